"""Layers' loops compiled by Numba, where the extra ``numba`` is installed.

What NumPy does in several passes over a block is one loop here: activations, pooling, and what
batch normalisation adds up and applies, in float32. A caller asks whether a loop takes its arrays, and goes
on with NumPy where it does not. Numba is imported when the first loop runs, and keeps on disk
what it compiled.

Chunks of work do not depend on the number of threads, nor does the order in which their sums are
added; so results do not either, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from gpuconv import settings, threads

__all__ = ["OPTIONS", "SMALL", "available", "numba_missing", "plain", "spread"]

#: How loops are compiled.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "boundscheck": False,
    "error_model": "numpy",
}
#: Elements below which NumPy's calls cost less than looking for a loop.
SMALL = 16 * 1024
#: Elements from which on a second thread is worth its start.
PARALLEL = 64 * 1024


def numba_missing() -> str | None:
    """Return why compiled loops cannot run here, or None."""
    if os.environ.get("GPUCONV_NUMBA") == "0":
        return "GPUCONV_NUMBA=0 switches it off"
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed: pip install 'gpuconv[numba]'"
    return None


@cache
def available() -> bool:
    """Return whether compiled loops can run here."""
    return numba_missing() is None


def plain(*arrays: Any, dense: bool = True) -> bool:
    """Return whether loops take these arrays: NumPy's, float32, and contiguous if ``dense``."""
    return all(
        type(a) is np.ndarray
        and a.dtype == np.float32
        and (a.flags.c_contiguous or not dense)
        and a.flags.aligned
        for a in arrays
    )


def spread(count: int, work: Callable[[int], None], parallel: bool = True) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, on every core if ``parallel``.

    A thread takes the next one when it is done with one: which thread does which must make no
    difference.
    """
    workers = min(count, settings.get_num_threads()) if parallel else 1
    if workers <= 1 or threads.inside():
        for k in range(count):
            work(k)
        return
    left = deque(range(count))
    done: list[int] = []

    def take(_: bool) -> None:
        while True:
            try:
                k = left.popleft()
            except IndexError:
                return
            work(k)
            done.append(k)

    threads.together(take, workers, lambda: len(done) == count)
