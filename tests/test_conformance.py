"""Every engine, dtype and pass against the loops in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch
from gpuconv.device import namespace
from gpuconv.engines.base import PASSES, Pass
from gpuconv.functional import _hashable, _plan
from gpuconv.problem import ConvProblem
from tests.support import (
    CASES,
    CPU_ENGINES,
    CUDA_ENGINES,
    DTYPES,
    Case,
    close,
    home,
    host,
    oracle,
    tolerance,
    widest,
)

ENGINES = [*CPU_ENGINES, *CUDA_ENGINES]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Force an engine, and give the library that its arrays are of."""
    with home(request.param) as xp, gpuconv.engine(request.param):
        yield request.param, xp


def test_every_registered_engine_is_tested() -> None:
    assert {info.name for info in gpuconv.engines()} == set(ENGINES)


def problem_of(c: Case, dtype: str) -> ConvProblem:
    data = oracle(c, dtype)
    options = {k: _hashable(v) for k, v in c.options}
    return _plan(
        2, data.x.shape, data.w.shape, dtype, options.get("stride", 1), options.get("padding", 0),
        options.get("dilation", 1), options.get("groups", 1), c.layout, None,
    ).problem  # fmt: skip


def reductions(c: Case, dtype: str) -> dict[str, int]:
    problem = problem_of(c, dtype)
    return {p: problem.reduction_length(p) for p in PASSES}


def refused(name: str, c: Case, dtype: str, call: Callable[[], Any], *passes: Pass) -> bool:
    """Return whether the engine does not take the case; it must then say why."""
    problem = problem_of(c, dtype)
    reasons = [dispatch.get_engine(name).unsupported(problem, p) for p in passes or PASSES]
    reason = next((r for r in reasons if r), None)
    if reason is None:
        return False
    with pytest.raises(gpuconv.EngineError, match=re.escape(reason)):
        call()
    return True


def taken(name: str, dtype: str) -> Case:
    """Return the first case with an activation that the engine takes in every pass."""
    made = dispatch.get_engine(name)
    return next(
        c
        for c in CASES
        if c.activation and not any(made.unsupported(problem_of(c, dtype), p) for p in PASSES)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_forward(engine: tuple[str, Any], c: Case, dtype: str) -> None:
    name, xp = engine
    data = oracle(c, dtype)
    b = None if data.b is None else xp.asarray(data.b)

    def call() -> Any:
        return gpuconv.conv2d(xp.asarray(data.x), xp.asarray(data.w), b, **c.keywords)

    if refused(name, c, dtype, call, "forward"):
        return
    y = call()
    assert namespace(y) is xp
    assert y.dtype == dtype
    close(host(y), data.y, tolerance(name, dtype, reductions(c, dtype)["forward"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("needs", ["x", "w", "b", "xwb"])
def test_backward(engine: tuple[str, Any], c: Case, dtype: str, needs: str) -> None:
    name, xp = engine
    data = oracle(c, dtype)
    y = xp.asarray(data.y.astype(dtype)) if c.activation else None
    arrays = xp.asarray(data.dy), xp.asarray(data.x), xp.asarray(data.w)

    def call() -> Any:
        return gpuconv.conv2d_backward(*arrays, y=y, needs=needs, **c.keywords)

    passes: dict[str, Pass] = {"x": "input_grad", "w": "weight_grad", "b": "weight_grad"}
    if refused(name, c, dtype, call, *(passes[key] for key in needs)):
        return
    got = call()
    length = reductions(c, dtype)
    wanted = {
        "x": (got[0], data.dx, length["input_grad"]),
        "w": (got[1], data.dw, length["weight_grad"]),
        "b": (got[2], data.db, length["weight_grad"]),
    }
    for key, (gradient, want, reduction) in wanted.items():
        if key not in needs:
            assert gradient is None
            continue
        assert namespace(gradient) is xp
        assert gradient.dtype == dtype
        close(host(gradient), want, tolerance(name, dtype, reduction))


def test_nan_and_infinity_go_where_the_definition_sends_them(engine: tuple[str, Any]) -> None:
    name, xp = engine
    x = np.zeros((1, 7, 7, 2))
    x[0, 1, 1, 0], x[0, 5, 5, 1] = np.nan, np.inf
    want = np.zeros((1, 7, 7, 2))
    if "depthwise" in name:  # each channel to itself
        w, options = np.ones((3, 3, 1, 2)), {"padding": 1, "groups": 2}
        want[0, :3, :3, 0], want[0, 4:, 4:, 1] = np.nan, -np.inf
    else:
        w, options = np.ones((3, 3, 2, 2)), {"padding": 1}
        want[0, :3, :3] = np.nan
        want[0, 4:, 4:, 0], want[0, 4:, 4:, 1] = np.inf, -np.inf
    w[..., 1] *= -1
    x, w, given = (a.astype(widest(name)) for a in (x, w, want))
    y = host(gpuconv.conv2d(xp.asarray(x), xp.asarray(w), **options))
    np.testing.assert_array_equal(y, want)
    for act in ("ReLU", "LeakyReLU(0)"):
        rectified = host(gpuconv.conv2d(xp.asarray(x), xp.asarray(w), activation=act, **options))
        np.testing.assert_array_equal(rectified, np.maximum(want, 0), err_msg=act)
    dx, dw, db = gpuconv.conv2d_backward(xp.asarray(given), xp.asarray(x), xp.asarray(w), **options)
    assert np.isnan(host(dx)[0, :4, :4, 0]).all()
    assert not np.isnan(host(dx)[0, 0:3, 5:]).any()
    assert np.isnan(host(dw)[..., 0]).all()
    assert np.isnan(host(db)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(engine: tuple[str, Any], dtype: str) -> None:
    name, xp = engine
    made = dispatch.get_engine(name)
    if not made.can_repeat():
        with gpuconv.deterministic(True), pytest.raises(gpuconv.EngineError, match="deterministic"):
            gpuconv.conv2d(xp.zeros((1, 3, 3, 1), dtype), xp.zeros((2, 2, 1, 1), dtype))
        return
    if dtype not in made.dtypes:
        return
    c = taken(name, dtype)
    data = oracle(c, dtype)
    arrays = xp.asarray(data.dy), xp.asarray(data.x), xp.asarray(data.w)
    y = xp.asarray(data.y.astype(dtype))
    with nullcontext() if made.deterministic else gpuconv.deterministic(True):
        runs = [gpuconv.conv2d_backward(*arrays, y=y, **c.keywords) for _ in range(3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert host(a).tobytes() == host(b).tobytes()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_empty_batch(engine: tuple[str, Any], layout: str) -> None:
    _, xp = engine
    shape = (0, 5, 5, 2) if layout == "NHWC" else (0, 2, 5, 5)
    kernel = (3, 3, 2, 4) if layout == "NHWC" else (4, 2, 3, 3)
    x, w = xp.zeros(shape, "float32"), xp.ones(kernel, "float32")
    y = gpuconv.conv2d(x, w, xp.ones(4, "float32"), layout=layout)
    assert y.shape == ((0, 3, 3, 4) if layout == "NHWC" else (0, 4, 3, 3))
    dx, dw, db = gpuconv.conv2d_backward(y, x, w, layout=layout)
    assert dx.shape == x.shape
    assert not host(dw).any()
    assert not host(db).any()


def memory_forms(a: np.ndarray) -> dict[str, np.ndarray]:
    spread = np.zeros([2 * n + 1 for n in a.shape], a.dtype)[
        tuple(slice(1, None, 2) for _ in a.shape)
    ]
    spread[...] = a
    backwards = np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1]
    return {
        "fortran": np.asfortranarray(a),
        "spread": spread,
        "negative strides": backwards,
        "transposed": np.ascontiguousarray(a.T).T,
    }


@pytest.mark.parametrize("form", ["fortran", "spread", "negative strides", "transposed"])
@pytest.mark.parametrize(
    "c",
    [c for c in CASES if c.name in ("strided", "first-layout", "one-by-one", "depthwise")],
    ids=lambda c: c.name,
)
def test_any_strides(engine: tuple[str, Any], c: Case, form: str) -> None:
    _, xp = engine
    data = oracle(c, "float64")
    x, w, dy, y = (memory_forms(a)[form] for a in (data.x, data.w, data.dy, data.y))
    if xp is not np:  # a device array of the same strides

        def strided(a: np.ndarray) -> Any:
            if form == "spread":
                shape = [2 * n + 1 for n in a.shape]
                view = xp.zeros(shape)[tuple(slice(1, None, 2) for _ in shape)]
                view[...] = xp.asarray(np.ascontiguousarray(a))
                return view
            if form == "negative strides":
                return xp.asarray(np.ascontiguousarray(a[::-1, ::-1]))[::-1, ::-1]
            axes = tuple(reversed(range(a.ndim)))
            return xp.asarray(np.ascontiguousarray(a.T)).transpose(axes)

        x, w, dy, y = map(strided, (x, w, dy, y))
    b = None if data.b is None else xp.asarray(data.b)
    if refused(engine[0], c, "float64", lambda: gpuconv.conv2d(x, w, b, **c.keywords)):
        return
    close(host(gpuconv.conv2d(x, w, b, **c.keywords)), data.y, 1e-11)
    got = gpuconv.conv2d_backward(dy, x, w, y=y if c.activation else None, **c.keywords)
    for gradient, want in zip(got, (data.dx, data.dw, data.db), strict=True):
        close(host(gradient), want, 1e-11)


def test_out_of_any_strides(engine: tuple[str, Any]) -> None:
    name, xp = engine
    dtype = widest(name)
    c = taken(name, dtype)
    data = oracle(c, dtype)
    n, h, w_, o = data.y.shape
    place = xp.full((n, 2 * h, w_, o + 3), 7, dtype)
    view = place[:, ::2, :, 1 : o + 1]
    returned = gpuconv.conv2d(
        xp.asarray(data.x), xp.asarray(data.w), xp.asarray(data.b), out=view, **c.keywords
    )
    assert returned is view
    close(host(view), data.y, tolerance(name, dtype, reductions(c, dtype)["forward"]))
    rest = host(place).copy()
    rest[:, ::2, :, 1 : o + 1] = 7
    assert (rest == 7).all()


def test_inputs_are_not_changed(engine: tuple[str, Any]) -> None:
    name, xp = engine
    made = dispatch.get_engine(name)
    dtype = "float32" if "float32" in made.dtypes else made.dtypes[0]
    c = taken(name, dtype)
    data = oracle(c, dtype)
    arrays = [xp.asarray(a.astype(dtype)) for a in (data.dy, data.x, data.w, data.y)]
    before = [host(a).copy() for a in arrays]
    gpuconv.conv2d(arrays[1], arrays[2], **c.keywords)
    gpuconv.conv2d_backward(*arrays[:3], y=arrays[3], **c.keywords)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(host(a), b)
