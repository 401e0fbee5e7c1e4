"""Training in half precision: float32 master weights, and a scaled loss for float16.

The passes run in float16 or bfloat16; the optimizer works on float32 copies of the parameters,
in which small updates are not lost. Gradients of float16 would vanish below 6e-8, so the loss is
multiplied by a scale, and the gradients divided by it in float32 [1]_. Where a gradient
overflows, the step is skipped and the scale halved; after many good steps it is doubled.

.. [1] Micikevicius et al.: Mixed precision training (2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from gpuconv.arguments import integer, real
from gpuconv.device import asarray, asnumpy, namespace
from gpuconv.dtypes import HALVES
from gpuconv.losses import CrossEntropy
from gpuconv.models import Sequential
from gpuconv.profiling import ranges
from gpuconv.training.watch import leaves, named_leaves

__all__ = ["Full", "Mixed", "Precision", "UnderflowError", "precision_for"]

Array = Any


class UnderflowError(ArithmeticError):
    """Gradients overflow however small the loss is scaled."""


class Precision(Protocol):
    """What a step does differently in different dtypes.

    Attributes
    ----------
    dtype : str
        That the layers compute in.
    data : str
        Of the images before :meth:`images`.
    scaled : bool
        Whether gradients may overflow without being amiss.
    """

    dtype: str
    data: str
    scaled: bool

    def images(self, images: Array) -> Array:
        """Return a step's images as the network takes them."""

    def loss(self, labels: Array, logits: Array) -> tuple[Array, Array]:
        """Return the mean loss and the gradient to send back."""

    def update(self, net: Sequential, loss: float | None) -> None:
        """Update the network by its gradients, and flush these."""


class Full:
    """float32 or float64 throughout."""

    scaled = False

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = self.data = dtype

    def images(self, images: Array) -> Array:
        """Return the images."""
        return images

    def loss(self, labels: Array, logits: Array) -> tuple[Array, Array]:
        """Return the mean cross-entropy and its gradient."""
        return CrossEntropy.from_logits(labels, logits)

    def update(self, net: Sequential, loss: float | None) -> None:
        """Update the network."""
        net.update(loss)


class Mixed:
    """float16 or bfloat16 with float32 master weights.

    Parameters
    ----------
    dtype : {"float16", "bfloat16"}
        To compute in. bfloat16 has float32's range, so its loss is not scaled.
    scale : float
        That the loss is first multiplied by.
    growth : int
        Good steps after which the scale is doubled.

    Attributes
    ----------
    scale : float
        The current one.
    good, skipped : int
        Steps since the scale changed, and steps skipped in all.
    masters : dict of ndarray
        float32 parameters, by the network's names.
    """

    data = "float32"

    def __init__(self, dtype: str = "float16", scale: float = 2.0**16, growth: int = 2000) -> None:
        if dtype not in HALVES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(HALVES)}")
        self.dtype = dtype
        self.scaled = dtype == "float16"
        self.scale = real("scale", scale, 0, above=True) if self.scaled else 1.0
        self.growth = integer("growth", growth, 1)
        self.good = self.skipped = 0
        self.masters: dict[str, Array] = {}
        self._factor: Array | None = None

    def images(self, images: Array) -> Array:
        """Return the images in the dtype of the passes."""
        return images.astype(self.dtype)

    def loss(self, labels: Array, logits: Array) -> tuple[Array, Array]:
        """Return the mean loss, in float32, and its gradient times the scale."""
        loss, gradient = CrossEntropy.from_logits(labels, logits.astype("float32"))
        if self.scaled:
            # An array of the device's, set in place: a captured step reads it anew each time.
            if self._factor is None or namespace(self._factor) is not namespace(gradient):
                self._factor = namespace(gradient).full((), self.scale, "float32")
            gradient = gradient * self._factor
        return loss, gradient.astype(self.dtype)

    def update(self, net: Sequential, loss: float | None) -> None:
        """Update the masters, and the network from them; or skip the step where it overflowed.

        Whether it did is known on the host only after the device: in float16 a step waits here.
        """
        self._hold(net)
        wide = {
            f"{place}.{name}": gradient.astype("float32") * np.float32(1 / self.scale)
            for place, leaf in named_leaves(net)
            for name, gradient in leaf.gradients.items()
            if leaf.trainable
        }
        if self.scaled and not _all_finite(list(wide.values())):
            net.flush_gradients()
            self._overflowed()
            return
        for place, leaf in named_leaves(net):
            if not leaf.trainable:
                continue
            with ranges.of(leaf, "update"):
                leaf.optimizer.step()
                for name in leaf.gradients:
                    key = f"{place}.{name}"
                    master = leaf.optimizer(self.masters[key], wide[key], name, loss)
                    self.masters[key] = master
                    leaf.parameters[name] = master.astype(self.dtype)
        net.flush_gradients()
        self.good += 1
        if self.scaled and self.good >= self.growth:
            self._rescale(self.scale * 2)

    def _overflowed(self) -> None:
        self.skipped += 1
        if self.scale <= 2.0**-24:
            raise UnderflowError(
                f"gradients of {self.dtype} overflow even with the loss times {self.scale:g}"
            )
        self._rescale(self.scale / 2)

    def _rescale(self, scale: float) -> None:
        self.scale, self.good = min(scale, 2.0**24), 0
        if self._factor is not None:
            self._factor[...] = self.scale

    def _hold(self, net: Sequential) -> None:
        """Make the masters from the parameters, where there are none yet."""
        if not self.masters:
            own = net.parameters
            self.masters = {name: own[name].astype("float32") for name in net.gradients}

    # ------------------------------------------------------------------------------ its state

    def state(self, net: Sequential) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """Return what :meth:`load_state` needs to go on exactly: JSON values, and arrays by name."""
        self._hold(net)
        values = {"scale": self.scale, "good": self.good, "skipped": self.skipped}
        return values, {n: np.array(asnumpy(v)) for n, v in self.masters.items()}

    def load_state(
        self, net: Sequential, values: Mapping[str, Any], masters: Mapping[str, Any]
    ) -> None:
        """Take over what :meth:`state` returned.

        Raises
        ------
        TypeError, ValueError
            If it is not the state of such a network's training.
        """
        if not isinstance(values, Mapping) or set(values) != {"scale", "good", "skipped"}:
            raise ValueError(f"scaling is {values!r}; expected scale, good and skipped")
        own = net.parameters
        if set(masters) != set(net.gradients):
            raise ValueError("master weights are not those of the network")
        for name, value in masters.items():
            if value.dtype != np.float32 or tuple(value.shape) != tuple(own[name].shape):
                raise ValueError(
                    f"master weight {name} is {value.dtype} of shape {tuple(value.shape)}; "
                    f"expected float32 of shape {tuple(own[name].shape)}"
                )
        scale = real("scale", values["scale"], 0, above=True)
        self.good, self.skipped = (integer(n, values[n], 0) for n in ("good", "skipped"))
        self.scale = scale
        self._factor = None
        device = leaves(net)[0].device
        self.masters = {n: asarray(np.array(v), device) for n, v in masters.items()}


def _all_finite(arrays: list[Array]) -> bool:
    """Return whether every number is finite; one look from the host for all arrays."""
    if not arrays:
        return True
    xp = namespace(arrays[0])
    # A sum of absolute values is finite only where all are (float32 sums of float16's do not
    # overflow at these sizes).
    return bool(xp.isfinite(sum(xp.abs(a).sum() for a in arrays)))


def precision_for(dtype: str) -> Full | Mixed:
    """Return how to train in ``dtype``."""
    return Mixed(dtype) if dtype in HALVES else Full(dtype)
