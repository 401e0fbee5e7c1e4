"""bfloat16 in the stand-in: conversions against ml_dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.cuda_on_cpu import compiler_available, stand_in

ml_dtypes = pytest.importorskip("ml_dtypes")

SOURCE = """
#include <cuda_bf16.h>
extern "C" __global__ void widen(const __nv_bfloat16* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __bfloat162float(x[i]);
}
extern "C" __global__ void narrow(const float* x, __nv_bfloat16* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = __float2bfloat16_rn(x[i]);
}
"""


@pytest.fixture
def cp() -> Iterator[Any]:
    reason = compiler_available()
    if reason:
        pytest.skip(reason)
    with stand_in() as module:
        yield module


def run(cp: Any, name: str, x: Any, y: Any) -> np.ndarray:
    kernel = cp.RawModule(code=SOURCE, options=("-std=c++17",), backend="nvrtc").get_function(name)
    kernel((-(-x.size // 256),), (256,), (x, y, np.int32(x.size)))
    return y.get()


def test_every_bfloat16_becomes_its_float(cp: Any) -> None:
    every = np.arange(2**16, dtype="u2").view(ml_dtypes.bfloat16)
    got = run(cp, "widen", cp.asarray(every), cp.empty(every.shape, "f4"))
    np.testing.assert_array_equal(got.view("u4"), every.view("u2").astype("u4") << 16)


def test_floats_round_to_nearest_even(cp: Any) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype="u4")
    halves = (np.arange(2**16, dtype="u4") << 16) + 0x8000  # in the middle of two
    x = np.concatenate([bits, halves, halves - 1, halves + 1]).view("f4")
    got = run(cp, "narrow", cp.asarray(x), cp.empty(x.shape, ml_dtypes.bfloat16))
    with np.errstate(invalid="ignore"):
        want = x.astype(ml_dtypes.bfloat16)
    nan = np.isnan(x)
    assert np.isnan(got[nan].astype("f4")).all()
    np.testing.assert_array_equal(got[~nan].view("u2"), want[~nan].view("u2"))


def test_other_elements_are_refused(cp: Any) -> None:
    with pytest.raises(TypeError, match="points to V2, given float16"):
        run(cp, "widen", cp.zeros(4, "f2"), cp.empty(4, "f4"))
