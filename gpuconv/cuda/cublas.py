"""Matrix products by cuBLAS, through CuPy: of arrays as they lie, with sums in float32 or better.

``cupy.matmul`` copies what is not dense, takes three calls where one will do, and rounds every
product of 16-bit arrays to 16 bits. So ``gemmEx`` is called itself: operands may be transposed
or parts of larger matrices, 16-bit products can be added up in float32, and float32 is IEEE
whatever ``CUPY_TF32`` says (TF32 with ``set_precision("tf32")`` only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.cuda import runtime

__all__ = ["MOST", "Matrices", "prepare", "unavailable"]

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


@dataclass(frozen=True)
class Matrices:
    """A batch of matrices as it lies in memory.

    Parameters
    ----------
    dtype : str
    shape, strides : tuple of three int
        Of batch, rows and columns; strides in elements.
    offset : int
        Bytes from the start of the array that is given, when there is one, to the first matrix.
    """

    dtype: str
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    offset: int = 0

    @classmethod
    def dense(cls, dtype: str, count: int, rows: int, columns: int) -> Matrices:
        """Return matrices that lie dense, one behind the other."""
        return cls(dtype, (count, rows, columns), (rows * columns, columns, 1))

    @classmethod
    def of(cls, view: Array, base: Array) -> Matrices:
        """Return those of a view with three axes, of the array that will be given."""
        batch, row, column = (s // view.dtype.itemsize for s in view.strides)
        offset = int(view.data.ptr) - int(base.data.ptr)
        return cls(view.dtype.name, tuple(view.shape), (batch, row, column), offset)

    def form(self) -> tuple[int, int]:
        """Return how cuBLAS, to which rows are columns, takes them: as they are or transposed."""
        (_, rows, columns), (_, by_row, by_column) = self.shape, self.strides
        if by_column == 1 or columns == 1:
            return _AS_IT_IS, max(by_row if rows > 1 else 1, columns)
        if by_row != 1 and rows > 1:
            raise ValueError(f"a matrix has steps {self.strides}; expected one to be 1")
        return _TRANSPOSED, max(by_column, rows)


def prepare(
    a: Matrices, b: Matrices, c: Matrices, accumulate: bool = False, exact: bool = False
) -> Callable[[Array, Array, Array], None]:
    """Return what writes ``a @ b``, or adds it, into ``c``: on the current device and stream.

    Parameters
    ----------
    a, b, c : Matrices
        Of shapes ``(batch, m, k)``, ``(batch, k, n)`` and ``(batch, m, n)``, each matrix with
        rows or columns that lie dense, ``c`` with rows. ``c`` may be float32 where the others
        are of 16 bits.
    accumulate : bool
        Add to what ``c`` holds.
    exact : bool
        float32 is IEEE whatever ``set_precision`` says.

    Returns
    -------
    callable
        Takes the arrays in which the matrices lie.
    """
    xp = runtime.cupy()
    count, m, n = c.shape
    kind = "float64" if a.dtype == "float64" else "float32"
    compute = _COMPUTE_64F if a.dtype == "float64" else _COMPUTE_32F
    if a.dtype == "float32" and settings.get_precision() == "tf32" and not exact:
        compute = _COMPUTE_32F_FAST_TF32
    (trans_a, lda), (trans_b, ldb), (trans_c, ldc) = a.form(), b.form(), c.form()
    if trans_c != _AS_IT_IS:
        raise ValueError(f"c has steps {c.strides}; expected dense rows")
    zero, one = _POINTERS[kind]
    # Row by row here is column by column there: C^T = B^T A^T.
    sizes = trans_b, trans_a, n, m, a.shape[2], one
    of_a = _TYPES[a.dtype], lda, a.strides[0]
    of_b = _TYPES[b.dtype], ldb, b.strides[0]
    of_c = _TYPES[c.dtype], ldc, c.strides[0], count, compute, _DEFAULT_ALGORITHM
    beta = one if accumulate else zero
    from_a, from_b, from_c = a.offset, b.offset, c.offset
    multiply, handle = xp.cuda.cublas.gemmStridedBatchedEx, xp.cuda.get_cublas_handle

    def run(a: Array, b: Array, c: Array) -> None:
        multiply(
            handle(), *sizes, b.data.ptr + from_b, *of_b, a.data.ptr + from_a, *of_a, beta,
            c.data.ptr + from_c, *of_c,
        )  # fmt: skip

    return run
