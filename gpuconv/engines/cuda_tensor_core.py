"""Tensor cores, no im2col in memory: ``kernels/conv_tensor_core.cu``.

float16 and bfloat16 with float32 sums, and float32 as TF32 where ``set_precision("tf32")`` allows
it. Arrays are taken as they are where they are dense, channels last and each group's channels an
even number of 16-bit values; others are copied so first, in parts of the batch that fit the
workspace, channels filled up with zeros. On compute capability 9.0 :mod:`gpuconv.engines.tensor_wgmma`
does what it can and should do faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import (
    architecture,
    kernels,
    prediction,
    runtime,
    split_sum,
    tensor_tiles,
    wgmma_tiles,
)
from gpuconv.cuda.architecture import GPU
from gpuconv.cuda.tensor_tiles import Choice, Product, Tile
from gpuconv.device import probe
from gpuconv.engines import cuda_arrays, tensor_wgmma
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.cuda_arrays import NULL, three
from gpuconv.engines.cuda_engine import CudaEngine
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaTensorCore", "sample_variants"]

Array = Any

_PASSES = {"forward": 0, "input_grad": 1, "weight_grad": 2}
_SUFFIXES = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}
#: Lowest compute capability, times ten.
_NEEDS = {"float16": 75, "bfloat16": 80, "float32": 80}
#: Positions are counted in 32 bits, to the end of the last tile.
_MOST_POSITIONS = 2**31 - 2**16


# ------------------------------------------------------------------------------------- variants


@lru_cache(maxsize=1024)
def _variant(
    tile: Tile,
    product: Product,
    dtype: str,
    axes: int,
    capability: int,
    wide_index: bool,
    activation: Activation | None,
) -> kernels.Variant:
    """Return the specialisation of ``conv_tensor_core.cu``."""
    name = f"conv_{product.pass_}_tensor_{_SUFFIXES[dtype]}_{tile}"
    defines = {
        "KERNEL": name,
        "PASS": str(_PASSES[product.pass_]),
        "NDIM": str(axes),
        "TILE_M": str(tile.rows),
        "TILE_N": str(tile.columns),
        "TILE_K": str(tensor_tiles.DEPTH_BYTES // product.itemsize),
        "WARP_M": str(tile.warp_rows),
        "WARP_N": str(tile.warp_columns),
        "STAGES": str(tile.stages_on(capability)),
        "BLOCKS": str(tile.blocks_at_least(product, capability)),
        "COPY": str(product.copy_bytes),
        **kernels.activation_defines(activation),
    }
    if wide_index:
        defines["INDEX_64"] = "1"
    return kernels.Variant(
        "conv_tensor_core.cu",
        dtype,
        tuple(sorted(defines.items())),
        (name,),
        tile.shared_bytes(capability),
        80 if capability >= 80 else _NEEDS[dtype],
    )


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants that between them hold every tile, pass, dtype, width of copies and rank."""
    relu = get_activation("ReLU")
    passes: tuple[Pass, ...] = ("forward", "input_grad", "weight_grad")
    dtypes = tuple(_SUFFIXES)
    tiles = tensor_tiles.TILES
    for tile, pass_, dtype, copy, axes, wide, capability in (
        *((tile, passes[i % 3], dtypes[i // 2], 16, 2, False, 80) for i, tile in enumerate(tiles)),
        (tiles[3], passes[0], dtypes[2], 4, 2, False, 80),
        (tiles[3], passes[0], dtypes[1], 8, 3, False, 80),
        (tiles[5], passes[2], dtypes[2], 4, 2, True, 80),
        (tiles[1], passes[1], dtypes[0], 16, 2, False, 75),
    ):
        size = 4 if dtype == "float32" else 2
        product = Product(pass_, size, copy, 1, 1, 1, 1, 1, 1, axes == 3 or wide)
        activation = relu if pass_ == "forward" else None
        yield _variant(tile, product, dtype, axes, capability, wide, activation)
    yield from tensor_wgmma.sample_variants()


# ---------------------------------------------------------------------------------------- plans


def _filled(count: int, itemsize: int) -> int:
    """Return how many channels a group has in copies: of 16 bits an even number, else more."""
    if itemsize == 4 or count % 2 == 0:
        return count
    return {1: 2, 3: 4}.get(count, -(-count // 8) * 8)


@lru_cache(maxsize=4096)
def _channels(problem: ConvProblem, pass_: Pass) -> tuple[int, int]:
    """Return the input and output channels that a group has in the arrays that kernels read."""
    c, o = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    fill = problem.itemsize
    return (c if pass_ == "input_grad" else _filled(c, fill)), _filled(o, fill)


@lru_cache(maxsize=4096)
def _product(problem: ConvProblem, pass_: Pass, wide_from: int) -> Product:
    """Return the pass as products of matrices; offsets from ``wide_from`` on need 64 bits."""
    c, o = _channels(problem, pass_)
    positions = problem.batch * math.prod(problem.out_shape)
    count, results = problem.groups, math.prod(problem.y_shape)
    columns = problem.out_channels // problem.groups
    aligned = (o,) if pass_ == "input_grad" else (c, o)
    if pass_ == "forward":
        rows, depth = positions, problem.taps * c
    elif pass_ == "weight_grad":
        rows, depth, results = problem.taps * c, positions, math.prod(problem.w_shape)
    else:
        shares = zip(problem.in_shape, problem.stride, strict=True)
        rows = problem.batch * math.prod(-(-n // s) for n, s in shares)
        phases = math.prod(problem.stride)
        depth, count = -(-problem.taps * o // phases), count * phases
        columns, results = c, math.prod(problem.x_shape)
    size = problem.itemsize
    copy_bytes = next(b for b in (16, 8, 4) if all(n * size % b == 0 for n in aligned))
    crowded = problem.ndim == 3 or _is_wide(problem, wide_from)
    return Product(
        pass_, size, copy_bytes, rows, columns, depth, count, results, problem.bytes, crowded
    )


def _is_wide(problem: ConvProblem, wide_from: int) -> bool:
    """Return whether an offset into an array that kernels see, or past its end, needs 64 bits."""
    c, o = _channels(problem, "forward")
    pixels = (
        math.prod(problem.in_shape) * max(problem.groups * c, problem.in_channels),
        math.prod(problem.out_shape) * max(problem.groups * o, problem.out_channels),
    )
    largest = max(problem.batch * max(pixels), problem.taps * c * problem.groups * o)
    return largest + 2**20 >= wide_from


@dataclass(frozen=True)
class _Plan:
    """What a launch needs beside the arrays."""

    variant: kernels.Variant
    activation: Activation | None
    shape: tuple[int, ...]
    wide_index: bool
    grid: tuple[int]
    block: tuple[int]
    splits: int
    results: int
    sizes: tuple[np.int32, ...]


@lru_cache(maxsize=4096)
def _plan(problem: ConvProblem, pass_: Pass, gpu: GPU, room: int, wide_from: int) -> _Plan:
    product = _product(problem, pass_, wide_from)
    choice = tensor_tiles.choose(gpu, product, room)
    tile, splits = choice.tile, choice.splits
    c, o = _channels(problem, pass_)
    groups = problem.groups
    in_shape, out_shape = three(problem.in_shape, 1), three(problem.out_shape, 1)
    if pass_ == "input_grad":
        image = (*out_shape, o, groups * o)
        positions, rows_y, pitch_y = in_shape, 0, problem.in_channels
    else:
        image = (*in_shape, c, groups * c)
        positions, rows_y = out_shape, problem.in_channels // groups
        pitch_y = problem.out_channels
    sizes = (
        problem.batch, *image, *positions, groups * o, o, rows_y, pitch_y, product.columns,
        *three(problem.kernel, 1), *three(problem.stride, 1), *three(problem.dilation, 1),
        *three(tuple(before for before, _ in problem.padding), 0), groups, splits,
    )  # fmt: skip
    tiles = -(-product.rows // tile.rows) * -(-product.columns // tile.columns)
    activation = problem.activation if pass_ == "forward" else None
    capability, wide = gpu.capability, _is_wide(problem, wide_from)
    variant = _variant(
        tile,
        product,
        problem.dtype,
        3 if problem.ndim == 3 else 2,
        capability,
        wide,
        None if splits > 1 else activation,
    )
    shapes = {"forward": problem.y_shape, "input_grad": problem.x_shape}
    return _Plan(
        variant,
        activation,
        shapes.get(pass_, problem.w_shape),
        wide,
        (tiles * product.count * splits,),
        (tile.threads,),
        splits,
        product.results,
        tuple(map(np.int32, sizes)),
    )


# --------------------------------------------------------------------------------------- arrays


def _dense(array: Array, size: int = 16) -> bool:
    """Return whether an array lies dense, its start a multiple of ``size`` bytes."""
    return bool(array.flags.c_contiguous) and array.data.ptr % size == 0


def _as_it_is(array: Array) -> Array:
    return array


def _copy(array: Array) -> Array:
    return runtime.cupy().array(array, order="C")


def _image(array: Array, groups: int, count: int, filled: int) -> Callable[[Array], Array]:
    """Return what makes pixels such as these dense, a group's channels filled up with zeros."""
    if count == filled:
        there = _dense(array, math.gcd(16, filled * array.dtype.itemsize))
        return _as_it_is if there else _copy
    xp, shape = runtime.cupy(), array.shape[:-1]

    def fill(array: Array) -> Array:
        dense = xp.zeros((*shape, groups, filled), array.dtype)
        cuda_arrays.put(dense[..., :count], array.reshape(*shape, groups, count))
        return dense

    return fill


def _weights(array: Array, groups: int, filled: tuple[int, int]) -> Callable[[Array], Array]:
    """Return what makes weights dense, input channels and each group's output channels filled up."""
    *kernel, rows, columns = array.shape
    if (rows, columns) == (filled[0], filled[1] * groups):
        return _as_it_is if _dense(array) else _copy
    xp, shape = runtime.cupy(), (*kernel, rows, groups, columns // groups)

    def fill(array: Array) -> Array:
        dense = xp.zeros((*kernel, filled[0], groups, filled[1]), array.dtype)
        cuda_arrays.put(dense[..., :rows, :, : columns // groups], array.reshape(shape))
        return dense

    return fill


def _copied(array: Array, groups: int = 1, count: int = 0, filled: int = 0) -> int:
    """Return the bytes of an example in a copy, 0 where none is made."""
    if count == filled and _dense(array):
        return 0
    pixels = math.prod(array.shape[1:-1])
    return int(pixels * (groups * filled or array.shape[-1]) * array.dtype.itemsize)


# --------------------------------------------------------------------------------------- engine


class CudaTensorCore(CudaEngine):
    """Products of tiles on tensor cores, gathered from the image as they are needed."""

    name = "cuda_tensor_core"
    dtypes = ("float16", "bfloat16")

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if problem.dtype == "float32":
            if settings.get_precision() != "tf32":
                return "it computes float32 as TF32, which gpuconv.set_precision('tf32') allows"
        else:
            reason = super().unsupported(problem, pass_)
            if reason is not None:
                return reason
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        if math.prod(problem.out_shape) > _MOST_POSITIONS or (
            math.prod(problem.in_shape) > _MOST_POSITIONS
        ):
            return f"it counts the pixels of an example up to {_MOST_POSITIONS}"
        needs = _NEEDS[problem.dtype]
        if probe().count and architecture.gpu().capability < needs:
            has = architecture.gpu().capability
            return (
                f"its {_SUFFIXES[problem.dtype]} needs compute capability {needs / 10}; "
                f"this device has {has / 10}"
            )
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time that the choice of tiles predicts, and that of copies."""
        gpu = architecture.gpu()
        copied = sum(self._copies(problem, pass_))
        return self._choice(problem, pass_).seconds + (
            1e-5 + prediction.bytes_moved(gpu, 3 * problem.batch * copied) if copied else 0.0
        )

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of copies and of the sums of splits."""
        fixed, example = self._fixed(problem, pass_), sum(self._copies(problem, pass_))
        choice = self._choice(problem, pass_)
        product = _product(problem, pass_, cuda_arrays.WIDE_FROM)
        sums = 4 * choice.splits * product.results if choice.splits > 1 else 0
        if isinstance(choice, wgmma_tiles.Choice):
            sums += tensor_wgmma.workspace(problem, pass_)
        return fixed + sums + example * _examples_at_once(problem, example, fixed)

    @staticmethod
    def _choice(problem: ConvProblem, pass_: Pass) -> Choice | wgmma_tiles.Choice:
        gpu, room = architecture.gpu(), _room()
        product = _product(problem, pass_, cuda_arrays.WIDE_FROM)
        choice = tensor_tiles.choose(gpu, product, room)
        other = tensor_wgmma.chosen(problem, pass_, gpu, room)
        return choice if other is None or other.seconds >= choice.seconds else other

    @staticmethod
    def _fixed(problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the weights' copy, where all arrays are dense."""
        c, o = _channels(problem, pass_)
        filled = problem.groups * c * o != problem.in_channels * problem.out_channels
        if pass_ == "weight_grad" or not (filled or problem.layout == CHANNELS_FIRST):
            return 0
        return problem.itemsize * problem.taps * problem.groups * c * o

    @staticmethod
    def _copies(problem: ConvProblem, pass_: Pass) -> tuple[int, int]:
        """Return the bytes of copies of an example of x and of y, where all arrays are dense."""
        c, o = (n * problem.groups for n in _channels(problem, pass_))
        first = problem.layout == CHANNELS_FIRST
        x = problem.itemsize * math.prod(problem.in_shape) * c
        y = problem.itemsize * math.prod(problem.out_shape) * o
        x_filled, y_filled = c != problem.in_channels, o != problem.out_channels
        return (
            x if first or (x_filled and pass_ != "input_grad") else 0,
            y if first or (y_filled and pass_ != "forward") else 0,
        )

    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what launches a pass, a part of the batch at a time where anything is copied."""
        if pass_ == "weight_grad":
            return _to_weights(problem, arrays, device)
        return _to_pixels(problem, pass_, arrays, device)


def _to_pixels(
    problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
) -> Callable[[Array, Array, Any, Array], None]:
    """Return what computes a pass whose results are pixels, given image, weights, bias, result."""
    xp, groups = runtime.cupy(), problem.groups
    image, weights, _, result = arrays
    channels = _channels(problem, pass_)
    filled = channels[0 if pass_ == "forward" else 1]
    count = image.shape[-1] // groups
    dense_weights = _weights(weights, groups, channels)
    in_place = _dense(result)
    example = _copied(image, groups, count, filled) + _copied(result)
    copied = 0 if dense_weights is _as_it_is else dense_weights(weights).nbytes
    cut = [
        (at, _image(image[at], groups, count, filled), _launcher(part, pass_, device, False))
        for part, at in _parts(problem, example, copied)
    ]
    if len(cut) == 1 and in_place and not copied and cut[0][1] is _as_it_is:
        return cut[0][2]

    def run(image: Array, weights: Array, bias: Any, result: Array) -> None:
        weights = dense_weights(weights)
        for at, dense, launch in cut:
            place = result[at]
            target = place if in_place else xp.empty(place.shape, place.dtype)
            launch(dense(image[at]), weights, bias, target)
            if not in_place:
                cuda_arrays.put(place, target)

    return run


def _to_weights(
    problem: ConvProblem, arrays: tuple[Array, ...], device: int
) -> Callable[[Array, Array, Array], None]:
    """Return what computes a weight gradient, given dz, x and dw."""
    xp, groups = runtime.cupy(), problem.groups
    dz, x, dw = arrays
    c, o = _channels(problem, "weight_grad")
    in_group, out_group = problem.in_channels // groups, problem.out_channels // groups
    example = _copied(x, groups, in_group, c) + _copied(dz, groups, out_group, o)
    fixed = 8 * dw.size  # a result that is not dense, and sums over the parts
    parts = list(_parts(problem, example, fixed))
    # 16-bit gradients may be wanted in float32.
    summed = len(parts) > 1 or dw.dtype != x.dtype
    cut = [
        (
            at,
            _image(x[at], groups, in_group, c),
            _image(dz[at], groups, out_group, o),
            _launcher(part, "weight_grad", device, summed),
        )
        for part, at in parts
    ]
    if not summed and _dense(dw) and cut[0][1] is cut[0][2] is _as_it_is:
        launch = cut[0][3]
        return lambda dz, x, dw: launch(x, dz, NULL, dw)
    in_place = dw.dtype == "float32" and dw.flags.c_contiguous if summed else _dense(dw)

    def run(dz: Array, x: Array, dw: Array) -> None:
        result = dw if in_place else xp.empty(dw.shape, "float32" if summed else dw.dtype)
        if summed:
            cuda_arrays.zero(result)
        for at, pixels, gradient, launch in cut:
            into = (NULL, result) if summed else (result,)
            launch(pixels(x[at]), gradient(dz[at]), NULL, *into)
        if not in_place:
            cuda_arrays.put(dw, result)

    return run


def _room() -> int:
    """Return the bytes that the sums of splits may take."""
    return Engine.workspace_limit() // 4


def _examples_at_once(problem: ConvProblem, example: int, fixed: int) -> int:
    """Return how many examples go into one launch, copies of ``example`` bytes each."""
    pixels = max(math.prod(problem.in_shape), math.prod(problem.out_shape))
    most = min(problem.batch, _MOST_POSITIONS // pixels)
    if example:
        limit = Engine.workspace_limit()
        # Weights that alone exceed the workspace do not cut the batch to pieces.
        most = min(most, (limit - _room() - min(fixed, limit // 2)) // example)
    return max(1, most)


def _parts(problem: ConvProblem, example: int, fixed: int) -> Iterator[tuple[ConvProblem, slice]]:
    """Yield parts of the batch, each within the workspace, and where they are."""
    count = _examples_at_once(problem, example, fixed)
    for start in range(0, problem.batch, count):
        size = min(count, problem.batch - start)
        yield problem.with_batch(size), slice(start, start + size)


def _launcher(problem: ConvProblem, pass_: Pass, device: int, summed: bool) -> Callable[..., None]:
    """Return what launches the product and, where its depth is divided, the sums.

    It takes image, weights (or gradient), bias and result; ``summed``: also the float32 total
    that the product is added to.
    """
    xp = runtime.cupy()
    gpu, room, wide_from = architecture.gpu(device), _room(), cuda_arrays.WIDE_FROM
    seconds = tensor_tiles.choose(gpu, _product(problem, pass_, wide_from), room).seconds
    wide = _is_wide(problem, wide_from)
    made = tensor_wgmma.launcher(problem, pass_, device, room, wide, seconds, summed)
    if made is not None:
        return made
    plan = _plan(problem, pass_, gpu, room, wide_from)
    variant = plan.variant
    launch = kernels.prepare(
        variant, variant.functions[0], device, plan.grid, plan.block, plan.sizes,
        variant.shared_bytes,
    )  # fmt: skip
    if plan.splits == 1 and not summed:
        return lambda image, weights, bias, result: launch(image, weights, bias, result, NULL)
    add = split_sum.prepare(
        problem.dtype, plan.shape, cuda_arrays.dense_strides(plan.shape), plan.splits,
        plan.wide_index, device, plan.activation,
    )  # fmt: skip
    size = plan.splits * plan.results

    def divided(image: Array, weights: Array, bias: Any, result: Any, total: Any = NULL) -> None:
        partial = xp.empty(size, "float32")
        launch(image, weights, bias, result, partial)
        add(partial, bias, result, total)

    return divided
