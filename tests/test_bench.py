"""The benchmark's runner, children, report, plots and command."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from benchmarks import children, layers, machine, net, report, runner, suite
from benchmarks.children import Child, ChildError, environment
from gpuconv import bench
from tests.support import CPU_ENGINES

TORCH = importlib.util.find_spec("torch") is not None

SUITE = """
[[shape]]
name = "plain"
network = "none"
batch = 2
input = [8, 8, 4]
out_channels = 4
kernel = [3, 3]
padding = 1
[[shape]]
name = "grouped"
batch = 2
input = [6, 6, 4]
out_channels = 6
kernel = [3, 3]
stride = 2
groups = 2
tags = ["quick"]
[[shape]]
name = "transposed"
batch = 2
input = [4, 4, 4]
out_channels = 4
kernel = [2, 2]
stride = 2
transposed = true
[[shape]]
name = "tiny"
batch = 1
input = [5, 5, 1]
out_channels = 1
kernel = [3, 3]
tags = ["overhead"]
"""


@pytest.fixture(scope="module")
def small_suite(tmp_path_factory):
    file = tmp_path_factory.mktemp("suite") / "suite.toml"
    file.write_text(SUITE)
    return file


@pytest.fixture(scope="module")
def shapes(small_suite):
    return suite.load(small_suite)


@contextmanager
def site(folder, text):
    """Have every child run ``text`` as it starts."""
    (folder / "sitecustomize.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield patch


#: For what is not there: JAX for this process's children, whether it is installed or not.
NO_JAX = "import sys\nsys.modules['jax'] = None\n"
#: One peer computes nonsense, another dies.
BROKEN = (
    NO_JAX
    + """
import os
from benchmarks import plain
forward = plain.im2col_forward
def wrong(problem, x, *rest):
    y = forward(problem, x, *rest)
    y[0, 0, 0, 0] += 0.5
    return y
plain.im2col_forward = wrong
plain.loops_backward = lambda *rest: os._exit(3)
"""
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """The pauses are for the sake of the times, which do not matter here."""
    monkeypatch.setattr(runner, "PAUSE", 0.0)
    monkeypatch.setattr(runner, "LONG_PAUSE", 0.0)
    monkeypatch.setattr(net, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def result(shapes, tmp_path_factory):
    """A small run: all passes, two dtypes."""
    said = []
    options = runner.Options(
        shapes,
        dtypes=("float32", "float64"),
        passes=suite.PASSES,
        peers=("jax", "im2col64", "im2col", "loops", "gpuconv:naive"),
        repeat=2,
        seconds=0.002,
        memory=False,
        say=said.append,
    )
    with site(tmp_path_factory.mktemp("site"), NO_JAX) as patch:
        patch.setattr(runner, "PAUSE", 0.0)
        patch.setattr(runner, "LONG_PAUSE", 0.0)
        found = runner.run(options)
    return {**found, "said": said}


# ------------------------------------------------------------------------------------ a real run


def test_every_shape_and_pass_has_a_row(result, shapes):
    rows = {(r["shape"], r["dtype"], r["pass"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 4 * 2 * 4
    named = {s.name: s for s in shapes}
    for (name, dtype, pass_), row in rows.items():
        shape = named[name].with_dtype(dtype)
        assert row["flops"] == shape.flops(pass_)
        assert row["bytes"] == shape.bytes(pass_)
        peak = result["machine"]["peak_flops"][dtype]
        assert row["floor"] == shape.floor(pass_, peak, result["machine"]["bandwidth_bytes"])
        assert 0 < row["floor"] < 1e-3


def test_results_were_checked_before_they_were_timed(result):
    wanted = {
        "forward": {"y"}, "train": {"y", "dx", "dw", "db"}, "input_grad": {"dx"},
        "weight_grad": {"dw", "db"},
    }  # fmt: skip
    for row in result["rows"]:
        for name, found in row["peers"].items():
            if "seconds" not in found:
                continue
            names = wanted[row["pass"]]
            if row["shape"] == "transposed":
                names = {"dx"} if row["pass"] == "forward" else names - {"db"}
            assert set(found["errors"]) == names
            for result_name, error in found["errors"].items():
                assert error <= found["tolerances"][result_name] < 1e-2
            assert found["least"] <= found["q1"] <= found["seconds"] <= found["q3"]
            assert found["samples"] >= 1
            assert 1 <= len(found["rounds"]) <= 2
            if name == "gpuconv:naive":
                assert set(found["engines"]) == {"naive"}
            elif name == "gpuconv":
                assert set(found["engines"]) <= set(CPU_ENGINES)
                assert found["engines"]
    assert report.failures(result) == []


def test_who_is_left_out_and_why(result):
    assert result["peers"]["jax"] == {"missing": "JAX is not installed"}
    assert "left out: JAX is not installed" in result["said"]
    for row in result["rows"]:
        assert "jax" not in row["peers"]
        assert ("im2col" in row["peers"]) == (row["dtype"] == "float32")  # else im2col64's twin
        im2col = row["peers"]["im2col64"]
        if row["shape"] == "grouped":
            assert im2col == {"left_out": "numpy-ml's layer has no groups"}
        else:
            assert im2col["seconds"] > 0
    text = report.markdown(result)
    assert "- left out: JAX is not installed" in text


def test_memory_is_measured(tmp_path):
    """The gathered windows, nine times the input, are beyond the limit set: blocks keep to it."""
    file = tmp_path / "suite.toml"
    file.write_text(SUITE.replace("input = [8, 8, 4]", "input = [96, 96, 32]"))
    options = runner.Options(
        [s for s in suite.load(file) if s.name == "plain"],
        passes=("forward",),
        peers=(),
        repeat=1,
        seconds=0.001,
    )
    setting = """
import gpuconv
gpuconv.set_workspace_limit(2**21)
forced = gpuconv.engine("numpy_gemm")
forced.__enter__()
"""
    with site(tmp_path, setting):
        found = runner.run(options)
    (only,) = found["rows"]
    assert only["peers"]["gpuconv"]["engines"] == ["numpy_gemm"]
    assert 2**18 < only["memory"]["extra"] <= only["memory"]["limit"] == 2**21
    extra = only["memory"]["extra"] / 2**20
    text = report.markdown(found)
    assert f"gpuconv's arrays took at most {extra:.1f} MiB (plain, forward); the " in text
    assert "Over the limit" not in text


def test_wrong_and_dying_peers_are_caught(shapes, tmp_path):
    options = runner.Options(
        [s for s in shapes if s.name == "plain"], passes=("forward", "train"),
        peers=("im2col", "loops"), repeat=1, seconds=0.001, memory=False,
    )  # fmt: skip
    with site(tmp_path, BROKEN):
        found = runner.run(options)
    forward, train = found["rows"]
    for row in (forward, train):
        errors = row["peers"]["im2col"]["wrong"][""]
        assert 0.01 < errors["y"] < 1
        assert "seconds" not in row["peers"]["im2col"]
        assert report.ratio(row, "im2col") is None
        assert row["peers"]["gpuconv"]["seconds"] > 0
    assert forward["peers"]["loops"]["seconds"] > 0
    assert "the process ended at prepare" in train["peers"]["loops"]["failed"]
    lines = report.failures(found)
    assert len(lines) == 3
    assert lines[0].startswith("im2col (numpy-ml style), plain, float32, forward: wrong result")
    text = report.markdown(found)
    assert "## Failures" in text
    assert "- loops, plain, float32, train: loops: the process ended at prepare" in text


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")
def test_pytorch_in_both_formats_and_the_fits(shapes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "BATCHES", (1, 4))
        patch.setattr(runner, "SIZES", (2, 8))
        found = runner.run(
            runner.Options(
                [s for s in shapes if s.name != "tiny"],
                peers=("torch",),
                repeat=2,
                seconds=0.004,
                memory=False,
                scaling="plain",
            )
        )
    for row in found["rows"]:
        torch = row["peers"]["torch"]
        assert set(torch["variants"]) == {"NCHW", "NHWC"}
        assert torch["seconds"] == min(torch["variants"].values())
        assert torch["variants"][torch["variant"]] == torch["seconds"]
    assert report.failures(found) == []
    fits = found["scaling"]
    assert [(f["axis"], f["pass"]) for f in fits] == [
        ("batch", "forward"), ("batch", "train"), ("image side", "forward"), ("image side", "train")
    ]  # fmt: skip
    assert fits[0]["values"] == [1, 4]
    assert fits[2]["values"] == [2, 8]
    for fit in fits:
        for peer in ("gpuconv", "torch"):
            assert fit["exponent"][peer] == runner.exponent(fit["flops"], fit["seconds"][peer])
    assert "## Cost against size" in report.markdown(found)


def test_exponents():
    work = [10, 40, 90, 1000]
    assert runner.exponent(work, [3e-9 * f for f in work]) == pytest.approx(1)
    assert runner.exponent(work, [3e-9 * f**1.5 for f in work]) == pytest.approx(1.5)
    assert runner.exponent(work, [1e-8, None, 9e-8, None]) == pytest.approx(1)
    assert runner.exponent(work, [1.0, None, None, None]) is None


# ---------------------------------------------------------------------------------- children


def test_children_have_equal_threads_and_untuned_blas(monkeypatch):
    base = {
        "PATH": "/bin", "OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": "512",
        "OMP_PROC_BIND": "false", "MKL_NUM_THREADS": "9", "GPUCONV_NUM_THREADS": "7", "HOME": "/h",
    }  # fmt: skip
    made = environment(3, base)
    assert made["PATH"] == "/bin"
    assert made["HOME"] == "/h"
    assert not {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"} & set(made)
    assert made["OMP_PROC_BIND"] == "true"  # each of OpenMP's threads on a core of its own
    assert {v for k, v in made.items() if k.endswith("_THREADS")} == {"3"}
    assert made["GPUCONV_DEVICE"] == "cpu"

    with Child("none", 1) as plain:
        want = plain.ask("hello")["pools"]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    with Child("gpuconv", 1) as child:
        pools = [p for p in child.ask("hello")["pools"] if p["user_api"] == "blas"]
    assert pools
    for pool in pools:
        assert pool["num_threads"] == 1
        assert pool["architecture"] in {p["architecture"] for p in want}
        assert (pool["architecture"] or "").lower() != "prescott"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_children_are_held_to_as_many_cores():
    before = os.sched_getaffinity(0)
    with children.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the cores' ticks are not known here")
def test_other_work_is_noticed():
    assert 0 <= machine.busy(0.1) <= os.cpu_count()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        try:
            assert machine.busy(0.5) > 0.4
        finally:
            spinning.kill()


def test_what_children_answer_when_something_is_wrong():
    with Child("nonsense", 1) as child, pytest.raises(ChildError, match="peer is 'nonsense'"):
        child.ask("hello")
    with Child("loops", 1) as child:
        with pytest.raises(ChildError, match="loops: RuntimeError: no peer or no case"):
            child.ask("prepare", pass_="forward")
        assert child.alive
        with pytest.raises(ChildError, match=r"loops: no answer to machine in 0\.01 s"):
            child.ask("machine", timeout=0.01, dtypes=["float32"], seconds=5.0)
        assert not child.alive
        with pytest.raises(ChildError, match="loops: the process ended at hello"):
            child.ask("hello")


# ----------------------------------------------------------------------------------- command


def command(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "alexnet*"], "no shape is called 'alexnet*'; the suite has resnet50_stem"),
        (["--shapes", "vgg16_*", "--quick"], "no shape is left to time"),
        (["--dtype", "float16"], "dtype is 'float16'; expected some of float32, float64"),
        (["--dtype", ","], "dtype is empty; expected some of float32, float64"),
        (["--passes", "backward"], "passes is 'backward'; expected some of forward, train"),
        (["--peers", "tensorflow"], "peers has 'tensorflow'; expected some of gpuconv, torch"),
        (["--peers", "torch:NHWC"], "peers has 'torch:NHWC'; expected some of"),
        (["--peers", "gpuconv:fast"], "peers has 'gpuconv:fast'; the engines are naive"),
        (["--threads", "0"], "threads is 0; expected 1 to"),
        (["--threads", "100000"], "threads is 100000; expected 1 to"),
        (["--repeat", "0"], "repeat is 0; expected at least 1"),
        (["--seconds", "0"], "seconds is 0.0; expected a positive number"),
        (["--seconds", "nan"], "seconds is nan; expected a positive number"),
        (["--suite", "/nowhere/suite.toml"], "/nowhere/suite.toml cannot be read: No such file"),
        (["--shapes", "unet_*", "--scaling"], "expected a chosen layer that is not transposed"),
        (["--net", "--threads", "0"], "threads is 0; expected 1 to"),
        (["--layers", "--list"], "--list was given with --layers"),
        (["--net", "--shapes", "lenet*"], "--shapes was given with --net"),
        (["--net", "--layers"], "--net was given with --layers"),
        (["--net", "--repeat", "7"], "steps is 50; expected a multiple of the 7 rounds"),
    ],
)  # fmt: skip
def test_wrong_options(arguments, message, capsys, monkeypatch):
    def no_children(*_):
        raise AssertionError("a child was started")

    monkeypatch.setattr(children.subprocess, "Popen", no_children)
    assert command(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("gpuconv bench: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert command("--shapes", "digits_*", "--out", str(tmp_path / "file" / "x")) == 2
    assert "gpuconv bench: " in capsys.readouterr().err


def test_list(capsys):
    assert command("--list", "--shapes", "vgg16_conv1_*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines] == ["vgg16_conv1_1", "vgg16_conv1_2"]
    assert "GFLOP" in lines[0]


def test_without_the_source_tree(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "gpuconv" / "bench.py"))
    assert command() == 2
    assert "needs the source tree" in capsys.readouterr().err


def test_a_short_run(small_suite, tmp_path, capsys):
    quick = ["--suite", str(small_suite), "--quick", "--peers", "none", "--passes", "forward",
             "--repeat", "1", "--seconds", "0.002", "--threads", "1", "--no-memory"]  # fmt: skip
    place = tmp_path / "new" / "folder"
    assert command(*quick, "--json", "--no-plots", "--out", str(place)) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [(r["shape"], r["pass"]) for r in found["rows"]] == [("grouped", "forward")]
    assert "memory" not in found["rows"][0]
    stem = machine.slug(found["machine"])
    assert sorted(f.name for f in place.iterdir()) == [f"{stem}.json", f"{stem}.md"]
    assert json.loads((place / f"{stem}.json").read_text()) == found
    assert (place / f"{stem}.md").read_text() == report.markdown(found)


def test_a_wrong_result_of_gpuconv_fails_the_run(small_suite, tmp_path, capsys):
    text = """
import gpuconv.functional as functional
forward = functional.conv2d
functional.conv2d = lambda *a, **k: forward(*a, **k) * 1.01
"""
    with site(tmp_path, text):
        status = command(
            "--suite", str(small_suite), "--shapes", "plain", "--peers", "none", "--passes",
            "forward", "--repeat", "1", "--seconds", "0.002", "--threads", "1", "--no-memory",
        )  # fmt: skip
    assert status == 1
    said = capsys.readouterr()
    assert "gpuconv, plain, float32, forward: wrong result" in said.out
    assert "gpuconv: wrong result" in said.err
    assert "not the whole suite, so nothing was written" in said.err


# --------------------------------------------------------------------------------------- net

TINY = net.NetOptions(batch=4, side=8, channels=(4, 6), steps=4, rounds=2, check=3)


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")
def test_nets_train_alike(tmp_path):
    found = net.run(TINY)
    assert list(found["net"]) == ["gpuconv", "torch:NCHW", "torch:NHWC"]
    losses = {n: f["losses"] for n, f in found["net"].items()}
    for name, entry in found["net"].items():
        assert len(losses[name]) == 3 + 4
        np.testing.assert_allclose(losses[name], losses["torch:NCHW"], rtol=1e-4)
        assert entry["difference"] < 1e-4
        assert entry["q1"] <= entry["seconds"] <= entry["q3"]
        assert len(entry["rounds"]) == 2
    assert len(set(losses["gpuconv"])) == 7  # it does train
    assert net.failures(found) == []
    assert net.best_torch(found) in ("torch:NCHW", "torch:NHWC")
    files = net.write(found, tmp_path)
    assert [f.suffix for f in files] == [".json", ".md"]
    text = files[1].read_text()
    assert "(the better)" in text
    ratio = found["net"]["torch:NHWC"]["seconds"] / found["net"]["gpuconv"]["seconds"]
    assert f"{ratio:.2f} (" in text
    assert json.loads(files[0].read_text())["net"] == found["net"]


def test_nets_that_differ_are_told():
    def trained(difference, last):
        return {"losses": [1.0, last], "difference": difference}

    found = {"net": {"gpuconv": trained(0.3, 1.0), "torch:NCHW": trained(0.0, math.nan)}}
    assert net.failures(found) == [
        "gpuconv: its losses differ from PyTorch's by 3.0e-01, more than 0.002",
        "torch:NCHW: a loss is not finite",
    ]


def test_net_without_pytorch(tmp_path):
    with site(tmp_path, "import sys\nsys.modules['torch'] = None\n"):
        found = net.run(TINY)
    assert list(found["net"]) == ["gpuconv"]
    assert found["net"]["gpuconv"]["difference"] is None
    assert "- left out: PyTorch is not installed" in net.markdown(found)


# ------------------------------------------------------------------------------------- layers


@pytest.mark.skipif(not TORCH, reason="needs PyTorch")
def test_layers_are_compared_and_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "PAUSE", 0.0)
    some = (
        "BatchNorm", "BatchNorm of vectors", "max pool 3x3, stride 2", "average pool 3, stride 2",
        "max pool 3x3x3, stride 2", "HardSigmoid", "GELU, exact",
    )  # fmt: skip
    shapes = {n: ((2, *(8,) * n, 4),) for n in range(1, 4)} | {0: ((32, 4),)}
    options = layers.LayersOptions(repeat=1, seconds=0.001, shapes=shapes, layers=some)
    found = layers.run(options)
    assert layers.failures(found) == []
    assert {r["layer"] for r in found["layers"]} == set(some)
    assert len(found["layers"]) == 3 * len(some)
    assert all(layers.ratio(r) > 0 for r in found["layers"])
    files = layers.write(found, tmp_path)
    assert json.loads(files[0].read_text())["layers"] == found["layers"]
    text = files[1].read_text()
    assert all(f"| {name} " in text for name in some)
    assert all(f"| {group} " in layers.summary(found) for group in layers.GROUPS)
    found["layers"][0]["peers"]["torch:NHWC"] = {"times": [], "error": 0.1}
    assert "torch:NHWC, BatchNorm, 2x8x8x4, forward: differs from gpuconv's by 1.0e-01" in (
        layers.markdown(found)
    )


def test_compiled_layers_need_numba(monkeypatch):
    monkeypatch.setenv("GPUCONV_NUMBA", "0")
    with pytest.raises(layers.OptionsError, match="compiled is asked for: GPUCONV_NUMBA=0"):
        layers.run(layers.LayersOptions(compiled=True))
