"""Compiled kernels are kept, and without a compiler the tests say so."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_on_cpu import build, compiler_available, elf

SOURCE = 'extern "C" __global__ void f(float* y) { __shared__ float tile[8], %s[3]; y[0] = VALUE; }'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is compiled in a folder of the test's own."""
    if compiler_available():
        pytest.skip(str(compiler_available()))
    for mode in ("fast", "checked"):  # these are kept beyond the test
        build._runtime_library(mode)
    monkeypatch.setattr(build, "_folder", lambda: tmp_path)
    return tmp_path


def test_what_was_compiled_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCE % "a"
    path = build.kernel_library(source, ("-DVALUE=1",), "fast")
    others = {
        build.kernel_library(source, ("-DVALUE=2",), "fast"),
        build.kernel_library(source + "\n", ("-DVALUE=1",), "fast"),
        build.kernel_library(source, ("-DVALUE=1",), "checked"),
    }
    assert len(others | {path}) == 4

    def refuse(*args: Any) -> str:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_run", refuse)
    assert build.kernel_library(source, ("-DVALUE=1",), "fast") == path
    with pytest.raises(AssertionError, match="compiled again"):
        build.kernel_library(source, ("-DVALUE=3",), "fast")
    assert len([p for p in folder.iterdir() if p.suffix == ".so"]) == 4
    assert not [p for p in folder.iterdir() if p.is_dir()]  # a failure leaves nothing half done


def test_many_may_compile_the_same_at_once(folder: Path) -> None:
    source = SOURCE % "b"
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build.kernel_library, source, ("-DVALUE=1",), "fast") for _ in range(8)]
        paths = {job.result() for job in jobs}
    assert len(paths) == 1
    assert [p.name for p in folder.iterdir()] == [p.name for p in paths]


def test_the_variables_of_a_library() -> None:
    source = """
    __device__ int counter = 3;
    __shared__ float outside[5];
    template <typename T> __device__ T* inside() { __shared__ T room[7]; return room; }
    extern "C" __global__ void f(float* y) {
      __shared__ double tile_2[2][3];
      tile_2[threadIdx.x][1] = 1, inside<int>()[threadIdx.x] = 2, outside[threadIdx.x] = 3;
      __syncthreads();
      y[0] = tile_2[1][1] + inside<int>()[1] + outside[1] + counter++;
    }"""
    path = build.kernel_library(source, (), "checked")
    sizes = {elf.plain_name(s.name): s.size for s in elf.variables(path)}
    wanted = {"counter": 4, "outside": 20, "room": 28, "tile_2": 48}
    assert {name: sizes.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZZ6kernelPfE4tile", "tile"),
        ("_ZZ1fE1t_0", "t"),
        ("_ZL7outside", "outside"),
        ("_ZZ6insideIiEPT_vE4room", "room"),
        ("_ZZ12kernel_4x4_aE10abcdefghij", "abcdefghij"),
        ("_ZZ4sumsE6tile_2", "tile_2"),
        ("counter", "counter"),
        ("tile.0", "tile"),
    ],
)
def test_names_of_variables(mangled: str, name: str) -> None:
    assert elf.plain_name(mangled) == name


def test_without_a_compiler_the_tests_say_so_and_skip(tmp_path: Path) -> None:
    chosen = "test_grids or test_a_missing_barrier or (cuda_atomic and one-pixel and float32)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", chosen,
         "tests/cuda_on_cpu/test_computes.py", "tests/cuda_on_cpu/test_catches.py",
         "tests/test_conformance.py", "tests/test_cuda_atomic.py"],
        env={k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++17 compiler" in done.stdout
    assert " passed" not in done.stdout
    assert " skipped" in done.stdout
