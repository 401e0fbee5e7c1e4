"""Where NaN or infinity first appeared: the steps before a bad loss, taken again and looked at.

Looking at every array of every step would cost as much as the step. So nothing is looked at
while all is well but the loss; only what is needed to take the last steps again is kept, which
are references: optimizers make new arrays and leave the old ones as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from gpuconv.device import namespace
from gpuconv.losses import CrossEntropy
from gpuconv.models import Sequential
from gpuconv.profiling import ranges

__all__ = ["Watch", "leaves", "named_leaves", "origin_in_forward"]

Array = Any
Fetch = Callable[[int, int], tuple[Array, Array]]


def leaves(net: Sequential) -> list[Any]:
    """Return the layers that hold parameters, those inside of modules and wrappers too."""
    return [leaf for _, leaf in named_leaves(net)]


def named_leaves(net: Sequential) -> list[tuple[str, Any]]:
    """Return the same with their places, by which ``net.parameters`` names what they hold."""
    return [
        (f"{k}.{name}" if name else str(k), leaf)
        for k, layer in enumerate(net.layers)
        for name, leaf in layer.leaves()
    ]


def _finite(a: Array) -> bool:
    xp = namespace(a)
    return bool(xp.isfinite(a).all())


def _name(k: int, layer: Any) -> str:
    return f"layer {k} ({ranges.describe(layer)})"


class Watch:
    """Keeps what tells where a bad loss came from.

    Parameters
    ----------
    net : Sequential
        The network that is trained.
    interval : int
        Steps after which the loss is looked at. With 1 it is looked at before the update, so
        only the parameters of the step before have to be kept; else also what the optimizers
        remember.
    in_place : bool
        Whether parameters are changed in place, so that they must be copied.
    """

    def __init__(self, net: Sequential, interval: int = 1, in_place: bool = False) -> None:
        self._net, self._interval, self._in_place = net, interval, in_place
        self._kept: list[tuple[int, int, list[Any]]] = []

    def keep(self, epoch: int, step: int) -> None:
        """Note the state before a step; called where the loss was just looked at."""
        parts: list[Any] = []
        for layer in leaves(self._net):
            values = layer.parameters
            held = {k: v.copy() for k, v in values.items()} if self._in_place else dict(values)
            parts.append((held, None if self._interval == 1 else _remembered(layer.optimizer)))
        # With 1: the step under way and the one before, whose update may be to blame.
        self._kept = [*self._kept[-1:], (epoch, step, parts)] if self._interval == 1 else [
            (epoch, step, parts)
        ]  # fmt: skip

    def origin(self, fetch: Fetch, epoch: int, step: int, backward: bool = True) -> str:
        """Take the kept steps again and return in words where the first bad number was.

        Parameters
        ----------
        fetch : callable
            Given epoch and step, from 0, returns the images and labels of that step.
        epoch, step : int
            Where the bad loss was seen.
        backward : bool
            Whether gradients that are not finite are amiss: under loss scaling they are not.

        Notes
        -----
        The network is of no use afterwards.
        """
        before: str | None = None
        for first_epoch, first_step, parts in self._kept:
            for layer, (held, memory) in zip(leaves(self._net), parts, strict=True):
                layer.parameters.update(held)
                if memory is not None:
                    layer.optimizer.__dict__.update(memory)
            before = _bad_parameter(self._net)
            if before is not None:
                continue  # an earlier update is to blame, and its step was kept before
            last = step if first_epoch == epoch else first_step
            for k in range(first_step, last + 1):
                images, labels = fetch(first_epoch, k)
                where = f", step {k + 1} of epoch {first_epoch + 1}"
                found = self._step(images, labels, backward)
                if found is not None:
                    return found + where
                if self._interval == 1 and (first_epoch, k) == (epoch, step):
                    break
                found = self._update(backward)
                if found is not None:
                    return found + where
        if before is not None:  # by nothing that a step does
            return f"{before}, before step {step + 1} of epoch {epoch + 1}"
        return "none of the last steps, when they are taken again"

    def _step(self, images: Array, labels: Array, backward: bool) -> str | None:
        net = self._net
        net.flush_gradients()
        found = origin_in_forward(net, images, retain=True)
        if isinstance(found, str):
            return found
        loss, gradient = CrossEntropy.from_logits(labels, found)
        if not _finite(loss) or not _finite(gradient):
            return "the loss"
        if not backward:
            return None
        for k in range(len(net.layers) - 1, -1, -1):
            layer = net.layers[k]
            gradient = layer.backpropagate(gradient, layer.trainable, k > 0)
            for name, value in layer.gradients.items():
                if not _finite(value):
                    return f"{_name(k, layer)}, backward (gradient of {name})"
            if k > 0 and not _finite(gradient):
                return f"{_name(k, layer)}, backward (gradient of the input)"
        return None

    def _update(self, backward: bool) -> str | None:
        """Take the update; return where a parameter became bad."""
        if not backward:  # the scaled update is not repeated: the next kept state shows it
            return None
        for k, layer in enumerate(self._net.layers):
            if layer.trainable:
                layer.update(1.0)
            for name, value in layer.parameters.items():
                if not _finite(value):
                    return f"{_name(k, layer)}, update ({name})"
        return None


def _bad_parameter(net: Sequential) -> str | None:
    """Return the first parameter that holds NaN or infinity, in words."""
    for k, layer in enumerate(net.layers):
        for name, value in layer.parameters.items():
            if not _finite(value):
                return f"{_name(k, layer)} ({name})"
    return None


def _remembered(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state, its arrays by reference."""
    cache = {
        name: dict(entry) if isinstance(entry, dict) else entry
        for name, entry in optimizer.cache.items()
    }
    scheduler = copy.deepcopy(optimizer.lr_scheduler)
    return {
        "cache": cache, "cur_step": optimizer.cur_step, "lr_scheduler": scheduler, "_rate": None,
    }  # fmt: skip


def origin_in_forward(net: Sequential, images: Array, retain: bool = False) -> Any:
    """Return where a forward pass first holds NaN or infinity, in words; else its result."""
    if not _finite(images):
        return "the images"
    bad = _bad_parameter(net)
    if bad is not None:
        return bad
    x = images
    for k, layer in enumerate(net.layers):
        x = layer.forward(x, retain)
        if not _finite(x):
            return f"{_name(k, layer)}, forward"
    return x
