"""What the engines' cost models say of a GPU that is not here: ``python -m benchmarks.predict``.

    python -m benchmarks.predict --gpu H100                 # a line a class, dtype and pass
    python -m benchmarks.predict --gpu A100 --layers '*3x3*' # and of these layers, every engine

Every number is a prediction, from the data sheet's peaks and the models by which engines and
tiles are chosen; nothing is measured. The floor is the larger of the definition's operations over
the peak and the fewest bytes over the bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

import gpuconv
from benchmarks import suite
from benchmarks.gpu import shapes
from benchmarks.report import format_table, geometric_mean
from benchmarks.suite import CLASSES, Shape
from gpuconv import dispatch
from gpuconv.cuda import runtime
from gpuconv.cuda.architecture import GPU, architecture
from gpuconv.engines.base import PASSES, Engine, Pass

__all__ = ["GPUS", "Absent", "Prediction", "assumed", "main", "predictions", "section", "table"]

#: From the data sheets: capability, multiprocessors, boost clock, bytes/s, bytes of L2.
GPUS = {
    name: GPU(architecture(capability), capability, count, clock, bandwidth, l2 << 20)
    for name, capability, count, clock, bandwidth, l2 in (
        ("V100", 70, 80, 1.53e9, 0.9e12, 6),
        ("T4", 75, 40, 1.59e9, 0.32e12, 4),
        ("A100", 80, 108, 1.41e9, 1.555e12, 40),
        ("RTX3090", 86, 82, 1.70e9, 0.936e12, 6),
        ("RTX4090", 89, 128, 2.52e9, 1.008e12, 72),
        ("H100", 90, 132, 1.83e9, 3.35e12, 50),
    )
}
#: Of the classes and dtypes, what the README shows.
SHOWN = "H100"


@dataclass(frozen=True)
class Prediction:
    """One layer, dtype and pass: the floor and what each engine that takes it predicts, in seconds."""

    shape: Shape
    dtype: str
    pass_: Pass
    floor: float
    seconds: dict[str, float]

    @property
    def best(self) -> str | None:
        """The engine of the least time; ``cudnn``, which is not ours, left out."""
        own = {n: s for n, s in self.seconds.items() if n != "cudnn"}
        return min(own, key=lambda n: own[n]) if own else None


class Absent:
    """In the place of CuPy: says what a device is, and does nothing else."""

    def __init__(self, gpu: GPU, index: int) -> None:
        bus = 4096  # bits; only the product with the clock counts
        attributes = {
            "MultiProcessorCount": gpu.multiprocessors, "ClockRate": gpu.clock / 1e3,
            "GlobalMemoryBusWidth": bus, "MemoryClockRate": gpu.bandwidth / (2 * bus / 8) / 1e3,
            "L2CacheSize": gpu.l2_bytes, "WarpSize": 32, "MaxThreadsPerBlock": 1024,
            "MaxSharedMemoryPerBlock": 48 << 10,
            "MaxSharedMemoryPerBlockOptin": gpu.architecture.shared_per_block,
        }  # fmt: skip
        device = _Device(index, attributes, str(gpu.capability))
        self.cuda = SimpleNamespace(
            Device=lambda which=index: device,
            runtime=SimpleNamespace(
                getDevice=lambda: index,
                getDeviceCount=lambda: 1,
                getDeviceProperties=lambda device: {"name": str(gpu)},
            ),
            cublas=SimpleNamespace(),
        )
        self.zeros: Any = np.zeros


class _Device(nullcontext[None]):
    """What ``cupy.cuda.Device`` tells, and a context as it is one."""

    def __init__(self, index: int, attributes: dict[str, float], capability: str) -> None:
        super().__init__()
        self.id, self.attributes, self.compute_capability = index, attributes, capability


@contextmanager
def assumed(gpu: GPU) -> Iterator[None]:
    """Let the engines believe that this GPU is the current device; nothing can be computed on it.

    Each has a number of its own as device, so that what engines keep by device stays apart.
    """
    before = runtime.installed()
    runtime.install(Absent(gpu, 1000 + list(GPUS.values()).index(gpu)))
    try:
        yield
    finally:
        if before is None:
            runtime.uninstall()
        else:
            runtime.install(before)


def _engines() -> dict[str, Engine]:
    """Return the CUDA engines, whether or not there is a device for them here."""
    return {i.name: dispatch.get_engine(i.name) for i in gpuconv.engines() if i.device == "cuda"}


def predictions(gpu: GPU, layers: Iterable[Shape], dtypes: Iterable[str]) -> list[Prediction]:
    """Return what the engines predict of every layer, dtype and pass on a GPU."""
    made = []
    before = gpuconv.get_precision()
    engines = _engines()
    with assumed(gpu):
        for dtype in dtypes:
            tensor = dtype not in ("float32", "float64")
            plain = "float32" if dtype == "tf32" else dtype
            peak = max(gpu.flops(plain, tensor_cores=tensor), gpu.flops(plain))
            gpuconv.set_precision("tf32" if dtype == "tf32" else "default")
            try:
                for shape in layers:
                    own = shape.with_dtype(plain)
                    for pass_ in PASSES:
                        seconds = _seconds(engines, own, pass_)
                        floor = own.floor(pass_, peak, gpu.bandwidth)
                        made.append(Prediction(own, dtype, pass_, floor, seconds))
            finally:
                gpuconv.set_precision(before)
    return made


def _seconds(engines: dict[str, Engine], shape: Shape, pass_: Pass) -> dict[str, float]:
    problem = shape.problem
    return {
        name: engine.cost(problem, pass_)
        for name, engine in engines.items()
        if engine.unsupported(problem, pass_) is None
    }


def table(found: Sequence[Prediction]) -> str:
    """Return the percent of the floor by class and dtype, and the engines that win.

    A cell holds the geometric means of forward, input gradient and weight gradient.
    """
    dtypes = list(dict.fromkeys(p.dtype for p in found))
    lines = [["layers", *dtypes, "engines"]]
    for kind in CLASSES:
        here = [p for p in found if p.shape.kind == kind]
        if not here:
            continue
        best = dict.fromkeys(p.best for p in here if p.best)
        cells = [_percents([p for p in here if p.dtype == d]) for d in dtypes]
        lines.append([kind, *cells, ", ".join(f"`{b}`" for b in sorted(map(str, best)))])
    return format_table(lines)


def _percents(found: Sequence[Prediction]) -> str:
    texts = []
    for pass_ in PASSES:
        parts = [p.floor / p.seconds[p.best] for p in found if p.pass_ == pass_ and p.best]
        mean = geometric_mean(parts)
        texts.append("-" if mean is None else f"{100 * mean:.0f}")
    return " / ".join(texts)


def _layers(found: Sequence[Prediction]) -> str:
    engines = list(dict.fromkeys(n for p in found for n in p.seconds))
    lines = [
        ["layer", "dtype", "pass", "floor, µs", *(f"{n}, µs" for n in engines), "best of floor"]
    ]
    for p in found:
        times = [f"{1e6 * p.seconds[n]:.1f}" if n in p.seconds else "-" for n in engines]
        part = f"{100 * p.floor / p.seconds[p.best]:.0f} %" if p.best else "-"
        lines.append([p.shape.name, p.dtype, p.pass_, f"{1e6 * p.floor:.1f}", *times, part])
    return format_table(lines)


def section(name: str = SHOWN) -> str:
    """Return what the README shows of a GPU that nothing was measured on."""
    found = predictions(GPUS[name], shapes.shapes(), shapes.DTYPES)
    return (
        f"**Predicted, not measured**: percent of the floor that the data sheet of an {name} sets "
        "(forward / input gradient / weight gradient), as the engines' cost models have it: the best "
        f"engine, geometric means over the suite at {shapes.FACTOR} times the CPU's batches. Winograd "
        f"may pass 100. `python -m benchmarks.predict --gpu {name}` says it anew.\n\n{table(found)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    add: Any = parser.add_argument
    add("--gpu", default=SHOWN, choices=sorted(GPUS), help=f"which ({SHOWN})")
    add("--dtypes", default=",".join(shapes.DTYPES), metavar="LIST")
    add("--layers", metavar="LIST", help="these, with every engine's time")
    args = parser.parse_args(arguments)
    dtypes = args.dtypes.split(",")
    if set(dtypes) - {*shapes.DTYPES, "float64"}:
        print(f"dtypes is {args.dtypes!r}; expected of {', '.join(shapes.DTYPES)}", file=sys.stderr)
        return 2
    try:
        pool = suite.select(shapes.shapes(), args.layers.split(",") if args.layers else ())
    except suite.SuiteError as error:
        print(error, file=sys.stderr)
        return 2
    found = predictions(GPUS[args.gpu], pool, dtypes)
    print(f"PREDICTED for {args.gpu} by the engines' cost models; nothing is measured.\n")
    print(_layers(found) if args.layers else table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
