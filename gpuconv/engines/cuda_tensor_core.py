"""Tensor cores, no im2col in memory: ``kernels/conv_tensor_core.cu``.

float16 and bfloat16 with float32 sums, and float32 as TF32 where ``set_precision("tf32")`` allows
it. Arrays are taken as they are where they are dense, channels last and each group's channels an
even number of 16-bit values; others are copied so first, in parts of the batch that fit the
workspace, channels filled up with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, kernels, prediction, runtime, split_sum, tensor_tiles
from gpuconv.cuda.architecture import GPU
from gpuconv.cuda.tensor_tiles import Choice, Product, Tile
from gpuconv.device import probe
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Engine, Pass, bias_grad
from gpuconv.engines.cuda_arrays import NULL, three
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


def _image(array: Array, groups: int, count: int, filled: int) -> Array:
    """Return pixels dense, a group's channels filled up with zeros."""
    if count == filled and _dense(array, math.gcd(16, filled * array.dtype.itemsize)):
        return array
    xp = runtime.cupy()
    if count == filled:
        return xp.array(array, order="C")
    dense = xp.zeros((*array.shape[:-1], groups, filled), array.dtype)
    dense[..., :count] = array.reshape(*array.shape[:-1], groups, count)
    return dense


def _weights(array: Array, groups: int, filled: tuple[int, int]) -> Array:
    """Return weights dense, input channels and each group's output channels filled up."""
    *kernel, rows, columns = array.shape
    whole = (rows, columns) == (filled[0], filled[1] * groups)
    if whole and _dense(array):
        return array
    xp = runtime.cupy()
    if whole:
        return xp.array(array, order="C")
    dense = xp.zeros((*kernel, filled[0], groups, filled[1]), array.dtype)
    dense[..., :rows, :, : columns // groups] = array.reshape(
        *kernel, rows, groups, columns // groups
    )
    return dense


def _copied(array: Array, groups: int = 1, count: int = 0, filled: int = 0) -> int:
    """Return the bytes of an example in a copy, 0 where none is made."""
    if count == filled and _dense(array):
        return 0
    pixels = math.prod(array.shape[1:-1])
    return int(pixels * (groups * filled or array.shape[-1]) * array.dtype.itemsize)


# --------------------------------------------------------------------------------------- engine


class CudaTensorCore(Engine):
    """Products of tiles on tensor cores, gathered from the image as they are needed."""

    name = "cuda_tensor_core"
    device_kind = "cuda"
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
        return fixed + sums + example * _examples_at_once(problem, example, fixed)

    @staticmethod
    def _choice(problem: ConvProblem, pass_: Pass) -> Choice:
        product = _product(problem, pass_, cuda_arrays.WIDE_FROM)
        return tensor_tiles.choose(architecture.gpu(), product, _room())

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

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        c, o = _channels(problem, "forward")
        weights = _weights(w, problem.groups, (c, o))
        bias = NULL if b is None else runtime.cupy().ascontiguousarray(b)
        self._gather(problem, "forward", x, weights, weights is not w, bias, y)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        weights = _weights(w, problem.groups, _channels(problem, "input_grad"))
        self._gather(problem, "input_grad", dz, weights, weights is not w, NULL, dx)

    @staticmethod
    def _gather(
        problem: ConvProblem,
        pass_: Pass,
        image: Array,
        weights: Array,
        copied: bool,
        bias: Array,
        result: Array,
    ) -> None:
        """Compute a pass whose results are pixels, a part of the batch at a time."""
        xp = runtime.cupy()
        groups = problem.groups
        filled = _channels(problem, pass_)[0 if pass_ == "forward" else 1]
        count = image.shape[-1] // groups
        in_place = _dense(result)
        example = _copied(image, groups, count, filled) + _copied(result)
        for part, at in _parts(problem, example, weights.nbytes if copied else 0):
            some, place = (image, result) if part is problem else (image[at], result[at])
            target = place if in_place else xp.empty(place.shape, place.dtype)
            _launch(part, pass_, (_image(some, groups, count, filled), weights, bias, target))
            if not in_place:
                place[...] = target

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_grad(dz, db)
        if dw is None:
            return
        xp = runtime.cupy()
        groups = problem.groups
        c, o = _channels(problem, "weight_grad")
        counts = problem.in_channels // groups, problem.out_channels // groups
        example = _copied(x, groups, counts[0], c) + _copied(dz, groups, counts[1], o)
        fixed = 8 * dw.size  # a result that is not dense, and sums over the parts
        cut = list(_parts(problem, example, fixed))
        result, total = dw, None
        if len(cut) > 1 or dw.dtype != x.dtype:  # 16-bit gradients may be wanted in float32
            result = NULL
            if dw.dtype == "float32" and dw.flags.c_contiguous:
                total = dw
                total.fill(0)
            else:
                total = xp.zeros(dw.shape, "float32")
        elif not _dense(dw):
            result = xp.empty(dw.shape, dw.dtype)
        for part, at in cut:
            some, other = (x, dz) if part is problem else (x[at], dz[at])
            pixels = _image(some, groups, counts[0], c)
            gradient = _image(other, groups, counts[1], o)
            _launch(part, "weight_grad", (pixels, gradient, NULL, result), total)
        made = result if total is None else total
        if made is not dw:
            dw[...] = made


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


def _launch(
    problem: ConvProblem, pass_: Pass, arrays: tuple[Any, ...], total: Array | None = None
) -> None:
    """Launch the product and, where its depth is divided or a total is kept, the sums."""
    xp = runtime.cupy()
    device = int(xp.cuda.runtime.getDevice())
    plan = _plan(problem, pass_, architecture.gpu(device), _room(), cuda_arrays.WIDE_FROM)
    divided = plan.splits > 1 or total is not None
    partial = xp.empty(plan.splits * plan.results, "float32") if divided else NULL
    kernels.launch(
        plan.variant,
        plan.variant.functions[0],
        device,
        plan.grid,
        plan.block,
        (*arrays, partial, *plan.sizes),
        plan.variant.shared_bytes,
    )
    if divided:
        into = arrays[2], arrays[3], NULL if total is None else total
        split_sum.launch(
            problem.dtype,
            plan.shape,
            cuda_arrays.dense_strides(plan.shape),
            plan.splits,
            plan.wide_index,
            (partial, *into),
            device,
            plan.activation,
        )
