"""The skip connections of numpy-ml: two convolutions with a way around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuconv.activations import Affine
from gpuconv.arguments import integer, pair, real
from gpuconv.device import Device
from gpuconv.initializers import Rng, get_initializer
from gpuconv.layers.base import activation_of
from gpuconv.layers.conv import Conv2D, checked_pad, plain
from gpuconv.layers.elementwise import Add
from gpuconv.layers.interface import Array, Shape
from gpuconv.layers.normalization import BatchNorm2D
from gpuconv.modules.base import ModuleBase
from gpuconv.optimizers import Optimizer

__all__ = ["SkipConnectionConvModule", "SkipConnectionIdentityModule"]

#: What a module calls its activation where none is given, as numpy-ml does.
LINEAR = Affine(slope=1, intercept=0)

_SKIP_CHECKS: dict[str, Any] = {
    "out_ch": lambda v: integer("out_ch", v, 1),
    "out_ch1": lambda v: integer("out_ch1", v, 1),
    "out_ch2": lambda v: integer("out_ch2", v, 1),
    "kernel_shape1": lambda v: pair("kernel_shape1", v, 1),
    "kernel_shape2": lambda v: pair("kernel_shape2", v, 1),
    "kernel_shape_skip": lambda v: pair("kernel_shape_skip", v, 1),
    "pad1": checked_pad,
    "pad2": checked_pad,
    "stride1": lambda v: plain("stride1", v, 1),
    "stride2": lambda v: plain("stride2", v, 1),
    "stride_skip": lambda v: plain("stride_skip", v, 1),
    "act_fn": lambda v: LINEAR if v is None else activation_of(v),
    "epsilon": lambda v: real("epsilon", v, 0),
    "momentum": lambda v: real("momentum", v, 0, 1),
    "init": lambda v: get_initializer(v).__name__,
}


class _SkipConnection(ModuleBase):
    """Convolution, activation, normalisation, convolution, normalisation; then the sum."""

    epsilon: float
    momentum: float
    act_fn: Any
    conv1: Conv2D
    conv2: Conv2D
    batchnorm1: BatchNorm2D
    batchnorm2: BatchNorm2D
    add3: Add

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: _SKIP_CHECKS[name](value) for name, value in values.items()}

    def _norm(self) -> BatchNorm2D:
        made: BatchNorm2D = self._ready(BatchNorm2D(self.momentum, self.epsilon))
        return made

    def _main(self, X: Array, retain: bool) -> Array:
        """Return the result of the way through the convolutions."""
        self.conv1._checked("X", X, self.conv1.device or self._wanted_device)
        self.output_shape(tuple(X.shape))
        self._complete(tuple(X.shape))
        first = self.conv1.forward(X, retain)
        outs = {"conv1_out": first}
        outs["batchnorm1_out"] = self.batchnorm1.forward(first, retain)
        outs["conv2_out"] = self.conv2.forward(outs["batchnorm1_out"], retain)
        outs["batchnorm2_out"] = self.batchnorm2.forward(outs["conv2_out"], retain)
        if retain:
            self._dv.update(outs)
        return outs["batchnorm2_out"]

    def _main_grad(self, dLdy: list[Array], retain: bool, wanted: bool) -> list[Any]:
        """Return the gradients through the convolutions, for every retained pass."""
        d_conv2 = self._through(self.batchnorm2, dLdy, retain)
        d_bn1 = self._through(self.conv2, d_conv2, retain)
        d_conv1 = self._through(self.batchnorm1, d_bn1, retain)
        dX: list[Any] = self._through(self.conv1, d_conv1, retain, wanted)
        self._keep(Bn2=dLdy, Conv2=d_conv2, Bn1=d_bn1, Conv1=d_conv1)
        return dX

    def _keep(self, **gradients: list[Any]) -> None:
        """Put gradients among the derived variables, under numpy-ml's names."""
        for name, found in gradients.items():
            self._dv[f"dLd{name}"] = found[0] if len(found) == 1 else found


class SkipConnectionIdentityModule(_SkipConnection):
    """Two convolutions with normalisation, and the input added to their result [1]_.

    ``act_fn(X + norm(conv(norm(act_fn(conv(X))))))``; paddings are "same", so the result has the
    input's shape at any stride.

    Parameters
    ----------
    out_ch : int
        Kernels of the first convolution; the second has as many as the input has channels.
    kernel_shape1, kernel_shape2 : int or pair of int
        Of the convolutions.
    stride1, stride2 : int or pair of int
        Of the convolutions.
    act_fn : Activation, str or None
        None is linear.
    epsilon, momentum : float
        Of the normalisations.
    optimizer : Optimizer, str, dict or None
        Of the convolutions; the normalisations have SGD, as in numpy-ml.
    init : str
        See :func:`gpuconv.initializers.get_initializer`.
    rng, device
        See :class:`~gpuconv.layers.base.LayerBase`.

    Notes
    -----
    numpy-ml's fails in the second training step, after ``update``; this one does not.

    .. [1] He, Zhang, Ren, Sun: Deep residual learning for image recognition (2015).
    """

    _component_ids = ("conv1", "batchnorm1", "conv2", "batchnorm2", "add3")
    out_ch: int
    kernel_shape1: tuple[int, int]
    kernel_shape2: tuple[int, int]
    stride1: Any
    stride2: Any

    def __init__(
        self,
        out_ch: int,
        kernel_shape1: int | tuple[int, int],
        kernel_shape2: int | tuple[int, int],
        stride1: int | tuple[int, int] = 1,
        stride2: int | tuple[int, int] = 1,
        act_fn: Any = None,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        init: str = "glorot_uniform",
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        values = locals()
        given = {name: values[name] for name in self._arguments()}
        super().__init__(given, optimizer, rng, device)

    def _arguments(self) -> tuple[str, ...]:
        return (
            "out_ch", "kernel_shape1", "kernel_shape2", "stride1", "stride2", "act_fn", "epsilon",
            "momentum", "init",
        )  # fmt: skip

    def _make_components(self) -> None:
        self.conv1 = self._conv(self.out_ch, self.kernel_shape1, "same", self.stride1, self.act_fn)
        self.batchnorm1, self.batchnorm2 = self._norm(), self._norm()
        self.add3 = self._ready(Add(self.act_fn))

    def _complete(self, shape: Shape) -> None:
        super()._complete(shape)
        if not hasattr(self, "conv2"):
            self.conv2 = self._conv(shape[3], self.kernel_shape2, "same", self.stride2, LINEAR)

    def _own_hyperparameters(self) -> dict[str, Any]:
        return {
            "init": self.init,
            "in_ch": self.in_ch,
            "out_ch": self.out_ch,
            "epsilon": self.epsilon,
            "stride1": self.stride1,
            "stride2": self.stride2,
            "momentum": self.momentum,
            "optimizer": self.optimizer,
            "act_fn": str(self.act_fn),
            "kernel_shape1": self.kernel_shape1,
            "kernel_shape2": self.kernel_shape2,
        }

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``shape``, if the module takes such an input."""
        self.conv1.output_shape(shape)
        return shape

    def build(self, shape: Sequence[int], dtype: str = "float32") -> Shape:
        """Draw all parameters for an input of ``shape``."""
        inner = self.conv1.build(shape, dtype)
        self._complete(tuple(shape))
        self.batchnorm1.build(inner, dtype)
        out = self.batchnorm2.build(self.conv2.build(inner, dtype), dtype)
        return self.add3.build(out, dtype)

    def _forward(self, X: Array, retain: bool) -> Array:
        through = self._main(X, retain)
        return self.add3.forward([X, through], retain)

    def _backward(self, dLdy: list[Array], retain_grads: bool, input_grad: bool) -> list[Any]:
        pairs = self._through(self.add3, dLdy, retain_grads)
        through = self._main_grad([p[1] for p in pairs], retain_grads, input_grad)
        if not input_grad:
            return [None] * len(pairs)
        total = [around + dX for (around, _), dX in zip(pairs, through, strict=True)]
        self._keep(Add3_X=total)
        return total


class SkipConnectionConvModule(_SkipConnection):
    """Two convolutions with normalisation, and a third one of the input added to their result.

    ``act_fn(norm(conv_skip(X)) + norm(conv(norm(act_fn(conv(X))))))``; the padding of
    ``conv_skip`` is what gives it the size of the other summand [1]_.

    Parameters
    ----------
    out_ch1, out_ch2 : int
        Kernels of the first convolution; of the second and of the one around.
    kernel_shape1, kernel_shape2, kernel_shape_skip : int or pair of int
        Of the convolutions.
    pad1, pad2 : int, tuple or "same"
        Of the first two convolutions, as for :class:`~gpuconv.layers.Conv2D`.
    stride1, stride2, stride_skip : int or pair of int
        Of the convolutions.
    act_fn, epsilon, momentum, optimizer, init, rng, device
        See :class:`SkipConnectionIdentityModule`.

    Notes
    -----
    numpy-ml takes an integer or two of them as ``pad1`` and ``pad2`` alone, does not heed
    ``retain_grads``, and fails in the second training step.

    .. [1] He, Zhang, Ren, Sun: Deep residual learning for image recognition (2015).
    """

    _component_ids = (
        "add3", "conv1", "conv2", "conv_skip", "batchnorm1", "batchnorm2", "batchnorm_skip",
    )  # fmt: skip
    out_ch1: int
    out_ch2: int
    kernel_shape1: tuple[int, int]
    kernel_shape2: tuple[int, int]
    kernel_shape_skip: tuple[int, int]
    pad1: Any
    pad2: Any
    stride1: Any
    stride2: Any
    stride_skip: Any
    conv_skip: Conv2D
    batchnorm_skip: BatchNorm2D

    def __init__(
        self,
        out_ch1: int,
        out_ch2: int,
        kernel_shape1: int | tuple[int, int],
        kernel_shape2: int | tuple[int, int],
        kernel_shape_skip: int | tuple[int, int],
        pad1: int | tuple[int, ...] | str = 0,
        pad2: int | tuple[int, ...] | str = 0,
        stride1: int | tuple[int, int] = 1,
        stride2: int | tuple[int, int] = 1,
        act_fn: Any = None,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        stride_skip: int | tuple[int, int] = 1,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        init: str = "glorot_uniform",
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        values = locals()
        given = {name: values[name] for name in self._arguments()}
        super().__init__(given, optimizer, rng, device)

    def _arguments(self) -> tuple[str, ...]:
        return (
            "out_ch1", "out_ch2", "kernel_shape1", "kernel_shape2", "kernel_shape_skip", "pad1",
            "pad2", "stride1", "stride2", "act_fn", "epsilon", "momentum", "stride_skip", "init",
        )  # fmt: skip

    def _make_components(self) -> None:
        self.conv1 = self._conv(
            self.out_ch1, self.kernel_shape1, self.pad1, self.stride1, self.act_fn
        )
        self.conv2 = self._conv(self.out_ch2, self.kernel_shape2, self.pad2, self.stride2, LINEAR)
        self.batchnorm1, self.batchnorm2 = self._norm(), self._norm()
        self.batchnorm_skip = self._norm()
        self.add3 = self._ready(Add(self.act_fn))

    @property
    def pad_skip(self) -> Any:
        """Return the padding around the input of ``conv_skip``; None before the first input."""
        return self.conv_skip.pad if hasattr(self, "conv_skip") else None

    def _complete(self, shape: Shape) -> None:
        super()._complete(shape)
        if not hasattr(self, "conv_skip"):
            pad = self._skip_pads(shape)
            self.conv_skip = self._conv(
                self.out_ch2, self.kernel_shape_skip, pad, self.stride_skip, LINEAR
            )

    def _skip_pads(self, shape: Shape) -> tuple[int, ...]:
        out = self.conv2.output_shape(self.conv1.output_shape(shape))
        return _pads_between(shape[1:3], out[1:3], self.kernel_shape_skip, self.stride_skip)

    def _own_hyperparameters(self) -> dict[str, Any]:
        return {
            "init": self.init,
            "pad1": self.pad1,
            "pad2": self.pad2,
            "in_ch": self.in_ch,
            "out_ch1": self.out_ch1,
            "out_ch2": self.out_ch2,
            "epsilon": self.epsilon,
            "stride1": self.stride1,
            "stride2": self.stride2,
            "momentum": self.momentum,
            "act_fn": str(self.act_fn),
            "stride_skip": self.stride_skip,
            "kernel_shape1": self.kernel_shape1,
            "kernel_shape2": self.kernel_shape2,
            "kernel_shape_skip": self.kernel_shape_skip,
            "pad_skip": self.pad_skip,
        }

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the result for an input of ``shape``."""
        out = self.conv2.output_shape(self.conv1.output_shape(shape))
        around = self.conv_skip.output_shape(shape)[1:3] if hasattr(self, "conv_skip") else out[1:3]
        if around != out[1:3]:
            raise ValueError(
                f"X has shape {shape}; expected one for which pad_skip, {self.pad_skip}, gives "
                f"conv_skip {out[1:3]} cells, as the other convolutions have"
            )
        self._skip_pads(shape)  # raises where there are none
        return out

    def build(self, shape: Sequence[int], dtype: str = "float32") -> Shape:
        """Draw all parameters for an input of ``shape``."""
        self._complete(tuple(shape))
        inner = self.conv1.build(shape, dtype)
        self.batchnorm1.build(inner, dtype)
        out = self.batchnorm2.build(self.conv2.build(inner, dtype), dtype)
        self.batchnorm_skip.build(self.conv_skip.build(shape, dtype), dtype)
        return self.add3.build(out, dtype)

    def _forward(self, X: Array, retain: bool) -> Array:
        through = self._main(X, retain)
        around = self.conv_skip.forward(X, retain)
        normed = self.batchnorm_skip.forward(around, retain)
        if retain:
            self._dv.update(conv_skip_out=around, batchnorm_skip_out=normed)
        return self.add3.forward([normed, through], retain)

    def _backward(self, dLdy: list[Array], retain_grads: bool, input_grad: bool) -> list[Any]:
        pairs = self._through(self.add3, dLdy, retain_grads)
        d_skip = self._through(self.batchnorm_skip, [p[0] for p in pairs], retain_grads)
        around = self._through(self.conv_skip, d_skip, retain_grads, input_grad)
        through = self._main_grad([p[1] for p in pairs], retain_grads, input_grad)
        if not input_grad:
            return [None] * len(pairs)
        total = [a + b for a, b in zip(around, through, strict=True)]
        self._keep(Add3_X=total, BnSkip=[p[0] for p in pairs], ConvSkip=d_skip)
        return total


def _pads_between(size: Shape, wanted: Shape, kernel: Shape, stride: Any) -> tuple[int, ...]:
    """Return (top, bottom, left, right) that give a convolution an output of the wanted size."""
    found: list[int] = []
    for n, out, k, s in zip(size, wanted, kernel, pair("stride_skip", stride, 1), strict=True):
        each = max(s * (out - 1) + k - n, 0) // 2
        reached = (n + 2 * each - k) // s + 1
        if not out - 1 <= reached <= out:
            raise ValueError(
                f"stride_skip is {stride}; with kernel_shape_skip {kernel} no padding makes "
                f"{out} cells of {n}, as the other convolutions do"
            )
        found += [each, each + (out - reached)]
    return tuple(found)
