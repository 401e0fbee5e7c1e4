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
    "FactorViews",
    "Grid",
    "Line",
    "OutputViews",
    "factor_views",
    "filter_factors",
    "filter_grad",
    "gradient_grid",
    "grids",
    "output_views",
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


@dataclass
class FactorViews:
    """The buffers of a block's factors, as each step sees them.

    Attributes
    ----------
    left, right : ndarray
        What transforms rows and columns.
    gathered, gathered_flat : ndarray
        ``(window columns, n, r, u, c)``, and as a matrix.
    columns_flat : ndarray
        The transformed columns as a matrix.
    rows, place : ndarray
        The rows of each tile, overlapping, and where their factors go.
    padded : ndarray
        ``(n, r, columns, c)``: the block's part of the source, with zeros for what lies outside.
    windows : ndarray
        ``padded`` as ``gathered`` is laid out, overlapping.
    outside : tuple or None
        Which cells of ``padded`` are known to be zeros.
    """

    left: Array
    right: Array
    gathered: Array
    gathered_flat: Array
    columns_flat: Array
    rows: Array
    place: Array
    padded: Array
    windows: Array
    outside: tuple[int, ...] | None = None


def factor_views(
    grid: Grid, block: Block, gradient: bool, scratch: Scratch, out: Array
) -> FactorViews:
    """Return the views of :func:`tile_factors` for blocks of this size."""
    dtype, size = out.dtype, out.itemsize
    by_row, by_column = (_matrices(line.method, dtype.char) for line in (grid.rows, grid.columns))
    left, right = (m.a if gradient else m.b for m in (by_row, by_column))
    step, across = grid.rows.method.m, grid.columns.method.m
    window = left.shape[1], right.shape[1]
    images, tile_rows = block.count
    tiles, channels = grid.columns.tiles, out.shape[-1]
    length, width = (tile_rows - 1) * step + window[0], (tiles - 1) * across + window[1]
    shape = (images, length, tiles, channels)
    gathered = scratch.get("gathered", (window[1], *shape), dtype)
    columns = gathered
    if right.size > 1:
        columns = scratch.get("columns", (right.shape[0], *shape), dtype)
    padded = scratch.get("padded tiles", (images, length, width, channels), dtype)
    s, o, p = columns.strides, out.strides, padded.strides
    line = tiles * channels
    return FactorViews(
        left,
        right,
        gathered,
        gathered.reshape(window[1], -1),
        columns.reshape(right.shape[0], -1),
        as_strided(
            columns,
            (right.shape[0], images, tile_rows, window[0], line),
            (s[0], s[1], step * s[2], s[2], size),
        ),
        as_strided(
            out,
            (right.shape[0], images, tile_rows, left.shape[0], line),
            (o[1], o[2], o[3], o[0], size),
        ),
        padded,
        as_strided(padded, gathered.shape, (p[2], p[0], p[1], across * p[2], p[3])),
    )


def _gathered(source: Array, grid: Grid, block: Block, v: FactorViews, scratch: Scratch) -> None:
    """Copy a block's tiles into ``v.gathered``, with zeros for what lies outside.

    Two copies at most: each gives the interpreter's lock away and waits for it again, which
    with several workers takes its time.
    """
    (n0, n1), (t0, _) = block.images, block.tile_rows
    rows, columns = grid.rows, grid.columns
    _, length, width, _ = v.padded.shape
    r0, r1, row_slice = rows.span(rows.start + rows.step * t0 * rows.method.m, length, rows.step)
    c0, c1, column_slice = columns.span(columns.start, width, columns.step)
    cells = source[n0:n1, row_slice, column_slice]
    if (r0, r1, c0, c1) == (0, length, 0, width):
        s = cells.strides
        strides = (s[2], s[0], s[1], columns.method.m * s[2], s[3])
        np.copyto(v.gathered, as_strided(cells, v.gathered.shape, strides), casting="same_kind")
        return
    padded = v.padded
    if v.outside != (r0, r1, c0, c1) or scratch.holder is not v:
        padded[:, :r0] = 0
        padded[:, r1:] = 0
        padded[:, r0:r1, :c0] = 0
        padded[:, r0:r1, c1:] = 0
        v.outside, scratch.holder = (r0, r1, c0, c1), v
    padded[:, r0:r1, c0:c1] = cells
    np.copyto(v.gathered, v.windows)


def tile_factors(
    source: Array,
    grid: Grid,
    block: Block,
    gradient: bool,
    scratch: Scratch,
    out: Array,
    views: FactorViews | None = None,
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
    views : FactorViews, optional
        Of a block of this size, made before.
    """
    v = views or factor_views(grid, block, gradient, scratch, out)
    _gathered(source, grid, block, v, scratch)
    if v.right.size > 1:
        np.matmul(v.right, v.gathered_flat, out=v.columns_flat)
    if v.left.size > 1:
        np.matmul(v.left, v.rows, out=v.place)
    else:
        np.copyto(v.place, v.rows)


@dataclass
class OutputViews:
    """The buffers of a block's outputs, as each step sees them.

    Attributes
    ----------
    left, right : ndarray
        What transforms rows and columns back.
    by_column, inner, inner_flat : ndarray
        The products, a matrix for each column of factors; these after the rows' transform, and
        as one matrix.
    outputs, flat, y : ndarray
        The outputs as a matrix, in one axis, and as ``(column, row, n, t, u, o)``.
    """

    left: Array
    right: Array
    by_column: Array
    inner: Array
    inner_flat: Array
    outputs: Array
    flat: Array
    y: Array


def output_views(products: Array, grid: Grid, scratch: Scratch) -> OutputViews:
    """Return the views of :func:`tile_outputs` for these products."""
    dtype = products.dtype
    left, right = (_matrices(line.method, dtype.char).a.T for line in (grid.rows, grid.columns))
    n_rows, n_columns, images, tile_rows, tiles, channels = products.shape
    m_rows, m_columns = left.shape[0], right.shape[0]
    size = images * tile_rows * tiles * channels
    by_column = products.reshape(n_rows, n_columns, size).transpose(1, 0, 2)
    inner = by_column
    if left.size > 1:
        inner = scratch.get("gathered", (n_columns, m_rows, size), dtype)
    inner_flat = inner.reshape(n_columns, m_rows * size)
    outputs = inner_flat
    if right.size > 1:
        outputs = scratch.get("columns", (m_columns, m_rows * size), dtype)
    y = outputs.reshape(m_columns, m_rows, images, tile_rows, tiles, channels)
    return OutputViews(left, right, by_column, inner, inner_flat, outputs, outputs.reshape(-1), y)


def tile_outputs(
    products: Array,
    grid: Grid,
    block: Block,
    scratch: Scratch,
    target: Array,
    bias: Array | None,
    activation: Activation | None,
    views: OutputViews | None = None,
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
        As :func:`gpuconv.engines.im2col.bias_line` repeats it.
    activation : Activation, optional
        Applied to the biased sums.
    views : OutputViews, optional
        Of these products, made before.

    Returns
    -------
    bool
        Whether all sums are finite, and their squares too. If not, nothing is written: an
        infinity or a NaN has spread over its tile, where the definition does not send it.
    """
    v = views or output_views(products, grid, scratch)
    if v.left.size > 1:
        np.matmul(v.left, v.by_column, out=v.inner)
    if v.right.size > 1:
        np.matmul(v.right, v.inner_flat, out=v.outputs)
    if not np.isfinite(np.dot(v.flat, v.flat)):  # the quickest pass that nothing infinite survives
        return False
    y = v.y
    m_columns, m_rows, _, tile_rows, tiles, _ = y.shape
    if bias is not None:
        add_bias(y, bias, y.shape[-1])
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
