"""The tables that NVIDIA's profilers write as CSV, as one kind of row.

- nvprof ``--print-gpu-summary --csv``: lines that begin with ``==`` are remarks; then a line of
  names, a line of units, a line a kernel (``"GPU activities"``) or API call.
- ``nsys stats --report=cuda_gpu_kern_sum --format=csv``: remarks, then a line of names that hold
  their units, a line a kernel.
- ``ncu --import ... --csv --page details``: a line a launch and metric; they are gathered by kernel.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gpuconv.profiling.table import format_columns

__all__ = ["Kernel", "ReportError", "format_kernels", "parse", "parse_ncu", "parse_nsys", "parse_nvprof"]  # fmt: skip


class ReportError(ValueError):
    """A report is not in its tool's format."""


@dataclass
class Kernel:
    """A kernel, or a copy, over all its launches.

    Attributes
    ----------
    name : str
        As the tool gives it.
    calls : int
        Launches.
    seconds : float
        In all.
    least, most : float
        Seconds of the quickest and the slowest launch.
    counters : dict of float
        Means of what the tool counted: such as ``"memory %"``.
    """

    name: str
    calls: int
    seconds: float
    least: float
    most: float
    counters: dict[str, float] = field(default_factory=dict)


_UNITS = {
    "s": 1.0, "second": 1.0, "sec": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6,
    "µs": 1e-6, "ns": 1e-9, "nsecond": 1e-9,
}  # fmt: skip
#: Metrics of Nsight Compute that are shown, with their heads.
_COUNTERS = {
    "Compute (SM) Throughput": "compute %",
    "SM [%]": "compute %",
    "Memory Throughput": "memory %",
    "Memory [%]": "memory %",
    "Achieved Occupancy": "occupancy %",
    "Registers Per Thread": "registers",
}


def _number(text: str) -> float:
    """Read a number with or without thousands separators."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        raise ReportError(f"{text!r} is no number") from None


def _unit(name: str) -> float:
    """Return the seconds of a unit of time."""
    try:
        return _UNITS[name.strip()]
    except KeyError:
        raise ReportError(f"{name!r} is no unit of time") from None


def _table(text: str, first: Iterable[str]) -> list[dict[str, str]]:
    """Return the lines after the one that names these columns; remarks before it are skipped."""
    wanted = set(first)
    rows = list(csv.reader(io.StringIO(text)))
    for k, row in enumerate(rows):
        if wanted <= {cell.strip() for cell in row}:
            head = [cell.strip() for cell in row]
            return [
                dict(zip(head, line, strict=True))
                for line in rows[k + 1 :]
                if len(line) == len(head)
            ]
    raise ReportError(f"no line names the columns {', '.join(sorted(wanted))}")


def parse_nvprof(text: str) -> list[Kernel]:
    """Return the kernels and copies of nvprof's GPU summary.

    Raises
    ------
    ReportError
        If it is not one; the text says what is missing.
    """
    rows = _table(text, ("Time(%)", "Time", "Calls", "Avg", "Min", "Max", "Name"))
    if not rows:
        return []
    units, *body = rows
    found = []
    for row in body:
        # Versions before CUDA 9 have no column of types.
        if row.get("Type", "GPU activities") != "GPU activities":
            continue
        seconds, least, most = (_number(row[n]) * _unit(units[n]) for n in ("Time", "Min", "Max"))
        found.append(Kernel(row["Name"], int(_number(row["Calls"])), seconds, least, most))
    return found


def parse_nsys(text: str) -> list[Kernel]:
    """Return the kernels of ``nsys stats``' kernel summary.

    Raises
    ------
    ReportError
        If it is not one; the text says what is missing.
    """
    found = []
    for row in _table(text, ("Total Time (ns)", "Instances", "Min (ns)", "Max (ns)", "Name")):
        seconds, least, most = (
            1e-9 * _number(row[n]) for n in ("Total Time (ns)", "Min (ns)", "Max (ns)")
        )
        found.append(Kernel(row["Name"], int(_number(row["Instances"])), seconds, least, most))
    return found


def parse_ncu(text: str) -> list[Kernel]:
    """Return the kernels of Nsight Compute's details, their launches gathered.

    Raises
    ------
    ReportError
        If it is not such a page; the text says what is missing.
    """
    rows = _table(text, ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"))
    times: dict[str, dict[str, float]] = {}
    counted: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        name, metric, value = row["Kernel Name"], row["Metric Name"], row["Metric Value"]
        if metric == "Duration" and value:
            times.setdefault(name, {})[row["ID"]] = _number(value) * _unit(row["Metric Unit"])
        elif metric in _COUNTERS and row["Metric Unit"] in ("%", "register/thread", ""):
            try:
                number = _number(value)
            except ReportError:  # "n/a" where the device does not count it
                continue
            counted.setdefault(name, {}).setdefault(_COUNTERS[metric], []).append(number)
    found = []
    for name, launches in times.items():
        seconds = list(launches.values())
        means = {k: sum(v) / len(v) for k, v in counted.get(name, {}).items()}
        found.append(Kernel(name, len(seconds), sum(seconds), min(seconds), max(seconds), means))
    return found


_PARSERS: dict[str, Callable[[str], list[Kernel]]] = {
    "nvprof": parse_nvprof,
    "nsys": parse_nsys,
    "ncu": parse_ncu,
}


def parse(tool: str, text: str) -> list[Kernel]:
    """Return the kernels of a tool's report, the longest first.

    Raises
    ------
    ReportError
        If it is not in the tool's format.
    """
    return sorted(_PARSERS[tool](text), key=lambda k: (-k.seconds, k.name))


def short(name: str, width: int = 60) -> str:
    """Return a kernel's name without its arguments, cut to ``width``."""
    plain = re.sub(r"^void ", "", name.strip())
    plain = re.sub(r"\((?:[^()]|\([^()]*\))*\)\s*(const)?$", "", plain) or plain
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def format_kernels(kernels: Sequence[Kernel], most: int = 15) -> str:
    """Return the longest kernels as a table."""
    if not kernels:
        return "no kernel ran on the GPU"
    whole = sum(k.seconds for k in kernels)
    heads = list(dict.fromkeys(name for k in kernels for name in k.counters))
    lines = [["kernel", "share", "ms", "calls", "mean µs", "min µs", "max µs", *heads]]
    for kernel in kernels[:most]:
        mean = kernel.seconds / kernel.calls if kernel.calls else 0.0
        lines.append(
            [
                short(kernel.name),
                f"{100 * kernel.seconds / whole:.1f}%" if whole else "–",
                f"{1e3 * kernel.seconds:.3f}",
                str(kernel.calls),
                *(f"{1e6 * t:.2f}" for t in (mean, kernel.least, kernel.most)),
                *(f"{kernel.counters[h]:.1f}" if h in kernel.counters else "–" for h in heads),
            ]
        )
    text = format_columns(lines, 1)
    left = len(kernels) - most
    return text + (f"\nand {left} more" if left > 0 else "")
