"""Maximum and mean over windows, over one to three spatial axes, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuconv.device import Device, namespace
from gpuconv.engines import pooling as windowed
from gpuconv.engines.pooling import Windows
from gpuconv.functional.passes import check_arrays, check_out, native, on, overlap
from gpuconv.functional.plan import (
    Ints,
    Padding,
    channels_last,
    hashable,
    padding_argument,
    per_axis,
    shape_argument,
)
from gpuconv.interop import dlpack
from gpuconv.problem import COMPLEX

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
_Shape = tuple[int, ...]
_Pads = tuple[tuple[int, int], ...]


# --------------------------------------------------------------------------- for the layers


def pooled_shape(shape: _Shape, kernel: _Shape, stride: _Shape, pads: _Pads) -> _Shape:
    """Return the shape of the result for an input of ``shape``, batch and channels included."""
    return (shape[0], *Windows(shape[1:-1], kernel, stride, pads, 1).out, shape[-1])


def pool(x: Array, kernel: _Shape, stride: _Shape, pads: _Pads, mode: str) -> Array:
    """Return the maximum or the mean of every window; zeros of the padding take part.

    Parameters
    ----------
    x : ndarray
        ``(batch, *spatial, channels)``.
    kernel, stride : tuple of int
        Per spatial axis.
    pads : tuple of (int, int)
        Zeros before and after, per spatial axis.
    mode : {"max", "average"}
        NaN in a window gives NaN in either.
    """
    w = Windows(x.shape[1:-1], kernel, stride, pads, 1)
    y = namespace(x).empty((x.shape[0], *w.out, x.shape[-1]), x.dtype)
    if y.size:
        windowed.pool(x, y, w, mode, "zeros")
    return y


def pool_grad(
    dy: Array, x: Array, y: Array, kernel: _Shape, stride: _Shape, pads: _Pads, mode: str
) -> Array:
    """Return the gradient of :func:`pool` with respect to ``x``.

    A maximum that several taps share gives its gradient to the first, in row-major order.

    Parameters
    ----------
    dy, y : ndarray
        Gradient with respect to the result, and the result.
    x, kernel, stride, pads, mode
        As for :func:`pool`.
    """
    w = Windows(x.shape[1:-1], kernel, stride, pads, 1)
    dx = namespace(x).empty(x.shape, dy.dtype)
    if dx.size:
        largest = mode == "max"
        windowed.pool_grad(dy, x if largest else None, y if largest else None, dx, w, mode, "zeros")
    return dx


# ---------------------------------------------------------------------------- over any rank


def _windows(
    nd: int, shape: _Shape, kernel: Any, stride: Any, padding: Any, layout: Any
) -> tuple[Windows, _Shape]:
    """Return the checked windows, and the shape of the result."""
    last = channels_last(nd, layout)
    if len(shape) != nd + 2:
        raise ValueError(f"x has {len(shape)} axes, of shape {shape}; expected {nd + 2}")
    size = shape[1:-1] if last else shape[2:]
    if min(shape[1:]) < 1:
        raise ValueError(f"x has shape {shape}; expected all but the batch to be at least 1")
    kernel = per_axis("kernel", hashable(kernel), nd)
    stride = kernel if stride is None else per_axis("stride", hashable(stride), nd)
    pads = padding_argument(hashable(padding), nd, size, kernel, stride, False)
    for pair, k, n in zip(pads, kernel, size, strict=True):
        if max(pair) >= k:
            raise ValueError(f"padding is {padding!r}; expected less than the kernel, {kernel}")
        if k > n + sum(pair):
            raise ValueError(
                f"kernel is {kernel}; expected at most the padded input, of {size} and {pads}"
            )
    w = Windows(size, kernel, stride, pads, 1 if last else 2)
    return w, (shape[0], *w.out, shape[-1]) if last else (*shape[:2], *w.out)


def _real(x: Array) -> None:
    if x.dtype.name in COMPLEX:
        raise TypeError(f"x has dtype {x.dtype}; expected real numbers, which have a mean or order")


def _padded(count_include_pad: Any) -> str:
    if not isinstance(count_include_pad, bool):
        raise TypeError(f"count_include_pad is {count_include_pad!r}; expected True or False")
    return "zeros" if count_include_pad else "outside"


def _pool(
    nd: int,
    x: Array,
    kernel: Any,
    stride: Any,
    padding: Any,
    layout: Any,
    mode: str,
    padded: str,
    out: Array | None,
) -> Array:
    where = check_arrays({"x": x})
    if where is None:
        return dlpack.call(
            lambda x, out: _pool(nd, x, kernel, stride, padding, layout, mode, padded, out),
            {"x": x, "out": out},
        )
    x = native(x)
    _real(x)
    w, shape = _windows(nd, x.shape, kernel, stride, padding, layout)
    if out is not None:
        check_out(out, shape, x, where)
    with on(where):
        y = out
        if y is None or overlap(y, x):
            y = namespace(x).empty(shape, x.dtype)
        if x.size:
            windowed.pool(x, y, w, mode, padded)
        if out is not None and y is not out:
            out[...] = y
            return out
    return y


def _pool_backward(
    nd: int,
    dy: Array,
    x: Array,
    y: Array | None,
    kernel: Any,
    stride: Any,
    padding: Any,
    layout: Any,
) -> Array:
    """Return the gradient of a maximum."""
    where = check_arrays({"dy": dy, "x": x, "y": y})
    if where is None:
        return dlpack.call(
            lambda dy, x, y: _pool_backward(nd, dy, x, y, kernel, stride, padding, layout),
            {"dy": dy, "x": x, "y": y},
        )
    dy, x, y = native(dy), native(x), None if y is None else native(y)
    _real(x)
    w, shape = _windows(nd, x.shape, kernel, stride, padding, layout)
    _result("dy", dy, shape)
    if y is not None:
        _result("y", y, shape)
    with on(where):
        dx = namespace(x).empty(x.shape, x.dtype)
        if x.size:
            if y is None:
                y = namespace(x).empty(shape, x.dtype)
                windowed.pool(x, y, w, "max", "outside")
            windowed.pool_grad(dy, x, y, dx, w, "max", "outside")
    return dx


def _mean_backward(
    nd: int,
    dy: Array,
    x_shape: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    layout: Any,
    padded: str,
) -> Array:
    """Return the gradient of a mean."""
    where: Device | None = check_arrays({"dy": dy})
    if where is None:
        return dlpack.call(
            lambda dy: _mean_backward(nd, dy, x_shape, kernel, stride, padding, layout, padded),
            {"dy": dy},
        )
    dy = native(dy)
    _real(dy)
    size = shape_argument("x_shape", x_shape)
    w, shape = _windows(nd, size, kernel, stride, padding, layout)
    _result("dy", dy, shape)
    with on(where):
        dx = namespace(dy).empty(size, dy.dtype)
        if dx.size:
            windowed.pool_grad(dy, None, None, dx, w, "average", padded)
    return dx


def _result(name: str, array: Array, shape: _Shape) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}, the forward's result")


# ---------------------------------------------------------------------------- the calls


def max_pool2d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NHWC",
    out: Array | None = None,
) -> Array:
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

    Returns
    -------
    y : ndarray
        ``(batch, out_rows, out_columns, channels)``, in the layout of ``x``. NaN where a window
        has one.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    return _pool(2, x, kernel, stride, padding, layout, "max", "outside", out)


def max_pool2d_backward(
    dy: Array,
    x: Array,
    kernel: Ints,
    *,
    y: Array | None = None,
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
    y : ndarray, optional
        The forward's result; computed again if not given.

    Returns
    -------
    dx : ndarray
        Each window's gradient at its maximum; at the first of several, in row-major order.
    """
    return _pool_backward(2, dy, x, y, kernel, stride, padding, layout)


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
    padded = _padded(count_include_pad)
    return _pool(2, x, kernel, stride, padding, layout, "average", padded, out)


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
    padded = _padded(count_include_pad)
    return _mean_backward(2, dy, x_shape, kernel, stride, padding, layout, padded)


def max_pool1d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NWC",
    out: Array | None = None,
) -> Array:
    """Return the maximum of every window over one spatial axis; see :func:`max_pool2d`."""
    return _pool(1, x, kernel, stride, padding, layout, "max", "outside", out)


def max_pool1d_backward(
    dy: Array,
    x: Array,
    kernel: Ints,
    *,
    y: Array | None = None,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NWC",
) -> Array:
    """Return the gradient of :func:`max_pool1d`; see :func:`max_pool2d_backward`."""
    return _pool_backward(1, dy, x, y, kernel, stride, padding, layout)


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
    padded = _padded(count_include_pad)
    return _pool(1, x, kernel, stride, padding, layout, "average", padded, out)


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
    padded = _padded(count_include_pad)
    return _mean_backward(1, dy, x_shape, kernel, stride, padding, layout, padded)


def max_pool3d(
    x: Array,
    kernel: Ints,
    *,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NDHWC",
    out: Array | None = None,
) -> Array:
    """Return the maximum of every window over three spatial axes; see :func:`max_pool2d`."""
    return _pool(3, x, kernel, stride, padding, layout, "max", "outside", out)


def max_pool3d_backward(
    dy: Array,
    x: Array,
    kernel: Ints,
    *,
    y: Array | None = None,
    stride: Ints | None = None,
    padding: Padding = 0,
    layout: str = "NDHWC",
) -> Array:
    """Return the gradient of :func:`max_pool3d`; see :func:`max_pool2d_backward`."""
    return _pool_backward(3, dy, x, y, kernel, stride, padding, layout)


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
    padded = _padded(count_include_pad)
    return _pool(3, x, kernel, stride, padding, layout, "average", padded, out)


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
    padded = _padded(count_include_pad)
    return _mean_backward(3, dy, x_shape, kernel, stride, padding, layout, padded)
