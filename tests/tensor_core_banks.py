"""Which banks of shared memory the tensor cores' kernels read and fill at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv.cuda.tensor_tiles import Product, Tile
from gpuconv.engines import cuda_tensor_core
from gpuconv.engines.base import Pass

__all__ = ["assert_apart", "banks"]

KERNEL = """
// The bytes at which each lane of warp 0 reads, and each of its threads copies.
extern "C" __global__ void banks(int* a, int* b, int* copies) {
  const int lane = threadIdx.x;
#if PASS != WEIGHT_GRAD
  a[lane] = PieceA::at(lane % 16, lane / 16 * CHUNK);
#else
  a[lane] = TF32 ? PieceA::at(lane % 4, lane / 4)
                 : PieceA::at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
#endif
#if PASS == INPUT_GRAD
  b[lane] = PieceB::at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * CHUNK);
#else
  b[lane] = TF32 ? PieceB::at(lane % 4, lane / 4) : PieceB::at(lane % 16, lane / 16 * 8);
#endif
  copies[lane] = PieceA::at(lane / PieceA::PER_ROW, lane % PieceA::PER_ROW * V);
  copies[32 + lane] = PieceB::at(lane / PieceB::PER_ROW, lane % PieceB::PER_ROW * V);
}
"""


def banks(xp: Any, tile: Tile, pass_: Pass, dtype: str) -> list[tuple[str, np.ndarray]]:
    """Return for each access its name and where it meets memory, all of a row at once.

    Rows are of eight chunks of 16 bytes, or of 32 floats, numbered by their place in 128 bytes.
    """
    size = 4 if dtype == "float32" else 2
    product = Product(pass_, size, 16, 1, 1, 1, 1, 1, 1)
    variant = cuda_tensor_core._variant(tile, product, dtype, 2, 80, False, None)
    module = xp.RawModule(code=variant.source + KERNEL, options=variant.options)
    a, b, copies = xp.zeros(32, "i4"), xp.zeros(32, "i4"), xp.zeros(64, "i4")
    module.get_function("banks")((1,), (32,), (a, b, copies))
    by_value = {"a": pass_ == "weight_grad", "b": pass_ != "input_grad"}
    found = [("copies", copies.get().reshape(8, 8) * size // 16 % 8)]
    for name, values in (("a", a), ("b", b)):
        places = values.get() * size
        if dtype == "float32" and by_value[name]:
            found.append((name, places.reshape(1, 32) // 4 % 32))
        else:
            found.append((name, places.reshape(4, 8) // 16 % 8))
    return found


def assert_apart(found: list[tuple[str, np.ndarray]]) -> None:
    """Assert that no two accesses at once meet the same bank."""
    for name, rows in found:
        for row in rows:
            assert len(set(row)) == len(row), f"{name}: {row}"
