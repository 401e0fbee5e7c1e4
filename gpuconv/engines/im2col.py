"""Gathering windows into a small buffer and multiplying it: im2col, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation
from gpuconv.engines.windows import (
    Axis,
    Block,
    Scratch,
    blocks,
    forward_axes,
    input_grad_phases,
    windows,
)
from gpuconv.problem import ConvProblem

__all__ = [
    "ROWS",
    "SUM_ROWS",
    "add_bias",
    "bias_line",
    "block_target",
    "by_definition",
    "flat_target",
    "gathered",
    "gemm_windows",
    "multiply",
    "run_shares",
    "scratch",
    "transposed_weights",
    "weight_matrices",
    "wide_dtype",
    "window_sums",
    "worker_count",
]

Array = np.ndarray[Any, Any]

#: Bytes that a worker's window buffer should have: what stays in a core's own cache.
BUFFER = 768 * 1024
#: Rows that a product should have, that packing the weights does not dominate.
ROWS = 192
#: The same for the weight gradient, whose products are added up as well.
SUM_ROWS = 1024
#: Multiply-adds below which starting a second worker costs more than it saves.
SMALL = 1 << 20

scratch = Scratch()


@cache
def wide_dtype(dtype: str) -> np.dtype[Any]:
    """Return the dtype of buffers and products."""
    return np.dtype("float32" if dtype in ("float16", "bfloat16") else dtype)


def worker_count(flops: float) -> int:
    """Return how many workers a pass of so many operations is worth."""
    return 1 if flops < 2 * SMALL else settings.get_num_threads()


def block_target(depth: int, width: int, itemsize: int, share: int, least: int = ROWS) -> int:
    """Return how many outputs a rectangle should have.

    ``depth`` values are gathered and ``width`` produced for each output; ``share`` workers
    have half the workspace limit, and the rest is for the gradient in front of the activation.
    """
    budget = settings.get_workspace_limit() // (2 * share)
    row = (2 * depth + width) * itemsize
    # What is finished (bias, activation) must be in the cache still, too.
    return max(1, min(max(BUFFER // (max(depth, width) * itemsize), least), budget // row))


def run_shares(shares: tuple[Any, ...], work: Any) -> None:
    """Run ``work(k, share)`` for every worker's share."""

    def quiet(k: int) -> None:
        with np.errstate(all="ignore"):  # NaN and Inf travel on without a word; a thread's own
            work(k, shares[k])

    if len(shares) == 1:
        quiet(0)
        return
    with threads.single_threaded_blas():
        threads.run(quiet, len(shares))


def weight_matrices(w: Array, groups: int, dtype: Any) -> Array:
    """Return weights ``(*taps, in, out)`` as ``(groups, taps * in, out // groups)``."""
    out = w.shape[-1]
    depth = w.size // out
    flat = np.ascontiguousarray(w, dtype).reshape(depth, groups, out // groups)
    return flat.transpose(1, 0, 2)


def transposed_weights(w: Array, groups: int, dtype: Any) -> Array:
    """Return weights ``(*taps, in, out)`` as ``(groups, taps * out // groups, in)``."""
    *taps, w_in, out = w.shape
    if groups == 1 and math.prod(taps) == 1 and w.dtype == dtype:
        return w.reshape(1, w_in, out).swapaxes(1, 2)  # BLAS reads it as it lies
    split = w.reshape(math.prod(taps), w_in, groups, out // groups)
    matrices = np.ascontiguousarray(split.transpose(2, 0, 3, 1), dtype)
    return matrices.reshape(groups, -1, w_in)


def gathered(
    source: Array, axes: tuple[Axis, ...], block: Block, groups: int, dtype: np.dtype[Any]
) -> Array:
    """Return the windows of a block as ``(groups, cells, depth)``, without a copy where it can be."""
    view = windows(source, axes, block, scratch, groups, dtype)
    cells = math.prod(b - a for a, b in block)
    depth = view.shape[-1] * math.prod(a.taps for a in axes)
    if (
        view.dtype == dtype
        and all(a.taps == 1 for a in axes)
        and view.strides[-1] == dtype.itemsize
    ):
        flat = _merged(view, groups, cells, depth)
        if flat is not None:
            return flat
    buffer = scratch.get("windows", view.shape, dtype)
    np.copyto(buffer, view)
    return buffer.reshape(groups, cells, depth)


def _merged(view: Array, groups: int, cells: int, depth: int) -> Array | None:
    """Return the view as ``(groups, cells, depth)`` if its cells are evenly spaced."""
    step: int | None = None
    extent = 1
    for size, stride in zip(view.shape[-2:0:-1], view.strides[-2:0:-1], strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != step * extent:
            return None
        extent *= size
    if step is None:
        step = depth * view.itemsize
    if step < depth * view.itemsize or step % view.itemsize:
        return None
    return np.lib.stride_tricks.as_strided(
        view, (groups, cells, depth), (view.strides[0], step, view.itemsize)
    )


def flat_target(y: Array, block: Block, groups: int, dtype: Any) -> Array | None:
    """Return the block of ``y`` as ``(groups, cells, out // groups)`` if BLAS can write there."""
    if y.dtype != dtype or y.strides[-1] != y.itemsize:
        return None
    part = y[tuple(slice(a, b) for a, b in block)]
    split = part.shape[-1] // groups
    view = np.lib.stride_tricks.as_strided(
        part,
        (groups, *part.shape[:-1], split),
        (split * part.itemsize, *part.strides[:-1], part.itemsize),
    )
    return _merged(view, groups, math.prod(b - a for a, b in block), split)


def multiply(a: Array, b: Array, out: Array) -> None:
    """Write the batched product ``a @ b`` into ``out``; one group skips the batch axis."""
    if len(a) == 1:
        np.matmul(a[0], b[0], out=out[0])
    else:
        np.matmul(a, b, out=out)


def bias_line(bias: Array) -> Array:
    """Return the bias repeated to a long line, for :func:`add_bias`."""
    return np.tile(bias, max(1, 2048 // len(bias)))


def add_bias(out: Array, line: Array, width: int) -> None:
    """Add a bias of ``width`` values to the last axis of an array, in place.

    Of a contiguous array to a whole line at a time: NumPy's inner loop is the last axis, and a
    short one takes several times as long.
    """
    if not out.flags.c_contiguous or len(line) == width:
        out += line[:width]
        return
    flat = out.reshape(-1)
    whole = out.size // len(line) * len(line)
    lines = flat[:whole].reshape(-1, len(line))
    np.add(lines, line, out=lines)
    if whole < out.size:
        rest = flat[whole:]
        np.add(rest, line[: len(rest)], out=rest)


def gemm_windows(
    source: Array,
    axes: tuple[Axis, ...],
    matrices: Array,
    targets: Sequence[Array],
    flops: float,
    bias: Array | None = None,
    activation: Activation | None = None,
) -> None:
    """Write ``act(windows(source) @ matrices + bias)`` into ``targets``.

    Parameters
    ----------
    source : ndarray
        ``(n, *spatial, channels)``, any strides.
    axes : tuple of Axis
        How windows are gathered.
    matrices : ndarray
        ``(groups, depth, width)``.
    targets : sequence of ndarray
        One for all columns of the product, or several that share them evenly (of one group).
    flops : float
        For the number of workers.
    bias, activation : optional
        Of the whole width.
    """
    groups, depth, width = matrices.shape
    dtype = matrices.dtype
    workers = worker_count(flops)
    target_rows = block_target(groups * depth, groups * width, dtype.itemsize, workers)
    line = bias if bias is None else bias_line(bias)
    counts = targets[0].shape[:-1]
    if _few_rows(counts, target_rows, groups, width, workers):
        shares: tuple[tuple[Block, ...], ...] = ((tuple((0, n) for n in counts),),)
        spread = workers
    else:
        shares, spread = blocks(counts, target_rows, workers), 1

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            rows = gathered(source, axes, block, groups, dtype)
            direct = flat_target(targets[0], block, groups, dtype) if len(targets) == 1 else None
            out = direct
            if out is None:
                out = scratch.get("product", (rows.shape[1], groups, width), dtype)
                out = out.transpose(1, 0, 2)
            _multiply_by_columns(rows, matrices, out, spread)
            if bias is not None and line is not None:
                if groups == 1 and out.flags.c_contiguous:
                    add_bias(out, line, width)
                else:
                    out += bias.reshape(groups, 1, width)
            if activation is not None:
                activation.fn(out, out=out)
            if direct is None:
                cells = tuple(slice(a, b) for a, b in block)
                whole = out.transpose(1, 0, 2).reshape(rows.shape[1], groups * width)
                part = groups * width // len(targets)
                shape = (*(b - a for a, b in block), part)
                for k, target in enumerate(targets):
                    target[cells] = whole[:, k * part : (k + 1) * part].reshape(shape)

    run_shares(shares, work)


def by_definition(
    problem: ConvProblem,
    backwards: bool,
    source: Array,
    w: Array,
    target: Array,
    bias: Array | None = None,
    activation: Activation | None = None,
) -> None:
    """Compute the forward pass, or an input gradient of one phase, as products of windows."""
    dtype = wide_dtype(problem.dtype)
    if backwards:
        (phase,) = input_grad_phases(problem)
        axes = phase.axes
        matrices = transposed_weights(w[phase.taps], problem.groups, dtype)
    else:
        axes, matrices = forward_axes(problem), weight_matrices(w, problem.groups, dtype)
    wide = None if bias is None else bias.astype(dtype, copy=False)
    gemm_windows(source, axes, matrices, [target], problem.flops, wide, activation)


def _few_rows(
    counts: tuple[int, ...], target_rows: int, groups: int, width: int, workers: int
) -> bool:
    """Return whether workers should share the rows and divide the columns of a product.

    BLAS packs all weights for every call, which few rows do not make up for.
    """
    cells = math.prod(counts)
    return workers > 1 and groups == 1 and cells <= min(target_rows, 96) and width >= 64 * workers


def _multiply_by_columns(rows: Array, matrices: Array, out: Array, workers: int) -> None:
    """Write ``rows @ matrices`` into ``out``, each worker some of its columns."""
    if workers == 1:
        multiply(rows, matrices, out)
        return

    def work(_: int, part: range) -> None:
        columns = slice(part.start, part.stop)
        np.matmul(rows[0], matrices[0][:, columns], out=out[0][:, columns])

    run_shares(tuple(threads.shares(matrices.shape[2], workers)), work)


def window_sums(
    problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
) -> None:
    """Write ``windows(x).T @ dz`` into ``dw``, and the sums of ``dz`` into ``db``, where given.

    Each worker adds up one product per rectangle; then the workers' sums are added in order.
    """
    dtype = wide_dtype(problem.dtype)
    groups = problem.groups
    depth = problem.taps * (problem.in_channels // groups)
    width = problem.out_channels // groups
    axes = forward_axes(problem)
    workers = worker_count(problem.flops)
    target = block_target(groups * depth, groups * width, dtype.itemsize, workers, SUM_ROWS)
    counts = dz.shape[:-1]
    # Each worker's sum is as large as dw: over few outputs they divide dw instead.
    spread = workers if groups == 1 and math.prod(counts) <= target else 1
    shares = blocks(counts, target, 1 if spread > 1 else workers)
    own = dw is not None and dw.dtype == dtype and groups == 1 and dw.flags.c_contiguous
    totals: list[tuple[Array | None, Array | None]] = [(None, None)] * len(shares)

    def work(k: int, share: tuple[Block, ...]) -> None:
        total_w: Array | None = None
        total_b: Array | None = None
        for block in share:
            cells = tuple(slice(a, b) for a, b in block)
            gradient = flat_target(dz, block, groups, dtype)
            if gradient is None:
                copy = scratch.get("product", dz[cells].shape, dtype)
                np.copyto(copy, dz[cells])
                gradient = copy.reshape(-1, groups, width).transpose(1, 0, 2)
            if db is not None:
                part = np.matmul(np.ones(gradient.shape[1], dtype), gradient)
                total_b = part if total_b is None else np.add(total_b, part, out=total_b)
            if dw is None:
                continue
            rows = gathered(x, axes, block, groups, dtype).transpose(0, 2, 1)
            if total_w is None:
                if own and k == 0:
                    total_w = dw.reshape(1, depth, width)
                else:
                    total_w = np.empty((groups, depth, width), dtype)
                _multiply_by_rows(rows, gradient, total_w, spread)
            else:
                product = scratch.get("sum", total_w.shape, dtype)
                multiply(rows, gradient, product)
                total_w += product
        totals[k] = total_w, total_b

    run_shares(shares, work)
    sum_w, sum_b = totals[0]
    for other_w, other_b in totals[1:]:
        if sum_w is not None and other_w is not None:
            sum_w += other_w
        if sum_b is not None and other_b is not None:
            sum_b += other_b
    if dw is not None and sum_w is not None and not own:
        dw[...] = sum_w.transpose(1, 0, 2).reshape(problem.w_shape)
    if db is not None and sum_b is not None:
        db[...] = sum_b.reshape(-1)


def _multiply_by_rows(left: Array, right: Array, out: Array, workers: int) -> None:
    """Write ``left @ right`` into ``out``, each worker some of its rows."""
    if workers == 1:
        multiply(left, right, out)
        return

    def work(_: int, part: range) -> None:
        rows = slice(part.start, part.stop)
        np.matmul(left[0][rows], right[0], out=out[0][rows])

    run_shares(tuple(threads.shares(out.shape[1], workers)), work)
