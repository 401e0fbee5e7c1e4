"""Pooling, batch normalisation and activations, gpuconv beside PyTorch, in one run.

float32: the forward without a gradient, the gradients of a forward that was kept, and both, as in a
step of training. Each peer lives in a process of its own; its results are compared with gpuconv's
before anything is timed, and the peers then take turns, in an order that rotates.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report
from benchmarks.cases import compare
from benchmarks.children import Child, ChildError, pinned
from benchmarks.layers_worker import ACTIVATIONS, NORMS, PASSES, POOLS, axes_of
from benchmarks.runner import PAUSE, OptionsError
from gpuconv.compiled import numba_missing

__all__ = ["LayersOptions", "failures", "markdown", "run", "write"]

PEERS = ("gpuconv", "torch:NCHW", "torch:NHWC")
LAYERS = (*NORMS, *POOLS, *ACTIVATIONS)
#: What a group of layers is called, and which they are.
GROUPS = {
    "batch normalisation": tuple(NORMS),
    "pooling": tuple(POOLS),
    "activations": tuple(ACTIVATIONS),
}
PASS_TITLES = {"forward": "forward", "backward": "backward", "train": "forward and backward"}
#: Inputs, channels last, by the number of spatial axes.
SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((2048, 1024),),
    1: ((64, 1024, 64),),
    2: ((8, 56, 56, 128), (64, 32, 32, 32)),
    3: ((4, 16, 32, 32, 32),),
}
#: How far results may differ from PyTorch's, relative to the largest.
AGREEMENT = 2e-5


@dataclass(frozen=True)
class LayersOptions:
    """What to run: the threads of every peer, rounds of turns, seconds a layer and peer, inputs.

    ``compiled``: whether gpuconv may use the loops of its extra ``numba``.
    """

    threads: int = 1
    repeat: int = 5
    seconds: float = 0.4
    compiled: bool = False
    shapes: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=lambda: SHAPES)
    layers: tuple[str, ...] = LAYERS
    say: Callable[[str], None] = field(default=lambda text: None, compare=False)


def run(options: LayersOptions) -> dict[str, Any]:
    """Time the layers, and return the result in plain types.

    Raises
    ------
    OptionsError
        If it cannot be run as asked.
    """
    cores = machine.describe()["cores"]
    if not 1 <= options.threads <= cores:
        raise OptionsError(f"threads is {options.threads}; expected 1 to {cores}, the cores here")
    if options.repeat < 1:
        raise OptionsError(f"repeat is {options.repeat}; expected at least 1")
    missing = numba_missing() if options.compiled else None
    if missing:
        raise OptionsError(f"compiled is asked for: {missing}")
    date = datetime.datetime.now(datetime.timezone.utc)
    rows = []
    with pinned(options.threads), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuconv-bench-")))
        children, about = {}, {}
        for name in PEERS:
            child = stack.enter_context(
                Child(name, options.threads, "benchmarks.layers_worker", compiled=options.compiled)
            )
            about[name] = child.ask("hello")
            if "missing" in about[name]:
                options.say(f"left out: {about[name]['missing']}")
            else:
                children[name] = child
        place = machine.describe()
        for layer in options.layers:
            for shape in options.shapes[axes_of(layer)]:
                for pass_ in PASSES:
                    rows.append(_row(options, children, folder, layer, shape, pass_))
                    options.say(_line(rows[-1]))
    return {
        "schema": 2,
        "date": date.isoformat(timespec="seconds"),
        "machine": place,
        "options": {n: getattr(options, n) for n in ("threads", "repeat", "seconds", "compiled")},
        "peers": about,
        "layers": rows,
    }


def _row(
    options: LayersOptions,
    children: dict[str, Child],
    folder: Path,
    layer: str,
    shape: tuple[int, ...],
    pass_: str,
) -> dict[str, Any]:
    """Return one layer's times by every peer."""
    row: dict[str, Any] = {"layer": layer, "shape": list(shape), "pass": pass_, "peers": {}}
    found = row["peers"]
    for name, child in children.items():
        file = str(folder / f"{name.replace(':', '-')}.npz")
        try:
            child.ask("prepare", layer=layer, shape=list(shape), pass_=pass_, file=file)
            found[name] = {"times": [], "error": _error(folder, file)}
        except ChildError as error:
            found[name] = {"failed": str(error)}
    names = [n for n, f in found.items() if f.get("error", 1) <= AGREEMENT]
    for number in range(options.repeat):
        at = number % max(1, len(names))
        for name in names[at:] + names[:at]:
            time.sleep(PAUSE)
            answer = children[name].ask("time", seconds=options.seconds / options.repeat)
            found[name]["times"] += answer["times"]
    for name in names:
        times = found[name].pop("times")
        several = times if len(times) > 1 else times * 2
        q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
        found[name] |= {"seconds": median, "q1": q1, "q3": q3, "samples": len(times)}
    return row


def _error(folder: Path, file: str) -> float:
    """Return how far a peer's results are from gpuconv's."""
    with np.load(folder / "gpuconv.npz") as own, np.load(file) as other:
        if set(own.files) != set(other.files):
            return float("inf")
        # A sum over many pixels, such as the gradient of a scaler, is compared likewise.
        return max(compare(own[n].reshape(other[n].shape), other[n]) for n in own.files)


def ratio(row: dict[str, Any]) -> float | None:
    """Return the time of PyTorch's better memory format over gpuconv's."""
    own = row["peers"].get("gpuconv", {}).get("seconds")
    others = [f["seconds"] for n, f in row["peers"].items() if n != "gpuconv" and "seconds" in f]
    return min(others) / own if own and others else None


def failures(result: dict[str, Any]) -> list[str]:
    """Return a line for every peer that failed, or whose results are not gpuconv's."""
    lines = []
    for row in result["layers"]:
        for name, found in row["peers"].items():
            where = f"{name}, {row['layer']}, {'x'.join(map(str, row['shape']))}, {row['pass']}"
            if "failed" in found:
                lines.append(f"{where}: {found['failed']}")
            elif "seconds" not in found:
                lines.append(f"{where}: differs from gpuconv's by {found['error']:.1e}")
    return lines


def _line(row: dict[str, Any]) -> str:
    value = ratio(row)
    what = PASS_TITLES[row["pass"]]
    text = "no ratio" if value is None else f"{value:.2f} x PyTorch"
    return f"{row['layer']}, {'x'.join(map(str, row['shape']))}, {what}: {text}"


def table(result: dict[str, Any]) -> str:
    """Return the ratios as a Markdown table."""
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for row in result["layers"]:
        key = row["layer"], "x".join(map(str, row["shape"]))
        found.setdefault(key, {})[row["pass"]] = ratio(row)
    lines = [["layer", "input", *PASS_TITLES.values()]]
    for (layer, shape), values in found.items():
        cells = [values.get(k) for k in PASSES]
        lines.append([layer, shape, *("–" if v is None else report.number(v) for v in cells)])
    return report.format_table(lines)


def summary(result: dict[str, Any]) -> str:
    """Return the geometric means of the ratios and the least, as a Markdown table."""
    lines = [["", *PASS_TITLES.values()]]
    for group, names in GROUPS.items():
        cells = []
        for pass_ in PASSES:
            rows = [r for r in result["layers"] if r["layer"] in names and r["pass"] == pass_]
            values = [v for v in map(ratio, rows) if v is not None]
            mean = report.number(statistics.geometric_mean(values)) if values else "–"
            cells.append(f"{mean} ({report.number(min(values))})" if values else mean)
        lines.append([group, *cells])
    return report.format_table(lines)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    place, options = result["machine"], result["options"]
    versions: dict[str, str] = {}
    for about in result["peers"].values():
        versions.update(about.get("versions", {}))
    versions.pop("onednn", None)
    lines = [
        f"# Pooling, normalisation, activations: {machine.title(place)}, {place['cores']} cores",
        "",
        f"- {result['date'][:10]}, {options['threads']} threads for every peer, float32, "
        + ", ".join(f"{n} {v}" for n, v in versions.items()),
        "- gpuconv with the loops of its extra `numba`"
        if options.get("compiled")
        else "- gpuconv with NumPy alone",
        "- PyTorch's time, in the better of its memory formats, over gpuconv's: above 1, gpuconv is "
        "the faster; medians, each peer in its own process, in turn, results compared first",
        "- backward: the gradients of a forward that was kept",
    ]
    missing = dict.fromkeys(f["missing"] for f in result["peers"].values() if "missing" in f)
    lines += [f"- left out: {', '.join(missing)}"] if missing else []
    lines += ["", "Geometric means, in brackets the least:", "", summary(result), "", table(result)]
    wrong = failures(result)
    lines += ["", *(f"- {line}" for line in wrong)] if wrong else []
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``<cpu>[-numba]-layers.json`` and ``.md`` into ``folder``; return both."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = machine.slug(result["machine"]) + machine.compiled_stem(result) + "-layers"
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    files[0].write_text(report.to_json(result) + "\n", encoding="utf-8")
    files[1].write_text(markdown(result), encoding="utf-8")
    return files
