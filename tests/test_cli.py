"""The command as such: help, wrong arguments, predict, explain, bench, doctor."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cli import main
from gpuconv.training import run
from tests.commands import COMMON, command, environment, metrics
from tests.small_images import CLASSES, images, save
from tests.test_device import ROOT, WORKING, bare_environment, fake_cupy

COMMANDS = ("train", "predict", "bench", "profile", "explain", "doctor")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder of the test's own; threads are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gpuconv.set_num_threads(None)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(save(tmp_path / "a.npz"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on small images, trained until it knows them."""
    folder = tmp_path_factory.mktemp("trained")
    path = str(save(folder / "a.npz"))
    assert main(["train", "--data", path, "--epochs", "15", "--out", str(folder / "run"), "-q", *COMMON]) == 0  # fmt: skip
    return folder / "run"


# ------------------------------------------------------------------------- the command as such


def test_the_entry_point_and_the_module_are_the_same_command() -> None:
    for program in ([sys.executable, "-m", "gpuconv"], [str(Path(sys.executable).with_name("gpuconv"))]):  # fmt: skip
        if len(program) == 1 and not Path(program[0]).exists():
            continue  # not installed: the tests run from the source tree
        done = subprocess.run(
            [*program, "--version"], env=environment(), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, f"gpuconv {gpuconv.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: gpuconv {name}" in said
    assert len(said.splitlines()) > 5
    with pytest.raises(SystemExit):
        main(["--help"])
    assert name in capsys.readouterr().out


def test_help_names_every_option_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for option in (
        "digits", "--data", "--epochs", "--batch-size", "--lr", "--device", "--engine", "--seed",
        "--dtype", "--threads", "--out", "--overwrite", "--resume", "Ctrl-C",
    ):  # fmt: skip
        assert option in said
    # What it says of the defaults is so.
    defaults = run.Recipe()
    for text in (
        f"passes over the images ({defaults.epochs})", f"images a step ({defaults.batch_size})",
        f"highest learning rate ({defaults.lr})", f"of AdamW ({defaults.weight_decay})",
        f"each axis ({defaults.shift:g})", f"turned ({defaults.rotate:g})",
        f"reduced ({defaults.zoom:g})", f"bit for bit ({defaults.seed})",
        f"compute in ({defaults.dtype})",
    ):  # fmt: skip
        assert text in " ".join(said.split())


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from gpuconv.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'cupy', 'matplotlib', 'sklearn', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


WRONG: dict[str, tuple[list[str], str]] = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["trian"], "invalid choice: 'trian'"),
    "unknown option": (["train", "digits", "--epoch", "3"], "unrecognized arguments: --epoch"),
    "nothing to train on": (["train"], "say 'digits' or --data FILE.npz: neither is given"),
    "two things to train on": (["train", "digits", "--data", "a.npz"], "both are given"),
    "unknown data": (["train", "mnist"], "invalid choice: 'mnist'"),
    "no file": (["train", "--data", "none.npz"], "none.npz: No such file or directory"),
    "epochs 0": (["train", "digits", "--epochs", "0"], "--epochs: '0' is not an integer of at least 1"),
    "epochs a fraction": (["train", "digits", "--epochs", "1.5"], "--epochs: '1.5' is not an integer"),
    "epochs missing": (["train", "digits", "--epochs"], "--epochs: expected one argument"),
    "batch size": (["train", "digits", "--batch-size", "-4"], "--batch-size: '-4' is not an integer"),
    "lr 0": (["train", "digits", "--lr", "0"], "--lr: '0' is not a number above 0"),
    "lr text": (["train", "digits", "--lr", "fast"], "--lr: 'fast' is not a number above 0"),
    "lr NaN": (["train", "digits", "--lr", "nan"], "--lr: 'nan' is not a number above 0"),
    "lr infinite": (["train", "digits", "--lr", "inf"], "--lr: 'inf' is not a number above 0"),
    "zoom": (["train", "digits", "--zoom", "2"], "--zoom: '2' is not a number from 0 to 1"),
    "shift": (["train", "digits", "--shift", "-1"], "--shift: '-1' is not a number of at least 0"),
    "seed": (["train", "digits", "--seed", "-1"], "--seed: '-1' is not an integer of at least 0"),
    "dtype": (["train", "digits", "--dtype", "int8"], "invalid choice: 'int8'"),
    "graph on the CPU": (["train", "digits", "--cuda-graph", "--device", "cpu"], "--cuda-graph needs a GPU; the run computes on cpu"),
    "log interval": (["train", "digits", "--log-interval", "0"], "--log-interval: '0' is not an integer"),
    "threads": (["train", "digits", "--threads", "0"], "--threads: '0' is not an integer"),
    "device": (["train", "digits", "--device", "gpu"], "device is 'gpu'; expected 'cpu', 'cuda' or"),
    "engine": (["train", "digits", "--engine", "cudnnn"], "engine is 'cudnnn'; expected one of naive"),
    "engine of another device": (
        ["train", "digits", "--engine", "cuda_atomic", "--device", "cpu"], "'cuda_atomic', which computes on cuda; device is 'cpu'",
    ),
    "overwrite what": (["train", "digits", "--overwrite"], "--overwrite goes with --out"),
    "resume into another": (["train", "--resume", "a", "--out", "b"], "leave --out, --overwrite out"),
    "resume nothing": (["train", "--resume", "none"], "none is no folder of a run"),
    "predict what": (["predict", "model"], "required: FILE.npz"),
    "no model": (["predict", "none", "none.npz"], "none: No such file or directory"),
    "predict into": (["predict", "m", "f", "--out", "a.txt"], "--out is a.txt; expected a name that ends in .csv"),
    "explain shape": (["explain", "8,a", "3,3,1,1"], "'8,a' is no shape such as"),
    "explain rank": (["explain", "8,8", "3,3,1,1"], "x_shape is (8, 8); expected 3 to 5 axes"),
    "explain channels": (["explain", "8,8,8,3", "3,3,4,5"], "w has shape (3, 3, 4, 5) with 4 input"),
    "explain padding": (["explain", "8,8,8,3", "3,3,3,5", "--padding", "full"], "padding is 'full'"),
    "explain stride": (["explain", "8,8,8,3", "3,3,3,5", "--stride", "2;"], "'2;' is no number"),
    "explain engine": (["explain", "8,8,8,3", "3,3,3,5", "--engine", "x"], "engine is 'x'"),
    "explain forced": (
        ["explain", "8,8,8,3", "3,3,3,5", "--engine", "cuda_atomic", "--device", "cpu"], "engine 'cuda_atomic' was asked for but cannot",
    ),
    "doctor": (["doctor", "x"], "unrecognized arguments: x"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line_and_status_2(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[name]
    try:
        status: Any = main(arguments)
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("gpuconv")
    assert message in said.err
    assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------- predict


def test_predictions_are_printed(
    here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = images(30, seed=7)
    path = str(save(here / "new.npz", X=x, y=y))
    assert main(["predict", str(trained), path, *COMMON]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "label", "probability", "y"]
    rows = [line.split() for line in lines[1:31]]
    assert [int(r[0]) for r in rows] == list(range(30))
    assert [int(r[3]) for r in rows] == y.tolist()
    assert all(1 / 3 <= float(r[2]) <= 1 for r in rows)
    right = sum(r[1] == r[3] for r in rows)
    assert right >= 25
    assert lines[31:] == [f"accuracy {right / 30:.4f} ({right} of 30 images)"]


def test_predictions_are_written(
    here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, _ = images(30, seed=7)
    path = str(save(here / "new.npz", X=x))
    model = str(trained / run.MODEL)
    for name in ("a.csv", "a.npz"):
        assert main(["predict", model, path, "--out", name, "--batch-size", "7", *COMMON]) == 0
        assert capsys.readouterr().out == f"wrote 30 predictions to {name}\n"
    with open("a.csv") as file:
        rows = list(csv.DictReader(file))
    with np.load("a.npz") as found:
        assert [int(r["label"]) for r in rows] == found["labels"].tolist()
        assert [f"{p:.6f}" for p in found["probability"]] == [r["probability"] for r in rows]
        np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1)
        np.testing.assert_array_equal(found["classes"], CLASSES)
        best = found["probabilities"].argmax(axis=1)
        np.testing.assert_array_equal(found["classes"][best], found["labels"])
    assert sorted(p.name for p in here.iterdir()) == ["a.csv", "a.npz", "new.npz"]


def test_predictions_are_those_of_the_training_run(here: Path, trained: Path) -> None:
    """The test accuracy that training reported, from the files alone."""
    with np.load(trained.parent / "a.npz") as found:
        x, y = found["X"], found["y"]
    whole = run.read_data(str(trained.parent / "a.npz"))
    chosen = run.stratified_split(whole, 0).test
    path = save(here / "test.npz", X=x[chosen], y=y[chosen])
    assert main(["predict", str(trained), str(path), "--out", "a.csv", *COMMON]) == 0
    with open("a.csv") as file:
        rows = list(csv.DictReader(file))
    accuracy = np.mean([r["label"] == r["y"] for r in rows])
    assert accuracy == pytest.approx(metrics(trained)[-1]["test_accuracy"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.ones((3, 5, 6))}, "new.npz: X holds images of 5x6x1; "),
        ({"X": np.ones((3, 6, 5, 3))}, "new.npz: X holds images of 6x5x3; "),
        ({"X": np.ones((3, 6, 5)), "y": np.array([4, 9, 5])}, "new.npz: y holds 5, which is no label"),
        ({"X": np.ones((3, 6, 5)), "y": np.ones(3)}, "new.npz: y has dtype float64"),
        ({"X": np.array([None])}, "new.npz: array 'X' cannot be read"),
        ({"Z": np.ones((3, 6, 5))}, "new.npz has no array 'X'"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_the_model(
    here: Path,
    trained: Path,
    arrays: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(save(here / "new.npz", **arrays))
    assert main(["predict", str(trained), path, "--out", "a.csv", *COMMON]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert not (here / "a.csv").exists()


def test_a_reader_that_has_had_enough(here: Path, trained: Path) -> None:
    x, _ = images(30000)
    path = save(here / "new.npz", X=x)
    with subprocess.Popen(
        [sys.executable, "-m", "gpuconv", "predict", str(trained), str(path), *COMMON],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().split()[0] == "image"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_predicting_needs_safetensors(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["predict", "a", data]) == 2
    assert "pip install 'gpuconv[train]'" in capsys.readouterr().err


# ---------------------------------------------------------------------- explain, bench, doctor


def test_explain_says_the_choice_and_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["explain", "8,56,56,64", "3x3x64x64", "--device", "cpu"]
    assert main([*shapes, "--padding", "1", "--activation", "ReLU"]) == 0
    said = capsys.readouterr().out
    want = gpuconv.explain(
        (8, 56, 56, 64), (3, 3, 64, 64), padding=1, activation="ReLU", device="cpu"
    )
    assert said == f"{want}\n"
    assert f"forward: {want.choice['forward']}" in said
    assert "cuda_atomic      no: it computes CuPy arrays" in said
    assert main([*shapes, "--padding", "(0,1),(2,3)", "--stride", "2,1", "--engine", "naive"]) == 0
    assert "forward: naive (forced)" in capsys.readouterr().out
    assert main(["explain", "1,3,9,9", "4,3,3,3", "--layout", "NCHW", "--padding", "same", "--device", "cpu"]) == 0  # fmt: skip


def test_bench_lists_its_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--quick"]) == 0
    assert "GFLOP" in capsys.readouterr().out


def test_doctor_without_cupy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "gpuconv", "doctor"],
        env={**environment(), "PYTHONPATH": f"{bare_environment(tmp_path)}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert "CuPy CuPy is not installed" in said
    assert "default cpu: CuPy is not installed" in said
    assert "cuda_atomic cuda not available: CuPy is not installed" in said
    assert "for CUDA: pip install 'gpuconv[cuda12]' or 'gpuconv[cuda13]'" in said
    assert "for gpuconv train: pip install 'gpuconv[train]'" in said
    assert "nvprof not found; the CPU computes" in said
    assert "builtin always here" in said
    assert re.search(r"cpu .*\d+ cores?, [\d.]+ of [\d.]+ GiB free", said)


def test_doctor_with_cupy_and_no_gpu() -> None:
    pytest.importorskip("cupy")
    done = command("doctor", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stderr) == (0, "")
    import cupy

    assert f"CuPy {cupy.__version__} (cupy" in " ".join(done.stdout.split())
    assert "default  cpu: " in done.stdout
    assert "no CUDA  " in done.stdout


def test_doctor_with_a_gpu_and_with_a_wish(tmp_path: Path) -> None:
    path = f"{fake_cupy(tmp_path, WORKING)}{os.pathsep}{ROOT}"
    for wish, said in (
        ("", "default  cuda:0: a CUDA device works"),
        ("cpu", "default  cpu: GPUCONV_DEVICE is 'cpu'"),
        ("cuda:7", "default  none, GPUCONV_DEVICE is in the way: device is 'cuda:7', but the last"),
    ):
        done = command("doctor", env={"PYTHONPATH": path, "GPUCONV_DEVICE": wish})
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
        assert "cuda:1   " in done.stdout
