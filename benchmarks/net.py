"""One training epoch of a plain conv net, gpuconv beside PyTorch, in one run.

Six 3x3 convolutions with ReLU, two max pools, a dense layer, cross-entropy and Adam, on 32x32x3
images. All peers start from the same weights and see the same batches; their first losses are
compared, and then they train in turns, each in its own process, step by step timed.
"""

from __future__ import annotations

import datetime
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, report
from benchmarks.children import Child, pinned
from benchmarks.net_worker import conv_layers, dense_layer
from benchmarks.runner import PAUSE, OptionsError

__all__ = ["NetOptions", "initial", "markdown", "run", "write"]

CLASSES = 10
#: How far the losses of the first steps may differ, relative to PyTorch's: rounding grows with
#: every step, as Adam divides small gradients by their own size.
AGREEMENT = 2e-3


@dataclass(frozen=True)
class NetOptions:
    """What to run.

    Attributes
    ----------
    threads : int
        For every peer.
    batch, side : int
        Images of a step, and their rows and columns.
    channels : tuple of int
        Of the convolutions, two of each.
    steps : int
        Of the epoch that is timed, over all rounds.
    rounds : int
        Turns of every peer.
    check : int
        Steps before, whose losses are compared.
    compiled : bool
        Whether gpuconv may choose the engines of its extra ``numba``.
    """

    threads: int = 1
    batch: int = 64
    side: int = 32
    channels: tuple[int, ...] = (32, 64, 128)
    steps: int = 50
    rounds: int = 5
    check: int = 10
    compiled: bool = False
    say: Callable[[str], None] = field(default=lambda text: None, compare=False)


_RECORDED = ("threads", "batch", "side", "channels", "steps", "rounds", "check", "compiled")


def initial(options: NetOptions, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return weights, images and labels: a pattern for each class, under noise."""
    rng = np.random.default_rng(seed)
    blocks = len(options.channels)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    width = 3
    for k, number in enumerate(conv_layers(blocks)):
        out = options.channels[k // 2]
        scale = (2 / (9 * width)) ** 0.5
        tensors[f"{number}.W"] = rng.normal(0, scale, (3, 3, width, out)).astype("f4")
        tensors[f"{number}.b"] = np.zeros((1, 1, 1, out), "f4")
        width = out
    rows = (options.side // 2 ** (blocks - 1)) ** 2 * width
    tensors[f"{dense_layer(blocks)}.W"] = rng.normal(0, rows**-0.5, (rows, CLASSES)).astype("f4")
    tensors[f"{dense_layer(blocks)}.b"] = np.zeros((1, CLASSES), "f4")
    count = options.batch * max(options.check, options.steps // options.rounds)
    labels = rng.integers(0, CLASSES, count)
    patterns = rng.standard_normal((CLASSES, options.side, options.side, 3), "f4")
    images = rng.standard_normal((count, options.side, options.side, 3), "f4")
    images += 0.3 * patterns[labels]
    return {**tensors, "images": images, "labels": labels}


def run(options: NetOptions) -> dict[str, Any]:
    """Train, and return the result in plain types.

    Raises
    ------
    OptionsError
        If it cannot be run as asked.
    """
    cores = machine.describe()["cores"]
    if not 1 <= options.threads <= cores:
        raise OptionsError(f"threads is {options.threads}; expected 1 to {cores}, the cores here")
    if options.rounds < 1 or options.steps < options.rounds or options.steps % options.rounds:
        raise OptionsError(
            f"steps is {options.steps}; expected a multiple of the {options.rounds} rounds"
        )
    if options.side % 2 ** (len(options.channels) - 1):
        raise OptionsError(f"side is {options.side}; expected to be halved by every pool")
    date = datetime.datetime.now(datetime.timezone.utc)
    with pinned(options.threads), ExitStack() as stack:
        children, about = _start(options, stack)
        found: dict[str, dict[str, Any]] = {}
        for name, child in children.items():
            options.say(f"{name}: {options.check} steps to compare")
            found[name] = {"check": child.ask("train", steps=options.check)["losses"]}
            found[name] |= {"losses": [], "times": []}
        names = list(children)
        for number in range(options.rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                time.sleep(PAUSE)
                answer = children[name].ask("train", steps=options.steps // options.rounds)
                found[name]["losses"] += answer["losses"]
                found[name]["times"].append(answer["times"])
            options.say(f"round {number + 1} of {options.rounds}")
        place = machine.describe()
    return {
        "schema": 1,
        "date": date.isoformat(timespec="seconds"),
        "machine": place,
        "options": {name: getattr(options, name) for name in _RECORDED},
        "peers": about,
        "net": {name: _outcome(entry, found) for name, entry in found.items()},
    }


def _start(
    options: NetOptions, stack: ExitStack
) -> tuple[dict[str, Child], dict[str, dict[str, Any]]]:
    """Start the children that can run here, with the same weights and images."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuconv-bench-")))
    file = folder / "start.npz"
    np.savez(file, **initial(options))  # type: ignore[arg-type]
    started = {
        name: stack.enter_context(
            Child(name, options.threads, "benchmarks.net_worker", compiled=options.compiled)
        )
        for name in ("gpuconv", "torch:NCHW", "torch:NHWC")
    }
    children, about = {}, {}
    for name, child in started.items():
        about[name] = child.ask("hello")
        if "missing" in about[name]:
            options.say(f"left out: {about[name]['missing']}")
            continue
        child.ask("load", file=str(file), channels=options.channels, batch=options.batch)
        children[name] = child
    return children, about


def _outcome(entry: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a peer's times, and how its first losses compare with PyTorch's."""
    times = [t for turn in entry["times"] for t in turn]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    other = next((e["check"] for n, e in found.items() if n.startswith("torch")), None)
    differences = [abs(a / b - 1) for a, b in zip(entry["check"], other or [], strict=False)]
    return {
        "seconds": median,
        "q1": q1,
        "q3": q3,
        "epoch_seconds": sum(times),
        "rounds": [statistics.median(turn) for turn in entry["times"]],
        "losses": entry["check"] + entry["losses"],
        "difference": max(differences, default=None),
    }


# ---------------------------------------------------------------------------------- the page


def failures(result: dict[str, Any]) -> list[str]:
    """Return a line for a peer whose losses are not PyTorch's, or not finite."""
    lines = []
    for name, found in result["net"].items():
        if not all(map(math.isfinite, found["losses"])):
            lines.append(f"{name}: a loss is not finite")
        elif found["difference"] is not None and found["difference"] > AGREEMENT:
            lines.append(
                f"{name}: its losses differ from PyTorch's by {found['difference']:.1e}, "
                f"more than {AGREEMENT:g}"
            )
    return lines


def best_torch(result: dict[str, Any]) -> str | None:
    """Return PyTorch's faster memory format."""
    names = [n for n in result["net"] if n.startswith("torch")]
    return min(names, key=lambda n: result["net"][n]["seconds"], default=None)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    options, own = result["options"], result["net"]["gpuconv"]
    versions: dict[str, str] = {}
    for found in result["peers"].values():
        versions.update(found.get("versions", {}))
    versions.pop("onednn", None)
    place = result["machine"]
    channels = ", ".join(f"{c}, {c}" for c in options["channels"])
    lines = [
        f"# Training a net: {machine.title(place)}, {place['cores']} cores",
        "",
        f"- {result['date'][:10]}, {options['threads']} threads for every peer, "
        + ", ".join(f"{n} {v}" for n, v in versions.items()),
        f"- 3x3 convolutions of {channels} channels with ReLU, a 2x2 max pool after every two but "
        f"the last, a dense layer, cross-entropy, Adam; float32 images of {options['side']}x"
        f"{options['side']}x3, {options['batch']} a step",
        f"- {options['steps']} steps in {options['rounds']} rounds of turns, from the same weights "
        "on the same images, each peer in its own process",
    ]
    missing = dict.fromkeys(f["missing"] for f in result["peers"].values() if "missing" in f)
    if missing:
        lines.append(f"- left out: {', '.join(missing)}")
    best = best_torch(result)
    table = [["", "a step's time / gpuconv's", "losses differ from PyTorch's by", "last loss"]]
    for name, found in result["net"].items():
        ratio = found["seconds"] / own["seconds"]
        low, high = found["q1"] / own["q3"], found["q3"] / own["q1"]
        label = "gpuconv" if name == "gpuconv" else name.replace("torch:", "PyTorch, ")
        cells = "1" if name == "gpuconv" else f"{ratio:.2f} ({low:.2f}–{high:.2f})"
        difference = found["difference"]
        table.append(
            [
                label + (" (the better)" if name == best else ""),
                cells,
                "–" if difference is None else f"{difference:.1e}",
                f"{found['losses'][-1]:.4f}",
            ]
        )
    lines += ["", report.format_table(table)]
    lines += ["", "Median over the steps; in brackets the range between opposite quartiles."]
    lines += ["", *(f"- {line}" for line in failures(result))] if failures(result) else []
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``<cpu>-net.json`` and ``<cpu>-net.md`` into ``folder``; return both."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = machine.slug(result["machine"]) + machine.compiled_stem(result) + "-net"
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    files[0].write_text(report.to_json(result) + "\n", encoding="utf-8")
    files[1].write_text(markdown(result), encoding="utf-8")
    return files
