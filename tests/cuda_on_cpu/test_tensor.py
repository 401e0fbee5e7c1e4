"""Products of a warp's fragments and asynchronous copies (``kernels/mma.cuh``) on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuconv.cuda import kernels
from tests.cuda_on_cpu import CompileError, CUDADriverError, KernelError, sanitizer

RNG = np.random.default_rng(5)
HEADER = kernels.read("mma.cuh") + '#line 1 "test.cu"\n'


def run(cp: Any, body: str, *args: Any, parameters: str, block: int = 32) -> None:
    source = f'{HEADER}extern "C" __global__ void f({parameters}) {{ {body} }}'
    cp.RawModule(code=source).get_function("f")((1,), (block,), args)


# ------------------------------------------------------------------------------------- products
#
# The tables of the PTX manual ("Matrix Fragments for mma.m16n8k8 / m16n8k16"), element by element,
# as functions of the lane's group g, its place t in the group, and the number i of the element.

A16 = lambda g, t, i: (g + 8 * (i % 4 > 1), 2 * t + i % 2 + 8 * (i > 3))  # noqa: E731
B16 = lambda g, t, i: (2 * t + i % 2 + 8 * (i > 1), g)  # noqa: E731
A32 = lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i > 1))  # noqa: E731
B32 = lambda g, t, i: (t + 4 * i, g)  # noqa: E731
C = lambda g, t, i: (g + 8 * (i > 1), 2 * t + i % 2)  # noqa: E731

SHAPES = {  # instruction: K, dtype, elements of A and B a lane, their places
    "m16n8k8_f16": (8, "f2", 4, 2, A16, B16),
    "m16n8k16_f16": (16, "f2", 8, 4, A16, B16),
    "m16n8k16_bf16": (16, "bf16", 8, 4, A16, B16),
    "m16n8k8_tf32": (8, "f4", 4, 2, A32, B32),
}


def spread(matrix: np.ndarray, count: int, place: Callable[..., tuple[int, int]]) -> np.ndarray:
    """Return each lane's elements of a matrix."""
    lanes = [[matrix[place(n // 4, n % 4, i)] for i in range(count)] for n in range(32)]
    return np.array(lanes, matrix.dtype)


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values as the bits of ``dtype``, exactly."""
    if dtype == "bf16":
        bits = values.astype("f4").view("u4")
        assert not (bits & 0xFFFF).any()
        return (bits >> 16).astype("u2")
    return values.astype(dtype).view("u2" if dtype == "f2" else "u4")


MULTIPLY = """
  for (int i = 0; i < 4; i++) d[4 * threadIdx.x + i] = c[4 * threadIdx.x + i];
  mma_SHAPE(d + 4 * threadIdx.x, a + A_WORDS * threadIdx.x, b + B_WORDS * threadIdx.x);
"""


def multiply(cp: Any, shape: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return A B + C by the instruction, in its own spread."""
    _, dtype, a_count, b_count, a_place, b_place = SHAPES[shape]
    a_words = bits_of(spread(a, a_count, a_place), dtype).view("u4")
    b_words = bits_of(spread(b, b_count, b_place), dtype).view("u4")
    body = MULTIPLY.replace("SHAPE", shape)
    for name, words in (("A_WORDS", a_words), ("B_WORDS", b_words)):
        body = body.replace(name, str(words.shape[1]))
    d = cp.empty((32, 4), "f4")
    run(
        cp, body, d, cp.asarray(spread(c, 4, C)), cp.asarray(a_words), cp.asarray(b_words),
        parameters="float* d, const float* c, const unsigned* a, const unsigned* b",
    )  # fmt: skip
    return d.get()


@pytest.mark.parametrize("shape", SHAPES)
def test_products(cp: Any, shape: str) -> None:
    k = SHAPES[shape][0]
    a, b = RNG.integers(-8, 9, (16, k)).astype("f4"), RNG.integers(-8, 9, (k, 8)).astype("f4")
    c = RNG.integers(-8, 9, (16, 8)).astype("f4")
    np.testing.assert_array_equal(multiply(cp, shape, a, b, c), spread(a @ b + c, 4, C))


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_any_numbers(fast: Any, shape: str) -> None:
    """Products are exact, sums those of float32; NaN and infinity go their way."""
    k, dtype, *_ = SHAPES[shape]
    keep = {"f2": 0xFFFFE000, "f4": 0xFFFFE000, "bf16": 0xFFFF0000}[dtype]
    a, b = RNG.standard_normal((16, k)).astype("f4"), RNG.standard_normal((k, 8)).astype("f4")
    a, b = ((m.view("u4") & np.uint32(keep)).view("f4") for m in (a, b))
    c = RNG.standard_normal((16, 8)).astype("f4")
    a[3, 2], a[9, 1] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        want = spread((a.astype("f8") @ b.astype("f8") + c).astype("f4"), 4, C)
    np.testing.assert_allclose(multiply(fast, shape, a, b, c), want, rtol=2e-5, atol=2e-5)


def test_float16_before_sm_80_is_twice_the_smaller_product(start: Callable[..., Any]) -> None:
    a, b = RNG.integers(-8, 9, (16, 16)).astype("f4"), RNG.integers(-8, 9, (16, 8)).astype("f4")
    with start(capability=75) as cp:
        got = multiply(cp, "m16n8k16_f16", a, b, np.zeros((16, 8), "f4"))
    np.testing.assert_array_equal(got, spread(a @ b, 4, C))


@pytest.mark.parametrize(("shape", "capability"), [
    ("m16n8k8_f16", 70), ("m16n8k16_bf16", 75), ("m16n8k8_tf32", 75),
])  # fmt: skip
def test_what_an_architecture_lacks_does_not_compile(
    start: Callable[..., Any], shape: str, capability: int
) -> None:
    k = SHAPES[shape][0]
    with (
        start(capability=capability) as cp,
        pytest.raises(CompileError, match=f"mma_{shape}"),
    ):
        multiply(cp, shape, np.ones((16, k), "f4"), np.ones((k, 8), "f4"), np.ones((16, 8), "f4"))


def test_tf32_is_rounded_by_who_asks_and_else_cut(fast: Any) -> None:
    """``to_tf32`` keeps 10 bits of mantissa, halves away from zero; the product ignores the rest."""
    x = np.concatenate([RNG.standard_normal(500) * 10.0 ** RNG.integers(-30, 30, 500),
                        [0, -0.0, np.inf, -np.inf, np.nan, 1 + 2.0**-11, -1 - 2.0**-11,
                         1 + 2.0**-11 - 2.0**-23, 3.4e38, 1e-40]]).astype("f4")  # fmt: skip
    y = fast.empty(x.size, "u4")
    body = "if (threadIdx.x < n) y[threadIdx.x] = to_tf32(x[threadIdx.x]);"
    run(fast, body, fast.asarray(x), y, np.int32(x.size), block=1024,
        parameters="const float* x, unsigned* y, int n")  # fmt: skip
    wide = x.astype("f8")
    with np.errstate(all="ignore"):
        unit = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(wide))), -126) - 10)
        want = np.copysign(np.floor(np.abs(wide) / unit + 0.5) * unit, wide)
        want = np.where(np.isfinite(wide) & (wide != 0), want, wide).astype("f4")
    np.testing.assert_array_equal(y.get().view("f4"), want)
    a, b, c = np.zeros((16, 8), "f4"), np.zeros((8, 8), "f4"), np.zeros((16, 8), "f4")
    a[0, 0], b[0, 0] = 1 + 2.0**-10 + 2.0**-11, 1
    assert multiply(fast, "m16n8k8_tf32", a, b, c)[0, 0] == 1 + 2.0**-10


# ------------------------------------------------------------------------------------- ldmatrix

LDMATRIX = """
  __shared__ __align__(16) unsigned short s[32 * 12 * 4];
  const int t = threadIdx.x;
  for (int i = t; i < 32 * 24; i += 32) s[i] = x[i];
  __syncthreads();
  unsigned r[4];
  const int row = t % (8 * TILES);   // the other lanes' addresses do not count
  ldmatrix<TILES, TRANSPOSED>(r, &s[row * 24 + 8 * (row % 2)]);
  for (int i = 0; i < TILES; i++) y[t * TILES + i] = r[i];
"""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_ldmatrix(cp: Any, tiles: int, transposed: bool) -> None:
    """Rows 48 bytes apart, every second one 16 bytes further."""
    x = RNG.integers(0, 65536, (32, 24)).astype("u2")
    body = LDMATRIX.replace("TILES", str(tiles)).replace("TRANSPOSED", str(transposed).lower())
    y = cp.zeros((32, tiles), "u4")
    run(cp, body, cp.asarray(x), y, parameters="const unsigned short* x, unsigned* y")
    got = y.get().view("u2").reshape(32, tiles, 2)
    for tile in range(tiles):
        rows = [x[r, 8 * (r % 2) : 8 * (r % 2) + 8] for r in range(8 * tile, 8 * tile + 8)]
        matrix = np.array(rows).T if transposed else np.array(rows)
        np.testing.assert_array_equal(got[:, tile].reshape(8, 8), matrix)


def test_ldmatrix_reads_what_has_been_written(checked: Any) -> None:
    body = LDMATRIX.replace("TILES", "4").replace("TRANSPOSED", "false")
    x, y = checked.zeros((32, 24), "u2"), checked.zeros((32, 4), "u4")
    parameters = "const unsigned short* x, unsigned* y"
    run(checked, body, x, y, parameters=parameters)
    for line, message in (
        ("__syncthreads();", "race|uninitialised"),
        ("for (int i = t; i < 32 * 24; i += 32) s[i] = x[i];", "uninitialised"),
    ):
        with pytest.raises(KernelError, match=message):
            run(checked, body.replace(line, ""), x, y, parameters=parameters)
    with pytest.raises(KernelError, match="no multiple of 16 bytes"):
        run(checked, body.replace("8 * (row % 2)", "4"), x, y, parameters=parameters)


# ----------------------------------------------------------------------------------- divergence

MMA = "mma_m16n8k16_f16(d + 4 * t, a + 4 * t, b + 2 * t);"
DIVERGED = {
    "a lane is missing": f"if (t != 9) {MMA}",
    "a lane has left": f"if (t == 9) return; {MMA}",
    "half of the warp elsewhere": f"if (t < 16) {MMA} else __syncwarp(0xffff0000u);",
    "another product": f"if (t & 1) {MMA} else {MMA.replace('_f16', '_bf16')}",
    "another operation": f"if (t & 1) {MMA} else __syncwarp();",
}


@pytest.mark.parametrize("name", DIVERGED)
def test_a_diverged_warp(cp: Any, name: str) -> None:
    a, b, d = cp.zeros(128, "u4"), cp.zeros(64, "u4"), cp.zeros(128, "f4")
    parameters = "float* d, const unsigned* a, const unsigned* b"
    run(cp, f"const int t = threadIdx.x; {MMA}", d, a, b, parameters=parameters)
    with pytest.raises(KernelError, match="divergent warp collective"):
        run(cp, f"const int t = threadIdx.x; {DIVERGED[name]}", d, a, b, parameters=parameters)


def test_a_warp_that_is_not_whole(fast: Any) -> None:
    a, b, d = fast.zeros(128, "u4"), fast.zeros(64, "u4"), fast.zeros(128, "f4")
    with pytest.raises(KernelError, match="whole warp, in a block of 24 threads"):
        run(fast, f"const int t = threadIdx.x; {MMA}", d, a, b, block=24,
            parameters="float* d, const unsigned* a, const unsigned* b")  # fmt: skip


# --------------------------------------------------------------------------------------- copies

# Three stages of 64 floats on their way through shared memory, each summed up in reverse.
PIPELINE = """
  __shared__ __align__(16) float s[3][64];
  const int t = threadIdx.x;
  float sum = 0;
  for (int k = 0; k < 2; k++) {
    START(k, k)
    copy_async_commit();
  }
  for (int k = 0; k < n; k++) {
    copy_async_wait<1>();
    __syncthreads();
    if (k + 2 < n) { START((k + 2) % 3, k + 2) }
    copy_async_commit();
    sum += s[k % 3][63 - t];
  }
  y[t] = sum;
"""
START = {
    4: "copy_async<4>(&s[{0}][t], x + 64 * ({1}) + t, t < 50);",
    8: "if (t < 32) copy_async<8>(&s[{0}][2 * t], x + 64 * ({1}) + 2 * t, t < 25);",
    16: "if (t < 16) copy_async<16>(&s[{0}][4 * t], x + 64 * ({1}) + 4 * t, t < 13);",
}


def pipeline(cp: Any, size: int = 4, old: str = "", new: str = "", steps: int = 7) -> np.ndarray:
    assert PIPELINE.count(old) or not old
    body = PIPELINE.replace(old, new, 1) if old else PIPELINE
    for stage, step in (("k", "k"), ("(k + 2) % 3", "k + 2")):
        body = body.replace(f"START({stage}, {step})", START[size].format(stage, step))
    y = cp.empty(64, "f4")
    x = cp.asarray(np.arange(64 * steps, dtype="f4")[: 64 * steps - 12])
    parameters = "const float* x, float* y, int n"
    run(cp, body, x, y, np.int32(steps), parameters=parameters, block=64)
    return y.get()


def summed(size: int, steps: int = 7) -> np.ndarray:
    x = np.arange(64 * steps, dtype="f4").reshape(steps, 64)
    x[:, {4: 50, 8: 50, 16: 52}[size] :] = 0  # the last 12 are not there, and are not read
    return x.sum(0)[::-1]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_pipeline_of_copies(cp: Any, size: int) -> None:
    np.testing.assert_array_equal(pipeline(cp, size), summed(size))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_before_sm_80_copies_are_plain(start: Callable[..., Any], size: int) -> None:
    for mode in ("fast", "checked"):
        with start(mode=mode, capability=75) as cp:
            np.testing.assert_array_equal(pipeline(cp, size), summed(size))


BROKEN = {
    "no wait": ("copy_async_wait<1>();", "", "before that copy has landed"),
    "a wait for too little": ("wait<1>", "wait<2>", "before that copy has landed"),
    "no barrier behind the wait": (
        "__syncthreads();",
        "",
        "before that copy has landed|race|uninitialised",
    ),
    "no commit": ("copy_async_commit();\n    sum", "sum", "landed"),
    "a stage too few": ("START((k + 2) % 3, k + 2)", "START((k + 1) % 3, k + 2)", "landed|race"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pipelines(checked: Any, start: Callable[..., Any], name: str) -> None:
    """They are caught where memory is watched, and compute nonsense where it is not."""
    old, new, message = BROKEN[name]
    if name == "a stage too few":
        START_BROKEN = START[4].format("(k + 1) % 3", "k + 2")
        new = START_BROKEN
    with pytest.raises(KernelError, match=message):
        pipeline(checked, 4, old, new)
    with start() as cp:
        try:
            got = pipeline(cp, 4, old, new)
        except KernelError as error:
            assert "unfinished" in str(error)  # noqa: PT017
        else:
            assert not np.array_equal(got, summed(4))


ONE = """
  __shared__ __align__(16) float s[64];
  const int t = threadIdx.x;
  FIRST
  copy_async<4>(&s[t], x + t, true);
  copy_async_commit();
  LAST
"""


@pytest.mark.parametrize(("first", "last", "message"), [
    ("", "copy_async_wait<0>(); __syncthreads(); y[t] = s[63 - t];", None),
    ("", "copy_async_wait<0>(); y[t] = s[t];", None),  # a thread's own
    ("", "y[t] = s[t]; copy_async_wait<0>();", "before that copy has landed"),
    ("", "s[t] = 1; copy_async_wait<0>();", "before that copy has landed"),
    ("", "copy_async<4>(&s[t], x + t, false); copy_async_wait<0>();", "before that copy has land"),
    ("s[t] = 0; __syncthreads(); y[t] = s[63 - t];", "copy_async_wait<0>();",
     "race"),
    ("s[63 - t] = 0;", "copy_async_wait<0>();", "race"),
    ("x[t ^ 1] = 1;", "copy_async_wait<0>();", "race: .* the array of argument 0"),
    ("", "x[t ^ 1] = 1; copy_async_wait<0>();", "race: .* the array of argument 0"),
    ("", "__syncthreads(); x[t ^ 1] = 1; __syncthreads(); copy_async_wait<0>();",
     "race: .* writes .*which an asynchronous copy that has not landed reads"),
    ("", "copy_async_wait<0>(); __syncthreads(); x[t ^ 1] = 1;", None),
    ("", "", "unfinished: .* of a group not waited for"),
    ("", "copy_async_wait<0>(); copy_async<4>(&s[t], x, true);", "of a group not committed"),
    ("copy_async<4>(&s[t], x + 64, true);", "copy_async_wait<0>();", "past the end of the array"),
    ("copy_async<4>(&s[t], x + 64, false); copy_async_commit(); copy_async_wait<0>();",
     "copy_async_wait<0>();", None),
    ("copy_async<4>(&s[64], x, true);", "", "past the end of shared memory s"),
    ("copy_async<8>(&s[1], x, true);", "", "misaligned: .* copies 8 bytes"),
    ("copy_async<8>(&s[0], x + 1, true);", "", "misaligned: .* copies 8 bytes"),
    ("copy_async<4>(y + t, x + t, true);", "", "not from global to shared memory"),
    ("s[t] = 0; copy_async<4>(&s[t], &s[t], true);", "", "not from global to shared memory"),
])  # fmt: skip
def test_copies_are_watched(checked: Any, first: str, last: str, message: str | None) -> None:
    x, y = checked.asarray(np.arange(64, dtype="f4")), checked.zeros(64, "f4")
    body = ONE.replace("FIRST", first).replace("LAST", last)
    parameters = "float* x, float* y"
    if message is None:
        run(checked, body, x, y, parameters=parameters, block=64)
        return
    with pytest.raises(KernelError, match=message):
        run(checked, body, x, y, parameters=parameters, block=64)


def test_the_message_names_lines(checked: Any) -> None:
    with pytest.raises(KernelError, match=r"\[mma\.cuh:\d+\] \[test\.cu:\d+\]"):
        pipeline(checked, 4, "copy_async_wait<1>();", "")


def test_under_address_sanitizer() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)
    body = ONE.replace("FIRST", "").replace("LAST", "copy_async_wait<0>(); y[t] = s[t];")
    reports = []
    for source in (body, body.replace("x + t", "x + 64 + t")):
        done = sanitizer.python(
            "-c",
            f"""
from tests.cuda_on_cpu import stand_in
from tests.cuda_on_cpu.test_tensor import run
with stand_in("asan") as cp:
    x, y = cp.ones(64, "f4"), cp.zeros(64, "f4")
    run(cp, {source!r}, x, y, parameters="float* x, float* y", block=64)
    print("sum", y.get().sum())
""",
        )
        reports.append((done.stdout, done.stderr))
    assert reports[0][0] == "sum 64.0\n", reports[0][1]
    assert "sum" not in reports[1][0]
    assert "buffer-overflow" in reports[1][1]


# -------------------------------------------------------------------------------- shared memory


def test_more_shared_memory_than_unasked(start: Callable[..., Any]) -> None:
    """A kernel may have what a block of its architecture can have, if it is asked for."""
    source = """
    extern __shared__ float s[];
    extern "C" __global__ void f(float* y, int n) {
      for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = i;
      __syncthreads();
      y[threadIdx.x] = s[n - 1 - threadIdx.x];
    }"""
    for mode, capability, most in (("fast", 75, 64), ("checked", 80, 163), ("fast", 90, 227)):
        with start(mode=mode, capability=capability) as cp:
            kernel = cp.RawModule(code=source).get_function("f")
            y, n = cp.empty(32, "f4"), np.int32(most * 256)
            with pytest.raises(CUDADriverError, match="at most 49152"):
                kernel((1,), (32,), (y, n), shared_mem=most * 1024)
            with pytest.raises(CUDADriverError, match=f"at most {most * 1024}"):
                kernel.max_dynamic_shared_size_bytes = most * 1024 + 1
            kernel.max_dynamic_shared_size_bytes = most * 1024
            kernel((1,), (32,), (y, n), shared_mem=most * 1024)
            np.testing.assert_array_equal(y.get(), n - 1 - np.arange(32))


def test_launch_asks_for_it(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "common.cuh").write_text("")
    (tmp_path / "large.cu").write_text(
        'extern __shared__ float s[]; extern "C" __global__ void f(float* y) '
        "{ s[threadIdx.x + 20000] = 1; y[threadIdx.x] = s[threadIdx.x + 20000]; }"
    )
    monkeypatch.setattr(kernels, "folder", lambda: tmp_path)
    variant = kernels.Variant("large.cu", "float32", (), ("f",))
    with start() as cp:
        y = cp.zeros(32, "f4")
        for size in (80_128, 90_000, 80_128):
            kernels.launch(variant, "f", 0, (1,), (32,), (y,), shared_bytes=size)
        assert y.get().tolist() == [1] * 32
        with pytest.raises(CUDADriverError, match="at most 166912"):
            kernels.launch(variant, "f", 0, (1,), (32,), (y,), shared_bytes=200_000)
