"""What gpuconv is measured against where there is no library: a plain im2col, and the loops.

Both are written from scratch after the method of numpy-ml's layer, as most code that trains
convolutions with NumPy alone is: a padded copy of the input, every window of the batch gathered
by fancy indexing into one matrix, one matrix product, and ``np.add.at`` to put the windows'
gradients back. Arrays are NHWC, weights HWIO; padding is symmetric or not, as the problem says.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gpuconv.problem import ConvProblem

__all__ = [
    "TooSlow",
    "columns_bytes",
    "im2col_backward",
    "im2col_forward",
    "loops_backward",
    "loops_forward",
]

Array = np.ndarray[Any, Any]


class TooSlow(Exception):
    """It would not finish within the time allowed."""


# ---------------------------------------------------------------------------------- im2col


def columns_bytes(problem: ConvProblem, itemsize: int) -> int:
    """Return the size of the matrix of all windows."""
    rows, columns = problem.out_shape
    return itemsize * problem.batch * rows * columns * problem.taps * problem.in_channels


def _indices(problem: ConvProblem) -> tuple[Array, Array, Array]:
    """Return channel, row and column of each element of the window matrix in the padded input.

    Its rows run over channel and tap, its columns over output positions.
    """
    (kr, kc), (sr, sc), (dr, dc) = problem.kernel, problem.stride, problem.dilation
    out_rows, out_columns = problem.out_shape
    channel = np.repeat(np.arange(problem.in_channels), kr * kc)[:, None]
    tap_row = np.tile(np.repeat(np.arange(kr) * dr, kc), problem.in_channels)
    tap_column = np.tile(np.arange(kc) * dc, kr * problem.in_channels)
    at_row = np.repeat(np.arange(out_rows) * sr, out_columns)
    at_column = np.tile(np.arange(out_columns) * sc, out_rows)
    return channel, tap_row[:, None] + at_row, tap_column[:, None] + at_column


def _padded(problem: ConvProblem, x: Array) -> Array:
    return np.pad(x, ((0, 0), *problem.padding, (0, 0)))


def _im2col(problem: ConvProblem, x: Array) -> Array:
    """Return the windows of the whole batch, ``(channels * taps, positions * batch)``."""
    channel, row, column = _indices(problem)
    windows = _padded(problem, x).transpose(0, 3, 1, 2)[:, channel, row, column]
    return windows.transpose(1, 2, 0).reshape(len(channel), -1)


def _weight_rows(problem: ConvProblem, w: Array) -> Array:
    return w.transpose(3, 2, 0, 1).reshape(problem.out_channels, -1)


def im2col_forward(problem: ConvProblem, x: Array, w: Array, b: Array | None, relu: bool) -> Array:
    """Return ``conv(x, w) + b``, with ReLU or without."""
    z = _weight_rows(problem, w) @ _im2col(problem, x)
    out = z.reshape(problem.out_channels, *problem.out_shape, problem.batch).transpose(3, 1, 2, 0)
    if b is not None:
        out = out + b
    return np.maximum(out, 0) if relu else out


def im2col_backward(
    problem: ConvProblem, dz: Array, x: Array, w: Array, needs: str = "xwb"
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of the plain convolution for those of x, w, b that are needed."""
    rows = dz.transpose(3, 1, 2, 0).reshape(problem.out_channels, -1)
    dx = dw = db = None
    if "w" in needs:
        dw = rows @ _im2col(problem, x).T
        dw = dw.reshape(problem.out_channels, problem.in_channels, *problem.kernel)
        dw = dw.transpose(2, 3, 1, 0)
    if "b" in needs:
        db = rows.sum(axis=1)
    if "x" in needs:
        dx = _col2im(problem, _weight_rows(problem, w).T @ rows)
    return dx, dw, db


def _col2im(problem: ConvProblem, columns: Array) -> Array:
    """Return the sum of the windows at their places, without the padding."""
    channel, row, column = _indices(problem)
    (top, bottom), (left, right) = problem.padding
    height, width = problem.in_shape
    shape = (problem.batch, problem.in_channels, height + top + bottom, width + left + right)
    padded = np.zeros(shape, columns.dtype)
    windows = columns.reshape(len(channel), -1, problem.batch).transpose(2, 0, 1)
    at: Any = (slice(None), channel, row, column)
    np.add.at(padded, at, windows)
    return padded[:, :, top : top + height, left : left + width].transpose(0, 2, 3, 1)


# ----------------------------------------------------------------------------------- loops


class _Deadline:
    """Raises once the rows done so far tell that all rows will take too long."""

    def __init__(self, rows: int, limit: float) -> None:
        self.rows, self.limit = rows, limit
        self.done, self.start = 0, time.perf_counter()

    def row(self) -> None:
        self.done += 1
        elapsed = time.perf_counter() - self.start
        if elapsed / self.done * self.rows > self.limit:
            raise TooSlow(f"the loops would take more than {self.limit:g} s")


def _group(problem: ConvProblem, channel: int) -> slice:
    """Return the input channels that an output channel sees."""
    width = problem.in_channels // problem.groups
    group = channel // (problem.out_channels // problem.groups)
    return slice(group * width, (group + 1) * width)


def _window(problem: ConvProblem, row: int, column: int) -> tuple[slice, slice]:
    """Return where in the padded input the window of an output position lies."""
    (sr, sc), (dr, dc), (wr, wc) = problem.stride, problem.dilation, problem.window
    return slice(row * sr, row * sr + wr, dr), slice(column * sc, column * sc + wc, dc)


def loops_forward(
    problem: ConvProblem, x: Array, w: Array, b: Array | None, relu: bool, limit: float
) -> Array:
    """Return ``conv(x, w) + b`` by loops over example, position and output channel.

    Raises
    ------
    TooSlow
        If it would take more than ``limit`` seconds.
    """
    padded = _padded(problem, x)
    rows, columns = problem.out_shape
    y = np.zeros(problem.y_shape, x.dtype)
    deadline = _Deadline(problem.batch * rows, limit)
    for n in range(problem.batch):
        for i in range(rows):
            for j in range(columns):
                at = _window(problem, i, j)
                for c in range(problem.out_channels):
                    window = padded[(n, *at, _group(problem, c))]
                    y[n, i, j, c] = np.sum(window * w[:, :, :, c])
            deadline.row()
    if b is not None:
        y = y + b
    return np.maximum(y, 0) if relu else y


def loops_backward(
    problem: ConvProblem,
    dz: Array,
    x: Array,
    w: Array,
    limit: float,
    needs: str = "xwb",
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients by the same loops, each output adding into its window.

    Raises
    ------
    TooSlow
        If it would take more than ``limit`` seconds.
    """
    padded = _padded(problem, x)
    rows, columns = problem.out_shape
    dx, dw, db = np.zeros_like(padded), np.zeros_like(w), np.zeros(problem.out_channels, x.dtype)
    deadline = _Deadline(problem.batch * rows, limit)
    for n in range(problem.batch):
        for i in range(rows):
            for j in range(columns):
                at = _window(problem, i, j)
                for c in range(problem.out_channels):
                    window, d = (n, *at, _group(problem, c)), dz[n, i, j, c]
                    if "x" in needs:
                        dx[window] += d * w[:, :, :, c]
                    if "w" in needs:
                        dw[:, :, :, c] += d * padded[window]
                    if "b" in needs:
                        db[c] += d
            deadline.row()
    (top, _), (left, _) = problem.padding
    height, width = problem.in_shape
    inner = dx[:, top : top + height, left : left + width]
    return (
        inner if "x" in needs else None,
        dw if "w" in needs else None,
        db if "b" in needs else None,
    )
