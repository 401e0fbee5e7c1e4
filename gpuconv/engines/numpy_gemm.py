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

from gpuconv import settings
from gpuconv.activations import Activation
from gpuconv.engines.base import Engine, Pass, epilogue_grad
from gpuconv.engines.im2col import (
    ROWS,
    SUM_ROWS,
    block_target,
    flat_target,
    gathered,
    gemm_windows,
    multiply,
    run_shares,
    scratch,
    transposed_weights,
    weight_matrices,
    wide_dtype,
    worker_count,
)
from gpuconv.engines.windows import Block, blocks, forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumpyGemm"]

Array = np.ndarray[Any, Any]


class NumpyGemm(Engine):
    """Blocked im2col and BLAS, a worker per core."""

    name = "numpy_gemm"
    device_kind = "cpu"
    fused_backward = True

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time at a usual rate of BLAS and of memory."""
        workers = worker_count(problem.flops)
        rate = workers * (6e10 if problem.itemsize == 8 else 1.2e11)
        if problem.groups > 1:  # narrow products
            rate *= min(1.0, problem.out_channels / problem.groups / 32)
        gathered = problem.flops / (2 * problem.out_channels / problem.groups) * problem.itemsize
        return 1.5e-5 + problem.flops / rate + (problem.bytes + gathered) / (workers * 1e10)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        wide = wide_dtype(problem.dtype).itemsize
        workers = worker_count(problem.flops)
        weights = wide * math.prod(problem.w_shape)
        if pass_ == "input_grad":
            depth = problem.taps * problem.out_channels
            width, out = problem.in_channels, math.prod(problem.x_shape[:-1])
        else:
            depth = problem.taps * problem.in_channels
            width, out = problem.out_channels, math.prod(problem.y_shape[:-1])
        summed = pass_ == "weight_grad"
        rows = block_target(depth, width, wide, workers, SUM_ROWS if summed else ROWS)
        held = workers * min(rows, out) * (2 * depth + width) * wide
        held += (2 * workers if summed else 1) * weights
        if summed and problem.activation is not None:
            held += _chunk(problem) * math.prod(problem.y_shape[1:]) * wide
        return held

    # ------------------------------------------------------------------------------ forward

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        dtype = wide_dtype(problem.dtype)
        matrices = weight_matrices(w, problem.groups, dtype)
        bias = None if b is None else b.astype(dtype, copy=False)
        axes = forward_axes(problem)
        gemm_windows(x, axes, matrices, y, problem.flops, bias, problem.activation)

    # ---------------------------------------------------------------------------- gradients

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        dtype = wide_dtype(problem.dtype)
        phases = input_grad_phases(problem)
        for phase in phases:
            cells = dx[(slice(None), *phase.cells)]
            if not phase.axes:
                cells[...] = 0
                continue
            matrices = transposed_weights(w[phase.taps], problem.groups, dtype)
            flops = problem.flops / len(phases)
            gemm_windows(dz, phase.axes, matrices, cells, flops)

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
        dtype = wide_dtype(problem.dtype)
        groups = problem.groups
        depth = problem.taps * (problem.in_channels // groups)
        width = problem.out_channels // groups
        axes = forward_axes(problem)
        workers = worker_count(problem.flops)
        target = block_target(groups * depth, groups * width, dtype.itemsize, workers, SUM_ROWS)
        shares = blocks(dz.shape[:-1], target, workers)
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
                gradient = flat_target(dz, block, groups, dtype)
                if gradient is None:
                    copy = scratch.get("product", dz[cells].shape, dtype)
                    np.copyto(copy, dz[cells])
                    gradient = copy.reshape(-1, groups, width).transpose(1, 0, 2)
                if need_b:
                    part = np.matmul(np.ones(gradient.shape[1], dtype), gradient)
                    total_b = part if total_b is None else np.add(total_b, part, out=total_b)
                if not need_w:
                    continue
                rows = gathered(x, axes, block, groups, dtype).transpose(0, 2, 1)
                if total_w is None:
                    total_w = np.empty((groups, depth, width), dtype)
                    multiply(rows, gradient, total_w)
                else:
                    if product is None:
                        product = np.empty_like(total_w)
                    multiply(rows, gradient, product)
                    total_w += product
            totals[k] = total_w, total_b

        run_shares(shares, work)
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
        dtype = wide_dtype(problem.dtype)
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
    example = math.prod(problem.y_shape[1:]) * wide_dtype(problem.dtype).itemsize
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
