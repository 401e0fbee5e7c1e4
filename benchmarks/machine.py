"""What the result says about the machine it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["busy", "describe", "slug", "title"]


def describe() -> dict[str, Any]:
    """Return the CPU, its cores at hand, the memory and the system, as far as they can be known."""
    cpu = _cpuinfo()
    return {
        "cpu": cpu.get("model name") or _sysctl() or platform.processor() or platform.machine(),
        "family": cpu.get("cpu family", ""),
        "model": cpu.get("model", ""),
        "cores": _cores(),
        "architecture": platform.machine(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def busy(seconds: float = 0.2) -> float | None:
    """Return how many cores are at work while this process waits; None where it is not known."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None:
        return None
    at_work, total = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * at_work / max(1, total)


def compiled_stem(result: Mapping[str, Any]) -> str:
    """Return what tells results with compiled engines from those of NumPy alone."""
    return "-numba" if result["options"].get("compiled") else ""


def title(machine: Mapping[str, Any]) -> str:
    """Return the processor in words, with what tells it where its name does not."""
    known = [f"{part} {machine[part]}" for part in ("family", "model") if machine.get(part)]
    return str(machine["cpu"]) + (f" ({', '.join(known)})" if known else "")


def slug(machine: dict[str, Any]) -> str:
    """Return the machine as part of a file name: ``amd-epyc-9354-family-25-model-17-16-cores``.

    A virtual machine's name of the processor may tell neither its family nor its model.
    """
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\bprocessor\b|\d+-core", " ", machine["cpu"].lower())
    words = re.findall(r"[a-z0-9]+", name) or ["cpu"]
    for part in ("family", "model"):
        if machine.get(part):
            words += [part, machine[part]]
    return "-".join([*words, str(machine["cores"]), "core" if machine["cores"] == 1 else "cores"])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ticks() -> tuple[int, int] | None:
    """Return the clock ticks of all cores at work, and all ticks, since the system started."""
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            ticks = [int(t) for t in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _cpuinfo() -> dict[str, str]:
    """Return the first processor of Linux's list."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sysctl() -> str:
    """Return macOS's name of the processor."""
    if platform.system() != "Darwin":
        return ""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
