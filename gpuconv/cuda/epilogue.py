"""The gradient in front of the epilogue, and of the bias: ``kernels/epilogue.cu``.

Arrays are seen channels last; those that lie channels first arrive as transposed views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import kernels, runtime
from gpuconv.cuda.prepared import NULL, prepared
from gpuconv.engines import base

__all__ = ["bias_grad", "example_bytes", "output_grad", "sample_variants", "vector_length"]

Array = Any

_DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Sizes at or beyond this are counted in 64 bits; the last strip may end beyond the size.
_WIDE_FROM = 2**31 - 2**27
_THREADS = 256
#: Rows that a thread sees at least, and blocks that there are at most, unless there are more
#: columns: enough to fill any GPU, and few rows of sums.
_ROWS, _BLOCKS = 4, 1024


def vector_length(itemsize: int, count: int, *arrays: Array) -> int:
    """Return how many elements may be moved at once: 16 bytes of them, or a half, a quarter ...

    Parameters
    ----------
    itemsize : int
        Bytes of an element.
    count : int
        Of neighbours in memory; the vectors do not go beyond them.
    *arrays
        Whose first addresses must be a multiple of a vector's bytes.
    """
    address = 16
    for array in arrays:
        address |= int(array.data.ptr)
    length = 16 // itemsize
    while count % length or address % (length * itemsize):
        length //= 2
    return length


@lru_cache(maxsize=256)
def _variant(
    dtype: str, length: int, wide_index: bool, activation: Activation | None
) -> kernels.Variant:
    defines = {"VEC": str(length), **kernels.activation_defines(activation)}
    if wide_index:
        defines["INDEX_64"] = "1"
    end = kernels.suffix(dtype)
    names = ("grad_last", "grad_first", "bias_sums")
    functions = tuple(f"epilogue_{name}_{end}" for name in names)
    return kernels.Variant("epilogue.cu", dtype, tuple(sorted(defines.items())), functions)


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants of every dtype, vector and index, with and without an activation."""
    relu = get_activation("ReLU")
    for dtype, itemsize in zip(_DTYPES, (4, 8, 2, 2), strict=True):
        yield _variant(dtype, 16 // itemsize, False, relu)
        yield _variant(dtype, 1, True, None)


@dataclass(frozen=True)
class _Launch:
    """What is the same for all arrays of a shape."""

    variant: kernels.Variant
    name: str
    grid: tuple[int, int]
    block: tuple[int, int]
    sizes: tuple[np.int64, ...]
    sum_dtype: str
    end: str


def _power(count: int, most: int) -> int:
    """Return the least power of two that is not below ``count``; ``most`` at most."""
    return min(most, 1 << max(0, count - 1).bit_length())


def _launch(
    dtype: str, shape: tuple[int, ...], first: bool, length: int, activation: Activation | None
) -> _Launch:
    """Return the launch for arrays of a shape (channels last) that lie channels ``first``."""
    batch, channels, positions = shape[0], shape[-1], math.prod(shape[1:-1])
    end = kernels.suffix(dtype)
    if first:
        rows, columns = batch * positions // length, channels
        block = (1, max(32, _power(rows, _THREADS)))
        tiles = channels
    else:
        rows, columns = batch * positions, channels // length
        lanes = _power(columns, 32)
        block = (lanes, _THREADS // lanes)
        tiles = -(-columns // lanes)
    strips = max(1, min(rows // (_ROWS * block[1]), _BLOCKS // tiles))
    strip = -(-rows // strips)
    strips = -(-rows // strip)
    counts = (batch, channels, positions, strip) if first else (rows, channels, strip)
    return _Launch(
        _variant(dtype, length, math.prod(shape) >= _WIDE_FROM, activation),
        f"epilogue_grad_{'first' if first else 'last'}_{end}",
        (tiles, strips),
        block,
        tuple(map(np.int64, counts)),
        "float64" if dtype == "float64" else "float32",
        end,
    )


def output_grad(
    dy: Array,
    y: Array | None,
    activation: Activation | None,
    db: Array | None,
    channels_first: bool,
) -> Array:
    """Return ``dz = dy * act'(z)``, the derivative taken from ``y = act(z)``; sums go into ``db``.

    One pass over the arrays, with :mod:`kernels/epilogue.cu`; what that cannot compute (an
    activation of the user's own) is computed by array operations.

    Parameters
    ----------
    dy, y : ndarray
        ``(n, *spatial, c)``, not empty; dense in the order of memory that ``channels_first``
        says, or they are copied.
    activation : Activation or None
        None for the identity: ``dy`` itself is returned.
    db : ndarray, optional
        ``(c,)``, dense: the sums of ``dz`` over all other axes.
    channels_first : bool
        Whether the result lies channels first; its view is channels last.
    """
    if activation is None or y is None:
        if db is not None:
            bias_grad(dy, db, channels_first)
        return dy
    arrays = dy, y, NULL if db is None else db
    return prepared(_gradient, (dy.shape, activation, channels_first), arrays)(*arrays)


def bias_grad(dz: Array, db: Array, channels_first: bool) -> None:
    """Write the sums of ``dz`` over all axes but the channels into ``db``."""
    prepared(_sums, (dz.shape, channels_first), (dz, db))(dz, db)


def example_bytes(
    dy: Array,
    y: Array | None,
    activation: Activation | None,
    db: Array | None,
    channels_first: bool,
) -> int:
    """Return the bytes that :func:`output_grad` uses for each example, ``dz`` and copies."""
    formed = activation is not None and y is not None
    if not formed and db is None:
        return 0
    read = [dy] if y is None or not formed else [dy, y]
    copies = [a for a in read if not _stored(a, channels_first).flags.c_contiguous]
    return int(math.prod(dy.shape[1:]) * dy.dtype.itemsize * (len(copies) + formed))


def _stored(view: Array, channels_first: bool) -> Array:
    return view.transpose(0, view.ndim - 1, *range(1, view.ndim - 1)) if channels_first else view


def _sums(
    shape: tuple[int, ...], first: bool, arrays: tuple[Array, Array], device: int
) -> Callable[..., None]:
    """Return what writes the sums of an array like the first into one like the second."""
    dz, db = arrays
    if dz.dtype.name not in _DTYPES or db.dtype != dz.dtype or not db.flags.c_contiguous:
        return base.bias_grad
    run = _pass(shape, first, (dz, NULL, NULL, db), None, device)
    return lambda dz, db: run(dz, NULL, NULL, db)


def _gradient(
    shape: tuple[int, ...],
    activation: Activation,
    first: bool,
    arrays: tuple[Array, Array, Array],
    device: int,
) -> Callable[..., Array]:
    """Return what makes ``dz`` of arrays like ``dy``, ``y`` and ``db`` or NULL."""
    xp, (dy, y, db) = runtime.cupy(), arrays
    dtype = dy.dtype
    if not kernels.has_activation(activation) or dtype.name not in _DTYPES:

        def by_operations(dy: Array, y: Array, db: Array) -> Array:
            dz = base.epilogue_grad(dy, y, activation)
            if db is not NULL:
                bias_grad(dz, db, first)
            return dz

        return by_operations
    stored = _stored(dy, first).shape
    run = _pass(shape, first, (dy, y, xp.empty(stored, dtype), db), activation, device)
    order = (0, *range(2, dy.ndim), 1) if first else None

    def by_kernel(dy: Array, y: Array, db: Array) -> Array:
        dz = xp.empty(stored, dtype)
        run(dy, y, dz, db)
        return dz if order is None else dz.transpose(order)

    return by_kernel


def _pass(
    shape: tuple[int, ...],
    first: bool,
    arrays: tuple[Array, Array, Array, Array],
    activation: Activation | None,
    device: int,
) -> Callable[[Array, Array, Array, Array], None]:
    """Return what launches the pass over ``dy``, ``y``, ``dz``, ``db`` and, of several strips, the sums.

    ``dz`` is dense as it is stored, the others are seen channels last; those that are not there
    are NULL.
    """
    xp = runtime.cupy()
    *read, dz, db = arrays
    copies = [a is not NULL and not _stored(a, first).flags.c_contiguous for a in read]

    def dense(array: Array, copy: bool) -> Array:
        return xp.ascontiguousarray(_stored(array, first)) if copy else array

    arrays = (*map(dense, read, copies), dz, db)
    count = math.prod(shape[1:-1]) if first else shape[-1]
    there = [a for a in arrays[:3] if a is not NULL]
    length = vector_length(there[0].dtype.itemsize, count, *there)
    plan = _launch(there[0].dtype.name, shape, first, length, activation)
    launch = kernels.prepare(plan.variant, plan.name, device, plan.grid, plan.block, plan.sizes)
    strips = plan.grid[1]
    if db is NULL or strips == 1:

        def whole(dy: Array, y: Array, dz: Array, db: Array) -> None:
            launch(dense(dy, copies[0]), dense(y, copies[1]), dz, NULL, db)

        return whole
    add = kernels.prepare(
        plan.variant, f"epilogue_bias_sums_{plan.end}", device, (-(-shape[-1] // 32),), (32, 8),
        (np.int32(strips), np.int64(shape[-1])),
    )  # fmt: skip
    parts_shape, sum_dtype = (strips, shape[-1]), plan.sum_dtype

    def in_strips(dy: Array, y: Array, dz: Array, db: Array) -> None:
        parts = xp.empty(parts_shape, sum_dtype)
        launch(dense(dy, copies[0]), dense(y, copies[1]), dz, parts, db)
        add(parts, db)

    return in_strips
