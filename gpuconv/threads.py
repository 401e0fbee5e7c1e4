"""Threads for the CPU engines: a worker per core, BLAS held to one thread inside.

The work is divided *statically*: worker k always gets the same share, so sums over workers
are added in the same order and results repeat bit for bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from gpuconv import settings

__all__ = ["inside", "run", "shares", "single_threaded_blas", "together"]

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_blas: list[_Blas] | None = None
_depth = 0
_local = threading.local()


def inside() -> bool:
    """Return whether this thread is at work for :func:`run`, so that the cores are taken."""
    return getattr(_local, "inside", False)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Hold BLAS to one thread, for the process, until the last user of this leaves.

    The limit belongs to the process, so concurrent callers share it: the first to enter sets
    it and the last to leave restores it.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for blas in _libraries():
                blas.restore = blas.get()
                blas.set(1)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for blas in _libraries():
                    blas.set(blas.restore)


class _Blas:
    """A loaded BLAS whose number of threads can be set."""

    def __init__(self, controller: Any) -> None:
        self.get: Callable[[], int] = controller.get_num_threads
        # threadpoolctl lets one thread of a process set an OpenBLAS limit and ignores all
        # others; here every caller counts, and the lock above keeps them in order.
        self.set: Callable[[int], None] = getattr(
            controller, "_real_set_num_threads", controller.set_num_threads
        )
        self.restore = 1


def _libraries() -> list[_Blas]:
    global _blas
    if _blas is None:
        from threadpoolctl import ThreadpoolController

        found = ThreadpoolController().select(user_api="blas")
        _blas = [_Blas(c) for c in found.lib_controllers]
    return _blas


def shares(count: int, workers: int) -> list[range]:
    """Divide ``range(count)`` into at most ``workers`` contiguous, nearly equal ranges."""
    workers = max(1, min(workers, count))
    bounds = [count * k // workers for k in range(workers + 1)]
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _marked(work: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the work, during which :func:`inside` is true."""

    def call(argument: Any) -> None:
        before, _local.inside = inside(), True
        try:
            work(argument)
        finally:
            _local.inside = before

    return call


def run(work: Callable[[int], None], workers: int) -> None:
    """Call ``work(0)`` to ``work(workers - 1)``, at the same time, and wait for all.

    The calling thread takes number 0. The first exception is raised when all have ended. From
    inside another run they are called in turn: all cores are at work already.
    """
    if workers == 1 or inside():
        for k in range(workers):
            work(k)
        return
    pool = _executor(workers - 1)
    marked = _marked(work)
    futures = [pool.submit(marked, k) for k in range(1, workers)]
    try:
        marked(0)
    finally:
        errors = [f.exception() for f in futures]
    for error in errors:
        if error is not None:
            raise error


def together(work: Callable[[bool], None], workers: int, done: Callable[[], bool]) -> None:
    """Call ``work(True)`` here and ``work(False)`` in other threads, as soon as they wake up.

    The work is a number of shares that each call takes one after the other until there are none,
    and which call takes which must make no difference to the result. So nobody waits for a thread
    that is still asleep when ``done()`` says that all shares are.
    """
    if workers == 1 or inside():
        work(True)
        return
    pool = _executor(workers - 1)
    marked = _marked(work)
    futures = [pool.submit(marked, False) for _ in range(1, workers)]
    try:
        marked(True)
    finally:
        late = [f for f in futures if not f.cancel()]
        errors = [] if done() else [f.exception() for f in late]
    for error in errors:
        if error is not None:
            raise error


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            old = _pool
            _pool_size = max(size, settings.get_num_threads() - 1)
            _pool = ThreadPoolExecutor(_pool_size, thread_name_prefix="gpuconv")
            if old is not None:
                old.shutdown(wait=False)
        return _pool


def _after_fork() -> None:
    """A child process has none of its parent's threads, and no lock that one of them held."""
    global _pool, _pool_size, _lock, _depth
    _pool, _pool_size, _lock, _depth = None, 0, threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
