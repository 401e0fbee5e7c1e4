"""Compiled loops for several workers: the helpers stay awake between two of them.

To wake a sleeping thread takes some 30 microseconds, and Python's lock must change hands twice:
longer than a small layer computes. So a helper that has worked goes on looking for more, in
compiled code and without the lock, for a moment before it sleeps; where one call follows the other
it never does. Shares are taken from one counter by whoever comes first, and which worker takes
which makes no difference to the result: nobody waits for a thread that wakes up late.

A *job* is the address of a function ``(job, share, count, worker)`` and that of its arguments, an
array of integers.
"""

from __future__ import annotations

import threading
import time
from functools import cache
from typing import Any

import numpy as np

from gpuconv import threads

__all__ = ["run"]

Array = np.ndarray[Any, Any]

#: Seconds for which a helper looks for work before it sleeps, some times what waking it takes.
AWAKE = 1.5e-4
#: The most workers and shares that the counter holds.
MOST_WORKERS, MOST_SHARES = 62, 65_535


def _loops() -> Any:
    from gpuconv.engines import numba_team_loops

    return numba_team_loops


class _Team:
    """The helpers of this process, as compiled code sees them."""

    def __init__(self) -> None:
        self._loops = _loops()
        self._memory = np.zeros(self._loops.WORDS + 8, np.int64)  # whole cache lines
        at = self._memory.ctypes.data
        self._box = at + -at % 64
        self._owner = threading.Lock()
        self._spins = self._spins_for(AWAKE)
        threads.while_idle(self)

    def _spins_for(self, seconds: float) -> int:
        """Return how often a helper looks for work in this time."""
        count, least = 2000, 1.0
        for _ in range(4):
            start = time.perf_counter()
            self._loops.finished(self._box, 1, count)
            least = min(least, time.perf_counter() - start)
        return max(100, int(seconds / least * count))

    def wait(self, helper: int) -> None:
        """Look for work, and do it, until there has been none for a while."""
        if helper < MOST_WORKERS - 1:
            self._loops.serve(self._box, helper, self._spins)

    def interrupt(self, helper: int) -> None:
        """End a helper's waiting."""
        if helper < MOST_WORKERS - 1:
            self._loops.interrupt(self._box, helper)

    def forget(self) -> None:
        """Begin anew in a process without the helpers."""
        self._owner = threading.Lock()
        self._memory[:] = 0

    def run(self, function: int, job: int, count: int, workers: int) -> bool:
        """Run all shares of a job; return False if the helpers are another thread's."""
        if not self._owner.acquire(blocking=False):
            return False
        try:
            asleep = self._loops.begin(self._box, function, job, count, workers)
            if asleep:
                helpers = threads.helpers(workers - 1)
                for k in range(workers - 1):
                    if asleep >> k & 1:
                        helpers[k].give(None)
        finally:
            while not self._loops.lead(self._box, count, self._spins):
                time.sleep(2e-5)
            self._owner.release()
        return True


@cache
def _team() -> _Team:
    return _Team()


def run(function: int, job: Array, count: int, workers: int) -> None:
    """Run the shares of a job, 0 to ``count - 1``, here and in ``workers - 1`` helpers.

    Parameters
    ----------
    function : int
        Address of a compiled ``(job, share, count, worker)``, all integers. Which worker takes
        which share is chance.
    job : ndarray
        Integers, passed by their address.
    count, workers : int
    """
    at = job.ctypes.data
    workers = min(workers, MOST_WORKERS, count)
    alone = workers <= 1 or count > MOST_SHARES or threads.inside()
    if alone or not _team().run(function, at, count, workers):
        _loops().alone(function, at, count)
