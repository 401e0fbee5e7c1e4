"""What Nsight Compute counts in the five slowest: the passes furthest from their floor.

    python -m benchmarks.gpu.counters resnet50_conv2_3x3 float32 forward cuda_gemm

is what ``ncu`` looks at: one call, after one that compiles.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpuconv
from benchmarks.gpu import shapes as layers
from benchmarks.gpu.stages import State
from benchmarks.gpu.summary import floor_ms, own_best
from benchmarks.gpu.timing import calls_of
from gpuconv.cuda import runtime
from gpuconv.profiling.tools import find

__all__ = ["METRICS", "parse", "slowest", "stage"]

ROOT = Path(__file__).resolve().parents[2]
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
}
COUNT = 5
#: Into base units.
_SCALE = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "nsecond": 1, "ns": 1, "usecond": 1e3,
          "us": 1e3, "msecond": 1e6, "ms": 1e6, "second": 1e9, "s": 1e9}  # fmt: skip


def slowest(
    rows: dict[str, Any], ceilings: dict[str, Any], count: int = COUNT
) -> list[dict[str, Any]]:
    """Return the passes of the best of our engines that are furthest from their floor."""
    found = []
    for name, row in rows.items():
        for pass_, one in row.get("passes", {}).items():
            best = own_best(one)
            floor = floor_ms(row["dtype"], one, ceilings)
            if best is None or floor is None or pass_ == "train":
                continue
            found.append({
                "unit": name, "pass": pass_, "engine": best[0], "ms": best[1], "floor_ms": floor,
                "times_the_floor": best[1] / floor,
            })  # fmt: skip
    return sorted(found, key=lambda f: -float(f["times_the_floor"]))[:count]


def parse(text: str) -> list[dict[str, Any]]:
    """Return the kernels of ``ncu --csv``: their names and metrics, in base units."""
    lines = [x for x in text.splitlines() if x.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if row.get("Metric Name") not in METRICS:
            continue
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        value = float(row["Metric Value"].replace(",", "")) * _SCALE.get(row["Metric Unit"], 1)
        kernel[METRICS[row["Metric Name"]]] = value
    return list(kernels.values())


def stage(state: State, limit: float, tool: str | None = None) -> dict[str, Any]:
    """Look at the five slowest; without Nsight Compute, or the right to count, say so."""
    timings, ceilings = state.result("timings"), state.result("ceilings")
    if timings is None or ceilings is None:
        return {"run": False, "why_not": "there are no times yet"}
    chosen = slowest(timings["rows"], ceilings)
    tool = tool or find("ncu")
    if tool is None:
        return {"run": False, "why_not": "ncu is not installed", "slowest": chosen}
    for one in chosen:
        name, dtype = one["unit"].split("|")
        command = [
            tool, "--csv", "--metrics", ",".join(METRICS), "--profile-from-start", "off",
            "--target-processes", "all", sys.executable, "-m", "benchmarks.gpu.counters", name, dtype,
            one["pass"], one["engine"],
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False,
                timeout=limit / len(chosen),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            one["why_not"] = f"not done in {limit / len(chosen):.0f} s"
            continue
        if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
            why = "this user may not read the counters (ERR_NVGPUCTRPERM)"
            return {"run": False, "why_not": why, "slowest": chosen}
        one["kernels"] = parse(done.stdout)
        if not one["kernels"]:
            one["why_not"] = " ".join((done.stderr or done.stdout).split())[-300:]
    return {"run": True, "slowest": chosen}


def main(arguments: list[str]) -> int:
    """Compute one pass twice, and let the profiler see the second."""
    name, dtype, pass_, engine = arguments
    shape = next(s for s in layers.shapes() if s.name == name)
    data = layers.make(shape, dtype)
    gpuconv.set_precision("tf32" if dtype == "tf32" else "default")
    call = calls_of(data, engine)[pass_]
    call()
    cuda = runtime.cupy().cuda
    cuda.runtime.deviceSynchronize()
    cuda.runtime.profilerStart()
    call()
    cuda.runtime.deviceSynchronize()
    cuda.runtime.profilerStop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
