"""A network in a safetensors file: its layers in the header, its weights and statistics beside.

The container is that of :mod:`gpuconv.training.checkpoint`: a versioned header that is checked
before anything is believed, nothing executed, written whole or not at all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gpuconv.device import Device
from gpuconv.models.sequential import Sequential
from gpuconv.training import checkpoint

__all__ = ["load", "save"]

KIND = "network"


def save(model: Sequential, path: str | Path) -> None:
    """Write a network's layers, weights and running statistics.

    Optimizers, and what a training run needs to go on, are not part of the file.

    Parameters
    ----------
    model : Sequential
        One that has seen an input, or was built.
    path : str or Path
        Overwritten if it exists; ends in ``.safetensors`` by custom.

    Raises
    ------
    TypeError, ValueError
        If ``model`` is no network, or has no weights yet, or holds NaN or infinity.
    ImportError
        If safetensors is not installed.
    """
    if not isinstance(model, Sequential):
        raise TypeError(f"model is a {type(model).__name__}; expected a Sequential")
    shape, dtype = model.input_shape, model.dtype
    if shape is None or dtype is None:
        raise ValueError("model has no parameters yet; build() it first")
    tensors = model.tensors()
    for name, value in tensors.items():
        if not math.isfinite(float(value.astype("float64").sum())):
            raise ValueError(f"parameter {name} holds NaN or infinity; expected finite numbers")
    header = {"model": model.config(), "input_shape": list(shape), "dtype": dtype}
    checkpoint.write(path, KIND, header, tensors)


def load(path: str | Path, device: Device | str | None = None) -> Sequential:
    """Return the network of a file that :func:`save`, or a training run, wrote.

    Parameters
    ----------
    path : str or Path
        A network's file, or the ``model.safetensors`` of ``gpuconv train``.
    device : Device, str or None
        Where it computes.

    Raises
    ------
    ValueError
        If the file is truncated, corrupt, another program's or another version's, or does not
        hold what its header says; the text names the file and what is wrong.
    OSError
        If it is not there or cannot be read.
    """
    path = Path(path)
    header, tensors = checkpoint.read(path, (KIND, "model"))
    shape = header.get("input_shape", header.get("image_shape"))
    if not isinstance(shape, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape
    ):
        raise ValueError(f"{path}: input_shape is {shape!r}; expected positive integers")
    dtype: Any = header.get("dtype")
    try:
        model = Sequential.from_config(header.get("model", {}), device=device)
        model.build((1, *shape), dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the network it describes cannot be made: {error}") from error
    checkpoint.check_tensors(tensors, model.tensors(), path)
    model.load_tensors(tensors)
    return model
