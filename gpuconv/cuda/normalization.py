"""Batch normalisation on a GPU: ``kernels/batch_norm.cu``, a matrix with a channel a column."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import kernels, runtime

__all__ = ["column_statistics", "columns_grad", "normalized_columns", "sample_variants"]

Array = Any

_NULL = np.uintp(0)
_DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Sizes at or beyond this are counted in 64 bits; the grid's stride may go beyond the size.
_WIDE_FROM = 2**31 - 2**27
_LANES, _WARPS = 32, 8
#: The rows that a strip has at least, and the strips that there are at most.
_STRIP, _STRIPS = 64, 512


@lru_cache(maxsize=256)
def _variant(dtype: str, wide_index: bool, activation: Activation | None) -> kernels.Variant:
    defines = dict(kernels.activation_defines(activation))
    if wide_index:
        defines["INDEX_64"] = "1"
    end = kernels.suffix(dtype)
    names = ("moments", "normalize", "grad_sums", "grad")
    functions = tuple(f"batch_norm_{name}_{end}" for name in names)
    return kernels.Variant("batch_norm.cu", dtype, tuple(sorted(defines.items())), functions)


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants of every dtype and index, with and without an activation."""
    for dtype in _DTYPES:
        yield _variant(dtype, False, get_activation("ReLU"))
        yield _variant(dtype, True, None)


def _sum_dtype(x: Array) -> str:
    return "float32" if x.dtype.itemsize == 2 else str(x.dtype)


def _launch(
    name: str, x: Array, activation: Activation | None, arrays: tuple[Any, ...], *, sums: bool
) -> Any:
    """Launch over a matrix; return the strips' results and their numbers of rows for sums."""
    xp = runtime.cupy()
    device = int(xp.cuda.runtime.getDevice())
    rows, columns = x.shape
    variant = _variant(str(x.dtype), x.size >= _WIDE_FROM, activation)
    name = f"batch_norm_{name}_{kernels.suffix(str(x.dtype))}"
    if not sums:
        grid: tuple[int, ...] = (kernels.grid_for(x.size, device),)
        sizes: tuple[Any, ...] = (np.int64(x.size), np.int64(columns))
        kernels.launch(variant, name, device, grid, (kernels.BLOCK,), (*arrays, *sizes))
        return None
    strip = max(_STRIP, -(-rows // _STRIPS))
    strips = -(-rows // strip)
    parts = xp.empty((strips, 2, columns), _sum_dtype(x))
    sizes = (np.int64(rows), np.int64(columns), np.int64(strip))
    grid = (-(-columns // _LANES), strips)
    kernels.launch(variant, name, device, grid, (_LANES, _WARPS), (*arrays, parts, *sizes))
    return parts, strip


def column_statistics(x: Array) -> tuple[Array, Array]:
    """Return mean and variance of every column; see :mod:`gpuconv.normalization`."""
    xp = runtime.cupy()
    rows = len(x)
    parts, strip = _launch("moments", x, None, (x,), sums=True)
    counts = np.full(len(parts), strip)
    counts[-1] = rows - strip * (len(parts) - 1)
    weight = xp.asarray((counts / rows).astype(parts.dtype))[:, None]
    mean = (weight * parts[:, 0]).sum(axis=0)
    spread = (weight * xp.square(parts[:, 0] - mean)).sum(axis=0)
    return mean, parts[:, 1].sum(axis=0) / rows + spread


def normalized_columns(
    x: Array, mean: Array, factor: Array, offset: Array, activation: Activation | None
) -> Array:
    """Return ``act((x - mean) * factor + offset)``."""
    y = runtime.cupy().empty(x.shape, x.dtype)
    values = _values(x, mean, factor, offset)
    _launch("normalize", x, activation, (x, *values, y), sums=False)
    return y


def columns_grad(
    dy: Array,
    x: Array,
    y: Array | None,
    activation: Activation | None,
    mean: Array,
    inverse: Array,
    scaler: Array,
    moving: bool,
    needs_x: bool,
) -> tuple[Array | None, Array, Array]:
    """Return the gradients for ``x``, scaler and intercept."""
    xp = runtime.cupy()
    rows = max(len(x), 1)
    mean, inverse, scaler = _values(x, mean, inverse, scaler)
    images = (dy, _NULL if y is None else y, x)
    parts, _ = _launch("grad_sums", x, activation, (*images, mean), sums=True)
    products, dintercept = parts.sum(axis=0)
    dscaler = products * inverse
    if not needs_x:
        return None, dscaler, dintercept
    share = 1 / rows if moving else 0.0
    changes = (scaler * inverse, inverse * dscaler * -share, dintercept * -share)
    dx = xp.empty(x.shape, x.dtype)
    _launch("grad", x, activation, (*images, mean, *_values(x, *changes), dx), sums=False)
    return dx, dscaler, dintercept


def _values(x: Array, *values: Array) -> list[Array]:
    xp = runtime.cupy()
    return [xp.ascontiguousarray(v.astype(_sum_dtype(x), copy=False)) for v in values]
