"""Whether it is right on the device: the conformance suite, compute-sanitizer, a net that learns."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import State

__all__ = ["conformance", "digits", "run_sanitizer", "run_tests", "sanitizer"]

ROOT = Path(__file__).resolve().parents[2]
#: Accuracy on the test images that the digits must reach.
ACCURACY = 0.98
#: What compute-sanitizer looks at.
MODULE = "benchmarks.gpu.sanitized"
_DTYPES = ("bfloat16", "float16", "float32", "float64", "tf32")


def run_tests(arguments: list[str], limit: float) -> dict[str, Any]:
    """Run tests and return their numbers; one that is skipped has not been run on the device."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", *arguments]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"passed": False, "reason": f"not done in {limit:.0f} s"}
        counts = _counts(file)
    if done.returncode:
        print((done.stdout + done.stderr)[-3000:], flush=True)
    if counts is None:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        return {"passed": False, "reason": said[-300:] or f"exit status {done.returncode}"}
    good = done.returncode == 0 and counts["run"] > 0 and counts["skipped"] == 0
    result = {"passed": good, **counts}
    if not good:
        result["reason"] = f"{counts['failed']} failed, {counts['skipped']} skipped"
    return result


def _counts(file: Path) -> dict[str, Any] | None:
    """Return the numbers of pytest's report, by dtype as well; None if there is none."""
    try:
        found = ET.parse(file).getroot().find("testsuite")
    except (OSError, ET.ParseError):
        return None
    if found is None:
        return None
    tests, failures, errors, skipped = (
        int(found.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
    )
    run: Counter[str] = Counter()
    for case in found.findall("testcase"):
        dtype = next((d for d in _DTYPES if d in re.split(r"[^a-z0-9]+", case.get("name", ""))), "")
        if dtype and case.find("skipped") is None:
            run[dtype] += 1
    return {
        "run": tests - skipped, "failed": failures + errors, "skipped": skipped,
        "by_dtype": dict(sorted(run.items())),
    }  # fmt: skip


def conformance(state: State, limit: float) -> dict[str, Any]:
    """Run the conformance suite of the CUDA engines on the device, in every dtype."""
    tests = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "tests").glob("test_conformance*.py"))
    arguments = [*tests, "-k", "cuda or cudnn", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:  # compiling is what takes the time
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    return run_tests(arguments, limit)


def run_sanitizer(limit: float, tool: str | None = None) -> dict[str, Any]:
    """Run compute-sanitizer's memcheck and racecheck, where it is installed."""
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    tool = tool or shutil.which("compute-sanitizer") or usual
    if not Path(tool).exists():
        return {"run": False, "why_not": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"run": True, "passed": True}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", MODULE]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit / 2
            )
        except subprocess.TimeoutExpired:
            found[check] = {"passed": False, "reason": f"not done in {limit / 2:.0f} s"}
        else:
            computed = done.stdout.count("computed ")
            lines = [x for x in done.stdout.splitlines() if "SUMMARY" in x]
            found[check] = {
                "passed": done.returncode == 0 and computed > 0,
                "computed": computed,
                "summary": " ".join(lines)[-200:],
            }
            if not found[check]["passed"]:
                print((done.stdout + done.stderr)[-3000:], flush=True)
        if not found[check]["passed"]:
            found["passed"] = False
            found["reason"] = f"{check}: {found[check].get('reason') or found[check]['summary']}"
    return found


def sanitizer(state: State, limit: float) -> dict[str, Any]:
    """Run compute-sanitizer on small shapes."""
    return run_sanitizer(limit)


def digits(state: State, limit: float, device: str = "cuda", epochs: int = 15) -> dict[str, Any]:
    """Train on the digits, on the device; the accuracy on the test images must reach 0.98."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digits"
        command = [
            sys.executable, "-m", "gpuconv", "train", "digits", "--device", device, "--epochs",
            str(epochs), "--quiet", "--out", str(out),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"passed": False, "reason": f"not done in {limit:.0f} s"}
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            return {"passed": False, "reason": said[-300:]}
        rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = next(r["test_accuracy"] for r in rows if "test_accuracy" in r)
    seconds = [r["seconds"] for r in rows if "epoch" in r]
    result = {
        "passed": accuracy >= ACCURACY, "accuracy": accuracy, "epochs": epochs,
        "seconds_an_epoch": sorted(seconds)[len(seconds) // 2],
    }  # fmt: skip
    if accuracy < ACCURACY:
        result["reason"] = f"accuracy {accuracy:.4f}, below {ACCURACY}"
    return result
