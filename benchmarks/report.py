"""What is made of a result: ratios, geometric means, a Markdown page, the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import compiled_stem, slug, title
from benchmarks.peers import label
from benchmarks.suite import CLASSES
from gpuconv.profiling.table import of_floor, rate

__all__ = [
    "PASS_TITLES",
    "baseline",
    "compared",
    "failures",
    "format_table",
    "geometric_mean",
    "markdown",
    "means",
    "memory",
    "number",
    "overhead",
    "ratio",
    "spread",
    "summary",
    "to_json",
    "write",
]

PASS_TITLES = {
    "forward": "forward, with bias and ReLU",
    "train": "forward and all gradients",
    "input_grad": "input gradient alone",
    "weight_grad": "weight and bias gradients alone",
}

#: How many cores may be at work for others before the page says so.
QUIET = 0.25

Row = dict[str, Any]


# ----------------------------------------------------------------------------------- numbers


def ratio(row: Row, peer: str) -> float | None:
    """Return the peer's median time over gpuconv's; above 1 gpuconv is the faster."""
    own, other = row["peers"].get("gpuconv", {}), row["peers"].get(peer, {})
    if "seconds" not in own or "seconds" not in other:
        return None
    return float(other["seconds"] / own["seconds"])


def spread(row: Row, peer: str) -> tuple[float, float] | None:
    """Return the ratio's range when both times go to their opposite quartiles."""
    if ratio(row, peer) is None:
        return None
    own, other = row["peers"]["gpuconv"], row["peers"][peer]
    return float(other["q1"] / own["q3"]), float(other["q3"] / own["q1"])


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def compared(result: dict[str, Any]) -> list[str]:
    """Return the peers that gpuconv can be compared with somewhere, in the order they ran."""
    return [
        peer
        for peer in result["peers"]
        if peer != "gpuconv" and any(ratio(row, peer) is not None for row in result["rows"])
    ]


def baseline(result: dict[str, Any]) -> str | None:
    """Return the peer that the plots compare with: PyTorch, else the first that ran."""
    peers = compared(result)
    return "torch" if "torch" in peers else next(iter(peers), None)


def means(rows: Iterable[Row], peer: str) -> dict[str, tuple[float, float, str, int]]:
    """Return, for the whole suite (``"all"``) and each class, the ratios in short.

    Returns
    -------
    dict
        From the class to geometric mean, least ratio, the shape that has it, and their number.
        Rows of the class "call overhead" count for themselves only.
    """
    groups: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        value = ratio(row, peer)
        if value is None:
            continue
        if row["kind"] != "call overhead":
            groups.setdefault("all", []).append((value, row["shape"]))
        groups.setdefault(row["kind"], []).append((value, row["shape"]))
    return {
        kind: (geometric_mean(v for v, _ in found) or 0.0, *min(found), len(found))
        for kind, found in groups.items()
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Return a line for every wrong result and every failure."""
    lines = []
    for row in result["rows"]:
        where = f"{row['shape']}, {row['dtype']}, {row['pass']}"
        for peer, found in row["peers"].items():
            if "failed" in found:
                lines.append(f"{label(peer)}, {where}: {found['failed']}")
            if "wrong" in found:
                lines.append(f"{label(peer)}, {where}: wrong result, error {_worst(found)}")
            elif found.get("wrong_variants"):
                names = ", ".join(found["wrong_variants"])
                lines.append(f"{label(peer)}, {where}: wrong result in {names}")
        if "failed" in row.get("memory", {}):
            lines.append(f"memory, {where}: {row['memory']['failed']}")
    return lines


def _worst(found: dict[str, Any]) -> str:
    errors = [e for found_ in found["wrong"].values() for e in found_.values()]
    # An error that is no finite number is null in a result read back from its file.
    return "not finite" if None in errors else f"{max(errors):.1e}"


# ---------------------------------------------------------------------------------- Markdown


def markdown(result: dict[str, Any]) -> str:
    """Return the whole result as a Markdown page."""
    parts = [_head(result)]
    for dtype in result["options"]["dtypes"]:
        for pass_ in result["options"]["passes"]:
            rows = [r for r in result["rows"] if r["dtype"] == dtype and r["pass"] == pass_]
            title = f"{dtype}, {PASS_TITLES[pass_]}"
            usual = [r for r in rows if r["kind"] != "call overhead"]
            if usual:
                parts += [f"## {title}", summary(result, usual), _shapes(result, usual)]
    for name, make in (
        ("Fixed cost of a call", overhead),
        ("Memory", memory),
        ("Cost against size", _scaling),
    ):
        text = make(result)
        if text:
            parts += [f"## {name}", text]
    wrong = failures(result)
    if wrong:
        parts += ["## Failures", "\n".join(f"- {line}" for line in wrong)]
    return "\n\n".join(parts) + "\n"


def _head(result: dict[str, Any]) -> str:
    machine, options = result["machine"], result["options"]
    blas = machine["blas"]
    peak = ", ".join(f"{v / 1e9:.0f} GFLOP/s {d}" for d, v in machine["peak_flops"].items())
    versions: dict[str, str] = {}
    for found in result["peers"].values():
        versions.update(found.get("versions", {}))
    versions.pop("onednn", None)
    left = [f["missing"] for f in result["peers"].values() if "missing" in f]
    lines = [
        f"# Benchmark: {title(machine)}, {machine['cores']} "
        + ("core" if machine["cores"] == 1 else "cores"),
        "",
        f"- {result['date'][:10]}, {options['threads']} threads for every peer, "
        f"{machine['architecture']}, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, "
        f"Python {machine['python']}",
        f"- {', '.join(f'{n} {v}' for n, v in versions.items())}; NumPy's BLAS: "
        f"{blas.get('internal_api', 'unknown')} {blas.get('version', '')} "
        f"({blas.get('architecture', '')})",
        "- gpuconv with the extra `numba`: the engines that it compiles are chosen where they win"
        if options.get("compiled")
        else "- gpuconv with NumPy alone",
        f"- measured in the same run: matrix product {peak}; copy "
        f"{machine['bandwidth_bytes'] / 1e9:.1f} GB/s, read plus written",
    ]
    busy = machine.get("busy_cores")
    if busy is not None and busy > QUIET:
        lines.append(
            f"- **not to be relied on**: {busy:.1f} cores were at work for others as the run began "
            "or ended"
        )
    if left:
        lines.append(f"- left out: {', '.join(left)}")
    lines += [
        "",
        "A ratio is a peer's time over gpuconv's: above 1, gpuconv is the faster. Times are medians "
        f"over {options['repeat']} rounds in which the peers take turns, each in its own process; "
        "in brackets the range between the opposite quartiles. PyTorch counts in the better of its "
        "two memory formats. Every result was checked against a float64 reference first. The "
        "*floor* is the larger of FLOPs over the measured matrix product and bytes over the "
        "measured copy; a layer whose data stays in the cache, or that is computed with fewer "
        "operations than the definition's, can be faster than it (above 100%). Transposed layers "
        "are timed as the input gradient of a convolution, without bias and activation.",
    ]
    return "\n".join(lines)


def summary(result: dict[str, Any], rows: list[Row]) -> str:
    """Return the geometric means over the suite and over each class."""
    peers = [p for p in compared(result) if any(ratio(r, p) is not None for r in rows)]
    if not peers:
        return "No peer to compare with."
    by_peer = {p: means(rows, p) for p in peers}
    kinds = [k for k in CLASSES if any(r["kind"] == k for r in rows)]
    table = [["layers", "number", *(label(p) for p in peers)]]
    for kind in ["all", *kinds]:
        total = sum(kind in ("all", r["kind"]) for r in rows)
        cells = []
        for peer in peers:
            found = by_peer[peer].get(kind)
            if found is None:
                cells.append("–")
                continue
            mean, least, _, count = found
            text = f"{number(mean)} (least {number(least)})" if count > 1 else number(mean)
            cells.append(text + (f" of {count}" if count < total else ""))
        name = "**all**" if kind == "all" else kind
        table.append([name, str(total), *cells])
    return "Geometric means of the ratios:\n\n" + format_table(table)


def _shapes(result: dict[str, Any], rows: list[Row]) -> str:
    """Return a line for every layer."""
    peers = [p for p in compared(result) if any(ratio(r, p) is not None for r in rows)]
    with_memory = any("extra" in r.get("memory", {}) for r in rows)
    head = [
        "layer",
        "",
        "GFLOP",
        "MB",
        "GFLOP/s",
        "GB/s",
        "of floor",
        "engine",
        *(label(p) for p in peers),
    ]
    table = [head + (["extra MiB"] if with_memory else [])]
    for row in rows:
        own = row["peers"].get("gpuconv", {})
        seconds = own.get("seconds")
        rates = [_why(own)] * 3
        if seconds:
            rates = [
                rate(row["flops"], seconds),
                rate(row["bytes"], seconds),
                of_floor(row["floor"], seconds),
            ]
        cells = [
            row["shape"],
            row["layer"],
            f"{row['flops'] / 1e9:.3g}",
            f"{row['bytes'] / 1e6:.3g}",
            *rates,
            ", ".join(dict.fromkeys(own.get("engines", []))),
        ]
        cells += [_cell(row, peer) for peer in peers]
        if with_memory:
            cells.append(_mebibytes(row))
        table.append(cells)
    return format_table(table)


def _cell(row: Row, peer: str) -> str:
    value, range_ = ratio(row, peer), spread(row, peer)
    if value is None or range_ is None:
        return _why(row["peers"].get(peer, {}))
    if row["peers"][peer]["samples"] == 1:
        return number(value)
    return f"{number(value)} ({number(range_[0])}–{number(range_[1])})"


def _why(found: dict[str, Any]) -> str:
    """Return what stands in the place of a number."""
    if "wrong" in found:
        return "wrong"
    return "failed" if "failed" in found else "–"


def _mebibytes(row: Row) -> str:
    extra = row.get("memory", {}).get("extra")
    return "–" if extra is None else f"{extra / 2**20:.1f}"


def number(value: float) -> str:
    """Return three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def overhead(result: dict[str, Any]) -> str:
    """Return the times of the calls that are too small to be anything but overhead."""
    rows = [r for r in result["rows"] if r["kind"] == "call overhead"]
    peers = [p for p in result["peers"] if any("seconds" in r["peers"].get(p, {}) for r in rows)]
    if not rows or not peers:
        return ""
    table = [["layer", "dtype", "pass", *(f"{label(p)}, µs" for p in peers)]]
    for row in rows:
        cells = [row["peers"].get(p, {}) for p in peers]
        times = [f"{1e6 * c['seconds']:.1f}" if "seconds" in c else _why(c) for c in cells]
        table.append([row["layer"], row["dtype"], row["pass"], *times])
    return format_table(table)


def memory(result: dict[str, Any]) -> str:
    """Return how far gpuconv's memory beyond inputs and outputs stays within its limit."""
    found = [
        (r["memory"]["extra"], r["memory"]["limit"], r["shape"], r["pass"])
        for r in result["rows"]
        if "extra" in r.get("memory", {})
    ]
    if not found:
        return ""
    extra, limit, shape, pass_ = max(found)
    over = sorted({f"{s} ({p})" for e, most, s, p in found if e > most})
    text = (
        "At the peak of the first call in a fresh process, beyond inputs and outputs, gpuconv's "
        f"arrays took at most {extra / 2**20:.1f} MiB ({shape}, {pass_}); the workspace limit is "
        f"{limit / 2**20:.0f} MiB."
    )
    return text + (f" Over the limit: {', '.join(over)}." if over else "")


def _scaling(result: dict[str, Any]) -> str:
    """Return the fits of time over size."""
    fits = result.get("scaling", [])
    if not fits:
        return ""
    peers = list(fits[0]["seconds"])
    table = [["layer", "pass", "varied", *(f"{label(p)}, exponent" for p in peers)]]
    for fit in fits:
        values = ", ".join(map(str, fit["values"]))
        exponents = [fit["exponent"][p] for p in peers]
        table.append(
            [
                f"{fit['shape']}, {fit['fixed']}",
                fit["pass"],
                f"{fit['axis']} {values}",
                *("–" if e is None else f"{e:.3f}" for e in exponents),
            ]
        )
    return "The slope of log time over log FLOPs; 1 is linear cost.\n\n" + format_table(table)


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its columns aligned for whoever reads the text."""
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(lines[0]))]

    def row(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([row(lines[0]), rule, *map(row, lines[1:])])


# -------------------------------------------------------------------------------------- files


def to_json(result: dict[str, Any]) -> str:
    """Return the result as JSON; an error that is no finite number is null there."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, list):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(result), indent=1, allow_nan=False)


def write(
    result: dict[str, Any],
    folder: Path,
    plots: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write ``<cpu>.json``, ``<cpu>.md`` and the plots into ``folder``; return what was written.

    The names carry the dtypes where they are not float32 alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = slug(result["machine"]) + compiled_stem(result)
    if result["options"]["dtypes"] != ["float32"]:
        stem += "-" + "-".join(result["options"]["dtypes"])
    text = markdown(result)
    made: list[Path] = []
    if plots:
        try:
            from benchmarks.plots import draw

            made = draw(result, folder, stem)
        except ImportError:
            say("matplotlib is not installed, so there are no plots: pip install 'gpuconv[bench]'")
    if made:
        text += "\n## Plots\n\n" + "\n\n".join(f"![{p.stem}]({p.name})" for p in made) + "\n"
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    files[0].write_text(to_json(result) + "\n", encoding="utf-8")
    files[1].write_text(text, encoding="utf-8")
    return files + made
