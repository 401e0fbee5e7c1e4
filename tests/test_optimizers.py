"""Optimizers against PyTorch and against their formulas; state, text, wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuconv.optimizers import SGD, AdaGrad, Adam, AdamW, Optimizer, RMSProp, get_optimizer
from gpuconv.schedulers import ExponentialScheduler

RNG = np.random.default_rng(0)
ALL = [SGD, AdaGrad, RMSProp, Adam, AdamW]


def run(optimizer: Optimizer, start: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    param = start
    for gradient in gradients:
        optimizer.step()
        param = optimizer(param, gradient, "W")
    return param


@pytest.mark.parametrize(
    ("own", "name", "options"),
    [
        (SGD(lr=0.1), "SGD", {"lr": 0.1}),
        (RMSProp(lr=0.01, decay=0.8, eps=1e-6), "RMSprop", {"lr": 0.01, "alpha": 0.8, "eps": 1e-6}),
        (AdaGrad(lr=0.05, eps=1e-6), "Adagrad", {"lr": 0.05, "eps": 1e-6}),
        (Adam(0.01, 0.8, 0.99, 1e-6), "Adam", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
        (AdamW(0.01, 0.8, 0.99, 1e-6, 0.1), "AdamW",
         {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_against_pytorch(own: Optimizer, name: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    start = RNG.standard_normal((3, 4))
    gradients = [RNG.standard_normal((3, 4)) for _ in range(7)]
    param = torch.tensor(start, requires_grad=True)
    theirs = getattr(torch.optim, name)([param], **options)
    for gradient in gradients:
        param.grad = torch.tensor(gradient)
        theirs.step()
    np.testing.assert_allclose(run(own, start, gradients), param.detach().numpy(), atol=1e-12)


def test_momentum_keeps_the_last_step() -> None:
    optimizer = SGD(lr=0.1, momentum=0.5)
    gradients = [np.array([1.0]), np.array([2.0]), np.array([0.0])]
    # v = 0.1, then 0.05 + 0.2, then 0.125
    assert run(optimizer, np.array([1.0]), gradients) == pytest.approx(1 - 0.1 - 0.25 - 0.125)


@pytest.mark.parametrize("cls", ALL)
def test_clipping_scales_long_gradients_only(cls: type[Optimizer]) -> None:
    start = RNG.standard_normal(5)
    short, long = np.full(5, 0.01), np.full(5, 100.0)
    limit = 0.5
    clipped = cls(clip_norm=limit)
    plain = cls()
    np.testing.assert_array_equal(
        run(clipped, start, [short, short]), run(plain, start, [short, short])
    )
    clipped, plain = cls(clip_norm=limit), cls()
    scaled = long * limit / np.linalg.norm(long)
    np.testing.assert_allclose(run(clipped, start, [long]), run(plain, start, [scaled]))
    zero = np.zeros(5)
    assert np.isfinite(run(cls(clip_norm=limit), start, [zero])).all()


@pytest.mark.parametrize("cls", ALL)
def test_arguments_are_not_changed_and_dtype_stays(cls: type[Optimizer]) -> None:
    param, gradient = np.ones(4, "float32"), np.full(4, 2, "float32")
    optimizer = cls()
    for _ in range(3):
        optimizer.step()
        new = optimizer(param, gradient, "W")
    assert new.dtype == np.float32
    assert (param == 1).all()
    assert (gradient == 2).all()
    for entry in optimizer.cache.values():
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            assert isinstance(value, int) or value.dtype == np.float32


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("scheduler", [None, "KingScheduler(patience=2)", "cosine(total_steps=9)"])
def test_state_goes_on_exactly(cls: type[Optimizer], scheduler: str | None) -> None:
    start = RNG.standard_normal((2, 3))
    gradients = [RNG.standard_normal((2, 3)) for _ in range(6)]
    losses = [3.0, 2.0, 2.5, 2.6, 2.7, 2.8]

    def go(optimizer: Optimizer, param: np.ndarray, part: slice) -> np.ndarray:
        for gradient, loss in zip(gradients[part], losses[part], strict=True):
            optimizer.step()
            param = optimizer(param, gradient, "W", loss)
        return param

    whole = go(cls(lr_scheduler=scheduler), start, slice(None))
    first = cls(lr_scheduler=scheduler)
    half = go(first, start, slice(3))
    state, arrays = first.state()
    import json

    second = first.fresh()
    assert second.cache == {}
    assert second.cur_step == 0
    second.load_state(json.loads(json.dumps(state)), {k: v.copy() for k, v in arrays.items()})
    np.testing.assert_array_equal(go(second, half, slice(3, None)), whole)


def test_a_step_has_one_rate_for_all_parameters() -> None:
    optimizer = SGD(lr=1.0, lr_scheduler="KingScheduler(initial_lr=1.0, patience=2, decay=0.5)")
    for loss in (1.0, 1.0, 1.0, 1.0):
        optimizer.step()
        for name in ("W", "b"):
            optimizer(np.zeros(1), np.zeros(1), name, loss)
    assert len(optimizer.lr_scheduler.state()["loss_history"]) == 4


def test_schedules_count_from_one() -> None:
    optimizer = SGD(lr_scheduler=ExponentialScheduler(initial_lr=1.0, stage_length=1, decay=0.5))
    rates = []
    for _ in range(3):
        optimizer.step()
        rates.append(optimizer.learning_rate())
    assert rates == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    "text",
    [
        "SGD", "sgd(momentum=0.9)", "Adam(lr=0.01, decay1=0.5)", "adagrad(0.2)",
        "AdamW(weight_decay=0.1, lr_scheduler=CosineScheduler(initial_lr=0.1, total_steps=10))",
        "RMSProp(lr=0.001, eps=1e-07, decay=0.9, clip_norm=None, lr_scheduler=ConstantScheduler(lr=0.001))",
    ],
)  # fmt: skip
def test_text_goes_round(text: str) -> None:
    made = get_optimizer(text)
    again = get_optimizer(str(made))
    assert type(again) is type(made)
    assert again.hyperparameters == made.hyperparameters
    from_dict = get_optimizer({"cache": {"W": np.ones(2)}, "hyperparameters": made.hyperparameters})
    assert from_dict.hyperparameters == made.hyperparameters
    assert (from_dict.cache["W"] == 1).all()


def test_a_new_rate_is_followed() -> None:
    optimizer = get_optimizer("SGD(lr=0.5)")
    optimizer.set_params({"lr": 0.25, "unknown": 3})
    optimizer.step()
    assert optimizer(np.zeros(1), np.ones(1), "W") == pytest.approx(-0.25)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": (lambda: get_optimizer("LBFGS"), ValueError, "expected one of SGD, AdaGrad"),
    "a number": (lambda: get_optimizer(3), TypeError, "optimizer is 3"),
    "an argument": (lambda: get_optimizer("SGD(beta=1)"), ValueError, "do not fit SGD"),
    "Adam's argument": (lambda: Adam(weight_decay=1), TypeError, "weight_decay"),
    "no call": (lambda: get_optimizer("SGD(lr=)"), ValueError, "optimizer is"),
    "code": (lambda: get_optimizer("SGD(lr=__import__('os').getpid())"), ValueError, "optimizer is"),
    "rate negative": (lambda: SGD(lr=-1), ValueError, "lr is -1"),
    "rate NaN": (lambda: Adam(lr=float("nan")), ValueError, "lr is nan"),
    "rate text": (lambda: Adam(lr="fast"), TypeError, "lr is 'fast'"),
    "momentum": (lambda: SGD(momentum=2), ValueError, "momentum is 2"),
    "decay": (lambda: Adam(decay2=1), ValueError, "decay2 is 1"),
    "eps": (lambda: AdaGrad(eps=0), ValueError, "eps is 0"),
    "clip": (lambda: SGD(clip_norm=0), ValueError, "clip_norm is 0"),
    "decay of weights": (lambda: AdamW(weight_decay=-1), ValueError, "weight_decay is -1"),
    "dict without id": (lambda: get_optimizer({"cache": {}}), ValueError, "hold an 'id'"),
    "dict of another": (
        lambda: get_optimizer({"hyperparameters": {"id": "X"}}), ValueError, "optimizer is 'X'",
    ),
    "shapes": (lambda: SGD()(np.ones(3), np.ones(2), "W"), ValueError, "param_grad has shape"),
    "state": (lambda: SGD().load_state({}, {}), ValueError, "state is not"),
    "state's step": (
        lambda: SGD().load_state({"cur_step": -1, "scheduler": {}, "numbers": {}}, {}),
        ValueError, "cur_step is -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
