"""What is measured of a machine and of its engines, and the files it is kept in."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cache, tuning
from gpuconv.engines.rates import Rates, rates, reset

ROOT = Path(__file__).parents[1]
SHAPES = (2, 12, 12, 8), (3, 3, 8, 16)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let each test have an empty cache directory, and leave nothing behind."""
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "cache"))
    reset()
    monkeypatch.setattr(tuning, "_times", None)
    gpuconv.settings.changed()
    yield tmp_path / "cache"
    reset()
    gpuconv.settings.changed()


def files(place: Path, name: str) -> list[Path]:
    return list(place.glob(f"{name}-*.json"))


def test_rates_are_measured_once_and_kept(place: Path) -> None:
    first = rates()
    (file,) = files(place, "rates")
    text = file.read_text()
    reset()
    assert rates() == first
    assert file.read_text() == text
    usual = Rates()
    assert usual.product32 / 30 <= first.product32 <= usual.product32 * 30
    assert first.product32 > first.product64


def test_calibrate_writes_them_anew(place: Path) -> None:
    rates()
    (file,) = files(place, "rates")
    file.write_text("{}")
    found = gpuconv.calibrate()
    assert set(found) == {"product32", "product64", "copy", "einsum", "call"}
    reset()
    assert vars(rates()) == found


DAMAGE: dict[str, Any] = {
    "empty": lambda whole: "",
    "no JSON": lambda whole: "{",
    "a list": lambda whole: "[1]",
    "deep": lambda whole: "[" * 100_000,
    "another format": lambda whole: json.dumps({**whole, "format": "other"}),
    "another version": lambda whole: json.dumps({**whole, "version": 99}),
    "another machine": lambda whole: json.dumps({**whole, "machine": {"processor": "6502"}}),
    "no content": lambda whole: json.dumps({**whole, "content": 3}),
    "a rate missing": lambda whole: json.dumps({**whole, "content": {"copy": 1e10}}),
    "a rate too many": lambda whole: json.dumps({**whole, "content": {**whole["content"], "x": 1.0}}),
    "a rate of text": lambda whole: json.dumps({**whole, "content": {**whole["content"], "copy": "1e10"}}),
    "a rate of zero": lambda whole: json.dumps({**whole, "content": {**whole["content"], "copy": 0.0}}),
    "a rate of NaN": lambda whole: json.dumps({**whole, "content": {**whole["content"], "copy": math.nan}}),
    "an absurd rate": lambda whole: json.dumps({**whole, "content": {**whole["content"], "call": 1e6}}),
    "too large": lambda whole: json.dumps({**whole, "pad": "x" * 5_000_000}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_file_is_ignored(place: Path, name: str) -> None:
    rates()
    (file,) = files(place, "rates")
    file.write_text(DAMAGE[name](json.loads(file.read_text())))
    reset()
    found = rates()
    for field, usual in vars(Rates()).items():
        assert usual / 30 <= getattr(found, field) <= usual * 30
    x, w = np.ones(SHAPES[0], "float32"), np.ones(SHAPES[1], "float32")
    assert gpuconv.conv2d(x, w)[0, 0, 0, 0] == 72


@pytest.mark.parametrize("setting", ["off", "/dev/null/nowhere"])
def test_without_a_directory_the_usual_rates_serve(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUCONV_CACHE_DIR", setting)
    assert rates() == Rates()
    with gpuconv.autotune():
        assert "measured" in str(gpuconv.explain(*SHAPES, device="cpu"))
    assert cache.read("rates") is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "sealed"))
    assert rates() == Rates()


def test_the_system_names_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUCONV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if sys.platform == "linux":
        assert cache.folder() == Path("/somewhere/gpuconv")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.folder() == Path.home() / ".cache" / "gpuconv"


@pytest.fixture
def usual_rates(place: Path) -> None:
    """Let the predictions be those of the usual machine, here and in other processes."""
    cache.write("rates", vars(Rates()))
    reset()


def test_of_several_processes_the_first_measures(place: Path) -> None:
    code = "from gpuconv.engines.rates import rates; print(rates())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    answers = {p.communicate()[0] for p in running}
    assert len(answers) == 1
    assert len(files(place, "rates")) == 1
    assert not list(place.glob(".*"))


def test_autotune_measures_and_remembers(place: Path, usual_rates: None) -> None:
    before = gpuconv.explain(*SHAPES, padding=1, device="cpu")
    assert "measured" not in str(before)
    with gpuconv.autotune():
        tuned = gpuconv.explain(*SHAPES, padding=1, device="cpu")
    for pass_, found in tuned.passes.items():
        times = {c.engine: c.tuned for c in found if not math.isnan(c.tuned)}
        assert len(times) >= 2
        assert tuned.choice[pass_] == min(times, key=lambda name: times[name])
    # Used when tuning is off, and by another process.
    after = gpuconv.explain(*SHAPES, padding=1, device="cpu")
    assert after.choice == tuned.choice
    assert "measured" in str(after)
    code = f"import gpuconv; print(gpuconv.explain(*{SHAPES}, padding=1, device='cpu'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(after)
    # Another shape is another matter.
    assert "measured" not in str(gpuconv.explain((3, 12, 12, 8), SHAPES[1], device="cpu"))
    tuning.forget()
    assert gpuconv.explain(*SHAPES, padding=1, device="cpu").choice == before.choice


def test_a_measurement_overrules_the_prediction(place: Path, usual_rates: None) -> None:
    usual = gpuconv.explain(*SHAPES, device="cpu").choice["forward"]
    with gpuconv.autotune():
        gpuconv.explain(*SHAPES, device="cpu")
    times = tuning._loaded()
    for entry in times.values():
        entry["naive"] = 1e-9
    gpuconv.settings.changed()
    assert gpuconv.explain(*SHAPES, device="cpu").choice["forward"] == "naive" != usual


@pytest.mark.parametrize(
    "content", [{"k": 3}, {"k": {}}, {"k": {"naive": "fast"}}, {"k": {"naive": -1.0}}]
)
def test_bad_entries_of_the_tuned_file_are_ignored(place: Path, content: Any) -> None:
    cache.write("tuned", content)
    assert tuning._loaded() == {}


def test_tuned_calls_compute_the_same(place: Path) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(SHAPES[0]), rng.standard_normal(SHAPES[1])
    want = gpuconv.conv2d(x, w, padding=1, activation="ReLU")
    dy = rng.standard_normal(want.shape)
    grads = gpuconv.conv2d_backward(dy, x, w, y=want, padding=1, activation="ReLU")
    with gpuconv.autotune():
        np.testing.assert_allclose(
            gpuconv.conv2d(x, w, padding=1, activation="ReLU"), want, atol=1e-12
        )
        again = gpuconv.conv2d_backward(dy, x, w, y=want, padding=1, activation="ReLU")
        first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        y = gpuconv.conv2d(first, w.transpose(3, 2, 0, 1), padding=1, layout="NCHW")
    for a, b in zip(again, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
    np.testing.assert_allclose(np.maximum(y, 0).transpose(0, 2, 3, 1), want, atol=1e-12)


def test_on_is_a_boolean() -> None:
    with pytest.raises(TypeError, match="on is 1"):
        gpuconv.autotune(1)  # type: ignore[arg-type]
