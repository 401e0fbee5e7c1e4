"""Convolution and correlation of signals against scipy.signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import signal as reference

from gpuconv import signal
from tests.support import home, host

RNG = np.random.default_rng(11)


def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    a = RNG.standard_normal(shape)
    if dtype.startswith("complex"):
        a = a + 1j * RNG.standard_normal(shape)
    return a.astype(dtype)


SIZES = [
    ((9,), (4,)), ((9,), (3,)), ((4,), (9,)), ((6,), (6,)), ((1,), (5,)), ((8,), (1,)),
    ((7, 8), (3, 2)), ((3, 2), (7, 8)), ((6, 5), (4, 5)), ((5, 6, 7), (2, 3, 4)), ((2, 2, 3), (4, 5, 3)),
]  # fmt: skip


@pytest.mark.parametrize("name", ["convolve", "correlate"])
@pytest.mark.parametrize("mode", ["full", "same", "valid"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "complex128", "complex64"])
def test_agrees_with_scipy(name: str, mode: str, dtype: str) -> None:
    for a_shape, b_shape in SIZES:
        a, b = values(a_shape, dtype), values(b_shape, dtype)
        got = getattr(signal, name)(a, b, mode)
        want = getattr(reference, name)(a, b, mode, method="direct")
        assert got.dtype == a.dtype
        allowed = 1e-4 if dtype in ("float32", "complex64") else 1e-11
        np.testing.assert_allclose(got, want, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", ["convolve", "correlate"])
@pytest.mark.parametrize("mode", ["full", "same", "valid"])
@pytest.mark.parametrize(
    ("batch_a", "batch_b", "size", "kernel"),
    [
        ((4,), (4,), (7, 9), (3, 2)),  # pairs
        ((2, 3), (2, 3), (10,), (4,)),
        ((5,), (), (6, 7), (3, 3)),  # one kernel
        ((), (5,), (6, 7), (3, 3)),  # one signal
        ((2, 1), (1, 3), (8,), (3,)),
        ((3,), (3,), (2, 3), (5, 4)),  # the larger one is the second
        ((2,), (2,), (4, 5, 6), (2, 2, 3)),
    ],
)
def test_batches_are_what_each_pair_gives(
    name: str, mode: str, batch_a: Any, batch_b: Any, size: Any, kernel: Any
) -> None:
    a, b = values((*batch_a, *size), "complex128"), values((*batch_b, *kernel), "complex128")
    got = getattr(signal, name)(a, b, mode, ndim=len(size))
    batch = np.broadcast_shapes(batch_a, batch_b)
    a, b = np.broadcast_to(a, (*batch, *size)), np.broadcast_to(b, (*batch, *kernel))
    for index in np.ndindex(*batch):
        want = getattr(reference, name)(a[index], b[index], mode, method="direct")
        np.testing.assert_allclose(got[index], want, atol=1e-11)


def test_on_a_cuda_device() -> None:
    with home("cuda_atomic") as xp:
        a, b = values((3, 6, 7), "float32"), values((3, 3, 2), "float32")
        for name in ("convolve", "correlate"):
            for mode in ("full", "same", "valid"):
                got = host(getattr(signal, name)(xp.asarray(a), xp.asarray(b), mode, ndim=2))
                for k in range(3):
                    want = getattr(reference, name)(a[k], b[k], mode, method="direct")
                    np.testing.assert_allclose(got[k], want, atol=1e-5)


def test_an_empty_batch() -> None:
    assert signal.convolve(np.empty((0, 5)), np.empty((0, 3)), ndim=1).shape == (0, 7)


A = np.ones((4, 5))
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "mode": (lambda: signal.convolve(A, A, "wrap"), ValueError, "mode is 'wrap'; expected 'full'"),
    "a list": (lambda: signal.convolve([1.0], A), TypeError, "in1 is a list"),
    "integers": (lambda: signal.correlate(A.astype(int), A), TypeError, "in1 has dtype int64"),
    "dtypes": (lambda: signal.correlate(A, A.astype("f4")), TypeError, "in1 has dtype float64 and in2 float32"),
    "axes": (lambda: signal.convolve(A, A[0]), ValueError, "in1 has 2 axes and in2 1.*ndim"),
    "ndim 0": (lambda: signal.convolve(A, A, ndim=0), ValueError, "ndim is 0"),
    "ndim 4": (lambda: signal.convolve(A[None, None], A[None, None]), ValueError, "ndim is 4; expected 1 to 3"),
    "ndim text": (lambda: signal.convolve(A, A, ndim="1"), TypeError, "ndim is '1'"),
    "too few axes": (lambda: signal.convolve(A, A[0], ndim=2), ValueError, "in2 has 1 axes"),
    "batches": (lambda: signal.convolve(A, A[:3], ndim=1), ValueError, r"batches of \(4,\) and \(3,\)"),
    "no values": (lambda: signal.convolve(A[:, :0], A), ValueError, "in1 has shape"),
    "neither larger": (lambda: signal.convolve(A, A.T, "valid"), ValueError, "mode is 'valid'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_allowed(name: str) -> None:
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        wrong()
