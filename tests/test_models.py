"""Networks of layers, and the losses they are trained with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gpuconv.layers import Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.losses import CrossEntropy, SquaredError, softmax
from gpuconv.models import Sequential

RNG = np.random.default_rng(1)
X = RNG.standard_normal((6, 8, 8, 1))
LABELS = np.array([0, 1, 2, 0, 1, 2])


def net(**options: Any) -> Sequential:
    layers = [
        Conv2D(4, (3, 3), pad=1, act_fn="ReLU"), Pool2D((2, 2), 2),
        Conv2D(5, (3, 3), act_fn="Tanh"), Flatten(), FullyConnected(3),
    ]  # fmt: skip
    return Sequential(layers, **{"rng": 0, **options})


def step(model: Sequential, **options: Any) -> float:
    loss, gradient = CrossEntropy().from_logits(LABELS, model.forward(X))
    model.backward(gradient, **options)
    model.update(float(loss))
    return float(loss)


def test_learns() -> None:
    model = net(optimizer="Adam(lr=0.01)")
    losses = [step(model) for _ in range(60)]
    assert losses[0] > 0.9
    assert losses[-1] < 0.02


def test_gradients_against_differences() -> None:
    model = net()
    loss, gradient = CrossEntropy().from_logits(LABELS, model.forward(X))
    dX = model.backward(gradient)
    gradients = model.gradients
    v = RNG.standard_normal(X.shape)

    def at(x: np.ndarray) -> float:
        return float(CrossEntropy().from_logits(LABELS, model.forward(x, False))[0])

    assert (at(X + 1e-6 * v) - at(X - 1e-6 * v)) / 2e-6 == pytest.approx((dX * v).sum(), rel=1e-5)
    values = model.tensors()
    v = {k: RNG.standard_normal(p.shape) for k, p in values.items()}
    ends = []
    for sign in (1, -1):
        model.load_tensors({k: p + sign * 1e-6 * v[k] for k, p in values.items()})
        ends.append(at(X))
    want = sum(float((gradients[k] * v[k]).sum()) for k in values)
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(want, rel=1e-5)
    assert set(values) == {"0.W", "0.b", "2.W", "2.b", "4.W", "4.b"}
    assert at(X) != float(loss)


def test_the_input_gradient_may_be_left_out() -> None:
    a, b = net(), net()
    for model, options in ((a, {}), (b, {"input_grad": False})):
        for _ in range(3):
            step(model, **options)
    for name, value in a.tensors().items():
        np.testing.assert_array_equal(value, b.tensors()[name])
    _, gradient = CrossEntropy().from_logits(LABELS, a.forward(X))
    assert a.backward(gradient, input_grad=False) is None


@pytest.mark.parametrize("which", [[0], [2], [4], [0, 2]])
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_layers_pass_gradients_on(which: list[int], input_grad: bool) -> None:
    model, free = net(), net()
    for k in which:
        model[k].freeze()
    before = model.tensors() or None
    model.build(X.shape, "float64")
    before = model.tensors()
    step(model, input_grad=input_grad)
    step(free)
    for name, value in model.tensors().items():
        if int(name[0]) in which:
            np.testing.assert_array_equal(value, before[name])
        else:
            np.testing.assert_array_equal(value, free.tensors()[name])
    assert all(layer.X == [] for layer in model.layers)
    model.freeze()
    with pytest.raises(RuntimeError, match="every layer is frozen"):
        step(model)


def test_config_and_tensors_make_an_equal_model() -> None:
    model = net(optimizer="Adam(lr=0.01)")
    for _ in range(3):
        step(model)
    again = Sequential.from_config(json.loads(json.dumps(model.config())))
    again.set_optimizer("Adam(lr=0.01)")
    assert again.build(X.shape, "float64") == (6, 3)
    again.load_tensors(model.tensors())
    again.load_state(json.loads(json.dumps(model.state())), model.state_tensors())
    for _ in range(3):
        assert step(again) == step(model)
    for name, value in model.tensors().items():
        np.testing.assert_array_equal(value, again.tensors()[name])


def test_summary_goes_round() -> None:
    model = net()
    Y = model.forward(X, False)
    other = net(rng=9)
    assert other.set_params(model.summary()) is other
    np.testing.assert_array_equal(other.forward(X, False), Y)


def test_same_seed_same_weights() -> None:
    for seed in (0, 3):
        a, b = net(rng=seed), net(rng=seed)
        for _ in range(2):
            assert step(a) == step(b)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no list": (lambda: Sequential(Flatten()), TypeError, "layers is a Flatten"),  # type: ignore[arg-type]
    "empty": (lambda: Sequential([]), ValueError, "layers is empty"),
    "no layer": (lambda: Sequential([Flatten(), 3]), TypeError, r"layers\[1\] is a int"),  # type: ignore[list-item]
    "twice": (lambda: Sequential([*net().layers, *net().layers[:0], *(2 * [Flatten()])]), ValueError, "twice"),
    "does not fit": (
        lambda: Sequential([Flatten(), Conv2D(1, (1, 1))]).build((2, 3, 3, 1)),
        ValueError, r"layer 1 \(Conv2D\): X has shape",
    ),
    "shrinks away": (
        lambda: Sequential([Pool2D((2, 2), 2), Pool2D((2, 2), 2)]).build((1, 3, 3, 1)),
        ValueError, r"layer 1 \(Pool2D\)",
    ),
    "config": (lambda: Sequential.from_config({}), ValueError, "config has no layers"),
    "config's layer": (
        lambda: Sequential.from_config({"layers": [{"layer": "os.system"}]}), ValueError, "os.system",
    ),
    "config's argument": (
        lambda: Sequential.from_config({"layers": [{"layer": "Conv2D", "out": 1}]}),
        ValueError, r"layer 0 \(Conv2D\)",
    ),
    "tensors too early": (lambda: net().load_tensors({}), ValueError, "build"),
    "summary": (lambda: net().set_params({"layers": []}), ValueError, "does not hold 5"),
    "state": (lambda: net().load_state([], {}), ValueError, "state has 0 entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_wrong_tensors_change_nothing() -> None:
    model = net()
    model.build(X.shape, "float64")
    good = model.tensors()
    missing = {k: v for k, v in good.items() if k != "0.b"}
    other = {**good, "4.b": np.zeros((1, 4))}
    narrow = {**good, "4.b": good["4.b"].astype("float32")}
    for bad, message in ((missing, "lacks"), (other, "4.b"), (narrow, "float32")):
        with pytest.raises(ValueError, match=message):
            model.load_tensors(bad)
    for name, value in model.tensors().items():
        np.testing.assert_array_equal(value, good[name])


# ------------------------------------------------------------------------------------ losses


def test_cross_entropy_against_pytorch() -> None:
    torch = pytest.importorskip("torch")
    z = RNG.standard_normal((7, 4)) * 30
    labels = RNG.integers(0, 4, 7)
    t = torch.tensor(z, requires_grad=True)
    want = torch.nn.functional.cross_entropy(t, torch.tensor(labels))
    want.backward()
    loss, gradient = CrossEntropy().from_logits(labels, z)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-12)
    np.testing.assert_allclose(gradient, t.grad.numpy(), atol=1e-14)


def test_the_two_forms_of_cross_entropy_agree() -> None:
    z = RNG.standard_normal((5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    one_hot = np.eye(3)[labels]
    p = softmax(z)
    loss, gradient = CrossEntropy().from_logits(labels, z)
    assert CrossEntropy()(one_hot, p) / 5 == pytest.approx(float(loss), rel=1e-9)
    np.testing.assert_allclose(CrossEntropy().grad(one_hot, p) / 5, gradient, atol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    z = np.array([[1e4, -1e4], [-1e30, 1e30]], "float32")
    loss, gradient = CrossEntropy().from_logits(np.array([1, 1]), z)
    assert float(loss) == pytest.approx(1e4)
    assert np.isfinite(gradient).all()


def test_squared_error() -> None:
    y, z = RNG.standard_normal((4, 2)), RNG.standard_normal((4, 2))
    assert SquaredError()(y, z) == pytest.approx(0.5 * ((z - y) ** 2).sum())
    v = RNG.standard_normal(z.shape)

    def at(s: np.ndarray) -> float:
        return float(SquaredError().loss(y, np.tanh(s)))

    slope = (at(z + 1e-6 * v) - at(z - 1e-6 * v)) / 2e-6
    assert slope == pytest.approx((SquaredError.grad(y, np.tanh(z), z, "Tanh") * v).sum(), rel=1e-5)
    np.testing.assert_array_equal(SquaredError.grad(y, z), z - y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SquaredError()(np.ones(2), np.ones(3)), ValueError, "y_pred has shape"),
        (lambda: SquaredError.grad(np.ones(2), np.ones(2), None, "ReLU"), ValueError, "z is None"),
        (lambda: CrossEntropy()(np.full((1, 2), 0.5), np.full((1, 2), 0.5)), ValueError, "binary"),
        (lambda: CrossEntropy()(np.eye(2), np.ones((2, 2))), ValueError, "sum to 1"),
        (
            lambda: CrossEntropy.from_logits(np.array([0.0]), np.ones((1, 2))),
            TypeError,
            "labels has",
        ),
        (
            lambda: CrossEntropy.from_logits(np.array([0, 1]), np.ones((1, 2))),
            ValueError,
            "labels has",
        ),
        (lambda: CrossEntropy.from_logits(np.array([2]), np.ones((1, 2))), ValueError, "0 to 1"),
        (lambda: CrossEntropy.from_logits(np.array([-1]), np.ones((1, 2))), ValueError, "0 to 1"),
        (
            lambda: CrossEntropy.from_logits(np.array([0]), np.ones(2)),
            ValueError,
            "logits has shape",
        ),
    ],
)
def test_wrong_losses(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
