"""The fused gradient of the epilogue: the kernels against NumPy, and what the passes make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv.activations import ReLU, get_activation
from gpuconv.cuda import epilogue
from gpuconv.engines import cuda_atomic
from tests.ranks import CASES, answers, wide
from tests.ranks import allowed as allowed_error
from tests.support import home, host, real_gpu

ALLOWED = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
#: Vectors of every length, one strip and several, more columns than a block has lanes.
SHAPES = [
    (1, 1, 1), (2, 3, 3), (2, 7, 7, 40), (5, 4, 4, 33), (2, 8, 9, 260), (150, 10, 4),
    (2, 40, 40, 8), (1, 2, 3, 4, 6),
]  # fmt: skip


def lay(cp: Any, a: np.ndarray, first: bool) -> Any:
    """Return a channels-last view of an array that lies in memory as ``first`` says."""
    if not first:
        return cp.asarray(a)
    stored = np.ascontiguousarray(np.moveaxis(a, -1, 1))
    return cp.asarray(stored).transpose(0, *range(2, a.ndim), 1)


def by_numpy(dy: np.ndarray, y: np.ndarray, act: Any) -> tuple[np.ndarray, np.ndarray]:
    dz = dy.astype("float64")
    if act is not None:
        dz = dz * act.grad_from_output(y.astype("float64"))
    return dz, dz.sum(axis=tuple(range(dy.ndim - 1)))


def agree(got: np.ndarray, want: np.ndarray, allowed: float) -> None:
    assert got.shape == want.shape
    assert (np.abs(got.astype("float64") - want) <= allowed * (1 + np.abs(want).max())).all()


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_against_numpy(mode: str, dtype: str, first: bool) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    with home("cuda_atomic", mode, seed=5) as cp:
        for shape in SHAPES:
            rng = np.random.default_rng(len(shape))
            dy, y = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
            for act in (None, get_activation("ReLU"), get_activation("Tanh")):
                db = cp.empty(shape[-1], dtype)
                dz = epilogue.output_grad(lay(cp, dy, first), lay(cp, y, first), act, db, first)
                want, sums = by_numpy(dy, y, act)
                agree(host(dz), want, ALLOWED[dtype])
                agree(host(db), sums, ALLOWED[dtype])
                if act is not None:
                    axes = (0, dz.ndim - 1, *range(1, dz.ndim - 1)) if first else range(dz.ndim)
                    assert dz.transpose(tuple(axes)).flags.c_contiguous


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_alignment(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 17), min_size=3, max_size=4)))
    first, needs_db = data.draw(st.booleans()), data.draw(st.booleans())
    offset = data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    act = data.draw(st.sampled_from([None, ReLU(), get_activation("LeakyReLU(0.3)")]))
    rng = np.random.default_rng(0)
    dy, y = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    with home("cuda_atomic", "checked") as cp:
        place = cp.empty(dy.size + offset, dtype)[offset:]  # any element of an array
        stored = np.moveaxis(dy, -1, 1) if first else dy
        place[...] = cp.asarray(np.ascontiguousarray(stored).ravel())
        there = place.reshape(stored.shape)
        seen = there.transpose(0, *range(2, dy.ndim), 1) if first else there
        db = cp.empty(shape[-1], dtype) if needs_db else None
        dz = epilogue.output_grad(seen, lay(cp, y, first), act, db, first)
        want, sums = by_numpy(dy, y, act)
        agree(host(dz), want, ALLOWED[dtype])
        if db is not None:
            agree(host(db), sums, ALLOWED[dtype])


def test_wide_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "_WIDE_FROM", 0)
    for dtype in ("float32", "float16"):
        test_against_numpy("fast", dtype, False)
        test_against_numpy("fast", dtype, True)


def test_the_same_bits_whatever_the_order_of_blocks_and_threads() -> None:
    rng = np.random.default_rng(1)
    dy, y = rng.standard_normal((2, 3, 40, 30, 6)).astype("float32")
    for first in (False, True):
        found = set()
        for seed in range(3):
            with home("cuda_atomic", "checked", seed) as cp:
                db = cp.empty(6, "float32")
                epilogue.output_grad(lay(cp, dy, first), lay(cp, y, first), ReLU(), db, first)
                found.add(host(db).tobytes())
        assert len(found) == 1


def test_sums_of_half_precision_do_not_stop_growing() -> None:
    with home("cuda_atomic") as cp:
        for first in (False, True):
            db = cp.empty(2, "float16")
            dy = lay(cp, np.full((8, 100, 50, 2), 0.5, "float16"), first)
            epilogue.output_grad(dy, None, None, db, first)
            assert host(db).tolist() == [20000, 20000]


def test_nan_and_infinity_pass() -> None:
    dy = np.array([np.nan, np.inf, -np.inf, 1], "float32").reshape(1, 1, 1, 4)
    with home("cuda_atomic") as cp:
        y = cp.asarray(np.array([0, 1, 0, np.nan], "float32").reshape(dy.shape))
        db = cp.empty(4, "float32")
        dz = host(epilogue.output_grad(cp.asarray(dy), y, ReLU(), db, False)).ravel()
        np.testing.assert_array_equal(dz, [np.nan, np.inf, np.nan, 0])
        np.testing.assert_array_equal(host(db), dz)


@dataclass(frozen=True)
class Mine(ReLU):
    pass


@pytest.mark.parametrize("divided", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_gradients_of_engines_that_leave_the_epilogue_to_it(
    monkeypatch: pytest.MonkeyPatch, c: Any, dtype: str, divided: bool
) -> None:
    """Through the public calls, transposed ones too; whole, and in parts of the batch."""
    monkeypatch.setattr(cuda_atomic.CudaAtomic, "fused_backward", False)
    data = answers(c, dtype)
    options = c.keywords(dtype)
    if divided:  # no more than an example fits
        monkeypatch.setattr("gpuconv.settings._workspace_limit", 1)
    with home("cuda_atomic") as cp, gpuconv.engine("cuda_atomic"):
        arrays = [cp.asarray(a) for a in (data.dy, data.x, data.w)]
        y = cp.asarray(data.y.astype(dtype)) if c.activation else None
        for needs in (("x", "w", "b"), ("b",), ("x",), ("w",)):
            got = c.call("_backward")(*arrays, y=y, needs=needs, **options)
            for key, value, want in zip("xwb", got, data.gradients, strict=True):
                assert (value is not None) == (key in needs)
                if value is not None:
                    error = np.abs(host(value).astype(wide(dtype)) - want).max()
                    allowed = allowed_error("cuda_atomic", dtype, 100)
                    assert error <= allowed * max(1.0, np.abs(want).max())
        if not real_gpu():
            names = {name.rsplit("_", 1)[0] for name, *_ in cp.settings.launches}
            assert f"epilogue_grad_{'first' if c.first else 'last'}" in names


def test_an_activation_of_ones_own_is_computed_by_array_operations() -> None:
    rng = np.random.default_rng(2)
    dy, y = rng.standard_normal((2, 2, 5, 4, 3)).astype("float32")
    with home("cuda_atomic") as cp:
        results = []
        for act in (Mine(), ReLU()):
            db = cp.empty(3, "float32")
            dz = epilogue.output_grad(cp.asarray(dy), cp.asarray(y), act, db, False)
            results.append((host(dz), host(db)))
        for mine, named in zip(*results, strict=True):
            np.testing.assert_array_equal(mine, named)


def test_launches_and_the_bytes_of_an_example() -> None:
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with home("cuda_atomic") as cp:
        small, large = cp.zeros((1, 3, 3, 8), "float32"), cp.zeros((4, 64, 64, 8), "float32")
        for dy, needs_db, names in (
            (small, True, ["grad_last"]),  # one strip
            (large, True, ["grad_last", "bias_sums"]),
            (large, False, ["grad_last"]),
        ):
            cp.settings.launches.clear()
            epilogue.output_grad(
                dy, dy, ReLU(), cp.empty(8, "float32") if needs_db else None, False
            )
            found = [name for name, *_ in cp.settings.launches]
            assert found == [f"epilogue_{name}_f32" for name in names]
        cp.settings.launches.clear()
        assert epilogue.output_grad(large, None, None, None, False) is large
        assert cp.settings.launches == []
        image = 64 * 64 * 8 * 4
        bytes_of = epilogue.example_bytes
        assert bytes_of(large, None, None, None, False) == 0
        assert bytes_of(large, None, None, cp.empty(8), False) == 0
        assert bytes_of(large, large, ReLU(), None, False) == image
        assert bytes_of(large, large, ReLU(), None, True) == 3 * image  # both are copied


def test_the_gradient_in_front_is_formed_within_the_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    monkeypatch.setattr(cuda_atomic.CudaAtomic, "fused_backward", False)
    before = gpuconv.get_workspace_limit()
    rng = np.random.default_rng(0)
    y, dy = rng.standard_normal((2, 5, 100, 100, 8)).astype("float32")
    x, w = rng.standard_normal((5, 100, 100, 1)), rng.standard_normal((1, 1, 1, 8))
    with home("cuda_atomic") as cp, gpuconv.engine("cuda_atomic"):
        arrays = [cp.asarray(a.astype("float32")) for a in (dy, x, w)]
        seen = cp.asarray(y)
        found = []
        for limit in (before, 2**20):
            gpuconv.set_workspace_limit(limit)
            cp.settings.launches.clear()
            try:
                got = gpuconv.conv2d_backward(*arrays, y=seen, activation="ReLU")
            finally:
                gpuconv.set_workspace_limit(before)
            found.append([host(a) for a in got])
            names = [name for name, *_ in cp.settings.launches]
            assert names.count("epilogue_grad_last_f32") == (1 if limit == before else 5)
        for whole, parts in zip(*found, strict=True):
            np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-3)
