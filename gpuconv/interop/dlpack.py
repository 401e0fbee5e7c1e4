"""Arrays of other libraries, through DLPack: no copy is made, and none of them is imported.

A library whose array we are given is imported already, so it is found where Python keeps its
modules. PyTorch's and JAX's arrays on the CPU are seen as NumPy arrays over the same memory,
those on a CUDA device as CuPy arrays; results go back the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv.cuda import runtime

__all__ = ["call", "speaks"]

Array = Any

_CPU, _CUDA = (1, 3, 11), (2, 13)  # DLPack's numbers of device kinds; pinned and managed memory


def speaks(array: Any) -> bool:
    """Return whether ``array`` can be exchanged by DLPack."""
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def call(function: Callable[..., Any], arrays: dict[str, Array | None]) -> Any:
    """Call ``function`` with the arrays as ours, and return its results as theirs.

    Parameters
    ----------
    function : callable
        Takes the arrays by their names; returns an array, None, or a tuple of these.
    arrays : dict of arrays or None
        All of one library. ``out``, where given, is written to and returned.

    Raises
    ------
    TypeError
        If they are of several libraries, or one cannot be exchanged.
    """
    library: str | None = None
    first = ""
    ours: dict[str, Array | None] = {}
    for name, array in arrays.items():
        if array is None:
            ours[name] = None
            continue
        its = type(array).__module__.partition(".")[0]
        if not speaks(array):
            raise TypeError(
                f"{name} is a {type(array).__name__}; expected an array of {library or 'NumPy'}"
            )
        if library is None:
            library, first = its, name
        elif its != library:
            raise TypeError(
                f"{first} is an array of {library} and {name} one of {its}; expected one library"
            )
        ours[name] = _ours(name, array)
    out = arrays.get("out")
    result = function(**ours)
    if out is not None:
        return out
    one = next(a for a in arrays.values() if a is not None)
    if isinstance(result, tuple):
        return tuple(_theirs(r, one) for r in result)
    return _theirs(result, one)


def _torch(array: Array) -> Any | None:
    """Return PyTorch, if ``array`` is its tensor."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def _ours(name: str, array: Array) -> Array:
    """Return the NumPy or CuPy array over the same memory."""
    torch = _torch(array)
    if torch is not None:
        if array.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires a gradient, which this call does not record; expected a "
                "detached tensor, or the differentiable calls of gpuconv.interop.torch"
            )
        array = array.detach().resolve_conj().resolve_neg()
    kind = int(array.__dlpack_device__()[0])
    if kind in _CPU:
        if torch is not None:
            if array.dtype == torch.bfloat16:  # which NumPy has no name for
                return array.view(torch.int16).numpy().view(_bfloat16())
            return array.numpy()
        source: Any = np.from_dlpack
    elif kind in _CUDA:
        source = runtime.cupy().from_dlpack
    else:
        raise TypeError(
            f"{name} is a {type(array).__name__} on DLPack's device kind {kind}; expected one on "
            "the CPU or a CUDA device"
        )
    try:
        return source(array)
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(array).__name__} that does not come: {error}") from None


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


def _theirs(array: Array | None, like: Array) -> Array | None:
    """Return the array of the library of ``like`` over the same memory."""
    if array is None:
        return None
    torch = _torch(like)
    if torch is not None:
        if array.dtype.name == "bfloat16":
            return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
        return torch.from_dlpack(array)
    space = getattr(like, "__array_namespace__", None)
    if space is None:
        name = type(like).__module__.partition(".")[0]
        return sys.modules[name].from_dlpack(array)
    return space().from_dlpack(array)
