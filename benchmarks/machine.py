"""What the result says about the machine it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from typing import Any

__all__ = ["describe", "slug"]


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


def slug(machine: dict[str, Any]) -> str:
    """Return the machine as part of a file name: ``amd-epyc-9354-16-cores``."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\bprocessor\b|\d+-core", " ", machine["cpu"].lower())
    words = re.findall(r"[a-z0-9]+", name) or ["cpu"]
    return "-".join([*words, str(machine["cores"]), "core" if machine["cores"] == 1 else "cores"])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
