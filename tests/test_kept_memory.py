"""Memory of large results that is kept for the next ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import gpuconv
from gpuconv import memory

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    limit = gpuconv.get_workspace_limit()
    gc.collect()
    memory.clear()
    yield
    gpuconv.set_workspace_limit(limit)
    memory.clear()


def test_the_next_array_lies_where_the_last_one_was() -> None:
    first = memory.empty((512, 1024), "float32")
    assert first.shape == (512, 1024)
    assert first.dtype == np.float32
    assert first.flags.c_contiguous
    assert first.flags.writeable
    assert first.flags.aligned
    assert first.ctypes.data % 64 == 0
    at = first.ctypes.data
    second = memory.empty((512, 1024), "float32")
    assert second.ctypes.data != at
    assert memory.kept() == 0
    del first
    assert memory.kept() >= 2 * MEGABYTE
    third = memory.empty((1024, 256), "float64")
    assert third.ctypes.data == at
    assert memory.kept() == 0


def test_a_view_holds_the_memory() -> None:
    whole = memory.empty((1024, 1024), "float32")
    row = whole[3, 5:]
    whole[:] = 7
    del whole
    assert memory.kept() == 0
    other = memory.empty((1024, 1024), "float32")
    other[:] = 1
    assert (row == 7).all()
    del row
    assert memory.kept() >= 4 * MEGABYTE


def test_small_arrays_are_numpys_own() -> None:
    small = memory.empty((10, 10), "float32")
    assert small.base is None
    assert memory.empty((0, 5), "float64").shape == (0, 5)
    del small
    assert memory.kept() == 0


def test_no_more_is_kept_than_allowed_and_the_oldest_goes_first() -> None:
    gpuconv.set_workspace_limit(10 * MEGABYTE)
    sizes = [3, 4, 5]
    arrays = [memory.empty((n * MEGABYTE,), "uint8") for n in sizes]
    places = [a.ctypes.data for a in arrays]
    while arrays:
        arrays.pop(0)
    assert 5 * MEGABYTE <= memory.kept() <= 10 * MEGABYTE
    assert memory.empty((5 * MEGABYTE,), "uint8").ctypes.data == places[2]
    gpuconv.set_workspace_limit(MEGABYTE)
    large = memory.empty((5 * MEGABYTE,), "uint8")
    del large
    assert memory.kept() == 0


def test_what_cannot_be_had_is_an_error_and_nothing_is_lost() -> None:
    with pytest.raises(MemoryError):
        memory.empty((1 << 60,), "uint8")
    assert memory.kept() == 0


def test_a_cycle_gives_its_memory_back() -> None:
    class Node:
        pass

    node = Node()
    node.itself, node.array = node, memory.empty((2 * MEGABYTE,), "uint8")  # type: ignore[attr-defined]
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert gone() is None
    assert memory.kept() >= 2 * MEGABYTE


def test_what_ends_while_memory_is_counted_comes_back_too() -> None:
    first, second = (memory.empty((n * MEGABYTE,), "uint8") for n in (2, 3))
    with memory._lock:  # as when a collection begins there
        del first
        assert memory.kept() == 0
    del second
    assert memory.kept() >= 5 * MEGABYTE
    with memory._lock:
        other = memory.empty((2 * MEGABYTE,), "uint8")
    assert other.shape == (2 * MEGABYTE,)


def test_many_threads_never_share() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            a = memory.empty((MEGABYTE,), "uint8")
            a[:64] = number
            b = memory.empty((MEGABYTE,), "uint8")
            b[:64] = number + 100
            if (a[:64] != number).any() or a.ctypes.data == b.ctypes.data:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("layer", ["conv", "pool", "relu"])
def test_results_take_turns_in_one_place(layer: str) -> None:
    x = np.ones((8, 64, 64, 32), "float32")
    w = np.ones((1, 1, 32, 32), "float32")
    call = {
        "conv": lambda: gpuconv.conv2d(x, w),
        "pool": lambda: gpuconv.avg_pool2d(x, 3, stride=1, padding=1),
        "relu": lambda: gpuconv.activations.ReLU().fn(x),
    }[layer]
    y = call()
    want, at = y.copy(), y.ctypes.data
    y[:] = np.nan
    del y
    again = call()
    assert again.ctypes.data == at
    np.testing.assert_array_equal(again, want)
    other = call()
    assert other.ctypes.data != at
