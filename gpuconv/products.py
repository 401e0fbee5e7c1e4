"""Products of matrices outside the convolutions: by the same workers.

After a product that BLAS has divided among its own threads, these spin for some milliseconds in
wait of the next one, and take a core from the workers of the convolutions meanwhile. So BLAS is
held to one thread here too, and the workers divide the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import threads
from gpuconv.engines.im2col import run_shares, worker_count

__all__ = ["product"]

Array = Any

#: Operations below which BLAS uses one thread by itself.
_SMALL = 2**19


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``, two matrices of NumPy or CuPy."""
    flops = 2 * a.size * b.shape[-1]
    if type(a) is not np.ndarray or type(b) is not np.ndarray or flops < _SMALL:
        return a @ b
    out = np.empty((a.shape[0], b.shape[1]), np.result_type(a, b))
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
