"""One child process of the benchmark: it holds one peer and does what it is told, line by line.

``python -m benchmarks.worker PEER THREADS`` reads requests from stdin and answers each with one
line on stdout; both are JSON objects. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import PEERS, Peer, Prepared, Unsupported, make_peer
from benchmarks.plain import TooSlow
from benchmarks.suite import Shape
from gpuconv.dispatch import EngineError
from gpuconv.profiling.floors import measure_cpu
from gpuconv.profiling.timing import sample

__all__ = ["Worker", "serve"]

#: Seconds that one sample should take; shorter calls are repeated within it.
SAMPLE = 2e-3
#: The most samples of one turn.
MOST = 1000


class Worker:
    """What the process holds between requests.

    Parameters
    ----------
    peer : str
        Its name, or ``"none"`` for a process that only makes cases and measures the machine.
    threads : int
        For the peer and for BLAS.
    """

    def __init__(self, peer: str, threads: int) -> None:
        self.name = peer
        self.threads = threads
        self.forced = ":" in peer
        self.why: str | None = None
        self.peer: Peer | None = None
        self.case: Case | None = None
        self.prepared: dict[str, tuple[Prepared, int]] = {}
        if peer != "none":
            base = PEERS.get(peer.partition(":")[0])
            self.why = None if base is None else base.missing()
            if self.why is None:
                self.peer = make_peer(peer, threads)
        else:
            cases.warm()
        # Collecting garbage before each turn is quick when a library's own objects are left out.
        gc.collect()
        gc.freeze()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; the fields are the arguments of the method that ``op`` names."""
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "hello": self.hello,
            "machine": self.machine,
            "make": self.make,
            "load": self.load,
            "prepare": self.prepare,
            "time": self.time,
            "memory": self.memory,
            "drop": self.drop,
        }
        arguments = dict(request)
        return operations[arguments.pop("op")](**arguments)

    # ------------------------------------------------------------------------- the process

    def hello(self) -> dict[str, Any]:
        """Return why the peer cannot run here, or its versions and libraries."""
        if self.why is not None:
            return {"missing": self.why}
        from threadpoolctl import threadpool_info

        keys = ("user_api", "internal_api", "version", "architecture", "num_threads")
        pools = [{k: pool.get(k) for k in keys} for pool in threadpool_info()]
        versions = {} if self.peer is None else self.peer.versions()
        return {"versions": versions, "pools": pools}

    def machine(self, dtypes: list[str], seconds: float = 0.5) -> dict[str, Any]:
        """Measure BLAS's best FLOP/s in each dtype, and the memory's byte/s, read plus written."""
        found = measure_cpu(dtypes, self.threads, seconds)
        return {"peak": found.peak, "bandwidth": found.bandwidth}

    # ---------------------------------------------------------------------------- the case

    def make(self, shape: dict[str, Any], folder: str, seed: int = 0) -> dict[str, Any]:
        """Make a case with its reference results and leave it in ``folder``."""
        cases.make(Shape.from_json(shape), seed).save(Path(folder))
        return {}

    def load(self, shape: dict[str, Any], folder: str) -> dict[str, Any]:
        """Read a case."""
        self.drop()
        self.case = Case.load(Path(folder), Shape.from_json(shape))
        return {}

    def drop(self) -> dict[str, Any]:
        """Let go of the case."""
        self.prepared, self.case = {}, None
        gc.collect()
        return {}

    def prepare(self, pass_: str) -> dict[str, Any]:
        """Prepare every variant, check its results, and see how long a call takes."""
        peer, case = self._ready()
        self.prepared = {}
        found = {}
        try:
            about = peer.about(case, pass_)
            for variant in peer.variants(case):
                prepared = peer.prepare(case, pass_, variant)
                errors = _errors(case, prepared.collect(prepared.run()))
                seconds = sample(prepared.run, 1)
                limits = {
                    n: cases.tolerance(case.shape, n, about.get("error_factor", 1.0))
                    for n in errors
                }
                found[variant] = {
                    "errors": errors,
                    "tolerances": limits,
                    "correct": all(errors[n] <= limits[n] for n in errors),
                    "seconds": seconds,
                    "once": seconds > peer.patience,
                }
                calls = max(1, min(100_000, math.ceil(SAMPLE / max(seconds, 1e-9))))
                self.prepared[variant] = prepared, calls
        except (TooSlow, Unsupported, EngineError) as why:
            if isinstance(why, EngineError) and not self.forced:
                raise
            self.prepared = {}
            return {"unsupported": str(why)}
        return {"variants": found, "about": about}

    def time(self, variant: str, seconds: float) -> dict[str, Any]:
        """Return the seconds per call of as many samples as fit, at least one.

        Short calls are made a few times before, untimed: other processes had the cores.
        """
        prepared, calls = self.prepared[variant]
        run = prepared.run
        gc.collect()
        gc.disable()
        try:
            warm, start = 0.05 * seconds, time.perf_counter()
            times = [sample(run, calls)]
            if times[0] * calls < seconds:
                while time.perf_counter() - start < warm:
                    sample(run, calls)
                times, start = [], time.perf_counter()
                while not times or (time.perf_counter() - start < seconds and len(times) < MOST):
                    times.append(sample(run, calls))
        finally:
            gc.enable()
        return {"times": times, "calls": calls}

    def memory(self, pass_: str) -> dict[str, Any]:
        """Return the bytes that the first call allocates beyond its results, at the peak.

        NumPy tells :mod:`tracemalloc` of its arrays; memory inside BLAS is not in it.
        """
        import gpuconv

        peer, case = self._ready()
        prepared = peer.prepare(case, pass_, peer.variants(case)[0])
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        results = prepared.collect(prepared.run())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = sum(r.nbytes for r in results.values())
        return {"extra": max(0, peak - before - size), "limit": gpuconv.get_workspace_limit()}

    def _ready(self) -> tuple[Peer, Case]:
        if self.peer is None or self.case is None:
            raise RuntimeError("no peer or no case")
        return self.peer, self.case


def _errors(case: Case, results: dict[str, Any]) -> dict[str, float]:
    return {n: cases.compare(r, case.expected[n]) for n, r in results.items()}


def serve(make: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> int:
    """Answer requests with what ``make`` returns until stdin ends; errors are answers too."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answerer: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    failure = ""
    try:
        answerer = make()
    except Exception:
        failure = traceback.format_exc()
    for line in sys.stdin:
        answer: dict[str, Any]
        if answerer is None:
            answer = {"error": failure}
        else:
            try:
                answer = answerer(json.loads(line))
            except Exception:
                answer = {"error": traceback.format_exc()}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(serve(lambda: Worker(sys.argv[1], int(sys.argv[2])).answer))
