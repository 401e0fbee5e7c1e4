"""A network as a list of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpuconv.device import Device, asarray, asnumpy
from gpuconv.initializers import Rng, generator
from gpuconv.layers import (
    Add,
    BatchNorm1D,
    BatchNorm2D,
    Conv1D,
    Conv2D,
    Deconv2D,
    Dropout,
    Flatten,
    FullyConnected,
    Layer,
    LayerNorm1D,
    LayerNorm2D,
    Multiply,
    Pool2D,
    Softmax,
)
from gpuconv.models.random_state import load_random_state, random_state
from gpuconv.modules import (
    ResidualBlock,
    SkipConnectionConvModule,
    SkipConnectionIdentityModule,
)
from gpuconv.optimizers import Optimizer, get_optimizer

__all__ = ["Sequential"]

Array = Any

_LAYERS: dict[str, type[Layer]] = {
    cls.__name__: cls
    for cls in (
        Conv2D, Conv1D, Deconv2D, Pool2D, FullyConnected, Flatten, BatchNorm1D, BatchNorm2D,
        LayerNorm1D, LayerNorm2D, Softmax, Add, Multiply, ResidualBlock,
        SkipConnectionIdentityModule, SkipConnectionConvModule,
    )
}  # fmt: skip
#: How deep wrappers may stand in each other in a description.
_DEPTH = 8


class Sequential:
    """Layers one behind the other.

    Parameters
    ----------
    layers : sequence of Layer
        At least one, each once.
    optimizer : Optimizer, str, dict or None
        Given to every layer, a fresh copy each; None leaves the layers' own.
    rng : int, Generator or None
        Draws the initial weights of all layers, in order; None leaves the layers' own.
    device : Device, str or None
        Where all layers compute; None leaves the layers' own.

    Raises
    ------
    TypeError, ValueError
        If ``layers`` is not as said.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f"layers is a {type(layers).__name__}; expected a list of layers")
        if not layers:
            raise ValueError("layers is empty; expected at least one layer")
        for k, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layers[{k}] is a {type(layer).__name__}; expected a layer")
        if len(set(map(id, layers))) != len(layers):
            raise ValueError("layers holds a layer twice; expected each once")
        self.layers = list(layers)
        self._input_shape: tuple[int, ...] | None = None
        if optimizer is not None:
            self.set_optimizer(optimizer)
        if rng is not None:
            source = generator(rng)
            for layer in self.layers:
                layer.use_rng(source)
        if device is not None:
            for layer in self.layers:
                layer.use_device(device)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]

    def set_optimizer(self, optimizer: Optimizer | str | Mapping[str, Any] | None) -> None:
        """Give every layer a fresh optimizer of this kind."""
        made = get_optimizer(optimizer)
        for layer in self.layers:
            layer.use_optimizer(made)

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Return the first input's shape without the batch; None before."""
        return self._input_shape

    @property
    def dtype(self) -> str | None:
        """Return the parameters' dtype; None before there are any."""
        found: list[str | None] = [leaf.dtype for _, leaf in self.leaves()]
        return next((dtype for dtype in found if dtype is not None), None)

    @property
    def trainable(self) -> bool:
        """Whether any layer with parameters is not frozen."""
        return any(layer.trainable for layer in self.layers)

    # ------------------------------------------------------------------------------ the passes

    def build(self, shape: Sequence[int], dtype: str = "float32") -> tuple[int, ...]:
        """Draw all parameters for an input of ``shape`` and return the output's shape.

        Raises
        ------
        TypeError, ValueError
            If a layer does not take what the one before gives; the text names the layer.
        """
        current = tuple(shape)
        for k, layer in enumerate(self.layers):
            try:
                current = layer.build(current, dtype)
            except ValueError as error:
                raise ValueError(f"layer {k} ({type(layer).__name__}): {error}") from None
        self._input_shape = tuple(shape)[1:]
        return current

    def forward(self, X: Array, retain_derived: bool = True) -> Array:
        """Return the last layer's output; see :meth:`gpuconv.layers.LayerBase.forward`."""
        shape = getattr(X, "shape", None)
        for layer in self.layers:
            X = layer.forward(X, retain_derived)
        if self._input_shape is None and shape is not None:
            self._input_shape = tuple(shape)[1:]
        return X

    def backward(
        self, dLdy: Array | list[Array], retain_grads: bool = True, *, input_grad: bool = True
    ) -> Array | list[Array] | None:
        """Return the gradient with respect to the input, adding up the parameters' gradients.

        Frozen layers only pass gradients on. With ``input_grad=False`` nothing is computed
        below the first layer that is trained, and None is returned.

        Raises
        ------
        RuntimeError
            If every layer is frozen, or no forward pass was retained.
        """
        if not self.trainable:
            raise RuntimeError("every layer is frozen; unfreeze() those to train")
        last = 0
        if not input_grad:
            trained = (k for k, x in enumerate(self.layers) if x.trainable and x.parameters)
            last = next(trained, 0)
        gradient = dLdy
        for k in range(len(self.layers) - 1, last - 1, -1):
            layer = self.layers[k]
            wanted = input_grad or k > last
            gradient = layer.backpropagate(gradient, retain_grads and layer.trainable, wanted)
        return gradient if input_grad else None

    def update(self, cur_loss: float | None = None) -> None:
        """Update every layer that is not frozen, and flush all.

        Raises
        ------
        RuntimeError
            If every layer is frozen.
        """
        if not self.trainable:
            raise RuntimeError("every layer is frozen; unfreeze() those to train")
        for layer in self.layers:
            if layer.trainable:
                layer.update(cur_loss)
            else:
                layer.discard()

    def flush_gradients(self) -> None:
        """Forget what the forward passes retained, and set the gradients to zero."""
        for layer in self.layers:
            layer.discard()

    def freeze(self) -> None:
        """Freeze every layer."""
        for layer in self.layers:
            layer.freeze()

    def unfreeze(self) -> None:
        """Unfreeze every layer."""
        for layer in self.layers:
            layer.unfreeze()

    def leaves(self) -> list[tuple[str, Any]]:
        """Return the layers that hold parameters by number and, within a module, name."""
        return [
            (f"{k}.{name}" if name else str(k), leaf)
            for k, layer in enumerate(self.layers)
            for name, leaf in layer.leaves()
        ]

    @property
    def parameters(self) -> dict[str, Array]:
        """Return all parameters, as ``"<number of the layer>.<name>"``.

        Those of a module's components are named ``"<number>.<component>.<name>"``.
        """
        return {
            f"{place}.{name}": value
            for place, leaf in self.leaves()
            for name, value in leaf.parameters.items()
        }

    @property
    def gradients(self) -> dict[str, Array]:
        """Return all gradients, named as the parameters."""
        return {
            f"{place}.{name}": value
            for place, leaf in self.leaves()
            for name, value in leaf.gradients.items()
        }

    # ------------------------------------------------------------------- summaries and weights

    def summary(self) -> dict[str, Any]:
        """Return the layers' summaries."""
        return {"layer": "Sequential", "layers": [layer.summary() for layer in self.layers]}

    def set_params(self, summary_dict: Mapping[str, Any]) -> Sequential:
        """Take over what :meth:`summary` returned, layer by layer, and return the model.

        Raises
        ------
        TypeError, ValueError
            If it is not the summary of such layers.
        """
        found = summary_dict.get("layers") if isinstance(summary_dict, Mapping) else None
        if not isinstance(found, (list, tuple)) or len(found) != len(self.layers):
            raise ValueError(
                f"summary_dict does not hold {len(self.layers)} layers; expected what summary() "
                "of such a model returns"
            )
        for layer, part in zip(self.layers, found, strict=True):
            layer.set_params(part)
        return self

    def config(self) -> dict[str, Any]:
        """Return what makes the layers, as JSON values, without weights and optimizers."""
        return {"layers": [_plain(layer.config()) for layer in self.layers]}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], device: Device | str | None = None
    ) -> Sequential:
        """Return a model made from what :meth:`config` returned.

        Raises
        ------
        TypeError, ValueError
            If it is not such a description; nothing in it is executed.
        """
        found = config.get("layers") if isinstance(config, Mapping) else None
        if not isinstance(found, (list, tuple)) or not found:
            raise ValueError("config has no layers; expected what config() of a model returns")
        layers = []
        for k, part in enumerate(found):
            try:
                layers.append(_made(part))
            except (TypeError, ValueError) as error:
                raise ValueError(f"config's layer {k} {error}") from None
        return cls(layers, device=device)

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return copies of all parameters as NumPy arrays, by name."""
        return {name: np.array(asnumpy(value)) for name, value in self.parameters.items()}

    def load_tensors(self, tensors: Mapping[str, Array]) -> None:
        """Replace all parameters by these values.

        Raises
        ------
        ValueError
            If the model has no parameters yet (see :meth:`build`), or names, shapes or dtypes
            differ; nothing is changed then.
        """
        own = self.parameters
        _check_same(tensors, own)
        for place, leaf in self.leaves():
            for name in leaf.parameters:
                value = tensors[f"{place}.{name}"]
                leaf.parameters[name] = asarray(np.array(asnumpy(value)), leaf.device)
        for layer in self.layers:
            layer.discard()

    def state(self) -> list[dict[str, Any]]:
        """Return the optimizers' counts and schedules as JSON values; see :meth:`load_state`."""
        return [leaf.optimizer.state()[0] for _, leaf in self.leaves()]

    def state_tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the optimizers' arrays as NumPy arrays, by name."""
        return {
            f"{place}.{name}": np.array(asnumpy(value))
            for place, leaf in self.leaves()
            for name, value in leaf.optimizer.state()[1].items()
        }

    def load_state(self, state: Sequence[Mapping[str, Any]], tensors: Mapping[str, Array]) -> None:
        """Take over what :meth:`state` and :meth:`state_tensors` returned, to go on exactly.

        Raises
        ------
        TypeError, ValueError
            If it is not the state of such a model's optimizers.
        """
        if not isinstance(state, (list, tuple)):
            raise TypeError(f"state is a {type(state).__name__}; expected what state() returns")
        leaves = self.leaves()
        if len(state) != len(leaves):
            raise ValueError(f"state has {len(state)} entries; expected {len(leaves)}")
        for (place, leaf), part in zip(leaves, state, strict=True):
            own = {
                name.removeprefix(f"{place}."): asarray(np.array(asnumpy(value)), leaf.device)
                for name, value in tensors.items()
                if name.startswith(f"{place}.")
            }
            for name, value in own.items():
                parameter = leaf.parameters.get(name.partition(".")[0])
                if parameter is None or parameter.shape != value.shape:
                    raise ValueError(f"tensor {place}.{name} fits no parameter of layer {place}")
            leaf.optimizer.load_state(part, own)

    def random_state(self) -> dict[str, Any]:
        """Return the generators of all dropouts as JSON values; see :meth:`load_random_state`.

        Raises
        ------
        TypeError
            If a generator is over none of NumPy's bit generators.
        """
        return random_state(self._dropouts())

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Draw masks on from where :meth:`random_state` was called; what was shared is again.

        Raises
        ------
        ValueError
            If it is not the state of such a model's dropouts; nothing is changed then.
        """
        load_random_state(self._dropouts(), state)

    def _dropouts(self) -> list[Dropout]:
        return [found for layer in self.layers for found in layer.dropouts()]


def _made(part: Any, depth: int = 0) -> Layer:
    """Return the layer that a part of a description makes; an error's text begins with its name."""
    name = part.get("layer") if isinstance(part, Mapping) else None
    if not isinstance(name, str) or (name not in _LAYERS and name != "Dropout"):
        raise ValueError(f"is {name!r}; expected one of {', '.join([*_LAYERS, 'Dropout'])}")
    options = {str(key): value for key, value in part.items() if key != "layer"}
    if name == "Dropout":
        if depth == _DEPTH:
            raise ValueError(f"has more than {_DEPTH} wrappers; expected fewer")
        return Dropout(_made(options.pop("wrapped_layer", None), depth + 1), **options)
    try:
        return _LAYERS[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"({name}): {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_same(given: Mapping[str, Array], own: Mapping[str, Array]) -> None:
    if not own:
        raise ValueError("the model has no parameters yet; build() it first")
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise ValueError(
            f"tensors lacks {missing or 'nothing'} and has {extra or 'nothing'} too many; "
            f"expected {sorted(own)}"
        )
    for name, value in own.items():
        got = given[name]
        if tuple(got.shape) != tuple(value.shape) or got.dtype != value.dtype:
            raise ValueError(
                f"tensor {name!r} is {got.dtype} of shape {tuple(got.shape)}; expected "
                f"{value.dtype} of shape {tuple(value.shape)}"
            )
