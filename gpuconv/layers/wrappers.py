"""What is wrapped around a layer: dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpuconv.arguments import real
from gpuconv.device import Device, asarray
from gpuconv.initializers import Rng, generator
from gpuconv.layers.interface import Array, Layer, Shape
from gpuconv.optimizers import Optimizer

__all__ = ["Dropout"]


def _scaled(a: Array, scale: float) -> Array:
    """Return ``a * scale`` in the dtype of ``a``: of bfloat16 NumPy makes float32."""
    return (a * scale).astype(a.dtype, copy=False)


class Dropout(Layer):
    """A layer whose input loses each value with probability ``p`` while it is trained [1]_.

    The layer's output is multiplied by ``1 / (1 - p)``, as in numpy-ml: for a layer without a
    bias and with a linear or ReLU activation that equals scaling what is left of the input.

    Parameters
    ----------
    wrapped_layer : Layer
        It is found as ``_base_layer``, and whatever else is asked of the wrapper, such as
        ``parameters``, ``optimizer`` or ``X``, is the layer's.
    p : float
        At least 0 and below 1.
    rng : int, Generator or None
        Where the masks come from; drawn on the CPU, so one seed gives the same on every device.

    Notes
    -----
    Nothing is dropped in a frozen layer, nor in a pass that retains nothing
    (``forward(X, retain_derived=False)``), where numpy-ml still drops. Its gradient leaves out
    the mask, writes into the array it is given, and ``unfreeze`` freezes; here the gradient is
    that of the pass, ``dLdy`` is only read, and ``unfreeze`` does what it says.

    .. [1] Srivastava et al.: Dropout: a simple way to prevent neural networks from
       overfitting (2014).
    """

    _OWN = frozenset(
        {
            "_base_layer", "p", "generator", "_generator", "_retained",
            "_wrapper_derived_variables",
        }
    )  # fmt: skip

    def __init__(self, wrapped_layer: Layer, p: float, *, rng: Rng = None) -> None:
        if not isinstance(wrapped_layer, Layer):
            raise TypeError(f"wrapped_layer is a {type(wrapped_layer).__name__}; expected a layer")
        self._base_layer: Any = wrapped_layer
        self.p = real("p", p, 0, 1, below=True)
        self._generator: np.random.Generator | None = None if rng is None else generator(rng)
        self._forget()

    def __getattr__(self, name: str) -> Any:
        if name in Dropout._OWN or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Dropout._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._base_layer, name, value)

    def _forget(self) -> None:
        self._retained: list[tuple[Array | None, float]] = []
        self._wrapper_derived_variables: dict[str, list[Array]] = {"dropout_mask": []}

    @property
    def generator(self) -> np.random.Generator:
        """What the masks are drawn from; made anew by the first question where none was given."""
        if self._generator is None:
            self._generator = np.random.default_rng()
        return self._generator

    @generator.setter
    def generator(self, value: np.random.Generator) -> None:
        self._generator = value

    # -------------------------------------------------------------- what it says of itself

    @property
    def _wrapper_hyperparameters(self) -> dict[str, Any]:
        return {"wrapper": "Dropout", "p": self.p}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the wrapped layer, and the list of its ``wrappers``."""
        inner = self._base_layer.hyperparameters
        return {**inner, "wrappers": [*inner.get("wrappers", []), self._wrapper_hyperparameters]}

    @property
    def derived_variables(self) -> dict[str, Any]:
        """Return what the wrapped layer has worked out, and the masks under ``wrappers``."""
        inner = self._base_layer.derived_variables
        own = self._wrapper_derived_variables
        return {**inner, "wrappers": [*inner.get("wrappers", []), own]}

    def config(self) -> dict[str, Any]:
        """Return what makes wrapper and layer anew."""
        return {"layer": "Dropout", "p": self.p, "wrapped_layer": self._base_layer.config()}

    def leaves(self) -> list[tuple[str, Layer]]:
        """Return the leaves of the wrapped layer."""
        found: list[tuple[str, Layer]] = self._base_layer.leaves()
        return found

    def dropouts(self) -> list[Dropout]:
        """Return this wrapper, and those that it is around."""
        return [self, *self._base_layer.dropouts()]

    def summary(self) -> dict[str, Any]:
        """Return the wrapped layer's summary, with ``layer_wrappers``."""
        made = self.hyperparameters
        return {
            "layer": made["layer"],
            "layer_wrappers": [w["wrapper"] for w in made["wrappers"]],
            "parameters": self._base_layer.parameters,
            "hyperparameters": made,
        }

    def set_params(self, summary_dict: Mapping[str, Any]) -> Dropout:
        """Take over a summary: the last of its ``wrappers`` here, the rest in the layer.

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
        values = dict(summary_dict)
        nested = values.get("hyperparameters")
        if isinstance(nested, Mapping):
            nested = values["hyperparameters"] = dict(nested)
        holder = nested if isinstance(nested, dict) and "wrappers" in nested else values
        wrappers = holder.pop("wrappers", [])
        p = self.p
        if wrappers:
            last = wrappers[-1]
            if not isinstance(last, Mapping) or last.get("wrapper") != "Dropout":
                raise ValueError(f"wrappers holds {last!r}; expected a Dropout")
            p = real("p", last.get("p"), 0, 1, below=True)
            if len(wrappers) > 1:
                holder["wrappers"] = wrappers[:-1]
        self._base_layer.set_params(values)
        self.p = p
        return self

    # ------------------------------------------------------------------------------ the passes

    def output_shape(self, shape: Shape) -> Shape:
        """Return the wrapped layer's."""
        found: Shape = self._base_layer.output_shape(shape)
        return found

    def build(self, shape: Sequence[int], dtype: str = "float32") -> Shape:
        """Draw the wrapped layer's parameters."""
        found: Shape = self._base_layer.build(shape, dtype)
        return found

    def forward(self, X: Array, retain_derived: bool = True) -> Array:
        """Return the layer's output for what the mask leaves of the input.

        Raises
        ------
        TypeError, ValueError
            If the layer takes no such input.
        """
        base = self._base_layer
        if not (base.trainable and retain_derived):
            Y = base.forward(X, retain_derived)
            if retain_derived:
                self._retain(None, np.ones(tuple(getattr(X, "shape", ())), bool), 1.0)
            return Y
        if not isinstance(getattr(X, "shape", None), tuple):
            raise TypeError(f"X is a {type(X).__name__}; expected an array")
        drawn = self.generator.random(X.shape, np.float32) >= self.p
        place = getattr(base, "device", None)
        mask = drawn if isinstance(X, np.ndarray) else asarray(drawn, place)
        Y = base.forward(X * mask, True)
        scale = 1 / (1 - self.p)
        place = getattr(base, "device", None)
        self._retain(mask if place is None else asarray(mask, place), mask, scale)
        return _scaled(Y, scale)

    def _retain(self, used: Array | None, mask: Array, scale: float) -> None:
        self._retained.append((used, scale))
        self._wrapper_derived_variables["dropout_mask"].append(mask)

    def backpropagate(
        self, dLdy: Array | list[Array], retain_grads: bool, input_grad: bool = True
    ) -> Any:
        """Pass gradients on through layer and masks."""
        given = list(dLdy) if isinstance(dLdy, (list, tuple)) else [dLdy]
        if len(given) == len(self._retained):
            given = [
                _scaled(dy, scale) if hasattr(dy, "dtype") else dy
                for dy, (_, scale) in zip(given, self._retained, strict=True)
            ]
        found = self._base_layer.backpropagate(given, retain_grads, input_grad)
        several = found if isinstance(found, list) else [found]
        masked = [
            dx if dx is None or mask is None else dx * mask
            for dx, (mask, _) in zip(several, self._retained, strict=True)
        ]
        return masked if isinstance(found, list) else masked[0]

    def update(self, cur_loss: float | None = None) -> None:
        """Update the wrapped layer and forget the masks."""
        self._base_layer.update(cur_loss)
        self._forget()

    def discard(self) -> None:
        """Forget what was retained, in the wrapped layer too."""
        self._base_layer.discard()
        self._forget()

    def freeze(self) -> None:
        """Freeze the wrapped layer; nothing is dropped then."""
        self._base_layer.freeze()

    def unfreeze(self) -> None:
        """Let the wrapped layer be trained again."""
        self._base_layer.unfreeze()

    def use_rng(self, rng: Rng) -> None:
        """Draw the layer's first weights and the masks from this generator."""
        self.generator = generator(rng)
        self._base_layer.use_rng(self.generator)

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Train the wrapped layer with a fresh optimizer of this kind."""
        self._base_layer.use_optimizer(optimizer)

    def use_device(self, device: Device | str) -> None:
        """Compute on this device."""
        self._base_layer.use_device(device)
