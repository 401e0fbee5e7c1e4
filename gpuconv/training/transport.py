"""What the training asks of a GPU beside arithmetic: pinned memory, streams, events, graphs.

Each is an interface with CUDA behind it by CuPy. What is done with them, in
:mod:`~gpuconv.training.feeding` and :mod:`~gpuconv.training.graph`, knows the interface alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from gpuconv.cuda import runtime
from gpuconv.device import Device

__all__ = ["Capture", "CudaCapture", "CudaTransport", "Transport"]

Array = Any


class Transport(Protocol):
    """Copies from the host to a device, on a stream of their own."""

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """Return an array of the host's that the device can read by itself."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array on the device."""

    def array(self, a: np.ndarray[Any, Any]) -> Array:
        """Return a copy on the device, in the compute stream's order."""

    def copy(self, host: np.ndarray[Any, Any], there: Array) -> None:
        """Put a copy into the copy stream's queue."""

    def sent(self) -> Any:
        """Return an event at this point of the copy stream."""

    def computed(self) -> Any:
        """Return an event at this point of the compute stream."""

    def wait(self, event: Any) -> None:
        """Let the compute stream wait for an event."""

    def hold(self, event: Any) -> None:
        """Let the copy stream wait for an event."""

    def finish(self, event: Any) -> None:
        """Wait for an event on the host."""


class CudaTransport:
    """The way to a GPU; the compute stream is the current one."""

    def __init__(self, place: Device) -> None:
        self._cupy, self._index = runtime.cupy(), place.index
        with self._cupy.cuda.Device(place.index):
            self._stream = self._cupy.cuda.Stream(non_blocking=True)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """Return an array in pinned memory."""
        count, kind = math.prod(shape), np.dtype(dtype)
        memory = self._cupy.cuda.alloc_pinned_memory(max(1, count * kind.itemsize))
        return np.frombuffer(memory, kind, count).reshape(shape)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array on the device."""
        with self._cupy.cuda.Device(self._index):
            return self._cupy.empty(shape, dtype)

    def array(self, a: np.ndarray[Any, Any]) -> Array:
        """Return a copy on the device."""
        with self._cupy.cuda.Device(self._index):
            return self._cupy.asarray(a)

    def copy(self, host: np.ndarray[Any, Any], there: Array) -> None:
        """Put a copy into the copy stream's queue."""
        with self._cupy.cuda.Device(self._index):
            there.set(host, stream=self._stream)

    def sent(self) -> Any:
        """Return an event at this point of the copy stream."""
        return self._event(self._stream)

    def computed(self) -> Any:
        """Return an event at this point of the compute stream."""
        return self._event(self._cupy.cuda.get_current_stream())

    def _event(self, stream: Any) -> Any:
        with self._cupy.cuda.Device(self._index):
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(stream)
            return event

    def wait(self, event: Any) -> None:
        """Let the compute stream wait for an event."""
        self._cupy.cuda.get_current_stream().wait_event(event)

    def hold(self, event: Any) -> None:
        """Let the copy stream wait for an event."""
        self._stream.wait_event(event)

    def finish(self, event: Any) -> None:
        """Wait for an event on the host."""
        event.synchronize()


class Capture(Protocol):
    """Records work once and repeats it as one.

    Attributes
    ----------
    errors : tuple of exception classes
        What :meth:`record` raises where something cannot be captured.
    """

    errors: tuple[type[BaseException], ...]

    def record(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` and keep what it puts into the queue; return what it returned.

        Whatever arrays ``work`` reads or returns stay where they are from then on.
        """

    def replay(self) -> None:
        """Do the work again, on the same arrays."""


class CudaCapture:
    """A CUDA graph, on a stream and in a memory pool of its own.

    The pool keeps what the graph writes to from being given to anything else.
    """

    def __init__(self, place: Device) -> None:
        self._cupy, self._index = runtime.cupy(), place.index
        cuda = self._cupy.cuda
        self.errors: tuple[type[BaseException], ...] = (
            cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError,
        )  # fmt: skip
        with cuda.Device(place.index):
            self._stream = cuda.Stream(non_blocking=True)
            self._pool = cuda.MemoryPool()
        self._graph: Any = None

    def record(self, work: Callable[[], Any]) -> Any:
        """Capture ``work``."""
        cuda = self._cupy.cuda
        with cuda.Device(self._index):
            self._after(cuda.get_current_stream())
            with cuda.using_allocator(self._pool.malloc), self._stream:
                # Compiles, and lets the pool get its memory: neither may happen while capturing.
                work()
                self._stream.synchronize()
                self._stream.begin_capture()
                try:
                    result = work()
                finally:
                    graph = self._stream.end_capture()
        self._graph = graph
        return result

    def _after(self, stream: Any) -> None:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        self._stream.wait_event(event)

    def replay(self) -> None:
        """Launch the graph, between what came before and what comes next in the current stream."""
        cuda = self._cupy.cuda
        with cuda.Device(self._index):
            current = cuda.get_current_stream()
            self._after(current)
            self._graph.launch(self._stream)
            event = cuda.Event(disable_timing=True)
            event.record(self._stream)
            current.wait_event(event)
