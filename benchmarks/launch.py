"""What a call costs in Python, beside its launches: ``python -m benchmarks.launch``.

    python -m benchmarks.launch                               # every engine and pass
    python -m benchmarks.launch --engines cuda_winograd --profile   # and where the time goes

No GPU takes part. Kernels and cuBLAS are there by name and do nothing; everything in front of
them is what runs on a GPU: checks, choice, plans, arguments. Arrays are CuPy's own, over
memory of the host, or, where CuPy is not installed, those of the tests. From a call's time the
bare launches are taken off, as many as it makes; what is left is what gpuconv adds. Engines plan
for an H100. Times are medians of many rounds.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

import gpuconv
from benchmarks.predict import GPUS, Absent
from benchmarks.report import format_table
from gpuconv import dispatch
from gpuconv.cuda import runtime
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import PASSES, Pass
from gpuconv.functional.plan import make_plan

__all__ = ["CASES", "ENGINES", "Case", "Cost", "idle", "main", "measure"]

Array = Any

#: What is measured, in the order of the table. cuDNN's own time in a call is not gpuconv's.
ENGINES = (
    "cuda_implicit_gemm", "cuda_gemm", "cuda_tensor_core", "cuda_depthwise", "cuda_winograd",
    "cuda_atomic",
)  # fmt: skip
#: Calls of a round, and rounds.
CALLS, ROUNDS = 100, 31


@dataclass(frozen=True)
class Case:
    """A layer: 3x3 of 64 channels over 28x28 unless it says otherwise."""

    name: str
    batch: int = 4
    layout: str = "NHWC"
    taps: int = 3
    stride: int = 1


CASES = (
    Case("3x3"),
    Case("3x3, channels first", layout="NCHW"),
    Case("1x1", taps=1),
    Case("3x3, stride 2", stride=2),
)


class Idle:
    """What launches nothing, and counts how often."""

    launches = 0

    @staticmethod
    def kernel(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
        Idle.launches += 1

    @staticmethod
    def product(*arguments: Any) -> None:
        Idle.launches += 1

    @staticmethod
    def fill(array: Array, value: Array = None) -> None:
        Idle.launches += 1


class _Library(Absent):
    """CuPy, or what stands in for it, whose kernels, products and copies do nothing."""

    def __init__(self, arrays: Any, empty: Callable[..., Array]) -> None:
        super().__init__(GPUS["H100"], 0)
        self._probed = self.zeros
        self._arrays, self.ndarray, self.empty = arrays, arrays.ndarray, empty
        self.cuda.cublas = SimpleNamespace(gemmStridedBatchedEx=Idle.product)
        self.cuda.get_cublas_handle = lambda: 1
        module = SimpleNamespace(get_function=lambda name: Idle.kernel)
        self.libcuda = SimpleNamespace(
            cuTensorMapEncodeTiled=lambda *_: 0, cuTensorMapEncodeIm2col=lambda *_: 0
        )
        self.RawModule = lambda **options: module
        self.zeros = self._zeros

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._arrays, name)
        setattr(self, name, found)
        return found

    def _zeros(self, shape: Any, dtype: Any = "float32") -> Array:
        if shape == 1:  # the look for a device that works
            return self._probed(shape, dtype)
        return self.array(self.empty(shape, dtype))

    def array(self, a: Array, order: str = "C") -> Array:
        """Return room for a copy: CuPy's copies are launches."""
        Idle.launches += 1
        return self.empty(a.shape, a.dtype)

    def ascontiguousarray(self, a: Array) -> Array:
        """Return the array, or room for its copy."""
        return a if a.flags.c_contiguous else self.array(a)


def _of_cupy() -> Any:
    """Return CuPy, its arrays in one piece of the host's memory, which nothing touches."""
    import cupy
    from cupy.cuda import memory

    room = np.zeros(1 << 20, np.uint8)
    start = -(-room.ctypes.data // 256) * 256
    piece = memory.MemoryPointer(memory.UnownedMemory(start, 1 << 30, room, 0), 0)
    cupy.cuda.set_allocator(lambda size: piece)
    return cupy


@contextmanager
def idle(arrays: str = "cupy") -> Iterator[Any]:
    """Put a library in the place of CuPy that launches nothing.

    Parameters
    ----------
    arrays : {"cupy", "stand-in"}
        Whose arrays; the time of the tests' ``empty`` is left out, as they fill it with NaN.

    Yields
    ------
    object
        Use it as ``cupy``: ``empty`` makes arrays.
    """
    before = runtime.installed()
    plain = cuda_arrays.put, cuda_arrays.zero
    if arrays == "cupy":
        found = _of_cupy()
        made: Any = _Library(found, found.empty)
    else:
        from tests.cuda_on_cpu import stand_in

        with stand_in() as found:
            kept: dict[Any, Array] = {}
            make = found.empty

            def empty(shape: Any, dtype: Any) -> Array:
                key = shape, dtype
                if key not in kept:
                    kept[key] = make(shape, dtype)
                return kept[key]

            made = _Library(found, empty)
    runtime.install(made)
    for name in ("put", "zero"):
        setattr(cuda_arrays, name, Idle.fill)
    try:
        yield made
    finally:
        cuda_arrays.put, cuda_arrays.zero = plain
        if arrays == "cupy":
            found.cuda.set_allocator(None)
        if before is None:
            runtime.uninstall()
        else:
            runtime.install(before)


@dataclass(frozen=True)
class Cost:
    """What one pass costs in Python, in seconds.

    Attributes
    ----------
    engine, case, what : str
        ``what`` is a pass of the engine, or a public call.
    launches : int
        Kernels and products.
    seconds : float
        Without the bare launches.
    """

    engine: str
    case: str
    what: str
    launches: int
    seconds: float


def _medians(called: Sequence[tuple[str | None, Callable[[], Any]]], rounds: int) -> list[float]:
    """Return the seconds of calls by engines, each round over all: so a disturbance hits few of each."""
    times: list[list[float]] = [[] for _ in called]
    gc.disable()  # as timeit does: a collection is no part of a call
    try:
        for _ in range(rounds):
            for (engine, call), own in zip(called, times, strict=True):
                with gpuconv.engine(engine):
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    own.append((time.perf_counter() - start) / CALLS)
    finally:
        gc.enable()
    return [statistics.median(own) for own in times]


def calls(xp: Any, engine: str, case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is measured: the passes of an engine, then the public calls that lead to them."""
    dtype = "float16" if engine == "cuda_tensor_core" else "float32"
    channels, size = 64, 28
    groups = channels if engine == "cuda_depthwise" else 1
    first = case.layout == "NCHW"
    image = (channels, size, size) if first else (size, size, channels)
    window = (case.taps, case.taps)
    inner = (channels, channels // groups)
    shape = (*inner, *window) if first else (*window, *inner[::-1])
    pads = case.taps // 2
    x, w, b = (xp.empty(s, dtype) for s in ((case.batch, *image), shape, (channels,)))
    plan = make_plan(
        2, x.shape, w.shape, dtype, case.stride, pads, 1, groups, case.layout,
        gpuconv.activations.ReLU(),
    )  # fmt: skip
    if any(dispatch.get_engine(engine).unsupported(plan.plain, p) for p in PASSES):
        return
    y, dw = xp.empty(plan.y_shape, dtype), xp.empty(w.shape, dtype)
    made = dispatch.get_engine(engine)

    def last(array: Array, axes: Any) -> Array:
        return array if axes is None else array.transpose(axes)

    seen, out = last(x, plan.x_axes), last(y, plan.x_axes)
    weights, into = last(w, plan.w_axes), last(dw, plan.w_axes)
    passes: dict[Pass, Callable[[], Any]] = {
        "forward": lambda: made.forward(plan.problem, seen, weights, b, out),
        "input_grad": lambda: made.input_grad(plan.plain, out, weights, seen),
        "weight_grad": lambda: made.weight_grad(plan.plain, out, seen, into, None),
    }
    yield from passes.items()
    options: dict[str, Any] = {
        "stride": case.stride, "padding": pads, "groups": groups, "layout": case.layout,
        "activation": "ReLU",
    }  # fmt: skip
    yield "conv2d", lambda: gpuconv.conv2d(x, w, b, out=None, **options)
    for needs in (("x",), ("w",), ("x", "w", "b")):
        yield (
            f"conv2d_backward {''.join(needs)}",
            partial(gpuconv.conv2d_backward, y, x, w, y=y, needs=needs, **options),
        )


def measure(
    xp: Any, engines: Sequence[str] = ENGINES, cases: Sequence[Case] = CASES, rounds: int = ROUNDS
) -> list[Cost]:
    """Return what the calls of engines cost."""
    arguments = tuple(range(12))
    called: list[tuple[str | None, Callable[[], Any]]] = [
        (None, lambda: None),
        (None, lambda: Idle.kernel((1,), (1,), arguments, shared_mem=0)),
    ]
    names, counts = [], []
    for engine in engines:
        for case in cases:
            for what, call in calls(xp, engine, case):
                with gpuconv.engine(engine):
                    call()
                    Idle.launches = 0
                    call()
                names.append((engine, case.name, what))
                counts.append(Idle.launches)
                called.append((engine, call))
    nothing, bare, *times = _medians(called, rounds)
    return [
        Cost(*name, count, seconds - nothing - count * (bare - nothing))
        for name, count, seconds in zip(names, counts, times, strict=True)
    ]


def profile(xp: Any, engine: str, case: Case, lines: int = 12) -> str:
    """Return where the time of an engine's passes goes, as cProfile has it."""
    text = io.StringIO()
    with gpuconv.engine(engine):
        for what, call in calls(xp, engine, case):
            call()
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(20 * CALLS):
                call()
            profiler.disable()
            text.write(f"{engine} {case.name} {what}\n")
            pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def table(found: Sequence[Cost]) -> str:
    """Return a line an engine and case, a column a call: microseconds and, in brackets, launches."""
    whats = list(dict.fromkeys(c.what for c in found))
    lines = [["engine", "layer", *whats]]
    for engine, case in dict.fromkeys((c.engine, c.case) for c in found):
        cells = {c.what: c for c in found if (c.engine, c.case) == (engine, case)}
        lines.append(
            [engine, case, *(f"{1e6 * cells[w].seconds:.1f} ({cells[w].launches})" for w in whats)]
        )
    return format_table(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch", description=__doc__)
    add: Any = parser.add_argument
    add("--engines", default=",".join(ENGINES), metavar="LIST")
    add("--arrays", default="cupy", choices=("cupy", "stand-in"), help="whose arrays")
    add("--rounds", default=ROUNDS, type=int, help=f"of {CALLS} calls each ({ROUNDS})")
    add("--profile", action="store_true", help="show where the time of the first layer goes")
    args = parser.parse_args(arguments)
    engines = args.engines.split(",")
    if set(engines) - set(ENGINES):
        print(f"engines is {args.engines!r}; expected of {', '.join(ENGINES)}", file=sys.stderr)
        return 2
    with idle(args.arrays) as xp:
        if args.profile:
            print("\n".join(profile(xp, engine, CASES[0]) for engine in engines))
            return 0
        print("Microseconds in Python beside the launches, whose number is in brackets.\n")
        print(table(measure(xp, engines, rounds=args.rounds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
