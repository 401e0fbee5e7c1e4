"""Learning rates against closed forms, PyTorch's schedulers, and a simulation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpuconv import schedulers
from gpuconv.schedulers import (
    ConstantScheduler,
    CosineScheduler,
    ExponentialScheduler,
    KingScheduler,
    NoamScheduler,
    Scheduler,
    StepScheduler,
    get_scheduler,
)

ALL = [
    ConstantScheduler(0.2),
    ExponentialScheduler(0.5, 10, True, 0.3),
    StepScheduler(0.5, 7, 0.2),
    CosineScheduler(0.3, 50, 5, 0.01),
    NoamScheduler(64, 2.0, 30),
    KingScheduler(0.1, 20, 0.9),
]
each = pytest.mark.parametrize("scheduler", ALL, ids=str)
rates = st.floats(1e-6, 10)
steps = st.integers(1, 5000)


@given(steps, rates)
def test_constant(step, lr):
    assert ConstantScheduler(lr)(step) == lr


@given(steps, rates, st.integers(1, 900), st.floats(0.01, 1.5))
def test_exponential(step, lr, length, decay):
    step = min(step, 100 * length)  # within what a float holds
    smooth = ExponentialScheduler(lr, length, False, decay)(step)
    want = math.log(lr) + step / length * math.log(decay)
    assert math.log(smooth) == pytest.approx(want, rel=1e-12, abs=1e-9)
    stairs = ExponentialScheduler(lr, length, True, decay)
    assert stairs(step) == stairs(step // length * length)
    assert stairs(length) == pytest.approx(lr * decay)
    assert stairs(step) == StepScheduler(lr, length, decay)(step)


def test_step_is_pytorchs():
    torch = pytest.importorskip("torch")
    ours = StepScheduler(0.5, 7, 0.2)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.2)
    for step in range(40):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_cosine_is_pytorchs():
    torch = pytest.importorskip("torch")
    ours = CosineScheduler(0.3, 50, 0, 0.02)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, 0.02)
    for step in range(51):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_warms_up_and_ends():
    s = CosineScheduler(0.4, 100, 20, 0.05)
    assert [s(k) for k in range(1, 21)] == pytest.approx([0.4 * k / 20 for k in range(1, 21)])
    assert s(60) == pytest.approx((0.4 + 0.05) / 2)
    assert s(100) == pytest.approx(0.05)
    assert s(10**6) == pytest.approx(0.05)
    falling = [s(k) for k in range(20, 101)]
    assert falling == sorted(falling, reverse=True)
    assert CosineScheduler(0.4, 100)(1) == pytest.approx(0.4, rel=1e-3)


@given(st.integers(1, 10**6), st.integers(1, 2000), st.floats(0.1, 4), st.integers(1, 10**5))
def test_noam(step, dim, scale, warmup):
    s = NoamScheduler(dim, scale, warmup)
    want = scale / math.sqrt(dim) * min(1 / math.sqrt(step), step / warmup**1.5)
    assert s(step) == pytest.approx(want, rel=1e-12)
    assert s(warmup) >= s(step) * (1 - 1e-12)
    assert s(0) == s(1)


# --------------------------------------------------------------------------------- King


def probability_of_fall(losses: np.ndarray) -> float:
    """Return the probability that the slope of a line through the losses is negative."""
    fit = stats.linregress(np.arange(len(losses)), losses)
    return float(stats.norm.cdf(0, fit.slope, math.sqrt(fit.stderr**2 + np.finfo(float).eps)))


def simulate(losses, lr, patience, decay):
    """Return the rate after each loss by the rule's own words."""
    seen, found = [], []
    for loss in losses:
        seen.append(loss)
        kept = np.array(seen[-math.ceil(1.1 * (patience + 1)) :])
        stalled = []
        for history in (kept, kept[kept <= np.quantile(kept, 0.9)]):
            last = history[-(patience + 1) :]
            stalled.append(len(last) == patience + 1 and probability_of_fall(last) < 0.51)
        if all(stalled):
            lr *= decay
        found.append(lr)
    return found


@pytest.mark.parametrize("patience", [5, 20])
@pytest.mark.parametrize("fall", [0.0, 0.01, 0.2])
def test_king_follows_its_rule(patience, fall):
    rng = np.random.default_rng(patience)
    losses = 5 + np.exp(-fall * np.arange(150)) + 0.1 * rng.standard_normal(150)
    losses[::17] += 3
    king = KingScheduler(0.1, patience, 0.9)
    got = [king(k, float(v)) for k, v in enumerate(losses, 1)]
    assert got == pytest.approx(simulate(losses, 0.1, patience, 0.9), rel=1e-12)
    assert got[-1] < 0.1


def test_king_waits_while_the_loss_falls():
    king = KingScheduler(0.1, 10, 0.5)
    assert {king(k, 10.0 - 0.05 * k) for k in range(1, 100)} == {0.1}
    after = [king(k, 5.0 + 0.001 * k) for k in range(100, 140)]
    assert after[-1] < 0.1


def test_king_goes_on_from_its_state():
    rng = np.random.default_rng(3)
    losses = rng.random(80)
    whole, first = KingScheduler(0.1, 8, 0.9), KingScheduler(0.1, 8, 0.9)
    want = [whole(k, float(v)) for k, v in enumerate(losses)]
    got = [first(k, float(v)) for k, v in enumerate(losses[:40])]
    second = first.fresh()
    assert second.current_lr == 0.1
    second.load_state(json.loads(json.dumps(first.state())))
    got += [second(k, float(v)) for k, v in enumerate(losses[40:])]
    assert got == want
    assert want[-1] < 0.1


@pytest.mark.parametrize(
    ("loss", "error"), [(None, TypeError), (math.nan, ValueError), ("1", TypeError)]
)
def test_king_wants_a_loss(loss, error):
    king = KingScheduler(0.1, 8)
    before = king.state()
    with pytest.raises(error, match="cur_loss is"):
        king(1, loss)
    assert king.state() == before


# --------------------------------------------------------------------- states and names


@each
def test_text_and_back(scheduler):
    again = get_scheduler(str(scheduler))
    assert type(again) is type(scheduler)
    assert again.hyperparameters == scheduler.hyperparameters
    assert repr(again) == str(scheduler)
    assert again.hyperparameters["id"] == type(scheduler).__name__


@each
def test_states(scheduler):
    fresh = scheduler.fresh()
    assert fresh is not scheduler
    assert fresh.hyperparameters == scheduler.hyperparameters
    fresh.load_state(json.loads(json.dumps(scheduler.state())))
    assert fresh.state() == scheduler.state()
    before = fresh.state()
    for wrong, error in (([], TypeError), ({"other": 1}, ValueError), (None, TypeError)):
        with pytest.raises(error, match=r"^state "):
            fresh.load_state(wrong)
    assert fresh.state() == before


@pytest.mark.parametrize(
    "state",
    [{"current_lr": -1.0, "loss_history": []}, {"current_lr": "1", "loss_history": []},
     {"current_lr": 1.0, "loss_history": 3}, {"current_lr": 1.0, "loss_history": [1.0, None]},
     {"current_lr": 1.0, "loss_history": [math.inf]}, {"current_lr": 1.0}],
)  # fmt: skip
def test_wrong_states_change_nothing(state):
    king = KingScheduler(0.1, 8)
    king(1, 2.5)
    before = king.state()
    with pytest.raises((TypeError, ValueError), match="expected"):
        king.load_state(state)
    assert king.state() == before


@pytest.mark.parametrize(
    ("text", "cls", "values"),
    [
        ("constant", ConstantScheduler, {"lr": 0.01}),
        ("ConstantScheduler(lr=0.5)", ConstantScheduler, {"lr": 0.5}),
        ("exponential(0.1, stage_length=5)", ExponentialScheduler,
         {"initial_lr": 0.1, "stage_length": 5, "staircase": False, "decay": 0.1}),
        ("step(decay=0.5)", StepScheduler, {"decay": 0.5}),
        ("cosine(total_steps=9)", CosineScheduler, {"total_steps": 9, "warmup_steps": 0}),
        ("Noam Scheduler(model_dim=8)", NoamScheduler, {"model_dim": 8, "warmup_steps": 4000}),
        ("king_scheduler(patience=3)", KingScheduler, {"patience": 3, "decay": 0.99}),
    ],
)  # fmt: skip
def test_names(text, cls, values):
    made = get_scheduler(text)
    assert type(made) is cls
    assert made.hyperparameters.items() >= values.items()


def test_the_rate_to_start_from():
    assert get_scheduler(None)(1) == 0.01
    assert get_scheduler(None, 0.7)(1) == 0.7
    assert get_scheduler("constant", 0.7)(1) == 0.7
    assert get_scheduler("step", 0.7).initial_lr == 0.7
    assert get_scheduler("step(0.3)", 0.7).initial_lr == 0.3
    assert get_scheduler("step(initial_lr=0.3)", 0.7).initial_lr == 0.3
    assert get_scheduler("noam", 0.7).scale_factor == 1.0
    given = StepScheduler(0.3)
    assert get_scheduler(given, 0.7) is given


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("linear", ValueError, "lr_scheduler is 'linear'; expected one of ConstantScheduler, "),
        ("step(length=3)", ValueError, "its arguments do not fit StepScheduler.*length"),
        ("step(stage_length=0)", ValueError, "stage_length is 0; expected an integer of at least"),
        ("step(decay=0)", ValueError, "decay is 0; expected a finite number > 0"),
        ("king(decay=1.5)", ValueError, "decay is 1.5; expected a finite number > 0 and <= 1"),
        ("constant(lr=-1)", ValueError, "lr is -1; expected a finite number >= 0"),
        ("cosine(total_steps=5, warmup_steps=5)", ValueError, "warmup_steps is 5; expected less"),
        ("exponential(staircase=1)", ValueError, "staircase is 1; expected True or False"),
        ("step(", ValueError, "expected a name or a call"),
        (0.1, TypeError, "lr_scheduler is 0.1; expected a Scheduler, its text, or None"),
        (StepScheduler, TypeError, "expected a Scheduler, its text, or None"),
    ],
)  # fmt: skip
def test_wrong_names(spec, error, message):
    with pytest.raises(error, match=message):
        get_scheduler(spec)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [(ConstantScheduler, ("0.1",)), (ConstantScheduler, (math.inf,)),
     (ExponentialScheduler, (0.1, 2.5)), (ExponentialScheduler, (0.1, True)),
     (NoamScheduler, (0,)), (NoamScheduler, (8, -1.0)), (KingScheduler, (0.1, 1)),
     (CosineScheduler, (0.1, 10, -1)), (CosineScheduler, (0.1, 10, 0, None))],
)  # fmt: skip
def test_wrong_parameters(cls, arguments):
    with pytest.raises((TypeError, ValueError), match=r" is .*; expected "):
        cls(*arguments)


def test_a_scheduler_of_ones_own():
    class Half(Scheduler):
        def __init__(self, start: float = 1.0) -> None:
            self.start = start

        def learning_rate(self, step, cur_loss=None):
            return self.start / 2**step

    assert get_scheduler(Half(3.0))(2) == 0.75
    assert str(Half(3.0)) == "Half(start=3.0)"
    assert Half(3.0).fresh()(1) == 1.5


def test_all_are_tested():
    assert {type(s) for s in ALL} == set(schedulers._CLASSES)
