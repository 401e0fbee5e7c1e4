"""The loop, the recipe, evaluation, pictures: training as a library."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.layers import Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.models import Sequential
from gpuconv.training import plots, run
from gpuconv.training.evaluation import (
    Evaluation,
    confusion_matrix,
    evaluate,
    format_confusion,
    probabilities,
)
from gpuconv.training.loop import (
    DivergedError,
    EpochEnd,
    EpochRecord,
    Progress,
    StepBegin,
    StepEnd,
    fit,
)
from gpuconv.training.recipe import Recipe, make_network, make_optimizer, network_layers
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import images, network, save, scaled

HELD = scaled(20, seed=1)


def tensors(net: Sequential) -> dict[str, bytes]:
    return {k: v.tobytes() for k, v in {**net.tensors(), **net.state_tensors()}.items()}


def shifted(images: Any, epoch: int, step: int) -> Any:
    return Recipe(seed=5).augment(images, epoch, step)


def train(net: Sequential, **options: Any) -> Progress:
    dtype = options.pop("dtype", "float32")
    held = HELD[0].astype(dtype), HELD[1]
    usual = {"epochs": 3, "batch_size": 16, "seed": 5, "augment": shifted}
    return fit(net, scaled(dtype=dtype), held, **{**usual, **options})


# ------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_learns(dtype: str) -> None:
    net = network()
    progress = train(net, epochs=12, dtype=dtype)
    assert {t.dtype.name for t in net.tensors().values()} == {dtype}
    first, last = progress.history[0], progress.history[-1]
    assert last.train_loss < first.train_loss / 3
    assert last.validation_accuracy >= 0.95
    assert evaluate(net, HELD[0].astype(dtype), HELD[1]).loss == last.validation_loss


def test_events_tell_every_step_and_epoch() -> None:
    events: list[Any] = []
    progress = train(network(), epochs=2, on_event=events.append)
    steps = math.ceil(60 / 16)
    shape = [(StepBegin, StepEnd)] * steps
    kinds = [type(e) for e in events]
    assert kinds == [*(k for pair in shape for k in pair), EpochEnd] * 2
    ends = [e for e in events if isinstance(e, StepEnd)]
    assert [(e.epoch, e.step, e.steps) for e in ends] == [
        (epoch, step, steps) for epoch in (1, 2) for step in range(1, steps + 1)
    ]
    sizes = [16, 16, 16, 12]
    for record, some in zip(progress.history, (ends[:steps], ends[steps:]), strict=True):
        mean = sum(e.loss * n for e, n in zip(some, sizes, strict=True)) / 60
        assert record.train_loss == pytest.approx(mean)
        assert record.train_loss == some[-1].mean_loss
        assert record.train_accuracy == some[-1].mean_accuracy
    assert [e.record for e in events if isinstance(e, EpochEnd)] == progress.history
    assert [r.epoch for r in progress.history] == [1, 2]


def test_the_first_loss_is_that_of_the_first_batch() -> None:
    """Against a loss worked out with NumPy alone."""
    net, losses = network(), []
    x, y = scaled()
    order = np.random.default_rng([5, 0x0DE4, 0]).permutation(60)[:16]
    net.build((1, *x.shape[1:]), "float32")
    z = net.forward(x[order], retain_derived=False).astype("f8")
    want = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(16), y[order]])
    train(net, epochs=1, augment=None, on_event=lambda e: losses.append(getattr(e, "loss", None)))
    assert losses[1] == pytest.approx(want, rel=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    first, second, other, order = network(), network(), network(seed=2), network()
    train(first)
    train(second)
    train(other)
    train(order, seed=6)
    assert tensors(first) == tensors(second)
    assert tensors(first) != tensors(other)
    assert tensors(first) != tensors(order)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stops", [(1,), (2, 3), (4,), (5, 6, 7, 8), (12,)])
def test_interrupted_and_taken_up_again_is_the_same_bit_for_bit(
    stops: tuple[int, ...], dtype: str
) -> None:
    """After any step, with the state through JSON and a network made anew."""
    optimizer = "Adam(lr_scheduler='cosine(0.01, total_steps=12, warmup_steps=4)')"
    whole = network(optimizer)
    want = train(whole, dtype=dtype)

    net, progress, done = network(optimizer), Progress(), 0
    for end in (*stops, 10**9):

        def count(event: Any) -> None:
            nonlocal done
            done += isinstance(event, StepEnd)

        train(net, dtype=dtype, progress=progress, on_event=count, stop=lambda e=end: done >= e)
        assert done == min(end, 12)
        fresh = Sequential.from_config(json.loads(json.dumps(net.config())), device="cpu")
        fresh.set_optimizer(optimizer)
        fresh.build((1, 6, 5, 1), dtype)
        fresh.load_tensors(net.tensors())
        fresh.load_state(json.loads(json.dumps(net.state())), net.state_tensors())
        progress = Progress.from_json(json.loads(json.dumps(progress.to_json())))
        net = fresh
    assert tensors(net) == tensors(whole)
    numbers = [dataclasses.replace(r, seconds=0) for r in progress.history]
    assert numbers == [dataclasses.replace(r, seconds=0) for r in want.history]


@pytest.mark.parametrize("model", ["vgg_small", "resnet20"])
def test_a_run_with_batch_normalisation_is_taken_up_again(model: str, tmp_path: Path) -> None:
    data = str(save(tmp_path / "a.npz"))
    recipe = Recipe(epochs=2, batch_size=16, lr=0.01, model=model)
    made = [run.start(recipe, data, {"device": "cpu", "engine": None, "threads": 1}, "cpu") for _ in range(2)]  # fmt: skip
    made[0].train()
    made[1].train(stop=lambda: made[1].progress.step == 1)
    made[1].save_checkpoint(tmp_path)
    again = run.resume(tmp_path, None, lambda settings: "cpu")
    again.train()
    assert tensors(again.net) == tensors(made[0].net)


def test_a_finished_run_stays_as_it_is() -> None:
    net = network()
    progress = train(net)
    before = tensors(net)
    assert train(net, progress=progress) is progress
    assert tensors(net) == before
    assert len(progress.history) == 3


@pytest.mark.parametrize("optimizer", ["SGD(lr=1e30)", "AdamW(lr=1e38)"])
def test_divergence_is_an_error_that_says_where(optimizer: str) -> None:
    net, seen = network(optimizer), []
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d of epoch 1"):
        train(net, on_event=seen.append)
    assert not any(isinstance(e, StepEnd) and not math.isfinite(e.loss) for e in seen)


def test_divergence_seen_in_the_validation_alone() -> None:
    net = network()
    x = HELD[0].copy()
    x[0] = np.inf
    with pytest.raises(DivergedError, match="the validation loss is nan after epoch 1"):
        fit(net, scaled(), (x, HELD[1]), epochs=1)


X, Y = scaled()
BAD_FITS: dict[str, tuple[Callable[[Sequential], Any], type[Exception], str]] = {
    "no images": (lambda n: fit(n, (X[:0], Y[:0]), HELD, epochs=1), ValueError, r"train: images.*\(0,"),
    "three axes": (lambda n: fit(n, (X[..., 0], Y), HELD, epochs=1), ValueError, "train: images have shape"),
    "held-out empty": (lambda n: fit(n, (X, Y), (X[:0], Y[:0]), epochs=1), ValueError, "validation: images"),
    "too few labels": (lambda n: fit(n, (X, Y[1:]), HELD, epochs=1), ValueError, r"train: labels.*\(60,\)"),
    "float labels": (lambda n: fit(n, (X, Y * 1.0), HELD, epochs=1), ValueError, "train: labels.*integers"),
    "labels a list": (lambda n: fit(n, (X, list(Y)), HELD, epochs=1), ValueError, "train: labels"),
    "label below 0": (lambda n: fit(n, (X, Y - 1), HELD, epochs=1), ValueError, "train: labels hold -1"),
    "label too large": (lambda n: fit(n, (X, Y + 1), HELD, epochs=1), ValueError, "labels hold 3; expected classes 0 to 2"),
    "held-out label": (lambda n: fit(n, (X, Y), (X, Y + 9), epochs=1), ValueError, "validation: labels hold 11"),
    "epochs 0": (lambda n: fit(n, (X, Y), HELD, epochs=0), ValueError, "epochs is 0"),
    "epochs a float": (lambda n: fit(n, (X, Y), HELD, epochs=1.0), TypeError, "epochs is 1.0"),
    "batch 0": (lambda n: fit(n, (X, Y), HELD, epochs=1, batch_size=0), ValueError, "batch_size is 0"),
    "seed negative": (lambda n: fit(n, (X, Y), HELD, epochs=1, seed=-1), ValueError, "seed is -1"),
    "integer images": (lambda n: fit(n, (X.astype(int), Y), HELD, epochs=1), TypeError, "dtype is 'int64'"),
    "progress of another run": (
        lambda n: fit(n, (X, Y), HELD, epochs=1, progress=Progress(step=2)), ValueError, "progress is at step 2; expected less than 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FITS)
def test_wrong_calls_of_fit_change_nothing(name: str) -> None:
    call, error, message = BAD_FITS[name]
    net = network()
    net.build((1, 6, 5, 1), "float32")
    if name == "integer images":
        net = network()  # else its dtype is settled
    before = tensors(net)
    with pytest.raises(error, match=message):
        call(net)
    assert tensors(net) == before


def test_a_network_too_deep_for_its_images_says_which_layer() -> None:
    layers = [Conv2D(2, (3, 3)), Pool2D((2, 2), stride=2), Conv2D(2, (3, 3)), Flatten()]
    net = Sequential([*layers, FullyConnected(3)], device="cpu")
    with pytest.raises(
        ValueError, match=r"layer 2 \(Conv2D\): X has shape .* expected at least the kernel"
    ):
        fit(net, scaled(), HELD, epochs=1)


# ---------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_fits_any_size(channels: int) -> None:
    for rows in (1, 2, 3, 4, 5, 7, 8, 13, 28, 64, 100):
        for columns in (1, 2, 3, 8, 31):
            net = Sequential(network_layers((rows, columns, channels), 7), device="cpu")
            assert net.build((2, rows, columns, channels), "float32") == (2, 7)
            assert net.layers[-1].parameters["W"].shape[0] <= 9 * 128


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 7, 2), (2, 2, 5), (3, 1, 1), (9, 4, 3), (17, 16, 1)]
)
def test_images_of_any_size_train(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    x, y = images(30, shape)
    path = save(tmp_path / "a.npz", X=x, y=y)
    made = run.start(Recipe(epochs=1, batch_size=8), str(path), {}, "cpu")
    made.train()
    assert math.isfinite(made.progress.history[0].train_loss)
    assert made.test().probabilities.shape == (len(made.split.test), 3)


def test_the_schedule_rises_for_an_epoch_and_falls_to_zero() -> None:
    from gpuconv.optimizers import get_optimizer

    recipe = Recipe(epochs=20, batch_size=10, lr=0.5, weight_decay=0.25)
    made = get_optimizer(make_optimizer(recipe, 95))
    assert made.hyperparameters["weight_decay"] == 0.25
    rates = [made.lr_scheduler(step) for step in range(1, 201)]
    assert max(rates) == 0.5 == rates[9]
    assert rates[0] == 0.05
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    for epochs, count in ((1, 3), (1, 1000), (2, 10)):  # short ones have a schedule too
        get_optimizer(make_optimizer(Recipe(epochs=epochs), count))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size is 2.5"),
        ({"lr": 0}, ValueError, "lr is 0; expected a finite number > 0"),
        ({"lr": math.inf}, ValueError, "lr is inf"),
        ({"weight_decay": -1}, ValueError, "weight_decay is -1"),
        ({"shift": -1}, ValueError, "shift is -1"),
        ({"rotate": 200}, ValueError, "rotate is 200"),
        ({"zoom": "a"}, TypeError, "zoom is 'a'"),
        ({"seed": -2}, ValueError, "seed is -2"),
        (
            {"dtype": "int8"},
            ValueError,
            "dtype is 'int8'; expected one of float16, bfloat16, float32, float64",
        ),
    ],
)
def test_a_wrong_recipe_names_the_number(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Recipe(**values)


def test_recipe_and_progress_go_through_json() -> None:
    recipe = Recipe(lr=0.1, seed=3)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    progress = train(network(), epochs=2)
    again = json.loads(json.dumps(progress.to_json()))
    assert Progress.from_json(again) == progress
    for wrong in (None, {}, {**recipe.to_json(), "more": 1}):
        with pytest.raises(ValueError, match="recipe is"):
            Recipe.from_json(wrong)  # type: ignore[arg-type]
    line = again["history"][0]
    for change in (
        {"epoch": -1}, {"step": "1"}, {"seen": True}, {"loss_sum": None}, {"history": {}},
        {"history": [line]}, {"history": [line, line]}, {"history": [{}, {}]}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            Progress.from_json({**again, **change})


# ---------------------------------------------------------------------------------- evaluation


def test_probabilities_do_not_depend_on_the_batch() -> None:
    net = network()
    train(net, epochs=1)
    whole = probabilities(net, HELD[0], 20)
    np.testing.assert_allclose(whole.sum(axis=1), 1)
    assert whole.dtype == np.float64
    for size in (1, 7, 1000):
        np.testing.assert_allclose(probabilities(net, HELD[0], size), whole, rtol=1e-5)
    before = tensors(net)
    found = evaluate(net, *HELD, 7)
    assert tensors(net) == before
    np.testing.assert_array_equal(found.predictions, whole.argmax(axis=1))
    assert found.loss == pytest.approx(-np.log(whole[np.arange(20), HELD[1]]).mean(), rel=1e-5)
    assert found.accuracy == np.mean(found.predictions == HELD[1])
    with pytest.raises(ValueError, match="labels hold 3; expected 0 to 2"):
        evaluate(net, HELD[0], HELD[1] + 1)


def test_confusion() -> None:
    counts = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 3)
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 1, 0], [2, 0, 0]])
    text = format_confusion(counts, (-3, 4, 900)).splitlines()
    assert text[0].split() == ["label", "|", "predicted"]
    assert text[1].split() == ["|", "-3", "4", "900"]
    assert text[3].split() == ["-3", "|", "1", "1", "."]
    assert text[5].split() == ["900", "|", "2", ".", "."]
    assert len({len(line) for line in text[1:]}) == 1
    wide = np.eye(50, dtype=int)
    assert format_confusion(wide, tuple(range(50))) == "no image was taken for another class"
    wide[7, 9], wide[1, 2] = 5, 2
    assert format_confusion(wide, tuple(range(50))).splitlines() == [
        "most frequent confusions (2):",
        "  7 taken for 9: 5",
        "  1 taken for 2: 2",
    ]


# ------------------------------------------------------------------------------------ pictures


def record(epoch: int, wrong: float) -> EpochRecord:
    return EpochRecord(epoch, 1 / epoch, 1 - wrong, 0.5 / epoch, 1 - wrong / 2, 0.1)


def answers(labels: np.ndarray, wrong: int) -> Evaluation:
    chances = np.full((len(labels), 3), 0.1)
    taken = labels.copy()
    taken[:wrong] = (taken[:wrong] + 1) % 3
    chances[np.arange(len(labels)), taken] = 0.8
    return Evaluation(0.3, 1 - wrong / len(labels), chances, taken)


def picture_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize("wrong", [(0.5, 0.2, 0.0), (0.0,), (0.3,) * 100])
def test_curves_are_drawn(tmp_path: Path, wrong: tuple[float, ...]) -> None:
    history = [record(k + 1, w) for k, w in enumerate(wrong)]
    for missed in (0, 2):
        plots.plot_curves(tmp_path / "a.png", "title", history, answers(np.arange(9) % 3, missed))
        assert picture_size(tmp_path / "a.png") == (1200, 504)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 9, 3), (1, 1, 2), (30, 4, 4)])
@pytest.mark.parametrize("wrong", [0, 1, 7, 40])
def test_mistakes_are_drawn(tmp_path: Path, shape: tuple[int, int, int], wrong: int) -> None:
    x, _ = images(45, shape)
    labels = np.arange(45) % 3
    plots.plot_mistakes(tmp_path / "a.png", x, labels, (-3, 4, 9), answers(labels, wrong))
    width, height = picture_size(tmp_path / "a.png")
    assert width >= 600
    assert height >= 250


def test_flat_and_huge_images_are_drawn(tmp_path: Path) -> None:
    for x in (np.full((6, 4, 4, 1), 7), np.array([-1e308, 1e308] * 48).reshape(6, 4, 4, 1)):
        plots.plot_mistakes(
            tmp_path / "a.png", x, np.zeros(6, int), (0, 1, 2), answers(np.zeros(6, int), 2)
        )


# --------------------------------------------------------------------------- engines and devices


def losses(net: Sequential, steps: int, dtype: str) -> list[float]:
    found: list[float] = []
    x, y = scaled(24, dtype)

    def note(event: Any) -> None:
        if isinstance(event, StepEnd):
            found.append(event.loss)

    fit(
        net,
        (x, y),
        (x[:4], y[:4]),
        epochs=1,
        batch_size=24 // steps,
        augment=shifted,
        on_event=note,
        interval=1,
    )
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_engines_agree_on_the_losses(dtype: str) -> None:
    found = []
    for name in ("naive", "numpy_gemm"):
        with gpuconv.engine(name):
            net = make_network(Recipe(dtype=dtype), (6, 5, 1), 3, 24, "cpu")
            found.append(losses(net, 4, dtype))
    np.testing.assert_allclose(*found, rtol=1e-3 if dtype == "float32" else 1e-10)


@pytest.fixture
def needs_compiler() -> None:
    if reason := compiler_available():
        pytest.skip(reason)


needs = pytest.mark.usefixtures("needs_compiler")


@needs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_few_steps_on_a_cuda_device_have_the_losses_of_numpy(dtype: str) -> None:
    """The very loop of the command, with the kernels run on the CPU in the place of a GPU."""
    recipe = Recipe(dtype=dtype)
    want = losses(make_network(recipe, (6, 5, 1), 3, 24, "cpu"), 4, dtype)
    with stand_in() as cp, gpuconv.engine("cuda_atomic"):
        net = make_network(recipe, (6, 5, 1), 3, 24, "cuda")
        found = losses(net, 4, dtype)
        assert all(isinstance(p, cp.ndarray) for p in net.parameters.values())
    np.testing.assert_allclose(found, want, rtol=2e-3 if dtype == "float32" else 1e-9)


@needs
def test_what_was_trained_on_a_cuda_device_predicts_on_the_cpu(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", X=images(30)[0], y=images(30)[1])
    with stand_in():
        made = run.start(Recipe(epochs=1, batch_size=16), str(path), {}, "cuda")
        made.train()
        test = made.test()
        made.save_model(tmp_path)
    net, info = run.load_model(tmp_path, "cpu")
    x = info.scaling.apply(made.data.images[made.split.test], info.dtype)
    np.testing.assert_allclose(probabilities(net, x), test.probabilities, rtol=1e-3)
