"""Adds up the parts of sums that were divided among blocks: ``kernels/split_sum.cu``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import kernels

__all__ = ["prepare", "sample_variants"]

#: Results counted in 32 bits: a thread's count goes past the end by all threads of the launch.
_MOST_NARROW = 2**31 - 2**24


@lru_cache(maxsize=256)
def _variant(dtype: str, wide_index: bool, activation: Activation | None) -> kernels.Variant:
    defines = dict(kernels.activation_defines(activation))
    if wide_index:
        defines["INDEX_64"] = "1"
    name = f"conv_split_sum_{kernels.suffix(dtype)}"
    return kernels.Variant("split_sum.cu", dtype, tuple(sorted(defines.items())), (name,))


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants of every dtype, and of both widths of offsets."""
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        yield _variant(dtype, dtype == "float64", get_activation("ReLU"))


def _result(shape: tuple[int, ...], strides: tuple[int, ...], wide: bool) -> Any:
    """Return ``Result`` of the kernel."""
    index = np.int64 if wide else np.int32
    made = np.zeros(1, np.dtype([("size", np.int32, (5,)), ("stride", index, (5,))], align=True))
    missing = 5 - len(shape)
    made["size"] = (*(1,) * missing, *shape)
    made["stride"] = (*(0,) * missing, *strides)
    return made


def prepare(
    dtype: str,
    shape: tuple[int, ...],
    strides: Sequence[int],
    count: int,
    wide: bool,
    device: int,
    activation: Activation | None = None,
) -> Callable[..., None]:
    """Return what writes ``act(sum of parts + bias)``, or adds the sum of parts to a total.

    Parameters
    ----------
    dtype : str
        Of the result. The parts are of the dtype that its sums are held in, each dense.
    shape : tuple of int
        Of the result, up to five axes, the channels last.
    strides : sequence of int
        Of the result, in elements.
    count : int
        Number of parts.
    wide : bool
        Whether offsets need 64 bits.
    device : int
    activation : Activation, optional

    Returns
    -------
    callable
        Takes four arrays: parts; bias or NULL; result; the total of the parts' dtype that takes
        the place of the result, or NULL.
    """
    wide = wide or math.prod(shape) > _MOST_NARROW
    variant = _variant(dtype, wide, activation)
    return kernels.prepare(
        variant,
        variant.functions[0],
        device,
        (kernels.grid_for(math.prod(shape), device),),
        (kernels.BLOCK,),
        (_result(shape, tuple(strides), wide), np.int32(count)),
    )
