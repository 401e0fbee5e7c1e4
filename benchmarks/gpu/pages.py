"""The Markdown page and the plots of a device's check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.summary import THREE, floor_ms, own_best, torch_best
from benchmarks.report import format_table, number
from gpuconv.training.files import replacing

__all__ = ["draw", "goals_table", "markdown", "means_table"]

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """Return the whole report as a page."""
    parts = [_head(report), "## Checks", _checks(report)]
    if "ceilings" in report:
        parts += ["## What the device can do, measured", _ceilings(report["ceilings"])]
    if "summary" in report:
        parts += ["## Beside PyTorch with cuDNN", EXPLAINED, means_table(report["summary"])]
        parts += ["## Goals", goals_table(report["summary"])]
        for dtype in report["summary"]["means"]:
            parts += [
                f"## {dtype}, by class",
                _classes(report["summary"]["means"][dtype]["classes"]),
            ]
            parts += [f"## {dtype}, layers", _layers(report, dtype)]
    if "counters" in report:
        parts += ["## Furthest from the floor", _counters(report["counters"])]
    if "training" in report:
        parts += ["## Training", _training(report["training"])]
    if report.get("failures"):
        parts += ["## Failures", "\n".join(f"- {line}" for line in report["failures"])]
    return "\n\n".join(parts) + "\n"


EXPLAINED = (
    "Numbers are PyTorch's time over ours (above 1, ours is the faster), geometric means over the "
    "layers, in brackets the least. *Ours* is the best of gpuconv's own engines, *with cudnn* counts "
    "the engine of that name as well, *chosen* is what the dispatcher takes by its cost model. *Of the "
    "floor* is the time that the measured ceilings allow over the time of ours; *atomic* the time of "
    "`cuda_atomic` over it. PyTorch counts in the better of its memory formats, with "
    "`cudnn.benchmark`, in TF32 only where ours is."
)


def _head(report: Report) -> str:
    place = report["machine"]
    versions = ", ".join(f"{n} {v}" for n, v in place["versions"].items() if v)
    return (
        f"# {place['gpu']}\n\n- {report['date'][:10]}, compute capability "
        f"{int(place['compute_capability']) / 10}, {place['memory_bytes'] / 2**30:.0f} GiB, driver "
        f"{place['driver']}, CUDA {place['cuda_runtime']}, cuDNN of PyTorch {place['cudnn_of_torch']}\n"
        f"- {place['system']}, Python {place['python']}, {versions}"
    )


def _checks(report: Report) -> str:
    lines = [["check", "result"]]
    for name in ("conformance", "sanitizer", "digits"):
        found = report.get(name)
        if found is None:
            lines.append([name, "not run"])
        elif not found.get("passed", True):
            lines.append([name, f"**failed**: {found.get('reason', '')}"])
        elif name == "conformance":
            by = ", ".join(f"{d} {n}" for d, n in found.get("by_dtype", {}).items())
            lines.append([name, f"{found['run']} tests passed ({by})"])
        elif name == "digits":
            lines.append([name, f"accuracy {found['accuracy']:.4f} after {found['epochs']} epochs"])
        elif found.get("run"):
            counts = [f"{c}: {found[c]['summary']}" for c in ("memcheck", "racecheck")]
            lines.append([name, "; ".join(counts)])
        else:
            lines.append([name, f"not run: {found['why_not']}"])
    return format_table(lines)


def _ceilings(found: Report) -> str:
    lines = [["", "", "how"], ["copy", f"{found['bandwidth'] / 1e9:.0f} GB/s", "read plus written"]]
    for dtype, rate in found["flops"].items():
        lines.append([dtype, f"{rate / 1e12:.1f} TFLOP/s", found["how"][dtype]])
    return format_table(lines)


def _mean(found: dict[str, Any] | None, percent: bool = False) -> str:
    if found is None:
        return "not measured"
    if percent:
        return f"{100 * found['mean']:.0f} %"
    return f"{number(found['mean'])} (least {number(found['least'])})"


def means_table(summary: Report) -> str:
    """Return the geometric means by dtype and pass."""
    lines = [["dtype", "pass", "ours", "with cudnn", "chosen", "of the floor", "atomic"]]
    for dtype, found in summary["means"].items():
        for pass_ in (*THREE, "train"):
            one = found[pass_]
            lines.append([
                dtype, pass_, _mean(one["best"]), _mean(one["any"]), _mean(one["chosen"]),
                _mean(one["floor"], True), _mean(one["atomic"]),
            ])  # fmt: skip
    return format_table(lines)


def _classes(found: Report) -> str:
    lines = [["layers", "ours", "with cudnn", "of the floor"]]
    for kind, one in found.items():
        lines.append([kind, _mean(one["best"]), _mean(one["any"]), _mean(one["floor"], True)])
    return format_table(lines)


def goals_table(summary: Report) -> str:
    """Return what is aimed at, and what was reached."""
    lines = [["dtype", "pass", "layers", "at least", "reached", ""]]
    for one in summary["goals"]:
        reached = "not measured" if one["reached"] is None else number(one["reached"])
        verdict = {None: "", True: "met", False: "**not met**"}[one["met"]]
        lines.append([
            one["dtype"], one["pass"], one["class"], number(one["least"]), reached, verdict,
        ])  # fmt: skip
    return format_table(lines)


def _layers(report: Report, dtype: str) -> str:
    lines = [
        ["layer", "", "pass", "engine", "ms", "of the floor", "PyTorch, ms", "ratio", "chosen"]
    ]
    for name, row in report["timings"]["rows"].items():
        if row.get("dtype") != dtype:
            continue
        for pass_, found in row["passes"].items():
            own, torch = own_best(found), torch_best(found)
            floor = floor_ms(dtype, found, report["ceilings"])
            lines.append([
                name.split("|")[0], row["layer"], pass_, own[0] if own else "none",
                f"{own[1]:.4f}" if own else "-",
                f"{100 * floor / own[1]:.0f} %" if own and floor else "-",
                f"{torch:.4f}" if torch else "-",
                number(torch / own[1]) if own and torch else "-", found["chosen"],
            ])  # fmt: skip
    return format_table(lines)


def _counters(found: Report) -> str:
    lines = [
        ["layer", "pass", "engine", "ms", "times the floor", "kernel", "dram %", "sm %", "warps %"]
    ]
    for one in found.get("slowest", []):
        head = [
            one["unit"],
            one["pass"],
            one["engine"],
            f"{one['ms']:.4f}",
            number(one["times_the_floor"]),
        ]
        kernels = one.get("kernels") or [{"kernel": one.get("why_not", found.get("why_not", "-"))}]
        for kernel in kernels:
            cells = [
                f"{kernel[k]:.0f}" if k in kernel else "-" for k in ("dram %", "sm %", "warps %")
            ]
            lines.append([*head, kernel["kernel"], *cells])
            head = [""] * len(head)
    return format_table(lines)


def _training(found: Report) -> str:
    lines = [["", ""]]
    for name, value in found.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.append([name.replace("_", " "), f"{value:.4g}"])
    return format_table(lines)


# --------------------------------------------------------------------------------------- plots


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    """Draw, for each dtype, the ratio to PyTorch and the part of the floor; return the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = []
    for dtype in report.get("summary", {}).get("means", {}):
        rows = {n: r for n, r in report["timings"]["rows"].items() if r.get("dtype") == dtype}
        figure = Figure(figsize=(10, 1.5 + 0.28 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        names = [n.split("|")[0] for n in rows]
        for number_, (pass_, color) in enumerate(
            zip((*THREE, "train"), ("#1f5fa8", "#d9822b", "#3a8f5c", "#8c5aa8"), strict=True)
        ):
            places, ratios, parts, places_of_parts = [], [], [], []
            for place, row in enumerate(rows.values()):
                found = row["passes"][pass_]
                own, torch = own_best(found), torch_best(found)
                floor = floor_ms(dtype, found, report["ceilings"])
                at = place + 0.18 * (number_ - 1.5)
                if own and torch:
                    places.append(at)
                    ratios.append(torch / own[1])
                if own and floor:
                    places_of_parts.append(at)
                    parts.append(100 * floor / own[1])
            left.scatter(ratios, places, s=12, color=color, label=pass_)
            right.scatter(parts, places_of_parts, s=12, color=color, label=pass_)
        left.axvline(1, color="#8a8f98", linewidth=1)
        left.set(
            xscale="log",
            xlabel="PyTorch's time over ours",
            title=f"{dtype}, {report['machine']['gpu']}",
        )
        right.set(xlim=(0, None), xlabel="percent of the floor")
        left.set_yticks(range(len(names)), names, fontsize=7)
        left.invert_yaxis()
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
        right.legend(fontsize=7)
        place_ = folder / f"{stem}-{dtype}.png"
        with replacing(place_) as temporary:
            figure.savefig(temporary, dpi=120)
        made.append(place_)
    return made
