"""The arrays that stand in for CuPy's keep CuPy's rules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda import runtime
from gpuconv.device import namespace, parse_device

RNG = np.random.default_rng(2)
A = RNG.standard_normal((3, 4)).astype("f4")


def test_numpy_arrays_come_and_go_only_when_asked(fast: Any) -> None:
    a = fast.asarray(A)
    assert not isinstance(a, np.ndarray)
    np.testing.assert_array_equal(a.get(), A)
    np.testing.assert_array_equal(fast.asnumpy(a), A)
    assert not np.shares_memory(a.get(), A)
    for wrong in (
        lambda: np.asarray(a),
        lambda: np.array(a),
        lambda: a + A,
        lambda: A + a,
        lambda: np.add(a, A),
        lambda: fast.add(a, A),
        lambda: fast.maximum(A, 0),
        lambda: fast.sum(A),
        lambda: fast.ascontiguousarray(A),
        lambda: fast.concatenate([a, A]),
        lambda: fast.where(a > 0, a, A),
        lambda: fast.add(a, a, out=A),
        lambda: a.__setitem__(..., A),
        lambda: a.__iadd__(A),
        lambda: fast.add(a, [1, 2, 3, 4]),
        lambda: a[np.array([0, 1])],
    ):
        with pytest.raises(TypeError, match=r"Implicit conversion|Unsupported type"):
            wrong()
    np.testing.assert_array_equal(a.get(), A)


def test_numbers_are_welcome(fast: Any) -> None:
    a = fast.asarray(A)
    for b in (2, 2.5, np.float32(2.5), np.float64(2.5), np.array(2.5)):
        want = A * b
        for got in (a * b, b * a, fast.multiply(a, b)):
            assert type(got) is fast.ndarray
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got.get(), want)


SAME: dict[str, Callable[[Any, Any], Any]] = {
    "operators": lambda xp, a: (a + 1) * a - a / 3 + (-a) ** 2 + abs(a) % 2,
    "comparisons": lambda xp, a: (a > 0) & (a <= 1) | ~(a != 2),
    "matmul": lambda xp, a: a @ a.T,
    "dot": lambda xp, a: xp.dot(a, a.T),
    "einsum": lambda xp, a: xp.einsum("ij,kj->ik", a, a),
    "tensordot": lambda xp, a: xp.tensordot(a, a, axes=([1], [1])),
    "reductions": lambda xp, a: a.sum(axis=0) + a.mean(axis=0) + a.max(axis=0) + xp.min(a, axis=0),
    "element": lambda xp, a: a[1, 2],
    "sum of all": lambda xp, a: a.sum(),
    "sum in float64": lambda xp, a: a.sum(axis=1, dtype="float64"),
    "argmax": lambda xp, a: a.argmax(axis=1),
    "take_along_axis": lambda xp, a: xp.take_along_axis(a, a.argmax(axis=1)[:, None], axis=1),
    "take": lambda xp, a: a[xp.asarray([2, 0])],
    "mask": lambda xp, a: a[a > 0],
    "concatenate": lambda xp, a: xp.concatenate([a, a[:1]], axis=0),
    "stack": lambda xp, a: xp.stack((a, 2 * a)),
    "pad": lambda xp, a: xp.pad(a, ((1, 2), (0, 3))),
    "broadcast_to": lambda xp, a: xp.broadcast_to(a[:, None], (3, 2, 4)),
    "strided": lambda xp, a: xp.lib.stride_tricks.as_strided(a, (2, 3, 2), (16, 4, 4)),
    "windows": lambda xp, a: xp.lib.stride_tricks.sliding_window_view(a, (2, 2)),
    "where": lambda xp, a: xp.where(a > 0, a, 0.1 * a),
    "functions": lambda xp, a: xp.tanh(a) + xp.exp(-xp.abs(a)) + xp.log1p(xp.square(a)),
    "clip": lambda xp, a: xp.clip(a, -0.5, 0.5),
    "sorted": lambda xp, a: xp.sort(a, axis=1)[:, ::-1],
    "moved": lambda xp, a: xp.moveaxis(a.reshape(3, 2, 2), 0, -1),
    "fortran": lambda xp, a: xp.asfortranarray(a),
    "norm": lambda xp, a: xp.linalg.norm(a, axis=1),
    "cumsum": lambda xp, a: xp.cumsum(a, axis=1).astype("float64"),
    "arange": lambda xp, a: xp.arange(5, dtype="int32") + xp.zeros_like(a)[0, 0],
    "eye": lambda xp, a: xp.eye(3) + xp.full((3, 3), 2.0) + xp.ones(3),
}


@pytest.mark.parametrize("name", SAME)
def test_computes_as_numpy(fast: Any, name: str) -> None:
    want = np.asarray(SAME[name](np, A))
    got = SAME[name](fast, fast.asarray(A))
    assert type(got) is fast.ndarray  # numbers are arrays of no axes
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_array_equal(got.get(), want)
    if want.size > 1:  # one of one element may be seen as either
        assert got.flags.c_contiguous == want.flags.c_contiguous


def test_changes_in_place(fast: Any) -> None:
    a = fast.asarray(A)
    view = a[1:, ::2]
    view *= 2
    view[0] = 7
    a.T[3] += 1
    want = A.copy()
    want[1:, ::2] *= 2
    want[1, ::2] = 7
    want.T[3] += 1
    np.testing.assert_array_equal(a.get(), want)
    out = fast.empty((3, 4), "f4")
    assert fast.maximum(a, 0, out=out) is out
    np.testing.assert_array_equal(out.get(), np.maximum(want, 0))
    fast.add.at(out, (fast.asarray([0, 0]), fast.asarray([1, 1])), 5)
    assert out.get()[0, 1] == max(want[0, 1], 0) + 10
    a.fill(3)
    assert (a.get() == 3).all()


def test_views_share_memory_and_copies_do_not(fast: Any) -> None:
    a = fast.asarray(A)
    for view in (a[1:], a.T, a.reshape(2, 6), a[...], a[0, 0], fast.broadcast_to(a, (2, 3, 4))):
        assert fast.may_share_memory(a, view)
        assert view._memory is a._memory
    for other in (a.copy(), a + 0, a.astype("f4"), fast.array(a), copy.deepcopy(a)):
        assert not fast.may_share_memory(a, other)
    assert fast.asarray(a) is a
    assert a.astype("f4", copy=False) is a
    assert fast.ascontiguousarray(a) is a
    assert a[1:].data.ptr == a.data.ptr + 16


def test_python_sees_numbers(fast: Any) -> None:
    a = fast.asarray(A)
    assert float(a[0, 0]) == A[0, 0]
    assert int(fast.asarray(3)) == 3
    assert bool(fast.asarray(True))
    assert a.sum().item() == A.sum()
    assert f"{a[0, 0]:.3f}" == f"{A[0, 0]:.3f}"
    assert [float(v) for v in a[0]] == A[0].tolist() == a[0].tolist()
    assert len(a) == 3
    assert list(range(5))[fast.asarray(2)] == 2
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(a)


def test_what_cupy_lacks_is_not_there(fast: Any) -> None:
    for name in ("busday_count", "no_such_function", "chararray"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(fast, name)
    with pytest.raises(AttributeError):
        fast.asarray(A).setflags(write=False)
    with pytest.raises(TypeError, match="dtype object is not supported"):
        fast.asarray(np.array([{}, ()], dtype=object))
    with pytest.raises(TypeError, match="dtype <U1 is not supported"):
        fast.empty(3, "<U1")


@pytest.mark.parametrize("package", ["", "linalg", "random", "fft", "lib.stride_tricks"])
def test_it_has_the_names_that_cupy_shares_with_numpy(fast: Any, package: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cupy = pytest.importorskip("cupy", exc_type=ImportError)
    ours: Any = fast
    numpys: Any = np
    for part in filter(None, package.split(".")):
        ours, numpys, cupy = getattr(ours, part), getattr(numpys, part), getattr(cupy, part)
    names = [name for name in dir(numpys) if not name.startswith("_")]
    assert [n for n in names if hasattr(ours, n)] == [n for n in names if hasattr(cupy, n)]


def test_devices(start: Callable[..., Any]) -> None:
    with start(devices=2) as cp:
        assert cp.cuda.runtime.getDeviceCount() == 2
        a = cp.asarray(A)
        with cp.cuda.Device(1) as device:
            assert (device.id, cp.cuda.runtime.getDevice()) == (1, 1)
            b = cp.asarray(A)
            assert (a.device.id, b.device.id) == (0, 1)
            for wrong in (lambda: a + 1, lambda: a.sum(), lambda: a + b):
                with pytest.raises(ValueError, match="array device = 0 while current = 1"):
                    wrong()
            moved = cp.asarray(a)
            assert moved.device.id == 1
            np.testing.assert_array_equal((moved + b).get(), 2 * A)
            np.testing.assert_array_equal(a.get(), A)
        assert cp.cuda.runtime.getDevice() == 0
        with pytest.raises(ValueError, match="array device = 1 while current = 0"):
            a += b
        source = 'extern "C" __global__ void f(float* y) { y[threadIdx.x] = 1; }'
        kernel = cp.RawModule(code=source).get_function("f")
        with pytest.raises(ValueError, match="array device = 1 while current = 0"):
            kernel((1,), (12,), (b,))
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            cp.cuda.Device(2)


def test_it_stands_in_for_cupy_and_goes_again(start: Callable[..., Any]) -> None:
    before = runtime.installed()
    with start() as outer:
        assert runtime.cupy() is runtime.loaded() is outer
        assert namespace(outer.zeros(3)) is outer
        assert str(gpuconv.device()) == "cuda:0"
        with start(devices=3) as inner:
            assert runtime.cupy() is inner
            assert str(parse_device("cuda:2")) == "cuda:2"
        assert runtime.cupy() is outer
        with pytest.raises(ZeroDivisionError), start():
            _ = 1 / 0
        assert runtime.cupy() is outer
        moved = gpuconv.asarray(A)
        assert type(moved) is outer.ndarray
        np.testing.assert_array_equal(gpuconv.asnumpy(moved), A)
    assert runtime.installed() is before


def test_streams_events_and_random_numbers(fast: Any) -> None:
    with fast.cuda.Stream(non_blocking=True) as stream:
        assert fast.cuda.get_current_stream() is stream
        start, end = fast.cuda.Event(), fast.cuda.Event()
        start.record()
        end.record(stream)
        end.synchronize()
        assert fast.cuda.get_elapsed_time(start, end) >= 0
    assert fast.cuda.get_current_stream() is fast.cuda.null_stream
    a = fast.random.default_rng(3).standard_normal((2, 3))
    assert type(a) is fast.ndarray
    np.testing.assert_array_equal(a.get(), np.random.default_rng(3).standard_normal((2, 3)))
