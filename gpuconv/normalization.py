"""Means, variances and what is normalised by them, with gradients: cache-sized blocks, threads.

Arrays are matrices: a row an example (or a pixel), a column a feature (or a channel). Those of
the CPU are passed over in blocks that stay in the cache, a worker per core; sums over rows are
products with ones, at the speed of BLAS. On a GPU batch normalisation has kernels of its own, and
layer normalisation whole-array operations of the array's library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import memory
from gpuconv.activations import Activation, ReLU
from gpuconv.compiled import columns as fast
from gpuconv.cuda import kernels
from gpuconv.cuda import normalization as on_cuda
from gpuconv.device import namespace
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.threads import shares

__all__ = ["column_statistics", "columns_grad", "normalized_columns", "rows_forward", "rows_grad"]

Array = Any
#: ``(first element, lines, elements a line)`` of a block of a flat array.
Piece = tuple[int, int, int]

#: Elements of a block.
BLOCK = 256 * 1024
#: Elements that a line has at least: short rows are taken several at a time.
LINE = 2048
#: The same where nothing is added up over lines: longer ones cost less a line.
LONG = 8192
#: What an element counts for in whether a second worker is worth its start.
WORTH = 4


def _pieces(rows: int, columns: int, line: int = LINE) -> list[list[Piece]]:
    """Return each worker's blocks: lines of as many whole rows as make ``line`` elements."""
    fold = max(1, line // columns)
    lines, rest = divmod(rows, fold)
    width = fold * columns
    step = max(1, BLOCK // width)
    work: list[list[Piece]] = []
    for share in shares(lines, worker_count(WORTH * rows * columns)) if lines else []:
        starts = range(share.start, share.stop, step)
        work.append([(a * width, min(step, share.stop - a), width) for a in starts])
    if rest:
        work = work or [[]]
        work[-1].append((lines * width, 1, rest * columns))
    return work or [[]]


def _view(flat: Array, piece: Piece) -> Array:
    start, lines, width = piece
    return flat[start : start + lines * width].reshape(lines, width)


def _flat(a: Array, dtype: Any) -> Array:
    return np.ascontiguousarray(a, dtype).reshape(-1)


class _Tiles:
    """A row of values, repeated to the length of a block's line."""

    def __init__(self, values: Array, dtype: Any) -> None:
        repeats = -(-max(LINE, LONG) // len(values)) + 1
        self._values = np.tile(np.asarray(values, dtype), repeats)

    def __getitem__(self, piece: Piece) -> Array:
        return self._values[: piece[2]]


_all_ones: dict[str, Array] = {}


def _ones(count: int, dtype: Any) -> Array:
    name = np.dtype(dtype).name
    found = _all_ones.get(name)
    if found is None or len(found) < count:
        found = _all_ones[name] = np.ones(count, dtype)
    return found[:count]


class _Sums:
    """Sums over rows of every column of a worker's blocks, in float64."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._total = np.zeros(columns)
        self._lines: Array | None = None

    def add(self, block: Array) -> None:
        """Add the rows of a block."""
        sums = np.matmul(_ones(len(block), block.dtype), block)
        if self._lines is None:
            self._lines = sums.astype(np.float64)
        elif len(self._lines) == len(sums):
            np.add(self._lines, sums, out=self._lines)
        else:  # the rest of the rows
            self._total += sums.reshape(-1, self._columns).sum(axis=0, dtype=np.float64)

    def result(self) -> Array:
        """Return the sums."""
        if self._lines is None:
            return self._total
        return self._total + self._lines.reshape(-1, self._columns).sum(axis=0)


# ------------------------------------------------------- statistics of columns: batch normalisation

#: A mean of so many deviations is subtracted before anything else, as it would cost digits.
FAR = 4.0


def column_statistics(x: Array) -> tuple[Array, Array]:
    """Return mean and variance (divided by the number of rows) of every column.

    One pass adds up values and squares; where the difference of these loses digits, the mean
    being far from zero, another adds up the squares of what is left without the mean.

    Parameters
    ----------
    x : ndarray, shape (rows, columns)
        At least one row.

    Returns
    -------
    mean, variance : ndarray, shape (columns,)
        float64 on the CPU; on a GPU of the dtype that sums are taken in.
    """
    xp = namespace(x)
    rows = len(x)
    dtype = wide_dtype(x.dtype.name)
    if xp is not np:
        return on_cuda.column_statistics(xp.ascontiguousarray(x))
    sums, squares = _moments(x, dtype, None)
    with np.errstate(all="ignore"):
        mean = sums / rows
        variance = squares / rows - mean * mean
        if not (mean * mean <= FAR * FAR * variance).all():
            near = mean.astype(dtype)
            sums, squares = _moments(x, dtype, near)
            mean = near + sums / rows
            variance = squares / rows - (sums / rows) ** 2
        return mean, np.maximum(variance, 0)


def _moments(x: Array, dtype: Any, shift: Array | None) -> tuple[Array, Array]:
    """Return the sums of ``x - shift`` and of its squares."""
    if fast.takes(x):
        sums, squares = fast.moments(x, shift)
        return sums, squares
    columns = x.shape[1]
    flat, work = _flat(x, dtype), tuple(_pieces(*x.shape))
    found = [(_Sums(columns), _Sums(columns)) for _ in work]
    shifts = None if shift is None else _Tiles(shift, flat.dtype)

    def run(k: int, share: list[Piece]) -> None:
        for piece in share:
            block = _view(flat, piece)
            square = scratch.get("normalized", block.shape, flat.dtype)
            if shifts is not None:
                block = np.subtract(block, shifts[piece], out=square)
            found[k][0].add(block)
            found[k][1].add(np.multiply(block, block, out=square))

    run_shares(work, run)
    return sum(a.result() for a, _ in found), sum(b.result() for _, b in found)


def _split(mean: Array, inverse: Array, dtype: Any) -> tuple[Array | None, Array]:
    """Return what to subtract from the values first, if anything, and what is left of the mean."""
    if (np.abs(mean) * inverse <= FAR).all():
        return None, mean
    near = mean.astype(dtype)
    return near, mean - near


def normalized_columns(
    x: Array,
    mean: Array,
    inverse: Array,
    scaler: Array,
    intercept: Array,
    activation: Activation | None = None,
) -> Array:
    """Return ``act(scaler * (x - mean) * inverse + intercept)``, all being one value a column."""
    xp = namespace(x)
    if xp is not np:
        fused = kernels.has_activation(activation)
        y = x if len(x) == 0 else on_cuda.normalized_columns(
            xp.ascontiguousarray(x), mean, inverse * scaler, intercept, activation if fused else None
        )  # fmt: skip
        return y if fused or activation is None else activation.fn(y)
    dtype = wide_dtype(x.dtype.name)
    with np.errstate(all="ignore"):
        slope = np.asarray(scaler, np.float64) * inverse
        near, rest = _split(mean, inverse, dtype)
        if fast.takes(x):
            rectify = type(activation) is ReLU
            made = fast.normalized(x, near, slope, intercept - slope * rest, rectify)
            return made if rectify or activation is None else activation.fn(made, out=made)
        flat, out = _flat(x, dtype), memory.empty((x.size,), dtype)
        factors, offsets = _Tiles(slope, dtype), _Tiles(intercept - slope * rest, dtype)
        means = None if near is None else _Tiles(near, dtype)

    def run(_: int, share: list[Piece]) -> None:
        for piece in share:
            target = _view(out, piece)
            source = _view(flat, piece)
            if means is not None:
                source = np.subtract(source, means[piece], out=target)
            np.multiply(source, factors[piece], out=target)
            np.add(target, offsets[piece], out=target)
            if activation is not None:
                activation.fn(target, out=target)

    rows, columns = x.shape
    run_shares(tuple(_pieces(rows, columns, LONG)), run)
    return out.reshape(x.shape).astype(x.dtype, copy=False)


def columns_grad(
    dy: Array,
    x: Array,
    mean: Array,
    inverse: Array,
    scaler: Array,
    moving: bool,
    needs_x: bool,
    y: Array | None = None,
    activation: Activation | None = None,
) -> tuple[Array | None, Array, Array]:
    """Return the gradients of :func:`normalized_columns` for ``x``, ``scaler``, ``intercept``.

    Parameters
    ----------
    dy, x : ndarray, shape (rows, columns)
        Gradient with respect to the result; what was normalised.
    mean, inverse, scaler : ndarray, shape (columns,)
        As they were in the forward pass; ``inverse`` is one over the deviation.
    moving : bool
        Mean and deviation are those of ``x`` and move with it; else they are constants.
    needs_x : bool
        Whether the gradient with respect to ``x`` is wanted.
    y, activation : ndarray, Activation, optional
        The forward's result, and the activation, whose derivative follows from it.

    Returns
    -------
    dx : ndarray or None
    dscaler, dintercept : ndarray, shape (columns,)
    """
    xp = namespace(x)
    rows, columns = x.shape
    fused = xp is not np and kernels.has_activation(activation)
    if activation is not None and y is not None and not fused:
        dy, y, activation = activation.backward(dy, y=y), None, None
    if xp is not np and rows > 0:
        dy, x = xp.ascontiguousarray(dy), xp.ascontiguousarray(x)
        y = None if y is None else xp.ascontiguousarray(y)
        return on_cuda.columns_grad(dy, x, y, activation, mean, inverse, scaler, moving, needs_x)
    if rows == 0:
        nothing = xp.zeros((columns,), mean.dtype)
        return (x if needs_x else None), nothing, nothing
    dtype = wide_dtype(x.dtype.name)
    quick = fast.takes(x, dy)
    if not quick:
        flat, grad = _flat(x, dtype), _flat(dy, dtype)
    with np.errstate(all="ignore"):
        near, rest = _split(mean, inverse, dtype)
        means = None if near is None or quick else _Tiles(near, dtype)
        if quick:
            dscaler, dintercept = fast.gradient_sums(dy, x, near)
        else:
            work = tuple(_pieces(rows, columns))
            dscaler, dintercept = _gradient_sums(grad, flat, work, columns, means)
        dscaler = (dscaler - rest * dintercept) * inverse
        if not needs_x:
            return None, dscaler, dintercept
        slope = np.asarray(scaler, np.float64) * inverse
        bend = -inverse * dscaler / max(rows, 1)
        level = -dintercept / max(rows, 1) - bend * rest
        if quick and moving:
            dx = fast.gradient(dy, x, near, bend, level, slope)
            return dx, dscaler, dintercept
        if quick:
            flat, grad = _flat(x, dtype), _flat(dy, dtype)
        slopes, bends, levels = (_Tiles(v, dtype) for v in (slope, bend, level))
    out = memory.empty((x.size,), dtype)

    def finish(_: int, share: list[Piece]) -> None:
        for piece in share:
            target, change = _view(out, piece), _view(grad, piece)
            if moving:
                source = _view(flat, piece)
                if means is not None:
                    source = np.subtract(source, means[piece], out=target)
                np.multiply(source, bends[piece], out=target)
                np.add(target, change, out=target)
                change = np.add(target, levels[piece], out=target)
            np.multiply(change, slopes[piece], out=target)

    run_shares(tuple(_pieces(rows, columns, LONG)), finish)
    return out.reshape(x.shape).astype(x.dtype, copy=False), dscaler, dintercept


def _gradient_sums(
    grad: Array, flat: Array, work: tuple[list[Piece], ...], columns: int, means: _Tiles | None
) -> tuple[Array, Array]:
    """Return the sums of ``dy * (x - mean)`` (of ``dy * x`` without means) and of ``dy``."""
    found = [(_Sums(columns), _Sums(columns)) for _ in work]

    def run(k: int, share: list[Piece]) -> None:
        for piece in share:
            block, source = _view(grad, piece), _view(flat, piece)
            product = scratch.get("normalized", block.shape, grad.dtype)
            if means is not None:
                source = np.subtract(source, means[piece], out=product)
            found[k][0].add(np.multiply(source, block, out=product))
            found[k][1].add(block)

    run_shares(work, run)
    total = np.zeros((2, columns))
    for products, sums in found:
        total[0] += products.result()
        total[1] += sums.result()
    return total[0], total[1]


# ---------------------------------------------------------- statistics of rows: layer normalisation


def rows_forward(x: Array, scaler: Array, intercept: Array, epsilon: float) -> tuple[Array, Any]:
    """Return ``scaler * (x - mean) / sqrt(variance + epsilon) + intercept``, row by row.

    Parameters
    ----------
    x : ndarray, shape (rows, columns)
    scaler, intercept : ndarray, shape (columns,)
    epsilon : float

    Returns
    -------
    y : ndarray
        Of the shape and dtype of ``x``.
    statistics : tuple of ndarray
        Mean and one over the deviation, ``(rows, 1)``: for :func:`rows_grad`.
    """
    xp = namespace(x)
    rows, columns = x.shape
    dtype = wide_dtype(x.dtype.name)
    if xp is not np:
        mean = x.mean(axis=1, keepdims=True, dtype=dtype)
        centred = x - mean
        inverse = 1 / xp.sqrt(xp.square(centred).mean(axis=1, keepdims=True) + epsilon)
        return (centred * inverse * scaler + intercept).astype(x.dtype, copy=False), (mean, inverse)
    kind, x = x.dtype, np.ascontiguousarray(x, dtype)
    scaler, intercept = scaler.astype(dtype, copy=False), intercept.astype(dtype, copy=False)
    y = memory.empty(x.shape, dtype)
    mean, inverse = np.empty((rows, 1), dtype), np.empty((rows, 1), dtype)

    def run(part: slice) -> None:
        block, target = x[part], y[part]
        ones = _ones(columns, dtype)
        mean[part, 0] = block @ ones / columns
        np.subtract(block, mean[part], out=target)
        square = scratch.get("normalized", block.shape, dtype)
        np.multiply(target, target, out=square)
        inverse[part, 0] = 1 / np.sqrt(square @ ones / columns + epsilon)
        np.multiply(target, inverse[part], out=target)
        np.multiply(target, scaler, out=target)
        np.add(target, intercept, out=target)

    _over_rows(rows, columns, lambda _, part: run(part))
    return y.astype(kind, copy=False), (mean, inverse)


def rows_grad(
    dy: Array, x: Array, statistics: Any, scaler: Array, needs_x: bool
) -> tuple[Array | None, Array, Array]:
    """Return the gradients of :func:`rows_forward` for ``x``, ``scaler`` and ``intercept``."""
    xp = namespace(x)
    rows, columns = x.shape
    mean, inverse = statistics
    if xp is not np:
        hat = (x - mean) * inverse
        dscaler, dintercept = (dy * hat).sum(axis=0), dy.sum(axis=0, dtype=hat.dtype)
        if not needs_x:
            return None, dscaler, dintercept
        g = dy * scaler
        g = g - g.mean(axis=1, keepdims=True) - hat * (g * hat).mean(axis=1, keepdims=True)
        return (g * inverse).astype(x.dtype, copy=False), dscaler, dintercept
    kind, dtype = x.dtype, mean.dtype
    x, dy = np.ascontiguousarray(x, dtype), np.ascontiguousarray(dy, dtype)
    scaler = scaler.astype(dtype, copy=False)
    dx = memory.empty(x.shape, dtype) if needs_x else None
    sums: dict[int, Array] = {}

    def run(k: int, part: slice) -> None:
        block = dy[part]
        ones, column = _ones(columns, dtype), _ones(len(block), dtype)
        hat = scratch.get("normalized", block.shape, dtype)
        product = scratch.get("product", block.shape, dtype)
        np.subtract(x[part], mean[part], out=hat)
        np.multiply(hat, inverse[part], out=hat)
        np.multiply(block, hat, out=product)
        total = sums.setdefault(k, np.zeros((2, columns), dtype))
        total[0] += column @ product
        total[1] += column @ block
        if dx is None:
            return
        target = dx[part]
        np.multiply(product, scaler, out=product)
        tilt = (product @ ones / columns)[:, None]
        np.multiply(block, scaler, out=target)
        level = (target @ ones / columns)[:, None]
        np.multiply(hat, tilt, out=hat)
        np.subtract(target, hat, out=target)
        np.subtract(target, level, out=target)
        np.multiply(target, inverse[part], out=target)

    _over_rows(rows, columns, run)
    total = np.zeros((2, columns))
    for k in sorted(sums):
        total += sums[k]
    result = None if dx is None else dx.astype(kind, copy=False)
    return result, total[0], total[1]


def _over_rows(rows: int, columns: int, run: Callable[[int, slice], None]) -> None:
    """Call ``run(worker, rows)`` for blocks of rows."""
    if rows == 0:
        return
    step = max(1, BLOCK // columns)
    work = tuple(shares(rows, worker_count(16 * rows * columns)))

    def walk(k: int, share: range) -> None:
        for start in range(share.start, share.stop, step):
            run(k, slice(start, min(start + step, share.stop)))

    run_shares(work, walk)
