"""How well training keeps a GPU busy: part of ``make gpu-check``.

A net large enough to fill the device learns digits-like images at batch 512. Measured are an
epoch with its batches copied through pinned memory and with all of them on the device already
(the difference is what the copy does not hide); an epoch captured and uncaptured, of this net and
of a small one, in which launches count; epochs in half precision; and for how much of the epoch the
device was busy. That is told in two ways: by what the device needs for a step that is queued before
its turn comes, so that it never waits for the host, times the steps of an epoch, over the epoch;
and, where cupti-python is installed, by the time in which a kernel or a copy ran.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuconv.cuda import runtime
from gpuconv.device import Device, asarray
from gpuconv.layers import Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.models import Sequential
from gpuconv.profiling import cupti
from gpuconv.profiling.timing import Clock, EventClock
from gpuconv.training.loop import EpochEnd, fit
from gpuconv.training.precision import Full, precision_for
from gpuconv.training.step import Step

__all__ = ["measure"]

#: Channels of the nets that are tried, and the seconds of a step that fills the device.
WIDTHS, FILLED = (64, 128, 256, 512), 0.02
#: What is to be reached: the device busy, and what the copies may add to an epoch.
BUSY, ADDED = 0.9, 0.02
#: Steps that are queued at once (a queue holds some thousand launches), and how often that is tried.
QUEUED, TRIES = 4, 6


def network(channels: int) -> Sequential:
    """Return a net of four convolutions for 8x8 images."""
    layers: list[Any] = []
    for width in (channels, 2 * channels):
        layers += [Conv2D(width, (3, 3), pad=1, act_fn="ReLU", init="he_uniform") for _ in range(2)]
        layers.append(Pool2D((2, 2), stride=2))
    layers += [Flatten(), FullyConnected(10)]
    return Sequential(layers, optimizer="AdamW(lr=0.001)", rng=0, device="cuda")


def images(count: int) -> tuple[Any, Any]:
    """Return noise as large as the digits, and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 8, 8, 1), np.float32)
    return x, np.arange(count) % 10


def epoch(
    data: tuple[Any, Any], channels: int, batch: int, epochs: int, **options: Any
) -> dict[str, float]:
    """Return the seconds of an epoch, the median of all but the first, which compiles."""
    held = data[0][:batch], data[1][:batch]
    ends: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, EpochEnd):
            ends.append(time.perf_counter())

    fit(
        network(channels), data, held, epochs=epochs + 1, batch_size=batch, on_event=note,
        **options,
    )  # fmt: skip
    times = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return {"seconds": statistics.median(times), "least": min(times), "most": max(times)}


def measure(
    count: int = 16 * 512,
    batch: int = 512,
    channels: int | Sequence[int] = WIDTHS,
    epochs: int = 3,
    ahead: int | None = None,
) -> dict[str, Any]:
    """Return the epochs' times and what follows from them.

    Parameters
    ----------
    count, batch, epochs : int
        Images, images a step, and epochs that are timed.
    channels : int or sequence of int
        Of the nets: the first that fills the device is taken, or the last.
    ahead : int, optional
        Rows of the matrices that keep the device busy while steps are queued; few where no
        device computes.
    """
    x, y = images(count)
    place = Device("cuda", 0)
    there = asarray(x, place), asarray(y, place)
    if ahead is None:
        ahead = 4096 if runtime.installed() is None else 4
    needed = None
    for width in (channels,) if isinstance(channels, int) else channels:
        needed = device_seconds(
            stepper(network(width), there[0][:batch], there[1][:batch]), queuer(ahead), EventClock()
        )  # fmt: skip
        if needed is None or needed >= FILLED:
            break
    sizes = (width, batch, epochs)
    found: dict[str, Any] = {
        "images": count, "batch": batch, "channels": width,
        "device_ms_a_step": None if needed is None else 1e3 * needed,
        "pinned": epoch((x, y), *sizes),
        "resident": epoch(there, *sizes),
    }  # fmt: skip
    usual = found["pinned"]["seconds"]
    found["pinned_over_resident"] = usual / found["resident"]["seconds"]
    steps = -(-count // batch)
    found["busy"] = None if needed is None else needed * steps / usual
    found["busy_by_cupti"] = busy_by_cupti((x, y), *sizes) if cupti.available() else None
    for dtype in ("float16", "bfloat16"):
        try:
            found[dtype] = epoch((x, y), *sizes, precision=precision_for(dtype))
        except ImportError as error:  # bfloat16 needs ml_dtypes, and CuPy 14
            found[dtype] = {"why_not": str(error)}
    if runtime.installed() is None:  # no stand-in captures
        found["captured"] = epoch((x, y), *sizes, cuda_graph=True)
        found["captured_over_uncaptured"] = found["captured"]["seconds"] / usual
        little = (8, 64, epochs)
        plain, captured = (epoch((x, y), *little, cuda_graph=g)["seconds"] for g in (False, True))
        found["small_captured_over_uncaptured"] = captured / plain
    found["shortfalls"] = shortfalls(found)
    return found


def shortfalls(found: dict[str, Any]) -> list[str]:
    """Return what is not reached, in words."""
    wrong = []
    busy = [b for b in (found["busy"], found["busy_by_cupti"]) if b is not None]
    if not busy:
        wrong.append("for how much of an epoch the device is busy is not known")
    elif max(busy) < BUSY:
        wrong.append(f"the device is busy for {max(busy):.1%} of an epoch; wanted {BUSY:.0%}")
    if found["pinned_over_resident"] > 1 + ADDED:
        added = found["pinned_over_resident"] - 1
        wrong.append(f"copies make an epoch {added:.1%} longer; wanted at most {ADDED:.0%}")
    return wrong


# --------------------------------------------------------------------------- how busy it is


def stepper(net: Sequential, images: Any, labels: Any) -> Callable[[], Any]:
    """Return what takes a step on these, after the first ones, which compile."""
    net.build(images.shape, "float32")
    step = Step(net, Full())
    for _ in range(3):
        step(images, labels)
    return lambda: step(images, labels)


def queuer(rows: int) -> Callable[[int], None]:
    """Return what puts so many large matrix products into the queue."""
    cp = runtime.cupy()
    a = cp.ones((rows, rows), "float32")
    a @ a  # the library's own start

    def queue(count: int) -> None:
        for _ in range(count):
            a @ a

    return queue


def device_seconds(
    take: Callable[[], Any], ahead: Callable[[int], None], clock: Clock
) -> float | None:
    """Return the seconds that the device needs for a step that is queued before its turn comes.

    Parameters
    ----------
    take : callable
        Queues a step, without waiting for the device.
    ahead : callable
        Queues so many pieces of other work, for the device to do meanwhile.
    clock : Clock
        The device's.

    Returns
    -------
    float or None
        None where the device was never behind the host for long enough.
    """
    count = 32
    for _ in range(TRIES):
        begin, start = time.perf_counter(), clock.mark()
        ahead(count)
        first = clock.mark()
        for _ in range(QUEUED):
            take()
        last = clock.mark()
        queued = time.perf_counter() - begin
        whole = clock.seconds(first, last)
        # The device came to the first step when the host had queued the last.
        if queued < clock.seconds(start, first):
            return whole / QUEUED
        count *= 2
    return None


def busy_by_cupti(data: tuple[Any, Any], channels: int, batch: int, epochs: int) -> float | None:
    """Return for how much of the epochs a kernel or a copy ran; the first is left out."""
    held = data[0][:batch], data[1][:batch]
    times = cupti.KernelTimes()
    spent: list[float] = []
    begin = 0.0

    def note(event: Any) -> None:
        nonlocal begin
        if isinstance(event, EpochEnd):
            runtime.cupy().cuda.Device(0).synchronize()
            if len(event.progress.history) == 1:
                times.__enter__()
                begin = time.perf_counter()
            elif event.record.epoch == epochs + 1:
                spent.append(time.perf_counter() - begin)
                times.__exit__(None, None, None)

    fit(network(channels), data, held, epochs=epochs + 1, batch_size=batch, on_event=note)
    return cupti.covered(times.intervals) / spent[0] if spent else None
