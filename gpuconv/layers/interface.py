"""What a network asks of its parts: layers, wrappers of layers, and modules of several."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpuconv.device import Device
from gpuconv.initializers import Rng
from gpuconv.optimizers import Optimizer

__all__ = ["Layer"]

Array = Any
Shape = tuple[int, ...]


class Layer(abc.ABC):
    """A part of a network; see :class:`gpuconv.layers.base.LayerBase` for the contract."""

    if TYPE_CHECKING:

        @property
        def parameters(self) -> dict[str, Any]: ...
        @property
        def gradients(self) -> dict[str, Any]: ...
        @property
        def derived_variables(self) -> dict[str, Any]: ...
        @property
        def trainable(self) -> bool: ...

    @property
    @abc.abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what makes the layer anew, without weights and optimizer."""

    @abc.abstractmethod
    def leaves(self) -> list[tuple[str, Layer]]:
        """Return the layers that hold parameters, by name; a layer is its own, named ``""``."""

    def dropouts(self) -> list[Any]:
        """Return the wrappers that draw masks, this layer's and those of what it is made of."""
        return []

    @abc.abstractmethod
    def output_shape(self, shape: Shape) -> Shape:
        """Return the output's shape for an input of ``shape``, batch included."""

    @abc.abstractmethod
    def build(self, shape: Sequence[int], dtype: str = "float32") -> Shape:
        """Draw the parameters for an input of ``shape``, and return the output's shape."""

    @abc.abstractmethod
    def forward(self, X: Array, retain_derived: bool = True) -> Array:
        """Return the output."""

    @abc.abstractmethod
    def backpropagate(
        self, dLdy: Array | list[Array], retain_grads: bool, input_grad: bool = True
    ) -> Any:
        """Do :meth:`backward`'s work, frozen or not: how a network passes gradients on."""

    def backward(
        self, dLdy: Array | list[Array], retain_grads: bool = True, *, input_grad: bool = True
    ) -> Any:
        """Return the gradient with respect to the input, and add up those of the parameters.

        Parameters
        ----------
        dLdy : ndarray or list of ndarray
            The gradient with respect to the output of each retained forward pass.
        retain_grads : bool
            Whether to add the parameters' gradients to ``gradients``.
        input_grad : bool
            Whether the input's gradient is wanted; if not, None takes its place and its work
            is not done.

        Returns
        -------
        ndarray or list of ndarray
            A list where more than one forward pass was retained.

        Raises
        ------
        RuntimeError
            If the layer is frozen, or no forward pass was retained.
        TypeError, ValueError
            If ``dLdy`` does not match the retained passes.
        """
        self._check_trainable()
        return self.backpropagate(dLdy, retain_grads, input_grad)

    @abc.abstractmethod
    def update(self, cur_loss: float | None = None) -> None:
        """Change the parameters by the optimizer and the gradients, then flush these."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Do :meth:`flush_gradients`' work, frozen or not."""

    def flush_gradients(self) -> None:
        """Forget what the forward passes retained, and set the gradients to zero.

        Raises
        ------
        RuntimeError
            If the layer is frozen.
        """
        self._check_trainable()
        self.discard()

    def _check_trainable(self) -> None:
        if not self.trainable:
            raise RuntimeError(f"{type(self).__name__} is frozen; unfreeze() it to train it")

    @abc.abstractmethod
    def freeze(self) -> None:
        """Keep the parameters as they are; training the layer is an error from now on."""

    @abc.abstractmethod
    def unfreeze(self) -> None:
        """Let the parameters be trained again."""

    @abc.abstractmethod
    def use_rng(self, rng: Rng) -> None:
        """Draw the initial weights, if they are not drawn yet, from this generator."""

    @abc.abstractmethod
    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Train with a fresh optimizer of this kind."""

    @abc.abstractmethod
    def use_device(self, device: Device | str) -> None:
        """Compute on this device."""

    @abc.abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the layer's name, its parameters and its hyperparameters."""

    @abc.abstractmethod
    def set_params(self, summary_dict: Mapping[str, Any]) -> Layer:
        """Take over parameters and hyperparameters from what :meth:`summary` returns."""
