"""The parts of `make gpu-check`: times, tests, sanitizer, counters and the summary, without a GPU."""

import subprocess
import time

import pytest

from benchmarks.gpu import checks, command, counters, pages
from benchmarks.gpu.command import failures
from gpuconv.profiling.timing import timed
from tests.test_gpu_check import state_at

# ---------------------------------------------------------------------------------- the checks


class Clock:
    """A device on which every call takes as long as said."""

    def __init__(self, ms):
        self.ms, self.calls = ms, 0

    def mark(self):
        return self.calls

    def seconds(self, first, last):
        return 1e-3 * self.ms * (last - first)

    def call(self):
        self.calls += 1
        time.sleep(1e-5)


@pytest.mark.parametrize(("ms", "calls"), [(5.0, 1), (0.5, 4), (0.013, 100), (0.0, 100)])
def test_times(ms, calls):
    clock = Clock(ms)
    found = timed(clock.call, clock, 0.0)
    assert found["calls"] == calls
    assert found["samples"] == 5
    assert found["ms"] == found["q1"] == found["q3"] == pytest.approx(ms)
    assert clock.calls == 2 + 5 * calls


TESTS = {
    "good": ("def test_a(): pass\ndef test_b(): pass\n", {"passed": True, "run": 2}),
    "bad": ("def test_a(): pass\ndef test_b(): assert 0\n", {"passed": False, "failed": 1}),
    "skipped": (
        "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no device')\n",
        {"passed": False, "skipped": 1, "run": 1},
    ),
    "none": ("x = 1\n", {"passed": False, "run": 0}),
    "broken": ("import nothing_of_this_name\n", {"passed": False}),
}


@pytest.mark.parametrize("name", TESTS)
def test_tests_count_only_where_they_ran(tmp_path, name, capsys):
    text, want = TESTS[name]
    file = tmp_path / f"test_{name}.py"
    file.write_text(text)
    found = checks.run_tests([str(file), "-p", "no:cacheprovider", f"--rootdir={tmp_path}"], 60.0)
    assert found.items() >= want.items(), found


def test_tests_that_hang_or_cannot_start(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_a(): time.sleep(60)\n")
    assert checks.run_tests([str(file)], 0.5) == {"passed": False, "reason": "not done in 0 s"}
    found = checks.run_tests(["--no-such-option"], 60.0)
    assert not found["passed"]
    assert "no-such-option" in found["reason"]


def test_conformance_counts_by_dtype(tmp_path):
    file = tmp_path / "test_kinds.py"
    kinds = ["dense-float16-cuda_gemm", "dense-bfloat16-cuda_gemm", "float32", "tf32", "float32-b"]
    file.write_text(f"import pytest\n@pytest.mark.parametrize('k', {kinds})\ndef test_a(k): pass\n")
    found = checks.run_tests([str(file), "-p", "no:cacheprovider", f"--rootdir={tmp_path}"], 60.0)
    assert found["by_dtype"] == {"bfloat16": 1, "float16": 1, "float32": 2, "tf32": 1}


@pytest.mark.parametrize(
    ("status", "computed", "passed"), [(0, 1, True), (9, 1, False), (0, 0, False)]
)
def test_sanitizer(tmp_path, status, computed, passed, capsys):
    tool = tmp_path / "compute-sanitizer"
    lines = ["#!/bin/sh", 'echo "$1 $2 $3 $4" >> "$0.asked"', 'echo "== ERROR SUMMARY: 0 errors"']
    lines += ['echo "computed cuda_atomic float32 NHWC"'] * computed
    tool.write_text("\n".join([*lines, f"exit {status}\n"]))
    tool.chmod(0o755)
    found = checks.run_sanitizer(60.0, str(tool))
    assert found["run"]
    for check in ("memcheck", "racecheck"):
        assert found[check] == {
            "passed": passed, "computed": computed, "summary": "== ERROR SUMMARY: 0 errors"
        }  # fmt: skip
    asked = (tmp_path / "compute-sanitizer.asked").read_text().splitlines()
    assert asked == [f"--tool {c} --error-exitcode 9" for c in ("memcheck", "racecheck")]
    assert (failures({"sanitizer": found}) == []) == passed


def test_no_sanitizer(tmp_path):
    found = checks.run_sanitizer(60.0, str(tmp_path / "none"))
    assert found == {"run": False, "why_not": "compute-sanitizer is not installed"}
    assert failures({"sanitizer": found}) == []


def test_digits(monkeypatch):
    """On the CPU: the same command; one epoch is not enough for the accuracy that is asked for."""
    found = checks.digits(None, 120.0, "cpu", 1)
    assert not found["passed"]
    assert 0.3 < found["accuracy"] < checks.ACCURACY == 0.98
    assert found["reason"] == f"accuracy {found['accuracy']:.4f}, below 0.98"
    assert found["seconds_an_epoch"] > 0
    said = subprocess.CompletedProcess([], 2, "", "there is no such device")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: said)
    assert checks.digits(None, 1.0)["reason"] == "there is no such device"


# --------------------------------------------------------------------------------- the counters

NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","conv2d_forward_f32","dram__bytes.sum","Mbyte","1,234.5"
"0","1","conv2d_forward_f32","gpu__time_duration.sum","usecond","12.5"
"0","1","conv2d_forward_f32","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","61.25"
"1","1","conv_split_sum_f16","gpu__time_duration.sum","nsecond","800"
"1","1","conv_split_sum_f16","something.else","%","1"
==PROF== Disconnected
"""


def test_what_nsight_compute_prints():
    assert counters.parse(NCU) == [
        {"kernel": "conv2d_forward_f32", "bytes": 1234.5e6, "ns": 12500.0, "sm %": 61.25},
        {"kernel": "conv_split_sum_f16", "ns": 800.0},
    ]


def made_up(name, dtype, **times):
    """A row in which every pass takes as long as said; the floor is 1 ms by operations."""
    passes = {
        p: {
            "flops": 1e9, "bytes": 1.0, "chosen": "cuda_gemm",
            "times": {w.replace("_N", " N"): {"ms": t, "correct": True} for w, t in times.items()},
        }
        for p in ("forward", "input_grad", "weight_grad", "train")
    }  # fmt: skip
    return {"layer": name, "kind": "1x1", "dtype": dtype, "passes": passes}


CEILINGS = {"bandwidth": 1e12, "flops": {"float32": 1e12}, "how": {"float32": "made up"}}


@pytest.mark.parametrize("said", ["counts", "may not", "nothing"])
def test_counters_of_the_five_slowest(tmp_path, said):
    rows = {
        f"l{n}|float32": made_up(f"l{n}", "float32", cuda_gemm=2.0 + n, gpuconv=9.0)
        for n in range(4)
    }
    state = state_at(tmp_path)
    state.finish("timings", {"rows": rows})
    state.finish("ceilings", CEILINGS)
    tool = tmp_path / "ncu"
    text = {"counts": NCU, "may not": "==ERROR== ERR_NVGPUCTRPERM", "nothing": "broken"}[said]
    (tmp_path / "text").write_text(text)
    tool.write_text(f'#!/bin/sh\necho "$@" >> "$0.asked"\ncat {tmp_path / "text"}\n')
    tool.chmod(0o755)
    found = counters.stage(state, 60.0, str(tool))
    first = found["slowest"][0]
    assert (first["unit"], first["engine"]) == ("l3|float32", "cuda_gemm")
    assert first["times_the_floor"] == pytest.approx(5.0)
    assert [f["unit"] for f in found["slowest"]] == ["l3|float32"] * 3 + ["l2|float32"] * 2
    asked = (tmp_path / "ncu.asked").read_text().splitlines()
    assert asked[0].endswith("benchmarks.gpu.counters l3 float32 forward cuda_gemm")
    if said == "counts":
        assert found["run"]
        assert all(len(f["kernels"]) == 2 for f in found["slowest"])
    elif said == "may not":
        assert not found["run"]
        assert "ERR_NVGPUCTRPERM" in found["why_not"]
    else:
        assert found["slowest"][0]["why_not"] == "broken"
    assert failures({"counters": found}) == []


def test_counters_without_times_or_tool(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "find", lambda name: None)
    state = state_at(tmp_path)
    assert counters.stage(state, 60.0)["why_not"] == "there are no times yet"
    state.finish("timings", {"rows": {}})
    state.finish("ceilings", CEILINGS)
    assert counters.stage(state, 60.0)["why_not"] == "ncu is not installed"


# --------------------------------------------------------------------------------- the summary


def test_geometric_means_and_goals():
    rows = {
        "a|float32": made_up("a", "float32", gpuconv=4.0, cuda_gemm=2.0, cudnn=1.0, cuda_atomic=100.0,
                             torch_NHWC=4.0, torch_NCHW=5.0),
        "b|float32": made_up("b", "float32", gpuconv=2.0, cuda_gemm=2.0, cudnn=2.0, cuda_atomic=50.0,
                             torch_NHWC=9.0, torch_NCHW=1.0),
    }  # fmt: skip
    rows["b|float32"]["passes"]["forward"]["times"]["cuda_gemm"]["correct"] = False
    found = command.summarise(rows, CEILINGS)
    one = found["means"]["float32"]["train"]
    assert one["best"]["mean"] == pytest.approx((4 / 2 * 1 / 2) ** 0.5)
    assert one["best"]["least"] == pytest.approx(0.5)
    assert one["any"]["mean"] == pytest.approx((4 / 1 * 1 / 2) ** 0.5)
    assert one["chosen"]["mean"] == pytest.approx((4 / 4 * 1 / 2) ** 0.5)
    assert one["floor"]["mean"] == pytest.approx(0.5)
    assert one["atomic"]["mean"] == pytest.approx((50 * 25) ** 0.5)
    forward = found["means"]["float32"]["forward"]["best"]  # what is wrong counts for nothing
    assert forward["mean"] == pytest.approx((4 / 2 * 1 / 50) ** 0.5)
    assert found["means"]["float32"]["classes"]["1x1"]["best"]["count"] == 6
    goals = {(g["dtype"], g["pass"], g["class"]): g for g in found["goals"]}
    assert goals["float32", "train", "all"]["met"] is False
    assert goals["float32", "each pass", "depthwise"]["met"] is None
    assert failures({"summary": found})[-1].startswith("float32, train, all: 1.00 of PyTorch")
    text = pages.means_table(found)
    assert "1.00 (least 0.50)" in text
    assert "**not met**" in pages.goals_table(found)


def test_file_is_written_whole_or_not_at_all(tmp_path):
    place = {
        "gpu": "NVIDIA GeForce RTX 4090 / Ti", "compute_capability": "89", "memory_bytes": 2**34,
        "driver": "1", "cuda_runtime": 12090, "cudnn_of_torch": None, "system": "s", "python": "3",
        "versions": {},
    }  # fmt: skip
    report = {"machine": place, "date": "2026-01-01", "x": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        command.write(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
    made = command.write({**report, "x": 1}, tmp_path)
    assert [f.name for f in made] == [
        "nvidia-geforce-rtx-4090-ti.json", "nvidia-geforce-rtx-4090-ti.md",
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == made
