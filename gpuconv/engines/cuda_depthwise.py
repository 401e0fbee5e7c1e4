"""Depthwise convolutions on a GPU, the window sliding in registers: ``kernels/conv_depthwise.cu``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import kernels, runtime
from gpuconv.cuda.architecture import GPU, architecture, gpu
from gpuconv.cuda.epilogue import output_grad, vector_length
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.cuda_arrays import (
    NULL,
    WIDE_FROM,
    copied,
    parts,
    stored_image,
    stored_weights,
)
from gpuconv.engines.cuda_depthwise_tiles import (
    THREADS,
    Geometry,
    Tile,
    best_tile,
    blocks_at_once,
    groups,
    predicted,
)
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaDepthwise", "sample_variants"]

Array = Any

#: Taps that a kernel is compiled for at most: of a plane, and along one axis.
MOST_TAPS, MOST_ALONG = 64, 32


@lru_cache(maxsize=1024)
def _variant(
    dtype: str,
    name: str,
    geometry: Geometry,
    tile: Tile,
    blocks: int,
    wide_index: bool,
    activation: Activation | None,
) -> kernels.Variant:
    """Return the specialisation of ``conv_depthwise.cu``; ``name`` is that of the pass."""
    g = geometry
    defines = {
        "PASS": name.upper(),
        "NDIM": str(g.ndim),
        **_by_axis("K", g.kernel),
        **_by_axis("S", g.stride),
        **_by_axis("D", g.dilation),
        "M": str(g.multiplier),
        "VEC": str(tile.vector),
        "TW": str(tile.columns),
        "UNROLL": str(tile.unroll),
        "BLOCKS": str(blocks),
        "LOADED": str(tile.loaded),
        "PHASE": str(tile.phase),
        "STORED": str(tile.stored),
        "CHANNELS_FIRST": str(int(g.channels_first)),
        **kernels.activation_defines(activation),
    }
    if wide_index:
        defines["INDEX_64"] = "1"
    end = kernels.suffix(dtype)
    functions = [f"conv{g.ndim}d_depthwise_{name}_{end}"]
    if name == "weight_grad":
        functions.append(f"conv{g.ndim}d_depthwise_weight_sums_{end}")
    return kernels.Variant(
        "conv_depthwise.cu", dtype, tuple(sorted(defines.items())), tuple(functions)
    )


def _by_axis(letter: str, values: tuple[int, int, int]) -> dict[str, str]:
    return {letter + axis: str(v) for axis, v in zip("DHW", values, strict=True)}


#: The device whose tiles are compiled where there is none: an H100 SXM.
_SAMPLE = GPU(architecture(90), 90, 132, 1.755e9, 3.35e12, 50 << 20)


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants that between them hold every pass, rank, dtype, layout and index."""
    square = ConvProblem(32, 144, 144, (56, 56), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), 144)
    first = replace(square, layout=CHANNELS_FIRST, activation=get_activation("ReLU"))
    line = ConvProblem(8, 256, 256, (4096,), (4,), (1,), ((3, 0),), (1,), 256)
    solid = ConvProblem(2, 32, 32, (8, 8, 8), (3, 3, 3), (1, 1, 1), ((1, 1),) * 3, (1, 1, 1), 32)
    large = replace(square, kernel=(7, 7), padding=((3, 3),) * 2)
    both = replace(square, stride=(2, 2), dilation=(2, 2))
    names: tuple[Pass, ...] = ("forward", "input_grad", "weight_grad")
    wanted: list[tuple[ConvProblem, Pass, int]] = [
        *((problem, pass_, WIDE_FROM) for problem in (square, first, line) for pass_ in names),
        *((replace(line, dtype="float16"), pass_, WIDE_FROM) for pass_ in names),
        (replace(line, dtype="float64"), "forward", 0),
        (replace(line, dtype="float64"), "weight_grad", WIDE_FROM),
        (replace(line, dtype="bfloat16"), "weight_grad", WIDE_FROM),
        (replace(square, dtype="bfloat16", stride=(2, 2)), "forward", WIDE_FROM),
        (replace(first, dtype="float16"), "forward", WIDE_FROM),
        (replace(first, dtype="bfloat16"), "input_grad", 0),
        (solid, "forward", WIDE_FROM),
        (large, "forward", WIDE_FROM),
        (both, "input_grad", 0),
    ]  # fmt: skip
    for problem, pass_, wide_from in wanted:
        yield _plan(problem, pass_, 16 // problem.itemsize, wide_from, _SAMPLE).variant


@dataclass(frozen=True)
class _Launch:
    """What is the same for all arrays of a problem."""

    variant: kernels.Variant
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    sizes: tuple[Any, ...]


def _launch(problem: ConvProblem, pass_: Pass, vector: int) -> _Launch:
    """Return the launch of a pass on the current device with vectors of at most so many elements."""
    return _plan(problem, pass_, vector, cuda_arrays.WIDE_FROM, gpu())


@lru_cache(maxsize=4096)
def _plan(problem: ConvProblem, pass_: Pass, vector: int, wide_from: int, device: GPU) -> _Launch:
    g = Geometry.of(problem)
    tile = best_tile(problem, pass_, vector, device)
    gather = pass_ == "input_grad" and not g.scatters
    name = "input_gather" if gather else pass_
    cut = groups(problem, pass_, tile, device)
    sizes = (
        problem.batch, *g.in_shape, problem.in_channels, *g.out_shape, problem.out_channels,
        *g.before, tile.strip, cut.strips, cut.tiles, cut.runs_of,
    )  # fmt: skip
    threads = math.prod(problem.x_shape) // tile.vector if gather else cut.threads
    extra: tuple[Any, ...] = ()
    if pass_ == "weight_grad":
        grid: tuple[int, ...] = (cut.across, cut.shares, g.kernel[0])
        block: tuple[int, ...] = (cut.lanes, THREADS // cut.lanes)
        extra = (np.int64(cut.share),)
    else:
        grid, block = (-(-threads // THREADS),), (THREADS,)
        if pass_ == "forward":
            extra = (np.int32(0),)
        elif not gather:
            rows, columns = g.reached(1), g.reached(2)
            extra = tuple(map(np.int32, (0, rows[0], rows[1], columns[0])))
    largest = max(map(math.prod, (problem.x_shape, problem.y_shape, problem.w_shape)))
    wide = max(largest, threads + THREADS) >= wide_from
    activation = problem.activation if pass_ == "forward" else None
    blocks = blocks_at_once(problem, pass_, tile)
    variant = _variant(problem.dtype, name, g, tile, blocks, wide, activation)
    return _Launch(variant, variant.functions[0], grid, block, (*extra, *map(np.int32, sizes)))


class CudaDepthwise(Engine):
    """Channels side by side, the window in registers; every number is read from memory once."""

    name = "cuda_depthwise"
    device_kind = "cuda"

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if problem.groups != problem.in_channels:
            return "it computes depthwise convolutions: a group for each input channel"
        rows, columns = Geometry.of(problem).kernel[1:]
        if rows * columns > MOST_TAPS or max(rows, columns) > MOST_ALONG:
            return (
                f"it computes at most {MOST_ALONG} taps along an axis and {MOST_TAPS} in a plane, "
                f"not {rows}x{columns}"
            )
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        return super().unsupported(problem, pass_)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the longest of memory, caches and arithmetic, at the device's rates."""
        device = gpu()
        return predicted(
            problem, pass_, best_tile(problem, pass_, 16 // problem.itemsize, device), device
        )

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the sums of the weight gradient's strips."""
        if pass_ != "weight_grad":
            return 0
        shares = _launch(problem, pass_, 16 // problem.itemsize).grid[1]
        return shares * math.prod(problem.w_shape) * _sum_bytes(problem) if shares > 1 else 0

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        xp = runtime.cupy()
        weights = xp.ascontiguousarray(stored_weights(problem, w))
        bias = NULL if b is None else xp.ascontiguousarray(b)
        self._over_parts(problem, "forward", x, (weights, bias), y)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        weights = runtime.cupy().ascontiguousarray(stored_weights(problem, w))
        self._over_parts(problem, "input_grad", dz, (weights,), dx)

    def _over_parts(
        self,
        problem: ConvProblem,
        pass_: Pass,
        source: Array,
        weights: tuple[Array, ...],
        target: Array,
    ) -> None:
        """Compute images from images; what is not dense is copied, within the workspace."""
        xp = runtime.cupy()
        source, target = stored_image(problem, source), stored_image(problem, target)
        example = copied(source) + copied(target)
        if example == 0:  # the usual case, without views of parts
            arrays = (source, *weights, target)
            self._run(_launch(problem, pass_, _vector(problem, arrays)), arrays)
            return
        for part, at in parts(problem, example):
            given, wanted = source[at], target[at]
            in_place = wanted.flags.c_contiguous
            result = wanted if in_place else xp.empty(wanted.shape, wanted.dtype)
            given = xp.ascontiguousarray(given)
            arrays = (given, *weights, result)
            self._run(_launch(part, pass_, _vector(part, arrays)), arrays)
            if not in_place:
                wanted[...] = result

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            output_grad(dz, None, None, db, problem.layout == CHANNELS_FIRST)
        if dw is None:
            return
        xp = runtime.cupy()
        dz, x, dw = stored_image(problem, dz), stored_image(problem, x), stored_weights(problem, dw)
        direct = dw.flags.c_contiguous and str(dw.dtype) == problem.dtype
        result = dw if direct else xp.empty(dw.shape, dz.dtype)
        made = []
        for part, at in parts(problem, copied(dz) + copied(x)):
            images = tuple(xp.ascontiguousarray(a[at]) for a in (dz, x))
            plan = _launch(part, "weight_grad", _vector(part, images))
            single = plan.grid[1] == 1 and part.batch == problem.batch
            sums: Array = (
                NULL if single else xp.empty((plan.grid[1], result.size), _sum_dtype(problem))
            )
            self._run(plan, (*images, sums, result))
            if not single:
                made.append(sums)
        if made:
            sums = made[0] if len(made) == 1 else xp.concatenate(made)
            device = int(xp.cuda.runtime.getDevice())
            sizes = (np.int32(len(sums)), np.int64(result.size))
            grid = (-(-result.size // 32),)
            name = plan.variant.functions[1]
            kernels.launch(plan.variant, name, device, grid, (32, 8), (sums, result, *sizes))
        if not direct:
            dw[...] = result

    @staticmethod
    def _run(plan: _Launch, arrays: tuple[Any, ...]) -> None:
        device = int(runtime.cupy().cuda.runtime.getDevice())
        kernels.launch(
            plan.variant, plan.name, device, plan.grid, plan.block, (*arrays, *plan.sizes)
        )


def _vector(problem: ConvProblem, arrays: tuple[Any, ...]) -> int:
    """Return how many elements may be moved at once: channels, or columns if channels are first."""
    there = (a for a in arrays if a is not NULL)
    if problem.layout == CHANNELS_FIRST:
        return vector_length(problem.itemsize, 16, *there)
    if problem.out_channels != problem.in_channels:
        return 1
    return vector_length(problem.itemsize, problem.in_channels, *there)


def _sum_dtype(problem: ConvProblem) -> str:
    return "float64" if problem.dtype == "float64" else "float32"


def _sum_bytes(problem: ConvProblem) -> int:
    return 8 if problem.dtype == "float64" else 4
