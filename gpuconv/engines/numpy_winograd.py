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
from functools import partial
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
from gpuconv.engines.winograd import (
    Block,
    Grid,
    factor_views,
    filter_factors,
    filter_grad,
    gradient_grid,
    output_views,
    tile_factors,
    tile_outputs,
)
from gpuconv.engines.winograd_plan import (
    Plan,
    block_bytes,
    cut,
    largest_side,
    plan_of,
    seconds_of,
    shared,
    tile_rows,
)
from gpuconv.problem import ConvProblem

__all__ = ["NumpyWinograd"]

Array = np.ndarray[Any, Any]

#: Bytes of products that are formed before they are added to their sums.
PRODUCT = 2_000_000


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
        most = largest_side(problem.kernel) - 1
        if max(problem.kernel) > most:
            return f"it computes such kernels of up to {most} taps an axis, not {problem.kernel}"
        if self.workspace(problem, pass_) > settings.get_workspace_limit():
            return "the filters' factors exceed the workspace limit"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time."""
        backwards = pass_ == "input_grad"
        return seconds_of(problem, plan_of(problem, backwards), pass_)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the filters' factors and of all workers' blocks."""
        backwards = pass_ == "input_grad"
        plan = plan_of(problem, backwards)
        workers = worker_count(problem.flops)
        summed = pass_ == "weight_grad"
        size = wide_dtype(problem.dtype).itemsize
        filters = plan.factors * problem.in_channels * problem.out_channels * size
        filters = filters * plan.merged // problem.groups
        together = shared(problem, plan, workers, summed)
        tiles = max(
            min(problem.batch * g.rows.tiles, tile_rows(problem, plan, g, summed)) * g.columns.tiles
            for g in plan.grids
        )
        sums = (1 if together else 2 * workers) if summed else 1
        blocks_held = 1 if together else workers
        return (1 + sums) * filters + blocks_held * block_bytes(problem, plan, tiles)

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
        plan = plan_of(problem, False)
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


def _buffer(name: str, plan: Plan, grid: Grid, block: Block, channels: int, dtype: Any) -> Array:
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
    plan = plan_of(problem, backwards)
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

    if not shared(problem, plan, workers, False):

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

        run_shares(tuple(cut(problem, plan, workers, False)), work)
        return all(finite)

    ((*whole,),) = cut(problem, plan, 1, False)
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


def _factor_sums(problem: ConvProblem, plan: Plan, dz: Array, x: Array) -> Array:
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

    if not shared(problem, plan, workers, True):
        shares = tuple(cut(problem, plan, workers, True))
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
    ((*whole,),) = cut(problem, plan, 1, True)
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
