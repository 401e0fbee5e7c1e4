"""A product of matrices for each tap, over just those outputs whose tap falls inside the input.

With a wide dilation most windows reach into the padding, and gathering them means to multiply
zeros. Tap by tap nothing is multiplied that the definition does not ask for, and each product
reads a plain shifted piece of the image. What it costs is an addition into the outputs for each
tap, which many channels make up for.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import (
    add_bias,
    bias_line,
    run_shares,
    scratch,
    wide_dtype,
    worker_count,
)
from gpuconv.engines.rates import efficiency, rates
from gpuconv.engines.windows import Axis, Block, blocks, forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumpyTaps"]

Array = np.ndarray[Any, Any]

#: Outputs of a block: enough that packing a tap's weights does not dominate its product.
ROWS = 512


def _range(axis: Axis, tap: int, first: int, last: int) -> tuple[int, int, slice]:
    """Return which of the outputs ``first`` to ``last`` read inside at this tap, and what."""
    at = tap * axis.dilation + axis.start  # of output 0
    low = max(first, -(at // axis.stride))
    high = max(low, min(last, (axis.size - 1 - at) // axis.stride + 1))
    begin = at + low * axis.stride
    return low, high, slice(begin, begin + (high - low) * axis.stride, axis.stride)


def _pieces(
    axes: tuple[Axis, ...], ranges: tuple[tuple[int, int], ...]
) -> list[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """Return each tap with the outputs it takes part in, within ``ranges``, and what these read."""
    found = []
    for tap in itertools.product(*(range(a.taps) for a in axes)):
        parts = [_range(a, t, *r) for a, t, r in zip(axes, tap, ranges, strict=True)]
        if all(low < high for low, high, _ in parts):
            outputs = tuple(
                slice(low - first, high - first)
                for (low, high, _), (first, _) in zip(parts, ranges, strict=True)
            )
            found.append((tap, outputs, tuple(part[2] for part in parts)))
    return found


@lru_cache(maxsize=1024)
def _inside(axes: tuple[Axis, ...]) -> float:
    """Return the share of taps that fall inside the source."""
    shares = []
    for axis in axes:
        parts = [_range(axis, t, 0, axis.count) for t in range(axis.taps)]
        shares.append(sum(high - low for low, high, _ in parts) / (axis.taps * axis.count))
    return math.prod(shares)


class NumpyTaps(Engine):
    """A product of matrices for each tap, a worker per core."""

    name = "numpy_taps"
    device_kind = "cpu"

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is None and problem.groups != 1:
            reason = f"it computes one group, not {problem.groups}"
        return reason

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products inside the input, copies, and additions."""
        rate, workers = rates(), worker_count(problem.flops)
        size = wide_dtype(problem.dtype).itemsize
        depth, width = problem.in_channels, problem.out_channels
        if pass_ == "input_grad":
            depth, width = width, depth
        flops = problem.flops * _inside(forward_axes(problem))
        outputs = flops / (2 * depth * width)  # over all taps
        count = max(1.0, outputs / problem.taps / _rows(problem)) * problem.taps
        copied = 0 if problem.pointwise else outputs * depth
        seconds = flops / rate.product(size)
        if pass_ == "weight_grad":
            seconds /= efficiency(outputs / problem.taps, min(width, depth / workers))
            copied += outputs * width
            if problem.pointwise:  # BLAS packs the transposed image where it lies, slowly
                copied += 2.5 * outputs * (depth + width)
            count = problem.taps
        else:
            seconds /= efficiency(depth, width)
            copied += outputs * width * (1 if problem.taps == 1 else 3)
            seconds += count * depth * width * size * 1.5 / rate.copy  # packing the weights
        return (
            4e-5
            + (seconds + (copied * size * 1.2 + problem.bytes) / rate.copy + 8 * rate.call * count)
            / workers
        )

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        size = wide_dtype(problem.dtype).itemsize
        workers = worker_count(problem.flops)
        weights = problem.in_channels * problem.out_channels
        if pass_ == "weight_grad":
            shifted = math.prod(problem.y_shape[:-1]) * (problem.in_channels + problem.out_channels)
            return size * (shifted + weights)
        sides = problem.in_channels + 2 * problem.out_channels
        if pass_ == "input_grad":
            sides = problem.out_channels + 2 * problem.in_channels
        return size * (workers * _rows(problem) * sides + problem.taps * weights)

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        dtype = wide_dtype(problem.dtype)
        bias = None if b is None else b.astype(dtype, copy=False)
        weights = w.astype(dtype, copy=False)
        _add_products(problem, x, forward_axes(problem), weights, y, bias, problem.activation)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        dtype = wide_dtype(problem.dtype)
        for phase in input_grad_phases(problem):
            cells = dx[(slice(None), *phase.cells)]
            if not phase.axes:
                cells[...] = 0
                continue
            weights = w[phase.taps].astype(dtype, copy=False).swapaxes(-1, -2)
            _add_products(problem, dz, phase.axes, weights, cells, None, None)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given.

        Workers divide the input channels, so that each weight's sum is one worker's.
        """
        if db is not None:
            bias_sums(dz, db)
        if dw is None:
            return
        dtype = wide_dtype(problem.dtype)
        axes = forward_axes(problem)
        pieces = _pieces(axes, tuple((0, a.count) for a in axes))
        if len(pieces) < problem.taps:
            dw[...] = 0
        images = _images_at_once(problem)

        def work(_: int, channels: range) -> None:
            part = slice(channels.start, channels.stop)
            for start in range(0, problem.batch, images):
                some = slice(start, min(start + images, problem.batch))
                for tap, outputs, cells in pieces:
                    left = _matrix(x[(some, *cells, part)], "windows", dtype)
                    right = _matrix(dz[(some, *outputs)], "product", dtype)
                    place: Any = (*tap, part)
                    target = dw[place]
                    if (
                        start == 0
                        and target.dtype == dtype
                        and target.strides[-1] == dtype.itemsize
                    ):
                        np.matmul(left.T, right, out=target)
                        continue
                    sums = scratch.get("sum", target.shape, dtype)
                    np.matmul(left.T, right, out=sums)
                    if start == 0:
                        target[...] = sums
                    else:
                        target += sums

        run_shares(tuple(threads.shares(problem.in_channels, worker_count(problem.flops))), work)


def _rows(problem: ConvProblem) -> int:
    """Return how many outputs a block should have."""
    size = wide_dtype(problem.dtype).itemsize
    budget = settings.get_workspace_limit() // (4 * worker_count(problem.flops))
    sides = 2 * (problem.in_channels + problem.out_channels)
    return max(1, min(ROWS, budget // (size * sides)))


def _images_at_once(problem: ConvProblem) -> int:
    """Return over how many examples the weight gradient's products are summed by BLAS."""
    size = wide_dtype(problem.dtype).itemsize
    sides = problem.in_channels + worker_count(problem.flops) * problem.out_channels
    example = math.prod(problem.out_shape) * sides * size
    return max(1, settings.get_workspace_limit() // 2 // example)


def _matrix(cells: Array, name: str, dtype: Any) -> Array:
    """Return ``(..., channels)`` as a matrix, copied where BLAS could not read it."""
    channels = cells.shape[-1]
    if cells.dtype == dtype and cells.flags.c_contiguous:
        return cells.reshape(-1, channels)
    copy = scratch.get(name, cells.shape, dtype)
    np.copyto(copy, cells)
    return copy.reshape(-1, channels)


def _add_products(
    problem: ConvProblem,
    source: Array,
    axes: tuple[Axis, ...],
    w: Array,
    target: Array,
    bias: Array | None,
    activation: Activation | None,
) -> None:
    """Write ``act(sum over taps of source @ w[tap] + bias)`` into ``target``."""
    dtype = w.dtype
    width = w.shape[-1]
    workers = worker_count(problem.flops)
    shares = blocks(target.shape[:-1], _rows(problem), workers)
    line = None if bias is None else bias_line(bias)

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            (n0, n1), *ranges = block
            cells = target[tuple(slice(*r) for r in block)]
            direct = cells.dtype == dtype and cells.flags.c_contiguous
            total = cells if direct else scratch.get("total", cells.shape, dtype)
            pieces = _pieces(axes, tuple(ranges))
            whole = next((k for k, p in enumerate(pieces) if _all(p[1], total.shape[1:-1])), None)
            if whole is None:
                total[...] = 0
            else:  # the tap that reaches every output begins the sum
                pieces.insert(0, pieces.pop(whole))
            for k, (tap, outputs, read) in enumerate(pieces):
                left = _matrix(source[(slice(n0, n1), *read)], "windows", dtype)
                if k == 0 and whole is not None:
                    np.matmul(left, w[tap], out=total.reshape(-1, width))
                    continue
                product = scratch.get("product", (len(left), width), dtype)
                np.matmul(left, w[tap], out=product)
                place = total[(slice(None), *outputs)]
                np.add(place, product.reshape(place.shape), out=place)
            if line is not None:
                add_bias(total, line, width)
            if activation is not None:
                activation.fn(total, out=total)
            if not direct:
                cells[...] = total

    run_shares(shares, work)


def _all(outputs: tuple[slice, ...], counts: tuple[int, ...]) -> bool:
    return all(s.start == 0 and s.stop == n for s, n in zip(outputs, counts, strict=True))
