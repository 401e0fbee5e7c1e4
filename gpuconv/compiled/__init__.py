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
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gpuconv import settings

__all__ = ["SMALL", "available", "numba_missing", "plain", "run"]

Array = np.ndarray[Any, Any]

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


def run(job: int, arguments: Sequence[Array | int], shares: int, parallel: bool = True) -> None:
    """Run a job on every core if ``parallel``.

    Parameters
    ----------
    job : int
        Of :func:`gpuconv.engines.numba_team_loops.job`. Which worker takes which share must make
        no difference.
    arguments : sequence of ndarray and int
        The job finds, as 64-bit integers, a number as it is, and of an array its address and then
        its shape.
    shares : int
    parallel : bool
    """
    from gpuconv.engines import numba_team

    numbers: list[int] = []
    for a in arguments:
        if isinstance(a, int):
            numbers.append(a)
        else:
            numbers += (a.ctypes.data, *a.shape)
    workers = settings.get_num_threads() if parallel else 1
    numba_team.run(job, np.array(numbers, np.int64), shares, workers)
