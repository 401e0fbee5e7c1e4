"""Memory of large arrays on the CPU, kept for the next array when one is gone.

The C library hands the pages of a large array that is freed back to the system, and gets them
anew for the next, zeroed, page by page: that takes longer than many a layer computes. So the
memory of results is kept here, as CuPy and PyTorch keep a GPU's: at most as many bytes as
:func:`gpuconv.set_workspace_limit` allows for buffers. What was not asked for lately goes first.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.device import namespace

__all__ = ["clear", "empty", "empty_as", "kept"]

Array = Any
#: Bytes below which the C library keeps memory itself.
LARGE = 1 << 20
#: Sizes are rounded up to multiples of this, so that arrays of nearly one size share memory.
STEP = 1 << 16
_ALIGNED = 64

#: Held while what is kept is counted. Nobody waits for it: a collection may end arrays at any
#: time, also in the thread that holds it.
_lock = threading.Lock()
#: Memory that came back and is not counted yet.
_returned: deque[Array] = deque()
_free: OrderedDict[int, list[Array]] = OrderedDict()
_kept = 0


class _Held:
    """What a large array and its views rest on; when the last is gone, the memory comes back."""

    __slots__ = ("__array_interface__", "_memory")

    def __init__(self, memory: Array) -> None:
        at = memory.ctypes.data
        self._memory = memory
        size = len(memory) - _ALIGNED
        self.__array_interface__ = {
            "version": 3, "shape": (size,), "typestr": "|u1", "data": (at + -at % _ALIGNED, False),
        }  # fmt: skip

    def __del__(self) -> None:
        _returned.append(self._memory)
        _count()


def empty(shape: Sequence[int], dtype: Any) -> Array:
    """Return a new array of NumPy's, dense and with any content, like :func:`numpy.empty`."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return np.empty(shape, dtype)
    held = _Held(_taken(-(-nbytes // STEP) * STEP + _ALIGNED))
    return np.asarray(held)[:nbytes].view(dtype).reshape(shape)


def empty_as(a: Array, shape: Sequence[int] | None = None, dtype: Any = None) -> Array:
    """Return a new array where ``a`` is, of its shape and dtype unless others are given."""
    xp = namespace(a)
    shape, dtype = a.shape if shape is None else shape, a.dtype if dtype is None else dtype
    return empty(shape, dtype) if xp is np else xp.empty(shape, dtype)


def kept() -> int:
    """Return the bytes that are kept and not in use."""
    return _kept


def clear() -> None:
    """Give all that is not in use back to the system."""
    global _kept
    with _lock:
        _returned.clear()
        _free.clear()
        _kept = 0


def _taken(size: int) -> Array:
    """Return memory that was kept, if there is of this size, else new."""
    global _kept
    found: Array = None
    if _lock.acquire(blocking=False):
        try:
            if size in _free:
                found = _free[size].pop()
                _kept -= size
                if _free[size]:
                    _free.move_to_end(size)
                else:
                    del _free[size]
        finally:
            _lock.release()
        _count()
    if found is not None:
        return found
    try:
        return np.empty(size, np.uint8)
    except MemoryError:
        if not _kept:
            raise
        clear()
        return np.empty(size, np.uint8)


def _count() -> None:
    """Keep what came back, within the limit; whoever holds the lock does it for the others."""
    global _kept
    limit = settings.get_workspace_limit()
    while _returned and _lock.acquire(blocking=False):
        try:
            while _returned:
                memory = _returned.popleft()
                size = len(memory)
                _free.setdefault(size, []).append(memory)
                _free.move_to_end(size)
                _kept += size
            while _kept > limit:
                oldest = next(iter(_free))
                _free[oldest].pop()
                _kept -= oldest
                if not _free[oldest]:
                    del _free[oldest]
        finally:
            _lock.release()


def _after_fork() -> None:
    """Another thread may have held the lock when this process began."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
