"""Half precision: master weights and the scaled loss; and bad runs, which say where they went bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cli import main
from gpuconv.layers import Conv2D, Dropout, Flatten, FullyConnected
from gpuconv.losses import CrossEntropy
from gpuconv.models import Sequential
from gpuconv.training import checkpoint, precision, run
from gpuconv.training.loop import DivergedError, StepEnd, fit
from gpuconv.training.precision import Full, Mixed, UnderflowError, precision_for
from gpuconv.training.recipe import Recipe
from tests.commands import COMMON, metrics
from tests.small_images import network, save, scaled

HELD = scaled(20, seed=1)


def train(net: Sequential, how: Any = None, **options: Any) -> Any:
    usual = {"epochs": 3, "batch_size": 16, "seed": 5}
    return fit(net, scaled(), HELD, precision=how, **{**usual, **options})


# ----------------------------------------------------------------------------------- learning


def test_float16_learns_as_float32_does() -> None:
    half, single = network(), network()
    how = Mixed("float16")
    found = train(half, how, epochs=8).history[-1]
    want = train(single, epochs=8).history[-1]
    assert {v.dtype.name for v in half.parameters.values()} == {"float16"}
    assert {v.dtype.name for v in how.masters.values()} == {"float32"}
    assert {a.dtype.name for a in half.state_tensors().values()} == {"float32"}
    assert found.train_loss == pytest.approx(want.train_loss, rel=0.05)
    assert found.validation_accuracy >= want.validation_accuracy - 0.05
    for name, value in half.parameters.items():
        assert value.tobytes() == how.masters[name].astype("float16").tobytes()


def test_master_weights_keep_what_float16_would_lose() -> None:
    """Steps of a ten-thousandth: in float16 they vanish beside weights near 1."""
    net = Sequential([Flatten(), FullyConnected(2)], optimizer="SGD(lr=1.0)", device="cpu")
    net.build((1, 2, 2, 1), "float16")
    net.layers[1].parameters["W"] = np.ones((4, 2), "float16")
    how = Mixed("float16", scale=1.0)
    for _ in range(20):
        net.layers[1].gradients["W"] = np.full((4, 2), 1e-4, "float16")
        how.update(net, None)
    np.testing.assert_allclose(how.masters["1.W"], 1 - 20e-4, rtol=1e-5)
    np.testing.assert_allclose(net.parameters["1.W"], np.float16(1 - 20e-4))
    assert np.float16(1) - np.float16(1e-4) == 1  # which is why


def test_gradients_too_small_for_float16_arrive() -> None:
    """Of a loss whose gradient is below the smallest float16; the scale lifts it."""
    logits = np.array([[18.0, 0.0]], "float16")
    labels = np.array([0])
    _, plain = CrossEntropy.from_logits(labels, logits.astype("float32"))
    assert 0 < plain[0, 1] < 2**-25
    assert plain.astype("float16")[0, 1] == 0
    loss, lifted = Mixed("float16", scale=2.0**12).loss(labels, logits)
    assert loss.dtype == np.float32
    assert lifted.dtype == np.float16
    assert float(lifted[0, 1]) / 2.0**12 == pytest.approx(plain[0, 1], rel=1e-2)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    net, how = network(), Mixed("float16", scale=2.0**10, growth=3)
    net.build((1, 6, 5, 1), "float16")
    before = net.tensors()

    def take(value: float) -> None:
        net.layers[0].gradients["W"] = np.full(net.parameters["0.W"].shape, value, "float16")
        how.update(net, None)

    take(np.inf)
    take(np.nan)
    assert (how.scale, how.skipped, how.good) == (2.0**8, 2, 0)
    for name, value in net.tensors().items():
        assert value.tobytes() == before[name].tobytes()
    assert [layer.optimizer.cur_step for layer in net.layers] == [0, 0, 0, 0]
    assert not net.gradients["0.W"].any()
    for _ in range(3):
        take(1.0)
    assert (how.scale, how.good) == (2.0**9, 0)  # doubled after three good steps
    assert [layer.optimizer.cur_step for layer in net.layers] == [3, 3, 3, 3]
    assert net.tensors()["0.W"].tobytes() != before["0.W"].tobytes()


def test_a_scale_far_too_high_comes_down_within_the_training() -> None:
    how = Mixed("float16", scale=2.0**24)
    net = network()
    found = train(net, how, epochs=6)
    assert how.skipped >= 3
    assert how.scale == 2.0 ** (24 - how.skipped)
    assert found.history[-1].train_loss < found.history[0].train_loss / 1.5


def test_gradients_that_always_overflow_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_all_finite", lambda arrays: False)
    with pytest.raises(DivergedError, match=r"gradients of float16 overflow even .* at step"):
        train(network(), Mixed("float16"), epochs=30)
    with pytest.raises(UnderflowError):
        Mixed("float16", scale=2.0**-24)._overflowed()


def test_what_is_computed_in() -> None:
    assert isinstance(precision_for("float64"), Full)
    assert (precision_for("float16").dtype, precision_for("float16").data) == ("float16", "float32")
    for wrong, message in (({"dtype": "int8"}, "dtype is 'int8'"), ({"growth": 0}, "growth is 0"), ({"scale": 0}, "scale is 0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Mixed(**wrong)  # type: ignore[arg-type]
    x = np.ones((2, 3), "float32")
    assert Full().images(x) is x


# ------------------------------------------------------------------------------------- a run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gpuconv.set_num_threads(None)


def test_a_half_run_is_taken_up_again_bit_for_bit(here: Path) -> None:
    data = str(save(here / "a.npz"))
    recipe = Recipe(epochs=3, batch_size=8, dtype="float16", lr=0.01)
    whole = run.start(recipe, data, {"device": "cpu", "engine": None, "threads": 1}, "cpu")
    whole.precision.scale = 2.0**23  # so that some steps are skipped, before the stop and after
    whole.train()
    half = run.start(recipe, data, {"device": "cpu", "engine": None, "threads": 1}, "cpu")
    half.precision.scale = 2.0**23
    done = 0

    def count(event: Any) -> None:
        nonlocal done
        done += isinstance(event, StepEnd)

    half.train(count, lambda: done >= 4)
    (here / "r").mkdir()
    half.save_checkpoint(here / "r")
    assert half.precision.skipped > 0
    again = run.resume(here / "r", None, lambda settings: "cpu")
    again.train()
    assert again.precision.state(again.net)[0] == whole.precision.state(whole.net)[0]
    for name, value in whole.net.tensors().items():
        assert value.dtype == np.float16
        assert value.tobytes() == again.net.tensors()[name].tobytes()
    for name, value in whole.precision.masters.items():
        assert value.tobytes() == again.precision.masters[name].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_command_trains_and_predicts_in_halves(dtype: str, here: Path, capsys: Any) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    data = str(save(here / "a.npz"))
    options = ["--data", data, "--dtype", dtype, "--epochs", "12", "--out", "r", *COMMON]
    assert main(["train", *options]) == 0
    assert f"parameters, {dtype}" in capsys.readouterr().out
    assert metrics(here / "r")[-1]["test_accuracy"] > 0.6
    assert main(["predict", "r", data, *COMMON]) == 0
    assert re.search(r"^accuracy [01]\.\d+ \(\d+ of 60 images\)$", capsys.readouterr().out, re.M)
    header, tensors = checkpoint.read(here / "r" / run.MODEL, "model")
    assert header["dtype"] == dtype
    assert {t.dtype.name for t in tensors.values()} == {dtype}


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = {
    "no scaling": (lambda h, t: h.pop("scaling_state"), "skipped is None"),
    "scale": (lambda h, t: h["scaling_state"].update(scale=0), "scale is 0"),
    "more": (lambda h, t: h["scaling_state"].update(more=1), "expected scale, good and skipped"),
    "skipped": (lambda h, t: h["scaling_state"].update(skipped=h["scaling_state"]["skipped"] ^ 1), "state is not that after"),
    "a master": (lambda h, t: t.pop("master.0.W"), "master weights are not those"),
    "its dtype": (
        lambda h, t: t.update({"master.0.W": t["master.0.W"].astype("f8")}), "expected float32 of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_without_its_masters_is_refused(name: str, here: Path) -> None:
    data = str(save(here / "a.npz"))
    made = run.start(
        Recipe(epochs=1, dtype="float16"),
        data,
        {"device": "cpu", "engine": None, "threads": 1},
        "cpu",
    )
    made.train()
    (here / "r").mkdir()
    made.save_checkpoint(here / "r")
    path = here / "r" / run.CHECKPOINT
    header, tensors = checkpoint.read(path, "checkpoint")
    change, message = BROKEN[name]
    change(header, tensors)
    header.pop("kind", None)
    checkpoint.write(path, "checkpoint", json.loads(json.dumps(header)), tensors)
    with pytest.raises((ValueError, TypeError), match=message):
        run.resume(here / "r", None, lambda settings: "cpu")


# ----------------------------------------------------------------------------------- bad runs


class Bad(Conv2D):
    """Puts NaN into one of its results, from a step on."""

    def __init__(self, where: str, after: int, **options: Any) -> None:
        super().__init__(4, (3, 3), pad=1, **options)
        self.where, self.after, self.value = where, after, np.nan

    def _now(self, what: str) -> bool:
        return what == self.where and self.optimizer.cur_step >= self.after

    def _forward(self, X: Any, retain: bool) -> Any:
        y = super()._forward(X, retain)
        if retain and self._now("forward"):
            y[0, 0, 0, 0] = self.value
        return y

    def _backward(self, dy: Any, index: int, input_grad: bool, needs_params: bool) -> Any:
        dx, gradients = super()._backward(dy, index, input_grad, needs_params)
        if dx is not None and self._now("input"):
            dx[0, 0, 0, 0] = self.value
        if self._now("weights"):
            gradients["W"][0, 0, 0, 0] = self.value
        return dx, gradients


def bad_network(where: str, after: int, optimizer: str = "SGD(lr=0.01)") -> Sequential:
    layers = [Conv2D(4, (3, 3), pad=1), Bad(where, after), Flatten(), FullyConnected(3)]
    return Sequential(layers, optimizer=optimizer, rng=1, device="cpu")


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("where", "after", "text"),
    [
        ("forward", 2, r"layer 1 \(Bad 4 3x3\), forward, step 3 of epoch 1"),
        ("weights", 2, r"layer 1 \(Bad 4 3x3\), backward \(gradient of W\), step 3 of epoch 1"),
        ("input", 1, r"layer 1 \(Bad 4 3x3\), backward \(gradient of the input\), step 2 of epoch 1"),
        ("forward", 5, r"layer 1 \(Bad 4 3x3\), forward, step 2 of epoch 2"),
        ("weights", 3, r"layer 1 \(Bad 4 3x3\), backward \(gradient of W\), step 4 of epoch 1"),
    ],
)  # fmt: skip
def test_a_bad_run_names_layer_and_pass(where: str, after: int, text: str, interval: int) -> None:
    with pytest.raises(DivergedError, match=f"NaN or infinity first appeared in {text}"):
        train(bad_network(where, after), interval=interval)


@pytest.mark.parametrize(("interval", "taken", "first"), [(1, 3, 1), (2, 4, 0)])
def test_a_step_is_taken_again_with_its_own_dropout(interval: int, taken: int, first: int) -> None:
    """What one mask alone lets become bad must be found again."""
    seen: list[bytes] = []

    class Seeing(Flatten):
        def _forward(self, X: Any, retain: bool) -> Any:
            seen.append(X.tobytes())
            return super()._forward(X, retain)

    layers = [
        Dropout(Conv2D(4, (3, 3), pad=1), 0.5), Bad("forward", 2), Seeing(), FullyConnected(3),
    ]  # fmt: skip
    net = Sequential(layers, optimizer="SGD(lr=0.01)", rng=1, device="cpu")
    with pytest.raises(DivergedError, match=r"layer 1 \(Bad 4 3x3\), forward, step 3 of epoch 1"):
        train(net, interval=interval)
    assert seen[taken:] == seen[first:2]  # those before the third, which ends in the bad layer


def test_a_step_too_long_is_the_updates() -> None:
    with pytest.raises(DivergedError, match=r"the loss is nan at step 2 of epoch 1.*layer \d \(.*\), (update|forward)"):  # fmt: skip
        train(network("SGD(lr=1e38)"))


def test_bad_images_are_named() -> None:
    x, y = scaled()
    x = x.copy()
    x[7, 2, 2] = np.inf
    with pytest.raises(DivergedError, match=r"first appeared in the images, step \d of epoch 1"):
        fit(network(), (x, y), HELD, epochs=1, batch_size=16)
    with pytest.raises(DivergedError, match=r"the validation loss is nan .* in the images$"):
        fit(network(), scaled(), (x[:9], y[:9]), epochs=1)


def test_layers_that_go_bad_in_float16_are_named() -> None:
    """Activations beyond 65504: the forward is to blame, not the overflow of a gradient."""
    net = network()
    net.build((1, 6, 5, 1), "float16")
    net.layers[0].parameters["W"][...] = 6e4
    with pytest.raises(DivergedError, match=r"layer 0 \(Conv2D 4 3x3\), forward, step 1"):
        train(net, Mixed("float16"))


def test_what_does_not_happen_again_is_said() -> None:
    class Once(Flatten):
        calls = 0

        def _forward(self, X: Any, retain: bool) -> Any:
            Once.calls += 1
            return super()._forward(X * (np.nan if Once.calls == 3 else 1), retain)

    net = Sequential([Once(), FullyConnected(3)], optimizer="SGD(lr=0.1)", rng=1, device="cpu")
    with pytest.raises(DivergedError, match="first appeared in none of the last steps, when they"):
        train(net)


def test_the_command_says_it_in_one_line_and_keeps_the_last_good_state(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(save(here / "a.npz"))
    backward = FullyConnected._backward

    def poisoned(self: Any, dy: Any, index: int, *rest: Any) -> Any:
        dx, gradients = backward(self, dy, index, *rest)
        if self.optimizer.cur_step >= 4 and "b" in gradients:
            gradients["b"] = gradients["b"] * np.nan
        return dx, gradients

    monkeypatch.setattr(FullyConnected, "_backward", poisoned)
    options = ["--data", data, "--epochs", "4", "--out", "r", "-q", *COMMON]
    assert main(["train", *options]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "NaN or infinity first appeared in layer 4 (FullyConnected 3), backward (gradient of b), step" in said  # fmt: skip
    assert "is kept in r" in said
    good = checkpoint.read(here / "r" / run.CHECKPOINT, "checkpoint")[1]
    assert all(np.isfinite(v).all() for v in good.values())
