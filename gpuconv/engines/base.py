"""What an engine is: the three passes of a convolution, and what it says about itself.

Engines see every array *channels last*: ``x`` of ``problem.x_shape``, ``w`` of
``problem.w_shape``, ``y`` and its gradient of ``problem.y_shape``. What the caller holds
channels first arrives as a transposed view, so ``problem.layout`` tells what lies next to
what in memory; strides may be anything, and inputs may be read-only. Results are written
into the arrays given. Shapes and dtypes were checked before.

Every pass is bilinear: of complex arrays nothing is conjugated here.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

from gpuconv import settings
from gpuconv.activations import Activation
from gpuconv.device import namespace
from gpuconv.problem import ConvProblem

__all__ = ["PASSES", "Engine", "Pass", "bias_grad", "epilogue_grad"]

Array = Any
Pass = Literal["forward", "input_grad", "weight_grad"]
PASSES: tuple[Pass, ...] = ("forward", "input_grad", "weight_grad")


def epilogue_grad(dy: Array, y: Array, activation: Activation, out: Array | None = None) -> Array:
    """Return ``dy * act'(z)``, the derivative taken from the output ``y = act(z)``."""
    if activation.by_sign and getattr(activation, "alpha", 0) == 0:  # ReLU: one pass
        return namespace(dy).multiply(dy, y > 0, out=out)
    return activation.backward(dy, y=y, out=out)


def bias_grad(dz: Array, db: Array) -> None:
    """Add ``dz`` up over all but its channels, in float32 or better, into ``db``."""
    wide = "float32" if dz.dtype.itemsize < 4 else dz.dtype
    db[...] = dz.sum(axis=tuple(range(dz.ndim - 1)), dtype=wide)


class Engine(abc.ABC):
    """One way to compute convolutions on one kind of device."""

    #: The name users force it by.
    name: ClassVar[str]
    #: "cpu" or "cuda".
    device_kind: ClassVar[str]
    #: The same bits from run to run.
    deterministic: ClassVar[bool] = True
    #: Whether ``backward`` computes all gradients at once, epilogue included.
    fused_backward: ClassVar[bool] = False
    #: Whether it is there to be read: chosen only if it is forced, or no other engine can.
    reference: ClassVar[bool] = False
    #: Names of the dtypes it computes.
    dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16", "float32", "float64")
    #: Numbers of spatial axes it computes.
    ndims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    #: Factor on the tolerance against the oracle (Winograd's transforms round more).
    error_factor: ClassVar[float] = 1.0

    def unavailable(self) -> str | None:
        """Return why this engine cannot run on this machine, or None."""
        return None

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if problem.dtype not in self.dtypes:
            return f"it computes {', '.join(self.dtypes)}, not {problem.dtype}"
        if problem.ndim not in self.ndims:
            axes = " or ".join(map(str, self.ndims))
            return f"it computes {axes} spatial axes, not {problem.ndim}"
        return None

    def can_repeat(self) -> bool:
        """Return whether it gives the same bits from run to run where the settings ask for that."""
        return self.deterministic

    @abc.abstractmethod
    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time in seconds."""

    @abc.abstractmethod
    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes used beyond inputs and outputs, within the workspace limit."""

    @abc.abstractmethod
    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``; ``b`` has shape ``(out_channels,)``."""

    @abc.abstractmethod
    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""

    @abc.abstractmethod
    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""

    def backward(
        self,
        problem: ConvProblem,
        dy: Array,
        x: Array,
        w: Array,
        y: Array | None,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
    ) -> None:
        """Write the gradients asked for (not None), given the gradient ``dy`` behind the activation.

        Called only where ``fused_backward`` is set. ``y`` is the forward's result where
        ``problem.activation`` is not None.
        """
        raise NotImplementedError(f"{self.name} has no fused backward")

    @staticmethod
    def workspace_limit() -> int:
        """Return the bytes that a call may use beyond its inputs and outputs."""
        return settings.get_workspace_limit()
