"""One thread per output element, atomics for the gradients: ``kernels/conv_atomic.cu``.

The readable reference on the GPU. Its sums arrive in any order, so it is not deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import ELU, GELU, SELU, Activation, Affine, LeakyReLU, get_activation
from gpuconv.cuda import kernels, runtime
from gpuconv.engines.base import Engine, Pass
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaAtomic", "sample_variants"]

Array = Any

_NULL = np.uintp(0)
#: Offsets at or beyond this are held in 64 bits.
_WIDE_FROM = 2**31


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
        **_by_axis("K", kernel),
        **_by_axis("S", stride),
        **_by_axis("D", dilation),
        "CHANNELS_FIRST": str(int(channels_first)),
        **kernels.activation_defines(activation),
    }
    if wide_index:
        defines["INDEX_64"] = "1"
    end = kernels.suffix(dtype)
    functions = (f"conv{nd}d_forward_atomic_{end}", f"conv{nd}d_backward_atomic_{end}")
    return kernels.Variant("conv_atomic.cu", dtype, tuple(sorted(defines.items())), functions)


def _by_axis(letter: str, values: tuple[int, ...]) -> dict[str, str]:
    """Return the constants of an option for depth, rows and columns."""
    return {letter + axis: str(v) for axis, v in zip("DHW", _three(values, 1), strict=True)}


def _three(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Return a value for depth, rows and columns; ``fill`` for axes that are not there."""
    return (*(fill,) * (3 - len(values)), *values)


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

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        return super().unsupported(problem, pass_)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time at the rate of scattered loads or, for gradients, of atomics."""
        return 1e-5 + problem.flops / (5e11 if pass_ == "forward" else 2e10)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the float32 sums of 16-bit gradients."""
        if problem.itemsize != 2 or pass_ == "forward":
            return 0
        if pass_ == "weight_grad":
            return 4 * math.prod(problem.w_shape)
        example = 4 * math.prod(problem.x_shape[1:])
        return example * _examples_at_once(problem, example)

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        xp = runtime.cupy()
        weights = xp.ascontiguousarray(_weights(problem, w))
        bias = _NULL if b is None else xp.ascontiguousarray(b)
        x, y = _image(problem, x), _image(problem, y)
        for part, at in _parts(problem, _copied(x) + _copied(y)):
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
        images = [None if a is None else _image(problem, a) for a in (dy, y, x)]
        weights = _NULL if w is None else xp.ascontiguousarray(_weights(problem, w))
        dx = None if dx is None else _image(problem, dx)
        dw = None if dw is None else _weights(problem, dw)
        shared = [_Sums(dw), _Sums(db)]
        example = sum(map(_copied, images)) + _Sums.example_bytes(dx)
        for part, at in _parts(problem, example):
            own = _Sums(None if dx is None else dx[at])
            inputs = [_NULL if a is None else xp.ascontiguousarray(a[at]) for a in images]
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
        # The largest offset, and the grid stride's overshoot, must fit the index.
        largest = max(math.prod(problem.x_shape), math.prod(problem.w_shape), elements)
        variant = _variant(
            problem.dtype,
            problem.kernel,
            problem.stride,
            problem.dilation,
            problem.layout == CHANNELS_FIRST,
            largest + grid * kernels.BLOCK >= _WIDE_FROM,
            problem.activation,
        )
        sizes = (
            problem.batch,
            *_three(problem.in_shape, 1),
            problem.in_channels,
            *_three(problem.out_shape, 1),
            problem.out_channels,
            *_three(tuple(before for before, _ in problem.padding), 0),
            problem.groups,
        )
        kernels.launch(
            variant,
            f"conv{problem.ndim}d_{name}_atomic_{kernels.suffix(problem.dtype)}",
            device,
            (grid,),
            (kernels.BLOCK,),
            (*arrays, *map(np.int32, sizes)),
        )


class _Sums:
    """Dense zeros to add up in, float32 at least: the gradient itself where it is such."""

    def __init__(self, target: Array | None) -> None:
        self._target = target
        if target is None:
            self.array = _NULL
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


def _copied(array: Array | None) -> int:
    """Return the bytes of the dense copy of an example; 0 where none is made."""
    if array is None or array.flags.c_contiguous:
        return 0
    return int(math.prod(array.shape[1:]) * array.dtype.itemsize)


def _examples_at_once(problem: ConvProblem, example: int) -> int:
    """Return how many examples fit the workspace at ``example`` bytes each; one at least."""
    if example == 0:
        return problem.batch
    return max(1, min(problem.batch, Engine.workspace_limit() // example))


def _parts(problem: ConvProblem, example: int) -> Iterator[tuple[ConvProblem, slice]]:
    """Yield parts of the batch, each within the workspace, and where they are."""
    count = _examples_at_once(problem, example)
    for start in range(0, problem.batch, count):
        size = min(count, problem.batch - start)
        part = problem if size == problem.batch else replace(problem, batch=size)
        yield part, slice(start, start + size)


def _image(problem: ConvProblem, view: Array) -> Array:
    """Return a channels-last view in the order of the caller's memory."""
    if problem.layout != CHANNELS_FIRST:
        return view
    return view.transpose(0, problem.ndim + 1, *range(1, problem.ndim + 1))


def _weights(problem: ConvProblem, view: Array) -> Array:
    """Return weights seen channels last in the order of the caller's memory."""
    if problem.layout != CHANNELS_FIRST:
        return view
    return view.transpose(problem.ndim + 1, problem.ndim, *range(problem.ndim))
