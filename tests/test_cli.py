"""What a user does with the command: trains, interrupts, goes on, predicts, asks."""

from __future__ import annotations

import csv
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
from gpuconv.training import loop, run
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import CLASSES, images, save
from tests.test_device import ROOT, WORKING, bare_environment, fake_cupy

COMMON = ["--device", "cpu", "--threads", "1"]
FAST = ["--epochs", "2", *COMMON]
COMMANDS = ("train", "predict", "bench", "explain", "doctor")


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


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUCONV_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m gpuconv`` as a user does."""
    env = more.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "gpuconv", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run.METRICS).read_text().splitlines()]


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


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
        f"reduced ({defaults.zoom:g})", f"the same run ({defaults.seed})",
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
    "dtype": (["train", "digits", "--dtype", "float16"], "invalid choice: 'float16'"),
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


@pytest.mark.parametrize("engine", ["naive", "numpy_gemm"])
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
    step, save_checkpoint = loop._step, run.Run.save_checkpoint

    def poisoned(net: Any, *batch: Any) -> Any:
        if len(kept) == 2:
            net.layers[0].parameters["W"][...] = np.nan
        return step(net, *batch)

    def noting(self: run.Run, folder: Path) -> None:
        save_checkpoint(self, folder)
        kept.append((folder / run.CHECKPOINT).read_bytes())

    monkeypatch.setattr(loop, "_step", poisoned)
    monkeypatch.setattr(run.Run, "save_checkpoint", noting)
    assert main([*options, "--out", "a"]) == 1
    said = capsys.readouterr().err
    assert "the loss is nan at step 1 of epoch 3; the state of the end of epoch 2 is kept" in said
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


def test_predicting_needs_safetensors(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["predict", "a", data]) == 2
    assert "pip install 'gpuconv[train]'" in capsys.readouterr().err


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


# ---------------------------------------------------------------------- explain, bench, doctor


def test_explain_says_the_choice_and_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["explain", "8,56,56,64", "3x3x64x64", "--device", "cpu"]
    assert main([*shapes, "--padding", "1", "--activation", "ReLU"]) == 0
    said = capsys.readouterr().out
    want = gpuconv.explain(
        (8, 56, 56, 64), (3, 3, 64, 64), padding=1, activation="ReLU", device="cpu"
    )
    assert said == f"{want}\n"
    assert "forward: numpy_gemm" in said
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
