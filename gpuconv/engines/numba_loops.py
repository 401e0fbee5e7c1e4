"""The loops around the tiles of :mod:`gpuconv.engines.numba_tile`, compiled by Numba.

:func:`correlate` is the forward pass and, phase by phase, the input gradient;
:func:`outer_sums` is the weight gradient. They take addresses, and distances in bytes, so that
arrays whose channels are dense are used as they lie; :mod:`gpuconv.engines.numba_direct`
prepares what they take. Nothing here holds the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from gpuconv.engines.numba_tile import ADD, BIAS, BYTES, MOST_ROWS, STAMP, ZERO, add_line, tile

__all__ = ["Loops", "compiled", "swap"]


class Loops(NamedTuple):
    """The compiled loops of a dtype."""

    correlate: Callable[..., None]
    outer_sums: Callable[..., None]
    scatter: Callable[..., None]
    pack: Callable[..., None]
    pack_transposed: Callable[..., None]


@cache
def compiled(real: str) -> Loops:
    """Return the loops for "float32" or "float64"; each is compiled when it is first called."""
    from numba import njit

    options: dict[str, Any] = {
        "nogil": True,
        "cache": True,
        "boundscheck": False,
        "error_model": "numpy",
    }
    size = 4 if real == "float32" else 8
    width = BYTES // size
    most = (*(int(n) for n in MOST_ROWS), STAMP)
    first_step, add, bias_first, vector = ZERO, ADD, BIAS, BYTES

    # Arguments of both loops.
    #   steps, places   bytes from one output to the next, over n, d, h, w
    #   counts          outputs over n, d, h
    #   columns         of every block of output channels: vectors, first vector, numbers in the
    #                   last vector
    #   group           bytes from one channel group to the next, in each of the arrays
    #   share           first and last row over (n, d, h), block and group; of the weight
    #                   gradient also what of a row of taps and channels is this worker's

    @njit(**options)
    def correlate(
        source, target, filters, bias, steps, places, counts, rows_at_once, depth_classes,
        row_classes, column_classes, combos, chunks, segments, panel, columns, group, rectify,
        share,
    ):  # fmt: skip
        # Classes are ranges of outputs that meet the same taps; combos[d, h, w] tells where in
        # ``chunks`` the steps of a combination begin and how many chunks there are; a chunk is a
        # range of ``segments``, as many as the filters of a block stay in the cache for.
        step_n, step_d, step_h, step_w = steps
        place_n, place_d, place_h, place_w = places
        depths, heights = counts[1], counts[2]
        row, last_row, first_block, last_block, first_group, last_group = share
        table = segments.ctypes.data
        while row < last_row:
            n, rest = row // (depths * heights), row % (depths * heights)
            d, h = rest // heights, rest % heights
            stop = min(h + rows_at_once, heights, h + last_row - row)
            row += stop - h
            k_d = 0
            while depth_classes[k_d, 1] <= d:
                k_d += 1
            for g in range(first_group, last_group):
                at = source + n * step_n + d * step_d + g * group[0]
                to = target + n * place_n + d * place_d + g * group[1]
                for block in range(first_block, last_block):
                    vectors, first_vector, valid = columns[block]
                    b = filters + g * group[2] + first_vector * panel
                    b_step = vectors * vector
                    line = bias + g * group[3] + first_vector * vector
                    chunk, left = 0, True
                    while left:
                        left = False
                        for k_h in range(len(row_classes)):
                            h0 = max(h, row_classes[k_h, 0])
                            h1 = min(stop, row_classes[k_h, 1])
                            if h0 >= h1:
                                continue
                            for k_w in range(len(column_classes)):
                                first_chunk, count = combos[k_d, k_h, k_w]
                                if chunk >= count:
                                    continue
                                last = chunk == count - 1
                                left = left or not last
                                w0, w1 = column_classes[k_w]
                                first, number = chunks[first_chunk + chunk]
                                begin = add
                                if chunk == 0:
                                    begin = bias_first if bias != 0 else first_step
                                rectified = 1 if rectify != 0 and last else 0
                                steps_at = table + first * 24
                                # Tiles lie along the longer side.
                                if w1 - w0 >= h1 - h0:
                                    outer0, outer1, out_a, out_c = h0, h1, step_h, place_h
                                    inner0, inner1, in_a, in_c = w0, w1, step_w, place_w
                                else:
                                    outer0, outer1, out_a, out_c = w0, w1, step_w, place_w
                                    inner0, inner1, in_a, in_c = h0, h1, step_h, place_h
                                length = inner1 - inner0
                                pieces = (length + most[vectors] - 1) // most[vectors]
                                for o in range(outer0, outer1):
                                    i = inner0
                                    for piece in range(pieces):
                                        end = inner0 + length * (piece + 1) // pieces
                                        a = at + o * out_a + i * in_a
                                        c = to + o * out_c + i * in_c + first_vector * vector
                                        m = end - i
                                        i = end
                                        if vectors == 4:
                                            tile(real, "step", 4, m, a, in_a, size, b, b_step,
                                                 b_step, steps_at, number, c, in_c, begin, line,
                                                 rectified, valid)  # fmt: skip
                                        elif vectors == 3:
                                            tile(real, "step", 3, m, a, in_a, size, b, b_step,
                                                 b_step, steps_at, number, c, in_c, begin, line,
                                                 rectified, valid)  # fmt: skip
                                        elif vectors == 2:
                                            tile(real, "step", 2, m, a, in_a, size, b, b_step,
                                                 b_step, steps_at, number, c, in_c, begin, line,
                                                 rectified, valid)  # fmt: skip
                                        else:
                                            tile(real, "step", 1, m, a, in_a, size, b, b_step,
                                                 b_step, steps_at, number, c, in_c, begin, line,
                                                 rectified, valid)  # fmt: skip
                        chunk += 1

    @njit(**options)
    def outer_sums(
        source, gradient, sums, steps, places, counts, taps, tap_steps, ranges_d, ranges_h,
        entries, channels, rows_at_once, columns, out_row, group, segments, share,
    ):  # fmt: skip
        # Adds to sums[tap, channel] the products over all outputs, a block of rows at a time.
        # ranges_d, ranges_h: the outputs that meet a tap inside the image; entries: first and
        # last column, first and last column tap (they lie side by side as their channels do),
        # first and last row.
        step_n, step_d, step_h, step_w = steps
        place_n, place_d, place_h, place_w = places
        depths, heights = counts[1], counts[2]
        first_row, last_row, first_block, last_block, first_group, last_group = share[:6]
        first_line, last_line = share[6:]
        table = segments.ctypes.data
        for block_row in range(first_row, last_row, rows_at_once):
            stop = min(block_row + rows_at_once, last_row)
            for g in range(first_group, last_group):
                for o in range(taps[0]):
                    for p in range(taps[1]):
                        for e in range(len(entries)):
                            w0, w1, q0, q1, h0, h1 = entries[e]
                            h0, h1 = max(h0, ranges_h[p, 0]), min(h1, ranges_h[p, 1])
                            low = max(q0 * channels, first_line)
                            high = min(q1 * channels, last_line)
                            if low >= high:
                                continue
                            count = 0
                            for row in range(block_row, stop):
                                n, rest = row // (depths * heights), row % (depths * heights)
                                d, h = rest // heights, rest % heights
                                if d < ranges_d[o, 0] or d >= ranges_d[o, 1]:
                                    continue
                                if h < h0 or h >= h1:
                                    continue
                                segments[count, 0] = (
                                    n * step_n + d * step_d + h * step_h + w0 * step_w
                                    + o * tap_steps[0] + p * tap_steps[1] + q0 * tap_steps[2]
                                )  # fmt: skip
                                segments[count, 1] = (
                                    n * place_n + d * place_d + h * place_h + w0 * place_w
                                )
                                segments[count, 2] = w1 - w0
                                count += 1
                            if count == 0:
                                continue
                            line = (o * taps[1] + p) * taps[2] * channels + low
                            for block in range(first_block, last_block):
                                vectors, first_vector, valid = columns[block]
                                b = gradient + g * group[1] + first_vector * vector
                                to = sums + g * group[2] + line * out_row + first_vector * vector
                                at = source + g * group[0] + (low - q0 * channels) * size
                                pieces = (high - low + most[vectors] - 1) // most[vectors]
                                i = 0
                                for piece in range(pieces):
                                    end = (high - low) * (piece + 1) // pieces
                                    a = at + i * size
                                    c = to + i * out_row
                                    m = end - i
                                    i = end
                                    if vectors == 4:
                                        tile(real, "row", 4, m, a, size, step_w, b, place_w, 1,
                                             table, count, c, out_row, add, 0, 0, valid)  # fmt: skip
                                    elif vectors == 3:
                                        tile(real, "row", 3, m, a, size, step_w, b, place_w, 1,
                                             table, count, c, out_row, add, 0, 0, valid)  # fmt: skip
                                    elif vectors == 2:
                                        tile(real, "row", 2, m, a, size, step_w, b, place_w, 1,
                                             table, count, c, out_row, add, 0, 0, valid)  # fmt: skip
                                    else:
                                        tile(real, "row", 1, m, a, size, step_w, b, place_w, 1,
                                             table, count, c, out_row, add, 0, 0, valid)  # fmt: skip

    @njit(**options)
    def scatter(
        gradient, places, counts, filters, target, steps, sizes, taps, geometry, channels, columns,
        product, segment, share,
    ):  # fmt: skip
        # For few input channels: all taps of a row of pixels in one product, whose parts are then
        # added to the rows of dx that they reach. Each worker has rows of its own.
        place_n, place_h, place_w = places
        step_n, step_h, step_w = steps
        height, breadth = sizes
        stride_h, stride_w, dilation_h, top, left = geometry
        first_row, last_row = share
        run = segment.ctypes.data
        row_out = (columns[-1, 0] + columns[-1, 1]) * vector
        depth = segment[0, 2]
        line = taps[1] * channels
        row = first_row
        while row < last_row:
            n, h0 = row // height, row % height
            h1 = min(height, h0 + last_row - row)
            row += h1 - h0
            i0 = max(0, -((-(h0 + top - (taps[0] - 1) * dilation_h)) // stride_h))
            i1 = min(counts[0], (h1 - 1 + top) // stride_h + 1)
            for i in range(i0, i1):
                at = gradient + n * place_n + i * place_h
                for block in range(len(columns)):
                    vectors, first_vector, _ = columns[block]
                    b = filters + first_vector * vector * depth
                    pieces = (counts[1] + most[vectors] - 1) // most[vectors]
                    j = 0
                    for piece in range(pieces):
                        end = counts[1] * (piece + 1) // pieces
                        a = at + j * place_w
                        c = product + j * row_out + first_vector * vector
                        m = end - j
                        j = end
                        if vectors == 4:
                            tile(real, "step", 4, m, a, place_w, size, b, 4 * vector, 1, run, 1,
                                 c, row_out, first_step, 0, 0, width)  # fmt: skip
                        elif vectors == 3:
                            tile(real, "step", 3, m, a, place_w, size, b, 3 * vector, 1, run, 1,
                                 c, row_out, first_step, 0, 0, width)  # fmt: skip
                        elif vectors == 2:
                            tile(real, "step", 2, m, a, place_w, size, b, 2 * vector, 1, run, 1,
                                 c, row_out, first_step, 0, 0, width)  # fmt: skip
                        else:
                            tile(real, "step", 1, m, a, place_w, size, b, vector, 1, run, 1,
                                 c, row_out, first_step, 0, 0, width)  # fmt: skip
                for p in range(taps[0]):
                    h = i * stride_h + p * dilation_h - top
                    if h < h0 or h >= h1:
                        continue
                    to = target + n * step_n + h * step_h
                    for j in range(counts[1]):
                        w = j * stride_w - left
                        q0, q1 = max(0, -w), min(taps[1], breadth - w)
                        if q0 < q1:
                            add_line(
                                real, to + (w + q0) * step_w,
                                product + j * row_out + (p * line + q0 * channels) * size,
                                (q1 - q0) * channels,
                            )  # fmt: skip

    @njit(**options)
    def pack(w, columns, packed, first_block, last_block):
        # w: (groups, steps, channels); packed: (groups, vectors * steps, numbers of a vector).
        groups, depth, channels = w.shape
        for g in range(groups):
            for block in range(first_block, last_block):
                vectors, first_vector, _ = columns[block]
                at = first_vector * depth
                first = first_vector * width
                for k in range(depth):
                    for v in range(vectors):
                        for j in range(width):
                            c = first + v * width + j
                            packed[g, at, j] = w[g, k, c] if c < channels else 0
                        at += 1

    @njit(**options)
    def pack_transposed(w, columns, packed, first_block, last_block):
        # w: (groups, taps, channels, steps of a tap), to the same form as above.
        groups, taps, channels, depth = w.shape
        for g in range(groups):
            for block in range(first_block, last_block):
                vectors, first_vector, _ = columns[block]
                at = first_vector * depth * taps
                first = first_vector * width
                for t in range(taps):
                    for k0 in range(0, depth, width):
                        for v in range(vectors):
                            for j in range(width):
                                c = first + v * width + j
                                for k in range(k0, min(k0 + width, depth)):
                                    place = at + (t * depth + k) * vectors + v
                                    packed[g, place, j] = w[g, t, c, k] if c < channels else 0

    return Loops(correlate, outer_sums, scatter, pack, pack_transposed)


@cache
def swap() -> Callable[..., None]:
    """Return what writes ``(taps, in, out)`` into ``(taps, out, in)``, a square at a time."""
    from numba import njit

    side = 16

    @njit(nogil=True, cache=True, boundscheck=False)
    def swapped(w, out):
        taps, rows, columns = w.shape
        for t in range(taps):
            for i0 in range(0, rows, side):
                for j0 in range(0, columns, side):
                    for j in range(j0, min(j0 + side, columns)):
                        for i in range(i0, min(i0 + side, rows)):
                            out[t, j, i] = w[t, i, j]

    return swapped  # type: ignore[no-any-return]
