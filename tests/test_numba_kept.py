"""Compiled functions that are kept on disk, by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

#: Too long to become a part of its caller.
LINES = "\n".join(f"        a[{i}] = a[{i}] % (number + {i + 1}) + number" for i in range(64))
FACTORIES = f"""
import ctypes
import numpy as np
from numba import carray
from gpuconv.engines.numba_memory import numbers_at
from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_team_loops import job

def make_part(number):
    @kept(number)
    def part(a):
{LINES}
    return part

part_of_one, part_of_two = make_part(1), make_part(2)

def make_job(number):
    one = number == 1
    def written(at, share, count, worker):
        if one:
            part_of_one(carray(numbers_at(at), 64))
        else:
            part_of_two(carray(numbers_at(at), 64))
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
    run = kind(job(written, number))
    def answer():
        place = np.zeros(64, np.int64)
        run(place.ctypes.data, 0, 1, 0)
        return int(place[5])
    return answer

def make_function(number):
    one = number == 1
    @kept(number)
    def whole(a):
        if one:
            part_of_one(a)
        else:
            part_of_two(a)
    def answer():
        place = np.zeros(64, np.int64)
        whole(place)
        return int(place[5])
    return answer
"""


def run(folder: Path, code: str, before: str = "") -> str:
    place = {
        "NUMBA_CACHE_DIR": str(folder / "kept"),
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nfrom factories import *\n{code}"],
        env={**os.environ, **place}, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("make", ["make_job", "make_function"])
def test_what_processes_compiled_apart_is_told_apart(make: str, tmp_path: Path) -> None:
    """As when one process computes in float32, another in float64, and a third in both."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    for number in (1, 2):
        assert run(tmp_path, f"print({make}({number})())") == f"{number}\n"
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").rglob("*.nbc")}
    got = run(tmp_path, f"made = [{make}(n) for n in (1, 2)]\nprint(*[f() for f in made])")
    assert got == "1 2\n"
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "kept").rglob("*.nbc")} == kept
    assert kept


def test_nowhere_to_keep_them(tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    shut = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []"
    assert run(tmp_path, "print(make_function(1)(), make_job(2)())", shut) == "1 2\n"
    assert not list(tmp_path.rglob("*.nbc"))


LAYERS = """
import numpy as np
import gpuconv
from gpuconv.activations import ELU, GELU
from gpuconv.layers import BatchNorm2D, Pool2D

for dtype in ("float32", "float64"):
    x = np.ones((4, 32, 32, 64), dtype)
    for w in (np.ones((3, 3, 64, 64), dtype), np.ones((1, 1, 64, 64), dtype)):
        padding = w.shape[0] // 2
        y = gpuconv.conv2d(x, w, padding=padding)
        gpuconv.conv2d_backward(y, x, w, padding=padding)
    w = np.ones((3, 3, 1, 64), dtype)
    y = gpuconv.conv2d(x, w, padding=1, groups=64)
    gpuconv.conv2d_backward(y, x, w, padding=1, groups=64)
    for layer in (BatchNorm2D(), Pool2D((2, 2), 2), Pool2D((2, 2), 2, mode="average")):
        layer.backward(layer.forward(x))
    ELU().fn(x), GELU().fn(x)
"""


def test_a_second_process_compiles_nothing() -> None:
    said = ""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LAYERS],
            env={**os.environ, "NUMBA_DEBUG_CACHE": "1"}, capture_output=True, text=True, timeout=300,
            check=True,
        )  # fmt: skip
        said = done.stdout
    assert "data loaded" in said
    assert "data saved" not in said
