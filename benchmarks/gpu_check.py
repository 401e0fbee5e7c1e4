"""Everything that needs a GPU, in one command: ``make gpu-check``.

Runs the conformance suite on the device, compute-sanitizer over small shapes where it is
installed, and times the CUDA engines beside PyTorch where that is; writes
``benchmarks/results/<gpu>.json`` with the date, the driver and the versions. Exits with 1
where something fails and with 2 where there is no device.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import gpuconv
from benchmarks import cases, gpu_training, suite
from benchmarks.cases import Case
from benchmarks.suite import Shape
from gpuconv import dispatch
from gpuconv.cuda import runtime
from gpuconv.device import probe
from gpuconv.profiling.timing import EventClock, timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

#: The layers of the suite that are timed: one of each kind that the CUDA engines differ on.
LAYERS = (
    "resnet50_conv2_3x3", "resnet50_conv4_3x3", "resnet50_conv2_1x1_expand", "resnet50_stem",
    "mobilenetv2_depthwise_112_stride2", "resnext50_conv3_grouped", "odd_channels_3x3",
)  # fmt: skip

#: Seconds after which a part is given up; all parts together stay under ten minutes.
SUITE_LIMIT, SANITIZER_LIMIT = 300.0, 90.0

#: Run by compute-sanitizer: every pass, layout and dtype of the CUDA engines, on small shapes.
SANITIZED = """
import numpy as np
import gpuconv
from gpuconv.cuda import runtime
cp = runtime.cupy()
rng = np.random.default_rng(0)
names = [e.name for e in gpuconv.engines() if e.available and e.device == "cuda"]
for name in names:
    for dtype in ("float32", "float64", "float16"):
        for layout in ("NHWC", "NCHW"):
            last = layout == "NHWC"
            x = cp.asarray(rng.standard_normal((2, 9, 8, 4) if last else (2, 4, 9, 8)), dtype)
            w = cp.asarray(rng.standard_normal((3, 2, 2, 6) if last else (6, 2, 3, 2)), dtype)
            b = cp.ones(6, dtype)
            options = dict(stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 2), groups=2,
                           layout=layout, activation="ReLU")
            with gpuconv.engine(name):
                try:
                    y = gpuconv.conv2d(x, w, b, **options)
                    gpuconv.conv2d_backward(y, x, w, y=y, **options)
                except gpuconv.EngineError as error:
                    print("not for", name, dtype, layout, error)
                else:
                    print("computed", name, dtype, layout)
cp.cuda.Device().synchronize()
"""


# ------------------------------------------------------------------------------------- times


class TorchClock:
    """CUDA's events by PyTorch, on its stream."""

    what, waits = "CUDA events, by PyTorch", True

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event, time.perf_counter_ns()

    def seconds(self, first: Any, last: Any) -> float:
        last[0].synchronize()
        return float(first[0].elapsed_time(last[0])) * 1e-3

    def host(self, mark: Any) -> int:
        return int(mark[1])


def options_of(shape: Shape) -> dict[str, Any]:
    """Return the keywords of a layer's calls."""
    p = shape.problem
    return {
        "stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups,
        "activation": "ReLU",
    }  # fmt: skip


def judged(case: Case, results: dict[str, Any], factor: float = 1.0) -> dict[str, Any]:
    """Return the errors against the float64 results, and whether all are within bounds."""
    errors = {n: cases.compare(r, case.expected[n]) for n, r in results.items()}
    limits = {n: cases.tolerance(case.shape, n, factor) for n in errors}
    return {
        "errors": {n: e if math.isfinite(e) else None for n, e in errors.items()},
        "correct": all(errors[n] <= limits[n] for n in errors),
    }


def with_rates(shape: Shape, row: dict[str, Any]) -> dict[str, Any]:
    """Add GFLOP/s to a row's times; the gradients are two passes."""
    for name, passes in (("forward", 1), ("backward", 2)):
        row[name]["gflops"] = passes * shape.flops("forward") / row[name]["ms"] / 1e6
    return row


def time_engine(case: Case, engine: str, seconds: float) -> dict[str, Any]:
    """Return an engine's times, forward and all gradients, and its errors."""
    cp = runtime.cupy()
    x, w, b, dy = (cp.asarray(a) for a in (case.x, case.w, case.b, case.dy))
    options = options_of(case.shape)
    with gpuconv.engine(engine):
        try:
            y = gpuconv.conv2d(x, w, b, **options)
            found = gpuconv.conv2d_backward(dy, x, w, y=y, **options)
        except dispatch.EngineError as error:
            return {"unsupported": str(error)}
        results = dict(zip(("y", "dx", "dw", "db"), (y, *found), strict=True))
        row = judged(
            case,
            {n: gpuconv.asnumpy(r) for n, r in results.items()},
            dispatch.get_engine(engine).error_factor,
        )
        clock = EventClock()
        row["forward"] = timed(lambda: gpuconv.conv2d(x, w, b, **options), clock, seconds)
        row["backward"] = timed(
            lambda: gpuconv.conv2d_backward(dy, x, w, y=y, **options), clock, seconds
        )
    return with_rates(case.shape, row)


def time_torch(torch: Any, case: Case, form: str, seconds: float) -> dict[str, Any]:
    """Return PyTorch's times for the same in one memory format, with cuDNN's own search on."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    p = case.shape.problem
    layout = torch.channels_last if form == "NHWC" else torch.contiguous_format
    options = {
        "stride": p.stride, "padding": tuple(a for a, _ in p.padding), "dilation": p.dilation,
        "groups": p.groups,
    }  # fmt: skip

    def tensor(array: Any, axes: tuple[int, ...]) -> Any:
        made = torch.from_numpy(array.transpose(axes).copy()).cuda()
        return made.contiguous(memory_format=layout) if made.ndim == 4 else made

    x, dy = (tensor(a, (0, 3, 1, 2)) for a in (case.x, case.dy))
    w, b = tensor(case.w, (3, 2, 0, 1)), tensor(case.b, (0,))
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def layer() -> Any:
        return torch.relu(torch.nn.functional.conv2d(x, w, b, **options))

    def forward() -> Any:
        with torch.inference_mode():
            return layer()

    y = layer()

    def backward() -> Any:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    axes = ((0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0), (0,))
    tensors = (y, *backward())
    results = {
        n: t.detach().cpu().numpy().transpose(a)
        for n, t, a in zip(("y", "dx", "dw", "db"), tensors, axes, strict=True)
    }
    clock = TorchClock(torch)
    row = judged(case, results, 10.0)  # cuDNN too may choose Winograd
    row["forward"] = timed(forward, clock, seconds)
    row["backward"] = timed(backward, clock, seconds)
    return with_rates(case.shape, row)


def time_layer(shape: Shape, seconds: float) -> dict[str, Any]:
    """Return the times of one layer: every CUDA engine, and PyTorch where it sees the device."""
    case = cases.make(shape)
    row: dict[str, Any] = {"layer": shape.describe(), "flops": shape.flops("forward")}
    for info in gpuconv.engines():
        if info.device == "cuda" and info.available:
            row[info.name] = time_engine(case, info.name, seconds)
    torch = _torch()
    if torch is not None:
        for form in ("NCHW", "NHWC"):
            row[f"torch {form}"] = time_torch(torch, case, form, seconds)
    return row


def _torch() -> Any:
    """Return PyTorch if it is installed and sees a device."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def line(name: str, row: dict[str, Any]) -> str:
    """Return a layer's times in a few words."""
    parts = []
    for who, found in row.items():
        if isinstance(found, dict) and "forward" in found:
            times = f"{found['forward']['ms']:.3f} + {found['backward']['ms']:.3f} ms"
            parts.append(f"{who} {times}" + ("" if found["correct"] else " WRONG"))
    return f"{name}, forward + gradients: " + "; ".join(parts)


# ------------------------------------------------------------------------------------ checks


def run_tests(arguments: list[str]) -> dict[str, Any]:
    """Run tests and return their numbers; one that is skipped has not been run on the device."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", *arguments]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SUITE_LIMIT
            )
        except subprocess.TimeoutExpired:
            return {"passed": False, "reason": f"not done in {SUITE_LIMIT:g} s"}
        counts = _counts(file)
    if done.returncode:
        print((done.stdout + done.stderr)[-3000:], flush=True)
    if counts is None:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        return {"passed": False, "reason": said[-300:] or f"exit status {done.returncode}"}
    good = done.returncode == 0 and counts["run"] > 0 and counts["skipped"] == 0
    return {"passed": good, **counts}


def _counts(file: Path) -> dict[str, int] | None:
    """Return the numbers of pytest's report; None if there is none."""
    try:
        found = ET.parse(file).getroot().find("testsuite")
    except (OSError, ET.ParseError):
        return None
    if found is None:
        return None
    tests, failures, errors, skipped = (
        int(found.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
    )
    return {"run": tests - skipped, "failed": failures + errors, "skipped": skipped}


def run_suite() -> dict[str, Any]:
    """Run the conformance suite on the device."""
    return run_tests(["tests/test_conformance.py", "-k", "cuda"])


def run_sanitizer(tool: str | None = None) -> dict[str, Any]:
    """Run compute-sanitizer's memcheck and racecheck, where it is installed."""
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    tool = tool or shutil.which("compute-sanitizer") or usual
    if not Path(tool).exists():
        return {"run": False, "reason": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"run": True}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False,
                timeout=SANITIZER_LIMIT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            found[check] = {"passed": False, "reason": f"not done in {SANITIZER_LIMIT:g} s"}
            continue
        computed = done.stdout.count("computed ")
        lines = [x for x in done.stdout.splitlines() if "SUMMARY" in x]
        found[check] = {
            "passed": done.returncode == 0 and computed > 0,
            "computed": computed,
            "summary": " ".join(lines)[-200:],
        }
        if not found[check]["passed"]:
            print((done.stdout + done.stderr)[-3000:], flush=True)
    return found


# ------------------------------------------------------------------------------------ report


def machine() -> dict[str, Any]:
    """Return the device, the driver and the versions."""
    cp = runtime.cupy()
    properties = cp.cuda.runtime.getDeviceProperties(0)
    name = properties["name"]
    torch = _torch()
    return {
        "gpu": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": str(cp.cuda.Device(0).compute_capability),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "driver": _driver(),
        "cuda_driver": int(cp.cuda.runtime.driverGetVersion()),
        "cuda_runtime": int(cp.cuda.runtime.runtimeGetVersion()),
        "cudnn_of_torch": None if torch is None else torch.backends.cudnn.version(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {
            "gpuconv": gpuconv.__version__,
            "cupy": str(cp.__version__),
            **{p: _version(p) for p in ("numpy", "torch")},
        },
    }


def _driver() -> str | None:
    """Return the driver's version as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _version(package: str) -> str | None:
    """Return an installed package's version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def failures(report: dict[str, Any]) -> list[str]:
    """Return a line for everything that failed."""
    lines = []
    for name in ("suite", "sanitizer"):
        part = report.get(name, {})
        checks = {name: part} if name == "suite" else {k: part.get(k) for k in part}
        for check, found in checks.items():
            if isinstance(found, dict) and not found.get("passed", True):
                lines.append(f"{check}: {found}")
    for layer, row in report.get("timings", {}).items():
        for who, found in row.items():
            if isinstance(found, dict) and not found.get("correct", True):
                lines.append(f"{layer}, {who}: wrong result, errors {found['errors']}")
    return lines


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write the report as ``<gpu>.json``, whole or not at all; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / (re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()) + ".json")
    temporary = place.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(place)
    return place


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and write the results; return the exit status."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where to write; benchmarks/results at first")
    add("--skip-suite", action="store_true", help="only the timings; nothing is written then")
    add("--layers", metavar="LIST", help="other layers of the suite; nothing is written then")
    add("--seconds", type=float, default=0.4, metavar="S", help="for each time (0.4)")
    args = parser.parse_args(arguments)
    found = probe()
    if found.count == 0:
        print(f"gpu-check needs a CUDA device: {found.reason}. {found.advice}", file=sys.stderr)
        return 2
    stand_in = runtime.installed() is not None
    whole = not (args.skip_suite or args.layers or stand_in)
    out = args.out or (RESULTS if whole else None)
    if stand_in and out is not None and out.resolve().is_relative_to(RESULTS):
        print(f"gpu-check: no GPU computes here, so nothing goes into {RESULTS}", file=sys.stderr)
        return 2
    try:
        names = tuple(args.layers.split(",")) if args.layers else LAYERS
        shapes = [s for s in suite.select(suite.load(), names) if not s.transposed]
    except suite.SuiteError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "on_a_gpu": not stand_in,
        "machine": machine(),
    }
    print(json.dumps(report["machine"], indent=2), flush=True)
    if not args.skip_suite:
        for name, check in (("suite", run_suite), ("sanitizer", run_sanitizer)):
            report[name] = check()
            print(f"{name}: {json.dumps(report[name])}", flush=True)
    report["timings"] = {}
    for shape in shapes:
        report["timings"][shape.name] = time_layer(shape, args.seconds)
        print(line(shape.name, report["timings"][shape.name]), flush=True)
    if not stand_in:
        report["training"] = gpu_training.measure()
        print(f"training: {json.dumps(report['training'])}", flush=True)
    wrong = failures(report)
    report["failures"] = wrong
    for text in wrong:
        print(f"FAILED {text}", file=sys.stderr)
    if out is not None:
        print(f"wrote {write(report, out)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
