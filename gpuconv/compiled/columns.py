"""Batch normalisation's sums and what is made of them, compiled; see :mod:`gpuconv.normalization`.

Arrays are lines of several rows each, ``(lines, width)``, and what belongs to a column is repeated
to the width. Sums are taken over a few lines in the arrays' dtype and added up in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuconv import compiled, memory

if TYPE_CHECKING:
    from gpuconv.compiled.column_loops import Jobs

__all__ = ["gradient", "gradient_sums", "moments", "normalized", "takes"]

Array = Any
#: Elements of a chunk.
CHUNK = 256 * 1024
#: Elements that a line has at least.
WIDTH = 1024


def _jobs() -> Jobs:
    from gpuconv.compiled.column_loops import jobs

    return jobs()


def takes(*arrays: Array) -> bool:
    """Return whether the loops take the arrays, of one size."""
    return arrays[0].size >= compiled.SMALL and compiled.available() and compiled.plain(*arrays)


class _Lines:
    """Matrices as lines of several rows, and the rest of the rows."""

    def __init__(self, rows: int, columns: int) -> None:
        fold = max(1, WIDTH // columns)
        self.columns, self.fold = columns, fold
        self.lines, self.rest = divmod(rows, fold)
        self.width = fold * columns
        self.step = max(1, CHUNK // self.width)
        self.parallel = rows * columns >= compiled.PARALLEL

    def tiled(self, values: Array | None, dtype: Any) -> Array:
        """Return a column's values repeated to the width; zeros for None."""
        if values is None:
            return np.zeros(self.width, dtype)
        return np.tile(np.asarray(values).astype(dtype), self.fold)

    def run(self, job: int, arrays: Sequence[Array], *arguments: Any) -> None:
        """Run a job on arrays of lines, and what else it takes."""
        flats = [a.reshape(-1) for a in arrays]
        shares = -(-self.lines // self.step) + bool(self.rest)
        sizes = self.lines, self.width, self.rest * self.columns, self.step
        compiled.run(job, (*sizes, *flats, *arguments), shares, self.parallel)

    def add(self, job: int, arrays: Sequence[Array], shift: Array) -> Array:
        """Return two sums of every column, ``(2, columns)``; shares are added in their order."""
        shares = -(-self.lines // self.step) + bool(self.rest)
        totals = np.zeros((shares, 2, self.width))
        self.run(job, arrays, shift, totals)
        return totals.sum(axis=0).reshape(2, self.fold, self.columns).sum(axis=1)


def moments(x: Array, shift: Array | None) -> Array:
    """Return the sums of ``x - shift`` and of its squares, of every column."""
    lines = _Lines(*x.shape)
    return lines.add(_jobs().moments, [x], lines.tiled(shift, x.dtype))


def gradient_sums(dy: Array, x: Array, shift: Array | None) -> Array:
    """Return the sums of ``dy * (x - shift)`` and of ``dy``, of every column."""
    lines = _Lines(*x.shape)
    return lines.add(_jobs().gradient_sums, [dy, x], lines.tiled(shift, x.dtype))


def normalized(x: Array, shift: Array | None, slope: Array, level: Array, rectify: bool) -> Array:
    """Return ``(x - shift) * slope + level``, at least zero if ``rectify``."""
    lines, out = _Lines(*x.shape), memory.empty_as(x)
    values = [lines.tiled(v, x.dtype) for v in (shift, slope, level)]
    lines.run(_jobs().normalized, [x, out], *values, int(rectify))
    return out


def gradient(
    dy: Array, x: Array, shift: Array | None, bend: Array, level: Array, slope: Array
) -> Array:
    """Return ``((x - shift) * bend + dy + level) * slope``."""
    lines, dx = _Lines(*x.shape), memory.empty_as(x)
    values = [lines.tiled(v, x.dtype) for v in (shift, bend, level, slope)]
    lines.run(_jobs().gradient, [dy, x, dx], *values)
    return dx
