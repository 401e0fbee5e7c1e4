"""``conv_wgmma.cu`` behind the engine cuda_tensor_core: compute capability 9.0 and its tiles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.cuda import architecture, kernels, prepared, tensor_tiles, wgmma_tiles
from gpuconv.cuda.tensor_tiles import Product
from gpuconv.cuda.wgmma_tiles import TILES, Choice, Tile
from gpuconv.engines import cuda_tensor_core, tensor_wgmma
from gpuconv.functional.plan import make_plan
from gpuconv.problem import ConvProblem
from tests.cuda_on_cpu import sanitizer
from tests.support import CASES, Case, case, close, count_in_64_bits, host, real_gpu
from tests.test_cuda_tensor_core import ALLOWED, PASSES, agree, device, draw

NAME = "cuda_tensor_core"
SMALLEST = TILES[-1]
H100 = architecture.GPU(architecture.architecture(90), 90, 132, 1.755e9, 3.35e12, 50 << 20)


def eightfold(c: Case) -> Case:
    """Return the case with eight times the channels, which TMA can copy.

    Activations that squash would leave of larger sums their errors alone: ReLU in their place.
    """
    activation = "ReLU" if c.activation else None
    w = (*c.w[:-2], 8 * c.w[-2], 8 * c.w[-1])
    return replace(c, x=(*c.x[:-1], 8 * c.x[-1]), w=w, activation=activation)


EIGHTFOLD = {c.name: eightfold(c) for c in CASES}


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return what makes every product that wgmma can do take a tile and a number of splits."""

    def forced(tile: Tile = SMALLEST, splits: int = 1) -> None:
        prepared.clear()

        def choose(gpu: Any, product: Product, rows: Any, room: int) -> Choice:
            return Choice(tile, splits, -1.0)

        monkeypatch.setattr(wgmma_tiles, "choose", choose)

    yield forced
    prepared.clear()


@contextmanager
def hopper(mode: str | None = None, seed: int = 0) -> Iterator[Any]:
    """The engine forced on a device of compute capability 9.0."""
    if not real_gpu():
        with device(mode, seed, capability=90) as xp:
            yield xp
        return
    if architecture.gpu().capability != wgmma_tiles.CAPABILITY:
        pytest.skip("needs compute capability 9.0")
    with device() as xp:
        kernels.clear()  # what is compiled from now on is what is launched
        yield xp


def launched(xp: Any) -> list[str]:
    if real_gpu():
        return [name for _, _, name in kernels._functions]
    return [name for name, *_ in xp.settings.launches]


@pytest.fixture
def no_gpu() -> None:
    """Skip where there is one: what is broken on purpose could hang it, or looks at the stand-in."""
    if real_gpu():
        pytest.skip("breaks or looks at the stand-in for CuPy")


def by_wgmma(xp: Any) -> set[str]:
    """Return the passes that wgmma has done."""
    found = (re.fullmatch(r"conv_(\w+)_wgmma_\w+", name) for name in launched(xp))
    return {m[1] for m in found if m}


def problem_of(
    x: tuple[int, ...], w: tuple[int, ...], dtype: str = "float16", **options: Any
) -> ConvProblem:
    values = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    return make_plan(
        len(x) - 2, x, w, dtype, values["stride"], values["padding"], values["dilation"],
        values["groups"], "channels_last", None,
    ).problem  # fmt: skip


# ------------------------------------------------------------------------------------ conformance


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, list(ALLOWED)[i % 3]) for i, name in enumerate(EIGHTFOLD)]
)
def test_the_conformance_cases(force: Callable[..., None], name: str, dtype: str) -> None:
    """Each case of the suite, its channels eightfold, in all passes; wgmma does what it can."""
    c = EIGHTFOLD[name]
    force()
    with hopper() as xp:
        agree(xp, c, dtype)
        expected = set(PASSES)
        if dtype == "float32":
            expected -= {"weight_grad"}  # TF32 has no transposed operands
        options = dict(c.options)
        if options.get("groups", 1) > 1:
            expected -= {"forward", "input_grad"}  # fewer than 64 channels a group
        if name in ("stride-beyond-kernel", "stride-per-axis", "dilated-strided",
                    "padding-beyond-kernel", "depthwise-dilated"):  # fmt: skip
            expected -= {"input_grad"}  # more than four phases
        assert by_wgmma(xp) == expected


# Rows, columns and depth beyond the largest tile, none of them a multiple of anything.
LARGE = case("large", (2, 13, 11, 72), (2, 2, 72, 264), padding=1, activation="ReLU")
SMALL = case("small", (1, 9, 8, 24), (3, 2, 24, 40), padding=1, stride=(2, 1),
             activation="LeakyReLU(0.1)")  # fmt: skip


def one_pass(xp: Any, c: Case, dtype: str, pass_: str) -> None:
    """Compare one pass with NumPy's in float64."""
    (x, w, b, dy), options = draw(c, dtype)
    there = [xp.asarray(a) for a in (x, w, b, dy)]
    wide = [a.astype("f8") for a in (x, w, b, dy)]
    if pass_ == "forward":
        with gpuconv.engine("numpy_gemm"):
            want = gpuconv.conv2d(*wide[:3], activation=c.activation, **options)
        got = gpuconv.conv2d(*there[:3], activation=c.activation, **options)
    else:
        i = 0 if pass_ == "input_grad" else 1
        with gpuconv.engine("numpy_gemm"):
            want = gpuconv.conv2d_backward(wide[3], *wide[:2], needs="xw"[i], **options)[i]
        got = gpuconv.conv2d_backward(there[3], *there[:2], needs="xw"[i], **options)[i]
    close(host(got), want, ALLOWED[dtype])


@pytest.mark.parametrize(("tile", "pass_", "dtype"), [
    (TILES[0], "weight_grad", "float16"), (TILES[1], "forward", "bfloat16"),
    (TILES[1], "weight_grad", "bfloat16"), (TILES[2], "input_grad", "float16"),
    (TILES[3], "input_grad", "bfloat16"), (TILES[4], "forward", "float32"),
    (TILES[5], "forward", "float16"),
], ids=str)  # fmt: skip
def test_every_tile(force: Callable[..., None], tile: Tile, pass_: str, dtype: str) -> None:
    with hopper() as xp:
        force(tile)
        one_pass(xp, LARGE, dtype, pass_)
        end = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}[dtype]
        assert f"conv_{pass_}_wgmma_{end}_{tile}" in launched(xp)


@pytest.mark.parametrize(("splits", "dtype"), [(2, "float16"), (40, "float16")])
def test_splits_of_the_depth(force: Callable[..., None], splits: int, dtype: str) -> None:
    """With fewer steps than splits too; the same bits every time."""
    with hopper() as xp:
        force(SMALLEST, splits)
        first = agree(xp, SMALL, dtype)
        for a, b in zip(first, agree(xp, SMALL, dtype), strict=True):
            assert a.tobytes() == b.tobytes()
        assert any(name.startswith("conv_split_sum_") for name in launched(xp))


@pytest.mark.parametrize(("x", "w", "options"), [
    ((2, 21, 16), (5, 16, 24), {"stride": 2, "padding": 3, "dilation": 2}),
    ((2, 5, 4, 6, 8), (3, 2, 3, 8, 16), {"padding": 1, "dilation": (1, 2, 1)}),
    ((1, 6, 5, 4, 16), (2, 2, 3, 16, 8), {"stride": (1, 2, 2)}),
])  # fmt: skip
def test_one_and_three_axes(force: Callable[..., None], x: Any, w: Any, options: Any) -> None:
    conv = {3: (gpuconv.conv1d, gpuconv.conv1d_backward),
            5: (gpuconv.conv3d, gpuconv.conv3d_backward)}[len(x)]  # fmt: skip
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype("f2") for s in (x, w)]
    wide = [a.astype("f8") for a in arrays]
    with gpuconv.engine("numpy_gemm"):
        y = conv[0](*wide, **options)
        dy = rng.standard_normal(y.shape).astype("f2")
        want = [y, *conv[1](dy.astype("f8"), *wide, needs="xw", **options)[:2]]
    force()
    with hopper() as xp:
        there = [xp.asarray(a) for a in arrays]
        got = [conv[0](*there, **options)]
        got += conv[1](xp.asarray(dy), *there, needs="xw", **options)[:2]
        assert by_wgmma(xp) == set(PASSES)
        for have, wanted in zip(map(host, got), want, strict=True):
            np.testing.assert_allclose(have, wanted, rtol=0, atol=5e-3 * abs(wanted).max())


def test_groups_of_whole_pieces(force: Callable[..., None]) -> None:
    c = case("groups", (1, 5, 6, 128), (3, 3, 64, 128), groups=2, padding=1)
    force()
    with hopper() as xp:
        agree(xp, c, "float16")
        assert by_wgmma(xp) == set(PASSES)


def test_nan_and_infinity_stay_in_their_group_and_their_window(
    force: Callable[..., None],
) -> None:
    """Channels and pixels that a copy brings beside what is wanted count for nothing."""
    force()
    with hopper() as xp:
        for groups, c in ((1, 72), (2, 128)):
            x = np.zeros((2, 7, 7, c), "f2")
            x[0, 1, 1, 3], x[1, 5, 5, c - 1] = np.nan, np.inf
            w = np.ones((3, 3, c // groups, 16), "f2")
            y = host(gpuconv.conv2d(xp.asarray(x), xp.asarray(w), padding=1, groups=groups))
            want = np.zeros((2, 7, 7, 16))
            want[0, :3, :3, : 16 // groups] = np.nan
            want[1, 4:, 4:, 16 - 16 // groups :] = np.inf
            np.testing.assert_array_equal(y, want)
            dy = np.zeros(y.shape, "f2")
            dy[0, 1, 1, 0] = np.nan
            dx = host(gpuconv.conv2d_backward(
                xp.asarray(dy), xp.asarray(np.zeros_like(x)), xp.asarray(w), padding=1, groups=groups,
                needs="x",
            )[0])  # fmt: skip
            want = np.zeros(x.shape)
            want[0, :3, :3, : c // groups] = np.nan
            np.testing.assert_array_equal(dx, want)
        assert "forward" in by_wgmma(xp)


def test_offsets_of_64_bits_give_the_same(
    force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force()
    with hopper() as xp:
        narrow = agree(xp, EIGHTFOLD["same"], "float16")
        used = count_in_64_bits(monkeypatch)
        wide = agree(xp, EIGHTFOLD["same"], "float16")
        mine = [v for v in used if v.file == "conv_wgmma.cu"]
        assert len(mine) == 3
        assert all(("INDEX_64", "1") in v.defines for v in mine)
        for a, b in zip(narrow, wide, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.usefixtures("no_gpu")
def test_the_batch_is_split_to_stay_within_the_workspace(force: Callable[..., None]) -> None:
    c = case("batch", (8, 24, 25, 96), (1, 1, 96, 16), activation="ReLU", layout="NCHW")
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(2**20)
    force()
    try:
        with hopper() as xp:
            agree(xp, c, "float16")
            names = launched(xp)
            assert sum("forward_wgmma" in name for name in names) > 1
            assert sum("weight_grad_wgmma" in name for name in names) > 1
    finally:
        gpuconv.set_workspace_limit(before)


def test_weight_gradients_of_float16_in_float32(force: Callable[..., None]) -> None:
    """What mixed training asks for, and the same bits as the sums that are rounded."""
    force()
    (x, w, _, dy), _ = draw(SMALL, "float16")
    options = {"padding": 1, "stride": (2, 1)}
    with hopper() as xp:
        there = [xp.asarray(a) for a in (dy, x, w)]
        narrow = gpuconv.conv2d_backward(*there, needs="w", **options)[1]
        problem = problem_of(x.shape, w.shape, padding=1, stride=(2, 1))
        engine = cuda_tensor_core.CudaTensorCore()
        wide = xp.empty(w.shape, "float32")
        engine.weight_grad(problem, there[0], there[1], wide, None)
        assert by_wgmma(xp) == {"weight_grad"}
        np.testing.assert_array_equal(host(wide).astype("f2"), host(narrow))


SIZES = st.integers(1, 9)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 2), SIZES, SIZES, st.sampled_from([8, 16, 72])),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 24, 80])),
    st.sampled_from([1, 2, (1, 2), (3, 1)]), st.integers(1, 2),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
)  # fmt: skip
def test_random_convolutions(x: Any, w: Any, stride: Any, dilation: int, pads: Any) -> None:
    rows = x[1] + pads[0] + pads[1] - (w[0] - 1) * dilation
    columns = x[2] + pads[2] + pads[3] - (w[1] - 1) * dilation
    if min(rows, columns) < 1:
        return
    c = case("random", x, (*w[:2], x[3], w[2]), stride=stride, dilation=dilation,
             padding=(pads[:2], pads[2:]))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, hopper() as xp:
        prepared.clear()
        patch.setattr(wgmma_tiles, "choose", lambda *_: Choice(SMALLEST, 1, -1.0))
        agree(xp, c, "float16")
        assert by_wgmma(xp) == set(PASSES)
    prepared.clear()


# ---------------------------------------------------------------------------------------- watched


@pytest.mark.parametrize(("tile", "dtype", "splits"), [
    (SMALLEST, "float16", 1), (SMALLEST, "float16", 3),
])  # fmt: skip
def test_every_access_is_within_bounds_and_free_of_races(
    force: Callable[..., None], tile: Tile, dtype: str, splits: int
) -> None:
    with hopper("checked", 1) as xp:
        force(tile, splits)
        agree(xp, SMALL, dtype)
        assert by_wgmma(xp)


def test_more_steps_than_stages_watched(force: Callable[..., None]) -> None:
    """The ring comes round: each stage is asked for again when its products are done."""
    c = case("ring", (1, 5, 12, 136), (2, 2, 136, 16))
    with hopper("checked", 3) as xp:
        force()
        one_pass(xp, c, "float16", "forward")


def test_a_single_pass(force: Callable[..., None]) -> None:
    force()
    with hopper() as xp:
        one_pass(xp, SMALL, "float16", "forward")
        assert by_wgmma(xp) == {"forward"}


def test_address_sanitizer_finds_nothing() -> None:
    missing = sanitizer.available()
    if missing:
        pytest.skip(missing)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_cuda_wgmma.py",
        "-k", "test_a_single_pass",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) == 1
    assert "skipped" not in done.stdout


# What goes wrong when a line of the kernel is lost. The ring has to come round to show some.
LOST = {
    "the wait for a stage's bytes": ("mbarrier_wait(full + stage, parity);", ""),
    "the wait for a stage to be free": ("mbarrier_wait(empty + stage, parity);", ""),
    "the release comes too early": (
        "wgmma_wait<1>();", "if (lane == 0) mbarrier_arrive(empty + stage); wgmma_wait<1>();"),
    "all bytes are announced": (
        "mbarrier_expect(barrier, BYTES);", "mbarrier_expect(barrier, BYTES - 16);"),
    "the wait for the products": ("wgmma_wait<0>();", ""),
    "the wait for the products before": ("wgmma_wait<1>();", ""),
    "the fence before products": ("    wgmma_fence();", ""),
    "the barrier behind barriers": ("__syncthreads();", ""),
    "a stage further": ("parity ^= stage == 0;\n    }", "}"),
}  # fmt: skip


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.usefixtures("no_gpu")
def test_what_is_lost_shows(
    force: Callable[..., None], monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    text = kernels.read("conv_wgmma.cu")
    before, after = LOST[lost]
    assert before in text
    broken = text.replace(before, after, 1)
    rng = np.random.default_rng(2)
    x, w = (rng.standard_normal(s).astype("f2") for s in ((1, 2, 9, 392), (1, 1, 392, 8)))
    read = kernels.read
    with hopper("checked", 1) as xp:
        force()
        there = xp.asarray(x), xp.asarray(w)
        gpuconv.conv2d(*there)
        assert by_wgmma(xp) == {"forward"}
        kernels.clear()
        monkeypatch.setattr(
            kernels, "read", lambda name: broken if name == "conv_wgmma.cu" else read(name)
        )
        with pytest.raises(Exception, match=r"race|uninitialised|without|expect|products|fence"):
            gpuconv.conv2d(*there)


# ------------------------------------------------------------------------------------- the choice


def test_what_wgmma_does_not_do_goes_on_by_mma_sync(force: Callable[..., None]) -> None:
    """Channels that are no multiple of 16 bytes, borders and strides beyond a map, other devices."""
    force()
    covered = tensor_wgmma._covered
    assert covered(problem_of((1, 9, 9, 8), (3, 3, 8, 8)), "forward")
    assert not covered(problem_of((1, 9, 9, 12), (3, 3, 12, 8)), "forward")
    assert not covered(problem_of((1, 9, 9, 8), (3, 3, 8, 12)), "forward")
    assert covered(problem_of((1, 9, 9, 12), (3, 3, 12, 8), "float32"), "forward")
    assert not covered(problem_of((1, 9, 9, 12), (3, 3, 12, 8), "float32"), "weight_grad")
    wide = {"padding": 129}
    assert covered(problem_of((1, 9, 9, 8), (2, 2, 8, 8), padding=127), "forward")
    assert not covered(problem_of((1, 9, 9, 8), (2, 2, 8, 8), **wide), "forward")
    assert not covered(problem_of((1, 999, 9, 8), (200, 2, 8, 8), dilation=2), "forward")
    assert not covered(problem_of((1, 99, 9, 8), (2, 2, 8, 8), stride=9), "forward")
    assert not covered(problem_of((1, 9, 9, 8), (2, 2, 8, 8), stride=3), "input_grad")
    grouped = problem_of((1, 9, 9, 64), (3, 3, 32, 64), groups=2)
    assert not covered(grouped, "forward")
    assert covered(grouped, "weight_grad")
    with hopper() as xp:
        one_pass(xp, case("odd", (1, 6, 5, 12), (3, 3, 12, 20), padding=1), "float16", "forward")
        assert by_wgmma(xp) == set()
    other = problem_of((1, 9, 9, 8), (3, 3, 8, 8))
    assert tensor_wgmma.chosen(other, "forward", H100, 0) is not None
    for capability in (80, 89, 100, 120):
        gpu = replace(H100, capability=capability)
        assert tensor_wgmma.chosen(other, "forward", gpu, 0) is None


@pytest.mark.usefixtures("no_gpu")
def test_a_driver_without_tensor_maps(
    force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force()
    with hopper() as xp:
        monkeypatch.setattr(xp, "libcuda", object())
        one_pass(xp, SMALL, "float16", "forward")
        assert by_wgmma(xp) == set()
    kernels.clear()


def test_a_compiler_that_knows_no_sm_90a(
    force: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, and the kernels for sm_90."""
    force()
    function = kernels.function

    def refusing(variant: kernels.Variant, name: str, index: int) -> Any:
        if variant.alone:
            raise RuntimeError("nvrtc: error: invalid value for --gpu-architecture")
        return function(variant, name, index)

    with hopper() as xp:
        monkeypatch.setattr(kernels, "function", refusing)
        for _ in range(2):
            one_pass(xp, SMALL, "float16", "forward")
        assert by_wgmma(xp) == set()
    warnings = [r for r in caplog.records if "sm_90a" in r.getMessage()]
    assert len(warnings) == 1
    kernels.clear()


@pytest.mark.usefixtures("no_gpu")
def test_maps_are_encoded_once(force: Callable[..., None]) -> None:
    """And anew for arrays elsewhere, and for the same memory as another tensor."""
    force()
    (x, w, _, _), _ = draw(SMALL, "float16")
    with hopper() as xp:
        xs, ws = xp.asarray(x), xp.asarray(w)
        first = host(gpuconv.conv2d(xs, ws))
        count = xp.libcuda.encoded
        assert count == 2
        for _ in range(3):
            np.testing.assert_array_equal(host(gpuconv.conv2d(xs, ws)), first)
        assert xp.libcuda.encoded == count
        np.testing.assert_array_equal(host(gpuconv.conv2d(xp.asarray(x), ws)), first)
        assert xp.libcuda.encoded == count + 2
        seen = xs.reshape(1, 8, 9, 24)
        want = host(gpuconv.conv2d(xp.asarray(x.reshape(1, 8, 9, 24)), ws))
        np.testing.assert_array_equal(host(gpuconv.conv2d(seen, ws)), want)


def problem_like(shape: str) -> ConvProblem:
    """Return ``batch side in out kernel``, padded to the same size."""
    batch, side, c, o, k = map(int, shape.split())
    return problem_of((batch, side, side, c), (k, k, c, o), padding="same")


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", ["256 56 64 64 3", "32 14 256 256 3", "8 56 256 64 1"])
def test_the_choice_keeps_to_the_floor_and_the_device(shape: str, pass_: str) -> None:
    problem = problem_like(shape)
    choice = tensor_wgmma.chosen(problem, pass_, H100, 64 << 20)  # type: ignore[arg-type]
    assert choice is not None
    peak = H100.flops("float16", tensor_cores=True)
    floor = max(problem.flops / peak, problem.bytes / H100.bandwidth)
    assert floor < choice.seconds < 40 * floor + 3e-5
    tile = choice.tile
    resident = architecture.resident_blocks(
        H100.architecture, tile.threads, 65536 // (tile.blocks * tile.threads) // 8 * 8,
        tile.shared_bytes,
    )  # fmt: skip
    assert resident >= tile.blocks


def test_it_is_chosen_where_it_should_be_faster() -> None:
    def plan(shape: str, pass_: Any) -> Any:
        problem, room = problem_like(shape), 64 << 20
        product = cuda_tensor_core._product(problem, pass_, 2**31)
        seconds = tensor_tiles.choose(H100, product, room).seconds
        return tensor_wgmma.planned(problem, pass_, H100, room, False, seconds)

    for pass_ in PASSES:
        much = plan("128 56 256 256 3", pass_)
        assert much is not None
        assert much.tile in TILES[:2]
    assert plan("128 56 256 256 3", "weight_grad").splits > 1
    assert plan("64 32 3 64 7", "forward") is None  # three channels
