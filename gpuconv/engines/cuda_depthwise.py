"""Depthwise convolutions on a GPU, the window sliding in registers: ``kernels/conv_depthwise.cu``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import kernels, runtime
from gpuconv.cuda.architecture import GPU, architecture, gpu
from gpuconv.cuda.epilogue import vector_length
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Pass
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
from gpuconv.engines.cuda_engine import CudaEngine
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


class CudaDepthwise(CudaEngine):
    """Channels side by side, the window in registers; every number is read from memory once."""

    name = "cuda_depthwise"

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

    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what launches a pass; what is not dense is copied, within the workspace."""
        if pass_ == "weight_grad":
            return _to_weights(problem, arrays, device)
        return _to_image(problem, pass_, arrays, device)


def _to_image(
    problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
) -> Callable[[Array, Array, Any, Array], None]:
    """Return what makes images from images, given source, weights, bias and target."""
    xp = runtime.cupy()
    source, w, bias, target = arrays
    forward = pass_ == "forward"
    weights = stored_weights(problem, w)
    turn = not weights.flags.c_contiguous
    weights = xp.ascontiguousarray(weights)
    beside = (weights, bias) if forward else (weights,)

    def launcher(part: ConvProblem, source: Array, target: Array) -> Callable[..., None]:
        launch = _launcher(_launch(part, pass_, _vector(part, (source, *beside, target))), device)
        if forward:
            return launch
        return lambda source, weights, bias, target: launch(source, weights, target)

    seen = stored_image(problem, source), stored_image(problem, target)
    example = sum(map(copied, seen))
    if example == 0:  # the usual case, without views of parts
        launch = launcher(problem, source, target)
        if not turn:
            return launch
        return lambda source, w, bias, target: launch(
            source, xp.ascontiguousarray(stored_weights(problem, w)), bias, target
        )
    in_place = seen[1].flags.c_contiguous
    cut = []
    for part, at in parts(problem, example):
        given = xp.ascontiguousarray(seen[0][at])
        result = seen[1][at] if in_place else xp.empty(seen[1][at].shape, target.dtype)
        cut.append((at, launcher(part, given, result)))

    def run(source: Array, w: Array, bias: Any, target: Array) -> None:
        source, target = stored_image(problem, source), stored_image(problem, target)
        weights = xp.ascontiguousarray(stored_weights(problem, w))
        for at, launch in cut:
            given, wanted = xp.ascontiguousarray(source[at]), target[at]
            result = wanted if in_place else xp.empty(wanted.shape, wanted.dtype)
            launch(given, weights, bias, result)
            if not in_place:
                cuda_arrays.put(wanted, result)

    return run


def _to_weights(
    problem: ConvProblem, arrays: tuple[Array, ...], device: int
) -> Callable[[Array, Array, Array], None]:
    """Return what computes a weight gradient, given dz, x and dw."""
    xp, sum_dtype = runtime.cupy(), _sum_dtype(problem)
    seen = tuple(stored_image(problem, a) for a in arrays[:2])
    dw = stored_weights(problem, arrays[2])
    direct = dw.flags.c_contiguous and dw.dtype.name == problem.dtype
    whole = not any(map(copied, seen))
    cut = []
    for part, at in parts(problem, sum(map(copied, seen))):
        images = tuple(xp.ascontiguousarray(a[at]) for a in seen)
        plan = _launch(part, "weight_grad", _vector(part, images))
        cut.append((at, plan.grid[1], plan, _launcher(plan, device)))
    strips = sum(count for _, count, *_ in cut)
    single, plan = strips == 1, cut[0][2]
    add = kernels.prepare(
        plan.variant, plan.variant.functions[1], device, (-(-dw.size // 32),), (32, 8),
        (np.int32(strips), np.int64(dw.size)),
    )  # fmt: skip
    size, shape, dtype = dw.size, dw.shape, arrays[0].dtype

    def run(dz: Array, x: Array, dw: Array) -> None:
        result = dw if direct else xp.empty(shape, dtype)
        sums: Any = NULL if single else xp.empty((strips, size), sum_dtype)
        if whole:
            cut[0][3](dz, x, sums, result)
        else:
            dz, x, first = stored_image(problem, dz), stored_image(problem, x), 0
            for at, count, _, launch in cut:
                images = (xp.ascontiguousarray(a[at]) for a in (dz, x))
                launch(*images, NULL if single else sums[first : first + count], result)
                first += count
        if not single:
            add(sums, result)
        if not direct:
            cuda_arrays.put(stored_weights(problem, dw), result)

    return run


def _launcher(plan: _Launch, device: int) -> Callable[..., None]:
    return kernels.prepare(plan.variant, plan.name, device, plan.grid, plan.block, plan.sizes)


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
