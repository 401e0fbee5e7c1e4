"""The compiled depthwise engine beyond the conformance suite: tails, borders, views, determinism."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch, settings
from gpuconv.engines.rates import Rates
from tests.support import close

RNG = np.random.default_rng(5)
NAME = "numba_depthwise"


@pytest.fixture(autouse=True)
def available() -> Iterator[None]:
    missing = dispatch.get_engine(NAME).unavailable()
    if missing:
        pytest.skip(missing)
    yield
    gpuconv.set_num_threads(None)


def made(shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def both(
    engine: str, x: Any, w: Any, b: Any, activation: str | None = None, **options: Any
) -> list[np.ndarray]:
    """Return the result and all gradients by one engine."""
    conv, backward = (
        (gpuconv.conv2d, gpuconv.conv2d_backward)
        if x.ndim == 4
        else (gpuconv.conv1d, gpuconv.conv1d_backward)
    )
    with gpuconv.engine(engine):
        y = conv(x, w, b, activation=activation, **options)
        dy = np.random.default_rng(3).standard_normal(y.shape).astype(y.dtype)
        return [y, *backward(dy, x, w, y=y, activation=activation, **options)]


def agrees(x: Any, w: Any, b: Any, allowed: float = 1e-12, **options: Any) -> None:
    wide = [a.astype("float64") for a in (x, w, b)]
    for got, want in zip(
        both(NAME, x, w, b, **options), both("numpy_gemm", *wide, **options), strict=True
    ):
        close(got, want, allowed)


@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 15, 16, 17, 40, 67])
def test_any_number_of_channels(channels: int) -> None:
    for dtype, allowed in (("float64", 1e-12), ("float32", 3e-5)):
        x, w = made((2, 9, 13, channels), dtype), made((3, 3, 1, channels), dtype)
        agrees(x, w, made((channels,), dtype), allowed, padding=1, groups=channels)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 6, 7, 9])
def test_any_kernel_and_width(kernel: int) -> None:
    """Strips of eight and of four, single columns, and zeros on one side or both."""
    for width in (1, 2, 3, 4, 5, 7, 8, 9, 12, 17):
        x, w, b = made((1, 6, width, 8)), made((kernel, kernel, 1, 8)), made((8,))
        agrees(x, w, b, groups=8, padding=kernel // 2 + 1, activation="ReLU")


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": ((0, 2), (3, 1))},
        {"stride": 3, "dilation": 2, "padding": 3},
        {"stride": 2, "dilation": 2, "padding": 2},
        {"dilation": (1, 3), "padding": "same"},
        {"stride": 5, "padding": 4},
        {"stride": (1, 2)},
    ],
    ids=str,
)
def test_any_step(options: dict[str, Any]) -> None:
    x, b = made((2, 15, 18, 24)), made((24,))
    for kernel in ((3, 3), (2, 5)):
        agrees(x, made((*kernel, 1, 24)), b, groups=24, activation="LeakyReLU(0.2)", **options)


@pytest.mark.parametrize(("group", "dtype"), [(8, "float32"), (16, "float64")])
def test_groups(group: int, dtype: str) -> None:
    """A group narrower than a vector, and one wider."""
    channels = 3 * max(16, group)
    for kernel, options in ((3, {"padding": 1}), (3, {"padding": 1, "stride": 2}), (5, {})):
        x, w = made((2, 11, 14, channels), dtype), made((kernel, kernel, group, channels), dtype)
        allowed = 1e-12 if dtype == "float64" else 1e-4
        agrees(x, w, made((channels,), dtype), allowed, groups=channels // group, **options)


def test_one_axis() -> None:
    x, w, b = made((3, 50, 20)), made((5, 1, 20)), made((20,))
    agrees(x, w, b, groups=20, padding=2, stride=2, activation="ReLU")


def test_views_are_read_where_they_lie() -> None:
    """Every second row, some channels, images backwards, columns that repeat."""
    base, w, b = made((4, 20, 12, 40)), made((3, 3, 1, 16)), made((16,))
    for x in (base[::-1, ::2, :, 8:24], base[..., ::2][..., :16], base[:, :, ::-1, :16]):
        agrees(x, w, b, groups=16, padding=1, activation="Tanh")
    repeated = np.broadcast_to(base[:, :, :1, :16], (4, 20, 12, 16))
    agrees(repeated, w, b, groups=16, padding=1, activation="ReLU")


def test_channels_first_and_half_precision_come_in_blocks() -> None:
    x, w, b = made((2, 24, 30, 31)), made((24, 1, 3, 3)), made((24,))
    options: dict[str, Any] = {"groups": 24, "padding": 1, "layout": "NCHW"}
    agrees(x, w, b, activation="Tanh", **options)
    half = [a.astype("float16") for a in (x, w, b)]
    for got, want in zip(
        both(NAME, *half, activation=None, **options),
        both("numpy_gemm", *(a.astype("float64") for a in half), **options),
        strict=True,
    ):
        assert got.dtype == "float16"
        close(got, want, 5e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_padding_has_no_part_in_the_gradients(bad: float) -> None:
    """A value that only some taps meet spoils their gradients and no other's."""
    x, w, dy = made((1, 9, 12, 8)), made((3, 3, 1, 8)), made((1, 9, 12, 8))
    x[0, 4, 0, 2] = bad
    with gpuconv.engine(NAME):
        dx, dw, _ = gpuconv.conv2d_backward(dy, x, w, padding=1, groups=8)
        assert np.isfinite(dx).all()
        # The first column is read by the taps in the middle and on the left, not on the right.
        assert np.isfinite(dw[:, 2]).all()
        assert not np.isfinite(dw[:, :2, 0, 2]).any()
        assert np.isfinite(np.delete(dw, 2, axis=-1)).all()
        w[1, 0, 0, 3] = bad
        dx, _, _ = gpuconv.conv2d_backward(dy, x, w, padding=1, groups=8)
    # The left tap of an output reads the column before: the last column is read by none.
    assert np.isfinite(dx[:, :, -1]).all()
    assert not np.isfinite(dx[:, :, :-1, 3]).any()


def test_relu_keeps_nan_and_drops_minus_infinity() -> None:
    x = np.zeros((1, 4, 9, 16), "float32")
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = np.nan, -np.inf, np.inf
    with gpuconv.engine(NAME):
        y = gpuconv.conv2d(x, np.ones((1, 1, 1, 16), "float32"), groups=16, activation="ReLU")
    assert np.isnan(y[0, 0, 0]).all()
    assert (y[0, 1, 1] == 0).all()
    assert np.isposinf(y[0, 2, 2]).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_bits_from_run_to_run(count: int) -> None:
    """Whichever worker takes which share."""
    gpuconv.set_num_threads(count)
    x, w, b = (
        made((6, 40, 40, 48), "float32"),
        made((3, 3, 1, 48), "float32"),
        made((48,), "float32"),
    )
    options: dict[str, Any] = {"padding": 1, "groups": 48, "activation": "ReLU"}
    first = both(NAME, x, w, b, **options)
    for _ in range(10):
        for got, want in zip(both(NAME, x, w, b, **options), first, strict=True):
            assert (got == want).all()


def test_it_is_chosen_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the rates of the usual machine: those of a busy one may say otherwise.
    monkeypatch.setattr(sys.modules[Rates.__module__], "_rates", Rates())
    settings.changed()
    for x, w, options in (
        ((8, 56, 56, 144), (3, 3, 1, 144), {"padding": 1, "groups": 144}),
        ((4, 112, 112, 96), (3, 3, 1, 96), {"padding": 1, "groups": 96, "stride": 2}),
        ((2, 21, 21, 240), (5, 5, 1, 240), {"padding": 2, "groups": 240}),
        ((8, 28, 28, 256), (3, 3, 8, 256), {"padding": 1, "groups": 32}),
    ):
        assert set(gpuconv.explain(x, w, **options).choice.values()) == {NAME}


def test_numba_is_imported_when_it_is_used_and_not_before() -> None:
    code = "import gpuconv, sys; gpuconv.engines(); print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
