"""Modules that are made of layers: what they share."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from gpuconv.device import Device, parse_device
from gpuconv.initializers import Rng, generator
from gpuconv.layers.conv import Conv2D
from gpuconv.layers.interface import Array, Layer, Shape
from gpuconv.optimizers import Optimizer, get_optimizer

__all__ = ["ModuleBase"]


class ModuleBase(Layer):
    """What modules share: their components, which are layers, in the order of the forward pass.

    Attributes
    ----------
    X : list of ndarray
        The inputs of the forward passes since the last update.
    parameters, gradients : dict
        ``{"components": {name: the component's}}``.
    derived_variables : dict
        The results of the components in the last retained pass, and the components' own under
        ``components``.
    trainable : bool
        False while frozen.
    """

    #: Names of the components, in the order in which numpy-ml lists them.
    _component_ids: ClassVar[tuple[str, ...]]
    trainable: bool

    def __init__(
        self,
        given: dict[str, Any],
        optimizer: Optimizer | str | Mapping[str, Any] | None,
        rng: Rng,
        device: Device | str | None,
    ) -> None:
        self.trainable = True
        self.X: list[Array] = []
        self.in_ch: int | None = None
        self.optimizer = optimizer
        self._made = get_optimizer(optimizer)
        self._rng = None if rng is None else generator(rng)
        self._wanted_device = None if device is None else parse_device(device)
        self._dv: dict[str, Any] = {}
        for name, value in self._settings(given).items():
            setattr(self, name, value)
        self._make_components()

    @abc.abstractmethod
    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return checked arguments; raise where one is not allowed."""

    @abc.abstractmethod
    def _make_components(self) -> None:
        """Set the components that do not depend on the input."""

    @abc.abstractmethod
    def _own_hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters without the components'."""

    @abc.abstractmethod
    def _arguments(self) -> tuple[str, ...]:
        """Return the names of what the constructor takes, the optimizer apart."""

    def _complete(self, shape: Shape) -> None:
        """Make the components that depend on the input's shape."""
        self.in_ch = shape[3]

    def _ready(self, layer: Any) -> Any:
        """Return a new component with the module's device and source of first weights."""
        if self._rng is not None:
            layer.use_rng(self._rng)
        if self._wanted_device is not None:
            layer.use_device(self._wanted_device)
        return layer

    def _conv(self, out_ch: int, shape: Any, pad: Any, stride: Any, act_fn: Any) -> Conv2D:
        made: Conv2D = self._ready(
            Conv2D(out_ch, shape, pad, stride, act_fn=act_fn, optimizer=self._made, init=self.init)
        )
        return made

    init: str

    # ------------------------------------------------------------- what a module says of itself

    @property
    def components(self) -> list[Any]:
        """Return the components that there are."""
        return [getattr(self, c) for c in self._component_ids if hasattr(self, c)]

    @property
    def layers(self) -> list[Any]:
        """Return the components, under the name that a network has for its layers."""
        return self.components

    @property
    def device(self) -> Device | None:
        """Return where the parameters are; None before the first input."""
        found: Device | None = self.components[0].device
        return found

    @property
    def dtype(self) -> str | None:
        """Return the first input's dtype; None before."""
        found: str | None = self.components[0].dtype
        return found

    def _each(self, what: str) -> dict[str, Any]:
        """Return an attribute of every component by name; None for one not yet made."""
        return {
            name: getattr(getattr(self, name), what) if hasattr(self, name) else None
            for name in sorted(self._component_ids)
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the components' parameters."""
        return {"components": self._each("parameters")}

    @property
    def gradients(self) -> dict[str, Any]:
        """Return the components' gradients."""
        return {"components": self._each("gradients")}

    @property
    def derived_variables(self) -> dict[str, Any]:
        """Return what the components have worked out."""
        outs = {f"{c}_out": None for c in self._component_ids if not c.startswith("add")}
        return {**outs, "components": self._each("derived_variables"), **self._dv}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the module."""
        return {
            "layer": type(self).__name__,
            **self._own_hyperparameters(),
            "component_ids": list(self._component_ids),
            "components": self._each("hyperparameters"),
        }

    def config(self) -> dict[str, Any]:
        """Return what makes the module anew, without weights and optimizer."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self._arguments()}
        return {"layer": type(self).__name__, **values, "act_fn": str(values["act_fn"])}

    def leaves(self) -> list[tuple[str, Layer]]:
        """Return the components by name."""
        return [(name, getattr(self, name)) for name in self._component_ids if hasattr(self, name)]

    def dropouts(self) -> list[Any]:
        """Return those of the components."""
        return [found for _, component in self.leaves() for found in component.dropouts()]

    def summary(self) -> dict[str, Any]:
        """Return the module's name, its parameters and its hyperparameters."""
        return {
            "layer": type(self).__name__,
            "parameters": self.parameters,
            "hyperparameters": self.hyperparameters,
        }

    def set_params(self, summary_dict: Mapping[str, Any]) -> ModuleBase:
        """Take over what :meth:`summary` returned, or a part, and return the module.

        Raises
        ------
        TypeError, ValueError
            If a value is not allowed; nothing is changed then.
        """
        if not isinstance(summary_dict, Mapping):
            raise TypeError(
                f"summary_dict is a {type(summary_dict).__name__}; expected a dict as summary() "
                "returns it"
            )
        parameters = summary_dict.get("parameters", {})
        values = {**summary_dict, **summary_dict.get("hyperparameters", {})}
        name = values.get("layer", type(self).__name__)
        if name != type(self).__name__:
            raise ValueError(f"layer is {name!r}; expected {type(self).__name__!r}")
        settings = self._settings({k: values[k] for k in self._arguments() if k in values})
        fresh = copy.deepcopy(self)
        for key, value in settings.items():
            setattr(fresh, key, value)
        fresh.in_ch = values.get("in_ch", self.in_ch)
        made, weights = values.get("components") or {}, parameters.get("components") or {}
        for c in self._component_ids:
            part = {
                "parameters": weights.get(c) or {},
                "hyperparameters": made.get(c) or {},
            }
            if not (part["parameters"] or part["hyperparameters"]):
                continue
            if not hasattr(fresh, c):
                fresh._make_late(c, part["hyperparameters"])
            getattr(fresh, c).set_params(part)
        fresh.discard()
        self.__dict__.update(fresh.__dict__)
        return self

    def _make_late(self, name: str, hyperparameters: Mapping[str, Any]) -> None:
        """Make a component whose summary is known and whose input is not."""
        setattr(self, name, self._ready(Conv2D(1, (1, 1))))

    # ------------------------------------------------------------------------------ the passes

    @abc.abstractmethod
    def _forward(self, X: Array, retain: bool) -> Array:
        """Return the output."""

    @abc.abstractmethod
    def _backward(self, dLdy: list[Array], retain_grads: bool, input_grad: bool) -> list[Any]:
        """Return the gradient with respect to every retained input."""

    def forward(self, X: Array, retain_derived: bool = True) -> Array:
        """Return the module's output.

        Parameters
        ----------
        X : ndarray
            ``(n_ex, in_rows, in_cols, in_ch)``.
        retain_derived : bool
            Whether :meth:`backward` will want this input's gradient; without it, the batch
            normalisations use their running statistics.

        Raises
        ------
        TypeError, ValueError
            If the module takes no such input.
        """
        Y = self._forward(X, retain_derived)
        if retain_derived:
            self.X.append(X)
        return Y

    def backpropagate(
        self, dLdy: Array | list[Array], retain_grads: bool, input_grad: bool = True
    ) -> Any:
        """Do :meth:`backward`'s work, frozen or not."""
        given = list(dLdy) if isinstance(dLdy, (list, tuple)) else [dLdy]
        found = self._backward(given, retain_grads, input_grad)
        return found[0] if len(found) == 1 else found

    def _through(self, layer: Layer, dLdy: list[Any], retain: bool, wanted: bool = True) -> Any:
        """Return the gradients of a component's inputs, always as a list."""
        found = layer.backpropagate(dLdy, retain, wanted)
        return [found] if len(dLdy) == 1 else found

    def update(self, cur_loss: float | None = None) -> None:
        """Update every component, then forget what was retained.

        Raises
        ------
        RuntimeError
            If the module is frozen.
        """
        self._check_trainable()
        for component in self.components:
            component.update(cur_loss)
        self.discard()

    def discard(self) -> None:
        """Forget what was retained, in the components too."""
        self.X, self._dv = [], {}
        for component in self.components:
            component.discard()

    def freeze(self) -> None:
        """Freeze every component."""
        self.trainable = False
        for component in self.components:
            component.freeze()

    def unfreeze(self) -> None:
        """Unfreeze every component."""
        self.trainable = True
        for component in self.components:
            component.unfreeze()

    def use_rng(self, rng: Rng) -> None:
        """Draw the first weights, if they are not drawn yet, from this generator."""
        self._rng = generator(rng)
        for component in self.components:
            component.use_rng(self._rng)

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Train every component, also those made later, with a fresh optimizer of this kind."""
        self.optimizer, self._made = str(optimizer), optimizer.fresh()
        for component in self.components:
            component.use_optimizer(optimizer)

    def use_device(self, device: Device | str) -> None:
        """Compute on this device."""
        self._wanted_device = parse_device(device)
        for component in self.components:
            component.use_device(self._wanted_device)
