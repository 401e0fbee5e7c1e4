"""The loops of the compiled windows: Python that Numba compiles, around vectors in registers.

Tables say which taps an output meets, so that no loop tests for the padding
(:mod:`gpuconv.engines.window_tables`); what a strip of outputs does is
:mod:`gpuconv.engines.numba_window`'s. What is compiled is kept on disk, for the same source only.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from numba import carray

from gpuconv.engines import numba_window
from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_memory import numbers_at
from gpuconv.engines.numba_team_loops import job
from gpuconv.engines.numba_window import (
    BYTES,
    LANES,
    SPREAD,
    correlation,
    line,
    number_of,
    sums_at_once,
    taps_at_once,
    window,
)
from gpuconv.engines.window_tables import APART, DENSE, EDGE, NARROW, STRIDED, WIDE

__all__ = ["LANES", "backward", "forward", "sums_at_once", "taps_at_once"]


#: Numba looks at this file for changes; its vectors' come in by the name.
_STAMP = hashlib.sha256(Path(numba_window.__file__).read_bytes()).hexdigest()[:12]


@kept(_STAMP)
def _rows(kind, size, channels, x, w, y, bias, slope, zeros, steps, rows, columns, first, last):
    """Compute outputs ``first`` to ``last`` of the table of rows, all columns.

    Arrays are given as the address of their first element and the distances of rows and columns
    (of taps, for the weights, with that of a group's channels at last). See ``forward``.
    """
    x_start, x_row, x_column = x
    w_start, w_row, w_column, w_channel = w
    y_start, y_row, y_column = y
    p_cells, q_cells, x_cells, y_cells, p_taps, q_taps, cells = steps
    line = channels * size
    group = len(kind) * size
    for i in range(first, last):
        for k in range(len(columns)):
            taps, way, count = columns[k, 4], columns[k, 5], columns[k, 6]
            at_x = x_start + rows[i, 0] * x_row + columns[k, 0] * x_column
            at_w = w_start + rows[i, 1] * w_row + columns[k, 1] * w_column
            at_y = y_start + rows[i, 3] * y_row + columns[k, 3] * y_column
            j = 0
            while j < count:
                # Strips overlap rather than be short: what is computed twice is the same.
                left = count - j
                if count < NARROW:
                    strip, tap, how = 1, 1, APART
                elif left >= WIDE or (count >= WIDE and left > NARROW):
                    strip, tap, how = WIDE, taps, way
                else:
                    strip, tap, how = NARROW, taps, APART if way == STRIDED else way
                j = min(j, count - strip)
                skip = -(columns[k, 0] + j)
                stop = cells + skip
                if how == EDGE and skip <= 0 and stop >= strip + tap - 1:
                    how = DENSE
                c = 0
                while c < line:
                    number, width = number_of(strip, tap, how, 0), BYTES
                    vectors = (line - c) // BYTES
                    if line < BYTES:
                        number, vectors = number_of(strip, tap, how, 1), 1
                    elif group > BYTES:
                        vectors = 1
                    elif vectors == 0:  # the last begins earlier rather than be short
                        c, vectors = line - BYTES, 1
                    elif strip == 1 and vectors >= SPREAD:
                        number, width = number_of(0, 1, APART, 0), SPREAD * BYTES
                        vectors //= SPREAD
                    of_x = c // group * group if group > BYTES else c
                    window(kind, number, (
                        vectors, at_x + j * x_cells * x_column + of_x, x_cells * x_column,
                        p_cells * x_row, q_cells * x_column, rows[i, 2], columns[k, 2] // tap,
                        at_w + c, p_taps * w_row, q_taps * w_column, w_channel,
                        at_y + j * y_cells * y_column + c, y_cells * y_column,
                        bias + c, slope, channels, zeros, skip, stop,
                    ))  # fmt: skip
                    c += vectors * width
                j += strip


@cache
def forward(real: str, group: int) -> int:
    """Return the job that computes outputs, counted over the rows of all images.

    Its numbers, in this order; arrays are given as address, bytes from image to image, row to row,
    column to column:

    size, channels
        Bytes of a number; channels.
    first, last
        Rows of outputs, of all images.
    x, y
        Arrays.
    w
        Address; bytes from tap to tap along rows and columns, and from channel to channel of a
        group.
    bias, slope, zeros
        Addresses: a number for each channel; what negative results are multiplied with; as many
        zeros as two vectors or a group hold.
    steps
        Rows and columns of ``x`` from tap to tap; columns of ``x`` and of ``y`` from output to
        output; taps of ``w`` from tap to tap, along rows and columns; the columns that ``x`` has.
    rows, their number
        Address of a table. For each row of outputs: first row of ``x``, first tap, number of taps,
        row of ``y``.
    columns, their number
        For each run of columns the same, and the taps to take at a time, how inputs lie (APART,
        DENSE, EDGE, STRIDED), the number of outputs.
    """
    kind = (np.dtype(real).type(0),) * group

    def forwarded(at, share, count, worker):
        given = carray(numbers_at(at), 30)
        size, channels, first, last = given[0], given[1], given[2], given[3]
        rows = carray(numbers_at(given[26]), (given[27], 4))
        columns = carray(numbers_at(given[28]), (given[29], 7))
        steps = (given[19], given[20], given[21], given[22], given[23], given[24], given[25])
        w = (given[12], given[13], given[14], given[15])
        images = len(rows)
        done = first + (last - first) * share // count
        stop = first + (last - first) * (share + 1) // count
        while done < stop:
            n, i = done // images, done % images
            end = min(images, i + stop - done)
            _rows(
                kind, size, channels, (given[4] + n * given[5], given[6], given[7]), w,
                (given[8] + n * given[9], given[10], given[11]), given[16], given[17], given[18], steps, rows,
                columns, i, end,
            )  # fmt: skip
            done += end - i

    return job(forwarded, real, group, _STAMP)


@kept(_STAMP)
def _gradients(kind, size, channels, dy, y, dz, db, repeats, slope, behind, columns, first, last):
    """Write the gradient in front of the activation, rows ``first`` to ``last``, and its sums."""
    dy_start, dy_row, dy_column = dy
    y_start, y_row, y_column = y
    dz_start, dz_row, dz_column = dz
    lanes = BYTES // size
    for i in range(first, last):
        for j in range(0, columns, repeats):
            numbers = min(repeats, columns - j) * channels
            at_dy = dy_start + i * dy_row + j * dy_column
            at_y = y_start + i * y_row + j * y_column
            at_dz = dz_start + i * dz_row + j * dz_column
            whole, rest = numbers // lanes, numbers % lanes
            line(kind, number_of(behind, 0, 0, 0), (at_dy, at_y, at_dz, db, slope, whole, 0))
            if rest:
                done = whole * BYTES
                line(kind, number_of(behind, 0, 0, 1), (
                    at_dy + done, at_y + done, at_dz + done, db + done, slope, 1, rest,
                ))  # fmt: skip


@kept(_STAMP)
def _sums(kind, size, channels, x, dz, dw, steps, rows, columns, first, last):
    """Add the weights' gradient of rows ``first`` to ``last`` of ``dz`` to ``dw``."""
    x_start, x_row, x_column = x
    dz_start, dz_row, dz_column = dz
    dw_start, dw_row, dw_column, dw_channel = dw
    row_step, column_step, q_taps = steps
    length = channels * size
    group = len(kind) * size
    masked = 1 if length < BYTES else 0
    # The last vector begins earlier rather than be short; its sums lie in a place of their own.
    for c in range(0, length, BYTES):
        at_c = c if masked else min(c, length - BYTES)
        of_x = at_c // group * group if group > BYTES else at_c
        for p in range(len(rows)):
            begin = max(0, first - rows[p, 1])
            end = min(rows[p, 2], last - rows[p, 1])
            if begin < end:
                for k in range(len(columns)):
                    m = columns[k, 2]
                    correlation(kind, number_of(0, columns[k, 5], 0, masked), (
                        x_start + (rows[p, 0] + begin * row_step) * x_row
                        + (columns[k, 0] + m * column_step) * x_column + of_x,
                        column_step * x_column, row_step * x_row,
                        dz_start + (begin + rows[p, 1]) * dz_row
                        + (m + columns[k, 1]) * dz_column + at_c,
                        dz_column, dz_row, end - begin, columns[k, 3] - m,
                        dw_start + rows[p, 3] * dw_row + columns[k, 4] * dw_column + c,
                        q_taps * dw_column, dw_channel, channels,
                    ))  # fmt: skip


@cache
def backward(real: str, group: int) -> int:
    """Return the job that computes the gradients of blocks, counted over all images.

    Every share has sums of its own. Its numbers, in this order:

    size, channels, first, last
        As for :func:`forward`, of blocks.
    dy, y, x, dx
        Arrays.
    w
        As for :func:`forward`, with the channels of its groups exchanged.
    dz
        The buffer of a block: address of its first row's first column that is no padding, bytes
        from row to row, column to column and worker to worker.
    dw
        The sums: address, bytes from share to share, and as for ``w``.
    db
        Address of a line of ``repeats`` times the channels that gets the sums of ``dz``, and bytes
        from share to share.
    nothing
        The same for sums that nobody needs, with bytes from worker to worker.
    zeros, one, slope
        Addresses: a zero for each channel; the number 1; what the gradient is multiplied with
        where ``y`` is not above 0.
    repeats, behind, need_x, need_w, out_columns, part
        Whether ``dy`` is the gradient behind an activation; whether ``dx`` and ``dw`` are wanted;
        columns of ``dz``; the rows of it that stay in the first-level cache.
    steps
        As for :func:`forward`: how ``dx`` gathers from ``dz``.
    sum_steps
        Rows and columns of ``x`` from place to place; taps of ``dw`` from tap to tap.
    rows, columns, sum_rows, sum_columns, blocks
        Address and number of lines of each table. The first two as for :func:`forward`. For each
        tap along the rows: first row of ``x``, what to add to its number for that of ``dz``, the
        number of rows, the tap of ``dw``. For each run of taps along the columns: first column of
        ``x``, what to add for that of ``dz``, first and last place, first tap of ``dw``, taps. For
        each block of an image: rows of ``dz``, rows of ``dx``, rows of ``dz`` that they need.
    """
    kind = (np.dtype(real).type(0),) * group

    def gone_back(at, share, count, worker):
        given = carray(numbers_at(at), 66)
        size, channels, first, last = given[0], given[1], given[2], given[3]
        dy, y, x, dx, w, dw = (
            given[4:8],
            given[8:12],
            given[12:16],
            given[16:20],
            given[20:24],
            given[28:33],
        )
        dz_start, dz_row, dz_column = given[24] + worker * given[27], given[25], given[26]
        sum_b, nothing = given[33] + share * given[34], given[35] + worker * given[36]
        zeros, one, slope = given[37], given[38], given[39]
        repeats, behind, need_x, need_w = given[40], given[41], given[42], given[43]
        out_columns, part = given[44], given[45]
        steps = (given[46], given[47], given[48], given[49], given[50], given[51], given[52])
        sum_steps = (given[53], given[54], given[55])
        rows = carray(numbers_at(given[56]), (given[57], 4))
        columns = carray(numbers_at(given[58]), (given[59], 7))
        sum_rows = carray(numbers_at(given[60]), (given[61], 4))
        sum_columns = carray(numbers_at(given[62]), (given[63], 6))
        blocks = carray(numbers_at(given[64]), (given[65], 6))
        sum_w = (dw[0] + share * dw[1], dw[2], dw[3], dw[4])
        weights = (w[0], w[1], w[2], w[3])
        begin_block = first + (last - first) * share // count
        end_block = first + (last - first) * (share + 1) // count
        for block in range(begin_block, end_block):
            n, k = block // len(blocks), block % len(blocks)
            i0, i1, r0, r1 = blocks[k, 0], blocks[k, 1], blocks[k, 2], blocks[k, 3]
            low, high = blocks[k, 4], blocks[k, 5]
            dy_place = (dy[0] + n * dy[1], dy[2], dy[3])
            y_place = (y[0] + n * y[1], y[2], y[3])
            dz_place = (dz_start - low * dz_row, dz_row, dz_column)
            for begin, end, sums in ((low, i0, nothing), (i0, i1, sum_b), (i1, high, nothing)):
                _gradients(
                    kind, size, channels, dy_place, y_place, dz_place, sums, repeats, slope, behind,
                    out_columns, begin, end,
                )  # fmt: skip
            if need_x:
                dx_place = (dx[0] + n * dx[1], dx[2], dx[3])
                _rows(
                    kind, size, channels, dz_place, weights, dx_place, zeros, one, zeros, steps,
                    rows, columns, r0, r1,
                )  # fmt: skip
            if need_w:
                x_place = (x[0] + n * x[1], x[2], x[3])
                for i in range(i0, i1, part):
                    _sums(
                        kind, size, channels, x_place, dz_place, sum_w, sum_steps, sum_rows,
                        sum_columns, i, min(i1, i + part),
                    )  # fmt: skip

    return job(gone_back, real, group, _STAMP)
