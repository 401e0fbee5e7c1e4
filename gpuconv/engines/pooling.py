"""Maximum and mean over windows, with gradients: axis by axis, in blocks that stay in a cache.

A maximum or a sum over a window is one over its rows, then one over its columns: ``k + k``
passes over the block in the place of ``k * k``. Cells of the padding are never stored; a tap
that falls there has a shorter range.

On a CUDA device the block is the whole array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv.compiled import pooling as fast
from gpuconv.device import namespace
from gpuconv.dtypes import is_half
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.windows import blocks

__all__ = ["Windows", "at_axis", "by_blocks", "mean_grad", "new", "pool", "reduce_axis", "widened"]

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


def at_axis(axis: int, part: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, part)


def new(xp: Any, name: str, shape: Ints, dtype: Any) -> Array:
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
    if fast.pool(x, y, w, mode, padded):
        return
    xp = namespace(x)
    scale = _scale(xp, w, mode, padded, y.dtype)

    def work(images: slice, rows: tuple[int, int]) -> None:
        part = w.rows(*rows)
        source = x[images]
        target = y[(images, *at_axis(w.first, slice(*rows))[1:])]
        if is_half(source):
            source, part = widened(xp, source, part)
        for axis in range(len(w.kernel)):
            final = axis == len(w.kernel) - 1
            shape = list(source.shape)
            shape[w.first + axis] = part.out[axis]
            direct = final and target.dtype == source.dtype
            into = target if direct else new(xp, f"pool{axis % 2}", tuple(shape), source.dtype)
            reduce_axis(xp, source, into, part, axis, mode, padded)
            source = into
        if scale is not None:
            source *= scale if isinstance(scale, float) else scale[at_axis(w.first, slice(*rows))]
        if source is not target:
            target[...] = source

    by_blocks(xp, x, w, w.out[0], work)


def widened(xp: Any, source: Array, part: Windows) -> tuple[Array, Windows]:
    """Return the rows that a block reads in float32, and its windows over them."""
    low = max(0, -part.before[0])
    high = min(part.size[0], (part.out[0] - 1) * part.stride[0] - part.before[0] + part.kernel[0])
    rows = source[at_axis(part.first, slice(low, high))]
    wide = new(xp, "pool", rows.shape, "float32")
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


def reduce_axis(
    xp: Any, source: Array, out: Array, w: Windows, axis: int, mode: str, padded: str
) -> None:
    """Write the maximum or the sum of the taps of one axis into ``out``; see :func:`pool`."""
    at = w.first + axis
    combine: Callable[..., Any] = xp.maximum if mode == "max" else xp.add
    whole, rest = [], []
    for outputs, cells in w.taps(axis):
        part = source[at_axis(at, cells)]
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
            target = out[at_axis(at, outputs)]
            combine(target, part, out=target)
        if mode == "max" and padded == "zeros":
            for end in (slice(0, outputs.start), slice(outputs.stop, None)):
                target = out[at_axis(at, end)]
                combine(target, 0, out=target)


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
    if fast.mean_grad(dy, dx, w, padded):
        return
    xp = namespace(dy)
    scale = _scale(xp, w, "average", padded, dy.dtype)
    s, before, k = w.stride[0], w.before[0], w.kernel[0]

    def work(images: slice, rows: tuple[int, int]) -> None:
        # The outputs whose windows reach into these rows of the input.
        low = min(w.out[0], max(0, -((k - 1 - before - rows[0]) // s)))
        high = max(low, min(w.out[0], (rows[1] - 1 + before) // s + 1))
        target = dx[(images, *at_axis(w.first, slice(*rows))[1:])]
        if high == low:
            target[...] = 0
            return
        inside = (images, *at_axis(w.first, slice(low, high))[1:])
        share = new(xp, "pool share", dy[inside].shape, wide_dtype(dy.dtype.name))
        factor = scale if isinstance(scale, float) else scale[at_axis(w.first, slice(low, high))]  # type: ignore[index]
        if is_half(dy):  # as a half times a number is a half in CuPy
            share[...] = dy[inside]
            share *= factor
        else:
            xp.multiply(dy[inside], factor, out=share)
        _spread(xp, share, target, w.rows(low, high), rows)

    by_blocks(xp, dx, w, w.size[0], work)


def _spread(xp: Any, share: Array, dx: Array, w: Windows, rows: tuple[int, int]) -> None:
    """Add every output's share to the cells of its window, columns first."""
    for axis in reversed(range(len(w.kernel))):
        at = w.first + axis
        final = axis == 0
        offset, size = (rows[0], rows[1] - rows[0]) if final else (0, w.size[axis])
        shape = list(share.shape)
        shape[at] = size
        direct = final and dx.dtype == share.dtype
        into = dx if direct else new(xp, f"pool{axis % 2}", tuple(shape), share.dtype)
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
                target = into[at_axis(at, cells)]
                if t < apart:
                    target[...] = share[at_axis(at, outputs)]
                else:
                    target += share[at_axis(at, outputs)]
        share = into
    if share is not dx:
        dx[...] = share


def by_blocks(
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
