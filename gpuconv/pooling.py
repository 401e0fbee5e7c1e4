"""Maximum and mean over windows, over one to three spatial axes, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuconv.arguments import boolean
from gpuconv.device import Device, device_of, namespace
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
        As for :func:`pool`. The values of ``x`` and ``y`` matter to a maximum only.
    """
    xp = namespace(x)
    w = Windows(x.shape[1:-1], kernel, stride, pads, 1)
    if mode == "max" and any(map(any, pads)) and x.size:
        # Zeros that take part, and may win: put there to be found.
        inner = (slice(None), *(slice(p[0], p[0] + n) for n, p in zip(w.size, pads, strict=True)))
        sizes = (n + sum(p) for n, p in zip(w.size, pads, strict=True))
        padded = xp.zeros((x.shape[0], *sizes, x.shape[-1]), x.dtype)
        padded[inner] = x
        return pool_grad(dy, padded, y, kernel, stride, ((0, 0),) * len(pads), mode)[inner]
    dx = xp.empty(x.shape, dy.dtype)
    if not dx.size:
        return dx
    if mode == "max":
        windowed.max_grad(dy, _largest(x, y.shape, w)[1], dx)
    else:
        windowed.mean_grad(dy, dx, w, "zeros")
    return dx


def _largest(x: Array, shape: _Shape, w: Windows) -> tuple[Array, Array]:
    """Return the maxima and where they are."""
    xp = namespace(x)
    y, indices = xp.empty(shape, x.dtype), xp.empty(shape, "int64")
    if x.size:
        windowed.pool_indices(x, y, indices, w)
    return y, indices


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
    return "zeros" if boolean("count_include_pad", count_include_pad) else "outside"


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
    return_indices: bool = False,
) -> Any:
    where = check_arrays({"x": x})
    if where is None:
        return dlpack.call(
            lambda x, out: _pool(
                nd, x, kernel, stride, padding, layout, mode, padded, out, return_indices
            ),
            {"x": x, "out": out},
        )
    x = native(x)
    _real(x)
    w, shape = _windows(nd, x.shape, kernel, stride, padding, layout)
    if out is not None:
        check_out(out, shape, x, where)
    with on(where):
        if return_indices:
            y, indices = _largest(x, shape, w)
            if out is not None:
                out[...] = y
            return (y if out is None else out), indices
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
    indices: Array | None,
    kernel: Any,
    stride: Any,
    padding: Any,
    layout: Any,
) -> Array:
    """Return the gradient of a maximum."""
    where = check_arrays({"dy": dy, "x": x})
    if where is None:
        return dlpack.call(
            lambda dy, x, indices: _pool_backward(
                nd, dy, x, indices, kernel, stride, padding, layout
            ),
            {"dy": dy, "x": x, "indices": indices},
        )
    dy, x = native(dy), native(x)
    _real(x)
    w, shape = _windows(nd, x.shape, kernel, stride, padding, layout)
    _result("dy", dy, shape)
    if indices is not None:
        _check_indices(indices, shape, x)
    with on(where):
        dx = namespace(x).empty(x.shape, x.dtype)
        if x.size:
            if indices is None:
                indices = _largest(x, shape, w)[1]
            windowed.max_grad(dy, indices, dx)
    return dx


def _check_indices(indices: Array, shape: _Shape, x: Array) -> None:
    expected = f"the int64 array of shape {shape} that return_indices gave"
    if device_of(indices) != device_of(x):
        raise TypeError(f"indices is a {type(indices).__name__}; expected {expected}")
    if indices.dtype != "int64":
        raise TypeError(f"indices has dtype {indices.dtype}; expected {expected}")
    if indices.shape != shape:
        raise ValueError(f"indices has shape {indices.shape}; expected {expected}")
    # Seen without a sign a negative one is too large as well.
    if indices.size and int(indices.view("uint64").max()) >= x.size:
        raise ValueError(f"indices reach beyond the {x.size} values of x; expected {expected}")


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
            windowed.mean_grad(dy, dx, w, padded)
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
    return _pool(2, x, kernel, stride, padding, layout, "max", "outside", out, indexed)


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
    return _pool_backward(2, dy, x, indices, kernel, stride, padding, layout)


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
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window over one spatial axis; see :func:`max_pool2d`."""
    indexed = boolean("return_indices", return_indices)
    return _pool(1, x, kernel, stride, padding, layout, "max", "outside", out, indexed)


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
    return _pool_backward(1, dy, x, indices, kernel, stride, padding, layout)


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
    return_indices: bool = False,
) -> Any:
    """Return the maximum of every window over three spatial axes; see :func:`max_pool2d`."""
    indexed = boolean("return_indices", return_indices)
    return _pool(3, x, kernel, stride, padding, layout, "max", "outside", out, indexed)


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
    return _pool_backward(3, dy, x, indices, kernel, stride, padding, layout)


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
