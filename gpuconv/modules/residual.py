"""The basic block of residual networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuconv.activations import Activation
from gpuconv.arguments import integer, real
from gpuconv.device import Device, namespace
from gpuconv.initializers import Rng, get_initializer
from gpuconv.layers.base import activation_of
from gpuconv.layers.conv import Conv2D
from gpuconv.layers.interface import Array, Shape
from gpuconv.layers.normalization import BatchNorm2D
from gpuconv.modules.base import ModuleBase
from gpuconv.optimizers import Optimizer

__all__ = ["ResidualBlock"]


class ResidualBlock(ModuleBase):
    """Two 3x3 convolutions, each normalised, with the input added: ResNet's basic block [1]_.

    ``act_fn(around(X) + norm(conv(act_fn(norm(conv(X))))))``. The way around has no parameters:
    it takes every ``stride``-th pixel and puts channels of zeros on both sides of the others
    (option A of the paper, which its networks for CIFAR-10 have).

    Parameters
    ----------
    out_ch : int
        Kernels of both convolutions; at least the input's channels.
    stride : int
        Of the first convolution.
    act_fn : Activation or str
        One whose derivative follows from its output, such as ``"ReLU"``.
    epsilon, momentum : float
        Of the normalisations.
    optimizer : Optimizer, str, dict or None
        Of all components.
    init : str
        See :func:`gpuconv.initializers.get_initializer`.
    rng, device
        See :class:`~gpuconv.layers.base.LayerBase`.

    References
    ----------
    .. [1] He, Zhang, Ren, Sun: Deep residual learning for image recognition (2015).
    """

    _component_ids = ("conv1", "batchnorm1", "conv2", "batchnorm2")
    out_ch: int
    stride: int
    act_fn: Activation
    epsilon: float
    momentum: float
    conv1: Conv2D
    conv2: Conv2D
    batchnorm1: BatchNorm2D
    batchnorm2: BatchNorm2D

    def __init__(
        self,
        out_ch: int,
        stride: int = 1,
        act_fn: Activation | str = "ReLU",
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        init: str = "he_normal",
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        values = locals()
        given = {name: values[name] for name in self._arguments()}
        super().__init__(given, optimizer, rng, device)
        self._outputs: list[Array] = []

    def _arguments(self) -> tuple[str, ...]:
        return ("out_ch", "stride", "act_fn", "epsilon", "momentum", "init")

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "out_ch": lambda v: integer("out_ch", v, 1),
            "stride": lambda v: integer("stride", v, 1),
            "act_fn": _from_output,
            "epsilon": lambda v: real("epsilon", v, 0),
            "momentum": lambda v: real("momentum", v, 0, 1),
            "init": lambda v: get_initializer(v).__name__,
        }
        return {name: checks[name](value) for name, value in values.items()}

    def _make_components(self) -> None:
        self.conv1 = self._conv(self.out_ch, (3, 3), 1, self.stride, None)
        self.conv2 = self._conv(self.out_ch, (3, 3), 1, 1, None)
        options: dict[str, Any] = {"first_scaler": "ones"}
        given = (self.momentum, self.epsilon, self._made)
        self.batchnorm1 = self._ready(BatchNorm2D(*given, act_fn=self.act_fn, **options))
        self.batchnorm2 = self._ready(BatchNorm2D(*given, **options))

    def _own_hyperparameters(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self._arguments()}
        return {**own, "act_fn": str(self.act_fn), "in_ch": self.in_ch, "optimizer": self.optimizer}

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the result for an input of ``shape``."""
        out = self.conv1.output_shape(shape)
        if shape[3] > self.out_ch:
            raise ValueError(f"X has {shape[3]} channels; expected at most out_ch, {self.out_ch}")
        return out

    def build(self, shape: Sequence[int], dtype: str = "float32") -> Shape:
        """Draw all parameters for an input of ``shape``."""
        self.output_shape(tuple(shape))
        self._complete(tuple(shape))
        current = tuple(shape)
        for layer in self.components:
            current = layer.build(current, dtype)
        return current

    def discard(self) -> None:
        """Forget what was retained, in the components too."""
        self._outputs = []
        super().discard()

    def _inner(self, size: int) -> slice:
        before = (self.out_ch - size) // 2
        return slice(before, before + size)

    def _forward(self, X: Array, retain: bool) -> Array:
        shape = self.output_shape(tuple(getattr(X, "shape", ())))
        outs = {"conv1_out": self.conv1.forward(X, retain)}
        self._complete(tuple(X.shape))
        outs["batchnorm1_out"] = self.batchnorm1.forward(outs["conv1_out"], retain)
        outs["conv2_out"] = self.conv2.forward(outs["batchnorm1_out"], retain)
        total = outs["batchnorm2_out"] = self.batchnorm2.forward(outs["conv2_out"], retain)
        if retain:
            self._dv.update(outs)
            total = total.copy()
        around = self.conv1.X[-1] if retain else self._moved(X, total)
        total[..., self._inner(X.shape[3])] += around[:, :: self.stride, :: self.stride]
        assert total.shape == shape
        Y = self.act_fn.fn(total, out=total)
        if retain:
            self._outputs.append(Y)
        return Y

    def _moved(self, X: Array, like: Array) -> Array:
        return X if namespace(X) is namespace(like) else namespace(like).asarray(X)

    def _backward(self, dLdy: list[Array], retain_grads: bool, input_grad: bool) -> list[Any]:
        if len(dLdy) != len(self._outputs):
            raise ValueError(
                f"dLdy holds {len(dLdy)} gradients; expected {len(self._outputs)}, one for each "
                "forward pass retained since the last update"
            )
        sums = [self.act_fn.backward(dy, y=Y) for dy, Y in zip(dLdy, self._outputs, strict=True)]
        d_conv2 = self._through(self.batchnorm2, sums, retain_grads)
        d_bn1 = self._through(self.conv2, d_conv2, retain_grads)
        d_conv1 = self._through(self.batchnorm1, d_bn1, retain_grads)
        found: list[Any] = self._through(self.conv1, d_conv1, retain_grads, input_grad)
        if not input_grad:
            return [None] * len(sums)
        for dX, total in zip(found, sums, strict=True):
            dX[:, :: self.stride, :: self.stride] += total[..., self._inner(dX.shape[3])]
        return found


def _from_output(act_fn: Activation | str) -> Activation:
    found = activation_of(act_fn)
    if not found.invertible:
        raise ValueError(
            f"act_fn is {act_fn}; expected one whose derivative follows from its output"
        )
    return found
