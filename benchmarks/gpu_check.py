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
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv.cuda import runtime
from gpuconv.device import probe

ROOT = Path(__file__).resolve().parent.parent

#: What is timed: name, x, w, options. Small enough for the atomic kernel to finish.
SHAPES: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("resnet_3x3_56", (8, 56, 56, 64), (3, 3, 64, 64), {"padding": 1}),
    ("resnet_3x3_14", (8, 14, 14, 256), (3, 3, 256, 256), {"padding": 1}),
    ("resnet_1x1_56", (8, 56, 56, 64), (1, 1, 64, 256), {}),
    ("resnet_stem", (8, 224, 224, 3), (7, 7, 3, 64), {"padding": 3, "stride": 2}),
    ("depthwise_3x3_112", (8, 112, 112, 32), (3, 3, 1, 32), {"padding": 1, "groups": 32}),
    ("odd_channels", (8, 28, 28, 37), (3, 3, 37, 51), {"padding": 1}),
]

#: Run by compute-sanitizer: every pass, layout and dtype of the CUDA engines, on small shapes.
SANITIZED = """
import numpy as np
import gpuconv
from gpuconv.cuda import runtime
cp = runtime.cupy()
rng = np.random.default_rng(0)
names = [e.name for e in gpuconv.engines() if e.available and e.name.startswith("cuda")]
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
                y = gpuconv.conv2d(x, w, b, **options)
                gpuconv.conv2d_backward(y, x, w, y=y, **options)
cp.cuda.Device().synchronize()
print("sanitized", names)
"""


def timed(call: Callable[[], Any], seconds: float = 0.5) -> dict[str, float]:
    """Return the median and the quartiles of a call's time on the device, in milliseconds."""
    cp = runtime.cupy()
    call()
    start, stop = cp.cuda.Event(), cp.cuda.Event()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(float(cp.cuda.get_elapsed_time(start, stop)))
    quarter = statistics.quantiles(times, n=4)
    return {"ms": statistics.median(times), "q1": quarter[0], "q3": quarter[2]}


def time_gpuconv(shape: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any]) -> Any:
    """Return the times of every CUDA engine, forward and all gradients, with their errors."""
    cp = runtime.cupy()
    rng = np.random.default_rng(0)
    x, w = (cp.asarray(rng.standard_normal(s), "float32") for s in (shape, kernel))
    b = cp.zeros(kernel[-1], "float32")
    exact = gpuconv.conv2d(*(gpuconv.asnumpy(a).astype("f8") for a in (x, w)), **options)
    rows = {}
    for info in gpuconv.engines():
        if not info.available or not info.name.startswith("cuda"):
            continue
        with gpuconv.engine(info.name):
            y = gpuconv.conv2d(x, w, b, activation="ReLU", **options)
            error = np.abs(gpuconv.asnumpy(y) - np.maximum(exact, 0)).max() / np.abs(exact).max()
            dy = cp.asarray(rng.standard_normal(y.shape), "float32")
            flops = 2 * y.size * int(np.prod(kernel[:3]))
            forward = timed(lambda: gpuconv.conv2d(x, w, b, activation="ReLU", **options))
            gradients = partial(
                gpuconv.conv2d_backward, dy, x, w, y=y, activation="ReLU", **options
            )
            backward = timed(gradients)
        rows[info.name] = {
            "forward": {**forward, "gflops": flops / forward["ms"] / 1e6},
            "backward": {**backward, "gflops": 2 * flops / backward["ms"] / 1e6},
            "forward_error": float(error),
        }
    return rows


def time_torch(
    torch: Any, shape: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any]
) -> Any:
    """Return PyTorch's times for the same, channels last, with cuDNN's own search on."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    form = torch.channels_last
    x = torch.randn(shape[0], shape[3], shape[1], shape[2], device="cuda")
    w = torch.randn(kernel[3], kernel[2], kernel[0], kernel[1], device="cuda")
    x, w = (t.to(memory_format=form).requires_grad_() for t in (x, w))
    b = torch.zeros(kernel[3], device="cuda", requires_grad=True)
    act, conv = torch.relu, torch.nn.functional.conv2d

    def forward() -> Any:
        with torch.no_grad():
            return act(conv(x, w, b, **options))

    y = act(conv(x, w, b, **options))
    dy = torch.randn_like(y)

    def measure(call: Callable[[], Any]) -> dict[str, float]:
        for _ in range(3):
            call()
        times = []
        for _ in range(50):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        quarter = statistics.quantiles(times, n=4)
        return {"ms": statistics.median(times), "q1": quarter[0], "q3": quarter[2]}

    return {
        "forward": measure(forward),
        "backward": measure(lambda: torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)),
    }


def run_suite() -> dict[str, Any]:
    """Run the conformance suite on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_conformance.py", "-k", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tail = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    print(done.stdout[-3000:] if done.returncode else tail[0], flush=True)
    return {"passed": done.returncode == 0, "summary": tail[0]}


def run_sanitizer() -> dict[str, Any]:
    """Run compute-sanitizer's memcheck and racecheck, where it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"run": False, "reason": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"run": True}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
        environment = {**os.environ, "CUPY_CACHE_IN_MEMORY": "0"}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
        )
        lines = [x for x in done.stdout.splitlines() if "ERROR SUMMARY" in x or "RACECHECK" in x]
        found[check] = {"passed": done.returncode == 0, "summary": " ".join(lines)[-200:]}
        print(f"compute-sanitizer {check}: {found[check]}", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-3000:], flush=True)
    return found


def machine() -> dict[str, Any]:
    """Return the device, the driver and the versions."""
    cp = runtime.cupy()
    properties = cp.cuda.runtime.getDeviceProperties(0)
    name = properties["name"]
    packages = ("numpy", "torch", "gpuconv")
    return {
        "gpu": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": str(cp.cuda.Device(0).compute_capability),
        "driver": int(cp.cuda.runtime.driverGetVersion()),
        "runtime": int(cp.cuda.runtime.runtimeGetVersion()),
        "cupy": cp.__version__,
        "python": platform.python_version(),
        "versions": {p: version(p) for p in packages},
    }


def version(package: str) -> str | None:
    """Return an installed package's version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and write the results; return the exit status."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--skip-suite", action="store_true", help="only the timings")
    args = parser.parse_args(arguments)
    found = probe()
    if found.count == 0:
        print(f"gpu-check needs a CUDA device: {found.reason}. {found.advice}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
    }
    print(json.dumps(report["machine"], indent=2), flush=True)
    if not args.skip_suite:
        report["suite"] = run_suite()
        report["sanitizer"] = run_sanitizer()
    try:
        import torch
    except ImportError:
        torch = None
    report["timings"] = {}
    for name, shape, kernel, options in SHAPES:
        row = {"x": shape, "w": kernel, "options": options, **time_gpuconv(shape, kernel, options)}
        if torch is not None and torch.cuda.is_available():
            row["torch"] = time_torch(torch, shape, kernel, options)
        report["timings"][name] = row
        print(name, json.dumps(row), flush=True)
    place = args.out / (re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()) + ".json")
    args.out.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.replace(place)
    print(f"wrote {place}")
    checks = [report.get("suite", {"passed": True})["passed"]]
    checks += [v["passed"] for v in report.get("sanitizer", {}).values() if isinstance(v, dict)]
    return 0 if all(checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
