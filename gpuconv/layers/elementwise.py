"""Softmax, and the layers that take several inputs: their sum, their product."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from gpuconv.activations import Activation, Identity
from gpuconv.arguments import integer
from gpuconv.device import Device, asarray, namespace
from gpuconv.layers.base import Array, LayerBase, Shape, activation_of
from gpuconv.optimizers import Optimizer

__all__ = ["Add", "Multiply", "Softmax"]


class Softmax(LayerBase):
    """``exp(X)`` divided by its sum along an axis.

    Parameters
    ----------
    dim : int
        The axis; counted from the end if negative.
    optimizer, device
        As for every layer; there is nothing to train.

    Notes
    -----
    Any number of axes is taken. numpy-ml's gradient is right for ``dim=-1`` and matrices alone,
    and its summary leaves ``dim`` out; here it is one of the hyperparameters.
    """

    n_in: int | None
    dim: int
    _derived_settings = frozenset({"n_in", "n_out"})

    def __init__(
        self,
        dim: int = -1,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        device: Device | str | None = None,
    ) -> None:
        super().__init__(optimizer, device=device)
        self.n_in = None
        self.dim = self._settings({"dim": dim})["dim"]

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "dim": lambda v: integer("dim", v, -32),
            "n_in": lambda v: None if v is None else integer("n_in", v, 1),
        }
        return {name: checks[name](value) for name, value in values.items() if name in checks}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "SoftmaxLayer",
            "n_in": self.n_in,
            "n_out": self.n_in,
            "dim": self.dim,
            "optimizer": self._optimizer_summary(),
        }

    def _no_derived(self) -> dict[str, Any]:
        self._outputs: list[Array] = []
        return {}

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``shape``, if it has the axis."""
        if len(shape) < 2:
            raise ValueError(f"X has shape {shape}; expected (n_ex, n_in), or more axes")
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(f"X has shape {shape}; expected one with an axis {self.dim}")
        if shape[self.dim] < 1:
            raise ValueError(f"X has shape {shape}; expected values along the axis {self.dim}")
        return shape

    def _init_params(self, shape: Shape) -> None:
        self.n_in = shape[1]

    def _forward(self, X: Array, retain: bool) -> Array:
        xp = namespace(X)
        Y = xp.exp(X - X.max(axis=self.dim, keepdims=True))
        Y /= Y.sum(axis=self.dim, keepdims=True)
        if retain:
            self._outputs.append(Y)
        return Y

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        if not input_grad:
            return None, {}
        Y = self._outputs[index]
        dX = dy * Y
        dX -= Y * dX.sum(axis=self.dim, keepdims=True)
        return dX, {}


class _Merge(LayerBase):
    """A layer of several inputs of one shape; ``X`` holds a list of them for each pass."""

    act_fn: Activation

    def __init__(
        self,
        act_fn: Activation | str | None = None,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        device: Device | str | None = None,
    ) -> None:
        super().__init__(optimizer, device=device)
        self.act_fn = activation_of(act_fn)

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: activation_of(value) for name, value in values.items()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": self._label,
            "act_fn": str(self.act_fn),
            "optimizer": self._optimizer_summary(),
        }

    _label: str
    _derived: str

    def _no_derived(self) -> dict[str, Any]:
        return {self._derived: []}

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``shape``, that of every input."""
        if not shape:
            raise ValueError("X holds arrays without axes; expected (n_ex, ...)")
        return shape

    def _accepted(self, X: Any) -> list[Array]:
        if not isinstance(X, (list, tuple)):
            raise TypeError(f"X is a {type(X).__name__}; expected a list of arrays")
        if not X:
            raise ValueError("X is empty; expected a list of one or more arrays")
        place = self.device or self._wanted_device
        homes = []
        for k, x in enumerate(X):
            where, place = self._checked(f"X[{k}]", x, place)
            homes.append(where)
            if x.dtype != X[0].dtype:
                raise TypeError(f"X[{k}] has dtype {x.dtype}; expected {X[0].dtype}, as X[0]")
            if x.shape != X[0].shape:
                raise ValueError(f"X[{k}] has shape {x.shape}; expected {X[0].shape}, as X[0]")
        shape = self.output_shape(tuple(X[0].shape))
        assert place is not None
        if self.device is None:
            self._settle(shape, X[0].dtype.name, place)
        return [
            x if where == place else asarray(x, place) for x, where in zip(X, homes, strict=True)
        ]

    def _retained_shape(self, X: Any) -> Shape:
        return tuple(X[0].shape)

    @abc.abstractmethod
    def _combined(self, X: list[Array]) -> Array:
        """Return the inputs combined, in front of the activation."""

    def _forward(self, X: list[Array], retain: bool) -> Array:
        Z = self._combined(X)
        Y = Z if isinstance(self.act_fn, Identity) else self.act_fn.fn(Z)
        if retain:
            self.derived_variables[self._derived].append(Z)
        return Y

    def _before(self, dy: Array, index: int) -> Array:
        """Return the gradient in front of the activation; it may be ``dy`` itself."""
        if isinstance(self.act_fn, Identity):
            return dy
        return self.act_fn.backward(dy, self.derived_variables[self._derived][index])


class Add(_Merge):
    """The sum of several inputs: ``act_fn(X[0] + X[1] + ...)``.

    ``forward`` takes a list of arrays of one shape and dtype, and ``backward`` returns a list of
    as many gradients, each an array of its own.

    Parameters
    ----------
    act_fn : Activation, str or None
        Such as ``"ReLU"``.
    optimizer, device
        As for every layer; there is nothing to train.

    Attributes
    ----------
    derived_variables : dict
        Of each retained forward pass: ``sum``, what goes into ``act_fn``.
    """

    _label, _derived = "Sum", "sum"

    def _combined(self, X: list[Array]) -> Array:
        if len(X) == 1:
            return X[0].copy()
        total = X[0] + X[1]
        for x in X[2:]:
            total += x
        return total

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Any, dict[str, Array]]:
        if not input_grad:
            return None, {}
        dZ = self._before(dy, index)
        return [dZ.copy() for _ in self.X[index]], {}


class Multiply(_Merge):
    """The product of several inputs: ``act_fn(X[0] * X[1] * ...)``.

    ``forward`` takes a list of arrays of one shape and dtype, and ``backward`` returns a list of
    as many gradients.

    Parameters
    ----------
    act_fn : Activation, str or None
        Such as ``"ReLU"``.
    optimizer, device
        As for every layer; there is nothing to train.

    Attributes
    ----------
    derived_variables : dict
        Of each retained forward pass: ``product``, what goes into ``act_fn``.
    """

    _label, _derived = "Multiply", "product"

    def _combined(self, X: list[Array]) -> Array:
        product = X[0].copy() if len(X) == 1 else X[0] * X[1]
        for x in X[2:]:
            product *= x
        return product

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Any, dict[str, Array]]:
        if not input_grad:
            return None, {}
        X = self.X[index]
        # Products of what stands before and behind each: no division, so zeros do no harm.
        gradients, before = [], self._before(dy, index)
        for x in X:
            gradients.append(before)
            before = before * x
        behind = None
        for k in range(len(X) - 1, -1, -1):
            gradients[k] = gradients[k].copy() if behind is None else gradients[k] * behind
            behind = X[k] if behind is None else behind * X[k]
        return gradients, {}
