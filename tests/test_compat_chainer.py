"""Chainer's convolutions through the drop-in: its GPU branch, on NumPy arrays, against its CPU one.

Chainer is not developed any more and imports NumPy names that are gone; they are put back while
it is imported.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from gpuconv.compat import cudnn

RNG = np.random.default_rng(33)


@pytest.fixture
def chainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return Chainer."""
    if not hasattr(np, "sctypes"):  # gone since NumPy 2
        kinds = {"int": [np.int8, np.int16, np.int32, np.int64], "float": [np.float32, np.float64]}
        monkeypatch.setattr(np, "sctypes", kinds, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Skipped, too, where it is there and something that it imports is not.
        return pytest.importorskip("chainer")


@pytest.fixture
def by_drop_in(chainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the drop-in where Chainer looks for cuDNN, and have NumPy arrays go that way."""
    from chainer.backends import cuda
    from chainer.functions.connection import convolution_2d, deconvolution_2d

    calls: list[str] = []

    class Counted:
        """The drop-in, with what was called."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("convolution"):
                calls.append(name)
            return getattr(cudnn, name)

    class WithCudnn:
        """Chainer to the modules of convolutions, whose functions alone find cuDNN there."""

        should_use_cudnn = staticmethod(lambda level, lowest=0: True)

        def __getattr__(self, name: str) -> Any:
            return getattr(chainer, name)

    # What docs/other-libraries.md says of a program.
    monkeypatch.setattr(cuda, "cudnn", Counted(), raising=False)
    for module in (convolution_2d, deconvolution_2d):
        monkeypatch.setattr(module, "_cudnn_version", 8000, raising=False)
        monkeypatch.setattr(module, "chainer", WithCudnn())
    # What makes NumPy arrays those of the GPU.
    monkeypatch.setattr(cuda, "cupy", np, raising=False)
    monkeypatch.setattr(cuda, "cuda", cuda, raising=False)
    for function in (
        convolution_2d.Convolution2DFunction,
        convolution_2d.Convolution2DGradW,
        deconvolution_2d.Deconvolution2DFunction,
    ):
        monkeypatch.setattr(function, "forward_cpu", function.forward_gpu)
    return calls


CASES = {
    "plain": {},
    "padded, strided": {"pad": 1, "stride": 2},
    "uneven": {"pad": (2, 0), "stride": (1, 3)},
    "dilated": {"dilate": 2, "pad": 2},
    "grouped": {"groups": 2, "pad": 1},
}


def results(chainer: Any, bias: bool, options: dict[str, Any], dtype: str) -> list[np.ndarray]:
    """Return the value of Convolution2DFunction and its gradients."""
    random = np.random.default_rng(7)
    x = chainer.Variable(random.standard_normal((3, 4, 9, 10)).astype(dtype))
    w = random.standard_normal((6, 4 // options.get("groups", 1), 3, 2)).astype(dtype)
    W = chainer.Variable(w)
    b = chainer.Variable(random.standard_normal(6).astype(dtype))
    function = chainer.functions.connection.convolution_2d.Convolution2DFunction(**options)
    (y,) = function.apply((x, W, b) if bias else (x, W))
    y.grad = random.standard_normal(y.shape).astype(dtype)
    y.backward()
    return [y.array, x.grad, W.grad, *([b.grad] if bias else [])]


@pytest.mark.filterwarnings("ignore")  # Chainer's own, of a NumPy newer than itself
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_convolution_2d_function(
    case: str, bias: bool, dtype: str, chainer: Any, request: pytest.FixtureRequest
) -> None:
    want = results(chainer, bias, CASES[case], dtype)
    calls = request.getfixturevalue("by_drop_in")
    got = results(chainer, bias, CASES[case], dtype)
    assert calls == [
        "convolution_forward", "convolution_backward_data", "convolution_backward_filter",
    ]  # fmt: skip
    tolerance = 1e-4 if dtype == "float32" else 1e-11
    for ours, its in zip(got, want, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, its, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
def test_a_deconvolution_and_its_gradients(chainer: Any, request: pytest.FixtureRequest) -> None:
    x, W = RNG.standard_normal((2, 3, 5, 6)), RNG.standard_normal((3, 4, 3, 3))

    def run() -> list[np.ndarray]:
        v, w = chainer.Variable(x), chainer.Variable(W)
        y = chainer.functions.deconvolution_2d(v, w, stride=2, pad=1)
        y.grad = np.cos(np.arange(y.size)).reshape(y.shape)
        y.backward()
        return [y.array, v.grad, w.grad]

    want = run()
    calls = request.getfixturevalue("by_drop_in")
    got = run()
    assert calls[0] == "convolution_backward_data"
    assert len(calls) == 3
    for ours, its in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, its, atol=1e-11)
