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

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation, ReLU
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import run_shares, scratch, worker_count
from gpuconv.engines.rates import rates
from gpuconv.engines.windows import Axis, Block, blocks, forward_axes, input_grad_phases
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["NumbaDirect"]

Array = np.ndarray[Any, Any]

#: Steps of a sum for which a block's filters stay in a core's own cache beside the image.
CHUNK = 768
#: Outputs that are computed before the next block of filters is read.
PIXELS = 256
#: Pixels that the weight gradient sums over at a time: a block's gradients stay in the first cache.
SUM_PIXELS = 112
#: Pixels of a row, where an image is as good as one long row (a multiple of tiles' heights).
LINE = 84
#: Numbers of filters that one worker puts in order sooner than two share them.
PACKED_ALONE = 64 * 1024
#: Elements after which an activation is applied, while they are in the cache.
FINISH = 64 * 1024


# Numba is imported when the engine computes, not when it is asked whether it could.


@cache
def _vector() -> int:
    """Return the bytes of a vector register."""
    from gpuconv.engines.numba_tile import BYTES

    return BYTES


@cache
def _most_rows() -> list[int]:
    """Return the most rows of a tile by its number of vectors."""
    from gpuconv.engines.numba_tile import MOST_ROWS

    return [int(n) for n in MOST_ROWS]


def _loops(real: str) -> Any:
    from gpuconv.engines.numba_loops import compiled

    return compiled(real)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple)


@lru_cache(maxsize=256)
def _columns(channels: int, width: int) -> Array:
    """Return vectors, first vector and numbers of the last one, of every block of channels."""
    vectors = _up(channels, width)
    blocks = _up(vectors, 4)
    bounds = [vectors * k // blocks for k in range(blocks + 1)]
    rest = channels - (vectors - 1) * width
    return np.array(
        [(b - a, a, rest if b == vectors else width) for a, b in zip(bounds, bounds[1:])],
        np.int64,
    )


def _classes(axis: Axis) -> list[tuple[int, int, int, int]]:
    """Return (first, last output, first, last tap) of runs of outputs with the same taps."""
    found: list[tuple[int, int, int, int]] = []
    for i in range(axis.count):
        at = i * axis.stride + axis.start
        low = max(0, _up(-at, axis.dilation))
        high = min(axis.taps, _up(axis.size - at, axis.dilation))
        low, high = (low, high) if low < high else (0, 0)
        if found and found[-1][2:] == (low, high):
            found[-1] = (found[-1][0], i + 1, low, high)
        else:
            found.append((i, i + 1, low, high))
    return found


@dataclass(frozen=True, eq=False)
class _Geometry:
    """Where a gather reads and writes, for the compiled loops; distances are bytes."""

    origin: int  # from the source's first number to what output 0 reads by tap 0
    steps: Array
    places: Array
    counts: Array
    depth_classes: Array
    row_classes: Array
    column_classes: Array
    combos: Array
    chunks: Array
    segments: Array
    taps: Array
    tap_steps: Array
    ranges_d: Array
    ranges_h: Array
    entries: Array
    rows_at_once: int
    sum_rows: int

    @property
    def rows(self) -> int:
        return int(np.prod(self.counts))


def _three(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return (*(Axis(1, 1, 1, 1, 1, 0),) * (3 - len(axes)), *axes)


def _four(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides over n, d, h, w of ``(n, *spatial)``."""
    return (strides[0], *(0,) * (4 - len(strides)), *strides[1:])


def _even(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether all pixels are evenly spaced."""
    step, extent = strides[-1], 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != step * extent:
            return False
        extent *= n
    return True


@lru_cache(maxsize=512)
def _geometry(
    axes: tuple[Axis, ...],
    batch: int,
    source_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    channels: int,
    groups: int,
    width: int,
    size: int,
    workers: int,
) -> _Geometry:
    """Return what the loops take.

    Parameters
    ----------
    axes : tuple of Axis
        Over the spatial axes.
    batch : int
    source_strides, target_strides : tuple of int
        Bytes, over ``(n, *spatial)``.
    channels, groups : int
        Input channels of a group; groups.
    width : int
        Output channels of a group.
    size : int
        Bytes of a number.
    workers : int
    """
    spatial = tuple(a.count for a in axes)
    plain = all(a.taps == 1 and a.stride == 1 and a.start == 0 and a.count == a.size for a in axes)
    shape = (batch, *spatial)
    if plain and _even(shape, source_strides) and _even(shape, target_strides):
        return _lines(
            math.prod(shape), source_strides[-1], target_strides[-1], channels, width, size, workers
        )
    three = _three(axes)
    s, t = _four(source_strides), _four(target_strides)
    steps = (s[0], *(a.stride * b for a, b in zip(three, s[1:], strict=True)))
    tap_steps = tuple(a.dilation * b for a, b in zip(three, s[1:], strict=True))
    origin = sum(a.start * b for a, b in zip(three, s[1:], strict=True))
    classes = [_classes(a) for a in three]
    # The taps of a row lie side by side with their channels: one run.
    merged = groups == 1 and tap_steps[2] == channels * size
    combos = np.zeros((*map(len, classes), 2), np.int64)
    chunks: list[tuple[int, int]] = []
    segments: list[tuple[int, int, int]] = []
    for index in np.ndindex(*combos.shape[:3]):
        (d0, d1), (h0, h1), (w0, w1) = (c[k][2:] for c, k in zip(classes, index, strict=True))
        runs = [
            (o, p, q, (w1 - w0) * channels if merged else channels)
            for o in range(d0, d1)
            for p in range(h0, h1)
            for q in ((w0,) if merged and w1 > w0 else range(w0, w1))
        ]
        first_chunk, first, held = len(chunks), len(segments), 0
        for o, p, q, length in runs:
            at = o * tap_steps[0] + p * tap_steps[1] + q * tap_steps[2]
            step = ((o * three[1].taps + p) * three[2].taps + q) * channels
            for begin in range(0, length, CHUNK):
                part = min(CHUNK, length - begin)
                if held and held + part > CHUNK:
                    chunks.append((first, len(segments) - first))
                    first, held = len(segments), 0
                segments.append((at + begin * size, step + begin, part))
                held += part
        chunks.append((first, len(segments) - first))
        combos[index] = first_chunk, len(chunks) - first_chunk
    if merged:
        entries = [c for c in classes[2] if c[3] > c[2]]
    else:
        entries = []
        for q in range(three[2].taps):
            inside = [c for c in classes[2] if c[2] <= q < c[3]]
            if inside:
                entries.append((inside[0][0], inside[-1][1], q, q + 1))
    entries = [(a, b, *taps) for w0, w1, *taps in entries for a, b in _cut(w0, w1, SUM_PIXELS)]
    heights = 0, three[1].count
    return _Geometry(
        origin,
        np.array(steps),
        np.array(t),
        np.array((batch, *(a.count for a in three[:2]))),
        *(np.array([c[:2] for c in of_axis]) for of_axis in classes),
        combos,
        np.array(chunks, np.int64),
        np.array(segments, np.int64).reshape(-1, 3),
        np.array([a.taps for a in three]),
        np.array(tap_steps),
        _ranges(classes[0], three[0].taps),
        _ranges(classes[1], three[1].taps),
        np.array([(*e, *heights) for e in entries], np.int64).reshape(-1, 6),
        max(1, PIXELS // three[2].count),
        max(1, SUM_PIXELS // three[2].count),
    )


def _lines(
    pixels: int, source: int, target: int, channels: int, width: int, size: int, workers: int
) -> _Geometry:
    """Return the geometry of a product of matrices, in rows of ``LINE`` pixels and a rest."""
    line = min(LINE, _up(pixels, workers))
    rows, rest = _up(pixels, line), pixels - (_up(pixels, line) - 1) * line
    # Rows are whole but for the last, which may be a class of its own.
    full = rows - 1 if rest < line else rows
    row_classes = [(0, full)] * (full > 0) + [(full, rows)] * (full < rows)
    column_classes = [(0, rest), (rest, line)] if rest < line else [(0, line)]
    chunks = [(k, 1) for k in range(_up(channels, CHUNK))]
    segments = [
        (k * CHUNK * size, k * CHUNK, min(CHUNK, channels - k * CHUNK)) for k in range(len(chunks))
    ]
    combos = np.zeros((1, len(row_classes), len(column_classes), 2), np.int64)
    combos[...] = 0, len(chunks)
    if rest < line:
        combos[0, -1, 1] = 0, 0
    one = np.array([1, 1, 1])
    return _Geometry(
        0,
        np.array([0, 0, line * source, source]),
        np.array([0, 0, line * target, target]),
        np.array([1, 1, rows]),
        np.array([(0, 1)]),
        np.array(row_classes),
        np.array(column_classes),
        combos,
        np.array(chunks, np.int64),
        np.array(segments, np.int64),
        one,
        np.zeros(3, np.int64),
        np.array([(0, 1)]),
        np.array([(0, rows)]),
        np.array(
            [(a, b, 0, 1, *rows) for rows, (a, b) in zip(row_classes, ((0, line), (0, rest)))]
            if full
            else [(0, rest, 0, 1, 0, 1)]
        ),
        max(1, PIXELS // line),
        max(1, SUM_PIXELS // line),
    )


def _cut(first: int, last: int, most: int) -> list[tuple[int, int]]:
    """Divide a range into nearly equal ones of at most so many."""
    parts = max(1, _up(last - first, most))
    bounds = [first + (last - first) * k // parts for k in range(parts + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _ranges(classes: list[tuple[int, int, int, int]], taps: int) -> Array:
    """Return the first and last output that meet each tap."""
    found = []
    for t in range(taps):
        inside = [c for c in classes if c[2] <= t < c[3]]
        found.append((inside[0][0], inside[-1][1]) if inside else (0, 0))
    return np.array(found, np.int64)


class NumbaDirect(Engine):
    """Tiles of outputs summed in registers, a worker per core."""

    name = "numba_direct"
    device_kind = "cpu"
    dtypes = ("float32", "float64")

    def unavailable(self) -> str | None:
        """Return why this engine cannot run on this machine, or None."""
        if os.environ.get("GPUCONV_NUMBA") == "0":
            return "GPUCONV_NUMBA=0 switches it off"
        if importlib.util.find_spec("numba") is None:
            return "Numba is not installed: pip install 'gpuconv[numba]'"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products in whole vectors, tiles, memory."""
        rate, workers = rates(), worker_count(problem.flops)
        size = np.dtype(problem.dtype).itemsize
        width = _vector() // size
        channels = problem.in_channels // problem.groups
        out = problem.out_channels // problem.groups
        across, depth = (channels, out) if pass_ == "input_grad" else (out, channels)
        vectors = _up(across, width)
        seconds = problem.flops * vectors * width / across / (1.1 * rate.product(size))
        # What a tile takes beside its products.
        outputs = math.prod(problem.y_shape[:-1])
        if pass_ == "weight_grad":
            tiles = problem.taps * depth * vectors / 20 * problem.groups
            tiles *= max(1.0, outputs / SUM_PIXELS)
        else:
            tiles = outputs * vectors / 20 * problem.groups * max(1.0, problem.taps * depth / CHUNK)
        seconds += 3e-8 * tiles
        moved = sum(map(math.prod, (problem.x_shape, problem.y_shape))) * size
        weights = 3 * math.prod(problem.w_shape) * size
        return 4e-5 + (seconds + weights / rate.copy) / workers + moved / (1.5 * rate.copy)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the packed filters, and of dense copies where they are needed."""
        size = np.dtype(problem.dtype).itemsize
        copies = 0
        if problem.layout == CHANNELS_FIRST:
            example = size * (math.prod(problem.x_shape[1:]) + math.prod(problem.y_shape[1:]))
            copies = example * _at_once(problem.batch, example)
        weights = size * math.prod(problem.w_shape)
        if pass_ == "weight_grad":
            return weights + copies
        c, o = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        across = c if pass_ == "input_grad" else o
        width = _vector() // size
        return weights * (_up(across, width) * width) // across + weights + copies

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

        _in_parts((x,), y, part)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        groups = problem.groups
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

        _in_parts((dz,), dx, part)

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
        _in_parts((x, dz), None, lambda x, dz: _outer_sums(problem, x, dz, sums))
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
        width = _vector() // weights.itemsize
        self.columns = _columns(self.channels, width)
        vectors = _up(self.channels, width)
        self.packed = _aligned((self.groups, vectors * self.depth, width), weights.dtype)

    def pack(self, first_block: int, last_block: int) -> None:
        """Put some blocks in order."""
        loops = _loops(self._weights.dtype.name)
        work = loops.pack_transposed if self._transposed else loops.pack
        work(self._weights, self.columns, self.packed, first_block, last_block)


def _flat_taps(w: Array, ndim: int) -> Array:
    """Return weights ``(*taps, in, out)`` as ``(taps, in, out)``."""
    return w.reshape(math.prod(w.shape[:ndim]), *w.shape[ndim:])


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a buffer that begins where a vector may."""
    count = math.prod(shape)
    room = scratch.get("filters", (count + _vector() // dtype.itemsize,), dtype)
    skip = -room.ctypes.data % _vector() // dtype.itemsize
    return room[skip : skip + count].reshape(shape)


def _usable(a: Array) -> bool:
    return a.shape[-1] == 1 or a.strides[-1] == a.itemsize


def _at_once(batch: int, example: int) -> int:
    """Return how many examples may be copied at a time."""
    return max(1, min(batch, settings.get_workspace_limit() // 2 // max(1, example)))


def _in_parts(inputs: tuple[Array, ...], output: Array | None, work: Callable[..., None]) -> None:
    """Call ``work`` with arrays whose channels are dense, copies where need be, by parts."""
    arrays = (*inputs, *(() if output is None else (output,)))
    copied = [a for a in arrays if not _usable(a)]
    batch = len(inputs[0])
    example = sum(math.prod(a.shape[1:]) * a.itemsize for a in copied)
    count = _at_once(batch, example) if copied else batch
    for start in range(0, batch, count):
        some = slice(start, min(start + count, batch))
        dense = [a[some] if _usable(a) else np.ascontiguousarray(a[some]) for a in inputs]
        if output is None:
            work(*dense)
        elif _usable(output):
            work(*dense, output[some])
        else:
            result = np.empty(output[some].shape, output.dtype)
            work(*dense, result)
            output[some] = result


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
    g = _geometry(
        axes, len(source), source.strides[:-1], target.strides[:-1], channels, groups,
        filters.channels, size, workers,
    )  # fmt: skip
    line = None
    if bias is not None:
        line = np.zeros(
            (groups, filters.packed.shape[1] // filters.depth * _vector() // size), bias.dtype
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
            filters.depth * _vector(), filters.columns, strides, int(rectify),
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
        _finish(target, activation, workers)


def _finish(target: Array, activation: Activation, workers: int) -> None:
    """Apply an activation in place, in blocks of a cache's size."""

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            cells = target[tuple(slice(a, b) for a, b in block)]
            activation.fn(cells, out=cells)

    run_shares(blocks(target.shape[:-1], max(1, FINISH // target.shape[-1]), workers), work)


@lru_cache(maxsize=512)
def _pieces(g: _Geometry, channels: int, width: int, size: int, workers: int) -> tuple[range, ...]:
    """Divide the tiles of the weight gradient, in the order of the loops, by their work."""
    most = _most_rows()
    works: list[int] = []
    for o, p in np.ndindex(int(g.taps[0]), int(g.taps[1])):
        depths = int(g.ranges_d[o, 1] - g.ranges_d[o, 0])
        for w0, w1, q0, q1, h0, h1 in g.entries.tolist():
            rows = min(h1, int(g.ranges_h[p, 1])) - max(h0, int(g.ranges_h[p, 0]))
            steps = max(0, rows) * depths * (w1 - w0)
            height = (q1 - q0) * channels
            for vectors in _columns(width, _vector() // size)[:, 0].tolist():
                tiles = _up(height, most[vectors])
                works += [steps * vectors * height // tiles] * tiles
    total = np.cumsum(works)
    bounds = np.searchsorted(total, [total[-1] * k / workers for k in range(1, workers)])
    cuts = [0, *(int(c) + 1 for c in bounds), len(works)]
    return tuple(range(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b)


def _outer_sums(problem: ConvProblem, x: Array, dz: Array, sums: Array) -> None:
    """Add the weight gradient of a part of the batch to ``sums``, dense as the weights."""
    groups, size = problem.groups, x.itemsize
    channels, width = problem.in_channels // groups, problem.out_channels // groups
    workers = worker_count(problem.flops)
    g = _geometry(
        forward_axes(problem), len(x), x.strides[:-1], dz.strides[:-1], channels, groups, width,
        size, workers,
    )  # fmt: skip
    columns = _columns(width, _vector() // size)
    strides = (channels * size, width * size, width * size)
    shares = _pieces(g, channels, width, size, workers)
    loop = _loops(x.dtype.name).outer_sums

    def work(_: int, share: range) -> None:
        segments = np.empty((min(g.sum_rows, g.rows), 3), np.int64)
        loop(
            x.ctypes.data + g.origin, dz.ctypes.data, sums.ctypes.data, g.steps, g.places, g.counts,
            g.taps, g.tap_steps, g.ranges_d, g.ranges_h, g.entries, channels, g.sum_rows, columns,
            problem.out_channels * size, strides, segments,
            (0, g.rows, share.start, share.stop, 0, groups),
        )  # fmt: skip

    run_shares(shares, work)
