"""Loops over windows, compiled: channels side by side, their vectors the innermost loop.

Arrays are ``(batch, depth, rows, columns, channels)``. A box is what a cell of the result is
made of: on each axis the cells from ``low`` to ``high``. In the forward pass it is a window
without its padding; in the gradient of a mean, the windows that a cell of the input is part of.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray
from numba.extending import register_jitable

from gpuconv.compiled.job_arrays import (
    STAMP,
    factor_table,
    five,
    five_bytes,
    line,
    table,
)
from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_memory import numbers_at
from gpuconv.engines.numba_team_loops import job

__all__ = ["NOBODY", "largest_job", "sums_job", "winners_job"]

#: The number of a winner that is a cell of the padding.
NOBODY = 255
#: Rows of windows that share the maxima of the input's rows.
BAND = 8
_NOBODY = np.uint8(NOBODY)


# Each loop takes a range of rows of its result, counted over all axes. low, high: (3, cells), bounds
# of boxes on the three axes; zeros: where the padding takes part in a maximum as zeros.


@kept()
def largest(x, y, low, high, zeros, start, stop):
    _, depth, rows, columns, channels = y.shape
    for row in range(start, stop):
        n, rest = row // (depth * rows), row % (depth * rows)
        d, h = rest // rows, rest % rows
        d0, d1, h0, h1 = low[0, d], high[0, d], low[1, h], high[1, h]
        for w in range(columns):
            w0, w1 = low[2, w], high[2, w]
            out = y[n, d, h, w]
            first = True
            for i in range(d0, d1):
                for j in range(h0, h1):
                    k = w0
                    if first and k < w1:
                        cell = x[n, i, j, k]
                        if k + 1 < w1:
                            other = x[n, i, j, k + 1]
                            for c in range(channels):
                                a, b = cell[c], other[c]
                                out[c] = b if (b > a) | (b != b) else a
                            k += 2
                        else:
                            for c in range(channels):
                                out[c] = cell[c]
                            k += 1
                        first = False
                    while k < w1:
                        cell = x[n, i, j, k]
                        if k + 1 < w1:
                            other = x[n, i, j, k + 1]
                            for c in range(channels):
                                a, b, m = cell[c], other[c], out[c]
                                m = a if (a > m) | (a != a) else m
                                out[c] = b if (b > m) | (b != b) else m
                            k += 2
                        else:
                            for c in range(channels):
                                a, m = cell[c], out[c]
                                out[c] = a if (a > m) | (a != a) else m
                            k += 1
            if first:
                for c in range(channels):
                    out[c] = 0
            elif zeros[0, d] | zeros[1, h] | zeros[2, w]:
                for c in range(channels):
                    out[c] = 0 if out[c] < 0 else out[c]


@register_jitable(inline="always")
def better(a, m):
    # A NaN is its window's maximum, the first of several.
    return (not (a <= m)) & (m == m)


@register_jitable(inline="always")
def along(source, at, best, mark, to, length, step, taps, number):
    # The maxima of ``taps`` cells a step apart, of ``length`` of them side by side, and which
    # they are, counted from ``number``, in as many bits as the maxima have: then one mask chooses
    # both. Indices without a sign need no look whether they count from the end, and slices for a
    # few channels would take longer than the channels.
    t, u, v = np.int32(number), np.int32(number + 1), np.int32(number + 2)
    if taps == 0:
        for e in range(length):
            best[np.uint64(to + e)], mark[np.uint64(to + e)] = -np.inf, t
    elif taps == 1:
        for e in range(length):
            best[np.uint64(to + e)], mark[np.uint64(to + e)] = source[np.uint64(at + e)], t
    elif taps == 2:
        second = at + step
        for e in range(length):
            m, a = source[np.uint64(at + e)], source[np.uint64(second + e)]
            b = better(a, m)
            best[np.uint64(to + e)] = a if b else m
            mark[np.uint64(to + e)] = u if b else t
    else:
        second, third = at + step, at + 2 * step
        for e in range(length):
            m, a = source[np.uint64(at + e)], source[np.uint64(second + e)]
            b = better(a, m)
            m, k = a if b else m, u if b else t
            a = source[np.uint64(third + e)]
            b = better(a, m)
            best[np.uint64(to + e)] = a if b else m
            mark[np.uint64(to + e)] = v if b else k
        for tap in range(3, taps):
            more, w = at + tap * step, np.int32(number + tap)
            for e in range(length):
                m, a = best[np.uint64(to + e)], source[np.uint64(more + e)]
                b = better(a, m)
                best[np.uint64(to + e)] = a if b else m
                mark[np.uint64(to + e)] = w if b else mark[np.uint64(to + e)]


@kept()
def winners(x, y, code, low, high, zeros, skipped, kernel, stride, start, stop):
    # skipped: (3, cells), taps of a window in front of the first cell inside. First of the
    # columns, for the rows that some windows share; then of the rows, over whole lines.
    _, depth, rows, columns, channels = y.shape
    width, most = columns * channels, (BAND - 1) * stride[1] + kernel[1]
    best = np.empty((kernel[0] * most, width), x.dtype)
    mark = np.empty((kernel[0] * most, width), np.int32)
    inner0 = 0  # columns whose windows are whole
    while inner0 < columns and high[2, inner0] - low[2, inner0] < kernel[2]:
        inner0 += 1
    inner1 = inner0
    while inner1 < columns and high[2, inner1] - low[2, inner1] == kernel[2]:
        inner1 += 1
    row = start
    while row < stop:
        n, rest = row // (depth * rows), row % (depth * rows)
        d, h = rest // rows, rest % rows
        last = min(h + BAND, rows, h + stop - row)
        row += last - h
        d0, d1, first_row, last_row = low[0, d], high[0, d], low[1, h], high[1, last - 1]
        for i in range(d0, d1):
            for j in range(first_row, last_row):
                slot = (i - d0) * most + j - first_row
                source, to, number = x[n, i, j].reshape(-1), best[slot], mark[slot]
                w = 0
                while w < columns:
                    cells, length = high[2, w] - low[2, w], channels
                    if w == inner0 and stride[2] == 1:
                        length *= inner1 - inner0
                    along(
                        source, low[2, w] * channels, to, number, w * channels, length,
                        channels, cells, skipped[2, w],
                    )  # fmt: skip
                    w += length // channels
        for hh in range(h, last):
            h0, h1 = low[1, hh], high[1, hh]
            out, winner = y[n, d, hh].reshape(-1), code[n, d, hh].reshape(-1)
            if d0 >= d1 or h0 >= h1:
                for e in range(width):
                    out[e], winner[e] = 0, _NOBODY
                continue
            after = np.int32(kernel[2])
            for i in range(d0, d1):
                j = h0
                while j < h1:
                    base = np.int32(
                        ((i - d0 + skipped[0, d]) * kernel[1] + j - h0 + skipped[1, hh]) * kernel[2]
                    )
                    slot = (i - d0) * most + j - first_row
                    one, number = best[slot], mark[slot]
                    first = (i == d0) & (j == h0)
                    if first and h1 - h0 == 1:
                        for e in range(width):
                            out[e], winner[e] = one[e], number[e] + base
                        j += 1
                    elif first and h1 - h0 == 2:
                        two, other = best[slot + 1], mark[slot + 1]
                        for e in range(width):
                            m, a = one[e], two[e]
                            b = better(a, m)
                            k = other[e] + after if b else number[e]
                            out[e], winner[e] = a if b else m, k + base
                        j += 2
                    elif first:
                        two, other = best[slot + 1], mark[slot + 1]
                        three, third = best[slot + 2], mark[slot + 2]
                        for e in range(width):
                            m, a = one[e], two[e]
                            b = better(a, m)
                            m, k = a if b else m, other[e] + after if b else number[e]
                            a = three[e]
                            b = better(a, m)
                            k = third[e] + 2 * after if b else k
                            out[e], winner[e] = a if b else m, k + base
                        j += 3
                    elif j + 1 < h1:
                        two, other = best[slot + 1], mark[slot + 1]
                        for e in range(width):
                            m, a, k = out[e], one[e], np.int32(winner[e])
                            b = better(a, m)
                            m, k = a if b else m, number[e] + base if b else k
                            a = two[e]
                            b = better(a, m)
                            k = other[e] + base + after if b else k
                            out[e], winner[e] = a if b else m, k
                        j += 2
                    else:
                        for e in range(width):
                            m, a, k = out[e], one[e], np.int32(winner[e])
                            b = better(a, m)
                            k = number[e] + base if b else k
                            out[e], winner[e] = a if b else m, k
                        j += 1
            for w in range(columns):
                if not (zeros[0, d] | zeros[1, hh] | zeros[2, w]):
                    continue
                # The first tap in the padding, in row-major order.
                if skipped[0, d] + skipped[1, hh] + skipped[2, w] > 0:
                    outside = 0
                elif high[2, w] - low[2, w] < kernel[2]:
                    outside = high[2, w] - low[2, w]
                elif h1 - h0 < kernel[1]:
                    outside = (h1 - h0) * kernel[2]
                else:
                    outside = (d1 - d0) * kernel[1] * kernel[2]
                for e in range(w * channels, (w + 1) * channels):
                    m = out[e]
                    if (m < 0) | ((m == 0) & (outside < winner[e])):
                        out[e], winner[e] = 0, _NOBODY


@kept()
def sums(source, target, low, high, weights, factors, start, stop):
    # weights: (3, cells) of the source; factors: (3, cells) of the result; multiplied. First the
    # rows of a box, over whole lines; then the columns of the line.
    _, depth, rows, columns, channels = target.shape
    _, source_depth, source_rows, source_columns, _ = source.shape
    flat, width = source.reshape(-1), source_columns * channels
    line = np.empty(width, source.dtype)
    for row in range(start, stop):
        n, rest = row // (depth * rows), row % (depth * rows)
        d, h = rest // rows, rest % rows
        d0, d1, h0, h1 = low[0, d], high[0, d], low[1, h], high[1, h]
        out = target[n, d, h].reshape(-1)
        factor = factors[0, d] * factors[1, h]
        some = False
        for i in range(d0, d1):
            image, deep = (n * source_depth + i) * source_rows, weights[0, i] * factor
            j = h0
            while j < h1:
                f, at = deep * weights[1, j], (image + j) * width
                if j + 1 < h1:
                    g, to = deep * weights[1, j + 1], (image + j + 1) * width
                    if some:
                        for e in range(width):
                            line[e] += flat[np.uint64(at + e)] * f + flat[np.uint64(to + e)] * g
                    else:
                        for e in range(width):
                            line[e] = flat[np.uint64(at + e)] * f + flat[np.uint64(to + e)] * g
                    j += 2
                else:
                    if some:
                        for e in range(width):
                            line[e] += flat[np.uint64(at + e)] * f
                    else:
                        for e in range(width):
                            line[e] = flat[np.uint64(at + e)] * f
                    j += 1
                some = True
        if not some:
            out[:] = 0
            continue
        for w in range(columns):
            k, w1, to = low[2, w], high[2, w], w * channels
            factor, at = factors[2, w], k * channels
            if w1 <= k:
                for e in range(channels):
                    out[np.uint64(to + e)] = 0
                continue
            f = weights[2, k] * factor
            if w1 - k == 1:
                for e in range(channels):
                    out[np.uint64(to + e)] = line[np.uint64(at + e)] * f
                continue
            g, by = weights[2, k + 1] * factor, at + channels
            if w1 - k == 2:
                for e in range(channels):
                    out[np.uint64(to + e)] = (
                        line[np.uint64(at + e)] * f + line[np.uint64(by + e)] * g
                    )
                continue
            p, on = weights[2, k + 2] * factor, by + channels
            for e in range(channels):
                out[np.uint64(to + e)] = (
                    line[np.uint64(at + e)] * f + line[np.uint64(by + e)] * g
                ) + line[np.uint64(on + e)] * p
            for m in range(k + 3, w1):
                f, at = weights[2, m] * factor, m * channels
                for e in range(channels):
                    out[np.uint64(to + e)] += line[np.uint64(at + e)] * f


# Jobs for compiled.run: a share is a range of rows, or of images. They take the arrays in the order
# in which their loop does, each as its address and its shape.


@cache
def largest_job() -> int:
    """Of x, y, low, high, zeros."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 21)
        rows = given[7] * given[8] * given[9]
        largest(
            five(given, 0), five(given, 6), table(given, 12), table(given, 15), table(given, 18),
            rows * share // count, rows * (share + 1) // count,
        )  # fmt: skip

    return job(run, STAMP)


@cache
def winners_job() -> int:
    """Of x, y, code, low, high, zeros, skipped, kernel, stride."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 34)
        rows = given[7] * given[8] * given[9]
        winners(
            five(given, 0), five(given, 6), five_bytes(given, 12), table(given, 18),
            table(given, 21), table(given, 24), table(given, 27), line(given, 30), line(given, 32),
            rows * share // count, rows * (share + 1) // count,
        )  # fmt: skip

    return job(run, STAMP)


@cache
def sums_job() -> int:
    """Of source, target, low, high, weights, factors."""

    def run(at, share, count, worker):
        given = carray(numbers_at(at), 24)
        rows = given[7] * given[8] * given[9]
        sums(
            five(given, 0), five(given, 6), table(given, 12), table(given, 15),
            factor_table(given, 18), factor_table(given, 21),
            rows * share // count, rows * (share + 1) // count,
        )  # fmt: skip

    return job(run, STAMP)
