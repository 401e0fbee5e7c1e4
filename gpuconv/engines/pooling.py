"""Maximum and mean over windows, with gradients: axis by axis, in blocks that stay in a cache.

A maximum or a sum over a window is one over its rows, then one over its columns: ``k + k``
passes over the block in the place of ``k * k``. Cells of the padding are never stored; a tap
that falls there has a shorter range.

Where a maximum lies is kept as the number of its tap, a byte, along the way: each axis takes
over what the one before found. In the end it becomes an index into the input, and the gradient
adds to the cells at these indices.

On a CUDA device the block is the whole array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv.device import namespace
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.windows import blocks

__all__ = ["Windows", "max_grad", "mean_grad", "pool", "pool_indices"]

Array = Any
Ints = tuple[int, ...]

#: Bytes of a block's input: with what is made of it, it stays in a core's cache.
BLOCK = 1024 * 1024


class Windows:
    """Where the windows of a pooling lie.

    Parameters
    ----------
    size, kernel, stride : tuple of int
        Per spatial axis.
    pads : tuple of (int, int)
        Cells of padding before and after.
    first : int
        The first spatial axis: 1 where channels are last, 2 where they are first.
    """

    def __init__(
        self, size: Ints, kernel: Ints, stride: Ints, pads: tuple[tuple[int, int], ...], first: int
    ) -> None:
        self.size, self.kernel, self.stride, self.first = size, kernel, stride, first
        self.before = tuple(before for before, _ in pads)
        self.out = tuple(
            (n + before + after - k) // s + 1
            for n, k, s, (before, after) in zip(size, kernel, stride, pads, strict=True)
        )

    def rows(self, start: int, stop: int) -> Windows:
        """Return the windows of some outputs on the first axis; the input stays whole."""
        part = object.__new__(Windows)
        part.__dict__.update(self.__dict__)
        part.before = (self.before[0] - start * self.stride[0], *self.before[1:])
        part.out = (stop - start, *self.out[1:])
        return part

    def taps(self, axis: int, count: int | None = None) -> list[tuple[slice, slice]]:
        """Return for each tap of an axis its outputs, and the cells that they read.

        ``count`` is the number of outputs, if it is not that of the windows.
        """
        s, n, before = self.stride[axis], self.size[axis], self.before[axis]
        out = self.out[axis] if count is None else count
        found = []
        for tap in range(self.kernel[axis]):
            low = max(0, -((tap - before) // s))
            high = max(low, min(out, (n - 1 + before - tap) // s + 1))
            start = low * s + tap - before
            found.append((slice(low, high), slice(start, start + (high - low) * s, s)))
        return found

    def counts(self, xp: Any) -> Array:
        """Return how many cells of the input each window has, to be broadcast over an output."""
        total = np.ones((1,) * self.first)
        for axis in range(len(self.size)):
            inside = np.zeros(self.out[axis])
            for outputs, _ in self.taps(axis):
                inside[outputs] += 1
            total = total[..., None] * inside
        return xp.asarray(total if self.first == 2 else total[..., None])


def _at(axis: int, part: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, part)


def _new(xp: Any, name: str, shape: Ints, dtype: Any) -> Array:
    """Return uninitialised memory: on the CPU a buffer of the thread's own."""
    return scratch.get(name, shape, dtype) if xp is np else xp.empty(shape, dtype)


# ----------------------------------------------------------------------------------- forward


def pool(x: Array, y: Array, w: Windows, mode: str, padded: str) -> None:
    """Write the maximum or the mean of every window into ``y``.

    Parameters
    ----------
    x, y : ndarray
        Input and result, ``(batch, *spatial, channels)`` or ``(batch, channels, *spatial)``.
    w : Windows
        Where they lie.
    mode : {"max", "average"}
        NaN in a window gives NaN in either.
    padded : {"zeros", "outside"}
        Whether the padding takes part as zeros or is not there.
    """
    xp = namespace(x)
    scale = _scale(xp, w, mode, padded, y.dtype)

    def work(images: slice, rows: tuple[int, int]) -> None:
        part = w.rows(*rows)
        source = x[images]
        target = y[(images, *_at(w.first, slice(*rows))[1:])]
        if source.dtype.itemsize == 2:
            source, part = _widened(xp, source, part)
        for axis in range(len(w.kernel)):
            final = axis == len(w.kernel) - 1
            shape = list(source.shape)
            shape[w.first + axis] = part.out[axis]
            direct = final and target.dtype == source.dtype
            into = target if direct else _new(xp, f"pool{axis % 2}", tuple(shape), source.dtype)
            _reduce(xp, source, into, part, axis, mode, padded)
            source = into
        if scale is not None:
            source *= scale if isinstance(scale, float) else scale[_at(w.first, slice(*rows))]
        if source is not target:
            target[...] = source

    _by_blocks(xp, x, w, w.out[0], work)


def _widened(xp: Any, source: Array, part: Windows) -> tuple[Array, Windows]:
    """Return the rows that a block reads in float32, and its windows over them."""
    low = max(0, -part.before[0])
    high = min(part.size[0], (part.out[0] - 1) * part.stride[0] - part.before[0] + part.kernel[0])
    rows = source[_at(part.first, slice(low, high))]
    wide = _new(xp, "pool", rows.shape, "float32")
    wide[...] = rows
    moved = part.rows(0, part.out[0])
    moved.size = (high - low, *part.size[1:])
    moved.before = (part.before[0] + low, *part.before[1:])
    return wide, moved


def _scale(xp: Any, w: Windows, mode: str, padded: str, dtype: Any) -> float | Array | None:
    """Return what sums are multiplied by."""
    if mode == "max":
        return None
    if padded == "zeros" or not any(
        outputs.stop - outputs.start < n
        for axis, n in enumerate(w.out)
        for outputs, _ in w.taps(axis)
    ):
        return 1 / math.prod(w.kernel)
    return (1 / w.counts(xp)).astype(wide_dtype(dtype.name))


def _reduce(
    xp: Any, source: Array, out: Array, w: Windows, axis: int, mode: str, padded: str
) -> None:
    """Combine the taps of one axis."""
    at = w.first + axis
    combine: Callable[..., Any] = xp.maximum if mode == "max" else xp.add
    whole, rest = [], []
    for outputs, cells in w.taps(axis):
        part = source[_at(at, cells)]
        if outputs.stop - outputs.start == w.out[axis]:
            whole.append(part)
        else:
            rest.append((outputs, part))
    if len(whole) > 1:
        combine(whole[0], whole[1], out=out)
    elif whole:
        out[...] = whole[0]
    else:
        out.fill(-math.inf if mode == "max" else 0)
    for part in whole[2:]:
        combine(out, part, out=out)
    for outputs, part in rest:
        if outputs.stop > outputs.start:
            target = out[_at(at, outputs)]
            combine(target, part, out=target)
        if mode == "max" and padded == "zeros":
            for end in (slice(0, outputs.start), slice(outputs.stop, None)):
                target = out[_at(at, end)]
                combine(target, 0, out=target)


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
    xp = namespace(x)
    steps = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
    inside = steps[w.first : w.first + len(w.kernel)]
    taps = itertools.product(*map(range, w.kernel))
    offsets = xp.asarray([sum(t * n for t, n in zip(tap, inside, strict=True)) for tap in taps])
    origins: dict[tuple[int, ...], Array] = {}

    def work(images: slice, rows: tuple[int, int]) -> None:
        part = w.rows(*rows)
        source, cell = x[images], (images, *_at(w.first, slice(*rows))[1:])
        if source.dtype.itemsize == 2:
            source, part = _widened(xp, source, part)
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
            found = _new(xp, "pool found", code.shape, offsets.dtype)
            np.take(offsets + start, code, out=found, mode="clip")
        else:
            found = (offsets + start)[code]
        xp.add(found, origin, out=indices[cell])

    _by_blocks(xp, x, w, w.out[0], work)


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
        value = _new(xp, f"pool{axis % 2}", tuple(shape), source.dtype)
        into = _new(xp, f"pool code{axis % 2}", tuple(shape), kind)
        taps = w.taps(axis)
        whole = [t for t, (r, _) in enumerate(taps) if r.stop - r.start == w.out[axis]]
        if whole:
            first = whole[0]
            start: Array | None = source[_at(at, taps[first][1])]
            into[...] = first * weight
            if code is not None:
                into += code[_at(at, taps[first][1])]
        else:
            first, start = len(taps), None
            value.fill(-math.inf)
            into.fill(0)
        # Backwards from there where a tie goes to the earlier tap, then forwards.
        for t in [*reversed(range(first)), *range(first + 1, len(taps))]:
            outputs, cells = (_at(at, part) for part in taps[t])
            if start is not None and t not in whole:
                value[...] = start
                start = None
            found, target, place = source[cells], value[outputs], into[outputs]
            if not found.size:
                continue
            best = target if start is None else start
            better = _new(xp, "pool better", found.shape, bool)
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
    other = _new(xp, "pool other", place.shape, place.dtype)
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


# ---------------------------------------------------------------------------------- gradients


def mean_grad(dy: Array, dx: Array, w: Windows, padded: str) -> None:
    """Write the gradient of a mean into ``dx``.

    Parameters
    ----------
    dy, dx : ndarray
        Gradients with respect to the result and to the input.
    w, padded
        As for :func:`pool`.
    """
    xp = namespace(dy)
    scale = _scale(xp, w, "average", padded, dy.dtype)
    s, before, k = w.stride[0], w.before[0], w.kernel[0]

    def work(images: slice, rows: tuple[int, int]) -> None:
        # The outputs whose windows reach into these rows of the input.
        low = min(w.out[0], max(0, -((k - 1 - before - rows[0]) // s)))
        high = max(low, min(w.out[0], (rows[1] - 1 + before) // s + 1))
        target = dx[(images, *_at(w.first, slice(*rows))[1:])]
        if high == low:
            target[...] = 0
            return
        inside = (images, *_at(w.first, slice(low, high))[1:])
        share = _new(xp, "pool share", dy[inside].shape, wide_dtype(dy.dtype.name))
        factor = scale if isinstance(scale, float) else scale[_at(w.first, slice(low, high))]  # type: ignore[index]
        xp.multiply(dy[inside], factor, out=share)
        _spread(xp, share, target, w.rows(low, high), rows)

    _by_blocks(xp, dx, w, w.size[0], work)


def max_grad(dy: Array, indices: Array, dx: Array) -> None:
    """Add every output's gradient to the cell of ``dx`` that ``indices`` names.

    Parameters
    ----------
    dy, indices : ndarray
        Gradient with respect to the result, and what :func:`pool_indices` found.
    dx : ndarray
        The gradient with respect to the input, contiguous.
    """
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


def _spread(xp: Any, share: Array, dx: Array, w: Windows, rows: tuple[int, int]) -> None:
    """Add every output's share to the cells of its window, columns first."""
    for axis in reversed(range(len(w.kernel))):
        at = w.first + axis
        final = axis == 0
        offset, size = (rows[0], rows[1] - rows[0]) if final else (0, w.size[axis])
        shape = list(share.shape)
        shape[at] = size
        direct = final and dx.dtype == share.dtype
        into = dx if direct else _new(xp, f"pool{axis % 2}", tuple(shape), share.dtype)
        part = w.rows(0, w.out[0])
        part.size = (*w.size[:axis], size, *w.size[axis + 1 :])
        part.before = (*w.before[:axis], w.before[axis] + offset, *w.before[axis + 1 :])
        taps = part.taps(axis)
        # The taps of one stride meet every cell once at most: what they meet needs no zero.
        apart = w.stride[axis]
        if sum(r.stop - r.start for r, _ in taps[:apart]) < size:
            into.fill(0)
        for t, (outputs, cells) in enumerate(taps):
            if outputs.stop > outputs.start:
                target = into[_at(at, cells)]
                if t < apart:
                    target[...] = share[_at(at, outputs)]
                else:
                    target += share[_at(at, outputs)]
        share = into
    if share is not dx:
        dx[...] = share


def _by_blocks(
    xp: Any, x: Array, w: Windows, rows: int, work: Callable[[slice, tuple[int, int]], None]
) -> None:
    """Call ``work`` for every block of images and of ``rows``, on the CPU a worker per core."""
    if xp is not np:
        work(slice(0, x.shape[0]), (0, rows))
        return
    line = max(1, x.size // x.shape[0] * wide_dtype(x.dtype.name).itemsize // rows)
    workers = worker_count(8 * x.size)

    def run(_: int, share: tuple[Any, ...]) -> None:
        for images, part in share:
            work(slice(*images), part)

    # Overlapping windows are read again at a block's edge: not less than some windows' rows.
    least = min(rows, 4 * w.kernel[0])
    run_shares(blocks((x.shape[0], rows), max(least, BLOCK // line), workers), run)
