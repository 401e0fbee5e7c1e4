"""Threads for the CPU engines: a worker per core, BLAS held to one thread inside.

The work is divided *statically*: share k is always the same, whoever takes it, so sums over shares
are added in the same order and results repeat bit for bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Protocol

__all__ = [
    "Idle",
    "helpers",
    "inside",
    "run",
    "shares",
    "single_threaded_blas",
    "together",
    "while_idle",
]

_lock = threading.Lock()
_helpers: list[_Helper] = []
_idle: Idle | None = None
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


class _Task:
    """A worker's share of the work, for whoever takes it first."""

    __slots__ = ("_argument", "_ended", "_taken", "_work", "error")

    def __init__(self, work: Callable[[Any], None], argument: Any) -> None:
        self._work, self._argument = work, argument
        self._taken, self._ended = threading.Lock(), threading.Lock()
        self._ended.acquire()
        self.error: BaseException | None = None

    def take(self) -> bool:
        """Do the work, or return False if somebody else does."""
        if not self._taken.acquire(blocking=False):
            return False
        try:
            self._work(self._argument)
        except BaseException as error:
            self.error = error
        finally:
            self._ended.release()
        return True

    def cancel(self) -> bool:
        """Let nobody begin the work, or return False if somebody has."""
        return self._taken.acquire(blocking=False)

    def wait(self) -> None:
        """Wait for the end of the work."""
        self._ended.acquire()


class _Helper:
    """A thread that waits for tasks."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        name = f"gpuconv_{number}"
        threading.Thread(target=self._live, name=name, daemon=True).start()

    def give(self, task: _Task | None) -> None:
        """Wake the thread, for a task or for what it does between tasks."""
        self._tasks.put(task)
        if task is not None and _idle is not None:
            _idle.interrupt(self._number)

    def _live(self) -> None:
        while True:
            task = self._tasks.get()
            if task is not None:
                task.take()
            task = None  # whose arrays are not held while this waits
            if _idle is not None:
                _idle.wait(self._number)


class Idle(Protocol):
    """What helpers do when they have no task, before they sleep."""

    def wait(self, helper: int) -> None:
        """Wait a while."""

    def interrupt(self, helper: int) -> None:
        """End the waiting of a helper: there is a task."""

    def forget(self) -> None:
        """All helpers are gone: this is a process of its own."""


def while_idle(idle: Idle) -> None:
    """Let helpers wait in this way from now on."""
    global _idle
    _idle = idle


def helpers(count: int) -> list[_Helper]:
    """Return at least so many helpers."""
    if len(_helpers) < count:
        with _lock:
            _helpers.extend(_Helper(number) for number in range(len(_helpers), count))
    return _helpers


def run(work: Callable[[int], None], workers: int) -> None:
    """Call ``work(0)`` to ``work(workers - 1)``, at the same time, and wait for all.

    The calling thread takes number 0, and then what nobody else has begun: a thread that is still
    asleep keeps nobody waiting. The first exception is raised when all have ended. From inside
    another run they are called in turn: all cores are at work already.
    """
    if workers == 1 or inside():
        for k in range(workers):
            work(k)
        return
    marked = _marked(work)
    tasks = [_Task(marked, k) for k in range(workers)]
    for helper, task in zip(helpers(workers - 1), tasks[1:], strict=False):
        helper.give(task)
    late = [task for task in tasks if not task.take()]
    for task in late:
        task.wait()
    for task in tasks:
        if task.error is not None:
            raise task.error


def together(work: Callable[[bool], None], workers: int, done: Callable[[], bool]) -> None:
    """Call ``work(True)`` here and ``work(False)`` in helpers, as soon as they wake up.

    The work is a number of shares that each call takes one after the other until there are none,
    and which call takes which must make no difference to the result. So nobody waits for a thread
    that is still asleep when ``done()`` says that all shares are.
    """
    if workers == 1 or inside():
        work(True)
        return
    marked = _marked(work)
    mine, *others = (_Task(marked, first) for first in (True, *(False,) * (workers - 1)))
    for helper, task in zip(helpers(workers - 1), others, strict=False):
        helper.give(task)
    mine.take()
    late = [task for task in others if not task.cancel()]
    if mine.error is not None or not done():
        for task in late:
            task.wait()
    for task in (mine, *late):
        if task.error is not None:
            raise task.error


def _after_fork() -> None:
    """A child process has none of its parent's threads, and no lock that one of them held."""
    global _lock, _depth
    _lock, _depth = threading.Lock(), 0
    _helpers.clear()
    if _idle is not None:
        _idle.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
