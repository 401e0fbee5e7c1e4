"""The training loop: steps, epochs, and the events by which others follow them.

Nothing is printed or written here. Everything random follows from the seed and the position,
and all that a run knows beside the network's own state is in :class:`Progress`; so a run that
is stopped after any step, saved, and taken up again gives the same weights bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from gpuconv.arguments import integer, real
from gpuconv.device import asarray, asnumpy
from gpuconv.losses import CrossEntropy
from gpuconv.models import Sequential
from gpuconv.profiling import ranges
from gpuconv.profiling.ranges import REST, STEP
from gpuconv.training.data import epoch_order
from gpuconv.training.evaluation import evaluate

__all__ = ["DivergedError", "EpochEnd", "EpochRecord", "Event", "Progress", "StepBegin", "StepEnd", "fit"]  # fmt: skip

Array = Any


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number; the message says where."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to.

    Attributes
    ----------
    epoch : int
        From 1.
    train_loss, train_accuracy : float
        Means over the epoch's steps, each before its update and on the images as they were augmented.
    validation_loss, validation_accuracy : float
        After the epoch.
    seconds : float
        Of the steps and the validation; what an interruption cut off is not in it.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass
class Progress:
    """How far a run is.

    Attributes
    ----------
    epoch, step : int
        Finished epochs, and finished steps of the epoch under way.
    loss_sum : float
        Of the epoch under way: the loss times the images, added up.
    correct, seen : int
        Of the epoch under way: images classified rightly, and images.
    seconds : float
        Of the epoch under way.
    history : list of EpochRecord
        One for each finished epoch.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Return what :meth:`to_json` wrote.

        Raises
        ------
        TypeError, ValueError
            If a part is missing, unknown, or not of its kind.
        """
        _same_names("progress", values, cls)
        counts = {n: integer(n, values[n], 0) for n in ("epoch", "step", "correct", "seen")}
        sums = {n: real(n, values[n], 0) for n in ("loss_sum", "seconds")}
        history = []
        if not isinstance(values["history"], list):
            raise TypeError("history is no list")
        for number, line in enumerate(values["history"], start=1):
            _same_names("history", line, EpochRecord)
            if integer("epoch", line["epoch"], 1) != number:
                raise ValueError(f"history has epoch {line['epoch']} in place {number}")
            numbers = {n: real(n, v, 0) for n, v in line.items() if n != "epoch"}
            history.append(EpochRecord(epoch=number, **numbers))
        if len(history) != counts["epoch"]:
            raise ValueError(f"history has {len(history)} epochs; expected {counts['epoch']}")
        return cls(**counts, **sums, history=history)  # type: ignore[arg-type]


def _same_names(what: str, values: Any, cls: type) -> None:
    known = {f.name for f in fields(cls)}
    if not isinstance(values, Mapping) or set(values) != known:
        raise ValueError(f"{what} is {values!r}; expected a mapping of {', '.join(sorted(known))}")


@dataclass(frozen=True)
class StepBegin:
    """A step is about to start; ``epoch`` and ``step`` count from 1."""

    epoch: int
    step: int


@dataclass(frozen=True)
class StepEnd:
    """A step is done; ``loss`` is its own, ``mean_*`` are the epoch's so far."""

    epoch: int
    step: int
    steps: int
    loss: float
    mean_loss: float
    mean_accuracy: float


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is done, its validation too, and is in ``progress.history``."""

    record: EpochRecord
    progress: Progress


Event = StepBegin | StepEnd | EpochEnd


def _ignore(event: Event) -> None:
    return None


def _never() -> bool:
    return False


def fit(
    net: Sequential,
    train: tuple[Array, Array],
    validation: tuple[Array, Array],
    *,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
    augment: Callable[[Array, int, int], Array] | None = None,
    progress: Progress | None = None,
    on_event: Callable[[Event], object] = _ignore,
    stop: Callable[[], bool] = _never,
) -> Progress:
    """Train a classifier with cross-entropy.

    Parameters
    ----------
    net : Sequential
        Ends in one output a class, without a softmax; it has its optimizer. Changed in place.
    train, validation : tuple of ndarray
        Images ``(n, rows, columns, channels)``, scaled, of the dtype to compute in, and
        integer labels ``(n,)`` from 0. Moved to the network's device, once.
    epochs, batch_size : int
        The last batch of an epoch may be smaller.
    seed : int
        For the order of the images.
    augment : callable, optional
        Given a step's images and the numbers of epoch and step, from 0, returns the images to
        train on. What it returns may depend on nothing else, or a resumed run differs.
    progress : Progress, optional
        Where an earlier call stopped; the network is as it was then. Changed in place.
    on_event : callable
        Called with each :class:`StepBegin`, :class:`StepEnd` and :class:`EpochEnd`.
    stop : callable
        Asked after each step and each epoch; where it returns True, the call returns.

    Returns
    -------
    progress : Progress
        ``progress.epoch < epochs`` where ``stop`` ended it.

    Raises
    ------
    TypeError, ValueError
        If images, labels and network do not fit together, or a number is not allowed.
    DivergedError
        If a loss is not finite; the network is then of no use.
    """
    integer("epochs", epochs, 1)
    integer("batch_size", batch_size, 1)
    integer("seed", seed, 0)
    x, y = train
    _check("train", x, y)
    _check("validation", *validation)
    # A network that does not fit the images says so here; the layers settle their device.
    out = net.build((1, *x.shape[1:]), x.dtype.name)
    for name, labels in (("train", y), ("validation", validation[1])):
        if int(labels.max()) >= out[-1]:
            raise ValueError(
                f"{name}: labels hold {int(labels.max())}; expected classes 0 to {out[-1] - 1}, "
                "the network's outputs"
            )
    ranges.name_layers(net.layers)
    place = net.layers[0].device
    x, y = asarray(x, place), asarray(y, place)
    held_x, held_y = asarray(validation[0], place), asnumpy(validation[1])
    steps = math.ceil(len(x) / batch_size)
    now = Progress() if progress is None else progress
    if now.step >= steps:
        raise ValueError(f"progress is at step {now.step}; expected less than {steps}, an epoch's")
    while now.epoch < epochs and not stop():
        order = epoch_order(len(x), seed, now.epoch)
        while now.step < steps:
            on_event(StepBegin(now.epoch + 1, now.step + 1))
            begin = time.perf_counter()
            with ranges.part(STEP, REST):
                with ranges.part(STEP, "batch"):
                    chosen = asarray(order[now.step * batch_size :][:batch_size], place)
                    images, labels = x[chosen], y[chosen]
                if augment is not None:
                    with ranges.part(STEP, "augment"):
                        images = augment(images, now.epoch, now.step)
                with np.errstate(over="ignore", invalid="ignore"):  # said below, once
                    loss, correct = _step(net, images, labels)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {now.step + 1} of epoch {now.epoch + 1}"
                )
            now.step += 1
            now.loss_sum += loss * len(chosen)
            now.correct += correct
            now.seen += len(chosen)
            now.seconds += time.perf_counter() - begin
            on_event(
                StepEnd(
                    now.epoch + 1, now.step, steps, loss,
                    now.loss_sum / now.seen, now.correct / now.seen,
                )
            )  # fmt: skip
            if now.step < steps and stop():
                return now
        begin = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore"):
            held = evaluate(net, held_x, held_y)
        if not math.isfinite(held.loss):
            raise DivergedError(f"the validation loss is {held.loss} after epoch {now.epoch + 1}")
        record = EpochRecord(
            epoch=now.epoch + 1,
            train_loss=now.loss_sum / now.seen,
            train_accuracy=now.correct / now.seen,
            validation_loss=held.loss,
            validation_accuracy=held.accuracy,
            seconds=now.seconds + time.perf_counter() - begin,
        )
        now.history.append(record)
        now.epoch += 1
        now.step, now.loss_sum, now.correct, now.seen, now.seconds = 0, 0.0, 0, 0, 0.0
        on_event(EpochEnd(record, now))
    return now


def _step(net: Sequential, images: Array, labels: Array) -> tuple[float, int]:
    """Take one step; return the loss before it and how many images were classified rightly.

    Where the loss is not finite, the parameters are left as they are.
    """
    logits = net.forward(images, retain_derived=True)
    with ranges.part(STEP, "loss"):
        loss, gradient = CrossEntropy().from_logits(labels, logits)
        value = float(loss)
        correct = int((logits.argmax(axis=1) == labels).sum())
    if math.isfinite(value):
        net.backward(gradient, input_grad=False)
        net.update(value)
    return value, correct


def _check(name: str, images: Array, labels: Array) -> None:
    """See that there are images, and one integer label for each."""
    if getattr(images, "ndim", 0) != 4 or len(images) == 0:
        raise ValueError(
            f"{name}: images have shape {np.shape(images)}; expected (n, rows, columns, channels) "
            "with n of at least 1"
        )
    kind = getattr(labels, "dtype", np.dtype(object)).kind
    if kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"{name}: labels have shape {np.shape(labels)}; "
            f"expected integers of shape ({len(images)},), one an image"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"{name}: labels hold {int(labels.min())}; expected classes from 0")
