"""The engine cuda_tensor_core beyond the conformance suite: tiles, splits, devices, banks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import gpuconv
from gpuconv.cuda import architecture, prepared, tensor_tiles
from gpuconv.cuda.tensor_tiles import TILES, Choice, Product, Tile
from gpuconv.engines import cuda_tensor_core
from gpuconv.functional.plan import make_plan
from tests.cuda_on_cpu import compiler_available, sanitizer, stand_in
from tests.support import (
    CASES,
    Case,
    case,
    close,
    convolutions,
    count_in_64_bits,
    home,
    host,
    real_gpu,
)
from tests.tensor_core_banks import assert_apart, banks

NAME = "cuda_tensor_core"
CASE = {c.name: c for c in CASES}
ALLOWED = {"float16": 5e-3, "bfloat16": 2e-2, "float32": 2e-3}  # float32 as TF32
PASSES = ("forward", "input_grad", "weight_grad")


@contextmanager
def device(mode: str | None = None, seed: int = 0, capability: int = 80) -> Iterator[Any]:
    """The engine forced, TF32 allowed, on a device of this compute capability."""
    before = gpuconv.get_precision()
    try:
        if capability == 80:
            with home(NAME, mode, seed) as xp, gpuconv.engine(NAME):
                gpuconv.set_precision("tf32")
                yield xp
            return
        if real_gpu():
            pytest.skip("asks for a device of another compute capability")
        reason = compiler_available()
        if reason:
            pytest.skip(reason)
        with stand_in(mode or "fast", seed, capability=capability) as xp, gpuconv.engine(NAME):
            gpuconv.set_precision("tf32")
            yield xp
    finally:
        gpuconv.set_precision(before)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tile, int], None]]:
    """Return what makes every product take a tile and a number of splits."""

    def forced(tile: Tile, splits: int) -> None:
        cuda_tensor_core._plan.cache_clear()
        prepared.clear()

        def choose(gpu: Any, product: Product, room: int) -> Choice:
            fits = tile in tensor_tiles.usable(gpu, product)
            return Choice(tile if fits else TILES[-1], splits, 1.0)

        monkeypatch.setattr(tensor_tiles, "choose", choose)

    yield forced
    cuda_tensor_core._plan.cache_clear()


def draw(c: Case, dtype: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Return x, w, b and dy of the case in ``dtype``, and its options without the layout."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(c.seed)
    options = {k: v for k, v in c.keywords.items() if k not in ("layout", "activation")}
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in (c.x, c.w, c.w[-1:]))
    with gpuconv.engine("numpy_gemm"):
        shape = gpuconv.conv2d(x.astype("f8") * 0, w.astype("f8"), **options).shape
    return [x, w, b, rng.standard_normal(shape).astype(dtype)], options


def agree(xp: Any, c: Case, dtype: str) -> list[np.ndarray]:
    """Compare all passes with NumPy's in float64; return the engine's results."""
    arrays, options = draw(c, dtype)
    x, w, b, dy = (a.astype("f8") for a in arrays)
    with gpuconv.engine("numpy_gemm"):  # quicker than the loops, which the conformance suite takes
        want = [gpuconv.conv2d(x, w, b, activation=c.activation, **options)]
        want += gpuconv.conv2d_backward(dy, x, w, **options)
    there = [xp.asarray(a) for a in arrays]
    if c.layout == "NCHW":
        there = [
            xp.ascontiguousarray(a.transpose(p)) if a.ndim > 1 else a
            for a, p in zip(there, ((0, 3, 1, 2), (3, 2, 0, 1), (0,), (0, 3, 1, 2)), strict=True)
        ]
    xs, ws, bs, dys = there
    got = [gpuconv.conv2d(xs, ws, bs, activation=c.activation, layout=c.layout, **options)]
    got += gpuconv.conv2d_backward(dys, xs, ws, layout=c.layout, **options)
    found = []
    for k, (have, wanted) in enumerate(zip(got, want, strict=True)):
        assert have.dtype == dtype
        back = host(have)
        if c.layout == "NCHW" and back.ndim > 1:
            back = back.transpose((2, 3, 1, 0) if k == 2 else (0, 2, 3, 1))
        close(back, wanted, ALLOWED[dtype])
        found.append(back)
    return found


# ---------------------------------------------------------------------------------------- tiles

# Rows, columns and depth beyond the largest tile, none of them a multiple of anything.
LARGE = case("large", (2, 13, 11, 24), (2, 2, 24, 136), padding=1, activation="ReLU")
SMALL = case("small", (1, 9, 8, 20), (3, 2, 20, 44), padding=1, stride=(2, 1),
             activation="LeakyReLU(0.1)")  # fmt: skip


@pytest.mark.parametrize(
    ("tile", "dtype"), [(tile, list(ALLOWED)[i % 3]) for i, tile in enumerate(TILES)], ids=str
)
def test_every_tile(force: Callable[[Tile, int], None], tile: Tile, dtype: str) -> None:
    with device() as xp:
        force(tile, 1)
        agree(xp, LARGE, dtype)
        if not real_gpu():
            names = {name for name, *_ in xp.settings.launches}
            end = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}[dtype]
            assert names >= {f"conv_{p}_tensor_{end}_{tile}" for p in PASSES}


@pytest.mark.parametrize(("splits", "dtype"), [(2, "float32"), (5, "float16"), (3, "bfloat16")])
def test_splits_of_the_depth(force: Callable[[Tile, int], None], splits: int, dtype: str) -> None:
    """With fewer steps than splits too; the same bits every time."""
    with device() as xp:
        force(TILES[-1], splits)
        first = agree(xp, SMALL, dtype)
        for a, b in zip(first, agree(xp, SMALL, dtype), strict=True):
            assert a.tobytes() == b.tobytes()
        if not real_gpu():
            assert any(name.startswith("conv_split_sum_") for name, *_ in xp.settings.launches)


@pytest.mark.parametrize(("channels", "width"), [(8, 16), (4, 8), (6, 4), (3, 8), (5, 16), (1, 4)])
def test_copies_are_as_wide_as_channels_allow(channels: int, width: int) -> None:
    """An odd number of 16-bit channels is filled up, to a number that allows wide copies."""
    c = case("width", (1, 7, 6, channels), (3, 3, channels, 8), padding=1)
    problem = make_plan(
        2, c.x, c.w, "float16", 1, 1, 1, 1, "channels_last", None
    ).problem  # fmt: skip
    assert cuda_tensor_core._product(problem, "forward", 2**31).copy_bytes == width
    with device() as xp:
        agree(xp, c, "float16")


@pytest.mark.parametrize("capability", [75, 90])
def test_other_devices(force: Callable[[Tile, int], None], capability: int) -> None:
    """Before 8.0 copies are plain, products half as deep, and a block has 64 KiB."""
    with device(capability=capability) as xp:
        agree(xp, SMALL, "float16")
        force(TILES[1], 1)
        agree(xp, LARGE, "float16")


def test_stride_and_dilation_meet_in_every_phase() -> None:
    """Taps that no pixel of a phase meets, phases that no tap meets, dilation and stride with
    and without a common divisor."""
    for stride, dilation, kernel in ((4, 2, 3), (3, 2, 2), (2, 3, 3), (5, 1, 2), (2, 2, 3)):
        c = case("phases", (1, 17, 19, 2), (kernel, 2, 2, 4), stride=(stride, 2),
                 dilation=(dilation, 3), padding=((2, 3), (1, 0)))  # fmt: skip
        with device() as xp:
            agree(xp, c, "float16")


@pytest.mark.parametrize("name", ["grouped", "depthwise", "first-strided", "dilated-strided"])
def test_offsets_of_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with device() as xp:
        narrow = agree(xp, CASE[name], "float16")
        used = count_in_64_bits(monkeypatch)
        wide = agree(xp, CASE[name], "float16")
        assert used
        assert all(("INDEX_64", "1") in v.defines for v in used if v.file != "epilogue.cu")
        for a, b in zip(narrow, wide, strict=True):
            assert a.tobytes() == b.tobytes()


def test_arrays_that_start_anywhere() -> None:
    """Dense arrays whose first element lies off a multiple of 16 bytes, results among them."""
    c = case("off", (2, 6, 5, 8), (3, 3, 8, 16), padding=1, bias=True)
    (x, w, b, dy), _ = draw(c, "float16")
    with device() as xp:

        def off(a: np.ndarray) -> Any:
            room = xp.zeros(a.size + 1, a.dtype)
            room[1:] = xp.asarray(a).ravel()
            return room[1:].reshape(a.shape)

        out = off(np.zeros(dy.shape, dy.dtype))
        want = host(gpuconv.conv2d(*map(xp.asarray, (x, w, b)), padding=1))
        got = host(gpuconv.conv2d(off(x), off(w), off(b), padding=1, out=out))
        assert got.tobytes() == want.tobytes()
        plain = gpuconv.conv2d_backward(*map(xp.asarray, (dy, x, w)), padding=1)
        shifted = gpuconv.conv2d_backward(off(dy), off(x), off(w), padding=1)
        for a, d in zip(plain, shifted, strict=True):
            assert host(a).tobytes() == host(d).tobytes()


# ------------------------------------------------------------------------------------ workspace


def test_the_batch_is_split_to_stay_within_the_workspace() -> None:
    """Copies of arrays that are not dense, and the sums of the weights' gradient, in parts."""
    c = case("batch", (8, 24, 25, 96), (1, 1, 96, 10), activation="ReLU", layout="NCHW")
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(2**20)
    try:
        with device() as xp:
            agree(xp, c, "float16")
            if not real_gpu():
                names = [name for name, *_ in xp.settings.launches]
                assert sum("forward" in name for name in names) > 1
                assert sum("weight_grad" in name for name in names) > 1
    finally:
        gpuconv.set_workspace_limit(before)


def test_the_workspace_stated_is_what_is_used() -> None:
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with device() as xp:
        for layout, channels in (("NHWC", 8), ("NHWC", 5), ("NCHW", 8)):
            c = case("room", (3, 20, 18, channels), (3, 3, channels, 16), layout=layout)
            (x, w, _, dy), _ = draw(c, "float16")
            order = (0, 3, 1, 2) if layout == "NCHW" else (0, 1, 2, 3)
            w_order = (3, 2, 0, 1) if layout == "NCHW" else (0, 1, 2, 3)
            x, dy = (xp.asarray(np.ascontiguousarray(a.transpose(order))) for a in (x, dy))
            w = xp.asarray(np.ascontiguousarray(w.transpose(w_order)))
            problem = make_plan(
                2, x.shape, w.shape, "float16", 1, 0, 1, 1, layout, None
            ).problem  # fmt: skip
            engine = cuda_tensor_core.CudaTensorCore()
            calls: dict[str, Callable[[], Any]] = {
                "forward": lambda x=x, w=w, layout=layout: gpuconv.conv2d(x, w, layout=layout),
                "input_grad": lambda dy=dy, x=x, w=w, layout=layout: gpuconv.conv2d_backward(
                    dy, x, w, needs="x", layout=layout
                ),
                "weight_grad": lambda dy=dy, x=x, w=w, layout=layout: gpuconv.conv2d_backward(
                    dy, x, w, needs="w", layout=layout
                ),
            }
            for pass_, call in calls.items():
                stated = engine.workspace(problem, pass_)  # type: ignore[arg-type]
                used = xp._home.used
                xp._home.peak = used
                result = call()
                size = sum(a.nbytes for a in result if a is not None) if isinstance(
                    result, tuple) else result.nbytes  # fmt: skip
                beyond = xp._home.peak - used - size
                assert beyond <= stated + 4096, (layout, channels, pass_)


# -------------------------------------------------------------------------------------- refusals


def reason(dtype: str, capability: int = 80, precision: str = "tf32") -> str | None:
    problem = make_plan(
        2, (1, 5, 5, 8), (3, 3, 8, 8), dtype, 1, 0, 1, 1, "channels_last", None
    ).problem  # fmt: skip
    with device(capability=capability):
        gpuconv.set_precision(precision)
        return cuda_tensor_core.CudaTensorCore().unsupported(problem, "forward")


def test_what_it_does_not_compute() -> None:
    assert reason("float16", 75) is None
    assert "f16 needs compute capability 7.5; this device has 7.0" in str(reason("float16", 70))
    assert "bf16 needs compute capability 8.0; this device has 7.5" in str(reason("bfloat16", 75))
    assert "tf32 needs compute capability 8.0; this device has 7.5" in str(reason("float32", 75))
    assert "float32 as TF32, which gpuconv.set_precision" in str(reason("float32", 80, "default"))
    assert reason("float32") is None
    assert "not float64" in str(reason("float64"))


def test_tf32_only_where_it_is_asked_for() -> None:
    with home(NAME) as xp, gpuconv.engine(NAME):
        x, w = xp.zeros((1, 4, 4, 4), "float32"), xp.zeros((3, 3, 4, 4), "float32")
        with pytest.raises(gpuconv.EngineError, match="as TF32, which"):
            gpuconv.conv2d(x, w)


# ---------------------------------------------------------------------------------- random, watched


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(convolutions())
def test_random_convolutions(c: Case) -> None:
    with device() as xp:
        agree(xp, c, "float16")


WATCHED = [
    ("dense", "float16"), ("strided", "bfloat16"), ("grouped", "float32"),
    ("dilated-strided", "float16"), ("first-strided", "float16"), ("asymmetric", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), WATCHED)
def test_every_access_is_within_bounds_and_free_of_races(name: str, dtype: str) -> None:
    with device("checked", 1) as xp:
        agree(xp, CASE[name], dtype)


@pytest.mark.parametrize(("tile", "dtype", "splits"), [
    (TILES[1], "float16", 1), (TILES[3], "float32", 2), (TILES[3], "bfloat16", 2),
])  # fmt: skip
def test_larger_tiles_watched(
    force: Callable[[Tile, int], None], tile: Tile, dtype: str, splits: int
) -> None:
    with device("checked", 2) as xp:
        force(tile, splits)
        agree(xp, SMALL, dtype)


def test_address_sanitizer_finds_nothing() -> None:
    missing = sanitizer.available()
    if missing:
        pytest.skip(missing)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance.py",
        "-k", "cuda_tensor_core and float16 and (forward or xwb) and (first-strided or grouped)",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 4
    assert "skipped" not in done.stdout


# ----------------------------------------------------------------------------------------- banks


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("tile", [TILES[1], TILES[-1]], ids=str)
def test_no_bank_conflicts(tile: Tile, pass_: str, dtype: str) -> None:
    """Eight 16-byte chunks at once, or 32 floats, lie in 32 different banks."""
    if real_gpu():
        pytest.skip("compiles an additional kernel")
    with device() as xp:
        assert_apart(banks(xp, tile, pass_, dtype))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- the choice

H100 = architecture.GPU(architecture.architecture(90), 90, 132, 1.755e9, 3.35e12, 50 << 20)
A100 = architecture.GPU(architecture.architecture(80), 80, 108, 1.41e9, 1.555e12, 40 << 20)
T4 = architecture.GPU(architecture.architecture(75), 75, 40, 1.59e9, 3.2e11, 4 << 20)


def product(shape: str, pass_: str = "forward", dtype: str = "float16") -> Product:
    """Return the product of ``batch x side x in -> out, k`` with padding."""
    batch, side, c, o, k = map(int, shape.split())
    problem = make_plan(
        2, (batch, side, side, c), (k, k, c, o), dtype, 1, "same", 1, 1, "channels_last", None
    ).problem  # fmt: skip
    return cuda_tensor_core._product(problem, pass_, 2**31)  # type: ignore[arg-type]


@pytest.mark.parametrize("gpu", [H100, A100, T4], ids=["H100", "A100", "T4"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", ["256 56 64 64 3", "32 14 256 256 3", "1 7 512 512 3",
                                   "64 32 3 64 7", "8 56 256 64 1"])  # fmt: skip
def test_the_choice_keeps_to_the_floor_and_the_device(
    gpu: architecture.GPU, pass_: str, shape: str
) -> None:
    p = product(shape, pass_)
    choice = tensor_tiles.choose(gpu, p, 64 << 20)
    flops = 2.0 * p.rows * p.columns * p.depth * p.count
    floor = max(flops / gpu.flops("float16", tensor_cores=True), p.bytes / gpu.bandwidth)
    assert floor < choice.seconds < 60 * floor + 3e-5
    tile = choice.tile
    assert tile.shared_bytes(gpu.capability) <= gpu.architecture.shared_per_block
    assert 4 * p.results * choice.splits <= max(64 << 20, 4 * p.results)


def test_the_choice_fills_the_device() -> None:
    """Much work takes large tiles, little work many splits, and few columns narrow tiles."""
    much = tensor_tiles.choose(A100, product("128 56 128 256 3"), 64 << 20)
    assert (much.tile.rows * much.tile.columns, much.splits) >= (128 * 128, 1)
    little = tensor_tiles.choose(A100, product("1 7 512 512 3"), 64 << 20)
    assert little.splits > 4
    weights = tensor_tiles.choose(A100, product("32 56 64 64 3", "weight_grad"), 64 << 20)
    assert weights.splits > 4
    assert tensor_tiles.choose(A100, product("1 7 512 512 3"), 0).splits == 1
    assert tensor_tiles.choose(A100, product("64 56 64 24 3"), 64 << 20).tile.columns == 32
