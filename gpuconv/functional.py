"""The calls: a convolution and its gradients, on whatever device the arrays are on.

Here arguments are validated and described by a :class:`~gpuconv.problem.ConvProblem`; the
dispatcher picks an engine; the engine computes. Everything is written over the number of
spatial axes. Arrays that are held channels first go to the engines as transposed views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dispatch
from gpuconv.activations import Activation, Identity, get_activation
from gpuconv.arguments import integer
from gpuconv.cuda import runtime
from gpuconv.device import CPU, Device, device, device_of, namespace, parse_device
from gpuconv.engines.base import epilogue_grad
from gpuconv.engines.epilogue import backward_by_parts
from gpuconv.problem import CHANNELS_FIRST, CHANNELS_LAST, ConvProblem

__all__ = ["conv2d", "conv2d_backward", "explain"]

Array = Any
Ints = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]

_LAYOUTS = {
    1: {"NWC": CHANNELS_LAST, "NCW": CHANNELS_FIRST},
    2: {"NHWC": CHANNELS_LAST, "NCHW": CHANNELS_FIRST},
    3: {"NDHWC": CHANNELS_LAST, "NCDHW": CHANNELS_FIRST},
}
_AXES = {1: "columns", 2: "rows, columns", 3: "depth, rows, columns"}
_FLOATS = ("float16", "float32", "float64")
_NEEDS = ("x", "w", "b")


@dataclass(frozen=True)
class _Plan:
    """What follows from shapes and options alone, worked out once for each."""

    problem: ConvProblem
    plain: ConvProblem  # without the activation
    y_shape: tuple[int, ...]  # in the caller's layout
    empty: bool
    x_axes: tuple[int, ...] | None  # transposition to channels last; None where it is so already
    w_axes: tuple[int, ...] | None


# --------------------------------------------------------------------------- the public calls


def conv2d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve images with a bank of kernels: ``act(conv(x, w) + b)``.

    As everywhere in deep learning this is a cross-correlation; the kernel is not flipped.

    Parameters
    ----------
    x : ndarray
        ``(batch, rows, columns, in_ch)``, or ``(batch, in_ch, rows, columns)`` for NCHW.
        float16, float32 or float64; a NumPy array or a CuPy array, with any strides.
    w : ndarray
        ``(kernel_rows, kernel_columns, in_ch // groups, out_ch)``, or
        ``(out_ch, in_ch // groups, kernel_rows, kernel_columns)`` for NCHW.
    b : ndarray, optional
        ``(out_ch,)``.
    stride, dilation : int or pair of int
        Per spatial axis; ``dilation`` 1 is a dense kernel.
    padding : int, pair, pair of pairs, "same" or "valid"
        Zeros around the image: the same on all sides; ``(rows, columns)``;
        ``((top, bottom), (left, right))``; ``"same"``: the output has ``ceil(in / stride)``
        cells and an odd zero goes to the end; ``"valid"``: none.
    groups : int
        Channels are split into so many independent convolutions.
    layout : {"NHWC", "NCHW"}
        Also ``"channels_last"`` and ``"channels_first"``.
    activation : Activation or str, optional
        Applied to the result, such as ``"ReLU"`` or ``"LeakyReLU(alpha=0.1)"``.
    out : ndarray, optional
        Where to put the result. It may overlap the inputs.

    Returns
    -------
    y : ndarray
        ``(batch, out_rows, out_columns, out_ch)`` or ``(batch, out_ch, out_rows,
        out_columns)``; of the dtype, the library and the device of ``x``. ``out`` where given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; the message names it and says what is allowed.
    EngineError
        If the engine forced by :func:`gpuconv.engine` cannot compute this.
    """
    return _conv(2, x, w, b, stride, padding, dilation, groups, layout, activation, out)


def conv2d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    needs: Iterable[str] = _NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv2d` with respect to ``x``, ``w`` and ``b``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output, of the output's shape: behind the activation
        where one is given, else of the plain convolution.
    x, w : ndarray
        The forward's inputs.
    y : ndarray, optional
        The forward's result; with ``activation`` only. For activations whose derivative
        depends on the sign alone (ReLU, LeakyReLU) the argument of the activation will do
        as well.
    activation : Activation or str, optional
        The forward's. Its derivative must follow from its output, which rules out GELU.
    stride, padding, dilation, groups, layout
        As in the forward.
    needs : iterable of {"x", "w", "b"}
        The gradients to compute.

    Returns
    -------
    dx, dw, db : ndarray or None
        Of the shapes of ``x``, ``w`` and ``(out_ch,)``; None for what ``needs`` leaves out.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    EngineError
        If the engine forced by :func:`gpuconv.engine` cannot compute this.
    """
    return _conv_backward(
        2, dy, x, w, y, activation, stride, padding, dilation, groups, layout, needs
    )


def explain(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    dtype: Any = "float32",
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    activation: Activation | str | None = None,
    device: Device | str | None = None,
) -> dispatch.Explanation:
    """Return which engine would compute a convolution, and what each would cost.

    Parameters
    ----------
    x_shape, w_shape : sequence of int
        As for :func:`conv2d`.
    dtype : dtype
        Of the arrays.
    stride, padding, dilation, groups, layout, activation
        As for :func:`conv2d`.
    device : Device or str, optional
        Where the arrays are; the default device if not given.

    Returns
    -------
    Explanation
        ``print`` it; or read its ``choice`` and ``passes``.
    """
    shapes = [_shape("x_shape", x_shape), _shape("w_shape", w_shape)]
    nd = len(shapes[0]) - 2
    if nd not in _LAYOUTS:
        raise ValueError(f"x_shape is {tuple(x_shape)}; expected 3 to 5 axes")
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; expected one of {', '.join(_FLOATS)}") from None
    if kind.name not in _FLOATS:
        raise TypeError(f"dtype is {kind.name}; expected one of {', '.join(_FLOATS)}")
    plan = _plan(
        nd,
        shapes[0],
        shapes[1],
        kind.name,
        _hashable(stride),
        _hashable(padding),
        _hashable(dilation),
        groups,
        layout,
        _activation(activation),
    )
    where = _default_device() if device is None else parse_device(device)
    return dispatch.explain(plan.problem, where.kind)


_default_device = device


# ------------------------------------------------------------------- the passes, over any rank


def _conv(
    nd: int,
    x: Array,
    w: Array,
    b: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    activation: Any,
    out: Array | None,
) -> Array:
    where = _arrays(nd, {"x": x, "w": w, "b": b})
    x, w, b = _native(x), _native(w), None if b is None else _native(b)
    plan = _plan(
        nd,
        x.shape,
        w.shape,
        x.dtype.name,
        _hashable(stride),
        _hashable(padding),
        _hashable(dilation),
        groups,
        layout,
        _activation(activation),
    )
    problem = plan.problem
    if b is not None and b.shape != (problem.out_channels,):
        raise ValueError(
            f"b has shape {b.shape}; expected ({problem.out_channels},), one value an output channel"
        )
    with _on(where):
        if out is None:
            y = namespace(x).empty(plan.y_shape, x.dtype)
        else:
            _check_out(out, plan.y_shape, x, where)
            y = out
            if any(a is not None and _overlap(out, a) for a in (x, w, b)):
                y = namespace(x).empty(plan.y_shape, x.dtype)
        if not plan.empty:
            chosen = dispatch.choose(problem, "forward", where.kind)
            with _range(problem, "forward", where.kind, chosen.name):
                chosen.forward(
                    problem, _last(x, plan.x_axes), _last(w, plan.w_axes), b, _last(y, plan.x_axes)
                )
        if out is not None and y is not out:
            out[...] = y
            return out
    return y


def _conv_backward(
    nd: int,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    activation: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    needs: Iterable[str],
) -> tuple[Array | None, Array | None, Array | None]:
    where = _arrays(nd, {"dy": dy, "x": x, "w": w, "y": y})
    dy, x, w, y = _native(dy), _native(x), _native(w), None if y is None else _native(y)
    act = _activation(activation)
    plan = _plan(
        nd,
        x.shape,
        w.shape,
        x.dtype.name,
        _hashable(stride),
        _hashable(padding),
        _hashable(dilation),
        groups,
        layout,
        act,
    )
    need_x, need_w, need_b = _needs(needs)
    problem = plan.problem
    for name, array in (("dy", dy), ("y", y)):
        if array is not None and array.shape != plan.y_shape:
            raise ValueError(
                f"{name} has shape {array.shape}; expected {plan.y_shape}, the forward's result"
            )
    if act is not None:
        if not act.invertible:
            raise ValueError(
                f"activation is {act}; its derivative does not follow from its output y, so "
                "multiply dy by its gradient yourself and pass activation=None"
            )
        if y is None:
            raise ValueError(f"y is None; expected the forward's result, as activation is {act}")
    with _on(where):
        xp = namespace(x)
        make = xp.zeros if plan.empty else xp.empty
        dx = make(x.shape, x.dtype) if need_x else None
        dw = make(w.shape, x.dtype) if need_w else None
        db = make((problem.out_channels,), x.dtype) if need_b else None
        if not plan.empty and (need_x or need_w or need_b):
            _run_backward(
                plan,
                where.kind,
                _last(dy, plan.x_axes),
                _last(x, plan.x_axes),
                _last(w, plan.w_axes),
                None if y is None or act is None else _last(y, plan.x_axes),
                None if dx is None else _last(dx, plan.x_axes),
                None if dw is None else _last(dw, plan.w_axes),
                db,
            )
    return dx, dw, db


def _run_backward(
    plan: _Plan,
    kind: str,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
) -> None:
    """Compute the gradients asked for: in one call where one engine does all of them."""
    weights = dw is not None or db is not None
    by_x = dispatch.choose(plan.plain, "input_grad", kind) if dx is not None else None
    by_w = dispatch.choose(plan.plain, "weight_grad", kind) if weights else None
    whole = by_x or by_w
    if whole is not None and whole.fused_backward and all(e in (whole, None) for e in (by_x, by_w)):
        with _range(plan.problem, "backward", kind, whole.name):
            whole.backward(plan.problem, dy, x, w, y, dx, dw, db)
        return
    names = " ".join(dict.fromkeys(e.name for e in (by_x, by_w) if e is not None))
    if kind == "cpu":
        backward_by_parts(plan.problem, by_x, by_w, dy, x, w, y, dx, dw, db)
        return
    with _range(plan.problem, "backward", kind, names):
        activation = plan.problem.activation
        dz = dy if activation is None or y is None else epilogue_grad(dy, y, activation)
        if by_x is not None and dx is not None:
            with _range(plan.problem, "input_grad", kind, by_x.name):
                by_x.input_grad(plan.plain, dz, w, dx)
        if by_w is not None:
            with _range(plan.problem, "weight_grad", kind, by_w.name):
                by_w.weight_grad(plan.plain, dz, x, dw, db)


# --------------------------------------------------------------------------------- arguments


@lru_cache(maxsize=4096, typed=True)
def _plan(
    nd: int,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: str,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    activation: Activation | None,
) -> _Plan:
    """Validate shapes and options and describe the convolution."""
    if not isinstance(layout, str):
        raise TypeError(f"layout is {layout!r}; expected one of {_layout_names(nd)}")
    order = _LAYOUTS[nd].get(layout, layout)
    if order not in (CHANNELS_LAST, CHANNELS_FIRST):
        raise ValueError(f"layout is {layout!r}; expected one of {_layout_names(nd)}")
    last = order == CHANNELS_LAST
    for name, shape in (("x", x_shape), ("w", w_shape)):
        if len(shape) != nd + 2:
            form = _forms(nd, last)[name]
            raise ValueError(
                f"{name} has {len(shape)} axes, of shape {shape}; expected {nd + 2}: {form}"
            )
    batch = x_shape[0]
    if last:
        in_shape, in_ch = x_shape[1:-1], x_shape[-1]
        kernel, w_in, out_ch = w_shape[:-2], w_shape[-2], w_shape[-1]
    else:
        in_shape, in_ch = x_shape[2:], x_shape[1]
        kernel, w_in, out_ch = w_shape[2:], w_shape[1], w_shape[0]
    for name, what, values in (
        ("x", "spatial size", in_shape),
        ("x", "number of channels", (in_ch,)),
        ("w", "kernel size", kernel),
        ("w", "number of output channels", (out_ch,)),
    ):
        if min(values) < 1:
            shape = x_shape if name == "x" else w_shape
            raise ValueError(f"{name} has shape {shape}; expected a {what} of at least 1")
    count = integer("groups", groups, 1, "a positive integer")
    if in_ch % count:
        raise ValueError(
            f"groups is {count}; expected a divisor of the {in_ch} input channels of x"
        )
    if out_ch % count:
        raise ValueError(
            f"groups is {count}; expected a divisor of the {out_ch} output channels of w"
        )
    if w_in * count != in_ch:
        raise ValueError(
            f"w has shape {w_shape} with {w_in} input channels; "
            f"expected {in_ch // count}: x has {in_ch} and groups is {count}"
        )
    strides = _per_axis("stride", stride, nd)
    dilations = _per_axis("dilation", dilation, nd)
    window = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    pads = _padding(padding, nd, in_shape, window, strides)
    for n, (before, after), extent in zip(in_shape, pads, window, strict=True):
        if extent > n + before + after:
            raise ValueError(
                f"w has a kernel of {kernel}, {window} with dilation {dilations}; expected at most "
                f"the padded input, {tuple(n + sum(p) for n, p in zip(in_shape, pads, strict=True))}"
            )
    problem = ConvProblem(
        batch, in_ch, out_ch, in_shape, kernel, strides, pads, dilations, count, dtype, order,
        activation,
    )  # fmt: skip
    plain = problem if activation is None else replace(problem, activation=None)
    spatial = tuple(range(2, nd + 2))
    if last:
        return _Plan(problem, plain, problem.y_shape, batch == 0, None, None)
    y_shape = (batch, out_ch, *problem.out_shape)
    return _Plan(problem, plain, y_shape, batch == 0, (0, *spatial, 1), (*spatial, 1, 0))


def _layout_names(nd: int) -> str:
    return ", ".join(repr(n) for n in (*_LAYOUTS[nd], CHANNELS_LAST, CHANNELS_FIRST))


def _forms(nd: int, last: bool) -> dict[str, str]:
    axes, kernel = _AXES[nd], ", ".join(f"kernel {a}" for a in _AXES[nd].split(", "))
    if last:
        return {"x": f"(batch, {axes}, in_ch)", "w": f"({kernel}, in_ch // groups, out_ch)"}
    return {"x": f"(batch, in_ch, {axes})", "w": f"(out_ch, in_ch // groups, {kernel})"}


def _per_axis(name: str, value: Any, nd: int) -> tuple[int, ...]:
    expected = f"a positive integer or {nd} of them ({_AXES[nd]})"
    if isinstance(value, tuple):
        if len(value) != nd:
            raise ValueError(f"{name} is {value!r}; expected {expected}")
        return tuple(integer(name, v, 1, expected) for v in value)
    return (integer(name, value, 1, expected),) * nd


def _padding(
    padding: Any,
    nd: int,
    in_shape: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    expected = (
        f"a non-negative integer, {nd} of them ({_AXES[nd]}), {nd} pairs (before, after), "
        "'same' or 'valid'"
    )
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * nd
        if padding != "same":
            raise ValueError(f"padding is {padding!r}; expected {expected}")
        totals = [
            max(0, (-(-n // s) - 1) * s + win - n)
            for n, win, s in zip(in_shape, window, stride, strict=True)
        ]
        return tuple((t // 2, t - t // 2) for t in totals)
    if not isinstance(padding, tuple):
        both = integer("padding", padding, 0, expected)
        return ((both, both),) * nd
    if len(padding) != nd:
        raise ValueError(f"padding is {padding!r}; expected {expected}")
    pads = []
    for value in padding:
        if isinstance(value, tuple):
            if len(value) != 2:
                raise ValueError(f"padding is {padding!r}; expected {expected}")
            before, after = (integer("padding", v, 0, expected) for v in value)
        else:
            before = after = integer("padding", value, 0, expected)
        pads.append((before, after))
    return tuple(pads)


def _hashable(value: Any) -> Any:
    """Return lists and integer arrays, at any depth, as tuples."""
    if isinstance(value, (int, str)):
        return value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    return value


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    expected = "a sequence of non-negative integers"
    try:
        values = tuple(shape)
    except TypeError:
        raise TypeError(f"{name} is {shape!r}; expected {expected}") from None
    return tuple(integer(name, v, 0, expected) for v in values)


def _activation(spec: Activation | str | None) -> Activation | None:
    """Return the activation, None for the identity."""
    if spec is None:
        return None
    found = _named_activation(spec) if isinstance(spec, str) else get_activation(spec)
    return None if isinstance(found, Identity) else found


@lru_cache(maxsize=256)
def _named_activation(spec: str) -> Activation:
    return get_activation(spec)


def _needs(needs: Iterable[str]) -> tuple[bool, bool, bool]:
    try:
        names = tuple(needs)
    except TypeError:
        raise TypeError(f"needs is {needs!r}; expected some of {_NEEDS}") from None
    for name in names:
        if name not in _NEEDS:
            raise ValueError(f"needs is {needs!r}; expected some of {_NEEDS}")
    return "x" in names, "w" in names, "b" in names


def _arrays(nd: int, arrays: dict[str, Array | None]) -> Device:
    """Check that the arrays are such, of one float dtype, on one device; return the device."""
    where: Device | None = None
    first: str = ""
    dtype: Any = None
    for name, array in arrays.items():
        if array is None:
            if name in ("b", "y"):
                continue
            raise TypeError(f"{name} is None; expected a NumPy or CuPy array")
        here = CPU if type(array) is np.ndarray else device_of(array)
        if here is None or isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a {type(array).__name__}; expected a NumPy or CuPy array "
                "(gpuconv.asarray makes one)"
            )
        if array.dtype.kind != "f" or array.dtype.name not in _FLOATS:
            raise TypeError(f"{name} has dtype {array.dtype}; expected one of {', '.join(_FLOATS)}")
        if where is None:
            where, first, dtype = here, name, array.dtype
            continue
        if here != where:
            raise ValueError(
                f"{first} is on {where} and {name} on {here}; expected one device "
                "(gpuconv.asarray moves an array)"
            )
        if array.dtype != dtype and array.dtype.name != dtype.name:
            raise TypeError(
                f"{first} has dtype {dtype} and {name} {array.dtype}; expected one dtype"
            )
    if where is None:
        raise TypeError("expected arrays")
    return where


def _native(array: Array) -> Array:
    """Return the array as the plain class, in the machine's byte order."""
    if type(array) is np.ndarray and array.dtype.isnative:
        return array
    if isinstance(array, np.ndarray):
        return np.asarray(array, dtype=array.dtype.newbyteorder("="))
    return array


def _last(array: Array, axes: tuple[int, ...] | None) -> Array:
    """Return the channels-last view."""
    return array if axes is None else array.transpose(axes)


def _check_out(out: Array, shape: tuple[int, ...], x: Array, where: Device) -> None:
    here = device_of(out)
    if here is None:
        raise TypeError(f"out is a {type(out).__name__}; expected a NumPy or CuPy array")
    if here != where:
        raise ValueError(f"out is on {here} and x on {where}; expected one device")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; expected {shape}")
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype}; expected {x.dtype}, the dtype of x")
    if not getattr(out.flags, "writeable", True):
        raise ValueError("out is read-only; expected an array that can be written")


def _overlap(out: Array, array: Array) -> bool:
    xp = namespace(array)
    return bool(xp.may_share_memory(out, array))


def _on(where: Device) -> AbstractContextManager[Any]:
    """Make the arrays' CUDA device the current one; nothing to do on the CPU."""
    if where.kind == "cpu":
        return _NOTHING
    return runtime.cupy().cuda.Device(where.index)  # type: ignore[no-any-return]


_NOTHING: AbstractContextManager[Any] = nullcontext()


def _range(
    problem: ConvProblem, pass_: str, kind: str, engines: str
) -> AbstractContextManager[Any]:
    """Name what a profiler sees of a pass; nothing to do on the CPU."""
    if kind == "cpu":
        return _NOTHING
    return runtime.named_range(_range_name(problem, pass_, engines))


@lru_cache(maxsize=4096)
def _range_name(problem: ConvProblem, pass_: str, engines: str) -> str:
    x, w = ("x".join(map(str, shape)) for shape in (problem.x_shape, problem.w_shape))
    what = f"{engines} {problem.dtype} {problem.layout} {x} * {w}"
    return f"gpuconv.conv{problem.ndim}d.{pass_}[{what}]"
