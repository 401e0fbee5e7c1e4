"""How the NumPy Winograd engine cuts a pass up: tiles, blocks, shares, and what they cost.

See :mod:`gpuconv.engines.numpy_winograd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gpuconv import settings
from gpuconv.engines.base import Pass
from gpuconv.engines.im2col import wide_dtype, worker_count
from gpuconv.engines.rates import efficiency, rates
from gpuconv.engines.toom_cook import LARGEST, Filtering, filtering
from gpuconv.engines.windows import Axis, blocks, forward_axes, input_grad_phases
from gpuconv.engines.winograd import Block, Grid, grids
from gpuconv.problem import ConvProblem

__all__ = [
    "Plan",
    "block_bytes",
    "cut",
    "largest_side",
    "plan_of",
    "seconds_of",
    "shared",
    "tile_rows",
]

#: Bytes of a block's factors and products: about a core's own cache.
BLOCK = 4_000_000
#: The same where products are summed over the block, which costs a pass over the filters.
SUM_BLOCK = 6_000_000
#: Tiles under which reading the filters for a block takes longer than multiplying by them.
FEW_TILES = 96
#: Bytes of filters that do not stay in a core's own cache.
LARGE_FILTERS = 1_000_000
#: Channels that a product should have at least; groups are put together up to it.
CHANNELS = 32
#: The largest side of a square tile: beyond it rounding errors grow faster than anything is gained.
LARGEST_TILE = 8


@dataclass(frozen=True)
class Plan:
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
def plan_of(problem: ConvProblem, backwards: bool) -> Plan:
    """Return the plan of least cost."""
    axes = _axes(problem, backwards)
    merged = _merged(problem)
    found = []
    largest = largest_side(problem.kernel)
    for rows in _candidates(axes[0].taps, axes[0].count, largest):
        for columns in _candidates(axes[1].taps, axes[1].count, largest):
            methods = rows, columns
            plan = Plan(axes, methods, grids(axes, methods), merged)
            found.append(
                (seconds_of(problem, plan, "input_grad" if backwards else "forward"), plan)
            )
    return min(found, key=lambda pair: pair[0])[1]


def largest_side(kernel: tuple[int, ...]) -> int:
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


def seconds_of(problem: ConvProblem, plan: Plan, pass_: Pass) -> float:
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
        block = min(inside, tile_rows(problem, plan, grid, summed))
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


def block_bytes(problem: ConvProblem, plan: Plan, tiles: int) -> int:
    """Return the bytes of a block of so many tiles."""
    size = wide_dtype(problem.dtype).itemsize
    rows, columns = plan.methods
    c, o = problem.in_channels, problem.out_channels
    halo = max(c, o) * columns.n * (rows.m + rows.r)
    return tiles * size * (plan.factors * (c + o) + 2 * halo)


def tile_rows(problem: ConvProblem, plan: Plan, grid: Grid, summed: bool) -> int:
    """Return how many rows of tiles a block should have."""
    size = wide_dtype(problem.dtype).itemsize
    tile = plan.factors * size * (problem.in_channels + problem.out_channels)
    wanted = max((SUM_BLOCK if summed else BLOCK) // tile, FEW_TILES)
    workers = worker_count(problem.flops)
    budget = settings.get_workspace_limit() // 2 // workers // block_bytes(problem, plan, 1)
    return max(1, min(wanted, budget) // grid.columns.tiles)


def shared(problem: ConvProblem, plan: Plan, workers: int, summed: bool) -> bool:
    """Return whether the workers should share blocks and divide the products."""
    size = wide_dtype(problem.dtype).itemsize
    filters = plan.factors * size * problem.in_channels * problem.out_channels
    filters = filters * plan.merged // problem.groups
    if workers == 1 or filters < LARGE_FILTERS:
        return False
    return summed or plan.tiles(problem.batch) < FEW_TILES // 2 * workers


def cut(
    problem: ConvProblem, plan: Plan, workers: int, summed: bool
) -> list[list[tuple[Grid, Block]]]:
    """Divide all tiles into blocks, and these among workers."""
    shares: list[list[tuple[Grid, Block]]] = [[] for _ in range(workers)]
    for grid in plan.grids:
        counts = problem.batch, grid.rows.tiles
        cut = blocks(counts, tile_rows(problem, plan, grid, summed), workers)
        for k, share in enumerate(cut):
            shares[k] += [(grid, Block(images, rows)) for images, rows in share]
    return [share for share in shares if share]
