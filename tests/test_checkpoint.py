"""Model files and checkpoints: read whole and checked, or an error that names file and fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import gpuconv
from gpuconv.cli import main
from gpuconv.layers import Conv2D, Dropout, Flatten, FullyConnected
from gpuconv.models import Sequential
from gpuconv.training import checkpoint, run
from gpuconv.training.data import Scaling
from gpuconv.training.recipe import Recipe, make_optimizer
from tests.small_images import images, save
from tests.test_device import ROOT

Tensors = dict[str, np.ndarray]
Header = dict[str, Any]
COMMON = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    gpuconv.set_num_threads(None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images ``a.npz`` and a finished run in ``run``."""
    folder = tmp_path_factory.mktemp("made")
    data = str(save(folder / "a.npz"))
    assert main(["train", "--data", data, "--out", str(folder / "run"), "--epochs", "2", "-q", *COMMON]) == 0  # fmt: skip
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that run; its images stay where they are."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def unpack(path: Path) -> tuple[dict[str, str], Header, Tensors]:
    with safe_open(path, framework="numpy") as opened:
        metadata = dict(opened.metadata())
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return metadata, json.loads(metadata["header"]), found


def rewrite(path: Path, change: Callable[[dict[str, str], Header, Tensors], None]) -> None:
    """Change a file in a way that leaves the container whole."""
    metadata, header, found = unpack(path)
    metadata["header"] = "?"
    change(metadata, header, found)
    if metadata["header"] == "?":
        metadata["header"] = json.dumps(header)
    save_file(found, path, metadata)


# --------------------------------------------------------------------------------- the container


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 4))
    given = {
        "whole": base,
        "fortran": np.asfortranarray(base),
        "transposed": base.T,
        "strided": base[::2, 1:],
        "single": base.astype("f4"),
        "count": np.arange(3),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3)),
    }
    checkpoint.write(tmp_path / "a", "model", {"x": [1, None, 0.1]}, given)
    header, found = checkpoint.read(tmp_path / "a", "model")
    assert header == {"kind": "model", "x": [1, None, 0.1]}
    assert set(found) == set(given)
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from gpuconv.training import checkpoint\n"
        "checkpoint.write({!r}, 'model', dict(a=1, b=2), dict(x=np.ones(3), y=np.ones(5, 'f4')))"
    )
    for name in "abcd":  # the order of a set of words differs from process to process
        path = str(tmp_path / name)
        subprocess.run([sys.executable, "-c", code.format(path)], cwd=ROOT, check=True)
    assert len(set(contents(tmp_path).values())) == 1


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    checkpoint.write(path, "model", {}, {"a": np.ones(3)})
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, "model", {}, {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoint.write(path, "model", {"a": float("nan")}, {})
    assert contents(tmp_path) == before


def test_what_a_model_says_of_itself_goes_through_json() -> None:
    info = checkpoint.ModelInfo({"layers": []}, (-3, 4), (5, 6, 2), Scaling((0.1, 2.0), (1.0, 3.0)), "float64")  # fmt: skip
    header = json.loads(json.dumps(info.header()))
    assert checkpoint.ModelInfo.from_header(header, Path("a")) == info


# ------------------------------------------------------------------------------ damaged in any way


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("no model\n" * 100)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def header_damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] = 0xFF
    path.write_bytes(content)


def pickled(path: Path) -> None:
    np.savez(path, a=np.array([None]))
    path.with_name(path.name + ".npz").rename(path)


def foreign(path: Path) -> None:
    save_file({"0.W": np.ones(3)}, path, {"format": "pt"})


def bare(path: Path) -> None:
    save_file({"0.W": np.ones(3)}, path)


def inner(change: Callable[[dict[str, str], Header, Tensors], None]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, change)


def first(found: Tensors) -> str:
    return min(name for name in found if name.endswith("0.W"))


def poison(value: float) -> Callable[[dict[str, str], Header, Tensors], None]:
    def change(metadata: dict[str, str], header: Header, found: Tensors) -> None:
        found[first(found)][0, 0] = value

    return change


def drop(metadata: dict[str, str], header: Header, found: Tensors) -> None:
    del found[first(found)]


def reshape(metadata: dict[str, str], header: Header, found: Tensors) -> None:
    found[first(found)] = found[first(found)].reshape(-1)


def retype(metadata: dict[str, str], header: Header, found: Tensors) -> None:
    found[first(found)] = found[first(found)].astype("f8")


def add(metadata: dict[str, str], header: Header, found: Tensors) -> None:
    found[first(found).replace("0.W", "77.W")] = np.ones(3, "f4")


def part(name: str, value: Any) -> Callable[[dict[str, str], Header, Tensors], None]:
    def change(metadata: dict[str, str], header: Header, found: Tensors) -> None:
        if value is None:
            del header[name]
        else:
            header[name] = value

    return change


def layer(**values: Any) -> Callable[[dict[str, str], Header, Tensors], None]:
    def change(metadata: dict[str, str], header: Header, found: Tensors) -> None:
        header["model"]["layers"][0].update(values)

    return change


BOTH: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "truncated, corrupt or no safetensors file"),
    "header cut": (header_cut, "truncated, corrupt or no safetensors file"),
    "empty": (empty, "truncated, corrupt or no safetensors file"),
    "zeros": (zeros, "truncated, corrupt or no safetensors file"),
    "text": (text, "truncated, corrupt or no safetensors file"),
    "longer": (longer, "truncated, corrupt or no safetensors file"),
    "header damaged": (header_damaged, "truncated, corrupt or no safetensors file"),
    "pickles": (pickled, "truncated, corrupt or no safetensors file"),
    "foreign": (foreign, "not one that gpuconv wrote"),
    "foreign and bare": (bare, "not one that gpuconv wrote"),
    "other version": (inner(lambda m, h, t: m.update(version="2")), "of version 2; this gpuconv reads 1"),
    "no version": (inner(lambda m, h, t: m.pop("version")), "of version ?; this"),
    "header no JSON": (inner(lambda m, h, t: m.update(header="{")), "the header is not JSON"),
    "header a list": (inner(lambda m, h, t: m.update(header="[]")), "the header is not a JSON object"),
    "NaN": (inner(poison(np.nan)), "0.W' holds NaN or infinity"),
    "infinity": (inner(poison(np.inf)), "0.W' holds NaN or infinity"),
    "tensor missing": (inner(drop), "lacks tensors of the model it describes: 0.W"),
    "tensor too many": (inner(add), "77.W"),
    "other shape": (inner(reshape), "tensor '0.W' is float32 of shape (288,); expected float32 of shape (3, 3, 1, 32)"),
    "other dtype": (inner(retype), "tensor '0.W' is float64 of shape"),
    "no network": (inner(part("model", None)), "the header's 'model' is missing"),
    "network without layers": (inner(part("model", {"layers": []})), "cannot be made"),
    "unknown layer": (inner(layer(layer="os.system")), "'os.system'; expected one of Conv2D"),
    "unknown option": (inner(layer(colour=1)), "config's layer 0 (Conv2D)"),
    "wrong option": (inner(layer(stride=0)), "stride is 0"),
    "activation that is code": (inner(layer(act_fn="__import__('os')")), "config's layer 0 (Conv2D)"),
    "classes missing": (inner(part("classes", None)), "the header's 'classes' is missing"),
    "classes twice": (inner(part("classes", [1, 1, 2])), "classes are not two or more ascending"),
    "classes text": (inner(part("classes", ["a"])), "'classes' is not a list of int"),
    "classes too few": (inner(part("classes", [1, 2])), "its network gives (1, 3) for an image; expected (1, 2)"),
    "image shape": (inner(part("image_shape", [6, 0, 1])), "image_shape is (6, 0, 1)"),
    "image too small": (inner(part("image_shape", [1, 1, 1])), "the network it describes cannot be made: layer"),
    "scaling": (inner(part("scaling", {"shift": [0.0, 1.0], "scale": [1.0]})), "scaling does not hold 1 finite"),
    "dtype": (inner(part("dtype", "int8")), "dtype is 'int8'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_a_damaged_model_is_an_error_of_one_line(
    name: str, made: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BOTH[name]
    path = folder / run.MODEL
    damage(path)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        run.load_model(path, "cpu")
    capsys.readouterr()
    out = folder.parent / "labels.csv"
    assert main(["predict", str(folder), str(made / "a.npz"), "--out", str(out), *COMMON]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"gpuconv predict: {path}")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert contents(folder) == before
    assert not out.exists()


def progress(**values: Any) -> Callable[[dict[str, str], Header, Tensors], None]:
    def change(metadata: dict[str, str], header: Header, found: Tensors) -> None:
        header["progress"].update(values)

    return change


def state(key: str, value: Any) -> Callable[[dict[str, str], Header, Tensors], None]:
    def change(metadata: dict[str, str], header: Header, found: Tensors) -> None:
        header["state"][0][key] = value

    return change


def momentum_dropped(metadata: dict[str, str], header: Header, found: Tensors) -> None:
    del found["state.0.W.mean"]


def momentum_of_another_shape(metadata: dict[str, str], header: Header, found: Tensors) -> None:
    found["state.0.W.mean"] = np.zeros((1, 1), "f4")


CHECKPOINT: dict[str, tuple[Callable[[Path], None], str]] = {
    **BOTH,
    "recipe missing": (inner(part("recipe", None)), "recipe is {}"),
    "recipe wrong": (inner(lambda m, h, t: h["recipe"].update(lr=-1)), "lr is -1"),
    "progress missing": (inner(part("progress", None)), "progress is {}"),
    "progress negative": (inner(progress(step=-1)), "step is -1"),
    "progress without history": (inner(progress(history=[])), "history has 0 epochs; expected 2"),
    "progress beyond the epoch": (inner(progress(step=999)), "step 999; expected at most 2 epochs of 2 steps"),
    "progress beyond the run": (inner(lambda m, h, t: h["recipe"].update(epochs=1)), "at epoch 2, step 0; expected at most 1 epochs"),
    "settings missing": (inner(part("settings", None)), "settings is None"),
    "settings wrong": (inner(part("settings", {"device": 3, "engine": None, "threads": 1})), "settings is {'device': 3"),
    "source missing": (inner(part("source", None)), "source is missing"),
    "fingerprint": (inner(part("fingerprint", "0")), "does not hold the images and labels"),
    "state missing": (inner(part("state", None)), "state"),
    "state short": (inner(part("state", [])), "state has 0 entries; expected 5"),
    "state step": (inner(state("cur_step", -1)), "state is not that after 4 updates"),
    "state scheduler": (inner(state("scheduler", {"a": 1})), "state has the keys ['a']"),
    "momentum missing": (inner(momentum_dropped), "lacks tensors of the model it describes: 0.W.mean"),
    "momentum of another shape": (inner(momentum_of_another_shape), "0.W.mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_checkpoint_is_an_error_of_one_line(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = CHECKPOINT[name]
    damage(folder / run.CHECKPOINT)
    before = contents(folder)
    capsys.readouterr()
    # A file that names another device or engine is not believed either.
    assert main(["train", "--resume", str(folder), "-q"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpuconv train: ")
    assert message in said.err
    if name != "fingerprint":
        assert str(folder / run.CHECKPOINT) in said.err
    assert said.err.count("\n") == 1
    assert contents(folder) == before


def test_one_kind_is_not_taken_for_the_other(made: Path, folder: Path) -> None:
    shutil.copy(made / "run" / run.MODEL, folder / run.CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is a model; expected a check"):
        run.resume(folder)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is a checkpoint; expected a mo"):
        run.load_model(made / "run" / run.CHECKPOINT)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: No such file"):
        run.load_model(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: No such file"):
        run.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run.resume(tmp_path)
    with pytest.raises(FileNotFoundError, match="none is no folder of a run"):
        run.resume(tmp_path / "none")


def test_other_images_are_not_trained_on(made: Path, folder: Path, tmp_path: Path) -> None:
    """Neither where the file has changed, nor with another file."""
    x, y = images()
    other = save(tmp_path / "b.npz", X=x, y=np.roll(y, 1))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"b\.npz does not hold the images and labels that"):
        run.resume(folder, str(other))
    with pytest.raises(ValueError, match="digits does not hold the images"):
        run.resume(folder, run.DIGITS)
    assert contents(folder) == before
    moved = shutil.copy(made / "a.npz", tmp_path / "moved.npz")
    assert run.resume(folder, str(moved)).source == str(moved)


def test_what_is_not_finite_is_not_saved(folder: Path) -> None:
    before = contents(folder)
    again = run.resume(folder, device=lambda settings: "cpu")
    again.net.layers[0].optimizer.cache["W"]["mean"][...] = np.inf
    with pytest.raises(run.DivergedError, match=r"0\.W\.mean holds NaN or infinity after epoch 2"):
        again.save_checkpoint(folder)
    assert contents(folder) == before


# ------------------------------------------------------------------------------------- dropout


def with_dropout(recipe: Any, image_shape: Any, classes: int, count: int, device: Any) -> Any:
    """Return a network that drops between layers, in a wrapper around another too."""
    dense = FullyConnected(8, act_fn="ReLU")
    dense.use_rng(7)
    layers = [
        Dropout(Conv2D(4, (3, 3), pad=1, act_fn="ReLU"), 0.2),
        Flatten(),
        Dropout(Dropout(dense, 0.3, rng=5), 0.1, rng=6),
        Dropout(FullyConnected(classes), 0.4),
    ]
    net = Sequential(layers, make_optimizer(recipe, count), device=device)
    shared = np.random.default_rng(recipe.seed)
    layers[0].use_rng(shared)
    layers[3].use_rng(shared)
    net.build((1, *image_shape), recipe.dtype)
    return net


def dropping(folder: Path, dtype: str = "float32") -> run.Run:
    """Return a run of such a network at its start."""
    settings = {"device": "cpu", "engine": None, "threads": 1}
    recipe = Recipe(epochs=3, batch_size=16, lr=0.01, seed=4, dtype=dtype)
    return run.start(recipe, str(folder / "a.npz"), settings, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_dropout_is_taken_up_again_bit_for_bit(
    dtype: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make_network", with_dropout)
    whole = dropping(made, dtype)
    whole.train()
    parts = dropping(made, dtype)
    # Before the first step, in the midst of an epoch, at its end, and not at all.
    for stop in ((0, 0), (0, 1), (1, 1), (2, 0), (3, 0)):
        at = parts.progress
        parts.train(stop=lambda at=at, stop=stop: (at.epoch, at.step) >= stop)
        assert (at.epoch, at.step) == stop
        parts.save_checkpoint(tmp_path)
        parts = run.resume(tmp_path, device=lambda settings: "cpu")
    assert parts.finished
    for name, value in whole.net.tensors().items():
        np.testing.assert_array_equal(parts.net.tensors()[name], value)
    assert [r.train_loss for r in parts.progress.history] == [r.train_loss for r in whole.progress.history]  # fmt: skip


def test_a_checkpoint_of_before_dropouts_were_kept_loads(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make_network", with_dropout)
    begun = dropping(made)
    begun.train(stop=lambda: begun.progress.step == 1)
    begun.save_checkpoint(tmp_path)
    rewrite(tmp_path / run.CHECKPOINT, part("random", None))
    again = run.resume(tmp_path, device=lambda settings: "cpu")
    again.train()
    assert again.finished


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_generator_of_numpys_goes_on(kind: str) -> None:
    source = np.random.Generator(getattr(np.random, kind)(3))
    first = [Dropout(Flatten(), 0.5, rng=source), Dropout(Flatten(), 0.5), Dropout(Flatten(), 0.5, rng=source)]  # fmt: skip
    source.random(3, np.float32)  # half of a 64-bit number is kept for the next
    state = json.loads(json.dumps(Sequential(first).random_state()))
    assert state["dropouts"] == [0, 1, 0]
    second = [Dropout(Flatten(), 0.5) for _ in range(3)]
    Sequential(second).load_random_state(state)
    for k in (2, 1, 0, 2):
        np.testing.assert_array_equal(
            second[k].generator.random(700, np.float32), first[k].generator.random(700, np.float32)
        )


def test_a_generator_whose_state_cannot_be_kept_is_named() -> None:
    class Own(np.random.PCG64):
        pass

    net = Sequential([Dropout(Flatten(), 0.5, rng=np.random.Generator(Own(1)))])
    with pytest.raises(TypeError, match="draws from a Own, whose state cannot be kept"):
        net.random_state()


RANDOM: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no mapping": (lambda r: r.clear(), "random is no mapping"),
    "no list": (lambda r: r.update(dropouts=3), "are no lists"),
    "too few": (lambda r: r["dropouts"].pop(), "random has 3 dropouts; expected 4"),
    "no such generator": (lambda r: r["dropouts"].__setitem__(0, 3), "name 3; it has 3 generators"),
    "negative": (lambda r: r["dropouts"].__setitem__(0, -1), "name -1"),
    "a truth": (lambda r: r["dropouts"].__setitem__(0, True), "name True"),
    "unknown": (lambda r: r["generators"][1].update(bit_generator="os.system"), "generator 1 is 'os.system'"),
    "no generator": (lambda r: r["generators"].__setitem__(2, None), "generator 2 is None"),
    "part missing": (lambda r: r["generators"][0].pop("state"), "generator 0 is no state of a PCG64"),
    "part too many": (lambda r: r["generators"][0].update(more=1), "generator 0 is no state"),
    "text": (lambda r: r["generators"][0]["state"].update(inc="a"), "generator 0 is no state"),
    "too large": (lambda r: r["generators"][0]["state"].update(inc=1 << 130), "generator 0 is no state"),
    "of another": (lambda r: r["generators"][0].update(bit_generator="MT19937"), "no state of a MT19937"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_a_damaged_state_of_dropouts_is_an_error_and_changes_nothing(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = RANDOM[name]
    monkeypatch.setattr(run, "make_network", with_dropout)
    begun = dropping(made)
    begun.save_checkpoint(tmp_path)
    rewrite(tmp_path / run.CHECKPOINT, lambda m, header, t: damage(header["random"]))
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: ") as error:
        run.resume(tmp_path, device=lambda settings: "cpu")
    assert message in str(error.value)
    before = begun.net.random_state()
    wrong = json.loads(json.dumps(before))
    damage(wrong)
    with pytest.raises(ValueError, match="random"):
        begun.net.load_random_state(wrong)
    assert begun.net.random_state() == before
