"""Loops over windows, compiled: channels side by side, their vectors the innermost loop.

Arrays are ``(batch, depth, rows, columns, channels)``. A box is what a cell of the result is
made of: on each axis the cells from ``low`` to ``high``. In the forward pass it is a window
without its padding; in the gradient of a mean, the windows that a cell of the input is part of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from gpuconv import compiled

__all__ = ["NOBODY", "Loops", "loops"]

Array = Any
#: The number of a winner that is a cell of the padding.
NOBODY = 255


class Loops(NamedTuple):
    """The compiled loops; each takes a range of rows of its result, counted over all axes."""

    largest: Callable[..., None]
    winners: Callable[..., None]
    sums: Callable[..., None]
    hand_down: Callable[..., None]
    scatter: Callable[..., None]
    indices: Callable[..., None]


@cache
def loops() -> Loops:
    """Return the loops, each compiled when it is first called with a dtype."""
    from numba import njit

    options, nobody = compiled.OPTIONS, NOBODY

    # An argument of the loops: low, high   (3, cells) bounds of boxes on the three axes
    #                           zeros       the padding takes part in a maximum as zeros

    @njit(**options)
    def largest(x, y, low, high, zeros, start, stop):  # type: ignore[no-untyped-def]
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

    @njit(inline="always")
    def better(a, m):  # type: ignore[no-untyped-def]
        # A NaN is its window's maximum, the first of several.
        return (not (a <= m)) & (m == m)

    @njit(**options)
    def winners(x, y, code, low, high, zeros, skipped, kernel, start, stop):  # type: ignore[no-untyped-def]
        # skipped: (3, cells), taps of a window in front of the first cell inside. Up to three
        # taps of a row at a time, so that what is best so far is read and written less often.
        _, depth, rows, columns, channels = y.shape
        number = np.empty(channels, np.int32)
        for row in range(start, stop):
            n, rest = row // (depth * rows), row % (depth * rows)
            d, h = rest // rows, rest % rows
            d0, d1, h0, h1 = low[0, d], high[0, d], low[1, h], high[1, h]
            for w in range(columns):
                w0, w1 = low[2, w], high[2, w]
                out, mark = y[n, d, h, w], code[n, d, h, w]
                if d0 >= d1 or h0 >= h1 or w0 >= w1:
                    for c in range(channels):
                        out[c], mark[c] = 0, nobody
                    continue
                first = True
                for i in range(d0, d1):
                    for j in range(h0, h1):
                        tap = ((i - d0 + skipped[0, d]) * kernel[1] + j - h0 + skipped[1, h]) * (
                            kernel[2]
                        ) + skipped[2, w]
                        k = w0
                        while k < w1:
                            here = np.int32(tap + k - w0)
                            one = x[n, i, j, k]
                            if first:
                                if w1 - k == 1:
                                    for c in range(channels):
                                        out[c], number[c] = one[c], here
                                    k += 1
                                elif w1 - k == 3:
                                    two, three = x[n, i, j, k + 1], x[n, i, j, k + 2]
                                    second, third = np.int32(here + 1), np.int32(here + 2)
                                    for c in range(channels):
                                        m, t, a = one[c], here, two[c]
                                        m, t = (a, second) if better(a, m) else (m, t)
                                        a = three[c]
                                        m, t = (a, third) if better(a, m) else (m, t)
                                        out[c], number[c] = m, t
                                    k += 3
                                else:
                                    two, second = x[n, i, j, k + 1], np.int32(here + 1)
                                    for c in range(channels):
                                        m, t, a = one[c], here, two[c]
                                        m, t = (a, second) if better(a, m) else (m, t)
                                        out[c], number[c] = m, t
                                    k += 2
                                first = False
                            elif w1 - k == 1:
                                for c in range(channels):
                                    m, t, a = out[c], number[c], one[c]
                                    m, t = (a, here) if better(a, m) else (m, t)
                                    out[c], number[c] = m, t
                                k += 1
                            elif w1 - k == 3:
                                two, three = x[n, i, j, k + 1], x[n, i, j, k + 2]
                                second, third = np.int32(here + 1), np.int32(here + 2)
                                for c in range(channels):
                                    m, t, a = out[c], number[c], one[c]
                                    m, t = (a, here) if better(a, m) else (m, t)
                                    a = two[c]
                                    m, t = (a, second) if better(a, m) else (m, t)
                                    a = three[c]
                                    m, t = (a, third) if better(a, m) else (m, t)
                                    out[c], number[c] = m, t
                                k += 3
                            else:
                                two, second = x[n, i, j, k + 1], np.int32(here + 1)
                                for c in range(channels):
                                    m, t, a = out[c], number[c], one[c]
                                    m, t = (a, here) if better(a, m) else (m, t)
                                    a = two[c]
                                    m, t = (a, second) if better(a, m) else (m, t)
                                    out[c], number[c] = m, t
                                k += 2
                if zeros[0, d] | zeros[1, h] | zeros[2, w]:
                    # The first tap in the padding, in row-major order.
                    if skipped[0, d] + skipped[1, h] + skipped[2, w] > 0:
                        outside = np.int32(0)
                    elif w1 - w0 < kernel[2]:
                        outside = np.int32(w1 - w0)
                    elif h1 - h0 < kernel[1]:
                        outside = np.int32((h1 - h0) * kernel[2])
                    else:
                        outside = np.int32((d1 - d0) * kernel[1] * kernel[2])
                    for c in range(channels):
                        m = out[c]
                        lost = (m < 0) | ((m == 0) & (outside < number[c]))
                        out[c] = 0 if lost else m
                        number[c] = nobody if lost else number[c]
                for c in range(channels):
                    mark[c] = np.uint8(number[c])

    @njit(**options)
    def sums(source, target, low, high, weights, factors, start, stop):  # type: ignore[no-untyped-def]
        # weights: (3, cells) of the source; factors: (3, cells) of the result; multiplied.
        _, depth, rows, columns, channels = target.shape
        for row in range(start, stop):
            n, rest = row // (depth * rows), row % (depth * rows)
            d, h = rest // rows, rest % rows
            d0, d1, h0, h1 = low[0, d], high[0, d], low[1, h], high[1, h]
            for w in range(columns):
                w0, w1 = low[2, w], high[2, w]
                out = target[n, d, h, w]
                factor = factors[0, d] * factors[1, h] * factors[2, w]
                if d1 <= d0 or h1 <= h0 or w1 <= w0:
                    for c in range(channels):
                        out[c] = 0
                    continue
                first = True
                for i in range(d0, d1):
                    for j in range(h0, h1):
                        along = weights[0, i] * weights[1, j] * factor
                        k = w0
                        if first:
                            f, cell = along * weights[2, k], source[n, i, j, k]
                            if k + 1 < w1:
                                g, other = along * weights[2, k + 1], source[n, i, j, k + 1]
                                for c in range(channels):
                                    out[c] = cell[c] * f + other[c] * g
                                k += 2
                            else:
                                for c in range(channels):
                                    out[c] = cell[c] * f
                                k += 1
                            first = False
                        while k < w1:
                            f, cell = along * weights[2, k], source[n, i, j, k]
                            if k + 1 < w1:
                                g, other = along * weights[2, k + 1], source[n, i, j, k + 1]
                                for c in range(channels):
                                    out[c] += cell[c] * f + other[c] * g
                                k += 2
                            else:
                                for c in range(channels):
                                    out[c] += cell[c] * f
                                k += 1

    @njit(**options)
    def hand_down(dy, code, dx, places, offsets, channels_from, channels_to, start, stop):  # type: ignore[no-untyped-def]
        # places: (3, cells), elements from the image's first cell to a window's first tap;
        # offsets: elements from there to each tap.
        _, depth, rows, columns, _ = dy.shape
        for n in range(start, stop):
            image = dx[n].reshape(-1)
            dx[n, :, :, :, channels_from:channels_to] = 0
            for d in range(depth):
                for h in range(rows):
                    for w in range(columns):
                        base = places[0, d] + places[1, h] + places[2, w]
                        mark, gradient = code[n, d, h, w], dy[n, d, h, w]
                        for c in range(channels_from, channels_to):
                            if mark[c] != nobody:
                                # Without a sign: no look whether it counts from the end.
                                image[np.uint64(base + offsets[mark[c]] + c)] += gradient[c]

    @njit(**options)
    def scatter(dy, indices, dx, start, stop):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            into = dx[n]
            into[:] = 0
            base = n * into.size
            gradient, index = dy[n], indices[n]
            for i in range(gradient.size):
                into[np.uint64(index[i] - base)] += gradient[i]

    @njit(**options)
    def indices(code, found, places, offsets, image, start, stop):  # type: ignore[no-untyped-def]
        _, depth, rows, columns, channels = code.shape
        for row in range(start, stop):
            n, rest = row // (depth * rows), row % (depth * rows)
            d, h = rest // rows, rest % rows
            for w in range(columns):
                base = n * image + places[0, d] + places[1, h] + places[2, w]
                mark, index = code[n, d, h, w], found[n, d, h, w]
                for c in range(channels):
                    index[c] = base + offsets[mark[c]] + c

    return Loops(largest, winners, sums, hand_down, scatter, indices)
