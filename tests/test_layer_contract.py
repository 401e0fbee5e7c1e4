"""The layers' contract: several passes, dtypes, summaries, devices, wrong calls."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from gpuconv import layers as L
from gpuconv.layers import Dropout, Layer
from gpuconv.modules import ResidualBlock, SkipConnectionConvModule, SkipConnectionIdentityModule

RNG = np.random.default_rng(7)


def made(name: str) -> tuple[Any, Any]:
    """Return a layer and an input for it."""
    return {
        "Conv1D": lambda: (L.Conv1D(3, 2, "causal", act_fn="LeakyReLU(0.3)", rng=0), (2, 5, 2)),
        "Deconv2D": lambda: (L.Deconv2D(3, (2, 3), 1, 2, "Tanh", rng=0), (2, 4, 3, 2)),
        "BatchNorm1D": lambda: (L.BatchNorm1D(rng=0), (5, 3)),
        "BatchNorm2D": lambda: (L.BatchNorm2D(rng=0), (2, 3, 4, 3)),
        "LayerNorm1D": lambda: (L.LayerNorm1D(rng=0), (5, 3)),
        "LayerNorm2D": lambda: (L.LayerNorm2D(rng=0), (2, 3, 4, 3)),
        "Softmax": lambda: (L.Softmax(), (4, 3)),
        "Add": lambda: (L.Add("ReLU"), [(4, 3)] * 3),
        "Multiply": lambda: (L.Multiply("Tanh"), [(4, 3)] * 3),
        "Dropout": lambda: (Dropout(L.FullyConnected(3, "ReLU", rng=0), 0.4, rng=1), (5, 4)),
        "SkipConnectionIdentityModule": lambda: (
            SkipConnectionIdentityModule(3, (3, 3), (2, 2), act_fn="ReLU", rng=0), (2, 5, 4, 2),
        ),
        "SkipConnectionConvModule": lambda: (
            SkipConnectionConvModule(3, 4, (3, 3), (3, 3), (3, 3), 1, 0, rng=0), (2, 6, 6, 2),
        ),
        "ResidualBlock": lambda: (ResidualBlock(4, 2, rng=0), (2, 5, 6, 2)),
    }[name]()  # fmt: skip


NAMES = [
    "Conv1D", "Deconv2D", "BatchNorm1D", "BatchNorm2D", "LayerNorm1D", "LayerNorm2D", "Softmax",
    "Add", "Multiply", "Dropout", "SkipConnectionIdentityModule", "SkipConnectionConvModule",
    "ResidualBlock",
]  # fmt: skip


def draw(shape: Any, dtype: str = "float64") -> Any:
    if isinstance(shape, list):
        return [draw(s, dtype) for s in shape]
    return RNG.standard_normal(shape).astype(dtype)


def same(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    """Compare nested lists and dictionaries of arrays."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key, value in a.items():
            same(value, b[key], tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, tolerance)
    elif a is not None:
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def total(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {k: total(v, b[k]) for k, v in a.items()}
    return a + b


@pytest.mark.parametrize("name", NAMES)
def test_several_passes_before_an_update(name: str) -> None:
    layer, shape = made(name)
    first, second = draw(shape), draw(shape)
    layer.forward(first)
    state = copy.deepcopy(layer)
    outputs = [state.forward(second)]
    gradients = [draw(outputs[0].shape), draw(outputs[0].shape)]
    both = state.backward(gradients)
    assert len(state.X) == 2
    alone, other = copy.deepcopy(layer), copy.deepcopy(layer)
    same(alone.backward(gradients[0]), both[0])
    other.flush_gradients()
    assert other.X == []
    if name == "Dropout":  # the generator goes on where the first pass left it
        other._generator = copy.deepcopy(layer._generator)
    other.forward(second)
    same(other.backward(gradients[1]), both[1])
    same(total(alone.gradients, other.gradients), state.gradients, 1e-10)
    kept = copy.deepcopy(state.gradients)
    state.backward(gradients, retain_grads=False)
    same(state.gradients, kept)
    state.update()
    assert state.X == []
    for _, leaf in state.leaves():
        assert all((g == 0).all() for g in leaf.gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_that_retains_nothing_changes_nothing(name: str) -> None:
    layer, shape = made(name)
    layer.forward(draw(shape))
    layer.flush_gradients()
    before = repr(layer.summary())
    X = draw(shape)
    Y = layer.forward(X, retain_derived=False)
    assert layer.X == []
    assert repr(layer.summary()) == before
    same(layer.forward(X, retain_derived=False), Y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_results_keep_the_dtype(name: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    layer, shape = made(name)
    X = draw(shape, dtype)
    Y = layer.forward(X)
    assert Y.dtype == dtype
    dX = layer.backward(np.ones_like(Y))
    assert all(d.dtype == dtype for d in (dX if isinstance(dX, list) else [dX]))
    layer.update()
    for _, leaf in layer.leaves():
        for key, value in leaf.parameters.items():  # a half could not hold running statistics
            assert value.dtype == ("float32" if key.startswith("running") else dtype)
        assert all(p.dtype == dtype for p in leaf.gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_summary_makes_an_equal_layer(name: str) -> None:
    layer, shape = made(name)
    layer.backward(np.ones_like(layer.forward(draw(shape))))
    layer.update()
    X = draw(shape)
    Y = layer.forward(X, retain_derived=False)
    blank: Layer = {
        "Conv1D": lambda: L.Conv1D(9, 1),
        "Deconv2D": lambda: L.Deconv2D(9, 1),
        "BatchNorm1D": lambda: L.BatchNorm1D(0.1, 0.1),
        "BatchNorm2D": lambda: L.BatchNorm2D(0.1, 0.1),
        "LayerNorm1D": lambda: L.LayerNorm1D(0.1),
        "LayerNorm2D": lambda: L.LayerNorm2D(0.1),
        "Softmax": lambda: L.Softmax(0),
        "Add": lambda: L.Add(),
        "Multiply": lambda: L.Multiply(),
        "Dropout": lambda: Dropout(L.FullyConnected(9), 0.9),
        "SkipConnectionIdentityModule": lambda: SkipConnectionIdentityModule(9, 1, 1),
        "SkipConnectionConvModule": lambda: SkipConnectionConvModule(9, 9, 1, 1, 1),
        "ResidualBlock": lambda: ResidualBlock(9),
    }[name]()
    summary = layer.summary()
    before = repr(summary)
    assert blank.set_params(summary) is blank
    assert repr(summary) == before
    same(blank.forward(X, retain_derived=False), Y)
    assert repr(blank.hyperparameters) == repr(layer.hyperparameters)
    blank.freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        blank.update()
    with pytest.raises(RuntimeError, match="frozen"):
        blank.backward(Y)
    blank.unfreeze()
    kept = copy.deepcopy(layer.parameters)
    blank.backward(np.ones_like(blank.forward(X)))
    blank.update()
    same(layer.parameters, kept)  # the copy is its own


# ----------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("shape", [(3, 70000), (70000, 3), (5, 1), (1, 5), (300, 2049), (4097, 7)])
def test_statistics_in_blocks(shape: tuple[int, int]) -> None:
    """Rows that do not fill blocks, columns longer than one; a mean far from zero in float32."""
    from gpuconv.normalization import column_statistics, columns_grad, normalized_columns

    rng = np.random.default_rng(0)
    X = (rng.standard_normal(shape) + rng.choice([0.0, 3000.0], shape[1])).astype("float32")
    dy = rng.standard_normal(shape).astype("float32")
    scaler, intercept = rng.standard_normal((2, shape[1]))
    wide = X.astype("float64")
    mean, variance = column_statistics(X)
    np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, wide.var(axis=0), rtol=1e-4, atol=1e-6)
    inverse = 1 / np.sqrt(variance + 1e-5)
    hat = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-5)
    Y = normalized_columns(X, mean, inverse, scaler, intercept)
    np.testing.assert_allclose(Y, scaler * hat + intercept, rtol=1e-3, atol=2e-3)
    dx, dscaler, dintercept = columns_grad(dy, X, mean, inverse, scaler, True, True)
    reach = np.sqrt(shape[0])
    np.testing.assert_allclose(dintercept, dy.sum(axis=0), atol=1e-5 * reach)
    np.testing.assert_allclose(dscaler, (dy * hat).sum(axis=0), atol=1e-3 * reach)
    want = dy - dy.mean(axis=0) - hat * (dy * hat).mean(axis=0)
    assert dx is not None
    np.testing.assert_allclose(dx * np.sqrt(variance + 1e-5), scaler * want, atol=5e-3)


def test_frozen_batch_normalisation_passes_gradients_on() -> None:
    layer = L.BatchNorm1D(first_scaler="ones")
    layer.forward(draw((6, 3)))
    layer.flush_gradients()
    layer.freeze()
    kept = copy.deepcopy(layer.parameters)
    X = draw((6, 3))
    Y = layer.forward(X)
    same(layer.parameters, kept)
    same(Y, layer.forward(X, retain_derived=False))
    dY = draw((6, 3))
    deviation = np.sqrt(kept["running_var"] + 1e-5)
    same(layer.backpropagate(dY, True), dY / deviation)
    layer.unfreeze()
    layer.reset_running_stats()
    assert (layer.parameters["running_var"] == 1).all()
    assert (layer.parameters["running_mean"] == 0).all()


def test_nan_stays_where_it_belongs() -> None:
    X = draw((4, 3))
    X[1, 2] = np.nan
    Y = L.BatchNorm1D().forward(X)
    assert np.isnan(Y[:, 2]).all()
    assert np.isfinite(Y[:, :2]).all()
    Y = L.LayerNorm1D().forward(X)
    assert np.isnan(Y[1]).all()
    assert np.isfinite(Y[[0, 2, 3]]).all()


@pytest.mark.parametrize("name", ["BatchNorm2D", "LayerNorm2D", "Conv1D", "Deconv2D", "Softmax"])
def test_empty_batches(name: str) -> None:
    layer, shape = made(name)
    layer.build(shape, "float64")
    X = np.zeros((0, *shape[1:]))
    Y = layer.forward(X)
    assert Y.shape == layer.output_shape(X.shape)
    assert layer.backward(Y).shape == X.shape
    for value in layer.parameters.values():
        assert np.isfinite(value).all()


# ----------------------------------------------------------------------------------- dropout


def test_dropout_drops_and_scales() -> None:
    layer = Dropout(L.FullyConnected(4, rng=0), 0.3, rng=2)
    X = np.ones((500, 40))
    Y = layer.forward(X)
    mask = layer.derived_variables["wrappers"][0]["dropout_mask"][0]
    assert abs(mask.mean() - 0.7) < 0.02
    same(Y, (mask @ layer.parameters["W"]) / 0.7)
    assert (layer.backward(np.ones_like(Y))[~mask] == 0).all()
    layer.freeze()
    same(layer.forward(X), X @ layer.parameters["W"])
    layer.unfreeze()
    assert layer.trainable
    twin = Dropout(L.FullyConnected(4, rng=0), 0.3, rng=2)
    same(twin.forward(X), Y)


def test_dropout_within_dropout() -> None:
    layer = Dropout(Dropout(L.FullyConnected(2, rng=0), 0.25, rng=1), 0.5, rng=2)
    X = np.ones((50, 30))
    Y = layer.forward(X)
    assert [w["p"] for w in layer.hyperparameters["wrappers"]] == [0.25, 0.5]
    masks = [w["dropout_mask"][0] for w in layer.derived_variables["wrappers"]]
    same(Y, (masks[0] & masks[1]) @ layer.parameters["W"] / (0.75 * 0.5))
    other = Dropout(Dropout(L.FullyConnected(3), 0), 0).set_params(layer.summary())
    assert [w["p"] for w in other.hyperparameters["wrappers"]] == [0.25, 0.5]


# -------------------------------------------------------------------------------- on a device


@pytest.mark.parametrize("name", NAMES)
def test_on_a_device(name: str) -> None:
    from tests.support import home

    layer, shape = made(name)
    twin = copy.deepcopy(layer)
    X = draw(shape, "float32")
    Y = layer.forward(X)
    dY = draw(Y.shape, "float32")
    dX = layer.backward(dY)
    with home("cuda_atomic") as cp:
        put = (lambda a: [cp.asarray(x) for x in a]) if isinstance(X, list) else cp.asarray
        there = twin.forward(put(X))
        assert isinstance(there, cp.ndarray)
        back = twin.backward(cp.asarray(dY))
        backs, dXs = (back, dX) if isinstance(back, list) else ([back], [dX])
        same([b.get() for b in backs], dXs, 2e-4)
        same(there.get(), Y, 2e-4)
        pairs = zip(twin.leaves(), layer.leaves(), strict=True)
        for (_, there_leaf), (_, leaf) in pairs:
            for key, value in leaf.gradients.items():
                same(there_leaf.gradients[key].get(), value, 2e-3)
        twin.update()
        layer.update()
        for (_, there_leaf), (_, leaf) in zip(twin.leaves(), layer.leaves(), strict=True):
            for key, value in leaf.parameters.items():
                assert isinstance(there_leaf.parameters[key], cp.ndarray)
                same(there_leaf.parameters[key].get(), value, 2e-4)
        still = twin.forward(put(X), retain_derived=False)
        same(still.get(), layer.forward(X, retain_derived=False), 5e-4)


# ------------------------------------------------------------------------------- wrong calls

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "causal in 2-D": (lambda: L.Conv2D(1, 1, "causal"), ValueError, "pad is 'causal'"),
    "pad of three": (lambda: L.Conv1D(1, 1, (1, 1, 1)), ValueError, "pad is"),
    "pad unknown": (lambda: L.Conv1D(1, 1, "valid"), ValueError, "'same' or 'causal'"),
    "width 0": (lambda: L.Conv1D(1, 0), ValueError, "kernel_width is 0"),
    "1-D input": (lambda: L.Conv1D(1, 1).forward(np.ones((1, 2))), ValueError, "X has shape"),
    "1-D channels": (
        lambda: made("Conv1D")[0].set_params({"W": np.ones((2, 2, 3)), "b": np.ones((1, 1, 2))}),
        ValueError, "b has shape",
    ),
    "too short": (lambda: L.Conv1D(1, 4).forward(np.ones((1, 3, 1))), ValueError, "the kernel, 4"),
    "all cut off": (
        lambda: L.Deconv2D(1, 1, 1).forward(np.ones((1, 2, 2, 1))), ValueError, "cuts off all",
    ),
    "momentum": (lambda: L.BatchNorm1D(1.5), ValueError, "momentum is 1.5"),
    "epsilon": (lambda: L.LayerNorm2D(-1), ValueError, "epsilon is -1"),
    "first scaler": (lambda: L.BatchNorm2D(first_scaler="x"), ValueError, "first_scaler is 'x'"),
    "axes": (lambda: L.BatchNorm2D().forward(np.ones((2, 3))), ValueError, "in_rows"),
    "another size": (
        lambda: [n := L.LayerNorm2D(), n.build((1, 2, 2, 1)), n.forward(np.ones((1, 3, 2, 1), "f4"))],
        ValueError, "expected .*2, 2, 1",
    ),
    "dim": (lambda: L.Softmax(2).forward(np.ones((2, 2))), ValueError, "an axis 2"),
    "dim a word": (lambda: L.Softmax("last"), TypeError, "dim is 'last'"),
    "one array to add": (lambda: L.Add().forward(np.ones((2, 2))), TypeError, "X is a ndarray"),
    "nothing to add": (lambda: L.Add().forward([]), ValueError, "X is empty"),
    "shapes to add": (
        lambda: L.Add().forward([np.ones((2, 2)), np.ones((2, 1))]), ValueError, r"X\[1\] has shape",
    ),
    "dtypes to multiply": (
        lambda: L.Multiply().forward([np.ones((2, 2)), np.ones((2, 2), "f4")]), TypeError, r"X\[1\]",
    ),
    "p": (lambda: Dropout(L.Flatten(), 1.0), ValueError, "p is 1.0"),
    "what is wrapped": (lambda: Dropout("x", 0.5), TypeError, "wrapped_layer is a str"),
    "another wrapper": (
        lambda: Dropout(L.Flatten(), 0.5).set_params({"wrappers": [{"wrapper": "Noise"}]}),
        ValueError, "expected a Dropout",
    ),
    "gradients of dropout": (
        lambda: made("Dropout")[0].backward(np.ones((5, 3))), RuntimeError, "before forward",
    ),
    "skip": (
        lambda: SkipConnectionConvModule(1, 1, 3, 1, 1).forward(np.ones((1, 4, 4, 1))),
        ValueError, "stride_skip is 1",
    ),
    "module's summary": (
        lambda: made("ResidualBlock")[0].set_params({"layer": "Conv2D"}), ValueError, "'ResidualBlock'",
    ),
    "channels lost": (
        lambda: ResidualBlock(2).forward(np.ones((1, 4, 4, 3))), ValueError, "at most out_ch, 2",
    ),
    "GELU": (lambda: ResidualBlock(2, act_fn="GELU"), ValueError, "act_fn is GELU"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["SkipConnectionIdentityModule", "BatchNorm2D", "Conv1D"])
def test_a_wrong_summary_changes_nothing(name: str) -> None:
    layer, shape = made(name)
    layer.forward(draw(shape))
    before = repr(layer.summary())
    wrong: dict[str, Any] = {"epsilon": -1.0, "stride": 0}
    if name.startswith("Skip"):
        wrong = {"parameters": {"components": {"conv1": {"b": np.ones(9)}}}}
    with pytest.raises(ValueError):
        layer.set_params(wrong)
    assert repr(layer.summary()) == before
