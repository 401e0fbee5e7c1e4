"""The engine cuda_depthwise beyond the conformance suite: tiles, what they move, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv import dispatch
from gpuconv.activations import ReLU
from gpuconv.cuda.architecture import GPU
from gpuconv.engines import cuda_depthwise
from gpuconv.engines import cuda_depthwise_tiles as tiles
from gpuconv.engines.base import PASSES
from gpuconv.functional.plan import make_plan
from gpuconv.problem import ConvProblem
from tests.cuda_on_cpu import sanitizer
from tests.depthwise_bytes import H100, LAYERS, count
from tests.support import count_in_64_bits, far_corners, home, host, real_gpu

ALLOWED = {"float64": 1e-11, "float32": 1e-4, "float16": 6e-3}


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution of any rank, its shapes channels last."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    first: bool
    activation: str | None
    dtype: str

    @property
    def nd(self) -> int:
        return len(self.stride)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.x[-1],
            "layout": "channels_first" if self.first else "channels_last",
            "activation": self.activation,
        }

    def problem(self) -> ConvProblem:
        x, w = self.x, self.w
        if self.first:
            x, w = (x[0], x[-1], *x[1:-1]), (w[-1], w[-2], *w[:-2])
        o = self.options
        return make_plan(
            self.nd, x, w, self.dtype, self.stride, self.padding, self.dilation, self.x[-1],
            o["layout"], None,
        ).problem  # fmt: skip

    def arrays(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, w = rng.standard_normal(self.x), rng.standard_normal(self.w)
        b = rng.standard_normal(self.w[-1]).astype(self.dtype)
        if self.first:
            x, w = np.moveaxis(x, -1, 1), np.moveaxis(w, (-1, -2), (0, 1))
        return (np.ascontiguousarray(x, self.dtype), np.ascontiguousarray(w, self.dtype), b)


@st.composite
def depthwise(draw: Any) -> Depthwise:
    nd = draw(st.sampled_from([1, 2, 2, 2, 3]))
    small = st.sampled_from([1, 1, 2, 3])
    stride, dilation = (tuple(draw(small) for _ in range(nd)) for _ in range(2))
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 5] if nd < 3 else [1, 2, 3])) for _ in range(nd))
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(nd))
    sizes = [
        max(1, d * (k - 1) + 1 - sum(p)) + draw(st.integers(0, 9))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    if draw(st.booleans()):  # rows that vectors divide
        sizes[-1] = -(-sizes[-1] // 8) * 8
    channels, multiplier = draw(st.sampled_from([1, 3, 4, 8])), draw(st.sampled_from([1, 1, 2]))
    return Depthwise(
        (draw(st.integers(1, 2)), *sizes, channels),
        (*kernel, 1, channels * multiplier),
        stride,
        padding,
        dilation,
        draw(st.booleans()),
        draw(st.sampled_from([None, "ReLU"])),
        draw(st.sampled_from(["float32", "float64", "float16"])),
    )


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Let a test choose the tiles: the place in the list of each pass; and see which they were."""
    record: dict[str, Any] = {"draw": lambda found: found[0]}

    def pick(problem: ConvProblem, pass_: Any, vector: int, device: GPU) -> tiles.Tile:
        if pass_ == "input_grad" and not tiles.Geometry.of(problem).scatters:
            tile = tiles.best_tile(problem, pass_, vector, device)
        else:
            tile = record["draw"](list(tiles.tiles(problem, pass_, vector)))
        record[pass_] = tile
        return tile

    monkeypatch.setattr(cuda_depthwise, "best_tile", pick)
    yield record
    cuda_depthwise._plan.cache_clear()


def run(xp: Any, c: Depthwise) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return y, dx, dw, db, each beside the answer of a CPU engine in float64."""
    rng = np.random.default_rng(3)
    x, w, b = c.arrays(rng)
    call = getattr(gpuconv, f"conv{c.nd}d")
    backward = getattr(gpuconv, f"conv{c.nd}d_backward")
    wide = [a.astype("float64") for a in (x, w, b)]
    with gpuconv.engine("numpy_gemm"):
        y = call(*wide, **c.options)
        dy = rng.standard_normal(y.shape).astype(c.dtype)
        seen = y.astype(c.dtype)
        exact = dy.astype("float64"), wide[0], wide[1]
        want = [y, *backward(*exact, y=seen.astype("float64"), **c.options)]
    with gpuconv.engine("cuda_depthwise"):
        x, w, b, dy, seen = map(xp.asarray, (x, w, b, dy, seen))
        got = [call(x, w, b, **c.options), *backward(dy, x, w, y=seen, **c.options)]
    return list(zip(map(host, got), want, strict=True))


def agree(xp: Any, c: Depthwise) -> None:
    for got, want in run(xp, c):
        assert got.shape == want.shape
        error = np.abs(got.astype("float64") - want).max()
        assert error <= ALLOWED[c.dtype] * max(1.0, np.abs(want).max())


def pick_any(data: st.DataObject) -> Callable[[list[tiles.Tile]], tiles.Tile]:
    return lambda found: data.draw(st.sampled_from(found))


@given(data=st.data())
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_problem_in_any_tile_is_right_and_moves_what_was_predicted(
    chosen: dict[str, Any], data: st.DataObject
) -> None:
    """Every access watched, and every byte counted: the cost model's counts are the kernels'."""
    c = data.draw(depthwise())
    chosen["draw"] = pick_any(data)
    cuda_depthwise._plan.cache_clear()
    with home("cuda_depthwise", "checked", seed=1) as cp:
        agree(cp, c)
        if real_gpu():
            return
        problem = c.problem()
        for (name, *_), moved in zip(cp.settings.launches, cp.settings.traffic, strict=True):
            pass_ = next((p for p in PASSES if f"depthwise_{p}" in name), None)
            if pass_ is None:
                continue
            want = tiles.traffic(problem, pass_, chosen[pass_])
            if pass_ == "weight_grad":  # loads whose value meets nothing but padding may be dropped
                assert moved[0][0] + moved[1][0] <= want.images
                continue
            assert moved[0][0] == want.images
            assert moved[3 if pass_ == "forward" else 2][2] == want.written


@pytest.mark.parametrize("layer", [n for n in LAYERS if "7x7" not in n and "5x5" not in n])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes_of_known_layers(layer: str, dtype: str) -> None:
    """Channels last, the threads ask for little more than what must be moved."""
    problem = replace(LAYERS[layer], dtype=dtype)
    for pass_ in PASSES:
        tile = tiles.best_tile(problem, pass_, 16 // problem.itemsize, H100)
        moved = tiles.traffic(problem, pass_, tile)
        issued = moved.images + moved.written
        assert issued <= (1.2 if dtype == "float32" else 1.3) * problem.bytes, (pass_, tile)


def test_blocks_share_what_their_threads_both_read() -> None:
    """What the threads of a block read twice meets the L1 cache: beyond it, little is left."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    problem = replace(
        LAYERS["ConvNeXt 14, 7x7"], batch=1, in_channels=32, out_channels=32, groups=32
    )
    tile = tiles.best_tile(LAYERS["ConvNeXt 14, 7x7"], "forward", 4, H100)
    found = count(problem, "forward", tile)
    moved = tiles.traffic(problem, "forward", tile)
    assert found.issued >= (moved.images + moved.written) / problem.bytes > 1.4
    assert found.images <= 1.2


def test_offsets_of_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Depthwise(
            (1, 6, 8, 4), (3, 3, 1, 4), (1, 2), ((1, 1),) * 2, (1, 1), first, "ReLU", "float32"
        )
        for first in (False, True)
    ]
    cases.append(
        Depthwise((1, 7, 9, 4), (2, 3, 1, 4), (2, 2), ((1, 1),) * 2, (2, 2), False, None, "float32")
    )
    used = count_in_64_bits(monkeypatch)
    with home("cuda_depthwise") as xp:
        for c in cases:
            agree(xp, c)
    found = [v for v in used if v.file == "conv_depthwise.cu"]
    assert {dict(v.defines)["PASS"] for v in found} == {
        "FORWARD", "INPUT_GRAD", "INPUT_GATHER", "WEIGHT_GRAD",
    }  # fmt: skip
    assert all(("INDEX_64", "1") in v.defines for v in found)


def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    """Its far corners are read where they are; a 32-bit offset would wrap around."""
    if real_gpu():
        pytest.skip("takes memory only when it is written, on the stand-in")
    with home("cuda_depthwise") as cp, gpuconv.engine("cuda_depthwise"):
        far_corners(cp, ("w", "b"))


def test_weight_gradients_have_the_same_bits_whatever_the_order(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any]
) -> None:
    """Many strips, as on a large GPU, each with many places."""
    monkeypatch.setattr(cuda_depthwise, "gpu", lambda: H100)
    chosen["draw"] = lambda found: min(found, key=lambda tile: (tile.columns, tile.strip))
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 1, 40, 20, 4)).astype("float32")
    for layout in ("NHWC", "NCHW"):
        found = set()
        for seed in range(3):
            with home("cuda_depthwise", "checked", seed) as cp, gpuconv.engine("cuda_depthwise"):
                a, d, w = (cp.asarray(v) for v in (x, dy, np.zeros((3, 3, 1, 4), "float32")))
                if layout == "NCHW":
                    a, d, w = (
                        a.transpose(0, 3, 1, 2),
                        d.transpose(0, 3, 1, 2),
                        w.transpose(3, 2, 0, 1),
                    )
                _, dw, _ = gpuconv.conv2d_backward(
                    d, a, w, padding=1, groups=4, layout=layout, needs="w"
                )
                found.add(host(dw).tobytes())
                if not real_gpu():
                    names = [name for name, *_ in cp.settings.launches]
                    assert "conv2d_depthwise_weight_sums_f32" in names
        assert len(found) == 1


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_what_no_output_reads_does_not_spoil_the_weight_gradient(layout: str) -> None:
    """NaN at the border is no part of taps whose outputs would lie outside."""
    rng = np.random.default_rng(0)
    shape = (1, 5, 6, 4) if layout == "NHWC" else (1, 4, 5, 6)
    kernel = (3, 3, 1, 4) if layout == "NHWC" else (4, 1, 3, 3)
    x, dy = rng.standard_normal((2, *shape)).astype("float32")
    view = x if layout == "NHWC" else x.transpose(0, 2, 3, 1)
    view[0, 0, 0], view[0, -1, -1, 1], view[0, 2, -1, 2] = np.nan, np.inf, np.nan
    w = np.zeros(kernel, "float32")
    options: dict[str, Any] = {"padding": 1, "groups": 4, "layout": layout, "needs": "w"}
    with gpuconv.engine("naive"):
        want = gpuconv.conv2d_backward(dy, x, w, **options)[1]
    with home("cuda_depthwise") as cp, gpuconv.engine("cuda_depthwise"):
        got = host(gpuconv.conv2d_backward(*map(cp.asarray, (dy, x, w)), **options)[1])
    assert np.isnan(want).any()
    assert not np.isnan(want).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_copies_are_made_in_parts_of_the_batch() -> None:
    before = gpuconv.get_workspace_limit()
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 5, 60, 60, 16)).astype("float32")
    w = rng.standard_normal((3, 3, 1, 16)).astype("float32")
    options: dict[str, Any] = {"padding": 1, "groups": 16}
    with home("cuda_depthwise") as cp, gpuconv.engine("cuda_depthwise"):
        spread = [cp.zeros((*a.shape[:3], 32), "float32")[..., ::2] for a in (x, dy)]
        for place, a in zip(spread, (x, dy), strict=True):
            place[...] = cp.asarray(a)
        found, launches = [], []
        for a, d in ((cp.asarray(x), cp.asarray(dy)), spread):
            gpuconv.set_workspace_limit(2**20)
            cp.settings.launches.clear()
            try:
                y = gpuconv.conv2d(a, cp.asarray(w), **options)
                got = gpuconv.conv2d_backward(d, a, cp.asarray(w), **options)
            finally:
                gpuconv.set_workspace_limit(before)
            found.append([host(v) for v in (y, *got)])
            names = [name for name, *_ in cp.settings.launches]
            launches.append([names.count(f"conv2d_depthwise_{p}_f32") for p in PASSES])
    assert launches[0] == [1, 1, 1]
    # A copy is 230 KB an example: four of x fit a MiB, and of dy, for its sums, two a half.
    assert launches[1] == [2, 3, 3]
    for whole, parts in zip(*found, strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-3)


def test_what_it_does_not_compute_it_says() -> None:
    @dataclass(frozen=True)
    class Mine(ReLU):
        pass

    with home("cuda_depthwise") as cp, gpuconv.engine("cuda_depthwise"):
        x = cp.zeros((1, 40, 40, 4), "float32")
        for w, options, message in (
            (cp.zeros((3, 3, 4, 4), "float32"), {}, "a group for each input channel"),
            (cp.zeros((9, 9, 1, 4), "float32"), {"groups": 4}, "64 in a plane, not 9x9"),
            (cp.zeros((1, 33, 1, 4), "float32"), {"groups": 4}, "at most 32 taps along an axis"),
            (cp.zeros((3, 3, 1, 4), "float32"), {"groups": 4, "activation": Mine()}, "Mine"),
        ):
            with pytest.raises(gpuconv.EngineError, match=message):
                gpuconv.conv2d(x, w, **options)


def test_depthwise_layers_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is chosen over the atomics; its gradients get the epilogue's done before."""
    monkeypatch.setattr(cuda_depthwise, "gpu", lambda: H100)
    dispatch.clear()
    try:
        with home("cuda_depthwise") as cp:
            x, w = cp.ones((2, 28, 28, 32), "float32"), cp.ones((3, 3, 1, 32), "float32")
            options: dict[str, Any] = {"padding": 1, "groups": 32, "activation": "ReLU"}
            y = gpuconv.conv2d(x, w, **options)
            gpuconv.conv2d_backward(y, x, w, y=y, **options)
            if real_gpu():
                return
            names = [name for name, *_ in cp.settings.launches]
    finally:
        dispatch.clear()
    assert [n for n in names if not n.endswith("sums_f32")] == [
        "conv2d_depthwise_forward_f32",
        "epilogue_grad_last_f32",
        "conv2d_depthwise_input_grad_f32",
        "conv2d_depthwise_weight_grad_f32",
    ]


def test_address_sanitizer_finds_nothing() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)
    done = sanitizer.python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_conformance_ranks.py",
        "-k", "test_every_pass and cuda_depthwise and depthwise and float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
