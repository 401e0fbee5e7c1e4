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
from gpuconv.engines.rates import efficiency, rates
from gpuconv.engines.windows import Phase, forward_axes, input_grad_phases
from gpuconv.problem import COMPLEX, ConvProblem

__all__ = ["NumpyGemm"]

Array = np.ndarray[Any, Any]


class NumpyGemm(Engine):
    """Blocked im2col and BLAS, a worker per core."""

    name = "numpy_gemm"
    device_kind = "cpu"
    dtypes = (*Engine.dtypes, *COMPLEX)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products, packing of weights, gathering."""
        rate, workers = rates(), worker_count(problem.flops)
        size = wide_dtype(problem.dtype).itemsize
        groups = problem.groups
        narrow, wide = problem.in_channels // groups, problem.out_channels // groups
        backwards, summed = pass_ == "input_grad", pass_ == "weight_grad"
        phases = 1
        if backwards:
            narrow, wide = wide, narrow
            phases = min(math.prod(problem.stride), problem.taps)
        taps = problem.taps / phases
        depth = taps * narrow
        gathered = problem.flops / (2 * wide)  # elements
        outputs = gathered / (taps * narrow * groups)
        rows = block_target(
            int(depth * groups) or 1, wide * groups, size, workers, SUM_ROWS if summed else ROWS
        )
        count = max(1.0, outputs / rows)
        filters = problem.taps * problem.in_channels * wide
        seconds = problem.flops / rate.product(size) / efficiency(depth, wide)
        if groups > 1:
            seconds = 4 * seconds + count * groups * rate.call
        if taps > 1 or any(s > 1 for s in problem.stride):
            runs = gathered / (narrow * (problem.kernel[-1] if not backwards else 1))
            seconds += gathered * size * 2 / rate.copy + 3e-9 * runs
        else:
            seconds += 1.5 * problem.bytes / rate.copy
        seconds += count * filters * size * (2.5 if summed else 1.5) / rate.copy
        seconds += outputs * wide * groups * size * (3 if phases > 1 else 1) / rate.copy
        if backwards and problem.taps > 1:
            seconds += 3 * filters * size / rate.copy
        fixed = 3e-5 * phases + (4e-5 if workers > 1 else 0.0)  # workers wait for the lock
        return fixed + (seconds + 8 * rate.call * count) / workers

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
