"""Tables for the compiled windows: which taps meet which cells, worked out once a problem.

The compiled loops of :mod:`gpuconv.engines.numba_window_loops` follow tables and ask no questions: an
output in the padding's reach has fewer taps in its line, and the cells of ``dx`` of one remainder
by the stride have theirs. Everything is counted in cells and taps; bytes come in with the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.engines.windows import Axis, axis_phases, forward_axes
from gpuconv.problem import ConvProblem

__all__ = ["Gather", "Sums", "blocks_of", "forward_gather", "input_gather", "plane", "weight_sums"]

Array = np.ndarray[Any, Any]

#: How the inputs of a strip lie: each output has its own; a step from tap to tap is one from output
#: to output, so that most are shared; the same, and some lie outside, where there are zeros; outputs
#: are a stride apart, so that the next strip reads several new rows and columns for each of them.
APART, DENSE, EDGE, STRIDED = 0, 1, 2, 3
#: Outputs of a strip.
WIDE, NARROW = 8, 4


@dataclass(frozen=True)
class Gather:
    """How outputs gather; see :func:`gpuconv.engines.numba_window_loops.forward`.

    Attributes
    ----------
    steps : tuple of int
        Cells and taps from tap to tap and from output to output.
    rows, columns : ndarray
        A line for each row of outputs, and for each run of columns.
    """

    steps: tuple[int, ...]
    rows: Array
    columns: Array


@dataclass(frozen=True)
class Sums:
    """How the weights' gradient sums up; see :func:`gpuconv.engines.numba_window_loops.backward`."""

    steps: tuple[int, ...]
    rows: Array
    columns: Array


def plane(problem: ConvProblem) -> ConvProblem:
    """Return the problem with two spatial axes."""
    if problem.ndim == 2:
        return problem
    return replace(
        problem,
        in_shape=(1, *problem.in_shape),
        kernel=(1, *problem.kernel),
        stride=(1, *problem.stride),
        padding=((0, 0), *problem.padding),
        dilation=(1, *problem.dilation),
    )


def _taps_of(axis: Axis, output: int) -> tuple[int, int]:
    """Return the first tap that reads inside the source, and the number of them."""
    at = output * axis.stride + axis.start
    first = max(0, -(at // axis.dilation))
    last = min(axis.taps, (axis.size - 1 - at) // axis.dilation + 1)
    return first, max(0, last - first)


def _lines(axis: Axis) -> list[tuple[int, int, int, int]]:
    """Return first cell, first tap and number of taps of each output, and its number."""
    found = []
    for output in range(axis.count):
        first, taps = _taps_of(axis, output)
        found.append(
            (output * axis.stride + first * axis.dilation + axis.start, first, taps, output)
        )
    return found


def _runs(axis: Axis, take: tuple[int, ...], padded: bool) -> list[tuple[int, ...]]:
    """Return runs of outputs with the same taps: their first line, how to take it, the number.

    With ``padded`` the source has zeros on both sides, and all outputs are one run.
    """
    whole = [(axis.start, 0, axis.taps, 0)]
    dense = axis.stride == axis.dilation
    found: list[tuple[int, ...]] = []
    for line in whole if padded else _lines(axis):
        if found and found[-1][1:3] == line[1:3]:
            found[-1] = (*found[-1][:6], found[-1][6] + 1)
            continue
        at_once = next(t for t in take if line[2] % t == 0) if dense and line[2] else 1
        way = DENSE if dense and 1 in take and len(take) > 1 else APART
        found.append((*line, at_once, way, axis.count if padded else 1))
    return found


def _table(lines: list[tuple[int, ...]], width: int) -> Array:
    return np.array(lines, np.int64).reshape(-1, width)


@lru_cache(maxsize=1024)
def forward_gather(problem: ConvProblem, take: tuple[int, ...]) -> Gather:
    """Return how ``y`` gathers from ``x``.

    Parameters
    ----------
    problem : ConvProblem
        Of two spatial axes.
    take : tuple of int
        Numbers of taps that are taken at a time, falling to 1.
    """
    rows, columns = forward_axes(problem)
    steps = (rows.dilation, columns.dilation, columns.stride, 1, 1, 1, columns.size)
    # Where strips may read zeros beside the rows, no output needs a line of its own.
    edges = columns.stride == columns.dilation == 1 < columns.taps and columns.taps in take
    runs = _runs(columns, take, padded=edges)
    if edges:
        runs = [(*run[:5], EDGE, run[6]) for run in runs]
    if edges and columns.count < NARROW:
        runs = _runs(columns, take, padded=False)
    if columns.stride > columns.dilation and len(take) > 1:
        runs = [(*run[:5], STRIDED, run[6]) for run in runs]
    return Gather(steps, _table(list(_lines(rows)), 4), _table(runs, 7))


def _phases(problem: ConvProblem, k: int) -> list[tuple[Axis | None, slice, slice]]:
    """Return what the cells of ``dx`` of each remainder by the stride gather along axis ``k``."""
    return axis_phases(
        problem.in_shape[k],
        problem.out_shape[k],
        problem.kernel[k],
        problem.stride[k],
        problem.dilation[k],
        problem.padding[k][0],
    )


def _apart(problem: ConvProblem, k: int) -> tuple[int, int]:
    """Return the cells of ``dz`` and the taps from one tap of a phase to the next."""
    common = int(np.gcd(problem.stride[k], problem.dilation[k]))
    return problem.dilation[k] // common, problem.stride[k] // common


@lru_cache(maxsize=1024)
def input_gather(
    problem: ConvProblem, take: tuple[int, ...], padded: bool
) -> tuple[Gather, tuple[int, int]]:
    """Return how ``dx`` gathers from ``dz``, and the zeros that ``dz`` has before and after.

    Parameters
    ----------
    problem, take
        As for :func:`forward_gather`.
    padded : bool
        Whether rows of ``dz`` lie between zeros; otherwise columns at the border have fewer taps.
    """
    (p_cells, p_taps), (q_cells, q_taps) = _apart(problem, 0), _apart(problem, 1)
    rows: dict[int, tuple[int, ...]] = {}
    for axis, cells, taps in _phases(problem, 0):
        for k, row in enumerate(range(problem.in_shape[0])[cells]):
            rows[row] = (0, 0, 0, row)
            if axis is not None:
                first, count = _taps_of(axis, k)
                cell = k * axis.stride + first * axis.dilation + axis.start
                rows[row] = (cell, taps.start - first * p_taps, count, row)
    columns: list[tuple[int, ...]] = []
    before, after = 0, 0
    for axis, cells, taps in _phases(problem, 1):
        if axis is None:
            count = len(range(problem.in_shape[1])[cells])
            columns.append((0, 0, 0, cells.start, 1, 0, count))
            continue
        before = max(before, -axis.start)
        after = max(after, axis.reads(0, axis.count)[1] - axis.size)
        for cell, first, count, output, *rest in _runs(axis, take, padded):
            place = cells.start + output * problem.stride[1]
            columns.append((cell, taps.start - first * q_taps, count, place, *rest))
    steps = (p_cells, q_cells, 1, problem.stride[1], -p_taps, -q_taps, problem.out_shape[1])
    table = _table([rows[k] for k in range(problem.in_shape[0])], 4)
    return Gather(steps, table, _table(columns, 7)), (before, after)


@lru_cache(maxsize=1024)
def weight_sums(problem: ConvProblem, take: tuple[int, ...], padded: bool) -> Sums:
    """Return how the weights' gradient sums up products of ``x`` with neighbouring ``dz``.

    With ``padded`` rows of ``dz`` lie between zeros, and the taps of a row share their places;
    otherwise each tap has its own, and meets nothing but what the definition says.
    """
    (_, p_taps), (_, q_taps) = _apart(problem, 0), _apart(problem, 1)
    rows: list[tuple[int, ...]] = []
    for axis, cells, taps in _phases(problem, 0):
        if axis is not None:
            for t in range(axis.taps):
                move = axis.start + t * axis.dilation
                begin, end = max(0, -move), min(axis.count, axis.size - move)
                if begin < end:
                    first = cells.start + begin * problem.stride[0]
                    rows.append((first, begin + move, end - begin, taps.start - t * p_taps))
    columns: list[tuple[int, ...]] = []
    for axis, cells, taps in _phases(problem, 1):
        t = 0
        while axis is not None and t < axis.taps:
            move = axis.start + t * axis.dilation
            left, begin, end, at_once = axis.taps - t, 0, axis.count, 1
            if padded and axis.dilation == 1:
                at_once = next((n for n in take if left % n == 0 and n > 1), 0) or next(
                    n for n in take if n <= left
                )
            if not padded:
                begin, end = max(0, -move), min(axis.count, axis.size - move)
            tap = taps.start - t * q_taps
            if begin < end:
                columns.append((cells.start, move, begin, end, tap, at_once))
            t += at_once
    steps = (problem.stride[0], problem.stride[1], -q_taps)
    return Sums(steps, _table(rows, 4), _table(columns, 6))


@lru_cache(maxsize=1024)
def blocks_of(problem: ConvProblem, rows: int, need_x: bool) -> Array:
    """Return blocks of an image: rows of ``dz``, of ``dx``, and of ``dz`` that these need.

    Parameters
    ----------
    problem : ConvProblem
        Of two spatial axes.
    rows : int
        Rows of ``dz`` in a block.
    need_x : bool
        Whether ``dx`` is wanted.
    """
    gather, _ = input_gather(problem, (1,), True)
    out, size, stride = problem.out_shape[0], problem.in_shape[0], problem.stride[0]
    step = gather.steps[0]
    met = [(r[0], r[0] + (r[2] - 1) * step + 1) if r[2] else None for r in gather.rows.tolist()]
    count = -(-out // rows)
    ends = [out * k // count for k in range(count + 1)]
    found: list[tuple[int, ...]] = []
    for k, (low, high) in enumerate(zip(ends, ends[1:], strict=False)):
        first = 0 if k == 0 else min(size, low * stride)
        last = size if k == count - 1 else min(size, high * stride)
        reads = [r for r in met[first:last] if need_x and r is not None]
        least = min([low, *(a for a, _ in reads)])
        most = max([high, *(b for _, b in reads)])
        found.append((low, high, first, last, least, most))
    return _table(found, 6)
