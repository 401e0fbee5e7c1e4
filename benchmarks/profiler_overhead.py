"""What the profiler costs a training of the digits: without its hooks, with them, and recording.

``python -m benchmarks.profiler_overhead`` trains one network an epoch at a time in one process:
with the ranges taken out of the code, with ranges that nobody follows, and under the recorder, in
turns whose order rotates. What is shown is the median, over all turns, of the ratio of two epochs
that lie beside each other in time. ``GPUCONV_NUMBA=0`` measures with NumPy's engines alone.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import gpuconv
from benchmarks import machine
from gpuconv.profiling.recorder import Recorder
from gpuconv.threads import single_threaded_blas
from gpuconv.training import options, run
from gpuconv.training.loop import fit
from gpuconv.training.recipe import Recipe

__all__ = ["HOOKED", "Found", "main", "measure", "without_hooks"]

#: The modules that have ranges.
HOOKED = (
    "engines.epilogue", "functional.passes", "functional.transposed_passes", "layers.base",
    "training.evaluation", "training.graph", "training.loop", "training.precision",
    "training.step",
)  # fmt: skip
#: What begins a range.
_RANGES = {"of", "part", "convolution"}
VARIANTS = ("without hooks", "off", "on")


# ------------------------------------------------------------------------------ without hooks


class _Removal(ast.NodeTransformer):
    """Takes the ranges out of a module: ``with ranges.of(...): body`` becomes ``body``."""

    def visit_With(self, node: ast.With) -> Any:
        self.generic_visit(node)
        node.items = [item for item in node.items if not _is_range(item.context_expr)]
        return node if node.items else node.body


def _is_range(node: ast.expr) -> bool:
    """Return whether an expression calls one of the functions of ``ranges`` that begin one."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in _RANGES) == ("ranges", True)
    )


def _codes(
    code: CodeType, place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], CodeType]]:
    """Yield the functions and methods of a module's code by their names."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and not inner.co_name.startswith("<"):
            name = (*place, inner.co_name)
            yield name, inner
            yield from _codes(inner, name)


def without_hooks() -> dict[FunctionType, CodeType]:
    """Return the functions that hold ranges, and their code without them."""
    found: dict[FunctionType, CodeType] = {}
    for name in HOOKED:
        module = importlib.import_module(f"gpuconv.{name}")
        source, path = inspect.getsource(module), str(module.__file__)
        tree = ast.fix_missing_locations(_Removal().visit(ast.parse(source)))
        plain = dict(_codes(compile(source, path, "exec")))
        for place, code in _codes(compile(tree, path, "exec")):
            function: Any = module
            for part in place:
                function = inspect.getattr_static(function, part, None)
            function = inspect.unwrap(function) if callable(function) else None
            # A function within another comes with that one's code.
            if isinstance(function, FunctionType) and code != plain[place]:
                found[function] = code
    return found


# ------------------------------------------------------------------------------------ measure


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes
    ----------
    step_ms : dict of float
        The median of a step's time, with all around it, by variant.
    ratios : dict of list of float
        Of the epochs of a turn: ``"off"`` over that without hooks, ``"on"`` over ``"off"``.
    share : float
        The sum of the recorder's rows over its steps' time.
    engines : str
        That computed.
    """

    step_ms: dict[str, float]
    ratios: dict[str, list[float]]
    share: float
    engines: str


def measure(seconds: float, epochs: int = 1) -> Found:
    """Train so long, in turns of ``epochs`` each."""
    job = run.start(Recipe(), "digits", {}, "cpu")
    train, held = job._part(job.split.train), job._part(job.split.validation)
    steps = epochs * -(-len(train[0]) // job.recipe.batch_size)
    codes = without_hooks()
    hooked = {function: function.__code__ for function in codes}
    recorder = Recorder("cpu", skip=3)

    def turn() -> float:
        start = time.perf_counter()
        fit(
            job.net, train, held, epochs=epochs, batch_size=job.recipe.batch_size,
            augment=job.recipe.augment,
        )  # fmt: skip
        return time.perf_counter() - start

    def take(variant: str) -> float:
        # Always set, so that no variant alone pays for what the interpreter then looks up anew.
        for function, code in (codes if variant == VARIANTS[0] else hooked).items():
            function.__code__ = code
        if variant != "on":
            return turn()
        start = time.perf_counter()
        with recorder:
            turn()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    try:
        with single_threaded_blas():
            for variant in VARIANTS:  # chooses engines, compiles, fills caches
                take(variant)
            end, turns = time.perf_counter() + seconds, 0
            while time.perf_counter() < end:
                for k in range(len(VARIANTS)):
                    variant = VARIANTS[(turns + k) % len(VARIANTS)]
                    times[variant].append(take(variant))
                turns += 1
    finally:
        for function, code in hooked.items():
            function.__code__ = code
    rows = recorder.rows()
    return Found(
        {v: 1e3 * statistics.median(t) / steps for v, t in times.items()},
        {
            "off": [a / b for a, b in zip(times["off"], times[VARIANTS[0]], strict=True)],
            "on": [a / b for a, b in zip(times["on"], times["off"], strict=True)],
        },
        recorder.accounted() / recorder.whole(),
        " ".join(dict.fromkeys(" ".join(row.engine for row in rows).split())),
    )


def spread(ratios: list[float]) -> tuple[float, float, float]:
    """Return the median and between which two it lies 19 times in 20, by the order of the ratios."""
    ordered = sorted(ratios)
    n = len(ordered)
    off = 0.98 * n**0.5  # 1.96 standard deviations of how many lie below the median
    low, high = max(0, int(n / 2 - off)), min(n - 1, int(n / 2 + off))
    return statistics.median(ordered), ordered[low], ordered[high]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.profiler_overhead", description=__doc__)
    parser.add_argument("--threads", type=options.count(1), default=1, help="(1)")
    parser.add_argument("--seconds", type=float, default=40.0, help="to train (40)")
    args = parser.parse_args(arguments)
    gpuconv.set_num_threads(args.threads)
    found = measure(args.seconds)
    about = machine.describe()
    print(f"{about['cpu']}, threads {args.threads}, engines {found.engines}")
    print("ms a step: " + ", ".join(f"{v} {ms:.3f}" for v, ms in found.step_ms.items()))
    for name, against in (("off", "without hooks"), ("on", "off")):
        middle, low, high = spread(found.ratios[name])
        pairs = len(found.ratios[name])
        print(
            f"{name} / {against}: {middle:.4f} ({low:.4f}-{high:.4f}), {pairs} pair{'s' * (pairs > 1)}"
        )
    print(f"rows / wall: {100 * found.share:.1f}%")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
