"""Direct convolution compiled by Numba: no copy of the windows, every sum in the registers.

A tile of outputs, a few pixels by a few vectors of channels, is summed over all taps and input
channels in registers, its bias is what the sum begins with, and a ReLU is applied before it is
stored (:mod:`gpuconv.engines.numba_tile`). Windows are read where they lie in the image. Outputs
are classed by the taps that fall inside the image: each class sums only those, so that no padded
copy is made and nothing is multiplied by zero. The input gradient is the same over its phases;
the weight gradient takes tiles of taps and channels and sums over pixels.

For who has Numba installed (the extra ``numba``); it is chosen only then. ``GPUCONV_NUMBA=0``
switches it off. Workers take shares of the outputs or of the weights as they come, and no sum is
divided among workers: the bits are the same for any number of them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import ReLU
from gpuconv.engines import numba_team
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.numba_arrays import (
    blocks_at,
    buffers,
    copied_bytes,
    finish,
    in_parts,
    numba_missing,
    team_size,
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
        rate, workers = rates(), team_size(problem.flops)
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
        if pass_ == "weight_grad" and vector_bytes() == 32:
            seconds *= 2  # a line of dy at a time, each in a page of its own
        if problem.groups > 1:  # short runs: a tap's channels are all that lies side by side
            seconds *= 1.5 if vectors > 1 else 2.4
        # Of an image, at most what the windows hold.
        pixels = min(math.prod(problem.x_shape[:-1]), outputs * problem.taps)
        moved = (pixels * problem.in_channels + math.prod(problem.y_shape)) * size
        # Filters are packed; sums of the weight gradient go through the caches several times.
        weights = (6 if pass_ == "weight_grad" else 2.5) * math.prod(problem.w_shape) * size
        return 2e-5 + (seconds + weights / rate.copy) / workers + moved / (1.5 * rate.copy)

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
        axes = forward_axes(problem)
        w = w if w.strides[-1] == w.itemsize else np.ascontiguousarray(w)
        bias = None if b is None else np.ascontiguousarray(b)

        def part(x: Array, y: Array) -> None:
            _correlate(axes, x, _Filters(w, problem, False), y, problem, bias)

        in_parts((x,), y, part)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        w = w if w.strides[-1] == w.itemsize else np.ascontiguousarray(w)
        if _few_channels(problem):
            in_parts((dz,), dx, lambda dz, dx: _scatter(problem, dz, w, dx))
            return

        def part(dz: Array, dx: Array) -> None:
            for phase in input_grad_phases(problem):
                cells = dx[(slice(None), *phase.cells)]
                if phase.axes:
                    filters = _Filters(w[phase.taps], problem, True)
                    _correlate(phase.axes, dz, filters, cells, None, None)
                else:
                    cells[...] = 0

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


@lru_cache(maxsize=1024)
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return where each tap's filters lie, in bytes from the first one's."""
    total = np.zeros(1, np.int64)
    for count, stride in zip(shape, strides, strict=True):
        total = (total[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return total


class _Filters:
    """Weights, to be put in the order in which tiles read them: a block of channels after the other.

    Parameters
    ----------
    w : ndarray
        ``(*taps, in, out)``, the outputs side by side.
    problem : ConvProblem
    exchanged : bool
        Whether outputs are what is summed over, as for the input gradient.
    """

    def __init__(self, w: Array, problem: ConvProblem, exchanged: bool) -> None:
        size, self.groups = w.itemsize, problem.groups
        of_group = w.shape[-1] // self.groups
        taps = _offsets(w.shape[:-2], w.strides[:-2])
        each, self.channels = w.shape[-2], of_group
        if exchanged:
            each, self.channels = self.channels, each
        self.depth = len(taps) * each
        columns, self.blocks, vectors = blocks_at(self.channels, vector_bytes() // size)
        shape = (self.groups, vectors * self.depth, vector_bytes() // size)
        self.packed = buffers.get("packed", shape, w.dtype)
        self.at, self.nbytes = self.packed.ctypes.data, self.packed.nbytes
        self.columns = columns
        self.job = np.array(
            [w.ctypes.data, taps.ctypes.data, len(taps), w.strides[-2], each, of_group * size,
             self.groups, columns, self.blocks, self.channels, self.at, exchanged],
            np.int64,
        )  # fmt: skip

    def pack(self, workers: int) -> None:
        """Put all of them in order."""
        some = min(self.blocks, workers) if self.packed.size > PACKED_ALONE else 1
        numba_team.run(_loops().pack(self.packed.dtype.name), self.job, some, workers)


def _loops() -> Any:
    from gpuconv.engines import numba_loops

    return numba_loops


def _correlate(
    axes: tuple[Axis, ...],
    source: Array,
    filters: _Filters,
    target: Array,
    problem: ConvProblem | None,
    bias: Array | None,
) -> None:
    """Write ``act(source * filters + bias)`` into ``target``; without a problem no activation."""
    groups, size = filters.groups, source.itemsize
    channels = source.shape[-1] // groups
    activation = None if problem is None else problem.activation
    outputs = target.size // filters.channels
    workers = team_size(2.0 * outputs * filters.depth * filters.channels)
    g = geometry(
        axes, len(source), source.strides[:-1], target.strides[:-1], channels, groups,
        filters.channels, size, workers,
    )  # fmt: skip
    rectify = type(activation) is ReLU
    blocks = filters.blocks
    by_blocks = (blocks % workers == 0 or blocks >= 4 * workers) and (
        g.rows < 4 * workers or filters.nbytes > source.nbytes
    )
    job = np.array(
        [g.job.ctypes.data, source.ctypes.data + g.origin, target.ctypes.data, filters.at,
         0 if bias is None else bias.ctypes.data, filters.columns, blocks,
         filters.depth * vector_bytes(), channels * size, filters.channels * size,
         filters.nbytes // groups, filters.channels * size, rectify, groups, by_blocks,
         filters.job.ctypes.data],
        np.int64,
    )  # fmt: skip
    if by_blocks:
        shares = blocks
    else:
        filters.pack(workers)
        # A share reads all filters: as many outputs as make up for that, where there are some.
        shares = min(g.rows, max(4 * workers, up(g.rows, g.rows_at_once)))
    numba_team.run(_loops().correlate(source.dtype.name), job, shares, workers)
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
    workers = team_size(problem.flops)
    # All taps of all channels are the channels of one product.
    matrix = (
        w.reshape(-1, depth) if w.flags.c_contiguous else np.ascontiguousarray(w).reshape(-1, depth)
    )
    filters = _Filters(matrix, problem, True)
    filters.pack(workers)
    line = filters.nbytes // depth
    products = buffers.get("product", (workers, columns.count * line), np.uint8)
    segment = np.array([0, 0, depth], np.int64)
    job = np.array(
        [dz.ctypes.data, filters.at, dx.ctypes.data, *dz.strides[:3], *dx.strides[:3], rows.count,
         columns.count, rows.taps, columns.taps, rows.size, columns.size, rows.stride,
         columns.stride, rows.dilation, -rows.start, -columns.start, problem.in_channels,
         len(dx) * rows.size, filters.columns, filters.blocks, products.ctypes.data,
         columns.count * line, segment.ctypes.data],
        np.int64,
    )  # fmt: skip
    # Parts of an image share products: whole images where there are enough of them.
    shares = len(dx) if len(dx) % workers == 0 or len(dx) >= 4 * workers else workers
    numba_team.run(_loops().scatter(dx.dtype.name), job, min(shares, len(dx) * rows.size), workers)


def _outer_sums(problem: ConvProblem, x: Array, dz: Array, sums: Array) -> None:
    """Add the weight gradient of a part of the batch to ``sums``, dense as the weights."""
    groups, size = problem.groups, x.itemsize
    channels, width = problem.in_channels // groups, problem.out_channels // groups
    workers = team_size(problem.flops)
    g = geometry(
        forward_axes(problem), len(x), x.strides[:-1], dz.strides[:-1], channels, groups, width,
        size, workers,
    )  # fmt: skip
    columns, blocks, _ = blocks_at(width, vector_bytes() // size)
    line, taps = int(g.taps[2]) * channels, int(g.taps[1])
    by_blocks = by_taps = by_line = 1
    if blocks % workers == 0 or blocks >= 4 * workers:
        by_blocks = blocks
    elif taps % workers == 0 or taps >= 2 * workers:
        by_taps = taps
    else:
        by_line = min(line, workers)
    segments = buffers.get("segments", (workers, min(g.sum_rows, g.rows), 3), np.int64)
    job = np.array(
        [g.job.ctypes.data, x.ctypes.data + g.origin, dz.ctypes.data, sums.ctypes.data, columns,
         blocks, channels, problem.out_channels * size, channels * size, width * size, width * size,
         groups, by_blocks, by_taps, by_line, segments.ctypes.data, segments[0].nbytes],
        np.int64,
    )  # fmt: skip
    shares = by_blocks * by_taps * by_line
    numba_team.run(_loops().outer_sums(x.dtype.name), job, shares, workers)
