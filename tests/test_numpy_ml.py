"""What numpy-ml writes and computes: its summaries load here, ours have its keys, losses agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuconv import layers as L
from gpuconv.layers import Dropout
from gpuconv.losses import CrossEntropy
from gpuconv.optimizers import Adam

SGD = {
    "cache": {},
    "hyperparameters": {
        "id": "SGD", "lr": 0.01, "momentum": 0.0, "clip_norm": None,
        "lr_scheduler": "ConstantScheduler(lr=0.01)",
    },
}  # fmt: skip


def numbers(*shape: int) -> np.ndarray:
    """Return numbers between -1 and 1 that are the same everywhere."""
    return np.sin(np.arange(1, np.prod(shape) + 1) ** 1.5).reshape(shape)


WEIGHTS_1D = {"W": numbers(2, 1, 2), "b": numbers(1, 1, 2)}
SUMMARIES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "Conv1D": (
        lambda: L.Conv1D(1, 1),
        {
            "layer": "Conv1D",
            "parameters": WEIGHTS_1D,
            "hyperparameters": {
                "layer": "Conv1D", "pad": "causal", "init": "glorot_uniform", "in_ch": 1,
                "out_ch": 2, "stride": 1, "dilation": 0, "act_fn": "Leaky ReLU(alpha=0.3)",
                "kernel_width": 2, "optimizer": SGD,
            },
        },
        numbers(1, 4, 1),
    ),
    "Deconv2D": (
        lambda: L.Deconv2D(1, 1),
        {
            "layer": "Deconv2D",
            "parameters": {"W": numbers(2, 2, 1, 2), "b": numbers(1, 1, 1, 2)},
            "hyperparameters": {
                "layer": "Deconv2D", "pad": 0, "init": "glorot_uniform", "in_ch": 1, "out_ch": 2,
                "stride": 2, "act_fn": "Identity", "kernel_shape": (2, 2), "optimizer": SGD,
            },
        },
        numbers(1, 2, 1, 1),
    ),
    "BatchNorm2D": (
        lambda: L.BatchNorm2D(),
        {
            "layer": "BatchNorm2D",
            "parameters": {
                "scaler": np.array([2.0, 0.5]), "intercept": np.array([1.0, -1.0]),
                "running_var": np.array([4.0, 0.25]), "running_mean": np.array([1.0, 2.0]),
            },
            "hyperparameters": {
                "layer": "BatchNorm2D", "act_fn": None, "in_ch": 2, "out_ch": 2, "epsilon": 0.0,
                "momentum": 0.9, "optimizer": SGD,
            },
        },
        np.array([[[[3.0, 2.5], [1.0, 1.0]]]]),
    ),
    "LayerNorm1D": (
        lambda: L.LayerNorm1D(),
        {
            "layer": "LayerNorm1D",
            "parameters": {"scaler": np.array([1.0, 2.0]), "intercept": np.array([0.5, 0.0])},
            "hyperparameters": {
                "layer": "LayerNorm1D", "act_fn": None, "n_in": 2, "n_out": 2, "epsilon": 0.0,
                "optimizer": SGD,
            },
        },
        np.array([[1.0, 5.0]]),
    ),
    "Softmax": (
        lambda: L.Softmax(0),
        {
            "layer": "SoftmaxLayer", "parameters": {},
            "hyperparameters": {"layer": "SoftmaxLayer", "n_in": 2, "n_out": 2, "optimizer": SGD},
        },
        np.log([[1.0, 1.0], [3.0, 1.0]]),
    ),
    "Add": (
        lambda: L.Add("Tanh"),
        {
            "layer": "Sum", "parameters": {},
            "hyperparameters": {"layer": "Sum", "act_fn": "ReLU", "optimizer": SGD},
        },
        [np.array([[1.0, -3.0]]), np.array([[2.0, 1.0]])],
    ),
    "Multiply": (
        lambda: L.Multiply(),
        {
            "layer": "Multiply", "parameters": {},
            "hyperparameters": {
                "layer": "Multiply", "act_fn": "Affine(slope=2, intercept=1)", "optimizer": SGD,
            },
        },
        [np.array([[1.0, -3.0]]), np.array([[2.0, 1.0]])],
    ),
    "Dropout": (
        lambda: Dropout(L.FullyConnected(1), 0.5),
        {
            "layer": "FullyConnected", "layer_wrappers": ["Dropout"],
            "parameters": {"W": np.array([[1.0], [2.0]]), "b": np.array([[0.5]])},
            "hyperparameters": {
                "layer": "FullyConnected", "init": "glorot_uniform", "n_in": 2, "n_out": 1,
                "act_fn": "Hard Sigmoid", "optimizer": SGD,
                "wrappers": [{"wrapper": "Dropout", "p": 0.25}],
            },
        },
        np.array([[1.0, -2.0]]),
    ),
}  # fmt: skip

#: Worked out by hand, or (the first two) by sums over the numbers above.
RESULTS: dict[str, Any] = {
    "BatchNorm2D": [[[[3.0, -0.5], [1.0, -2.0]]]],
    "LayerNorm1D": [[-0.5, 2.0]],
    "Softmax": [[0.25, 0.5], [0.75, 0.5]],
    "Add": [[3.0, 0.0]],
    "Multiply": [[5.0, -5.0]],
    "Dropout": [[0.2 * -2.5 + 0.5]],
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_summaries_of_numpy_ml_load(name: str) -> None:
    make, summary, X = SUMMARIES[name]
    layer = make()
    layer.set_params(summary)
    Y = layer.forward(X, retain_derived=False)
    x = X if isinstance(X, list) else X.reshape(-1)
    W, b = (summary["parameters"].get(k) for k in ("W", "b"))
    if name == "Conv1D":
        before = np.concatenate([[0], x[:-1]])
        Z = before[:, None] * W[0, 0] + x[:, None] * W[1, 0] + b[0, 0]
        want: Any = np.where(Z > 0, Z, 0.3 * Z)[None]
    elif name == "Deconv2D":
        want = np.concatenate([v * W[:, :, 0] + b[0, 0, 0] for v in x])[None]
    else:
        want = RESULTS[name]
    np.testing.assert_allclose(Y, want, atol=1e-12)
    # Ours has the same keys, and text that numpy-ml's parsers know.
    ours = layer.summary()
    assert set(ours) == set(summary)
    assert set(ours["hyperparameters"]) - {"dim"} == set(summary["hyperparameters"])
    for key, value in summary["hyperparameters"].items():
        if name != "Dropout" or key != "act_fn":  # numpy-ml does not read its own "Hard Sigmoid"
            assert ours["hyperparameters"][key] == value
    assert set(ours["parameters"]) == set(summary["parameters"])


def test_a_training_script_of_numpy_ml() -> None:
    """The losses that numpy-ml prints for this network, from these weights, step by step."""
    conv = L.Conv2D(out_ch=4, kernel_shape=(3, 3), pad=1, act_fn="ReLU", optimizer=Adam(lr=0.01))
    pool = L.Pool2D(kernel_shape=(2, 2), stride=2)
    dense = L.FullyConnected(n_out=3, optimizer=Adam(lr=0.01))
    net = [conv, pool, L.Flatten(), dense, L.Softmax()]
    X, y = numbers(12, 8, 8, 2), np.eye(3)[np.arange(12) % 3]
    conv.set_params({"parameters": {"W": 0.3 * numbers(3, 3, 2, 4), "b": np.zeros((1, 1, 1, 4))}})
    dense.set_params({"parameters": {"W": 0.2 * numbers(64, 3), "b": np.zeros((1, 3))}})
    loss, losses = CrossEntropy(), []
    for _ in range(10):
        out = X
        for layer in net:
            out = layer.forward(out)
        losses.append(float(loss(y, out)))
        grad = loss.grad(y, out)
        for layer in net[-2::-1]:  # the gradient of the loss is that of the softmax's argument
            grad = layer.backward(grad)
        for layer in net:
            layer.update(losses[-1])
    np.testing.assert_allclose(
        losses,
        [16.867815626935, 14.91080335783, 13.801677466936, 12.729836168973, 11.612140231045,
         10.524712632018, 9.545601867011, 8.675799908571, 7.91507560236, 7.222533933847],
        atol=1e-9,
    )  # fmt: skip
