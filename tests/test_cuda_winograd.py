"""The engine cuda_winograd beyond the conformance suite: rounding, cuts, what is not finite."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.cuda import kernels
from gpuconv.cuda.architecture import GPU, architecture
from gpuconv.engines import cuda_winograd, cuda_winograd_plan
from gpuconv.engines.base import PASSES
from gpuconv.engines.toom_cook import filtering
from gpuconv.functional.plan import make_plan
from gpuconv.problem import ConvProblem
from tests.cuda_on_cpu import KernelError, sanitizer
from tests.cuda_on_cpu.arrays import ndarray
from tests.support import (
    Case,
    case,
    close,
    count_in_64_bits,
    home,
    host,
    oracle,
    real_gpu,
    tolerance,
)
from tests.test_conformance import problem_of

ENGINE = "cuda_winograd"
SMALL = {
    c.name: c
    for c in (
        case("last", (2, 7, 9, 3), (3, 3, 3, 5), padding=1, activation="ReLU"),
        case("first", (2, 9, 7, 5), (3, 3, 5, 3), padding=1, activation="ReLU", layout="NCHW"),
        case("grouped", (1, 8, 5, 6), (3, 3, 2, 9), groups=3, padding=((2, 0), (1, 3))),
        case("grouped-first", (2, 6, 7, 6), (3, 3, 3, 4), groups=2, layout="NCHW", bias=False),
        case("far-padding", (1, 4, 3, 2), (3, 3, 2, 2), padding=((4, 5), (3, 0))),
        case("one-output", (3, 3, 3, 2), (3, 3, 2, 4), activation="Tanh"),
    )
}


@pytest.fixture
def xp() -> Iterator[Any]:
    """The device's array library, the engine forced."""
    with home(ENGINE) as module, gpuconv.engine(ENGINE):
        yield module


@pytest.fixture
def cp() -> Iterator[Any]:
    """The stand-in, whose records tests look at."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with home(ENGINE) as module, gpuconv.engine(ENGINE):
        yield module


def make_problem(x: Any, w: Any, **options: Any) -> ConvProblem:
    o = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "layout": "NHWC", **options}
    return make_plan(2, x, w, "float32", *o.values(), None).problem


def compute(xp: Any, c: Case, dtype: str) -> list[tuple[Any, np.ndarray]]:
    """Return y, dx, dw and db, each beside the oracle's."""
    data = oracle(c, dtype)
    x, w, dy = (xp.asarray(a) for a in (data.x, data.w, data.dy))
    b = None if data.b is None else xp.asarray(data.b)
    y = gpuconv.conv2d(x, w, b, **c.keywords)
    seen = xp.asarray(data.y.astype(dtype)) if c.activation else None
    grads = gpuconv.conv2d_backward(dy, x, w, y=seen, **c.keywords)
    return list(zip([y, *grads], [data.y, data.dx, data.dw, data.db], strict=True))


def agree(xp: Any, c: Case, dtype: str) -> None:
    problem = problem_of(c, dtype)
    lengths = [problem.reduction_length(p) for p in (*PASSES, "weight_grad")]
    for (got, want), length in zip(compute(xp, c, dtype), lengths, strict=True):
        close(host(got), want, tolerance(ENGINE, dtype, length))


# -------------------------------------------------------------------------------- the transforms


@pytest.mark.parametrize("tile", [2, 4, 6])
@pytest.mark.parametrize("name", SMALL)
def test_every_tile(xp: Any, monkeypatch: pytest.MonkeyPatch, name: str, tile: int) -> None:
    monkeypatch.setattr(cuda_winograd_plan, "TILES", (tile,))
    cuda_winograd_plan.plan_of.cache_clear()
    try:
        agree(xp, SMALL[name], "float32")
    finally:
        cuda_winograd_plan.plan_of.cache_clear()


@pytest.mark.parametrize("tile", [2, 4, 6])
def test_the_matrices_are_those_of_the_engine_on_the_cpu(tile: int) -> None:
    defines = dict(cuda_winograd._variant("float32", tile, False).defines)
    method = filtering(tile, 3)
    for name, matrix in (("A", method.a), ("BT", method.b), ("G", method.g)):
        text = defines[f"TABLE_{name}"].replace("{", "[").replace("}", "]")
        np.testing.assert_array_equal(ast.literal_eval(text), matrix)
    assert int(defines["TILE"]) == tile


def test_the_tile_follows_the_size() -> None:
    """Small images take small tiles, which reach less far beyond the edge."""
    h100 = GPU(architecture(90), 90, 132, 1.755e9, 3.35e12, 50 << 20)
    chosen = []
    for size in (1, 16, 60):
        problem = make_problem((32, size + 2, size + 2, 256), (3, 3, 256, 256))
        plans = [
            cuda_winograd_plan.cut(problem, "forward", tile, 2**28, h100) for tile in (2, 4, 6)
        ]
        chosen.append(min(plans, key=lambda plan: plan.seconds).tile)
    assert chosen == [2, 4, 6]


@st.composite
def scaled(draw: Any) -> tuple[Case, float, float, float]:
    """Draw a convolution, an offset of its input, and the width of both operands' ranges."""
    groups = draw(st.sampled_from([1, 1, 2]))
    pads = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
    sizes = [draw(st.integers(3, 14)) for _ in range(2)]
    inputs, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    c = case(
        "scaled",
        (draw(st.integers(1, 3)), *sizes, groups * inputs),
        (3, 3, inputs, groups * outputs),
        groups=groups,
        padding=pads,
        layout=draw(st.sampled_from(["NHWC", "NCHW"])),
        bias=False,
    )
    return c, draw(st.sampled_from([0, 1, -1e3, 1e6])), *(draw(st.floats(0, 6)) for _ in range(2))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(scaled())
def test_large_offsets_and_wide_ranges(drawn: tuple[Case, float, float, float]) -> None:
    """Ten times the definition's bound on rounding, relative to the operands' sizes."""
    c, offset, *widths = drawn
    rng = np.random.default_rng(1)
    problem = make_problem(c.x, c.w, **dict(c.options))
    x, w, dy = (
        rng.standard_normal(shape) * 10 ** (width * rng.uniform(-1, 0, shape))
        for shape, width in zip((c.x, c.w, problem.y_shape), (*widths, widths[0]), strict=True)
    )
    x += offset
    if c.layout == "NCHW":
        x, w, dy = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), dy.transpose(0, 3, 1, 2)
    x, w, dy = (np.ascontiguousarray(a, "float32") for a in (x, w, dy))
    with gpuconv.engine("numpy_gemm"):
        arrays = [a.astype("float64") for a in (dy, x, w)]
        wanted = [
            gpuconv.conv2d(*arrays[1:], **c.keywords),
            *gpuconv.conv2d_backward(*arrays, **c.keywords, needs="xw")[:2],
        ]
    with home(ENGINE) as xp, gpuconv.engine(ENGINE):
        device = [xp.asarray(a) for a in (dy, x, w)]
        got = [
            gpuconv.conv2d(*device[1:], **c.keywords),
            *gpuconv.conv2d_backward(*device, **c.keywords, needs="xw")[:2],
        ]
        got = list(map(host, got))
    largest = [np.abs(a).max() for a in (dy, x, w)]
    scales = largest[1] * largest[2], largest[0] * largest[2], largest[0] * largest[1]
    for value, want, scale, p in zip(got, wanted, scales, PASSES, strict=True):
        length = problem.reduction_length(p)
        error = np.abs(value - want).max() / scale
        assert error <= 1e-4 * length**0.5, (p, error)


# ------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_what_the_definition_says_is_not_finite(
    xp: Any, layout: str, bad: float, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 13, 11)), rng.standard_normal((6, 2, 3, 3))
    dy = rng.standard_normal((2, 6, 13, 11))
    x[1, 1, 6, 5] = dy[0, 4, 0, 0] = bad
    if layout == "NHWC":
        x, w, dy = x.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0), dy.transpose(0, 2, 3, 1)
    x, w, dy = (np.ascontiguousarray(a, dtype) for a in (x, w, dy))
    options: dict[str, Any] = {"padding": 1, "groups": 2, "layout": layout}

    def results(arrays: Any) -> list[Any]:
        dy, x, w = arrays
        y = gpuconv.conv2d(x, w, **options)
        return [y, *gpuconv.conv2d_backward(dy, x, w, needs="xw", **options)[:2]]

    got = results(map(xp.asarray, (dy, x, w)))
    with gpuconv.engine("naive"), np.errstate(all="ignore"):
        wanted = results(a.astype("float64") for a in (dy, x, w))
    for value, want in zip(got, wanted, strict=True):
        finite = np.isfinite(want)
        assert 0 < finite.sum() < finite.size
        np.testing.assert_array_equal(host(value)[~finite], want[~finite])
        allowed = 1e-2 if dtype == "float16" else 1e-3
        np.testing.assert_allclose(host(value)[finite], want[finite], rtol=0, atol=allowed * 10)


def test_an_overflow_of_the_transforms_alone_is_not_seen(xp: Any) -> None:
    """Sums that are finite although the transforms of their terms are not."""
    x = np.full((1, 6, 6, 1), 1e38, "float32")
    w = np.zeros((3, 3, 1, 1), "float32")
    w[1, 1] = 0.5
    y = host(gpuconv.conv2d(xp.asarray(x), xp.asarray(w), padding=1))
    np.testing.assert_array_equal(y, x / 2)
    dw = host(gpuconv.conv2d_backward(
        xp.asarray(x[:, 2:, 2:] * 1e-38), xp.asarray(x * 0.1), xp.asarray(w), needs="w")[1])  # fmt: skip
    np.testing.assert_allclose(dw, np.full_like(w, 16 * 1e37), rtol=1e-4)


# ------------------------------------------------------------------------------------------- cuts


def test_the_tiles_are_cut_to_stay_within_the_workspace(cp: Any) -> None:
    """Chunk by chunk, the weight gradient's sums over them too; in a fixed order."""
    cases = [
        case("cut", (3, 20, 18, 48), (3, 3, 48, 32), padding=1, activation="ReLU"),
        case("cut-first", (3, 19, 24, 32), (3, 3, 32, 48), padding=1, layout="NCHW"),
    ]
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(2**20)
    try:
        for c in cases:
            data = oracle(c, "float32")
            x, w, dy = (cp.asarray(a) for a in (data.x, data.w, data.dy))
            y = cp.empty(data.y.shape, "float32")
            cp.settings.launches.clear()
            held = cp._home.peak = cp._home.used
            gpuconv.conv2d(x, w, out=y, **c.keywords)
            names = [name for name, *_ in cp.settings.launches]
            assert names.count("conv2d_winograd_filters_f32") == 1
            assert names.count("conv2d_winograd_output_f32") > 1
            assert cp._home.peak - held <= 2**20
            held = cp._home.peak = cp._home.used
            runs = [gpuconv.conv2d_backward(dy, x, w, needs="w", layout=c.layout, padding=1)[1]
                    for _ in range(2)]  # fmt: skip
            assert cp._home.peak - held <= 2**20 + 2 * w.nbytes
            assert host(runs[0]).tobytes() == host(runs[1]).tobytes()
            agree(cp, c, "float32")
            for p in PASSES:
                plan = cuda_winograd._planned(problem_of(c, "float32"), p)
                assert plan.workspace <= 2**20
                assert plan.tiles > plan.chunk
    finally:
        gpuconv.set_workspace_limit(before)


@pytest.mark.parametrize("name", ["last", "first", "grouped"])
def test_the_weight_gradient_is_cut_into_partial_products(
    xp: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cuda_winograd_plan, "_segments", lambda *a: 3)
    cuda_winograd_plan.plan_of.cache_clear()
    try:
        c = SMALL[name]
        assert cuda_winograd._planned(problem_of(c, "float32"), "weight_grad").segments == 3
        agree(xp, c, "float32")
    finally:
        cuda_winograd_plan.plan_of.cache_clear()


def test_a_gradient_of_few_channels_fills_the_device() -> None:
    problem = make_problem((32, 56, 56, 64), (3, 3, 64, 64), padding=1)
    counts = [cuda_winograd_plan._segments(problem, 36, 6272, sms) for sms in (1, 108, 132, 1000)]
    assert counts == [1, 6, 7, 12]


@pytest.mark.parametrize("name", ["last", "first", "grouped"])
def test_offsets_of_64_bits_give_the_same(
    xp: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    narrow = [host(got) for got, _ in compute(xp, SMALL[name], "float32")]
    used = count_in_64_bits(monkeypatch)
    wide = [host(got) for got, _ in compute(xp, SMALL[name], "float32")]
    assert used
    assert all(("INDEX_64", "1") in v.defines for v in used if v.file != "epilogue.cu")
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(a, b)


def test_far_offsets_are_held_in_64_bits(xp: Any) -> None:
    """A view whose elements lie far apart, though they are few."""
    plan = cuda_winograd._planned(problem_of(SMALL["last"], "float32"), "forward")

    class View:
        shape, strides, itemsize = (2, 3, 3, 1), (4 * 2**31, 12, 4, 4), 4

    near: Any = xp.zeros((2, 3, 3, 1), "float32")
    view: Any = View()
    assert cuda_winograd._needs_wide_index(plan, 1, (near, view))
    assert not cuda_winograd._needs_wide_index(plan, 1, (near, near))


# -------------------------------------------------------------------------------------- behaviour


def test_weights_that_change_in_place_count(xp: Any) -> None:
    data = oracle(SMALL["last"], "float32")
    x, w = xp.asarray(data.x), xp.asarray(data.w)
    first = host(gpuconv.conv2d(x, w, padding=1))
    w *= 2
    np.testing.assert_allclose(host(gpuconv.conv2d(x, w, padding=1)), 2 * first, rtol=1e-5)


def test_nothing_waits_for_the_device(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result is read by the host in between: a call can be captured in a graph."""
    data = oracle(SMALL["last"], "float32")
    x, w, dy = (cp.asarray(a) for a in (data.x, data.w, data.dy))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the host reads what the device computes")

    gpuconv.conv2d(x, w, padding=1)  # finds the device
    cp.settings.launches.clear()
    for name in ("get", "__bool__", "__int__", "__float__", "item", "tolist"):
        monkeypatch.setattr(ndarray, name, refuse)
    gpuconv.conv2d(x, w, padding=1)
    gpuconv.conv2d_backward(dy, x, w, padding=1)
    launched = [name for name, *_ in cp.settings.launches if "_winograd_" in name]
    names = [name.split("_")[2] for name in launched]
    assert names == ["filters", "input", "output"] * 2 + ["input", "gradient", "filter"]


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "reason"),
    [
        ((1, 9, 9, 2), (5, 5, 2, 2), {}, "3x3 taps"),
        ((1, 9, 9, 2), (3, 3, 2, 2), {"stride": 2}, "stride 1"),
        ((1, 9, 9, 2), (3, 3, 2, 2), {"dilation": 2}, "dilation 1"),
        ((1, 5, 5, 1200), (3, 3, 1200, 1200), {}, "workspace limit"),
    ],
)
def test_what_it_does_not_compute(
    xp: Any, shape: Any, kernel: Any, options: dict[str, Any], reason: str
) -> None:
    x, w = xp.zeros(shape, "float64"), xp.zeros(kernel, "float64")
    with pytest.raises(gpuconv.EngineError, match=reason):
        gpuconv.conv2d(x, w, **options)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_transposed_convolution(xp: Any, dtype: str) -> None:
    """Its passes are the same ones in other roles; its weight gradient is held in float32."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(dtype) for s in ((2, 5, 6, 3), (3, 3, 3, 4)))
    options: dict[str, Any] = {"padding": 1, "activation": "ReLU"}

    def results(xp: Any, *arrays: np.ndarray) -> list[Any]:
        x, w = (xp.asarray(a) for a in arrays)
        y = gpuconv.conv_transpose2d(x, w, **options)
        return [y, *gpuconv.conv_transpose2d_backward(y, x, w, y=y, **options)]

    with gpuconv.engine("naive"):
        wanted = results(np, x.astype("float64"), w.astype("float64"))
    for got, want in zip(results(xp, x, w), wanted, strict=True):
        assert got.dtype == dtype
        close(host(got), want, 1e-2 if dtype == "float16" else 1e-4)


def test_strict_precision_leaves_it_out(xp: Any) -> None:
    x, w = xp.zeros((1, 5, 5, 1), "float32"), xp.zeros((3, 3, 1, 1), "float32")
    gpuconv.conv2d(x, w)
    gpuconv.set_precision("strict")
    try:
        with pytest.raises(gpuconv.EngineError, match="strict"):
            gpuconv.conv2d(x, w)
    finally:
        gpuconv.set_precision("default")


# ---------------------------------------------------------------------------------------- watched


@pytest.mark.parametrize("name", SMALL)
def test_every_access_is_within_bounds_and_free_of_races(name: str) -> None:
    with home(ENGINE, "checked", 1) as xp, gpuconv.engine(ENGINE):
        agree(xp, SMALL[name], "float32")


def test_address_sanitizer_finds_nothing() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py",
        "-k", f"{ENGINE} and float32 and (dense or asymmetric or grouped or first-layout)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 20
    assert "skipped" not in done.stdout


@dataclass(frozen=True)
class Mutation:
    """A change of kernels/winograd.cu for the worse, and who notices it."""

    old: str
    new: str
    case: str
    error: type[Exception]
    message: str


OUT = "out of bounds"
MUTATIONS = {
    "no test of the first row": Mutation("row + i >= 0 && ", "", "last", Exception, f"{OUT}|error"),
    "no test of columns": Mutation(
        "column + j >= 0 && column + j < W", "true", "last", Exception, f"{OUT}|error"),
    "tiles behind the last": Mutation(
        "if (at.a >= count) return;", "", "last", KernelError, OUT),
    "rows behind the last": Mutation(
        "tile.row + i < OH && ", "", "last", Exception, f"{OUT}|race|error"),
    "one thread too many": Mutation("if (e >= work) return;", "", "last", KernelError, OUT),
    "what tiles share is added once": Mutation(
        "sum + m * in[j]", "m * in[j]", "one-output", AssertionError, "error"),
    "padding forgotten": Mutation("tile.row - top,", "tile.row,", "last", AssertionError, "error"),
    "groups forgotten": Mutation(
        "g * step.group + at.a", "at.a", "grouped", AssertionError, "error"),
    "layouts confused": Mutation(
        "by_channel ? c * per_segment + t", "false ? c", "first", AssertionError, "error"),
    "bias forgotten": Mutation(
        "activate(out[j] + b)", "activate(out[j])", "last", AssertionError, "error"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if real_gpu():
        pytest.skip("breaks kernels, which a GPU may not survive")
    mutation = MUTATIONS[name]
    read = kernels.read
    text = read("winograd.cu")
    broken = text.replace(mutation.old, mutation.new)
    assert broken != text
    monkeypatch.setattr(
        kernels, "read", lambda file: broken if file == "winograd.cu" else read(file)
    )
    with (
        home(ENGINE, "checked", 1) as xp,
        gpuconv.engine(ENGINE),
        pytest.raises(mutation.error, match=mutation.message),
    ):
        agree(xp, SMALL[mutation.case], "float32")
