"""Times of single kernels, by NVIDIA's cupti-python where that is installed.

CUDA's events, by which the recorder measures, tell how long a pass took; CUPTI tells which kernels
that was. It is asked for kernels and copies only, and its buffers are read when all is over.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from gpuconv.profiling.reports import Kernel

__all__ = ["KernelTimes", "available", "covered"]

#: Bytes of a buffer of CUPTI's records.
BUFFER = 8 * 2**20


def available() -> bool:
    """Return whether cupti-python is installed and imports."""
    try:
        _module()
    except Exception:  # a broken installation raises what it likes; it is an optional part
        return False
    return True


def _module() -> Any:
    return importlib.import_module("cupti.cupti")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return for how long at least one of the intervals lasted."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


class KernelTimes:
    """Collects the kernels and copies that run inside a ``with`` block.

    Attributes
    ----------
    kernels : list of Kernel
        The longest first; complete once the block is left.
    intervals : list of (float, float)
        When each kernel and copy ran, in seconds.
    """

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self._cupti = _module()
        activity = self._cupti.ActivityKind
        self._kinds = (activity.CONCURRENT_KERNEL, activity.MEMCPY)
        self._times: dict[str, list[float]] = defaultdict(list)
        self.intervals: list[tuple[float, float]] = []

    @staticmethod
    def _requested() -> tuple[int, int]:
        """Return the bytes of a buffer, and no bound on its records."""
        return BUFFER, 0

    def _completed(self, activities: list[Any]) -> None:
        for record in activities:
            copied = record.kind == self._kinds[1]
            name = "[memory copy]" if copied else str(record.name)
            self._times[name].append((record.end - record.start) * 1e-9)
            self.intervals.append((record.start * 1e-9, record.end * 1e-9))

    def __enter__(self) -> KernelTimes:
        self._cupti.activity_register_callbacks(self._requested, self._completed)
        for kind in self._kinds:
            self._cupti.activity_enable(kind)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cupti.activity_flush_all(1)
        for one in self._kinds:
            self._cupti.activity_disable(one)
        found = [Kernel(n, len(t), sum(t), min(t), max(t)) for n, t in self._times.items()]
        self.kernels = sorted(found, key=lambda k: (-k.seconds, k.name))
