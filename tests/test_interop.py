"""Arrays of other libraries are taken without a copy and answered in kind; PyTorch differentiates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
import gpuconv.signal
from gpuconv.interop import dlpack

RNG = np.random.default_rng(8)
X, W, B = (
    RNG.standard_normal((2, 7, 6, 3)),
    RNG.standard_normal((3, 2, 3, 4)),
    RNG.standard_normal(4),
)


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    x, w, b = (torch.tensor(a) for a in (X, W, B))
    y = gpuconv.conv2d(x, w, b, padding=1, activation="ReLU")
    assert isinstance(y, torch.Tensor)
    want = gpuconv.conv2d(X, W, B, padding=1, activation="ReLU")
    np.testing.assert_array_equal(y.numpy(), want)
    got = gpuconv.conv2d_backward(y, x, w, y=y, padding=1, activation="ReLU", needs=("x", "b"))
    grads = gpuconv.conv2d_backward(want, X, W, y=want, padding=1, activation="ReLU")
    np.testing.assert_array_equal(got[0].numpy(), grads[0])
    assert got[1] is None
    np.testing.assert_array_equal(got[2].numpy(), grads[2])
    out = torch.empty_like(y)
    assert gpuconv.conv2d(x, w, b, padding=1, activation="ReLU", out=out) is out
    np.testing.assert_array_equal(out.numpy(), want)
    assert isinstance(gpuconv.max_pool2d(x, 2), torch.Tensor)
    dx = gpuconv.avg_pool2d_backward(gpuconv.avg_pool2d(x, 2), x.shape, 2)
    assert isinstance(dx, torch.Tensor)
    up = gpuconv.conv_transpose2d(x, torch.tensor(W.copy()), stride=2)
    assert isinstance(up, torch.Tensor)
    pair = gpuconv.conv2d_jvp(x, w, dx=x)
    assert all(isinstance(t, torch.Tensor) for t in pair)
    assert isinstance(gpuconv.signal.convolve(b, b), torch.Tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes_of_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    x, w = (torch.tensor(a).to(getattr(torch, dtype)) for a in (X, W))
    y = gpuconv.conv2d(x, w)
    assert y.dtype == x.dtype
    want = torch.tensor(gpuconv.conv2d(X, W)).to(x.dtype)
    assert (y - want).abs().max() < 0.2


def test_no_copy_is_made() -> None:
    torch = pytest.importorskip("torch")
    seen: list[np.ndarray] = []
    x = torch.tensor(X).permute(0, 2, 1, 3)  # strides are kept too

    def look(x: Any) -> Any:
        seen.append(x)
        return x

    y = dlpack.call(look, {"x": x})
    assert seen[0].ctypes.data == x.data_ptr() == y.data_ptr()
    assert y.stride() == x.stride()


def test_a_tensor_that_needs_a_gradient_is_not_taken_silently() -> None:
    torch = pytest.importorskip("torch")
    x, w = torch.tensor(X, requires_grad=True), torch.tensor(W)
    with pytest.raises(TypeError, match=r"x requires a gradient.*gpuconv.interop.torch"):
        gpuconv.conv2d(x, w)
    with torch.no_grad():
        assert gpuconv.conv2d(x, w).shape == (2, 5, 5, 4)


def test_mixed_libraries_are_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="x is an array of torch and w one of numpy"):
        gpuconv.conv2d(torch.tensor(X), W)
    with pytest.raises(TypeError, match="x is an array of numpy and w one of torch"):
        gpuconv.conv2d(X, torch.tensor(W))
    with pytest.raises(TypeError, match="w is a list; expected an array of torch"):
        gpuconv.conv2d(torch.tensor(X), W.tolist())
    with pytest.raises(ValueError, match="w has 3 axes"):
        gpuconv.conv2d(torch.tensor(X), torch.tensor(W[0]))
    out = np.full((2, 5, 5, 4), 7.0)
    with pytest.raises(TypeError, match="x is an array of torch and out one of numpy"):
        gpuconv.conv2d(torch.tensor(X), torch.tensor(W), out=out)
    assert (out == 7).all()


def test_jax_in_jax_out() -> None:
    jax = pytest.importorskip("jax")
    x, w = jax.numpy.asarray(X.astype("f4")), jax.numpy.asarray(W.astype("f4"))
    y = gpuconv.conv2d(x, w, padding=1)
    assert isinstance(y, jax.Array)
    want = gpuconv.conv2d(X.astype("f4"), W.astype("f4"), padding=1)
    np.testing.assert_array_equal(np.asarray(y), want)
    gradients = gpuconv.conv2d_backward(y, x, w, padding=1)
    assert all(isinstance(g, jax.Array) for g in gradients)


def test_no_library_is_imported_that_the_user_has_not() -> None:
    code = (
        "import sys, numpy as np, gpuconv\n"
        "gpuconv.conv2d(np.ones((1, 4, 4, 1)), np.ones((2, 2, 1, 1)))\n"
        "print([m for m in ('torch', 'jax', 'cupy', 'ml_dtypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------- autograd

NAMES = [f"conv{t}{nd}d" for nd in (1, 2, 3) for t in ("", "_transpose")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_gradcheck(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from gpuconv.interop import torch as ours

    nd = int(name[-2])
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    channels = (4, 3) if "transpose" in name else (6, 2)
    x = torch.randn(2, 4, *(4, 3, 3)[:nd], dtype=kind, requires_grad=True)
    w = torch.randn(*channels, *(2, 3, 2)[:nd], dtype=kind, requires_grad=True)
    b = torch.randn(6, dtype=kind, requires_grad=True)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    if "transpose" in name:
        options["output_padding"] = 1
    call = getattr(ours, name)
    want = getattr(torch.nn.functional, name)(x, w, b, **options)
    torch.testing.assert_close(call(x, w, b, **options), want)
    assert torch.autograd.gradcheck(lambda *a: call(*a, **options), (x, w, b), fast_mode=True)
    y = call(x.detach(), w, None, **options)
    (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
    y = getattr(torch.nn.functional, name)(x.detach(), w, None, **options)
    torch.testing.assert_close(dw, torch.autograd.grad(y, w, torch.ones_like(y))[0])


def test_a_small_net_learns_as_pytorch_does() -> None:
    torch = pytest.importorskip("torch")
    from gpuconv.interop import torch as ours

    weights = []
    for conv in (ours.conv2d, torch.nn.functional.conv2d):
        torch.manual_seed(0)
        w = torch.randn(4, 3, 3, 3, requires_grad=True)
        b = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD([w, b], 0.1)
        for _ in range(5):
            y = conv(torch.randn(2, 3, 8, 8), w, b, padding=1)
            optimizer.zero_grad()
            torch.relu(y).square().mean().backward()
            optimizer.step()
        weights.append(w.detach())
    torch.testing.assert_close(*weights)


def wrong_cases() -> dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]]:
    return {
        "x of NumPy": (lambda ours, t: ours.conv2d(X, t(W)), TypeError, "x is a ndarray"),
        "b a list": (lambda ours, t: ours.conv2d(t(X), t(W), [1.0]), TypeError, "b is a list"),
        "channels": (lambda ours, t: ours.conv2d(t(X), t(W)), ValueError, "w has shape"),
        "stride": (lambda ours, t: ours.conv2d(t(X), t(W), stride=0, layout="NHWC"), ValueError, "stride is 0"),
        "integers": (lambda ours, t: ours.conv2d(t(X).int(), t(W).int()), TypeError, "x has dtype int32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_cases())
def test_wrong_calls_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    from gpuconv.interop import torch as ours

    wrong, error, message = wrong_cases()[name]
    with pytest.raises(error, match=message):
        wrong(ours, torch.tensor)
