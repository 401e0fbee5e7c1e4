"""Products of matrices outside the convolutions: by the same workers.

After a product that BLAS has divided among its own threads, these spin for some milliseconds in
wait of the next one, and take a core from the workers of the convolutions meanwhile. So BLAS is
held to one thread here too, and the workers divide the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import memory, threads
from gpuconv.dtypes import is_half, widened
from gpuconv.engines.im2col import run_shares, worker_count

__all__ = ["column_sums", "product"]

Array = Any

#: Operations below which BLAS uses one thread by itself.
_SMALL = 2**19


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``, two matrices of NumPy or CuPy and of one dtype.

    Halves are multiplied in float32: NumPy's BLAS has none of them, and cuBLAS adds up in float32
    itself, but knows bfloat16 only from compute capability 8.0 on.
    """
    if is_half(a) and (type(a) is np.ndarray or _lacks_bfloat16(a)):
        return product(widened(a), widened(b)).astype(a.dtype)
    flops = 2 * a.size * b.shape[-1]
    if type(a) is not np.ndarray or type(b) is not np.ndarray or flops < _SMALL:
        return a @ b
    out = memory.empty((a.shape[0], b.shape[1]), np.result_type(a, b))
    by_rows = a.shape[0] >= b.shape[1]
    shares = tuple(threads.shares(max(out.shape), worker_count(flops)))

    def work(_: int, share: range) -> None:
        part = slice(share.start, share.stop)
        if by_rows:
            np.matmul(a[part], b, out=out[part])
        else:
            np.matmul(a, b[:, part], out=out[:, part])

    with threads.single_threaded_blas():
        run_shares(shares, work)
    return out


def _lacks_bfloat16(a: Array) -> bool:
    """Return whether the array is of bfloat16, on a GPU whose matrix products have none."""
    return a.dtype.name == "bfloat16" and int(a.device.compute_capability) < 80


def column_sums(a: Array) -> Array:
    """Return the sum of every column of a matrix as a row, added up in float32 for halves."""
    wide = "float32" if is_half(a) else a.dtype
    return a.sum(axis=0, dtype=wide, keepdims=True).astype(a.dtype, copy=False)
