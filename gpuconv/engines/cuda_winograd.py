"""Winograd's minimal filtering on a GPU: ``kernels/winograd.cu`` and products of cuBLAS.

3x3 kernels of stride 1 in two dimensions, ``F(m x m, 3 x 3)`` with the tile ``m`` of least cost.
The kernels transform tiles on either side of ``n * n`` matrix products, which are one batched call
of cuBLAS; its operands lie so that none of them is transposed. Tiles are
numbered over the whole batch, and a pass takes as many at a time as the workspace holds.

The sums round some ten times worse than the definition's. What is not finite is computed by the
definition, inside the kernels, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, cublas, kernels, runtime
from gpuconv.cuda.cublas import Matrices
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Pass
from gpuconv.engines.cuda_arrays import NULL
from gpuconv.engines.cuda_engine import CudaEngine
from gpuconv.engines.cuda_winograd_plan import (
    ALIGN,
    TAPS,
    TILES,
    Plan,
    fixed_bytes,
    plan_of,
    round_up,
    wide_dtype,
)
from gpuconv.engines.toom_cook import filtering
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaWinograd", "sample_variants"]

Array = Any

#: Tiles that neighbouring threads hold where one side is read by channel, the other by tile.
RUN = 8


def _table(matrix: Any) -> str:
    """Return a matrix as C++ initialises an array."""
    return "{" + ",".join("{" + ",".join(repr(float(v)) for v in row) + "}" for row in matrix) + "}"


@lru_cache(maxsize=64)
def _tables(tile: int) -> dict[str, str]:
    method = filtering(tile, TAPS)
    return {
        "TILE": str(tile),
        "TABLE_A": _table(method.a),
        "TABLE_BT": _table(method.b),
        "TABLE_G": _table(method.g),
    }


@lru_cache(maxsize=256)
def _variant(dtype: str, tile: int, wide: bool) -> kernels.Variant:
    """Return the transforms in front of the products, and the gradient's behind them."""
    parts = ("filters", "input", "gradient", "filter_grad")
    return _specialised(dtype, tile, wide, kernels.activation_defines(None), parts)


@lru_cache(maxsize=256)
def _output_variant(
    dtype: str, tile: int, wide: bool, activation: Activation | None
) -> kernels.Variant:
    """Return the transform behind the products, with its activation."""
    defines = {"WITH_OUTPUT": "1", **kernels.activation_defines(activation)}
    return _specialised(dtype, tile, wide, defines, ("output",))


def _specialised(
    dtype: str, tile: int, wide: bool, defines: dict[str, str], parts: tuple[str, ...]
) -> kernels.Variant:
    defines = {**_tables(tile), **defines, **({"INDEX_64": "1"} if wide else {})}
    functions = tuple(_name(part, dtype) for part in parts)
    return kernels.Variant("winograd.cu", dtype, tuple(sorted(defines.items())), functions)


def _name(part: str, dtype: str) -> str:
    return f"conv2d_winograd_{part}_{kernels.suffix(dtype)}"


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants that between them hold every tile, dtype and index."""
    relu = get_activation("ReLU")
    for dtype in CudaWinograd.dtypes:
        for tile in TILES if dtype == "float32" else (4,):
            yield _variant(dtype, tile, False)
            yield _output_variant(dtype, tile, False, relu)
    yield _variant("float32", 2, True)
    yield _output_variant("float32", 2, True, None)


def _planned(problem: ConvProblem, pass_: Pass) -> Plan:
    device = int(runtime.cupy().cuda.runtime.getDevice())
    return plan_of(problem, pass_, settings.get_workspace_limit(), architecture.gpu(device))


class CudaWinograd(CudaEngine):
    """Winograd's minimal filtering: transforms in kernels, products by cuBLAS."""

    name = "cuda_winograd"
    ndims = (2,)
    error_factor = 10.0

    def unavailable(self) -> str | None:
        """Return why cuBLAS cannot be called, or None."""
        return cublas.unavailable()

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if settings.get_precision() == "strict":
            return "its sums are rounded differently, and set_precision('strict') rules that out"
        if problem.kernel != (TAPS, TAPS):
            return f"it computes kernels of {TAPS}x{TAPS} taps, not {problem.kernel}"
        if any(s != 1 for s in problem.stride):
            return f"it computes stride 1, not {problem.stride}"
        if any(d != 1 for d in problem.dilation):
            return f"it computes dilation 1, not {problem.dilation}"
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        if fixed_bytes(problem, pass_, TILES[0], 1) > settings.get_workspace_limit() // 2:
            return "the filters' factors exceed half the workspace limit"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time."""
        return _planned(problem, pass_).seconds

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the factors of filters and of a chunk of tiles, and their products."""
        return _planned(problem, pass_).workspace

    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what launches a pass: transforms, products, transforms, chunk by chunk."""
        plan = _planned(problem, pass_)
        (top, _), (left, _) = problem.padding
        if pass_ == "weight_grad":
            return _weight_grad(problem, plan, arrays, device)
        source, w, _, target = arrays
        activation = problem.activation if pass_ == "forward" else None
        launcher = _Launcher(problem, plan, (source, w, target), device, activation)
        if pass_ == "forward":
            steps = _weight_steps(problem, w)
            return _correlate(plan, launcher, source, steps, (top, left), target)
        row, column, inputs, outputs, group = _weight_steps(problem, w[::-1, ::-1])
        steps, before = (row, column, outputs, inputs, group), (TAPS - 1 - top, TAPS - 1 - left)
        run = _correlate(plan, launcher, source, steps, before, target)
        return lambda dz, w, b, dx: run(dz, w[::-1, ::-1], b, dx)


# ------------------------------------------------------------------------------------- the passes


def _correlate(
    plan: Plan,
    launcher: _Launcher,
    source: Array,
    steps: tuple[int, ...],
    before: tuple[int, int],
    target: Array,
) -> Callable[[Array, Array, Any, Array], None]:
    """Return what writes ``act(source * w + bias)`` into ``target``, given these and the bias.

    ``steps`` are those of ``w``, as :func:`_weight_steps` gives them, with source's channels in
    the place of the inputs; ``before`` are the zeros before the source's rows and columns.
    """
    xp, wide, groups = runtime.cupy(), launcher.wide, launcher.groups
    inputs, outputs, count = plan.inputs, plan.outputs, plan.factors * launcher.groups
    by_channel = launcher.by_channel
    into_filters = launcher(
        "filters",
        round_up(inputs, RUN) * outputs * groups,
        (*_ints(inputs, outputs * groups, groups), *_longs(*steps)),
        _ints(by_channel, _filter_run(steps, inputs, by_channel)),
    )
    filters = (outputs, inputs) if by_channel else (inputs, outputs)
    chunks = []
    for first in range(0, plan.tiles, plan.chunk):
        tiles = min(plan.chunk, plan.tiles - first)
        length = round_up(tiles, ALIGN)
        left = (inputs, length) if by_channel else (length, inputs)
        right = (outputs, length) if by_channel else (length, outputs)
        operands = (filters, left, right) if by_channel else (left, filters, right)
        chunks.append(
            (
                launcher.transform(
                    "input", source, before, first, tiles, inputs, length, by_channel
                ),
                _product(wide, count, operands),
                launcher(
                    "output",
                    length * groups * outputs,
                    (*_ints(*source.shape[1:3], *target.shape[1:3], *before), np.int64(first)),
                    (*_ints(tiles, inputs), *_steps(target), *_steps(source), *_longs(*steps)),
                    _ints(groups, outputs, length, by_channel),
                ),
            )
        )
    sizes = count * inputs * outputs, count * plan.chunk * inputs, count * plan.chunk * outputs

    def run(source: Array, w: Array, bias: Any, target: Array) -> None:
        filters, factors, products = [xp.empty(size, wide) for size in sizes]
        into_filters(w, filters)
        for into_factors, multiply, out_of_products in chunks:
            into_factors(source, factors)
            if by_channel:
                multiply(filters, factors, products)
            else:
                multiply(factors, filters, products)
            out_of_products(products, bias, target, source, w)

    return run


def _weight_grad(
    problem: ConvProblem, plan: Plan, arrays: tuple[Array, ...], device: int
) -> Callable[[Array, Array, Array], None]:
    """Return what writes the gradient of the weights, chunk by chunk, given dz, x and dw."""
    xp = runtime.cupy()
    dz, x, dw = arrays
    # Parts of a gradient are asked for in float32.
    in_place = dw.dtype == x.dtype
    wanted = dw if in_place else xp.empty(dw.shape, x.dtype)
    launcher = _Launcher(problem, plan, (x, dz, wanted), device, None)
    wide, groups, segments = launcher.wide, problem.groups, plan.segments
    inputs, outputs = plan.inputs, plan.outputs
    count = plan.factors * groups * segments
    before = problem.padding[0][0], problem.padding[1][0]
    chunks = []
    for first in range(0, plan.tiles, plan.chunk):
        tiles = min(plan.chunk, plan.tiles - first)
        length = round_up(-(-tiles // segments), ALIGN)
        end = first + tiles >= plan.tiles
        sizes = (problem.batch, *x.shape[1:3], *dz.shape[1:3], *before)
        operands = (inputs, length), (length, outputs), (inputs, outputs)
        chunks.append(
            (
                launcher.transform("input", x, before, first, tiles, inputs, length, True),
                launcher.transform("gradient", dz, (0, 0), first, tiles, outputs, length, False),
                _product(wide, count, operands),
                launcher(
                    "filter_grad",
                    inputs * outputs * groups,
                    _ints(*sizes, inputs, outputs * groups, groups, segments),
                    (*_steps(x), *_steps(dz), *_longs(*_weight_steps(problem, wanted))),
                    _ints((first == 0) + 2 * end),
                ),
            )
        )
    every = plan.factors * groups * plan.chunk
    room = every * inputs, every * outputs, count * inputs * outputs
    summed = TAPS * TAPS * inputs * outputs * groups if len(chunks) > 1 else 0
    shape, dtype = wanted.shape, x.dtype

    def run(dz: Array, x: Array, dw: Array) -> None:
        of_x, of_dz, products = [xp.empty(size, wide) for size in room]
        total = xp.empty(summed, wide) if summed else NULL
        result = dw if in_place else xp.empty(shape, dtype)
        for from_x, from_dz, multiply, add in chunks:
            from_x(x, of_x)
            from_dz(dz, of_dz)
            multiply(of_x, of_dz, products)
            add(products, total, x, dz, result)
        if not in_place:
            cuda_arrays.put(dw, result)

    return run


def _product(
    dtype: str, count: int, operands: tuple[tuple[int, int], ...]
) -> Callable[[Array, Array, Array], None]:
    """Return ``count`` products of dense matrices, IEEE whatever the settings, of these sizes."""
    a, b, c = (Matrices.dense(dtype, count, *sizes) for sizes in operands)
    return cublas.prepare(a, b, c, exact=True)


class _Launcher:
    """Prepares the kernels of a pass: call it with a part's name, its work and its constants.

    Attributes
    ----------
    wide : str
        Dtype of the factors.
    groups : int
    by_channel : bool
        Channels are first, so factors lie channel by channel.
    """

    def __init__(
        self,
        problem: ConvProblem,
        plan: Plan,
        arrays: tuple[Array, ...],
        device: int,
        activation: Activation | None,
    ) -> None:
        self.wide, self.groups = wide_dtype(problem), problem.groups
        self.by_channel = problem.layout == CHANNELS_FIRST
        self._plan, self._dtype, self._device = plan, problem.dtype, device
        wide = _needs_wide_index(plan, problem.groups, arrays)
        self._before = _variant(problem.dtype, plan.tile, wide)
        self._behind = _output_variant(problem.dtype, plan.tile, wide, activation)

    def __call__(self, part: str, work: int, *constants: tuple[Any, ...]) -> Callable[..., None]:
        """Return what launches a thread for each piece of work."""
        return kernels.prepare(
            self._behind if part == "output" else self._before,
            _name(part, self._dtype),
            self._device,
            (-(-work // kernels.BLOCK),),
            (kernels.BLOCK,),
            tuple(value for values in constants for value in values),
        )

    def transform(
        self,
        part: str,
        source: Array,
        before: tuple[int, int],
        first: int,
        tiles: int,
        channels: int,
        length: int,
        by_channel: bool,
    ) -> Callable[..., None]:
        """Return what writes the factors of some tiles, ``length`` a segment."""
        plan = self._plan
        every = length * plan.segments
        if (abs(source.strides[3]) > abs(source.strides[2])) == by_channel:
            run = every if by_channel else 1
        else:
            run = RUN
        return self(
            part,
            every * channels * self.groups,
            (*_ints(*source.shape[1:3], plan.rows, plan.columns, *before), np.int64(first)),
            (np.int32(tiles), *_steps(source)),
            _ints(self.groups, channels, plan.segments, length, by_channel, run),
        )


def _needs_wide_index(plan: Plan, groups: int, arrays: tuple[Array, ...]) -> bool:
    """Return whether an offset into an array, or into the factors, exceeds 32 bits."""
    spans = [
        sum((n - 1) * abs(s) for n, s in zip(a.shape, a.strides, strict=True)) // a.itemsize
        for a in arrays
    ]
    channels = groups * max(plan.inputs, plan.outputs)
    products = plan.factors * plan.segments * groups * plan.inputs * plan.outputs
    largest = max(*spans, plan.factors * plan.chunk * channels, products)
    return bool(largest + kernels.BLOCK >= cuda_arrays.WIDE_FROM)


def _ints(*values: Any) -> tuple[np.int32, ...]:
    return tuple(map(np.int32, values))


def _longs(*values: int) -> tuple[np.int64, ...]:
    return tuple(map(np.int64, values))


def _steps(image: Array) -> tuple[np.int64, ...]:
    """Return the steps of a batch of images, in elements."""
    return _longs(*(s // image.itemsize for s in image.strides))


def _weight_steps(problem: ConvProblem, w: Array) -> tuple[int, ...]:
    """Return the steps of weights over rows, columns, inputs, outputs and groups, in elements."""
    row, column, inputs, outputs = (s // w.itemsize for s in w.strides)
    return row, column, inputs, outputs, problem.out_channels // problem.groups * outputs


def _filter_run(steps: tuple[int, ...], inputs: int, by_channel: bool) -> int:
    """Return how the work on filters is dealt, as ``winograd.cu`` says."""
    if (abs(steps[2]) < abs(steps[3])) == by_channel:
        return inputs if by_channel else 1
    return RUN
