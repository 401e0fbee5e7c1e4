"""Predicted seconds of what kernels do, from a GPU's facts: the units that engines' costs share.

The constants are rules of thumb of the trade, the same for every engine, so that predictions
can be held against each other; only a measurement (:func:`gpuconv.autotune`) is more than that.
"""

from __future__ import annotations

import math

from gpuconv.cuda.architecture import GPU
from gpuconv.problem import ConvProblem

__all__ = ["LAUNCH", "atomics", "bytes_moved", "multiply_adds", "scattered", "wave_share"]

#: Seconds from one launch to the next, where kernels are short.
LAUNCH = 3e-6
#: What copies reach of the memory's bandwidth.
_BANDWIDTH = 0.85
#: Multiply-adds a clock and SM of a thread that loads both operands of each; additions in
#: memory, of atomics that meet.
_SCATTERED, _ATOMICS = 4.0, 1 / 16


def bytes_moved(gpu: GPU, count: float) -> float:
    """Return the seconds in which ``count`` bytes go through the device's memory."""
    return count / (_BANDWIDTH * gpu.bandwidth)


def multiply_adds(
    gpu: GPU, problem: ConvProblem, share: float, tensor_cores: bool = False
) -> float:
    """Return the seconds of a pass's arithmetic at a ``share`` of the peak."""
    return problem.flops / (share * gpu.flops(problem.dtype, tensor_cores))


def wave_share(blocks: int, at_once: int) -> float:
    """Return which part of the time the device is full: the last wave of blocks may not fill it."""
    return blocks / (math.ceil(blocks / at_once) * at_once)


def scattered(gpu: GPU, problem: ConvProblem) -> float:
    """Return the seconds of a pass whose operands are loaded one by one."""
    return problem.flops / 2 / (_SCATTERED * gpu.multiprocessors * gpu.clock)


def atomics(gpu: GPU, count: float) -> float:
    """Return the seconds of ``count`` atomic additions to memory."""
    return count / (_ATOMICS * gpu.multiprocessors * gpu.clock)
