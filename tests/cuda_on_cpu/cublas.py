"""``cupy.cuda.cublas``: matrix products by NumPy, from pointers, each checked against its array."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.cuda_on_cpu.arrays import Home

__all__ = ["Cublas", "CublasError"]

_MOST = 2**31 - 1
_COMPUTE = {68: "float32", 70: "float64", 77: "float32"}


def _dtype(number: int) -> np.dtype:
    if number == 14:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({0: "float32", 1: "float64", 2: "float16"}[number])


class CublasError(RuntimeError):
    """What cuBLAS would refuse, or an operand that leaves its array."""


@dataclass(frozen=True)
class Product:
    """One call: ``batch`` products of m x k and k x n matrices, as cuBLAS counts them."""

    batch: int
    m: int
    n: int
    k: int
    compute: int


class Cublas:
    """Matrix products on the arrays of a home.

    Attributes
    ----------
    products : list of Product
        What was computed.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self.products: list[Product] = []

    def handle(self) -> int:
        return 1 + self._home.device

    def gemmStridedBatchedEx(
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int,
        A: int, Atype: int, lda: int, strideA: int, B: int, Btype: int, ldb: int, strideB: int,
        beta: int, C: int, Ctype: int, ldc: int, strideC: int, batchCount: int,
        computeType: int, algo: int,
    ) -> None:  # fmt: skip
        """C = alpha op(A) op(B) + beta C, column by column, for each of a batch."""
        if handle != self.handle():
            raise CublasError(f"handle {handle} is not that of the current device")
        if min(m, n, k, batchCount) < 1 or max(m, n, k, lda, ldb, ldc, batchCount) > _MOST:
            raise CublasError(f"sizes {m} {n} {k}, distances {lda} {ldb} {ldc}, {batchCount} times")
        wide = _COMPUTE[computeType]
        if (_dtype(Atype) == np.float64) != (wide == "float64") or Atype != Btype:
            raise CublasError(f"types {Atype} {Btype} computed as {computeType}")
        if Ctype != Atype and (Ctype != 0 or wide != "float32"):
            raise CublasError(f"a result of type {Ctype} from operands of {Atype}")
        a = self._matrices("A", A, Atype, (k, m) if transa else (m, k), lda, strideA, batchCount)
        b = self._matrices("B", B, Btype, (n, k) if transb else (k, n), ldb, strideB, batchCount)
        c = self._matrices("C", C, Ctype, (m, n), ldc, strideC, batchCount)
        if batchCount > 1:
            self._apart(c)
        left = (a.transpose(0, 2, 1) if transa else a).astype(wide)
        right = (b.transpose(0, 2, 1) if transb else b).astype(wide)
        number = ctypes.c_double if wide == "float64" else ctypes.c_float
        by, keep = number.from_address(alpha).value, number.from_address(beta).value
        with np.errstate(all="ignore"):  # a GPU does not warn of NaN
            total = by * (left @ right)
        if keep:  # where it is 0, C is not read
            total += keep * c.astype(wide)
        c[...] = total.astype(c.dtype)
        self.products.append(Product(batchCount, m, n, k, computeType))

    def _matrices(
        self, name: str, pointer: int, kind: int, shape: tuple[int, int], ld: int, apart: int,
        count: int,
    ) -> Any:  # fmt: skip
        """Return a view of the operand, (batch, rows, columns) as cuBLAS counts them."""
        rows, columns = shape
        dtype = _dtype(kind)
        if ld < max(1, rows):
            raise CublasError(f"{name}: distance {ld} of columns of {rows}")
        memory = self._home.memory_of(pointer)
        if memory is None:
            raise CublasError(f"{name}: pointer {pointer:#x} belongs to no array")
        last = (columns - 1) * ld + rows - 1 + max(0, (count - 1) * apart)
        first = min(0, (count - 1) * apart)
        start = pointer - memory.start
        if start + first * dtype.itemsize < 0 or start + (last + 1) * dtype.itemsize > memory.size:
            raise CublasError(
                f"{name}: elements {first} to {last} from byte {start} of an array of "
                f"{memory.size} bytes"
            )
        size = dtype.itemsize
        return np.ndarray(
            (count, rows, columns), dtype, memory.bytes, start, (apart * size, size, ld * size)
        )

    @staticmethod
    def _apart(c: np.ndarray) -> None:
        """Refuse results that lie on each other."""
        where = np.zeros(c.shape, np.int64)
        for axis, step in enumerate(c.strides):
            sizes = [1] * c.ndim
            sizes[axis] = c.shape[axis]
            where += np.arange(c.shape[axis]).reshape(sizes) * step
        if np.unique(where).size != where.size:
            raise CublasError("results of a batch overlap")
