"""Winograd's minimal filtering compiled by Numba: transforms in registers, products by tiles.

The same method as :mod:`gpuconv.engines.numpy_winograd`, for who has Numba installed (the extra
``numba``). Compiled, a transform is some two hundred additions of vectors that never leave the
core, instead of products of small matrices and copies between them, and no step waits for the
interpreter's lock: the products are nearly all that is left.

Blocks of tiles go to the workers. Where the filters are large and the tiles few, the workers
divide the output channels instead, so that each reads half of the filters; the weight gradient
is divided so always, and no sum is divided among workers. A call that meets a NaN or an infinity
is computed by the definition.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation, ReLU
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import by_definition, run_shares, window_sums, worker_count
from gpuconv.engines.numba_arrays import (
    buffers,
    channel_blocks,
    copied_bytes,
    finish,
    in_parts,
    numba_missing,
    swapped,
    two_axes,
    vector_bytes,
)
from gpuconv.engines.rates import rates
from gpuconv.engines.toom_cook import Filtering, filtering
from gpuconv.engines.windows import forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumbaWinograd"]

Array = np.ndarray[Any, Any]

#: Bytes of a block's factors and products.
BLOCK = 1_500_000
#: Tiles under which reading the filters for a block takes longer than multiplying by them.
FEW_TILES = 48
#: Bytes of filters that do not stay in a core's own cache.
LARGE_FILTERS = 2_000_000
#: Outputs of a tile by the taps of an axis.
OUTPUTS = {1: 1, 3: 4, 5: 4, 7: 4}
#: Each takes some seconds to compile when it is first met, so these are what networks have.
KERNELS = {(3, 3), (5, 5), (1, 3), (3, 1), (1, 5), (5, 1), (1, 7), (7, 1)}


@lru_cache(maxsize=256)
def _methods(kernel: tuple[int, ...]) -> tuple[Filtering, Filtering]:
    """Return the method of rows and of columns; a single axis gets rows of one cell."""
    rows, columns = kernel if len(kernel) == 2 else (1, *kernel)
    return filtering(OUTPUTS[rows], rows), filtering(OUTPUTS[columns], columns)


def _loops(dtype: np.dtype[Any], methods: tuple[Filtering, Filtering]) -> Any:
    from gpuconv.engines.numba_winograd_loops import compiled

    return compiled(dtype.name, *((f.m, f.r) for f in methods))


def _flat(array: Array, problem: ConvProblem) -> Array:
    """Return an image of one spatial axis as one of a single row."""
    return array if problem.ndim == 2 else array[:, None]


class _Cut:
    """How a pass is cut into tiles and blocks.

    Parameters
    ----------
    problem : ConvProblem
    backwards : bool
        Whether it is the input gradient.
    workers : int
    budget : int
        Bytes for the blocks of all workers.
    """

    def __init__(self, problem: ConvProblem, backwards: bool, workers: int, budget: int) -> None:
        self.axes = two_axes(
            input_grad_phases(problem)[0].axes if backwards else forward_axes(problem)
        )
        self.methods = _methods(problem.kernel)
        self.inputs, self.outputs = problem.in_channels, problem.out_channels
        if backwards:
            self.inputs, self.outputs = self.outputs, self.inputs
        self.size = np.dtype(problem.dtype).itemsize
        self.width = vector_bytes() // self.size
        self.factors = math.prod(f.n for f in self.methods)
        self.tiles = problem.batch * math.prod(
            -(-a.count // f.m) for a, f in zip(self.axes, self.methods, strict=True)
        )
        self.padded_in = -(-self.inputs // self.width) * self.width
        self.padded_out = -(-self.outputs // self.width) * self.width
        # An odd number of vectors, or the factors of a tap meet in one set of a cache.
        vectors = self.inputs * self.padded_out // self.width | 1
        self.filter_stride = vectors * vector_bytes()
        self.filter_bytes = self.factors * self.inputs * self.padded_out * self.size
        self.tile_bytes = self.factors * (self.padded_in + self.padded_out) * self.size
        self.workers = workers
        wanted = max(BLOCK // self.tile_bytes, FEW_TILES)
        self.at_once = max(1, min(wanted, self.tiles, budget // workers // self.tile_bytes))

    def blocks(self) -> tuple[Array, Array, Array]:
        """Return a worker's factors, products, and a place for a tile at the border."""
        kind = np.dtype(f"f{self.size}")
        some = self.factors
        rows, columns = self.methods
        patch = rows.n * columns.n * max(self.padded_in, self.padded_out)
        return (
            buffers.get("factors", (some * (self.at_once * self.padded_in + self.width),), kind),
            buffers.get("products", (some * (self.at_once * self.padded_out + self.width),), kind),
            buffers.get("patch", (patch,), kind),
        )


_kept = lru_cache(maxsize=1024)(_Cut)


def _cut(problem: ConvProblem, backwards: bool) -> _Cut:
    limit = settings.get_workspace_limit()
    return _kept(problem, backwards, worker_count(problem.flops), limit // 2)


class NumbaWinograd(Engine):
    """Winograd's minimal filtering, compiled, a worker per core."""

    name = "numba_winograd"
    device_kind = "cpu"
    dtypes = ("float32", "float64")
    ndims = (1, 2)
    error_factor = 10.0

    def unavailable(self) -> str | None:
        """Return why this engine cannot run on this machine, or None."""
        return numba_missing()

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if settings.get_precision() == "strict":
            return "its sums are rounded differently, and set_precision('strict') rules that out"
        if any(s != 1 for s in problem.stride) or any(
            d != 1 and k > 1 for d, k in zip(problem.dilation, problem.kernel, strict=True)
        ):
            return f"it computes stride 1 and dilation 1, not {problem.stride}, {problem.dilation}"
        if problem.groups != 1:
            return f"it computes one group, not {problem.groups}"
        if (1, *problem.kernel)[-2:] not in KERNELS:
            return f"it has no transform for a kernel of {problem.kernel}"
        if self.workspace(problem, pass_) > settings.get_workspace_limit():
            return "the filters' factors exceed the workspace limit"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products, transforms, reading the filters."""
        cut = _cut(problem, pass_ == "input_grad")
        rate = rates()
        (rows, columns), workers = cut.methods, cut.workers
        peak = 1.1 * rate.product(cut.size)
        seconds = 2.0 * cut.tiles * cut.factors * cut.inputs * cut.padded_out / peak
        # Operations on vectors, half of which are loads and stores.
        each = rows.n * columns.n * (rows.n + columns.n) + cut.factors * (rows.m + columns.m)
        seconds += 2.0 * cut.tiles * each * (cut.padded_in + cut.padded_out) / 2 / peak * 2
        blocks = max(1.0, cut.tiles / cut.at_once)
        passes = 4 + blocks * (2 if pass_ == "weight_grad" else 1)
        read = 1.5 * passes * cut.filter_bytes / rate.copy
        moved = sum(map(math.prod, (problem.x_shape, problem.y_shape))) * cut.size
        return 4e-5 + (seconds + read) / workers + moved / (1.5 * rate.copy)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the filters' factors, of the workers' blocks and of copies."""
        cut = _cut(problem, pass_ == "input_grad")
        held = cut.workers * cut.at_once * cut.tile_bytes
        weights = cut.size * math.prod(problem.w_shape)
        return cut.filter_bytes + 2 * weights + held + copied_bytes(problem)

    # ------------------------------------------------------------------------------- the passes

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        taps = np.ascontiguousarray(w)

        def part(x: Array, y: Array) -> None:
            some = problem.with_batch(len(x))
            if not _correlate(some, False, x, taps, y, b, problem.activation):
                by_definition(some, False, x, w, y, b, problem.activation)

        in_parts((x,), y, part)

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        reverse = (slice(None, None, -1),) * problem.ndim
        taps = swapped(w[reverse], problem.ndim, worker_count(problem.flops))

        def part(dz: Array, dx: Array) -> None:
            some = problem.with_batch(len(dz))
            if not _correlate(some, True, dz, taps, dx, None, None):
                by_definition(some, True, dz, w, dx)

        in_parts((dz,), dx, part)

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is None:
            return
        whole = _cut(problem, False)
        shape = (whole.factors, whole.filter_stride // whole.size)
        sums = buffers.get("filters", shape, dw.dtype)

        def zero(_: int, share: range) -> None:
            sums[share.start : share.stop] = 0

        run_shares(tuple(threads.shares(len(sums), whole.workers)), zero)
        in_parts((x, dz), None, lambda x, dz: _factor_sums(problem.with_batch(len(x)), x, dz, sums))
        out = dw if dw.flags.c_contiguous else np.empty(dw.shape, dw.dtype)
        loops = _loops(dw.dtype, whole.methods)
        columns = channel_blocks(whole.outputs, whole.width)
        taps = out if problem.ndim == 2 else out[None]

        def finish(_: int, share: range) -> None:
            loops.filter_grad(
                sums.ctypes.data, whole.filter_stride, columns, taps.ctypes.data, *taps.strides[:3],
                share.start, share.stop,
            )  # fmt: skip

        run_shares(tuple(threads.shares(whole.inputs, whole.workers)), finish)
        if out is not dw:
            dw[...] = out
        if not np.isfinite(np.sum(dw)):
            window_sums(problem, dz, x, dw, None)


def _sizes(cut: _Cut) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    rows, columns = cut.axes
    return (rows.size, columns.size), (rows.start, columns.start), (rows.count, columns.count)


def _correlate(
    problem: ConvProblem,
    backwards: bool,
    source: Array,
    w: Array,
    target: Array,
    bias: Array | None,
    activation: Activation | None,
) -> bool:
    """Write ``act(source * w + bias)`` into ``target``; return whether all sums are finite.

    ``w`` is dense ``(*taps, in, out)``, turned around for the input gradient already.
    """
    cut = _cut(problem, backwards)
    source, target = _flat(source, problem), _flat(target, problem)
    taps = w if problem.ndim == 2 else w[None]
    loops = _loops(source.dtype, cut.methods)
    columns = channel_blocks(cut.outputs, cut.width)
    blocks = len(columns)
    filters = buffers.get("filters", (cut.factors, cut.filter_stride // cut.size), source.dtype)
    line = np.zeros(cut.padded_out, source.dtype)
    if bias is not None:
        line[: cut.outputs] = bias
    rectify = int(type(activation) is ReLU)
    workers = cut.workers
    by_blocks = (
        workers > 1 and blocks % workers == 0 and cut.filter_bytes > LARGE_FILTERS
        and cut.tiles < 4 * FEW_TILES * workers
    )  # fmt: skip
    sizes, starts, counts = _sizes(cut)
    segment = np.array([[0, 0, cut.inputs]])
    wrong = [0] * workers

    def transformed(first: int, last: int) -> None:
        loops.filters(
            taps.ctypes.data, *taps.strides[:3], cut.inputs, columns, filters.ctypes.data,
            cut.filter_stride, first, last,
        )  # fmt: skip

    def work(k: int, share: range) -> None:
        tiles, some = (0, cut.tiles), (0, blocks)
        if by_blocks:
            some = (share.start, share.stop)
            transformed(*some)
        else:
            tiles = (share.start, share.stop)
        factors, products, patch = cut.blocks()
        wrong[k] = loops.correlate(
            source.ctypes.data, source.strides[:3], sizes, starts, cut.inputs,
            factors.ctypes.data, filters.ctypes.data, cut.filter_stride, target.ctypes.data, target.strides[:3],
            counts, line.ctypes.data, rectify, columns, products.ctypes.data, patch.ctypes.data,
            segment.ctypes.data, cut.at_once, (*tiles, *some),
        )  # fmt: skip

    if by_blocks:
        run_shares(tuple(threads.shares(blocks, workers)), work)
    else:
        run_shares(
            tuple(threads.shares(blocks, workers)),
            lambda _, share: transformed(share.start, share.stop),
        )
        run_shares(tuple(threads.shares(cut.tiles, workers)), work)
    if any(wrong):
        return False
    if activation is not None and not rectify:
        finish(target, activation, workers)
    return True


def _factor_sums(problem: ConvProblem, x: Array, dz: Array, sums: Array) -> None:
    """Add ``factors(x).T @ factors(dz)`` over all tiles to ``sums``."""
    cut = _cut(problem, False)
    x, dz = _flat(x, problem), _flat(dz, problem)
    loops = _loops(x.dtype, cut.methods)
    columns = channel_blocks(cut.outputs, cut.width)
    blocks, vectors_in = len(columns), cut.padded_in // cut.width
    by_blocks = blocks >= min(vectors_in, cut.workers)
    sizes, starts, counts = _sizes(cut)

    def work(_: int, share: range) -> None:
        mine = share.start, share.stop
        both = (*mine, 0, vectors_in) if by_blocks else (0, blocks, *mine)
        factors, products, patch = cut.blocks()
        loops.factor_sums(
            x.ctypes.data, x.strides[:3], sizes, starts, cut.inputs, factors.ctypes.data,
            dz.ctypes.data, dz.strides[:3], counts, columns, products.ctypes.data,
            sums.ctypes.data, cut.filter_stride, patch.ctypes.data, np.zeros((1, 3), np.int64), cut.at_once,
            (0, cut.tiles, *both),
        )  # fmt: skip

    run_shares(tuple(threads.shares(blocks if by_blocks else vectors_in, cut.workers)), work)
