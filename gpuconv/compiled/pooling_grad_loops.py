"""The gradient of max pooling, compiled; arrays and tables as in :mod:`.pooling_loops`."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray

from gpuconv.compiled.job_arrays import (
    STAMP,
    factor_table,
    five,
    five_bytes,
    five_numbers,
    line,
    table,
)
from gpuconv.compiled.pooling_loops import NOBODY
from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_memory import numbers_at
from gpuconv.engines.numba_team_loops import job

__all__ = ["hand_down_job", "indices_job", "scatter_job", "strew_job"]

_NOBODY, _ZERO = np.uint8(NOBODY), np.float32(0)


@kept()
def hand_down(dy, code, dx, low, skipped, part_low, part_high, kernel, stride, start, stop):
    # Row by row of dx: each cell asks the windows that it is part of, in their order.
    _, depth, rows, columns, _ = dx.shape
    for row in range(start, stop):
        n, rest = row // (depth * rows), row % (depth * rows)
        d, h = rest // rows, rest % rows
        line = dx[n, d, h].reshape(-1)
        if stride[2] == 1:
            line_of_neighbours(
                dy, code, line, n, d, h, low, skipped, part_low, part_high, kernel, columns
            )
        else:
            line_of_cells(dy, code, line, n, d, h, low, skipped, part_low, part_high, kernel)


@kept()
def line_of_neighbours(dy, code, line, n, d, h, low, skipped, part_low, part_high, kernel, columns):
    # Windows a cell apart: all that have won with one tap, over the whole line.
    windows, channels = dy.shape[3], dy.shape[4]
    line[:] = 0
    for i in range(part_low[0, d], part_high[0, d]):
        deep = d - low[0, i] + skipped[0, i]
        for j in range(part_low[1, h], part_high[1, h]):
            base = (deep * kernel[1] + h - low[1, j] + skipped[1, j]) * kernel[2]
            gradient, mark = dy[n, i, j].reshape(-1), code[n, i, j].reshape(-1)
            for k in range(kernel[2] - 1, -1, -1):
                ahead, tap = k - skipped[2, 0], np.int32(base + k)
                w = max(0, -ahead)
                at, to = w * channels, (w + ahead) * channels
                for e in range((min(windows, columns - ahead) - w) * channels):
                    won = np.int32(mark[np.uint64(at + e)]) == tap
                    line[np.uint64(to + e)] += gradient[np.uint64(at + e)] if won else _ZERO


@kept()
def line_of_cells(dy, code, line, n, d, h, low, skipped, part_low, part_high, kernel):
    # Windows further apart: each cell asks the few that it is part of.
    _, deep, high, wide, channels = dy.shape
    gradient, mark = dy.reshape(-1), code.reshape(-1)
    rows = (part_high[0, d] - part_low[0, d]) * (part_high[1, h] - part_low[1, h])
    start, base = np.empty(max(1, rows), np.int64), np.empty(max(1, rows), np.int64)
    row = 0
    for i in range(part_low[0, d], part_high[0, d]):
        first = (d - low[0, i] + skipped[0, i]) * kernel[1]
        for j in range(part_low[1, h], part_high[1, h]):
            start[row] = ((n * deep + i) * high + j) * wide * channels
            base[row] = (first + h - low[1, j] + skipped[1, j]) * kernel[2]
            row += 1
    for w in range(line.size // channels):
        first, last, to = part_low[2, w], part_high[2, w], w * channels
        if rows == 0 or first >= last:
            for e in range(channels):
                line[np.uint64(to + e)] = 0
        for row in range(rows):
            for k in range(first, last):
                at = start[np.uint64(row)] + k * channels
                tap = np.int32(base[np.uint64(row)] + w - low[2, k] + skipped[2, k])
                if (row == 0) & (k == first):
                    for e in range(channels):
                        v = gradient[np.uint64(at + e)]
                        won = np.int32(mark[np.uint64(at + e)]) == tap
                        line[np.uint64(to + e)] = v if won else _ZERO
                else:
                    for e in range(channels):
                        v = gradient[np.uint64(at + e)]
                        won = np.int32(mark[np.uint64(at + e)]) == tap
                        line[np.uint64(to + e)] += v if won else _ZERO


@kept()
def strew(dy, code, dx, places, offsets, channels_from, channels_to, n):
    # Each window adds to the cell that won: one number after the other, however large windows are.
    # places: (3, cells), elements from the image's first cell to a window's first tap; offsets:
    # from there to each tap.
    _, depth, rows, columns, _ = dy.shape
    image = dx[n].reshape(-1)
    dx[n, :, :, :, channels_from:channels_to] = 0
    for d in range(depth):
        for h in range(rows):
            for w in range(columns):
                base = places[0, d] + places[1, h] + places[2, w]
                mark, gradient = code[n, d, h, w], dy[n, d, h, w]
                for c in range(channels_from, channels_to):
                    if mark[c] != _NOBODY:
                        image[np.uint64(base + offsets[mark[c]] + c)] += gradient[c]


@kept()
def scatter(dy, indices, dx, start, stop):
    for n in range(start, stop):
        into = dx[n]
        into[:] = 0
        base = n * into.size
        gradient, index = dy[n], indices[n]
        for i in range(gradient.size):
            into[np.uint64(index[i] - base)] += gradient[i]


@kept()
def indices(code, found, places, offsets, image, start, stop):
    _, depth, rows, columns, channels = code.shape
    for row in range(start, stop):
        n, rest = row // (depth * rows), row % (depth * rows)
        d, h = rest // rows, rest % rows
        for w in range(columns):
            base = n * image + places[0, d] + places[1, h] + places[2, w]
            mark, index = code[n, d, h, w], found[n, d, h, w]
            for c in range(channels):
                index[c] = base + offsets[mark[c]] + c


# Jobs for compiled.run: a share is a range of rows, or of images. They take the arrays in the order
# in which their loop does, each as its address and its shape.


@cache
def hand_down_job() -> int:
    """Of dy, code, dx, low, skipped, part_low, part_high, kernel, stride."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 34)
        rows = given[13] * given[14] * given[15]
        hand_down(
            five(given, 0), five_bytes(given, 6), five(given, 12), table(given, 18),
            table(given, 21), table(given, 24), table(given, 27), line(given, 30), line(given, 32),
            rows * share // count, rows * (share + 1) // count,
        )  # fmt: skip

    return job(run, STAMP)


@cache
def strew_job() -> int:
    """Of dy, code, dx, places, offsets and the parts of an image: a share is one of them."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 24)
        parts, channels = given[23], given[17]
        n, part = share // parts, share % parts
        strew(
            five(given, 0), five_bytes(given, 6), five(given, 12), table(given, 18), line(given, 21),
            channels * part // parts, channels * (part + 1) // parts, n,
        )  # fmt: skip

    return job(run, STAMP)


@cache
def scatter_job() -> int:
    """Of dy, indices, dx, an image a line."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 9)
        scatter(
            factor_table(given, 0), table(given, 3), factor_table(given, 6), share, share + 1
        )  # fmt: skip

    return job(run, STAMP)


@cache
def indices_job() -> int:
    """Of code, found, places, offsets and the elements of an image."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 18)
        rows = given[1] * given[2] * given[3]
        indices(
            five_bytes(given, 0), five_numbers(given, 6), table(given, 12), line(given, 15),
            given[17], rows * share // count, rows * (share + 1) // count,
        )  # fmt: skip

    return job(run, STAMP)
