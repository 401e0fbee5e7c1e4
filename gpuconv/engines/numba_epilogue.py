"""The gradient in front of a ReLU and of the bias in one pass over memory, compiled by Numba.

What :func:`gpuconv.engines.epilogue.output_grad` does in several NumPy passes over a block, for
dense arrays. Sums over pixels are taken in blocks, which are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from gpuconv import compiled, threads
from gpuconv.activations import Activation, ReLU
from gpuconv.engines.im2col import run_shares, worker_count

__all__ = ["output_grad"]

Array = np.ndarray[Any, Any]

#: Rows whose sum is formed before it is added to the others.
ROWS = 256


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    from gpuconv.engines.numba_kept import kept

    rows_at_once = ROWS

    @kept()
    def rectified(dy: Array, y: Array, dz: Array, total: Array, first: int, last: int) -> None:
        channels = dy.shape[1]
        some = np.empty_like(total)
        for start in range(first, last, rows_at_once):
            some[:] = 0
            for i in range(start, min(start + rows_at_once, last)):
                for c in range(channels):
                    # A product, so that an infinity where the ReLU is shut stays one with 0.
                    value = dy[i, c] * (y[i, c] > 0)
                    dz[i, c] = value
                    some[c] += value
            for c in range(channels):
                total[c] += some[c]

    @kept()
    def plain(dy: Array, total: Array, first: int, last: int) -> None:
        channels = dy.shape[1]
        some = np.empty_like(total)
        for start in range(first, last, rows_at_once):
            some[:] = 0
            for i in range(start, min(start + rows_at_once, last)):
                for c in range(channels):
                    some[c] += dy[i, c]
            for c in range(channels):
                total[c] += some[c]

    return rectified, plain


def output_grad(
    dy: Array, y: Array | None, activation: Activation | None, dz: Array | None, db: Array | None
) -> bool:
    """Do what its namesake of :mod:`gpuconv.engines.epilogue` does; return whether it could."""
    rectify = type(activation) is ReLU and y is not None
    arrays = [a for a in (dy, y if rectify else None, dz) if a is not None]
    if (
        not compiled.available()
        or dy.dtype.name not in ("float32", "float64")
        or (activation is not None and not rectify)
        or (rectify and dz is None)
        or not all(a.flags.c_contiguous and a.dtype == dy.dtype for a in arrays)
    ):
        return False
    channels = dy.shape[-1]
    flat = [a.reshape(-1, channels) for a in arrays]
    workers = worker_count(16 * dy.size)
    shares = tuple(threads.shares(len(flat[0]), workers))
    totals = np.zeros((len(shares), channels), dy.dtype)
    by_relu, by_sum = _compiled()

    def work(k: int, share: range) -> None:
        loop = by_relu if rectify else by_sum
        loop(*flat, totals[k], share.start, share.stop)

    if rectify or db is not None:
        run_shares(shares, work)
    if not rectify and dz is not None and dz is not dy:
        dz[...] = dy
    if db is not None:
        db[...] = totals.sum(axis=0) if len(totals) else 0
    return True
