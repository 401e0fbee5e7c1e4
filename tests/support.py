"""What the tests of convolutions share: cases, references, tolerances, and engines' homes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import gpuconv
from gpuconv import dispatch
from gpuconv.activations import get_activation
from gpuconv.cuda import kernels, prepared, runtime
from gpuconv.engines import cuda_arrays

CPU_ENGINES = [
    "naive",
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
CUDA_ENGINES = [
    "cuda_atomic",
    "cuda_depthwise",
    "cuda_gemm",
    "cuda_implicit_gemm",
    "cuda_tensor_core",
    "cuda_winograd",
    "cudnn",
]
DTYPES = ["float64", "float32", "float16"]


@dataclass(frozen=True)
class Case:
    """A convolution with the shapes of its arrays, channels last."""

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    bias: bool = True
    activation: str | None = None
    layout: str = "NHWC"
    seed: int = field(default=0, compare=False)

    @property
    def keywords(self) -> dict[str, Any]:
        return {**dict(self.options), "layout": self.layout, "activation": self.activation}


def case(name: str, x: Any, w: Any, **options: Any) -> Case:
    known = {k: options.pop(k) for k in ("bias", "activation", "layout") if k in options}
    return Case(name, tuple(x), tuple(w), tuple(sorted(options.items())), **known)


CASES = [
    case("dense", (2, 6, 5, 3), (3, 3, 3, 4), padding=1),
    case("no-bias", (1, 5, 5, 2), (3, 3, 2, 3), bias=False),
    case("one-by-one", (2, 4, 5, 6), (1, 1, 6, 5), activation="ReLU"),
    case("strided", (2, 9, 8, 3), (3, 3, 3, 4), stride=2, padding=1, activation="ReLU"),
    case("strided-many", (1, 7, 9, 5), (3, 2, 5, 17), stride=(2, 1), padding=((1, 0), (0, 2))),
    case("stride-beyond-kernel", (1, 9, 7, 2), (1, 1, 2, 3), stride=3),
    case("stride-per-axis", (1, 9, 10, 2), (3, 2, 2, 3), stride=(3, 2), padding=(2, 0)),
    case("dilated", (1, 9, 9, 2), (3, 3, 2, 2), dilation=2, padding=2),
    case(
        "dilated-strided", (1, 11, 12, 2), (3, 2, 2, 3), dilation=(2, 3), stride=(3, 2), padding=3
    ),
    case("asymmetric", (1, 5, 6, 2), (3, 3, 2, 3), padding=((2, 0), (1, 3)), activation="Tanh"),
    case("padding-beyond-kernel", (1, 3, 3, 1), (2, 2, 1, 2), padding=4, stride=3),
    case("same", (2, 7, 6, 2), (3, 4, 2, 2), padding="same", stride=2),
    case("grouped", (2, 5, 5, 6), (3, 3, 2, 9), groups=3, padding=1, activation="LeakyReLU(0.1)"),
    case("depthwise", (1, 6, 6, 5), (3, 3, 1, 5), groups=5, padding=1, activation="ReLU"),
    case("depthwise-multiplied", (1, 6, 5, 3), (3, 3, 1, 6), groups=3, stride=2),
    case(
        "depthwise-dilated", (2, 9, 11, 2), (3, 3, 1, 4), groups=2, stride=3, dilation=2, padding=2
    ),
    case("depthwise-first", (2, 5, 7, 3), (2, 3, 1, 3), groups=3, stride=(1, 2), layout="NCHW"),
    case("kernel-is-image", (3, 4, 5, 2), (4, 5, 2, 3)),
    case("one-row", (1, 1, 9, 2), (1, 4, 2, 3), padding=((0, 0), (3, 3)), activation="Sigmoid"),
    case("one-pixel", (2, 1, 1, 3), (1, 1, 3, 2), activation="ELU"),
    case("first-layout", (2, 6, 5, 3), (3, 3, 3, 4), padding=1, layout="NCHW", activation="ReLU"),
    case("first-strided", (2, 9, 8, 4), (3, 3, 2, 4), stride=2, groups=2, layout="NCHW"),
    case("first-one-by-one", (2, 4, 5, 6), (1, 1, 6, 5), layout="NCHW"),
]


@dataclass
class Data:
    """Inputs in the case's layout, and the oracle's answers in float64."""

    x: np.ndarray
    w: np.ndarray
    b: np.ndarray | None
    dy: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    dw: np.ndarray
    db: np.ndarray


def draw(c: Case, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return random x, w and b of the case, in its layout."""
    rng = np.random.default_rng(c.seed)
    x, w = rng.standard_normal(c.x), rng.standard_normal(c.w)
    b = rng.standard_normal(c.w[-1]).astype(dtype) if c.bias else None
    if c.layout == "NCHW":
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(x, dtype), np.ascontiguousarray(w, dtype), b


def oracle(c: Case, dtype: str, engine: str = "naive") -> Data:
    """Return the case's inputs rounded to ``dtype`` and the loops' results in float64.

    Cases too large for the loops name another engine to ask. Made once, and kept.
    """
    return _oracle(c, dtype, engine)


@cache
def _oracle(c: Case, dtype: str, engine: str) -> Data:
    x, w, b = draw(c, dtype)
    wide = [None if a is None else a.astype("float64") for a in (x, w, b)]
    with gpuconv.engine(engine):
        y = gpuconv.conv2d(*wide, **c.keywords)
        rng = np.random.default_rng(c.seed + 1)
        dy = rng.standard_normal(y.shape).astype(dtype)
        y_seen = y.astype(dtype)  # what a user passes back
        dx, dw, db = gpuconv.conv2d_backward(
            dy.astype("float64"), wide[0], wide[1], y=y_seen.astype("float64"), **c.keywords
        )
    return Data(x, w, b, dy, y, dx, dw, db)


def compute(xp: Any, c: Case, dtype: str, by: str = "naive") -> list[tuple[Any, np.ndarray]]:
    """Return y, dx, dw and db of the library ``xp``, each beside the oracle's (of engine ``by``)."""
    data = oracle(c, dtype, by)
    x, w, dy = (xp.asarray(a) for a in (data.x, data.w, data.dy))
    b = None if data.b is None else xp.asarray(data.b)
    y = gpuconv.conv2d(x, w, b, **c.keywords)
    seen = xp.asarray(data.y.astype(dtype)) if c.activation else None
    grads = gpuconv.conv2d_backward(dy, x, w, y=seen, **c.keywords)
    return list(zip([y, *grads], [data.y, data.dx, data.dw, data.db], strict=True))


def tolerance(engine: str, dtype: str, reduction: int) -> float:
    """Return the error allowed relative to the largest value (and to 1)."""
    if dtype == "float64":
        return 1e-11
    if dtype == "float32":
        return 1e-5 * max(1, reduction) ** 0.5 * dispatch.get_engine(engine).error_factor
    return 5e-3


def widest(engine: str) -> str:
    """Return the most exact dtype that an engine computes."""
    return next(d for d in DTYPES if d in dispatch.get_engine(engine).dtypes)


def close(got: np.ndarray, want: np.ndarray, allowed: float) -> None:
    got = np.asarray(got, "float64")
    assert got.shape == want.shape
    if want.size:
        error = np.abs(got - want).max() / max(1.0, np.abs(want).max())
        assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"


def real_gpu() -> bool:
    return runtime.installed() is None and _gpu_count() > 0


@cache
def _gpu_count() -> int:
    from gpuconv.device import probe

    return probe().count


@contextmanager
def home(engine: str, mode: str | None = None, seed: int = 0) -> Iterator[Any]:
    """Make the device of ``engine`` usable: yields the array library to put data into.

    CUDA engines run on a GPU where there is one, else the kernels run on the CPU, in the mode
    of ``tests.cuda_on_cpu.stand_in`` given here or in ``GPUCONV_TEST_KERNELS``. cuDNN's frontend
    is then a stand-in too, ``tests.cudnn_on_cpu``.
    """
    if engine in CPU_ENGINES:
        missing = dispatch.get_engine(engine).unavailable()
        if missing:
            pytest.skip(missing)
        yield np
    elif real_gpu():
        missing = dispatch.get_engine(engine).unavailable()
        if missing:
            pytest.skip(missing)
        yield runtime.cupy()
    else:
        from tests import cudnn_on_cpu
        from tests.cuda_on_cpu import compiler_available, stand_in

        reason = compiler_available()
        if reason:
            pytest.skip(reason)
        if engine == "cudnn":
            with stand_in(mode or "fast", seed) as cp, cudnn_on_cpu.installed():
                yield cp
            return
        with stand_in(mode or os.environ.get("GPUCONV_TEST_KERNELS", "fast"), seed) as cp:
            yield cp


def count_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Variant]:
    """Let offsets be held in 64 bits from now on, however small; return the variants of what follows."""
    used: list[kernels.Variant] = []
    prepare = kernels.prepare
    monkeypatch.setattr(cuda_arrays, "WIDE_FROM", 0)
    monkeypatch.setattr(kernels, "prepare", lambda v, *rest: (used.append(v), prepare(v, *rest))[1])
    prepared.clear()
    return used


def untouched_zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """Return an array of the stand-in whose zeros take no memory until they are written."""
    from tests.cuda_on_cpu.arrays import Memory, ndarray

    count, guard = int(np.prod(shape)), Memory.GUARD
    try:
        room = np.zeros(count * np.dtype(dtype).itemsize + 2 * guard, "u1")
    except MemoryError:
        pytest.skip("the system does not promise memory that is not used")
    room[:guard] = room[-guard:] = 0xFF
    memory = Memory(0)
    memory.size, memory.bytes = room.size - 2 * guard, room[guard:-guard]
    memory.start = memory.bytes.ctypes.data
    return ndarray._view(memory.bytes.view(dtype).reshape(shape), memory, 0)


def far_corners(cp: Any, needs: tuple[str, ...]) -> None:
    """Convolve an image of more than 2**31 elements of which only the far corners are not zero."""
    wide = 2**30
    x = untouched_zeros((1, 3, wide, 1), "float16")
    x._a[0, :, 0, 0] = 1, 2, 3
    x._a[0, :, -1, 0] = 4, 5, 6
    w = cp.asarray(np.array([10, 1], "float16").reshape(1, 1, 1, 2))
    y = host(gpuconv.conv2d(x, w, stride=(1, wide - 1)))
    want = np.array([[1, 4], [2, 5], [3, 6]])
    np.testing.assert_array_equal(y[0, :, :, 1], want)
    np.testing.assert_array_equal(y[0, :, :, 0], 10 * want)
    if needs:
        dy = cp.ones((1, 3, 2, 2), "float16")
        _, dw, db = gpuconv.conv2d_backward(dy, x, w, stride=(1, wide - 1), needs=needs)
        assert host(dw).ravel().tolist() == [want.sum()] * 2
        assert db is None or host(db).tolist() == [6, 6]


def host(a: Any) -> Any:
    return None if a is None else gpuconv.asnumpy(a)


# ------------------------------------------------------------------------ random convolutions


@st.composite
def convolutions(draw: Any, dtype: str = "float64", max_size: int = 8) -> Case:
    """Draw a valid convolution of any options."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c_in = groups * draw(st.integers(1, 3))
    c_out = groups * draw(st.integers(1, 3))
    small = st.integers(1, 3)
    kernel, stride, dilation = (tuple(draw(small) for _ in range(2)) for _ in range(3))
    pads = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
    padding = draw(st.sampled_from([pads, "same"]))
    sizes = []
    for k, d, p in zip(kernel, dilation, pads, strict=True):
        window = d * (k - 1) + 1
        least = max(1, window - (sum(p) if padding != "same" else window))
        sizes.append(draw(st.integers(least, least + max_size)))
    return case(
        "random",
        (draw(st.integers(1, 3)), *sizes, c_in),
        (*kernel, c_in // groups, c_out),
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        layout=draw(st.sampled_from(["NHWC", "NCHW"])),
        activation=draw(st.sampled_from([None, "ReLU", "Tanh", "LeakyReLU(0.2)"])),
        bias=draw(st.booleans()),
    )


def by_scipy(c: Case, x: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """Return the convolution by ``scipy.signal.correlate``, channel by channel, in float64."""
    from scipy.signal import correlate

    from gpuconv.functional import _plan

    options = dict(c.options)
    plan = _plan(
        2, x.shape, w.shape, "float64", options.get("stride", 1), options.get("padding", 0),
        options.get("dilation", 1), options.get("groups", 1), c.layout, None,
    )  # fmt: skip
    p = plan.problem
    if c.layout == "NCHW":
        x, w = x.transpose(0, 2, 3, 1), w.transpose(2, 3, 1, 0)
    x = np.pad(x, ((0, 0), *p.padding, (0, 0)))
    dilated = np.zeros((*p.window, *w.shape[2:]))
    dilated[tuple(slice(None, None, d) for d in p.dilation)] = w
    y = np.zeros(p.y_shape)
    in_group, out_group = p.in_channels // p.groups, p.out_channels // p.groups
    steps = tuple(slice(None, None, s) for s in p.stride)
    for n, o, k in itertools.product(range(p.batch), range(p.out_channels), range(in_group)):
        image = x[n, :, :, o // out_group * in_group + k]
        y[n, :, :, o] += correlate(image, dilated[:, :, k, o], "valid", "direct")[steps]
    if b is not None:
        y += b
    y = get_activation(c.activation).fn(y)
    return y.transpose(0, 3, 1, 2) if c.layout == "NCHW" else y
