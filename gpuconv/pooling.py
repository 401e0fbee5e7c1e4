"""Maximum and mean over windows, over one to three spatial axes, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuconv.arguments import boolean
from gpuconv.functional.plan import Ints, Padding
from gpuconv.functional.pooling_passes import (
    average_backward,
    forward,
    max_backward,
    padding_counts,
    pool,
    pool_grad,
    pooled_shape,
)

__all__ = [
    "avg_pool1d",
    "avg_pool1d_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
    "avg_pool3d",
    "avg_pool3d_backward",
    "max_pool1d",
    "max_pool1d_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool3d",
    "max_pool3d_backward",
    "pool",
    "pool_grad",
    "pooled_shape",
]

Array = Any


def max_pool2d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NHWC",
    out: Array | None = None,
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window.

    Parameters
    ----------
    x : ndarray
        ``(batch, rows, columns, channels)``, or ``(batch, channels, rows, columns)`` for NCHW;
        of any real dtype that :func:`gpuconv.conv2d` takes, and of the same libraries.
    kernel : int or pair of int
        Rows and columns of the window.
    stride : int or pair of int, optional
        Step of the window; ``kernel`` if not given.
    padding : int, pair, pair of pairs, "same" or "valid"
        Cells around the image, less than the kernel on each side. They never win: a window's
        maximum is that of its cells inside the image.
    layout : {"NHWC", "NCHW"}
        Also ``"channels_last"`` and ``"channels_first"``.
    out : ndarray, optional
        Where to put the result.
    return_indices : bool
        Whether to return where the maxima are as well, for the gradient.

    Returns
    -------
    y : ndarray
        ``(batch, out_rows, out_columns, channels)``, in the layout of ``x``. NaN where a window
        has one.
    indices : ndarray, with ``return_indices`` only
        int64, of the shape of ``y``: an index into ``x.reshape(-1)``. The first of several cells
        that share a maximum, in row-major order.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    indexed = boolean("return_indices", return_indices)
    return forward(2, x, kernel, stride, padding, layout, "max", "outside", out, indexed)


def max_pool2d_backward(
    dy: Array,
    x: Array,
    kernel: Ints,
    *,
    indices: Array | None = None,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NHWC",
) -> Array:
    """Return the gradient of :func:`max_pool2d` with respect to ``x``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the result.
    x : ndarray
        The forward's input.
    kernel, stride, padding, layout
        As in the forward.
    indices : ndarray, optional
        Where the maxima are, as the forward returned it; found again if not given.

    Returns
    -------
    dx : ndarray
        Each window's gradient at its maximum; at the first of several, in row-major order.
    """
    return max_backward(2, dy, x, indices, kernel, stride, padding, layout)


def avg_pool2d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NHWC",
    count_include_pad: bool = True,
    out: Array | None = None,
) -> Array:
    """Return the mean of every window.

    Parameters
    ----------
    x, kernel, stride, padding, layout, out
        As for :func:`max_pool2d`.
    count_include_pad : bool
        Whether cells of the padding count, as zeros; else the mean is over those inside.

    Returns
    -------
    y : ndarray
        As for :func:`max_pool2d`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    padded = padding_counts(count_include_pad)
    return forward(2, x, kernel, stride, padding, layout, "average", padded, out)


def avg_pool2d_backward(
    dy: Array,
    x_shape: Sequence[int],
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NHWC",
    count_include_pad: bool = True,
) -> Array:
    """Return the gradient of :func:`avg_pool2d` with respect to ``x``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the result.
    x_shape : sequence of int
        Shape of the forward's input.
    kernel, stride, padding, layout, count_include_pad
        As in the forward.
    """
    padded = padding_counts(count_include_pad)
    return average_backward(2, dy, x_shape, kernel, stride, padding, layout, padded)


def max_pool1d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NWC",
    out: Array | None = None,
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window over one spatial axis; see :func:`max_pool2d`."""
    indexed = boolean("return_indices", return_indices)
    return forward(1, x, kernel, stride, padding, layout, "max", "outside", out, indexed)


def max_pool1d_backward(
    dy: Array,
    x: Array,
    kernel: Ints,
    *,
    indices: Array | None = None,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NWC",
) -> Array:
    """Return the gradient of :func:`max_pool1d`; see :func:`max_pool2d_backward`."""
    return max_backward(1, dy, x, indices, kernel, stride, padding, layout)


def avg_pool1d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NWC",
    count_include_pad: bool = True,
    out: Array | None = None,
) -> Array:
    """Return the mean of every window over one spatial axis; see :func:`avg_pool2d`."""
    padded = padding_counts(count_include_pad)
    return forward(1, x, kernel, stride, padding, layout, "average", padded, out)


def avg_pool1d_backward(
    dy: Array,
    x_shape: Sequence[int],
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NWC",
    count_include_pad: bool = True,
) -> Array:
    """Return the gradient of :func:`avg_pool1d`; see :func:`avg_pool2d_backward`."""
    padded = padding_counts(count_include_pad)
    return average_backward(1, dy, x_shape, kernel, stride, padding, layout, padded)


def max_pool3d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NDHWC",
    out: Array | None = None,
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window over three spatial axes; see :func:`max_pool2d`."""
    indexed = boolean("return_indices", return_indices)
    return forward(3, x, kernel, stride, padding, layout, "max", "outside", out, indexed)


def max_pool3d_backward(
    dy: Array,
    x: Array,
    kernel: Ints,
    *,
    indices: Array | None = None,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NDHWC",
) -> Array:
    """Return the gradient of :func:`max_pool3d`; see :func:`max_pool2d_backward`."""
    return max_backward(3, dy, x, indices, kernel, stride, padding, layout)


def avg_pool3d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NDHWC",
    count_include_pad: bool = True,
    out: Array | None = None,
) -> Array:
    """Return the mean of every window over three spatial axes; see :func:`avg_pool2d`."""
    padded = padding_counts(count_include_pad)
    return forward(3, x, kernel, stride, padding, layout, "average", padded, out)


def avg_pool3d_backward(
    dy: Array,
    x_shape: Sequence[int],
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NDHWC",
    count_include_pad: bool = True,
) -> Array:
    """Return the gradient of :func:`avg_pool3d`; see :func:`avg_pool2d_backward`."""
    padded = padding_counts(count_include_pad)
    return average_backward(3, dy, x_shape, kernel, stride, padding, layout, padded)
