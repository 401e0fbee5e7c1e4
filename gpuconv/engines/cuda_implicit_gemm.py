"""Tiled products whose window matrix is never made: ``kernels/conv_implicit_gemm.cu``.

Arrays of any strides go to the kernel as they are, so no copies are made; the only workspace
is for sums that are divided among blocks. What a call needs beyond its pointers is worked out
once for each problem and arrangement of memory, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, kernels, runtime, split_sum, tiles
from gpuconv.cuda.tiles import DEPTH, TILES, Choice, Tile
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Engine, Pass, bias_grad
from gpuconv.engines.cuda_arrays import NULL, element_strides, reach
from gpuconv.engines.cuda_product import Packs, describe, phase_counts, shape_of, strided
from gpuconv.problem import ConvProblem

__all__ = ["CudaImplicitGemm", "sample_variants"]

Array = Any

#: Blocks of a launch's second and third axis.
_MOST_BLOCKS = 65535
#: Launches that are remembered.
_MOST_PLANS = 4096


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


@dataclass(frozen=True)
class _Plan:
    """One launch, all but its pointers, and what goes before and after it.

    Attributes
    ----------
    kernel : callable
    grid, block : tuple of int
    product : array
        The kernel's structure, passed by value.
    parts : tuple or None
        Shape of the parts of a divided sum; None where it is not divided.
    add : callable or None
        Adds up the parts: takes them, the bias and the result.
    sums : str
        Dtype of the sums.
    as_sums : bool
        The result is of that dtype and the operands are not.
    zero : bool
        There are results that no launch writes.
    """

    kernel: Callable[..., None]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    product: Any
    parts: tuple[int, ...] | None
    sums: str
    as_sums: bool
    add: Callable[[Array, Any, Array], None] | None
    zero: bool


class CudaImplicitGemm(Engine):
    """A product over windows that are fetched as it goes."""

    name = "cuda_implicit_gemm"
    device_kind = "cuda"

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

    # ----------------------------------------------------------------------------------- passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        if b is not None and not b.flags.c_contiguous:
            b = runtime.cupy().ascontiguousarray(b)
        self._run(problem, "forward", x, w, NULL if b is None else b, y)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        self._run(problem, "input_grad", dz, w, NULL, dx)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if dw is not None:
            self._run(problem, "weight_grad", x, dz, NULL, dw)
        if db is not None:
            bias_grad(dz, db)

    def _run(
        self, problem: ConvProblem, pass_: Pass, a: Array, b: Array, bias: Any, c: Array
    ) -> None:
        xp = runtime.cupy()
        device = xp.cuda.runtime.getDevice()
        aligned = a.data.ptr % 16 == 0, b.data.ptr % 16 == 0, c.data.ptr % 16 == 0
        key = (
            self.name, problem, pass_, a.strides, b.strides, c.strides, c.dtype, aligned, device,
            self.workspace_limit(),
        )  # fmt: skip
        plan = kernels.plans.get(key)
        if plan is None:
            if len(kernels.plans) >= _MOST_PLANS:
                kernels.plans.clear()
            plan = kernels.plans[key] = self._plan(problem, pass_, a, b, c, aligned, device)
        if plan.zero:
            c.fill(0)
        if plan.parts is None or plan.add is None:
            results = (NULL, c) if plan.as_sums else (c, NULL)
            plan.kernel(plan.grid, plan.block, (a, b, bias, *results, plan.product))
            return
        parts = xp.empty(plan.parts, plan.sums)
        plan.kernel(plan.grid, plan.block, (a, b, NULL, NULL, parts, plan.product))
        plan.add(parts, bias, c)

    def _plan(self, problem: ConvProblem, pass_: Pass, a: Array, b: Array, c: Array,
              aligned: tuple[bool, bool, bool], device: int) -> _Plan:  # fmt: skip
        """Choose a tile and work out the launch."""
        shape, choice = shape_of(problem, pass_), self._choice(problem, pass_)
        tile, phases = choice.tile, strided(problem, pass_)
        result = element_strides(c) if choice.parts == 1 else cuda_arrays.dense_strides(c.shape)
        product = describe(problem, pass_, element_strides(a), element_strides(b), result)
        packs = product.packs(problem, pass_, aligned)
        far = max(*(reach(array) for array in (a, b, c)), math.prod(c.shape))
        # Rows beyond the last and the step beyond the end are counted too.
        far += tile.rows * max(abs(s) for s in result) + DEPTH * max(map(abs, element_strides(a)))
        far = max(far, shape.rows + tile.rows, shape.inner + DEPTH * choice.parts)
        wide = far >= cuda_arrays.WIDE_FROM
        activation = problem.activation if pass_ == "forward" else None
        blocks = -(-shape.rows // tile.rows) * -(-shape.columns // tile.columns) * problem.groups
        # The phases' sums differ in length: those that are not divided have no bound.
        length = choice.length if choice.parts > 1 else 2**62 if wide else 2**31 - 1
        structure = product.structure(tile, packs, length, math.prod(c.shape), wide)
        variant = _variant(
            problem.dtype, problem.ndim, pass_, phases, tile, packs, wide,
            activation if choice.parts == 1 else None,
        )  # fmt: skip
        covered = [n == s for n, s in zip(phase_counts(problem), problem.stride, strict=True)]
        return _Plan(
            kernels.function(variant, variant.functions[0], device),
            (blocks, choice.parts, math.prod(phase_counts(problem)) if phases else 1),
            (tile.threads,),
            structure,
            (choice.parts, *c.shape) if choice.parts > 1 else None,
            "float64" if problem.dtype == "float64" else "float32",
            c.dtype.name != problem.dtype,
            _adder(c, choice.parts, activation, wide, device) if choice.parts > 1 else None,
            phases and not all(covered),
        )


def _adder(
    c: Array, parts: int, activation: Activation | None, wide: bool,
    device: int,
) -> Callable[[Array, Any, Array], None]:  # fmt: skip
    """Return what adds up ``parts`` parts of an array like ``c``."""
    dtype, shape, strides = c.dtype.name, c.shape, element_strides(c)

    def add(sums: Array, bias: Any, result: Array) -> None:
        arrays = sums, bias, result, NULL
        split_sum.launch(dtype, shape, strides, parts, wide, arrays, device, activation)

    return add
