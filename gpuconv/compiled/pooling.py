"""Pooling of dense arrays whose channels are last, by the loops of :mod:`.pooling_loops`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gpuconv import compiled, memory

__all__ = ["max_grad", "mean_grad", "pool", "pool_indices", "pool_max", "scatter"]

Array = Any
Ints = tuple[int, ...]
#: Bytes of a chunk's input.
CHUNK = 512 * 1024
#: Fewer channels than this do not fill a vector: NumPy's way is along the columns then.
LEAST_CHANNELS = 8
#: Rows of a box from which on NumPy's way, one axis after the other, takes fewer steps.
MOST_ROWS = 48
#: Taps of a window whose number is a byte, and none of them the padding's.
MOST_WINNERS = 255
#: Windows that a cell is part of, from which on it is not asked which of them it has won.
MOST_ASKED = 16
#: Bytes of an image of cells that stays in a core's cache while windows strew into it.
STREWN = 256 * 1024
#: Windows that a cell is part of, from which on a maximum of rows' maxima takes fewer steps.
MOST_READ = 3


class Tables(NamedTuple):
    """Where windows lie, on three axes: each ``(3, cells)``."""

    low: Array
    high: Array
    #: Whether the padding takes part.
    zeros: Array
    #: Taps in front of the first cell inside.
    skipped: Array
    #: Windows that a cell of the input is part of: the first, and behind the last.
    part_low: Array
    part_high: Array
    #: One over the cells that a mean is over.
    shares: Array
    #: Elements from an image's first cell to a window's first tap, and from there to each tap.
    places: Array
    offsets: Array
    kernel: Array
    stride: Array


@lru_cache(maxsize=64)
def _tables(
    size: Ints, kernel: Ints, stride: Ints, before: Ints, out: Ints, padded: str, channels: int
) -> Tables:
    missing = 3 - len(size)
    size, kernel, stride, out = ((1,) * missing + t for t in (size, kernel, stride, out))
    before = (0,) * missing + before
    outs, ins = max(out), max(size)
    low, high, skipped, places = (np.zeros((3, outs), np.int64) for _ in range(4))
    zeros, shares = np.zeros((3, outs), np.int64), np.ones((3, outs))
    part_low, part_high = np.zeros((3, ins), np.int64), np.zeros((3, ins), np.int64)
    step = channels
    offsets = np.zeros((1,), np.int64)
    for axis in reversed(range(3)):
        n, k, s, b, count = size[axis], kernel[axis], stride[axis], before[axis], out[axis]
        first = np.arange(count) * s - b
        low[axis, :count] = np.clip(first, 0, n)
        high[axis, :count] = np.clip(first + k, 0, n)
        skipped[axis, :count] = low[axis, :count] - first
        inside = high[axis, :count] - low[axis, :count]
        zeros[axis, :count] = (inside < k) & (padded == "zeros")
        shares[axis, :count] = 1 / (k if padded == "zeros" else np.maximum(inside, 1))
        cells = np.arange(n)
        part_low[axis, :n] = np.clip(-((k - 1 - b - cells) // s), 0, count)
        part_high[axis, :n] = np.clip((cells + b) // s + 1, 0, count)
        places[axis, :count] = first * step
        offsets = (np.arange(k)[:, None] * step + offsets).reshape(-1)
        step *= n
    return Tables(
        low, high, zeros, skipped, part_low, part_high, shares, places, offsets,
        np.array(kernel), np.array(stride),
    )  # fmt: skip


def _found(w: Any, padded: str, channels: int) -> Tables:
    return _tables(
        tuple(w.size), tuple(w.kernel), tuple(w.stride), tuple(w.before), tuple(w.out), padded, channels
    )  # fmt: skip


def _takes(w: Any, x: Array, *others: Array) -> bool:
    """Return whether the loops take the arrays."""
    return (
        x.size >= compiled.SMALL
        and w.first == 1
        and x.shape[-1] >= LEAST_CHANNELS
        and compiled.available()
        and compiled.plain(x, *others)
    )


def _five(a: Array) -> Array:
    """Return an array with three spatial axes."""
    return a.reshape(a.shape[0], *(1,) * (5 - a.ndim), *a.shape[1:])


def _by_rows(job: int, result: Array, read: Array, arguments: Sequence[Any]) -> None:
    """Run a job whose shares are rows of a result."""
    rows = math.prod(result.shape[:3])
    shares = max(1, min(rows, -(-max(read.nbytes, result.nbytes) // CHUNK)))
    compiled.run(job, arguments, shares, result.size + read.size >= compiled.PARALLEL)


def pool(x: Array, y: Array, w: Any, mode: str, padded: str) -> bool:
    """Do what its namesake of :mod:`gpuconv.engines.pooling` does; return whether it could."""
    if not _takes(w, x, y):
        return False
    if mode == "average" and math.prod(w.kernel[:-1]) > MOST_ROWS:
        return False
    if (
        mode == "max"
        and len(w.kernel) > 1
        and math.prod(w.kernel) > MOST_READ * math.prod(w.stride)
    ):
        return False

    from gpuconv.compiled import pooling_loops as loops

    t, x, y = _found(w, padded, x.shape[-1]), _five(x), _five(y)
    if mode == "max":
        _by_rows(loops.largest_job(), y, x, (x, y, t.low, t.high, t.zeros))
        return True
    ones = np.ones((3, max(x.shape[1:4])), y.dtype)
    shares = t.shares.astype(y.dtype, copy=False)
    _by_rows(loops.sums_job(), y, x, (x, y, t.low, t.high, ones, shares))
    return True


def mean_grad(dy: Array, dx: Array, w: Any, padded: str) -> bool:
    """Do what its namesake of :mod:`gpuconv.engines.pooling` does; return whether it could."""
    if not _takes(w, dx, dy) or math.prod(w.kernel[:-1]) > MOST_ROWS * math.prod(w.stride[:-1]):
        return False

    from gpuconv.compiled import pooling_loops as loops

    t, dy, dx = _found(w, padded, dx.shape[-1]), _five(dy), _five(dx)
    ones = np.ones((3, max(dx.shape[1:4])), dx.dtype)
    shares = t.shares.astype(dx.dtype, copy=False)
    _by_rows(loops.sums_job(), dx, dy, (dy, dx, t.part_low, t.part_high, shares, ones))
    return True


def pool_max(x: Array, y: Array, w: Any, padded: str) -> Array | None:
    """Write the maxima into ``y``; return the winners' taps for :func:`max_grad`, or None."""
    if not _takes(w, x, y) or math.prod(w.kernel) > MOST_WINNERS:
        return None

    from gpuconv.compiled import pooling_loops as loops

    t, x, y = _found(w, padded, x.shape[-1]), _five(x), _five(y)
    code = memory.empty(y.shape, np.uint8)
    tables = t.low, t.high, t.zeros, t.skipped, t.kernel, t.stride
    _by_rows(loops.winners_job(), y, x, (x, y, code, *tables))
    return code


def max_grad(dy: Array, code: Array, dx: Array, w: Any) -> None:
    """Write the gradient of a maximum into ``dx``, dense as ``dy`` need not be."""
    from gpuconv.compiled import pooling_grad_loops as loops

    t = _found(w, "outside", dx.shape[-1])
    dy, dx = _five(np.ascontiguousarray(dy, dx.dtype)), _five(dx)
    if dx[0].nbytes <= STREWN or math.prod(w.kernel) > MOST_ASKED * math.prod(w.stride):
        # Windows of an image overlap, and its channels do not.
        batch, channels = len(dx), dx.shape[-1]
        parts = 1 if batch > 1 else min(4, max(1, channels // 16))
        compiled.run(
            loops.strew_job(),
            (dy, code, dx, t.places, t.offsets, parts),
            batch * parts,
            dx.size + dy.size >= compiled.PARALLEL,
        )
        return
    tables = t.low, t.skipped, t.part_low, t.part_high, t.kernel, t.stride
    _by_rows(loops.hand_down_job(), dx, dy, (dy, code, dx, *tables))


def pool_indices(x: Array, y: Array, indices: Array, w: Any) -> bool:
    """Do what its namesake of :mod:`gpuconv.engines.pooling_max` does; return whether it could."""
    code = pool_max(x, y, w, "outside")
    if code is None:
        return False

    from gpuconv.compiled import pooling_grad_loops as loops

    t = _found(w, "outside", x.shape[-1])
    found = _five(indices)
    _by_rows(loops.indices_job(), found, code, (code, found, t.places, t.offsets, x[0].size))
    return True


def scatter(dy: Array, indices: Array, dx: Array) -> bool:
    """Add the gradients to the cells that indices name; return whether it could."""
    if dx.size < compiled.SMALL or not compiled.available():
        return False
    if not compiled.plain(dx, dy) or not indices.flags.c_contiguous:
        return False

    from gpuconv.compiled import pooling_grad_loops as loops

    batch = len(dx)
    given, places, into = (a.reshape(batch, -1) for a in (dy, indices, dx))
    compiled.run(loops.scatter_job(), (given, places, into), batch, dx.size >= compiled.PARALLEL)
    return True
