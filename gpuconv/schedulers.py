"""Learning rates as functions of the step; names and defaults are numpy-ml's where it has them.

Steps count from 1: the first update is step 1.
"""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from gpuconv.arguments import boolean, integer, normal_name, parse_call, real

__all__ = [
    "ConstantScheduler",
    "CosineScheduler",
    "ExponentialScheduler",
    "KingScheduler",
    "NoamScheduler",
    "Scheduler",
    "StepScheduler",
    "get_scheduler",
]


class Scheduler(abc.ABC):
    """A learning rate for each step."""

    #: Whether :meth:`learning_rate` wants the loss.
    needs_loss: ClassVar[bool] = False

    def __call__(self, step: int = 0, cur_loss: float | None = None) -> float:
        """Return the learning rate of this step."""
        return self.learning_rate(step, cur_loss)

    @abc.abstractmethod
    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Return the learning rate of this step.

        Parameters
        ----------
        step : int
            The number of the update, from 1.
        cur_loss : float, optional
            The loss of the current batch, for schedulers that follow it.
        """

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the class's name as ``id``."""
        names = inspect.signature(type(self)).parameters
        return {"id": type(self).__name__} | {n: getattr(self, n) for n in names}

    def fresh(self) -> Scheduler:
        """Return a scheduler with the same hyperparameters that has seen nothing."""
        values = self.hyperparameters
        del values["id"]
        return type(self)(**values)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load_state` needs to go on exactly, as JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned.

        Raises
        ------
        TypeError, ValueError
            If it is not such a state; nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {state!r}; expected the mapping that state() returns")
        if set(state) != set(self.state()):
            raise ValueError(
                f"state has the keys {sorted(map(str, state))}; "
                f"expected {sorted(self.state())}, those of {type(self).__name__}"
            )

    def __str__(self) -> str:
        values = self.hyperparameters
        return f"{values.pop('id')}({', '.join(f'{k}={v!r}' for k, v in values.items())})"

    def __repr__(self) -> str:
        return str(self)


class ConstantScheduler(Scheduler):
    """Always ``lr``."""

    def __init__(self, lr: float = 0.01) -> None:
        self.lr = real("lr", lr, 0)

    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Return ``lr``."""
        return self.lr


class ExponentialScheduler(Scheduler):
    """``initial_lr * decay ** (step / stage_length)``.

    With ``staircase`` the exponent is rounded down, so the rate falls at stage ends only.
    """

    def __init__(
        self,
        initial_lr: float = 0.01,
        stage_length: int = 500,
        staircase: bool = False,
        decay: float = 0.1,
    ) -> None:
        self.initial_lr = real("initial_lr", initial_lr, 0)
        self.stage_length = integer("stage_length", stage_length, 1)
        self.staircase = boolean("staircase", staircase)
        self.decay = real("decay", decay, 0, above=True)

    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Return the decayed rate."""
        stage = step // self.stage_length if self.staircase else step / self.stage_length
        return float(self.initial_lr * self.decay**stage)


class StepScheduler(Scheduler):
    """``initial_lr * decay ** (step // stage_length)``: falls once a stage."""

    def __init__(
        self, initial_lr: float = 0.01, stage_length: int = 500, decay: float = 0.1
    ) -> None:
        self.initial_lr = real("initial_lr", initial_lr, 0)
        self.stage_length = integer("stage_length", stage_length, 1)
        self.decay = real("decay", decay, 0, above=True)

    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Return the rate of the stage."""
        return float(self.initial_lr * self.decay ** (step // self.stage_length))


class CosineScheduler(Scheduler):
    """Half a cosine from ``initial_lr`` down to ``final_lr``, after a linear warm-up [1]_.

    Parameters
    ----------
    initial_lr : float
        The highest rate, reached at the end of the warm-up.
    total_steps : int
        Updates until ``final_lr``, the warm-up included; the rate stays there afterwards.
    warmup_steps : int
        Updates over which the rate rises from ``initial_lr / warmup_steps``; fewer than
        ``total_steps``.
    final_lr : float
        The last rate.

    References
    ----------
    .. [1] Loshchilov, Hutter: SGDR: stochastic gradient descent with warm restarts (2017).
    """

    def __init__(
        self,
        initial_lr: float = 0.01,
        total_steps: int = 1000,
        warmup_steps: int = 0,
        final_lr: float = 0.0,
    ) -> None:
        self.initial_lr = real("initial_lr", initial_lr, 0)
        self.total_steps = integer("total_steps", total_steps, 1)
        self.warmup_steps = integer("warmup_steps", warmup_steps, 0)
        self.final_lr = real("final_lr", final_lr, 0)
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"warmup_steps is {warmup_steps}; expected less than total_steps, {total_steps}"
            )

    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Return the rate of this step."""
        if step <= self.warmup_steps:
            return self.initial_lr * max(step, 1) / max(self.warmup_steps, 1)
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        weight = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.final_lr + (self.initial_lr - self.final_lr) * weight


class NoamScheduler(Scheduler):
    """``scale_factor * model_dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)`` [1]_.

    .. [1] Vaswani et al.: Attention is all you need (2017).
    """

    def __init__(
        self, model_dim: int = 512, scale_factor: float = 1.0, warmup_steps: int = 4000
    ) -> None:
        self.model_dim = integer("model_dim", model_dim, 1)
        self.scale_factor = real("scale_factor", scale_factor, 0)
        self.warmup_steps = integer("warmup_steps", warmup_steps, 1)

    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Return the rate of this step; a step below 1 counts as 1."""
        step = max(step, 1)
        rise = step * self.warmup_steps**-1.5
        return float(self.scale_factor * self.model_dim**-0.5 * min(step**-0.5, rise))


class KingScheduler(Scheduler):
    """Multiply the rate by ``decay`` whenever the loss has stopped to fall [1]_.

    A line is fitted to the last ``patience + 1`` losses. Where the probability that its slope
    is negative is under 0.51, both with all losses and with the largest tenth left out, the
    loss is taken to have stopped.

    References
    ----------
    .. [1] King: Automatic learning rate scheduling that really works,
       http://blog.dlib.net/2018/02/automatic-learning-rate-scheduling-that.html
    """

    needs_loss = True

    def __init__(self, initial_lr: float = 0.01, patience: int = 1000, decay: float = 0.99) -> None:
        self.initial_lr = real("initial_lr", initial_lr, 0)
        self.patience = integer("patience", patience, 2)
        self.decay = real("decay", decay, 0, 1, above=True)
        self.current_lr = self.initial_lr
        self.loss_history: list[float] = []

    def learning_rate(self, step: int, cur_loss: float | None = None) -> float:
        """Take the loss in and return the rate.

        Raises
        ------
        TypeError, ValueError
            If ``cur_loss`` is not a finite number.
        """
        kept = math.ceil(1.1 * (self.patience + 1))
        loss = real("cur_loss", cur_loss)
        self.loss_history = [*self.loss_history[-kept + 1 :], loss]
        losses = np.array(self.loss_history)
        if self._stalled(losses) and self._stalled(losses[losses <= np.quantile(losses, 0.9)]):
            self.current_lr *= self.decay
        return self.current_lr

    def _stalled(self, losses: np.ndarray[Any, Any]) -> bool:
        count = self.patience + 1
        if len(losses) < count:
            return False
        last = losses[-count:]
        time = np.arange(count) - (count - 1) / 2
        spread = float(time @ time)
        slope = float(time @ last) / spread
        residual = last - last.mean() - slope * time
        variance = float(residual @ residual) / (count - 2) / spread
        score = -slope / math.sqrt(variance + np.finfo(float).eps)
        return (1 + math.erf(score / math.sqrt(2))) / 2 < 0.51

    def state(self) -> dict[str, Any]:
        """Return the rate and the losses."""
        return {"current_lr": self.current_lr, "loss_history": list(self.loss_history)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the rate and the losses."""
        super().load_state(state)
        rate = real("current_lr", state["current_lr"], 0)
        if not isinstance(state["loss_history"], (list, tuple)):
            raise TypeError(f"loss_history is {state['loss_history']!r}; expected a list")
        losses = [real("loss_history", v) for v in state["loss_history"]]
        self.current_lr, self.loss_history = rate, losses


_CLASSES: tuple[type[Scheduler], ...] = (
    ConstantScheduler, ExponentialScheduler, StepScheduler, CosineScheduler, NoamScheduler,
    KingScheduler,
)  # fmt: skip
_BY_NAME = {normal_name(c.__name__): c for c in _CLASSES}
_BY_NAME |= {key.removesuffix("scheduler"): c for key, c in _BY_NAME.items()}


def get_scheduler(spec: Scheduler | str | None, lr: float | None = None) -> Scheduler:
    """Return the scheduler that ``spec`` names.

    Parameters
    ----------
    spec : Scheduler, str or None
        A scheduler, returned as it is; or text such as ``"cosine(total_steps=1000)"`` or
        ``"ExponentialScheduler(decay=0.5)"``; or None for a constant rate.
    lr : float, optional
        The rate to start from where the text does not say it.

    Raises
    ------
    TypeError, ValueError
        If the name or its arguments are unknown.
    """
    labels = ", ".join(c.__name__ for c in _CLASSES)
    if spec is None:
        return ConstantScheduler() if lr is None else ConstantScheduler(lr)
    if isinstance(spec, Scheduler):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"lr_scheduler is {spec!r}; expected a Scheduler, its text, or None")
    cls, arguments, options = parse_call("lr_scheduler", spec, _BY_NAME, labels)
    first = next(iter(inspect.signature(cls).parameters))
    if lr is not None and first in ("lr", "initial_lr") and not arguments:
        options.setdefault(first, lr)
    try:
        return cls(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler is {spec!r}; its arguments do not fit {cls.__name__}: {error}"
        ) from None
