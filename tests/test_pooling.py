"""Pooling over one to three axes against PyTorch, and what it makes of wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import pooling
from gpuconv.engines import pooling as windowed
from gpuconv.engines import pooling_max
from tests.support import home, host

RNG = np.random.default_rng(3)


def call(name: str, nd: int, suffix: str = "") -> Callable[..., Any]:
    return getattr(gpuconv, f"{name}_pool{nd}d{suffix}")  # type: ignore[no-any-return]


def problem(seed: int) -> dict[str, Any]:
    """Draw a pooling that PyTorch takes as well."""
    rng = np.random.default_rng(seed)
    nd = int(rng.integers(1, 4))
    kernel = [int(k) for k in rng.integers(1, 4, nd)]
    x = rng.standard_normal(
        (
            int(rng.integers(1, 4)),
            int(rng.integers(1, 5)),
            *(int(rng.integers(k, k + 7)) for k in kernel),
        )
    )
    return {
        "nd": nd,
        "kernel": kernel,
        "stride": [int(s) for s in rng.integers(1, 5, nd)],
        "padding": [int(rng.integers(0, k // 2 + 1)) for k in kernel],
        "x": np.round(x) if seed % 3 else x,  # whole numbers: maxima that several cells share
        "first": bool(rng.integers(2)),
        "rng": rng,
    }  # fmt: skip


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("library", ["numpy", "cuda"])
def test_random_pooling_agrees_with_torch(part: int, library: str) -> None:
    torch = pytest.importorskip("torch")
    with home("naive" if library == "numpy" else "cuda_atomic") as xp:
        for seed in range(part, 200 if library == "numpy" else 40, 4):
            agree(torch, xp, problem(seed))


def agree(torch: Any, xp: Any, p: dict[str, Any]) -> None:
    nd, first, rng = p["nd"], p["first"], p["rng"]
    f = torch.nn.functional
    t = torch.tensor(p["x"], requires_grad=True)
    options = {
        "stride": p["stride"],
        "padding": p["padding"],
        "layout": "channels_first" if first else "channels_last",
    }

    def ours(a: np.ndarray) -> Any:
        return xp.asarray(a if first else np.ascontiguousarray(np.moveaxis(a, 1, -1)))

    def same(got: Any, want: Any) -> None:
        want = want.detach().numpy()
        np.testing.assert_allclose(
            host(got), want if first else np.moveaxis(want, 1, -1), rtol=1e-12, atol=1e-12
        )

    x = ours(p["x"])
    want = getattr(f, f"max_pool{nd}d")(t, p["kernel"], p["stride"], p["padding"])
    dy = rng.standard_normal(want.shape)
    (grad,) = torch.autograd.grad(want, t, torch.tensor(dy))
    y = call("max", nd)(x, p["kernel"], **options)
    same(y, want)
    same(call("max", nd, "_backward")(ours(dy), x, p["kernel"], **options), grad)
    again, indices = call("max", nd)(x, p["kernel"], return_indices=True, **options)
    np.testing.assert_array_equal(host(again), host(y))
    np.testing.assert_array_equal(host(x).reshape(-1)[host(indices)], host(y))
    given = call("max", nd, "_backward")(ours(dy), x, p["kernel"], indices=indices, **options)
    same(given, grad)
    for counted in (True, False):
        want = getattr(f, f"avg_pool{nd}d")(
            t, p["kernel"], p["stride"], p["padding"], count_include_pad=counted
        )
        (grad,) = torch.autograd.grad(want, t, torch.tensor(dy))
        more = {**options, "count_include_pad": counted}
        same(call("avg", nd)(x, p["kernel"], **more), want)
        same(call("avg", nd, "_backward")(ours(dy), x.shape, p["kernel"], **more), grad)


@pytest.mark.parametrize("shape", [(3, 45, 50, 64), (2, 70, 33, 96)])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"stride": 1}, {"stride": 4}])
def test_blocks_and_threads_change_nothing(
    shape: tuple[int, ...], threads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.round(RNG.standard_normal(shape) * 2).astype("float32")
    y = gpuconv.max_pool2d(x, 3, **options)
    dy = RNG.standard_normal(y.shape).astype("float32")
    want = [
        y, gpuconv.max_pool2d_backward(dy, x, 3, **options),
        gpuconv.avg_pool2d(x, 3, **options), gpuconv.avg_pool2d_backward(dy, shape, 3, **options),
    ]  # fmt: skip
    monkeypatch.setattr(windowed, "BLOCK", 20_000)
    gpuconv.set_num_threads(threads)
    try:
        got = [
            gpuconv.max_pool2d(x, 3, **options),
            gpuconv.max_pool2d_backward(dy, x, 3, **options),
            gpuconv.avg_pool2d(x, 3, **options),
            gpuconv.avg_pool2d_backward(dy, shape, 3, **options),
        ]
    finally:
        gpuconv.set_num_threads(None)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_padding_never_wins_a_maximum_but_in_the_layer() -> None:
    x = -np.ones((1, 3, 3, 1))
    assert gpuconv.max_pool2d(x, 2, stride=1, padding=1).max() == -1
    dx = gpuconv.max_pool2d_backward(np.ones((1, 4, 4, 1)), x, 2, stride=1, padding=1)
    assert dx.sum() == 16
    y, won = pooling.pool(x, (2, 2), (1, 1), ((1, 1), (1, 1)), "max", True)
    assert y[0, 0, 0, 0] == 0
    assert y[0, 1, 1, 0] == -1
    dx = pooling.pool_grad(np.ones(y.shape), won, x.shape, (2, 2), (1, 1), ((1, 1), (1, 1)), "max")
    assert dx.sum() == 4  # the other windows' maximum is a zero of the padding
    apart, won = pooling.pool(x, (2, 2), (2, 2), ((1, 0), (1, 0)), "max", True)
    dx = pooling.pool_grad(
        np.ones(apart.shape), won, x.shape, (2, 2), (2, 2), ((1, 0), (1, 0)), "max"
    )
    assert dx.sum() == 1


def test_a_tie_with_the_paddings_zero_goes_to_what_comes_first() -> None:
    x = np.zeros((1, 2, 2, 1))
    y, won = pooling.pool(x, (2, 2), (2, 2), ((1, 1), (1, 1)), "max", True)
    dx = pooling.pool_grad(np.ones(y.shape), won, x.shape, (2, 2), (2, 2), ((1, 1), (1, 1)), "max")
    assert dx[0, :, :, 0].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_is(stride: int, special: float) -> None:
    x = RNG.standard_normal((1, 6, 6, 2))
    x[0, 2, 2, 0] = special
    y = gpuconv.max_pool2d(x, 2, stride=stride)
    assert np.isnan(y).sum() == (np.isnan(special) * 4 if stride == 1 else np.isnan(special))
    dy = np.ones(y.shape)
    dx = gpuconv.max_pool2d_backward(dy, x, 2, stride=stride)
    assert dx.sum() == dy.sum()
    dy[0, 0, 0] = np.inf
    dx = gpuconv.max_pool2d_backward(dy, x, 2, stride=stride)
    assert not np.isnan(dx).any()
    assert np.isinf(dx).sum() == 2  # one cell a channel


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_small_dtypes(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = RNG.standard_normal((2, 9, 8, 3)).astype(dtype)
    wide = x.astype("float64")
    apart = gpuconv.max_pool2d_backward(np.ones((2, 4, 4, 3), x.dtype), x, 2)
    want = gpuconv.max_pool2d_backward(np.ones((2, 4, 4, 3)), wide, 2)
    np.testing.assert_array_equal(apart.astype("float64"), want)
    for padding in (0, 1):
        y = gpuconv.max_pool2d(x, 3, stride=2, padding=padding)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(
            y.astype("float64"), gpuconv.max_pool2d(wide, 3, stride=2, padding=padding)
        )
        dx = gpuconv.max_pool2d_backward(np.ones_like(y), x, 3, stride=2, padding=padding)
        assert dx.dtype == x.dtype
        assert dx.astype("float64").sum() == y.size
        mean = gpuconv.avg_pool2d(x, 3, stride=2, padding=padding).astype("float64")
        want = gpuconv.avg_pool2d(wide, 3, stride=2, padding=padding)
        np.testing.assert_allclose(mean, want, atol={"bfloat16": 2e-2}.get(dtype, 2e-3))


def test_on_a_device_gradients_repeat_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with home("cuda_atomic") as xp:
        x = xp.asarray(np.round(RNG.standard_normal((2, 6, 6, 3))))
        _, indices = gpuconv.max_pool2d(x, 3, stride=1, return_indices=True)
        dy = xp.asarray(RNG.standard_normal(indices.shape))
        scattered = gpuconv.max_pool2d_backward(dy, x, 3, stride=1, indices=indices)
        monkeypatch.setattr(pooling_max, "max_grad", None)  # nothing scatters now
        with gpuconv.deterministic(True):
            kept = gpuconv.max_pool2d_backward(dy, x, 3, stride=1, indices=indices)
        np.testing.assert_allclose(host(kept), host(scattered), atol=1e-12)


def test_out_and_empty_batches() -> None:
    x = RNG.standard_normal((2, 6, 6, 3))
    out = np.empty((2, 3, 3, 3))
    assert gpuconv.max_pool2d(x, 2, out=out) is out
    np.testing.assert_array_equal(out, gpuconv.max_pool2d(x, 2))
    empty = np.empty((0, 6, 6, 3))
    assert gpuconv.avg_pool2d(empty, 2).shape == (0, 3, 3, 3)
    assert gpuconv.max_pool2d_backward(np.empty((0, 3, 3, 3)), empty, 2).shape == empty.shape
    assert gpuconv.max_pool2d(x, 2, stride=1, padding="same").shape == (2, 6, 6, 3)


X = np.ones((2, 6, 6, 3))
OUT = np.full((2, 3, 3, 3), 7.0)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x a list": (lambda: gpuconv.max_pool2d([1], 2, out=OUT), TypeError, "x is a list"),
    "x complex": (lambda: gpuconv.avg_pool2d(X + 1j, 2, out=OUT), TypeError, "x has dtype complex128"),
    "x of integers": (lambda: gpuconv.max_pool2d(X.astype(int), 2, out=OUT), TypeError, "x has dtype int64"),
    "x of three axes": (lambda: gpuconv.max_pool2d(X[0], 2, out=OUT), ValueError, "x has 3 axes.*expected 4"),
    "x without rows": (lambda: gpuconv.max_pool2d(X[:, :0], 2, out=OUT), ValueError, "x has shape"),
    "kernel 0": (lambda: gpuconv.max_pool2d(X, 0, out=OUT), ValueError, "kernel is 0; expected a positive"),
    "kernel of three": (lambda: gpuconv.max_pool2d(X, (1, 2, 3), out=OUT), ValueError, "kernel is"),
    "kernel too large": (lambda: gpuconv.max_pool2d(X, 7, out=OUT), ValueError, "kernel is .*padded input"),
    "stride a fraction": (lambda: gpuconv.avg_pool2d(X, 2, stride=0.5, out=OUT), TypeError, "stride is 0.5"),
    "padding as wide as the kernel": (
        lambda: gpuconv.max_pool2d(X, 2, padding=2, out=OUT), ValueError, "padding is 2; expected less"),
    "padding causal": (lambda: gpuconv.avg_pool1d(X[0], 2, padding="causal"), ValueError, "padding is 'causal'"),
    "layout of another rank": (lambda: gpuconv.max_pool2d(X, 2, layout="NCW", out=OUT), ValueError, "layout is 'NCW'"),
    "count_include_pad 1": (
        lambda: gpuconv.avg_pool2d(X, 2, count_include_pad=1, out=OUT), TypeError, "count_include_pad is 1"),
    "out of another shape": (lambda: gpuconv.max_pool2d(X, 3, out=OUT), ValueError, "out has shape"),
    "out of another dtype": (
        lambda: gpuconv.max_pool2d(X.astype("f4"), 2, out=OUT), TypeError, "out has dtype float64"),
    "dy of another shape": (lambda: gpuconv.max_pool2d_backward(X, X, 2), ValueError, "dy has shape"),
    "dy of another dtype": (
        lambda: gpuconv.max_pool2d_backward(OUT.astype("f4"), X, 2), TypeError, "dy has dtype float32 and x float64"),
    "indices a list": (lambda: gpuconv.max_pool2d_backward(OUT, X, 2, indices=[1]), TypeError, "indices is a list"),
    "indices of another dtype": (
        lambda: gpuconv.max_pool2d_backward(OUT, X, 2, indices=OUT), TypeError, "indices has dtype float64"),
    "indices of another shape": (
        lambda: gpuconv.max_pool2d_backward(OUT, X, 2, indices=X.astype(int)), ValueError, "indices has shape"),
    "indices beyond": (
        lambda: gpuconv.max_pool2d_backward(OUT, X, 2, indices=OUT.astype(int) + X.size), ValueError, "indices reach"),
    "indices negative": (
        lambda: gpuconv.max_pool2d_backward(OUT, X, 2, indices=OUT.astype(int) - 8), ValueError, "indices reach"),
    "return_indices 1": (
        lambda: gpuconv.max_pool2d(X, 2, return_indices=1, out=OUT), TypeError, "return_indices is 1"),
    "x_shape a number": (lambda: gpuconv.avg_pool2d_backward(OUT, 3, 2), TypeError, "x_shape is 3"),
    "x_shape of another result": (
        lambda: gpuconv.avg_pool2d_backward(OUT, (2, 9, 9, 3), 2), ValueError, "dy has shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_allowed(name: str) -> None:
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        wrong()
    assert (OUT == 7).all()
