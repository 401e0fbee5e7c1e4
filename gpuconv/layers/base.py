"""What layers share: devices and dtypes, what is kept between the passes, and updates.

The contract is numpy-ml's: every :meth:`LayerBase.forward` that retains adds one entry to ``X``
and to each of ``derived_variables``; :meth:`LayerBase.backward` takes one gradient for each of
these and adds up the parameters' gradients; :meth:`LayerBase.update` lets the optimizer change
the parameters and forgets the rest.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.device import CPU, Device, asarray, device_of, namespace, parse_device
from gpuconv.device import device as default_device
from gpuconv.dtypes import known_dtype
from gpuconv.initializers import Rng, generator, get_initializer, glorot_gain
from gpuconv.layers.interface import Array, Layer, Shape
from gpuconv.optimizers import Optimizer, get_optimizer
from gpuconv.profiling import ranges

__all__ = ["Array", "LayerBase", "Lazy", "Shape", "activation_of"]

FLOATS = ("float16", "bfloat16", "float32", "float64")
_NAMES = {np.dtype(name): name for name in FLOATS if name != "bfloat16"}


def dtype_name(dtype: Any) -> str:
    """Return ``dtype.name``; of the usual ones without NumPy's work to make the text."""
    return _NAMES.get(dtype) or str(dtype.name)


class Lazy(Sequence[Array]):
    """A list of arrays of which each may be computed when it is first looked at."""

    def __init__(self) -> None:
        self._entries: list[Array | Callable[[], Array]] = []

    def append(self, entry: Array | Callable[[], Array]) -> None:
        """Add an array, or what returns one."""
        self._entries.append(entry)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        entry = self._entries[index]
        if callable(entry):
            entry = self._entries[index] = entry()
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Array]:
        return (self[k] for k in range(len(self)))


class LayerBase(Layer):
    """A layer.

    Parameters
    ----------
    optimizer : Optimizer, str, dict or None
        What updates the parameters; SGD with its defaults if None. An optimizer object is
        copied, so that layers do not share what it remembers.
    rng : int, Generator or None
        Where initial weights come from.
    device : Device, str or None
        Where the layer computes. None: the device of a CuPy array if the first input is one,
        else the default device. NumPy input to a layer on a GPU is moved there.

    Attributes
    ----------
    X : list of ndarray
        The inputs of the forward passes since the last update.
    parameters, gradients : dict of ndarray
        By name.
    derived_variables : dict of list
        What the forward passes since the last update have worked out.
    hyperparameters : dict
        What makes the layer, with its class's name as ``layer``.
    trainable : bool
        False while frozen.
    device : Device or None
        Where the parameters are; None before the first input.
    dtype : str or None
        The first input's dtype; None before.
    """

    parameters: dict[str, Array]
    gradients: dict[str, Array]
    derived_variables: dict[str, Any]
    trainable: bool
    #: Hyperparameters that follow from the first input, or cannot be given.
    _derived_settings: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        optimizer: Optimizer | str | Mapping[str, Any] | None,
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        found = get_optimizer(optimizer)
        self.optimizer = found.copy() if found is optimizer else found
        self.X: list[Array] = []
        self.act_fn: Activation | None = None
        self.trainable = True
        self.parameters = {}
        self.gradients = {}
        self.derived_variables = self._no_derived()
        self.is_initialized = False
        self.device: Device | None = None
        self.dtype: str | None = None
        self._rng = None if rng is None else generator(rng)
        self._wanted_device = None if device is None else parse_device(device)
        self._untouched = True  # the gradients are zeros

    # ------------------------------------------------------------- what a layer says of itself

    def config(self) -> dict[str, Any]:
        """Return what makes the layer anew, without weights and optimizer."""
        leave = self._derived_settings | {"optimizer"}
        values = {k: v for k, v in self.hyperparameters.items() if k not in leave}
        return {**values, "layer": type(self).__name__}

    def leaves(self) -> list[tuple[str, Layer]]:
        """Return the layer itself, without a name."""
        return [("", self)]

    def _optimizer_summary(self) -> dict[str, Any]:
        return {
            "cache": self.optimizer.cache,
            "hyperparameters": self.optimizer.hyperparameters,
        }

    def _no_derived(self) -> dict[str, Any]:
        """Return ``derived_variables`` as they are before a forward pass."""
        return {}

    @abc.abstractmethod
    def output_shape(self, shape: Shape) -> Shape:
        """Return the output's shape for an input of ``shape``, batch included.

        Raises
        ------
        ValueError
            If the layer takes no such input.
        """

    def _init_params(self, shape: Shape) -> None:
        """Draw the parameters for an input of ``shape``; a layer without any has nothing to do."""

    # ------------------------------------------------------------------------------ the passes

    @abc.abstractmethod
    def _forward(self, X: Array, retain: bool) -> Array:
        """Return the output; append to the derived variables if ``retain``."""

    @abc.abstractmethod
    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        """Return the gradients for the ``index``-th retained input and for the parameters."""

    def forward(self, X: Array, retain_derived: bool = True) -> Array:
        """Return the layer's output.

        Parameters
        ----------
        X : ndarray
            The input: a NumPy or CuPy array of float16, bfloat16, float32 or float64.
        retain_derived : bool
            Whether :meth:`backward` will want this input's gradient.

        Raises
        ------
        TypeError, ValueError
            If the layer takes no such input; nothing is changed then.
        """
        with ranges.of(self, "forward", X):
            X = self._accepted(X)
            Y = self._forward(X, retain_derived)
            if retain_derived:
                self.X.append(X)
            return Y

    def backpropagate(
        self, dLdy: Array | list[Array], retain_grads: bool, input_grad: bool = True
    ) -> Array | list[Array]:
        """Do :meth:`backward`'s work, frozen or not: how a network passes gradients on."""
        with ranges.of(self, "backward", self.X[-1] if self.X else None):
            found = [
                self._backward(dy, k, input_grad, retain_grads and bool(self.parameters))
                for k, dy in enumerate(self._taken(dLdy))
            ]
            for _, gradients in found:
                for name, value in gradients.items():
                    value = value.reshape(self.parameters[name].shape)
                    if self._untouched:
                        self.gradients[name] = value
                    else:
                        self.gradients[name] = self.gradients[name] + value
                self._untouched = self._untouched and not gradients
            return found[0][0] if len(found) == 1 else [dx for dx, _ in found]

    def _accepted(self, X: Array) -> Array:
        """Return the input on the layer's device; the first one settles device, dtype and weights."""
        where, place = self._checked("X", X, self.device or self._wanted_device)
        self.output_shape(tuple(X.shape))  # checks it
        if self.device is None:
            self._settle(tuple(X.shape), dtype_name(X.dtype), place)
        return X if where == place else asarray(X, place)

    def _checked(self, name: str, X: Array, place: Device | None) -> tuple[Device, Device]:
        """Return where an input is and where it is to go, if the layer takes its dtype."""
        where = device_of(X)
        if where is None or isinstance(X, np.ma.MaskedArray):
            raise TypeError(f"{name} is a {type(X).__name__}; expected a NumPy or CuPy array")
        dtype = dtype_name(X.dtype)
        if dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {X.dtype}; expected one of {', '.join(FLOATS)}")
        if self.dtype is not None and dtype != self.dtype:
            raise TypeError(
                f"{name} has dtype {X.dtype}; expected {self.dtype}, as the layer's parameters"
            )
        if place is None:
            place = where if where != CPU else default_device()
        if where not in (CPU, place):
            raise ValueError(f"{name} is on {where} and the layer on {place}; expected one device")
        return where, place

    def build(self, shape: Sequence[int], dtype: str = "float32") -> Shape:
        """Draw the parameters for an input of ``shape`` without one, and return the output's shape.

        Parameters
        ----------
        shape : sequence of int
            Of the input, batch included.
        dtype : {"float16", "bfloat16", "float32", "float64"}
            Of the input.

        Raises
        ------
        ImportError
            If it is bfloat16, and ml_dtypes is not installed or CuPy too old.
        TypeError, ValueError
            If the layer takes no such input, or has another dtype already.
        """
        if dtype not in FLOATS:
            raise TypeError(f"dtype is {dtype!r}; expected one of {', '.join(FLOATS)}")
        if self.dtype is not None and dtype != self.dtype:
            raise TypeError(f"dtype is {dtype!r}; expected {self.dtype}, the layer's")
        out = self.output_shape(tuple(shape))
        if self.device is None:
            self._settle(tuple(shape), dtype, self._wanted_device or default_device())
        return out

    def _settle(self, shape: Shape, dtype: str, place: Device) -> None:
        known_dtype(dtype, place)
        self.device, self.dtype = place, dtype
        if not self.is_initialized:
            self._init_params(shape)
            self._reset_gradients()
            self.is_initialized = True

    def _taken(self, dLdy: Array | list[Array]) -> list[Array]:
        """Return the gradients on the layer's device, one for each retained forward pass."""
        given = dLdy if isinstance(dLdy, (list, tuple)) else [dLdy]
        if not self.X:
            raise RuntimeError(
                f"backward of {type(self).__name__} before forward: call forward with "
                "retain_derived=True first"
            )
        if len(given) != len(self.X):
            raise ValueError(
                f"dLdy holds {len(given)} gradients; expected {len(self.X)}, one for each forward "
                "pass retained since the last update"
            )
        taken = []
        for dy, x in zip(given, self.X, strict=True):
            where = device_of(dy)
            if where is None:
                raise TypeError(f"dLdy is a {type(dy).__name__}; expected a NumPy or CuPy array")
            if dtype_name(dy.dtype) != self.dtype:
                raise TypeError(f"dLdy has dtype {dy.dtype}; expected {self.dtype}")
            want = self.output_shape(self._retained_shape(x))
            if tuple(dy.shape) != want:
                raise ValueError(f"dLdy has shape {tuple(dy.shape)}; expected {want}, the output's")
            if where not in (CPU, self.device):
                raise ValueError(f"dLdy is on {where} and the layer on {self.device}")
            taken.append(dy if where == self.device else asarray(dy, self.device))
        return taken

    def _retained_shape(self, X: Any) -> Shape:
        return tuple(X.shape)

    # ------------------------------------------------------------------------------ parameters

    def use_rng(self, rng: Rng) -> None:
        """Draw the initial weights, if they are not drawn yet, from this generator."""
        self._rng = generator(rng)

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Train with a fresh optimizer of this kind."""
        self.optimizer = optimizer.fresh()

    def use_device(self, device: Device | str) -> None:
        """Compute on this device.

        Raises
        ------
        RuntimeError
            If the layer has begun to compute on another.
        """
        wanted = parse_device(device)
        if self.device not in (None, wanted):
            raise RuntimeError(f"device is {device!r}; the layer is on {self.device} already")
        self._wanted_device = wanted

    def _drawn(self, init: str, shape: Shape) -> Array:
        """Return initial weights on the layer's device, in its dtype."""
        gain = glorot_gain(self.act_fn) if self.act_fn is not None else 1.0
        return self._placed(get_initializer(init)(shape, self._rng, gain=gain))

    def _zeros(self, shape: Shape) -> Array:
        return self._placed(np.zeros(shape))

    def _placed(self, values: Array, name: str | None = None) -> Array:
        """Return the values on the layer's device, in the dtype of the parameter ``name``."""
        return asarray(values, self.device, self._parameter_dtype(name))

    def _parameter_dtype(self, name: str | None) -> str | None:
        """Return the dtype that a parameter is kept in: the layer's."""
        return self.dtype

    def _reset_gradients(self) -> None:
        for name, value in self.parameters.items():
            if name in self._trained_names():
                self.gradients[name] = namespace(value).zeros(value.shape, value.dtype)
        self._untouched = True

    def _trained_names(self) -> tuple[str, ...]:
        """Return the parameters that the optimizer changes."""
        return self._parameter_names()

    def freeze(self) -> None:
        """Keep the parameters as they are; training the layer is an error from now on."""
        self.trainable = False

    def unfreeze(self) -> None:
        """Let the parameters be trained again."""
        self.trainable = True

    def discard(self) -> None:
        """Do :meth:`flush_gradients`' work, frozen or not."""
        self.X = []
        self.derived_variables = self._no_derived()
        if self.is_initialized:
            self._reset_gradients()

    def update(self, cur_loss: float | None = None) -> None:
        """Change the parameters by the optimizer and the gradients, then flush these.

        Parameters
        ----------
        cur_loss : float, optional
            For learning-rate schedules that follow the loss.

        Raises
        ------
        RuntimeError
            If the layer is frozen.
        """
        self._check_trainable()
        if not self.parameters:  # nothing that would be worth a range
            self.optimizer.step()
            self.discard()
            return
        with ranges.of(self, "update"):
            self.optimizer.step()
            for name, gradient in self.gradients.items():
                self.parameters[name] = self.optimizer(
                    self.parameters[name], gradient, name, cur_loss
                )
            self.discard()

    # --------------------------------------------------------------------------------- summary

    def summary(self) -> dict[str, Any]:
        """Return the layer's name, its parameters and its hyperparameters."""
        return {
            "layer": self.hyperparameters["layer"],
            "parameters": self.parameters,
            "hyperparameters": self.hyperparameters,
        }

    def set_params(self, summary_dict: Mapping[str, Any]) -> LayerBase:
        """Take over parameters and hyperparameters, from what :meth:`summary` returns or a part.

        Entries may stand in ``"parameters"`` and ``"hyperparameters"`` or beside these; what
        the layer does not know is ignored. The dictionary is left as it is.

        Returns
        -------
        LayerBase
            The layer itself.

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
        flat: dict[str, Any] = {}
        for key, value in summary_dict.items():
            flat.update(value if key in ("parameters", "hyperparameters") else {key: value})
        known = self.hyperparameters
        name = flat.get("layer", known["layer"])
        if name != known["layer"]:
            raise ValueError(f"layer is {name!r}; expected {known['layer']!r}")
        values = {k: v for k, v in flat.items() if k in known and k != "layer"}
        parameters = {
            k: v for k, v in flat.items() if k in self._parameter_names() and v is not None
        }
        optimizer = get_optimizer(values["optimizer"]) if "optimizer" in values else None
        settings = self._settings({k: v for k, v in values.items() if k != "optimizer"})
        placed = self._checked_parameters(parameters, {**known, **settings})
        for key, value in settings.items():
            setattr(self, key, value)
        if optimizer is not None:
            self.optimizer = optimizer.copy() if optimizer is values["optimizer"] else optimizer
        if placed:
            self._take_parameters(placed)
        return self

    def _parameter_names(self) -> tuple[str, ...]:
        return ()

    @abc.abstractmethod
    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return checked hyperparameters as attributes; raise where one is not allowed."""

    def _checked_parameters(
        self, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Return the parameters if they are float arrays that fit the layer."""
        for name, value in parameters.items():
            if device_of(value) is None:
                raise TypeError(f"{name} is a {type(value).__name__}; expected an array")
            if value.dtype.name not in FLOATS:
                raise TypeError(f"{name} has dtype {value.dtype}; expected one of {FLOATS}")
            want = self._parameter_shape(name, parameters, known)
            if want is not None and tuple(value.shape) != want:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {want}")
        missing = set(self._parameter_names()) - set(parameters)
        if parameters and missing and not self.is_initialized:
            raise ValueError(
                f"parameters lacks {', '.join(sorted(missing))}; expected all, as the layer has "
                "none yet"
            )
        return parameters

    def _parameter_shape(
        self, name: str, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> Shape | None:
        """Return the shape that a parameter must have; None for any."""
        return None

    def _take_parameters(self, parameters: dict[str, Array]) -> None:
        first = next(iter(parameters.values()))
        if self.device is None:
            where = device_of(first)
            self.device = self._wanted_device or (
                where if where is not None and where != CPU else default_device()
            )
            self.dtype = first.dtype.name
        for name, value in parameters.items():
            self.parameters[name] = self._placed(value, name).copy()  # nobody else's to change
        self._reset_gradients()
        self.is_initialized = True
        self._follow_parameters()

    def _follow_parameters(self) -> None:
        """Set what follows from the parameters' shapes."""


def activation_of(act_fn: Activation | str | None) -> Activation:
    """Return the activation, whose errors name the layer's argument."""
    try:
        return get_activation(act_fn)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("activation is", "act_fn is", 1)) from None
