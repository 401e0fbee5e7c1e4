"""The engine cuda_atomic beyond the conformance suite: launches, checks, broken kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import gpuconv
from gpuconv.activations import ReLU
from gpuconv.cuda import kernels
from gpuconv.engines import cuda_atomic
from gpuconv.profiling import named_ranges
from tests.cuda_on_cpu import KernelError, compiler_available, sanitizer
from tests.support import (
    CASES,
    DTYPES,
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

CASE = {c.name: c for c in CASES}


@pytest.fixture
def xp() -> Iterator[Any]:
    """The device's array library, the engine forced."""
    with home("cuda_atomic") as module, gpuconv.engine("cuda_atomic"):
        yield module


@pytest.fixture
def cp() -> Iterator[Any]:
    """The stand-in, whose records tests look at."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with home("cuda_atomic") as module, gpuconv.engine("cuda_atomic"):
        yield module


def agree(xp: Any, c: Case, dtype: str) -> None:
    for got, want in compute(xp, c, dtype):
        close(host(got), want, tolerance("cuda_atomic", dtype, 200))


# -------------------------------------------------------------------------------------- launches


def test_a_grid_smaller_than_the_work(cp: Any) -> None:
    """More output elements than the largest grid has threads."""
    c = case("large", (1, 96, 96, 1), (2, 2, 1, 3), activation="ReLU", padding=1)
    agree(cp, c, "float32")
    for name, grid, block in cp.settings.launches:
        assert name.startswith("conv2d_")
        assert grid[0] * block[0] < 97 * 97 * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dilated-strided", "grouped", "first-strided"])
def test_offsets_of_64_bits_give_the_same(
    xp: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    narrow = [host(got) for got, _ in compute(xp, CASE[name], dtype)]
    used = count_in_64_bits(monkeypatch)
    wide = [host(got) for got, _ in compute(xp, CASE[name], dtype)]
    assert used
    assert all(("INDEX_64", "1") in v.defines for v in used)
    for a, b in zip(narrow, wide, strict=True):
        close(a, b.astype("float64"), tolerance("cuda_atomic", dtype, 10))


def test_a_tensor_of_more_than_2_to_the_31_elements(cp: Any) -> None:
    """Its far corners are read where they are; a 32-bit offset would wrap around."""
    far_corners(cp, ("w", "b"))


def test_kernels_run_once_a_pass_and_only_for_what_is_needed(cp: Any) -> None:
    data = oracle(CASE["strided"], "float32")
    x, w, dy = (cp.asarray(a) for a in (data.x, data.w, data.dy))
    y = cp.asarray(data.y.astype("float32"))
    gpuconv.conv2d(x, w, **CASE["strided"].keywords)
    gpuconv.conv2d_backward(dy, x, w, y=y, **CASE["strided"].keywords)
    gpuconv.conv2d_backward(dy, x, w, y=y, needs=(), **CASE["strided"].keywords)
    names = [name for name, *_ in cp.settings.launches]
    assert names == ["conv2d_forward_atomic_f32", "conv2d_backward_atomic_f32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_batch_is_split_to_stay_within_the_workspace(cp: Any, dtype: str) -> None:
    """Copies of arrays that are not dense, and the sums of float16, are made part by part."""
    c = case("batch", (5, 64, 64, 4), (1, 1, 4, 4), activation="ReLU")
    data = oracle(c, dtype)
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(2**20)
    image = 64 * 64 * 4 * np.dtype(dtype).itemsize
    try:
        dense = [cp.asarray(a.astype(dtype)) for a in (data.x, data.w, data.dy, data.y)]
        x, w, dy, y = dense
        spread = [cp.zeros((*a.shape[:3], 8), dtype)[..., ::2] for a in (x, dy, y)]
        for place, a in zip(spread, (x, dy, y), strict=True):
            place[...] = a
        for xs, dys, ys in ((x, dy, y), spread):
            cp.settings.launches.clear()
            out = cp.empty((*y.shape[:3], 8), dtype)[..., ::2] if xs is not x else None
            b = cp.asarray(data.b)
            got = gpuconv.conv2d(xs, w, b, out=out, activation="ReLU")
            forward = len(cp.settings.launches)
            grads = gpuconv.conv2d_backward(dys, xs, w, y=ys, activation="ReLU")
            backward = len(cp.settings.launches) - forward
            copies = (2 * image, 3 * image) if xs is not x else (0, 0)
            sums = 4 * 64 * 64 * 4 if dtype == "float16" else 0
            for count, example in ((forward, copies[0]), (backward, copies[1] + sums)):
                assert count == (-(-5 // (2**20 // example)) if example else 1)
            wanted = (data.y, data.dx, data.dw, data.db)
            for a, want in zip((got, *grads), wanted, strict=True):
                close(host(a), want, tolerance("cuda_atomic", dtype, 20480))
    finally:
        gpuconv.set_workspace_limit(before)


def test_an_empty_batch_launches_nothing(cp: Any) -> None:
    with named_ranges():
        gpuconv.conv2d(cp.zeros((0, 4, 4, 2)), cp.zeros((3, 3, 2, 2)))
    assert cp.settings.launches == []
    assert cp.cuda.nvtx.ranges == []


def test_every_pass_sits_in_a_named_range(cp: Any) -> None:
    compute(cp, CASE["first-strided"], "float32")
    assert cp.cuda.nvtx.ranges == []  # nobody looks
    with named_ranges():
        compute(cp, CASE["first-strided"], "float32")
    forward = "[cuda_atomic float32 channels_first 2x9x8x4 * 3x3x2x4]"
    assert cp.cuda.nvtx.ranges == [
        ("gpuconv.conv2d.forward" + forward, 0),
        ("gpuconv.conv2d.backward" + forward, 0),
    ]
    assert cp.cuda.nvtx.open == []


def test_passes_of_a_backward_in_parts_have_ranges_within_its_own(
    cp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_atomic.CudaAtomic, "fused_backward", False)
    oracle(CASE["strided"], "float32")  # made before: its passes have ranges too
    with named_ranges():
        agree(cp, CASE["strided"], "float32")
    what = "[cuda_atomic float32 channels_last 2x9x8x3 * 3x3x3x4]"
    assert cp.cuda.nvtx.ranges[1:] == [
        ("gpuconv.conv2d.backward" + what, 0),
        ("gpuconv.conv2d.input_grad" + what, 1),
        ("gpuconv.conv2d.weight_grad" + what, 1),
    ]


def test_a_range_ends_where_a_launch_fails(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise MemoryError

    oracle(CASES[0], "float32")  # made before: its passes have ranges too
    monkeypatch.setattr(kernels, "prepare", refuse)
    with pytest.raises(MemoryError), named_ranges():
        compute(cp, CASES[0], "float32")
    assert len(cp.cuda.nvtx.ranges) == 1
    assert cp.cuda.nvtx.open == []


def test_a_device_computes_its_own_arrays() -> None:
    """On the arrays' device, whichever is the current one; a module a device."""
    if real_gpu():
        pytest.skip("asks for two devices")
    reason = compiler_available()
    if reason:
        pytest.skip(reason)
    from tests.cuda_on_cpu import stand_in

    data = oracle(CASES[0], "float32")
    with stand_in(devices=2) as cp:
        with cp.cuda.Device(1):
            x, w = cp.asarray(data.x), cp.asarray(data.w)
        y = gpuconv.conv2d(x, w, **CASES[0].keywords)
        assert y.device.id == 1
        assert cp.cuda.runtime.getDevice() == 0
        assert {device for device, _ in kernels._modules} == {1}


def test_an_activation_of_ones_own_is_refused(cp: Any) -> None:
    class Mine(ReLU):
        pass

    x, w = cp.zeros((1, 4, 4, 2)), cp.zeros((3, 3, 2, 2))
    with pytest.raises(gpuconv.EngineError, match="no kernel computes the activation Mine"):
        gpuconv.conv2d(x, w, activation=Mine())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "activation",
    ["Affine(2, 1)", "ReLU", "LeakyReLU(0.1)", "ELU(0.5)", "SELU", "GELU", "GELU(approximate=False)",
     "Tanh", "Sigmoid", "HardSigmoid", "SoftPlus", "Exponential"],
)  # fmt: skip
def test_activations(xp: Any, activation: str, dtype: str) -> None:
    c = case("activation", (1, 5, 4, 2), (2, 2, 2, 3), activation=activation)
    if "GELU" in activation:
        x, w, b = (a.astype(dtype) for a in np.random.default_rng(0).standard_normal((3, 2, 2)))
        x, w, b = x.reshape(1, 2, 2, 1), w.reshape(1, 1, 1, 4), b.ravel()
        got = gpuconv.conv2d(*map(xp.asarray, (x, w, b)), activation=activation)
        with gpuconv.engine("naive"):
            want = gpuconv.conv2d(*(a.astype("f8") for a in (x, w, b)), activation=activation)
        close(host(got), want, tolerance("cuda_atomic", dtype, 1))
    else:
        agree(xp, c, dtype)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(convolutions())
def test_random_convolutions(c: Case) -> None:
    with home("cuda_atomic") as xp, gpuconv.engine("cuda_atomic"):
        for got, want in compute(xp, c, "float64"):
            close(host(got), want, 1e-11)


# ---------------------------------------------------------------------------------------- watched

WATCHED = [
    (c.name, dtype)
    for c in CASES
    for dtype in DTYPES
    if dtype == "float32" or c.name in ("dense", "grouped", "first-layout", "first-strided")
]


@pytest.mark.parametrize(("name", "dtype"), WATCHED)
def test_every_access_is_within_bounds_and_free_of_races(name: str, dtype: str) -> None:
    for seed in (1, 2):
        with home("cuda_atomic", "checked", seed) as xp, gpuconv.engine("cuda_atomic"):
            agree(xp, CASE[name], dtype)


def test_address_sanitizer_finds_nothing() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py",
        "-k", "cuda_atomic",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= len(CASES) * len(DTYPES) * 5
    assert "skipped" not in done.stdout


# --------------------------------------------------------------------------------- broken kernels


@dataclass(frozen=True)
class Mutation:
    """A change of kernels/conv_atomic.cu for the worse, and who notices it."""

    old: str
    new: str
    cases: tuple[str, ...]
    error: type[Exception]
    message: str


PLAIN = r"race: .* with no barrier between \[conv_atomic.cu:\d+\]"
MUTATIONS = {
    "plain store into dx": Mutation(
        "atomicAdd(&dx[at_x], ", "dx[at_x] += (", ("dense",), KernelError, PLAIN),
    "plain store into dw": Mutation(
        "atomicAdd(&dw[at_w], ", "dw[at_w] += (", ("dense",), KernelError, PLAIN),
    "plain store into db": Mutation(
        "atomicAdd(&db[at.c], ", "db[at.c] += (", ("dense",), KernelError, PLAIN),
    "no test of the first row": Mutation(
        "if (r < 0 || r >= H)", "if (r >= H)", ("dense",), KernelError, "out of bounds"),
    "no test of the last row": Mutation(
        "if (r < 0 || r >= H)", "if (r < 0)", ("dense",), KernelError, "out of bounds"),
    "no test of columns": Mutation(
        "if (s < 0 || s >= W) continue;", "", ("dense",), Exception, "out of bounds|error .* >"),
    "one element too many": Mutation(
        "e < elements", "e <= elements", ("dense",), KernelError, "out of bounds"),
    "no grid stride": Mutation(
        "e += threads", "e += elements", ("large",), AssertionError, "error nan"),
    "a bias that is not there": Mutation(
        "if (b != nullptr) ", "", ("no-bias",), KernelError, "null pointer"),
    "groups forgotten": Mutation(
        "first + k", "k", ("grouped",), AssertionError, "error"),
    "stride forgotten": Mutation(
        "at.i * SH", "at.i", ("strided",), AssertionError, "error"),
    "dilation forgotten": Mutation(
        "q * DW", "q", ("dilated",), AssertionError, "error"),
    "padding forgotten": Mutation(
        " - left", "", ("dense",), AssertionError, "error"),
    "derivative forgotten": Mutation(
        "if (y != nullptr) d *=", "if (y != nullptr) (void)", ("strided",), AssertionError, "error"),
    "layouts confused": Mutation(
        "(((n * C + k) * D + u) * H + r) * W + s", "(((n * D + u) * H + r) * W + s) * C + k",
        ("first-layout",),
        AssertionError, "error"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if real_gpu():
        pytest.skip("breaks kernels, which a GPU may not survive")
    mutation = MUTATIONS[name]
    text = kernels.read("conv_atomic.cu")
    broken = text.replace(mutation.old, mutation.new)
    assert broken != text
    monkeypatch.setattr(kernels, "read", lambda file: broken)
    large = case("large", (1, 96, 96, 1), (1, 1, 1, 1))
    with home("cuda_atomic", "checked", 1) as xp, gpuconv.engine("cuda_atomic"):
        for chosen in mutation.cases:
            with pytest.raises(mutation.error, match=mutation.message):
                agree(xp, {**CASE, "large": large}[chosen], "float32")
