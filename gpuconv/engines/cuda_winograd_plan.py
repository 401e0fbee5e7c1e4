"""How a pass of cuda_winograd is cut up, and what it costs: apart from the kernels and their launches.

The tile, the chunks of the workspace and the partial products of the weight gradient follow from
the facts of the device, without timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpuconv.cuda import architecture, prediction
from gpuconv.engines.base import Pass
from gpuconv.engines.toom_cook import Filtering, filtering
from gpuconv.problem import ConvProblem

__all__ = [
    "ALIGN",
    "TAPS",
    "TILES",
    "Plan",
    "cut",
    "fixed_bytes",
    "plan_of",
    "round_up",
    "wide_dtype",
]

#: Taps of an axis.
TAPS = 3
#: Outputs of a tile's side, to choose from; beyond, rounding errors grow faster than the gain, and
#: a tile of float64 has to fit the registers.
TILES = (2, 4, 6)
LARGEST = {"float64": 4}
#: Tiles are counted in multiples of it: whole sectors of memory, and aligned rows for cuBLAS.
ALIGN = 8
#: Tiles that a partial product of the weight gradient has at least.
SEGMENT = 512
#: Fraction of the peak that cuBLAS reaches.
PRODUCT = 0.8
#: How much faster what stays in the second cache is read.
NEAR = 2.5


@dataclass(frozen=True)
class Plan:
    """How a pass is cut up.

    Attributes
    ----------
    tile : int
        ``m``.
    method : Filtering
    inputs, outputs : int
        Channels of a group, as the pass sees them: of its source and of its result.
    rows, columns : int
        Tiles along each axis.
    tiles : int
        All of them.
    segments : int
        Partial products of the weight gradient, added in a fixed order.
    chunk : int
        Tiles at a time.
    workspace : int
        Bytes of it all.
    seconds : float
        Predicted.
    """

    tile: int
    method: Filtering
    inputs: int
    outputs: int
    rows: int
    columns: int
    tiles: int
    segments: int
    chunk: int
    workspace: int
    seconds: float

    @property
    def factors(self) -> int:
        return self.method.n**2


def wide_dtype(problem: ConvProblem) -> str:
    """Return the dtype of the factors."""
    return "float64" if problem.dtype == "float64" else "float32"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _segments(problem: ConvProblem, factors: int, tiles: int, multiprocessors: int) -> int:
    """Return into how many partial products to cut the weight gradient's, to fill the device."""
    inputs, outputs = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    blocks = factors * problem.groups * -(-inputs // 64) * -(-outputs // 64)
    return max(1, min(2 * multiprocessors // blocks, tiles // SEGMENT))


def _size(problem: ConvProblem) -> int:
    """Return the bytes of a factor."""
    return np.dtype(wide_dtype(problem)).itemsize


def _weights(problem: ConvProblem) -> int:
    """Return the number of products of a tap."""
    return problem.in_channels * problem.out_channels // problem.groups


def fixed_bytes(problem: ConvProblem, pass_: Pass, tile: int, segments: int) -> int:
    """Return the bytes that a pass takes whatever the number of tiles."""
    factors = (tile + TAPS - 1) ** 2 * segments
    if pass_ == "weight_grad":
        factors += TAPS * TAPS  # the sums over chunks
    return factors * _weights(problem) * _size(problem)


def cut(problem: ConvProblem, pass_: Pass, tile: int, limit: int, gpu: architecture.GPU) -> Plan:
    """Return the plan of a pass with this tile."""
    method = filtering(tile, TAPS)
    count, groups = method.n**2, problem.groups
    inputs, outputs = problem.in_channels // groups, problem.out_channels // groups
    target = problem.in_shape if pass_ == "input_grad" else problem.out_shape
    rows, columns = (-(-n // tile) for n in target)
    tiles = problem.batch * rows * columns
    each = count * groups * (inputs + outputs) * _size(problem)
    segments = 1
    if pass_ == "weight_grad":
        sums = count * _weights(problem) * _size(problem)
        wanted = _segments(problem, count, tiles, gpu.multiprocessors)
        segments = max(1, min(wanted, limit // 4 // sums))
    fixed = fixed_bytes(problem, pass_, tile, segments)
    unit = ALIGN * segments
    chunk = max(unit, min(round_up(tiles, unit), (limit - fixed) // each // unit * unit))
    if pass_ == "input_grad":
        inputs, outputs = outputs, inputs
    seconds = _seconds(problem, pass_, gpu, count, tile, tiles, segments, chunk)
    workspace = fixed + chunk * each
    return Plan(
        tile, method, inputs, outputs, rows, columns, tiles, segments, chunk, workspace, seconds
    )  # fmt: skip


def _seconds(
    problem: ConvProblem,
    pass_: Pass,
    gpu: architecture.GPU,
    factors: int,
    tile: int,
    tiles: int,
    segments: int,
    chunk: int,
) -> float:
    """Return the predicted time: launches, transforms by their bytes, products."""
    size = _size(problem)
    c, o, groups = problem.in_channels, problem.out_channels, problem.groups
    at_once = min(tiles, chunk) * factors * (c + o) * size
    near = NEAR if at_once < gpu.l2_bytes / 2 else 1
    cells = tiles * (c + o) * tile * tile * problem.itemsize
    moved = prediction.bytes_moved(gpu, tiles * (c + o) * factors * size) / near
    filters = factors * _weights(problem) * size * segments
    transforms = prediction.bytes_moved(gpu, cells + 2 * filters) + moved
    # Matrix products come in blocks: what is narrower takes as long.
    wide = {"forward": o, "input_grad": c, "weight_grad": o}[pass_] // groups
    other = (c + o) // groups - wide
    high = other if pass_ == "weight_grad" else min(tiles, chunk)
    blocks = factors * groups * segments * -(-high // 128) * -(-wide // 64)
    fill = prediction.wave_share(blocks, gpu.multiprocessors)
    flops = 2.0 * factors * tiles * groups * round_up(other, 8) * round_up(wide, 32)
    product = flops / (PRODUCT * gpu.flops(wide_dtype(problem)) * fill)
    launches = 1 + 3 * -(-tiles // chunk)
    return launches * prediction.LAUNCH + transforms + max(product, moved)


@lru_cache(maxsize=1024)
def plan_of(problem: ConvProblem, pass_: Pass, limit: int, gpu: architecture.GPU) -> Plan:
    target = problem.in_shape if pass_ == "input_grad" else problem.out_shape
    plans = [
        cut(problem, pass_, tile, limit, gpu)
        for tile in TILES
        if tile == TILES[0]
        or (tile < 2 * max(target) and tile <= LARGEST.get(problem.dtype, TILES[-1]))
    ]
    return min(plans, key=lambda plan: (plan.workspace > limit, plan.seconds))
