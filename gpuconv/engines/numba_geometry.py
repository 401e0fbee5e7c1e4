"""Where a direct convolution reads and writes: what :mod:`gpuconv.engines.numba_loops` takes.

Outputs are classed by the taps that fall inside the image. Every class has its list of
segments, runs of taps and channels that lie side by side in the image as in the filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv.engines.numba_arrays import up
from gpuconv.engines.windows import Axis

__all__ = ["CHUNK", "SUM_PIXELS", "Geometry", "geometry", "inside"]

Array = np.ndarray[Any, Any]

#: Steps of a sum for which a block's filters stay in a core's own cache beside the image.
CHUNK = 768
#: Outputs that are computed before the next block of filters is read.
PIXELS = 256
#: Pixels that the weight gradient sums over at a time: a block's gradients stay in the first cache.
SUM_PIXELS = 112
#: Pixels of a row, where an image is as good as one long row (a multiple of tiles' heights).
LINE = 84


def _classes(axis: Axis) -> list[tuple[int, int, int, int]]:
    """Return (first, last output, first, last tap) of runs of outputs with the same taps."""
    found: list[tuple[int, int, int, int]] = []
    for i in range(axis.count):
        at = i * axis.stride + axis.start
        low = max(0, up(-at, axis.dilation))
        high = min(axis.taps, up(axis.size - at, axis.dilation))
        low, high = (low, high) if low < high else (0, 0)
        if found and found[-1][2:] == (low, high):
            found[-1] = (found[-1][0], i + 1, low, high)
        else:
            found.append((i, i + 1, low, high))
    return found


def _outputs(classes: list[tuple[int, int, int, int]]) -> Array:
    return np.array([c[:2] for c in classes], np.int64)


@lru_cache(maxsize=1024)
def inside(axes: tuple[Axis, ...]) -> float:
    """Return which share of all taps falls into the image."""
    return math.prod(
        sum((b - a) * (t1 - t0) for a, b, t0, t1 in _classes(axis)) / (axis.count * axis.taps)
        for axis in axes
    )


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a gather reads and writes, for the compiled loops; distances are bytes."""

    origin: int  # from the source's first number to what output 0 reads by tap 0
    steps: Array
    places: Array
    counts: Array
    depth_classes: Array
    row_classes: Array
    column_classes: Array
    combos: Array
    chunks: Array
    segments: Array
    taps: Array
    tap_steps: Array
    ranges_d: Array
    ranges_h: Array
    entries: Array
    rows_at_once: int
    sum_rows: int

    @cached_property
    def rows(self) -> int:
        """All rows of outputs."""
        return int(np.prod(self.counts))

    @cached_property
    def job(self) -> Array:
        """All of this as the jobs of :mod:`gpuconv.engines.numba_loops` read it."""
        numbers: list[Any] = [*self.steps, *self.places, *self.counts, self.rows_at_once]
        for table in (self.depth_classes, self.row_classes, self.column_classes):
            numbers += [table.ctypes.data, len(table)]
        numbers += [self.combos.ctypes.data, self.chunks.ctypes.data, len(self.chunks)]
        numbers += [self.segments.ctypes.data, *self.taps, *self.tap_steps]
        numbers += [self.ranges_d.ctypes.data, self.ranges_h.ctypes.data]
        numbers += [self.entries.ctypes.data, len(self.entries), self.sum_rows]
        return np.array(numbers, np.int64)


def _three(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return (*(Axis(1, 1, 1, 1, 1, 0),) * (3 - len(axes)), *axes)


def _four(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides over n, d, h, w of ``(n, *spatial)``."""
    return (strides[0], *(0,) * (4 - len(strides)), *strides[1:])


def _even(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether all pixels are evenly spaced."""
    step, extent = strides[-1], 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != step * extent:
            return False
        extent *= n
    return True


@lru_cache(maxsize=512)
def geometry(
    axes: tuple[Axis, ...],
    batch: int,
    source_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    channels: int,
    groups: int,
    width: int,
    size: int,
    workers: int,
) -> Geometry:
    """Return what the loops take.

    Parameters
    ----------
    axes : tuple of Axis
        Over the spatial axes.
    batch : int
    source_strides, target_strides : tuple of int
        Bytes, over ``(n, *spatial)``.
    channels, groups : int
        Input channels of a group; groups.
    width : int
        Output channels of a group.
    size : int
        Bytes of a number.
    workers : int
    """
    spatial = tuple(a.count for a in axes)
    plain = all(a.taps == 1 and a.stride == 1 and a.start == 0 and a.count == a.size for a in axes)
    shape = (batch, *spatial)
    if plain and _even(shape, source_strides) and _even(shape, target_strides):
        return _lines(
            math.prod(shape), source_strides[-1], target_strides[-1], channels, width, size, workers
        )
    three = _three(axes)
    s, t = _four(source_strides), _four(target_strides)
    steps = (s[0], *(a.stride * b for a, b in zip(three, s[1:], strict=True)))
    tap_steps = tuple(a.dilation * b for a, b in zip(three, s[1:], strict=True))
    origin = sum(a.start * b for a, b in zip(three, s[1:], strict=True))
    classes = [_classes(a) for a in three]
    # The taps of a row lie side by side with their channels: one run.
    merged = groups == 1 and tap_steps[2] == channels * size
    combos = np.zeros((*map(len, classes), 2), np.int64)
    chunks: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int]] = []
    for index in np.ndindex(*combos.shape[:3]):
        (d0, d1), (h0, h1), (w0, w1) = (c[k][2:] for c, k in zip(classes, index, strict=True))
        runs = [
            (o, p, q, (w1 - w0) * channels if merged else channels)
            for o in range(d0, d1)
            for p in range(h0, h1)
            for q in ((w0,) if merged and w1 > w0 else range(w0, w1))
        ]
        first_chunk, first, held = len(chunks), len(segments), 0
        for o, p, q, length in runs:
            at = o * tap_steps[0] + p * tap_steps[1] + q * tap_steps[2]
            step = ((o * three[1].taps + p) * three[2].taps + q) * channels
            for begin in range(0, length, CHUNK):
                part = min(CHUNK, length - begin)
                if held and held + part > CHUNK:
                    chunks.append((first, len(segments) - first))
                    first, held = len(segments), 0
                segments.append((at + begin * size, step + begin, part))
                held += part
        chunks.append((first, len(segments) - first))
        combos[index] = first_chunk, len(chunks) - first_chunk
    if merged:
        entries = [c for c in classes[2] if c[3] > c[2]]
    else:
        entries = []
        for q in range(three[2].taps):
            inside = [c for c in classes[2] if c[2] <= q < c[3]]
            if inside:
                entries.append((inside[0][0], inside[-1][1], q, q + 1))
    pieces = [(a, b, q0, q1) for w0, w1, q0, q1 in entries for a, b in _cut(w0, w1, SUM_PIXELS)]
    return Geometry(
        origin,
        np.array(steps),
        np.array(t),
        np.array((batch, *(a.count for a in three[:2]))),
        _outputs(classes[0]),
        _outputs(classes[1]),
        _outputs(classes[2]),
        combos,
        np.array(chunks, np.int64),
        np.array(segments, np.int64).reshape(-1, 3),
        np.array([a.taps for a in three]),
        np.array(tap_steps),
        _ranges(classes[0], three[0].taps),
        _ranges(classes[1], three[1].taps),
        np.array([(*e, 0, three[1].count) for e in pieces], np.int64).reshape(-1, 6),
        max(1, PIXELS // three[2].count),
        max(1, SUM_PIXELS // three[2].count),
    )


def _lines(
    pixels: int, source: int, target: int, channels: int, width: int, size: int, workers: int
) -> Geometry:
    """Return the geometry of a product of matrices, in rows of ``LINE`` pixels and a rest."""
    line = min(LINE, up(pixels, workers))
    rows, rest = up(pixels, line), pixels - (up(pixels, line) - 1) * line
    # Rows are whole but for the last, which may be a class of its own.
    full = rows - 1 if rest < line else rows
    row_classes = [(0, full)] * (full > 0) + [(full, rows)] * (full < rows)
    column_classes = [(0, rest), (rest, line)] if rest < line else [(0, line)]
    chunks = [(k, 1) for k in range(up(channels, CHUNK))]
    segments = [
        (k * CHUNK * size, k * CHUNK, min(CHUNK, channels - k * CHUNK)) for k in range(len(chunks))
    ]
    combos = np.zeros((1, len(row_classes), len(column_classes), 2), np.int64)
    combos[...] = 0, len(chunks)
    if rest < line:
        combos[0, -1, 1] = 0, 0
    one = np.array([1, 1, 1])
    return Geometry(
        0,
        np.array([0, 0, line * source, source]),
        np.array([0, 0, line * target, target]),
        np.array([1, 1, rows]),
        np.array([(0, 1)], np.int64),
        np.array(row_classes, np.int64),
        np.array(column_classes, np.int64),
        combos,
        np.array(chunks, np.int64),
        np.array(segments, np.int64),
        one,
        np.zeros(3, np.int64),
        np.array([(0, 1)], np.int64),
        np.array([(0, rows)], np.int64),
        np.array(
            [(0, line, 0, 1, 0, full)] * (full > 0) + [(0, rest, 0, 1, full, rows)] * (full < rows),
            np.int64,
        ),
        max(1, PIXELS // line),
        max(1, SUM_PIXELS // line),
    )


def _cut(first: int, last: int, most: int) -> list[tuple[int, int]]:
    """Divide a range into nearly equal ones of at most so many."""
    parts = max(1, up(last - first, most))
    bounds = [first + (last - first) * k // parts for k in range(parts + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _ranges(classes: list[tuple[int, int, int, int]], taps: int) -> Array:
    """Return the first and last output that meet each tap."""
    found = []
    for t in range(taps):
        inside = [c for c in classes if c[2] <= t < c[3]]
        found.append((inside[0][0], inside[-1][1]) if inside else (0, 0))
    return np.array(found, np.int64)
