"""How well training keeps a GPU busy: part of ``make gpu-check``.

A net large enough to fill the device learns digits-like images at batch 512. Measured are an
epoch with its batches copied through pinned memory and with all of them on the device already
(the difference is what the copy does not hide), an epoch captured and uncaptured, and, where
cupti-python is installed, for how much of the epoch a kernel or a copy ran.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from gpuconv.cuda import runtime
from gpuconv.device import Device, asarray
from gpuconv.layers import Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.models import Sequential
from gpuconv.profiling import cupti
from gpuconv.training.loop import EpochEnd, fit

__all__ = ["measure"]


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
    count: int = 16 * 512, batch: int = 512, channels: int = 64, epochs: int = 4
) -> dict[str, Any]:
    """Return the epochs' times and what follows from them."""
    x, y = images(count)
    place = Device("cuda", 0)
    there = asarray(x, place), asarray(y, place)
    sizes = (channels, batch, epochs)
    found: dict[str, Any] = {
        "images": count, "batch": batch, "channels": channels,
        "pinned": epoch((x, y), *sizes),
        "resident": epoch(there, *sizes),
    }  # fmt: skip
    if runtime.installed() is None:  # no stand-in captures
        found["captured"] = epoch((x, y), *sizes, cuda_graph=True)
        found["captured_over_uncaptured"] = (
            found["captured"]["seconds"] / found["pinned"]["seconds"]
        )
    found["pinned_over_resident"] = found["pinned"]["seconds"] / found["resident"]["seconds"]
    found["busy"] = busy((x, y), *sizes) if cupti.available() else None
    if found["busy"] is None:
        found["busy_why_not"] = "cupti-python is not installed"
    return found


def busy(data: tuple[Any, Any], channels: int, batch: int, epochs: int) -> float | None:
    """Return for how much of an epoch a kernel or a copy ran, by CUPTI; the first is left out."""
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
    # Copies run beside kernels, so that the sum may exceed the time.
    return min(1.0, sum(k.seconds for k in times.kernels) / spent[0]) if spent else None
