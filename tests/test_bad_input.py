"""Wrong calls: each is an error that names the argument and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv

X = np.ones((2, 5, 6, 4), "float32")
W = np.ones((3, 3, 4, 8), "float32")
B = np.ones(8, "float32")
Y = np.ones((2, 3, 4, 8), "float32")


def forward(x: Any = X, w: Any = W, b: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: gpuconv.conv2d(x, w, b, **options)


def backward(dy: Any = Y, x: Any = X, w: Any = W, **options: Any) -> Callable[[], Any]:
    return lambda: gpuconv.conv2d_backward(dy, x, w, **options)


def forced(name: Any) -> Callable[[], Any]:
    def call() -> Any:
        with gpuconv.engine(name):
            return gpuconv.conv2d(X, W)

    return call


read_only = np.ones_like(Y)
read_only.flags.writeable = False
masked = np.ma.masked_array(X)

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # arrays
    "x a list": (forward(x=X.tolist()), TypeError, "x is a list.*NumPy or CuPy"),
    "x None": (forward(x=None), TypeError, "x is None"),
    "w a scalar": (forward(w=3.0), TypeError, "w is a float"),
    "b a number": (forward(b=1.0), TypeError, "b is a float"),
    "x masked": (forward(x=masked), TypeError, "x is a MaskedArray"),
    "x of objects": (forward(x=X.astype(object)), TypeError, "x has dtype object.*float32"),
    "x of integers": (forward(x=X.astype(int)), TypeError, "x has dtype int64.*float32"),
    "x of booleans": (forward(x=X > 0), TypeError, "x has dtype bool"),
    "x complex": (forward(x=X.astype(complex)), TypeError, "x has dtype complex128"),
    "x of text": (forward(x=X.astype(str)), TypeError, "x has dtype <U"),
    "x of long doubles": (forward(x=X.astype(np.longdouble)), TypeError, "x has dtype"),
    "w of another dtype": (forward(w=W.astype("f8")), TypeError, "x.*float32 and w float64"),
    "b of another dtype": (forward(b=B.astype("f8")), TypeError, "x.*float32 and b float64"),
    "dy of another dtype": (backward(dy=Y.astype("f8")), TypeError, "dy.*float64 and x float32"),
    # shapes
    "x of three axes": (forward(x=X[0]), ValueError, r"x has 3 axes.*expected 4.*\(batch, rows"),
    "x of five axes": (forward(x=X[None]), ValueError, "x has 5 axes"),
    "w of three axes": (forward(w=W[0]), ValueError, "w has 3 axes.*in_ch // groups"),
    "x of NCHW, three axes": (forward(x=X[0], layout="NCHW"), ValueError, "batch, in_ch, rows"),
    "channels differ": (forward(w=W[:, :, :3]), ValueError, "w has.*3 input channels; expected 4"),
    "layout forgotten": (forward(layout="NCHW"), ValueError, "w has shape.*input channels"),
    "b too short": (forward(b=B[:7]), ValueError, r"b has shape \(7,\); expected \(8,\)"),
    "b of two axes": (forward(b=B[None]), ValueError, r"b has shape \(1, 8\); expected \(8,\)"),
    "no rows": (forward(x=X[:, :0]), ValueError, "x has shape.*spatial size of at least 1"),
    "no channels": (forward(x=X[..., :0]), ValueError, "x has shape.*number of channels"),
    "no kernel": (forward(w=W[:0]), ValueError, "w has shape.*kernel size of at least 1"),
    "no output channels": (forward(w=W[..., :0]), ValueError, "number of output channels"),
    "kernel too large": (forward(w=np.ones((6, 3, 4, 8), "f4")), ValueError, "w has a kernel of"),
    "kernel too dilated": (forward(dilation=3), ValueError, r"w has a kernel.*dilation \(3, 3\)"),
    "dy of another shape": (backward(dy=Y[:, 1:]), ValueError, r"dy has shape.*\(2, 3, 4, 8\)"),
    "y of another shape": (backward(y=Y[1:], activation="relu"), ValueError, "y has shape"),
    # options
    "stride 0": (forward(stride=0), ValueError, "stride is 0; expected a positive integer"),
    "stride negative": (forward(stride=(1, -2)), ValueError, r"stride is -2"),
    "stride a fraction": (forward(stride=1.5), TypeError, "stride is 1.5"),
    "stride NaN": (forward(stride=float("nan")), TypeError, "stride is nan"),
    "stride of three": (forward(stride=(1, 1, 1)), ValueError, "stride is .*rows, columns"),
    "stride None": (forward(stride=None), TypeError, "stride is None"),
    "stride True": (forward(stride=True), TypeError, "stride is True"),
    "dilation 0": (forward(dilation=0), ValueError, "dilation is 0; expected a positive integer"),
    "dilation text": (forward(dilation="2"), TypeError, "dilation is '2'"),
    "padding negative": (forward(padding=-1), ValueError, "padding is -1.*non-negative"),
    "padding unknown": (forward(padding="full"), ValueError, "padding is 'full'.*'same'"),
    "padding of three": (forward(padding=(1, 1, 1)), ValueError, "padding is .*pairs"),
    "padding of triples": (forward(padding=((1, 1, 1), (0, 0, 0))), ValueError, "padding is"),
    "padding a fraction": (forward(padding=0.5), TypeError, "padding is 0.5"),
    "padding NaN": (forward(padding=(float("nan"), 0)), TypeError, "padding is nan"),
    "groups 0": (forward(groups=0), ValueError, "groups is 0; expected a positive integer"),
    "groups do not divide x": (forward(groups=3), ValueError, "groups is 3.*divisor of the 4"),
    "groups do not divide w": (
        forward(w=np.ones((3, 3, 1, 6), "f4"), groups=4),
        ValueError,
        "groups is 4.*divisor of the 6",
    ),
    "groups without w": (forward(groups=2), ValueError, "expected 2: x has 4 and groups is 2"),
    "layout unknown": (forward(layout="HWCN"), ValueError, "layout is 'HWCN'; expected.*'NHWC'"),
    "layout of another rank": (forward(layout="NCDHW"), ValueError, "layout is 'NCDHW'"),
    "layout a number": (forward(layout=1), TypeError, "layout is 1"),
    "activation unknown": (forward(activation="swish?"), ValueError, "activation is.*ReLU"),
    "activation a number": (forward(activation=3), TypeError, "activation is 3"),
    "activation arguments": (forward(activation="ELU(beta=1)"), ValueError, "do not fit ELU"),
    "activation without y": (backward(activation="relu"), ValueError, "y is None.*ReLU"),
    "activation without inverse": (backward(y=Y, activation="gelu"), ValueError, "activation is GELU"),
    "needs unknown": (backward(needs=("x", "z")), ValueError, "needs is.*'x', 'w', 'b'"),
    "needs a number": (backward(needs=1), TypeError, "needs is 1"),
    "unknown option": (forward(strides=2), TypeError, "strides"),
    # out
    "out of another shape": (forward(out=Y[1:]), ValueError, r"out has shape.*\(2, 3, 4, 8\)"),
    "out of another dtype": (forward(out=Y.astype("f8")), TypeError, "out has dtype float64"),
    "out read-only": (forward(out=read_only), ValueError, "out is read-only"),
    "out a list": (forward(out=[1]), TypeError, "out is a list"),
    # engines, devices, settings
    "engine unknown": (forced("cudnnn"), ValueError, "engine is 'cudnnn'; expected one of naive"),
    "engine a number": (forced(3), TypeError, "engine is 3; expected a name"),
    "engine of another device": (forced("cuda_atomic"), ValueError, "these are NumPy arrays"),
    "device unknown": (lambda: gpuconv.use_device("tpu"), ValueError, "device is 'tpu'.*cuda:N"),
    "device a number": (lambda: gpuconv.use_device(0), TypeError, "device is 0"),
    "precision unknown": (lambda: gpuconv.set_precision("half"), ValueError, "precision is 'half'"),
    "workspace too small": (lambda: gpuconv.set_workspace_limit(1), ValueError, "limit is 1 bytes"),
    "workspace a fraction": (lambda: gpuconv.set_workspace_limit(1e9), TypeError, "limit is 1000"),
    "threads 0": (lambda: gpuconv.set_num_threads(0), ValueError, "count is 0"),
    "deterministic text": (lambda: gpuconv.deterministic("yes"), TypeError, "on is 'yes'"),
    # explain
    "explain NaN": (lambda: gpuconv.explain((1, 5, float("nan"), 1), W.shape), TypeError, "x_shape is nan"),
    "explain negative": (lambda: gpuconv.explain((1, -5, 5, 4), W.shape), ValueError, "x_shape is -5"),
    "explain two axes": (lambda: gpuconv.explain((5, 5), W.shape), ValueError, "expected 3 to 5 axes"),
    "explain integers": (lambda: gpuconv.explain(X.shape, W.shape, dtype=int), TypeError, "dtype is int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_what_is_allowed(name: str) -> None:
    call, error, message = WRONG[name]
    before = [a.tobytes() for a in (X, W, B, Y)]
    with pytest.raises(error, match=message):
        call()
    assert [a.tobytes() for a in (X, W, B, Y)] == before
    gpuconv.conv2d(X, W, B)  # nothing is left changed behind


def test_there_are_at_least_forty() -> None:
    assert len(WRONG) >= 40


def test_mixed_devices() -> None:
    from tests.cuda_on_cpu import stand_in

    with stand_in() as cp:
        for call in (
            lambda: gpuconv.conv2d(cp.asarray(X), W),
            lambda: gpuconv.conv2d(X, cp.asarray(W)),
            lambda: gpuconv.conv2d(X, W, cp.asarray(B)),
            lambda: gpuconv.conv2d(X, W, out=cp.asarray(Y)),
        ):
            with pytest.raises(ValueError, match=r"(cpu|cuda:0).*and.*(cuda:0|cpu)"):
                call()
    with stand_in(devices=2) as cp:
        with cp.cuda.Device(1):
            other = cp.asarray(W)
        with pytest.raises(ValueError, match="x is on cuda:0 and w on cuda:1"):
            gpuconv.conv2d(cp.asarray(X), other)
