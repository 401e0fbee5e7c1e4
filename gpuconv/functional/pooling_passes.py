"""What the pooling calls and layers do: check, describe the windows, compute."""

from __future__ import annotations

from typing import Any

from gpuconv import memory, settings
from gpuconv.arguments import boolean
from gpuconv.compiled import pooling as fast
from gpuconv.device import device_of
from gpuconv.engines import pooling as windowed
from gpuconv.engines import pooling_max
from gpuconv.engines.pooling import Windows
from gpuconv.engines.pooling_max_grad import max_grad_by_codes, max_grad_by_values, pool_max
from gpuconv.functional.passes import check_arrays, check_out, native, on, overlap
from gpuconv.functional.plan import (
    channels_last,
    hashable,
    padding_argument,
    per_axis,
    shape_argument,
)
from gpuconv.interop import dlpack
from gpuconv.problem import COMPLEX

__all__ = [
    "average_backward",
    "forward",
    "max_backward",
    "padding_counts",
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


def pool(
    x: Array, kernel: _Shape, stride: _Shape, pads: _Pads, mode: str, retain: bool = False
) -> tuple[Array, Any]:
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
    retain : bool
        Whether the gradient will be asked for.

    Returns
    -------
    y : ndarray
    winners : object
        For :func:`pool_grad`: which cells the maxima are, a byte or two each; None for a mean.
    """
    w = Windows(x.shape[1:-1], kernel, stride, pads, 1)
    y = memory.empty_as(x, (x.shape[0], *w.out, x.shape[-1]))
    if not y.size:
        return y, None
    if mode == "max" and retain:
        found = fast.pool_max(x, y, w, "zeros")
        return y, pool_max(x, y, w, "zeros") if found is None else found
    windowed.pool(x, y, w, mode, "zeros")
    return y, None


def pool_grad(
    dy: Array, winners: Any, shape: _Shape, kernel: _Shape, stride: _Shape, pads: _Pads, mode: str
) -> Array:
    """Return the gradient of :func:`pool` with respect to ``x``.

    A maximum that several taps share gives its gradient to the first, in row-major order.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the result.
    winners : object
        What the forward returned.
    shape : tuple of int
        Of ``x``.
    kernel, stride, pads, mode
        As for :func:`pool`.
    """
    dx = memory.empty_as(dy, shape)
    if not dx.size:
        return dx
    w = Windows(shape[1:-1], kernel, stride, pads, 1)
    if mode == "average":
        windowed.mean_grad(dy, dx, w, "zeros")
    elif isinstance(winners, list):
        max_grad_by_codes(dy, winners, dx, w)
    else:
        fast.max_grad(dy, winners, dx, w)
    return dx


def _largest(x: Array, shape: _Shape, w: Windows) -> tuple[Array, Array]:
    """Return the maxima and where they are."""
    y, indices = memory.empty_as(x, shape), memory.empty_as(x, shape, "int64")
    if x.size:
        pooling_max.pool_indices(x, y, indices, w)
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


def padding_counts(count_include_pad: Any) -> str:
    """Return how the padding takes part in a mean."""
    return "zeros" if boolean("count_include_pad", count_include_pad) else "outside"


def forward(
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
    """Return the maximum or the mean of every window, and indices if they are asked for."""
    where = check_arrays({"x": x})
    if where is None:
        return dlpack.call(
            lambda x, out: forward(
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
            y = memory.empty_as(x, shape)
        if x.size:
            windowed.pool(x, y, w, mode, padded)
        if out is not None and y is not out:
            out[...] = y
            return out
    return y


def max_backward(
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
            lambda dy, x, indices: max_backward(
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
        dx = memory.empty_as(x)
        if x.size:
            # A device scatters with atomics, whose order changes the last bits.
            scattered = indices is not None and (
                where.kind == "cpu" or not settings.is_deterministic()
            )
            if not scattered:
                max_grad_by_values(dy, x, dx, w)
            else:
                pooling_max.max_grad(dy, indices, dx)
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


def average_backward(
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
    where = check_arrays({"dy": dy})
    if where is None:
        return dlpack.call(
            lambda dy: average_backward(nd, dy, x_shape, kernel, stride, padding, layout, padded),
            {"dy": dy},
        )
    dy = native(dy)
    _real(dy)
    size = shape_argument("x_shape", x_shape)
    w, shape = _windows(nd, size, kernel, stride, padding, layout)
    _result("dy", dy, shape)
    with on(where):
        dx = memory.empty_as(dy, size)
        if dx.size:
            windowed.mean_grad(dy, dx, w, padded)
    return dx


def _result(name: str, array: Array, shape: _Shape) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}, the forward's result")
