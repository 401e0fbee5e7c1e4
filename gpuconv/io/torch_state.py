"""Weights in PyTorch's layout and names: ``state_dict`` in and out.

PyTorch holds images channels first and weights output channel first; what is flattened comes out
in another order, so the layer behind a :class:`~gpuconv.layers.Flatten` has its inputs put in
order too.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.device import asnumpy
from gpuconv.dtypes import known_dtype
from gpuconv.layers import (
    BatchNorm1D,
    Conv1D,
    Conv2D,
    Deconv2D,
    Dropout,
    Flatten,
    FullyConnected,
    LayerNorm1D,
    LayerNorm2D,
)
from gpuconv.models.sequential import Sequential
from gpuconv.training.files import write_bytes

__all__ = ["from_state_dict", "load_state_dict", "save_state_dict", "to_state_dict"]

Values = np.ndarray[Any, Any]
#: PyTorch's axes, as positions of ours.
_AXES: dict[tuple[type, str], tuple[int, ...]] = {
    (Conv1D, "W"): (2, 1, 0),
    (Conv2D, "W"): (3, 2, 0, 1),
    (Deconv2D, "W"): (2, 3, 0, 1),
    (FullyConnected, "W"): (1, 0),
    (LayerNorm2D, "scaler"): (2, 0, 1),
    (LayerNorm2D, "intercept"): (2, 0, 1),
}
_NAMES = {
    "W": "weight",
    "b": "bias",
    "scaler": "weight",
    "intercept": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}
#: Layers of vectors, whose inputs' order is the one they were flattened in.
_VECTORS = (FullyConnected, BatchNorm1D, LayerNorm1D)
#: PyTorch's count of a normalisation's batches; nothing here follows from it.
_COUNT = "num_batches_tracked"


class _Entry:
    """A parameter, and how PyTorch names it and holds it."""

    def __init__(self, ours: str, theirs: str, kind: type, name: str, order: Values | None) -> None:
        self.ours, self.theirs = ours, theirs
        self._axes, self._order, self._flat = _AXES.get((kind, name)), order, name == "b"

    def outward(self, value: Values) -> Values:
        """Return the value as PyTorch holds it."""
        if self._order is not None:
            value = value[self._order]
        if self._axes is not None:
            value = value.transpose(self._axes)
        return np.ascontiguousarray(value.reshape(-1) if self._flat else value)

    def inward(self, value: Values, shape: tuple[int, ...], dtype: Any) -> Values:
        """Return PyTorch's value as it is held here, in an array of this shape and dtype."""
        want = self.outward(np.empty(shape, np.uint8)).shape
        if value.shape != want:
            raise ValueError(
                f"state_dict's {self.theirs} has shape {value.shape}; expected {want}, as {self.ours}"
            )
        if self._axes is not None:
            value = value.transpose(np.argsort(self._axes))
        if self._order is not None:
            back = np.empty_like(value)
            back[self._order] = value
            value = back
        return np.ascontiguousarray(value.reshape(shape), dtype)


def _entries(model: Sequential, names: Mapping[str, str] | None) -> list[_Entry]:
    if not isinstance(model, Sequential):
        raise TypeError(f"model is a {type(model).__name__}; expected a Sequential")
    shape = model.input_shape
    if shape is None:
        raise ValueError("model has no parameters yet; build() it first")
    if names is not None and not isinstance(names, Mapping):
        raise TypeError(f"names is a {type(names).__name__}; expected a mapping of text")
    names = names or {}
    found: list[_Entry] = []
    places: set[str] = set()
    current: tuple[int, ...] = (1, *shape)
    order: Values | None = None
    for k, layer in enumerate(model.layers):
        plain: Any = layer
        while isinstance(plain, Dropout):
            plain = plain._base_layer
        if isinstance(plain, Flatten):
            order = _flat_order(current) if plain.keep_dim == "first" else None
        for name, leaf in layer.leaves():
            place = f"{k}.{name}" if name else str(k)
            places.add(place)
            prefix = names.get(place, place)
            for key in leaf.parameters:
                rows = order if isinstance(leaf, _VECTORS) and key != "b" else None
                theirs = f"{prefix}.{_NAMES[key]}" if prefix else _NAMES[key]
                found.append(_Entry(f"{place}.{key}", theirs, type(leaf), key, rows))
        if isinstance(plain, FullyConnected):
            order = None
        current = layer.output_shape(current)
    unknown = sorted(set(names) - places)
    if unknown:
        raise ValueError(f"names holds {unknown}; expected some of {sorted(places)}")
    return found


def _flat_order(shape: tuple[int, ...]) -> Values | None:
    """Return where PyTorch's features are among ours, behind a Flatten of images of ``shape``."""
    if len(shape) < 3:
        return None
    cells = np.arange(math.prod(shape[1:])).reshape(shape[1:])
    return np.moveaxis(cells, -1, 0).reshape(-1)


def to_state_dict(model: Sequential, names: Mapping[str, str] | None = None) -> dict[str, Values]:
    """Return a network's parameters as PyTorch names them and holds them.

    Parameters
    ----------
    model : Sequential
        One that has seen an input, or was built.
    names : mapping of str to str, optional
        PyTorch's module by the number of our layer, such as ``{"0": "conv1", "4": "fc"}``; of a
        module's component by ``"<number>.<component>"``. What is left out keeps our name, which
        is that of a ``torch.nn.Sequential`` with as many parts.

    Returns
    -------
    dict
        ``weight``, ``bias`` and, of batch normalisation, ``running_mean`` and ``running_var`` of
        every module: NumPy arrays, kernels as (out, in, rows, columns).

    Raises
    ------
    TypeError, ValueError
        If ``model`` has no parameters yet, or ``names`` names what is not there.
    """
    own = model.parameters if isinstance(model, Sequential) else {}
    state: dict[str, Values] = {}
    for entry in _entries(model, names):
        if entry.theirs in state:
            raise ValueError(f"names gives {entry.theirs} twice; expected each module once")
        state[entry.theirs] = entry.outward(asnumpy(own[entry.ours]))
    return state


def from_state_dict(
    model: Sequential, state: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> Sequential:
    """Replace a network's parameters by those of a ``state_dict``, and return the network.

    Parameters
    ----------
    model : Sequential
        One that has seen an input, or was built.
    state : mapping
        What PyTorch's ``state_dict()`` returns, or the like of NumPy arrays; converted to the
        network's dtype. A ``bias`` that PyTorch's module does not have is set to zero.
    names : mapping of str to str, optional
        See :func:`to_state_dict`.

    Raises
    ------
    TypeError, ValueError
        If names or shapes do not fit, or ``state`` has more; nothing is changed then.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}; expected a state_dict")
    entries = _entries(model, names)
    own = model.parameters
    rest = {k for k in state if k.rpartition(".")[2] != _COUNT}
    tensors: dict[str, Values] = {}
    for entry in entries:
        like = own[entry.ours]
        if entry.theirs not in state and entry.ours.endswith(".b"):
            tensors[entry.ours] = np.zeros(tuple(like.shape), like.dtype)
            continue
        if entry.theirs not in state:
            raise ValueError(f"state lacks {entry.theirs}; expected it for {entry.ours}")
        rest.discard(entry.theirs)
        value = _numbers(entry.theirs, state[entry.theirs])
        tensors[entry.ours] = entry.inward(value, tuple(like.shape), like.dtype)
    if rest:
        raise ValueError(f"state holds {sorted(rest)}, for which the model has no place")
    model.load_tensors(tensors)
    return model


def _numbers(name: str, value: Any) -> Values:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no such dtype
            value = value.float()
        value = value.numpy()
    array = asnumpy(value)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"state's {name} has dtype {array.dtype}; expected floating point")
    return array


def save_state_dict(
    model: Sequential, path: str | Path, names: Mapping[str, str] | None = None
) -> None:
    """Write a network's parameters as a file that PyTorch loads.

    Parameters
    ----------
    model, names
        See :func:`to_state_dict`.
    path : str or Path
        ``.safetensors``, or for ``torch.load`` any other, which needs PyTorch.

    Raises
    ------
    TypeError, ValueError
        As :func:`to_state_dict`.
    ImportError
        If PyTorch, or safetensors, is not installed.
    """
    path, state = Path(path), to_state_dict(model, names)
    if path.suffix == ".safetensors":
        write_bytes(path, importlib.import_module("safetensors.numpy").save(state))
        return
    torch = importlib.import_module("torch")
    torch.save({name: _tensor(torch, value) for name, value in state.items()}, path)


def _tensor(torch: Any, value: Values) -> Any:
    if value.dtype.name == "bfloat16":  # of which PyTorch knows NumPy's bits alone
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def load_state_dict(
    model: Sequential, path: str | Path, names: Mapping[str, str] | None = None
) -> Sequential:
    """Replace a network's parameters by those of a file, and return the network.

    Nothing in the file is executed: PyTorch reads it with ``weights_only``.

    Parameters
    ----------
    model, names
        See :func:`from_state_dict`.
    path : str or Path
        ``.safetensors``, or what ``torch.save(module.state_dict(), path)`` wrote.

    Raises
    ------
    TypeError, ValueError
        If the file is not one, or does not fit the network; nothing is changed then.
    ImportError, OSError
        If PyTorch is needed and not installed; if the file cannot be read.
    """
    path = Path(path)
    with open(path, "rb"):  # a missing file is said by its name
        pass
    if path.suffix == ".safetensors":
        return from_state_dict(model, _from_safetensors(path), names)
    torch = importlib.import_module("torch")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no file of torch.save, or truncated: {error}") from error
    return from_state_dict(model, state, names)


def _from_safetensors(path: Path) -> dict[str, Values]:
    package = importlib.import_module("safetensors")
    state: dict[str, Values] = {}
    try:
        with package.safe_open(path, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping: it has keys() alone)
                if opened.get_slice(name).get_dtype() == "BF16":
                    known_dtype("bfloat16")
                state[name] = opened.get_tensor(name)
    except ImportError:
        raise
    except Exception as error:  # its own class, which is not imported here
        raise ValueError(f"{path} is no safetensors file, or truncated: {error}") from error
    return state
