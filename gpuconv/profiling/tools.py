"""NVIDIA's profilers: which are here, which supports the device, and how each is called.

nvprof traces devices below compute capability 8.0 and came with CUDA toolkits up to 12; Nsight
Systems (``nsys``) shows the timeline of newer ones and Nsight Compute (``ncu``) the counters of
single kernels. Options are those of the tools' own guides: the *Profiler User's Guide* of CUDA
12 for nvprof, the *User Guide* of Nsight Systems, and the *Nsight Compute CLI* guide.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpuconv.cuda import runtime
from gpuconv.device import probe

__all__ = [
    "BUILTIN", "TOOLS", "Choice", "Facts", "Plan", "ToolError", "choose", "facts", "plan", "why_not",
]  # fmt: skip

BUILTIN = "builtin"
#: In the order in which they are preferred.
TOOLS = ("nvprof", "nsys", "ncu", BUILTIN)
TITLES = {
    "nvprof": "nvprof",
    "nsys": "Nsight Systems (nsys)",
    "ncu": "Nsight Compute (ncu)",
    BUILTIN: "the built-in profiler",
}
#: Where installers put them, beside the PATH.
_PLACES = {
    "nvprof": ("/usr/local/cuda/bin/nvprof", "/usr/local/cuda-1[0-2]*/bin/nvprof"),
    "nsys": (
        "/usr/local/cuda/bin/nsys",
        "/opt/nvidia/nsight-systems/*/bin/nsys",
        "/opt/nvidia/nsight-systems/*/target-linux-*/nsys",
    ),
    "ncu": ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu"),
}
#: The lowest compute capability that the tool supports, and the first that it no longer does.
_CAPABILITIES = {
    "nvprof": ((3, 0), (8, 0)),
    "nsys": ((6, 0), None),
    "ncu": ((7, 0), None),
}


class ToolError(ValueError):
    """A profiler was asked for that cannot be used here."""


@dataclass(frozen=True)
class Facts:
    """What the choice follows from.

    Attributes
    ----------
    capability : tuple of int or None
        The device's compute capability; None where nothing computes on a GPU.
    toolkit : int or None
        Major version of the CUDA toolkit in use.
    device : str
        The device in words, or why there is none.
    paths : dict of str
        The tools that were found.
    """

    capability: tuple[int, int] | None
    toolkit: int | None
    device: str
    paths: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A tool, why it is that one, and why none before it."""

    tool: str
    reason: str
    others: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"profiling with {TITLES[self.tool]}: {self.reason}"]
        lines += [f"  not {TITLES[tool]}: {why}" for tool, why in self.others]
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes
    ----------
    record : list of str
        The command under the tool.
    report : list of str
        Prints, or writes to ``table``, the times of the kernels as CSV; run afterwards.
    environment : dict of str
        Added to the environment of ``record``.
    files : tuple of Path
        What the two write.
    table : Path
        Where the CSV is, or is put.
    printed : bool
        Whether ``report`` prints the CSV.
    """

    record: list[str]
    report: list[str]
    environment: dict[str, str]
    files: tuple[Path, ...]
    table: Path
    printed: bool


def find(tool: str) -> str | None:
    """Return the path of a tool."""
    found = shutil.which(tool)
    if found is not None:
        return found
    root = os.environ.get("CUDA_PATH")
    places = ((f"{root}/bin/{tool}",) if root else ()) + _PLACES[tool]
    for place in places:
        for path in sorted(glob.glob(place), reverse=True):
            if os.access(path, os.X_OK):
                return path
    return None


def facts(index: int | None = 0) -> Facts:
    """Look at the machine.

    Parameters
    ----------
    index : int or None
        Of the CUDA device that will compute; None where the CPU will.
    """
    paths = {tool: path for tool in TOOLS[:-1] if (path := find(tool))}
    if index is None:
        return Facts(None, None, "the CPU computes", paths)
    found = probe()
    if found.count == 0:
        return Facts(None, None, f"there is no GPU to profile: {found.reason}", paths)
    cuda = runtime.cupy().cuda
    properties = cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    capability = int(properties["major"]), int(properties["minor"])
    toolkit = int(cuda.runtime.runtimeGetVersion()) // 1000
    return Facts(capability, toolkit, name, paths)


def why_not(tool: str, seen: Facts) -> str | None:
    """Return why a tool cannot profile what ``seen`` describes, or None."""
    if tool == BUILTIN:
        return None
    if seen.capability is None:
        return seen.device
    own = ".".join(map(str, seen.capability))
    least, first_not = _CAPABILITIES[tool]
    if seen.capability < least:
        return f"it needs compute capability {least[0]}.{least[1]}; {seen.device} has {own}"
    if first_not is not None and seen.capability >= first_not:
        return (
            f"it supports devices below compute capability {first_not[0]}.{first_not[1]}; "
            f"{seen.device} has {own}"
        )
    if tool == "nvprof" and seen.toolkit is not None and seen.toolkit > 12:
        return f"it supports CUDA 12 or older; this is CUDA {seen.toolkit}"
    if tool not in seen.paths:
        return "it is not installed, or not on the PATH"
    return None


def choose(seen: Facts, forced: str | None = None) -> Choice:
    """Return the profiler to use.

    Parameters
    ----------
    seen : Facts
        About device and tools.
    forced : str, optional
        One of :data:`TOOLS`.

    Raises
    ------
    ValueError
        If there is no such tool.
    """
    if forced is not None:
        if forced not in TOOLS:
            raise ValueError(f"tool is {forced!r}; expected one of {', '.join(TOOLS)}")
        why = why_not(forced, seen)
        return Choice(forced, "it was asked for" + (f", although {why}" if why else ""))
    others: list[tuple[str, str]] = []
    for tool in TOOLS:
        why = why_not(tool, seen)
        if why is None:
            return Choice(tool, _praise(tool, seen), tuple(others))
        others.append((tool, why))
    raise AssertionError("the built-in profiler is always there")


def _praise(tool: str, seen: Facts) -> str:
    if tool == BUILTIN:
        return "it needs nothing but gpuconv"
    own = ".".join(map(str, seen.capability or ()))
    return f"it supports {seen.device}, compute capability {own}, CUDA {seen.toolkit}"


def plan(tool: str, path: str, command: Sequence[str], folder: Path, launches: int = 200) -> Plan:
    """Return the commands that profile ``command`` with one of NVIDIA's tools.

    Parameters
    ----------
    tool, path : str
        Which one, and where it is.
    command : sequence of str
        What to profile.
    folder : Path
        Where the reports go.
    launches : int
        Kernels that Nsight Compute looks at: it runs each many times over.
    """
    base = folder / tool
    environment = {"GPUCONV_NVTX": "1"}
    if tool == "nvprof":
        profile, table = base.with_suffix(".nvvp"), base.with_suffix(".csv")
        record = [path, "--force-overwrite", "--export-profile", str(profile), *command]
        report = [
            path, "--import-profile", str(profile), "--print-gpu-summary", "--csv",
            "--normalized-time-unit", "us", "--log-file", str(table),
        ]  # fmt: skip
        return Plan(record, report, environment, (profile, table), table, False)
    if tool == "nsys":
        profile, table = base.with_suffix(".nsys-rep"), base.with_suffix(".csv")
        record = [
            path, "profile", "--trace=cuda,nvtx,cublas,cudnn", "--sample=none", "--cpuctxsw=none",
            "--force-overwrite=true", f"--output={base}", *command,
        ]  # fmt: skip
        report = [
            path, "stats", "--report=cuda_gpu_kern_sum", "--format=csv", "--force-export=true",
            "--output=-", str(profile),
        ]  # fmt: skip
        return Plan(record, report, environment, (profile, table), table, True)
    if tool == "ncu":
        profile, table = base.with_suffix(".ncu-rep"), base.with_suffix(".csv")
        record = [
            path, "--set", "basic", "--nvtx", "--target-processes", "all", "--launch-count",
            str(launches), "--force-overwrite", "--export", str(base), *command,
        ]  # fmt: skip
        report = [path, "--import", str(profile), "--csv", "--page", "details"]
        return Plan(record, report, environment, (profile, table), table, True)
    raise ValueError(f"tool is {tool!r}; expected nvprof, nsys or ncu")
