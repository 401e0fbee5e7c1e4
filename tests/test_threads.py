"""The workers of the CPU engines, and BLAS held to one thread."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

import gpuconv
from gpuconv import threads


def blas_threads() -> list[int]:
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return [c.get_num_threads() for c in found]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: BLAS has one thread anyway")
def test_blas_is_limited_from_any_thread_and_restored() -> None:
    before = blas_threads()
    seen: list[list[int]] = []

    def enter() -> None:
        with threads.single_threaded_blas():
            seen.append(blas_threads())

    enter()  # the first thread to limit OpenBLAS must not be the only one that can
    other = threading.Thread(target=enter)
    other.start()
    other.join()
    assert seen == [[1] * len(before)] * 2
    assert blas_threads() == before


def test_the_first_exception_is_raised_after_all_workers_ended() -> None:
    ended = []

    def work(k: int) -> None:
        if k == 1:
            raise MemoryError("worker 1")
        ended.append(k)

    with pytest.raises(MemoryError, match="worker 1"):
        threads.run(work, 4)
    assert sorted(ended) == [0, 2, 3]


def test_shares_are_contiguous_and_even() -> None:
    assert threads.shares(7, 3) == [range(2), range(2, 4), range(4, 7)]
    assert threads.shares(2, 5) == [range(1), range(1, 2)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_a_forked_child_computes() -> None:
    x, w = np.ones((4, 40, 40, 8), "float32"), np.ones((3, 3, 8, 16), "float32")
    want = gpuconv.conv2d(x, w)  # the pool is running now
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if np.array_equal(gpuconv.conv2d(x, w), want) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_work_inside_a_workers_work_waits_for_no_thread() -> None:
    """The pool has a thread for each core but one: work that needed another would wait for ever."""
    found: list[int] = []

    def outer(k: int) -> None:
        assert threads.inside()
        threads.run(lambda n: found.append(10 * k + n), 2)

    gpuconv.set_num_threads(2)
    try:
        threads.run(outer, 2)
        assert sorted(found) == [0, 1, 10, 11]
        found.clear()
        threads.together(lambda here: outer(int(here)), 2, lambda: len(found) == 4)
        assert {10, 11} <= set(found)
        assert not threads.inside()
    finally:
        gpuconv.set_num_threads(None)
