"""What `make gpu-check` times: layers, peers, and the process that it all runs in."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest

import gpuconv
from benchmarks.gpu import shapes, timing
from benchmarks.gpu import torch_peer as peers
from benchmarks.gpu.stages import TimeOut
from benchmarks.suite import CLASSES, Shape
from gpuconv.problem import ConvProblem
from tests.cuda_on_cpu import compiler_available, stand_in


def layer(**other: Any) -> Shape:
    facts = {
        "batch": 4, "in_channels": 6, "out_channels": 4, "in_shape": (6, 5), "kernel": (3, 2),
        "stride": (1, 2), "padding": ((1, 1), (0, 0)), "dilation": (1, 1), "groups": 2,
        "dtype": "float32", **other,
    }  # fmt: skip
    return Shape("made_up", "none", ConvProblem(**facts))


# -------------------------------------------------------------------------------------- layers


def test_layers() -> None:
    pool = shapes.shapes()
    assert len({s.name for s in pool}) == len(pool)
    assert not any(s.transposed for s in pool)
    some = shapes.representative(pool)
    kinds = {s.kind for s in pool}
    assert {s.kind for s in some} == kinds
    assert kinds >= set(CLASSES) - {"transposed", "call overhead"}
    for kind in kinds:
        mine = [s for s in some if s.kind == kind]
        lines = sum(s.problem.kernel[0] == 1 and s.problem.kernel[1] == 4 for s in mine)
        assert len(mine) - lines <= 2
    (line,) = [s for s in some if s.problem.in_channels == 12288]
    assert line.problem.depthwise
    assert line.problem.kernel == (1, 4)


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_the_batch_repeats_what_is_known(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    data = shapes.make(layer(), dtype)
    assert data.repeats == 2
    assert data.shape.problem.dtype == ("float32" if dtype == "tf32" else dtype)
    assert data.inputs["x"].shape == (4, 6, 5, 6)
    assert str(data.inputs["x"].dtype) == data.shape.problem.dtype
    p = data.shape.problem
    options = {"stride": p.stride, "padding": p.padding, "groups": 2}
    wide = {n: a.astype("float64") for n, a in data.inputs.items()}
    with gpuconv.engine("naive"):
        y = gpuconv.conv2d(wide["x"], wide["w"], wide["b"], activation="ReLU", **options)
        dx, dw, db = gpuconv.conv2d_backward(wide["dz"], wide["x"], wide["w"], **options)
    for name, right in (("y", y), ("dx", dx), ("dw", dw), ("db", db)):
        allowed = shapes.tolerance(data.shape, dtype, name)
        assert data.error(name, right) <= 1e-6
        wrong = right.copy()
        wrong.flat[-1] += 3 * allowed * abs(right).max()
        assert data.error(name, wrong) > allowed
    assert data.error("y", y[:1]) == np.inf


# --------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("pass_", shapes.PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("who", ["torch NHWC", "torch NCHW", "jax"])
def test_peers_compute_the_same(who: str, dtype: str, pass_: str) -> None:
    """On the CPU, with the calls that a GPU gets."""
    module = pytest.importorskip(who.split()[0])
    pytest.importorskip("ml_dtypes")
    data = shapes.make(layer(), dtype)
    arrays = dict(data.inputs)
    if pass_ in ("input_grad", "weight_grad"):
        arrays["dy"] = arrays["dz"]
    if who == "jax":
        calls, clock = peers.jax_calls(module, data.shape, arrays, dtype)
        first = clock.mark()
        found = calls[pass_]()
        assert 0 < clock.seconds(first, clock.mark()) < 100
    else:
        form = who.split()[1]
        calls = peers.torch_calls(module, data.shape, arrays, dtype, form, "cpu")
        found = calls[pass_]()
        if pass_ != "weight_grad" and form == "NHWC":
            first_ = found if pass_ in ("forward", "input_grad") else found[0]
            assert first_.is_contiguous(memory_format=module.channels_last)
    results = peers.results_of(pass_, found, who.split()[0])
    assert tuple(results) == peers.NAMES[pass_]
    judged = timing._judged(data, results, 1.0)
    assert judged["correct"], judged


# ----------------------------------------------------------------------------------- the engines


@pytest.fixture
def cp() -> Any:
    reason = compiler_available()
    if reason:
        pytest.skip(reason)
    with stand_in() as module:
        yield module


def test_every_engine_is_timed_and_an_unfit_one_says_why(
    cp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = timing.engines()
    assert "cuda_atomic" in names
    row = timing.measure(layer(), "float64", 0.0)
    for pass_, found in row["passes"].items():
        assert set(found["times"]) == {"gpuconv", *names}
        assert found["chosen"]
        for one in found["times"].values():
            assert one.get("correct") or len(one["unsupported"]) > 10
            if "how" in one:  # the stand-in captures nothing, or does so well
                assert one["how"] in ("calls", "graph", "one call")
        assert pass_ in shapes.PASSES


def test_precision_is_that_of_the_dtype(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(timing, "_measured", lambda *a: seen.append(gpuconv.get_precision()) or {})
    for dtype in ("tf32", "float32"):
        timing.measure(layer(), dtype, 0.0)
    assert seen == ["tf32", "default"]
    assert gpuconv.get_precision() == "default"


def test_what_is_hopeless_is_called_once(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shapes.make(layer(), "float32")
    row = timing._own(data, "cuda_atomic", "cuda_atomic", "forward", 1e-9, 0.0)
    assert row["how"] == "one call"
    assert row["correct"]
    assert row["ms"] > 0


# ----------------------------------------------------------------------------------- the process

UNITS = [("a", "float32"), ("b", "float32"), ("c", "float16")]
CHILD = """
import json, os, sys, time
for name, dtype in json.loads(sys.stdin.read())["units"]:
    {what}
    print("said", name)
    print("\x1e" + json.dumps(dict(name=name, pid=os.getpid())), flush=True)
"""


def child(what: str) -> list[str]:
    return [sys.executable, "-c", CHILD.format(what=what)]


def test_rows_come_from_another_process() -> None:
    found = list(timing.measured(UNITS, 0.03, 60.0, child("pass")))
    assert [u for u, _ in found] == UNITS
    assert [r["name"] for _, r in found] == ["a", "b", "c"]
    assert len({r["pid"] for _, r in found}) == 1


def test_a_process_that_dies_costs_one_layer() -> None:
    what = "if name == 'b': print('CUDA error: an illegal access', flush=True); os._exit(3)"
    found = dict(timing.measured(UNITS, 0.03, 60.0, child(what)))
    assert "CUDA error: an illegal access" in found.pop(UNITS[1])["failed"]
    assert [r["name"] for r in found.values()] == ["a", "c"]
    assert len({r["pid"] for r in found.values()}) == 2
    silent = dict(timing.measured(UNITS[:1], 0.03, 60.0, child("os._exit(3)")))
    assert silent[UNITS[0]] == {"failed": "exit status 3"}


def test_processes_that_all_die_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "DEATHS", 2)
    with pytest.raises(RuntimeError, match="2 processes died; 1 layers are not timed"):
        list(timing.measured(UNITS, 0.03, 60.0, child("os._exit(1)")))


def test_a_process_that_takes_too_long_is_ended() -> None:
    rows = timing.measured(UNITS, 0.03, 2.0, child("time.sleep(600 if name == 'c' else 0)"))
    assert [next(rows)[0] for _ in range(2)] == UNITS[:2]
    with pytest.raises(TimeOut, match="1 layers are left"):
        next(rows)


def test_the_process_itself(
    cp: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing.layers, "shapes", lambda: [layer()])
    text = json.dumps({"units": [["made_up", "float32"]], "seconds": 0})
    monkeypatch.setattr(sys, "stdin", __import__("io").StringIO(text))
    assert timing.main() == 0
    line = capsys.readouterr().out.rstrip("\n").split("\n")[-1]
    assert line.startswith(timing.MARK)
    assert set(json.loads(line[1:])["passes"]) == set(shapes.PASSES)
