"""The loops of the compiled windows: Python that Numba compiles, around vectors in registers.

Tables say which taps an output meets, so that no loop tests for the padding
(:mod:`gpuconv.engines.window_tables`); what a strip of outputs does is
:mod:`gpuconv.engines.numba_window`'s. What is compiled is kept on disk, for the same source only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit

from gpuconv.engines import numba_window
from gpuconv.engines.numba_window import (
    BYTES,
    LANES,
    SPREAD,
    add,
    correlation,
    line,
    number_of,
    sums_at_once,
    taps_at_once,
    window,
)
from gpuconv.engines.window_tables import APART, DENSE, EDGE, NARROW, WIDE

__all__ = ["LANES", "backward", "forward", "sums_at_once", "taps_at_once"]


def _compiled(function: Any) -> Any:
    """Return a function compiled when first called, kept on disk where there is a place for it."""
    options = {"nogil": True, "boundscheck": False}
    try:
        # Numba looks at this file for changes; its vectors' come in by the name.
        source = Path(numba_window.__file__).read_bytes()
        function.__qualname__ += "_" + hashlib.sha256(source).hexdigest()[:12]
        return njit(cache=True, **options)(function)
    except (OSError, RuntimeError):  # nowhere to keep it
        return njit(**options)(function)


@_compiled
def _finished(counters, count, spins):
    """Wait a while for the shares that other threads have taken: a sleep would take longer."""
    while spins > 0 and add(counters + 8, 0) < count:
        spins -= 1


@_compiled
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
                    strip, tap, how = NARROW, taps, way
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


@_compiled
def forward(
    kind, size, channels, x, w, y, bias, slope, zeros, steps, rows, columns, first, last, count,
    counters, spins,
):  # fmt: skip
    """Compute outputs ``first`` to ``last``, counted over the rows of all images.

    Several threads may do so together: each takes the next share, and which takes which makes no
    difference to the result.

    Parameters
    ----------
    kind : tuple
        As many zeros of the arrays' dtype as a group has channels.
    size, channels : int
        Bytes of a number; channels.
    x, y : tuple of int
        Address; bytes from image to image, row to row, column to column.
    w : tuple of int
        Address; bytes from tap to tap along rows and columns, and from channel to channel of
        a group.
    bias, slope, zeros : int
        Addresses: a number for each channel; what negative results are multiplied with; as many
        zeros as two vectors or a group hold.
    steps : tuple of int
        Rows and columns of ``x`` from tap to tap; columns of ``x`` and of ``y`` from output to
        output; taps of ``w`` from tap to tap, along rows and columns; the columns that ``x`` has.
    rows : ndarray
        For each row of outputs: first row of ``x``, first tap, number of taps, row of ``y``.
    columns : ndarray
        For each run of columns the same, and the taps to take at a time, how inputs lie (APART,
        DENSE, EDGE), the number of outputs.
    count, counters : int
        Number of shares; address of two zeros, which count the shares taken and done.
    spins : int
        How often to look whether the others have done theirs.
    """
    images = len(rows)
    x_start, x_image, x_row, x_column = x
    y_start, y_image, y_row, y_column = y
    share = add(counters, 1)
    while share < count:
        done = first + (last - first) * share // count
        stop = first + (last - first) * (share + 1) // count
        while done < stop:
            n, i = done // images, done % images
            end = min(images, i + stop - done)
            _rows(
                kind, size, channels, (x_start + n * x_image, x_row, x_column), w,
                (y_start + n * y_image, y_row, y_column), bias, slope, zeros, steps, rows,
                columns, i, end,
            )  # fmt: skip
            done += end - i
        add(counters + 8, 1)
        share = add(counters, 1)
    _finished(counters, count, spins)


@_compiled
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


@_compiled
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


@_compiled
def backward(
    kind, size, channels, dy, y, x, w, dx, dz, dw, db, nothing, repeats, numbers, behind, needs,
    out_columns, part, steps, rows, columns, sum_steps, sum_rows, sum_columns, blocks, first, last,
    count, counters, spins,
):  # fmt: skip
    """Compute the gradients of blocks ``first`` to ``last``, counted over all images.

    Several threads may do so together, as in ``forward``; every share has sums of its own.

    Parameters
    ----------
    kind, size, channels, count, counters, spins
        As for ``forward``.
    dy, y, x, dx : tuple of int
        Address; bytes from image to image, row to row, column to column.
    w, dw : tuple of int
        As for ``forward``; the weights with the channels of their groups exchanged, and the sums,
        with the bytes from share to share after the address.
    dz : tuple of int
        Of the buffer of a block: address of its first row's first column that is no padding,
        bytes from row to row and column to column.
    db : tuple of int
        Address of a line of ``repeats`` times the channels that gets the sums of ``dz``, and the
        bytes from share to share.
    nothing : int
        Address of a line for sums that nobody needs.
    numbers : tuple of int
        Addresses: a zero for each channel; the number 1; what the gradient is multiplied with
        where ``y`` is not above 0.
    behind : int
        Whether ``dy`` is the gradient behind an activation.
    needs : tuple of int
        Whether ``dx`` and ``dw`` are wanted.
    out_columns, part : int
        Columns of ``dz``; the rows of it that stay in the first-level cache.
    steps, rows, columns
        As for ``forward``: how ``dx`` gathers from ``dz``.
    sum_steps : tuple of int
        Rows and columns of ``x`` from place to place; taps of ``dw`` from tap to tap.
    sum_rows : ndarray
        For each tap along the rows: first row of ``x``, what to add to its number for that of
        ``dz``, the number of rows, the tap of ``dw``.
    sum_columns : ndarray
        For each run of taps along the columns: first column of ``x``, what to add for that of
        ``dz``, first and last place, first tap of ``dw``, taps.
    blocks : ndarray
        For each block of an image: rows of ``dz``, rows of ``dx``, rows of ``dz`` that they need.
    """
    dz_start, dz_row, dz_column = dz
    zeros, one, slope = numbers
    share = add(counters, 1)
    while share < count:
        begin_block = first + (last - first) * share // count
        end_block = first + (last - first) * (share + 1) // count
        sum_b = db[0] + share * db[1]
        sum_w = (dw[0] + share * dw[1], dw[2], dw[3], dw[4])
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
            if needs[0]:
                dx_place = (dx[0] + n * dx[1], dx[2], dx[3])
                _rows(
                    kind, size, channels, dz_place, w, dx_place, zeros, one, zeros, steps, rows,
                    columns, r0, r1,
                )  # fmt: skip
            if needs[1]:
                x_place = (x[0] + n * x[1], x[2], x[3])
                for i in range(i0, i1, part):
                    _sums(
                        kind, size, channels, x_place, dz_place, sum_w, sum_steps, sum_rows,
                        sum_columns, i, min(i1, i + part),
                    )  # fmt: skip
        add(counters + 8, 1)
        share = add(counters, 1)
    _finished(counters, count, spins)
