"""Winograd transforms of whole blocks of tiles, written as matrix products.

A block's inputs are gathered so that the column transform is one product, the row transform a
batch of products over overlapping views, and each lands where the next step reads it. The
layouts, outermost first (``l`` and ``k`` count the factors of columns and rows, ``n`` images,
``r`` rows, ``t`` and ``u`` tiles, ``c`` channels)::

    gathered   column of the tile, n, r, u, c
    columns    l, n, r, u, c           B.T of the columns @ gathered
    factors    k, l, n, t, u, c        B.T of the rows @ the rows of each tile
    products   k, l, n, t, u, o        factors @ filters, one product for each k, l
    outputs    column, row, n, t, u, o

Small products like these cost BLAS a few instructions more than hand-written additions would,
and Python a hundred calls less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.activations import Activation
from gpuconv.engines.im2col import add_bias
from gpuconv.engines.toom_cook import Filtering
from gpuconv.engines.windows import Axis, Scratch

__all__ = [
    "Block",
    "Grid",
    "Line",
    "filter_factors",
    "filter_grad",
    "gradient_grid",
    "grids",
    "tile_factors",
    "tile_outputs",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Line:
    """One axis of a dense correlation of stride 1, cut into tiles.

    Output ``i`` reads ``start + step * (i + tap)`` of the source.

    Attributes
    ----------
    size : int
        Cells of the source; what lies outside reads as zero.
    start, step : int
        As above; ``step`` is the dilation.
    cells : slice
        Where the outputs lie in the target.
    outputs : int
        Their number.
    method : Filtering
        ``F(m, r)`` with ``r`` the taps.
    """

    size: int
    start: int
    step: int
    cells: slice
    outputs: int
    method: Filtering

    @property
    def tiles(self) -> int:
        """Number of tiles; the last may reach beyond the outputs."""
        return -(-self.outputs // self.method.m)

    def span(self, first: int, count: int, step: int) -> tuple[int, int, slice]:
        """Return which of the cells ``first + step * i`` are inside, and their slice.

        ``i`` runs over ``range(count)``; the answer is a range of ``i`` and the source's slice.
        """
        low = max(0, -(first // step))
        high = max(low, min(count, (self.size - 1 - first) // step + 1))
        begin = first + step * low
        return low, high, slice(begin, begin + step * (high - low), step)


@dataclass(frozen=True)
class Grid:
    """The rows and columns of one dense correlation."""

    rows: Line
    columns: Line

    @property
    def factors(self) -> int:
        """Number of products of a tile and a channel."""
        return self.rows.method.n * self.columns.method.n


@dataclass(frozen=True)
class Block:
    """Some tiles: a range of images, and of rows of tiles, over all columns."""

    images: tuple[int, int]
    tile_rows: tuple[int, int]

    @property
    def count(self) -> tuple[int, int]:
        """Number of images and of rows of tiles."""
        return self.images[1] - self.images[0], self.tile_rows[1] - self.tile_rows[0]


def _lines(axis: Axis, method: Filtering) -> Iterator[Line]:
    """Yield a line for each remainder of the outputs by the dilation: each is dense."""
    step = axis.dilation if axis.taps > 1 else 1
    for first in range(min(step, axis.count)):
        outputs = -(-(axis.count - first) // step)
        cells = slice(first, None, step)
        yield Line(axis.size, axis.start + first, step, cells, outputs, method)


@lru_cache(maxsize=1024)
def grids(axes: tuple[Axis, ...], methods: tuple[Filtering, ...]) -> tuple[Grid, ...]:
    """Return the dense correlations that make up one of stride 1 over two axes."""
    rows, columns = axes
    return tuple(
        Grid(row, column)
        for row in _lines(rows, methods[0])
        for column in _lines(columns, methods[1])
    )


def gradient_grid(grid: Grid) -> Grid:
    """Return the grid by which the gradient of the outputs is cut into tiles of ``m``."""

    def of_outputs(line: Line) -> Line:
        first = line.cells.start
        last = first + line.step * line.outputs
        return Line(last, first, line.step, line.cells, line.outputs, line.method)

    return Grid(of_outputs(grid.rows), of_outputs(grid.columns))


def _gathered(
    source: Array,
    grid: Grid,
    block: Block,
    window: tuple[int, int],
    scratch: Scratch,
    out: Array,
) -> None:
    """Copy a block's tiles, ``window`` rows and columns each, with zeros for what lies outside.

    ``out`` has the layout ``(window columns, n, r, u, c)``. Two copies at most: each gives the
    interpreter's lock away and waits for it again, which with several workers takes its time.
    """
    (n0, n1), (t0, _) = block.images, block.tile_rows
    rows, columns = grid.rows, grid.columns
    _, images, length, tiles, channels = out.shape
    width = (tiles - 1) * columns.method.m + window[1]
    r0, r1, row_slice = rows.span(rows.start + rows.step * t0 * rows.method.m, length, rows.step)
    c0, c1, column_slice = columns.span(columns.start, width, columns.step)
    cells = source[n0:n1, row_slice, column_slice]
    if (r1 - r0, c1 - c0) != (length, width):
        padded = scratch.get("padded", (images, length, width, channels), out.dtype)
        padded[:, :r0] = 0
        padded[:, r1:] = 0
        padded[:, r0:r1, :c0] = 0
        padded[:, r0:r1, c1:] = 0
        padded[:, r0:r1, c0:c1] = cells
        cells = padded
    s = cells.strides
    np.copyto(
        out,
        as_strided(cells, out.shape, (s[2], s[0], s[1], columns.method.m * s[2], s[3])),
        casting="same_kind",
    )


def tile_factors(
    source: Array, grid: Grid, block: Block, gradient: bool, scratch: Scratch, out: Array
) -> None:
    """Write the factors of a block's tiles.

    Parameters
    ----------
    source : ndarray
        ``(n, rows, columns, c)``, any strides: the input; or, with ``gradient``, the gradient
        with respect to the outputs, whose tiles are of ``m`` cells and do not overlap.
    grid : Grid
        Over the source.
    block : Block
        Which tiles.
    gradient : bool
        As above.
    scratch : Scratch
        Where the steps between are held.
    out : ndarray
        ``(k, l, n, t, u, c)``, contiguous in ``u`` and ``c``.
    """
    dtype = out.dtype
    by_row, by_column = (_matrices(line.method, dtype.char) for line in (grid.rows, grid.columns))
    left, right = (m.a if gradient else m.b for m in (by_row, by_column))
    step = grid.rows.method.m
    window = left.shape[1], right.shape[1]
    images, tile_rows = block.count
    tiles, channels = grid.columns.tiles, source.shape[-1]
    length = (tile_rows - 1) * step + window[0]
    shape = (images, length, tiles, channels)
    gathered = scratch.get("gathered", (window[1], *shape), dtype)
    _gathered(source, grid, block, window, scratch, gathered)
    columns = gathered
    if right.size > 1:
        columns = scratch.get("columns", (right.shape[0], *shape), dtype)
        np.matmul(right, gathered.reshape(window[1], -1), out=columns.reshape(right.shape[0], -1))
    s = columns.strides
    rows = as_strided(
        columns,
        (right.shape[0], images, tile_rows, window[0], tiles * channels),
        (s[0], s[1], step * s[2], s[2], dtype.itemsize),
    )
    o = out.strides
    place = as_strided(
        out,
        (right.shape[0], images, tile_rows, left.shape[0], tiles * channels),
        (o[1], o[2], o[3], o[0], dtype.itemsize),
    )
    if left.size > 1:
        np.matmul(left, rows, out=place)
    else:
        np.copyto(place, rows)


def tile_outputs(
    products: Array,
    grid: Grid,
    block: Block,
    scratch: Scratch,
    target: Array,
    bias: Array | None,
    activation: Activation | None,
) -> bool:
    """Write the outputs of a block's tiles, finished, into their place in ``target``.

    Parameters
    ----------
    products : ndarray
        ``(k, l, n, t, u, o)``, contiguous.
    grid, block, scratch
        As for :func:`tile_factors`.
    target : ndarray
        ``(n, rows, columns, o)``, any strides.
    bias : ndarray, optional
        ``(o,)``.
    activation : Activation, optional
        Applied to the biased sums.

    Returns
    -------
    bool
        Whether all sums are finite, and their squares too. If not, nothing is written: an
        infinity or a NaN has spread over its tile, where the definition does not send it.
    """
    dtype = products.dtype
    left, right = (_matrices(line.method, dtype.char).a.T for line in (grid.rows, grid.columns))
    n_rows, n_columns, images, tile_rows, tiles, channels = products.shape
    m_rows, m_columns = left.shape[0], right.shape[0]
    size = images * tile_rows * tiles * channels
    inner = products
    if left.size > 1:
        inner = scratch.get("gathered", (n_columns, m_rows, size), dtype)
        by_column = products.reshape(n_rows, n_columns, size).transpose(1, 0, 2)
        np.matmul(left, by_column, out=inner)
    outputs = inner
    if right.size > 1:
        outputs = scratch.get("columns", (m_columns, m_rows * size), dtype)
        np.matmul(right, inner.reshape(n_columns, m_rows * size), out=outputs)
    flat = outputs.reshape(-1)
    if not np.isfinite(np.dot(flat, flat)):  # the quickest pass that no NaN or infinity survives
        return False
    y = outputs.reshape(m_columns, m_rows, images, tile_rows, tiles, channels)
    if bias is not None:
        add_bias(y, bias)
    (n0, n1), (t0, t1) = block.images, block.tile_rows
    cells = target[n0:n1, grid.rows.cells, grid.columns.cells]
    last = min(grid.rows.outputs, t1 * m_rows)
    cells = cells[:, t0 * m_rows : last]
    if cells.shape[1] == tile_rows * m_rows and cells.shape[2] == tiles * m_columns:
        s = cells.strides
        place = as_strided(
            cells,
            y.shape,
            (s[2], s[1], s[0], m_rows * s[1], m_columns * s[2], s[3]),
        )
        _finish(y, activation, place)
        return True
    for j in range(m_columns):
        for i in range(m_rows):
            place = cells[:, i::m_rows, j::m_columns]
            _finish(y[j, i, :, : place.shape[1], : place.shape[2]], activation, place)
    return True


def _finish(y: Array, activation: Activation | None, place: Array) -> None:
    if activation is None:
        np.copyto(place, y, casting="same_kind")
    else:
        activation.fn(y, out=place)


@dataclass(frozen=True, eq=False)
class _Matrices:
    """A method's matrices in the dtype of the products."""

    a: Array
    b: Array
    g: Array


@lru_cache(maxsize=64)
def _matrices(method: Filtering, dtype: str) -> _Matrices:
    return _Matrices(*(np.ascontiguousarray(x, dtype) for x in (method.a, method.b, method.g)))


@lru_cache(maxsize=64)
def _taps(rows: Filtering, columns: Filtering, dtype: str, backwards: bool) -> Array:
    """Return the matrix that takes ``(taps, ...)`` to ``(k * l, ...)``."""
    g = np.kron(rows.g, columns.g)
    return np.ascontiguousarray(g[:, ::-1] if backwards else g, dtype)


def filter_factors(w: Array, methods: tuple[Filtering, ...], reverse: bool, dtype: Any) -> Array:
    """Return the factors ``(k * l, in, out)`` of weights ``(rows, columns, in, out)``.

    With ``reverse`` the taps are taken backwards, as the gradient of the input does.
    """
    *_, w_in, out = w.shape
    flat = np.ascontiguousarray(w, dtype).reshape(-1, w_in * out)
    factors: Array = np.matmul(_taps(*methods, np.dtype(dtype).char, reverse), flat)
    return factors.reshape(-1, w_in, out)


def filter_grad(factors: Array, methods: tuple[Filtering, ...], dw: Array) -> None:
    """Write the gradient with respect to the weights, given that of their factors."""
    taps = _taps(*methods, factors.dtype.char, False)
    flat = np.matmul(taps.T, factors.reshape(len(taps), -1))
    dw[...] = flat.reshape(dw.shape)
