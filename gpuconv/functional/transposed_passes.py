"""Transposed convolutions and their gradients.

A transposed convolution is the input gradient of a convolution, so no engine needs anything
new: its forward is that gradient, its own input gradient is the forward, and its weight
gradient is the weight gradient with the two images in each other's place. Bias and activation
follow in a pass of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from gpuconv import dispatch, memory
from gpuconv.activations import Activation
from gpuconv.cuda.epilogue import output_grad as device_output_grad
from gpuconv.device import namespace
from gpuconv.engines.base import Engine
from gpuconv.engines.epilogue import BLOCK, output_grad
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.windows import Block, blocks
from gpuconv.functional.passes import (
    at,
    check_arrays,
    check_gradient,
    check_out,
    conjugate_weight_grad,
    formed_bytes,
    last,
    native,
    needs_argument,
    on,
    one_blas_thread,
    over_parts,
    overlap,
)
from gpuconv.functional.plan import Plan, activation_argument, hashable, transposed_plan
from gpuconv.interop import dlpack
from gpuconv.problem import CHANNELS_FIRST, COMPLEX, ConvProblem
from gpuconv.profiling import ranges

__all__ = ["conv_transpose", "conv_transpose_backward"]

Array = Any


def conv_transpose(
    nd: int,
    x: Array,
    w: Array,
    b: Array | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    activation: Any,
    out: Array | None,
) -> Array:
    """Return the result; the arguments are those of :func:`gpuconv.conv_transpose2d`."""
    where = check_arrays({"x": x, "w": w, "b": b})
    if where is None:
        return dlpack.call(
            lambda x, w, b, out: conv_transpose(
                nd, x, w, b, stride, padding, output_padding, dilation, groups, layout,
                activation, out,
            ),
            {"x": x, "w": w, "b": b, "out": out},
        )  # fmt: skip
    x, w, b = native(x), native(w), None if b is None else native(b)
    act = activation_argument(activation)
    plan = transposed_plan(
        nd, x.shape, w.shape, x.dtype.name, hashable(stride), hashable(padding),
        hashable(output_padding), hashable(dilation), groups, layout, act,
    )  # fmt: skip
    problem = plan.problem
    if b is not None and b.shape != (problem.in_channels,):
        raise ValueError(
            f"b has shape {b.shape}; expected ({problem.in_channels},), one value an output channel"
        )
    if out is not None:
        check_out(out, plan.y_shape, x, where)
    with on(where):
        y = out
        if y is None or any(a is not None and overlap(y, a) for a in (x, w, b)):
            y = memory.empty_as(x, plan.y_shape)
        if not plan.empty:
            chosen = dispatch.choose(problem, "input_grad", where.kind)
            result = last(y, plan.x_axes)
            with (
                ranges.convolution(problem, "transposed", chosen),
                one_blas_thread(problem, where.kind),
            ):
                chosen.input_grad(problem, last(x, plan.x_axes), last(w, plan.w_axes), result)
                _finish(where.kind, result, b, act)
        if out is not None and y is not out:
            out[...] = y
            return out
    return y


def _finish(kind: str, y: Array, b: Array | None, activation: Activation | None) -> None:
    """Add the bias and apply the activation in place, on the CPU in blocks that stay in a cache."""
    if b is None and activation is None:
        return
    if kind != "cpu":
        if b is not None:
            y += b
        if activation is not None:
            y[...] = activation.fn(y)
        return
    dtype = wide_dtype(y.dtype.name)
    bias = None if b is None else b.astype(dtype, copy=False)
    shares = blocks(y.shape[:-1], max(1, BLOCK // y.shape[-1]), worker_count(16 * y.size))

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            cells = y[tuple(slice(*ends) for ends in block)]
            part = cells.astype(dtype, copy=False)
            if bias is not None:
                part += bias
            if activation is not None:
                activation.fn(part, out=part)
            if part is not cells:
                cells[...] = part

    run_shares(shares, work)


def conv_transpose_backward(
    nd: int,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    activation: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    needs: Iterable[str],
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients; the arguments are those of :func:`gpuconv.conv_transpose2d_backward`."""
    where = check_arrays({"dy": dy, "x": x, "w": w, "y": y})
    if where is None:
        return dlpack.call(  # type: ignore[no-any-return]
            lambda dy, x, w, y: conv_transpose_backward(
                nd, dy, x, w, y, activation, stride, padding, output_padding, dilation, groups,
                layout, needs,
            ),
            {"dy": dy, "x": x, "w": w, "y": y},
        )  # fmt: skip
    dy, x, w, y = native(dy), native(x), native(w), None if y is None else native(y)
    act = activation_argument(activation)
    plan = transposed_plan(
        nd, x.shape, w.shape, x.dtype.name, hashable(stride), hashable(padding),
        hashable(output_padding), hashable(dilation), groups, layout, act,
    )  # fmt: skip
    need_x, need_w, need_b = needs_argument(needs)
    check_gradient(plan.y_shape, act, dy, y)
    problem = plan.problem
    with on(where):
        make = namespace(x).zeros if plan.empty else partial(memory.empty_as, x)
        dx = make(x.shape, x.dtype) if need_x else None
        dw = make(w.shape, x.dtype) if need_w else None
        db = make((problem.in_channels,), x.dtype) if need_b else None
        if not plan.empty and (need_x or need_w or need_b):
            _run_backward(
                plan,
                act,
                where.kind,
                last(dy, plan.x_axes),
                last(x, plan.x_axes),
                last(w, plan.w_axes),
                None if y is None or act is None else last(y, plan.x_axes),
                None if dx is None else last(dx, plan.x_axes),
                None if dw is None else last(dw, plan.w_axes),
                db,
            )
    return dx, dw, db


def _run_backward(
    plan: Plan,
    activation: Activation | None,
    kind: str,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
) -> None:
    """Compute the gradients asked for, a part of the batch at a time where ``dz`` is formed."""
    problem = plan.problem
    by_x = dispatch.choose(problem, "forward", kind) if dx is not None else None
    by_w = dispatch.choose(problem, "weight_grad", kind) if dw is not None else None
    if problem.dtype in COMPLEX:
        w = w.conj()
    with (
        ranges.convolution(problem, "transposed_backward", by_x, by_w),
        one_blas_thread(problem, kind),
    ):
        first = problem.layout == CHANNELS_FIRST
        if kind == "cpu":
            example = 0 if activation is None else math.prod(problem.x_shape[1:])
            example *= wide_dtype(problem.dtype).itemsize
        else:
            example = formed_bytes(dy, y, activation, db, first)

        def work(part: ConvProblem, some: slice | None, dw: Array | None, db: Array | None) -> None:
            dz = _activation_grad(kind, at(dy, some), at(y, some), activation, db, first)
            _products(part, by_x, by_w, dz, at(x, some), w, at(dx, some), dw)

        over_parts(
            problem, example, dw, db, work, wide_dtype(problem.dtype) if kind == "cpu" else None
        )


def _activation_grad(
    kind: str,
    dy: Array,
    y: Array | None,
    activation: Activation | None,
    db: Array | None,
    first: bool,
) -> Array:
    """Return ``dz``, the gradient in front of the activation; its sums go into ``db``."""
    if kind != "cpu":
        return device_output_grad(dy, y, activation, db, first)
    if activation is None or y is None:
        if db is not None:
            output_grad(dy, None, None, None, db)
        return dy
    dz = scratch.get("dz", dy.shape, wide_dtype(dy.dtype.name))
    output_grad(dy, y, activation, dz, db)
    return dz


def _products(
    problem: ConvProblem,
    by_x: Engine | None,
    by_w: Engine | None,
    dz: Array,
    x: Array,
    w: Array,
    dx: Array | None,
    dw: Array | None,
) -> None:
    """Write the gradients of ``x`` and ``w``: the engines' ``y`` is our ``x``, their ``x`` our ``dz``."""
    if by_x is not None and dx is not None:
        by_x.forward(problem, dz, w, None, dx)
    if by_w is not None and dw is not None:
        if problem.dtype in COMPLEX:
            conjugate_weight_grad(by_w, problem, x, dz, dw, None, "dz")
        else:
            by_w.weight_grad(problem, x, dz, dw, None)
