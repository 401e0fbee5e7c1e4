"""What broken kernels are held against: small convolutions of every kind, on every CUDA engine.

Each check computes on the stand-in in its checking mode and compares with the loops in float64.
The problems reach the branches of the kernels: channels that fill vectors and that do not, more
than a tile and less than one, strides, dilations, groups, padding on one side, images smaller
than the kernel, every activation, offsets of 64 bits, grids smaller than the work.
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
from gpuconv import dispatch, normalization, settings
from gpuconv.activations import get_activation
from gpuconv.cuda import kernels
from gpuconv.cuda import normalization as on_device
from gpuconv.cuda.tensor_tiles import TILES
from gpuconv.engines import cuda_arrays, cuda_winograd_plan
from gpuconv.engines.base import PASSES
from gpuconv.functional import _hashable, _plan
from gpuconv.problem import ConvProblem
from tests.cuda_on_cpu import stand_in
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
    """

    name: str
    topic: str
    run: Callable[[], None]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Problem:
    """A convolution, channels last; ``options`` are those of the call.

    Attributes
    ----------
    first : bool
        Arrays are channels first.
    wide : bool
        Offsets of 64 bits.
    one_block : bool
        Grids of one block, where a grid strides over its work.
    apart : bool
        Gradients one by one as well, the others not asked for.
    limit : int
        Bytes of workspace, if not the usual: the batch goes in parts.
    segments : int
        Winograd's weight gradient is summed in so many parts.
    tile : int
        Winograd's tile, if not the one of least cost.
    poison : int
        A NaN and an infinity in images and gradients, so far from the edges; they must go where
        the loops send them.
    spread : bool
        Images and the result lie in larger arrays, so that nothing is dense.
    blank : bool
        The first rows are zero and the rest is large: the activation at a kink and beyond.
    """

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    activation: str | None = "ReLU"
    bias: bool = True
    first: bool = False
    wide: bool = False
    one_block: bool = False
    apart: bool = False
    limit: int = 0
    segments: int = 0
    tile: int = 0
    poison: int = 0
    spread: bool = False
    blank: bool = False

    @property
    def call(self) -> str:
        """Name of the function for its number of axes."""
        return f"conv{len(self.x) - 2}d"

    @property
    def keywords(self) -> dict[str, Any]:
        layout = "channels_first" if self.first else "channels_last"
        return {**dict(self.options), "layout": layout, "activation": self.activation}


def _problem(name: str, x: tuple[int, ...], w: tuple[int, ...], **options: Any) -> Problem:
    own = {k: options.pop(k) for k in list(options) if k in Problem.__dataclass_fields__}
    return Problem(name, x, w, tuple(sorted(options.items())), **own)


PROBLEMS = (
    _problem("dense", (2, 6, 5, 3), (3, 3, 3, 4), padding=1),
    _problem("odd", (2, 7, 9, 5), (3, 2, 5, 7), stride=(2, 1), padding=((1, 0), (0, 2)),
             apart=True),
    _problem("dilated", (1, 9, 8, 4), (3, 2, 4, 6), dilation=(2, 3), padding=(2, 3), bias=False),
    _problem("grouped", (2, 5, 6, 6), (3, 3, 2, 9), groups=3, padding=1, activation=None),
    _problem("one-by-one", (2, 4, 5, 12), (1, 1, 12, 10), activation="Tanh"),
    _problem("one-by-one-strided", (1, 7, 8, 8), (1, 1, 8, 16), stride=2, activation=None),
    _problem("padded-beyond", (1, 2, 3, 4), (2, 3, 4, 8), padding=4, stride=3),
    _problem("first", (2, 5, 7, 3), (3, 3, 3, 4), padding=1, first=True),
    _problem("first-grouped", (2, 6, 5, 4), (2, 3, 2, 6), groups=2, stride=(1, 2), first=True),
    _problem("wide-index", (2, 6, 7, 8), (3, 3, 8, 8), padding=1, stride=2, wide=True),
    _problem("wide-index-odd", (2, 5, 4, 3), (2, 2, 3, 5), wide=True, activation=None),
    _problem("one-block", (3, 9, 9, 8), (3, 3, 8, 8), padding=1, one_block=True),
    _problem("channels-64", (1, 9, 9, 64), (3, 3, 64, 72), padding=1),
    _problem("channels-40", (2, 5, 5, 40), (3, 3, 40, 24), padding=1, activation=None),
    _problem("channels-136", (1, 12, 12, 16), (1, 1, 16, 136)),
    _problem("channels-200", (3, 3, 3, 200), (1, 1, 200, 8), activation=None),
    _problem("rows-300", (2, 13, 12, 8), (3, 3, 8, 16), padding=1),
    _problem("grouped-16", (1, 8, 8, 32), (3, 3, 16, 48), groups=2, padding=1),
    _problem("tiles", (2, 13, 11, 4), (3, 3, 4, 5), padding=((1, 2), (2, 0)), activation=None),
    _problem("positions-1800", (2, 30, 30, 4), (3, 3, 4, 6), padding=1, activation=None),
    _problem("parts", (6, 7, 6, 8), (3, 3, 8, 8), padding=1, limit=16384),
    _problem("parts-odd", (5, 6, 5, 5), (3, 3, 5, 3), activation=None, limit=4096, first=True),
    _problem("parts-of-one", (2, 9, 9, 4), (3, 3, 4, 6), padding=1, limit=3000),
    _problem("parts-of-one-3d", (1, 4, 5, 4, 3), (2, 2, 3, 3, 2), stride=(1, 2, 1), padding=1,
             limit=2000, activation=None, bias=False),
    _problem("spread", (2, 6, 7, 4), (3, 3, 4, 8), padding=1, spread=True),
    _problem("spread-first", (2, 5, 6, 3), (3, 2, 3, 4), spread=True, first=True, bias=False),
    _problem("spread-3d", (2, 3, 4, 5, 4), (2, 2, 2, 4, 3), spread=True, limit=2000),
    _problem("poison", (2, 9, 10, 4), (3, 3, 4, 6), padding=1, activation=None, poison=1),
    _problem("poison-first", (1, 8, 7, 3), (3, 3, 3, 5), activation=None, poison=1, first=True),
    _problem("poison-grouped", (2, 9, 9, 6), (3, 3, 3, 4), padding=((1, 2), (2, 0)), groups=2,
             poison=2, bias=False, activation=None),
    _problem("poison-parts", (3, 8, 9, 6), (3, 3, 6, 4), poison=1, limit=6000, tile=2,
             activation=None),
    _problem("segments", (3, 11, 14, 6), (3, 3, 3, 8), padding=1, groups=2, segments=3, tile=2),
    _problem("segments-parts", (3, 12, 13, 5), (3, 3, 5, 4), segments=2, tile=2, limit=13000,
             first=True, bias=False),
    _problem("first-grouped-3x3", (2, 7, 9, 6), (3, 3, 3, 8), padding=((0, 1), (2, 1)), groups=2, first=True),
    _problem("tile-6", (2, 15, 13, 4), (3, 3, 4, 6), padding=((1, 2), (3, 0)), tile=6),
    _problem("positions-2187", (3, 27, 27, 2), (1, 1, 2, 3), first=True),
    _problem("strips-9", (2, 13, 12, 3), (1, 1, 3, 128)),
    _problem("strips", (3, 40, 40, 4), (1, 1, 4, 4)),
    _problem("strips-first", (3, 40, 40, 3), (1, 1, 3, 2), first=True),
    _problem("no-bias", (2, 6, 5, 4), (3, 3, 4, 4), padding=1, bias=False),
    _problem("no-bias-first", (2, 6, 5, 4), (3, 3, 4, 3), padding=1, bias=False, first=True),
    _problem("deep-grouped", (2, 3, 3, 256), (3, 3, 128, 6), groups=2, padding=1),
    _problem("deep", (1, 3, 3, 256), (3, 3, 256, 9), padding=1),
    _problem("deep-even", (1, 2, 2, 512), (1, 1, 512, 8), activation=None),
    _problem("three-axes-strided", (1, 6, 8, 7, 3), (3, 4, 3, 3, 4), stride=(2, 3, 2), padding=1),
    _problem("one-axis", (2, 19, 5), (4, 5, 6), stride=2, padding=2, dilation=2),
    _problem("one-axis-8", (1, 40, 16), (3, 16, 24), padding=1, activation=None),
    _problem("three-axes", (1, 4, 5, 6, 3), (2, 3, 3, 3, 4), stride=(1, 2, 1), padding=1),
    _problem("depthwise", (2, 7, 8, 8), (3, 3, 1, 8), groups=8, padding=1, apart=True),
    _problem("depthwise-5", (1, 9, 13, 5), (3, 3, 1, 5), groups=5, padding=1, bias=False),
    _problem("depthwise-strided", (2, 11, 9, 16), (3, 3, 1, 16), groups=16, padding=1, stride=2),
    _problem("depthwise-5x5", (1, 9, 12, 8), (5, 5, 1, 8), groups=8, padding=2, activation=None),
    _problem("depthwise-7x7", (1, 12, 17, 4), (7, 7, 1, 4), groups=4, padding=3),
    _problem("depthwise-dilated", (1, 9, 8, 6), (3, 2, 1, 6), groups=6, dilation=2, padding=2),
    _problem("depthwise-multiplied", (1, 6, 7, 4), (3, 3, 1, 8), groups=4, padding=1),
    _problem("depthwise-first", (2, 6, 7, 3), (3, 3, 1, 3), groups=3, padding=1, first=True),
    _problem("depthwise-40", (2, 17, 5, 40), (3, 3, 1, 40), groups=40, padding=((2, 0), (0, 1))),
    _problem("depthwise-line", (2, 70, 8), (4, 1, 8), groups=8, padding=((3, 0),)),
    _problem("depthwise-line-odd", (1, 37, 35), (3, 1, 35), groups=35, stride=2, padding=1),
    _problem("depthwise-block", (3, 15, 6, 8), (3, 3, 1, 8), groups=8, padding=1, one_block=True),
    _problem("depthwise-wide", (2, 7, 6, 12), (3, 3, 1, 12), groups=12, padding=1, wide=True),
)  # fmt: skip

ACTIVATIONS = (
    "ReLU", "Affine(slope=2, intercept=1)", "LeakyReLU(0.1)", "ELU(0.5)", "SELU()", "GELU", "GELU(approximate=False)",
    "Tanh", "Sigmoid", "HardSigmoid", "SoftPlus", "Exponential",
)  # fmt: skip


def _described(problem: Problem, dtype: str) -> ConvProblem:
    options = {k: _hashable(v) for k, v in problem.options}
    return _plan(
        len(problem.x) - 2, problem.x, problem.w, str(_dtype(dtype)), options.get("stride", 1),
        options.get("padding", 0), options.get("dilation", 1), options.get("groups", 1),
        "channels_last", None,
    ).problem  # fmt: skip


def drawn(problem: Problem, dtype: str) -> dict[str, np.ndarray]:
    """Return inputs, channels last, and arrays of the results' shapes."""
    rng = np.random.default_rng(zlib.crc32(problem.name.encode()))
    x, w = rng.standard_normal(problem.x), rng.standard_normal(problem.w)
    w *= np.prod(problem.w[:-1]) ** -0.5
    if problem.blank:
        x *= 3
        x[:, : problem.x[1] // 2 + 1] = 0
    b = rng.standard_normal(problem.w[-1])
    dy = rng.standard_normal(_described(problem, dtype).y_shape)
    if problem.poison:
        for array in (x, dy):
            at = problem.poison
            array[0, at, at, 0], array[-1, -1 - at, -2 - at, -1] = np.nan, np.inf
    made = {n: _rounded(a, dtype) for n, a in (("x", x), ("w", w), ("b", b), ("dy", dy))}
    results = {"seen": "dy", "y": "dy", "dx": "x", "dw": "w", "db": "b"}
    if dtype == "tf32":
        results |= {f"{n}_tf32": like for n, like in results.items()}
    return made | {n: np.zeros_like(made[like]) for n, like in results.items()}


def _rounded(a: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(a, _dtype(dtype))


def _to_tf32(a: np.ndarray) -> np.ndarray:
    """Round to what tensor cores read: 10 bits behind the point, halves away from zero."""
    bits = np.ascontiguousarray(a, "f4").view("u4")
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view("f4")


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype("float32" if name == "tf32" else name)


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
        seen = y.astype(_dtype(dtype)) if seen is None else seen
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


def _settings(problem: Problem, dtype: str) -> ExitStack:
    stack = ExitStack()
    if problem.wide:
        stack.enter_context(mock.patch.object(cuda_arrays, "WIDE_FROM", 0))
    if problem.limit:
        # Less than a user may ask for, so that small batches go in parts.
        stack.enter_context(
            mock.patch.object(settings, "get_workspace_limit", return_value=problem.limit)
        )
    if problem.segments:
        stack.enter_context(
            mock.patch.object(cuda_winograd_plan, "_segments", return_value=problem.segments)
        )
    if problem.tile:
        stack.enter_context(mock.patch.object(cuda_winograd_plan, "TILES", (problem.tile,)))
    if problem.segments or problem.tile:
        cuda_winograd_plan.plan_of.cache_clear()
        stack.callback(cuda_winograd_plan.plan_of.cache_clear)
    if problem.one_block:
        stack.enter_context(mock.patch.object(kernels, "grid_for", return_value=1))
    precision = gpuconv.get_precision()
    gpuconv.set_precision("tf32" if dtype == "tf32" else "default")
    stack.callback(gpuconv.set_precision, precision)
    return stack


def _close(
    engine: str, problem: Problem, dtype: str, reduction: int, got: Any, given: Any, name: str
) -> None:
    factor = dispatch.get_engine(engine).error_factor
    sums = 1e-5 * max(1, reduction) ** 0.5 * factor
    value = gpuconv.asnumpy(got)
    compare = _meet_nan if problem.poison else close
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
    with stand_in("checked", 1) as cp, gpuconv.engine(engine), _settings(problem, dtype):
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
        if not problem.poison:
            _nothing_repaired(cp)


def _nothing_repaired(cp: Any) -> None:
    """Winograd's last kernels read images and weights to mend what is not finite, or never."""
    for (kernel, *_), traffic in zip(cp.settings.launches, cp.settings.traffic, strict=False):
        arrays = next((a for name, a in _MENDING.items() if name in kernel), ())
        read = [traffic[a][0] for a in arrays if a in traffic]
        assert not any(read), f"{kernel} read {read} bytes to mend what was finite"


def _takes(engine: str, problem: Problem, dtype: str) -> bool:
    """Return whether the engine computes some pass of it."""
    made, described = dispatch.get_engine(engine), _described(problem, dtype)
    with _settings(problem, dtype):
        return any(made.unsupported(described, p) is None for p in PASSES)


# ------------------------------------------------------------------------------ normalisation


def _normalise(dtype: str, activation: str | None, rows: int, columns: int, wide: bool) -> None:
    """Statistics, result and gradients of a batch normalisation, beside NumPy's in float64."""
    rng = np.random.default_rng(rows)
    x, dy = ((rng.standard_normal((rows, columns)) + 3).astype(_dtype(dtype)) for _ in range(2))
    act = None if activation is None else get_activation(activation)
    x64, dy64 = x.astype("f8"), dy.astype("f8")
    mean, variance = x64.mean(axis=0), x64.var(axis=0)
    inverse, scaler = (variance + 1e-5) ** -0.5, rng.standard_normal(columns) + 2
    factor, offset = inverse * scaler, rng.standard_normal(columns)
    z = (x64 - mean) * factor + offset
    y64 = z if act is None else act.fn(z)
    y = y64.astype(_dtype(dtype))
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
    return [*made, *_of_normalisation(), *_of_banks()]


def _of_engine(engine: str) -> Iterator[Check]:
    for dtype in ("float32", "float16", "bfloat16", "float64", "tf32"):
        for problem in PROBLEMS:
            yield from _conv(engine, problem, dtype, problem.name)
        for activation in ACTIVATIONS if dtype in ("float32", "float64") else ():
            for name, w, groups in (("dense", (3, 3, 8, 8), 1), ("depth", (3, 3, 1, 8), 8)):
                problem = _problem(
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
        )
