"""The command as a user runs it, for the tests of what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpuconv.training import run
from tests.test_device import ROOT

COMMON = ["--device", "cpu", "--threads", "1"]
FAST = ["--epochs", "2", *COMMON]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUCONV_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m gpuconv`` as a user does."""
    env = more.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "gpuconv", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run.METRICS).read_text().splitlines()]


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
