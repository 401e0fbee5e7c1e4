"""What to do when the device is full: free what is held back, use less room, split the batch.

A step that does not fit is taken again with its batch in parts, whose gradients are added up: to
rounding, the same step. Where an example's result depends on the others of its batch (batch
statistics), the batch must stay whole; such a network is only split inside its layers, whose
convolutions split the batch themselves rather than exceed the workspace limit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from gpuconv import settings
from gpuconv.cuda import runtime
from gpuconv.device import Device
from gpuconv.layers import BatchNorm1D, BatchNorm2D
from gpuconv.models import Sequential
from gpuconv.training.watch import leaves

__all__ = [
    "CudaRoom", "HostRoom", "OutOfMemory", "Room", "Splitter", "has_batch_statistics", "room_for",
    "told", "wanted",
]  # fmt: skip

log = logging.getLogger("gpuconv")

Array = Any

#: The least workspace that can be asked for.
LEAST = 2**20


class OutOfMemory(MemoryError):
    """A step does not fit into the device, and cannot be split further."""


class Room(Protocol):
    """A device's memory.

    Attributes
    ----------
    errors : tuple of exception classes
        What is raised where it is full.
    """

    errors: tuple[type[BaseException], ...]

    def free(self) -> None:
        """Give back what is held and not used."""


class HostRoom:
    """The CPU's: NumPy raises MemoryError, and holds nothing back."""

    errors: tuple[type[BaseException], ...] = (MemoryError,)

    def free(self) -> None:
        """Do nothing."""


class CudaRoom:
    """A GPU's, behind CuPy's pool."""

    def __init__(self) -> None:
        self._cupy = runtime.cupy()
        self.errors: tuple[type[BaseException], ...] = (self._cupy.cuda.memory.OutOfMemoryError,)

    def free(self) -> None:
        """Let the pools give their free blocks back to the driver."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()


def room_for(place: Device) -> Room:
    """Return the memory of a device."""
    return HostRoom() if place.kind == "cpu" else CudaRoom()


def has_batch_statistics(net: Sequential) -> bool:
    """Return whether any layer's result for an example depends on the others of its batch."""
    return any(
        isinstance(leaf, (BatchNorm1D, BatchNorm2D)) or getattr(leaf, "batch_statistics", False)
        for leaf in leaves(net)
    )


class Splitter:
    """Calls something over a batch, in as many parts as the device's memory asks for.

    Parameters
    ----------
    room : Room
        The device's memory.
    whole : bool
        Whether the batch must not be split.
    reset : callable
        Called before a batch is begun anew: forgets what a failed attempt has left.

    Attributes
    ----------
    parts : int
        In how many parts batches are computed; it only grows.
    """

    def __init__(self, room: Room, whole: bool, reset: Callable[[], None]) -> None:
        self._room, self._whole, self._reset = room, whole, reset
        self.parts = 1
        self._warned = False

    def __call__(self, compute: Callable[[slice], None], size: int) -> None:
        """Call ``compute`` with slices that together are the batch, each example in one.

        Parameters
        ----------
        compute : callable
            Computes a part. Where it runs out of memory, all parts are computed anew.
        size : int
            Of the batch.

        Raises
        ------
        OutOfMemory
            If the batch cannot be split further; the text says how much was wanted.
        """
        while True:
            try:
                for part in self.slices(size):
                    compute(part)
                return
            except self._room.errors as error:
                size_wanted = wanted(error)
            # Outside of the handler: the traceback would keep the failed attempt's arrays alive.
            self._reset()
            self._room.free()
            self._shrink(size, size_wanted)

    def slices(self, size: int) -> list[slice]:
        """Return the parts of a batch: as even as can be, none empty."""
        parts = min(self.parts, size)
        ends = [size * k // parts for k in range(parts + 1)]
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def _shrink(self, size: int, size_wanted: str) -> None:
        """Halve the workspace and the parts, or say that nothing can be halved."""
        limit = settings.get_workspace_limit()
        more = not self._whole and self.parts < size
        if not more and limit <= LEAST:
            why = (
                "a network with batch statistics is not split across its batch"
                if self._whole and size > 1
                else "its batch is split into single examples"
            )
            raise OutOfMemory(
                f"the device's memory is too small for a step: {size_wanted}; {why} and the workspace "
                f"limit is at its least: a smaller --batch-size or network may fit"
            )
        if limit > LEAST:
            settings.set_workspace_limit(max(LEAST, limit // 2))
        if more:
            self.parts = min(2 * self.parts, size)
        if not self._warned:
            self._warned = True
            how = (
                "only the layers split it inside, as the network has batch statistics"
                if self._whole
                else "its parts' gradients are added up, in as many parts as it takes"
            )
            log.warning(
                "out of memory in a batch of %d (%s): the workspace limit is lowered and the "
                "batch split; %s",
                size,
                size_wanted,
                how,
            )


@contextmanager
def told(room: Room, what: str) -> Iterator[None]:
    """Say what was computed where the device is full, and how much was wanted.

    Raises
    ------
    OutOfMemory
        In the place of the room's own errors.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except room.errors as error:
        raise OutOfMemory(
            f"the device's memory is too small for {what}: {wanted(error)}; a smaller "
            "--batch-size or network may fit"
        ) from None


def wanted(error: BaseException) -> str:
    """Return what an error says, with large numbers of bytes in MiB as well."""
    text = str(error).strip().splitlines()
    line = text[0].rstrip(".") if text else type(error).__name__
    match = re.search(r"allocating ([\d,]+) bytes", line)
    if match and int(match[1].replace(",", "")) >= 2**20:
        line += f" = {int(match[1].replace(',', '')) / 2**20:.1f} MiB wanted"
    return line
