"""The workers of the CPU engines, and BLAS held to one thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

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
        assert not threads.inside()
    finally:
        gpuconv.set_num_threads(None)


def test_nobody_waits_for_a_thread_that_is_busy() -> None:
    """Two threads call at once: each does itself what the helpers have no time for."""
    started, hold = threading.Event(), threading.Event()
    there: list[int] = []

    def occupied(k: int) -> None:
        if k == 1:
            started.set()
        assert (started if k == 0 else hold).wait(10)

    other = threading.Thread(target=threads.run, args=(occupied, 2))
    other.start()
    assert started.wait(10)
    threads.run(lambda k: there.append(threading.get_ident()), 2)
    hold.set()
    other.join()
    assert there == [threading.get_ident()] * 2


class TestTeam:
    """Jobs of the compiled engines, whose helpers stay awake."""

    @pytest.fixture
    def job(self) -> Iterator[Callable[[int, int], list[list[int]]]]:
        """Return what runs a job whose shares note that they were taken, and by whom."""
        numba = pytest.importorskip("numba")
        from gpuconv.engines import numba_team
        from gpuconv.engines.numba_memory import add, numbers_at

        @numba.cfunc("void(int64, int64, int64, int64)")
        def noted(at: int, share: int, count: int, worker: int) -> None:
            place = numba.carray(numbers_at(at), 1)[0]
            add(place + 16 * share, 1)
            total = 0
            for k in range(20_000):
                total += k * k % 7
            add(place + 16 * share + 8, worker + (total < 0))

        def run(count: int, workers: int) -> list[list[int]]:
            taken = np.zeros((max(count, 1), 2), np.int64)
            numba_team.run(noted.address, np.array([taken.ctypes.data]), count, workers)
            return taken[:count].tolist()  # type: ignore[no-any-return]

        gpuconv.set_num_threads(3)
        yield run
        gpuconv.set_num_threads(None)

    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_every_share_is_taken_once(
        self, job: Callable[[int, int], list[list[int]]], workers: int
    ) -> None:
        for count in (1, 2, 7, 64) * 20:
            taken = job(count, workers)
            assert [times for times, _ in taken] == [1] * count
            assert {worker for _, worker in taken} <= set(range(workers))

    def test_it_is_shared_once_the_helpers_are_awake(
        self, job: Callable[[int, int], list[list[int]]]
    ) -> None:
        found: set[int] = set()
        for _ in range(2000):
            found |= {worker for _, worker in job(16, 2)}
            if found == {0, 1}:
                break
        assert found == {0, 1}

    def test_callers_at_the_same_time_do_not_mix(
        self, job: Callable[[int, int], list[list[int]]]
    ) -> None:
        results: list[list[list[int]]] = []

        def call() -> None:
            for _ in range(50):
                results.append(job(16, 3))
                threads.run(lambda _: None, 3)

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(results) == 150
        assert all(times == 1 for taken in results for times, _ in taken)

    def test_they_sleep_in_between(self, job: Callable[[int, int], list[list[int]]]) -> None:
        import time

        job(64, 3)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1
        assert [times for times, _ in job(64, 3)] == [1] * 64  # and wake up again
