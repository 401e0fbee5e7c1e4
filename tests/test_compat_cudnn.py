"""The drop-in for cupy.cudnn: against our own calls, against PyTorch, and on a real client."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.compat import cudnn
from tests.support import home, host

RNG = np.random.default_rng(21)
FLAGS = {"auto_tune": True, "tensor_core": "auto"}


@pytest.fixture(params=["numpy", "cuda"])
def xp(request: pytest.FixtureRequest) -> Iterator[Any]:
    with home("naive" if request.param == "numpy" else "cuda_atomic") as module:
        yield module


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


@pytest.mark.parametrize("nd", [2, 3])
@pytest.mark.parametrize("d_layout", [0, 1])
@pytest.mark.parametrize("w_layout", [0, 1])
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "extra"),
    [(1, 1, 1, 0), (2, 1, 2, 1), (1, 2, 1, 0), (3, 1, 1, 2)],
)
def test_convolutions(
    xp: Any,
    nd: int,
    d_layout: int,
    w_layout: int,
    stride: int,
    dilation: int,
    groups: int,
    extra: int,
) -> None:
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    kernel, size = (3, 2, 2)[:nd], tuple(10 + extra - i for i in range(nd))
    x, W, b = values(2, 4, *size), values(6, 4 // groups, *kernel), values(6)
    options = {"stride": stride, "padding": 1, "dilation": dilation, "groups": groups}
    tx, tw, tb = (torch.tensor(a, requires_grad=True) for a in (x, W, b))
    want = getattr(f, f"conv{nd}d")(tx, tw, tb, **options)
    gy = values(*want.shape)
    gx_want, gw_want = torch.autograd.grad(want, (tx, tw), torch.tensor(gy))

    def image(a: np.ndarray) -> Any:
        return xp.asarray(np.ascontiguousarray(np.moveaxis(a, 1, -1)) if d_layout else a)

    def weights(a: np.ndarray) -> Any:
        return xp.asarray(np.ascontiguousarray(np.moveaxis(a, 1, -1)) if w_layout else a)

    def back(a: Any, last: int) -> np.ndarray:
        return np.moveaxis(host(a), -1, 1) if last else host(a)

    given = ((1,) * nd, (stride,) * nd, (dilation,) * nd, groups)
    layouts = {"d_layout": d_layout, "w_layout": w_layout}
    y = image(np.full(want.shape, np.nan))
    assert (
        cudnn.convolution_forward(
            image(x), weights(W), xp.asarray(b), y, *given, **FLAGS, **layouts
        )
        is None
    )
    np.testing.assert_allclose(back(y, d_layout), want.detach().numpy(), atol=1e-11)
    # Atomics do not repeat bit for bit: with no other engine on the device, that cannot be asked.
    flags = {"deterministic": xp is np, **FLAGS, **layouts}
    gW = weights(np.full(W.shape, np.nan))
    cudnn.convolution_backward_filter(image(x), image(gy), gW, *given, **flags)
    np.testing.assert_allclose(back(gW, w_layout), gw_want.numpy(), atol=1e-11)
    gx = image(np.full(x.shape, np.nan))
    cudnn.convolution_backward_data(weights(W), image(gy), None, gx, *given, **flags)
    np.testing.assert_allclose(back(gx, d_layout), gx_want.numpy(), atol=1e-11)
    c = values(4)
    cudnn.convolution_backward_data(weights(W), image(gy), xp.asarray(c), gx, *given, **flags)
    shifted = gx_want.numpy() + c.reshape(1, 4, *(1,) * nd)
    np.testing.assert_allclose(back(gx, d_layout), shifted, atol=1e-11)


@pytest.mark.parametrize("nd", [2, 3])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_pooling(xp: Any, nd: int, mode: int) -> None:
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    for kernel, stride, pad, size in ((2, 2, 0, 8), (3, 2, 1, 7), (3, 1, 1, 5)):
        x = np.round(values(2, 3, *(size,) * nd), 1)
        t = torch.tensor(x, requires_grad=True)
        if mode in (0, 3):
            want = getattr(f, f"max_pool{nd}d")(t, kernel, stride, pad)
        else:
            call = getattr(f, f"avg_pool{nd}d")
            want = call(t, kernel, stride, pad, count_include_pad=mode == 1)
        gy = values(*want.shape)
        (grad,) = torch.autograd.grad(want, t, torch.tensor(gy))
        y = xp.asarray(np.full(want.shape, np.nan))
        given = ((kernel,) * nd, (stride,) * nd, (pad,) * nd, mode)
        assert cudnn.pooling_forward(xp.asarray(x), y, *given) is y
        np.testing.assert_allclose(host(y), want.detach().numpy(), atol=1e-12)
        gx = cudnn.pooling_backward(xp.asarray(x), y, xp.asarray(gy), *given)
        np.testing.assert_allclose(host(gx), grad.numpy(), atol=1e-12)


def test_pooling_reaches_over_the_end_where_the_result_has_room() -> None:
    x = np.arange(25.0).reshape(1, 1, 5, 5)
    y = np.empty((1, 1, 3, 3))
    cudnn.pooling_forward(x, y, (2, 2), (2, 2), (0, 0), cudnn.CUDNN_POOLING_MAX)
    assert y[0, 0].tolist() == [[6, 8, 9], [16, 18, 19], [21, 23, 24]]
    gx = cudnn.pooling_backward(x, y, np.ones(y.shape), (2, 2), (2, 2), (0, 0), 0)
    assert gx.sum() == 9


X, W, Y = np.ones((1, 4, 6, 6)), np.ones((5, 4, 3, 3)), np.full((1, 5, 4, 4), 7.0)
GX = np.full(X.shape, 7.0)
GW = np.full(W.shape, 7.0)
P = np.full((1, 4, 3, 3), 7.0)
ONE, NONE = (1, 1), (0, 0)


def forward(x: Any = X, w: Any = W, b: Any = None, y: Any = Y, pad: Any = NONE, **more: Any) -> Any:
    options = {**FLAGS, **more}
    stride, groups = options.pop("stride", ONE), options.pop("groups", 1)
    return lambda: cudnn.convolution_forward(x, w, b, y, pad, stride, ONE, groups, **options)


def data(x: Any = Y, y: Any = GX, **more: Any) -> Any:
    options = {"deterministic": False, **FLAGS, **more}
    return lambda: cudnn.convolution_backward_data(W, x, None, y, NONE, ONE, ONE, 1, **options)


def filters(gy: Any = Y, gw: Any = GW) -> Any:
    return lambda: cudnn.convolution_backward_filter(
        X, gy, gw, NONE, ONE, ONE, 1, deterministic=False, **FLAGS
    )


def pool(
    x: Any = X, y: Any = P, k: Any = (2, 2), s: Any = (2, 2), p: Any = NONE, mode: Any = 0
) -> Any:
    return lambda: cudnn.pooling_forward(x, y, k, s, p, mode)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x a list": (forward(x=[1]), TypeError, "x is a list"),
    "x None": (forward(x=None), TypeError, "x is None"),
    "W of another dtype": (forward(w=W.astype("f4")), TypeError, "x has dtype float64 and W float32"),
    "complex": (forward(x=X + 0j, w=W + 0j, y=Y + 0j), TypeError, "x has dtype complex128"),
    "axes": (forward(x=X[0]), ValueError, "x has 3 axes; expected 4 or 5"),
    "axes differ": (forward(w=W[None]), ValueError, "W has 5 axes"),
    "channels": (forward(w=W[:, :3]), ValueError, "input channels"),
    "y too small": (forward(y=Y[:, :4]), ValueError, r"y has shape \(1, 4, 4, 4\); expected \(1, 5, 4, 4\)"),
    "b too short": (forward(b=np.ones(4)), ValueError, "b has shape .*5 values"),
    "b of another dtype": (forward(b=np.ones(5, "f4")), TypeError, "bias float32"),
    "pad a number": (forward(pad=1), TypeError, "pad is 1; expected a tuple"),
    "pad of three": (forward(pad=(0, 0, 0)), ValueError, "padding is"),
    "stride 0": (forward(stride=(0, 1)), ValueError, "stride is 0"),
    "groups": (forward(groups=3), ValueError, "groups is 3"),
    "tensor_core": (forward(tensor_core="maybe"), ValueError, "tensor_core is 'maybe'"),
    "d_layout": (forward(d_layout=2), ValueError, "d_layout is 2"),
    "w_layout": (forward(w_layout="NHWC"), ValueError, "w_layout is 'NHWC'"),
    "data of another size": (data(y=GX[:, :, :5]), ValueError, "y has shape .*of which the convolution makes"),
    "gy of another size": (filters(gy=Y[..., :3]), ValueError, "gy has shape"),
    "gW of another size": (filters(gw=GW[:4]), ValueError, "gy has shape"),
    "mode": (pool(mode=4), ValueError, "mode is 4"),
    "ksize a number": (pool(k=2), TypeError, "ksize is 2"),
    "windows outside": (pool(p=(2, 0)), ValueError, "every window"),
    "y without room": (pool(y=P[:, :3]), ValueError, "batch and channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_allowed_and_write_nothing(name: str) -> None:
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        wrong()
    assert all((a == 7).all() for a in (Y, GX, GW, P))


def test_deterministic_is_kept() -> None:
    refused = pytest.raises(gpuconv.EngineError, match="deterministic")
    with home("cuda_atomic") as cp, gpuconv.engine("cuda_atomic"), refused:
        cudnn.convolution_backward_data(
            cp.asarray(W), cp.asarray(Y), None, cp.asarray(GX), NONE, ONE, ONE, 1,
            deterministic=True, **FLAGS,
        )  # fmt: skip
    before = gpuconv.get_num_threads()
    filters(gw=GW.copy())()
    assert gpuconv.get_num_threads() == before


@pytest.mark.parametrize("mode", ["full", "valid"])
@pytest.mark.parametrize("multi_channel", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_sigpy(
    mode: str, multi_channel: bool, dtype: str, nd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA functions of sigpy over the drop-in agree with its own CPU functions."""
    conv = sigpy_with_drop_in(monkeypatch)

    def draw(*shape: int) -> np.ndarray:
        a = values(*shape)
        return a + 1j * values(*shape) if dtype == "complex128" else a

    size, kernel = (9, 8, 7)[:nd], (3, 2, 3)[:nd]
    for strides in (None, (2, 1, 3)[:nd]):
        x = draw(2, 3, *size) if multi_channel else draw(2, *size)
        w = draw(4, 3, *kernel) if multi_channel else draw(*kernel)
        options = {"mode": mode, "strides": strides, "multi_channel": multi_channel}

        def by_cuda(function: Any, a: Any, b: Any, *rest: Any) -> Any:
            call = conv._complex if dtype == "complex128" else lambda f, *args, **kw: f(*args, **kw)
            return call(function, a, b, *rest, **options)  # noqa: B023

        want = conv._convolve(x, w, **options)
        np.testing.assert_allclose(by_cuda(conv._convolve_cuda, x, w), want, atol=1e-10)
        y = draw(*want.shape)
        got = by_cuda(conv._convolve_data_adjoint_cuda, y, np.conj(w), x.shape)
        want = conv._convolve_data_adjoint(y, w, x.shape, **options)
        np.testing.assert_allclose(got, want, atol=1e-10)
        got = by_cuda(conv._convolve_filter_adjoint_cuda, y, np.conj(x), w.shape)
        want = conv._convolve_filter_adjoint(y, x, w.shape, **options)
        np.testing.assert_allclose(got, want, atol=1e-10)


def sigpy_with_drop_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import sigpy's convolutions with the drop-in where it looks for cupy.cudnn."""
    pytest.importorskip("sigpy")
    import importlib

    from sigpy import config

    stand_in = types.ModuleType("cupy")
    stand_in.cudnn = cudnn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(config, "cudnn_enabled", True)
    import sigpy.conv

    module = importlib.reload(sigpy.conv)
    monkeypatch.setattr(module.backend, "get_array_module", lambda a: np)
    return module
