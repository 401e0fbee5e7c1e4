"""The command: which stages there are, where results go, the exit status."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_training, suite
from benchmarks.gpu import checks, counters, device, pages, shapes, timing
from benchmarks.gpu.stages import Stage, State, run
from benchmarks.gpu.summary import summarise
from gpuconv.cuda import runtime
from gpuconv.device import probe
from gpuconv.training.files import replacing

__all__ = ["failures", "main", "write"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STATE = ROOT / "build" / "gpu-check"
#: Seconds of one run; what is left is done by the next.
BUDGET = 590.0
DESCRIPTION = "Check and time the CUDA engines on this machine's GPU; a rerun goes on where it was."


def _sources() -> str:
    """Return a digest of what is checked: another one makes earlier results void."""
    digest = hashlib.sha256()
    for pattern in ("gpuconv/**/*.py", "kernels/*", "benchmarks/**/*.py", "benchmarks/suite.toml"):
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stages(layers: Sequence[suite.Shape], dtypes: Sequence[str], seconds: float) -> list[Stage]:
    """Return the stages in their order; their times add up to less than the budget."""
    units = [(s.name, d) for d in dtypes for s in layers]
    return [
        Stage("ceilings", 20, lambda state, limit: device.ceilings()),
        Stage("conformance", 150, checks.conformance),
        Stage("sanitizer", 70, checks.sanitizer),
        Stage("digits", 40, checks.digits),
        Stage("timings", 210, timing.stage(units, seconds)),
        Stage("counters", 50, counters.stage),
        Stage("training", 50, _training),
    ]


def _training(state: State, limit: float) -> dict[str, Any]:
    return gpu_training.measure()


def failures(report: dict[str, Any]) -> list[str]:
    """Return a line for every stage that failed or was not done, and every goal not met."""
    lines = [
        f"{name}: {found.get('reason', 'failed')}"
        for name, found in report.items()
        if isinstance(found, dict) and not found.get("passed", True)
    ]
    lines += [f"{name}: not done; run again to go on" for name in report.get("undone", [])]
    for goal in report.get("summary", {}).get("goals", []):
        if goal["met"] is False:
            lines.append(
                f"{goal['dtype']}, {goal['pass']}, {goal['class']}: {goal['reached']:.2f} of PyTorch, "
                f"below {goal['least']:g}"
            )
    lines += [f"training: {text}" for text in report.get("training", {}).get("shortfalls", [])]
    return lines


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the report as JSON, as a page and as plots, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = _slug(report["machine"]["gpu"])
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    page = pages.markdown(report)
    made = []
    for place, content in ((folder / f"{stem}.json", text), (folder / f"{stem}.md", page)):
        with replacing(place) as temporary:
            temporary.write_text(content, encoding="utf-8")
        made.append(place)
    return made + pages.draw(report, folder, stem)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=DESCRIPTION)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where to write; benchmarks/results at first")
    add("--state", type=Path, default=STATE, metavar="DIR", help="where what is done is kept")
    add("--restart", action="store_true", help="forget what is done")
    add("--stages", metavar="LIST", help="only these; nothing is written then")
    add("--layers", metavar="LIST", help="other layers of the suite; nothing is written then")
    add("--whole-suite", action="store_true", help="all layers; takes some runs to go on")
    add("--dtypes", default=",".join(shapes.DTYPES), metavar="LIST", help="to time")
    add("--seconds", type=float, default=0.03, metavar="S", help="for each time (0.03)")
    add("--budget", type=float, default=BUDGET, metavar="S", help=f"of this run ({BUDGET:g})")
    return parser.parse_args(arguments)


def _asked(args: argparse.Namespace) -> tuple[list[suite.Shape], list[str], list[Stage]]:
    """Return layers, dtypes and stages.

    Raises
    ------
    SuiteError
        If one of them is not known.
    """
    pool = shapes.shapes()
    if args.layers:
        layers = suite.select(pool, args.layers.split(","))
    else:
        layers = pool if args.whole_suite else shapes.representative(pool)
    dtypes = args.dtypes.split(",")
    unknown = set(dtypes) - {*shapes.DTYPES, "float64"}
    if unknown:
        raise suite.SuiteError(f"dtypes is {args.dtypes!r}; expected of {', '.join(shapes.DTYPES)}")
    chosen = stages(layers, dtypes, args.seconds)
    if args.stages:
        names = args.stages.split(",")
        known = [s.name for s in chosen]
        if set(names) - set(known):
            raise suite.SuiteError(f"stages is {args.stages!r}; expected of {', '.join(known)}")
        chosen = [s for s in chosen if s.name in names]
    return layers, dtypes, chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and write the results; return the exit status."""
    args = _arguments(arguments)
    found = probe()
    if found.count == 0:
        print(f"gpu-check needs a CUDA device: {found.reason}. {found.advice}", file=sys.stderr)
        return 2
    stand_in = runtime.installed() is not None
    whole = not (args.stages or args.layers or stand_in)
    out = args.out or (RESULTS if whole else None)
    if stand_in and out is not None and out.resolve().is_relative_to(RESULTS):
        print(f"gpu-check: no GPU computes here, so nothing goes into {RESULTS}", file=sys.stderr)
        return 2
    try:
        layers, dtypes, chosen = _asked(args)
    except suite.SuiteError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    place = device.facts()
    print(json.dumps(place, indent=2), flush=True)
    identity = {
        "machine": place, "sources": _sources(), "dtypes": dtypes, "layers": [s.name for s in layers],
        "stand_in": stand_in,
    }  # fmt: skip
    state = State(args.state / f"{_slug(place['gpu'])}.json", identity)
    if args.restart:
        state.forget()
    if state.kept_from:
        print(f"going on with what was found until {state.kept_from}", flush=True)
    results, undone = run(chosen, state, args.budget, lambda text: print(text, flush=True))
    report: dict[str, Any] = {
        "schema": 2,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "on_a_gpu": not stand_in,
        "machine": place,
        **results,
    }
    if undone:
        report["undone"] = undone
    rows = results.get("timings", {}).get("rows") or state.units("timings")
    if rows and "ceilings" in results and "flops" in results["ceilings"]:
        report.setdefault("timings", {"rows": rows})["rows"] = rows
        report["summary"] = summarise(rows, results["ceilings"])
        print(pages.means_table(report["summary"]) + "\n\n" + pages.goals_table(report["summary"]))
    wrong = failures(report)
    report["failures"] = wrong
    for text in wrong:
        print(f"FAILED {text}", file=sys.stderr)
    if out is not None:
        for file in write(report, out):
            print(f"wrote {os.path.relpath(file, Path.cwd())}")
    return 1 if wrong else 0
