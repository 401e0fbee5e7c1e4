"""The engine cuda_implicit_gemm beyond the conformance suite: every tile, divided sums, phases."""

from __future__ import annotations

import cProfile
import pstats
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings

import gpuconv
from gpuconv.cuda import kernels, tiles
from gpuconv.cuda.tiles import TILES, Choice, Tile
from gpuconv.engines import cuda_implicit_gemm
from tests.cuda_on_cpu import KernelError, sanitizer
from tests.cuda_on_cpu.arrays import ndarray
from tests.support import (
    CASES,
    Case,
    case,
    close,
    compute,
    convolutions,
    count_in_64_bits,
    far_corners,
    home,
    host,
    oracle,
    real_gpu,
    tolerance,
)

NAME = "cuda_implicit_gemm"
CASE = {c.name: c for c in CASES}
#: More rows, columns and inner elements than the largest tile has, in all passes, and a rest.
LARGE = case("large", (1, 13, 13, 20), (3, 3, 20, 132), padding=1, activation="ReLU")
ODD = case("odd", (1, 13, 11, 15), (3, 3, 15, 33), padding=1, stride=2)
PLANES = case("planes", (2, 12, 8, 16), (3, 3, 8, 40), padding=1, groups=2, layout="NCHW")


@pytest.fixture
def cp() -> Iterator[Any]:
    """The stand-in, whose records tests look at; the engine forced."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with home(NAME) as module, gpuconv.engine(NAME):
        yield module


def agree(xp: Any, c: Case, dtype: str, by: str = "naive") -> None:
    for got, want in compute(xp, c, dtype, by):
        close(host(got), want, tolerance(NAME, dtype, 300))


def always(monkeypatch: pytest.MonkeyPatch, tile: Tile, parts: int = 1) -> None:
    """Choose this tile and about so many parts."""

    def choose(gpu: Any, shape: tiles.Shape, limit: int) -> Choice:
        count, length = tiles._parts(shape, parts if shape.divisible else 1)
        return Choice(tile, count, length, 1.0)

    monkeypatch.setattr(tiles, "choose", choose)
    kernels.clear()


# ----------------------------------------------------------------------------------------- tiles

EVERY = [(dtype, tile) for dtype in ("float32", "float64") for tile in TILES[dtype]]


@pytest.mark.parametrize(("dtype", "tile"), EVERY, ids=str)
@pytest.mark.parametrize("c", [LARGE, ODD, PLANES], ids=lambda c: c.name)
def test_every_tile(
    cp: Any, monkeypatch: pytest.MonkeyPatch, c: Case, dtype: str, tile: Tile
) -> None:
    always(monkeypatch, tile)
    agree(cp, c, dtype, "numpy_gemm")
    blocks = {block for name, _, block in cp.settings.launches if "_gemm_" in name}
    assert blocks == {(tile.threads, 1, 1)}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("parts", [2, 5, 1000])
@pytest.mark.parametrize("name", ["dense", "strided", "grouped", "first-layout", "dilated"])
def test_divided_sums(
    cp: Any, monkeypatch: pytest.MonkeyPatch, name: str, parts: int, dtype: str
) -> None:
    always(monkeypatch, TILES[dtype][-1], parts)
    agree(cp, CASE[name], dtype)
    names = [n for n, *_ in cp.settings.launches]
    assert f"conv_split_sum_{kernels.suffix(dtype)}" in names
    runs = [compute(cp, CASE[name], dtype) for _ in range(2)]
    for (a, _), (b, _) in zip(*runs, strict=True):
        assert host(a).tobytes() == host(b).tobytes()


def test_a_long_sum_is_divided_within_the_workspace(cp: Any) -> None:
    """The weight gradient of few channels over many positions, as it is chosen."""
    c = case("long", (2, 64, 64, 4), (3, 3, 4, 8), padding=1)
    agree(cp, c, "float32", "numpy_gemm")
    grids = {n: grid for n, grid, _ in cp.settings.launches}
    ((_, parts, _),) = [g for n, g in grids.items() if "weight_grad" in n]
    assert parts > 1
    made = gpuconv.dispatch.get_engine(NAME)
    problem = gpuconv.explain(c.x, c.w, **c.keywords).problem
    assert made.workspace(problem, "weight_grad") == parts * 9 * 4 * 8 * 4


def test_aligned_arrays_are_read_and_written_16_bytes_at_a_time(cp: Any) -> None:
    used = variants_of(cp, case("wide", (1, 8, 8, 16), (3, 3, 16, 32)), "float32")
    for pass_ in ("forward", "input_grad", "weight_grad"):
        assert {used[pass_][key] for key in ("VEC_A", "VEC_B", "VEC_C")} == {"4"}, pass_
    used = variants_of(cp, case("wide", (1, 8, 8, 16), (3, 3, 16, 32)), "float64")
    assert used["forward"]["VEC_A"] == "2"
    used = variants_of(cp, case("three", (1, 8, 8, 3), (3, 3, 3, 32)), "float32")
    assert (used["forward"]["VEC_A"], used["forward"]["VEC_B"]) == ("1", "4")


def variants_of(xp: Any, c: Case, dtype: str) -> dict[str, dict[str, str]]:
    """Return the constants of the variants that a case uses, by pass."""
    kernels.clear()
    compute(xp, c, dtype)
    found = [dict(v.defines) for _, v, _ in kernels._functions if v.file.startswith("conv_imp")]
    return {d["PASS"]: d for d in found}


def test_an_array_off_its_alignment_is_read_narrowly(cp: Any) -> None:
    """A view that begins 4 bytes after a multiple of 16."""
    c = case("wide", (1, 6, 6, 8), (3, 3, 8, 8), bias=False)
    data = oracle(c, "float32")
    flat = cp.zeros(data.x.size + 1, "float32")
    x = flat[1:].reshape(data.x.shape)
    x[...] = cp.asarray(data.x)
    for _ in range(2):  # planned once for each alignment
        for a in (x, cp.asarray(data.x)):
            close(host(gpuconv.conv2d(a, cp.asarray(data.w))), data.y, 1e-4)


def test_arrays_of_any_strides_are_not_copied(cp: Any) -> None:
    data = oracle(CASE["strided"], "float32")
    x = cp.zeros((*data.x.shape[:3], 7), "float32")[..., 1:7:2]
    x[...] = cp.asarray(data.x)
    w, b = cp.asarray(data.w), cp.asarray(data.b)
    y = cp.empty(data.y.shape[::-1], "float32").transpose(3, 2, 1, 0)
    memory = cp._home
    memory.peak = before = memory.used
    gpuconv.conv2d(x, w, b, out=y, **CASE["strided"].keywords)
    assert memory.peak < before + 64  # where arrays overlap is told by a small one
    close(host(y), data.y, 1e-4)


# ---------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "c",
    [
        case("a-third-unseen", (2, 10, 11, 4), (2, 2, 4, 5), stride=3, padding=1),
        case("half-of-taps", (1, 9, 12, 3), (4, 3, 3, 4), stride=4, dilation=2, padding=2),
        case("taps-beyond", (1, 5, 5, 2), (5, 5, 2, 2), stride=2, padding=4),
        case("far", (1, 3, 3, 2), (1, 1, 2, 2), stride=50, padding=60),
        case("one-of-axes", (1, 8, 9, 3), (3, 3, 3, 2), stride=(1, 2), dilation=(2, 1)),
    ],
    ids=lambda c: c.name,
)
def test_phases_of_strided_input_gradients(cp: Any, c: Case, dtype: str) -> None:
    agree(cp, c, dtype)


@pytest.mark.parametrize("name", ["dilated-strided", "grouped", "first-strided", "strided"])
def test_offsets_of_64_bits_give_the_same(
    cp: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    narrow = [host(got) for got, _ in compute(cp, CASE[name], "float32")]
    used = count_in_64_bits(monkeypatch)
    wide = [host(got) for got, _ in compute(cp, CASE[name], "float32")]
    assert used
    assert all(("INDEX_64", "1") in v.defines for v in used if v.file != "epilogue.cu")
    for a, b in zip(narrow, wide, strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_tensor_of_more_than_2_to_the_31_elements(cp: Any) -> None:
    """Its far corners are read where they are; a 32-bit offset would wrap around."""
    far_corners(cp, ("w",))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(convolutions())
def test_random_convolutions(c: Case) -> None:
    with home(NAME) as xp, gpuconv.engine(NAME):
        for got, want in compute(xp, c, "float64"):
            close(host(got), want, 1e-11)


# --------------------------------------------------------------------------------------- watched

WATCHED = [
    (c, dtype)
    for c in (CASE["dense"], CASE["strided"], CASE["grouped"], CASE["first-strided"],
              CASE["kernel-is-image"], case("wide", (2, 5, 6, 8), (3, 3, 8, 36), padding=1))
    for dtype in (("float32", "float16") if c.name in ("strided", "wide") else ("float32",))
]  # fmt: skip


@pytest.mark.parametrize(("c", "dtype"), WATCHED, ids=lambda v: getattr(v, "name", v))
def test_every_access_is_within_bounds_and_free_of_races(c: Case, dtype: str) -> None:
    with home(NAME, "checked", 1) as xp, gpuconv.engine(NAME):
        agree(xp, c, dtype)


def test_parts_of_sums_are_within_bounds_and_free_of_races(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with home(NAME, "checked", 2) as xp, gpuconv.engine(NAME):
        always(monkeypatch, TILES["float32"][-1], 3)
        agree(xp, CASE["dense"], "float32")


def test_address_sanitizer_finds_nothing() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py",
        "-k", f"{NAME} and xwb and float32 and (same or first-strided)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 2
    assert "skipped" not in done.stdout


# -------------------------------------------------------------------------------- broken kernels


@dataclass(frozen=True)
class Mutation:
    """A change of the kernel for the worse, and who notices it."""

    old: str
    new: str
    error: type[Exception]
    message: str
    file: str = "conv_implicit_gemm.cu"


MUTATIONS = {
    "no barrier": Mutation("__syncthreads();", "", KernelError, "race|uninitialised"),
    "one buffer": Mutation("now ^= 1", "now ^= 0", Exception, "race|error"),
    "edge of columns": Mutation(
        "column + v < p.columns) c[row", "true) c[row", KernelError, "race|out of bounds"),
    "edge of rows": Mutation(
        "if (first_row + m >= row_count) continue;", "", KernelError,
        "race|out of bounds"),
    "padding": Mutation(
        "< unsigned(p.size[axis])", "<= unsigned(p.size[axis])", Exception, "out of bounds|error"),
    "end of inner": Mutation(
        "inside = k < end", "inside = k <= end", Exception, "out of bounds|error"),
    "carry": Mutation("digit[d] -= radix[d], carry = 1", "digit[d] -= radix[d]", AssertionError,
                      "error"),
    "bias": Mutation("bias[group * p.columns + column + v]", "bias[column]", AssertionError,
                     "error"),
    "phase": Mutation("(seen % s + s) % s", "seen % s", Exception, "out of bounds|race|error"),
    "parts": Mutation("for (int i = 1; i < count; i++)", "for (int i = 2; i < count; i++)",
                      AssertionError, "error", "split_sum.cu"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if real_gpu():
        pytest.skip("breaks kernels, which a GPU may not survive")
    mutation = MUTATIONS[name]
    read = kernels.read
    assert mutation.old in read(mutation.file)
    monkeypatch.setattr(
        kernels, "read", lambda file: read(file).replace(
            mutation.old, mutation.new if file == mutation.file else mutation.old)
    )  # fmt: skip
    narrow = case("narrow", (1, 7, 5, 3), (3, 3, 3, 5), stride=2, padding=1)
    with home(NAME, "checked", 1) as xp, gpuconv.engine(NAME):
        always(monkeypatch, TILES["float32"][-1], 2 if mutation.file == "split_sum.cu" else 1)
        with pytest.raises(mutation.error, match=mutation.message):
            agree(xp, narrow, "float32")


def test_launches_are_planned_once(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    prepare = cuda_implicit_gemm.CudaImplicitGemm.prepare
    monkeypatch.setattr(
        cuda_implicit_gemm.CudaImplicitGemm, "prepare",
        lambda self, problem, pass_, *rest: (made.append(pass_), prepare(self, problem, pass_, *rest))[1],
    )  # fmt: skip
    for _ in range(3):
        compute(cp, CASE["strided"], "float32")
    assert sorted(made) == ["forward", "input_grad", "weight_grad"]


@pytest.mark.parametrize("name", ["cuda_gemm", NAME])
def test_a_call_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It can be captured in a CUDA graph: no number of the device's is read on the host."""
    if real_gpu():
        pytest.skip("looks at what is asked of the stand-in for CuPy")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the host waits for the device")

    with home(name) as cp, gpuconv.engine(name):
        data = oracle(CASE["first-strided"], "float32")
        x, w, b, dy = map(cp.asarray, (data.x, data.w, data.b, data.dy))
        compute(cp, CASE["first-strided"], "float32")  # found, compiled and planned before
        for reads in ("get", "item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(ndarray, reads, refuse)
        for waits in (cp.cuda.runtime, cp.cuda.Stream):
            for method in ("deviceSynchronize", "synchronize"):
                monkeypatch.setattr(waits, method, refuse, raising=False)
        gpuconv.conv2d(x, w, b, **CASE["first-strided"].keywords)
        gpuconv.conv2d_backward(dy, x, w, **CASE["first-strided"].keywords)
        monkeypatch.undo()


def test_a_call_costs_few_steps_beside_its_launch(cp: Any) -> None:
    """The fixed cost, counted: calls of Python's functions and methods, those of the stand-in too."""
    x, w, b = cp.ones((1, 4, 4, 4), "float32"), cp.ones((3, 3, 4, 4), "float32"), cp.ones(4, "f4")
    gpuconv.conv2d(x, w, b, padding=1, activation="ReLU")
    profile = cProfile.Profile()
    profile.enable()
    gpuconv.conv2d(x, w, b, padding=1, activation="ReLU")
    profile.disable()
    steps = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ours = sum(calls for (file, *_), (_, calls, *_) in steps.items() if "gpuconv/" in file)
    assert 5 < ours < 60, ours
