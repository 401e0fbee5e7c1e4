"""How batches reach the network: from where they are, or through pinned memory, two in flight.

A GPU computes a batch while the next is copied to it. What must be in order is said with events:

- the compute stream waits for the copy of its batch;
- the copy stream waits, before it overwrites a batch on the device, until that was computed with;
- the host waits, before it overwrites a batch in pinned memory, until that was copied.

The last is the only wait of the host's, and it is for a copy two batches back: so the host stays
at most that far ahead of the device, and waits for nothing within a step.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

import numpy as np

from gpuconv.device import Device, asarray
from gpuconv.training.transport import CudaTransport, Transport

__all__ = ["Feeder", "Pinned", "Resident", "feeder_for"]

Array = Any
Order = np.ndarray[Any, Any]
Batches = Generator[tuple[Array, Array], None, None]
#: Batches between host and device at a time.
DEPTH = 2


class Feeder(Protocol):
    """Gives a step's images and labels."""

    def batches(self, order: Order, size: int, first: int = 0) -> Batches:
        """Yield images and labels, on the device, of the batches from number ``first`` on.

        Parameters
        ----------
        order : ndarray of int
            The epoch's order of the examples.
        size : int
            Of a batch; the last may be smaller.
        first : int
            The number of the first batch to yield.
        """

    def fetch(self, order: Order, size: int, number: int) -> tuple[Array, Array]:
        """Return one batch, without hurry."""


class Resident:
    """All examples are on the device at once; a batch is taken there."""

    def __init__(self, images: Array, labels: Array, place: Device) -> None:
        self._images, self._labels = asarray(images, place), asarray(labels, place)
        self._place = place

    def fetch(self, order: Order, size: int, number: int) -> tuple[Array, Array]:
        """Return one batch."""
        chosen = asarray(order[number * size :][:size], self._place)
        return self._images[chosen], self._labels[chosen]

    def batches(self, order: Order, size: int, first: int = 0) -> Batches:
        """Yield the batches from number ``first`` on."""
        for number in range(first, -(-len(order) // size)):
            yield self.fetch(order, size, number)


class _Slot:
    """A batch's place in pinned memory and on the device, and the events that guard it."""

    def __init__(self, transport: Transport, size: int, images: Array, labels: Array) -> None:
        self.host = [transport.pinned((size, *a.shape[1:]), a.dtype) for a in (images, labels)]
        self.device = [transport.empty((size, *a.shape[1:]), a.dtype) for a in (images, labels)]
        self.copied: Any = None
        self.used: Any = None
        self.count = 0


class Pinned:
    """Examples stay on the host; batches go through pinned memory, the copy beside the compute.

    The arrays yielded are overwritten two batches later: whatever is made of them has to be put
    into the compute stream's queue before the next batch is asked for.

    Parameters
    ----------
    images, labels : ndarray
        NumPy arrays.
    transport : Transport
        The way to the device.
    depth : int
        Batches in flight.
    """

    def __init__(
        self, images: Array, labels: Array, transport: Transport, depth: int = DEPTH
    ) -> None:
        self._images, self._labels = np.asarray(images), np.asarray(labels)
        self._transport, self._depth = transport, depth
        self._slots: list[_Slot] = []
        self._size = 0

    def fetch(self, order: Order, size: int, number: int) -> tuple[Array, Array]:
        """Return one batch."""
        chosen = order[number * size :][:size]
        return self._transport.array(self._images[chosen]), self._transport.array(
            self._labels[chosen]
        )

    def batches(self, order: Order, size: int, first: int = 0) -> Batches:
        """Yield the batches from number ``first`` on."""
        if self._size < size:
            self._slots = [
                _Slot(self._transport, size, self._images, self._labels) for _ in range(self._depth)
            ]
            self._size = size
        numbers = range(first, -(-len(order) // size))
        sent = 0
        for done in range(len(numbers)):
            while sent < len(numbers) and sent < done + self._depth:
                self._send(self._slots[sent % self._depth], order[numbers[sent] * size :][:size])
                sent += 1
            slot = self._slots[done % self._depth]
            self._transport.wait(slot.copied)
            try:
                yield slot.device[0][: slot.count], slot.device[1][: slot.count]
            finally:
                # Also where the caller has had enough: the next epoch uses the same slots.
                slot.used = self._transport.computed()

    def _send(self, slot: _Slot, chosen: Order) -> None:
        """Put a batch on its way."""
        if slot.copied is not None:
            self._transport.finish(slot.copied)
        if slot.used is not None:
            self._transport.hold(slot.used)
        slot.count = len(chosen)
        for host, source in zip(slot.host, (self._images, self._labels), strict=True):
            np.take(source, chosen, axis=0, out=host[: slot.count])
        for host, there in zip(slot.host, slot.device, strict=True):
            self._transport.copy(host[: slot.count], there[: slot.count])
        slot.copied = self._transport.sent()


def feeder_for(images: Array, labels: Array, place: Device) -> Feeder:
    """Return the way of a device: what is on the host goes through pinned memory to a GPU."""
    on_host = isinstance(images, np.ndarray) and isinstance(labels, np.ndarray)
    if place.kind == "cuda" and on_host:
        return Pinned(images, labels, CudaTransport(place))
    return Resident(images, labels, place)
