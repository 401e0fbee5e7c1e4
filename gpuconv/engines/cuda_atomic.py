"""One thread per output element, atomics for the gradients: ``kernels/conv_atomic.cu``.

The readable reference on the GPU. Its sums arrive in any order, so it is not deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import ELU, GELU, SELU, Activation, Affine, LeakyReLU, get_activation
from gpuconv.cuda import architecture, kernels, prediction, runtime
from gpuconv.engines.base import Engine, Pass
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


class CudaAtomic(Engine):
    """One thread an output element: each adds its window's contribution with atomics."""

    name = "cuda_atomic"
    device_kind = "cuda"
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

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        xp = runtime.cupy()
        weights = xp.ascontiguousarray(stored_weights(problem, w))
        bias = NULL if b is None else xp.ascontiguousarray(b)
        x, y = stored_image(problem, x), stored_image(problem, y)
        for part, at in parts(problem, copied(x) + copied(y)):
            target = y[at]
            in_place = target.flags.c_contiguous
            result = target if in_place else xp.empty(target.shape, y.dtype)
            arrays = (xp.ascontiguousarray(x[at]), weights, bias, result)
            self._launch(part, "forward", arrays)
            if not in_place:
                target[...] = result

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        self.backward(problem, dz, None, w, None, dx, None, None)

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
        xp = runtime.cupy()
        images = [None if a is None else stored_image(problem, a) for a in (dy, y, x)]
        weights = NULL if w is None else xp.ascontiguousarray(stored_weights(problem, w))
        dx = None if dx is None else stored_image(problem, dx)
        dw = None if dw is None else stored_weights(problem, dw)
        shared = [_Sums(dw), _Sums(db)]
        example = sum(map(copied, images)) + _Sums.example_bytes(dx)
        for part, at in parts(problem, example):
            own = _Sums(None if dx is None else dx[at])
            inputs = [NULL if a is None else xp.ascontiguousarray(a[at]) for a in images]
            sums = [s.array for s in (own, *shared)]
            self._launch(part, "backward", (*inputs, weights, *sums))
            own.store()
        for total in shared:
            total.store()

    @staticmethod
    def _launch(problem: ConvProblem, name: str, arrays: tuple[Any, ...]) -> None:
        """Launch over the output elements, on the current device and its current stream."""
        device = int(runtime.cupy().cuda.runtime.getDevice())
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
        kernels.launch(
            variant,
            f"conv{problem.ndim}d_{name}_atomic_{kernels.suffix(problem.dtype)}",
            device,
            (grid,),
            (kernels.BLOCK,),
            (*arrays, *sizes(problem)),
        )


class _Sums:
    """Dense zeros to add up in, float32 at least: the gradient itself where it is such."""

    def __init__(self, target: Array | None) -> None:
        self._target = target
        if target is None:
            self.array = NULL
        elif self._in_place(target):
            self.array = target
            target.fill(0)
        else:
            self.array = runtime.cupy().zeros(target.shape, self._wide(target))

    @staticmethod
    def _wide(target: Array) -> str:
        return "float32" if target.dtype.itemsize == 2 else str(target.dtype)

    @classmethod
    def _in_place(cls, target: Array) -> bool:
        return bool(target.flags.c_contiguous) and target.dtype == cls._wide(target)

    @classmethod
    def example_bytes(cls, target: Array | None) -> int:
        """Return the bytes used for each example, beyond ``target`` itself."""
        if target is None or cls._in_place(target):
            return 0
        return int(math.prod(target.shape[1:]) * np.dtype(cls._wide(target)).itemsize)

    def store(self) -> None:
        """Put the sums where they are wanted, if they are not there."""
        if self._target is not None and self.array is not self._target:
            self._target[...] = self.array
