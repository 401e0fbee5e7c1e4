"""Winograd's minimal filtering on a GPU: ``kernels/winograd.cu`` and products of cuBLAS.

3x3 kernels of stride 1 in two dimensions, ``F(m x m, 3 x 3)`` with the tile ``m`` of least cost.
The kernels transform tiles on either side of ``n * n`` matrix products, which CuPy hands to
cuBLAS in one batched call; its operands lie so that none of them is transposed. Tiles are
numbered over the whole batch, and a pass takes as many at a time as the workspace holds.

The sums round some ten times worse than the definition's. What is not finite is computed by the
definition, inside the kernels, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, kernels, runtime
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Engine, Pass, bias_grad
from gpuconv.engines.cuda_arrays import NULL
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


class CudaWinograd(Engine):
    """Winograd's minimal filtering: transforms in kernels, products by cuBLAS."""

    name = "cuda_winograd"
    device_kind = "cuda"
    ndims = (2,)
    error_factor = 10.0

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

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        steps = _weight_steps(problem, w)
        before = problem.padding[0][0], problem.padding[1][0]
        plan = _planned(problem, "forward")
        _correlate(problem, plan, x, w, steps, before, b, y, problem.activation)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        turned = w[::-1, ::-1]
        row, column, inputs, outputs, group = _weight_steps(problem, turned)
        before = TAPS - 1 - problem.padding[0][0], TAPS - 1 - problem.padding[1][0]
        plan = _planned(problem, "input_grad")
        steps = row, column, outputs, inputs, group
        _correlate(problem, plan, dz, turned, steps, before, None, dx, None)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_grad(dz, db)
        if dw is None:
            return
        # Parts of a gradient are asked for in float32.
        result = dw if dw.dtype == x.dtype else runtime.cupy().empty(dw.shape, x.dtype)
        _weight_grad(problem, _planned(problem, "weight_grad"), dz, x, result)
        if result is not dw:
            dw[...] = result


# ------------------------------------------------------------------------------------- the passes


def _correlate(
    problem: ConvProblem,
    plan: Plan,
    source: Array,
    w: Array,
    steps: tuple[int, ...],
    before: tuple[int, int],
    bias: Array | None,
    target: Array,
    activation: Activation | None,
) -> None:
    """Write ``act(source * w + bias)`` into ``target``, chunk by chunk.

    ``steps`` are those of ``w``, as :func:`_weight_steps` gives them, with source's channels in
    the place of the inputs; ``before`` are the zeros before the source's rows and columns.
    """
    xp = runtime.cupy()
    launch = _Launcher(problem, plan, (source, w, target), activation)
    wide, groups = wide_dtype(problem), problem.groups
    inputs, outputs, count = plan.inputs, plan.outputs, plan.factors
    by_channel = problem.layout == CHANNELS_FIRST
    bias = NULL if bias is None else xp.ascontiguousarray(bias)

    shape = (count * groups, outputs, inputs) if by_channel else (count * groups, inputs, outputs)
    filters = xp.empty(shape, wide)
    launch(
        "filters",
        round_up(inputs, RUN) * outputs * groups,
        (w, filters),
        (*_ints(inputs, outputs * groups, groups), *_longs(*steps)),
        _ints(by_channel, _filter_run(steps, inputs, by_channel)),
    )
    factors = xp.empty(count * groups * plan.chunk * inputs, wide)
    products = xp.empty(count * groups * plan.chunk * outputs, wide)
    for first in range(0, plan.tiles, plan.chunk):
        tiles = min(plan.chunk, plan.tiles - first)
        length = round_up(tiles, ALIGN)
        left = factors[: count * groups * length * inputs]
        right = products[: count * groups * length * outputs]
        launch.transform("input", source, left, before, first, tiles, inputs, length, by_channel)
        if by_channel:
            left = left.reshape(count * groups, inputs, length)
            right = right.reshape(count * groups, outputs, length)
            xp.matmul(filters, left, out=right)
        else:
            left = left.reshape(count * groups, length, inputs)
            right = right.reshape(count * groups, length, outputs)
            xp.matmul(left, filters, out=right)
        launch(
            "output",
            length * groups * outputs,
            (right, bias, target, source, w),
            (*_ints(*source.shape[1:3], *target.shape[1:3], *before), np.int64(first)),
            (*_ints(tiles, inputs), *_steps(target), *_steps(source), *_longs(*steps)),
            _ints(groups, outputs, length, by_channel),
        )


def _weight_grad(problem: ConvProblem, plan: Plan, dz: Array, x: Array, dw: Array) -> None:
    """Write the gradient of the weights, chunk by chunk."""
    xp = runtime.cupy()
    launch = _Launcher(problem, plan, (x, dz, dw), None)
    wide, groups, segments = wide_dtype(problem), problem.groups, plan.segments
    inputs, outputs, count = plan.inputs, plan.outputs, plan.factors
    before = problem.padding[0][0], problem.padding[1][0]
    of_x = xp.empty(count * groups * plan.chunk * inputs, wide)
    of_dz = xp.empty(count * groups * plan.chunk * outputs, wide)
    products = xp.empty((count * groups * segments, inputs, outputs), wide)
    several = plan.tiles > plan.chunk
    total = xp.empty(TAPS * TAPS * inputs * outputs * groups, wide) if several else NULL
    for first in range(0, plan.tiles, plan.chunk):
        tiles = min(plan.chunk, plan.tiles - first)
        length = round_up(-(-tiles // segments), ALIGN)
        left = of_x[: count * groups * segments * length * inputs]
        right = of_dz[: count * groups * segments * length * outputs]
        launch.transform("input", x, left, before, first, tiles, inputs, length, True)
        launch.transform("gradient", dz, right, (0, 0), first, tiles, outputs, length, False)
        xp.matmul(
            left.reshape(count * groups * segments, inputs, length),
            right.reshape(count * groups * segments, length, outputs),
            out=products,
        )
        end = first + tiles >= plan.tiles
        sizes = (problem.batch, *x.shape[1:3], *dz.shape[1:3], *before)
        launch(
            "filter_grad",
            inputs * outputs * groups,
            (products, total, x, dz, dw),
            _ints(*sizes, inputs, outputs * groups, groups, segments),
            (*_steps(x), *_steps(dz), *_longs(*_weight_steps(problem, dw))),
            _ints((first == 0) + 2 * end),
        )


class _Launcher:
    """Launches the kernels of one call."""

    def __init__(
        self,
        problem: ConvProblem,
        plan: Plan,
        arrays: tuple[Array, ...],
        activation: Activation | None,
    ) -> None:
        self._plan, self._groups = plan, problem.groups
        self._dtype = problem.dtype
        self._device = int(runtime.cupy().cuda.runtime.getDevice())
        wide = _needs_wide_index(plan, problem.groups, arrays)
        before = _variant(problem.dtype, plan.tile, wide)
        behind = _output_variant(problem.dtype, plan.tile, wide, activation)
        self._variants = {"output": behind}
        self._other = before

    def __call__(self, part: str, work: int, arrays: tuple[Any, ...], *rest: Any) -> None:
        """Launch a thread for each piece of work."""
        kernels.launch(
            self._variants.get(part, self._other),
            _name(part, self._dtype),
            self._device,
            (-(-work // kernels.BLOCK),),
            (kernels.BLOCK,),
            (*arrays, *(value for values in rest for value in values)),
        )

    def transform(
        self,
        part: str,
        source: Array,
        factors: Array,
        before: tuple[int, int],
        first: int,
        tiles: int,
        channels: int,
        length: int,
        by_channel: bool,
    ) -> None:
        """Write the factors of some tiles, ``length`` a segment."""
        plan = self._plan
        every = length * plan.segments
        if (abs(source.strides[3]) > abs(source.strides[2])) == by_channel:
            run = every if by_channel else 1
        else:
            run = RUN
        self(
            part,
            every * channels * self._groups,
            (source, factors),
            (*_ints(*source.shape[1:3], plan.rows, plan.columns, *before), np.int64(first)),
            (np.int32(tiles), *_steps(source)),
            _ints(self._groups, channels, plan.segments, length, by_channel, run),
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
