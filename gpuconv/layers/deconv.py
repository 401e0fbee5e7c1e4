"""The transposed convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gpuconv.functional as F
from gpuconv.activations import Activation, Identity
from gpuconv.arguments import integer, pair
from gpuconv.device import Device, namespace
from gpuconv.initializers import Rng, get_initializer
from gpuconv.layers.base import Array, LayerBase, Shape, activation_of
from gpuconv.layers.conv import Pads, checked_pad, padding_of, plain
from gpuconv.optimizers import Optimizer

__all__ = ["Deconv2D"]


class Deconv2D(LayerBase):
    """A transposed convolution: ``act_fn(Z + b)``, ``Z`` spreading every cell of ``X`` by ``W``.

    Parameters
    ----------
    out_ch : int
        Number of output channels.
    kernel_shape : int or pair of int
        Rows and columns of a kernel.
    pad : int, tuple or "same"
        Rows and columns cut off the result: on every side; ``(rows, columns)``; ``(top, bottom,
        left, right)``; ``"same"`` leaves ``stride * (in - 1) + 1``, an odd one cut at the start.
    stride : int or pair of int
        Cells between the places where neighbouring cells of ``X`` are spread to.
    act_fn : Activation, str or None
        Such as ``"ReLU"``.
    optimizer : Optimizer, str, dict or None
        See :func:`gpuconv.optimizers.get_optimizer`.
    init : str
        See :func:`gpuconv.initializers.get_initializer`.
    rng, device
        See :class:`~gpuconv.layers.base.LayerBase`.

    Attributes
    ----------
    parameters : dict
        ``W`` of shape ``(rows, columns, in_ch, out_ch)`` and ``b`` of ``(1, 1, 1, out_ch)``.
    derived_variables : dict
        Of each retained forward pass: ``Z``, what goes into ``act_fn``, ``out_rows`` and
        ``out_cols``.

    Notes
    -----
    It is the gradient of a convolution with respect to its input (Dumoulin and Visin, A guide
    to convolution arithmetic for deep learning, 2016). numpy-ml cuts sides with unequal ``pad``
    evenly, by half of their sum, and fails where one is larger than the kernel; here each side
    is cut as it says.
    """

    act_fn: Activation
    in_ch: int | None
    out_ch: int
    kernel_shape: tuple[int, int]
    pad: Any
    stride: Any
    init: str
    _derived_settings = frozenset({"in_ch"})

    def __init__(
        self,
        out_ch: int,
        kernel_shape: int | tuple[int, int],
        pad: int | tuple[int, ...] | str = 0,
        stride: int | tuple[int, int] = 1,
        act_fn: Activation | str | None = None,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        init: str = "glorot_uniform",
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        super().__init__(optimizer, rng=rng, device=device)
        self.in_ch = None
        given = {
            "out_ch": out_ch,
            "kernel_shape": kernel_shape,
            "pad": pad,
            "stride": stride,
            "act_fn": act_fn,
            "init": init,
        }
        for name, value in self._settings(given).items():
            setattr(self, name, value)

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "out_ch": lambda v: integer("out_ch", v, 1),
            "in_ch": lambda v: None if v is None else integer("in_ch", v, 1),
            "kernel_shape": lambda v: pair("kernel_shape", v, 1),
            "pad": checked_pad,
            "stride": lambda v: plain("stride", v, 1),
            "act_fn": activation_of,
            "init": lambda v: get_initializer(v).__name__,
        }
        return {name: checks[name](value) for name, value in values.items()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "Deconv2D",
            "pad": self.pad,
            "init": self.init,
            "in_ch": self.in_ch,
            "out_ch": self.out_ch,
            "stride": self.stride,
            "act_fn": str(self.act_fn),
            "kernel_shape": self.kernel_shape,
            "optimizer": self._optimizer_summary(),
        }

    def _no_derived(self) -> dict[str, Any]:
        self._outputs: list[Array] = []
        return {"Z": [], "out_rows": [], "out_cols": []}

    def _cuts(self, shape: Shape) -> Pads:
        """Return what is cut off, per axis; by ``"same"`` it does not depend on the input."""
        if self.pad == "same":
            (a, b), (c, d) = padding_of("same", (1, 1), self.kernel_shape, (1, 1))
            return (b, a), (d, c)  # the odd one at the start
        return padding_of(self.pad, shape[1:3], self.kernel_shape, (1, 1))

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``(n_ex, out_rows, out_cols, out_ch)`` for an input of ``shape``."""
        if len(shape) != 4:
            raise ValueError(f"X has shape {shape}; expected (n_ex, in_rows, in_cols, in_ch)")
        if min(shape[1:]) < 1:
            raise ValueError(f"X has shape {shape}; expected rows, columns and channels")
        if self.in_ch is not None and shape[3] != self.in_ch:
            raise ValueError(f"X has {shape[3]} channels; expected {self.in_ch}")
        stride = pair("stride", self.stride, 1)
        sizes = [
            s * (n - 1) + k - sum(cut)
            for n, k, s, cut in zip(
                shape[1:3], self.kernel_shape, stride, self._cuts(shape), strict=True
            )
        ]
        if min(sizes) < 1:
            raise ValueError(f"X has shape {shape}; pad {self.pad!r} cuts off all of the output")
        return (shape[0], sizes[0], sizes[1], self.out_ch)

    def _init_params(self, shape: Shape) -> None:
        self.in_ch = shape[3]
        weights = self._drawn(self.init, (*self.kernel_shape, shape[3], self.out_ch))
        self.parameters = {"W": weights, "b": self._zeros((1, 1, 1, self.out_ch))}

    def _transposed(self, shape: Shape) -> tuple[Array, dict[str, Any]]:
        """Return weights and options of the convolution that this is the gradient of."""
        stride = pair("stride", self.stride, 1)
        weights = self.parameters["W"].transpose(0, 1, 3, 2)
        return weights, {"stride": stride, "padding": self._cuts(shape)}

    def _forward(self, X: Array, retain: bool) -> Array:
        weights, options = self._transposed(X.shape)
        # Of the convolution's input the shape alone matters: one value stands for all.
        xp, shape = namespace(X), self.output_shape(tuple(X.shape))
        like = xp.broadcast_to(X.reshape(-1)[:1], shape) if X.size else xp.zeros(shape, X.dtype)
        Z, _, _ = F.conv2d_backward(X, like, weights, needs=("x",), **options)
        Z += self.parameters["b"]
        Y = Z if isinstance(self.act_fn, Identity) else self.act_fn.fn(Z)
        if retain:
            self._outputs.append(Y)
            self.derived_variables["Z"].append(Z)
            self.derived_variables["out_rows"].append(Y.shape[1])
            self.derived_variables["out_cols"].append(Y.shape[2])
        return Y

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        X = self.X[index]
        weights, options = self._transposed(X.shape)
        if isinstance(self.act_fn, Identity):
            dZ = dy
        elif self.act_fn.invertible:
            dZ = self.act_fn.backward(dy, y=self._outputs[index])
        else:
            dZ = self.act_fn.backward(dy, self.derived_variables["Z"][index])
        dX = F.conv2d(dZ, weights, **options) if input_grad else None
        if not needs_params:
            return dX, {}
        _, dw, _ = F.conv2d_backward(X, dZ, weights, needs=("w",), **options)
        assert dw is not None
        return dX, {"W": dw.transpose(0, 1, 3, 2), "b": dZ.sum(axis=(0, 1, 2))}

    def _parameter_names(self) -> tuple[str, ...]:
        return ("W", "b")

    def _parameter_shape(
        self, name: str, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> Shape | None:
        if name == "b":
            return (1, 1, 1, known["out_ch"])
        in_ch = known["in_ch"]
        if in_ch is None:
            in_ch = parameters["W"].shape[2] if parameters["W"].ndim == 4 else "in_ch"
        return (*known["kernel_shape"], in_ch, known["out_ch"])

    def _follow_parameters(self) -> None:
        self.in_ch = int(self.parameters["W"].shape[2])
