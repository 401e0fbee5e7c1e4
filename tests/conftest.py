"""Where the tests keep what they measure, and what is reported beside their results."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from tests.nvrtc import Row, summary, whole

# Not the user's own: a tuned choice there would decide what the tests run.
os.environ["GPUCONV_CACHE_DIR"] = str(
    Path(tempfile.gettempdir()) / f"gpuconv-tests-{getattr(os, 'getuid', lambda: 0)()}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptxas", metavar="FILE",
        help="compile every variant for every architecture; write the table as .csv or .md",
    )  # fmt: skip


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what the kernels take, as tests/test_cuda_compile.py found it."""
    found = [
        Row(**json.loads(str(value)))
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "ptxas" and report.when == "call"
    ]
    if not found:
        return
    terminalreporter.section(
        "by ptxas: registers a thread (+ bytes spilled) / percent of an SM's warps resident"
    )
    for line in summary(found):
        terminalreporter.write_line(line)
    place = config.getoption("--ptxas")
    if place:
        file = Path(place)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(whole(found, file.suffix == ".md"), encoding="utf-8")
        temporary.replace(file)
        terminalreporter.write_line(f"wrote {file}")
