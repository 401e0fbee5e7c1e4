"""`make gpu-check` as far as it goes without a GPU."""

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest

import gpuconv
from benchmarks import cases, gpu_check, gpu_training, suite
from benchmarks.gpu_check import RESULTS, ROOT, failures, judged, main, run_sanitizer, run_tests
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.support import CUDA_ENGINES

SUITE = """
[[shape]]
name = "small"
batch = 2
input = [6, 5, 4]
out_channels = 6
kernel = [3, 2]
stride = [1, 2]
padding = 1
groups = 2
[[shape]]
name = "one_by_one"
batch = 1
input = [4, 4, 3]
out_channels = 5
kernel = [1, 1]
"""


@pytest.fixture
def layers(tmp_path, monkeypatch):
    """Small layers in the place of those that are timed."""
    file = tmp_path / "suite.toml"
    file.write_text(SUITE)
    found = suite.load(file)
    monkeypatch.setattr(gpu_check.suite, "load", lambda: found)
    monkeypatch.setattr(gpu_check, "LAYERS", tuple(s.name for s in found))
    return found


@pytest.fixture
def cp():
    reason = compiler_available()
    if reason:
        pytest.skip(reason)
    with stand_in() as module:
        yield module


@pytest.fixture
def unchanged():
    """Nothing may be left in benchmarks/results."""

    def files():
        return {p: p.stat().st_mtime_ns for p in RESULTS.rglob("*")} if RESULTS.exists() else {}

    before = files()
    yield
    assert files() == before


# ------------------------------------------------------------------------------- no device


def test_without_a_device(unchanged):
    """As ``make gpu-check`` runs it; on a machine with a GPU the device is hidden."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check needs a CUDA device: ")
    assert len(done.stderr.strip()) > len("gpu-check needs a CUDA device: .")
    assert done.stdout == ""


def test_the_layers_that_are_timed_exist():
    shapes = suite.select(suite.load(), gpu_check.LAYERS)
    assert [s.name for s in shapes] == sorted(gpu_check.LAYERS, key=[s.name for s in shapes].index)
    assert len(shapes) == len(gpu_check.LAYERS)
    assert not any(s.transposed for s in shapes)


# -------------------------------------------------------------------------- with a stand-in


def test_report(cp, layers, tmp_path, capsys, unchanged):
    out = tmp_path / "out"
    arguments = ["--skip-suite", "--seconds", "0.001", "--out", str(out)]
    assert main(arguments) == 0
    (file,) = out.iterdir()
    assert file.name == "cpu-in-the-place-of-a-gpu.json"
    report = json.loads(file.read_text())
    assert report["on_a_gpu"] is False
    assert report["failures"] == []
    assert report["date"].startswith("20")
    place = report["machine"]
    assert place["gpu"] == "CPU in the place of a GPU"
    assert place["cuda_driver"] == 12090
    assert place["versions"]["cupy"] == "stand-in"
    assert place["versions"]["numpy"] == np.__version__
    assert place["versions"]["gpuconv"] == gpuconv.__version__
    assert set(report["timings"]) == {"small", "one_by_one"}
    for shape in layers:
        row = report["timings"][shape.name]
        assert row["flops"] == shape.flops("forward")
        assert {"cuda_atomic"} <= set(row)
        assert set(row) - {"layer", "flops"} <= set(CUDA_ENGINES)  # PyTorch sees no device
        for name in set(row) & set(CUDA_ENGINES):
            found = row[name]
            if "unsupported" in found:
                continue
            assert found["correct"]
            assert set(found["errors"]) == {"y", "dx", "dw", "db"}
            for pass_, passes in (("forward", 1), ("backward", 2)):
                times = found[pass_]
                assert 0 < times["q1"] <= times["ms"] <= times["q3"]
                assert times["samples"] >= 5
                rate = passes * shape.flops("forward") / times["ms"] / 1e6
                assert times["gflops"] == pytest.approx(rate)
    said = capsys.readouterr().out
    assert "small, forward + gradients: cuda_atomic" in said
    assert f"wrote {file}" in said


@pytest.mark.parametrize(
    "place", [RESULTS, RESULTS / "new", ROOT / "kernels/../benchmarks/results"]
)
def test_a_stand_in_is_never_written_down_as_a_gpu(cp, layers, capsys, unchanged, place):
    assert main(["--skip-suite", "--out", str(place)]) == 2
    assert "no GPU computes here, so nothing goes into" in capsys.readouterr().err
    assert main(["--skip-suite", "--seconds", "0.001", "--layers", "one_by_one"]) == 0
    assert "wrote" not in capsys.readouterr().out


def test_a_whole_run_of_a_stand_in_writes_nothing(cp, layers, capsys, unchanged, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_suite", lambda: {"passed": True, "run": 3})
    monkeypatch.setattr(gpu_check, "run_sanitizer", lambda: {"run": False, "reason": "none"})
    assert main(["--seconds", "0.001"]) == 0
    assert 'suite: {"passed": true, "run": 3}' in capsys.readouterr().out


def test_a_wrong_result_fails(cp, layers, tmp_path, capsys, monkeypatch):
    right = gpuconv.conv2d_backward

    def wrong(*args, **options):
        dx, dw, db = right(*args, **options)
        return dx, dw * 1.01, db

    monkeypatch.setattr(gpuconv, "conv2d_backward", wrong)
    assert main(["--skip-suite", "--seconds", "0.001", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "FAILED small, cuda_atomic: wrong result" in said.err
    assert "WRONG" in said.out
    (file,) = (tmp_path / "out").iterdir()
    report = json.loads(file.read_text())
    assert len(report["failures"]) >= 2
    assert not report["timings"]["small"]["cuda_atomic"]["correct"]


def test_unknown_layers(cp, capsys):
    assert main(["--layers", "alexnet"]) == 2
    assert "no shape is called 'alexnet'" in capsys.readouterr().err


def test_what_the_sanitizer_runs(cp):
    said = StringIO()
    with redirect_stdout(said):
        exec(compile(gpu_check.SANITIZED, "sanitized", "exec"), {})
    lines = said.getvalue().splitlines()
    for dtype in ("float32", "float64", "float16"):
        for layout in ("NHWC", "NCHW"):
            assert f"computed cuda_atomic {dtype} {layout}" in lines
    launched = {name for name, *_ in cp.settings.launches}
    for end in ("f16", "f32", "f64"):
        assert {f"conv2d_forward_atomic_{end}", f"conv2d_backward_atomic_{end}"} <= launched


def test_how_busy_training_keeps_the_device(cp):
    """Its arithmetic, on small sizes; the numbers are none of a GPU's."""
    with gpuconv.engine("cuda_atomic"):
        found = gpu_training.measure(count=20, batch=8, channels=2, epochs=2)
    assert found["pinned"]["least"] <= found["pinned"]["seconds"] <= found["pinned"]["most"]
    ratio = found["pinned"]["seconds"] / found["resident"]["seconds"]
    assert found["pinned_over_resident"] == ratio
    assert "captured" not in found  # the stand-in captures nothing
    assert found["channels"] == 2
    assert found["float16"]["seconds"] > 0
    assert set(found["bfloat16"]) in ({"seconds", "least", "most"}, {"why_not"})
    # Nothing computes while the host goes on here.
    assert found["busy"] is found["busy_by_cupti"] is found["device_ms_a_step"] is None
    assert found["shortfalls"][0] == "for how much of an epoch the device is busy is not known"
    json.dumps(found)


class Queue:
    """A device that works off what the host queues, each in its own time, in milliseconds."""

    def __init__(self, host, product, step):
        self.host, self.product, self.step = host, product, step
        self.now = self.free = 0.0

    def take(self):
        self._queue(self.step)

    def ahead(self, count):
        for _ in range(count):
            self._queue(self.product)

    def _queue(self, takes):
        self.now += self.host
        self.free = max(self.free, self.now) + takes

    def mark(self):
        return max(self.free, self.now)

    def seconds(self, first, last):
        return 1e-3 * (last - first)


@pytest.mark.parametrize(
    ("host", "product", "step", "known"),
    [(1.0, 3.0, 20.0, True), (1.0, 1.2, 0.3, True), (4.0, 0.1, 0.3, False)],
)
def test_what_a_device_needs_for_a_step(monkeypatch, host, product, step, known):
    """Whatever the host takes to queue it, if only the device is kept busy meanwhile."""
    device = Queue(host, product, step)
    monkeypatch.setattr(gpu_training.time, "perf_counter", lambda: 1e-3 * device.now)
    found = gpu_training.device_seconds(device.take, device.ahead, device)
    if known:
        assert found == pytest.approx(1e-3 * step)
    else:  # more is asked for in vain: what the device needs cannot be told from its waiting
        assert found is None


def test_what_training_on_a_gpu_falls_short_of():
    good = {"busy": 0.93, "busy_by_cupti": None, "pinned_over_resident": 1.01}
    assert gpu_training.shortfalls(good) == []
    assert gpu_training.shortfalls({**good, "busy": 0.5, "busy_by_cupti": 0.96}) == []
    assert gpu_training.shortfalls({**good, "busy": 0.5, "pinned_over_resident": 1.25}) == [
        "the device is busy for 50.0% of an epoch; wanted 90%",
        "copies make an epoch 25.0% longer; wanted at most 2%",
    ]


# ---------------------------------------------------------------------------------- the parts


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
    found = gpu_check.timed(clock.call, clock, 0.0)
    assert found["calls"] == calls
    assert found["samples"] == 5
    assert found["ms"] == found["q1"] == found["q3"] == pytest.approx(ms)
    assert clock.calls == 2 + 5 * calls


def test_judgement(layers):
    case = cases.make(layers[0])
    right = {n: np.array(v, "f4") for n, v in case.expected.items()}
    assert judged(case, right)["correct"]
    right["dx"][0, 0, 0, 0] += 0.1 * abs(right["dx"]).max()
    assert not judged(case, right)["correct"]
    right["dx"][0, 0, 0, 0] = np.nan
    found = judged(case, right)
    assert not found["correct"]
    assert found["errors"]["dx"] is None  # no JSON holds NaN


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
    found = run_tests([str(file), "-p", "no:cacheprovider", f"--rootdir={tmp_path}"])
    assert found.items() >= want.items(), found


def test_tests_that_hang_or_cannot_start(tmp_path, monkeypatch):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\ndef test_a(): time.sleep(60)\n")
    monkeypatch.setattr(gpu_check, "SUITE_LIMIT", 0.5)
    assert run_tests([str(file)]) == {"passed": False, "reason": "not done in 0.5 s"}
    monkeypatch.setattr(gpu_check, "SUITE_LIMIT", 60.0)
    found = run_tests(["--no-such-option"])
    assert not found["passed"]
    assert "no-such-option" in found["reason"]


@pytest.mark.parametrize(
    ("status", "computed", "passed"), [(0, 1, True), (9, 1, False), (0, 0, False)]
)
def test_sanitizer(tmp_path, status, computed, passed, capsys):
    tool = tmp_path / "compute-sanitizer"
    lines = ["#!/bin/sh", 'echo "$1 $2 $3 $4" >> "$0.asked"', 'echo "== ERROR SUMMARY: 0 errors"']
    lines += ['echo "computed cuda_atomic float32 NHWC"'] * computed
    tool.write_text("\n".join([*lines, f"exit {status}\n"]))
    tool.chmod(0o755)
    found = run_sanitizer(str(tool))
    assert found["run"]
    for check in ("memcheck", "racecheck"):
        assert found[check] == {
            "passed": passed, "computed": computed, "summary": "== ERROR SUMMARY: 0 errors"
        }  # fmt: skip
    asked = (tmp_path / "compute-sanitizer.asked").read_text().splitlines()
    assert asked == [f"--tool {c} --error-exitcode 9" for c in ("memcheck", "racecheck")]
    assert (failures({"sanitizer": found}) == []) == passed


def test_no_sanitizer(tmp_path):
    found = run_sanitizer(str(tmp_path / "none"))
    assert found == {"run": False, "reason": "compute-sanitizer is not installed"}
    assert failures({"sanitizer": found}) == []


def test_failures_of_the_suite():
    assert failures({"suite": {"passed": False, "run": 0}}) == [
        "suite: {'passed': False, 'run': 0}"
    ]
    assert failures({"suite": {"passed": True, "run": 8}}) == []


def test_file_is_written_whole_or_not_at_all(tmp_path):
    report = {"machine": {"gpu": "NVIDIA GeForce RTX 4090 / Ti"}, "x": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        gpu_check.write(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
    place = gpu_check.write({**report, "x": 1}, tmp_path)
    assert place.name == "nvidia-geforce-rtx-4090-ti.json"
    assert list(tmp_path.iterdir()) == [place]
