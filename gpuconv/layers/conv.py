"""The convolutional layers, in one and two dimensions."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from functools import partial
from typing import Any

import gpuconv.functional as F
from gpuconv.activations import Activation, Identity
from gpuconv.arguments import integer, pair
from gpuconv.device import Device
from gpuconv.dispatch import engine
from gpuconv.initializers import Rng, get_initializer
from gpuconv.layers.base import Array, LayerBase, Lazy, Shape, activation_of
from gpuconv.optimizers import Optimizer

__all__ = ["Conv1D", "Conv2D", "checked_pad", "padding_of", "plain"]

Pads = tuple[tuple[int, int], tuple[int, int]]


def checked_pad(pad: Any) -> Any:
    """Return numpy-ml's ``pad`` with lists as tuples, if it is one.

    Raises
    ------
    TypeError, ValueError
        If it is neither an integer, nor 2 or 4 of them, nor ``"same"``.
    """
    expected = (
        "a non-negative integer, 2 (rows, columns) or 4 (top, bottom, left, right) of them, "
        "or 'same'"
    )
    if isinstance(pad, str):
        if pad != "same":
            raise ValueError(f"pad is {pad!r}; expected {expected}")
        return pad
    if isinstance(pad, (tuple, list)):
        if len(pad) not in (2, 4):
            raise ValueError(f"pad is {pad!r}; expected {expected}")
        return tuple(integer("pad", p, 0, expected) for p in pad)
    return integer("pad", pad, 0, expected)


def padding_of(pad: Any, size: Shape, window: Shape, stride: Shape) -> Pads:
    """Return the zeros before and after, per axis, that numpy-ml's ``pad`` stands for.

    ``"same"`` makes the output as large as the input at any stride; an odd zero goes to the end.
    """
    if pad == "same":
        totals = [s * (n - 1) + w - n for n, w, s in zip(size, window, stride, strict=True)]
        rows, columns = ((t // 2, t - t // 2) for t in totals)
        return rows, columns
    if isinstance(pad, int):
        return (pad, pad), (pad, pad)
    if len(pad) == 2:
        return (pad[0], pad[0]), (pad[1], pad[1])
    return (pad[0], pad[1]), (pad[2], pad[3])


class _Convolution(LayerBase):
    """What the convolutions share; those of one axis compute with a second one of one cell."""

    act_fn: Activation
    in_ch: int | None
    _derived_settings = frozenset({"in_ch"})

    def __init__(
        self,
        given: dict[str, Any],
        optimizer: Optimizer | str | Mapping[str, Any] | None,
        rng: Rng,
        device: Device | str | None,
    ) -> None:
        super().__init__(optimizer, rng=rng, device=device)
        self.in_ch = None
        for name, value in self._settings(given).items():
            setattr(self, name, value)
        self._outputs: list[Array] = []

    def _no_derived(self) -> dict[str, Any]:
        self._outputs = []
        return {"Z": Lazy(), "out_rows": [], "out_cols": []}

    @abc.abstractmethod
    def _geometry(self, shape: Shape) -> tuple[Shape, Shape, Pads]:
        """Return stride, dilation (1 is dense) and padding of both axes for an input of ``shape``."""

    def _planes(self, a: Array) -> Array:
        """Return images or their gradients with two spatial axes."""
        return a

    def _kernels(self) -> Array:
        """Return the weights with two spatial axes."""
        return self.parameters["W"]

    def _forward(self, X: Array, retain: bool) -> Array:
        def convolve(activation: Activation | None) -> Array:
            made = F.conv2d(self._planes(X), weights, bias, activation=activation, **options)
            return made.reshape(shape)

        weights, bias = self._kernels(), self.parameters["b"].reshape(-1)
        stride, dilation, padding = self._geometry(X.shape)
        options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding}
        shape = self.output_shape(tuple(X.shape))
        Z: Any
        if not retain or self.act_fn.invertible:
            # The activation is fused; what goes into it is seldom looked at, and made then.
            Y = convolve(self.act_fn)
            Z = Y if isinstance(self.act_fn, Identity) else partial(convolve, None)
        else:
            Z = convolve(None)
            Y = self.act_fn.fn(Z)
        if retain:
            self._outputs.append(Y)
            self.derived_variables["Z"].append(Z)
            self.derived_variables["out_rows"].append(Y.shape[1])
            self.derived_variables["out_cols"].append(Y.shape[2])
        return Y

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        X, Y = self.X[index], self._outputs[index]
        stride, dilation, padding = self._geometry(X.shape)
        activation: Activation | None = self.act_fn
        if not self.act_fn.invertible:
            dy = self.act_fn.backward(dy, self.derived_variables["Z"][index])
            activation = None
        dx, dw, db = F.conv2d_backward(
            self._planes(dy),
            self._planes(X),
            self._kernels(),
            y=None if activation is None else self._planes(Y),
            activation=activation,
            stride=stride,
            dilation=dilation,
            padding=padding,
            needs=("x",) * input_grad + ("w", "b") * needs_params,
        )
        if dx is not None:
            dx = dx.reshape(X.shape)
        return dx, {} if dw is None or db is None else {"W": dw, "b": db}

    def _backward_naive(
        self, dLdy: Array | list[Array], retain_grads: bool = True
    ) -> Array | list[Array]:
        """Return what :meth:`backward` returns, computed by the loops.

        On the CPU by the engine ``naive``; on a GPU by ``cuda_atomic``, which has a thread in
        the place of each iteration.
        """
        self._check_trainable()
        on_gpu = self.device is not None and self.device.kind == "cuda"
        with engine("cuda_atomic" if on_gpu else "naive"):
            return self.backpropagate(dLdy, retain_grads)

    def _parameter_names(self) -> tuple[str, ...]:
        return ("W", "b")

    def _follow_parameters(self) -> None:
        self.in_ch = int(self.parameters["W"].shape[-2])


class Conv2D(_Convolution):
    """A two-dimensional convolution: ``act_fn(conv(X, W) + b)``.

    Parameters
    ----------
    out_ch : int
        Number of kernels.
    kernel_shape : int or pair of int
        Rows and columns of a kernel.
    pad : int, tuple or "same"
        Zeros around the input: on every side; ``(rows, columns)``; ``(top, bottom, left,
        right)``; or as many as make the output as large as the input, at any stride.
    stride : int or pair of int
        Step of the window.
    dilation : int or pair of int
        Zeros *inserted* between neighbouring taps; 0 is a dense kernel.
    act_fn : Activation, str or None
        Such as ``"ReLU"`` or ``"LeakyReLU(alpha=0.1)"``.
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
        Of each retained forward pass: ``Z``, what goes into ``act_fn`` (computed when it is
        looked at), ``out_rows`` and ``out_cols``.
    """

    out_ch: int
    kernel_shape: tuple[int, int]
    pad: Any
    stride: Any
    dilation: Any
    init: str

    def __init__(
        self,
        out_ch: int,
        kernel_shape: int | tuple[int, int],
        pad: int | tuple[int, ...] | str = 0,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 0,
        act_fn: Activation | str | None = None,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        init: str = "glorot_uniform",
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        given = {
            "out_ch": out_ch,
            "kernel_shape": kernel_shape,
            "pad": pad,
            "stride": stride,
            "dilation": dilation,
            "act_fn": act_fn,
            "init": init,
        }
        super().__init__(given, optimizer, rng, device)

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "out_ch": lambda v: integer("out_ch", v, 1),
            "in_ch": lambda v: None if v is None else integer("in_ch", v, 1),
            "kernel_shape": lambda v: pair("kernel_shape", v, 1),
            "pad": checked_pad,
            "stride": lambda v: plain("stride", v, 1),
            "dilation": lambda v: plain("dilation", v, 0),
            "act_fn": activation_of,
            "init": lambda v: get_initializer(v).__name__,
        }
        return {name: checks[name](value) for name, value in values.items()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "Conv2D",
            "pad": self.pad,
            "init": self.init,
            "in_ch": self.in_ch,
            "out_ch": self.out_ch,
            "stride": self.stride,
            "dilation": self.dilation,
            "act_fn": str(self.act_fn),
            "kernel_shape": self.kernel_shape,
            "optimizer": self._optimizer_summary(),
        }

    def _geometry(self, shape: Shape) -> tuple[Shape, Shape, Pads]:
        """Return stride, dilation (1 is dense) and padding for an input of ``shape``."""
        stride = pair("stride", self.stride, 1)
        dilation = tuple(d + 1 for d in pair("dilation", self.dilation, 0))
        window = tuple(d * (k - 1) + 1 for d, k in zip(dilation, self.kernel_shape, strict=True))
        return stride, dilation, padding_of(self.pad, shape[1:3], window, stride)

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``(n_ex, out_rows, out_cols, out_ch)`` for an input of ``shape``."""
        if len(shape) != 4:
            raise ValueError(f"X has shape {shape}; expected (n_ex, in_rows, in_cols, in_ch)")
        if min(shape[1:]) < 1:
            raise ValueError(f"X has shape {shape}; expected rows, columns and channels")
        if self.in_ch is not None and shape[3] != self.in_ch:
            raise ValueError(f"X has {shape[3]} channels; expected {self.in_ch}")
        stride, dilation, pads = self._geometry(shape)
        sizes = []
        for n, k, s, d, (before, after) in zip(
            shape[1:3], self.kernel_shape, stride, dilation, pads, strict=True
        ):
            room = n + before + after - (d * (k - 1) + 1)
            if room < 0:
                raise ValueError(
                    f"X has shape {shape}, padded by {pads}; expected at least the kernel, "
                    f"{self.kernel_shape} with {self.dilation} zeros between its taps"
                )
            sizes.append(room // s + 1)
        return (shape[0], sizes[0], sizes[1], self.out_ch)

    def _init_params(self, shape: Shape) -> None:
        self.in_ch = shape[3]
        weights = self._drawn(self.init, (*self.kernel_shape, shape[3], self.out_ch))
        self.parameters = {"W": weights, "b": self._zeros((1, 1, 1, self.out_ch))}

    def _parameter_shape(
        self, name: str, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> Shape | None:
        if name == "b":
            return (1, 1, 1, known["out_ch"])
        in_ch = known["in_ch"]
        if in_ch is None:
            in_ch = parameters["W"].shape[2] if parameters["W"].ndim == 4 else "in_ch"
        return (*known["kernel_shape"], in_ch, known["out_ch"])


class Conv1D(_Convolution):
    """A one-dimensional convolution: ``act_fn(conv(X, W) + b)``.

    Parameters
    ----------
    out_ch : int
        Number of kernels.
    kernel_width : int
        Taps of a kernel.
    pad : int, tuple, "same" or "causal"
        Zeros around the input: on both sides; ``(left, right)``; or as many as make the output
        as long as the input, at any stride, an odd one on the right; ``"causal"`` puts all of
        them on the left, so that no output depends on later inputs.
    stride : int
        Step of the window.
    dilation : int
        Zeros *inserted* between neighbouring taps; 0 is a dense kernel.
    act_fn : Activation, str or None
        Such as ``"ReLU"``.
    init : str
        See :func:`gpuconv.initializers.get_initializer`.
    optimizer : Optimizer, str, dict or None
        See :func:`gpuconv.optimizers.get_optimizer`.
    rng, device
        See :class:`~gpuconv.layers.base.LayerBase`.

    Attributes
    ----------
    parameters : dict
        ``W`` of shape ``(kernel_width, in_ch, out_ch)`` and ``b`` of ``(1, 1, out_ch)``.
    derived_variables : dict
        Of each retained forward pass: ``Z``, what goes into ``act_fn`` (computed when it is
        looked at), and the last two axes of its shape as ``out_rows`` and ``out_cols``: the
        output's length and channels, as numpy-ml has them.
    """

    out_ch: int
    kernel_width: int
    pad: Any
    stride: int
    dilation: int
    init: str

    def __init__(
        self,
        out_ch: int,
        kernel_width: int,
        pad: int | tuple[int, int] | str = 0,
        stride: int = 1,
        dilation: int = 0,
        act_fn: Activation | str | None = None,
        init: str = "glorot_uniform",
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        given = {
            "out_ch": out_ch,
            "kernel_width": kernel_width,
            "pad": pad,
            "stride": stride,
            "dilation": dilation,
            "act_fn": act_fn,
            "init": init,
        }
        super().__init__(given, optimizer, rng, device)

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "out_ch": lambda v: integer("out_ch", v, 1),
            "in_ch": lambda v: None if v is None else integer("in_ch", v, 1),
            "kernel_width": lambda v: integer("kernel_width", v, 1),
            "pad": _line_pad,
            "stride": lambda v: integer("stride", v, 1),
            "dilation": lambda v: integer("dilation", v, 0),
            "act_fn": activation_of,
            "init": lambda v: get_initializer(v).__name__,
        }
        return {name: checks[name](value) for name, value in values.items()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "Conv1D",
            "pad": self.pad,
            "init": self.init,
            "in_ch": self.in_ch,
            "out_ch": self.out_ch,
            "stride": self.stride,
            "dilation": self.dilation,
            "act_fn": str(self.act_fn),
            "kernel_width": self.kernel_width,
            "optimizer": self._optimizer_summary(),
        }

    @property
    def _window(self) -> int:
        return (self.dilation + 1) * (self.kernel_width - 1) + 1

    def _ends(self, length: int) -> tuple[int, int]:
        """Return the zeros before and after an input of this length."""
        if isinstance(self.pad, str):
            total = self.stride * (length - 1) + self._window - length
            return (total, 0) if self.pad == "causal" else (total // 2, total - total // 2)
        return (self.pad, self.pad) if isinstance(self.pad, int) else self.pad

    def _geometry(self, shape: Shape) -> tuple[Shape, Shape, Pads]:
        return (1, self.stride), (1, self.dilation + 1), ((0, 0), self._ends(shape[1]))

    def _planes(self, a: Array) -> Array:
        return a[:, None]

    def _kernels(self) -> Array:
        return self.parameters["W"][None]

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``(n_ex, l_out, out_ch)`` for an input of ``shape``."""
        if len(shape) != 3:
            raise ValueError(f"X has shape {shape}; expected (n_ex, l_in, in_ch)")
        if min(shape[1:]) < 1:
            raise ValueError(f"X has shape {shape}; expected a length and channels")
        if self.in_ch is not None and shape[2] != self.in_ch:
            raise ValueError(f"X has {shape[2]} channels; expected {self.in_ch}")
        ends = self._ends(shape[1])
        room = shape[1] + sum(ends) - self._window
        if room < 0:
            raise ValueError(
                f"X has shape {shape}, padded by {ends}; expected at least the kernel, "
                f"{self.kernel_width} with {self.dilation} zeros between its taps"
            )
        return (shape[0], room // self.stride + 1, self.out_ch)

    def _init_params(self, shape: Shape) -> None:
        self.in_ch = shape[2]
        weights = self._drawn(self.init, (self.kernel_width, shape[2], self.out_ch))
        self.parameters = {"W": weights, "b": self._zeros((1, 1, self.out_ch))}

    def _parameter_shape(
        self, name: str, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> Shape | None:
        if name == "b":
            return (1, 1, known["out_ch"])
        in_ch = known["in_ch"]
        if in_ch is None:
            in_ch = parameters["W"].shape[1] if parameters["W"].ndim == 3 else "in_ch"
        return (known["kernel_width"], in_ch, known["out_ch"])


def _line_pad(pad: Any) -> Any:
    """Return the ``pad`` of :class:`Conv1D`, if it is one."""
    expected = "a non-negative integer, 2 of them (left, right), 'same' or 'causal'"
    if isinstance(pad, str):
        if pad not in ("same", "causal"):
            raise ValueError(f"pad is {pad!r}; expected {expected}")
        return pad
    if isinstance(pad, (tuple, list)):
        if len(pad) != 2:
            raise ValueError(f"pad is {pad!r}; expected {expected}")
        return tuple(integer("pad", p, 0, expected) for p in pad)
    return integer("pad", pad, 0, expected)


def plain(name: str, value: Any, least: int) -> int | tuple[int, int]:
    """Return an integer of at least ``least``, or two as a tuple, as given."""
    both = pair(name, value, least)
    return both if isinstance(value, (tuple, list)) else both[0]
