"""The built-in profiler: ranges, what the recorder makes of them, its table, trace and picture."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.profiling import Recorder, files, floors, named_ranges, ranges, table, timing, trace
from gpuconv.profiling.floors import Floors
from gpuconv.profiling.patterns import layer_work
from gpuconv.profiling.table import Row
from gpuconv.training.loop import fit
from tests.commands import environment
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import network, scaled


class Steps:
    """A clock that goes on by the numbers given."""

    what, waits = "a clock of the test's", False

    def __init__(self, *ticks: float) -> None:
        self._ticks, self.now = list(ticks), 0.0

    def mark(self) -> float:
        self.now += self._ticks.pop(0) if self._ticks else 1.0
        return self.now

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def host(self, mark: float) -> int:
        return int(1e9 * mark)


def train(recorder: Recorder, epochs: int = 2) -> Any:
    net = network()
    with recorder:
        fit(net, scaled(), scaled(20, seed=1), epochs=epochs, batch_size=16, seed=5)
    return net


# ------------------------------------------------------------------------------------ ranges


def test_nothing_is_told_while_nobody_follows() -> None:
    x, w = np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 2))
    with Recorder("cpu") as recorder:
        pass
    gpuconv.conv2d(x, w)
    network().forward(scaled()[0])
    assert recorder.rows() == []
    assert recorder.table() == "nothing was computed"
    assert ranges.of("a", "b") is ranges.of("c", "d")  # one empty with for all


def test_the_follower_before_is_back_afterwards() -> None:
    x, w = np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 2))
    with Recorder("cpu") as outer:
        inner = Recorder("cpu")
        with pytest.raises(ValueError, match="x has 1 axes"), inner:
            [gpuconv.conv2d(a, w) for a in (x, x[0, 0, 0])]
        gpuconv.conv2d(x, w)
        gpuconv.conv2d(x, w)
    assert [r.calls for r in inner.rows()] == [1]
    assert [r.calls for r in outer.rows()] == [2]


def test_other_threads_are_not_followed() -> None:
    x, w = np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 2))
    with Recorder("cpu") as recorder:
        thread = threading.Thread(target=gpuconv.conv2d, args=(x, w))
        thread.start()
        thread.join()
    assert recorder.rows() == []


def test_named_ranges_of_layers() -> None:
    if reason := compiler_available():
        pytest.skip(reason)
    with stand_in() as cp, gpuconv.engine("cuda_atomic"):
        net = network(device="cuda")
        ranges.name_layers(net.layers)
        with named_ranges():
            net.forward(cp.asarray(scaled(4)[0]))
        names = cp.cuda.nvtx.ranges
    assert [n for n, depth in names if depth == 0] == [
        "gpuconv.0 Conv2D 4 3x3.forward", "gpuconv.1 Pool2D 2x2.forward",
        "gpuconv.2 Flatten.forward", "gpuconv.3 FullyConnected 3.forward",
    ]  # fmt: skip
    assert names[1][0].startswith("gpuconv.conv2d.forward[cuda_atomic float32")
    assert names[1][1] == 1


# ---------------------------------------------------------------------------------- recorder


def test_times_are_exclusive_and_add_up() -> None:
    #                                  step, batch, end, conv, end, end of the step
    recorder = Recorder("cpu", clock=Steps(1, 2, 4, 8, 16, 32))
    with recorder:
        recorder.begin("step", "rest")
        recorder.begin("step", "batch")
        recorder.end()
        recorder.begin("a", "forward")
        recorder.end()
        recorder.end()
    assert {(r.name, r.pass_): r.seconds for r in recorder.rows()} == {
        ("step", "batch"): 4, ("a", "forward"): 16,
    }  # fmt: skip
    assert (recorder.steps, recorder.wall, recorder.accounted()) == (1, 62, 20)


def test_a_training_is_accounted_for() -> None:
    recorder = Recorder("cpu", skip=2)
    train(recorder)
    rows = {(r.name, r.pass_): r for r in recorder.rows()}
    assert recorder.steps == 2 * 4 - 2
    assert ("0 Conv2D 4 3x3", "input_grad") not in rows  # nothing is below the first layer
    for name, passes in {
        "step": ("batch", "loss"),
        "0 Conv2D 4 3x3": ("forward", "backward", "weight_grad", "update"),
        "1 Pool2D 2x2": ("forward", "backward"),
        "3 FullyConnected 3": ("forward", "backward", "update"),
    }.items():
        for pass_ in passes:
            assert rows[name, pass_].calls == 6
            assert rows[name, pass_].seconds > 0
    # Six steps, two of them the last, smaller ones of their epochs.
    images = 4 * 16 + 2 * 12
    conv = 2 * images * 6 * 5 * 4 * 9
    assert rows["0 Conv2D 4 3x3", "forward"].flops == conv
    assert rows["0 Conv2D 4 3x3", "weight_grad"].flops == conv
    assert rows["0 Conv2D 4 3x3", "backward"].flops == 0
    assert rows["3 FullyConnected 3", "forward"].flops == 2 * images * 24 * 3
    assert rows["3 FullyConnected 3", "backward"].flops == 2 * 2 * images * 24 * 3
    assert rows["0 Conv2D 4 3x3", "forward"].dtype == "float32"
    assert recorder.accounted() <= recorder.wall


def test_the_rows_are_the_steps_time() -> None:
    """Of a network that has something to do: all but a few per cent."""
    from gpuconv.training.recipe import Recipe, make_network

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((128, 8, 8, 1)).astype("f4"), np.arange(128) % 10
    shares = []
    for _ in range(3):  # another process may have the core for a while
        recorder = Recorder("cpu", skip=1)
        net = make_network(Recipe(), (8, 8, 1), 10, 128, "cpu")
        with recorder, gpuconv.engine("numpy_gemm"):  # which has nothing to compile
            fit(net, (x, y), (x[:8], y[:8]), epochs=3, batch_size=32, augment=Recipe().augment)
        shares.append(recorder.accounted() / recorder.wall)
    assert 0.95 <= max(shares) <= 1


def test_weights_do_not_depend_on_the_profiler() -> None:
    net, other = train(Recorder("cpu")), network()
    fit(other, scaled(), scaled(20, seed=1), epochs=2, batch_size=16, seed=5)
    for name, value in net.tensors().items():
        assert value.tobytes() == other.tensors()[name].tobytes()


def test_a_fused_backward_counts_what_it_computes() -> None:
    if reason := compiler_available():
        pytest.skip(reason)
    with stand_in() as cp, gpuconv.engine("cuda_atomic"):
        x, w = cp.ones((2, 5, 5, 3), "float32"), cp.ones((3, 3, 3, 4), "float32")
        with Recorder("cuda") as recorder:
            y = gpuconv.conv2d(x, w)
            gpuconv.conv2d_backward(y, x, w)
        assert recorder.clock.what == "CUDA events"
        forward, backward = recorder.rows()
    assert backward.flops == 2 * forward.flops == 4 * 2 * 9 * 9 * 3 * 4
    assert (backward.pass_, backward.engine) == ("backward", "cuda_atomic")


def test_what_is_pending_is_added_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuconv.profiling.recorder.PENDING", 8)
    monkeypatch.setattr("gpuconv.profiling.recorder.TRACED", 5)
    recorder = Recorder("cpu", clock=Steps())
    with recorder:
        for _ in range(20):
            with ranges.part("step", "rest"), ranges.part("a", "forward"):
                pass
            assert len(recorder._marks) < 8 + 2
    (row,) = recorder.rows()
    assert (row.calls, row.seconds, recorder.wall) == (20, 20, 60)
    assert len(recorder.spans) == 5


def test_a_layer_without_convolutions_moves_its_data() -> None:
    net = network()
    x = scaled(16)[0]
    for layer in net.layers[:2]:
        x = layer.forward(x)
    pool = net.layers[1]
    sizes = pool.X[0].size + x.size
    assert layer_work(pool, "forward", pool.X[0].shape) == (0, 4 * sizes)
    assert layer_work(pool, "backward", pool.X[0].shape) == (0, 8 * sizes)
    assert layer_work(pool, "update", pool.X[0].shape) == (0, 0)


# ------------------------------------------------------------------------ floors and reports


def test_floors() -> None:
    found = Floors({"float32": 100e9}, 10e9)
    assert found.seconds(100e9, 5e9, "float32") == 1
    assert found.seconds(10e9, 5e9, "float32") == 0.5
    assert found.seconds(10e9, 5e9, "float64") == 0.5  # its peak is not known
    assert Floors().seconds(1, 1, "float32") == 0


def test_floors_are_measured() -> None:
    found = floors.measure_cpu(("float32", "float16"), 1, 0.02)
    assert 1e8 < found.peak["float32"] < 1e14
    assert found.peak["float16"] == found.peak["float32"]
    assert 1e7 < found.bandwidth < 1e13


def test_table() -> None:
    rows = [
        Row("0 Conv", "forward", "naive", 4, 0.2, 10 * 10**9, 10**9, "float32"),
        Row("1 Pool", "forward", "", 4, 0.05),
    ]
    lines = table.format_rows(rows, 0.5, Floors({"float32": 100e9}, 40e9), steps=2).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert "ms/step" in lines[0]
    assert lines[1].split()[-7:] == ["naive", "4", "100.000", "40.0%", "50", "5", "50%"]
    assert lines[2].split()[-6:] == ["4", "25.000", "10.0%", "–", "–", "–"]
    assert len({len(line) for line in lines}) == 1


def test_best_and_timed_ask_their_clock() -> None:
    assert timing.best(lambda: None, 0, Steps(0, 5)) == float("inf")
    found = timing.timed(lambda: None, Steps(), 0.0)
    assert found["calls"] == 1
    assert found["ms"] == 1000
    assert found["samples"] == 5


def test_trace_has_what_perfetto_asks_for(tmp_path: Path) -> None:
    recorder = Recorder("cpu")
    train(recorder)
    trace.write(tmp_path / "a.json", recorder.spans, "cpu", False)
    found = json.loads((tmp_path / "a.json").read_text())
    events = found["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X"}
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"gpuconv", "host"}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(recorder.spans)
    for e in spans:
        assert e["ts"] >= 0
        assert e["dur"] >= 0
        assert e["pid"] == 1
        assert e["tid"] == trace.HOST
    # Nested: what begins within another ends within it.
    ends: list[float] = []
    for e in spans:
        while ends and e["ts"] >= ends[-1] - 1e-3:
            ends.pop()
        assert not ends or e["ts"] + e["dur"] <= ends[-1] + 1e-3
        ends.append(e["ts"] + e["dur"])
    forward = next(e for e in spans if "convolution" in e["args"])
    assert forward["args"]["GFLOP/s"] > 0


def test_on_a_gpu_the_trace_has_two_tracks() -> None:
    recorder = Recorder("cpu", clock=Steps())
    with recorder, ranges.part("a", "forward"):
        pass
    made = trace.events(recorder.spans, "cuda:0", True)
    assert [e["tid"] for e in made if e["ph"] == "X"] == [trace.HOST, trace.DEVICE]
    assert [e["args"]["name"] for e in made if e["ph"] == "M"] == ["gpuconv", "host", "cuda:0"]


def test_files_are_written_and_named(tmp_path: Path) -> None:
    recorder, said = Recorder("cpu"), []
    train(recorder)
    limits = Floors({"float32": 100e9}, 40e9)
    made = files.write(recorder, tmp_path / "p", limits, "a title", said.append)
    assert [p.name for p in made] == ["table.txt", "trace.json", "roofline.png"]
    assert all(f"wrote {p}" in said for p in made)
    assert (tmp_path / "p/roofline.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (tmp_path / "p/table.txt").read_text()
    assert "of floor" in text
    assert "100 GFLOP/s float32" in text
    assert files.write(Recorder("cpu"), tmp_path / "q", limits, "", said.append) == []
    assert not (tmp_path / "q").exists()


def test_a_process_is_recorded_by_its_environment(tmp_path: Path) -> None:
    code = (
        "import numpy as np, gpuconv\n"
        "for _ in range(3): gpuconv.conv2d(np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 2)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=environment(GPUCONV_PROFILE=str(tmp_path / "p"), GPUCONV_DEVICE="cpu"),
    )  # fmt: skip
    assert "forward" in done.stdout
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        "table.txt", "trace.json", "roofline.png",
    }  # fmt: skip
