"""The loops of the compiled Winograd engine; see :mod:`gpuconv.engines.numba_winograd`.

Addresses and distances are integers, in bytes. A block of tiles goes through all steps in the
caches: ``factors[k, tile, channel]``, the products ``[k, tile, output channel]``, outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numba import njit

from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_tile import ADD, BYTES, MOST_ROWS, ZERO, tile
from gpuconv.engines.numba_transform import STAMP, copy_bytes, transform, zero_bytes

__all__ = ["Loops", "compiled"]


class Loops(NamedTuple):
    """The compiled loops of a dtype and a method."""

    filters: Callable[..., None]
    correlate: Callable[..., int]
    factor_sums: Callable[..., None]
    filter_grad: Callable[..., None]


@njit(inline="always")
def gather(
    source, row, column, height, breadth, side_rows, side_columns, step_h, step_w, patch, held
):
    # Copies what of a tile lies inside the image into zeros.
    zero_bytes(patch, side_rows * side_columns * held)
    r0, r1 = max(0, -row), min(side_rows, height - row)
    c0, c1 = max(0, -column), min(side_columns, breadth - column)
    for r in range(r0, r1):
        for c in range(c0, c1):
            copy_bytes(
                patch + (r * side_columns + c) * held,
                source + (row + r) * step_h + (column + c) * step_w,
                held,
            )


@cache
def compiled(real: str, rows: tuple[int, int], columns: tuple[int, int]) -> Loops:
    """Return the loops for "float32" or "float64" and ``F(m, r)`` of rows and of columns."""
    method = " ".join(map(str, (*rows, *columns, STAMP)))
    of_input, of_taps = f"input {method}", f"taps {method}"
    of_outputs, of_gradient, of_sums = f"outputs {method}", f"gradient {method}", f"sums {method}"
    (m_rows, r_rows), (m_columns, r_columns) = rows, columns
    n_rows = 1 if r_rows == 1 else m_rows + r_rows - 1
    n_columns = 1 if r_columns == 1 else m_columns + r_columns - 1
    count = n_rows * n_columns
    size = 4 if real == "float32" else 8
    vector, width = BYTES, BYTES // size
    most = (*(int(n) for n in MOST_ROWS), STAMP)
    begin, add = ZERO, ADD

    @kept(real, method)
    def filters(w, tap_row, tap_column, channel, channels, columns, out, stride, first, last):
        # out[k, block][channel, vector]: the order in which tiles read them.
        for block in range(first, last):
            vectors, first_vector, valid = columns[block]
            for c in range(channels):
                transform(
                    real, of_taps, vectors, valid, width,
                    w + c * channel + first_vector * vector, tap_row, tap_column, vector,
                    out + first_vector * vector * channels + c * vectors * vector,
                    n_columns * stride, stride, vector, 0, 0,
                )  # fmt: skip

    @kept(real, method)
    def correlate(
        source, steps, sizes, starts, channels, factors, filters, stride, target, places, counts, bias,
        rectify, columns, products, patch, run, tiles_at_once, share,
    ):  # fmt: skip
        step_n, step_h, step_w = steps
        place_n, place_h, place_w = places
        height, breadth = sizes
        tile_rows = (counts[0] + m_rows - 1) // m_rows
        tile_columns = (counts[1] + m_columns - 1) // m_columns
        first_tile, last_tile, first_block, last_block = share
        vectors_in = (channels + width - 1) // width
        valid_in = channels - (vectors_in - 1) * width
        row_in = vectors_in * vector
        first_out = columns[first_block, 1]
        vectors_out = columns[last_block - 1, 0] + columns[last_block - 1, 1] - first_out
        valid_out = columns[last_block - 1, 2]
        row_out = vectors_out * vector
        held_in, held_out = channels * size, (vectors_out - 1) * vector + valid_out * size
        wrong = 0
        for block_tile in range(first_tile, last_tile, tiles_at_once):
            some = min(tiles_at_once, last_tile - block_tile)
            # An odd number of vectors apart, or the factors of a tile meet in one set of a cache.
            stride_in = (some * row_in // vector | 1) * vector
            stride_out = (some * row_out // vector | 1) * vector
            for t in range(some):
                n, rest = (
                    (block_tile + t) // (tile_rows * tile_columns),
                    (block_tile + t) % (tile_rows * tile_columns),
                )
                row = rest // tile_columns * m_rows + starts[0]
                column = rest % tile_columns * m_columns + starts[1]
                image = source + n * step_n
                inside = (
                    row >= 0 and column >= 0
                    and row + n_rows <= height and column + n_columns <= breadth
                )  # fmt: skip
                if inside:
                    at, at_h, at_w = image + row * step_h + column * step_w, step_h, step_w
                else:
                    gather(image, row, column, height, breadth, n_rows, n_columns, step_h, step_w,
                           patch, held_in)  # fmt: skip
                    at, at_h, at_w = patch, n_columns * held_in, held_in
                transform(
                    real, of_input, vectors_in, valid_in, width, at, at_h, at_w, vector,
                    factors + t * row_in, n_columns * stride_in, stride_in, vector, 0, 0,
                )  # fmt: skip
            for k in range(count):
                for block in range(first_block, last_block):
                    vectors, first_vector, _ = columns[block]
                    b = filters + k * stride + first_vector * vector * channels
                    to = products + k * stride_out + (first_vector - first_out) * vector
                    pieces = (some + most[vectors] - 1) // most[vectors]
                    i = 0
                    for piece in range(pieces):
                        end = some * (piece + 1) // pieces
                        a = factors + k * stride_in + i * row_in
                        c = to + i * row_out
                        m = end - i
                        i = end
                        tile(
                            real, "step", vectors, m, a, row_in, size, b, vectors * vector, 1, run,
                            1, c, row_out, begin, 0, 0, width,
                        )  # fmt: skip
            for t in range(some):
                n, rest = (
                    (block_tile + t) // (tile_rows * tile_columns),
                    (block_tile + t) % (tile_rows * tile_columns),
                )
                row, column = rest // tile_columns * m_rows, rest % tile_columns * m_columns
                place = target + n * place_n + row * place_h + column * place_w
                place += first_out * vector
                whole = row + m_rows <= counts[0] and column + m_columns <= counts[1]
                to, to_h, to_w = place, place_h, place_w
                if not whole:
                    to, to_h, to_w = patch, m_columns * row_out, row_out
                wrong |= transform(
                    real, of_outputs, vectors_out, width, valid_out, products + t * row_out,
                    n_columns * stride_out, stride_out, vector, to, to_h, to_w, vector,
                    bias + first_out * vector, rectify,
                )  # fmt: skip
                if not whole:
                    for r in range(min(m_rows, counts[0] - row)):
                        for c in range(min(m_columns, counts[1] - column)):
                            copy_bytes(
                                place + r * place_h + c * place_w,
                                patch + r * to_h + c * to_w,
                                held_out,
                            )
        return wrong

    @kept(real, method)
    def factor_sums(
        source, steps, sizes, starts, channels, factors, gradient, places, counts, columns,
        products, sums, stride, patch, segment, tiles_at_once, share,
    ):  # fmt: skip
        # Adds factors(x).T @ factors(dz) to sums[k][channel, output channel].
        step_n, step_h, step_w = steps
        place_n, place_h, place_w = places
        height, breadth = sizes
        tile_rows = (counts[0] + m_rows - 1) // m_rows
        tile_columns = (counts[1] + m_columns - 1) // m_columns
        first_tile, last_tile, first_block, last_block, first_in, last_in = share
        vectors_in = (channels + width - 1) // width
        vectors_in = min(vectors_in, last_in) - first_in
        mine = min(channels - first_in * width, vectors_in * width)
        valid_in = mine - (vectors_in - 1) * width
        row_in = vectors_in * vector
        held_in = mine * size
        first_out = columns[first_block, 1]
        vectors_out = columns[last_block - 1, 0] + columns[last_block - 1, 1] - first_out
        valid_out = columns[last_block - 1, 2]
        row_out = vectors_out * vector
        held_out = (vectors_out - 1) * vector + valid_out * size
        row_sum = (columns[-1, 0] + columns[-1, 1]) * vector
        for block_tile in range(first_tile, last_tile, tiles_at_once):
            some = min(tiles_at_once, last_tile - block_tile)
            # An odd number of vectors apart, or the factors of a tile meet in one set of a cache.
            stride_in = (some * row_in // vector | 1) * vector
            stride_out = (some * row_out // vector | 1) * vector
            for t in range(some):
                n, rest = (
                    (block_tile + t) // (tile_rows * tile_columns),
                    (block_tile + t) % (tile_rows * tile_columns),
                )
                row = rest // tile_columns * m_rows
                column = rest % tile_columns * m_columns
                image = gradient + n * place_n + first_out * vector
                at, at_h, at_w = image + row * place_h + column * place_w, place_h, place_w
                if row + m_rows > counts[0] or column + m_columns > counts[1]:
                    gather(image, row, column, counts[0], counts[1], m_rows, m_columns, place_h,
                           place_w, patch, held_out)  # fmt: skip
                    at, at_h, at_w = patch, m_columns * held_out, held_out
                transform(
                    real, of_gradient, vectors_out, valid_out, width, at, at_h, at_w, vector,
                    products + t * row_out, n_columns * stride_out, stride_out, vector, 0, 0,
                )  # fmt: skip
                row, column = row + starts[0], column + starts[1]
                image = source + n * step_n + first_in * vector
                inside = (
                    row >= 0 and column >= 0
                    and row + n_rows <= height and column + n_columns <= breadth
                )  # fmt: skip
                at, at_h, at_w = image + row * step_h + column * step_w, step_h, step_w
                if not inside:
                    gather(image, row, column, height, breadth, n_rows, n_columns, step_h, step_w,
                           patch, held_in)  # fmt: skip
                    at, at_h, at_w = patch, n_columns * held_in, held_in
                transform(
                    real, of_input, vectors_in, valid_in, width, at, at_h, at_w, vector,
                    factors + t * row_in, n_columns * stride_in, stride_in, vector, 0, 0,
                )  # fmt: skip
            segment[0, 2] = some
            run = segment.ctypes.data
            for k in range(count):
                for block in range(first_block, last_block):
                    vectors, first_vector, _ = columns[block]
                    b = products + k * stride_out + (first_vector - first_out) * vector
                    to = sums + k * stride + first_in * width * row_sum + first_vector * vector
                    pieces = (mine + most[vectors] - 1) // most[vectors]
                    i = 0
                    for piece in range(pieces):
                        end = mine * (piece + 1) // pieces
                        a = factors + k * stride_in + i * size
                        c = to + i * row_sum
                        m = end - i
                        i = end
                        tile(
                            real, "row", vectors, m, a, size, row_in, b, row_out, 1, run, 1, c,
                            row_sum, add, 0, 0, width,
                        )  # fmt: skip

    @kept(real, method)
    def filter_grad(sums, stride, columns, dw, tap_row, tap_column, channel, first, last):
        vectors = columns[-1, 0] + columns[-1, 1]
        row = vectors * vector
        for c in range(first, last):
            transform(
                real, of_sums, vectors, width, columns[-1, 2], sums + c * row,
                n_columns * stride, stride, vector, dw + c * channel, tap_row,
                tap_column, vector, 0, 0,
            )  # fmt: skip

    return Loops(filters, correlate, factor_sums, filter_grad)
