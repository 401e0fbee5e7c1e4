"""Barriers, copies of tensors (``kernels/tma.cuh``) and products (``kernels/wgmma.cuh``) on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpuconv.cuda import kernels, tensor_map
from tests.cuda_on_cpu import CompileError, CUDADriverError, KernelError

RNG = np.random.default_rng(7)
TMA = kernels.read("tma.cuh") + '#line 1 "test.cu"\n'
WGMMA = kernels.read("wgmma.cuh") + '#line 1 "test.cu"\n'


@pytest.fixture
def cp(start: Callable[..., Any]) -> Iterator[Any]:
    with start(mode="checked", capability=90) as module:
        yield module


def run(cp: Any, body: str, *args: Any, parameters: str, block: int = 32, shared: int = 0) -> None:
    source = f'{WGMMA}extern "C" __global__ void f({parameters}) {{\n'
    source += "extern __shared__ __align__(1024) unsigned char memory[];\n"
    source += f"const int t = threadIdx.x; {body} }}"
    kernel = cp.RawModule(code=source, options=("-arch=sm_90a",)).get_function("f")
    kernel.max_dynamic_shared_size_bytes = shared
    kernel((1,), (block,), args, shared_mem=shared)


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Return rows of 128 bytes, 16-byte chunk c of row r at chunk c ^ r % 8."""
    chunks = rows.view(np.uint8).reshape(len(rows), 8, 16)
    moved = [row[np.arange(8) ^ (r % 8)] for r, row in enumerate(chunks)]
    return np.array(moved).reshape(len(rows), 128)


# ---------------------------------------------------------------------------------------- copies

COPY = """
  Mbarrier* const full = (Mbarrier*)(memory + BYTES);
  if (t == 0) { mbarrier_init(full, 1); mbarrier_init_fence(); }
  __syncthreads();
  if (t == 0) {
    mbarrier_expect(full, BYTES);
    CALL;
  }
  mbarrier_wait(full, 0);
  for (int i = t; i < BYTES; i += blockDim.x) y[i] = memory[i];
"""


def copied(cp: Any, made: Any, call: str, size: int) -> np.ndarray:
    """Return the bytes that a copy by a map writes to shared memory."""
    y = cp.zeros(size, "u1")
    body = COPY.replace("CALL", call).replace("BYTES", str(size))
    parameters = "const __grid_constant__ TensorMap map, unsigned char* y"
    run(cp, body, made, y, parameters=parameters, shared=size + 8)
    return y.get()


def test_boxes_of_a_matrix(cp: Any) -> None:
    """Rows and columns beyond the matrix, before it too, are zeros."""
    x = RNG.standard_normal((13, 72)).astype("f2")
    there = cp.asarray(x)
    made = tensor_map.tiled("float16", there.data.ptr, (72, 13), (64, 16))
    room = np.zeros((40, 200), "f2")
    room[10:23, 50:122] = x
    for at in ((0, 0), (40, 5), (-8, -3), (72, 0)):
        want = room[10 + at[1] : 26 + at[1], 50 + at[0] : 114 + at[0]]
        got = copied(cp, made, f"tensor_copy(memory, &map, full, {at[0]}, {at[1]})", 2048)
        np.testing.assert_array_equal(got, swizzled(np.ascontiguousarray(want)).ravel())


def test_boxes_of_three_axes_round_to_tf32(cp: Any) -> None:
    x = RNG.standard_normal((3, 5, 8)).astype("f4")
    x[1, 2, 3], x[1, 0, 1] = np.nan, np.inf
    there = cp.asarray(x)
    made = tensor_map.tiled("float32", there.data.ptr, (8, 5, 3), (32, 8, 1))
    got = copied(cp, made, "tensor_copy(memory, &map, full, 0, 0, 1)", 1024)
    want = np.zeros((8, 32), "f4")
    want[:5, :8] = x[1]
    bits = want.view("u4")
    finite = np.isfinite(want)
    bits[finite] = (bits[finite] + 0x1000) & 0xFFFFE000
    bits[np.isnan(want)] = 0x7FFFFFFF
    np.testing.assert_array_equal(got, swizzled(want).ravel())


@pytest.mark.parametrize(("shape", "stride", "before", "after", "tap", "first"), [
    ((2, 1, 5, 6), (1, 1, 1), (0, 1, 1), (0, -1, -1), (0, 2, 1), 7),
    ((2, 1, 9, 7), (1, 2, 3), (0, 2, 0), (0, 1, -1), (0, 0, 3), 2),
    ((1, 1, 4, 4), (1, 1, 1), (0, -1, 3), (0, 2, 2), (0, 1, 0), 0),
    ((2, 3, 4, 5), (1, 1, 1), (1, 1, 0), (-1, 0, 0), (2, 0, 1), 11),
    ((1, 5, 4, 5), (2, 1, 2), (0, 1, 1), (0, -2, -1), (1, 1, 0), 3),
])  # fmt: skip
def test_pixels_as_the_rows_of_im2col(
    cp: Any, shape: Any, stride: Any, before: Any, after: Any, tap: Any, first: int
) -> None:
    """From a position on, row by row, image by image; zeros outside of them, and behind the last."""
    n, *sizes = shape
    deep = sizes[0] > 1
    x = RNG.standard_normal((*shape, 64)).astype("f2")
    there = cp.asarray(x)
    axes = [0, 1, 2][0 if deep else 1 :]
    ranges = [range(-before[i], sizes[i] + after[i], stride[i]) for i in range(3)]
    places = [
        (k, *(r[j] for r, j in zip(ranges, at, strict=True)))
        for k in range(n)
        for at in np.ndindex(*map(len, ranges))
    ]
    rows = np.zeros((16, 64), "f2")
    for i, (k, *at) in enumerate(places[first : first + 16]):
        moved = [a + b for a, b in zip(at, tap, strict=True)]
        if all(0 <= m < s for m, s in zip(moved, sizes, strict=True)):
            rows[i] = x[(k, *moved)]
    inner = axes[::-1]
    made = tensor_map.im2col(
        "float16", there.data.ptr, (64, *(sizes[i] for i in inner), n),
        [-before[i] for i in inner], [after[i] - 1 + 1 for i in inner],
        [stride[i] for i in inner], (64, 16),
    )  # fmt: skip
    k, *at = places[first]
    numbers = [0, *(at[i] for i in inner), k, *(tap[i] for i in inner)]
    call = f"tensor_copy_im2col(memory, &map, full, {', '.join(map(str, numbers))})"
    got = copied(cp, made, call, 2048)
    np.testing.assert_array_equal(got, swizzled(rows).ravel())


def test_what_a_driver_refuses(cp: Any) -> None:
    x = cp.zeros(4096, "f2")
    at = x.data.ptr
    box, ones = (64, 8), (1, 1)
    corners = ((0, 0), (0, 0))
    for message, call in {
        "globalAddress": lambda: tensor_map.tiled("float16", at + 8, (64, 8), box),
        r"globalStrides\[0\] is 120": lambda: tensor_map.tiled("float16", at, (60, 8), box),
        r"boxDim\[1\] is 257": lambda: tensor_map.tiled("float16", at, (64, 8), (64, 257)),
        "inner axis of the box has 256": lambda: tensor_map.tiled("float16", at, (64, 8), (128, 8)),
        "inner axis of the box has 8": lambda: tensor_map.tiled("float16", at, (64, 8), (4, 8)),
        r"globalDim\[1\] is 0": lambda: tensor_map.tiled("float16", at, (64, 0), box),
        "pixelBoxLowerCorner is -129": lambda: tensor_map.im2col(
            "float16", at, (64, 3, 3, 1), (-129, 0), (0, 0), ones, box),
        "pixelBoxUpperCorner is 16": lambda: tensor_map.im2col(
            "float16", at, (64, 3, 3, 3, 1), (0, 0, 0), (0, 16, 0), (1, 1, 1), box),
        r"elementStrides\[2\] is 9": lambda: tensor_map.im2col(
            "float16", at, (64, 3, 3, 1), *corners, (1, 9), box),
        "pixelsPerColumn is 1025": lambda: tensor_map.im2col(
            "float16", at, (64, 3, 3, 1), *corners, ones, (64, 1025)),
        "the box of axis 1 is empty": lambda: tensor_map.im2col(
            "float16", at, (64, 3, 3, 1), (3, 0), (0, 0), ones, box),
        "tensorRank is 2": lambda: tensor_map.im2col("float16", at, (64, 3), (), (), (), box),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=r"cuTensorMapEncode\w+ returns 1 for"):
            call()
        assert re.search(message, cp.libcuda.refused[-1])


def test_a_map_of_memory_that_is_gone(cp: Any) -> None:
    x = cp.zeros((8, 64), "f2")
    made = tensor_map.tiled("float16", x.data.ptr, (64, 8), (64, 8))
    copied(cp, made, "tensor_copy(memory, &map, full, 0, 0)", 1024)
    longer = tensor_map.tiled("float16", x.data.ptr, (64, 9), (64, 8))
    with pytest.raises(ValueError, match="lies in no array"):
        copied(cp, longer, "tensor_copy(memory, &map, full, 0, 0)", 1024)


WRONG = {
    "not a multiple of the swizzle": ("tensor_copy(memory + 128, &map, full, 0, 0)", "multiple of"),
    "of another rank": ("tensor_copy(memory, &map, full, 0, 0, 0)", "another number of axes"),
    "of another mode": ("tensor_copy_im2col(memory, &map, full, 0, 0, 0, 0, 0, 0)", "another mode"),
    "past the end": ("tensor_copy(memory + 1024, &map, full, 0, 0)", "past the end of shared"),
    "read before it has landed": (
        "tensor_copy(memory, &map, full, 0, 0); y[0] = memory[5]", "before that copy has landed"),
    "written before it has landed": (
        "tensor_copy(memory, &map, full, 0, 0); memory[5] = 1", "before that copy has landed"),
    "twice": (
        "tensor_copy(memory, &map, full, 0, 0); tensor_copy(memory, &map, full, 0, 0)",
        "race|more bytes"),
    "an unknown barrier": ("tensor_copy(memory, &map, full + 1, 0, 0)",
                           "not initialised|past the end|uninitialised"),
    "nothing": ("", "misses 0 of 1 arrivals in phase 0, and of 1024 bytes announced 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_copies(cp: Any, name: str) -> None:
    call, message = WRONG[name]
    x = cp.zeros((8, 64), "f2")
    made = tensor_map.tiled("float16", x.data.ptr, (64, 8), (64, 8))
    copied(cp, made, "tensor_copy(memory, &map, full, 0, 0)", 1024)
    with pytest.raises(KernelError, match=message):
        copied(cp, made, call, 1024)


# -------------------------------------------------------------------------------------- products

MULTIPLY = """
  for (int i = t; i < BYTES / 4; i += blockDim.x) ((unsigned*)memory)[i] = operands[i];
  mbarrier_init_fence();
  __syncthreads();
  float d[COUNT];
  for (int i = 0; i < COUNT; i++) d[i] = y[t * COUNT + i];
  wgmma_fence();
  const unsigned a = shared_address(memory), b = a + B_AT;
  for (int k = 0; k < 4; k++)
    wgmma_NAME(d, matrix_descriptor(a + k * A_STEP, 8192, 1024),
               matrix_descriptor(b + k * B_STEP, 8192, 1024));
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < COUNT; i++) y[t * COUNT + i] = d[i];
"""


def operand(matrix: np.ndarray, across: bool) -> np.ndarray:
    """Return a matrix of rows along the depth (128 bytes of it) as it lies in shared memory."""
    if not across:
        return swizzled(np.ascontiguousarray(matrix))
    blocks = [matrix[i : i + 64].T for i in range(0, len(matrix), 64)]
    return np.concatenate([swizzled(np.ascontiguousarray(b)) for b in blocks])


def bits_of(values: np.ndarray, name: str) -> np.ndarray:
    if name == "bf16":
        return (values.astype("f4").view("u4") >> 16).astype("u2")
    return values.astype("f2" if name == "f16" else "f4")


@pytest.mark.parametrize(("name", "n", "a_across", "b_across"), [
    ("f16", 64, False, False), ("f16", 128, True, True), ("f16", 256, False, True),
    ("bf16", 64, True, False), ("bf16", 128, False, False), ("bf16", 256, True, True),
    ("tf32", 64, False, False), ("tf32", 128, False, False), ("tf32", 256, False, False),
])  # fmt: skip
def test_products(cp: Any, name: str, n: int, a_across: bool, b_across: bool) -> None:
    """Four products along 128 bytes of depth, added to what the sums hold."""
    depth = 32 if name == "tf32" else 64
    a, b = (RNG.integers(-4, 5, (rows, depth)).astype("f4") for rows in (64, n))
    c = RNG.integers(-4, 5, (64, n)).astype("f4")
    room = np.concatenate([operand(bits_of(m, name), across)
                           for m, across in ((a, a_across), (b, b_across))])  # fmt: skip
    place = np.array([  # the PTX manual's table of the sums
        [(t // 32 * 16 + t % 32 // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (t % 4) + i % 2)
         for i in range(n // 2)] for t in range(128)
    ])  # fmt: skip
    y = cp.asarray(np.ascontiguousarray(c[place[..., 0], place[..., 1]]))
    suffix = f"<{int(a_across)}, {int(b_across)}>" if name != "tf32" else ""
    body = MULTIPLY.replace("NAME", name + suffix).replace("COUNT", str(n // 2))
    for word, value in (("BYTES", room.nbytes), ("B_AT", 64 * 128),
                        ("A_STEP", 2048 if a_across else 32),
                        ("B_STEP", 2048 if b_across else 32)):  # fmt: skip
        body = body.replace(word, str(value))
    words = cp.asarray(np.ascontiguousarray(room).view("u4").ravel())
    run(cp, "  if (t == 0) { Mbarrier* spare = (Mbarrier*)(memory + " + str(room.nbytes)
        + "); mbarrier_init(spare, 1); } __syncthreads();" + body, words, y,
        parameters="const unsigned* operands, float* y", block=128, shared=room.nbytes + 8)  # fmt: skip
    want = c + a @ b.T
    np.testing.assert_array_equal(y.get(), want[place[..., 0], place[..., 1]])


ORDER = """
  Mbarrier* const spare = (Mbarrier*)(memory + 16384);
  if (t == 0) mbarrier_init(spare, 1);
  __syncthreads();
  for (int i = t; i < 4096; i += blockDim.x) ((float*)memory)[i] = 1;
  FENCE
  __syncthreads();
  float d[32] = {};
  wgmma_fence();
  const unsigned a = shared_address(memory);
  wgmma_tf32(d, matrix_descriptor(a, 8192, 1024), matrix_descriptor(a + 8192, 8192, 1024));
  MIDDLE
  wgmma_commit();
  WAIT
  LAST
  for (int i = 0; i < 32; i++) y[t * 32 + i] = d[i];
"""
SOUND = {"FENCE": "mbarrier_init_fence();", "MIDDLE": "", "WAIT": "wgmma_wait<0>();", "LAST": ""}
ANOTHER = "wgmma_tf32(d, matrix_descriptor(a, 0, 1024), matrix_descriptor(a + 8192, 0, 1024));"
BROKEN = {
    "stores that are not fenced": ({"FENCE": ""}, "no fence of the asynchronous proxy"),
    "no wait": ({"WAIT": ""}, "has not waited for"),
    "operands overwritten before the wait": (
        {"WAIT": "memory[t] = 1; wgmma_wait<0>();"}, "a product that has not ended reads"),
    "operands overwritten by another warp": (
        {"LAST": "memory[8192 + t] = 1;"}, "a product that has not ended reads|race"),
    "another without a fence": (
        {"LAST": "d[0] = 1; " + ANOTHER + "wgmma_commit(); wgmma_wait<0>();"},
        "without a wgmma.fence"),
    "not swizzled": ({"MIDDLE": "wgmma_tf32(d, matrix_descriptor(a, 0, 1024) & ~(3ull << 62), "
                      "matrix_descriptor(a, 0, 1024));"}, "not swizzled by 128 bytes"),
    "past the end": ({"MIDDLE": "wgmma_tf32(d, matrix_descriptor(a + 16384, 0, 1024), "
                      "matrix_descriptor(a, 0, 1024));"}, "past the end of shared memory"),
    "a wait for all groups but the newest": ({"WAIT": "wgmma_wait<1>();"}, "has not waited for"),
    "lanes apart": ({"MIDDLE": "wgmma_tf32(d, matrix_descriptor(a + t / 16 % 2 * 1024, 0, 1024), "
                     "matrix_descriptor(a, 0, 1024));"}, "differ from lane to lane"),
}  # fmt: skip


def in_order(cp: Any, changes: dict[str, str]) -> np.ndarray:
    body = ORDER
    for word, text in {**SOUND, **changes}.items():
        body = body.replace(word, text)
    y = cp.zeros((128, 32), "f4")
    run(cp, body, y, parameters="float* y", block=128, shared=16384 + 8)
    return y.get()


@pytest.mark.parametrize("name", BROKEN)
def test_products_out_of_order(cp: Any, name: str) -> None:
    changes, message = BROKEN[name]
    assert (in_order(cp, {}) == 8).all()
    with pytest.raises(KernelError, match=message):
        in_order(cp, changes)


def test_sums_are_undefined_before_the_wait(start: Callable[..., Any]) -> None:
    with start(capability=90) as cp:
        early = in_order(
            cp, {"WAIT": "", "LAST": "y[t * 32] = d[0]; wgmma_wait<0>(); d[0] = y[t * 32];"}
        )
        assert np.isnan(early[:, 0]).all()
        assert (early[:, 1:] == 8).all()


# ------------------------------------------------------------------------------------- barriers


def test_phases_of_a_barrier(cp: Any) -> None:
    """One warp writes, the other reads, in turn, over two barriers."""
    body = """
      Mbarrier* const full = (Mbarrier*)memory;
      Mbarrier* const empty = full + 1;
      float* const s = (float*)(memory + 16);
      if (t == 0) { mbarrier_init(full, 32); mbarrier_init(empty, 32); mbarrier_init_fence(); }
      __syncthreads();
      for (int i = 0; i < 5; i++)
        if (t < 32) {
          mbarrier_wait(empty, (i + 1) % 2);
          s[t] = x[32 * i + t];
          mbarrier_arrive(full);
        } else {
          mbarrier_wait(full, i % 2);
          y[32 * i + t - 32] = s[63 - t];
          mbarrier_arrive(empty);
        }
    """
    x, y = cp.asarray(np.arange(160, dtype="f4")), cp.zeros(160, "f4")
    arguments = {"parameters": "const float* x, float* y", "block": 64, "shared": 256}
    run(cp, body, x, y, **arguments)
    want = np.arange(160).reshape(5, 32)[:, ::-1].ravel()
    np.testing.assert_array_equal(y.get(), want)
    for lost in (
        "mbarrier_wait(full, i % 2);", "mbarrier_wait(empty, (i + 1) % 2);",
        "mbarrier_arrive(full);", "mbarrier_arrive(empty);", "__syncthreads();",
    ):  # fmt: skip
        with pytest.raises(KernelError, match=r"race|uninitialised|a wait without end"):
            run(cp, body.replace(lost, ""), x, y, **arguments)


def test_what_an_architecture_lacks_does_not_compile(start: Callable[..., Any]) -> None:
    body = 'extern "C" __global__ void f(float* y) { Mbarrier b; wgmma_fence(); }'
    with start(capability=80) as cp, pytest.raises(CompileError, match="Mbarrier"):
        cp.RawModule(code=WGMMA + body).get_function("f")
    with start(capability=90) as cp:
        with pytest.raises(CompileError, match="wgmma_fence"):  # sm_90 without the a
            cp.RawModule(code=WGMMA + body).get_function("f")
        cp.RawModule(code=WGMMA + body, options=("-arch=sm_90a",)).get_function("f")
    with start(capability=100) as cp, pytest.raises(CUDADriverError, match="sm_90a on a device"):
        cp.RawModule(code=WGMMA + body, options=("-arch=sm_90a",))
