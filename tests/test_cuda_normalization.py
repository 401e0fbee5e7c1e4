"""The kernels of batch normalisation against NumPy in float64, every access watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuconv.activations import get_activation
from gpuconv.dtypes import HALVES
from gpuconv.normalization import column_statistics, columns_grad, normalized_columns
from tests.support import home

TOLERANCES = {"float64": 1e-11, "float32": 2e-4, "float16": 1e-2, "bfloat16": 2e-2}
SHAPES = [(1, 1), (7, 3), (64, 32), (65, 33), (200, 5), (131, 70), (1000, 2), (8, 130)]


@pytest.mark.parametrize("act_fn", [None, "ReLU", "Tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_against_numpy(mode: str, dtype: str, shape: tuple[int, int], act_fn: str | None) -> None:
    if mode == "checked" and shape[0] * shape[1] > 3000:
        return  # what is watched is slow, and the small ones have every edge
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(shape[0] + shape[1])
    act = None if act_fn is None else get_activation(act_fn)
    X = (rng.standard_normal(shape) * 2 + rng.normal(0, 3, shape[1])).astype(dtype)
    dY = rng.standard_normal(shape).astype(dtype)
    scaler, intercept = rng.standard_normal((2, shape[1]))
    wide, d = X.astype("float64"), dY.astype("float64")
    mean, variance = wide.mean(axis=0), wide.var(axis=0)
    inverse = 1 / np.sqrt(variance + 1e-2)
    hat = (wide - mean) * inverse
    want = scaler * hat + intercept
    want = want if act is None else act.fn(want)
    tolerance = TOLERANCES[dtype]
    with home("cuda_atomic", mode, seed=3) as cp:

        def put(a: Any) -> Any:
            return cp.asarray(np.asarray(a, "float32" if dtype in HALVES else dtype))

        x, dy = cp.asarray(X), cp.asarray(dY)
        m, v = column_statistics(x)
        np.testing.assert_allclose(m.get(), mean, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(v.get(), variance, rtol=tolerance, atol=tolerance)
        values = (put(mean), put(inverse), put(scaler))
        y = normalized_columns(x, *values, put(intercept), act)
        np.testing.assert_allclose(y.get(), want, rtol=tolerance, atol=4 * tolerance)
        if act is not None:
            d = d * act.grad_from_output(y.get().astype("float64"))
        for moving in (True, False):
            got = columns_grad(dy, x, *values, moving, True, y, act)
            inner = d - d.mean(axis=0) - hat * (d * hat).mean(axis=0) if moving else d
            reach = np.sqrt(shape[0])
            for g, w in zip(
                got, (inner * scaler * inverse, (d * hat).sum(axis=0), d.sum(axis=0)), strict=True
            ):
                error = np.abs(g.get().astype("float64") - w).max()
                assert error <= tolerance * reach * max(1.0, np.abs(w).max())
        assert columns_grad(dy, x, *values, True, False, y, act)[0] is None


def test_a_mean_far_away_costs_no_digits() -> None:
    rng = np.random.default_rng(0)
    X = (rng.standard_normal((500, 4)) + np.array([0, 1e3, -1e4, 1e5])).astype("float32")
    with home("cuda_atomic") as cp:
        mean, variance = column_statistics(cp.asarray(X))
        np.testing.assert_allclose(
            mean.get(), X.astype("float64").mean(axis=0), rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(variance.get(), X.astype("float64").var(axis=0), rtol=2e-3)


def test_the_same_bits_every_time() -> None:
    X = np.random.default_rng(1).standard_normal((300, 9)).astype("float32")
    found = []
    for seed in range(3):
        with home("cuda_atomic", "checked", seed) as cp:
            found.append([v.get() for v in column_statistics(cp.asarray(X))])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_an_activation_of_ones_own_is_applied_apart() -> None:
    from dataclasses import dataclass

    from gpuconv.activations import ReLU
    from gpuconv.layers import BatchNorm1D

    @dataclass(frozen=True)
    class Mine(ReLU):
        pass

    X = np.random.default_rng(1).standard_normal((30, 4)).astype("float32")
    layers = [BatchNorm1D(act_fn=Mine(), rng=0), BatchNorm1D(act_fn="ReLU", rng=0)]
    with home("cuda_atomic") as cp:
        results = []
        for layer in layers:
            Y = layer.forward(cp.asarray(X))
            results.append([Y.get(), layer.backward(cp.asarray(X)).get()])
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
