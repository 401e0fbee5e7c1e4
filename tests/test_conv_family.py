"""One, two and three axes, transposed convolutions, forward mode: what no other test asks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
from tests.support import home, host

RNG = np.random.default_rng(17)
LAYOUTS = {1: ("NWC", "NCW"), 2: ("NHWC", "NCHW"), 3: ("NDHWC", "NCDHW")}


def call(name: str, nd: int, suffix: str = "") -> Callable[..., Any]:
    return getattr(gpuconv, f"{name}{nd}d{suffix}")  # type: ignore[no-any-return]


def arrays(nd: int, transposed: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w = RNG.standard_normal((*(3, 2, 2)[:nd], *((4, 3) if transposed else (4, 6))))
    return RNG.standard_normal((2, *(7, 6, 5)[:nd], 4)), w, RNG.standard_normal(w.shape[-1])


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_names_of_layouts(nd: int) -> None:
    x, w, b = arrays(nd)
    last, first = LAYOUTS[nd]
    want = call("conv", nd)(x, w, b)
    for name in (last, "channels_last"):
        np.testing.assert_array_equal(call("conv", nd)(x, w, b, layout=name), want)
    x, w = np.moveaxis(x, -1, 1), np.moveaxis(w, (-1, -2), (0, 1))
    for name in (first, "channels_first"):
        got = call("conv", nd)(x, w, b, layout=name)
        np.testing.assert_allclose(np.moveaxis(got, 1, -1), want, atol=1e-12)


def test_causal_outputs_depend_on_no_later_input() -> None:
    x, w, _ = arrays(1)
    y = gpuconv.conv1d(x, w, padding="causal", dilation=2)
    assert y.shape == (2, 7, 6)
    later = x.copy()
    later[:, 4:] += 1
    again = gpuconv.conv1d(later, w, padding="causal", dilation=2)
    np.testing.assert_array_equal(again[:, :4], y[:, :4])
    assert (again[:, 4:] != y[:, 4:]).all()
    assert gpuconv.conv1d(x, w, padding="causal", stride=3).shape == (2, 3, 6)


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_transposed_is_the_adjoint(nd: int, padding: Any) -> None:
    """``<conv(u, w), x> == <u, conv_transpose(x, w)>``, whichever size the stride lost."""
    for stride in (1, 2, 3):
        for extra in range(stride if padding != "same" else 1):
            x, w, _ = arrays(nd, transposed=True)
            options: dict[str, Any] = {"stride": stride, "padding": padding}
            y = call("conv_transpose", nd)(x, w, output_padding=extra, **options)
            if padding == "same":
                assert y.shape == (2, *(n * stride for n in x.shape[1:-1]), 3)
            u = RNG.standard_normal(y.shape)
            swapped = np.swapaxes(w, -1, -2)  # the convolution takes 3 channels to 4
            if padding == 1 and extra:  # its zeros behind are read by no window
                options["padding"] = tuple((1, 1) for _ in range(nd))
            down = call("conv", nd)(u, np.ascontiguousarray(swapped), **options)
            assert down.shape == x.shape
            np.testing.assert_allclose((down * x).sum(), (u * y).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_out_may_overlap_and_batches_may_be_empty(nd: int) -> None:
    x, w, b = arrays(nd, transposed=True)
    want = call("conv_transpose", nd)(x, w, b, activation="ReLU")
    out = np.empty_like(want)
    assert call("conv_transpose", nd)(x, w, b, activation="ReLU", out=out) is out
    np.testing.assert_array_equal(out, want)
    square = RNG.standard_normal((*(1,) * nd, 4, 4))
    want = call("conv_transpose", nd)(x, square)
    assert call("conv_transpose", nd)(x, square, out=x) is x
    np.testing.assert_array_equal(x, want)
    y = call("conv_transpose", nd)(x[:0], w, b)
    dx, dw, db = call("conv_transpose", nd, "_backward")(y, x[:0], w)
    assert dx.shape == x[:0].shape
    assert not dw.any()
    assert not db.any()
    got = call("conv_transpose", nd, "_backward")(np.ones_like(want), x, square, needs="b")
    assert got[0] is got[1] is None


def test_the_gradient_before_an_activation_stays_within_the_workspace() -> None:
    x = RNG.standard_normal((24, 24, 24, 32)).astype("float32")
    w = RNG.standard_normal((3, 3, 32, 32)).astype("float32") / 10
    options: dict[str, Any] = {"stride": 2, "padding": 1, "activation": "Tanh"}
    y = gpuconv.conv_transpose2d(x, w, **options)
    want = gpuconv.conv_transpose2d_backward(y, x, w, y=y, **options)
    limit, before = 4 * 2**20, gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(limit)
    try:
        gpuconv.conv_transpose2d_backward(y, x, w, y=y, **options)
        tracemalloc.start()
        got = gpuconv.conv_transpose2d_backward(y, x, w, y=y, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    finally:
        gpuconv.set_workspace_limit(before)
    assert peak - sum(g.nbytes for g in got if g is not None) < limit
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3 * np.abs(b).max())


def test_conjugates_stay_within_the_workspace() -> None:
    x = RNG.standard_normal((24, 40, 40, 16)) + 1j * RNG.standard_normal((24, 40, 40, 16))
    w = RNG.standard_normal((3, 3, 16, 8)) + 0j
    dy = gpuconv.conv2d(x, w)
    want = gpuconv.conv2d_backward(dy, x, w)
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(4 * 2**20)
    try:
        tracemalloc.start()
        got = gpuconv.conv2d_backward(dy, x, w, needs=("w", "b"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    finally:
        gpuconv.set_workspace_limit(before)
    assert peak < 6 * 2**20  # a copy of x takes 9.4
    np.testing.assert_allclose(got[1], want[1], rtol=1e-10)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-10)


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("activation", [None, "ReLU", "GELU", "Tanh"])
def test_forward_mode_agrees_with_differences(nd: int, activation: str | None) -> None:
    x, w, b = arrays(nd)
    directions = [RNG.standard_normal(a.shape) for a in (x, w, b)]
    options: dict[str, Any] = {"padding": 1, "stride": 2, "activation": activation}
    for used in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)):
        dx, dw, db = (d if u else None for d, u in zip(directions, used, strict=True))
        y, dy = call("conv", nd, "_jvp")(x, w, b, dx=dx, dw=dw, db=db, **options)
        np.testing.assert_allclose(y, call("conv", nd)(x, w, b, **options), atol=1e-12)
        step = 1e-6
        ahead, back = (
            call("conv", nd)(
                *(a + s * u * d for a, u, d in zip((x, w, b), used, directions, strict=True)),
                **options,
            )
            for s in (step, -step)
        )
        np.testing.assert_allclose(dy, (ahead - back) / (2 * step), atol=1e-6)


def test_forward_mode_in_either_layout_on_a_device_and_of_complex_numbers() -> None:
    x, w, b = arrays(2)
    with home("cuda_atomic") as xp:
        first = [np.moveaxis(x, -1, 1), np.moveaxis(w, (-1, -2), (0, 1)), b]
        first = [xp.asarray(np.ascontiguousarray(a)) for a in first]
        y, dy = gpuconv.conv2d_jvp(*first, db=first[2], layout="NCHW")
        np.testing.assert_allclose(host(dy), np.broadcast_to(b.reshape(1, -1, 1, 1), y.shape))
    z = x + 1j * RNG.standard_normal(x.shape)
    _, dz = gpuconv.conv2d_jvp(z, w + 0j, dx=1j * z)
    np.testing.assert_allclose(dz, 1j * gpuconv.conv2d(z, w + 0j), atol=1e-12)


def test_explain_takes_any_rank_and_dtype() -> None:
    found = gpuconv.explain((2, 9, 3), (3, 3, 4), dtype="complex64", padding="causal", device="cpu")
    assert found.problem.ndim == 1
    assert set(found.choice.values()) <= {"naive", "numpy_gemm"}
    assert "not complex64" in str(found)
    assert gpuconv.explain((1, 4, 4, 4, 2), (2, 2, 2, 2, 3), device="cpu").problem.ndim == 3
    found = gpuconv.explain((1, 4, 4, 2), (2, 2, 2, 3), dtype="bfloat16", device="cpu")
    assert found.problem.itemsize == 2


X1, W1 = np.ones((2, 7, 4)), np.ones((3, 4, 6))
XT, WT = np.ones((2, 4, 5, 4)), np.ones((3, 3, 4, 6))
YT = np.full((2, 6, 7, 6), 7.0)


def one(**options: Any) -> Callable[[], Any]:
    return lambda: gpuconv.conv1d(options.pop("x", X1), options.pop("w", W1), **options)


def up(**options: Any) -> Callable[[], Any]:
    return lambda: gpuconv.conv_transpose2d(
        options.pop("x", XT), options.pop("w", WT), out=options.pop("out", YT), **options
    )


def up_back(**options: Any) -> Callable[[], Any]:
    return lambda: gpuconv.conv_transpose2d_backward(
        options.pop("dy", YT), options.pop("x", XT), WT, **options
    )


def jvp(**options: Any) -> Callable[[], Any]:
    return lambda: gpuconv.conv1d_jvp(X1, W1, **options)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "1-D, two axes": (one(x=X1[0]), ValueError, r"x has 2 axes.*\(batch, columns, in_ch\)"),
    "1-D, image": (one(x=XT), ValueError, "x has 4 axes.*expected 3"),
    "1-D, layout": (one(layout="NHWC"), ValueError, "layout is 'NHWC'; expected one of 'NWC'"),
    "1-D, padding": (one(padding="full"), ValueError, "padding is 'full'.*'causal'"),
    "1-D, padding of two": (one(padding=(1, 1)), ValueError, "padding is .*1 of them"),
    "1-D, stride of two": (one(stride=(1, 1)), ValueError, "stride is .*columns"),
    "1-D, complex and activation": (
        one(x=X1 + 0j, w=W1 + 0j, activation="ReLU"), ValueError, "activation is ReLU; expected None.*complex128"),
    "2-D causal": (lambda: gpuconv.conv2d(XT, WT, padding="causal"), ValueError, "padding is 'causal'"),
    "3-D, layout": (
        lambda: gpuconv.conv3d(np.ones((1, 3, 3, 3, 1)), np.ones((2, 2, 2, 1, 1)), layout="NCHW"),
        ValueError, "layout is 'NCHW'; expected one of 'NDHWC'"),
    "3-D, image": (lambda: gpuconv.conv3d(XT, WT), ValueError, "x has 4 axes.*depth, rows"),
    "transposed, x a list": (up(x=[1]), TypeError, "x is a list"),
    "transposed, dtypes": (up(w=WT.astype("f4")), TypeError, "x has dtype float64 and w float32"),
    "transposed, axes": (up(w=WT[0]), ValueError, "w has 3 axes.*in_ch, out_ch // groups"),
    "transposed, axes first": (up(w=WT[0], layout="NCHW"), ValueError, r"\(in_ch, out_ch // groups, kernel"),
    "transposed, channels": (up(w=WT[:, :, :3]), ValueError, "w has.*3 input channels; expected 4"),
    "transposed, no kernel": (up(w=WT[:0]), ValueError, "kernel size of at least 1"),
    "transposed, groups": (up(groups=3), ValueError, "groups is 3; expected a divisor of the 4"),
    "transposed, stride": (up(stride=0), ValueError, "stride is 0"),
    "transposed, padding": (up(padding=-1), ValueError, "padding is -1"),
    "transposed, causal": (up(padding="causal"), ValueError, "padding is 'causal'"),
    "transposed, padding too wide": (up(padding=4), ValueError, "padding is 4, which leaves"),
    "output_padding too large": (up(output_padding=1), ValueError, "output_padding is 1; expected less than stride"),
    "output_padding negative": (up(output_padding=-1), ValueError, "output_padding is -1; expected a non-negative"),
    "output_padding a fraction": (up(output_padding=0.5), TypeError, "output_padding is 0.5"),
    "output_padding and same": (
        up(padding="same", stride=2, output_padding=1), ValueError, "output_padding is 1; expected 0"),
    "transposed, b": (up(b=np.ones(5)), ValueError, r"b has shape \(5,\); expected \(6,\)"),
    "transposed, activation": (up(activation="swish?"), ValueError, "activation is"),
    "transposed, out": (up(out=YT[:1]), ValueError, "out has shape"),
    "transposed, dy": (up_back(dy=YT[:1]), ValueError, "dy has shape"),
    "transposed, y missing": (up_back(activation="ReLU"), ValueError, "y is None"),
    "transposed, GELU": (up_back(activation="GELU", y=YT), ValueError, "activation is GELU"),
    "transposed, needs": (up_back(needs="xz"), ValueError, "needs is 'xz'"),
    "no direction": (jvp(), ValueError, "dx, dw and db are None"),
    "direction of another shape": (jvp(dx=X1[:1]), ValueError, "dx has shape"),
    "direction of another dtype": (jvp(dw=W1.astype("f4")), TypeError, "x has dtype float64 and dw float32"),
    "direction of no bias": (jvp(db=np.ones(6)), ValueError, "db is given and b is None"),
    "direction a list": (jvp(dx=[1.0]), TypeError, "dx is a list"),
    "explain, dtype": (
        lambda: gpuconv.explain(X1.shape, W1.shape, dtype="int8"), TypeError, "dtype is int8; expected.*bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_allowed(name: str) -> None:
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        wrong()
    assert (YT == 7).all()
