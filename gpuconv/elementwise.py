"""Functions of every element: on the CPU in blocks that stay in a cache, a worker per core.

A formula of several NumPy calls over a whole array goes to memory and back for each of them;
over a block it stays in the core's cache. On a GPU the block is the whole array.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from gpuconv import memory, settings, threads
from gpuconv.device import namespace

__all__ = ["BLOCK", "New", "Step", "apply", "at_least_zero", "at_most"]

Array = Any

#: Elements of a block. It stays in the cache that cores share, not in a core's own: two workers
#: with smaller ones wait for the interpreter's lock, between calls, longer than they work.
BLOCK = 512 * 1024
#: Elements from which on a second worker is worth its start.
PARALLEL = 256 * 1024


class New(Protocol):
    """Gives uninitialised memory of a block's shape; the same for the same name."""

    def __call__(self, name: str, dtype: Any = None) -> Array: ...


#: ``step(xp, out, new, *arrays)`` writes into ``out``, which may be one of the arrays.
Step = Callable[..., None]


class _Buffers(threading.local):
    """A thread's buffers of a block's length."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Array] = {}

    def get(self, name: str, size: int, dtype: np.dtype[Any]) -> Array:
        """Return ``size`` elements of memory."""
        key = name, dtype.name
        found = self._held.get(key)
        if found is None or len(found) < size:
            found = self._held[key] = np.empty(size, dtype)
        return found[:size]


_buffers = _Buffers()


def at_least_zero(xp: Any, a: Array, out: Array) -> Array:
    """Write ``max(a, 0)`` into ``out`` and return it; NaN stays NaN."""
    if xp is np and a.dtype.kind == "f":  # a maximum with a number takes four times as long
        return np.clip(a, 0, np.inf, out=out)
    return xp.maximum(a, 0, out=out)


def at_most(xp: Any, a: Array, limit: float, out: Array) -> Array:
    """Write ``min(a, limit)`` into ``out`` and return it; NaN stays NaN."""
    if xp is np and a.dtype.kind == "f":
        return np.clip(a, -np.inf, limit, out=out)
    return xp.minimum(a, limit, out=out)


def apply(step: Step, *arrays: Array, out: Array | None = None) -> Array:
    """Return what ``step`` makes of arrays of one shape, element by element.

    Parameters
    ----------
    step : callable
        See :data:`Step`. It is given arrays of float32 in the place of 16-bit ones, and of
        float64 in the place of integers.
    arrays : ndarray
        Of one shape and library.
    out : ndarray, optional
        Where to put the result; may be one of the arrays.

    Returns
    -------
    ndarray
        ``out``; if there is none, of the first array's dtype, or float64 if that is no
        floating-point number.
    """
    first = arrays[0]
    xp = namespace(first)
    kind, wide = _dtypes(arrays)
    if xp is not np:
        given = [a.astype(wide, copy=False) for a in arrays]
        target = out if out is not None and out.dtype == wide else xp.empty(first.shape, wide)
        step(xp, target, lambda name, dtype=None: xp.empty(first.shape, dtype or wide), *given)
        if out is None:
            return target.astype(kind, copy=False)
        if out is not target:
            out[...] = target
        return out
    direct = out is not None and out.flags.c_contiguous
    result = out if direct else memory.empty(first.shape, kind)
    flats = [np.ascontiguousarray(a).reshape(-1) for a in arrays]
    _by_blocks(step, flats, result.reshape(-1), wide)  # type: ignore[union-attr]
    if out is None or direct:
        return result
    out[...] = result
    return out


def _dtypes(arrays: tuple[Array, ...]) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return the dtype of the result, and that of the computation."""
    kind = np.dtype(arrays[0].dtype)
    if kind.kind in "iub":
        kind = np.dtype(np.float64)
    wide = kind if kind.itemsize > 2 else np.dtype(np.float32)
    for other in arrays[1:]:
        if other.dtype != kind and other.dtype.itemsize > wide.itemsize:
            wide = np.dtype(other.dtype)
    return kind, wide


def _by_blocks(step: Step, flats: list[Array], result: Array, wide: np.dtype[Any]) -> None:
    size = result.size
    workers = 1
    if size >= PARALLEL and not threads.inside():
        workers = settings.get_num_threads()
    shares = threads.shares(size, workers) if size else []

    def work(k: int) -> None:
        share = shares[k]
        with np.errstate(all="ignore"):  # NaN and Inf travel on without a word; a thread's own
            for block in threads.shares(len(share), -(-len(share) // BLOCK)):
                part = slice(share.start + block.start, share.start + block.stop)
                _block(step, [a[part] for a in flats], result[part], wide)

    if shares:
        threads.run(work, len(shares))


def _block(step: Step, arrays: list[Array], target: Array, wide: np.dtype[Any]) -> None:
    size = target.size

    def new(name: str, dtype: Any = None) -> Array:
        return _buffers.get(name, size, wide if dtype is None else np.dtype(dtype))

    for k, a in enumerate(arrays):
        if a.dtype != wide:
            copy = arrays[k] = new(f"array {k}")
            copy[...] = a
    out = target if target.dtype == wide else new("result")
    for k, a in enumerate(arrays):
        # The same memory is the same array to the step; memory that overlaps is not read twice.
        if a.ctypes.data == out.ctypes.data:
            arrays[k] = out
    step(np, out, new, *arrays)
    if out is not target:
        target[...] = out
