"""The runner: every shape and pass, by every peer, in turn.

Each peer lives in a child process. A case is made once, checked by every peer against a float64
reference, and then timed in rounds: in each round every peer has one turn, and the order rotates,
so that a drift of the machine meets all of them. Between turns there is a pause, in which threads
that spin for work in the process before fall asleep.
"""

from __future__ import annotations

import datetime
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.children import Child, ChildError, pinned
from benchmarks.peers import PEERS
from benchmarks.suite import PASSES, Shape

__all__ = ["DTYPES", "Options", "OptionsError", "Runner", "check", "exponent", "run"]

DTYPES = ("float32", "float64")
#: Seconds between two turns, in which the threads of the peer before come to rest.
PAUSE = 0.05
#: The same after peers that leave the threads to OpenBLAS: its idle ones spin for longer.
LONG_PAUSE = 0.3
BLAS_PEERS = ("im2col64", "im2col", "loops")
#: Seconds after which a child that does not answer is given up.
TIMEOUT = 300.0
#: Samples that are enough of a peer so slow that its time is used up.
ENOUGH = 3
SCHEMA = 1

#: How far the layer of the scaling fits is varied.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (14, 28, 56, 112)


class OptionsError(ValueError):
    """What was asked for cannot be run."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes
    ----------
    shapes : list of Shape
        The layers.
    dtypes, passes, peers : tuple of str
        Of :data:`DTYPES`, :data:`benchmarks.suite.PASSES` and :data:`benchmarks.peers.PEERS`; a
        peer may also be ``"gpuconv:ENGINE"``.
    threads : int
        For every peer.
    repeat : int
        Rounds.
    seconds : float
        For each peer, pass and shape, over all rounds.
    memory : bool
        Whether to measure gpuconv's memory.
    scaling : str or None
        Name of the shape whose time is fitted against batch and image size.
    compiled : bool
        Whether gpuconv may choose the engines of its extra ``numba``.
    """

    shapes: list[Shape]
    dtypes: tuple[str, ...] = ("float32",)
    passes: tuple[str, ...] = ("forward", "train")
    peers: tuple[str, ...] = tuple(PEERS)
    threads: int = 1
    repeat: int = 5
    seconds: float = 0.4
    memory: bool = True
    scaling: str | None = None
    compiled: bool = False
    say: Callable[[str], None] = field(default=lambda text: None, compare=False)


def check(options: Options) -> None:
    """Raise :class:`OptionsError` where ``options`` names what there is not."""
    if not options.shapes:
        raise OptionsError("no shape is left to time")
    if options.scaling is not None:
        layer = next((s for s in options.shapes if s.name == options.scaling), None)
        if layer is None or layer.transposed:
            raise OptionsError(
                f"scaling is {options.scaling!r}; expected a chosen layer that is not transposed"
            )
    for name, values, allowed in (
        ("dtype", options.dtypes, DTYPES),
        ("passes", options.passes, PASSES),
    ):
        if not values:
            raise OptionsError(f"{name} is empty; expected some of {', '.join(allowed)}")
        for value in values:
            if value not in allowed:
                raise OptionsError(f"{name} is {value!r}; expected some of {', '.join(allowed)}")
    for peer in options.peers:
        base, colon, engine = peer.partition(":")
        if base not in PEERS or (colon and (base != "gpuconv" or not engine)):
            raise OptionsError(
                f"peers has {peer!r}; expected some of {', '.join(PEERS)}, gpuconv:ENGINE"
            )
        if engine:
            from gpuconv.dispatch import engines

            here = [e.name for e in engines() if e.device == "cpu" and e.available]
            if engine not in here:
                raise OptionsError(f"peers has {peer!r}; the engines are {', '.join(here)}")
    cores = machine.describe()["cores"]
    if not 1 <= options.threads <= cores:
        raise OptionsError(f"threads is {options.threads}; expected 1 to {cores}, the cores here")
    if options.repeat < 1:
        raise OptionsError(f"repeat is {options.repeat}; expected at least 1")
    if not 0 < options.seconds < 1e4:
        raise OptionsError(f"seconds is {options.seconds}; expected a positive number")


def run(options: Options) -> dict[str, Any]:
    """Run the benchmark and return its result, in plain types.

    Raises
    ------
    OptionsError
        If it cannot be run as asked.
    """
    check(options)
    idle = machine.busy()
    with pinned(options.threads), ExitStack() as stack:
        runner = Runner(options, stack)
        result = runner.result()
    others = [b for b in (idle, machine.busy()) if b is not None]
    result["machine"]["busy_cores"] = max(others, default=None)
    return result


class Runner:
    """The children, and what they are told."""

    def __init__(self, options: Options, stack: ExitStack) -> None:
        self.options = options
        self._stack = stack
        folder = tempfile.mkdtemp(prefix="gpuconv-bench-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self._folder = Path(folder)
        self._base = self._start("none")
        self._children: dict[str, Child] = {}
        self.about: dict[str, dict[str, Any]] = {}
        started = {n: self._start(n) for n in dict.fromkeys(("gpuconv", *options.peers))}
        for name, child in started.items():
            self.about[name] = child.ask("hello")
            if "missing" in self.about[name]:
                options.say(f"left out: {self.about[name]['missing']}")
                child.close()
            else:
                self._children[name] = child

    def _start(self, peer: str) -> Child:
        return self._stack.enter_context(
            Child(peer, self.options.threads, compiled=self.options.compiled)
        )

    def result(self) -> dict[str, Any]:
        """Measure everything."""
        options = self.options
        started = time.perf_counter()
        date = datetime.datetime.now(datetime.timezone.utc)
        rows = []
        jobs = [s.with_dtype(d) for d in options.dtypes for s in options.shapes]
        roofs: dict[str, Any] = {
            "dtypes": list(options.dtypes), "seconds": 0.5 if len(jobs) > 8 else 0.1,
        }  # fmt: skip
        before = self._base.ask("machine", **roofs)
        for number, shape in enumerate(jobs, 1):
            head = f"[{number}/{len(jobs)}] {shape.name} {shape.problem.dtype}"
            rows += self.shape(shape, options.passes, tuple(self._children), head)
        fits = self._scaling() if options.scaling else []
        after = self._base.ask("machine", **roofs)
        peak = {d: max(before["peak"][d], after["peak"][d]) for d in options.dtypes}
        bandwidth = max(before["bandwidth"], after["bandwidth"])
        shapes = {s.name: s for s in options.shapes}
        for row in rows:
            shape = shapes[row["shape"]].with_dtype(row["dtype"])
            row["floor"] = shape.floor(row["pass"], peak[row["dtype"]], bandwidth)
        return {
            "schema": SCHEMA,
            "date": date.isoformat(timespec="seconds"),
            "seconds": time.perf_counter() - started,
            "machine": {
                **machine.describe(),
                "blas": self._blas(),
                "peak_flops": peak,
                "bandwidth_bytes": bandwidth,
            },
            "options": {
                "shapes": [s.name for s in options.shapes],
                "dtypes": list(options.dtypes),
                "passes": list(options.passes),
                "threads": options.threads,
                "repeat": options.repeat,
                "seconds": options.seconds,
                "compiled": options.compiled,
            },
            "peers": self.about,
            "rows": rows,
            "scaling": fits,
        }

    def _blas(self) -> dict[str, Any]:
        """Return the library that NumPy multiplies matrices with."""
        pools = self._base.ask("hello")["pools"]
        return next((p for p in pools if p["user_api"] == "blas"), {})

    # ------------------------------------------------------------------------- one shape

    def shape(
        self, shape: Shape, passes: Iterable[str], peers: tuple[str, ...], head: str
    ) -> list[dict[str, Any]]:
        """Return the rows of one layer, one a pass."""
        folder = self._folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case = {"shape": shape.to_json(), "folder": str(folder)}
        try:
            self._base.ask("make", timeout=TIMEOUT, **case)
            peers = tuple(p for p in peers if not _twice(p, peers, shape.problem.dtype))
            return [self._row(shape, pass_, peers, case, head) for pass_ in passes]
        finally:
            for child in self._children.values():
                if child.alive:
                    child.ask("drop")

    def _row(
        self, shape: Shape, pass_: str, peers: tuple[str, ...], case: dict[str, Any], head: str
    ) -> dict[str, Any]:
        found = {peer: self._prepare(peer, pass_, case) for peer in peers}
        self._time(found)
        row: dict[str, Any] = {
            "shape": shape.name,
            "network": shape.network,
            "kind": shape.kind,
            "layer": shape.describe(),
            "dtype": shape.problem.dtype,
            "pass": pass_,
            "flops": shape.flops(pass_),
            "bytes": shape.bytes(pass_),
            "peers": {peer: _outcome(entry) for peer, entry in found.items()},
        }
        if self.options.memory:
            row["memory"] = self._memory(pass_, case)
        self.options.say(f"{head} {pass_}: {_line(row)}")
        return row

    def _prepare(self, peer: str, pass_: str, case: dict[str, Any]) -> dict[str, Any]:
        """Have a peer load the case, prepare the pass and check its results."""
        child = self._children[peer]
        try:
            if not child.alive:
                child = self._children[peer] = self._start(peer)
            child.ask("load", timeout=TIMEOUT, **case)
            answer = child.ask("prepare", pass_=pass_)
        except ChildError as error:
            return {"failed": str(error)}
        for entry in answer.get("variants", {}).values():
            entry["times"] = [entry["seconds"]] if entry["once"] else []
            entry["rounds"] = list(entry["times"])
            entry["calls"] = 1
        return answer

    def _time(self, found: dict[str, dict[str, Any]]) -> None:
        """Add the times of every correct variant, round by round."""
        turns = [
            (peer, variant)
            for peer, answer in found.items()
            for variant, entry in answer.get("variants", {}).items()
            if entry["correct"] and not entry["once"]
        ]
        share = self.options.seconds / self.options.repeat
        before = ""
        for number in range(self.options.repeat):
            at = number % max(1, len(turns))
            for peer, variant in turns[at:] + turns[:at]:
                if "failed" in found[peer]:
                    continue
                entry = found[peer]["variants"][variant]
                spent = entry["calls"] * sum(entry["times"])
                if len(entry["times"]) >= ENOUGH and spent > self.options.seconds:
                    continue
                time.sleep(LONG_PAUSE if before in BLAS_PEERS else PAUSE)
                before = peer
                try:
                    answer = self._children[peer].ask("time", variant=variant, seconds=share)
                except ChildError as error:
                    found[peer] = {"failed": str(error)}
                    continue
                entry["times"] += answer["times"]
                entry["rounds"].append(statistics.median(answer["times"]))
                entry["calls"] = answer["calls"]

    def _memory(self, pass_: str, case: dict[str, Any]) -> dict[str, Any]:
        """Return what gpuconv allocates in a process that has computed nothing before."""
        try:
            with Child("gpuconv", self.options.threads, compiled=self.options.compiled) as child:
                child.ask("load", timeout=TIMEOUT, **case)
                return child.ask("memory", pass_=pass_)
        except ChildError as error:
            return {"failed": str(error)}

    # ----------------------------------------------------------------------------- scaling

    def _scaling(self) -> list[dict[str, Any]]:
        """Time one layer over batches and over image sizes, and fit the exponents."""
        options = self.options
        base = next(s for s in options.shapes if s.name == options.scaling)
        side = base.problem.in_shape[0]
        images = [base.with_batch(4).with_input(n, n) for n in SIZES]
        images = [s for s in images if min(s.problem.out_shape) > 0]
        sweeps: list[tuple[str, list[int], list[Shape]]] = [
            ("batch", list(BATCHES), [base.with_batch(n) for n in BATCHES]),
            ("image side", [s.problem.in_shape[0] for s in images], images),
        ]
        peers = tuple(p for p in self._children if p in ("gpuconv", "torch"))
        fits = []
        for axis, values, shapes in sweeps:
            rows: dict[str, list[dict[str, Any]]] = {p: [] for p in options.passes}
            for value, shape in zip(values, shapes, strict=True):
                typed = shape.with_dtype(options.dtypes[0])
                head = f"[scaling] {base.name} {axis} {value}"
                for row in self.shape(typed, options.passes, peers, head):
                    rows[row["pass"]].append(row)
            for pass_, found in rows.items():
                seconds = {
                    peer: [row["peers"][peer].get("seconds") for row in found] for peer in peers
                }
                fits.append(
                    {
                        "shape": base.name,
                        "fixed": f"{side}x{side}" if axis == "batch" else "batch 4",
                        "dtype": options.dtypes[0],
                        "pass": pass_,
                        "axis": axis,
                        "values": values,
                        "flops": [row["flops"] for row in found],
                        "seconds": seconds,
                        "exponent": {
                            peer: exponent([row["flops"] for row in found], times)
                            for peer, times in seconds.items()
                        },
                    }
                )
        return fits


def exponent(work: list[int], seconds: list[float | None]) -> float | None:
    """Return the slope of log time over log FLOPs, by least squares; 1 is linear cost."""
    from math import log

    pairs = [(log(f), log(t)) for f, t in zip(work, seconds, strict=True) if t]
    if len(pairs) < 2:
        return None
    return statistics.linear_regression(*zip(*pairs, strict=True)).slope


def _twice(peer: str, peers: tuple[str, ...], dtype: str) -> bool:
    """Return whether a peer computes what another does: the im2col in float64."""
    return peer == "im2col" and dtype == "float64" and "im2col64" in peers


def _outcome(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a peer's part of a row: its best variant's times, or why there are none."""
    for key in ("failed", "unsupported"):
        if key in answer:
            return {"left_out": answer[key]} if key == "unsupported" else {key: answer[key]}
    variants = answer["variants"]
    right = {v: e for v, e in variants.items() if e["correct"] and e["times"]}
    if not right:
        return {"wrong": {v: e["errors"] for v, e in variants.items()}}
    best = min(right, key=lambda v: statistics.median(right[v]["times"]))
    entry = right[best]
    q1, median, q3 = _quartiles(entry["times"])
    return {
        "seconds": median,
        "q1": q1,
        "q3": q3,
        "least": min(entry["times"]),
        "rounds": entry["rounds"],
        "samples": len(entry["times"]),
        "calls": entry["calls"],
        "variant": best,
        "variants": {v: statistics.median(e["times"]) for v, e in right.items()},
        "wrong_variants": sorted(set(variants) - set(right)),
        "errors": entry["errors"],
        "tolerances": entry["tolerances"],
        **answer["about"],
    }


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return q1, median, q3


def _line(row: dict[str, Any]) -> str:
    """Return a row in a few words, for whoever watches."""
    own = row["peers"].get("gpuconv", {})
    if "seconds" not in own:
        return f"gpuconv: {'wrong result' if 'wrong' in own else own}"
    engines = "+".join(dict.fromkeys(own.get("engines", [])))
    parts = [
        f"{1e3 * own['seconds']:.3f} ms, {row['flops'] / own['seconds'] / 1e9:.0f} GFLOP/s "
        f"by {engines}"
    ]
    for peer, other in row["peers"].items():
        if peer != "gpuconv" and "seconds" in other:
            parts.append(f"{other['seconds'] / own['seconds']:.2f} x {peer}")
        elif "seconds" not in other and "left_out" not in other:
            parts.append(f"{peer} {'wrong' if 'wrong' in other else 'failed'}")
    return ", ".join(parts)
