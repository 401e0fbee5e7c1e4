"""Spans as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is the *Trace Event Format* of Chromium: complete events (``"ph": "X"``) with times in
microseconds; events of one track that lie within each other are shown nested.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpuconv.profiling.recorder import Span

__all__ = ["events", "write"]

HOST, DEVICE = 1, 2


def events(spans: Iterable[Span], device: str, on_gpu: bool) -> list[dict[str, Any]]:
    """Return the spans as trace events.

    Parameters
    ----------
    spans : iterable of Span
        As the recorder keeps them.
    device : str
        Where was computed.
    on_gpu : bool
        Whether the clock was the device's: then the host has a track of its own, with the times
        at which the work was put into the queue.
    """
    made: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "gpuconv"}},
        _thread(HOST, "host"),
    ]
    if on_gpu:
        made.append(_thread(DEVICE, device))
    for span in sorted(spans, key=lambda s: (s.start, s.depth)):
        event = {
            "name": f"{span.name}: {span.pass_}",
            "cat": span.pass_,
            "ph": "X",
            "pid": 1,
            "args": _details(span),
        }
        host = {"tid": HOST, "ts": 1e6 * span.host_start, "dur": 1e6 * span.host_seconds}
        made.append({**event, **host})
        if on_gpu:
            device_times = {"tid": DEVICE, "ts": 1e6 * span.start, "dur": 1e6 * span.seconds}
            made.append({**event, **device_times})
    return made


def _thread(number: int, name: str) -> dict[str, Any]:
    return {
        "ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name},
    }  # fmt: skip


def _details(span: Span) -> dict[str, Any]:
    """Return what is shown of a span that is clicked on."""
    found: dict[str, Any] = {}
    if span.engine:
        found["engine"] = span.engine
    if span.problem is not None:
        found["convolution"] = str(span.problem)
    if span.flops and span.seconds > 0:
        found["GFLOP/s"] = float(f"{span.flops / span.seconds / 1e9:.4g}")
    if span.bytes and span.seconds > 0:
        found["GB/s"] = float(f"{span.bytes / span.seconds / 1e9:.4g}")
    return found


def write(path: Path, spans: Iterable[Span], device: str, on_gpu: bool) -> None:
    """Write the trace, whole or not at all."""
    from gpuconv.training.files import write_bytes

    trace = {"traceEvents": events(spans, device, on_gpu), "displayTimeUnit": "ms"}
    write_bytes(path, json.dumps(trace, separators=(",", ":")).encode())
