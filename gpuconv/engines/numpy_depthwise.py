"""Depthwise convolution in NumPy: a line of columns and channels times a line of weights.

Where a channel meets one channel only there is no product of matrices, just a multiplication
and an addition for each tap. ``numpy.einsum`` does both in one pass over the shortest loops it
can find; the weights are laid out as often as there are columns in a line, so that columns and
channels become one long inner loop. All taps of a block are one call.

The source of a block is copied between the zeros of its padding. With a stride along the
columns, the columns of each remainder are copied to a place of their own, where they lie side
by side again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.activations import Activation
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.rates import rates
from gpuconv.engines.windows import Axis, Block, blocks, forward_axes, input_grad_phases
from gpuconv.problem import ConvProblem

__all__ = ["NumpyDepthwise"]

Array = np.ndarray[Any, Any]

#: Elements of a block's outputs: with its source and its weights they stay in a core's cache.
BLOCK = 160 * 1024
#: Elements of a line: enough to forget the loop around it, few enough to repeat the weights for.
LINE = 8 * 1024
#: Letters of the axes before the last, for outputs and for taps.
_OUT, _TAPS = "abc", "pqr"


@dataclass(frozen=True)
class _Columns:
    """The taps along the columns that read one remainder of them by the stride.

    Attributes
    ----------
    phase : int
        First cell, counted from the block's first.
    length : int
        Cells ``phase, phase + stride, ...`` that a line reads.
    offset, step : int
        Of the first tap, and from tap to tap, in these cells.
    taps : slice
        Which taps.
    """

    phase: int
    length: int
    offset: int
    step: int
    taps: slice


@lru_cache(maxsize=1024)
def _columns(axis: Axis, outputs: int) -> tuple[_Columns, ...]:
    """Return the remainders by the stride that a line of ``outputs`` reads."""
    stride, dilation = axis.stride, axis.dilation
    apart = stride // math.gcd(stride, dilation)  # taps with the same remainder
    found = []
    for first in range(min(apart, axis.taps)):
        phase, offset = first * dilation % stride, first * dilation // stride
        count = (axis.taps - 1 - first) // apart + 1
        step = apart * dilation // stride
        length = offset + (count - 1) * step + outputs
        found.append(_Columns(phase, length, offset, step, slice(first, None, apart)))
    return tuple(found)


class NumpyDepthwise(Engine):
    """Multiplications and additions along lines, a worker per core."""

    name = "numpy_depthwise"
    device_kind = "cpu"

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is None and problem.groups != problem.in_channels:
            reason = "it computes one input channel a group, and here there are " + str(
                problem.in_channels // problem.groups
            )
        return reason

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: multiplications and additions, and copies."""
        rate, workers = rates(), worker_count(16 * problem.flops)
        size = wide_dtype(problem.dtype).itemsize
        phases = math.prod(problem.stride) if pass_ == "input_grad" else 1
        outputs = max(math.prod(problem.y_shape), math.prod(problem.x_shape) // phases)
        count = max(1.0, outputs / BLOCK) * phases
        line = min(LINE, problem.out_channels * problem.out_shape[-1])
        lines = problem.flops / 2 / line
        seconds = problem.flops / 2 * size / 4 / rate.einsum + 1e-8 * lines
        seconds += (3 * problem.bytes + count * line * problem.taps * size) / rate.copy
        return 2e-5 + (seconds + 25 * rate.call * count) / workers

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        size = wide_dtype(problem.dtype).itemsize
        line = max(LINE, 2 * problem.out_channels)
        block = max(BLOCK, problem.out_channels)
        window = math.prod(problem.window)
        return (
            worker_count(16 * problem.flops)
            * size
            * (3 * problem.taps * line + (3 + min(window, 4 * math.prod(problem.stride))) * block)
        )

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        _correlate(
            problem, x, forward_axes(problem), w[..., 0, :], y, b, problem.activation, expand=True
        )

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``, phase by phase."""
        for phase in input_grad_phases(problem):
            cells = dx[(slice(None), *phase.cells)]
            if phase.axes:
                taps = w[phase.taps][..., 0, :]
                _correlate(problem, dz, phase.axes, taps, cells, None, None, expand=False)
            else:
                cells[...] = 0

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is not None:
            dw[..., 0, :] = _window_sums(problem, dz, x)


def _cut(counts: tuple[int, ...], channels: int, workers: int) -> tuple[tuple[Block, ...], ...]:
    """Divide outputs into blocks whose lines are not too long, and these among workers."""
    pieces = -(-counts[-1] * channels // LINE)
    if pieces <= 1:
        return blocks(counts, max(1, BLOCK // channels), workers)
    # Lines are cut first, then rows put together.
    length = max(1, -(-counts[-1] // pieces))
    rows = max(1, BLOCK // (length * channels))
    cut = blocks(counts[:-1], rows, workers)
    lines = [(a, min(a + length, counts[-1])) for a in range(0, counts[-1], length)]
    return tuple(tuple((*block, line) for block in share for line in lines) for share in cut)


def _reads(axes: tuple[Axis, ...], block: Block) -> list[tuple[int, int]]:
    """Return the source cells that a block reads, per spatial axis."""
    return [a.reads(first, last) for a, (first, last) in zip(axes, block[1:], strict=True)]


def _copied(
    source: Array, axes: tuple[Axis, ...], block: Block, columns: _Columns, repeat: int, dtype: Any
) -> Array:
    """Return the block's cells of one remainder of the columns, between zeros, channels repeated."""
    (n0, n1), *spatial = block
    *rows, last = axes
    lengths: list[int] = [n1 - n0]
    index, inner = [slice(n0, n1)], [slice(None)]
    for axis, (low, high) in zip(rows, _reads(tuple(rows), block[:-1]), strict=True):
        first, end = max(0, low), max(0, min(high, axis.size))
        lengths.append(high - low)
        index.append(slice(first, max(first, end)))
        inner.append(slice(first - low, first - low + max(0, end - first)))
    begin = spatial[-1][0] * last.stride + last.start + columns.phase
    skip = max(0, -(begin // last.stride))
    stop = max(skip, min(columns.length, (last.size - 1 - begin) // last.stride + 1))
    lengths.append(columns.length)
    at = begin + last.stride * skip
    index.append(slice(at, at + last.stride * (stop - skip), last.stride))
    inner.append(slice(skip, stop))
    channels = source.shape[-1]
    copy = scratch.get("lines", (*lengths, channels, repeat), dtype)
    place, cells = tuple(inner), source[tuple(index)]
    if any(s.stop - s.start < n for s, n in zip(inner[1:], lengths[1:], strict=True)):
        _zero_around(copy, inner)
    copy[place] = cells[..., None]
    return copy.reshape(*lengths, channels * repeat)


def _zero_around(copy: Array, inner: list[slice]) -> None:
    """Set to zero what lies outside the inner range, axis by axis."""
    before: list[slice] = [slice(None)]
    for part in inner[1:]:
        copy[(*before, slice(0, part.start))] = 0
        copy[(*before, slice(part.stop, None))] = 0
        before.append(part)


def _lines(
    copy: Array, axes: tuple[Axis, ...], block: Block, columns: _Columns, taps: int
) -> Array:
    """Return the view ``(n, *rows, *row taps, column taps, line)`` of a copied block."""
    (n0, n1), *spatial = block
    rows = axes[:-1]
    channels = copy.shape[-1]
    length = spatial[-1][1] - spatial[-1][0]
    s = copy.strides
    return as_strided(
        copy[..., columns.offset :, :],
        (
            n1 - n0,
            *(last - first for first, last in spatial[:-1]),
            *(a.taps for a in rows),
            taps,
            length * channels,
        ),
        (
            s[0],
            *(a.stride * step for a, step in zip(rows, s[1:], strict=False)),
            *(a.dilation * step for a, step in zip(rows, s[1:], strict=False)),
            columns.step * s[-2],
            s[-1],
        ),
    )


def _letters(axes: tuple[Axis, ...]) -> tuple[str, str]:
    """Return einsum's letters for images and rows, and for the row taps."""
    rows = len(axes) - 1
    return "n" + _OUT[:rows], _TAPS[:rows]


def _correlate(
    problem: ConvProblem,
    source: Array,
    axes: tuple[Axis, ...],
    w: Array,
    target: Array,
    b: Array | None,
    activation: Activation | None,
    *,
    expand: bool,
) -> None:
    """Write ``act(sum over taps of source * w + b)`` into ``target``.

    With ``expand`` each channel of the source is repeated for its outputs; else the outputs
    of each channel of the target are added up.
    """
    dtype = wide_dtype(problem.dtype)
    channels = w.shape[-1]
    multiple = channels // problem.in_channels
    repeat = multiple if expand else 1
    workers = worker_count(16 * problem.flops)
    shares = _cut(target.shape[:-1], channels, workers)
    longest = max(block[-1][1] - block[-1][0] for share in shares for block in share)
    groups = [(c.taps, _repeated(w[..., c.taps, :], longest)) for c in _columns(axes[-1], 1)]
    bias = None if b is None else _repeated(b.astype(dtype, copy=False), longest)
    places, row_taps = _letters(axes)
    sums = f"{places}{row_taps}xz,{row_taps}xz->{places}z"

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            cells = target[tuple(slice(*r) for r in block)]
            line = (block[-1][1] - block[-1][0]) * channels
            shape = (*cells.shape[:-2], line)
            direct = cells.dtype == dtype and multiple == repeat and _is_lines(cells)
            out = _as_lines(cells) if direct else scratch.get("product", shape, dtype)
            for k, (columns, (_taps, weights)) in enumerate(
                zip(_columns(axes[-1], line // channels), groups, strict=True)
            ):
                copy = _copied(source, axes, block, columns, repeat, dtype)
                view = _lines(copy, axes, block, columns, weights.shape[-2])
                into = out if k == 0 else scratch.get("sum", shape, dtype)
                np.einsum(sums, view, weights[..., :line], out=into)
                if k:
                    out += into
            if bias is not None:
                out += bias[:line]
            if activation is not None:
                activation.fn(out, out=out)
            if not direct:
                whole = out.reshape(*cells.shape[:-1], channels)
                if multiple != repeat:
                    whole = whole.reshape(*cells.shape, multiple).sum(axis=-1)
                cells[...] = whole

    run_shares(shares, work)


def _repeated(w: Array, length: int) -> Array:
    """Return ``(..., channels)`` as lines of ``length`` times the channels."""
    whole = np.empty((*w.shape[:-1], length, w.shape[-1]), wide_dtype(w.dtype.name))
    whole[...] = w[..., None, :]
    return whole.reshape(*w.shape[:-1], -1)


def _is_lines(cells: Array) -> bool:
    """Return whether columns and channels lie side by side."""
    return cells.strides[-1] == cells.itemsize and (
        cells.strides[-2] == cells.itemsize * cells.shape[-1] or cells.shape[-2] == 1
    )


def _as_lines(cells: Array) -> Array:
    return as_strided(
        cells,
        (*cells.shape[:-2], cells.shape[-2] * cells.shape[-1]),
        (*cells.strides[:-2], cells.itemsize),
    )


def _window_sums(problem: ConvProblem, dz: Array, x: Array) -> Array:
    """Return the gradient with respect to the weights, ``(*taps, channels)``."""
    dtype = wide_dtype(problem.dtype)
    axes = forward_axes(problem)
    channels = problem.out_channels
    repeat = channels // problem.in_channels
    workers = worker_count(16 * problem.flops)
    shares = _cut(dz.shape[:-1], channels, workers)
    places, row_taps = _letters(axes)
    sums = f"{places}{row_taps}xz,{places}z->{row_taps}xz"
    totals = [np.zeros((*problem.kernel, channels), dtype) for _ in shares]

    def work(k: int, share: tuple[Block, ...]) -> None:
        total = totals[k]
        for block in share:
            cells = dz[tuple(slice(*r) for r in block)]
            length = block[-1][1] - block[-1][0]
            if cells.dtype != dtype or not _is_lines(cells):
                copy = scratch.get("product", cells.shape, dtype)
                np.copyto(copy, cells)
                cells = copy
            lines = _as_lines(cells)
            for columns in _columns(axes[-1], length):
                part = total[..., columns.taps, :]
                copy = _copied(x, axes, block, columns, repeat, dtype)
                view = _lines(copy, axes, block, columns, part.shape[-2])
                found = scratch.get("sum", (*part.shape[:-1], length * channels), dtype)
                np.einsum(sums, view, lines, out=found)
                part += found.reshape(*part.shape[:-1], length, channels).sum(axis=-2)

    run_shares(shares, work)
    for other in totals[1:]:
        totals[0] += other
    return totals[0]
