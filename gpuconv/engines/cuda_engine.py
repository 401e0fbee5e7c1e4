"""What engines of our own kernels have in common: passes that are prepared once, then launched."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

from gpuconv.cuda import runtime
from gpuconv.cuda.epilogue import bias_grad
from gpuconv.cuda.prepared import NULL, prepared
from gpuconv.engines.base import Engine, Pass
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaEngine"]

Array = Any


class CudaEngine(Engine):
    """An engine that works its launches out once for each problem and arrangement of memory."""

    device_kind: ClassVar[str] = "cuda"

    @abc.abstractmethod
    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return a function that computes a pass on arrays that lie as these do.

        Parameters
        ----------
        problem : ConvProblem
        pass_ : str
        arrays : tuple
            The function's: ``x, w, b, y``, where ``b`` is dense or NULL; ``dz, w, NULL, dx``;
            ``dz, x, dw``. It keeps none of them.
        device : int
            The current one, on which the function will be called.
        """

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        if b is None:
            b = NULL
        elif not b.flags.c_contiguous:
            b = runtime.cupy().ascontiguousarray(b)
        arrays = (x, w, b, y)
        prepared(self.prepare, (problem, "forward"), arrays)(*arrays)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        arrays = (dz, w, NULL, dx)
        prepared(self.prepare, (problem, "input_grad"), arrays)(*arrays)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_grad(dz, db, problem.layout == CHANNELS_FIRST)
        if dw is not None:
            arrays = (dz, x, dw)
            prepared(self.prepare, (problem, "weight_grad"), arrays)(*arrays)
