"""`gpuconv train` as a user knows it: runs it, interrupts it, goes on with it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cli import main
from gpuconv.training import run
from gpuconv.training.step import Step
from tests.commands import COMMON, FAST, command, contents, environment, metrics, without_seconds
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import CLASSES, images, save


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder of the test's own; threads are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gpuconv.set_num_threads(None)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(save(tmp_path / "a.npz"))


# --------------------------------------------------------------------------------------- train


def test_train_digits_writes_all_it_promises(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "digits", *FAST]) == 0
    said = capsys.readouterr().out
    assert "digits: 1797 images 8x8x1 of 10 classes: 1259 to train, 179 to validate, 359 to" in said
    assert "device cpu, engine chosen by cost, 1 thread; seed 0; writing to runs/digits-1" in said
    assert "epoch 2/2   train loss" in said
    assert "label | predicted" in said
    folder = here / "runs" / "digits-1"
    assert sorted(p.name for p in folder.iterdir()) == sorted(run.FILES)
    lines = metrics(folder)
    assert [line.get("epoch") for line in lines] == [1, 2, None]
    assert lines[1]["validation_accuracy"] > 0.8
    assert lines[2]["test_accuracy"] > 0.8
    assert f"test accuracy {lines[2]['test_accuracy']:.4f}" in said
    confusion = np.array(lines[2]["confusion"])
    assert confusion.sum() == lines[2]["test_images"] == 359
    assert np.trace(confusion) == round(lines[2]["test_accuracy"] * 359)
    config = json.loads((folder / run.CONFIG).read_text())
    assert config["recipe"]["epochs"] == 2
    assert config["data"]["source"] == "digits"
    assert config["settings"] == {"device": "cpu", "engine": None, "threads": 1}
    net, info = run.load_model(folder, "cpu")
    assert config["parameters"] == sum(t.size for t in net.tensors().values())
    assert info.classes == tuple(range(10))
    for name in (run.CURVES, run.MISTAKES):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_training_on_digits_reaches_what_is_promised(here: Path) -> None:
    """The default run, shortened: its accuracy is the product's first promise."""
    assert main(["train", "digits", "--epochs", "12", "--out", "a", "-q", *COMMON]) == 0
    assert metrics(here / "a")[-1]["test_accuracy"] >= 0.98


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_seed_gives_the_same_files(here: Path, data: str, dtype: str) -> None:
    options = ["train", "--data", data, "--dtype", dtype, "-q", *FAST]
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert main([*options, "--seed", seed, "--out", name]) == 0
    first, second, other = (contents(here / name) for name in "abc")
    assert first[run.MODEL] == second[run.MODEL]
    assert first[run.MODEL] != other[run.MODEL]
    assert without_seconds(metrics(here / "a")) == without_seconds(metrics(here / "b"))
    net, _ = run.load_model(here / "a", "cpu")
    assert {t.dtype.name for t in net.tensors().values()} == {dtype}


@pytest.mark.parametrize("engine", ["numpy_taps", "numpy_gemm"])
def test_an_engine_can_be_forced(here: Path, data: str, engine: str) -> None:
    done = command("train", "--data", data, "--engine", engine, "--epochs", "1", "--out", "a")
    assert done.returncode == 0, done.stderr
    assert f"device cpu, engine {engine}" in done.stdout
    assert json.loads((here / "a" / run.CONFIG).read_text())["settings"]["engine"] == engine


def test_an_engine_brings_its_device(
    here: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, with its kernels run on the CPU: trained, gone on with, predicted."""
    if reason := compiler_available():
        pytest.skip(reason)
    with stand_in():
        fast = ["--epochs", "1", "--batch-size", "16", "--out", "a"]
        assert main(["train", "--data", data, "--engine", "cuda_atomic", *fast]) == 0
        assert "device cuda:0, engine cuda_atomic" in capsys.readouterr().out
        assert main(["train", "--resume", "a", "-q"]) == 0
        assert main(["train", "--data", data, "--engine", "naive", "--out", "b", *fast[:4]]) == 0
        assert "device cpu, engine naive" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["train", "--resume", "a"]) == 2
    said = capsys.readouterr().err
    assert "cuda" in said
    assert "--device cpu goes on with the run on the CPU" in said
    assert main(["train", "--resume", "a", "--device", "cpu", "-q"]) == 0
    assert main(["predict", "a", data, *COMMON]) == 0


def test_runs_are_numbered_and_never_overwritten(
    here: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train", "--data", data, "-q", *FAST]
    assert main(options) == main(options) == 0
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["a-1", "a-2"]
    before = contents(here / "runs" / "a-1")
    assert main([*options, "--out", "runs/a-1"]) == 2
    assert "runs/a-1 holds an earlier run (model.safetensors," in capsys.readouterr().err
    assert contents(here / "runs" / "a-1") == before
    (here / "runs" / "a-1" / "notes.txt").write_text("mine")
    assert main([*options, "--out", "runs/a-1", "--overwrite", "--seed", "9"]) == 0
    after = contents(here / "runs" / "a-1")
    assert set(after) == {*before, "notes.txt"}
    assert after[run.MODEL] != before[run.MODEL]


def test_a_folder_that_cannot_be_made(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", data, "-q", *FAST, "--out", f"{data}/run"]) == 2
    assert f"{data}" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 4)])
def test_images_of_any_size_and_label_values(here: Path, shape: tuple[int, int, int]) -> None:
    x, y = images(40, shape)
    path = str(save(here / "a.npz", X=x, y=y))
    assert main(["train", "--data", path, "--out", "run", "-q", *FAST]) == 0
    assert main(["predict", "run", path, "--out", "b.npz", *COMMON]) == 0
    with np.load("b.npz") as found:
        assert set(found["labels"]) <= set(CLASSES)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((9, 4, 4)), "y": np.arange(9) % 3}, "X is constant"),
        ({"X": images(9)[0], "y": np.zeros(9, int)}, "every label of y is 0"),
        ({"X": images(9)[0], "y": np.arange(9)}, "label 0 has 1 example; expected 3 or more"),
        ({"X": images(9)[0], "y": np.array([None] * 9)}, "array 'y' cannot be read"),
    ],
)
def test_images_that_cannot_be_trained_on(
    here: Path, arrays: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(save(here / "a.npz", **arrays))
    assert main(["train", "--data", path, *FAST]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert [p.name for p in here.iterdir()] == ["a.npz"]


# ------------------------------------------------------------------------ interrupted, gone on

#: Epochs long enough to be interrupted in their midst.
LONG = ["--epochs", "5", "--batch-size", "8", "--seed", "2", *COMMON]


def long_data(folder: Path) -> str:
    x, y = images(1500)
    return str(save(folder / "long.npz", X=x, y=y))


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpuconv", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, even where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not said; {process.communicate()[1]}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    here: Path, number: signal.Signals
) -> None:
    data = long_data(here)
    assert main(["train", "--data", data, "--out", "whole", "-q", *LONG]) == 0
    process = started("train", "--data", data, "--out", "parts", *LONG)
    wait_for(process, "epoch 2/5")
    time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
        (here / "parts" / ".checkpoint.1.tmp.safetensors").write_text("left behind")
    else:
        assert process.returncode == 128 + number, said
        assert "saved in parts; gpuconv train --resume parts goes on" in said[1]
        assert "Traceback" not in said[1]
        model = here / "parts" / run.MODEL
        assert model.read_bytes() != (here / "whole" / run.MODEL).read_bytes()
        run.load_model(model, "cpu")  # what was saved can be used
        with open(here / "parts" / run.CHECKPOINT, "rb") as file:
            assert b'\\"step\\": 0,' not in file.read(4096), "it was not in the midst of an epoch"
    again = command("train", "--resume", "parts")
    assert again.returncode == 0, again.stderr
    assert "going on in epoch 3 after step" in again.stdout
    whole, parts = contents(here / "whole"), contents(here / "parts")
    assert parts[run.MODEL] == whole[run.MODEL]
    assert set(parts) == set(whole)
    assert without_seconds(metrics(here / "parts")) == without_seconds(metrics(here / "whole"))


def test_a_second_ctrl_c_leaves_at_once(here: Path) -> None:
    """Steps of the loops in Python are long: the first would be waited for."""
    x, y = images(60, (40, 40))
    data = str(save(here / "a.npz", X=x, y=y))
    process = started(
        "train", "--data", data, "--engine", "naive", "--batch-size", "64", "--threads", "1"
    )
    wait_for(process, "writing to")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    for line in process.stderr:
        if "once more to leave at once" in line:
            break
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - begin < 2


def test_going_on_with_a_finished_run_changes_no_weights(
    here: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", data, "--out", "a", "-q", *FAST]) == 0
    before = contents(here / "a")
    capsys.readouterr()
    assert main(["train", "--resume", "a"]) == 0
    assert "the run is finished already" in capsys.readouterr().out
    assert contents(here / "a") == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--epochs", "9"), ("--lr", "0.1"), ("--seed", "1"), ("--dtype", "float64"), ("--zoom", "0")],
)
def test_a_run_goes_on_as_it_was_started(
    here: Path, data: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", data, "--out", "a", "-q", *FAST]) == 0
    before = contents(here / "a")
    capsys.readouterr()
    assert main(["train", "--resume", "a", option, value]) == 2
    said = capsys.readouterr().err
    assert f"{option} is {value}" in said
    assert "was started with" in said
    assert said.count("\n") == 1
    assert contents(here / "a") == before
    assert main(["train", "--resume", "a", "--epochs", "2", "--engine", "naive", "-q"]) == 0
    settings = json.loads((here / "a" / run.CONFIG).read_text())["settings"]
    assert settings == {"device": "cpu", "engine": "naive", "threads": 1}


def test_divergence_at_the_start_keeps_nothing(
    here: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", data, "--lr", "1e38", "--out", "a", *FAST]) == 1
    said = capsys.readouterr().err
    assert "the training diverged: the loss is" in said
    assert "there is no earlier state to keep; a lower --lr than 1e+38 may help" in said
    assert said.count("\n") == 1
    assert not (here / "a").exists()


def test_divergence_later_keeps_the_last_good_state(
    here: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train", "--data", data, "-q", "--epochs", "3", *COMMON]
    kept: list[bytes] = []
    checked, save_checkpoint = Step.checked, run.Run.save_checkpoint

    def poisoned(self: Step, *batch: Any) -> Any:
        if len(kept) == 2:
            self.net.layers[0].parameters["W"][...] = np.nan
        return checked(self, *batch)

    def noting(self: run.Run, folder: Path) -> None:
        save_checkpoint(self, folder)
        kept.append((folder / run.CHECKPOINT).read_bytes())

    monkeypatch.setattr(Step, "checked", poisoned)
    monkeypatch.setattr(run.Run, "save_checkpoint", noting)
    assert main([*options, "--out", "a"]) == 1
    said = capsys.readouterr().err
    assert (
        "the loss is nan at step 1 of epoch 3; NaN or infinity first appeared in layer 0 (Conv2D "
        "32 3x3) (W), around step 1 of epoch 3; the state of the end of epoch 2 is kept"
    ) in said
    assert (here / "a" / run.CHECKPOINT).read_bytes() == kept[1]
    assert [line["epoch"] for line in metrics(here / "a")] == [1, 2]
    assert main(["predict", "a", data, *COMMON]) == 0


# ----------------------------------------------------------------------------- the progress bar


def test_a_terminal_shows_a_bar_with_loss_and_accuracy(here: Path) -> None:
    data = long_data(here)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "gpuconv", "train", "--data", data, "--epochs", "1", "--batch-size", "2", "--out", "a", *COMMON],
        env=environment(COLUMNS="120"), stdout=subprocess.PIPE, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.stdout is not None
        process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    frames = shown.decode().split("\r")
    assert any(re.search(r"epoch 1/1: .*\d+/525 .*loss \d\.\d+ accuracy 0\.\d+", f) for f in frames)
    assert frames[-1].strip() == ""  # the bar is taken off: the line of the epoch says the same


def test_without_a_terminal_there_is_no_bar(data: str) -> None:
    done = command("train", "--data", data, "--out", "a", *FAST)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------ missing parts


@pytest.mark.parametrize("name", ["safetensors", "sklearn"])
def test_what_training_cannot_do_without(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "digits", *FAST]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"gpuconv train: {name} (")
    assert "pip install 'gpuconv[train]'" in said.err
    assert said.err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_pictures_and_bar_are_left_out_where_their_parts_are_missing(
    here: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "tqdm", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", "--data", data, "--out", "a", *FAST]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("no curves.png and mistakes.png, for want of matplotlib (")
    assert said[1].startswith("no progress bar, for want of tqdm (")
    assert all(line.endswith(": pip install 'gpuconv[train]'") for line in said[:2])
    kept = set(run.FILES) - {run.CURVES, run.MISTAKES}
    assert {p.name for p in (here / "a").iterdir()} == kept
