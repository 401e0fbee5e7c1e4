"""The convolutions and poolings of ``cupy.cudnn``, which CuPy had until version 13.

A program repairs itself with ``from gpuconv.compat import cudnn`` in the place of ``from cupy
import cudnn``. Signatures and contract are the same: results are written into the arrays
given, of two or three spatial axes. CuPy arrays are computed on their device; NumPy arrays are
taken too. ``auto_tune`` and ``tensor_core`` are taken and change nothing: engines are chosen
as everywhere (:func:`gpuconv.engine` forces one), and ``gpuconv.set_precision`` allows TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gpuconv import settings
from gpuconv.device import Device, namespace
from gpuconv.engines import pooling as windowed
from gpuconv.engines.pooling import Windows
from gpuconv.engines.pooling_max_grad import max_grad_by_values
from gpuconv.functional.passes import check_arrays, check_out, conv, conv_backward, on
from gpuconv.functional.plan import make_plan, padding_argument, per_axis
from gpuconv.functional.transposed_passes import conv_transpose
from gpuconv.problem import COMPLEX

__all__ = [
    "CUDNN_POOLING_AVERAGE_COUNT_EXCLUDE_PADDING",
    "CUDNN_POOLING_AVERAGE_COUNT_INCLUDE_PADDING",
    "CUDNN_POOLING_MAX",
    "CUDNN_POOLING_MAX_DETERMINISTIC",
    "CUDNN_TENSOR_NCHW",
    "CUDNN_TENSOR_NHWC",
    "convolution_backward_data",
    "convolution_backward_filter",
    "convolution_forward",
    "pooling_backward",
    "pooling_forward",
]

Array = Any
_Shape = tuple[int, ...]

# cuDNN's numbers.
CUDNN_TENSOR_NCHW = 0
CUDNN_TENSOR_NHWC = 1
CUDNN_POOLING_MAX = 0
CUDNN_POOLING_AVERAGE_COUNT_INCLUDE_PADDING = 1
CUDNN_POOLING_AVERAGE_COUNT_EXCLUDE_PADDING = 2
CUDNN_POOLING_MAX_DETERMINISTIC = 3


def convolution_forward(
    x: Array,
    W: Array,
    b: Array | None,
    y: Array,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Write the convolution of ``x`` with ``W``, plus ``b``, into ``y``.

    Parameters
    ----------
    x : ndarray
        ``(batch, in_ch, *size)``, two or three spatial axes; ``(batch, *size, in_ch)`` where
        ``d_layout`` is NHWC.
    W : ndarray
        ``(out_ch, in_ch // groups, *kernel)``; ``(out_ch, *kernel, in_ch // groups)`` where
        ``w_layout`` is NHWC.
    b : ndarray or None
        ``out_ch`` values.
    y : ndarray
        The result, in the layout of ``x``.
    pad, stride, dilation : sequence of int
        Per spatial axis; a dilation of 1 is dense.
    groups : int
        Number of channel groups.
    auto_tune, tensor_core
        Without effect; ``tensor_core`` is ``"always"``, ``"auto"`` or ``"never"``.
    d_layout, w_layout : int
        ``CUDNN_TENSOR_NCHW`` or ``CUDNN_TENSOR_NHWC``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; ``y`` is not written to then.
    """
    nd, where = _checked(x, {"x": x, "W": W, "y": y}, tensor_core)
    pad, stride, dilation = _options(nd, pad, stride, dilation)
    last, weights = _layout("d_layout", d_layout), _weights(W, w_layout, d_layout)
    layout = "channels_last" if last else "channels_first"
    plan = make_plan(
        nd, x.shape, weights.shape, x.dtype.name, stride, pad, dilation, groups, layout, None
    )
    _check_result("y", y, plan.y_shape, x, where)
    bias = _bias(b, plan.problem.out_channels, x)
    conv(nd, x, weights, bias, stride, pad, dilation, groups, layout, None, y)


def convolution_backward_filter(
    x: Array,
    gy: Array,
    gW: Array,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Write the gradient with respect to the weights into ``gW``.

    Parameters
    ----------
    x, gy : ndarray
        The forward's input, and the gradient with respect to its result.
    gW : ndarray
        The result, of the shape of the weights.
    deterministic : bool
        Whether the result must be the same bits every time.
    pad, stride, dilation, groups, auto_tune, tensor_core, d_layout, w_layout
        As for :func:`convolution_forward`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; ``gW`` is not written to then.
    """
    nd, where = _checked(x, {"x": x, "gy": gy, "gW": gW}, tensor_core)
    pad, stride, dilation = _options(nd, pad, stride, dilation)
    last, target = _layout("d_layout", d_layout), _weights(gW, w_layout, d_layout)
    layout = "channels_last" if last else "channels_first"
    plan = make_plan(
        nd, x.shape, target.shape, x.dtype.name, stride, pad, dilation, groups, layout, None
    )
    if gy.shape != plan.y_shape:
        raise ValueError(f"gy has shape {gy.shape}; expected {plan.y_shape}, the forward's result")
    _check_result("gW", gW, gW.shape, x, where)
    with _repeatable(deterministic), on(where):
        # The weights' values do not enter: their place is enough.
        _, dw, _ = conv_backward(
            nd, gy, x, target, None, None, stride, pad, dilation, groups, layout, ("w",)
        )
        target[...] = dw


def convolution_backward_data(
    W: Array,
    x: Array,
    b: Array | None,
    y: Array,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Write the input gradient of a convolution, a transposed convolution, plus ``b`` into ``y``.

    Parameters
    ----------
    W : ndarray
        The weights of the convolution: its output channels are those of ``x``.
    x : ndarray
        The gradient with respect to that convolution's result.
    b : ndarray or None
        One value a channel of ``y``.
    y : ndarray
        The result. Its size says which of the possible inputs of the convolution is meant.
    deterministic : bool
        Whether the result must be the same bits every time.
    pad, stride, dilation, groups, auto_tune, tensor_core, d_layout, w_layout
        As for :func:`convolution_forward`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; ``y`` is not written to then.
    """
    nd, where = _checked(x, {"W": W, "x": x, "y": y}, tensor_core)
    pad, stride, dilation = _options(nd, pad, stride, dilation)
    last, weights = _layout("d_layout", d_layout), _weights(W, w_layout, d_layout)
    layout = "channels_last" if last else "channels_first"
    plan = make_plan(
        nd, y.shape, weights.shape, x.dtype.name, stride, pad, dilation, groups, layout, None
    )
    if x.shape != plan.y_shape:
        raise ValueError(
            f"y has shape {y.shape}, of which the convolution makes {plan.y_shape}; expected one "
            f"of which it makes the shape of x, {x.shape}"
        )
    _check_result("y", y, y.shape, x, where)
    bias = _bias(b, plan.problem.in_channels, x)
    p = plan.problem
    more = tuple(
        (n + before + after - window) % s
        for n, (before, after), window, s in zip(
            p.in_shape, p.padding, p.window, p.stride, strict=True
        )
    )
    if last:  # (*kernel, in, out) as transposed weights
        weights = weights.transpose(*range(nd), nd + 1, nd)
    with _repeatable(deterministic):
        conv_transpose(nd, x, weights, bias, stride, pad, more, dilation, groups, layout, None, y)


def pooling_forward(
    x: Array,
    y: Array,
    ksize: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    mode: int,
) -> Array:
    """Write the maximum or the mean of every window into ``y``, and return it.

    Parameters
    ----------
    x, y : ndarray
        ``(batch, channels, *size)``, two or three spatial axes. As many windows are taken as
        ``y`` has room for; the last may reach over the end.
    ksize, stride, pad : sequence of int
        Per spatial axis.
    mode : int
        ``CUDNN_POOLING_MAX`` and the others; of the padding only
        ``CUDNN_POOLING_AVERAGE_COUNT_INCLUDE_PADDING`` takes notice.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; ``y`` is not written to then.
    """
    _, where = _checked(x, {"x": x, "y": y})
    windows, kind, padded = _windows(x, y, ksize, stride, pad, mode)
    _check_result("y", y, y.shape, x, where)
    with on(where):
        if x.size:
            windowed.pool(x, y, windows, kind, padded)
    return y


def pooling_backward(
    x: Array,
    y: Array,
    gy: Array,
    ksize: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    mode: int,
) -> Array:
    """Return the gradient of :func:`pooling_forward` with respect to ``x``.

    Parameters
    ----------
    x, y, gy : ndarray
        The forward's input and result, and the gradient with respect to the result.
    ksize, stride, pad, mode
        As in the forward.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    _, where = _checked(x, {"x": x, "y": y, "gy": gy})
    windows, kind, padded = _windows(x, y, ksize, stride, pad, mode)
    if gy.shape != y.shape:
        raise ValueError(f"gy has shape {gy.shape}; expected {y.shape}, the shape of y")
    with on(where):
        gx = namespace(x).empty(x.shape, x.dtype)
        if x.size:
            if kind == "max":
                max_grad_by_values(gy, x, gx, windows)
            else:
                windowed.mean_grad(gy, gx, windows, padded)
    return gx


# ------------------------------------------------------------------------------- arguments


def _checked(x: Array, arrays: dict[str, Array], tensor_core: str = "auto") -> tuple[int, Device]:
    """Return the number of spatial axes, and the arrays' device."""
    where = check_arrays(arrays)
    if where is None:
        kinds = ", ".join(f"{name} a {type(a).__name__}" for name, a in arrays.items())
        raise TypeError(f"these are {kinds}; expected NumPy or CuPy arrays")
    if x.dtype.name in COMPLEX:
        raise TypeError(f"x has dtype {x.dtype}; expected float16, bfloat16, float32 or float64")
    for name, array in arrays.items():
        if array.ndim not in (4, 5) or array.ndim != x.ndim:
            raise ValueError(f"{name} has {array.ndim} axes; expected 4 or 5, as many as x")
    if tensor_core not in ("always", "auto", "never"):
        raise ValueError(f"tensor_core is {tensor_core!r}; expected 'always', 'auto' or 'never'")
    return x.ndim - 2, where


def _options(nd: int, pad: Any, stride: Any, dilation: Any) -> tuple[Any, _Shape, _Shape]:
    pads = padding_argument(_sequence("pad", pad), nd, (1,) * nd, (1,) * nd, (1,) * nd, False)
    return (
        pads,
        per_axis("stride", _sequence("stride", stride), nd),
        per_axis("dilation", _sequence("dilation", dilation), nd),
    )


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"{name} is {value!r}; expected a tuple of an integer for each spatial axis"
        )
    return tuple(value)


def _layout(name: str, value: Any) -> bool:
    """Return whether channels are last."""
    if value not in (CUDNN_TENSOR_NCHW, CUDNN_TENSOR_NHWC) or isinstance(value, bool):
        raise ValueError(
            f"{name} is {value!r}; expected CUDNN_TENSOR_NCHW (0) or CUDNN_TENSOR_NHWC (1)"
        )
    return bool(value == CUDNN_TENSOR_NHWC)


def _weights(W: Array, w_layout: Any, d_layout: Any) -> Array:
    """Return a view of the weights as they go with images of ``d_layout``."""
    spatial = range(1, W.ndim - 1) if _layout("w_layout", w_layout) else range(2, W.ndim)
    channels = W.ndim - 1 if w_layout == CUDNN_TENSOR_NHWC else 1
    if d_layout == CUDNN_TENSOR_NHWC:
        return W.transpose(*spatial, channels, 0)
    return W.transpose(0, channels, *spatial)


def _bias(b: Array | None, channels: int, x: Array) -> Array | None:
    """Return the bias as a line of values."""
    if b is None:
        return None
    check_arrays({"x": x, "bias": b})
    if b.size != channels:
        raise ValueError(f"b has shape {b.shape}; expected {channels} values")
    return b.reshape(-1)


def _check_result(name: str, y: Array, shape: _Shape, x: Array, where: Device) -> None:
    try:
        check_out(y, shape, x, where)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("out", name, 1)) from None


def _windows(
    x: Array, y: Array, ksize: Any, stride: Any, pad: Any, mode: Any
) -> tuple[Windows, str, str]:
    kinds = {
        CUDNN_POOLING_MAX: ("max", "outside"),
        CUDNN_POOLING_MAX_DETERMINISTIC: ("max", "outside"),
        CUDNN_POOLING_AVERAGE_COUNT_INCLUDE_PADDING: ("average", "zeros"),
        CUDNN_POOLING_AVERAGE_COUNT_EXCLUDE_PADDING: ("average", "outside"),
    }
    if mode not in kinds or isinstance(mode, bool):
        raise ValueError(f"mode is {mode!r}; expected a CUDNN_POOLING_ number, 0 to 3")
    nd = x.ndim - 2
    kernel = per_axis("ksize", _sequence("ksize", ksize), nd)
    steps = per_axis("stride", _sequence("stride", stride), nd)
    before = per_axis("pad", _sequence("pad", pad), nd, 0)
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"y has shape {y.shape}; expected the batch and channels of {x.shape}")
    pads = []
    for n, out, k, s, p in zip(x.shape[2:], y.shape[2:], kernel, steps, before, strict=True):
        after = (out - 1) * s + k - n - p
        if p >= k or after >= k or out < 1:
            raise ValueError(
                f"y has shape {y.shape} for x of {x.shape}, ksize {kernel}, stride {steps} and pad "
                f"{before}; expected every window to have a cell of x"
            )
        pads.append((p, after))
    return Windows(x.shape[2:], kernel, steps, tuple(pads), 2), *kinds[mode]


def _repeatable(deterministic: Any) -> AbstractContextManager[Any]:
    """Return a context in which results repeat, if that is asked for."""
    return settings.deterministic(True) if deterministic else nullcontext()
