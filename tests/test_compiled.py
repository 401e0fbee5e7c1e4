"""The layers' loops that Numba compiles: against NumPy's way, float64 and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv import activations as act
from gpuconv import compiled, normalization, settings
from gpuconv.activations import Activation
from gpuconv.compiled import activations as fast
from gpuconv.compiled import columns, pooling
from gpuconv.functional import pooling_passes
from gpuconv.layers import BatchNorm1D

pytestmark = pytest.mark.skipif(
    compiled.numba_missing() is not None, reason="needs the extra numba"
)
ALL = [
    act.ReLU(), act.LeakyReLU(0.1), act.LeakyReLU(0.0), act.ELU(), act.ELU(0.5), act.SELU(),
    act.GELU(), act.GELU(False), act.Tanh(), act.Sigmoid(), act.HardSigmoid(), act.SoftPlus(),
    act.Exponential(),
]  # fmt: skip
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays take the loops as well, in several chunks and threads."""
    monkeypatch.setattr(compiled, "SMALL", 1)
    monkeypatch.setattr(compiled, "PARALLEL", 1)
    monkeypatch.setattr(fast, "CHUNK", 100)
    monkeypatch.setattr(pooling, "CHUNK", 1024)
    monkeypatch.setattr(pooling, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(pooling, "MOST_READ", 1000)
    monkeypatch.setattr(columns, "CHUNK", 100)
    monkeypatch.setattr(columns, "WIDTH", 16)


@contextmanager
def by_numpy() -> Iterator[None]:
    """Let NumPy compute."""
    before, compiled.available = compiled.available, lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        compiled.available = before


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shares of every job that has run."""
    found: list[int] = []
    run = compiled.run

    def noted(job: int, arguments: Any, shares: int, parallel: bool = True) -> None:
        found.append(shares)
        run(job, arguments, shares, parallel)

    monkeypatch.setattr(compiled, "run", noted)
    return found


def same_for_threads(call: Callable[[], Any]) -> Any:
    """Return the result, the same bit for bit with one thread and with two."""
    before = settings.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            settings.set_num_threads(count)
            results.append(call())
    finally:
        settings.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
    return results[0]


# ------------------------------------------------------------------------------- activations

POINTS = np.concatenate(
    [np.linspace(-88, 88, 2001), np.linspace(-6, 6, 4001), np.logspace(-30, 0, 301),
     -np.logspace(-30, 0, 301)]
).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("a", ALL, ids=repr)
def test_activations_agree_with_float64(a: Activation, runs: list[int]) -> None:
    z = POINTS[np.abs(POINTS) < 30] if isinstance(a, act.SELU | act.Exponential) else POINTS
    dy = RNG.standard_normal(z.shape).astype(np.float32)

    def call() -> tuple[np.ndarray, np.ndarray]:
        y = a.fn(z)
        return y, a.backward(dy, z, y)

    y, dx = same_for_threads(call)
    # NumPy's own tanh is quick enough.
    assert len(runs) == (2 if isinstance(a, act.Tanh) else 4)
    assert min(runs) > 2
    wide = z.astype(np.float64)
    want = a.fn(wide)
    np.testing.assert_allclose(y, want, rtol=3e-7, atol=7e-7 if isinstance(a, act.GELU) else 1e-7)
    slope = a.backward(dy.astype(np.float64), wide, want)
    np.testing.assert_allclose(dx, slope, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("a", ALL, ids=repr)
def test_activations_of_nan_and_infinity_are_numpys(a: Activation) -> None:
    z = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, 3e38, -3e38, 1e-45], np.float32)
    dy = np.ones_like(z)
    y, dx = a.fn(z), a.backward(dy, z, a.fn(z))
    with by_numpy(), np.errstate(all="ignore"):
        np.testing.assert_allclose(y, a.fn(z), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(dx, a.backward(dy, z, a.fn(z)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("a", [act.ELU(), act.GELU(), act.Sigmoid()], ids=repr)
def test_in_the_place_of_an_argument(a: Activation, runs: list[int]) -> None:
    z = RNG.standard_normal((7, 60)).astype(np.float32)
    dy = RNG.standard_normal(z.shape).astype(np.float32)
    y = a.fn(z)
    dx = a.backward(dy, z, y)
    held = z.copy()
    assert a.fn(held, out=held) is held
    np.testing.assert_array_equal(held, y)
    for k in range(2):
        arrays = [dy.copy(), z.copy(), y.copy()]
        # GELU's derivative is one of the argument, the others' one of the value.
        out = arrays[0 if k == 0 else 2 if a.invertible else 1]
        assert a.backward(*arrays, out=out) is out
        np.testing.assert_array_equal(out, dx)
    assert len(runs) == 5


def test_how_arrays_lie_makes_no_difference(runs: list[int]) -> None:
    z = RNG.standard_normal((20, 30)).astype(np.float32)
    want = act.ELU().fn(z)
    np.testing.assert_array_equal(act.ELU().fn(np.asfortranarray(z)), want)
    out = np.empty((30, 20), np.float32).T
    assert act.ELU().fn(z, out=out) is out
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(
        act.ELU().backward(z.T, y=want.T).T, act.ELU().backward(z, y=want)
    )
    z.flags.writeable = False
    np.testing.assert_array_equal(act.ELU().fn(z), want)
    assert len(runs) == 6


def test_what_overlaps_in_part_and_other_dtypes_go_by_numpy(runs: list[int]) -> None:
    held = RNG.standard_normal(1000).astype(np.float32)
    want = np.maximum(held[:-1], 0)
    act.LeakyReLU(0.0).fn(held[:-1], out=held[1:])
    np.testing.assert_array_equal(held[1:], want)
    for dtype in ("float16", "float64"):
        act.Sigmoid().fn(held.astype(dtype))
    assert not runs


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCONV_NUMBA", "0")
    assert "switches it off" in str(compiled.numba_missing())


# ----------------------------------------------------------------------------------- pooling


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a pooling: many equal values, some NaN, padding larger than a window too."""
    nd = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(nd))
    more = draw(st.sampled_from([0, 0, 3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = tuple(int(rng.integers(k, k + 6)) for k in kernel)
    x = rng.standard_normal((draw(st.integers(1, 3)), *size, draw(st.sampled_from([1, 5, 18]))))
    if draw(st.booleans()):
        x = np.round(x)
    if draw(st.booleans()):
        x.reshape(-1)[rng.integers(0, x.size, 2)] = draw(st.sampled_from([np.nan, np.inf]))
    return {
        "x": x.astype(np.float32),
        "kernel": kernel,
        "stride": tuple(draw(st.integers(1, 4)) for _ in range(nd)),
        "padding": tuple(
            (int(rng.integers(0, k)) + more, int(rng.integers(0, k)) + more) for k in kernel
        ),
        "seed": draw(st.integers(0, 2**32)),
    }  # fmt: skip


@hypothesis.settings(deadline=None, max_examples=60)
@given(windows())
def test_pools_of_the_layer_are_numpys(drawn: dict[str, Any]) -> None:
    x, where = drawn["x"], (drawn["kernel"], drawn["stride"], drawn["padding"])
    # Cells ask their windows, and windows strew.
    for mode, strewn in (("max", 0), ("max", 2**20), ("average", 0)):

        def call(mode: str = mode) -> tuple[np.ndarray, ...]:
            y, winners = pooling_passes.pool(x, *where, mode, True)
            dy = np.random.default_rng(drawn["seed"]).standard_normal(y.shape).astype(x.dtype)
            inferred, _ = pooling_passes.pool(x, *where, mode)
            return y, inferred, pooling_passes.pool_grad(dy, winners, x.shape, *where, mode)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pooling, "STREWN", strewn)
            agree(call)


@hypothesis.settings(deadline=None, max_examples=60)
@given(windows())
def test_pools_of_the_functions_are_numpys(drawn: dict[str, Any]) -> None:
    x, nd = drawn["x"], len(drawn["kernel"])
    if max(max(p) - k for p, k in zip(drawn["padding"], drawn["kernel"], strict=True)) >= 0:
        drawn["padding"] = 0
    options = {"stride": drawn["stride"], "padding": drawn["padding"], "layout": "channels_last"}
    named = {
        f"{mode}{suffix}": getattr(gpuconv, f"{mode}_pool{nd}d{suffix}")
        for mode in ("max", "avg")
        for suffix in ("", "_backward")
    }

    def call() -> tuple[np.ndarray, ...]:
        kernel = drawn["kernel"]
        y, indices = named["max"](x, kernel, return_indices=True, **options)
        dy = np.random.default_rng(drawn["seed"]).standard_normal(y.shape).astype(x.dtype)
        return (
            y,
            indices,
            named["max"](x, kernel, **options),
            named["max_backward"](dy, x, kernel, indices=indices, **options),
            named["max_backward"](dy, x, kernel, **options),
            named["avg"](x, kernel, count_include_pad=False, **options),
            named["avg_backward"](dy, x.shape, kernel, count_include_pad=False, **options),
        )

    agree(call)


def agree(call: Callable[[], tuple[np.ndarray, ...]]) -> None:
    """Compare what the loops compute with what NumPy does."""
    found = same_for_threads(call)
    with by_numpy():
        wanted = call()
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_pools_against_torch(runs: list[int]) -> None:
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    x = RNG.standard_normal((2, 9, 8, 20)).astype(np.float32)
    t = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    for mode in ("max", "avg"):
        y = getattr(gpuconv, f"{mode}_pool2d")(x, 3, stride=2, padding=1)
        want = getattr(f, f"{mode}_pool2d")(t, 3, 2, 1)
        np.testing.assert_allclose(np.moveaxis(y, -1, 1), want.detach(), rtol=1e-5, atol=1e-6)
        dy = RNG.standard_normal(y.shape).astype(np.float32)
        (grad,) = torch.autograd.grad(want, t, torch.tensor(np.moveaxis(dy, -1, 1)))
        layer = gpuconv.layers.Pool2D(3, 2, 1, {"max": "max", "avg": "average"}[mode])
        layer.forward(np.abs(x) if mode == "max" else x)
        if mode == "avg":
            np.testing.assert_allclose(
                np.moveaxis(layer.backward(dy), -1, 1), grad, rtol=1e-5, atol=1e-6
            )
    assert len(runs) == 5


def test_an_empty_batch_and_few_channels(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    empty = np.empty((0, 6, 6, 16), np.float32)
    assert gpuconv.max_pool2d(empty, 2).shape == (0, 3, 3, 16)
    assert act.ReLU().fn(empty).shape == empty.shape
    monkeypatch.setattr(pooling, "LEAST_CHANNELS", 8)
    gpuconv.max_pool2d(np.ones((2, 6, 6, 3), np.float32), 2)
    assert not runs


# ------------------------------------------------------------------------ batch normalisation


@pytest.mark.parametrize("shape", [(1, 3), (37, 3), (37, 40), (2000, 5)])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_columns(shape: tuple[int, int], far: float, runs: list[int]) -> None:
    x = (far + RNG.standard_normal(shape)).astype(np.float32)
    dy = RNG.standard_normal(shape).astype(np.float32)
    scaler, intercept = RNG.standard_normal((2, shape[1]))

    def call(x: np.ndarray = x, dy: np.ndarray = dy) -> tuple[np.ndarray, ...]:
        mean, variance = normalization.column_statistics(x)
        inverse = 1 / np.sqrt(variance + 1e-2)
        values = (mean, inverse, scaler, intercept)
        y = normalization.normalized_columns(x, *values)
        rectified = normalization.normalized_columns(x, *values, act.ReLU())
        bent = normalization.normalized_columns(x, *values, act.Tanh())
        changing = normalization.columns_grad(dy, x, *values[:3], True, True)
        fixed = normalization.columns_grad(dy, x, *values[:3], False, True)
        return mean, variance, y, rectified, bent, *changing, *fixed

    found = same_for_threads(call)
    assert len(runs) >= 14
    with by_numpy():
        wanted = call(x.astype(np.float64), dy.astype(np.float64))
    for got, want in zip(found, wanted, strict=True):
        scale = max(1.0, float(abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * scale)


def test_nan_stays_in_its_column() -> None:
    x = RNG.standard_normal((40, 6)).astype(np.float32)
    x[3, 2] = np.nan
    layer = BatchNorm1D(rng=0)
    assert np.isnan(layer.forward(x)).any(axis=0).tolist() == [k == 2 for k in range(6)]
    assert np.isnan(layer.backward(x)).any(axis=0).tolist() == [k == 2 for k in range(6)]
