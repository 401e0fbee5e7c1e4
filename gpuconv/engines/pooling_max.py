"""Where the maxima of windows are, and the gradient that goes there.

The place of a maximum is kept as the number of its tap, a byte, along the way: each axis takes
over what the one before found. In the end it becomes an index into the input, and the gradient
adds to the cells at these indices.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from gpuconv.compiled import pooling as fast
from gpuconv.device import namespace
from gpuconv.engines.im2col import run_shares, wide_dtype, worker_count
from gpuconv.engines.pooling import Windows, at_axis, by_blocks, new, widened
from gpuconv.engines.windows import blocks

__all__ = ["max_grad", "pool_indices"]

Array = Any
Ints = tuple[int, ...]


def pool_indices(x: Array, y: Array, indices: Array, w: Windows) -> None:
    """Write the maximum of every window into ``y``, and where it is into ``indices``.

    Cells of the padding take no part. Of several cells that share a maximum the first in
    row-major order is named; a NaN is the maximum of its window.

    Parameters
    ----------
    x, y, w
        As for :func:`pool`.
    indices : ndarray
        int64, of the shape of ``y``, contiguous: into the cells of ``x`` in C order.
    """
    if fast.pool_indices(x, y, indices, w):
        return
    xp = namespace(x)
    steps = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    inside = steps[w.first : w.first + len(w.kernel)]
    taps = itertools.product(*map(range, w.kernel))
    offsets = xp.asarray([sum(t * n for t, n in zip(tap, inside, strict=True)) for tap in taps])
    origins: dict[tuple[int, ...], Array] = {}

    def work(images: slice, rows: tuple[int, int]) -> None:
        part = w.rows(*rows)
        source, cell = x[images], (images, *at_axis(w.first, slice(*rows))[1:])
        if source.dtype.itemsize == 2:
            source, part = widened(xp, source, part)
        # On a GPU a look at the numbers would wait for the device: there the general way at once.
        plain = xp is np
        value, code = _largest(xp, source, part, plain)
        if plain and not math.isfinite(np.dot(value.reshape(-1), value.reshape(-1))):
            value, code = _largest(xp, source, part, False)
        y[cell] = value
        start = (images.start or 0) * steps[0] + rows[0] * w.stride[0] * inside[0]
        origin = origins.get(value.shape)
        if origin is None:
            origin = origins[value.shape] = _origins(xp, value.shape, steps, w)
        if xp is np:
            found = new(xp, "pool found", code.shape, offsets.dtype)
            np.take(offsets + start, code, out=found, mode="clip")
        else:
            found = (offsets + start)[code]
        xp.add(found, origin, out=indices[cell])

    by_blocks(xp, x, w, w.out[0], work)


def _origins(xp: Any, shape: Ints, steps: list[int], w: Windows) -> Array:
    """Return the index of each window's first cell, for a block at the start of the input."""
    origin = xp.zeros((1,) * len(shape), "int64")
    for axis, (count, step) in enumerate(zip(shape, steps, strict=True)):
        spatial = 0 <= axis - w.first < len(w.kernel)
        stride = w.stride[axis - w.first] if spatial else 1
        before = w.before[axis - w.first] if spatial else 0
        along = (xp.arange(count) * stride - before) * step
        origin = origin + along.reshape(-1, *(1,) * (len(shape) - axis - 1))
    return origin


def _largest(xp: Any, source: Array, w: Windows, plain: bool) -> tuple[Array, Array]:
    """Return the maxima of a block's windows and the numbers of their taps.

    ``plain``: there is no NaN. A NaN is not less than anything, and nothing is more.
    """
    kind = "uint8" if math.prod(w.kernel) <= 256 else "int64"
    code: Array | None = None
    weight = 1
    for axis in reversed(range(len(w.kernel))):
        at = w.first + axis
        shape = list(source.shape)
        shape[at] = w.out[axis]
        value = new(xp, f"pool{axis % 2}", tuple(shape), source.dtype)
        into = new(xp, f"pool code{axis % 2}", tuple(shape), kind)
        taps = w.taps(axis)
        whole = [t for t, (r, _) in enumerate(taps) if r.stop - r.start == w.out[axis]]
        if whole:
            first = whole[0]
            start: Array | None = source[at_axis(at, taps[first][1])]
            into[...] = first * weight
            if code is not None:
                into += code[at_axis(at, taps[first][1])]
        else:
            first, start = len(taps), None
            value.fill(-math.inf)
            into.fill(0)
        # Backwards from there where a tie goes to the earlier tap, then forwards.
        for t in [*reversed(range(first)), *range(first + 1, len(taps))]:
            outputs, cells = (at_axis(at, part) for part in taps[t])
            if start is not None and t not in whole:
                value[...] = start
                start = None
            found, target, place = source[cells], value[outputs], into[outputs]
            if not found.size:
                continue
            best = target if start is None else start
            better = new(xp, "pool better", found.shape, bool)
            (xp.greater_equal if t < first else xp.greater)(found, best, out=better)
            if not plain:
                better |= (found != found) & ((best == best) | (t < first))
            xp.maximum(best, found, out=target)
            start = None
            _choose(xp, place, better, t * weight, None if code is None else code[cells])
        if start is not None:
            value[...] = start
        source, code = value, into
        weight *= w.kernel[axis]
    assert code is not None
    return source, code


def _choose(xp: Any, place: Array, better: Array, number: int, code: Array | None) -> None:
    """Put ``number`` plus ``code`` into ``place`` where it is better; bit by bit, which is quick."""
    other = new(xp, "pool other", place.shape, place.dtype)
    if code is None:
        other.fill(number)
    else:
        xp.add(code, xp.asarray(number, place.dtype), out=other)
    if place.dtype != "uint8":
        place[...] = xp.where(better, other, place)
        return
    other ^= place
    mask = better.view("uint8")
    xp.negative(mask, out=mask)
    other &= mask
    place ^= other


def max_grad(dy: Array, indices: Array, dx: Array) -> None:
    """Add every output's gradient to the cell of ``dx`` that ``indices`` names.

    Parameters
    ----------
    dy, indices : ndarray
        Gradient with respect to the result, and what :func:`pool_indices` found.
    dx : ndarray
        The gradient with respect to the input, contiguous.
    """
    if fast.scatter(dy, indices, dx):
        return
    xp = namespace(dy)
    wide = wide_dtype(dx.dtype.name)
    total = dx if dx.dtype == wide else xp.empty(dx.shape, wide)
    flat = total.reshape(-1)

    def work(_: int, share: tuple[Any, ...]) -> None:
        for (images,) in share:
            part = slice(*images)
            total[part] = 0
            values = xp.ascontiguousarray(dy[part]).reshape(-1).astype(wide, copy=False)
            xp.add.at(flat, xp.ascontiguousarray(indices[part]).reshape(-1), values)

    if xp is np:
        workers = worker_count(16 * dy.size)
        run_shares(blocks((dy.shape[0],), dy.shape[0], workers), work)
    else:
        work(0, (((0, dy.shape[0]),),))
    if total is not dx:
        dx[...] = total
