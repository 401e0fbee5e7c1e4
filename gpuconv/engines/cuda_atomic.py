"""One thread per output element, atomics for the gradients: ``kernels/conv_atomic.cu``.

The readable reference on the GPU. Its sums arrive in any order, so it is not deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import ELU, GELU, SELU, Activation, Affine, LeakyReLU, get_activation
from gpuconv.cuda import architecture, kernels, prediction, runtime
from gpuconv.cuda.prepared import prepared
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Pass
from gpuconv.engines.cuda_arrays import (
    NULL,
    by_axis,
    copied,
    examples_at_once,
    needs_wide_index,
    parts,
    sizes,
    stored_image,
    stored_weights,
)
from gpuconv.engines.cuda_engine import CudaEngine
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaAtomic", "sample_variants"]

Array = Any


@lru_cache(maxsize=1024)
def _variant(
    dtype: str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    channels_first: bool,
    wide_index: bool,
    activation: Activation | None,
) -> kernels.Variant:
    """Return the specialisation of ``conv_atomic.cu``."""
    nd = len(kernel)
    defines = {
        "NDIM": str(nd),
        **by_axis("K", kernel),
        **by_axis("S", stride),
        **by_axis("D", dilation),
        "CHANNELS_FIRST": str(int(channels_first)),
        **kernels.activation_defines(activation),
    }
    if wide_index:
        defines["INDEX_64"] = "1"
    end = kernels.suffix(dtype)
    functions = (f"conv{nd}d_forward_atomic_{end}", f"conv{nd}d_backward_atomic_{end}")
    return kernels.Variant("conv_atomic.cu", dtype, tuple(sorted(defines.items())), functions)


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants that between them hold every rank, dtype, layout, index and activation."""
    plain = ((3, 3), (1, 1), (1, 1))
    for dtype in CudaAtomic.dtypes:
        for first in (False, True):
            yield _variant(dtype, *plain, first, False, get_activation("ReLU"))
        yield _variant(dtype, (5, 2), (2, 1), (1, 3), False, True, None)
    for first in (False, True):
        yield _variant("float32", (3,), (2,), (1,), first, False, None)
        yield _variant("float32", (2, 3, 3), (1, 1, 2), (1, 2, 1), first, False, None)
    extra = (Affine(2, 1), LeakyReLU(0.1), ELU(0.5), SELU(), GELU(), GELU(approximate=False))
    named = tuple(
        map(get_activation, ("Tanh", "Sigmoid", "HardSigmoid", "SoftPlus", "Exponential"))
    )
    for activation in (*extra, *named):
        for dtype in ("float32", "float64"):
            yield _variant(dtype, *plain, False, False, activation)


class CudaAtomic(CudaEngine):
    """One thread an output element: each adds its window's contribution with atomics."""

    name = "cuda_atomic"
    deterministic = False
    fused_backward = True
    reference = True

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        return super().unsupported(problem, pass_)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time at the rate of scattered loads or, for gradients, of atomics."""
        gpu = architecture.gpu()
        if pass_ == "forward":
            return prediction.LAUNCH + prediction.scattered(gpu, problem)
        return prediction.LAUNCH + prediction.atomics(gpu, problem.flops / 2)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the float32 sums of 16-bit gradients."""
        if problem.itemsize != 2 or pass_ == "forward":
            return 0
        if pass_ == "weight_grad":
            return 4 * math.prod(problem.w_shape)
        example = 4 * math.prod(problem.x_shape[1:])
        return example * examples_at_once(problem, example)

    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what launches the forward pass, or the gradient of the input alone."""
        if pass_ == "forward":
            return _forward(problem, arrays, device)
        dz, w, _, dx = arrays
        run = _backward(problem, (dz, NULL, w, NULL, dx, NULL, NULL), device)
        return lambda dz, w, _, dx: run(dz, NULL, w, NULL, dx, NULL, NULL)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        self.backward(problem, dz, x, None, None, None, dw, db)

    def backward(
        self,
        problem: ConvProblem,
        dy: Array,
        x: Array | None,
        w: Array | None,
        y: Array | None,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
    ) -> None:
        """Add every output element's contributions into the gradients asked for.

        That is one launch, or one for each part of the batch where copies (of arrays that do
        not lie dense, and the float32 sums of 16-bit gradients) would exceed the workspace.
        """
        arrays = tuple(NULL if a is None else a for a in (dy, x, w, y, dx, dw, db))
        prepared(_backward, (problem,), arrays)(*arrays)


def _forward(
    problem: ConvProblem, arrays: tuple[Array, ...], device: int
) -> Callable[[Array, Array, Any, Array], None]:
    """Return what launches the forward pass, given x, w, b or NULL, and y."""
    xp = runtime.cupy()
    x, w, _, y = arrays
    of_x, of_y = copied(stored_image(problem, x)), copied(stored_image(problem, y))
    of_w = _copies(stored_weights(problem, w))
    steps = [(at, _launcher(part, "forward", device)) for part, at in parts(problem, of_x + of_y)]

    def run(x: Array, w: Array, b: Any, y: Array) -> None:
        weights = xp.ascontiguousarray(stored_weights(problem, w)) if of_w else w
        if not (of_x or of_y):
            steps[0][1](x, weights, b, y)
            return
        x, y = stored_image(problem, x), stored_image(problem, y)
        for at, launch in steps:
            target = y[at]
            result = xp.empty(target.shape, y.dtype) if of_y else target
            launch(xp.ascontiguousarray(x[at]), weights, b, result)
            if of_y:
                cuda_arrays.put(target, result)

    return run


def _backward(problem: ConvProblem, arrays: tuple[Array, ...], device: int) -> Callable[..., None]:
    """Return what launches the backward pass, given dy, x, w, y, dx, dw and db, some of them NULL."""
    xp = runtime.cupy()

    def image(array: Any) -> Any:
        return array if array is NULL else stored_image(problem, array)

    def weights(array: Any) -> Any:
        return array if array is NULL else stored_weights(problem, array)

    dy, x, w, y, dx, dw, db = arrays
    of_w = w is not NULL and _copies(weights(w))
    of_x, of_dw, of_db = _Sums(image(dx)), _Sums(weights(dw)), _Sums(db)
    example = sum(copied(image(a)) for a in (dy, y, x) if a is not NULL) + of_x.example_bytes
    steps = [(at, _launcher(part, "backward", device)) for part, at in parts(problem, example)]

    def run(dy: Array, x: Any, w: Any, y: Any, dx: Any, dw: Any, db: Any) -> None:
        if of_w:
            w = xp.ascontiguousarray(weights(w))
        dx, dw = image(dx), weights(dw)
        sums = of_dw.begin(dw), of_db.begin(db)
        if example:
            dy, y, x = map(image, (dy, y, x))
        for at, launch in steps:
            if example:  # else there is one part, and nothing to copy
                given = [a if a is NULL else xp.ascontiguousarray(a[at]) for a in (dy, y, x)]
                target = dx if dx is NULL else dx[at]
            else:
                given, target = [dy, y, x], dx
            own = of_x.begin(target)
            launch(*given, w, own, *sums)
            of_x.end(target, own)
        of_dw.end(dw, sums[0])
        of_db.end(db, sums[1])

    return run


def _copies(array: Array) -> bool:
    return not array.flags.c_contiguous


def _launcher(problem: ConvProblem, name: str, device: int) -> Callable[..., None]:
    """Return what launches over the output elements."""
    elements = math.prod(problem.y_shape)
    grid = kernels.grid_for(elements, device)
    variant = _variant(
        problem.dtype,
        problem.kernel,
        problem.stride,
        problem.dilation,
        problem.layout == CHANNELS_FIRST,
        needs_wide_index(problem, grid * kernels.BLOCK),  # the grid's stride overshoots
        problem.activation,
    )
    name = f"conv{problem.ndim}d_{name}_atomic_{kernels.suffix(problem.dtype)}"
    return kernels.prepare(variant, name, device, (grid,), (kernels.BLOCK,), sizes(problem))


class _Sums:
    """Dense zeros to add up in, float32 at least: the gradient itself where it is such.

    Parameters
    ----------
    target : array or NULL
        As the gradient will be, in the order of memory.
    """

    def __init__(self, target: Any) -> None:
        self.example_bytes = 0
        self._there = target is not NULL
        if not self._there:
            return
        self._dtype = "float32" if target.dtype.itemsize == 2 else target.dtype.name
        self._in_place = target.flags.c_contiguous and target.dtype == self._dtype
        if not self._in_place:
            size = np.dtype(self._dtype).itemsize
            self.example_bytes = int(math.prod(target.shape[1:]) * size)

    def begin(self, target: Any) -> Any:
        """Return zeros; NULL where there is no gradient."""
        if not self._there:
            return NULL
        if not self._in_place:
            return runtime.cupy().zeros(target.shape, self._dtype)
        cuda_arrays.zero(target)
        return target

    def end(self, target: Any, sums: Any) -> None:
        """Put the sums where they are wanted, if they are not there."""
        if self._there and not self._in_place:
            cuda_arrays.put(target, sums)
