"""Depthwise convolution with tall kernels in NumPy: Winograd's minimal filtering along the rows.

Seven rows of taps over four rows of outputs take ten products a column in the place of 28. The
transforms of whole lines are products of small matrices, which BLAS does many times faster than
the additions that they save would take; the columns stay taps of :mod:`gpuconv.engines.depthwise`.
A NaN or an infinity would spread over its tile, so a call that meets one is left to the taps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv import settings
from gpuconv.activations import Activation
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.depthwise import (
    BLOCK,
    LINE,
    Columns,
    as_lines,
    columns_of,
    copied,
    correlate,
    cut,
    is_lines,
    repeated,
    window_sums,
)
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.rates import rates
from gpuconv.engines.toom_cook import LARGEST, Filtering, filtering
from gpuconv.engines.windows import Axis, Block, forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumpyDepthwiseWinograd"]

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=64)
def _method(taps: int, outputs: int) -> Filtering:
    """Return the method of fewest multiplications, transforms counted at a third of a tap."""

    def cost(m: int) -> float:
        n = m + taps - 1
        waste = -(-outputs // m) * m / outputs
        return waste * (n / m * taps + (n * n + n * m) / m / 3)

    return filtering(min((m for m in (2, 3, 4) if m + taps - 1 <= LARGEST), key=cost), taps)


@lru_cache(maxsize=64)
def _matrices(method: Filtering, dtype: str) -> tuple[Array, Array, Array]:
    a, b, g = (np.ascontiguousarray(x, dtype) for x in (method.a, method.b, method.g))
    return a, b, g


class NumpyDepthwiseWinograd(Engine):
    """Minimal filtering along the rows, taps along the columns, a worker per core."""

    name = "numpy_depthwise_winograd"
    device_kind = "cpu"
    dtypes = ("float16", "bfloat16", "float32", "float64")
    ndims = (2,)
    error_factor = 10.0

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if settings.get_precision() == "strict":
            return "its sums are rounded differently, and set_precision('strict') rules that out"
        if problem.groups != problem.in_channels or problem.out_channels != problem.in_channels:
            return "it computes one channel from one, " + (
                f"not {problem.out_channels} from {problem.in_channels} in {problem.groups} groups"
            )
        if any(s != 1 for s in problem.stride) or problem.dilation[0] != 1:
            return (
                f"it computes stride 1 and dense rows, not stride {problem.stride} and dilation "
                f"{problem.dilation}"
            )
        if not 2 <= problem.kernel[0] <= LARGEST - 1:
            return f"it computes kernels of 2 to {LARGEST - 1} rows, not {problem.kernel[0]}"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: transforms, multiplications and additions, and copies."""
        rate, workers = rates(), worker_count(16 * problem.flops)
        size = wide_dtype(problem.dtype).itemsize
        method = _method(problem.kernel[0], problem.out_shape[0])
        tiles = -(-problem.out_shape[0] // method.m)
        outputs = problem.batch * tiles * problem.out_shape[1] * problem.out_channels
        products = outputs * method.n * problem.kernel[1]
        transforms = 2 * outputs * (method.n**2 + method.n * method.m)
        line = min(LINE, problem.out_channels * problem.out_shape[1])
        seconds = products * size / 4 / rate.einsum + 1e-8 * products / line
        seconds += 2.5 * transforms / rate.product(size)
        count = max(1.0, math.prod(problem.y_shape) / BLOCK)
        moved = 1.0 * problem.bytes + 1.5 * outputs * (method.n + method.m) * size
        moved += count * line * method.n * problem.kernel[1] * size
        return 3e-5 + (seconds + moved / rate.copy + 30 * rate.call * count) / workers

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        size = wide_dtype(problem.dtype).itemsize
        method = _method(problem.kernel[0], problem.out_shape[0])
        line = max(LINE, 2 * problem.out_channels)
        block = max(BLOCK, method.m * problem.out_channels)
        weights = 3 * method.n * problem.kernel[1] * line
        held = block * (2 * method.n / method.m * (1 + problem.window[1] / 16) + 4)
        return worker_count(16 * problem.flops) * size * int(weights + held)

    # ------------------------------------------------------------------------------- the passes

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        axes, taps = forward_axes(problem), w[..., 0, :]
        if not _correlate(problem, x, axes, taps, y, b, problem.activation):
            correlate(problem, x, axes, taps, y, b, problem.activation, expand=True)

    @np.errstate(all="ignore")
    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        (phase,) = input_grad_phases(problem)
        taps = w[phase.taps][..., 0, :]
        if not _correlate(problem, dz, phase.axes, taps, dx, None, None):
            correlate(problem, dz, phase.axes, taps, dx, None, None, expand=False)

    @np.errstate(all="ignore")
    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is not None:
            found = _factor_sums(problem, dz, x)
            if not np.isfinite(found.sum()):
                found = window_sums(problem, dz, x)
            dw[..., 0, :] = found


def _blocks(
    axes: tuple[Axis, ...], batch: int, channels: int, method: Filtering, workers: int
) -> tuple[tuple[Axis, ...], tuple[tuple[Block, ...], ...]]:
    """Return the gather of tiles in the place of rows, and the blocks of tiles."""
    rows, columns = axes
    tiles = -(-rows.count // method.m)
    of_tiles = replace(rows, count=tiles, taps=method.n, stride=method.m)
    # A tile stands for its m rows in the size of a block.
    counts = batch, tiles, columns.count
    return (of_tiles, columns), cut(counts, channels * method.m, workers)


def _factors(
    source: Array, axes: tuple[Axis, ...], block: Block, columns: Columns, b: Array
) -> Array:
    """Return the view ``(n, tiles, factors, column taps, line)`` of a block's factors."""
    dtype = b.dtype
    copy = copied(source, axes, block, columns, 1, dtype)
    images, _, length, channels = copy.shape
    tiles = block[1][1] - block[1][0]
    s = copy.strides
    rows = as_strided(
        copy,
        (images, tiles, len(b), length * channels),
        (s[0], axes[0].stride * s[1], s[1], s[3]),
    )
    factors = scratch.get("factors", rows.shape, dtype)
    np.matmul(b, rows, out=factors)
    outputs = block[2][1] - block[2][0]
    f = factors.strides
    return as_strided(
        factors[..., columns.offset * channels :],
        (images, tiles, len(b), axes[1].taps, outputs * channels),
        (*f[:3], columns.step * channels * f[3], f[3]),
    )


def _correlate(
    problem: ConvProblem,
    source: Array,
    axes: tuple[Axis, ...],
    w: Array,
    target: Array,
    bias: Array | None,
    activation: Activation | None,
) -> bool:
    """Write ``act(sum over taps of source * w + bias)``; return whether all sums are finite."""
    dtype = wide_dtype(problem.dtype)
    channels = problem.out_channels
    method = _method(axes[0].taps, axes[0].count)
    a, b, g = _matrices(method, dtype.char)
    workers = worker_count(16 * problem.flops)
    of_tiles, shares = _blocks(axes, problem.batch, channels, method, workers)
    flat = np.ascontiguousarray(w, dtype).reshape(axes[0].taps, -1)
    filters = np.matmul(g, flat).reshape(method.n, axes[1].taps, channels)
    longest = max(block[-1][1] - block[-1][0] for share in shares for block in share)
    weights = repeated(filters, longest)
    line_bias = None if bias is None else repeated(bias.astype(dtype, copy=False), longest)
    finite = [True] * len(shares)

    def work(k: int, share: tuple[Block, ...]) -> None:
        for block in share:
            (n0, n1), (t0, t1), (j0, j1) = block
            (columns,) = columns_of(axes[1], j1 - j0)
            line = (j1 - j0) * channels
            view = _factors(source, of_tiles, block, columns, b)
            products = scratch.get("products", (*view.shape[:3], line), dtype)
            np.einsum("ntkxz,kxz->ntkz", view, weights[..., :line], out=products)
            out = scratch.get("product", (n1 - n0, t1 - t0, method.m, line), dtype)
            np.matmul(a.T, products, out=out)
            sums = out.reshape(-1)
            if not np.isfinite(np.dot(sums, sums)):
                finite[k] = False
                return
            if line_bias is not None:
                out += line_bias[:line]
            last = min(t1 * method.m, axes[0].count)
            cells = target[n0:n1, t0 * method.m : last, j0:j1]
            rows = out.reshape(n1 - n0, -1, line)[:, : cells.shape[1]]
            place = as_lines(cells) if is_lines(cells) else None
            if activation is not None and place is not None:
                activation.fn(rows, out=place)
                continue
            if activation is not None:
                activation.fn(rows, out=rows)
            cells[...] = rows.reshape(cells.shape)

    run_shares(shares, work)
    return all(finite)


def _factor_sums(problem: ConvProblem, dz: Array, x: Array) -> Array:
    """Return the gradient with respect to the weights, ``(rows, columns, channels)``."""
    dtype = wide_dtype(problem.dtype)
    axes = forward_axes(problem)
    channels = problem.out_channels
    method = _method(axes[0].taps, axes[0].count)
    a, b, g = _matrices(method, dtype.char)
    workers = worker_count(16 * problem.flops)
    of_tiles, shares = _blocks(axes, problem.batch, channels, method, workers)
    totals = [np.zeros((method.n, axes[1].taps, channels), dtype) for _ in shares]

    def work(k: int, share: tuple[Block, ...]) -> None:
        for block in share:
            (n0, n1), (t0, t1), (j0, j1) = block
            (columns,) = columns_of(axes[1], j1 - j0)
            line = (j1 - j0) * channels
            view = _factors(x, of_tiles, block, columns, b)
            last = min(t1 * method.m, axes[0].count)
            cells = dz[n0:n1, t0 * method.m : last, j0:j1]
            rows = scratch.get("product", (n1 - n0, (t1 - t0) * method.m, line), dtype)
            rows.reshape(*rows.shape[:2], j1 - j0, channels)[:, : cells.shape[1]] = cells
            rows[:, cells.shape[1] :] = 0
            products = scratch.get("products", (*view.shape[:3], line), dtype)
            np.matmul(a, rows.reshape(n1 - n0, t1 - t0, method.m, line), out=products)
            found = scratch.get("sum", (method.n, axes[1].taps, line), dtype)
            np.einsum("ntkxz,ntkz->kxz", view, products, out=found)
            totals[k] += found.reshape(method.n, axes[1].taps, j1 - j0, channels).sum(axis=2)

    run_shares(shares, work)
    for other in totals[1:]:
        totals[0] += other
    taps = np.matmul(g.T, totals[0].reshape(method.n, -1))
    return np.asarray(taps.reshape(axes[0].taps, axes[1].taps, channels))
