"""Where windows lie, and how they are gathered: what the NumPy engines share.

Every pass of a convolution reads windows of a source with *stride*, *dilation* and a *start*
that may lie outside the source (padding) or inside it (cropping). The forward and the weight
gradient gather windows of ``x``. The input gradient gathers windows of ``dz``: the cells of
``dx`` whose index has the same remainder by the stride meet the same taps, so each remainder
(a *phase*) is a gather of stride 1 with some of the taps. Nothing is ever scattered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.problem import ConvProblem

__all__ = [
    "Axis",
    "Phase",
    "Scratch",
    "axis_phases",
    "blocks",
    "forward_axes",
    "input_grad_phases",
    "windows",
]

Array = np.ndarray[Any, Any]
#: A rectangle of outputs: (first, last) over the batch and every spatial axis.
Block = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a gather: tap ``t`` of output ``i`` reads ``i*stride + t*dilation + start``.

    Parameters
    ----------
    size : int
        Cells of the source; what lies outside reads as zero.
    count : int
        Outputs.
    taps, stride, dilation, start : int
        As above.
    """

    size: int
    count: int
    taps: int
    stride: int
    dilation: int
    start: int

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of source cells that outputs ``first`` to ``last - 1`` read."""
        low = first * self.stride + self.start
        return low, low + (last - 1 - first) * self.stride + (self.taps - 1) * self.dilation + 1


@dataclass(frozen=True)
class Phase:
    """The cells of ``dx`` with one remainder by the stride, per axis.

    Attributes
    ----------
    axes : tuple of Axis
        How they gather from ``dz``; empty where no tap reaches them.
    cells : tuple of slice
        The spatial indices of ``dx``.
    taps : tuple of slice
        The taps of ``w`` that they meet, in the order of the gather.
    """

    axes: tuple[Axis, ...]
    cells: tuple[slice, ...]
    taps: tuple[slice, ...]


@lru_cache(maxsize=1024)
def forward_axes(problem: ConvProblem) -> tuple[Axis, ...]:
    """Return how the forward pass gathers from ``x``."""
    return tuple(
        Axis(n, count, k, s, d, -before)
        for n, count, k, s, d, (before, _) in zip(
            problem.in_shape,
            problem.out_shape,
            problem.kernel,
            problem.stride,
            problem.dilation,
            problem.padding,
            strict=True,
        )
    )


def axis_phases(
    size: int, out: int, taps: int, stride: int, dilation: int, before: int
) -> list[tuple[Axis | None, slice, slice]]:
    """Return each remainder's gather, cells and taps on one axis.

    ``dx[r]`` sums ``dz[i] * w[t]`` over ``i*stride + t*dilation - before = r``. For
    ``r = remainder + q*stride`` the taps with ``(remainder + before - t*dilation) % stride ==
    0`` take part; they are ``step`` apart, and read ``dz`` at ``q`` plus an offset that falls
    by ``dilation / gcd`` from one to the next. Taken backwards it is a gather of stride 1.
    """
    common = math.gcd(stride, dilation)
    step = stride // common
    found: list[tuple[Axis | None, slice, slice]] = []
    for remainder in range(min(stride, size)):
        count = -(-(size - remainder) // stride)
        cells = slice(remainder, None, stride)
        first = next(
            (
                t
                for t in range(min(step, taps))
                if (remainder + before - t * dilation) % stride == 0
            ),
            None,
        )
        if first is None:
            found.append((None, cells, slice(0, 0)))
            continue
        last = first + (taps - 1 - first) // step * step
        start = (remainder + before - last * dilation) // stride
        axis = Axis(out, count, (last - first) // step + 1, 1, dilation // common, start)
        found.append((axis, cells, slice(last, first - 1 if first else None, -step)))
    return found


@lru_cache(maxsize=1024)
def input_grad_phases(problem: ConvProblem) -> tuple[Phase, ...]:
    """Return the phases that together cover ``dx``."""
    per_axis = [
        axis_phases(n, out, k, s, d, before)
        for n, out, k, s, d, (before, _) in zip(
            problem.in_shape,
            problem.out_shape,
            problem.kernel,
            problem.stride,
            problem.dilation,
            problem.padding,
            strict=True,
        )
    ]
    phases: list[tuple[list[Axis | None], list[slice], list[slice]]] = [([], [], [])]
    for axis in per_axis:
        phases = [
            ([*axes, a], [*cells, c], [*taps, t])
            for axes, cells, taps in phases
            for a, c, t in axis
        ]
    return tuple(
        Phase(
            () if None in axes else tuple(a for a in axes if a is not None),
            tuple(cells),
            tuple(taps),
        )
        for axes, cells, taps in phases
    )


def _split(count: int, parts: int) -> list[tuple[int, int]]:
    """Divide ``range(count)`` into nearly equal ranges."""
    bounds = [count * k // parts for k in range(parts + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


@lru_cache(maxsize=4096)
def blocks(counts: tuple[int, ...], target: int, workers: int) -> tuple[tuple[Block, ...], ...]:
    """Divide outputs into rectangles of about ``target`` cells, and these among workers.

    Parameters
    ----------
    counts : tuple of int
        Outputs over the batch and every spatial axis.
    target : int
        Most cells of a rectangle (at least one is taken).
    workers : int
        So many shares at most; a share is a run of neighbouring rectangles.
    """
    axis = 0
    while axis < len(counts) - 1 and math.prod(counts[axis + 1 :]) > target:
        axis += 1
    # An axis shorter than there are workers is no good to divide among them.
    while (
        axis < len(counts) - 1
        and math.prod(counts[: axis + 1]) < workers
        and math.prod(counts[axis + 1 :]) > 1
    ):
        axis += 1
    outer, inner = counts[:axis], math.prod(counts[axis + 1 :])
    step = min(counts[axis], max(1, target // inner))
    parts = -(-counts[axis] // step)
    rows = math.prod(outer)
    while parts < counts[axis] and (rows * parts) % workers and rows * parts < 8 * workers:
        parts += 1
    ranges = _split(counts[axis], parts)
    whole = tuple((0, n) for n in counts[axis + 1 :])
    found = [
        (*((i, i + 1) for i in index), piece, *whole)
        for index in np.ndindex(*outer)
        for piece in ranges
    ]
    return tuple(
        tuple(found[a:b]) for a, b in _split(len(found), min(workers, len(found))) if b > a
    )


class Scratch(threading.local):
    """Buffers of a thread, kept from call to call while they are small."""

    #: Bytes of the largest buffer that is kept.
    KEEP = 16 * 2**20

    #: Made views that are kept.
    MOST = 32

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}
        self._made: dict[Any, Any] = {}
        self._too_large = False
        #: Whose zeros a shared buffer holds.
        self.holder: object = None

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made of this thread's buffers, made again when these have moved.

        Views take NumPy longer to make than a small block to compute, and the interpreter's
        lock is held meanwhile. Those of a buffer that is too large to be kept are not either.
        """
        found = self._made.get(key)
        if found is None:
            self._too_large = False
            found = make()
            if len(self._made) >= self.MOST:
                self._made.clear()
            if not self._too_large:
                self._made[key] = found
        return found

    def get(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an uninitialised array; the same memory for the same name."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        raw = self._kept.get(name)
        if raw is None or raw.size < size:
            raw = np.empty(size + 64, np.uint8)
            shift = -raw.ctypes.data % 64  # whole cache lines
            raw = raw[shift : shift + size]
            if size <= self.KEEP:
                self._kept[name] = raw
                self._made.clear()  # views of the buffer before
            else:
                self._too_large = True
        return np.ndarray(shape, kind, raw)


def windows(
    source: Array, axes: tuple[Axis, ...], block: Block, scratch: Scratch, groups: int, dtype: Any
) -> Array:
    """Return a view of the windows of a block.

    Parameters
    ----------
    source : ndarray
        ``(batch, *sizes, channels)``, any strides.
    axes : tuple of Axis
        Per spatial axis.
    block : Block
        Which outputs.
    scratch : Scratch
        Where a region that reaches into the padding is copied to, with its zeros.
    groups : int
        Channel groups.
    dtype : dtype
        Of the copy, where one is made.

    Returns
    -------
    ndarray
        ``(groups, images, *outputs, *taps, channels // groups)``, overlapping and not to be
        written to.
    """
    (n0, n1), *ranges = block
    reads = [a.reads(first, last) for a, (first, last) in zip(axes, ranges, strict=True)]
    inside = tuple(
        slice(max(0, low), max(0, min(high, a.size)))
        for a, (low, high) in zip(axes, reads, strict=True)
    )
    region = source[(slice(n0, n1), *inside)]
    if any(low < 0 or high > a.size for a, (low, high) in zip(axes, reads, strict=True)):
        region = _padded(region, axes, reads, scratch, dtype)
    channels = source.shape[-1] // groups
    steps = region.strides
    return as_strided(
        region,
        (
            groups,
            n1 - n0,
            *(last - first for first, last in ranges),
            *(a.taps for a in axes),
            channels,
        ),
        (
            channels * steps[-1],
            steps[0],
            *(a.stride * s for a, s in zip(axes, steps[1:], strict=False)),
            *(a.dilation * s for a, s in zip(axes, steps[1:], strict=False)),
            steps[-1],
        ),
    )


def _padded(
    region: Array,
    axes: tuple[Axis, ...],
    reads: list[tuple[int, int]],
    scratch: Scratch,
    dtype: Any,
) -> Array:
    """Copy a region between the zeros around it."""
    lengths = [high - low for low, high in reads]
    padded = scratch.get("padded", (region.shape[0], *lengths, region.shape[-1]), dtype)
    index: list[slice] = [slice(None)]
    for a, (low, high), length in zip(axes, reads, lengths, strict=True):
        before = min(length, max(0, -low))
        after = max(before, length - max(0, high - a.size))
        if before:
            padded[(*index, slice(0, before))] = 0
        if after < length:
            padded[(*index, slice(after, length))] = 0
        index.append(slice(before, after))
    padded[tuple(index)] = region
    return padded
