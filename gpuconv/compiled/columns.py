"""Batch normalisation's sums and what is made of them, compiled; see :mod:`gpuconv.normalization`.

Arrays are lines of several rows each, ``(lines, width)``, and what belongs to a column is repeated
to the width. Sums are taken over a few lines in the arrays' dtype and added up in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from gpuconv import compiled

__all__ = ["gradient", "gradient_sums", "moments", "normalized", "takes"]

Array = Any
#: Lines whose sum is taken in the arrays' dtype.
LINES = 64
#: Elements of a chunk.
CHUNK = 256 * 1024
#: Elements that a line has at least.
WIDTH = 1024


class _Loops(NamedTuple):
    moments: Callable[..., None]
    gradient_sums: Callable[..., None]
    normalized: Callable[..., None]
    gradient: Callable[..., None]


@cache
def _loops() -> _Loops:
    from numba import njit

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

    return _Loops(moments, gradient_sums, normalized, gradient)


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

    def views(self, a: Array) -> list[Array]:
        """Return the lines, and the rest as one more, shorter line."""
        flat, end = a.reshape(-1), self.lines * self.width
        found = [flat[:end].reshape(self.lines, self.width)]
        return [*found, flat[end:].reshape(1, -1)] if self.rest else found

    def tiled(self, values: Array | None, dtype: Any) -> Array:
        """Return a column's values repeated to the width; zeros for None."""
        if values is None:
            return np.zeros(self.width, dtype)
        return np.tile(np.asarray(values).astype(dtype), self.fold)

    def run(self, loop: Callable[..., None], arrays: list[Array], *values: Any) -> None:
        """Call ``loop(*arrays, *values, start, stop)`` for chunks of lines."""
        views = [self.views(a) for a in arrays]
        count = -(-self.lines // self.step)

        def work(k: int) -> None:
            if k == count:
                short = [v[: self.rest * self.columns] if np.ndim(v) else v for v in values]
                loop(*[v[1] for v in views], *short, 0, 1)
            else:
                loop(*[v[0] for v in views], *values, k * self.step,
                     min(self.lines, (k + 1) * self.step))  # fmt: skip

        compiled.spread(count + bool(self.rest), work, self.parallel)

    def add(self, loop: Callable[..., None], arrays: list[Array], shift: Array) -> Array:
        """Return two sums of every column, ``(2, columns)``; chunks are added in their order."""
        views = [self.views(a) for a in arrays]
        count = -(-self.lines // self.step)
        totals = np.zeros((count + bool(self.rest), 2, self.width))

        def work(k: int) -> None:
            if k == count:
                size = self.rest * self.columns
                held = np.zeros((2, size))
                loop(*[v[1] for v in views], shift[:size], held, 0, 1)
                totals[k, :, :size] = held
            else:
                start = k * self.step
                stop = min(self.lines, start + self.step)
                loop(*[v[0] for v in views], shift, totals[k], start, stop)

        compiled.spread(len(totals), work, self.parallel)
        return totals.sum(axis=0).reshape(2, self.fold, self.columns).sum(axis=1)


def moments(x: Array, shift: Array | None) -> Array:
    """Return the sums of ``x - shift`` and of its squares, of every column."""
    lines = _Lines(*x.shape)
    return lines.add(_loops().moments, [x], lines.tiled(shift, x.dtype))


def gradient_sums(dy: Array, x: Array, shift: Array | None) -> Array:
    """Return the sums of ``dy * (x - shift)`` and of ``dy``, of every column."""
    lines = _Lines(*x.shape)
    return lines.add(_loops().gradient_sums, [dy, x], lines.tiled(shift, x.dtype))


def normalized(x: Array, shift: Array | None, slope: Array, level: Array, rectify: bool) -> Array:
    """Return ``(x - shift) * slope + level``, at least zero if ``rectify``."""
    lines, out = _Lines(*x.shape), np.empty_like(x)
    values = [lines.tiled(v, x.dtype) for v in (shift, slope, level)]
    lines.run(_loops().normalized, [x, out], *values, rectify)
    return out


def gradient(
    dy: Array, x: Array, shift: Array | None, bend: Array, level: Array, slope: Array
) -> Array:
    """Return ``((x - shift) * bend + dy + level) * slope``."""
    lines, dx = _Lines(*x.shape), np.empty_like(x)
    values = [lines.tiled(v, x.dtype) for v in (shift, bend, level, slope)]
    lines.run(_loops().gradient, [dy, x, dx], *values)
    return dx
