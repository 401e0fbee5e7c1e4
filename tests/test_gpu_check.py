"""`make gpu-check` as far as it goes without a GPU: stages, resuming, failures, files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import gpuconv
from benchmarks import gpu_training, suite
from benchmarks.gpu import command, counters, device, sanitized, shapes
from benchmarks.gpu.command import RESULTS, ROOT, main
from benchmarks.gpu.stages import Stage, State, TimeOut, run
from tests.cuda_on_cpu import compiler_available, stand_in

SUITE = """
[[shape]]
name = "small"
batch = 1
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
    """Small layers in the place of those that are timed, and a quick look at the ceilings."""
    file = tmp_path / "suite.toml"
    file.write_text(SUITE)
    found = suite.load(file)
    monkeypatch.setattr(shapes.suite, "load", lambda: found)
    monkeypatch.setattr(shapes, "LINES", ())
    measure = device.ceilings
    monkeypatch.setattr(device, "ceilings", lambda: measure(0.001, 1 << 12, 8))
    monkeypatch.setattr(command.timing, "engines", lambda: ["cuda_atomic"])  # the others take long
    return shapes.shapes()


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


@pytest.fixture
def quick(tmp_path):
    """Arguments of a run that takes little, keeps its state apart, and only times."""
    return [
        "--stages", "ceilings,timings,counters", "--dtypes", "float32", "--seconds", "0",
        "--state", str(tmp_path / "state"),
    ]  # fmt: skip


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


def test_the_stages_fit_into_ten_minutes():
    chosen = command.stages([], [], 0.03)
    assert sum(s.seconds for s in chosen) <= command.BUDGET < 600
    assert [s.name for s in chosen] == [
        "ceilings", "conformance", "sanitizer", "digits", "timings", "counters", "training",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- the stages


def state_at(folder, **identity):
    return State(folder / "state.json", {"gpu": "made up", **identity})


def test_what_is_done_is_not_done_again(tmp_path):
    """The second stage is cut off the first time; the third fails, and is tried again."""
    calls = []

    def parts(state, limit):
        calls.append("parts")
        for unit in ("a", "b", "c"):
            if unit in state.units("parts"):
                continue
            if unit == "c" and calls.count("parts") == 1:
                raise TimeOut("c is left")
            calls.append(unit)
            state.add("parts", unit, {"found": unit})
        return {"units": state.units("parts")}

    def broken(state, limit):
        calls.append("broken")
        raise ZeroDivisionError("no such luck")

    stages = [
        Stage("first", 10, lambda s, t: calls.append("first") or {"passed": True}),
        Stage("parts", 10, parts),
        Stage("broken", 10, broken),
        Stage("last", 10, lambda s, t: calls.append("last") or {}),
    ]
    said = []
    found, undone = run(stages, state_at(tmp_path), 60, said.append)
    assert calls == ["first", "parts", "a", "b", "broken", "last"]
    assert undone == ["parts"]
    assert set(found) == {"first", "broken", "last"}
    assert found["broken"]["reason"] == "ZeroDivisionError: no such luck"
    assert "in broken" in found["broken"]["trace"]
    assert any("FAILED: ZeroDivisionError" in text for text in said)
    calls.clear()
    calls.append("parts")
    found, undone = run(stages, state_at(tmp_path), 60, said.append)
    assert calls == ["parts", "parts", "c", "broken"]
    assert undone == []
    assert found["parts"]["units"] == {u: {"found": u} for u in "abc"}


def test_a_stage_gets_the_time_that_is_left(tmp_path):
    limits = []
    stages = [Stage(n, s, lambda _, t: limits.append(t) or {}) for n, s in (("a", 5), ("b", 500))]
    assert run(stages, state_at(tmp_path), 100, str)[1] == []
    assert limits[0] == 5
    assert 90 < limits[1] <= 100
    assert run(stages, state_at(tmp_path / "new"), 0, str) == ({}, ["a", "b"])


def test_another_device_driver_or_source_begins_anew(tmp_path):
    state = state_at(tmp_path)
    state.finish("a", {"found": 1})
    state.add("b", "unit", 2)
    again = state_at(tmp_path)
    assert again.result("a") == {"found": 1}
    assert again.units("b") == {"unit": 2}
    assert again.kept_from
    other = state_at(tmp_path, sources="changed")
    assert other.result("a") is None
    assert other.units("b") == {}
    again.forget()
    assert state_at(tmp_path).result("a") is None


def test_a_state_that_was_cut_off_is_none(tmp_path):
    state_at(tmp_path).finish("a", {"found": 1})
    file = tmp_path / "state.json"
    file.write_text(file.read_text()[:-9])
    assert state_at(tmp_path).result("a") is None


def test_a_stop_in_the_middle_leaves_a_whole_file(tmp_path):
    def stopped(state, limit):
        state.add("parts", "a", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Stage("parts", 9, stopped)], state_at(tmp_path), 60, str)
    assert state_at(tmp_path).units("parts") == {"a": 1}
    with pytest.raises(ValueError, match="JSON"):
        state_at(tmp_path).finish("a", {"x": float("nan")})
    assert [f.name for f in tmp_path.iterdir()] == ["state.json"]
    assert state_at(tmp_path).units("parts") == {"a": 1}


# -------------------------------------------------------------------------- with a stand-in


def test_report(cp, layers, tmp_path, capsys, unchanged, quick):
    out = tmp_path / "out"
    assert main([*quick, "--out", str(out)]) == 0
    stem = "cpu-in-the-place-of-a-gpu"
    assert {f.name for f in out.iterdir()} == {
        f"{stem}.json", f"{stem}.md", f"{stem}-float32.png",
    }  # fmt: skip
    report = json.loads((out / f"{stem}.json").read_text())
    assert report["on_a_gpu"] is False
    assert report["failures"] == []
    assert report["date"].startswith("20")
    place = report["machine"]
    assert place["gpu"] == "CPU in the place of a GPU"
    assert place["cuda_driver"] == 12090
    assert place["versions"]["cupy"] == "stand-in"
    assert place["versions"]["numpy"] == np.__version__
    assert place["versions"]["gpuconv"] == gpuconv.__version__
    assert set(report["ceilings"]["flops"]) == {"float64", "float32", "float16"}
    assert report["ceilings"]["bandwidth"] > 0
    rows = report["timings"]["rows"]
    assert set(rows) == {"small|float32", "one_by_one|float32"}
    for shape in layers:
        row = rows[f"{shape.name}|float32"]
        assert shape.problem.batch == 8
        assert set(row["passes"]) == {"forward", "input_grad", "weight_grad", "train"}
        for pass_, found in row["passes"].items():
            assert found["flops"] == shape.flops(pass_)
            assert set(found["times"]) == {"gpuconv", "cuda_atomic"}  # PyTorch sees no device
            names = {"forward": {"y"}, "input_grad": {"dx"}, "weight_grad": {"dw", "db"}}
            for one in found["times"].values():
                if "unsupported" not in one:
                    assert one["correct"]
                    assert set(one["errors"]) == names.get(pass_, {"y", "dx", "dw", "db"})
                    assert 0 < one["q1"] <= one["ms"] <= one["q3"]
    assert {f["unit"] for f in report["counters"]["slowest"]} <= set(rows)
    assert report["summary"]["means"]["float32"]["forward"]["best"] is None  # no PyTorch here
    assert report["summary"]["means"]["float32"]["forward"]["floor"]["count"] == 2
    assert all(goal["met"] is None for goal in report["summary"]["goals"])
    page = (out / f"{stem}.md").read_text()
    assert "not measured" in page
    assert "| conformance | not run" in page
    said = capsys.readouterr().out
    assert "small|float32: forward " in said
    assert f"{stem}.json" in said


def test_a_rerun_goes_on(cp, layers, capsys, monkeypatch, quick):
    """The first run has no time for the second layer."""
    measure = command.timing.measure
    asked = []

    def slow(shape, dtype, seconds):
        asked.append(shape.name)
        if len(asked) == 2:
            raise TimeOut("one layer is left for the next run")
        return measure(shape, dtype, seconds)

    monkeypatch.setattr(command.timing, "measure", slow)
    assert main(quick) == 1
    said = capsys.readouterr()
    assert "FAILED timings: not done; run again to go on" in said.err
    assert "float32" in said.out  # what there is, is shown
    assert main(quick) == 0
    said = capsys.readouterr().out
    assert "going on with what was found" in said
    assert "ceilings: done before" in said
    assert asked == ["small", "one_by_one", "one_by_one"]
    assert main(quick) == 0
    assert len(asked) == 3
    assert main([*quick, "--restart"]) == 0
    assert asked[3:] == ["small", "one_by_one"]


@pytest.mark.parametrize(
    "place", [RESULTS, RESULTS / "new", ROOT / "kernels/../benchmarks/results"]
)
def test_a_stand_in_is_never_written_down_as_a_gpu(cp, layers, capsys, unchanged, quick, place):
    assert main([*quick, "--out", str(place)]) == 2
    assert "no GPU computes here, so nothing goes into" in capsys.readouterr().err
    assert main([*quick, "--layers", "one_by_one", "--stages", "ceilings"]) == 0
    assert "wrote" not in capsys.readouterr().out


def test_a_wrong_result_fails(cp, layers, tmp_path, capsys, monkeypatch, quick):
    right = gpuconv.conv2d_backward

    def wrong(*args, **options):
        dx, dw, db = right(*args, **options)
        return dx, None if dw is None else dw * 1.01, db

    monkeypatch.setattr(gpuconv, "conv2d_backward", wrong)
    assert main([*quick, "--out", str(tmp_path / "out")]) == 1
    assert (
        "FAILED timings: small|float32, weight_grad, gpuconv: wrong result"
        in capsys.readouterr().err
    )
    (file,) = (tmp_path / "out").glob("*.json")
    report = json.loads(file.read_text())
    times = report["timings"]["rows"]["small|float32"]["passes"]["weight_grad"]["times"]
    assert not times["cuda_atomic"]["correct"]
    page = file.with_suffix(".md").read_text()
    assert "## Failures" in page
    assert "wrong result" in page


def test_unknown_layers_stages_and_dtypes(cp, capsys, quick):
    for wrong, words in (
        (["--layers", "alexnet"], "no shape is called 'alexnet'"),
        (["--stages", "timings,lunch"], "stages is 'timings,lunch'; expected of ceilings"),
        (["--dtypes", "int8"], "dtypes is 'int8'; expected of float32"),
    ):
        assert main([*quick, *wrong]) == 2
        assert words in capsys.readouterr().err


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


def test_what_the_sanitizer_runs(cp, capsys):
    sanitized.compute(("float32", "tf32"), ("NHWC",))
    lines = capsys.readouterr().out.splitlines()
    for pass_ in ("forward", "input_grad", "weight_grad"):
        for kind in ("uneven", "plain", "depthwise"):
            assert f"computed cuda_atomic {pass_} {kind} float32 NHWC" in lines
    for engine in (e.name for e in gpuconv.engines() if e.device == "cuda" and e.available):
        assert any(line.startswith(f"computed {engine} ") for line in lines), engine
    assert gpuconv.get_precision() == "default"


def test_the_call_that_is_counted(cp, layers, monkeypatch):
    seen = []
    for name in ("profilerStart", "profilerStop"):
        note = lambda name=name: seen.append((name, len(cp.settings.launches)))  # noqa: E731
        monkeypatch.setattr(cp.cuda.runtime, name, note, raising=False)
    assert counters.main(["small", "float32", "forward", "cuda_atomic"]) == 0
    assert seen == [("profilerStart", 1), ("profilerStop", 2)]
