"""Tiled products whose window matrix is never made: ``kernels/conv_implicit_gemm.cu``.

Arrays of any strides go to the kernel as they are, so no copies are made; the only workspace
is for sums that are divided among blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, kernels, runtime, split_sum, tiles
from gpuconv.cuda.tiles import DEPTH, TILES, Choice, Tile
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Pass
from gpuconv.engines.cuda_arrays import NULL, element_strides, reach
from gpuconv.engines.cuda_engine import CudaEngine
from gpuconv.engines.cuda_product import Packs, describe, phase_counts, shape_of, strided
from gpuconv.problem import ConvProblem

__all__ = ["CudaImplicitGemm", "sample_variants"]

Array = Any

#: Blocks of a launch's second and third axis.
_MOST_BLOCKS = 65535


@lru_cache(maxsize=1024)
def _variant(
    dtype: str, ndim: int, pass_: Pass, phases: bool, tile: Tile, packs: Packs, wide_index: bool,
    activation: Activation | None,
) -> kernels.Variant:  # fmt: skip
    """Return the specialisation of ``conv_implicit_gemm.cu``."""
    defines = {
        "NDIM": ndim, "PASS": pass_, "WEIGHT_GRAD": int(pass_ == "weight_grad"),
        "PHASES": int(phases), "BM": tile.rows, "BN": tile.columns, "BK": DEPTH,
        "TM": tile.thread_rows, "TN": tile.thread_columns, "MIN": tile.blocks,
        "VEC_A": packs.a, "VEC_B": packs.b, "VEC_C": packs.c, "BY_X_A": int(packs.a_by_row),
        "BY_X_B": int(packs.b_by_column), "CHECKED_A": int(packs.a_checked),
        "LINEAR_A": int(packs.a_linear), "LINEAR_B": int(packs.b_linear), **kernels.activation_defines(activation),
    }  # fmt: skip
    if wide_index:
        defines["INDEX_64"] = 1
    name = f"conv{ndim}d_{pass_}_gemm_{tile}_{kernels.suffix(dtype)}"
    constants = tuple(sorted((key, str(value)) for key, value in defines.items()))
    return kernels.Variant("conv_implicit_gemm.cu", dtype, constants, (name,))


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants of every tile and dtype, and of every pass, width, direction and index."""
    relu = get_activation("ReLU")
    wide, narrow = Packs(4, 4, 4, False, True, b_linear=True), Packs(1, 1, 1, False, True)
    along, back = Packs(4, 4, 4, True, True, b_linear=True), Packs(4, 4, 4, False, False)
    point = Packs(4, 4, 4, False, True, False, True, True)
    planes = Packs(1, 4, 1, False, False)
    double, double_along = Packs(2, 2, 2, False, True, b_linear=True), Packs(2, 2, 2, True, True)
    largest, tall, square, slim, small = TILES["float32"]
    yield _variant("float32", 2, "forward", False, largest, wide, False, relu)
    yield _variant("float32", 2, "input_grad", True, largest, back, False, None)
    yield _variant("float32", 2, "weight_grad", False, largest, along, False, None)
    yield _variant("float32", 2, "weight_grad", False, tall, planes, False, None)
    yield _variant("float32", 2, "input_grad", False, square, back, False, None)
    yield _variant("float32", 2, "forward", False, slim, point, False, None)
    yield _variant("float32", 1, "forward", False, small, narrow, False, None)
    yield _variant("float32", 3, "input_grad", True, small, narrow, True, None)
    for tile, pass_, packs in zip(
        TILES["float64"],
        ("forward", "weight_grad", "input_grad"),
        (double, double_along, Packs(1, 1, 1, True, False)),
        strict=True,
    ):
        yield _variant("float64", 2, pass_, pass_ == "input_grad", tile, packs, False, None)
    yield _variant("float16", 2, "forward", False, square, wide, False, None)
    yield _variant("bfloat16", 2, "weight_grad", False, square, along, False, None)


class CudaImplicitGemm(CudaEngine):
    """A product over windows that are fetched as it goes."""

    name = "cuda_implicit_gemm"

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        if strided(problem, pass_) and math.prod(phase_counts(problem)) > _MOST_BLOCKS:
            return f"it computes up to {_MOST_BLOCKS} phases of a stride"
        return super().unsupported(problem, pass_)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time that the choice of tiles predicts."""
        return self._choice(problem, pass_).seconds

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the parts of divided sums."""
        parts = self._choice(problem, pass_).parts
        return parts * shape_of(problem, pass_).sum_bytes if parts > 1 else 0

    @classmethod
    def _choice(cls, problem: ConvProblem, pass_: Pass) -> Choice:
        shape = shape_of(problem, pass_)
        return tiles.choose(architecture.gpu(), shape, cls.workspace_limit())

    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what launches a pass: the product and, of a divided sum, what adds the parts."""
        if pass_ != "weight_grad":
            source, w, _, target = arrays
            return self._product(problem, pass_, source, w, target, device)
        dz, x, dw = arrays
        run = self._product(problem, pass_, x, dz, dw, device)
        return lambda dz, x, dw: run(x, dz, NULL, dw)

    def _product(
        self, problem: ConvProblem, pass_: Pass, a: Array, b: Array, c: Array, device: int
    ) -> Callable[[Array, Array, Any, Array], None]:
        """Choose a tile and return what launches ``c = a b``, given a, b, the bias and c."""
        shape, choice = shape_of(problem, pass_), self._choice(problem, pass_)
        tile, parts, phases = choice.tile, choice.parts, strided(problem, pass_)
        result = element_strides(c) if parts == 1 else cuda_arrays.dense_strides(c.shape)
        product = describe(problem, pass_, element_strides(a), element_strides(b), result)
        packs = product.packs(problem, pass_, tuple(x.data.ptr % 16 == 0 for x in (a, b, c)))
        far = max(*(reach(array) for array in (a, b, c)), math.prod(c.shape))
        # Rows beyond the last and the step beyond the end are counted too.
        far += tile.rows * max(abs(s) for s in result) + DEPTH * max(map(abs, element_strides(a)))
        far = max(far, shape.rows + tile.rows, shape.inner + DEPTH * parts)
        wide = far >= cuda_arrays.WIDE_FROM
        activation = problem.activation if pass_ == "forward" else None
        blocks = -(-shape.rows // tile.rows) * -(-shape.columns // tile.columns) * problem.groups
        # The phases' sums differ in length: those that are not divided have no bound.
        length = choice.length if parts > 1 else 2**62 if wide else 2**31 - 1
        structure = product.structure(tile, packs, length, math.prod(c.shape), wide)
        variant = _variant(
            problem.dtype, problem.ndim, pass_, phases, tile, packs, wide,
            activation if parts == 1 else None,
        )  # fmt: skip
        grid = blocks, parts, math.prod(phase_counts(problem)) if phases else 1
        launch = kernels.prepare(
            variant, variant.functions[0], device, grid, (tile.threads,), (structure,)
        )
        if parts > 1:
            return _divided(launch, problem, c, parts, wide, device, activation)
        as_sums = c.dtype.name != problem.dtype  # parts of a gradient are asked for in float32
        covered = [n == s for n, s in zip(phase_counts(problem), problem.stride, strict=True)]
        zero = phases and not all(covered)  # there are results that no launch writes

        def whole(a: Array, b: Array, bias: Any, c: Array) -> None:
            if zero:
                cuda_arrays.zero(c)
            if as_sums:
                launch(a, b, bias, NULL, c)
            else:
                launch(a, b, bias, c, NULL)

        return whole


def _divided(
    launch: Callable[..., None], problem: ConvProblem, c: Array, parts: int, wide: bool,
    device: int, activation: Activation | None,
) -> Callable[[Array, Array, Any, Array], None]:  # fmt: skip
    """Return what launches a product whose sums are in parts, and adds these up into ``c``."""
    xp, shape = runtime.cupy(), (parts, *c.shape)
    sums = "float64" if problem.dtype == "float64" else "float32"
    add = split_sum.prepare(
        c.dtype.name, c.shape, element_strides(c), parts, wide, device, activation
    )

    def run(a: Array, b: Array, bias: Any, c: Array) -> None:
        room = xp.empty(shape, sums)
        launch(a, b, NULL, NULL, room)
        add(room, bias, c, NULL)

    return run
