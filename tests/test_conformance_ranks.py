"""Every engine, rank, dtype and pass against the loops in 64 bits; transposed ones as well."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch
from gpuconv.device import namespace
from gpuconv.engines.base import PASSES
from gpuconv.problem import COMPLEX, DTYPES
from tests.ranks import CASES, ENGINES, Ranked, allowed, answers, listing, wide
from tests.support import home, host


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """Force an engine, and give the library that its arrays are of."""
    with home(request.param) as xp, gpuconv.engine(request.param):
        yield request.param, xp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_every_pass(engine: tuple[str, Any], c: Ranked, dtype: str) -> None:
    name, xp = engine
    data = answers(c, dtype)
    problem = c.problem(dtype)
    made = dispatch.get_engine(name)
    reasons = {p: made.unsupported(problem, p) for p in PASSES}
    x, w, b, dy = (xp.asarray(a) for a in (data.x, data.w, data.b, data.dy))
    options = c.keywords(dtype)
    for p, reason in reasons.items():
        if reason:
            calls = pass_calls(c, p, (dy, x, w, b), options)
            with pytest.raises(gpuconv.EngineError, match=re.escape(reason)):
                calls()
    if any(reasons.values()):
        return
    length = max(problem.reduction_length(p) for p in PASSES)
    y = c.call()(x, w, b, **options)
    seen = xp.asarray(data.y.astype(dtype)) if options["activation"] else None
    got = c.call("_backward")(dy, x, w, y=seen, **options)
    for value, want in zip((y, *got), (data.y, *data.gradients), strict=True):
        assert namespace(value) is xp
        assert value.dtype == x.dtype
        close(host(value), want, wide(dtype), allowed(name, dtype, length))


def pass_calls(c: Ranked, p: str, arrays: Any, options: dict[str, Any]) -> Any:
    """Return a call that needs the pass."""
    dy, x, w, b = arrays
    plain = {**options, "activation": None}
    roles = {"forward": "input_grad", "input_grad": "forward"} if c.transposed else {}
    role = roles.get(p, p)
    if role == "forward":
        return lambda: c.call()(x, w, b, **plain)
    needs = "x" if role == "input_grad" else "w"
    return lambda: c.call("_backward")(dy, x, w, needs=needs, **plain)


def close(got: np.ndarray, want: np.ndarray, dtype: str, most: float) -> None:
    assert got.shape == want.shape
    error = np.abs(got.astype(dtype) - want).max() / max(1.0, np.abs(want).max())
    assert error <= most, f"error {error:.3g} > {most:.3g}"


def test_the_listing_has_what_each_engine_promises() -> None:
    table = listing()
    for name in ENGINES:
        made = dispatch.get_engine(name)
        for nd in (1, 2, 3):
            for dtype in DTYPES:
                computed = {p for p in PASSES if table[name, nd, dtype, p]}
                promised = nd in made.ndims and dtype in made.dtypes
                assert computed == (set(PASSES) if promised else set()), (name, nd, dtype)
    for name in ("naive", "numpy_gemm"):
        for nd in (1, 2, 3):
            assert all(table[name, nd, dtype, p] for dtype in DTYPES for p in PASSES)
    for nd in (1, 2, 3):
        assert all(table["cuda_atomic", nd, "bfloat16", p] for p in PASSES)


@pytest.mark.parametrize("dtype", sorted(COMPLEX))
def test_complex_on_a_device_without_an_engine_for_it_is_refused(dtype: str) -> None:
    with home("cuda_atomic") as xp:
        x, w = xp.zeros((1, 4, 4, 1), dtype), xp.zeros((2, 2, 1, 1), dtype)
        with pytest.raises(gpuconv.EngineError, match=f"cuda_atomic: it computes .*not {dtype}"):
            gpuconv.conv2d(x, w)
