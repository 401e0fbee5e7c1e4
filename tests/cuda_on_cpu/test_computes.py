"""The stand-in computes what CUDA defines, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

RNG = np.random.default_rng(11)


def run(
    cp: Any, source: str, grid: tuple[int, ...], block: tuple[int, ...], *args: Any, shared: int = 0
) -> None:
    """Compile ``source`` and launch its kernel ``f``."""
    cp.RawModule(code=source).get_function("f")(grid, block, args, shared_mem=shared)


# -------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((7,), (33,)),
        ((3, 5), (4, 3)),
        ((2, 3, 4), (3, 2, 5)),
        ((1,), (1024,)),
        ((2, 2), (1, 1, 64)),
    ],
)
def test_grids_and_blocks(cp: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    source = """
    extern "C" __global__ void f(int* seen, int* dims) {
      const int b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      const int t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
      const int at = b * blockDim.x * blockDim.y * blockDim.z + t;
      atomicAdd(&seen[at], 1 + (int)blockIdx.z * 1000 + (int)threadIdx.y);
      if (at == 0) {
        dims[0] = gridDim.x, dims[1] = gridDim.y, dims[2] = gridDim.z;
        dims[3] = blockDim.x, dims[4] = blockDim.y, dims[5] = blockDim.z;
      }
    }"""
    g, b = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
    seen, dims = cp.zeros(np.prod(g) * np.prod(b), "i4"), cp.zeros(6, "i4")
    run(cp, source, grid, block, seen, dims)
    z, y = np.arange(g[2])[:, None, None], np.arange(b[1])[None, :, None]
    blocks = np.broadcast_to(z, (g[2], g[1], g[0])).ravel()
    threads = np.broadcast_to(y, (b[2], b[1], b[0])).ravel()
    np.testing.assert_array_equal(
        seen.get().reshape(-1, threads.size), 1 + blocks[:, None] * 1000 + threads
    )
    assert dims.get().tolist() == [*g, *b]


def test_grid_stride(cp: Any) -> None:
    source = """
    extern "C" __global__ void f(const float* x, float* y, int n) {
      for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        y[i] = 2 * x[i] + 1;
    }"""
    x = RNG.standard_normal(1000).astype("f4")
    y = cp.empty(1000, "f4")
    run(cp, source, (3,), (32,), cp.asarray(x), y, np.int32(1000))
    np.testing.assert_array_equal(y.get(), 2 * x + 1)


def test_arguments_of_every_type(cp: Any) -> None:
    source = """
    extern "C" __global__ void f(double* out, bool a, short b, unsigned short c, int d, unsigned e,
                                 long long g, unsigned long long h, float i, double j,
                                 const float* none) {
      out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = g, out[6] = h;
      out[7] = i, out[8] = j, out[9] = none == nullptr;
    }"""
    out = cp.empty(10)
    values = [
        np.bool_(True), np.int16(-2), np.uint16(65535), np.int32(-5), np.uint32(2**32 - 1),
        np.int64(-(2**40)), np.uint64(2**50), np.float32(0.1), 0.1, np.uintp(0),
    ]  # fmt: skip
    run(cp, source, (1,), (1,), out, *values)
    assert out.get().tolist() == [*map(float, values[:9]), 1.0]


def test_defines_several_kernels_templates_and_bounds(cp: Any) -> None:
    source = """
    #define MAKE(T, NAME) extern "C" __global__ void __launch_bounds__(2 * HALF, 2) NAME##_k(T* y) { \\
      store<T>(y, T(VALUE)); }
    template <typename T> __device__ __forceinline__ void store(T* y, T v) { y[threadIdx.x] = v; }
    template <typename T> __global__ void unused(T* y) { *y = 0; }
    MAKE(float, f32)
    MAKE(double, f64)
    extern "C" void __global__ __launch_bounds__(64) other(int* y);
    extern "C" void __global__ __launch_bounds__(64) other(int* y) { y[threadIdx.x] = HALF; }
    """
    module = cp.RawModule(code=source, options=("-std=c++17", "-DVALUE=2.5", "-DHALF=32"))
    for name, dtype, value in (("f32_k", "f4", 2.5), ("f64_k", "f8", 2.5), ("other", "i4", 32)):
        y = cp.zeros(64, dtype)
        module.get_function(name)((1,), (64,), (y,))
        assert (y.get() == value).all()
    with pytest.raises(RuntimeError, match="named symbol not found: f16_k"):
        module.get_function("f16_k")


ORDER = """
extern "C" __global__ void f(int* order, int* next) {
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}"""


def test_order_follows_the_seed(start: Callable[..., Any]) -> None:
    orders = []
    for options in ({"seed": 0}, {"seed": 1}, {"seed": 1}, {"seed": 2}):
        with start(**options) as cp:
            order, following = cp.empty(128, "i4"), cp.zeros(1, "i4")
            run(cp, ORDER, (4,), (32,), order, following)
            orders.append(order.get().tolist())
    assert orders[0] == list(range(128))
    assert orders[1] == orders[2]
    assert len({tuple(o) for o in orders}) == 3
    assert all(sorted(o) == list(range(128)) for o in orders)
    assert {o // 32 for o in orders[1][:32]} == {orders[1][0] // 32}  # block after block


# ---------------------------------------------------------------------------------------- blocks


REDUCTION = """
#define N %d
%s
extern "C" __global__ void f(const float* x, float* total, int n) {
  %s
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = blockIdx.x * N + t; i < n; i += gridDim.x * N) sum += x[i];
  s[t] = sum;
  __syncthreads();
  for (int k = N / 2; k; k /= 2) {
    if (t < k) s[t] += s[t + k];
    __syncthreads();
  }
  if (t == 0) atomicAdd(total, s[0]);
}"""


@pytest.mark.parametrize("threads", [2, 64, 256, 1024])
@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        ("", "__shared__ float s[N];"),
        ("__shared__ float s[N];", ""),
        ("", "extern __shared__ float s[];"),
        ("extern __shared__ __align__(16) float s[];", ""),
        ("", "extern __shared__ unsigned char raw[]; float* s = (float*)raw;"),
    ],
    ids=["static", "static-outside", "dynamic", "dynamic-outside", "dynamic-bytes"],
)
def test_reductions_in_shared_memory(cp: Any, threads: int, outside: str, inside: str) -> None:
    x = RNG.integers(-8, 8, 3000).astype("f4")
    total = cp.zeros(1, "f4")
    shared = 4 * threads if "extern" in outside + inside else 0
    source = REDUCTION % (threads, outside, inside)
    run(cp, source, (3,), (threads,), cp.asarray(x), total, np.int32(3000), shared=shared)
    assert total.get()[0] == x.sum()


def test_barriers_that_count(cp: Any) -> None:
    source = """
    extern "C" __global__ void f(int* out) {
      const int t = threadIdx.x;
      for (int i = 0; i < 5; i++) {
        out[(i * 3 + 0) * blockDim.x + t] = __syncthreads_count(t % 3 == i);
        out[(i * 3 + 1) * blockDim.x + t] = __syncthreads_and(t + i < 100);
        out[(i * 3 + 2) * blockDim.x + t] = __syncthreads_or(t == 10 * i + 60);
      }
    }"""
    out = cp.zeros(5 * 3 * 96, "i4")
    run(cp, source, (1,), (96,), out)
    got = out.get().reshape(5, 3, 96)
    assert (got == got[:, :, :1]).all()
    third = [32, 32, 32, 0, 0]
    want = [[third[i], int(95 + i < 100), int(10 * i + 60 < 96)] for i in range(5)]
    assert got[:, :, 0].tolist() == want


# ----------------------------------------------------------------------------------------- warps


def lanes_read(how: str, by: int, width: int) -> np.ndarray:
    """Return which lane each lane reads, straight from the text of the CUDA guide."""
    lane = np.arange(32)
    first = lane // width * width
    if how == "":
        return first + by % width
    source = {"_up": lane - by, "_down": lane + by, "_xor": lane ^ by}[how]
    inside = source >= first if how == "_up" else source < first + width
    return np.where(inside, source, lane)


@pytest.mark.parametrize("how", ["", "_up", "_down", "_xor"])
@pytest.mark.parametrize(
    ("dtype", "ctype"), [("f4", "float"), ("f8", "double"), ("i8", "long long")]
)
def test_shuffles(cp: Any, how: str, dtype: str, ctype: str) -> None:
    source = f"""
    extern "C" __global__ void f(const {ctype}* x, {ctype}* y, int by, int width) {{
      const int t = threadIdx.x;
      y[t] = __shfl{how}_sync(0xffffffff, x[t], by, width);
    }}"""
    kernel = cp.RawModule(code=source).get_function("f")
    x = RNG.integers(-1000, 1000, 96).astype(dtype)
    for width in (32, 16, 8, 4, 2):
        for by in {0, 1, 3, 5, width - 1, width // 2}:
            y = cp.empty(96, dtype)
            kernel((1,), (96,), (cp.asarray(x), y, np.int32(by), np.int32(width)))
            want = x.reshape(3, 32)[:, lanes_read(how, by, width)].ravel()
            np.testing.assert_array_equal(y.get(), want, err_msg=f"{how} {by} {width}")


def test_votes_and_reductions(cp: Any) -> None:
    source = """
    extern "C" __global__ void f(const int* x, unsigned* y) {
      const int t = threadIdx.x, n = blockDim.x;
      const unsigned all = 0xffffffff;
      y[7 * n + t] = __activemask();
      y[0 * n + t] = __ballot_sync(all, x[t] & 1);
      y[1 * n + t] = __any_sync(all, x[t] == 7);
      y[2 * n + t] = __all_sync(all, x[t] >= 0);
      y[3 * n + t] = __match_any_sync(all, x[t] % 4);
      y[4 * n + t] = __reduce_add_sync(all, x[t]);
      y[5 * n + t] = __reduce_max_sync(all, x[t]);
      y[6 * n + t] = __reduce_xor_sync(all, (unsigned)x[t]);
      // Lanes of two masks on two ways.
      if (t % 32 < 10) y[8 * n + t] = __ballot_sync(0x3ff, t & 1);
      else y[8 * n + t] = __ballot_sync(~0x3ffu, x[t] & 2);
    }"""
    x = RNG.integers(0, 16, 80)  # the third warp is half there
    x[64] = 7
    y = cp.zeros((9, 80), "u4")
    run(cp, source, (1,), (80,), cp.asarray(x.astype("i4")), y)
    got = y.get()

    def bits(values: np.ndarray) -> int:
        return sum(1 << i for i, v in enumerate(values) if v)

    for first in (0, 32, 64):
        w = x[first : first + 32]
        lane = np.arange(len(w))
        part = got[:, first : first + 32]
        assert (part[0] == bits(w & 1)).all()
        assert (part[1] == (w == 7).any()).all()
        assert (part[2] == 1).all()
        assert part[3].tolist() == [bits(w % 4 == v % 4) for v in w]
        assert (part[4] == w.sum()).all()
        assert (part[5] == w.max()).all()
        assert (part[6] == np.bitwise_xor.reduce(w)).all()
        assert (part[7] == bits(np.ones_like(w))).all()
        assert (part[8][:10] == bits((lane % 2 == 1) & (lane < 10))).all()
        assert (part[8][10:] == bits((w & 2 != 0) & (lane >= 10))).all()


def test_a_warp_may_exchange_by_pointers(cp: Any) -> None:
    """What operations on fragments are built on: lanes read each other's variables."""
    source = """
    extern "C" __global__ void f(const float* a, const float* b, float* c) {
      // A 32x32 product; lane t holds row t of a and column t of b.
      float mine[64], sums[32];
      const int t = threadIdx.x;
      for (int k = 0; k < 32; k++) mine[k] = a[t * 32 + k], mine[32 + k] = b[k * 32 + t];
      cuda_on_cpu_bits all[32];
      cuda_on_cpu_gather(GATHER_USER, ~0u, cuda_on_cpu::pack(&mine[0]), all, __LINE__);
      for (int j = 0; j < 32; j++) {
        sums[j] = 0;
        for (int k = 0; k < 32; k++) sums[j] += mine[k] * cuda_on_cpu::unpack<float*>(all[j])[32 + k];
      }
      cuda_on_cpu_gather(GATHER_USER, ~0u, 0, all, __LINE__);
      for (int j = 0; j < 32; j++) c[t * 32 + j] = sums[j];
    }"""
    a, b = RNG.integers(-4, 5, (2, 32, 32)).astype("f4")
    c = cp.empty((32, 32), "f4")
    run(cp, source, (1,), (32,), cp.asarray(a), cp.asarray(b), c)
    np.testing.assert_array_equal(c.get(), a @ b)


# --------------------------------------------------------------------------------------- atomics


@pytest.mark.parametrize(
    ("ctype", "dtype"),
    [
        ("int", "i4"),
        ("unsigned", "u4"),
        ("unsigned long long", "u8"),
        ("float", "f4"),
        ("double", "f8"),
    ],
)
def test_atomic_add(cp: Any, ctype: str, dtype: str) -> None:
    source = f"""
    extern "C" __global__ void f({ctype}* y, {ctype}* before) {{
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      before[i] = atomicAdd(&y[i % 3], ({ctype})1);
    }}"""
    y, before = cp.zeros(3, dtype), cp.zeros(192, dtype)
    run(cp, source, (4,), (48,), y, before)
    assert y.get().tolist() == [64, 64, 64]
    for k in range(3):
        assert sorted(before.get()[k::3].tolist()) == list(range(64))


def test_other_atomics(cp: Any) -> None:
    source = """
    __device__ float largest(float* at, float value) {
      int* bits = (int*)at;
      int seen = atomicCAS(bits, 0, 0), now;
      do {
        now = seen;
        if (__int_as_float(now) >= value) break;
        seen = atomicCAS(bits, now, __float_as_int(value));
      } while (seen != now);
      return __int_as_float(seen);
    }
    extern "C" __global__ void f(int* y, unsigned* u, unsigned long long* l, float* m) {
      const int t = threadIdx.x;
      atomicMin(&y[0], t - 20), atomicMax(&y[1], t - 20), atomicSub(&y[2], 2);
      atomicExch(&y[3], t), atomicOr(&u[0], 1u << (t % 32)), atomicAnd(&u[1], ~(1u << (t % 8)));
      atomicXor(&u[2], 1u << (t % 4)), atomicInc(&u[3], 9), atomicMax(&l[0], 1ull << t);
      atomicAdd(&m[0], 0.5f), largest(&m[1], (t * 7 % 50) * 0.25f);
    }"""
    y, u, many = cp.zeros(4, "i4"), cp.asarray(np.array([0, 255, 0, 0], "u4")), cp.zeros(1, "u8")
    m = cp.zeros(2, "f4")
    run(cp, source, (1,), (50,), y, u, many, m)
    smallest, largest, less, last = y.get().tolist()
    assert (smallest, largest, less) == (-20, 29, -100)
    assert 0 <= last < 50
    assert u.get().tolist() == [2**32 - 1, 0, 0b0011, 0]
    assert many.get()[0] == 1 << 49
    assert m.get().tolist() == [25, 49 * 0.25]


def test_threads_wait_for_each_other_by_compare_and_swap(cp: Any) -> None:
    """A lock: whoever does not get it lets the others run."""
    source = """
    extern "C" __global__ void f(int* lock, int* count) {
      bool done = false;
      while (!done)
        if (atomicCAS(lock, 0, 1) == 0) {
          atomicAdd(count, 1);
          __threadfence();
          done = true;
          atomicExch(lock, 0);
        }
    }"""
    lock, count = cp.zeros(1, "i4"), cp.zeros(1, "i4")
    run(cp, source, (3,), (64,), lock, count)
    assert (lock.get()[0], count.get()[0]) == (0, 192)


# ------------------------------------------------------------------------------------------ half


def test_every_half_becomes_its_float(fast: Any) -> None:
    source = """
    #include <cuda_fp16.h>
    extern "C" __global__ void f(const __half* x, float* y, __half* back, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = __half2float(x[i]), back[i] = __float2half_rn(y[i]);
    }"""
    x = np.arange(65536, dtype="u2").view("f2")
    y, back = fast.empty(65536, "f4"), fast.empty(65536, "f2")
    run(fast, source, (256,), (256,), fast.asarray(x), y, back, np.int32(65536))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(y.get().view("u4")[number], x.astype("f4").view("u4")[number])
    np.testing.assert_array_equal(back.get().view("u2")[number], x.view("u2")[number])
    assert np.isnan(y.get()[~number]).all()
    assert np.isnan(back.get()[~number]).all()


@pytest.mark.parametrize(("dtype", "ctype", "to_half"), [
    ("f4", "float", "__float2half_rn"), ("f8", "double", "__double2half"),
])  # fmt: skip
def test_conversion_to_half_rounds_to_nearest_even(
    fast: Any, dtype: str, ctype: str, to_half: str
) -> None:
    source = f"""
    #include <cuda_fp16.h>
    extern "C" __global__ void f(const {ctype}* x, __half* y, int n) {{
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = {to_half}(x[i]);
    }}"""
    halves = np.arange(0x7C00, dtype="u2").view("f2").astype(dtype)
    middles = (halves[:-1] + halves[1:]) / 2  # exact
    up, down = np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)
    edges = np.array([65519.99, 65520, 65536, 1e30, np.inf, 2.0**-25, 2.0**-26, 1e-40], dtype)
    rest = RNG.standard_normal(4000) * 2.0 ** RNG.integers(-30, 20, 4000)
    x = np.concatenate([halves, middles, up, down, edges, rest]).astype(dtype)
    x = np.concatenate([x, -x])
    y = fast.empty(x.size, "f2")
    run(fast, source, (-(-x.size // 512),), (512,), fast.asarray(x), y, np.int32(x.size))
    with np.errstate(over="ignore", under="ignore"):
        want = x.astype("f2")
    np.testing.assert_array_equal(y.get().view("u2"), want.view("u2"))


def test_arithmetic_of_halves(fast: Any) -> None:
    source = """
    #include <cuda_fp16.h>
    extern "C" __global__ void f(const __half* a, const __half* b, __half* y, bool* less, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i >= n) return;
      y[i] = a[i] + b[i], y[n + i] = a[i] - b[i], y[2 * n + i] = __hmul(a[i], b[i]);
      y[3 * n + i] = a[i] / b[i], y[4 * n + i] = __hfma(a[i], b[i], a[i]);
      const __half2 pair = __hadd2(__halves2half2(a[i], b[i]), __float2half2_rn(1.0f));
      y[5 * n + i] = pair.x, y[6 * n + i] = __high2half(pair);
      y[7 * n + i] = -a[i], less[i] = a[i] < b[i];
    }"""
    n = 4096
    a, b = RNG.integers(0, 65536, (2, n)).astype("u2").view("f2")
    y, less = fast.empty((8, n), "f2"), fast.zeros(n, "?")
    run(fast, source, (16,), (256,), fast.asarray(a), fast.asarray(b), y, less, np.int32(n))
    with np.errstate(all="ignore"):
        wide = a.astype("f8") * b.astype("f8") + a.astype("f8")
        want = [
            a + b,
            a - b,
            a * b,
            a / b,
            wide.astype("f2"),
            a + np.float16(1),
            b + np.float16(1),
            -a,
        ]
    np.testing.assert_array_equal(y.get(), np.stack(want))
    np.testing.assert_array_equal(less.get(), a < b)


def test_atomic_add_of_halves(cp: Any) -> None:
    source = """
    #include <cuda_fp16.h>
    extern "C" __global__ void f(__half* y, __half2* pairs) {
      atomicAdd(&y[threadIdx.x % 2], __float2half(0.5f));
      atomicAdd(&pairs[0], __floats2half2_rn(1.0f, 2.0f));
    }"""
    y, pairs = cp.zeros(2, "f2"), cp.zeros(2, "f2")
    cp.RawModule(code=source).get_function("f")((2,), (64,), (y, pairs))
    assert y.get().tolist() == [32, 32]
    assert pairs.get().tolist() == [128, 256]


# ------------------------------------------------------------------------------------ the rest


def test_vectors(cp: Any) -> None:
    source = """
    extern "C" __global__ void f(const float* x, float* y, int* z) {
      const int t = threadIdx.x;
      const float4 v = reinterpret_cast<const float4*>(x)[t];
      reinterpret_cast<float4*>(y)[t] = make_float4(v.w, v.z, v.y, v.x);
      reinterpret_cast<int2*>(z)[t] = make_int2(t, sizeof(float4) * 100 + alignof(float4));
    }"""
    x = RNG.standard_normal((32, 4)).astype("f4")
    y, z = cp.empty((32, 4), "f4"), cp.zeros((32, 2), "i4")
    run(cp, source, (1,), (32,), cp.asarray(x), y, z)
    np.testing.assert_array_equal(y.get(), x[:, ::-1])
    assert z.get().tolist() == [[t, 1616] for t in range(32)]


def test_mathematics(fast: Any) -> None:
    source = """
    template <typename T> __device__ void all(T v, T* y) {
      int i = 0;
      y[i++] = exp(v), y[i++] = log(v), y[i++] = tanh(v), y[i++] = sqrt(v), y[i++] = erf(v);
      y[i++] = expm1(v), y[i++] = log1p(v), y[i++] = pow(v, T(1.5)), y[i++] = fma(v, v, T(1));
      y[i++] = max(v, T(2)), y[i++] = min(v, T(2)), y[i++] = abs(-v), y[i++] = floor(v);
      y[i++] = rsqrt(v), y[i++] = isnan(v / T(0) - v / T(0)), y[i++] = isinf(v / T(0));
    }
    extern "C" __global__ void f(float v, double w, float* y, double* z, int* k) {
      all(v, y), all(w, z);
      k[0] = __popc(0xf0f0u), k[1] = __clz(1), k[2] = __ffs(8), k[3] = (int)__umulhi(1u << 31, 6);
      k[4] = __float_as_int(1.0f), k[5] = (int)__brev(0x80000000u), k[6] = max(3, 5);
    }"""
    y, z, k = fast.empty(16, "f4"), fast.empty(16), fast.zeros(7, "i4")
    v = 1.75
    run(fast, source, (1,), (1,), np.float32(v), v, y, z, k)
    from math import erf

    want = [
        np.exp(v), np.log(v), np.tanh(v), np.sqrt(v), erf(v), np.expm1(v), np.log1p(v), v**1.5,
        v * v + 1, 2, v, v, 1, v**-0.5, 1, 1,
    ]  # fmt: skip
    np.testing.assert_allclose(z.get(), want, rtol=1e-15)
    np.testing.assert_allclose(y.get(), want, rtol=2e-7)
    assert k.get().tolist() == [8, 31, 4, 3, 0x3F800000, 1, 5]
