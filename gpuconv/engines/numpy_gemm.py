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

from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.im2col import (
    ROWS,
    SUM_ROWS,
    block_target,
    gemm_windows,
    transposed_weights,
    weight_matrices,
    wide_dtype,
    window_sums,
    worker_count,
)
from gpuconv.engines.windows import Phase, forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumpyGemm"]

Array = np.ndarray[Any, Any]


class NumpyGemm(Engine):
    """Blocked im2col and BLAS, a worker per core."""

    name = "numpy_gemm"
    device_kind = "cpu"

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
        return held

    # ------------------------------------------------------------------------------ forward

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        dtype = wide_dtype(problem.dtype)
        matrices = weight_matrices(w, problem.groups, dtype)
        bias = None if b is None else b.astype(dtype, copy=False)
        axes = forward_axes(problem)
        gemm_windows(x, axes, matrices, [y], problem.flops, bias, problem.activation)

    # ---------------------------------------------------------------------------- gradients

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        dtype = wide_dtype(problem.dtype)
        phases = input_grad_phases(problem)
        together: dict[Any, list[Phase]] = {}
        for phase in phases:
            cells = dx[(slice(None), *phase.cells)]
            if not phase.axes:
                cells[...] = 0
            else:  # those that gather the same windows share them, if one group has the width
                alone = () if problem.groups == 1 else phase.cells
                together.setdefault((phase.axes, str(alone)), []).append(phase)
        for same in together.values():
            matrices = [transposed_weights(w[p.taps], problem.groups, dtype) for p in same]
            whole = matrices[0] if len(same) == 1 else np.concatenate(matrices, axis=2)
            targets = [dx[(slice(None), *p.cells)] for p in same]
            flops = problem.flops * len(same) / len(phases)
            gemm_windows(dz, same[0].axes, whole, targets, flops)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        window_sums(problem, dz, x, dw, db)
