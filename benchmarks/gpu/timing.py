"""The times: every CUDA engine and the dispatcher's choice, each pass, beside PyTorch and JAX.

Short calls are captured in a CUDA graph, several a graph, so that what is compared is the
device's work and not how long Python takes to ask for it; where a call cannot be captured it is
timed as it is, and the row says so. Everything runs in a process of its own: a kernel that fails
makes every later call of its process fail.

    echo '{"units": [["resnet50_conv2_3x3", "float32"]]}' | python -m benchmarks.gpu.timing
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

import gpuconv
from benchmarks.gpu import shapes as layers
from benchmarks.gpu import torch_peer as peers
from benchmarks.gpu.device import torch_on_device
from benchmarks.gpu.shapes import PASSES, Data
from benchmarks.gpu.stages import State, TimeOut
from benchmarks.suite import Shape
from gpuconv import dispatch
from gpuconv.cuda import runtime
from gpuconv.engines.base import Pass
from gpuconv.profiling.timing import Clock, EventClock, timed

__all__ = ["calls_of", "engines", "measure", "measured", "stage", "unit_name"]

ROOT = Path(__file__).resolve().parents[2]
#: Calls of a captured graph.
CAPTURED = 4
#: An engine whose first call takes so many times the best's is timed by few calls.
HOPELESS = 4.0
#: Processes that may die before the rest is given up.
DEATHS = 20
#: Begins a line of results among whatever else is printed.
MARK = "\x1e"

Unit = tuple[str, str]
Call = Callable[[], Any]


def unit_name(unit: Unit) -> str:
    """Return the key of a layer in a dtype."""
    return "|".join(unit)


def engines() -> list[str]:
    """Return the CUDA engines that can be used here."""
    return [e.name for e in gpuconv.engines() if e.device == "cuda" and e.available]


# ------------------------------------------------------------------------------------- calls


def calls_of(data: Data, engine: str | None) -> dict[str, Call]:
    """Return gpuconv's calls by pass, with an engine forced or as the dispatcher chooses."""
    cp = runtime.cupy()
    p = data.shape.problem
    options: dict[str, Any] = {
        "stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups,
    }  # fmt: skip
    x, w, b, dy, dz = (cp.asarray(data.inputs[n]) for n in ("x", "w", "b", "dy", "dz"))

    def forward() -> Any:
        return gpuconv.conv2d(x, w, b, activation="ReLU", **options)

    def input_grad() -> Any:
        return gpuconv.conv2d_backward(dz, x, w, needs=("x",), **options)[0]

    def weight_grad() -> Any:
        return gpuconv.conv2d_backward(dz, x, w, needs=("w", "b"), **options)[1:]

    def train() -> Any:
        y = forward()
        return y, *gpuconv.conv2d_backward(dy, x, w, y=y, activation="ReLU", **options)

    def within(call: Call) -> Call:
        def run() -> Any:
            with gpuconv.engine(engine):
                return call()

        return run if engine else call

    made = {
        "forward": forward,
        "input_grad": input_grad,
        "weight_grad": weight_grad,
        "train": train,
    }
    return {n: within(call) for n, call in made.items()}


def _captured(call: Call) -> tuple[Any, Call]:
    """Return a stream, and what launches a graph of several calls on it."""
    cp = runtime.cupy()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        kept = [call() for _ in range(CAPTURED)]  # compiles, and fills the memory pool
        stream.synchronize()
        del kept
        stream.begin_capture()
        try:
            kept = [call() for _ in range(CAPTURED)]
        finally:
            graph = stream.end_capture()
    holding = [kept]

    def launch() -> Any:
        graph.launch(stream)
        return holding

    return stream, launch


def _torch_captured(torch: Any, call: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(CAPTURED)]

    def launch() -> Any:
        graph.replay()
        return kept

    return launch


# ------------------------------------------------------------------------------------- times


def _timed(
    call: Call, clock: Clock, seconds: float, capture: Callable[[Call], Any]
) -> dict[str, Any]:
    """Return a call's time, captured if that can be, in milliseconds a call."""
    try:
        stream, launch = capture(call)
    except Exception as error:
        found: dict[str, Any] = dict(timed(call, clock, seconds))
        return {**found, "how": "calls", "not_captured": f"{type(error).__name__}: {error}"[:200]}
    if stream is None:
        found = dict(timed(launch, clock, seconds))
    else:
        with stream:
            found = dict(timed(launch, clock, seconds))
    for name in ("ms", "q1", "q3"):
        found[name] /= CAPTURED
    return {**found, "how": "graph"}


def _judged(data: Data, results: dict[str, Any], factor: float) -> dict[str, Any]:
    errors = {n: data.error(n, np.asarray(r)) for n, r in results.items()}
    correct = all(
        e <= layers.tolerance(data.shape, data.dtype, n, factor) for n, e in errors.items()
    )
    return {
        "errors": {n: e if math.isfinite(e) else None for n, e in errors.items()},
        "correct": correct,
    }


def _own(
    data: Data, who: str, engine: str | None, pass_: str, best: float, seconds: float
) -> dict[str, Any]:
    call = calls_of(data, engine)[pass_]
    try:
        found = call()
    except gpuconv.EngineError as error:
        return {"unsupported": str(error)[:300]}
    values = (found,) if pass_ in ("forward", "input_grad") else found
    wide = "float64" if data.dtype == "float64" else "float32"
    host = {
        n: gpuconv.asnumpy(v).astype(wide) for n, v in zip(peers.NAMES[pass_], values, strict=True)
    }
    used = {engine} if engine else set(_chosen(data, pass_).split("+"))
    factor = max(dispatch.get_engine(e).error_factor for e in used)
    row = _judged(data, host, factor)
    del found, values
    clock = EventClock()
    first = clock.mark()
    call()
    once = 1e3 * clock.seconds(first, clock.mark())
    if once > HOPELESS * best:
        return {**row, "ms": once, "q1": once, "q3": once, "samples": 1, "how": "one call"}
    return {**row, **_timed(call, clock, seconds, _captured)}


def _chosen(data: Data, pass_: str) -> str:
    """Return the engines that the dispatcher takes."""
    p = data.shape.problem
    passes: tuple[Pass, ...] = (
        ("forward", "input_grad", "weight_grad") if pass_ == "train" else (pass_,)  # type: ignore[assignment]
    )
    return "+".join(dict.fromkeys(dispatch.choose(p, q, "cuda").name for q in passes))


def measure(shape: Shape, dtype: str, seconds: float) -> dict[str, Any]:
    """Return one layer's times in one dtype, every pass and everybody."""
    data = layers.make(shape, dtype)
    before = gpuconv.get_precision()
    gpuconv.set_precision("tf32" if dtype == "tf32" else "default")
    try:
        return _measured(data, seconds)
    finally:
        gpuconv.set_precision(before)
        runtime.cupy().get_default_memory_pool().free_all_blocks()


def _measured(data: Data, seconds: float) -> dict[str, Any]:
    shape = data.shape
    row: dict[str, Any] = {
        "layer": shape.describe(), "kind": shape.kind, "dtype": data.dtype, "passes": {},
    }  # fmt: skip
    torch, jax = torch_on_device(), peers.jax_on_device()
    for pass_ in PASSES:
        times: dict[str, Any] = {}
        best = math.inf
        # The dispatcher's choice first: what it leaves behind is what the others have to meet.
        for who, engine in (("gpuconv", None), *((e, e) for e in engines())):
            times[who] = _own(data, who, engine, pass_, best, seconds)
            best = min(best, times[who].get("ms", math.inf))
        if torch is not None:
            for form in ("NHWC", "NCHW"):
                times[f"torch {form}"] = _torch(torch, data, pass_, form, seconds)
        if jax is not None:
            times["jax"] = _jax(jax, data, pass_, seconds)
        row["passes"][pass_] = {
            "flops": shape.flops(pass_), "bytes": shape.bytes(pass_),
            "chosen": _chosen(data, pass_), "times": times,
        }  # fmt: skip
    return row


def _torch(torch: Any, data: Data, pass_: str, form: str, seconds: float) -> dict[str, Any]:
    arrays = dict(data.inputs)
    if pass_ in ("input_grad", "weight_grad"):
        arrays["dy"] = arrays["dz"]
    call = peers.torch_calls(torch, data.shape, arrays, data.dtype, form)[pass_]
    row = _judged(data, peers.results_of(pass_, call(), "torch"), 10.0)  # cuDNN may choose Winograd
    capture = lambda c: (None, _torch_captured(torch, c))  # noqa: E731
    return {**row, **_timed(call, peers.TorchClock(torch), seconds, capture)}


def _jax(jax: Any, data: Data, pass_: str, seconds: float) -> dict[str, Any]:
    arrays = dict(data.inputs)
    if pass_ in ("input_grad", "weight_grad"):
        arrays["dy"] = arrays["dz"]
    calls, clock = peers.jax_calls(jax, data.shape, arrays, data.dtype)
    row = _judged(data, peers.results_of(pass_, calls[pass_](), "jax"), 10.0)
    return {**row, **timed(calls[pass_], clock, seconds), "how": "calls"}


# ------------------------------------------------------------------------------- the process


def measured(
    units: Sequence[Unit], seconds: float, limit: float, command: Sequence[str] | None = None
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Yield each unit's row, from a process that begins again where it dies.

    Raises
    ------
    TimeOut
        When ``limit`` seconds are over.
    """
    if runtime.installed() is not None:  # a stand-in lives in this process only
        pool = {s.name: s for s in layers.shapes()}
        end = time.monotonic() + limit
        for unit in units:
            if time.monotonic() > end:
                raise TimeOut(f"{unit_name(unit)} and what follows are left for the next run")
            yield unit, measure(pool[unit[0]], unit[1], seconds)
        return
    end, rest, deaths = time.monotonic() + limit, list(units), 0
    while rest:
        for row, why in _child(rest, seconds, end, command):
            unit = rest.pop(0)
            if why:
                deaths += 1
                row = {"failed": why}
            yield unit, row
        if deaths >= DEATHS and rest:
            raise RuntimeError(f"{deaths} processes died; {len(rest)} layers are not timed")


def _child(
    units: Sequence[Unit], seconds: float, end: float, command: Sequence[str] | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield rows in the units' order; if the process dies, an empty row and why it did."""
    process = subprocess.Popen(
        command or [sys.executable, "-m", "benchmarks.gpu.timing"], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    said: list[str] = []
    left = len(units)
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as stream:
            asked = {"units": [list(u) for u in units], "seconds": seconds}
            stream.write(json.dumps(asked).encode())
        for text in _lines(process.stdout, end):
            if text.startswith(MARK):
                left -= 1
                yield json.loads(text[1:]), ""
            else:
                said.append(text)
        if left:
            code = process.wait()
            yield {}, " ".join("\n".join(said[-8:]).split())[-400:] or f"exit status {code}"
    except TimeOut:
        raise TimeOut(f"{left} layers are left for the next run") from None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _lines(pipe: IO[bytes], end: float) -> Iterator[str]:
    """Yield what a process prints, line by line, until it ends.

    Raises
    ------
    TimeOut
        If it is not done at the time ``end``.
    """
    text = b""
    while True:
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeOut("the time is over")
        part = os.read(pipe.fileno(), 1 << 16)
        text += part
        *whole, text = text.split(b"\n")
        yield from (one.decode(errors="replace") for one in whole)
        if not part:
            if text:
                yield text.decode(errors="replace")
            return


def stage(units: Sequence[Unit], seconds: float) -> Callable[[State, float], dict[str, Any]]:
    """Return the stage that times all units, and keeps each as it is done."""

    def work(state: State, limit: float) -> dict[str, Any]:
        done = state.units("timings")
        rest = [u for u in units if "failed" in done.get(unit_name(u), {"failed": "not yet"})]
        for unit, row in measured(rest, seconds, limit):
            state.add("timings", unit_name(unit), row)
            print(line(unit, row), flush=True)
        found = {unit_name(u): state.units("timings")[unit_name(u)] for u in units}
        wrong = _wrong(found)
        return {"passed": not wrong, "reason": "; ".join(wrong[:5]), "rows": found}

    return work


def _wrong(rows: dict[str, Any]) -> list[str]:
    """Return a line for every failure, and every wrong result of ours."""
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name}: {row['failed']}")
        for pass_, found in row.get("passes", {}).items():
            for who, one in found["times"].items():
                if not one.get("correct", True) and not who.startswith(("torch", "jax")):
                    lines.append(f"{name}, {pass_}, {who}: wrong result, errors {one['errors']}")
    return lines


def line(unit: Unit, row: dict[str, Any]) -> str:
    """Return a layer's times in a few words: the best of ours over the best of PyTorch."""
    if "failed" in row:
        return f"{unit_name(unit)}: failed: {row['failed']}"
    parts = []
    for pass_, found in row["passes"].items():
        own = min((t["ms"], w) for w, t in found["times"].items() if "ms" in t and "torch" not in w)
        other = [t["ms"] for w, t in found["times"].items() if "ms" in t and w.startswith("torch")]
        beside = f", PyTorch {min(other):.4f}" if other else ""
        parts.append(f"{pass_} {own[0]:.4f} ms ({own[1]}){beside}")
    return f"{unit_name(unit)}: " + "; ".join(parts)


def main() -> int:
    """Time what standard input asks for; print a line a unit."""
    asked = json.loads(sys.stdin.read())
    pool = {s.name: s for s in layers.shapes()}
    for name, dtype in asked["units"]:
        row = measure(pool[name], dtype, asked.get("seconds", 0.03))
        print(MARK + json.dumps(row, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
