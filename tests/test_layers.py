"""The layers: numpy-ml's contract, gradients against differences and PyTorch, wrong calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.activations import get_activation
from gpuconv.layers import Conv2D, Flatten, FullyConnected, LayerBase, Pool2D

RNG = np.random.default_rng(3)


def images(*shape: int, dtype: str = "float64") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def slope(function: Any, at: np.ndarray, direction: np.ndarray, step: float = 1e-6) -> float:
    return float((function(at + step * direction) - function(at - step * direction)) / (2 * step))


def check_gradients(layer: LayerBase, X: np.ndarray) -> None:
    """Compare every gradient with differences along random directions, in float64."""
    Y = layer.forward(X)
    weight = RNG.standard_normal(Y.shape)
    dX = layer.backward(weight)
    gradients = dict(layer.gradients)
    parameters = dict(layer.parameters)

    def loss(x: np.ndarray) -> float:
        return float((layer.forward(x, retain_derived=False) * weight).sum())

    for _ in range(3):
        v = RNG.standard_normal(X.shape)
        assert slope(loss, X, v) == pytest.approx(float((dX * v).sum()), rel=1e-5, abs=1e-6)
        for name, value in parameters.items():

            def along(p: np.ndarray, name: str = name) -> float:
                layer.parameters[name] = p
                return loss(X)

            v = RNG.standard_normal(value.shape)
            want = float((gradients[name] * v).sum())
            assert slope(along, value, v) == pytest.approx(want, rel=1e-5, abs=1e-6)
            layer.parameters[name] = value


CONVOLUTIONS: list[dict[str, Any]] = [
    {"out_ch": 3, "kernel_shape": (3, 3)},
    {"out_ch": 2, "kernel_shape": (2, 3), "pad": 1, "stride": 2, "act_fn": "ReLU"},
    {"out_ch": 1, "kernel_shape": (3, 2), "pad": (1, 2), "dilation": 1, "act_fn": "Tanh"},
    {"out_ch": 4, "kernel_shape": (3, 3), "pad": (0, 1, 2, 3), "act_fn": "GELU"},
    {"out_ch": 2, "kernel_shape": (2, 2), "pad": "same", "stride": 2, "act_fn": "Sigmoid"},
    {"out_ch": 2, "kernel_shape": (3, 3), "pad": "same", "dilation": 1, "act_fn": "ELU(alpha=0.5)"},
    {"out_ch": 2, "kernel_shape": 2, "stride": (2, 1), "dilation": (0, 1), "act_fn": "Affine(2, 1)"},
]  # fmt: skip


@pytest.mark.parametrize(
    "options", CONVOLUTIONS, ids=lambda o: str(o.get("act_fn")) + str(o.get("pad"))
)
def test_convolution_gradients(options: dict[str, Any]) -> None:
    check_gradients(Conv2D(**options, rng=0), images(2, 7, 6, 3))


@pytest.mark.parametrize(
    "options", CONVOLUTIONS, ids=lambda o: str(o.get("act_fn")) + str(o.get("pad"))
)
def test_the_loops_give_the_same_gradients(options: dict[str, Any]) -> None:
    layer = Conv2D(**options, rng=0)
    inputs = [images(2, 7, 6, 3), images(1, 7, 6, 3)]
    gradients = [RNG.standard_normal(layer.forward(X).shape) for X in inputs]
    got = layer.backward(gradients)
    fast = dict(layer.gradients)
    layer.gradients = {k: np.zeros_like(v) for k, v in fast.items()}
    layer._untouched = True
    want = layer._backward_naive(gradients)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
    for name, value in fast.items():
        np.testing.assert_allclose(value, layer.gradients[name], atol=1e-11)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad"),
    [((2, 2), 2, 0), ((3, 2), 1, 0), ((3, 3), 2, 1), ((2, 3), (3, 1), (1, 0, 2, 1)), ((2, 2), 2, "same"), ((1, 1), 3, 0)],
)  # fmt: skip
def test_pooling_gradients(mode: str, kernel: Any, stride: Any, pad: Any) -> None:
    check_gradients(Pool2D(kernel, stride, pad, mode), images(2, 7, 6, 3))


@pytest.mark.parametrize("act_fn", [None, "ReLU", "GELU", "SoftPlus", "LeakyReLU(alpha=0.2)"])
def test_dense_gradients(act_fn: str | None) -> None:
    check_gradients(FullyConnected(4, act_fn, rng=1), images(5, 3))


@pytest.mark.parametrize(("keep", "shape"), [("first", (2, 60)), ("last", (30, 4)), (-1, (1, 120))])
def test_flatten(keep: Any, shape: tuple[int, int]) -> None:
    layer = Flatten(keep)
    X = images(2, 3, 5, 4)
    Y = layer.forward(X)
    assert Y.shape == shape
    np.testing.assert_array_equal(layer.backward(Y), X)


# ------------------------------------------------------------------------------- references


def test_pooling_takes_the_first_of_equal_maxima() -> None:
    layer = Pool2D((2, 2), 2)
    X = np.zeros((1, 4, 4, 1))
    X[0, 2:, 2:] = 5
    layer.forward(X)
    dX = layer.backward(np.ones((1, 2, 2, 1)))
    want = np.zeros((4, 4))
    want[::2, ::2] = 1
    np.testing.assert_array_equal(dX[0, :, :, 0], want)


def test_a_nan_is_the_maximum_of_its_window() -> None:
    layer = Pool2D((2, 2), 2)
    X = np.zeros((1, 2, 4, 1))
    X[0, 1, 0] = np.nan
    assert np.isnan(layer.forward(X)[0, 0, 0, 0])
    assert layer.backward(np.ones((1, 1, 2, 1)))[0, 1, 0, 0] == 1


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    pad=st.integers(0, 1),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    dilation=st.integers(0, 1),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    act_fn=st.sampled_from([None, "ReLU", "Tanh", "Sigmoid", "ELU"]),
    seed=st.integers(0, 2**16),
)
def test_convolution_against_pytorch(
    kernel: Any,
    stride: int,
    pad: int,
    size: Any,
    dilation: int,
    channels: Any,
    act_fn: Any,
    seed: int,
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    if any((k - 1) * (dilation + 1) + 1 > n + 2 * pad for k, n in zip(kernel, size, strict=True)):
        return
    layer = Conv2D(channels[1], kernel, pad, stride, dilation, act_fn, rng=seed)
    X = rng.standard_normal((2, *size, channels[0]))
    Y = layer.forward(X)
    dY = rng.standard_normal(Y.shape)
    dX = layer.backward(dY)
    x = torch.tensor(np.ascontiguousarray(X.transpose(0, 3, 1, 2)), requires_grad=True)
    first = np.ascontiguousarray(layer.parameters["W"].transpose(3, 2, 0, 1))
    w = torch.tensor(first, requires_grad=True)
    b = torch.tensor(layer.parameters["b"].reshape(-1), requires_grad=True)
    y = torch.nn.functional.conv2d(x, w, b, stride=stride, padding=pad, dilation=dilation + 1)
    if act_fn is not None:
        named = {"ReLU": torch.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}
        y = named.get(act_fn, torch.nn.functional.elu)(y)
    y.backward(torch.tensor(dY.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(Y, y.detach().numpy().transpose(0, 2, 3, 1), atol=1e-10)
    np.testing.assert_allclose(dX, x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-10)
    np.testing.assert_allclose(
        layer.gradients["W"], w.grad.numpy().transpose(2, 3, 1, 0), atol=1e-10
    )
    np.testing.assert_allclose(layer.gradients["b"].reshape(-1), b.grad.numpy(), atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    mode=st.sampled_from(["max", "average"]),
    seed=st.integers(0, 2**16),
)
def test_pooling_against_pytorch(kernel: Any, stride: int, size: Any, mode: str, seed: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    layer = Pool2D(kernel, stride, 0, mode)
    X = rng.integers(0, 4, (2, *size, 3)).astype(float)  # ties
    Y = layer.forward(X)
    dY = rng.standard_normal(Y.shape)
    x = torch.tensor(X.transpose(0, 3, 1, 2), requires_grad=True)
    F = torch.nn.functional
    y = (F.max_pool2d if mode == "max" else F.avg_pool2d)(x, kernel, stride)
    y.backward(torch.tensor(dY.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(Y, y.detach().numpy().transpose(0, 2, 3, 1), atol=1e-12)
    np.testing.assert_allclose(layer.backward(dY), x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 4), (5, 2)])
@pytest.mark.parametrize("dilation", [0, 1])
def test_same_keeps_the_size_at_any_stride(stride: int, kernel: Any, dilation: int) -> None:
    layer = Conv2D(2, kernel, pad="same", stride=stride, dilation=dilation, rng=0)
    X = images(1, 6, 5, 1)
    Y = layer.forward(X)
    assert Y.shape == (1, 6, 5, 2)
    # The same as the zeros written out, the odd one at the end.
    window = [d * (dilation + 1) - dilation for d in kernel]
    totals = [stride * (n - 1) + w - n for n, w in zip((6, 5), window, strict=True)]
    pads = [(t // 2, t - t // 2) for t in totals]
    explicit = gpuconv.conv2d(
        np.pad(X, ((0, 0), *pads, (0, 0))),
        layer.parameters["W"],
        stride=stride,
        dilation=dilation + 1,
    )
    np.testing.assert_allclose(Y, explicit, atol=1e-12)


# --------------------------------------------------------------------------------- contract


def make(name: str) -> tuple[LayerBase, np.ndarray]:
    return {
        "Conv2D": (Conv2D(3, (3, 3), act_fn="ReLU", rng=0), images(2, 5, 5, 2)),
        "Pool2D": (Pool2D((2, 2), 2), images(2, 4, 4, 2)),
        "FullyConnected": (FullyConnected(3, "Tanh", rng=0), images(2, 4)),
        "Flatten": (Flatten(), images(2, 3, 3, 2)),
    }[name]


NAMES = ["Conv2D", "Pool2D", "FullyConnected", "Flatten"]


@pytest.mark.parametrize("name", NAMES)
def test_several_passes_before_an_update(name: str) -> None:
    layer, X = make(name)
    layer.forward(images(*X.shape), retain_derived=False)
    assert layer.X == []
    first, second = X, images(*X.shape)
    outputs = [layer.forward(first), layer.forward(second)]
    assert len(layer.X) == 2
    assert all(len(v) == 2 for v in layer.derived_variables.values())
    gradients = [images(*y.shape) for y in outputs]
    both = layer.backward(gradients)
    assert [g.shape for g in both] == [X.shape, X.shape]
    total = {k: v.copy() for k, v in layer.gradients.items()}
    layer.flush_gradients()
    assert layer.X == []
    assert all(len(v) == 0 for v in layer.derived_variables.values())
    assert all((v == 0).all() for v in layer.gradients.values())
    parts = []
    for x, g, dx in zip((first, second), gradients, both, strict=True):
        layer.forward(x)
        np.testing.assert_allclose(layer.backward(g), dx, atol=1e-12)
        parts.append(dict(layer.gradients))
        layer.flush_gradients()
    for key, value in total.items():
        np.testing.assert_allclose(parts[0][key] + parts[1][key], value, atol=1e-12)


def test_gradients_add_up_until_the_update() -> None:
    layer, X = make("Conv2D")
    dY = np.ones_like(layer.forward(X))
    layer.backward(dY, retain_grads=False)
    assert (layer.gradients["W"] == 0).all()
    layer.backward(dY)
    once = layer.gradients["W"].copy()
    layer.backward(dY)
    np.testing.assert_allclose(layer.gradients["W"], 2 * once)
    layer.gradients["b"] += 1.0  # a user's own regulariser
    before = layer.parameters["W"].copy()
    layer.update()
    np.testing.assert_allclose(layer.parameters["W"], before - 0.01 * 2 * once)
    assert layer.optimizer.cur_step == 1


def test_the_sums_in_front_of_the_activation() -> None:
    for act_fn in (None, "ReLU", "GELU"):
        layer = Conv2D(3, (2, 2), act_fn=act_fn, rng=0)
        Y = layer.forward(images(1, 4, 4, 2))
        Z = layer.derived_variables["Z"]
        np.testing.assert_allclose(get_activation(act_fn).fn(Z[0]), Y, atol=1e-12)
        assert [z.shape for z in Z] == [Y.shape]
        assert layer.derived_variables["out_rows"] == [3]
        dense = FullyConnected(2, act_fn, rng=0)
        Y = dense.forward(images(3, 4))
        np.testing.assert_allclose(get_activation(act_fn).fn(dense.derived_variables["Z"][-1]), Y)


def test_the_input_gradient_may_be_left_out() -> None:
    for name in ("Conv2D", "FullyConnected", "Pool2D"):
        layer, X = make(name)
        dY = np.ones_like(layer.forward(X))
        assert layer.backward(dY, input_grad=False) is None
        alone = dict(layer.gradients)
        layer.flush_gradients()
        layer.forward(X)
        layer.backward(dY)
        for key, value in alone.items():
            np.testing.assert_array_equal(value, layer.gradients[key])


@pytest.mark.parametrize("name", NAMES)
def test_summary_makes_an_equal_layer(name: str) -> None:
    layer, X = make(name)
    Y = layer.forward(X)
    layer.backward(np.ones_like(Y))
    layer.update()
    Y = layer.forward(X, retain_derived=False)
    summary = layer.summary()
    assert set(summary) == {"layer", "parameters", "hyperparameters"}
    assert summary["layer"] == summary["hyperparameters"]["layer"] == name
    blank: LayerBase = {
        "Conv2D": lambda: Conv2D(9, (1, 1)),
        "Pool2D": lambda: Pool2D((1, 1)),
        "FullyConnected": lambda: FullyConnected(9),
        "Flatten": lambda: Flatten("last"),
    }[name]()
    before = repr(summary)
    assert blank.set_params(summary) is blank
    assert repr(summary) == before
    np.testing.assert_array_equal(blank.forward(X), Y)
    flat = {**summary["parameters"], **summary["hyperparameters"]}
    np.testing.assert_array_equal(type(blank).set_params(blank, flat).forward(X), Y)
    # The copy is its own: training it leaves the original alone.
    kept = {k: v.copy() for k, v in layer.parameters.items()}
    blank.flush_gradients()
    blank.backward(np.ones_like(blank.forward(X)))
    blank.update()
    for key, value in kept.items():
        np.testing.assert_array_equal(layer.parameters[key], value)


def test_one_seed_gives_the_same_weights_in_every_dtype() -> None:
    layers = [Conv2D(4, (3, 3), rng=5) for _ in range(3)]
    for layer, dtype in zip(layers, ("float64", "float64", "float32"), strict=True):
        layer.forward(images(1, 4, 4, 2, dtype=dtype))
        assert layer.dtype == layer.parameters["W"].dtype == dtype
    first, second, third = (layer.parameters["W"] for layer in layers)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first.astype("float32"), third)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_results_keep_the_dtype(name: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    layer, X = make(name)
    Y = layer.forward(X.astype(dtype))
    assert Y.dtype == dtype
    assert layer.backward(np.ones_like(Y)).dtype == dtype
    layer.update()
    assert all(p.dtype == dtype for p in layer.parameters.values())


def test_layers_do_not_share_an_optimizer() -> None:
    from gpuconv.optimizers import Adam

    shared = Adam()
    a, b = FullyConnected(2, optimizer=shared, rng=0), FullyConnected(3, optimizer=shared, rng=0)
    for layer in (a, b):
        layer.backward(np.ones_like(layer.forward(images(2, 4))))
        layer.update()
    assert shared.cache == {}
    assert a.optimizer.cache["W"]["mean"].shape == (4, 2)


# ------------------------------------------------------------------------------- wrong calls


def built() -> Conv2D:
    layer = Conv2D(3, (3, 3), rng=0)
    layer.forward(np.ones((1, 5, 5, 2)))
    return layer


def frozen(call: str) -> Any:
    layer = built()
    layer.freeze()
    return getattr(layer, call)(*([np.ones((1, 3, 3, 3))] if "backward" in call else []))


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no kernels": (lambda: Conv2D(0, (3, 3)), ValueError, "out_ch is 0"),
    "kernels a fraction": (lambda: Conv2D(1.5, (3, 3)), TypeError, "out_ch is 1.5"),
    "kernel of three": (lambda: Conv2D(1, (3, 3, 3)), ValueError, "kernel_shape is"),
    "kernel empty": (lambda: Conv2D(1, (0, 3)), ValueError, "kernel_shape is"),
    "stride 0": (lambda: Conv2D(1, (3, 3), stride=0), ValueError, "stride is 0"),
    "dilation -1": (lambda: Conv2D(1, (3, 3), dilation=-1), ValueError, "dilation is -1"),
    "pad unknown": (lambda: Conv2D(1, (3, 3), pad="valid"), ValueError, "pad is 'valid'.*same"),
    "pad negative": (lambda: Conv2D(1, (3, 3), pad=-1), ValueError, "pad is -1"),
    "pad of three": (lambda: Conv2D(1, (3, 3), pad=(1, 1, 1)), ValueError, "pad is"),
    "pad a fraction": (lambda: Conv2D(1, (3, 3), pad=0.5), TypeError, "pad is 0.5"),
    "activation": (lambda: Conv2D(1, (3, 3), act_fn="Swish"), ValueError, "act_fn is 'Swish'"),
    "init": (lambda: Conv2D(1, (3, 3), init="magic"), ValueError, "init is 'magic'"),
    "optimizer": (lambda: Conv2D(1, (3, 3), optimizer="LBFGS"), ValueError, "optimizer is 'LBFGS'"),
    "optimizer's arguments": (
        lambda: Conv2D(1, (3, 3), optimizer="Adam(lr=-1)"), ValueError, "lr is -1",
    ),
    "device": (lambda: Conv2D(1, (3, 3), device="tpu"), ValueError, "device is 'tpu'"),
    "seed": (lambda: Conv2D(1, (3, 3), rng="a"), TypeError, "rng is 'a'"),
    "mode": (lambda: Pool2D((2, 2), mode="min"), ValueError, "mode is 'min'"),
    "keep_dim": (lambda: Flatten("middle"), ValueError, "keep_dim is 'middle'"),
    "n_out": (lambda: FullyConnected(-1), ValueError, "n_out is -1"),
    "input a list": (lambda: built().forward([[1.0]]), TypeError, "X is a list"),
    "input of integers": (
        lambda: Conv2D(1, (1, 1)).forward(np.ones((1, 2, 2, 1), int)), TypeError, "X has dtype int64",
    ),
    "input's dtype changes": (
        lambda: built().forward(np.ones((1, 5, 5, 2), "f4")), TypeError, "X has dtype float32",
    ),
    "input's rank": (lambda: built().forward(np.ones((5, 5, 2))), ValueError, "X has shape"),
    "input's channels": (lambda: built().forward(np.ones((1, 5, 5, 3))), ValueError, "3 channels"),
    "input too small": (lambda: built().forward(np.ones((1, 2, 5, 2))), ValueError, "kernel"),
    "pooled input too small": (
        lambda: Pool2D((3, 3)).forward(np.ones((1, 2, 2, 1))), ValueError, "window",
    ),
    "dense input": (lambda: FullyConnected(2).forward(np.ones((1, 2, 2))), ValueError, "X has shape"),
    "backward first": (
        lambda: Conv2D(1, (1, 1)).backward(np.ones((1, 1, 1, 1))), RuntimeError, "before forward",
    ),
    "gradient's shape": (lambda: built().backward(np.ones((1, 3, 3, 2))), ValueError, "dLdy has shape"),
    "gradient a number": (lambda: built().backward(1.0), TypeError, "dLdy is a float"),
    "gradient's dtype": (
        lambda: built().backward(np.ones((1, 3, 3, 3), "f4")), TypeError, "dLdy has dtype float32",
    ),
    "too many gradients": (
        lambda: built().backward([np.ones((1, 3, 3, 3))] * 2), ValueError, "dLdy holds 2.*expected 1",
    ),
    "frozen backward": (lambda: frozen("backward"), RuntimeError, "frozen"),
    "frozen loops": (lambda: frozen("_backward_naive"), RuntimeError, "frozen"),
    "frozen update": (lambda: frozen("update"), RuntimeError, "frozen"),
    "frozen flush": (lambda: frozen("flush_gradients"), RuntimeError, "frozen"),
    "summary of another layer": (
        lambda: built().set_params(make("Pool2D")[0].summary()), ValueError, "layer is 'Pool2D'",
    ),
    "summary a list": (lambda: built().set_params([]), TypeError, "summary_dict is a list"),
    "parameter of another shape": (
        lambda: built().set_params({"W": np.ones((2, 2, 2, 3))}), ValueError, "W has shape",
    ),
    "parameter a list": (lambda: built().set_params({"b": [1.0]}), TypeError, "b is a list"),
    "parameters missing": (
        lambda: Conv2D(3, (3, 3)).set_params({"W": np.ones((3, 3, 2, 3))}), ValueError, "lacks b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_a_wrong_call_changes_nothing() -> None:
    layer = Conv2D(3, (3, 3), rng=0)
    for bad in (np.ones((1, 2, 2, 1)), np.ones((3, 3)), np.ones((1, 3, 3, 1), int)):
        with pytest.raises((TypeError, ValueError)):
            layer.forward(bad)
    assert (layer.in_ch, layer.dtype, layer.device, layer.X) == (None, None, None, [])
    assert not layer.is_initialized
    X = images(1, 4, 4, 2)
    Y = layer.forward(X)
    state = repr(layer.summary())
    for bad_params in ({"W": np.ones((1, 1, 2, 3))}, {"stride": 0}, {"pad": 1, "act_fn": "?"}):
        with pytest.raises(ValueError):
            layer.set_params(bad_params)
    for bad_gradient in (Y[0], Y.astype("f4"), [Y, Y]):
        with pytest.raises((TypeError, ValueError)):
            layer.backward(bad_gradient)
    assert repr(layer.summary()) == state
    assert (layer.gradients["W"] == 0).all()
    assert len(layer.X) == 1


def test_a_frozen_layer_still_computes() -> None:
    layer = built()
    layer.freeze()
    layer.forward(np.ones((1, 5, 5, 2)))
    layer.unfreeze()
    layer.flush_gradients()
    layer.backward(np.ones_like(layer.forward(np.ones((1, 5, 5, 2)))))
    layer.update()
