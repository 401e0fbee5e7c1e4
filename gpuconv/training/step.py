"""One step of training: forward, loss, backward, update; in parts where memory is short."""

from __future__ import annotations

import math
from typing import Any

from gpuconv.dtypes import widened
from gpuconv.models import Sequential
from gpuconv.profiling import ranges
from gpuconv.profiling.ranges import STEP
from gpuconv.training.memory import Room, Splitter, has_batch_statistics, room_for, told
from gpuconv.training.precision import Precision
from gpuconv.training.watch import leaves

__all__ = ["Step", "Tally"]

Array = Any


class Tally:
    """Loss and right answers of the steps since they were last read, kept on the device."""

    def __init__(self) -> None:
        self.images = self.steps = 0
        self._loss: Array = 0.0
        self._correct: Array = 0

    def add(self, loss: Array, correct: Array, images: int) -> None:
        """Add a step; nothing is waited for."""
        self._loss = self._loss + loss * images
        self._correct = self._correct + correct
        self.images += images
        self.steps += 1

    def read(self) -> tuple[float, int, int]:
        """Return the sum of losses over images, right answers, images; waits for the device."""
        found = float(self._loss), int(self._correct), self.images
        self.__init__()  # type: ignore[misc]
        return found


class Step:
    """Takes steps.

    Parameters
    ----------
    net : Sequential
        With its optimizer, built.
    precision : Precision
        How to compute.
    room : Room, optional
        The device's memory; that of the network's device if not given.
    """

    def __init__(self, net: Sequential, precision: Precision, room: Room | None = None) -> None:
        self.net, self.precision = net, precision
        self._leaves = leaves(net)
        self._whole = has_batch_statistics(net)
        self._before: list[dict[str, Array]] = []
        self._room = room or room_for(self._leaves[0].device)
        self.split = Splitter(self._room, self._whole, self._reset)

    def __call__(self, images: Array, labels: Array) -> tuple[Array, Array]:
        """Take a step; return the mean loss before it and the right answers, on the device."""
        loss, correct = self.gradients(images, labels)
        self.update(None)
        return loss, correct

    def checked(self, images: Array, labels: Array) -> tuple[float, int]:
        """Take a step, unless the loss is not finite; return the loss before it as a number.

        Where the loss is not finite, the parameters are left as they are.
        """
        loss, correct = self.gradients(images, labels, check=True)
        value = float(loss)
        if math.isfinite(value):
            self.update(value)
        return value, int(correct)

    def update(self, loss: float | None) -> None:
        """Update the network by its gradients."""
        with ranges.part(STEP, "release"):  # what the passes retained makes room for the update
            for leaf in self._leaves:
                leaf.X, leaf.derived_variables = [], leaf._no_derived()
        with told(self._room, "the optimizer's update"):
            self.precision.update(self.net, loss)

    def gradients(self, images: Array, labels: Array, check: bool = False) -> tuple[Array, Array]:
        """Compute the gradients; return the mean loss and the right answers, on the device.

        Parameters
        ----------
        images, labels : ndarray
            The batch.
        check : bool
            Whether to leave the backward pass out where the loss is not finite; the host then
            looks at the loss before it.
        """
        size = len(images)
        if self._whole:  # running statistics move in the forward pass
            self._before = [dict(leaf.parameters) for leaf in self._leaves]
        parts: list[tuple[Array, Array]] = []
        sums: list[dict[str, Array]] = []

        def compute(part: slice) -> None:
            if part.start == 0:
                parts.clear()
                sums.clear()
            whole = part.stop - part.start == size
            share = 1.0 if whole else (part.stop - part.start) / size
            parts.append(self._part(images[part], labels[part], share, check))
            if not whole:
                self._gather(sums)

        self.split(compute, size)
        if sums:
            for leaf, total in zip(self._leaves, sums, strict=True):
                leaf.gradients.update(total)
        if len(parts) == 1:
            return parts[0]
        loss, correct = parts[0]
        for more, right in parts[1:]:
            loss, correct = loss + more, correct + right
        return loss, correct

    def _reset(self) -> None:
        """Forget what a failed attempt has left."""
        # Everything is let go of before anything is made anew: there is no room for both.
        for leaf in self._leaves:
            leaf.X, leaf.derived_variables = [], leaf._no_derived()
            leaf.gradients.clear()
        self.net.flush_gradients()
        for leaf, before in zip(self._leaves, self._before, strict=False):
            leaf.parameters.update(before)

    def _part(self, images: Array, labels: Array, share: float, check: bool) -> tuple[Array, Array]:
        """Compute a part's gradients, times its share of the batch; so also its loss."""
        logits = self.net.forward(self.precision.images(images), retain_derived=True)
        with ranges.part(STEP, "loss"):
            loss, gradient = self.precision.loss(labels, logits)
            correct = (logits.argmax(axis=1) == labels).sum()
            if share != 1.0:
                loss = loss * share
                gradient = (gradient * share).astype(gradient.dtype, copy=False)
            good = not check or math.isfinite(float(loss))
        if good:
            self.net.backward(gradient, input_grad=False)
        return loss, correct

    def _gather(self, sums: list[dict[str, Array]]) -> None:
        """Add the gradients to those of earlier parts, and let go of what the part retained.

        Halves are added up in float32, which is what they are updated in.
        """
        for k, leaf in enumerate(self._leaves):
            found = {name: widened(value) for name, value in leaf.gradients.items()}
            if k == len(sums):
                sums.append(found)
            else:
                for name, value in found.items():
                    sums[k][name] = sums[k][name] + value
        self.net.flush_gradients()
