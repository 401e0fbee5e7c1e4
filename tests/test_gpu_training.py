"""How training uses a GPU: feeding, reading, capturing, splitting, with stand-ins for the device."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.layers import BatchNorm2D, Dropout, Flatten, FullyConnected
from gpuconv.models import Sequential
from gpuconv.profiling import Recorder, ranges
from gpuconv.training import graph, loop, step
from gpuconv.training.feeding import Pinned, Resident
from gpuconv.training.loop import StepBegin, StepEnd, fit
from gpuconv.training.precision import Full, Mixed
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import network, scaled

HELD = scaled(20, seed=1)


# ----------------------------------------------------------------------------------- feeding


class Event:
    done = False


class LateDevice:
    """Two streams that do their work as late, and in as odd an order, as their events allow.

    Attributes
    ----------
    calls : list of str
        What was asked, in order.
    deaf : set of str
        Which of the waits are ignored.
    """

    def __init__(self, seed: int, deaf: tuple[str, ...] = ()) -> None:
        self.random = random.Random(seed)
        self.queues: dict[str, list[Callable[[], bool]]] = {"copy": [], "compute": []}
        self.calls: list[str] = []
        self.deaf = deaf

    # What the feeder asks for.

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        self.calls.append("pinned")
        return np.zeros(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def array(self, a: Any) -> Any:
        return a.copy()

    def copy(self, host: Any, there: Any) -> None:
        self.calls.append("copy")
        self._put("copy", lambda: np.copyto(there, host))

    def sent(self) -> Event:
        return self._event("copy")

    def computed(self) -> Event:
        return self._event("compute")

    def wait(self, event: Event) -> None:
        self._wait("wait", "compute", event)

    def hold(self, event: Event) -> None:
        self._wait("hold", "copy", event)

    def finish(self, event: Event) -> None:
        self.calls.append("finish")
        while not event.done and "finish" not in self.deaf:
            self.run_some(1)

    # What happens.

    def _put(self, queue: str, work: Callable[[], Any]) -> None:
        self.queues[queue].append(lambda: (work(), True)[1])

    def _event(self, queue: str) -> Event:
        event = Event()
        self._put(queue, lambda: setattr(event, "done", True))
        return event

    def _wait(self, name: str, queue: str, event: Event) -> None:
        self.calls.append(name)
        if name not in self.deaf:
            self.queues[queue].append(lambda: event.done)

    def compute(self, work: Callable[[], Any]) -> None:
        self._put("compute", work)

    def run_some(self, most: int) -> None:
        """Do up to so many pieces of work."""
        for _ in range(most):
            ready = [q for q in self.queues.values() if q]
            if not ready:
                return
            queue = self.random.choice(ready)
            if queue[0]():
                queue.pop(0)

    def drain(self) -> None:
        while any(self.queues.values()):
            self.run_some(1)


def feed(device: LateDevice, epochs: int = 2, stop: int | None = None) -> tuple[list[int], Any]:
    """Return the examples that a device saw, and those it should have seen."""
    x, y = np.arange(23.0)[:, None] * np.ones(3), np.arange(23)
    feeder, seen, wanted = Pinned(x, y, device), [], []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(23)
        batches = feeder.batches(order, 4, first=epoch)
        for k, (images, labels) in enumerate(batches):

            def work(images: Any = images, labels: Any = labels) -> None:
                assert (images[:, 0] == labels).all()
                seen.extend(labels.tolist())

            device.compute(work)
            wanted.extend(order[(epoch + k) * 4 :][:4].tolist())
            device.run_some(device.random.randrange(4))
            if stop == k:
                batches.close()
                break
    device.drain()
    return seen, wanted


@pytest.mark.parametrize("stop", [None, 2])
def test_no_example_is_lost_or_doubled_or_out_of_order(stop: int | None) -> None:
    for seed in range(60):
        seen, wanted = feed(LateDevice(seed), stop=stop)
        assert seen == wanted


@pytest.mark.parametrize("deaf", ["wait", "hold", "finish"])
def test_each_of_the_waits_is_needed(deaf: str) -> None:
    """So the stand-in would show it if the feeder left one out."""
    wrong = 0
    for seed in range(60):
        try:
            seen, wanted = feed(LateDevice(seed, (deaf,)))
        except AssertionError:
            wrong += 1
        else:
            wrong += seen != wanted
    assert wrong > 5


def test_two_batches_are_in_flight() -> None:
    """The next one is sent before the device is asked to compute with the one before."""
    device = LateDevice(0)
    feeder = Pinned(np.zeros((12, 2)), np.zeros(12, int), device)
    batches = feeder.batches(np.arange(12), 4)
    assert device.calls == []
    next(batches)
    assert device.calls == ["pinned"] * 4 + ["copy"] * 4 + ["wait"]
    device.calls.clear()
    next(batches)
    # A slot is used again only when its copy has left it and its batch is computed with.
    assert device.calls == ["finish", "hold", "copy", "copy", "wait"]
    device.calls.clear()
    next(batches)
    assert device.calls == ["wait"]
    assert list(batches) == []


@pytest.mark.parametrize("size", [1, 5, 16, 60, 100])
def test_pinned_batches_are_those_of_resident_data(size: int) -> None:
    x, y = scaled()
    order = np.random.default_rng(3).permutation(60)
    device = LateDevice(1)
    other = Resident(x, y, gpuconv.Device("cpu"))
    number = 0
    for got, want in zip(
        Pinned(x, y, device).batches(order, size), other.batches(order, size), strict=True
    ):
        device.drain()
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(Pinned(x, y, device).fetch(order, size, number), want, strict=True):
            np.testing.assert_array_equal(a, b)
        number += 1
    assert number == -(-60 // size)


# ----------------------------------------------------------------------------------- reading


def train(net: Sequential, **options: Any) -> Any:
    usual = {"epochs": 2, "batch_size": 16, "seed": 5}
    return fit(net, scaled(), HELD, **{**usual, **options})


def same(a: Sequential, b: Sequential) -> bool:
    return all(v.tobytes() == b.tensors()[n].tobytes() for n, v in a.tensors().items())


@pytest.mark.parametrize("interval", [2, 3, 100])
def test_losses_read_once_an_interval_add_up_to_the_same(interval: int) -> None:
    one, other, ends = network(), network(), []
    want = train(one, interval=1).history
    found = train(
        other, interval=interval, on_event=lambda e: isinstance(e, StepEnd) and ends.append(e)
    ).history
    assert same(one, other)
    for a, b in zip(found, want, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-6)
        assert (a.train_accuracy, a.validation_loss) == (b.train_accuracy, b.validation_loss)
    read = [e.step for e in ends if e.loss is not None]
    assert read == [k for k in (1, 2, 3, 4) if k % interval == 0 or k == 4] * 2
    assert all(e.mean_loss == e.mean_loss for e in ends if e.step >= read[0])


def test_stopping_within_an_interval_reads_what_is_open() -> None:
    steps = []

    def stop() -> bool:
        return len(steps) == 3

    progress = train(
        network(), interval=2, stop=stop, on_event=lambda e: isinstance(e, StepEnd) and steps.append(e)
    )  # fmt: skip
    assert (progress.step, progress.seen) == (3, 48)
    assert progress.loss_sum > 0
    net, whole = network(), network()
    steps.clear()
    half = train(net, interval=2, stop=stop, on_event=lambda e: isinstance(e, StepEnd) and steps.append(e))  # fmt: skip
    train(net, progress=half)
    train(whole)
    assert same(net, whole)


def test_a_rate_that_follows_the_loss_reads_every_loss() -> None:
    losses: list[Any] = []
    train(
        network("SGD(lr_scheduler='king(0.01, patience=2)')"), interval=4,
        on_event=lambda e: isinstance(e, StepEnd) and losses.append(e.loss),
    )  # fmt: skip
    assert all(isinstance(x, float) for x in losses)
    with pytest.raises(TypeError, match=r"interval is 0\.5"):
        train(network(), interval=0.5)


def test_nothing_is_read_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device: no array becomes a number of the host's but once an interval."""
    if reason := compiler_available():
        pytest.skip(reason)
    with stand_in() as cp, gpuconv.engine("cuda_atomic"):
        reads: list[str] = []
        for name in ("__float__", "__int__", "__bool__", "__index__", "get", "item", "tolist"):
            method = getattr(cp.ndarray, name)
            monkeypatch.setattr(
                cp.ndarray, name,
                lambda self, *a, _m=method, _n=name, **k: (reads.append(_n), _m(self, *a, **k))[1],
            )  # fmt: skip
        counts: list[int] = []

        def note(event: Any) -> None:
            if isinstance(event, StepBegin):
                reads.clear()
            elif isinstance(event, StepEnd):
                counts.append(len(reads))

        fit(
            network(device="cuda"),
            scaled(),
            HELD,
            epochs=1,
            batch_size=12,
            interval=3,
            on_event=note,
        )
        assert counts == [0, 0, 2, 0, 2]  # loss and right answers


# ---------------------------------------------------------------------------------- capturing


class Repeating:
    """In the place of a graph: does the work again and writes into the same arrays.

    Attributes
    ----------
    replays : int
        How often.
    """

    errors = (RuntimeError,)

    def __init__(self, broken: bool = False) -> None:
        self.replays, self.broken = 0, broken
        self.work: Any = None
        self.result: Any = None

    def record(self, work: Callable[[], Any]) -> Any:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()  # warms up
        self.work, self.result = work, work()
        for array in self._arrays(self.result):
            array[...] = np.nan  # a graph's arrays hold nothing before it is launched
        return self.result

    @staticmethod
    def _arrays(result: Any) -> list[Any]:
        (loss, _), gradients = result
        return [loss, *(g for layer in gradients for g in layer.values())]

    def replay(self) -> None:
        self.replays += 1
        again = self.work()
        for to, source in zip(self._arrays(self.result), self._arrays(again), strict=True):
            to[...] = source
        self.result[0][1][...] = again[0][1]


class Zeros:
    """Arrays of no axes in the place of NumPy's scalars, as a device has them."""

    def __call__(self, images: Any, labels: Any, check: bool = False) -> Any:
        return tuple(np.asarray(a) for a in self.plain(images, labels))

    def __init__(self, plain: Any) -> None:
        self.plain = plain


def captured(precision: Any, capture: Any, batches: list[Any]) -> tuple[Sequential, list[Any]]:
    net = network()
    net.build((1, 6, 5, 1), precision.dtype)
    plain = step.Step(net, precision)
    plain.gradients = Zeros(plain.gradients)  # type: ignore[method-assign]
    take = graph.CapturedStep(plain, capture) if capture else plain
    return net, [take(x, y) for x, y in batches]


def batches_of(*sizes: int) -> list[Any]:
    x, y = scaled()
    ends = np.cumsum([0, *sizes])
    return [(x[a:b], y[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize("precision", [Full, lambda: Mixed("float16"), lambda: Mixed("bfloat16")])
def test_captured_steps_are_the_uncaptured_ones(precision: Callable[[], Any]) -> None:
    capture, batches = Repeating(), batches_of(16, 16, 5, 16, 5)
    net, found = captured(precision(), capture, batches)
    plain, want = captured(precision(), None, batches)
    assert capture.replays == 3  # the smaller batches are not captured
    for a, b in zip(found, want, strict=True):
        assert [float(v) for v in a] == [float(v) for v in b]
    assert same(net, plain)


def test_parameters_stay_where_the_capture_reads_them() -> None:
    net = network()
    net.build((1, 6, 5, 1))
    plain = step.Step(net, Full())
    plain.gradients = Zeros(plain.gradients)  # type: ignore[method-assign]
    take = graph.CapturedStep(plain, Repeating())
    places = []
    for images, labels in batches_of(16, 16, 4, 16):
        take(images.copy(), labels.copy())
        places.append([id(v) for v in net.parameters.values()])
    assert places[0] == places[1] == places[2] == places[3]


def test_a_profiler_sees_replays_and_nothing_within_the_capture() -> None:
    class Looking(Repeating):
        seen: list[int]

        def record(self, work: Callable[[], Any]) -> Any:
            before = len(recorder._marks)
            result = super().record(work)
            self.seen = [before, len(recorder._marks)]
            return result

        def replay(self) -> None:
            follower = ranges.install(None)
            super().replay()
            ranges.install(follower)

    capture = Looking()
    with Recorder("cpu") as recorder:
        captured(Full(), capture, batches_of(16, 16, 16))
    passes = [s.pass_ for s in recorder.spans]
    assert capture.seen[0] == capture.seen[1]
    assert passes.count("captured") == 3
    assert passes.count("update") == 3 * 2  # of the layers with parameters
    assert "forward" not in passes


def test_what_cannot_be_captured_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    batches = batches_of(16, 16)
    with caplog.at_level(logging.WARNING, "gpuconv"):
        net, _ = captured(Full(), Repeating(broken=True), batches)
    assert [r.getMessage() for r in caplog.records] == [
        "the step cannot be captured (operation not permitted when stream is capturing); it goes "
        "on uncaptured"
    ]
    assert same(net, captured(Full(), None, batches)[0])


def test_networks_that_are_another_in_every_pass_are_not_captured() -> None:
    dense = FullyConnected(3)
    assert graph.changing(network()) == ""
    assert "dropout" in graph.changing(Sequential([Flatten(), Dropout(dense, 0.5)]))
    normed = Sequential([BatchNorm2D(), Flatten(), FullyConnected(3)])
    assert "running statistics" in graph.changing(normed)


def test_a_graph_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(
        ValueError, match="cuda_graph is True; expected False, as the network is on"
    ):
        train(network(), cuda_graph=True)


def test_the_interval_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    net.build((1, 6, 5, 1))
    assert loop._interval(net, None, gpuconv.Device("cpu"), False) == 1
    assert loop._interval(net, None, gpuconv.Device("cuda"), False) == loop.INTERVAL > 1
    assert loop._interval(net, 5, gpuconv.Device("cuda"), True) == 5
