"""A case: the arrays of one layer, with the results that every peer is checked against.

The case is made once, in a process of its own, and left in a folder as ``.npy`` files, so that
all peers compute on the same values. The reference is computed in float64 by PyTorch, or by the
plain im2col where PyTorch is not installed or the other would need too much memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plain
from benchmarks.suite import Shape

__all__ = ["Case", "compare", "make", "reference", "tolerance", "warm"]

Array = np.ndarray[Any, Any]

_INPUTS = ("x", "w", "b", "dy", "dz")
_RESULTS = ("y", "dx", "dw", "db")


@dataclass(frozen=True)
class Case:
    """The inputs of a layer, in its dtype, and the results, in float64.

    ``dy`` is the gradient behind the activation, ``dz`` the one before it (the same for a
    transposed layer, which has none). NHWC, HWIO.
    """

    shape: Shape
    x: Array
    w: Array
    b: Array | None
    dy: Array
    dz: Array
    expected: dict[str, Array]

    @property
    def relu(self) -> bool:
        """Whether the layer has a bias and ReLU."""
        return not self.shape.transposed

    def save(self, folder: Path) -> None:
        """Write it."""
        for name in _INPUTS:
            array = getattr(self, name)
            if array is not None:
                np.save(folder / f"{name}.npy", array)
        for name, array in self.expected.items():
            np.save(folder / f"expected_{name}.npy", array)

    @classmethod
    def load(cls, folder: Path, shape: Shape) -> Case:
        """Read what :meth:`save` wrote; the results are mapped, not read."""
        arrays = {
            name: np.load(path) if (path := folder / f"{name}.npy").exists() else None
            for name in _INPUTS
        }
        expected = {
            name: np.load(path, mmap_mode="r")
            for name in _RESULTS
            if (path := folder / f"expected_{name}.npy").exists()
        }
        return cls(shape=shape, expected=expected, **arrays)  # type: ignore[arg-type]


def make(shape: Shape, seed: int = 0) -> Case:
    """Return a case of random values.

    Weights are scaled so that outputs are of order one. Where the activation's argument is so
    close to zero that rounding could decide its sign, ``dy`` is zero: otherwise two correct
    results could differ by a whole gradient.
    """
    p = shape.problem
    random = np.random.default_rng(seed)
    wide = np.float64 if p.dtype == "float64" else np.float32

    def normal(size: tuple[int, ...], scale: float = 1.0) -> Array:
        values: Array = random.standard_normal(size, wide)
        values *= wide(scale)
        return values.astype(p.dtype, copy=False)

    x = normal(p.x_shape)
    w = normal(p.w_shape, (2 / p.reduction_length("forward")) ** 0.5)
    b = None if shape.transposed else normal((p.out_channels,), 0.1)
    dy = normal(p.y_shape)
    z, backward = reference(shape, x, w, b)
    y, dz = z, dy
    if not shape.transposed:
        dy[np.abs(z) < 1e-3 * max(float(np.abs(z).max(initial=0)), 1e-30)] = 0
        dz = dy * (z > 0)
        y = np.maximum(z, 0)
    dx, dw, db = backward(dz)
    expected = {"y": y, "dx": dx, "dw": dw}
    if db is not None:
        expected["db"] = db
    return Case(shape, x, w, b, dy, dz, expected)


def warm() -> None:
    """Import what :func:`reference` computes with, so that the first case does not wait for it."""
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch")


def reference(shape: Shape, x: Array, w: Array, b: Array | None) -> tuple[Array, Any]:
    """Return ``conv(x, w) + b`` in float64, and a function from ``dz`` to the three gradients."""
    p = shape.problem
    wide = [None if a is None else a.astype(np.float64) for a in (x, w, b)]
    if importlib.util.find_spec("torch") is not None:
        from benchmarks.peers import torch_reference

        return torch_reference(p, wide)
    if p.groups > 1:
        return _by_groups(shape, wide)
    x64, w64, b64 = wide
    if x64 is None or w64 is None:
        raise TypeError("x and w are needed")

    def backward(dz: Array) -> tuple[Array | None, ...]:
        return plain.im2col_backward(
            p, dz.astype(np.float64), x64, w64, "xw" if b is None else "xwb"
        )

    return plain.im2col_forward(p, x64, w64, b64, False), backward


def _by_groups(shape: Shape, wide: list[Array | None]) -> tuple[Array, Any]:
    """Return the same by a sum over taps, which serves every number of groups."""
    p = shape.problem
    x, w, b = wide
    if x is None or w is None:
        raise TypeError("x and w are needed")
    groups = p.groups
    padded = np.pad(x, ((0, 0), *p.padding, (0, 0)))
    split = w.reshape(*p.kernel, p.in_channels // groups, groups, p.out_channels // groups)

    def window(array: Array, tap: tuple[int, ...]) -> Array:
        """Return the elements of a padded array that one tap meets, groups apart."""
        parts = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, s, n in zip(tap, p.dilation, p.stride, p.out_shape, strict=True)
        )
        found = array[(slice(None), *parts)]
        return found.reshape(*found.shape[:-1], groups, -1)

    z = np.zeros((*p.y_shape[:-1], groups, p.out_channels // groups))
    for tap in np.ndindex(*p.kernel):
        z += np.einsum("nhwgi,igo->nhwgo", window(padded, tap), split[tap])
    z = z.reshape(p.y_shape)

    def backward(dz: Array) -> tuple[Array | None, ...]:
        d = dz.astype(np.float64).reshape(*dz.shape[:-1], groups, -1)
        dpadded, dw = np.zeros_like(padded), np.zeros_like(split)
        view = dpadded.reshape(*dpadded.shape[:-1], groups, -1)
        for tap in np.ndindex(*p.kernel):
            dw[tap] = np.einsum("nhwgi,nhwgo->igo", window(padded, tap), d)
            part = tuple(
                slice(t * e, t * e + (n - 1) * s + 1, s)
                for t, e, s, n in zip(tap, p.dilation, p.stride, p.out_shape, strict=True)
            )
            view[(slice(None), *part)] += np.einsum("nhwgo,igo->nhwgi", d, split[tap])
        (top, _), (left, _) = p.padding
        height, width = p.in_shape
        dx = dpadded[:, top : top + height, left : left + width]
        return dx, dw.reshape(w.shape), None if b is None else d.sum((0, 1, 2)).reshape(-1)

    return (z if b is None else z + b), backward


# ----------------------------------------------------------------------------- correctness


def tolerance(shape: Shape, result: str, factor: float = 1.0) -> float:
    """Return the error allowed, relative to the largest value of the result.

    In float64 1e-11, in float32 1e-5 times the square root of the sum's length.

    Parameters
    ----------
    shape : Shape
        The layer.
    result : {"y", "dx", "dw", "db"}
        Which result.
    factor : float
        On top; 10 for Winograd in float32.
    """
    p = shape.problem
    if p.dtype == "float64":
        return 1e-11
    pass_ = {"y": "forward", "dx": "input_grad"}.get(result, "weight_grad")
    return factor * 1e-5 * math.sqrt(p.reduction_length(pass_))


def compare(result: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest expected value; inf if it cannot be."""
    if result.shape != expected.shape:
        return float("inf")
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    error = float(np.abs(result.astype(np.float64) - expected).max(initial=0)) / scale
    return error if np.isfinite(error) else float("inf")
