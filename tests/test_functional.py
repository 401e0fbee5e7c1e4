"""conv2d and conv2d_backward against independent references, and how they treat arrays."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import gpuconv
from tests.support import CASES, Case, by_scipy, close, convolutions, draw, oracle

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_the_loops_agree_with_scipy(c: Case) -> None:
    data = oracle(c, "float64")
    close(data.y, by_scipy(c, data.x, data.w, data.b), 1e-12)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_random_convolutions_agree_with_scipy(c: Case) -> None:
    x, w, b = draw(c, "float64")
    y = gpuconv.conv2d(x, w, b, **c.keywords)
    close(y, by_scipy(c, x, w, b), 1e-11)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_random_gradients_are_adjoint(c: Case) -> None:
    """Without an activation the result is linear in x, in w and in b: gradients transpose it."""
    plain = {**c.keywords, "activation": None}
    x, w, _ = draw(c, "float64")
    y = gpuconv.conv2d(x, w, **plain)
    rng = np.random.default_rng(1)
    dy, u, v = (rng.standard_normal(s) for s in (y.shape, x.shape, w.shape))
    dx, dw, db = gpuconv.conv2d_backward(dy, x, w, **plain)
    scale = max(1.0, np.abs(dy).sum())
    assert abs((dx * u).sum() - (dy * gpuconv.conv2d(u, w, **plain)).sum()) < 1e-11 * scale
    assert abs((dw * v).sum() - (dy * gpuconv.conv2d(x, v, **plain)).sum()) < 1e-11 * scale
    channel = -1 if c.layout == "NHWC" else 1
    np.testing.assert_allclose(db, np.moveaxis(dy, channel, -1).sum((0, 1, 2)), atol=1e-11 * scale)


@settings(max_examples=100, deadline=None)
@given(convolutions())
def test_random_convolutions_agree_with_the_loops(c: Case) -> None:
    data = oracle(c, "float64")
    close(gpuconv.conv2d(data.x, data.w, data.b, **c.keywords), data.y, 1e-11)
    got = gpuconv.conv2d_backward(data.dy, data.x, data.w, y=data.y, **c.keywords)
    for gradient, want in zip(got, (data.dx, data.dw, data.db), strict=True):
        close(gradient, want, 1e-11)


@settings(max_examples=100, deadline=None)
@given(convolutions())
def test_random_convolutions_agree_with_torch(c: Case) -> None:
    torch = pytest.importorskip("torch")
    x, w, b = draw(c, "float64")
    y = gpuconv.conv2d(x, w, b, **c.keywords)
    dy = np.random.default_rng(2).standard_normal(y.shape)
    got = gpuconv.conv2d_backward(dy, x, w, y=y, **c.keywords)
    first = c.layout == "NCHW"
    tx = torch.tensor(
        np.ascontiguousarray(x if first else x.transpose(0, 3, 1, 2)), requires_grad=True
    )
    tw = torch.tensor(
        np.ascontiguousarray(w if first else w.transpose(3, 2, 0, 1)), requires_grad=True
    )
    tb = None if b is None else torch.tensor(b, requires_grad=True)
    o = dict(c.options)
    # SAME and asymmetric padding are zeros put around the image beforehand.
    (top, bottom), (left, right) = _pads(c, x.shape, w.shape)
    padded = torch.nn.functional.pad(tx, (left, right, top, bottom))
    tz = torch.nn.functional.conv2d(
        padded, tw, tb, stride=o["stride"], dilation=o["dilation"], groups=o["groups"]
    )
    act: dict[Any, Any] = {
        None: lambda t: t,
        "ReLU": torch.relu,
        "Tanh": torch.tanh,
        "LeakyReLU(0.2)": lambda t: torch.nn.functional.leaky_relu(t, 0.2),
    }
    ty = act[c.activation](tz)
    back = (0, 1, 2, 3) if first else (0, 2, 3, 1)
    close(y, ty.detach().numpy().transpose(back), 1e-11)
    tdy = torch.tensor(np.ascontiguousarray(dy if first else dy.transpose(0, 3, 1, 2)))
    grads = torch.autograd.grad(ty, [t for t in (tx, tw, tb) if t is not None], tdy)
    close(got[0], grads[0].numpy().transpose(back), 1e-11)
    close(got[1], grads[1].numpy().transpose((0, 1, 2, 3) if first else (2, 3, 1, 0)), 1e-11)
    if tb is not None:
        close(got[2], grads[2].numpy(), 1e-11)


def _pads(c: Case, x_shape: Any, w_shape: Any) -> Any:
    from gpuconv.functional import _plan

    o = dict(c.options)
    plan = _plan(
        2, x_shape, w_shape, "float64", o["stride"], o["padding"], o["dilation"], o["groups"],
        c.layout, None,
    )  # fmt: skip
    return plan.problem.padding


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_layouts_agree(c: Case) -> None:
    x, w, b = draw(Case(c.name, c.x, c.w, c.options, c.bias, c.activation, "NHWC"), "float64")
    options = {**c.keywords, "layout": "NHWC"}
    last = gpuconv.conv2d(x, w, b, **options)
    first = gpuconv.conv2d(
        x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), b, **{**options, "layout": "NCHW"}
    )
    np.testing.assert_allclose(first.transpose(0, 2, 3, 1), last, atol=1e-12)
    named = gpuconv.conv2d(x, w, b, **{**options, "layout": "channels_last"})
    assert (named == last).all()


def test_same_keeps_ceil_of_the_size_and_puts_the_odd_zero_last() -> None:
    x = np.arange(1.0, 5.0).reshape(1, 1, 4, 1)
    w = np.ones((1, 2, 1, 1))
    assert gpuconv.conv2d(x, w, padding="same").ravel().tolist() == [3, 5, 7, 4]
    assert gpuconv.conv2d(np.ones((1, 7, 7, 1)), np.ones((3, 3, 1, 1)), padding="same", stride=3).shape == (1, 3, 3, 1)  # fmt: skip


def test_read_only_byte_order_and_subclasses() -> None:
    c = CASES[0]
    data = oracle(c, "float64")
    x, w = data.x.copy(), data.w.copy()
    x.flags.writeable = w.flags.writeable = False
    close(gpuconv.conv2d(x, w, data.b, **c.keywords), data.y, 1e-11)
    broadcast = np.broadcast_to(np.float64(1), x.shape)
    ones = gpuconv.conv2d(np.ones(x.shape), w, **c.keywords)
    close(gpuconv.conv2d(broadcast, w, **c.keywords), ones, 1e-12)
    swapped = gpuconv.conv2d(x.astype(">f8"), w.astype(">f8"), data.b, **c.keywords)
    close(swapped, data.y, 1e-11)
    assert swapped.dtype == np.dtype("=f8")

    class Mine(np.ndarray):
        pass

    assert type(gpuconv.conv2d(x.view(Mine), w, data.b, **c.keywords)) is np.ndarray


def test_out_may_overlap_the_inputs() -> None:
    x = RNG.standard_normal((2, 6, 6, 3))
    w = RNG.standard_normal((3, 3, 3, 3))
    want = gpuconv.conv2d(x, w, padding=1)
    assert gpuconv.conv2d(x, w, padding=1, out=x) is x
    np.testing.assert_array_equal(x, want)


def test_needs_takes_any_iterable() -> None:
    c = CASES[0]
    d = oracle(c, "float64")
    for needs in (("x",), ["x"], {"x"}, "x", iter(["x"])):
        dx, dw, db = gpuconv.conv2d_backward(d.dy, d.x, d.w, needs=needs, padding=1)
        close(dx, d.dx, 1e-11)
        assert dw is db is None
    assert gpuconv.conv2d_backward(d.dy, d.x, d.w, needs=(), padding=1) == (None, None, None)


def test_lists_and_numpy_integers_are_taken_for_options() -> None:
    x, w = RNG.standard_normal((1, 8, 9, 2)), RNG.standard_normal((3, 3, 2, 2))
    want = gpuconv.conv2d(x, w, stride=(2, 1), padding=((1, 0), (0, 2)), dilation=(1, 2))
    got = gpuconv.conv2d(
        x, w, stride=np.array([2, 1]), padding=[[1, 0], [0, 2]], dilation=[np.int64(1), np.int8(2)]
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_memory_beyond_inputs_and_outputs_stays_under_the_limit(dtype: str) -> None:
    x = (RNG.standard_normal((24, 48, 48, 32)) / 10).astype(dtype)
    w = (RNG.standard_normal((3, 3, 32, 32)) / 10).astype(dtype)
    limit = 12 * 2**20
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(limit)
    try:
        options: dict[str, Any] = {"padding": 1, "activation": "ReLU"}
        y = gpuconv.conv2d(x, w, **options)
        gpuconv.conv2d_backward(y, x, w, y=y, **options)  # what is compiled is compiled
        tracemalloc.start()
        try:
            y = gpuconv.conv2d(x, w, **options)
            forward = tracemalloc.get_traced_memory()[1] - y.nbytes
            tracemalloc.reset_peak()
            kept = tracemalloc.get_traced_memory()[0]
            gradients = gpuconv.conv2d_backward(y, x, w, y=y, **options)
            results = sum(g.nbytes for g in gradients if g is not None)
            backward = tracemalloc.get_traced_memory()[1] - kept - results
        finally:
            tracemalloc.stop()
        assert forward < limit
        assert backward < limit
    finally:
        gpuconv.set_workspace_limit(before)


def test_results_do_not_depend_on_threads_or_workspace() -> None:
    x = RNG.standard_normal((5, 40, 40, 8))
    w = RNG.standard_normal((3, 3, 8, 16))
    want = gpuconv.conv2d(x, w, padding=1)
    dy = RNG.standard_normal(want.shape)
    grads = gpuconv.conv2d_backward(dy, x, w, y=want, activation="Tanh", padding=1)
    before = gpuconv.get_workspace_limit()
    try:
        for threads in (1, 2, 3, 7):
            gpuconv.set_num_threads(threads)
            for limit in (2**20, 2**28):
                gpuconv.set_workspace_limit(limit)
                np.testing.assert_allclose(gpuconv.conv2d(x, w, padding=1), want, atol=1e-12)
                again = gpuconv.conv2d_backward(dy, x, w, y=want, activation="Tanh", padding=1)
                for a, b in zip(again, grads, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-9)
    finally:
        gpuconv.set_num_threads(None)
        gpuconv.set_workspace_limit(before)


def test_calls_from_many_threads_at_once() -> None:
    x = RNG.standard_normal((4, 30, 30, 8)).astype("float32")
    w = RNG.standard_normal((3, 3, 8, 32)).astype("float32")
    want = gpuconv.conv2d(x, w)
    equal: list[bool] = []

    def call() -> None:
        equal.extend(np.array_equal(gpuconv.conv2d(x, w), want) for _ in range(10))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert equal == [True] * 60


def test_explain_names_the_choice_and_the_reasons() -> None:
    text = str(gpuconv.explain((8, 56, 56, 64), (3, 3, 64, 64), padding=1, device="cpu"))
    assert "numpy_gemm" in text
    assert "cuda_atomic" in text
    assert "GFLOP/s" in text
    with gpuconv.engine("naive"):
        found = gpuconv.explain((1, 5, 5, 1), (3, 3, 1, 1), device="cpu")
    assert found.choice == dict.fromkeys(("forward", "input_grad", "weight_grad"), "naive")
    assert "(forced)" in str(found)


def test_engine_blocks_nest_and_end() -> None:
    with gpuconv.engine("naive"):
        with gpuconv.engine("numpy_gemm"):
            assert gpuconv.explain((1, 5, 5, 1), (3, 3, 1, 1), device="cpu").forced == "numpy_gemm"
        with gpuconv.engine(None):
            assert gpuconv.explain((1, 5, 5, 1), (3, 3, 1, 1), device="cpu").forced is None
    assert gpuconv.explain((1, 5, 5, 1), (3, 3, 1, 1), device="cpu").forced is None
