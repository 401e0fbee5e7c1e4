"""The CPU engines beyond the conformance suite: many blocks, any number of workers, precision."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv import dispatch
from gpuconv.engines import toom_cook  # type: ignore[attr-defined]
from gpuconv.engines.base import PASSES
from gpuconv.functional import _hashable, _plan
from tests.support import close

RNG = np.random.default_rng(11)
ENGINES = [
    "numpy_depthwise",
    "numpy_depthwise_winograd",
    "numpy_gemm",
    "numpy_planar",
    "numpy_taps",
    "numpy_winograd",
    "numba_depthwise",
    "numba_direct",
    "numba_winograd",
]
WINOGRAD = ["numpy_winograd", "numba_winograd"]


def available(engine: str) -> str:
    """Return the engine's name; skip where it cannot run."""
    missing = dispatch.get_engine(engine).unavailable()
    if missing:
        pytest.skip(missing)
    return engine


#: x, w, options: each makes some engine cut its work in another way.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "many tiles": ((3, 41, 38, 24), (3, 3, 24, 40), {"padding": 1}),
    "few tiles, large filters": ((2, 7, 7, 128), (3, 3, 128, 160), {"padding": 1}),
    "one image, few outputs": ((1, 7, 7, 64), (1, 1, 64, 300), {}),
    "dilated": ((2, 33, 30, 16), (3, 3, 16, 20), {"padding": 4, "dilation": (4, 3)}),
    "dilated beyond the image": ((1, 15, 14, 32), (3, 3, 32, 48), {"padding": 12, "dilation": 12}),
    "tall kernel": ((2, 19, 17, 12), (7, 1, 12, 20), {"padding": (3, 0)}),
    "wide kernel": ((2, 18, 21, 12), (1, 5, 12, 20), {"padding": (0, 2)}),
    "5x5": ((2, 23, 22, 16), (5, 5, 16, 12), {"padding": 2}),
    "even kernel": ((2, 20, 21, 16), (2, 4, 16, 24), {"padding": ((1, 0), (2, 1))}),
    "cropping gradient": ((2, 20, 21, 8), (3, 3, 8, 8), {"padding": 4}),
    "groups put together": ((2, 17, 18, 64), (3, 3, 8, 64), {"padding": 1, "groups": 8}),
    "groups by themselves": ((2, 12, 12, 96), (3, 3, 48, 96), {"padding": 1, "groups": 2}),
    "first layer": ((2, 60, 63, 3), (7, 7, 3, 32), {"padding": 3, "stride": 2}),
    "first layer, patches": ((3, 32, 36, 3), (4, 4, 3, 24), {"stride": 4}),
    "one channel, small images": ((50, 14, 14, 1), (5, 5, 1, 6), {"padding": 2}),
    "strided": ((2, 29, 30, 40), (3, 3, 40, 48), {"padding": 1, "stride": 2}),
    "stride is kernel": ((2, 28, 28, 32), (2, 2, 32, 48), {"stride": 2}),
    "depthwise": ((2, 40, 37, 48), (3, 3, 1, 48), {"padding": 1, "groups": 48}),
    "depthwise 7x7": ((2, 26, 24, 40), (7, 7, 1, 40), {"padding": 3, "groups": 40}),
    "depthwise strided": ((2, 40, 37, 24), (5, 5, 1, 48), {"padding": 2, "groups": 24, "stride": 2}),
    "depthwise, long lines": ((1, 3, 700, 32), (1, 7, 1, 32), {"padding": (0, 3), "groups": 32}),
}  # fmt: skip


@pytest.fixture
def restored() -> Iterator[None]:
    """Put the threads and the workspace limit back."""
    limit = gpuconv.get_workspace_limit()
    yield
    gpuconv.set_num_threads(None)
    gpuconv.set_workspace_limit(limit)


def problem_of(shape: str, dtype: str = "float64") -> Any:
    x, w, options = SHAPES[shape]
    values = {k: _hashable(v) for k, v in options.items()}
    return _plan(
        2, x, w, dtype, values.get("stride", 1), values.get("padding", 0),
        values.get("dilation", 1), values.get("groups", 1), "NHWC", None,
    ).problem  # fmt: skip


def reference(x: np.ndarray, w: np.ndarray, **options: Any) -> np.ndarray:
    """Return the convolution as a sum over taps, in the simplest whole-array form."""
    problem = _plan(
        2, x.shape, w.shape, x.dtype.name, *(_hashable(options.get(k, d)) for k, d in (
            ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))), "NHWC", None,
    ).problem  # fmt: skip
    padded = np.pad(x, ((0, 0), *problem.padding, (0, 0)))
    rows, columns = problem.out_shape
    groups = problem.groups
    y = np.zeros(problem.y_shape, x.dtype)
    w_in, out = w.shape[2], w.shape[3] // groups
    for p in range(w.shape[0]):
        for q in range(w.shape[1]):
            i, j = p * problem.dilation[0], q * problem.dilation[1]
            cells = padded[
                :,
                i : i + (rows - 1) * problem.stride[0] + 1 : problem.stride[0],
                j : j + (columns - 1) * problem.stride[1] + 1 : problem.stride[1],
            ]
            for g in range(groups):
                y[..., g * out : (g + 1) * out] += (
                    cells[..., g * w_in : (g + 1) * w_in] @ w[p, q, :, g * out : (g + 1) * out]
                )
    return y


def test_the_reference_agrees_with_the_loops() -> None:
    x, w = RNG.standard_normal((1, 6, 7, 4)), RNG.standard_normal((3, 2, 2, 6))
    options = {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2), "groups": 2}
    with gpuconv.engine("naive"):
        want = gpuconv.conv2d(x, w, **options)
    np.testing.assert_allclose(reference(x, w, **options), want, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_many_blocks_and_workers(engine: str, shape: str, restored: None) -> None:
    made = dispatch.get_engine(available(engine))
    problem = problem_of(shape)
    if any(made.unsupported(problem, p) for p in PASSES):
        return  # the conformance suite sees that it says why
    xs, ws, options = SHAPES[shape]
    x, w = RNG.standard_normal(xs), RNG.standard_normal(ws)
    b = RNG.standard_normal(ws[-1])
    want = reference(x, w, **options)
    dy = RNG.standard_normal(want.shape)
    with gpuconv.engine("numpy_gemm"):
        gradients = gpuconv.conv2d_backward(dy, x, w, **options)
    # The gradients of a bilinear form: <dy, conv(x, w)> = <dx, x> = <dw, w>.
    for gradient, array in zip(gradients[:2], (x, w), strict=True):
        assert (gradient * array).sum() == pytest.approx((dy * want).sum(), rel=1e-9)
    scale = max(1.0, np.abs(want).max())
    for threads, limit in ((1, 2**28), (2, 2**28), (3, 2**28), (2, 2**22)):
        gpuconv.set_num_threads(threads)
        gpuconv.set_workspace_limit(limit)
        if any(made.unsupported(problem, p) for p in PASSES):
            continue  # filters beyond this limit
        with gpuconv.engine(engine):
            y = gpuconv.conv2d(x, w, b, activation="ReLU", **options)
            np.testing.assert_allclose(y, np.maximum(want + b, 0), atol=1e-11 * scale)
            for got, exact in zip(
                gpuconv.conv2d_backward(dy, x, w, **options), gradients, strict=True
            ):
                most = max(1.0, np.abs(exact).max())
                np.testing.assert_allclose(got, exact, atol=1e-11 * most)


@pytest.mark.parametrize("engine", ENGINES)
def test_same_bits_from_run_to_run(engine: str, restored: None) -> None:
    available(engine)
    gpuconv.set_num_threads(3)
    for shape in SHAPES:
        problem = problem_of(shape, "float32")
        if any(dispatch.get_engine(engine).unsupported(problem, p) for p in PASSES):
            continue
        xs, ws, options = SHAPES[shape]
        x, w = (RNG.standard_normal(s).astype("float32") for s in (xs, ws))
        with gpuconv.engine(engine):
            first = gpuconv.conv2d(x, w, **options)
            grads = gpuconv.conv2d_backward(first, x, w, **options)
            for _ in range(2):
                assert gpuconv.conv2d(x, w, **options).tobytes() == first.tobytes()
                again = gpuconv.conv2d_backward(first, x, w, **options)
                assert [a.tobytes() for a in again] == [a.tobytes() for a in grads]


# -------------------------------------------------------------------------------- Winograd


@pytest.mark.parametrize(
    ("m", "r"), [(m, r) for r in range(2, 8) for m in range(1, 8) if m + r - 1 <= toom_cook.LARGEST]
)
def test_minimal_filtering_is_exact_but_for_rounding(m: int, r: int) -> None:
    f = toom_cook.filtering(m, r)
    assert f.n == m + r - 1
    x, g, dy = RNG.standard_normal(f.n), RNG.standard_normal(r), RNG.standard_normal(m)
    y = f.a.T @ ((f.g @ g) * (f.b @ x))
    np.testing.assert_allclose(y, np.correlate(x, g, "valid"), atol=1e-11)
    dg = f.g.T @ ((f.a @ dy) * (f.b @ x))
    np.testing.assert_allclose(dg, np.correlate(x, dy, "valid"), atol=1e-11)
    # The matrices are rationals: B is of integers.
    assert all(Fraction(v).denominator == 1 for v in f.b.ravel())


def test_too_large_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a tile of 11"):
        toom_cook.filtering(9, 3)


@pytest.mark.parametrize("engine", WINOGRAD)
@settings(max_examples=60, deadline=None)
@given(
    kernel=st.one_of(
        st.sampled_from([(3, 3), (7, 1)]),
        st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda k: k != (1, 1)),
    ),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 6),
    channels=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_winograd_keeps_its_bound_in_float32(
    engine: str,
    kernel: Any,
    size: Any,
    dilation: Any,
    padding: int,
    channels: Any,
    offset: float,
    spread: float,
    seed: int,
) -> None:
    """Ten times the tolerance of the other engines, also with large offsets and wide ranges."""
    available(engine)
    if engine == "numba_winograd":  # a kernel takes seconds to compile
        kernel, dilation = ((3, 3) if min(kernel) > 1 else (7, 1)), (1, 1)
    if any(
        d * (k - 1) + 1 > n + 2 * padding for k, n, d in zip(kernel, size, dilation, strict=True)
    ):
        return
    rng = np.random.default_rng(seed)
    options = {"padding": padding, "dilation": dilation}
    x = (
        offset
        + rng.standard_normal((2, *size, channels[0]))
        * 10 ** rng.uniform(-spread, spread, (2, *size, 1))
    ).astype("f4")
    w = (
        rng.standard_normal((*kernel, *channels)) * 10 ** rng.uniform(-spread, 0, (*kernel, 1, 1))
    ).astype("f4")
    want = reference(x.astype("f8"), w.astype("f8"), **options)
    dy = rng.standard_normal(want.shape).astype("f4")
    with gpuconv.engine("numpy_gemm"):
        exact = gpuconv.conv2d_backward(dy.astype("f8"), x.astype("f8"), w.astype("f8"), **options)
    with gpuconv.engine(engine):
        y = gpuconv.conv2d(x, w, **options)
        dx, dw, db = gpuconv.conv2d_backward(dy, x, w, **options)
    taps = kernel[0] * kernel[1]
    lengths = taps * channels[0], taps * channels[1], dy[..., 0].size, dy[..., 0].size
    for got, wanted, length in zip((y, dx, dw, db), (want, *exact), lengths, strict=True):
        error = np.abs(got - wanted).max() / max(1e-30, np.abs(wanted).max())
        assert error <= 1e-4 * length**0.5


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("engine", WINOGRAD)
def test_what_is_not_finite_stays_in_its_window(engine: str, pass_: str, bad: float) -> None:
    available(engine)
    x, w = (
        RNG.standard_normal((2, 20, 20, 8)).astype("f4"),
        RNG.standard_normal((3, 3, 8, 8)).astype("f4"),
    )
    dy = RNG.standard_normal((2, 20, 20, 8)).astype("f4")
    (dy if pass_ == "input_grad" else x)[1, 9, 9, 3] = bad

    def run() -> np.ndarray:
        if pass_ == "forward":
            return gpuconv.conv2d(x, w, padding=1)
        found = gpuconv.conv2d_backward(dy, x, w, padding=1)[0 if pass_ == "input_grad" else 1]
        assert found is not None
        return found

    with gpuconv.engine("numpy_gemm"):
        want = run()
    with gpuconv.engine(engine):
        got = run()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], rtol=1e-3, atol=1e-3)


def test_strict_precision_leaves_it_out() -> None:
    shapes = (8, 28, 28, 64), (3, 3, 64, 64)
    before = gpuconv.get_precision()
    assert "winograd" in gpuconv.explain(*shapes, padding=1, device="cpu").choice["forward"]
    try:
        gpuconv.set_precision("strict")
        choice = gpuconv.explain(*shapes, padding=1, device="cpu").choice
        assert not any("winograd" in name for name in choice.values())
        for engine in WINOGRAD:
            if dispatch.get_engine(engine).unavailable():
                continue
            with gpuconv.engine(engine), pytest.raises(gpuconv.EngineError, match="strict"):
                gpuconv.conv2d(np.ones(shapes[0], "f4"), np.ones(shapes[1], "f4"))
    finally:
        gpuconv.set_precision(before)


@pytest.mark.parametrize("engine", WINOGRAD)
def test_filters_beyond_the_workspace_are_refused(engine: str, restored: None) -> None:
    available(engine)
    gpuconv.set_workspace_limit(2**21)
    with gpuconv.engine(engine), pytest.raises(gpuconv.EngineError, match="workspace"):
        gpuconv.conv2d(np.ones((1, 9, 9, 256), "f4"), np.ones((3, 3, 256, 256), "f4"))


# ---------------------------------------------------------------------------------- compiled

COMPILED = {
    "rows and a rest": ((5, 13, 17, 20), (1, 1, 20, 70), {}),
    "padding": ((2, 19, 23, 24), (3, 3, 24, 37), {"padding": ((2, 0), (1, 3))}),
    "strided": ((2, 23, 25, 17), (3, 4, 17, 20), {"stride": (2, 3), "padding": 1}),
    "few channels": ((3, 21, 19, 3), (5, 3, 3, 18), {"stride": (2, 1), "padding": (2, 1)}),
    "few channels, dilated rows": ((2, 21, 19, 2), (3, 3, 2, 9), {"dilation": (2, 1)}),
    "groups": ((2, 14, 15, 36), (3, 3, 12, 30), {"groups": 3, "padding": 1}),
    "outside the image": ((1, 5, 6, 8), (3, 3, 8, 20), {"padding": 4, "dilation": (3, 1)}),
    "long sums": ((1, 6, 5, 900), (1, 1, 900, 20), {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ["numba_direct", "numba_winograd"])
def test_the_bits_do_not_depend_on_the_workers(engine: str, dtype: str, restored: None) -> None:
    made = dispatch.get_engine(available(engine))
    for xs, ws, options in COMPILED.values():
        x, w = (RNG.standard_normal(s).astype(dtype) for s in (xs, ws))
        want = reference(x.astype("f8"), w.astype("f8"), **options)
        dy = RNG.standard_normal(want.shape).astype(dtype)
        values = {k: _hashable(v) for k, v in options.items()}
        problem = _plan(
            2, xs, ws, dtype, values.get("stride", 1), values.get("padding", 0),
            values.get("dilation", 1), values.get("groups", 1), "NHWC", None,
        ).problem  # fmt: skip
        if any(made.unsupported(problem, p) for p in PASSES):
            continue
        with gpuconv.engine("numpy_gemm"):
            exact = gpuconv.conv2d_backward(
                *(a.astype("f8") for a in (dy, x, w)), needs=("x", "w"), **options
            )
        found = []
        for workers in (1, 2, 3):
            gpuconv.set_num_threads(workers)
            with gpuconv.engine(engine):
                y = gpuconv.conv2d(x, w, **options)
                dx, dw, _ = gpuconv.conv2d_backward(dy, x, w, needs=("x", "w"), **options)
            found.append([y, dx, dw])
        for results in found[1:]:
            assert [a.tobytes() for a in results] == [a.tobytes() for a in found[0]]
        for got, wanted in zip(found[0], (want, *exact[:2]), strict=True):
            most = max(1.0, np.abs(wanted).max())
            bound = {"float32": 2e-5, "float64": 1e-12}[dtype] * most * made.error_factor
            np.testing.assert_allclose(got, wanted, atol=bound)


def test_a_sum_in_front_of_a_relu_is_one_pass_with_the_same_result(restored: None) -> None:
    """The compiled pass, and NumPy's where an array is not dense."""
    from gpuconv.activations import get_activation
    from gpuconv.engines.epilogue import output_grad

    for dtype, shape in (("float32", (3, 31, 29, 19)), ("float64", (2, 5, 3, 1))):
        dy, y = (RNG.standard_normal(shape).astype(dtype) for _ in range(2))
        y[0, 0, 0], dy[0, 0, 1] = np.nan, np.inf
        y = np.maximum(y, 0)
        results = []
        for workers, spread in ((1, False), (2, False), (2, True)):
            gpuconv.set_num_threads(workers)
            dz, db = np.empty_like(dy), np.empty(shape[-1], dtype)
            other = np.repeat(y, 2, axis=-1)[..., ::2] if spread else y
            with np.errstate(invalid="ignore"):
                output_grad(dy, other, get_activation("ReLU"), dz, db)
            results.append((dz, db))
        for dz, db in results[1:]:
            np.testing.assert_array_equal(dz, results[0][0])
            np.testing.assert_allclose(db, results[0][1], rtol=1e-4, atol=1e-4)


def test_views_that_are_kept_follow_their_buffers() -> None:
    """Small and large images in turn: the views of the small one's buffers are made again."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((3, 3, 1, 4)).astype("float32")
    images = [
        rng.standard_normal((1, side, side, 1)).astype("float32") for side in (8, 9, 40, 8, 300, 8)
    ]
    with gpuconv.engine("naive"):
        want = [gpuconv.conv2d(x[:, :40, :40], w) for x in images]
    with gpuconv.engine("numpy_planar"):
        for _ in range(2):
            for x, expected in zip(images, want, strict=True):
                side = expected.shape[1]
                close(gpuconv.conv2d(x, w)[:, :side, :side], expected, 1e-5)
