"""Shapes and options of a convolution, validated once and kept as a plan.

Wrong arguments are found here, before anything is computed or written: each is an error that
names the argument, its value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, Identity, get_activation
from gpuconv.arguments import integer
from gpuconv.problem import CHANNELS_FIRST, CHANNELS_LAST, COMPLEX, DTYPES, ConvProblem

__all__ = [
    "LAYOUTS",
    "Ints",
    "Padding",
    "Plan",
    "activation_argument",
    "channels_last",
    "dtype_argument",
    "hashable",
    "make_plan",
    "padding_argument",
    "per_axis",
    "shape_argument",
    "transposed_plan",
]

Ints = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]
_Pads = tuple[tuple[int, int], ...]

LAYOUTS = {
    1: {"NWC": CHANNELS_LAST, "NCW": CHANNELS_FIRST},
    2: {"NHWC": CHANNELS_LAST, "NCHW": CHANNELS_FIRST},
    3: {"NDHWC": CHANNELS_LAST, "NCDHW": CHANNELS_FIRST},
}
_AXES = {1: "columns", 2: "rows, columns", 3: "depth, rows, columns"}


@dataclass(frozen=True)
class Plan:
    """What follows from shapes and options alone, worked out once for each.

    Attributes
    ----------
    problem, plain : ConvProblem
        The convolution that engines see, with and without its activation. That of a
        transposed convolution has its gradient's part: its ``y`` is the caller's ``x``.
    y_shape : tuple of int
        Of the result, in the caller's layout.
    empty : bool
        There are no examples.
    x_axes, w_axes : tuple of int or None
        Transpositions to the engines' order; None where it is so already.
    """

    problem: ConvProblem
    plain: ConvProblem
    y_shape: tuple[int, ...]
    empty: bool
    x_axes: tuple[int, ...] | None
    w_axes: tuple[int, ...] | None


@lru_cache(maxsize=4096, typed=True)
def make_plan(
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
) -> Plan:
    """Validate shapes and options and describe the convolution."""
    last = channels_last(nd, layout)
    _axes_of(nd, last, False, x_shape, w_shape)
    batch = x_shape[0]
    if last:
        in_shape, in_ch = x_shape[1:-1], x_shape[-1]
        kernel, w_in, out_ch = w_shape[:-2], w_shape[-2], w_shape[-1]
    else:
        in_shape, in_ch = x_shape[2:], x_shape[1]
        kernel, w_in, out_ch = w_shape[2:], w_shape[1], w_shape[0]
    _not_empty(x_shape, w_shape, in_shape, in_ch, kernel, out_ch)
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
    _no_complex_activation(dtype, activation)
    strides = per_axis("stride", stride, nd)
    dilations = per_axis("dilation", dilation, nd)
    window = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    pads = padding_argument(padding, nd, in_shape, window, strides)
    for n, (before, after), extent in zip(in_shape, pads, window, strict=True):
        if extent > n + before + after:
            raise ValueError(
                f"w has a kernel of {kernel}, {window} with dilation {dilations}; expected at most "
                f"the padded input, {tuple(n + sum(p) for n, p in zip(in_shape, pads, strict=True))}"
            )
    order = CHANNELS_LAST if last else CHANNELS_FIRST
    problem = ConvProblem(
        batch, in_ch, out_ch, in_shape, kernel, strides, pads, dilations, count, dtype, order,
        activation,
    )  # fmt: skip
    plain = problem if activation is None else replace(problem, activation=None)
    spatial = tuple(range(2, nd + 2))
    if last:
        return Plan(problem, plain, problem.y_shape, batch == 0, None, None)
    y_shape = (batch, out_ch, *problem.out_shape)
    return Plan(problem, plain, y_shape, batch == 0, (0, *spatial, 1), (*spatial, 1, 0))


@lru_cache(maxsize=4096, typed=True)
def transposed_plan(
    nd: int,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: str,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    activation: Activation | None,
) -> Plan:
    """Validate shapes and options of a transposed convolution.

    The plan's problem is the convolution whose input gradient it is, without the activation.
    """
    last = channels_last(nd, layout)
    _axes_of(nd, last, True, x_shape, w_shape)
    batch = x_shape[0]
    if last:
        in_shape, in_ch = x_shape[1:-1], x_shape[-1]
        kernel, w_in, w_out = w_shape[:-2], w_shape[-2], w_shape[-1]
    else:
        in_shape, in_ch = x_shape[2:], x_shape[1]
        kernel, w_in, w_out = w_shape[2:], w_shape[0], w_shape[1]
    _not_empty(x_shape, w_shape, in_shape, in_ch, kernel, w_out)
    count = integer("groups", groups, 1, "a positive integer")
    if in_ch % count:
        raise ValueError(
            f"groups is {count}; expected a divisor of the {in_ch} input channels of x"
        )
    if w_in != in_ch:
        raise ValueError(
            f"w has shape {w_shape} with {w_in} input channels; expected {in_ch}, as x has"
        )
    _no_complex_activation(dtype, activation)
    strides = per_axis("stride", stride, nd)
    dilations = per_axis("dilation", dilation, nd)
    window = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    more = per_axis("output_padding", output_padding, nd, 0)
    for extra, s, d in zip(more, strides, dilations, strict=True):
        if extra >= max(s, d):
            raise ValueError(
                f"output_padding is {output_padding!r}; expected less than stride {strides} or "
                f"dilation {dilations}"
            )
    if padding == "same":
        if any(more):
            raise ValueError(
                f"output_padding is {output_padding!r}; expected 0 where padding is 'same'"
            )
        out_shape = tuple(n * s for n, s in zip(in_shape, strides, strict=True))
        pads = padding_argument(padding, nd, out_shape, window, strides, False)
    else:
        pads = padding_argument(padding, nd, in_shape, window, strides, False)
        out_shape = tuple(
            (n - 1) * s + win + extra - before - after
            for n, s, win, extra, (before, after) in zip(
                in_shape, strides, window, more, pads, strict=True
            )
        )
        if min(out_shape) < 1:
            raise ValueError(
                f"padding is {padding!r}, which leaves an output of {out_shape}; expected less "
                f"than {tuple(n + sum(p) for n, p in zip(out_shape, pads, strict=True))} in all"
            )
        # What is added at the end is not read by any window: so many zeros less follow there.
        pads = tuple((p[0], p[1] - extra) for p, extra in zip(pads, more, strict=True))
    order = CHANNELS_LAST if last else CHANNELS_FIRST
    out_ch = w_out * count
    problem = ConvProblem(
        batch, out_ch, in_ch, out_shape, kernel, strides, pads, dilations, count, dtype, order
    )
    if last:
        w_axes = (*range(nd), nd + 1, nd)
        return Plan(problem, problem, (batch, *out_shape, out_ch), batch == 0, None, w_axes)
    spatial = tuple(range(2, nd + 2))
    y_shape = (batch, out_ch, *out_shape)
    return Plan(problem, problem, y_shape, batch == 0, (0, *spatial, 1), (*spatial, 1, 0))


# ---------------------------------------------------------------------------- single arguments


def channels_last(nd: int, layout: Any) -> bool:
    """Return whether a layout of ``nd`` spatial axes has its channels last.

    Raises
    ------
    TypeError, ValueError
        If it is none of :data:`LAYOUTS`.
    """
    if not isinstance(layout, str):
        raise TypeError(f"layout is {layout!r}; expected one of {_layout_names(nd)}")
    order = LAYOUTS[nd].get(layout, layout)
    if order not in (CHANNELS_LAST, CHANNELS_FIRST):
        raise ValueError(f"layout is {layout!r}; expected one of {_layout_names(nd)}")
    return order == CHANNELS_LAST


def _layout_names(nd: int) -> str:
    return ", ".join(repr(n) for n in (*LAYOUTS[nd], CHANNELS_LAST, CHANNELS_FIRST))


def _axes_of(
    nd: int, last: bool, transposed: bool, x_shape: tuple[int, ...], w_shape: tuple[int, ...]
) -> None:
    """Check the numbers of axes."""
    for name, shape in (("x", x_shape), ("w", w_shape)):
        if len(shape) != nd + 2:
            form = _forms(nd, last, transposed)[name]
            raise ValueError(
                f"{name} has {len(shape)} axes, of shape {shape}; expected {nd + 2}: {form}"
            )


def _forms(nd: int, last: bool, transposed: bool) -> dict[str, str]:
    axes, kernel = _AXES[nd], ", ".join(f"kernel {a}" for a in _AXES[nd].split(", "))
    w_in, w_out = ("in_ch", "out_ch // groups") if transposed else ("in_ch // groups", "out_ch")
    if last:
        return {"x": f"(batch, {axes}, in_ch)", "w": f"({kernel}, {w_in}, {w_out})"}
    first, second = (w_in, w_out) if transposed else (w_out, w_in)
    return {"x": f"(batch, in_ch, {axes})", "w": f"({first}, {second}, {kernel})"}


def _not_empty(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    in_shape: tuple[int, ...],
    in_ch: int,
    kernel: tuple[int, ...],
    out_ch: int,
) -> None:
    """Check that all sizes but the batch's are positive."""
    for name, what, values in (
        ("x", "spatial size", in_shape),
        ("x", "number of channels", (in_ch,)),
        ("w", "kernel size", kernel),
        ("w", "number of output channels", (out_ch,)),
    ):
        if min(values) < 1:
            shape = x_shape if name == "x" else w_shape
            raise ValueError(f"{name} has shape {shape}; expected a {what} of at least 1")


def _no_complex_activation(dtype: str, activation: Activation | None) -> None:
    if activation is not None and dtype in COMPLEX:
        raise ValueError(f"activation is {activation}; expected None for arrays of {dtype}")


def per_axis(name: str, value: Any, nd: int, least: int = 1) -> tuple[int, ...]:
    """Return an integer, or a tuple of one for each spatial axis, as such a tuple."""
    sign = "positive" if least else "non-negative"
    expected = f"a {sign} integer or {nd} of them ({_AXES[nd]})"
    if isinstance(value, tuple):
        if len(value) != nd:
            raise ValueError(f"{name} is {value!r}; expected {expected}")
        return tuple(integer(name, v, least, expected) for v in value)
    return (integer(name, value, least, expected),) * nd


def padding_argument(
    padding: Any,
    nd: int,
    in_shape: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    causal: bool = True,
) -> _Pads:
    """Return the zeros before and after, per axis; ``causal`` is a choice in 1-D only."""
    causal = causal and nd == 1
    names = "'same', 'valid' or 'causal'" if causal else "'same' or 'valid'"
    expected = (
        f"a non-negative integer, {nd} of them ({_AXES[nd]}), {nd} pairs (before, after), {names}"
    )
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * nd
        if padding == "causal" and causal:
            return ((window[0] - 1, 0),)
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


def hashable(value: Any) -> Any:
    """Return lists and integer arrays, at any depth, as tuples."""
    if isinstance(value, (int, str)):
        return value
    if type(value) is tuple:
        try:
            hash(value)
        except TypeError:
            pass
        else:
            return value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(hashable(v) for v in value)
    return value


def shape_argument(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of non-negative integers."""
    expected = "a sequence of non-negative integers"
    try:
        values = tuple(shape)
    except TypeError:
        raise TypeError(f"{name} is {shape!r}; expected {expected}") from None
    return tuple(integer(name, v, 0, expected) for v in values)


def dtype_argument(dtype: Any) -> str:
    """Return the name of a dtype that is computed."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype  # NumPy knows bfloat16 only once ml_dtypes is imported
    try:
        name = str(np.dtype(dtype).name)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}") from None
    if name not in DTYPES:
        raise TypeError(f"dtype is {name}; expected one of {', '.join(DTYPES)}")
    return name


def activation_argument(spec: Activation | str | None) -> Activation | None:
    """Return the activation, None for the identity."""
    if spec is None:
        return None
    found = _named_activation(spec) if isinstance(spec, str) else get_activation(spec)
    return None if isinstance(found, Identity) else found


@lru_cache(maxsize=256)
def _named_activation(spec: str) -> Activation:
    return get_activation(spec)
