"""The loops of :mod:`gpuconv.compiled.columns`, over ranges of lines."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import carray
from numba.extending import register_jitable

from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_memory import doubles_at, floats_at, numbers_at
from gpuconv.engines.numba_team_loops import job

__all__ = ["Jobs", "jobs"]

#: Lines whose sum is taken in the arrays' dtype.
LINES = 64


class Jobs(NamedTuple):
    """A share is some lines."""

    moments: int
    gradient_sums: int
    normalized: int
    gradient: int


@kept()
def moments(x, shift, total, start, stop):
    width = x.shape[1]
    sums, squares = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    line = start
    while line < stop:
        end = min(line + LINES, stop)
        sums[:], squares[:] = 0, 0
        while line + 4 <= end:
            a, b, c, d = x[line], x[line + 1], x[line + 2], x[line + 3]
            for i in range(width):
                p, q, r, s = a[i] - shift[i], b[i] - shift[i], c[i] - shift[i], d[i] - shift[i]
                sums[i] += (p + q) + (r + s)
                squares[i] += (p * p + q * q) + (r * r + s * s)
            line += 4
        while line < end:
            a = x[line]
            for i in range(width):
                p = a[i] - shift[i]
                sums[i] += p
                squares[i] += p * p
            line += 1
        for i in range(width):
            total[0, i] += sums[i]
            total[1, i] += squares[i]


@kept()
def gradient_sums(dy, x, shift, total, start, stop):
    width = x.shape[1]
    products, sums = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    line = start
    while line < stop:
        end = min(line + LINES, stop)
        products[:], sums[:] = 0, 0
        while line + 2 <= end:
            a, b, f, g = x[line], x[line + 1], dy[line], dy[line + 1]
            for i in range(width):
                m = shift[i]
                products[i] += (a[i] - m) * f[i] + (b[i] - m) * g[i]
                sums[i] += f[i] + g[i]
            line += 2
        while line < end:
            a, f = x[line], dy[line]
            for i in range(width):
                products[i] += (a[i] - shift[i]) * f[i]
                sums[i] += f[i]
            line += 1
        for i in range(width):
            total[0, i] += products[i]
            total[1, i] += sums[i]


# Several lines at a time: what belongs to a column is read once for all of them.


@kept()
def normalized(x, out, shift, slope, level, rectify, start, stop):
    line = start
    while line < stop:
        if rectify or line + 4 > stop:
            a, to = x[line], out[line]
            for i in range(a.size):
                v = (a[i] - shift[i]) * slope[i] + level[i]
                to[i] = 0 if rectify & (v <= 0) else v
            line += 1
            continue
        a, b, c, d = x[line], x[line + 1], x[line + 2], x[line + 3]
        e, f, g, h = out[line], out[line + 1], out[line + 2], out[line + 3]
        for i in range(a.size):
            m, s, t = shift[i], slope[i], level[i]
            e[i] = (a[i] - m) * s + t
            f[i] = (b[i] - m) * s + t
            g[i] = (c[i] - m) * s + t
            h[i] = (d[i] - m) * s + t
        line += 4


@kept()
def gradient(dy, x, dx, shift, bend, level, slope, start, stop):
    line = start
    while line < stop:
        a, f, e = x[line], dy[line], dx[line]
        if line + 1 == stop:
            for i in range(a.size):
                e[i] = ((a[i] - shift[i]) * bend[i] + f[i] + level[i]) * slope[i]
            return
        b, g, h = x[line + 1], dy[line + 1], dx[line + 1]
        for i in range(a.size):
            m, s, t, k = shift[i], bend[i], level[i], slope[i]
            e[i] = ((a[i] - m) * s + f[i] + t) * k
            h[i] = ((b[i] - m) * s + g[i] + t) * k
        line += 2


# given: lines, width, numbers of the rest, lines of a share; then arrays. A share is some lines,
# or what is left behind them as one more, shorter line.


@register_jitable(inline="always")
def lines_of(given, at, share):
    lines, width, rest, step = given[0], given[1], given[2], given[3]
    if share * step < lines:
        return carray(floats_at(given[at]), (lines, width))
    return carray(floats_at(given[at] + 4 * lines * width), (1, rest))


@register_jitable(inline="always")
def range_of(given, share):
    lines, step = given[0], given[3]
    if share * step < lines:
        return share * step, min(lines, (share + 1) * step)
    return 0, 1


@register_jitable(inline="always")
def values(given, at):
    return carray(floats_at(given[at]), given[at + 1])


@register_jitable(inline="always")
def total_of(given, at, share):
    total = carray(doubles_at(given[at]), (given[at + 1], given[at + 2], given[at + 3]))
    return total[share]


def moments_job(at, share, count, worker):
    given = carray(numbers_at(at), 12)
    start, stop = range_of(given, share)
    moments(lines_of(given, 4, share), values(given, 6), total_of(given, 8, share), start, stop)


def gradient_sums_job(at, share, count, worker):
    given = carray(numbers_at(at), 14)
    start, stop = range_of(given, share)
    gradient_sums(
        lines_of(given, 4, share), lines_of(given, 6, share), values(given, 8),
        total_of(given, 10, share), start, stop,
    )  # fmt: skip


def normalized_job(at, share, count, worker):
    given = carray(numbers_at(at), 15)
    start, stop = range_of(given, share)
    normalized(
        lines_of(given, 4, share), lines_of(given, 6, share), values(given, 8),
        values(given, 10), values(given, 12), given[14] != 0, start, stop,
    )  # fmt: skip


def gradient_job(at, share, count, worker):
    given = carray(numbers_at(at), 18)
    start, stop = range_of(given, share)
    gradient(
        lines_of(given, 4, share), lines_of(given, 6, share), lines_of(given, 8, share),
        values(given, 10), values(given, 12), values(given, 14), values(given, 16),
        start, stop,
    )  # fmt: skip


@cache
def jobs() -> Jobs:
    """Return the jobs, compiled now."""
    return Jobs(
        *(job(one) for one in (moments_job, gradient_sums_job, normalized_job, gradient_job))
    )
