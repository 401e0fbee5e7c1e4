"""Where NaN or infinity first appeared: the steps before a bad loss, taken again and looked at.

Looking at every array of every step would cost as much as the step. So nothing is looked at
while all is well but the loss; only what is needed to take the last steps again is kept, which
are references: optimizers make new arrays and leave the old ones as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from gpuconv.device import namespace
from gpuconv.losses import CrossEntropy
from gpuconv.models import Sequential
from gpuconv.profiling import ranges

__all__ = ["Watch", "bad_parameter", "leaves", "named_leaves", "origin_in_forward"]

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


def _arrays(layer: Any, what: str) -> Iterator[tuple[str, Array]]:
    """Yield a layer's parameters or gradients by name, those of a module's components too."""
    for place, leaf in layer.leaves():
        for name, value in getattr(leaf, what).items():
            yield f"{place}.{name}" if place else name, value


def _name(k: int, layer: Any) -> str:
    return f"layer {k} ({ranges.describe(layer)})"


class Watch:
    """Keeps what tells where a bad loss came from.

    Parameters
    ----------
    net : Sequential
        The network that is trained.
    in_place : bool
        Whether parameters are changed in place, so that they must be copied.
    """

    def __init__(self, net: Sequential, in_place: bool = False) -> None:
        self._net, self._in_place = net, in_place
        self._kept: list[tuple[int, int, list[Any], Any]] = []
        self._draws = any(layer.dropouts() for layer in net.layers)
        self._last: dict[int, int] = {}  # of an epoch, the step taken last

    def keep(self, epoch: int, step: int) -> None:
        """Note the state before a step; called where the loss was just looked at."""
        parts: list[Any] = []
        for layer in leaves(self._net):
            values = layer.parameters
            held = {k: v.copy() for k, v in values.items()} if self._in_place else dict(values)
            parts.append((held, _remembered(layer.optimizer)))
        # The state at the last look, and the one before: the last update in between is looked at
        # by the next step only.
        self._kept = [*self._kept[-1:], (epoch, step, parts, self._random())]

    def _random(self) -> Any:
        """Return the state of what masks are drawn from, or None where it cannot be kept."""
        try:
            return self._net.random_state() if self._draws else None
        except TypeError:  # a generator of one's own: a step taken again draws other masks
            return None

    def taken(self, epoch: int, step: int) -> None:
        """Note that a step was taken."""
        self._last = {k: v for k, v in self._last.items() if k >= epoch - 1} | {epoch: step}

    def origin(
        self, fetch: Fetch, epoch: int, step: int, updated: bool = False, backward: bool = True
    ) -> str:
        """Take the kept steps again and return in words where the first bad number was.

        Parameters
        ----------
        fetch : callable
            Given epoch and step, from 0, returns the images and labels of that step.
        epoch, step : int
            The last step to take again.
        updated : bool
            Whether its update was taken.
        backward : bool
            Whether gradients that are not finite are amiss: under loss scaling they are not.

        Notes
        -----
        The network is of no use afterwards.
        """
        before: str | None = None
        for first_epoch, first_step, parts, random in self._kept:
            for layer, (held, memory) in zip(leaves(self._net), parts, strict=True):
                layer.parameters.update(held)
                layer.optimizer.__dict__.update(memory)
            if random is not None:
                self._net.load_random_state(random)
            before = bad_parameter(self._net)
            if before is not None:
                continue  # an earlier update is to blame, and its step was kept before
            for k in range(first_step, self._end(first_epoch, epoch, step) + 1):
                images, labels = fetch(first_epoch, k)
                where = f", step {k + 1} of epoch {first_epoch + 1}"
                found = self._step(images, labels, backward)
                if found is not None:
                    return found + where
                if not updated and (first_epoch, k) == (epoch, step):
                    break
                found = self._update(backward)
                if found is not None:
                    return found + where
        if before is not None:  # by nothing that a step does
            return f"{before}, around step {step + 1} of epoch {epoch + 1}"
        return "none of the last steps, when they are taken again"

    def _end(self, first_epoch: int, epoch: int, step: int) -> int:
        """Return the last step to take again from a state that was kept in ``first_epoch``."""
        if first_epoch == epoch:
            return step
        return self._last.get(first_epoch, 0)

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
            for name, value in _arrays(layer, "gradients"):
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
            for name, value in _arrays(layer, "parameters"):
                if not _finite(value):
                    return f"{_name(k, layer)}, update ({name})"
        return None


def bad_parameter(net: Sequential) -> str | None:
    """Return the first parameter that holds NaN or infinity, in words."""
    for k, layer in enumerate(net.layers):
        for name, value in _arrays(layer, "parameters"):
            if not _finite(value):
                return f"{_name(k, layer)} ({name})"
    return None


def _remembered(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state by reference: each step it makes new arrays."""
    cache = {
        name: dict(entry) if isinstance(entry, dict) else entry
        for name, entry in optimizer.cache.items()
    }
    found = {"cache": cache, "cur_step": optimizer.cur_step, "_rate": None}
    if optimizer.lr_scheduler.needs_loss:  # the others remember nothing
        found["lr_scheduler"] = copy.deepcopy(optimizer.lr_scheduler)
    return found


def origin_in_forward(net: Sequential, images: Array, retain: bool = False) -> Any:
    """Return where a forward pass first holds NaN or infinity, in words; else its result."""
    if not _finite(images):
        return "the images"
    bad = bad_parameter(net)
    if bad is not None:
        return bad
    x = images
    for k, layer in enumerate(net.layers):
        x = layer.forward(x, retain)
        if not _finite(x):
            return f"{_name(k, layer)}, forward"
    return x
