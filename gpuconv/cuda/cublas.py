"""Matrix products by cuBLAS, through CuPy: of arrays as they lie, with sums in float32 or better.

``cupy.matmul`` copies what is not dense, takes three calls where one will do, and rounds every
product of 16-bit arrays to 16 bits. So ``gemmEx`` is called itself: operands may be transposed
or parts of larger matrices, 16-bit products can be added up in float32, and float32 is IEEE
whatever ``CUPY_TF32`` says (TF32 with ``set_precision("tf32")`` only).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.cuda import runtime

__all__ = ["MOST", "product", "unavailable"]

Array = Any

#: cuBLAS counts rows, columns and the distances between them in 32 bits.
MOST = 2**31 - 1

# library_types.h and cublas_api.h.
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77
_DEFAULT_ALGORITHM = -1
_AS_IT_IS, _TRANSPOSED = 0, 1

# Factors of the product and of what was there: (0, 1) in either precision, read on the host.
_FACTORS = {kind: np.array([0, 1], kind) for kind in ("float32", "float64")}
_POINTERS = {
    kind: (int(a.ctypes.data), int(a.ctypes.data) + a.itemsize) for kind, a in _FACTORS.items()
}


def unavailable() -> str | None:
    """Return why cuBLAS cannot be called, or None."""
    try:
        runtime.cupy().cuda.cublas  # noqa: B018
    except Exception as error:  # CuPy raises what its loader does
        return f"cuBLAS does not load: {error}"
    return None


def _form(matrix: Array, rows: int, columns: int) -> tuple[int, int]:
    """Return how cuBLAS, to which rows are columns, takes a matrix: as it is or transposed."""
    size = matrix.dtype.itemsize
    by_row, by_column = matrix.strides[-2:]
    if by_column == size or columns == 1:
        return _AS_IT_IS, max(by_row // size if rows > 1 else 1, columns)
    if by_row != size and rows > 1:
        raise ValueError(f"a matrix has strides {matrix.strides}; expected one to be {size}")
    return _TRANSPOSED, max(by_column // size, rows)


def product(a: Array, b: Array, c: Array, accumulate: bool = False) -> None:
    """Write ``a @ b``, or add it, into ``c``: on the current device and stream.

    Parameters
    ----------
    a, b, c : array
        Of shapes ``(batch, m, k)``, ``(batch, k, n)`` and ``(batch, m, n)``, each matrix with
        rows or columns that lie dense, ``c`` with rows. ``c`` may be float32 where the others
        are of 16 bits.
    accumulate : bool
        Add to what ``c`` holds.
    """
    xp = runtime.cupy()
    count, m, n = c.shape
    k = a.shape[2]
    dtype = a.dtype.name
    kind = "float64" if dtype == "float64" else "float32"
    compute = _COMPUTE_64F if dtype == "float64" else _COMPUTE_32F
    if dtype == "float32" and settings.get_precision() == "tf32":
        compute = _COMPUTE_32F_FAST_TF32
    trans_a, lda = _form(a, m, k)
    trans_b, ldb = _form(b, k, n)
    trans_c, ldc = _form(c, m, n)
    if trans_c != _AS_IT_IS:
        raise ValueError(f"c has strides {c.strides}; expected dense rows")
    zero, one = _POINTERS[kind]
    # Row by row here is column by column there: C^T = B^T A^T.
    xp.cuda.cublas.gemmStridedBatchedEx(
        xp.cuda.get_cublas_handle(), trans_b, trans_a, n, m, k, one,
        b.data.ptr, _TYPES[dtype], ldb, b.strides[0] // b.dtype.itemsize,
        a.data.ptr, _TYPES[dtype], lda, a.strides[0] // a.dtype.itemsize,
        one if accumulate else zero,
        c.data.ptr, _TYPES[c.dtype.name], ldc, c.strides[0] // c.dtype.itemsize,
        count, compute, _DEFAULT_ALGORITHM,
    )  # fmt: skip
