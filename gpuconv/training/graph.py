"""A step captured once and replayed: one launch in the place of some hundred.

Captured are the forward pass, the loss and the backward pass of a full batch, on arrays that
stay where they are. The update follows uncaptured, as its learning rate and the counts of the
optimizers change from step to step; the new parameters are copied to where the captured passes
read them. The last, smaller batch of an epoch is not captured.
"""

from __future__ import annotations

import logging
from typing import Any

from gpuconv.device import namespace
from gpuconv.layers import Dropout, Layer
from gpuconv.models import Sequential
from gpuconv.profiling import ranges
from gpuconv.profiling.ranges import STEP
from gpuconv.training.memory import has_batch_statistics
from gpuconv.training.step import Step
from gpuconv.training.transport import Capture
from gpuconv.training.watch import leaves

__all__ = ["CapturedStep"]

log = logging.getLogger("gpuconv")

Array = Any


def changing(net: Sequential) -> str:
    """Return what in the network is another in every pass, so that no pass can be repeated."""
    if has_batch_statistics(net):
        return "the running statistics of its batch normalisation change in every pass"
    if any(_drops(layer) for layer in net.layers):
        return "dropout draws another mask for every pass"
    return ""


def _drops(layer: Any) -> bool:
    inner = [v for v in vars(layer).values() if isinstance(v, Layer)]
    return isinstance(layer, Dropout) or any(map(_drops, inner))


class CapturedStep:
    """Takes steps by replaying a captured one, on batches of the size of the first.

    Parameters
    ----------
    step : Step
        What is captured.
    capture : Capture
        How.
    """

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._images: Array = None
        self._labels: Array = None
        self._places: list[dict[str, Array]] = []
        self._gradients: list[dict[str, Array]] = []
        self._found: tuple[Array, Array] | None = None
        self.captured = False
        self._given_up = False

    def __call__(self, images: Array, labels: Array) -> tuple[Array, Array]:
        """Take a step; return the mean loss before it and the right answers, on the device."""
        if not self.captured and not self._given_up:
            self._record(images, labels)
        if not self.captured or images.shape != self._images.shape:
            result = self._step(images, labels)
            self._put_back()
            return result
        self._images[...] = images
        self._labels[...] = labels
        with ranges.part(STEP, "captured"):
            self._capture.replay()
        assert self._found is not None
        # Copies: the next replay writes to the same place.
        loss, correct = (a.copy() for a in self._found)
        for layer, gradients in zip(self._layers(), self._gradients, strict=True):
            layer.gradients.update(gradients)
        self._step.update(None)
        self._put_back()
        return loss, correct

    def _layers(self) -> list[Any]:
        return leaves(self._step.net)

    def _record(self, images: Array, labels: Array) -> None:
        """Capture the passes over a batch of this size; where that fails, say so and go on without."""
        why = changing(self._step.net)
        if why:
            self._give_up(why)
            return
        xp = namespace(images)
        # Copies of both: what the feeder gives is overwritten by later batches.
        self._images, self._labels = images.copy(), labels.copy()
        self._places = []
        for layer in self._layers():
            layer.parameters.update({n: xp.array(v) for n, v in layer.parameters.items()})
            self._places.append(dict(layer.parameters))

        def passes() -> tuple[tuple[Array, Array], list[dict[str, Array]]]:
            found = self._step.gradients(self._images, self._labels)
            gradients = [dict(layer.gradients) for layer in self._layers()]
            self._step.net.flush_gradients()
            return found, gradients

        parts = self._step.split.parts
        # Events that a profiler puts into a captured stream cannot be asked for their times.
        follower = ranges.install(None)
        try:
            self._found, self._gradients = self._capture.record(passes)
        except self._capture.errors as error:
            self._give_up(str(error))
            return
        finally:
            ranges.install(follower)
        if self._step.split.parts != parts:
            self._give_up("its batch had to be split for want of memory")
            return
        self.captured = True

    def _give_up(self, why: str) -> None:
        log.warning("the step cannot be captured (%s); it goes on uncaptured", why)
        self._given_up, self._places = True, []
        self._step.net.flush_gradients()

    def _put_back(self) -> None:
        """Copy the parameters to where the captured passes read them."""
        for layer, places in zip(self._layers(), self._places, strict=False):
            for name, place in places.items():
                if layer.parameters[name] is not place:
                    place[...] = layer.parameters[name]
                    layer.parameters[name] = place
