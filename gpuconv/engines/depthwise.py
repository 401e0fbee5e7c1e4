"""Lines of columns and channels: how the depthwise engines cut, copy and view their blocks.

A line is a run of neighbouring columns with all their channels, one array in memory. The source
of a block is copied between the zeros of its padding, so that a tap is a shifted line; with a
stride along the columns, the columns of each remainder are copied to a place of their own, where
they lie side by side again. Weights are laid out as often as there are columns in a line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.activations import Activation
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.windows import Axis, Block, blocks, forward_axes
from gpuconv.problem import ConvProblem

__all__ = [
    "BLOCK",
    "LINE",
    "Columns",
    "as_lines",
    "columns_of",
    "copied",
    "correlate",
    "cut",
    "is_lines",
    "lines",
    "repeated",
    "window_sums",
]

Array = np.ndarray[Any, Any]

#: Elements of a block's outputs: few enough to stay in a cache, so many that calls do not matter.
BLOCK = 160 * 1024
#: Elements of a line: enough to forget the loop around it, few enough to repeat the weights for.
LINE = 8 * 1024
#: Letters of the axes before the last, for outputs and for taps.
_OUT, _TAPS = "abc", "pqr"


@dataclass(frozen=True)
class Columns:
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
def columns_of(axis: Axis, outputs: int) -> tuple[Columns, ...]:
    """Return the remainders by the stride that a line of ``outputs`` reads."""
    stride, dilation = axis.stride, axis.dilation
    apart = stride // math.gcd(stride, dilation)  # taps with the same remainder
    found = []
    for first in range(min(apart, axis.taps)):
        phase, offset = first * dilation % stride, first * dilation // stride
        count = (axis.taps - 1 - first) // apart + 1
        step = apart * dilation // stride
        length = offset + (count - 1) * step + outputs
        found.append(Columns(phase, length, offset, step, slice(first, None, apart)))
    return tuple(found)


def cut(counts: tuple[int, ...], channels: int, workers: int) -> tuple[tuple[Block, ...], ...]:
    """Divide outputs into blocks whose lines are not too long, and these among workers."""
    pieces = -(-counts[-1] * channels // LINE)
    if pieces <= 1:
        return blocks(counts, max(1, BLOCK // channels), workers)
    # Lines are cut first, then rows put together.
    length = max(1, -(-counts[-1] // pieces))
    rows = max(1, BLOCK // (length * channels))
    whole = blocks(counts[:-1], rows, workers)
    parts = [(a, min(a + length, counts[-1])) for a in range(0, counts[-1], length)]
    return tuple(tuple((*block, line) for block in share for line in parts) for share in whole)


def _reads(axes: tuple[Axis, ...], block: Block) -> list[tuple[int, int]]:
    """Return the source cells that a block reads, per spatial axis."""
    return [a.reads(first, last) for a, (first, last) in zip(axes, block[1:], strict=True)]


def copied(
    source: Array, axes: tuple[Axis, ...], block: Block, columns: Columns, repeat: int, dtype: Any
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


def lines(copy: Array, axes: tuple[Axis, ...], block: Block, columns: Columns, taps: int) -> Array:
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


def repeated(w: Array, length: int) -> Array:
    """Return ``(..., channels)`` as lines of ``length`` times the channels."""
    whole = np.empty((*w.shape[:-1], length, w.shape[-1]), wide_dtype(w.dtype.name))
    whole[...] = w[..., None, :]
    return whole.reshape(*w.shape[:-1], -1)


def is_lines(cells: Array) -> bool:
    """Return whether columns and channels lie side by side."""
    return cells.strides[-1] == cells.itemsize and (
        cells.strides[-2] == cells.itemsize * cells.shape[-1] or cells.shape[-2] == 1
    )


def as_lines(cells: Array) -> Array:
    return as_strided(
        cells,
        (*cells.shape[:-2], cells.shape[-2] * cells.shape[-1]),
        (*cells.strides[:-2], cells.itemsize),
    )


def _letters(axes: tuple[Axis, ...]) -> tuple[str, str]:
    """Return einsum's letters for images and rows, and for the row taps."""
    rows = len(axes) - 1
    return "n" + _OUT[:rows], _TAPS[:rows]


def correlate(
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
    shares = cut(target.shape[:-1], channels, workers)
    longest = max(block[-1][1] - block[-1][0] for share in shares for block in share)
    groups = [(c.taps, repeated(w[..., c.taps, :], longest)) for c in columns_of(axes[-1], 1)]
    bias = None if b is None else repeated(b.astype(dtype, copy=False), longest)
    places, row_taps = _letters(axes)
    sums = f"{places}{row_taps}xz,{row_taps}xz->{places}z"

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            cells = target[tuple(slice(*r) for r in block)]
            line = (block[-1][1] - block[-1][0]) * channels
            shape = (*cells.shape[:-2], line)
            direct = cells.dtype == dtype and multiple == repeat and is_lines(cells)
            out = as_lines(cells) if direct else scratch.get("product", shape, dtype)
            for k, (columns, (_taps, weights)) in enumerate(
                zip(columns_of(axes[-1], line // channels), groups, strict=True)
            ):
                copy = copied(source, axes, block, columns, repeat, dtype)
                view = lines(copy, axes, block, columns, weights.shape[-2])
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


def window_sums(problem: ConvProblem, dz: Array, x: Array) -> Array:
    """Return the gradient with respect to the weights, ``(*taps, channels)``."""
    dtype = wide_dtype(problem.dtype)
    axes = forward_axes(problem)
    channels = problem.out_channels
    repeat = channels // problem.in_channels
    workers = worker_count(16 * problem.flops)
    shares = cut(dz.shape[:-1], channels, workers)
    places, row_taps = _letters(axes)
    sums = f"{places}{row_taps}xz,{places}z->{row_taps}xz"
    totals = [np.zeros((*problem.kernel, channels), dtype) for _ in shares]

    def work(k: int, share: tuple[Block, ...]) -> None:
        total = totals[k]
        for block in share:
            cells = dz[tuple(slice(*r) for r in block)]
            length = block[-1][1] - block[-1][0]
            if cells.dtype != dtype or not is_lines(cells):
                copy = scratch.get("product", cells.shape, dtype)
                np.copyto(copy, cells)
                cells = copy
            gradient = as_lines(cells)
            for columns in columns_of(axes[-1], length):
                part = total[..., columns.taps, :]
                copy = copied(x, axes, block, columns, repeat, dtype)
                view = lines(copy, axes, block, columns, part.shape[-2])
                found = scratch.get("sum", (*part.shape[:-1], length * channels), dtype)
                np.einsum(sums, view, gradient, out=found)
                part += found.reshape(*part.shape[:-1], length, channels).sum(axis=-2)

    run_shares(shares, work)
    for other in totals[1:]:
        totals[0] += other
    return totals[0]
