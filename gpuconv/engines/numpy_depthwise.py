"""Depthwise convolution in NumPy: a line of columns and channels times a line of weights.

Where a channel meets one channel only there is no product of matrices, just a multiplication
and an addition for each tap. ``numpy.einsum`` does both in one pass over the shortest loops it
can find; the weights are laid out as often as there are columns in a line, so that columns and
channels become one long inner loop. All taps of a block are one call.
See :mod:`gpuconv.engines.depthwise` for the lines.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.depthwise import BLOCK, LINE, correlate, window_sums
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import wide_dtype, worker_count
from gpuconv.engines.rates import rates
from gpuconv.engines.windows import forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumpyDepthwise"]

Array = np.ndarray[Any, Any]


class NumpyDepthwise(Engine):
    """Multiplications and additions along lines, a worker per core."""

    name = "numpy_depthwise"
    device_kind = "cpu"

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is None and problem.groups != problem.in_channels:
            reason = "it computes one input channel a group, and here there are " + str(
                problem.in_channels // problem.groups
            )
        return reason

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: multiplications and additions, and copies."""
        rate, workers = rates(), worker_count(16 * problem.flops)
        size = wide_dtype(problem.dtype).itemsize
        phases = math.prod(problem.stride) if pass_ == "input_grad" else 1
        outputs = max(math.prod(problem.y_shape), math.prod(problem.x_shape) // phases)
        count = max(1.0, outputs / BLOCK) * phases
        line = min(LINE, problem.out_channels * problem.out_shape[-1])
        loops = problem.flops / 2 / line
        seconds = problem.flops / 2 * size / 4 / rate.einsum + 1e-8 * loops
        seconds += (problem.bytes + count * line * problem.taps * size) / rate.copy
        return 2e-5 + (seconds + 25 * rate.call * count) / workers

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        size = wide_dtype(problem.dtype).itemsize
        line = max(LINE, 2 * problem.out_channels)
        block = max(BLOCK, problem.out_channels)
        window = math.prod(problem.window)
        return (
            worker_count(16 * problem.flops)
            * size
            * (3 * problem.taps * line + (3 + min(window, 4 * math.prod(problem.stride))) * block)
        )

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        correlate(
            problem, x, forward_axes(problem), w[..., 0, :], y, b, problem.activation, expand=True
        )

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        for phase in input_grad_phases(problem):
            cells = dx[(slice(None), *phase.cells)]
            if phase.axes:
                taps = w[phase.taps][..., 0, :]
                correlate(problem, dz, phase.axes, taps, cells, None, None, expand=False)
            else:
                cells[...] = 0

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is not None:
            dw[..., 0, :] = window_sums(problem, dz, x)
