"""The loops around the tiles of :mod:`gpuconv.engines.numba_tile`, compiled by Numba.

:func:`correlate` is the forward pass and, phase by phase, the input gradient; :func:`outer_sums`
is the weight gradient, :func:`scatter` the input gradient of few channels. They are jobs of
:mod:`gpuconv.engines.numba_team`: each takes the address of its numbers, in the order in which it
reads them, and computes a share. They take addresses, and distances in bytes, so that arrays whose
channels are dense are used as they lie; :mod:`gpuconv.engines.numba_direct` prepares what they take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from numba import carray

from gpuconv.engines import numba_pack, numba_transform
from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_memory import numbers_at
from gpuconv.engines.numba_pack import pack_double, pack_single
from gpuconv.engines.numba_team_loops import job
from gpuconv.engines.numba_tile import ADD, BIAS, BYTES, MOST_ROWS, STAMP, ZERO, add_line, tile
from gpuconv.engines.numba_transform import zero_bytes

__all__ = ["correlate", "outer_sums", "pack", "scatter", "swap"]

#: Numba keeps loops by their own file; this makes them stale when what they are made of changes.
_STAMPS = STAMP, numba_pack.STAMP, numba_transform.STAMP


# Numbers of several jobs:
#   steps, places   bytes from one output to the next, over n, d, h, w
#   counts          outputs over n, d, h
#   columns         of every block of output channels: vectors, first vector, numbers in the last
#                   vector
#   group           bytes from one channel group to the next, in each of the arrays


@cache
def pack(real: str) -> int:
    """Return the job that packs filters; a share is some blocks of output channels."""
    single = real == "float32"

    def packed(at, share, count, worker):
        blocks = carray(numbers_at(at), 9)[8]
        first, last = blocks * share // count, blocks * (share + 1) // count
        if single:
            pack_single(at, first, last)
        else:
            pack_double(at, first, last)

    return job(packed, real, *_STAMPS)


@cache
def correlate(real: str) -> int:
    """Return the job of the forward pass; a share is some rows, or some blocks of channels."""
    single = real == "float32"
    size = 4 if single else 8
    most = tuple(int(n) for n in MOST_ROWS)
    first_step, add, bias_first, vector = ZERO, ADD, BIAS, BYTES

    def correlated(at_job, share, count, worker):
        # Classes are ranges of outputs that meet the same taps; combos[d, h, w] tells where in
        # ``chunks`` the steps of a combination begin and how many chunks there are; a chunk is a
        # range of ``segments``, as many as the filters of a block stay in the cache for.
        given = carray(numbers_at(at_job), 17)
        source, target, filters, bias = given[1], given[2], given[3], given[4]
        at_columns, blocks, panel = given[5], given[6], given[7]
        group = given[8:12]
        rectify, groups, by_blocks, packing = given[12], given[13], given[14], given[15]
        columns = carray(numbers_at(at_columns), (blocks, 3))
        g = carray(numbers_at(given[0]), 33)
        step_n, step_d, step_h, step_w = g[0], g[1], g[2], g[3]
        place_n, place_d, place_h, place_w = g[4], g[5], g[6], g[7]
        depths, heights, rows_at_once = g[9], g[10], g[11]
        depth_classes = carray(numbers_at(g[12]), (g[13], 2))
        row_classes = carray(numbers_at(g[14]), (g[15], 2))
        column_classes = carray(numbers_at(g[16]), (g[17], 2))
        combos = carray(numbers_at(g[18]), (g[13], g[15], g[17], 2))
        chunks = carray(numbers_at(g[19]), (g[20], 2))
        table = g[21]
        row, last_row = 0, g[8] * depths * heights
        first_block, last_block = 0, blocks
        if by_blocks != 0:
            first_block, last_block = blocks * share // count, blocks * (share + 1) // count
            if single:
                pack_single(packing, first_block, last_block)
            else:
                pack_double(packing, first_block, last_block)
        else:
            row, last_row = last_row * share // count, last_row * (share + 1) // count
        while row < last_row:
            n, rest = row // (depths * heights), row % (depths * heights)
            d, h = rest // heights, rest % heights
            stop = min(h + rows_at_once, heights, h + last_row - row)
            row += stop - h
            k_d = 0
            while depth_classes[k_d, 1] <= d:
                k_d += 1
            for k_g in range(groups):
                at = source + n * step_n + d * step_d + k_g * group[0]
                to = target + n * place_n + d * place_d + k_g * group[1]
                for block in range(first_block, last_block):
                    vectors, first_vector, valid = columns[block]
                    b = filters + k_g * group[2] + first_vector * panel
                    b_step = vectors * vector
                    line = bias + k_g * group[3] + first_vector * vector
                    chunk, left = 0, True
                    while left:
                        left = False
                        for k_h in range(len(row_classes)):
                            h0 = max(h, row_classes[k_h, 0])
                            h1 = min(stop, row_classes[k_h, 1])
                            if h0 >= h1:
                                continue
                            for k_w in range(len(column_classes)):
                                first_chunk, chunks_of = combos[k_d, k_h, k_w]
                                if chunk >= chunks_of:
                                    continue
                                last = chunk == chunks_of - 1
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
                                        tile(
                                            real, "step", vectors, m, a, in_a, size, b, b_step,
                                            b_step, steps_at, number, c, in_c, begin, line,
                                            rectified, valid,
                                        )  # fmt: skip
                        chunk += 1

    return job(correlated, real, *_STAMPS)


@cache
def outer_sums(real: str) -> int:
    """Return the job of the weight gradient; a share is some of the weights."""
    size = 4 if real == "float32" else 8
    most = tuple(int(n) for n in MOST_ROWS)
    add, vector = ADD, BYTES

    def summed(at_job, share, shares, worker):
        # Adds to sums[tap, channel] the products over all outputs, a block of rows at a time.
        # ranges_d, ranges_h: the outputs that meet a tap inside the image; entries: first and
        # last column, first and last column tap (they lie side by side as their channels do),
        # first and last row. Shares are blocks of output channels, rows of taps, or parts of a
        # row's taps and channels: so many of each.
        given = carray(numbers_at(at_job), 17)
        source, gradient, sums = given[1], given[2], given[3]
        channels, out_row, groups = given[6], given[7], given[11]
        columns = carray(numbers_at(given[4]), (given[5], 3))
        group = given[8:11]
        block_shares, tap_shares, line_shares = given[12], given[13], given[14]
        segments_at = given[15] + worker * given[16]
        g = carray(numbers_at(given[0]), 33)
        step_n, step_d, step_h, step_w = g[0], g[1], g[2], g[3]
        place_n, place_d, place_h, place_w = g[4], g[5], g[6], g[7]
        depths, heights = g[9], g[10]
        taps, tap_steps, rows_at_once = g[22:25], g[25:28], g[32]
        ranges_d = carray(numbers_at(g[28]), (taps[0], 2))
        ranges_h = carray(numbers_at(g[29]), (taps[1], 2))
        entries = carray(numbers_at(g[30]), (g[31], 6))
        segments = carray(numbers_at(segments_at), (rows_at_once, 3))
        table = segments_at
        first_row, last_row = 0, g[8] * depths * heights
        of_block, of_rest = share % block_shares, share // block_shares
        of_tap, of_line = of_rest % tap_shares, of_rest // tap_shares
        first_block = given[5] * of_block // block_shares
        last_block = given[5] * (of_block + 1) // block_shares
        first_tap, last_tap = taps[1] * of_tap // tap_shares, taps[1] * (of_tap + 1) // tap_shares
        line_steps = taps[2] * channels
        first_line = line_steps * of_line // line_shares
        last_line = line_steps * (of_line + 1) // line_shares
        for block_row in range(first_row, last_row, rows_at_once):
            stop = min(block_row + rows_at_once, last_row)
            for k_g in range(groups):
                for o in range(taps[0]):
                    for p in range(first_tap, last_tap):
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
                                b = gradient + k_g * group[1] + first_vector * vector
                                to = sums + k_g * group[2] + line * out_row + first_vector * vector
                                at = source + k_g * group[0] + (low - q0 * channels) * size
                                pieces = (high - low + most[vectors] - 1) // most[vectors]
                                i = 0
                                for piece in range(pieces):
                                    end = (high - low) * (piece + 1) // pieces
                                    a = at + i * size
                                    c = to + i * out_row
                                    m = end - i
                                    i = end
                                    tile(
                                        real, "row", vectors, m, a, size, step_w, b, place_w, 1,
                                        table, count, c, out_row, add, 0, 0, valid,
                                    )  # fmt: skip

    return job(summed, real, *_STAMPS)


@cache
def scatter(real: str) -> int:
    """Return the job of the input gradient of few channels; a share is some rows of ``dx``."""
    single = real == "float32"
    size = 4 if single else 8
    width = BYTES // size
    most = tuple(int(n) for n in MOST_ROWS)
    first_step, vector = ZERO, BYTES

    def scattered(at_job, share, count, worker):
        # All taps of a row of pixels in one product, whose parts are then added to the rows of
        # dx that they reach.
        given = carray(numbers_at(at_job), 27)
        gradient, filters, target = given[0], given[1], given[2]
        place_n, place_h, place_w = given[3], given[4], given[5]
        step_n, step_h, step_w = given[6], given[7], given[8]
        counts, taps = given[9:11], given[11:13]
        height, breadth = given[13], given[14]
        stride_h, stride_w, dilation_h, top, left = (
            given[15],
            given[16],
            given[17],
            given[18],
            given[19],
        )
        channels, rows = given[20], given[21]
        columns = carray(numbers_at(given[22]), (given[23], 3))
        product = given[24] + worker * given[25]
        segment = carray(numbers_at(given[26]), (1, 3))
        run = given[26]
        first_row, last_row = rows * share // count, rows * (share + 1) // count
        row_out = (columns[-1, 0] + columns[-1, 1]) * vector
        depth = segment[0, 2]
        line = taps[1] * channels
        apart = (taps[1] + stride_w - 1) // stride_w
        row = first_row
        while row < last_row:
            n, h0 = row // height, row % height
            h1 = min(height, h0 + last_row - row)
            row += h1 - h0
            for h in range(h0, h1):
                zero_bytes(target + n * step_n + h * step_h, breadth * channels * size)
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
                        tile(
                            real, "step", vectors, m, a, place_w, size, b, vectors * vector, 1,
                            run, 1, c, row_out, first_step, 0, 0, width,
                        )  # fmt: skip
                for p in range(taps[0]):
                    h = i * stride_h + p * dilation_h - top
                    if h < h0 or h >= h1:
                        continue
                    to = target + n * step_n + h * step_h
                    # Neighbours overlap, and would wait for each other's sums to reach memory.
                    for first in range(apart):
                        for j in range(first, counts[1], apart):
                            w = j * stride_w - left
                            q0, q1 = max(0, -w), min(taps[1], breadth - w)
                            if q0 < q1:
                                add_line(
                                    real, to + (w + q0) * step_w,
                                    product + j * row_out + (p * line + q0 * channels) * size,
                                    (q1 - q0) * channels,
                                )  # fmt: skip

    return job(scattered, real, *_STAMPS)


@cache
def swap() -> Callable[..., None]:
    """Return what writes ``(taps, in, out)`` into ``(taps, out, in)``, a square at a time."""
    side = 16

    @kept()
    def swapped(w, out):
        taps, rows, columns = w.shape
        for t in range(taps):
            for i0 in range(0, rows, side):
                for j0 in range(0, columns, side):
                    for j in range(j0, min(j0 + side, columns)):
                        for i in range(i0, min(i0 + side, rows)):
                            out[t, j, i] = w[t, i, j]

    return swapped  # type: ignore[no-any-return]
