"""Winograd's minimal filtering in NumPy: fewer multiplications for dense kernels of stride 1.

A 3x3 kernel over a tile of 4x4 outputs takes 36 products a channel pair in the place of 144.
All three passes have the same form, a product of matrices for each of the ``k * l`` factors of
a tile (:mod:`gpuconv.engines.winograd`), and share its transforms:

- forward: ``factors(x) @ factors(w)``;
- input gradient: the same of ``dz`` and the reversed, transposed weights;
- weight gradient: ``factors(x).T @ factors(dz)``, summed over all tiles, transformed once.

A dilated kernel is dense on each of the grids that its taps skip over. Groups of few channels
are put together into a block-diagonal filter, which BLAS multiplies faster than it skips zeros.

Each worker takes blocks of tiles through all steps while they are in its cache. Where the
filters are larger than a cache and the tiles are few, the workers share a block instead and
divide the products, so that each filter is read once.

Sums are exact but for rounding, some ten times that of the definition's; a NaN or an infinity
would spread over its tile, so a call that meets one is computed by the definition instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import (
    bias_line,
    by_definition,
    run_shares,
    scratch,
    wide_dtype,
    window_sums,
    worker_count,
)
from gpuconv.engines.rates import efficiency, rates
from gpuconv.engines.toom_cook import LARGEST, Filtering, filtering
from gpuconv.engines.windows import Axis, blocks, forward_axes, input_grad_phases
from gpuconv.engines.winograd import (
    Block,
    Grid,
    factor_views,
    filter_factors,
    filter_grad,
    gradient_grid,
    grids,
    output_views,
    tile_factors,
    tile_outputs,
)
from gpuconv.problem import ConvProblem

__all__ = ["NumpyWinograd"]

Array = np.ndarray[Any, Any]

#: Bytes of a block's factors and products: about a core's own cache.
BLOCK = 4_000_000
#: The same where products are summed over the block, which costs a pass over the filters.
SUM_BLOCK = 6_000_000
#: Bytes of products that are formed before they are added to their sums.
PRODUCT = 2_000_000
#: Tiles under which reading the filters for a block takes longer than multiplying by them.
FEW_TILES = 96
#: Bytes of filters that do not stay in a core's own cache.
LARGE_FILTERS = 1_000_000
#: Channels that a product should have at least; groups are put together up to it.
CHANNELS = 32
#: The largest side of a square tile: beyond it rounding errors grow faster than anything is gained.
LARGEST_TILE = 8


@dataclass(frozen=True)
class _Plan:
    """How a pass is cut up.

    Attributes
    ----------
    axes : tuple of Axis
        How the source is gathered, rows and columns.
    methods : tuple of Filtering
        For rows and columns.
    grids : tuple of Grid
        The dense correlations.
    merged : int
        Groups put together.
    """

    axes: tuple[Axis, ...]
    methods: tuple[Filtering, ...]
    grids: tuple[Grid, ...]
    merged: int

    @property
    def factors(self) -> int:
        return self.grids[0].factors

    def tiles(self, batch: int) -> int:
        """Return the number of tiles over all grids."""
        return batch * sum(g.rows.tiles * g.columns.tiles for g in self.grids)


def _axes(problem: ConvProblem, backwards: bool) -> tuple[Axis, ...]:
    """Return the gather of a pass over two axes; a single one gets a row of one cell."""
    axes = input_grad_phases(problem)[0].axes if backwards else forward_axes(problem)
    return axes if len(axes) == 2 else (Axis(1, 1, 1, 1, 1, 0), *axes)


def _candidates(taps: int, outputs: int, largest: int) -> list[Filtering]:
    """Return the methods to choose from on one axis."""
    if taps == 1:
        return [filtering(1, 1)]
    return [
        filtering(m, taps)
        for m in (2, 3, 4, 6)
        if m + taps - 1 <= largest and (m == 2 or m < 2 * outputs)
    ]


@lru_cache(maxsize=1024)
def _plan(problem: ConvProblem, backwards: bool) -> _Plan:
    """Return the plan of least cost."""
    axes = _axes(problem, backwards)
    merged = _merged(problem)
    found = []
    largest = _largest(problem.kernel)
    for rows in _candidates(axes[0].taps, axes[0].count, largest):
        for columns in _candidates(axes[1].taps, axes[1].count, largest):
            methods = rows, columns
            plan = _Plan(axes, methods, grids(axes, methods), merged)
            found.append((_seconds(problem, plan, "input_grad" if backwards else "forward"), plan))
    return min(found, key=lambda pair: pair[0])[1]


def _largest(kernel: tuple[int, ...]) -> int:
    """Return the largest side of a tile; where one axis has all the taps, errors meet once."""
    return LARGEST if sum(k > 1 for k in kernel) == 1 else LARGEST_TILE


def _merged(problem: ConvProblem) -> int:
    """Return how many groups to put together."""
    if problem.groups == 1:
        return 1
    narrow = min(problem.in_channels, problem.out_channels) // problem.groups
    return next(
        (
            q
            for q in range(1, problem.groups + 1)
            if problem.groups % q == 0 and q * narrow >= CHANNELS
        ),
        problem.groups,
    )


def _seconds(problem: ConvProblem, plan: _Plan, pass_: Pass) -> float:
    """Return the predicted time of a pass: products, packing of filters, transforms, copies."""
    rate, workers = rates(), worker_count(problem.flops)
    size = wide_dtype(problem.dtype).itemsize
    c, o = problem.in_channels, problem.out_channels
    summed = pass_ == "weight_grad"
    (rows, columns), tiles = plan.methods, plan.tiles(problem.batch)
    sets = problem.groups // plan.merged
    filters = plan.factors * c * o / sets
    count = 0.0
    for grid in plan.grids:
        inside = problem.batch * grid.rows.tiles
        block = min(inside, _tile_rows(problem, plan, grid, summed))
        count += max(1.0, inside / block)
    seconds = 2.0 * tiles * filters / efficiency(c / sets, o / sets)
    transforms = 1.0 * c * (rows.m * columns.n**2 + columns.n * rows.n**2)
    if summed:
        transforms += o * (rows.m * columns.n * columns.m + columns.n * rows.n * rows.m)
    else:
        transforms += o * (columns.n * rows.n * rows.m + rows.m * columns.n * columns.m)
    seconds += 2.5 * 2 * tiles * transforms
    seconds += 1.5 * 2 * filters * rows.r * columns.r
    seconds /= rate.product(size)
    copied = 3.0 * tiles * (c * rows.m * columns.n + o * rows.m * columns.m)
    # Filters come from memory, which all workers share.
    read = (4 * filters + count * filters * (3 if summed else 2)) * size / rate.copy
    if filters * size < LARGE_FILTERS:
        read /= workers
    calls = 30 * rate.call * count
    runs = tiles * rows.m * (columns.n + columns.m)  # of channels, copied one by one
    calls += 4e-9 * runs
    fixed = 4e-5 + 1e-5 * len(plan.grids) + read
    # Several workers wait for each other between the steps of a block.
    gain = workers if workers == 1 else workers / 1.2
    return fixed + (seconds + copied * size / rate.copy + calls) / gain


class NumpyWinograd(Engine):
    """Winograd's minimal filtering, a worker per core."""

    name = "numpy_winograd"
    device_kind = "cpu"
    ndims = (1, 2)
    error_factor = 10.0

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if settings.get_precision() == "strict":
            return "its sums are rounded differently, and set_precision('strict') rules that out"
        if any(s != 1 for s in problem.stride):
            return f"it computes stride 1, not {problem.stride}"
        if problem.taps == 1:
            return "a kernel of one tap leaves nothing to save"
        most = _largest(problem.kernel) - 1
        if max(problem.kernel) > most:
            return f"it computes such kernels of up to {most} taps an axis, not {problem.kernel}"
        if self.workspace(problem, pass_) > settings.get_workspace_limit():
            return "the filters' factors exceed the workspace limit"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time."""
        backwards = pass_ == "input_grad"
        return _seconds(problem, _plan(problem, backwards), pass_)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the filters' factors and of all workers' blocks."""
        backwards = pass_ == "input_grad"
        plan = _plan(problem, backwards)
        workers = worker_count(problem.flops)
        summed = pass_ == "weight_grad"
        size = wide_dtype(problem.dtype).itemsize
        filters = plan.factors * problem.in_channels * problem.out_channels * size
        filters = filters * plan.merged // problem.groups
        together = _shared(problem, plan, workers, summed)
        tiles = max(
            min(problem.batch * g.rows.tiles, _tile_rows(problem, plan, g, summed))
            * g.columns.tiles
            for g in plan.grids
        )
        sums = (1 if together else 2 * workers) if summed else 1
        blocks_held = 1 if together else workers
        return (1 + sums) * filters + blocks_held * _bytes(problem, plan, tiles)

    # ------------------------------------------------------------------------------- the passes

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        dtype = wide_dtype(problem.dtype)
        bias = None if b is None else b.astype(dtype, copy=False)
        if _correlate(problem, False, x, w, y, bias, problem.activation):
            return
        by_definition(problem, False, x, w, y, bias, problem.activation)

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        if _correlate(problem, True, dz, w, dx, None, None):
            return
        by_definition(problem, True, dz, w, dx)

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word
    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is None:
            return
        plan = _plan(problem, False)
        factors = _factor_sums(problem, plan, _flat(dz, problem), _flat(x, problem))
        diagonal = _diagonal(factors, problem.groups, plan.merged)
        filter_grad(diagonal, plan.methods, dw)
        if not np.isfinite(np.sum(dw)):
            window_sums(problem, dz, x, dw, None)


def _flat(array: Array, problem: ConvProblem) -> Array:
    """Return an image of one spatial axis as one of a single row."""
    return array if problem.ndim == 2 else array[:, None]


def _blocked(factors: Array, groups: int, merged: int) -> Array:
    """Return the filters ``(k * l, in of a group, out)`` as ``(k * l, sets, in, out)``.

    A set is ``merged`` groups, on the diagonal of its matrix.
    """
    count, w_in, out = factors.shape
    if groups == 1:
        return factors.reshape(count, 1, w_in, out)
    sets, width = groups // merged, out // groups
    split = factors.reshape(count, w_in, sets, merged, width)
    if merged == 1:
        return split[:, :, :, 0].transpose(0, 2, 1, 3)
    whole = np.zeros((count, sets, merged, w_in, merged, width), factors.dtype)
    for g in range(merged):
        whole[:, :, g, :, g] = split[:, :, :, g].transpose(0, 2, 1, 3)
    return whole.reshape(count, sets, merged * w_in, merged * width)


def _diagonal(sums: Array, groups: int, merged: int) -> Array:
    """Return ``(k * l, sets, in, out)`` as ``(k * l, in of a group, out)``."""
    count, sets, inputs, outputs = sums.shape
    if groups == 1:
        return sums.reshape(count, inputs, outputs)
    w_in, width = inputs // merged, outputs // merged
    split = sums.reshape(count, sets, merged, w_in, merged, width)
    whole = np.empty((count, w_in, sets, merged, width), sums.dtype)
    for g in range(merged):
        whole[:, :, :, g] = split[:, :, g, :, g].transpose(0, 2, 1, 3)
    return whole.reshape(count, w_in, groups * width)


def _sets(tensor: Array, sets: int) -> Array:
    """Return ``(k, l, n, t, u, c)`` as ``(k * l, sets, tiles, c of a set)``, a view."""
    k, l, *tiles, channels = tensor.shape  # noqa: E741  (the layout's letter)
    flat = tensor.reshape(k * l, math.prod(tiles), sets, channels // sets)
    return flat.transpose(0, 2, 1, 3)


def _bytes(problem: ConvProblem, plan: _Plan, tiles: int) -> int:
    """Return the bytes of a block of so many tiles."""
    size = wide_dtype(problem.dtype).itemsize
    rows, columns = plan.methods
    c, o = problem.in_channels, problem.out_channels
    halo = max(c, o) * columns.n * (rows.m + rows.r)
    return tiles * size * (plan.factors * (c + o) + 2 * halo)


def _tile_rows(problem: ConvProblem, plan: _Plan, grid: Grid, summed: bool) -> int:
    """Return how many rows of tiles a block should have."""
    size = wide_dtype(problem.dtype).itemsize
    tile = plan.factors * size * (problem.in_channels + problem.out_channels)
    wanted = max((SUM_BLOCK if summed else BLOCK) // tile, FEW_TILES)
    workers = worker_count(problem.flops)
    budget = settings.get_workspace_limit() // 2 // workers // _bytes(problem, plan, 1)
    return max(1, min(wanted, budget) // grid.columns.tiles)


def _shared(problem: ConvProblem, plan: _Plan, workers: int, summed: bool) -> bool:
    """Return whether the workers should share blocks and divide the products."""
    size = wide_dtype(problem.dtype).itemsize
    filters = plan.factors * size * problem.in_channels * problem.out_channels
    filters = filters * plan.merged // problem.groups
    if workers == 1 or filters < LARGE_FILTERS:
        return False
    return summed or plan.tiles(problem.batch) < FEW_TILES // 2 * workers


def _cut(
    problem: ConvProblem, plan: _Plan, workers: int, summed: bool
) -> list[list[tuple[Grid, Block]]]:
    """Divide all tiles into blocks, and these among workers."""
    shares: list[list[tuple[Grid, Block]]] = [[] for _ in range(workers)]
    for grid in plan.grids:
        counts = problem.batch, grid.rows.tiles
        cut = blocks(counts, _tile_rows(problem, plan, grid, summed), workers)
        for k, share in enumerate(cut):
            shares[k] += [(grid, Block(images, rows)) for images, rows in share]
    return [share for share in shares if share]


def _part(block: Block, k: int, workers: int) -> tuple[Block, tuple[slice, ...]] | None:
    """Return the k-th worker's part of a shared block, and where it lies in ``(n, t)``."""
    (n0, n1), (t0, t1) = block.images, block.tile_rows
    if n1 - n0 > 1:
        a, b = ((n1 - n0) * j // workers for j in (k, k + 1))
        part = Block((n0 + a, n0 + b), block.tile_rows), (slice(a, b), slice(None))
    else:
        a, b = ((t1 - t0) * j // workers for j in (k, k + 1))
        part = Block(block.images, (t0 + a, t0 + b)), (slice(None), slice(a, b))
    return part if b > a else None


def _buffer(name: str, plan: _Plan, grid: Grid, block: Block, channels: int, dtype: Any) -> Array:
    rows, columns = plan.methods
    shape = (rows.n, columns.n, *block.count, grid.columns.tiles, channels)
    return scratch.get(name, shape, dtype)


def _correlate(
    problem: ConvProblem,
    backwards: bool,
    source: Array,
    w: Array,
    target: Array,
    bias: Array | None,
    activation: Activation | None,
) -> bool:
    """Write ``act(source * filters + bias)`` into ``target``; return whether all sums are finite."""
    dtype = wide_dtype(problem.dtype)
    plan = _plan(problem, backwards)
    source, target = _flat(source, problem), _flat(target, problem)
    taps = w if problem.ndim == 2 else w[None]
    factors = filter_factors(taps, plan.methods, backwards, dtype)
    filters = _blocked(factors, problem.groups, plan.merged)
    if backwards:
        filters = filters.swapaxes(2, 3)
    sets, inputs, outputs = filters.shape[1:]
    workers = worker_count(problem.flops)
    finite = [True] * workers
    line = None if bias is None else bias_line(bias)

    def buffers(grid: Grid, block: Block) -> tuple[Array, Array]:
        return (
            _buffer("factors", plan, grid, block, sets * inputs, dtype),
            _buffer("products", plan, grid, block, sets * outputs, dtype),
        )

    if not _shared(problem, plan, workers, False):

        def views(grid: Grid, block: Block) -> tuple[Any, ...]:
            of_tiles, products = buffers(grid, block)
            return (
                grid,  # kept, so that its number in the key stays its own
                of_tiles,
                products,
                _sets(of_tiles, sets),
                _sets(products, sets),
                factor_views(grid, block, False, scratch, of_tiles),
                output_views(products, grid, scratch),
            )

        def work(k: int, share: list[tuple[Grid, Block]]) -> None:
            for grid, block in share:
                key = id(grid), block.count, sets, inputs, outputs, dtype.char
                _, of_tiles, products, left, out, before, behind = scratch.made(
                    key, partial(views, grid, block)
                )
                tile_factors(source, grid, block, False, scratch, of_tiles, before)
                np.matmul(left, filters, out=out)
                if not tile_outputs(
                    products, grid, block, scratch, target, line, activation, behind
                ):
                    finite[k] = False
                    return

        run_shares(tuple(_cut(problem, plan, workers, False)), work)
        return all(finite)

    ((*whole,),) = _cut(problem, plan, 1, False)
    for grid, block in whole:
        of_tiles, products = buffers(grid, block)
        _transform(source, grid, block, False, of_tiles, workers)
        left, out = _sets(of_tiles, sets), _sets(products, sets)

        def multiply(a: int, b: int, left: Array = left, out: Array = out) -> None:
            np.matmul(left[a:b], filters[a:b], out=out[a:b])

        def finish(k: int, part: Block, place: Any, grid: Grid = grid, p: Array = products) -> None:
            done = tile_outputs(
                p[(..., *place, slice(None), slice(None))],
                grid, part, scratch, target, line, activation,
            )  # fmt: skip
            finite[k] = finite[k] and done

        _divide(plan.factors, workers, multiply)
        _each_part(block, workers, finish)
    return all(finite)


def _each_part(block: Block, workers: int, work: Callable[[int, Block, Any], None]) -> None:
    """Call ``work(k, part, place)`` for every worker's part of a block."""

    def part(k: int, _: int) -> None:
        mine = _part(block, k, workers)
        if mine is not None:
            work(k, *mine)

    run_shares(tuple(range(workers)), part)


def _divide(count: int, workers: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(first, last)`` for every worker's range of the products."""
    shares = threads.shares(count, workers)
    run_shares(tuple(shares), lambda _, share: work(share.start, share.stop))


def _transform(
    source: Array, grid: Grid, block: Block, gradient: bool, out: Array, workers: int
) -> None:
    """Write a shared block's factors, each worker its part."""

    def work(_: int, part: Block, place: Any) -> None:
        mine = out[(slice(None), slice(None), *place)]
        tile_factors(source, grid, part, gradient, scratch, mine)

    _each_part(block, workers, work)


def _factor_sums(problem: ConvProblem, plan: _Plan, dz: Array, x: Array) -> Array:
    """Return ``factors(x).T @ factors(dz)`` over all tiles, ``(k * l, sets, in, out)``."""
    dtype = wide_dtype(problem.dtype)
    sets = problem.groups // plan.merged
    shape = (
        plan.factors,
        sets,
        problem.in_channels // sets,
        problem.out_channels // sets,
    )
    workers = worker_count(problem.flops)

    def buffers(grid: Grid, block: Block) -> tuple[Array, Array]:
        return (
            _buffer("factors", plan, grid, block, problem.in_channels, dtype),
            _buffer("products", plan, grid, block, problem.out_channels, dtype),
        )

    def add(total: Array, of_x: Array, of_dz: Array, first: bool) -> None:
        left, right = _sets(of_x, sets).swapaxes(2, 3), _sets(of_dz, sets)
        _add_product(total, left, right, first)

    if not _shared(problem, plan, workers, True):
        shares = tuple(_cut(problem, plan, workers, True))
        totals = [np.empty(0)] * len(shares)

        def work(k: int, share: list[tuple[Grid, Block]]) -> None:
            totals[k] = total = np.empty(shape, dtype)
            for j, (grid, block) in enumerate(share):
                of_x, of_dz = buffers(grid, block)
                tile_factors(x, grid, block, False, scratch, of_x)
                tile_factors(dz, gradient_grid(grid), block, True, scratch, of_dz)
                add(total, of_x, of_dz, j == 0)

        run_shares(shares, work)
        for other in totals[1:]:
            totals[0] += other
        return totals[0]

    total = np.empty(shape, dtype)
    ((*whole,),) = _cut(problem, plan, 1, True)
    for j, (grid, block) in enumerate(whole):
        of_x, of_dz = buffers(grid, block)
        _transform(x, grid, block, False, of_x, workers)
        _transform(dz, gradient_grid(grid), block, True, of_dz, workers)
        left, right = _sets(of_x, sets).swapaxes(2, 3), _sets(of_dz, sets)

        def multiply(a: int, b: int, lt: Array = left, rt: Array = right, j: int = j) -> None:
            _add_product(total[a:b], lt[a:b], rt[a:b], j == 0)

        _divide(plan.factors, workers, multiply)
    return total


def _add_product(total: Array, left: Array, right: Array, first: bool) -> None:
    """Add ``left @ right`` to the total, or begin it."""
    if first:
        np.matmul(left, right, out=total)
        return
    # As many factors at a time as stay in a cache; few calls, as workers wait for each other there.
    step = max(1, PRODUCT // (total.nbytes // len(total)))
    for k in range(0, len(total), step):
        part = total[k : k + step]
        product = scratch.get("sum", part.shape, total.dtype)
        np.matmul(left[k : k + step], right[k : k + step], out=product)
        np.add(part, product, out=part)
