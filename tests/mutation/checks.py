"""What broken kernels are held against: small convolutions of every kind, on every CUDA engine.

Each check computes on the stand-in in its checking mode and compares with the loops in float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np

import gpuconv
from gpuconv import dispatch, normalization
from gpuconv.activations import get_activation
from gpuconv.cuda import kernels
from gpuconv.cuda import normalization as on_device
from gpuconv.cuda.tensor_tiles import TILES
from gpuconv.engines import tensor_wgmma
from gpuconv.engines.base import PASSES
from tests.cuda_on_cpu import stand_in
from tests.mutation.problems import (
    ACTIVATIONS,
    PROBLEMS,
    WGMMA,
    Problem,
    convolution,
    described,
    dtype_of,
    in_force,
)
from tests.support import close
from tests.tensor_core_banks import assert_apart, banks

__all__ = ["Check", "checks", "drawn"]

#: Kernels that compute anew what is not finite, and the arguments that they read for it.
_MENDING = {"winograd_output": (3, 4), "winograd_filter_grad": (2, 3)}
_TOLERANCES = {"float64": 1e-11, "float16": 5e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Check:
    """One problem on one engine.

    Attributes
    ----------
    name : str
    topic : str
        What the problem is about; each kernel source is tried on each topic that reaches it.
    run : callable
        Computes and compares; raises where something is wrong.
    prepare : callable
        Computes what is compared with, once for all processes that are forked later.
    detail : str
        All there is to say of the problem.
    """

    name: str
    topic: str
    run: Callable[[], None]
    prepare: Callable[[], object] = lambda: None
    detail: str = ""


def drawn(problem: Problem, dtype: str) -> dict[str, np.ndarray]:
    """Return inputs, channels last, and arrays of the results' shapes."""
    rng = np.random.default_rng(zlib.crc32(problem.name.encode()))
    x, w = rng.standard_normal(problem.x), rng.standard_normal(problem.w)
    w *= np.prod(problem.w[:-1]) ** -0.5
    if problem.blank:
        x *= 3
        x[:, : problem.x[1] // 2 + 1] = 0
    b = rng.standard_normal(problem.w[-1])
    dy = rng.standard_normal(described(problem, dtype).y_shape)
    if problem.poison is not None:
        for array in (x, dy):
            at = problem.poison
            array[0, at, at, 0], array[-1, -1 - at, -2 - at, -1] = np.nan, np.inf
    made = {n: _rounded(a, dtype) for n, a in (("x", x), ("w", w), ("b", b), ("dy", dy))}
    results = {"seen": "dy", "y": "dy", "dx": "x", "dw": "w", "db": "b"}
    if dtype == "tf32":
        results |= {f"{n}_tf32": like for n, like in results.items()}
    return made | {n: np.zeros_like(made[like]) for n, like in results.items()}


def _rounded(a: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(a, dtype_of(dtype))


def _to_tf32(a: np.ndarray) -> np.ndarray:
    """Round to what tensor cores read: 10 bits behind the point, halves away from zero."""
    bits = np.ascontiguousarray(a, "f4").view("u4")
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view("f4")


@cache
def _oracle(problem: Problem, dtype: str) -> dict[str, np.ndarray]:
    """Return inputs, and results of the loops in float64, channels last.

    In TF32 the results (named ``*_tf32``) of the rounded inputs as well.
    """
    data = drawn(problem, dtype)
    found = _loops(problem, data, dtype, lambda a: a, None)
    if dtype == "tf32":
        rounded = _loops(problem, data, dtype, _to_tf32, found["seen"])
        found |= {f"{n}_tf32": a for n, a in rounded.items()}
    return data | found


def _loops(
    problem: Problem,
    data: dict[str, np.ndarray],
    dtype: str,
    rounded: Callable[..., np.ndarray],
    seen: np.ndarray | None,
) -> dict[str, np.ndarray]:
    call, back = getattr(gpuconv, problem.call), getattr(gpuconv, f"{problem.call}_backward")
    x, w, dy = (rounded(data[n]).astype("f8") for n in ("x", "w", "dy"))
    b = data["b"].astype("f8")
    options = {**dict(problem.options), "activation": problem.activation}
    with gpuconv.engine("naive"):
        y = call(x, w, b if problem.bias else None, **options)
        seen = y.astype(dtype_of(dtype)) if seen is None else seen
        found = {"y": y, "seen": seen}
        if _invertible(problem.activation):
            gradients = back(dy, x, w, y=seen.astype("f8"), **options)
            found |= dict(zip(("dx", "dw", "db"), gradients, strict=True))
            found["db"] = back(
                data["dy"].astype("f8"), x, w, y=seen.astype("f8"), needs="b", **options
            )[2]  # no product: nothing is rounded
    return found


def _invertible(activation: str | None) -> bool:
    """Return whether the derivative follows from the output, so that gradients can be had."""
    return activation is None or not activation.startswith("GELU")


_IMAGES, _WEIGHTS = ("x", "dy", "seen", "y", "dx", "y_tf32", "dx_tf32"), ("w", "dw", "dw_tf32")


def _laid(problem: Problem, name: str, a: np.ndarray) -> np.ndarray:
    """Return an array in the problem's layout."""
    if problem.first and name in _IMAGES:
        return np.ascontiguousarray(np.moveaxis(a, -1, 1))
    if problem.first and name in _WEIGHTS:
        return np.ascontiguousarray(np.moveaxis(a, (-1, -2), (0, 1)))
    return a


def _close(
    engine: str, problem: Problem, dtype: str, reduction: int, got: Any, given: Any, name: str
) -> None:
    factor = dispatch.get_engine(engine).error_factor
    sums = 1e-5 * max(1, reduction) ** 0.5 * factor
    value = gpuconv.asnumpy(got)
    compare = _meet_nan if problem.poison is not None else close
    try:
        compare(value, given[name], _TOLERANCES.get(dtype, sums))
    except AssertionError:
        # Rounded to TF32 at once, and from there on as exact as float32; where the activation's
        # derivative comes first, the product with it is what is rounded.
        if dtype != "tf32":
            raise
        exact = name == "y" or problem.activation in (None, "ReLU")
        compare(value, given[f"{name}_tf32"], sums if exact else 2e-3)


def _spread(cp: Any, a: np.ndarray) -> Any:
    """Return the array as every second element of a larger one of the device, along each axis."""
    large = cp.empty([2 * n for n in a.shape], a.dtype)
    view = large[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = cp.asarray(a)
    return view


def _meet_nan(got: np.ndarray, want: np.ndarray, allowed: float) -> None:
    """Compare where some values are not finite."""
    got = got.astype("f8")
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    assert np.isfinite(got[finite]).all()
    close(got[finite], want[finite], allowed)


def _convolve(engine: str, problem: Problem, dtype: str) -> None:
    """Compute the passes that the engine takes; those that it does not take are left out."""
    data = _oracle(problem, dtype)
    given = {n: _laid(problem, n, a) for n, a in data.items()}
    call, back = getattr(gpuconv, problem.call), getattr(gpuconv, f"{problem.call}_backward")
    with stand_in("checked", 1) as cp, gpuconv.engine(engine), in_force(problem, dtype):
        x, w, b, dy, seen = (cp.asarray(given[n]) for n in ("x", "w", "b", "dy", "seen"))
        if problem.spread:
            x, dy, seen = (_spread(cp, given[n]) for n in ("x", "dy", "seen"))
        length = int(np.prod(problem.w[:-1]))
        try:
            out = _spread(cp, given["y"].astype(given["x"].dtype)) if problem.spread else None
            y = call(x, w, b if problem.bias else None, out=out, **problem.keywords)
        except gpuconv.EngineError:
            pass
        else:
            _close(engine, problem, dtype, length, y, given, "y")
        if not _invertible(problem.activation):
            return
        together = ("xwb",) if dispatch.get_engine(engine).fused_backward else ("x", "wb")
        for needs in (*together, *(("x", "w", "b") if problem.apart else ())):
            try:
                found = back(dy, x, w, y=seen, needs=needs, **problem.keywords)
            except gpuconv.EngineError:
                continue
            reductions = (length, data["dy"].size // problem.w[-1], data["dy"].size)
            for name, got, reduction in zip(("dx", "dw", "db"), found, reductions, strict=True):
                if got is not None:
                    _close(engine, problem, dtype, reduction, got, given, name)
        if problem.poison is None:
            _nothing_repaired(cp)


def _nothing_repaired(cp: Any) -> None:
    """Winograd's last kernels read images and weights to mend what is not finite, or never."""
    for (kernel, *_), traffic in zip(cp.settings.launches, cp.settings.traffic, strict=False):
        arrays = next((a for name, a in _MENDING.items() if name in kernel), ())
        read = [traffic[a][0] for a in arrays if a in traffic]
        assert not any(read), f"{kernel} read {read} bytes to mend what was finite"


def _takes(engine: str, problem: Problem, dtype: str) -> bool:
    """Return whether the engine computes some pass of it."""
    made, convolved = dispatch.get_engine(engine), described(problem, dtype)
    with in_force(problem, dtype):
        return any(made.unsupported(convolved, p) is None for p in PASSES)


# ------------------------------------------------------------------- compute capability 9.0


def _on_hopper(problem: Problem, dtype: str, wanted: str) -> None:
    """Compute one pass as compute capability 9.0 does."""
    engine, data = "cuda_tensor_core", _oracle(problem, dtype)
    call, back = getattr(gpuconv, problem.call), getattr(gpuconv, f"{problem.call}_backward")
    with (
        stand_in("checked", 1, capability=90) as cp,
        gpuconv.engine(engine),
        in_force(problem, dtype),
        mock.patch.object(tensor_wgmma._log, "warning", _refused),
    ):
        x, w, b, dy = (cp.asarray(data[n]) for n in ("x", "w", "b", "dy"))
        if wanted == "y":
            got = call(x, w, b if problem.bias else None, **problem.keywords)
        else:
            got = back(dy, x, w, needs=wanted, **problem.keywords)["xw".index(wanted)]
        reduction = data["dy"].size // problem.w[-1] if wanted == "w" else np.prod(problem.w[:-1])
        name = wanted if wanted == "y" else f"d{wanted}"
        _close(engine, problem, dtype, int(reduction), got, data, name)


def _refused(text: str, reason: object) -> None:
    """In the place of a warning that another kernel is used: here nothing else will do."""
    raise reason if isinstance(reason, Exception) else RuntimeError(text % reason)


def _of_hopper() -> Iterator[Check]:
    for dtype, passes, problem in WGMMA:
        for wanted in passes:

            def run(p: Problem = problem, d: str = dtype, q: str = wanted) -> None:
                _on_hopper(p, d, q)

            def prepare(p: Problem = problem, d: str = dtype) -> None:
                _oracle(p, d)

            topic = f"{problem.name}-{wanted}"
            yield Check(f"cuda_tensor_core/{dtype}/{topic}", topic, run, prepare, f"{problem}")


# ------------------------------------------------------------------------------ normalisation


def _normalise(dtype: str, activation: str | None, rows: int, columns: int, wide: bool) -> None:
    """Statistics, result and gradients of a batch normalisation, beside NumPy's in float64."""
    rng = np.random.default_rng(rows)
    x, dy = ((rng.standard_normal((rows, columns)) + 3).astype(dtype_of(dtype)) for _ in range(2))
    act = None if activation is None else get_activation(activation)
    x64, dy64 = x.astype("f8"), dy.astype("f8")
    mean, variance = x64.mean(axis=0), x64.var(axis=0)
    inverse, scaler = (variance + 1e-5) ** -0.5, rng.standard_normal(columns) + 2
    factor, offset = inverse * scaler, rng.standard_normal(columns)
    z = (x64 - mean) * factor + offset
    y64 = z if act is None else act.fn(z)
    y = y64.astype(dtype_of(dtype))
    slope = 1 if act is None else act.grad_from_output(y.astype("f8"))
    d, normal = dy64 * slope, (x64 - mean) * inverse
    db, ds = d.sum(axis=0), (d * normal).sum(axis=0)
    dx = factor * (d - (db + normal * ds) / rows)
    allowed = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-2}.get(dtype, 5e-3)
    sums = "float64" if dtype == "float64" else "float32"
    with stand_in("checked", 1) as cp, ExitStack() as stack:
        if wide:
            stack.enter_context(mock.patch.object(on_device, "_WIDE_FROM", 0))
        stack.enter_context(mock.patch.object(kernels, "grid_for", return_value=1))
        values = [cp.asarray(v.astype(sums)) for v in (mean, inverse, scaler)]
        image = cp.asarray(x)
        found = normalization.column_statistics(image)
        close(gpuconv.asnumpy(found[0]), mean, allowed)
        close(gpuconv.asnumpy(found[1]), variance, allowed)
        intercept = cp.asarray(offset.astype(sums))
        made = normalization.normalized_columns(image, *values, intercept, act)
        close(gpuconv.asnumpy(made), y64, allowed)
        seen = None if act is None else cp.asarray(y)
        got = normalization.columns_grad(cp.asarray(dy), image, *values, True, True, seen, act)
        for have, want in zip(got, (dx, ds, db), strict=True):
            close(gpuconv.asnumpy(have), want, 4 * allowed)


# --------------------------------------------------------------------------------------- banks


def _of_banks() -> Iterator[Check]:
    """Where the tensor cores' kernels meet shared memory at once; it costs time and no value."""
    for tile in (TILES[1], TILES[-1]):
        for pass_ in PASSES:
            for dtype in ("float16", "float32"):

                def run(t: Any = tile, p: Any = pass_, d: str = dtype) -> None:
                    with stand_in("checked", 1) as cp:
                        assert_apart(banks(cp, t, p, d))

                topic = f"banks-{pass_}-{tile}-{dtype}"
                yield Check(f"banks/{dtype}/{pass_}-{tile}", topic, run)


# ----------------------------------------------------------------------------------------- all


def checks(engines: Collection[str] | None = None) -> list[Check]:
    """Return every check: each engine that can be used here (or of these), on what it takes."""
    with stand_in():
        made = [
            check
            for engine in (e.name for e in gpuconv.engines() if e.device == "cuda" and e.available)
            if engines is None or engine in engines
            for check in _of_engine(engine)
        ]
    hopper = _of_hopper() if engines is None or "cuda_tensor_core" in engines else ()
    return [*made, *_of_normalisation(), *_of_banks(), *hopper]


def _of_engine(engine: str) -> Iterator[Check]:
    for dtype in ("float32", "float16", "bfloat16", "float64", "tf32"):
        for problem in PROBLEMS:
            yield from _conv(engine, problem, dtype, problem.name)
        for activation in ACTIVATIONS if dtype in ("float32", "float64") else ():
            for name, w, groups in (("dense", (3, 3, 8, 8), 1), ("depth", (3, 3, 1, 8), 8)):
                problem = convolution(
                    f"{activation} {name}", (1, 7, 5, 8), w, activation=activation, padding=1,
                    groups=groups, bias=False, blank=True,
                )  # fmt: skip
                yield from _conv(engine, problem, dtype, f"activations {name}")


def _of_normalisation() -> Iterator[Check]:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for rows, columns, wide in ((150, 35, False), (3, 2, True), (600, 1, False)):
            for activation in (None, "ReLU"):
                topic = f"columns-{rows}x{columns}-{activation}"

                def run(
                    d: str = dtype, a: Any = activation, s: Any = (rows, columns, wide)
                ) -> None:
                    _normalise(d, a, *s)

                yield Check(f"batch-norm/{dtype}/{topic}", topic, run)


def _conv(engine: str, problem: Problem, dtype: str, topic: str) -> Iterator[Check]:
    if _takes(engine, problem, dtype):
        yield Check(
            f"{engine}/{dtype}/{problem.name}",
            topic,
            lambda: _convolve(engine, problem, dtype),
            lambda: _oracle(problem, dtype),
            f"{problem}",
        )
