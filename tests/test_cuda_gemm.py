"""The engine cuda_gemm beyond the conformance suite: parts, products, copies that are not made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import gpuconv
from gpuconv import dispatch
from gpuconv.cuda import cublas
from tests.cuda_on_cpu import sanitizer
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

CASE = {c.name: c for c in CASES}
FIRST = [c for c in CASES if c.layout == "NCHW"]


@pytest.fixture
def cp() -> Iterator[Any]:
    """The stand-in, whose records tests look at; the engine forced."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with home("cuda_gemm") as module, gpuconv.engine("cuda_gemm"):
        yield module


def agree(xp: Any, c: Case, dtype: str) -> None:
    for got, want in compute(xp, c, dtype):
        close(host(got), want, tolerance("cuda_gemm", dtype, 200))


@pytest.fixture
def workspace() -> Iterator[Any]:
    """Set the limit of the workspace, in bytes however few."""
    before = gpuconv.get_workspace_limit()

    def limit(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gpuconv.settings._workspace_limit", size)
        gpuconv.settings.changed()

    yield limit
    gpuconv.set_workspace_limit(before)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize(
    "name", ["dense", "strided", "dilated-strided", "grouped", "one-by-one", "same",
             "first-layout", "first-strided", "first-one-by-one", "depthwise-first"],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 1500, 8000])
def test_examples_are_divided_to_stay_within_the_workspace(
    cp: Any, monkeypatch: pytest.MonkeyPatch, workspace: Any, name: str, dtype: str, size: int
) -> None:
    """To single positions, to parts of an example, to some examples of a batch."""
    workspace(size, monkeypatch)
    agree(cp, CASE[name], dtype)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_no_more_memory_is_taken_than_promised(cp: Any, layout: str) -> None:
    c = case("batch", (7, 40, 40, 4), (3, 3, 4, 4), padding=1, layout=layout)
    data = oracle(c, "float32", "numpy_gemm")
    gpuconv.set_workspace_limit(2**20)
    try:
        x, w, dy = map(cp.asarray, (data.x, data.w, data.dy))
        memory = cp._home
        for call, result, name in (
            (lambda: gpuconv.conv2d(x, w, **c.keywords), dy.nbytes, "forward"),
            (lambda: gpuconv.conv2d_backward(dy, x, w, needs="x", **c.keywords)[0], x.nbytes,
             "input_grad"),
            (lambda: gpuconv.conv2d_backward(dy, x, w, needs="w", **c.keywords)[1], w.nbytes,
             "weight_grad"),
        ):  # fmt: skip
            memory.peak = memory.used
            before = memory.used
            got = call()
            used = memory.peak - before - result
            promised = dispatch.get_engine("cuda_gemm").workspace(
                gpuconv.explain(x.shape, w.shape, **c.keywords).problem, name
            )
            assert used <= promised <= 2**20, name
            del got
        assert len(cp.cuda.cublas.products) >= 3 * 4
    finally:
        gpuconv.set_workspace_limit(256 * 2**20)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_window_of_one_element_is_not_copied(cp: Any, layout: str) -> None:
    c = case("one", (3, 4, 5, 6), (1, 1, 6, 4), bias=False, layout=layout)
    data = oracle(c, "float32")
    x, w, dy = map(cp.asarray, (data.x, data.w, data.dy))
    cp.settings.launches.clear()
    gpuconv.conv2d(x, w, **c.keywords)
    gpuconv.conv2d_backward(dy, x, w, needs="x", **c.keywords)
    assert cp.settings.launches == []
    assert len(cp.cuda.cublas.products) == 2


def test_products_are_ieee_unless_tf32_is_asked_for(
    cp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_TF32", "1")
    ieee, wide, tf32 = 68, 70, 77
    for dtype, precision, number in (
        ("float32", "default", ieee), ("float32", "strict", ieee), ("float32", "tf32", tf32),
        ("float16", "tf32", ieee), ("float64", "tf32", wide),
    ):  # fmt: skip
        gpuconv.set_precision(precision)
        try:
            gpuconv.conv2d(cp.ones((1, 3, 3, 2), dtype), cp.ones((2, 2, 2, 2), dtype))
        finally:
            gpuconv.set_precision("default")
        assert cp.cuda.cublas.products[-1].compute == number


def test_a_sum_of_16_bit_numbers_is_held_in_32_over_all_parts(
    cp: Any, monkeypatch: pytest.MonkeyPatch, workspace: Any
) -> None:
    """4097 is no float16: a part's sum must not be rounded before the next is added."""
    half = 2052
    workspace(half * 2, monkeypatch)
    x, dy = np.zeros((1, 1, 4 * half, 1), "float16"), np.ones((1, 1, 2 * half, 1), "float16")
    seen = x[0, 0, ::2, 0]
    seen[:2048], seen[2048] = 2, 1
    seen[half : half + 2048] = -2
    w, options = cp.ones((1, 1, 1, 1), "float16"), {"stride": (1, 2), "needs": "w"}
    _, dw, _ = gpuconv.conv2d_backward(cp.asarray(dy), cp.asarray(x), w, **options)
    assert len(cp.cuda.cublas.products) == 2
    assert float(host(dw).ravel()[0]) == 1


def test_offsets_of_64_bits_give_the_same(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = count_in_64_bits(monkeypatch)
    for name in ("dilated-strided", "grouped", "first-strided"):
        agree(cp, CASE[name], "float32")
    assert used
    assert all(("INDEX_64", "1") in v.defines for v in used if v.file != "epilogue.cu")


def test_a_tensor_of_more_than_2_to_the_31_elements(cp: Any) -> None:
    """Its far corners are read where they are; a 32-bit offset would wrap around."""
    far_corners(cp, ())


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(convolutions())
def test_random_convolutions(c: Case) -> None:
    with home("cuda_gemm") as xp, gpuconv.engine("cuda_gemm"):
        for got, want in compute(xp, c, "float64"):
            close(host(got), want, 1e-11)


@pytest.mark.parametrize("name", ["dense", "strided", "grouped", "first-layout", "first-strided"])
def test_every_access_is_within_bounds_and_free_of_races(name: str) -> None:
    with home("cuda_gemm", "checked", 1) as xp, gpuconv.engine("cuda_gemm"):
        agree(xp, CASE[name], "float32")


def test_address_sanitizer_finds_nothing() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py",
        "-k", "cuda_gemm and xwb and float32 and (same or first-strided)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 2
    assert "skipped" not in done.stdout


def test_what_is_no_matrix_is_refused(cp: Any) -> None:
    def matrices(array: Any) -> cublas.Matrices:
        return cublas.Matrices.of(array, array)

    a, b = cp.ones((1, 4, 8), "float32")[:, :, ::2], matrices(cp.ones((1, 4, 3), "float32"))
    with pytest.raises(ValueError, match="a matrix has steps"):
        cublas.prepare(matrices(a), b, b)
    turned = (matrices(cp.ones((1, n, 4), "float32").transpose(0, 2, 1)) for n in (4, 3))
    with pytest.raises(ValueError, match="c has steps"):
        cublas.prepare(next(turned), b, next(turned))
