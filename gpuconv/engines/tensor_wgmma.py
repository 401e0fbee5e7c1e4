"""The products of :mod:`gpuconv.engines.cuda_tensor_core` by ``kernels/conv_wgmma.cu``.

Compute capability 9.0 only, and only where TMA can copy: channels of a group a multiple of 16
bytes, borders and taps within what a tensor map holds. :func:`planned` says whether and how.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product as combinations
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import (
    architecture,
    kernels,
    prediction,
    runtime,
    split_sum,
    tensor_map,
    wgmma_tiles,
)
from gpuconv.cuda.architecture import GPU
from gpuconv.cuda.tensor_tiles import Product
from gpuconv.cuda.wgmma_tiles import CAPABILITY, DEPTH_BYTES, Choice, Tile
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Pass
from gpuconv.engines.cuda_arrays import NULL, three
from gpuconv.problem import ConvProblem

__all__ = ["chosen", "launcher", "planned", "sample_variants", "workspace"]

Array = Any

_log = logging.getLogger("gpuconv")
_PASSES = {"forward": 0, "input_grad": 1, "weight_grad": 2}
_SUFFIXES = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}
#: Products of a launch: phases of input_grad's stride.
_MOST_WALKS = 4
#: By the number of spatial axes: corners of a map's box lie within -n and n-1, taps within 2n-1.
_CORNERS = {2: 128, 3: 16}
_MOST_STEP = 8

_AXIS = np.dtype(
    [
        (n, np.int32)
        for n in ["count", "start", "scale", "taps", "step", "first", "by", "spacing", "phase"]
    ]
)
_WALK = np.dtype(
    {
        "names": ["map", "d", "h", "w", "positions", "first_tile"],
        "formats": [tensor_map.MAP, _AXIS, _AXIS, _AXIS, np.int32, np.int32],
        "offsets": [0, 128, 164, 200, 236, 240],
        "itemsize": 256,
    }
)
_WALKS = np.dtype([("walk", _WALK, (_MOST_WALKS,))])


# ------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Axis:
    """One axis of a walk, as ``Axis`` of the kernel; ``size`` is that of the image."""

    size: int
    count: int
    start: int
    scale: int
    taps: int
    step: int
    first: int
    by: int
    spacing: int
    phase: int

    @property
    def upper(self) -> int:
        """How far the last position is from the image's last pixel."""
        return self.start + (self.count - 1) * self.scale - (self.size - 1)

    @property
    def values(self) -> tuple[int, ...]:
        """What the kernel gets."""
        return (
            self.count, self.start, self.scale, self.taps, self.step, self.first, self.by,
            self.spacing, self.phase,
        )  # fmt: skip

    def fits(self, most: int) -> bool:
        """Return whether a tensor map holds it."""
        if self.taps == 0:
            return True
        corners = all(-most <= v < most for v in (self.start, self.upper))
        return corners and (self.taps - 1) * self.step < 2 * most and self.scale <= _MOST_STEP


def _along(size: int, out: int, kernel: int, stride: int, dilation: int, before: int) -> Axis:
    """Return an axis of forward and of weight_grad."""
    return Axis(size, out, -before, stride, kernel, dilation, 0, 1, 1, 0)


def _back(
    size: int, pixels: int, kernel: int, stride: int, dilation: int, before: int, phase: int
) -> Axis:
    """Return an axis of input_grad: the pixels of a phase, and gradients from the last tap on.

    As ``Axis`` of ``conv_tensor_core.cu``, with the taps turned round: im2col's offsets grow.
    """
    count = -(-(pixels - phase) // stride)
    by = next(b for b in range(1, stride + 1) if b * dilation % stride == 0)
    fitting = [t for t in range(by) if (phase + before - t * dilation) % stride == 0]
    taps = -(-(kernel - fitting[0]) // by) if fitting and fitting[0] < kernel else 0
    if taps == 0:
        return Axis(size, count, 0, 1, 0, 1, 0, 1, stride, phase)
    first = fitting[0]
    step = by * dilation // stride
    start = (phase + before - first * dilation) // stride - (taps - 1) * step
    return Axis(size, count, start, 1, taps, step, first + (taps - 1) * by, -by, stride, phase)


@lru_cache(maxsize=4096)
def _walks(problem: ConvProblem, pass_: Pass) -> tuple[tuple[Axis, Axis, Axis], ...]:
    """Return the axes D, H and W of each product of a launch."""
    before = three(tuple(low for low, _ in problem.padding), 0)
    common = [
        three(problem.kernel, 1), three(problem.stride, 1), three(problem.dilation, 1), before,
    ]  # fmt: skip
    sizes, outs = three(problem.in_shape, 1), three(problem.out_shape, 1)
    if pass_ != "input_grad":
        d, h, w = (_along(*values) for values in zip(sizes, outs, *common, strict=True))
        return ((d, h, w),)
    made = []
    for phases in combinations(*map(range, three(problem.stride, 1))):
        d, h, w = (_back(*values) for values in zip(outs, sizes, *common, phases, strict=True))
        if d.count > 0 and h.count > 0 and w.count > 0:
            made.append((d, h, w))
    return tuple(made)


def _taps(walk: tuple[Axis, Axis, Axis]) -> int:
    return math.prod(axis.taps for axis in walk)


def _covered(problem: ConvProblem, pass_: Pass) -> bool:
    """Return whether TMA and wgmma can do this pass."""
    size = problem.itemsize
    c, o = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if c * size % 16 or o * size % 16 or (pass_ == "weight_grad" and size == 4):
        return False
    depth = c if pass_ == "forward" else o
    if problem.groups > 1 and pass_ != "weight_grad" and depth * size % DEPTH_BYTES:
        return False  # a piece would reach into the next group's channels
    if pass_ == "input_grad" and math.prod(problem.stride) > _MOST_WALKS:
        return False
    most = _CORNERS[3 if problem.ndim == 3 else 2]
    return all(axis.fits(most) for walk in _walks(problem, pass_) for axis in walk)


# --------------------------------------------------------------------------------------- choice


@lru_cache(maxsize=4096)
def _products(
    problem: ConvProblem, pass_: Pass, crowded: bool
) -> tuple[Product, tuple[int, ...], int]:
    """Return the pass as products, the rows of each, and the pieces that channels make."""
    size = problem.itemsize
    depth_of_step = DEPTH_BYTES // size
    c, o = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    walks = _walks(problem, pass_)
    positions = tuple(problem.batch * math.prod(a.count for a in walk) for walk in walks)
    if pass_ == "weight_grad":
        chunks, columns, results = -(-c // 64), o, math.prod(problem.w_shape)
        rows: tuple[int, ...] = (problem.taps * chunks * 64,)
        depth = -(-positions[0] // depth_of_step) * depth_of_step
    else:
        along, columns = (c, o) if pass_ == "forward" else (o, c)
        chunks, rows = -(-along // depth_of_step), positions
        results = math.prod(problem.y_shape if pass_ == "forward" else problem.x_shape)
        taps = sum(_taps(walk) * n for walk, n in zip(walks, rows, strict=True)) / sum(rows)
        depth = max(1, round(taps * chunks)) * depth_of_step
    made = Product(
        pass_, size, 16, sum(rows), columns, depth, problem.groups, results, problem.bytes, crowded
    )
    return made, rows, chunks


def chosen(problem: ConvProblem, pass_: Pass, gpu: GPU, room: int) -> Choice | None:
    """Return the tile of the least predicted time, or None where this is no way to do it.

    Parameters
    ----------
    problem : ConvProblem
    pass_ : {"forward", "input_grad", "weight_grad"}
    gpu : GPU
    room : int
        Bytes that the sums of splits may take.
    """
    if gpu.capability != CAPABILITY or CAPABILITY in kernels.unusable:
        return None
    if not _covered(problem, pass_):
        return None
    product, rows, _ = _products(problem, pass_, problem.ndim == 3)
    choice = wgmma_tiles.choose(gpu, product, rows, room)
    if _transposed(problem, pass_):
        more = prediction.LAUNCH + prediction.bytes_moved(gpu, 2 * _weight_bytes(problem))
        return Choice(choice.tile, choice.splits, choice.seconds + more)
    return choice


def _transposed(problem: ConvProblem, pass_: Pass) -> bool:
    """Return whether weights are wanted with input channels innermost."""
    return pass_ == "forward" and problem.itemsize == 4


def _weight_bytes(problem: ConvProblem) -> int:
    return math.prod(problem.w_shape) * problem.itemsize


def workspace(problem: ConvProblem, pass_: Pass) -> int:
    """Return the bytes of the weights' copy."""
    return _weight_bytes(problem) if _transposed(problem, pass_) else 0


# ---------------------------------------------------------------------------------------- plans


@lru_cache(maxsize=1024)
def _variant(
    tile: Tile,
    pass_: Pass,
    dtype: str,
    axes: int,
    wide_index: bool,
    activation: Activation | None,
) -> kernels.Variant:
    """Return the specialisation of ``conv_wgmma.cu``."""
    name = f"conv_{pass_}_wgmma_{_SUFFIXES[dtype]}_{tile}"
    defines = {
        "KERNEL": name,
        "PASS": str(_PASSES[pass_]),
        "NDIM": str(axes),
        "TILE_M": str(tile.rows),
        "TILE_N": str(tile.columns),
        "STAGES": str(tile.stages),
        "CONSUMERS": str(tile.consumers),
        "BLOCKS": str(tile.blocks),
        **kernels.activation_defines(activation),
    }
    if wide_index:
        defines["INDEX_64"] = "1"
    return kernels.Variant(
        "conv_wgmma.cu",
        dtype,
        tuple(sorted(defines.items())),
        (name,),
        tile.shared_bytes,
        CAPABILITY,
        alone=True,
    )


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants that between them hold every tile, pass, dtype, rank and width of offsets."""
    relu = get_activation("ReLU")
    kinds: tuple[tuple[Pass, str], ...] = (
        ("forward", "float16"), ("weight_grad", "bfloat16"), ("forward", "float32"),
        ("input_grad", "float16"), ("forward", "bfloat16"), ("weight_grad", "float16"),
        ("input_grad", "float32"), ("input_grad", "bfloat16"),
    )  # fmt: skip
    for i, (pass_, dtype) in enumerate(kinds):
        tile = wgmma_tiles.TILES[i % len(wgmma_tiles.TILES)]
        crowded = i in (1, 4, 6)
        activation = relu if pass_ == "forward" else None
        yield _variant(tile, pass_, dtype, 3 if crowded else 2, crowded, activation)


@dataclass(frozen=True)
class Plan:
    """What a launch needs beside the arrays."""

    problem: ConvProblem
    pass_: Pass
    tile: Tile
    variant: kernels.Variant
    activation: Activation | None
    shape: tuple[int, ...]
    wide_index: bool
    grid: tuple[int]
    splits: int
    results: int
    sizes: tuple[Any, ...]
    #: Parameters with the addresses of arrays in them, by these.
    encoded: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, compare=False, repr=False
    )


def planned(
    problem: ConvProblem, pass_: Pass, gpu: GPU, room: int, wide_index: bool, faster_than: float
) -> Plan | None:
    """Return the launch, or None where there is none that should take less time.

    Parameters
    ----------
    problem : ConvProblem
    pass_ : {"forward", "input_grad", "weight_grad"}
    gpu : GPU
    room : int
        Bytes that the sums of splits may take.
    wide_index : bool
        Whether offsets need 64 bits.
    faster_than : float
        Seconds that another way should take.
    """
    choice = chosen(problem, pass_, gpu, room)
    if choice is None or choice.seconds >= faster_than:
        return None
    tile, splits = choice.tile, choice.splits
    product, rows, chunks = _products(problem, pass_, problem.ndim == 3)
    c, o = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    tiles_m = sum(-(-n // tile.rows) for n in rows)
    shapes = {"forward": problem.y_shape, "input_grad": problem.x_shape}
    shape = shapes.get(pass_, problem.w_shape)
    result = shape[1:-1] if pass_ == "input_grad" else (1,)
    values = (
        o if pass_ == "input_grad" else c, chunks, *three(tuple(result), 1),
        *three(problem.kernel, 1)[1:], shape[-1], product.columns, tiles_m, len(rows),
        problem.groups, splits,
    )  # fmt: skip
    activation = problem.activation if pass_ == "forward" else None
    variant = _variant(
        tile,
        pass_,
        problem.dtype,
        3 if problem.ndim == 3 else 2,
        wide_index,
        None if splits > 1 else activation,
    )
    blocks = tiles_m * -(-product.columns // tile.columns) * problem.groups * splits
    return Plan(
        problem, pass_, tile, variant, activation, shape, wide_index, (blocks,), splits,
        product.results, (*map(np.int32, values), np.int64(product.results)),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launch


#: Pairs of addresses that a plan keeps maps for; a training loop has a few.
_MOST_ENCODED = 64


def _parameters(plan: Plan, image: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``Walks`` and the map of the other operand, for arrays at these addresses."""
    found = plan.encoded.get((image, other))
    if found is None:
        if len(plan.encoded) >= _MOST_ENCODED:
            plan.encoded.clear()
        found = plan.encoded[image, other] = _encoded(plan, image, other)
    return found


def _encoded(plan: Plan, image: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    problem, pass_, tile = plan.problem, plan.pass_, plan.tile
    dtype, across = problem.dtype, 64
    deep = DEPTH_BYTES // problem.itemsize
    spatial, channels = problem.in_shape, problem.in_channels
    if pass_ == "input_grad":
        spatial, channels = problem.out_shape, problem.out_channels
    axes = 3 if problem.ndim == 3 else 2
    sizes = three(spatial, 1)[3 - axes :]
    pixels = (channels, *reversed(sizes), problem.batch)
    box = (across, deep) if pass_ == "weight_grad" else (deep, tile.rows)
    walks = np.zeros(1, _WALKS)
    first = 0
    for i, walk in enumerate(_walks(problem, pass_)):
        place = walks["walk"][0, i]
        for name, axis in zip("dhw", walk, strict=True):
            place[name] = axis.values
        positions = problem.batch * math.prod(axis.count for axis in walk)
        place["positions"], place["first_tile"] = positions, first
        first += -(-positions // tile.rows)
        if _taps(walk):
            inner = walk[: -axes - 1 : -1]  # from W on
            place["map"] = tensor_map.im2col(
                dtype, image, pixels, [a.start for a in inner], [a.upper for a in inner],
                [a.scale for a in inner], box,
            )[0]  # fmt: skip
    c, total = problem.in_channels // problem.groups, problem.out_channels
    shape: tuple[int, ...] = (total, c, problem.taps)
    if pass_ == "weight_grad":
        shape = (total, problem.batch * math.prod(problem.out_shape))
        columns: tuple[int, ...] = (across, deep)
    elif pass_ == "input_grad":
        columns = (deep, tile.columns, 1)
    elif _transposed(problem, pass_):
        shape, columns = (c, total, problem.taps), (deep, tile.columns, 1)
    else:
        columns = (across, deep, 1)
    return walks, tensor_map.tiled(dtype, other, shape, columns)


def launcher(
    problem: ConvProblem,
    pass_: Pass,
    device: int,
    room: int,
    wide_index: bool,
    faster_than: float,
    summed: bool,
) -> Callable[..., None] | None:
    """Return what launches the product and, where its depth is divided, the sums.

    Parameters
    ----------
    problem, pass_, room, wide_index, faster_than
        See :func:`planned`.
    device : int
    summed : bool
        Whether the product is added to a float32 total.

    Returns
    -------
    callable or None
        Takes image, other operand, bias or NULL, result or NULL, and the total; all of them dense,
        channels last. None where it should take longer, or where the device's driver or compiler
        knows nothing of it.
    """
    plan = planned(problem, pass_, architecture.gpu(device), room, wide_index, faster_than)
    if plan is None:
        return None
    variant, name = plan.variant, plan.variant.functions[0]
    reason: object = None if tensor_map.available() else "the driver encodes no tensor maps"
    try:
        kernels.function(variant, name, device)
    except Exception as error:  # whatever NVRTC or the driver says: there is another way
        reason = error
    if reason is not None:
        if CAPABILITY not in kernels.unusable:
            _log.warning("no kernels for sm_90a, those for sm_90 are used: %s", reason)
        kernels.unusable.add(CAPABILITY)
        return None
    xp = runtime.cupy()
    launch = kernels.prepare(
        variant, name, device, plan.grid, (plan.tile.threads,), plan.sizes, variant.shared_bytes
    )
    add = split_sum.prepare(
        plan.problem.dtype, plan.shape, cuda_arrays.dense_strides(plan.shape), plan.splits,
        plan.wide_index, device, plan.activation,
    ) if plan.splits > 1 or summed else None  # fmt: skip
    transposed = _transposed(plan.problem, plan.pass_)
    room = plan.splits * plan.results

    def run(image: Array, other: Array, bias: Any, result: Any, total: Any = NULL) -> None:
        if transposed:
            other = xp.ascontiguousarray(other.swapaxes(-1, -2))
        parameters = _parameters(plan, image.data.ptr, other.data.ptr)
        if add is None:
            launch(*parameters, bias, result, NULL)
            return
        partial = xp.empty(room, "float32")
        launch(*parameters, bias, result, partial)
        add(partial, bias, result, total)

    return run
