"""Blocked im2col and BLAS: windows are gathered into a small buffer and multiplied.

The outputs are divided into rectangles whose windows fill a buffer of a cache's size; each
is gathered, multiplied by the weights, and finished (bias, activation) while it is in the
cache. A worker per core takes a fixed share of the rectangles, with BLAS held to one thread
inside, so results repeat bit for bit. The weight gradient adds up one product per rectangle
in each worker, then the workers in order. See :mod:`gpuconv.engines.windows` for the gather;
Chellapilla, Puri, Simard: High performance convolutional neural networks for document
processing (2006) for im2col.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation
from gpuconv.engines.base import Engine, Pass, epilogue_grad
from gpuconv.engines.windows import (
    Axis,
    Block,
    Scratch,
    blocks,
    forward_axes,
    input_grad_phases,
    windows,
)
from gpuconv.problem import ConvProblem

__all__ = ["NumpyGemm"]

Array = np.ndarray[Any, Any]

#: Bytes that a worker's window buffer should have: what stays in a core's own cache.
BUFFER = 768 * 1024
#: Rows that a product should have, that packing the weights does not dominate.
ROWS = 192
#: The same for the weight gradient, whose products are added up as well.
SUM_ROWS = 1024
#: Multiply-adds below which starting a second worker costs more than it saves.
SMALL = 1 << 20

_scratch = Scratch()


def _wide(dtype: str) -> np.dtype[Any]:
    """Return the dtype of buffers and products."""
    return np.dtype("float32" if dtype == "float16" else dtype)


def _workers(flops: float) -> int:
    return 1 if flops < 2 * SMALL else settings.get_num_threads()


def _target(depth: int, width: int, itemsize: int, share: int, least: int = ROWS) -> int:
    """Return how many outputs a rectangle should have.

    ``depth`` values are gathered and ``width`` produced for each output; ``share`` workers
    have half the workspace limit, and the rest is for the gradient in front of the activation.
    """
    budget = settings.get_workspace_limit() // (2 * share)
    row = (2 * depth + width) * itemsize
    return max(1, min(max(BUFFER // (depth * itemsize), least), budget // row))


def _run(shares: tuple[Any, ...], work: Any) -> None:
    """Run ``work(k, share)`` for every worker's share."""
    if len(shares) == 1:
        work(0, shares[0])
        return
    with threads.single_threaded_blas():
        threads.run(lambda k: work(k, shares[k]), len(shares))


def _matrices(w: Array, groups: int, dtype: Any) -> Array:
    """Return weights ``(*taps, in, out)`` as ``(groups, taps * in, out // groups)``."""
    out = w.shape[-1]
    depth = w.size // out
    flat = np.ascontiguousarray(w, dtype).reshape(depth, groups, out // groups)
    return flat.transpose(1, 0, 2)


def _transposed(w: Array, groups: int, dtype: Any) -> Array:
    """Return weights ``(*taps, in, out)`` as ``(groups, taps * out // groups, in)``."""
    *taps, w_in, out = w.shape
    split = w.reshape(math.prod(taps), w_in, groups, out // groups)
    matrices = np.ascontiguousarray(split.transpose(2, 0, 3, 1), dtype)
    return matrices.reshape(groups, -1, w_in)


def _gathered(
    source: Array, axes: tuple[Axis, ...], block: Block, groups: int, dtype: np.dtype[Any]
) -> Array:
    """Return the windows of a block as ``(groups, cells, depth)``, without a copy where it can be."""
    view = windows(source, axes, block, _scratch, groups, dtype)
    cells = math.prod(b - a for a, b in block)
    depth = view.shape[-1] * math.prod(a.taps for a in axes)
    if (
        view.dtype == dtype
        and all(a.taps == 1 for a in axes)
        and view.strides[-1] == dtype.itemsize
    ):
        flat = _merged(view, groups, cells, depth)
        if flat is not None:
            return flat
    buffer = _scratch.get("windows", view.shape, dtype)
    np.copyto(buffer, view)
    return buffer.reshape(groups, cells, depth)


def _merged(view: Array, groups: int, cells: int, depth: int) -> Array | None:
    """Return the view as ``(groups, cells, depth)`` if its cells are evenly spaced."""
    step: int | None = None
    extent = 1
    for size, stride in zip(view.shape[-2:0:-1], view.strides[-2:0:-1], strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != step * extent:
            return None
        extent *= size
    if step is None:
        step = depth * view.itemsize
    if step < depth * view.itemsize or step % view.itemsize:
        return None
    return np.lib.stride_tricks.as_strided(
        view, (groups, cells, depth), (view.strides[0], step, view.itemsize)
    )


def _flat_target(y: Array, block: Block, groups: int, dtype: Any) -> Array | None:
    """Return the block of ``y`` as ``(groups, cells, out // groups)`` if BLAS can write there."""
    if y.dtype != dtype or y.strides[-1] != y.itemsize:
        return None
    part = y[tuple(slice(a, b) for a, b in block)]
    split = part.shape[-1] // groups
    view = np.lib.stride_tricks.as_strided(
        part,
        (groups, *part.shape[:-1], split),
        (split * part.itemsize, *part.strides[:-1], part.itemsize),
    )
    return _merged(view, groups, math.prod(b - a for a, b in block), split)


def _multiply(a: Array, b: Array, out: Array) -> None:
    """Write the batched product ``a @ b`` into ``out``; one group skips the batch axis."""
    if len(a) == 1:
        np.matmul(a[0], b[0], out=out[0])
    else:
        np.matmul(a, b, out=out)


class NumpyGemm(Engine):
    """Blocked im2col and BLAS, a worker per core."""

    name = "numpy_gemm"
    device_kind = "cpu"
    fused_backward = True

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time at a usual rate of BLAS and of memory."""
        workers = _workers(problem.flops)
        rate = workers * (6e10 if problem.itemsize == 8 else 1.2e11)
        if problem.groups > 1:  # narrow products
            rate *= min(1.0, problem.out_channels / problem.groups / 32)
        gathered = problem.flops / (2 * problem.out_channels / problem.groups) * problem.itemsize
        return 1.5e-5 + problem.flops / rate + (problem.bytes + gathered) / (workers * 1e10)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        wide = _wide(problem.dtype).itemsize
        workers = _workers(problem.flops)
        weights = wide * math.prod(problem.w_shape)
        if pass_ == "input_grad":
            depth = problem.taps * problem.out_channels
            width, out = problem.in_channels, math.prod(problem.x_shape[:-1])
        else:
            depth = problem.taps * problem.in_channels
            width, out = problem.out_channels, math.prod(problem.y_shape[:-1])
        summed = pass_ == "weight_grad"
        rows = _target(depth, width, wide, workers, SUM_ROWS if summed else ROWS)
        held = workers * min(rows, out) * (2 * depth + width) * wide
        held += (2 * workers if summed else 1) * weights
        if summed and problem.activation is not None:
            held += _chunk(problem) * math.prod(problem.y_shape[1:]) * wide
        return held

    # ------------------------------------------------------------------------------ forward

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        dtype = _wide(problem.dtype)
        matrices = _matrices(w, problem.groups, dtype)
        bias = None if b is None else b.astype(dtype, copy=False)
        axes = forward_axes(problem)
        self._gemm(problem, x, axes, matrices, y, problem.flops, bias, problem.activation)

    def _gemm(
        self,
        problem: ConvProblem,
        source: Array,
        axes: tuple[Axis, ...],
        matrices: Array,
        target: Array,
        flops: float,
        bias: Array | None = None,
        activation: Activation | None = None,
    ) -> None:
        """Write ``act(windows(source) @ matrices + bias)`` into ``target``."""
        groups, depth, width = matrices.shape
        dtype = matrices.dtype
        workers = _workers(flops)
        rows = _target(groups * depth, groups * width, dtype.itemsize, workers)
        shares = blocks(target.shape[:-1], rows, workers)

        def work(_: int, share: tuple[Block, ...]) -> None:
            for block in share:
                gathered = _gathered(source, axes, block, groups, dtype)
                direct = _flat_target(target, block, groups, dtype)
                out = direct
                if out is None:
                    out = _scratch.get("product", (gathered.shape[1], groups, width), dtype)
                    out = out.transpose(1, 0, 2)
                _multiply(gathered, matrices, out)
                if bias is not None:
                    out += bias.reshape(groups, 1, width)
                if activation is not None:
                    activation.fn(out, out=out)
                if direct is None:
                    shape = (*(b - a for a, b in block), groups * width)
                    target[tuple(slice(a, b) for a, b in block)] = out.transpose(1, 0, 2).reshape(
                        shape
                    )

        _run(shares, work)

    # ---------------------------------------------------------------------------- gradients

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        dtype = _wide(problem.dtype)
        phases = input_grad_phases(problem)
        for phase in phases:
            cells = dx[(slice(None), *phase.cells)]
            if not phase.axes:
                cells[...] = 0
                continue
            matrices = _transposed(w[phase.taps], problem.groups, dtype)
            flops = problem.flops / len(phases)
            self._gemm(problem, dz, phase.axes, matrices, cells, flops)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        sums = self._weight_sums(problem, dz, x, dw is not None, db is not None)
        _store_sums(problem, sums, dw, db)

    def _weight_sums(
        self,
        problem: ConvProblem,
        dz: Array,
        x: Array,
        need_w: bool,
        need_b: bool,
        epilogue: tuple[Array, Array, Activation] | None = None,
    ) -> tuple[Array | None, Array | None]:
        """Return the sums for ``dw``, ``(groups, depth, width)``, and for ``db``.

        With an ``epilogue`` of ``(dy, y, activation)``, ``dz`` is formed on the way, each
        block of it just before it is multiplied.
        """
        dtype = _wide(problem.dtype)
        groups = problem.groups
        depth = problem.taps * (problem.in_channels // groups)
        width = problem.out_channels // groups
        axes = forward_axes(problem)
        workers = _workers(problem.flops)
        rows = _target(groups * depth, groups * width, dtype.itemsize, workers, SUM_ROWS)
        shares = blocks(dz.shape[:-1], rows, workers)
        totals: list[tuple[Array | None, Array | None]] = [(None, None)] * len(shares)

        def work(k: int, share: tuple[Block, ...]) -> None:
            total_w: Array | None = None
            total_b: Array | None = None
            product = None
            for block in share:
                cells = tuple(slice(a, b) for a, b in block)
                if epilogue is not None:
                    dy, y, activation = epilogue
                    epilogue_grad(
                        dy[cells], y[cells].astype(dtype, copy=False), activation, out=dz[cells]
                    )
                if not (need_w or need_b):
                    continue
                gradient = _flat_target(dz, block, groups, dtype)
                if gradient is None:
                    copy = _scratch.get("product", dz[cells].shape, dtype)
                    np.copyto(copy, dz[cells])
                    gradient = copy.reshape(-1, groups, width).transpose(1, 0, 2)
                if need_b:
                    part = np.matmul(np.ones(gradient.shape[1], dtype), gradient)
                    total_b = part if total_b is None else np.add(total_b, part, out=total_b)
                if not need_w:
                    continue
                gathered = _gathered(x, axes, block, groups, dtype).transpose(0, 2, 1)
                if total_w is None:
                    total_w = np.empty((groups, depth, width), dtype)
                    _multiply(gathered, gradient, total_w)
                else:
                    if product is None:
                        product = np.empty_like(total_w)
                    _multiply(gathered, gradient, product)
                    total_w += product
            totals[k] = total_w, total_b

        _run(shares, work)
        return _added(totals)

    def backward(
        self,
        problem: ConvProblem,
        dy: Array,
        x: Array,
        w: Array,
        y: Array | None,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
    ) -> None:
        """Write the gradients asked for (not None), given ``dy`` behind the activation.

        The gradient in front of the activation is formed for as many examples at a time as
        the workspace limit allows.
        """
        activation = problem.activation
        if activation is None or y is None:
            super().backward(problem, dy, x, w, y, dx, dw, db)
            return
        dtype = _wide(problem.dtype)
        chunk = _chunk(problem)
        dz = np.empty((chunk, *dy.shape[1:]), dtype)
        sums: list[tuple[Array | None, Array | None]] = []
        for start in range(0, problem.batch, chunk):
            part = slice(start, min(start + chunk, problem.batch))
            some = problem.with_batch(part.stop - part.start)
            held = dz[: some.batch]
            sums.append(
                self._weight_sums(
                    some,
                    held,
                    x[part],
                    dw is not None,
                    db is not None,
                    (dy[part], y[part], activation),
                )
            )
            if dx is not None:
                self.input_grad(some, held, w, dx[part])
        _store_sums(problem, _added(sums), dw, db)


def _chunk(problem: ConvProblem) -> int:
    """Return for how many examples ``dz`` may be held: half the workspace, at least one."""
    example = math.prod(problem.y_shape[1:]) * _wide(problem.dtype).itemsize
    return max(1, min(problem.batch, settings.get_workspace_limit() // 2 // example))


def _added(
    totals: list[tuple[Array | None, Array | None]],
) -> tuple[Array | None, Array | None]:
    """Add up in order, into the first."""
    first_w, first_b = totals[0]
    for other_w, other_b in totals[1:]:
        if first_w is not None and other_w is not None:
            first_w += other_w
        if first_b is not None and other_b is not None:
            first_b += other_b
    return first_w, first_b


def _store_sums(
    problem: ConvProblem,
    sums: tuple[Array | None, Array | None],
    dw: Array | None,
    db: Array | None,
) -> None:
    sum_w, sum_b = sums
    if dw is not None and sum_w is not None:
        dw[...] = sum_w.transpose(1, 0, 2).reshape(problem.w_shape)
    if db is not None and sum_b is not None:
        db[...] = sum_b.reshape(-1)
