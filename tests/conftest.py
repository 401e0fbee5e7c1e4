"""Where the tests keep what they measure, and what is reported beside their results."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

# Not the user's own: a tuned choice there would decide what the tests run.
os.environ["GPUCONV_CACHE_DIR"] = str(
    Path(tempfile.gettempdir()) / f"gpuconv-tests-{getattr(os, 'getuid', lambda: 0)()}"
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print registers and spills of the kernels, as tests/test_cuda_compile.py found them."""
    cells: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "ptxas" and report.when == "call":
                row, architecture, registers, spilled = value
                old = cells[row].get(architecture, (0, 0))
                cells[row][architecture] = (max(old[0], registers), max(old[1], spilled))
    if not cells:
        return
    columns = sorted({a for row in cells.values() for a in row})
    width = max(map(len, cells))
    terminalreporter.section("registers a thread (+ bytes spilled), the most of all variants")
    terminalreporter.write_line(" " * width + "".join(f"{f'sm_{a}':>9}" for a in columns))
    for row, found in sorted(cells.items()):
        texts = []
        for architecture in columns:
            registers, spilled = found.get(architecture, (0, 0))
            texts.append(f"{registers}+{spilled}" if spilled else str(registers or "-"))
        terminalreporter.write_line(f"{row:{width}}" + "".join(f"{t:>9}" for t in texts))
