"""How everything here is timed: clocks, samples of a call, the best of many.

The benchmark, the check on a GPU, and the profiler all measure with these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

from gpuconv.cuda import runtime
from gpuconv.device import Device

__all__ = ["Clock", "EventClock", "HostClock", "best", "clock_for", "sample", "timed"]


class Clock(Protocol):
    """Takes marks and tells the time between them.

    Attributes
    ----------
    what : str
        What measures, in words.
    waits : bool
        Whether :meth:`seconds` may have to wait for a device, so that it is better asked late.
    """

    what: str
    waits: bool

    def mark(self) -> Any:
        """Return a mark at this point of the program."""

    def seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two marks."""

    def host(self, mark: Any) -> int:
        """Return when the host took the mark, in nanoseconds."""


class HostClock:
    """The monotonic clock: on the CPU everything has happened when its call returns."""

    what = "the host's monotonic clock"
    waits = False
    mark = staticmethod(time.perf_counter_ns)

    def seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two marks."""
        return float(last - first) * 1e-9

    def host(self, mark: Any) -> int:
        """Return the mark, which is in nanoseconds."""
        return int(mark)


class EventClock:
    """CUDA's events on the current stream: what the device does, not when it was asked to."""

    what = "CUDA events"
    waits = True

    def __init__(self) -> None:
        self._cuda = runtime.cupy().cuda

    def mark(self) -> Any:
        """Put an event into the current stream's queue."""
        event = self._cuda.Event()
        event.record()
        return event, time.perf_counter_ns()

    def seconds(self, first: Any, last: Any) -> float:
        """Return the seconds between two marks, once the device has come to the second."""
        last[0].synchronize()
        return float(self._cuda.get_elapsed_time(first[0], last[0])) * 1e-3

    def host(self, mark: Any) -> int:
        """Return when the event was put into the queue, in nanoseconds."""
        return int(mark[1])


def clock_for(place: Device) -> Clock:
    """Return the clock for what computes on this device."""
    return HostClock() if place.kind == "cpu" else EventClock()


def sample(run: Callable[[], Any], calls: int) -> float:
    """Return the seconds a call takes, over ``calls`` of them, by the host's clock."""
    clock = time.perf_counter
    repeat = range(calls)
    start = clock()
    for _ in repeat:
        run()
    return (clock() - start) / calls


def best(run: Callable[[], Any], seconds: float, clock: Clock | None = None) -> float:
    """Return the shortest time of a call, of those that fit into ``seconds``."""
    clock = clock or HostClock()
    run()
    start, shortest = time.perf_counter(), math.inf
    while time.perf_counter() - start < seconds:
        first = clock.mark()
        run()
        shortest = min(shortest, clock.seconds(first, clock.mark()))
    return shortest


def timed(
    call: Callable[[], Any], clock: Clock, seconds: float, least: int = 5, most: int = 200
) -> dict[str, float]:
    """Return the median and the quartiles of a call's time, in milliseconds.

    A sample holds as many calls as take some 2 ms, so that a device does not wait for Python
    before each, and a clock's own cost does not count.
    """

    def turn(calls: int) -> float:
        first = clock.mark()
        for _ in range(calls):
            call()
        return 1e3 * clock.seconds(first, clock.mark()) / calls

    call()
    calls = max(1, min(100, math.ceil(2 / max(turn(1), 1e-3))))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        times.append(turn(calls))
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": median, "q1": q1, "q3": q3, "calls": calls, "samples": len(times)}
