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
from typing import Any, NoReturn

import numpy as np

from gpuconv.arguments import integer, real
from gpuconv.device import Device, asarray, asnumpy
from gpuconv.layers.base import dtype_name
from gpuconv.models import Sequential
from gpuconv.profiling import ranges
from gpuconv.profiling.ranges import REST, STEP
from gpuconv.training.data import epoch_order
from gpuconv.training.evaluation import evaluate
from gpuconv.training.feeding import Batches, Feeder, feeder_for
from gpuconv.training.graph import CapturedStep
from gpuconv.training.memory import room_for, told
from gpuconv.training.precision import Full, Precision, UnderflowError
from gpuconv.training.step import Step, Tally
from gpuconv.training.transport import Capture, CudaCapture
from gpuconv.training.watch import Watch, bad_parameter, leaves, origin_in_forward

__all__ = ["DivergedError", "EpochEnd", "EpochRecord", "Event", "Progress", "StepBegin", "StepEnd", "fit"]  # fmt: skip

Array = Any

#: Steps between two readings of loss and accuracy on a GPU.
INTERVAL = 16


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
    """A step is done.

    Attributes
    ----------
    epoch, step, steps : int
        Which one, of how many an epoch.
    loss : float or None
        Its own; where losses are read once an interval the mean of the interval at its last
        step, and None before.
    mean_loss, mean_accuracy : float
        The epoch's so far, as far as they were read; NaN before.
    """

    epoch: int
    step: int
    steps: int
    loss: float | None
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
    precision: Precision | None = None,
    interval: int | None = None,
    cuda_graph: bool = False,
) -> Progress:
    """Train a classifier with cross-entropy.

    Parameters
    ----------
    net : Sequential
        Ends in one output a class, without a softmax; it has its optimizer. Changed in place.
    train, validation : tuple of ndarray
        Images ``(n, rows, columns, channels)``, scaled, and integer labels ``(n,)`` from 0. What
        is on the host goes to a GPU a batch at a time, through pinned memory.
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
    precision : Precision, optional
        How to compute; see :func:`gpuconv.training.precision.precision_for`. In the images'
        dtype if not given.
    interval : int, optional
        Steps after which loss and accuracy are read, for which the host waits for the device:
        1 on the CPU and :data:`INTERVAL` on a GPU if not given, and 1 where the learning rate
        follows the loss. With 1, a step whose loss is not finite does not change the network.
    cuda_graph : bool
        Whether to capture the step, on a GPU, and replay it.

    Returns
    -------
    progress : Progress
        ``progress.epoch < epochs`` where ``stop`` ended it.

    Raises
    ------
    TypeError, ValueError
        If images, labels and network do not fit together, or a number is not allowed.
    DivergedError
        If a loss is not finite; the text says in which layer and pass that began. The network is
        then of no use.
    OutOfMemory
        If a step does not fit into the device's memory in any way.
    """
    integer("epochs", epochs, 1)
    integer("batch_size", batch_size, 1)
    integer("seed", seed, 0)
    x, y = train
    _check("train", x, y)
    _check("validation", *validation)
    how = Full(dtype_name(x.dtype)) if precision is None else precision
    # A network that does not fit the images says so here; the layers settle their device.
    out = net.build((1, *x.shape[1:]), how.dtype)
    for name, labels in (("train", y), ("validation", validation[1])):
        if int(labels.max()) >= out[-1]:
            raise ValueError(
                f"{name}: labels hold {int(labels.max())}; expected classes 0 to {out[-1] - 1}, "
                "the network's outputs"
            )
    place: Device = leaves(net)[0].device
    if cuda_graph and place.kind == "cpu":
        raise ValueError("cuda_graph is True; expected False, as the network is on the CPU")
    room = room_for(place)
    with told(room, "the batches that are fed"):
        run = _Run(
            net, how, feeder_for(x, y, place), augment, seed, batch_size, len(x),
            _interval(net, interval, place, cuda_graph), on_event,
            CudaCapture(place) if cuda_graph else None,
        )  # fmt: skip
    ranges.name_layers(net.layers)
    try:
        held_x = how.images(asarray(validation[0], place))
    except room.errors:  # a part at a time, then
        held_x = how.images(asnumpy(validation[0]))
    now = Progress() if progress is None else progress
    if now.step >= run.steps:
        raise ValueError(
            f"progress is at step {now.step}; expected less than {run.steps}, an epoch's"
        )
    while now.epoch < epochs and not stop():
        with told(room, "a batch and what surrounds its step"):
            done = run.epoch(now, stop)
        if not done:
            return now
        run.validate(held_x, asnumpy(validation[1]), now)
    return now


def _interval(net: Sequential, wanted: int | None, place: Device, cuda_graph: bool) -> int:
    """Return the steps between two readings of the loss."""
    if wanted is not None:
        integer("interval", wanted, 1)
    follows = any(layer.optimizer.lr_scheduler.needs_loss for layer in leaves(net))
    if follows:
        if cuda_graph:
            raise ValueError("cuda_graph is True; the learning rate follows the loss of each step")
        return 1
    if wanted is None:
        return 1 if place.kind == "cpu" else INTERVAL
    return wanted


class _Run:
    """What the steps of a call of :func:`fit` share."""

    def __init__(
        self,
        net: Sequential,
        precision: Precision,
        feeder: Feeder,
        augment: Callable[[Array, int, int], Array] | None,
        seed: int,
        size: int,
        count: int,
        interval: int,
        on_event: Callable[[Event], object],
        capture: Capture | None,
    ) -> None:
        self._feeder, self._augment, self._on_event = feeder, augment, on_event
        self._seed, self._size, self._count, self._interval = seed, size, count, interval
        self.steps = math.ceil(count / size)
        self._step = Step(net, precision)
        # A captured step's loss is looked at after its update, as those of longer intervals.
        self._captured = None if capture is None else CapturedStep(self._step, capture)
        late = interval > 1 or capture is not None
        self._checked = not late
        self._watch = Watch(net, capture is not None)
        self._tally = Tally()

    def epoch(self, now: Progress, stop: Callable[[], bool]) -> bool:
        """Take the rest of an epoch's steps; return False where ``stop`` ended it."""
        order = epoch_order(self._count, self._seed, now.epoch)
        batches = self._feeder.batches(order, self._size, now.step)
        try:
            while now.step < self.steps:
                self._on_event(StepBegin(now.epoch + 1, now.step + 1))
                begin = time.perf_counter()
                if self._tally.steps == 0:
                    self._watch.keep(now.epoch, now.step)
                with ranges.part(STEP, REST):
                    loss = self._take(batches, order, now)
                self._watch.taken(now.epoch, now.step - 1)
                now.seconds += time.perf_counter() - begin
                self._on_event(
                    StepEnd(
                        now.epoch + 1, now.step, self.steps, loss,
                        now.loss_sum / now.seen if now.seen else math.nan,
                        now.correct / now.seen if now.seen else math.nan,
                    )
                )  # fmt: skip
                if now.step < self.steps and stop():
                    self._read(order, now)
                    return False
        finally:
            batches.close()
        return True

    def _take(self, batches: Batches, order: Array, now: Progress) -> float | None:
        """Take a step; return its loss, or the mean since the last reading, or None."""
        with ranges.part(STEP, "batch"):
            images, labels = next(batches)
        images = self._augmented(images, now.epoch, now.step)
        size = len(labels)
        if self._checked:
            with np.errstate(over="ignore", invalid="ignore"):  # said below, once
                loss, correct = self._try(lambda: self._step.checked(images, labels), now)
            if not math.isfinite(loss):
                self._diverged(loss, order, now)
            now.step += 1
            now.loss_sum += loss * size
            now.correct += correct
            now.seen += size
            return float(loss)
        take = self._step if self._captured is None else self._captured
        with np.errstate(over="ignore", invalid="ignore"):
            found, right = self._try(lambda: take(images, labels), now)
            self._tally.add(found, right, size)
        now.step += 1
        if now.step % self._interval == 0 or now.step == self.steps:
            return self._read(order, now)
        return None

    def _augmented(self, images: Array, epoch: int, step: int) -> Array:
        if self._augment is None:
            return images
        with ranges.part(STEP, "augment"):
            changed: Array = self._augment(images, epoch, step)
            return changed

    def _try(self, call: Callable[[], Any], now: Progress) -> Any:
        try:
            return call()
        except UnderflowError as error:
            raise DivergedError(
                f"{error}, at step {now.step + 1} of epoch {now.epoch + 1}"
            ) from None

    def _read(self, order: Array, now: Progress) -> float | None:
        """Read the tally, if there is anything in it: here the host waits for the device."""
        if self._tally.steps == 0:
            return None
        with ranges.part(STEP, "read"):
            loss_sum, correct, images = self._tally.read()
        loss = loss_sum / images
        if not math.isfinite(loss):
            now.step -= 1
            self._diverged(loss, order, now)
        now.loss_sum += loss_sum
        now.correct += correct
        now.seen += images
        return loss

    def _diverged(self, loss: float, order: Array, now: Progress) -> NoReturn:
        """Say where the bad loss began."""
        origin = self._origin(order, now.epoch, now.step, not self._checked)
        raise DivergedError(
            f"the loss is {loss} at step {now.step + 1} of epoch {now.epoch + 1}; NaN or infinity "
            f"first appeared in {origin}"
        )

    def _origin(self, order: Array, epoch: int, step: int, updated: bool) -> str:
        """Take the last steps again, and return in words where a bad number came from."""

        def fetch(which: int, number: int) -> tuple[Array, Array]:
            mine = order if which == epoch else epoch_order(self._count, self._seed, which)
            images, labels = self._feeder.fetch(mine, self._size, number)
            images = self._augmented(images, which, number)
            return self._step.precision.images(images), labels

        backward = not self._step.precision.scaled
        with np.errstate(over="ignore", invalid="ignore"):
            return self._watch.origin(fetch, epoch, step, updated, backward)

    def validate(self, x: Array, y: Array, now: Progress) -> None:
        """Validate, and put the epoch into the history."""
        begin = time.perf_counter()
        net = self._step.net
        with np.errstate(over="ignore", invalid="ignore"):
            held = evaluate(net, x, y)
            if not math.isfinite(held.loss):
                origin = origin_in_forward(net, x)
                if bad_parameter(net):  # by the last update, which no training step has looked at
                    order = epoch_order(self._count, self._seed, now.epoch)
                    origin = self._origin(order, now.epoch, self.steps - 1, True)
                where = origin if isinstance(origin, str) else "the loss"
                raise DivergedError(
                    f"the validation loss is {held.loss} after epoch {now.epoch + 1}; NaN or "
                    f"infinity first appeared in {where}"
                )
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
        self._on_event(EpochEnd(record, now))


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
