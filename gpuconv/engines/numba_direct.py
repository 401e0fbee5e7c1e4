"""Direct convolution compiled by Numba: no copy of the windows, every sum in the registers.

A tile of outputs, a few pixels by a few vectors of channels, is summed over all taps and input
channels in registers, its bias is what the sum begins with, and a ReLU is applied before it is
stored (:mod:`gpuconv.engines.numba_tile`). Windows are read where they lie in the image. Outputs
are classed by the taps that fall inside the image: each class sums only those, so that no padded
copy is made and nothing is multiplied by zero. The input gradient is the same over its phases;
the weight gradient takes tiles of taps and channels and sums over pixels.

For who has Numba installed (the extra ``numba``); it is chosen only then. ``GPUCONV_NUMBA=0``
switches it off. Each worker has a fixed share, and no sum is divided among workers: the bits are
the same for any number of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuconv import threads
from gpuconv.activations import Activation, ReLU
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import run_shares, worker_count
from gpuconv.engines.numba_arrays import (
    buffers,
    channel_blocks,
    copied_bytes,
    finish,
    in_parts,
    numba_missing,
    two_axes,
    up,
    vector_bytes,
)
from gpuconv.engines.numba_geometry import CHUNK, SUM_PIXELS, geometry, inside
from gpuconv.engines.rates import rates
from gpuconv.engines.windows import Axis, forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumbaDirect"]

Array = np.ndarray[Any, Any]

#: Numbers of filters that one worker puts in order sooner than two share them.
PACKED_ALONE = 64 * 1024


class NumbaDirect(Engine):
    """Tiles of outputs summed in registers, a worker per core."""

    name = "numba_direct"
    device_kind = "cpu"
    dtypes = ("float32", "float64")

    def unavailable(self) -> str | None:
        """Return why this engine cannot run on this machine, or None."""
        return numba_missing()

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products in whole vectors, tiles, memory."""
        rate, workers = rates(), worker_count(problem.flops)
        size = np.dtype(problem.dtype).itemsize
        width = vector_bytes() // size
        channels = problem.in_channels // problem.groups
        out = problem.out_channels // problem.groups
        across, depth = (channels, out) if pass_ == "input_grad" else (out, channels)
        flops = problem.flops * inside(forward_axes(problem))
        if pass_ == "input_grad" and _few_channels(problem):
            across, flops = problem.taps * channels, 1.15 * problem.flops
        vectors = up(across, width)
        seconds = flops * vectors * width / across / (1.1 * rate.product(size))
        # What a tile takes beside its products.
        outputs = math.prod(problem.y_shape[:-1])
        if pass_ == "weight_grad":
            tiles = problem.taps * depth * vectors / 20 * problem.groups
            tiles *= max(1.0, outputs / SUM_PIXELS)
        else:
            tiles = outputs * vectors / 20 * problem.groups * max(1.0, problem.taps * depth / CHUNK)
        seconds += 3e-8 * tiles
        if problem.groups > 1:  # short runs: a tap's channels are all that lies side by side
            seconds *= 1.5
        moved = sum(map(math.prod, (problem.x_shape, problem.y_shape))) * size
        weights = 6 * math.prod(problem.w_shape) * size
        return 3e-5 + (seconds + weights / rate.copy) / workers + moved / (1.5 * rate.copy)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the packed filters, and of dense copies where they are needed."""
        size = np.dtype(problem.dtype).itemsize
        copies = copied_bytes(problem)
        weights = size * math.prod(problem.w_shape)
        if pass_ == "weight_grad":
            return weights + copies
        c, o = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        across = c if pass_ == "input_grad" else o
        width = vector_bytes() // size
        return weights * (up(across, width) * width) // across + weights + copies

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        groups = problem.groups
        matrices = _flat_taps(w, problem.ndim).reshape(-1, groups, problem.out_channels // groups)
        matrices = matrices.transpose(1, 0, 2)
        axes = forward_axes(problem)

        def part(x: Array, y: Array) -> None:
            filters = _Filters(matrices, False)
            _correlate(axes, x, filters, y, problem.flops, b, problem.activation)

        in_parts((x,), y, part)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        groups = problem.groups
        if _few_channels(problem):
            in_parts((dz,), dx, lambda dz, dx: _scatter(problem, dz, w, dx))
            return
        phases = input_grad_phases(problem)

        def part(dz: Array, dx: Array) -> None:
            for phase in phases:
                cells = dx[(slice(None), *phase.cells)]
                if not phase.axes:
                    cells[...] = 0
                    continue
                taps = _flat_taps(w[phase.taps], problem.ndim)
                split = taps.reshape(*taps.shape[:2], groups, -1)
                filters = _Filters(split.transpose(2, 0, 1, 3), True)
                flops = problem.flops / len(phases)
                _correlate(phase.axes, dz, filters, cells, flops, None, None)

        in_parts((dz,), dx, part)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is None:
            return
        sums = dw if dw.flags.c_contiguous else np.empty(dw.shape, dw.dtype)
        sums.fill(0)
        in_parts((x, dz), None, lambda x, dz: _outer_sums(problem, x, dz, sums))
        if sums is not dw:
            dw[...] = sums


class _Filters:
    """Weights in the order in which tiles read them: a block of channels after the other.

    Parameters
    ----------
    weights : ndarray
        ``(groups, steps, channels)``; transposed ``(groups, taps, channels, steps of a tap)``.
    transposed : bool
    """

    def __init__(self, weights: Array, transposed: bool) -> None:
        self._weights, self._transposed = weights, transposed
        self.groups = weights.shape[0]
        self.channels = weights.shape[2]
        self.depth = weights.shape[1] * (weights.shape[3] if transposed else 1)
        self.inputs = 0
        width = vector_bytes() // weights.itemsize
        self.columns = channel_blocks(self.channels, width)
        vectors = up(self.channels, width)
        self.packed = buffers.get(
            "packed", (self.groups, vectors * self.depth, width), weights.dtype
        )

    def pack(self, first_block: int, last_block: int) -> None:
        """Put some blocks in order."""
        loops = _loops(self._weights.dtype.name)
        work = loops.pack_transposed if self._transposed else loops.pack
        work(self._weights, self.columns, self.packed, first_block, last_block)


def _loops(real: str) -> Any:
    from gpuconv.engines.numba_loops import compiled

    return compiled(real)


def _flat_taps(w: Array, ndim: int) -> Array:
    """Return weights ``(*taps, in, out)`` as ``(taps, in, out)``."""
    return w.reshape(math.prod(w.shape[:ndim]), *w.shape[ndim:])


def _correlate(
    axes: tuple[Axis, ...],
    source: Array,
    filters: _Filters,
    target: Array,
    flops: float,
    bias: Array | None,
    activation: Activation | None,
) -> None:
    """Write ``act(source * filters + bias)`` into ``target``."""
    groups, size = filters.groups, source.itemsize
    channels = source.shape[-1] // groups
    workers = worker_count(flops)
    g = geometry(
        axes, len(source), source.strides[:-1], target.strides[:-1], channels, groups,
        filters.channels, size, workers,
    )  # fmt: skip
    line = None
    if bias is not None:
        line = np.zeros(
            (groups, filters.packed.shape[1] // filters.depth * vector_bytes() // size), bias.dtype
        )
        line[:, : filters.channels] = bias.reshape(groups, -1)
    rectify = type(activation) is ReLU
    strides = (channels * size, filters.channels * size, filters.packed[0].nbytes,
               0 if line is None else line[0].nbytes)  # fmt: skip
    blocks = len(filters.columns)
    by_blocks = blocks % workers == 0 and (
        g.rows < 4 * workers or filters.packed.nbytes > source.nbytes
    )
    loop = _loops(source.dtype.name).correlate

    def work(k: int, share: range) -> None:
        rows = (0, g.rows) if by_blocks else (share.start, share.stop)
        columns = (share.start, share.stop) if by_blocks else (0, blocks)
        if by_blocks:
            filters.pack(*columns)
        loop(
            source.ctypes.data + g.origin, target.ctypes.data, filters.packed.ctypes.data,
            0 if line is None else line.ctypes.data, g.steps, g.places, g.counts, g.rows_at_once,
            g.depth_classes, g.row_classes, g.column_classes, g.combos, g.chunks, g.segments,
            filters.depth * vector_bytes(), filters.columns, strides, int(rectify),
            (*rows, *columns, 0, groups),
        )  # fmt: skip

    if by_blocks:
        shares = threads.shares(blocks, workers)
    else:
        if workers > 1 and filters.packed.size > PACKED_ALONE and blocks >= workers:
            run_shares(
                tuple(threads.shares(blocks, workers)),
                lambda _, share: filters.pack(share.start, share.stop),
            )
        else:
            filters.pack(0, blocks)
        shares = threads.shares(g.rows, workers)
    run_shares(tuple(shares), work)
    if activation is not None and not rectify:
        finish(target, activation, workers)


def _few_channels(problem: ConvProblem) -> bool:
    """Return whether the input gradient has so few channels that its taps share a product."""
    if problem.groups != 1 or problem.ndim == 3 or problem.taps == 1:
        return False
    width = vector_bytes() // np.dtype(problem.dtype).itemsize
    dense = problem.dilation[-1] == 1 or problem.kernel[-1] == 1
    return dense and 2 * problem.in_channels <= width


def _scatter(problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
    """Write the input gradient: products of whole windows, added to the rows that they reach."""
    rows, columns = two_axes(forward_axes(problem))
    if problem.ndim == 1:
        dz, dx = dz[:, None], dx[:, None]
    size, channels = dx.itemsize, problem.in_channels
    if dx.strides[-2] != channels * size:  # the taps of a row must lie side by side
        result = np.empty(dx.shape, dx.dtype)
        _scatter_dense(problem, rows, columns, dz, w, result)
        dx[...] = result
    else:
        _scatter_dense(problem, rows, columns, dz, w, dx)


def _scatter_dense(
    problem: ConvProblem, rows: Axis, columns: Axis, dz: Array, w: Array, dx: Array
) -> None:
    depth = problem.out_channels
    filters = _Filters(w.reshape(1, -1, depth).swapaxes(1, 2), False)
    filters.pack(0, len(filters.columns))
    segment = np.array([[0, 0, depth]])
    loop = _loops(dx.dtype.name).scatter

    def work(_: int, share: range) -> None:
        lines = dx.reshape(-1, *dx.shape[2:]) if dx.flags.c_contiguous else None
        if lines is not None:
            lines[share.start : share.stop] = 0
        product = buffers.get(
            "product", (columns.count, filters.packed.shape[1] // depth, vector_bytes()), np.uint8
        )
        loop(
            dz.ctypes.data, dz.strides[:3], (rows.count, columns.count), filters.packed.ctypes.data,
            dx.ctypes.data, dx.strides[:3], (rows.size, columns.size), (rows.taps, columns.taps),
            (rows.stride, columns.stride, rows.dilation, -rows.start, -columns.start),
            problem.in_channels, filters.columns, product.ctypes.data, segment,
            (share.start, share.stop),
        )  # fmt: skip

    if not dx.flags.c_contiguous:
        dx[...] = 0
    workers = worker_count(problem.flops)
    run_shares(tuple(threads.shares(len(dx) * rows.size, workers)), work)


def _outer_sums(problem: ConvProblem, x: Array, dz: Array, sums: Array) -> None:
    """Add the weight gradient of a part of the batch to ``sums``, dense as the weights."""
    groups, size = problem.groups, x.itemsize
    channels, width = problem.in_channels // groups, problem.out_channels // groups
    workers = worker_count(problem.flops)
    g = geometry(
        forward_axes(problem), len(x), x.strides[:-1], dz.strides[:-1], channels, groups, width,
        size, workers,
    )  # fmt: skip
    columns = channel_blocks(width, vector_bytes() // size)
    strides = (channels * size, width * size, width * size)
    line, blocks = int(g.taps[2]) * channels, len(columns)
    by_blocks = blocks % workers == 0
    loop = _loops(x.dtype.name).outer_sums

    def work(_: int, share: range) -> None:
        mine = share.start, share.stop
        segments = np.empty((min(g.sum_rows, g.rows), 3), np.int64)
        loop(
            x.ctypes.data + g.origin, dz.ctypes.data, sums.ctypes.data, g.steps, g.places, g.counts,
            g.taps, g.tap_steps, g.ranges_d, g.ranges_h, g.entries, channels, g.sum_rows, columns,
            problem.out_channels * size, strides, segments,
            (0, g.rows, *(mine if by_blocks else (0, blocks)), 0, groups,
             *((0, line) if by_blocks else mine)),
        )  # fmt: skip

    run_shares(tuple(threads.shares(blocks if by_blocks else line, workers)), work)
