"""Broken kernels fail, each beside its mended self, which passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.cuda_on_cpu import CompileError, CUDADriverError, KernelError, sanitizer

X = np.arange(256, dtype="f4")


def launch(
    cp: Any, source: str, *args: Any, grid: int = 1, block: int = 64, shared: int = 0
) -> None:
    cp.RawModule(code=source).get_function("f")((grid,), (block,), args, shared_mem=shared)


# --------------------------------------------------------------------------------- out of bounds

SHIFT = """
extern "C" __global__ void f(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (BOUNDS) y[WRITE] = READ;
}"""


def shift(bounds: str, write: str = "i", read: str = "x[i]") -> str:
    return SHIFT.replace("BOUNDS", bounds).replace("WRITE", write).replace("READ", read)


OUT_OF_BOUNDS = {
    "write past the end": (
        shift("i <= n"), r"thread \(50, 0, 0\) of block \(0, 0, 0\) \w+ 4 bytes at 0 bytes past the "
        r"end of the array of argument \d \(200 bytes\) \[<stdin>:4\]",
    ),
    "write before the start": (shift("i < n", "i - 1"), "writes 4 bytes at 4 bytes before the"),
    "read past the end": (shift("i < n", "i", "x[i + 1]"), "reads 4 bytes at 0 bytes past the end"),
    "read far away": (shift("i < n", "i", "x[i + (1 << 20)]"), "thread .* reads 4 bytes"),
    "write across the end": (
        shift("i < n / 2 && (((double*)(y + 1))[i] = 1) < 0"), "writes 8 bytes at across the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_out_of_bounds(checked: Any, name: str) -> None:
    source, message = OUT_OF_BOUNDS[name]
    x, y = checked.asarray(X[:50]), checked.empty(50, "f4")
    launch(checked, shift("i < n"), x, y, np.int32(50))
    np.testing.assert_array_equal(y.get(), X[:50])
    with pytest.raises(KernelError, match=r"out of bounds: .*" + message):
        launch(checked, source, x, y, np.int32(50))
    launch(checked, shift("i < n"), x, y, np.int32(50))  # it is as good as new


def test_a_null_pointer(checked: Any) -> None:
    y = checked.empty(50, "f4")
    with pytest.raises(KernelError, match=r"out of bounds: .* reads 4 bytes at a null pointer"):
        launch(checked, shift("i < n"), np.uintp(0), y, np.int32(50))


def test_arrays_that_were_not_given_are_out_of_bounds(checked: Any) -> None:
    x, y, other = (checked.asarray(X) for _ in range(3))
    away = (other.data.ptr - y.data.ptr) // 4
    with pytest.raises(KernelError, match="out of bounds"):
        launch(checked, shift("i < n", f"i + ({away}ll)"), x, y, np.int32(50))
    np.testing.assert_array_equal(other.get(), X)


def test_writes_just_outside_show_in_every_mode(fast: Any) -> None:
    x, y = fast.asarray(X[:50]), fast.empty(50, "f4")
    with pytest.raises(KernelError, match=r"the kernel wrote outside of argument 1 \(200 bytes\)"):
        launch(fast, shift("i <= n", "i", "1"), x, y, np.int32(50))


def test_reads_just_outside_are_nan_in_every_mode(fast: Any) -> None:
    x, y = fast.asarray(X[:50]), fast.zeros(50, "f4")
    launch(fast, shift("i < n", "i", "x[i + 1]"), x, y, np.int32(50))
    assert np.isnan(y.get()).tolist() == [False] * 49 + [True]


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_out_of_bounds_of_shared_memory(checked: Any, kind: str, read: bool) -> None:
    declared = {"static": "__shared__ float s[50];", "dynamic": "extern __shared__ float s[];"}[
        kind
    ]
    source = f"""
    extern "C" __global__ void f(float* y, int far) {{
      {declared}
      const int t = threadIdx.x;
      if (t < 50) s[t] = t;
      __syncthreads();
      if (t < 50) y[t] = s[t + far * {int(read)}];
      __syncthreads();
      if (t < 50) s[t + far * {int(not read)}] = 1;
      __syncthreads();
      if (t < 50) y[t] += s[t];
    }}"""
    y = checked.zeros(50, "f4")
    shared = 200 if kind == "dynamic" else 0
    launch(checked, source, y, np.int32(0), shared=shared)
    with pytest.raises(
        KernelError, match=r"(past the end of|before) shared memory .*\(200 bytes\)"
    ):
        launch(checked, source, y, np.int32(1 if read else -3), shared=shared)


# ----------------------------------------------------------------------------- barriers and races

REVERSE = """
extern "C" __global__ void f(const float* x, float* y) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  s[t] = x[t];
  BARRIER
  y[t] = s[63 - t];
}"""
FIRST = "s[t] = 0; __syncthreads(); "  # so that nothing is read that was not written


def test_a_missing_barrier_is_a_race(checked: Any) -> None:
    x, y = checked.asarray(X[:64]), checked.empty(64, "f4")
    launch(checked, REVERSE.replace("BARRIER", "__syncthreads();"), x, y)
    np.testing.assert_array_equal(y.get(), X[:64][::-1])
    broken = REVERSE.replace("BARRIER", "").replace("s[t] = x[t]", FIRST + "s[t] = x[t]")
    with pytest.raises(KernelError, match=r"race: thread .* shared memory s .* no barrier between"):
        launch(checked, broken, x, y)
    with pytest.raises(KernelError, match=r"uninitialised|race"):
        launch(checked, REVERSE.replace("BARRIER", ""), x, y)


def test_a_missing_barrier_gives_wrong_results_even_unwatched(start: Callable[..., Any]) -> None:
    """Threads run one after the other until they wait: half of them read what is not there."""
    with start() as cp:
        x, y = cp.asarray(X[:64]), cp.empty(64, "f4")
        launch(cp, REVERSE.replace("BARRIER", ""), x, y)
        assert np.isnan(y.get()).any() or (y.get() != X[:64][::-1]).any()


def test_a_barrier_missing_at_the_end_of_a_loop(checked: Any) -> None:
    source = """
    extern "C" __global__ void f(const float* x, float* y) {
      __shared__ float s[64];
      const int t = threadIdx.x;
      float sum = 0;
      for (int i = 0; i < 4; i++) {
        s[t] = x[i * 64 + t];
        __syncthreads();
        for (int k = 0; k < 64; k++) sum += s[k];
        AGAIN
      }
      y[t] = sum;
    }"""
    x, y = checked.asarray(X), checked.empty(64, "f4")
    launch(checked, source.replace("AGAIN", "__syncthreads();"), x, y)
    assert (y.get() == X.sum()).all()
    with pytest.raises(KernelError, match=r"race: .* reads and .* writes .*shared memory s"):
        launch(checked, source.replace("AGAIN", ""), x, y)


HISTOGRAM = """
extern "C" __global__ void f(int* y) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) % 5;
  ADD
}"""


@pytest.mark.parametrize(("grid", "block"), [(1, 64), (64, 1), (3, 40)])
def test_a_plain_store_in_the_place_of_an_atomic_add(checked: Any, grid: int, block: int) -> None:
    y = checked.zeros(5, "i4")
    launch(checked, HISTOGRAM.replace("ADD", "atomicAdd(&y[i], 1);"), y, grid=grid, block=block)
    assert y.get().sum() == grid * block
    message = r"race: thread .* of block .* with no barrier between \[<stdin>:4\] \[<stdin>:4\]"
    with pytest.raises(KernelError, match=message):
        launch(checked, HISTOGRAM.replace("ADD", "y[i] += 1;"), y, grid=grid, block=block)


def test_a_plain_access_beside_atomic_ones(checked: Any) -> None:
    for access in ("if (threadIdx.x == 3) y[0] = 7;", "if (threadIdx.x == 3) y[1] = y[0];"):
        source = HISTOGRAM.replace("ADD", "atomicAdd(&y[0], 1); " + access)
        with pytest.raises(KernelError, match=r"race: .*atomically updates"):
            launch(checked, source, checked.zeros(5, "i4"))


def test_a_lost_update_happens(checked: Any) -> None:
    """Chance switches threads between a read and a write: here different bytes hide the race."""
    source = """
    extern "C" __global__ void f(int* y, int* seen) {
      const int now = atomicAdd(y, 0);
      seen[threadIdx.x] = now;
      atomicExch(y, now + 1);
    }"""
    y = checked.zeros(1, "i4")
    launch(checked, source, y, checked.zeros(64, "i4"))
    assert 1 <= y.get()[0] < 64


def test_blocks_share_nothing_but_atomics(checked: Any) -> None:
    source = """
    extern "C" __global__ void f(float* y) {
      if (threadIdx.x == 0 && blockIdx.x == 0) y[0] = 1;
      __syncthreads();
      if (threadIdx.x == 1) y[1 + blockIdx.x] = y[0];
    }"""
    y = checked.zeros(9, "f4")
    launch(checked, source, y, grid=1)
    with pytest.raises(KernelError, match=r"race: .* of block"):
        launch(checked, source, y, grid=8)


WARP_SUM = """
extern "C" __global__ void f(const float* x, float* y) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  s[t] = x[t];
  SYNC
  for (int k = 16; k; k /= 2) {
    if (t < k) s[t] += s[t + k];
    SYNC
  }
  if (t == 0) y[0] = s[0];
}"""


def test_warps_do_not_run_in_step(checked: Any) -> None:
    x, y = checked.asarray(X[:32]), checked.empty(1, "f4")
    launch(checked, WARP_SUM.replace("SYNC", "__syncwarp();"), x, y, block=32)
    assert y.get()[0] == X[:32].sum()
    with pytest.raises(KernelError, match=r"race|uninitialised"):
        launch(checked, WARP_SUM.replace("SYNC", ""), x, y, block=32)


def test_the_barrier_of_a_warp_does_not_order_another_warp(checked: Any) -> None:
    source = REVERSE.replace("s[t] = x[t]", FIRST + "s[t] = x[t]")
    x, y = checked.asarray(X[:64]), checked.empty(64, "f4")
    launch(checked, source.replace("BARRIER", "__syncthreads();"), x, y)
    with pytest.raises(KernelError, match="race"):
        launch(checked, source.replace("BARRIER", "__syncwarp();"), x, y)


def test_shared_memory_that_nothing_has_written(checked: Any) -> None:
    source = """
    extern "C" __global__ void f(float* y) {
      __shared__ float s[64];
      if (threadIdx.x != 5) s[threadIdx.x] = 1;
      __syncthreads();
      y[threadIdx.x] = s[threadIdx.x];
    }"""
    y = checked.empty(64, "f4")
    with pytest.raises(
        KernelError, match=r"uninitialised: thread \(5, 0, 0\) .* at byte 20 of shared"
    ):
        launch(checked, source, y)


def test_memory_that_nothing_has_written_is_nan(fast: Any) -> None:
    for dtype in ("f2", "f4", "f8"):
        assert np.isnan(fast.empty(7, dtype).get()).all()
        assert np.isnan(fast.empty_like(fast.zeros((2, 3), dtype)).get()).all()


# ------------------------------------------------------------------------------------ divergence

DIVERGENT = {
    "some threads only": "if (t < 40) __syncthreads();",
    "some threads have left": "if (t >= 40) return; __syncthreads();",
    "at two lines": "if (t < 40) __syncthreads();\n else __syncthreads();",
    "one round more": "for (int i = 0; i < 2 + t / 40; i++) __syncthreads();",
}


@pytest.mark.parametrize("name", DIVERGENT)
def test_divergent_barriers(cp: Any, name: str) -> None:
    source = f"""
    extern "C" __global__ void f(float* y) {{
      const int t = threadIdx.x;
      {DIVERGENT[name]}
      y[t] = t;
    }}"""
    with pytest.raises(KernelError, match=r"divergent barrier.*line \d"):
        launch(cp, source, cp.empty(64, "f4"))
    launch(cp, source, cp.empty(64, "f4"), block=40)


WARP = {
    "a lane is missing": "if (t != 7) y[t] = __shfl_xor_sync(~0u, t, 1);",
    "a lane has left": "if (t == 7) return; y[t] = __ballot_sync(~0u, 1);",
    "a lane outside the mask": "y[t] = __shfl_sync(0xffffu, t, 0);",
    "two operations": "if (t & 1) y[t] = __shfl_sync(~0u, t, 0);\n else y[t] = __ballot_sync(~0u, 1);",
}  # fmt: skip


@pytest.mark.parametrize("name", WARP)
def test_divergent_warps(cp: Any, name: str) -> None:
    source = f"""
    extern "C" __global__ void f(float* y) {{
      const int t = threadIdx.x;
      {WARP[name]}
    }}"""
    with pytest.raises(KernelError, match=r"divergent warp collective|does not name it"):
        launch(cp, source, cp.empty(32, "f4"), block=32)


def test_traps(fast: Any) -> None:
    source = """
    extern "C" __global__ void f(float* y) { assert(threadIdx.x < 8); y[threadIdx.x] = 1; }"""
    launch(fast, source, fast.empty(64, "f4"), block=8)
    with pytest.raises(KernelError, match="assertion"):
        launch(fast, source, fast.empty(64, "f4"), block=9)


# ---------------------------------------------------------------- launches that a GPU would refuse


def test_launches_that_a_gpu_refuses(fast: Any) -> None:
    source = 'extern "C" __global__ void __launch_bounds__(128) f(float* y, int n) { y[0] = n; }'
    kernel = fast.RawModule(code=source).get_function("f")
    y, n = fast.empty(4, "f4"), np.int32(3)
    kernel((1,), (128,), (y, n))
    assert y.get()[0] == 3
    wrong: dict[str, tuple[Any, ...]] = {
        "grid is": ((0,), (32,), (y, n)),
        "block is": ((1,), (0,), (y, n)),
        "block of 129 threads": ((1,), (129,), (y, n)),
        "block of 256 threads": ((1,), (8, 8, 4), (y, n)),
    }
    for message, call in wrong.items():
        with pytest.raises(CUDADriverError, match=message):
            kernel(*call)
    with pytest.raises(CUDADriverError, match="dynamic shared memory"):
        kernel((1,), (32,), (y, n), shared_mem=49 * 1024)
    kernel.max_dynamic_shared_size_bytes = 64 * 1024
    kernel((1,), (32,), (y, n), shared_mem=49 * 1024)


def test_arguments_that_do_not_fit(fast: Any) -> None:
    source = 'extern "C" __global__ void f(float* y, int n, float a) { y[0] = n * a; }'
    kernel = fast.RawModule(code=source).get_function("f")
    y, n, a = fast.empty(4, "f4"), np.int32(3), np.float32(2)
    for args, message in (
        ((y, n), "takes 3 arguments, not 2"),
        ((y, np.int64(3), a), "argument 1 of f takes 4 bytes, given int64"),
        ((y, 3, a), "argument 1 of f takes 4 bytes, given int64"),
        ((y, n, np.int32(2)), "argument 2 of f is of kind 'f', given int32"),
        ((fast.empty(4), n, a), "argument 0 of f points to f4, given float64"),
        ((np.empty(4, "f4"), n, a), "argument 0 of f is a ndarray"),
        ((np.uint64(8), n, a), "is a pointer"),
        ((y, y, a), "argument 1 of f is an array"),
    ):
        with pytest.raises(TypeError, match=message):
            kernel((1,), (1,), args)
    kernel((1,), (1,), (y, n, a))
    assert y.get()[0] == 6


def test_sources_that_do_not_compile(fast: Any) -> None:
    source = '#line 1 "broken.cu"\nextern "C" __global__ void f(float* y) {\n  y[0] = nothing;\n}'
    with pytest.raises(CompileError, match=r"broken.cu:2:.*'nothing' was not declared"):
        fast.RawModule(code=source).get_function("f")
    with pytest.raises(CompileError, match=r"stdint\.h"):  # NVRTC has no standard headers
        fast.RawModule(code="#include <stdint.h>").get_function("f")
    with pytest.raises(CompileError, match="option '--fast' is not known"):
        fast.RawModule(code="", options=("--fast",)).get_function("f")


# ------------------------------------------------------------------------------ AddressSanitizer

ASAN = {
    "past the end of an array": ("y[t + 1] = 1;", "heap-buffer-overflow", 0),
    "before an array": ("if (y[t - 1] > 0) y[t] = 1;", "heap-buffer-overflow", 0),
    "past static shared memory": (
        "__shared__ float s[64]; float* p = s; p[t + 1] = 1; y[t] = s[t];", "global-buffer-overflow", 0),
    "past dynamic shared memory": (
        "extern __shared__ float s[]; s[t + 1] = 1; y[t] = s[t];", "use-after-poison", 256),
    "off the alignment": ("if (t < 8) *(float4*)(y + t) = {};", "misaligned address", 0),
    "beyond 32 bits": ("int far = n * (t + 1) / n; y[t] = far;", "signed integer overflow", 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def asan() -> None:
    reason = sanitizer.available()
    if reason:
        pytest.skip(reason)


def under_asan(body: str, shared: int) -> Any:
    source = f'extern "C" __global__ void f(float* y, int n) {{ int t = threadIdx.x; {body} }}'
    return sanitizer.python(
        "-c",
        f"""
import numpy as np
from tests.cuda_on_cpu import stand_in
with stand_in("asan") as cp:
    f = cp.RawModule(code={source!r}).get_function("f")
    y = cp.zeros(64, "f4")
    f((1,), (64,), (y, np.int32(1 << 30)), shared_mem={shared})
    print("sum", y.get().sum())
""",
    )


@pytest.mark.parametrize("name", ASAN)
@pytest.mark.usefixtures("asan")
def test_address_sanitizer_stops_a_kernel(name: str) -> None:
    body, report, shared = ASAN[name]
    done = under_asan(body, shared)
    assert done.returncode != 0
    assert report in done.stderr
    assert "<stdin>:1" in done.stderr  # the kernel's line
    assert "sum" not in done.stdout


@pytest.mark.usefixtures("asan")
def test_address_sanitizer_lets_a_sound_kernel_pass() -> None:
    body = """
    __shared__ float s[64]; extern __shared__ float d[];
    s[t] = t, d[t] = 1;
    __syncthreads();
    y[t] = __shfl_xor_sync(~0u, s[63 - t] + d[63 - t], 1);
    """
    done = under_asan(body, 256)
    assert (done.returncode, done.stdout) == (0, f"sum {64 * 63 / 2 + 64}\n"), done.stderr


def test_address_sanitizer_has_to_be_loaded_first(start: Callable[..., Any]) -> None:
    with (
        pytest.raises(RuntimeError, match=r"python -m tests\.cuda_on_cpu\.sanitizer"),
        start(mode="asan"),
    ):
        pass
    with pytest.raises(ValueError, match="mode is 'slow'; expected one of"), start(mode="slow"):
        pass
