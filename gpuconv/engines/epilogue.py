"""What comes before the gradients' products on the CPU: the activation's derivative, the bias.

Both are passes over the gradient of the output; here they are one, in blocks that stay in the
cache, a worker per core.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.activations import Activation
from gpuconv.engines import numba_epilogue
from gpuconv.engines.base import Engine, epilogue_grad
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.windows import Block, blocks
from gpuconv.problem import ConvProblem
from gpuconv.profiling import ranges

__all__ = ["backward_by_parts", "bias_sums", "output_grad"]

Array = np.ndarray[Any, Any]

#: Bytes of the gradient in front of the activation that are held at a time: a buffer that stays
#: allocated, and in a shared cache until both gradients have read it.
HELD = 14 * 2**20
#: Elements of a block.
BLOCK = 64 * 1024


def bias_sums(dz: Array, db: Array) -> None:
    """Write the sums of ``dz`` over all but its channels into ``db``."""
    output_grad(dz, None, None, None, db)


def output_grad(
    dy: Array, y: Array | None, activation: Activation | None, dz: Array | None, db: Array | None
) -> None:
    """Write ``dz = dy * act'(z)``, the derivative taken from ``y = act(z)``, and its sums.

    Parameters
    ----------
    dy, y : ndarray
        ``(n, *spatial, c)``, any strides; ``y`` where there is an activation.
    activation : Activation, optional
        None for the identity.
    dz : ndarray, optional
        The result, of the wide dtype; None if only the sums are wanted.
    db : ndarray, optional
        ``(c,)``: the sums of ``dz`` over all other axes.
    """
    if numba_epilogue.output_grad(dy, y, activation, dz, db):
        return
    channels = dy.shape[-1]
    dtype = wide_dtype(dy.dtype.name)
    workers = worker_count(16 * dy.size)
    shares = blocks(dy.shape[:-1], max(1, BLOCK // channels), workers)
    totals: list[Array | None] = [None] * len(shares)

    def work(k: int, share: tuple[Block, ...]) -> None:
        total: Array | None = None
        for block in share:
            cells = tuple(slice(a, b) for a, b in block)
            part = dy[cells]
            if activation is not None and y is not None:
                out = scratch.get("epilogue", part.shape, dtype) if dz is None else dz[cells]
                part = epilogue_grad(part, y[cells].astype(dtype, copy=False), activation, out)
            if db is None:
                continue
            if part.dtype != dtype or not part.flags.c_contiguous:
                copy = scratch.get("product", part.shape, dtype)
                np.copyto(copy, part)
                part = copy
            rows = part.reshape(-1, channels)
            # As a product with ones: the sum over rows at the speed of BLAS.
            sums = np.matmul(_ones(len(rows), dtype), rows)
            total = sums if total is None else np.add(total, sums, out=total)
        totals[k] = total

    run_shares(shares, work)
    if db is not None:
        first, *others = (t for t in totals if t is not None)
        for other in others:
            first += other
        db[...] = first


_all_ones: dict[str, Array] = {}


def _ones(count: int, dtype: Any) -> Array:
    name = np.dtype(dtype).name
    found = _all_ones.get(name)
    if found is None or len(found) < count:
        found = _all_ones[name] = np.ones(count, dtype)
    return found[:count]


@np.errstate(all="ignore")  # NaN and Inf travel on without a word
def backward_by_parts(
    problem: ConvProblem,
    plain: ConvProblem,
    by_x: Engine | None,
    by_w: Engine | None,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
) -> None:
    """Write the gradients asked for, each by its own engine, given ``dy`` behind the activation.

    The gradient in front of the activation is formed for some examples at a time, within half
    the workspace limit.

    Parameters
    ----------
    problem, plain : ConvProblem
        With the activation, and without.
    by_x, by_w : Engine or None
        What computes the gradients of the input and of the weights.
    dy, x, w, y, dx, dw, db
        As :meth:`Engine.backward` takes them; NumPy arrays.
    """
    activation = problem.activation
    if activation is None or y is None:
        if by_x is not None and dx is not None:
            with ranges.convolution(plain, "input_grad", by_x):
                by_x.input_grad(plain, dy, w, dx)
        if by_w is not None:
            with ranges.convolution(plain, "weight_grad", by_w):
                by_w.weight_grad(plain, dy, x, dw, db)
        return
    dtype = wide_dtype(problem.dtype)
    example = math.prod(problem.y_shape[1:]) * dtype.itemsize
    most = min(settings.get_workspace_limit() // 2, HELD)
    chunk = max(1, min(problem.batch, most // example))
    held = scratch.get("dz", (chunk, *dy.shape[1:]), dtype)
    sums: list[Array | None] = [None, None]
    for start in range(0, problem.batch, chunk):
        some = slice(start, min(start + chunk, problem.batch))
        part = plain.with_batch(some.stop - some.start)
        dz = held[: part.batch]
        last = start + chunk >= problem.batch
        targets: list[Array | None] = []
        for result, total in zip((dw, db), sums, strict=True):
            direct = result is None or (last and total is None)
            targets.append(result if direct or result is None else np.empty(result.shape, dtype))
        output_grad(dy[some], y[some], activation, dz, targets[1])
        if by_x is not None and dx is not None:
            with ranges.convolution(part, "input_grad", by_x):
                by_x.input_grad(part, dz, w, dx[some])
        if by_w is not None and targets[0] is not None:
            with ranges.convolution(part, "weight_grad", by_w):
                by_w.weight_grad(part, dz, x[some], targets[0], None)
        if chunk < problem.batch:
            for k, value in enumerate(targets):
                total = sums[k]
                if value is not None:
                    sums[k] = value if total is None else np.add(total, value, out=total)
    if chunk < problem.batch:
        for result, total in zip((dw, db), sums, strict=True):
            if result is not None:
                result[...] = total
