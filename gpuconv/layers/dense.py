"""The fully connected layer, and what makes a matrix of its input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from gpuconv.activations import Activation, Identity
from gpuconv.arguments import integer
from gpuconv.device import Device
from gpuconv.initializers import Rng, get_initializer
from gpuconv.layers.base import Array, LayerBase, Lazy, Shape, activation_of
from gpuconv.optimizers import Optimizer
from gpuconv.products import column_sums, product

__all__ = ["Flatten", "FullyConnected"]


class FullyConnected(LayerBase):
    """A dense layer: ``act_fn(X @ W + b)``.

    Parameters
    ----------
    n_out : int
        Number of outputs.
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
        ``W`` of shape ``(n_in, n_out)`` and ``b`` of ``(1, n_out)``.
    derived_variables : dict
        Of each retained forward pass: ``Z``, what goes into ``act_fn`` (computed when it is
        looked at).
    """

    _derived_settings = frozenset({"n_in"})

    def __init__(
        self,
        n_out: int,
        act_fn: Activation | str | None = None,
        init: str = "glorot_uniform",
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        super().__init__(optimizer, rng=rng, device=device)
        self.act_fn: Activation
        self.n_in: int | None = None
        self.n_out: int
        self.init: str
        given = {"n_out": n_out, "act_fn": act_fn, "init": init}
        for name, value in self._settings(given).items():
            setattr(self, name, value)
        self._outputs: list[Array] = []

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "n_out": lambda v: integer("n_out", v, 1),
            "n_in": lambda v: None if v is None else integer("n_in", v, 1),
            "act_fn": activation_of,
            "init": lambda v: get_initializer(v).__name__,
        }
        return {name: checks[name](value) for name, value in values.items()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "FullyConnected",
            "init": self.init,
            "n_in": self.n_in,
            "n_out": self.n_out,
            "act_fn": str(self.act_fn),
            "optimizer": self._optimizer_summary(),
        }

    def _no_derived(self) -> dict[str, Any]:
        self._outputs = []
        return {"Z": Lazy()}

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``(n_ex, n_out)`` for an input of ``shape``."""
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"X has shape {shape}; expected (n_ex, n_in)")
        if self.n_in is not None and shape[1] != self.n_in:
            raise ValueError(f"X has {shape[1]} columns; expected {self.n_in}")
        return (shape[0], self.n_out)

    def _init_params(self, shape: Shape) -> None:
        self.n_in = shape[1]
        weights = self._drawn(self.init, (shape[1], self.n_out))
        self.parameters = {"W": weights, "b": self._zeros((1, self.n_out))}

    def _sums(self, X: Array, weights: Array, bias: Array) -> Array:
        Z = product(X, weights)
        Z += bias
        return Z

    def _forward(self, X: Array, retain: bool) -> Array:
        weights, bias = self.parameters["W"], self.parameters["b"]
        Z: Any = self._sums(X, weights, bias)
        if isinstance(self.act_fn, Identity):
            Y = Z
        elif not retain or self.act_fn.invertible:
            Y = self.act_fn.fn(Z, out=Z)
            Z = partial(self._sums, X, weights, bias)
        else:
            Y = self.act_fn.fn(Z)
        if retain:
            self._outputs.append(Y)
            self.derived_variables["Z"].append(Z)
        return Y

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        if isinstance(self.act_fn, Identity):
            dZ = dy
        elif self.act_fn.invertible:
            dZ = self.act_fn.backward(dy, y=self._outputs[index])
        else:
            dZ = self.act_fn.backward(dy, self.derived_variables["Z"][index])
        dX = product(dZ, self.parameters["W"].T) if input_grad else None
        if not needs_params:
            return dX, {}
        return dX, {"W": product(self.X[index].T, dZ), "b": column_sums(dZ)}

    def _parameter_names(self) -> tuple[str, ...]:
        return ("W", "b")

    def _parameter_shape(
        self, name: str, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> Shape | None:
        if name == "b":
            return (1, known["n_out"])
        n_in = known["n_in"]
        if n_in is None:
            n_in = parameters["W"].shape[0] if parameters["W"].ndim == 2 else "n_in"
        return (n_in, known["n_out"])

    def _follow_parameters(self) -> None:
        self.n_in = int(self.parameters["W"].shape[0])


class Flatten(LayerBase):
    """The same values as a matrix.

    Parameters
    ----------
    keep_dim : {"first", "last", -1}
        The axis that stays: ``(n, -1)`` for the first, ``(-1, n)`` for the last, ``(1, -1)``
        for none.
    optimizer, device
        As for every layer; there is nothing to train.
    """

    def __init__(
        self,
        keep_dim: str | int = "first",
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        device: Device | str | None = None,
    ) -> None:
        super().__init__(optimizer, device=device)
        self.keep_dim = self._settings({"keep_dim": keep_dim})["keep_dim"]

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        for value in values.values():
            if isinstance(value, bool) or value not in ("first", "last", -1):
                raise ValueError(f"keep_dim is {value!r}; expected 'first', 'last' or -1")
        return values

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "Flatten",
            "keep_dim": self.keep_dim,
            "optimizer": self._optimizer_summary(),
        }

    def _no_derived(self) -> dict[str, Any]:
        return {"in_dims": []}

    def output_shape(self, shape: Shape) -> Shape:
        """Return the matrix's shape for an input of ``shape``."""
        if not shape:
            raise ValueError("X has no axes; expected one or more")
        if self.keep_dim == -1:
            return (1, math.prod(shape))
        if self.keep_dim == "first":
            return (shape[0], math.prod(shape[1:]))
        return (math.prod(shape[:-1]), shape[-1])

    def _forward(self, X: Array, retain: bool) -> Array:
        if retain:
            self.derived_variables["in_dims"].append(tuple(X.shape))
        return X.reshape(self.output_shape(tuple(X.shape)))

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        return dy.reshape(self.derived_variables["in_dims"][index]), {}
