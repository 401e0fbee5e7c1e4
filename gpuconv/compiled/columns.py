"""Batch normalisation's sums and what is made of them, compiled; see :mod:`gpuconv.normalization`.

Arrays are lines of several rows each, ``(lines, width)``, and what belongs to a column is repeated
to the width. Sums are taken over a few lines in the arrays' dtype and added up in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from gpuconv import compiled, memory

__all__ = ["gradient", "gradient_sums", "moments", "normalized", "takes"]

Array = Any
#: Lines whose sum is taken in the arrays' dtype.
LINES = 64
#: Elements of a chunk.
CHUNK = 256 * 1024
#: Elements that a line has at least.
WIDTH = 1024


class _Jobs(NamedTuple):
    """Jobs of lines, for :meth:`_Lines.run` and :meth:`_Lines.add`."""

    moments: int
    gradient_sums: int
    normalized: int
    gradient: int


@cache
def _jobs() -> _Jobs:
    from numba import carray, njit
    from numba.extending import register_jitable

    from gpuconv.engines.numba_memory import STAMP, doubles_at, floats_at, numbers_at
    from gpuconv.engines.numba_team_loops import job

    options, few = compiled.OPTIONS, LINES

    @njit(**options)
    def moments(x, shift, total, start, stop):
        width = x.shape[1]
        sums, squares = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
        line = start
        while line < stop:
            end = min(line + few, stop)
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

    @njit(**options)
    def gradient_sums(dy, x, shift, total, start, stop):
        width = x.shape[1]
        products, sums = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
        line = start
        while line < stop:
            end = min(line + few, stop)
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

    @njit(**options)
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

    @njit(**options)
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

    made = (moments_job, gradient_sums_job, normalized_job, gradient_job)
    return _Jobs(*(job(one, STAMP) for one in made))


def takes(*arrays: Array) -> bool:
    """Return whether the loops take the arrays, of one size."""
    return arrays[0].size >= compiled.SMALL and compiled.available() and compiled.plain(*arrays)


class _Lines:
    """Matrices as lines of several rows, and the rest of the rows."""

    def __init__(self, rows: int, columns: int) -> None:
        fold = max(1, WIDTH // columns)
        self.columns, self.fold = columns, fold
        self.lines, self.rest = divmod(rows, fold)
        self.width = fold * columns
        self.step = max(1, CHUNK // self.width)
        self.parallel = rows * columns >= compiled.PARALLEL

    def tiled(self, values: Array | None, dtype: Any) -> Array:
        """Return a column's values repeated to the width; zeros for None."""
        if values is None:
            return np.zeros(self.width, dtype)
        return np.tile(np.asarray(values).astype(dtype), self.fold)

    def run(self, job: int, arrays: Sequence[Array], *arguments: Any) -> None:
        """Run a job on arrays of lines, and what else it takes."""
        flats = [a.reshape(-1) for a in arrays]
        shares = -(-self.lines // self.step) + bool(self.rest)
        sizes = self.lines, self.width, self.rest * self.columns, self.step
        compiled.run(job, (*sizes, *flats, *arguments), shares, self.parallel)

    def add(self, job: int, arrays: Sequence[Array], shift: Array) -> Array:
        """Return two sums of every column, ``(2, columns)``; shares are added in their order."""
        shares = -(-self.lines // self.step) + bool(self.rest)
        totals = np.zeros((shares, 2, self.width))
        self.run(job, arrays, shift, totals)
        return totals.sum(axis=0).reshape(2, self.fold, self.columns).sum(axis=1)


def moments(x: Array, shift: Array | None) -> Array:
    """Return the sums of ``x - shift`` and of its squares, of every column."""
    lines = _Lines(*x.shape)
    return lines.add(_jobs().moments, [x], lines.tiled(shift, x.dtype))


def gradient_sums(dy: Array, x: Array, shift: Array | None) -> Array:
    """Return the sums of ``dy * (x - shift)`` and of ``dy``, of every column."""
    lines = _Lines(*x.shape)
    return lines.add(_jobs().gradient_sums, [dy, x], lines.tiled(shift, x.dtype))


def normalized(x: Array, shift: Array | None, slope: Array, level: Array, rectify: bool) -> Array:
    """Return ``(x - shift) * slope + level``, at least zero if ``rectify``."""
    lines, out = _Lines(*x.shape), memory.empty_as(x)
    values = [lines.tiled(v, x.dtype) for v in (shift, slope, level)]
    lines.run(_jobs().normalized, [x, out], *values, int(rectify))
    return out


def gradient(
    dy: Array, x: Array, shift: Array | None, bend: Array, level: Array, slope: Array
) -> Array:
    """Return ``((x - shift) * bend + dy + level) * slope``."""
    lines, dx = _Lines(*x.shape), memory.empty_as(x)
    values = [lines.tiled(v, x.dtype) for v in (shift, bend, level, slope)]
    lines.run(_jobs().gradient, [dy, x, dx], *values)
    return dx
