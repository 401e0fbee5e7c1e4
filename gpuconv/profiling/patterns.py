"""What the ranges within one outermost range are: worked out once for all steps that are alike.

A step of training is the same ranges in the same order each time; only the times differ. So the
recorder keeps entries and times apart, and what follows from the entries (who is within whom,
labels, operations, bytes) is a :class:`Pattern`, made when they are first seen.

Entries are one flat list, as a tuple for each range would have to be made in the step: for a
layer's pass ``owner, pass_, shape of the input``, for a convolution's ``problem, pass_, engine,
other engine``, and None for the end of what began last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv.problem import DTYPES, ConvProblem
from gpuconv.profiling import ranges
from gpuconv.profiling.ranges import STEP

__all__ = ["Pattern", "Range", "Seconds", "layer_work"]

Seconds = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass
class Range:
    """One range of a pattern.

    Attributes
    ----------
    name, pass_, engine, dtype : str
        As in :class:`~gpuconv.profiling.table.Row`.
    problem : ConvProblem or None
        The convolution.
    first, last : int
        Which of the pattern's marks are its begin and end.
    within : int
        The range around it, as its place in the list; -1 if there is none.
    depth : int
        How many ranges are around it.
    call : bool
        Whether it is a call of its own: not where the range around it has the same row.
    flops, bytes : int
        By the definition; what inner ranges count is not in them.
    """

    name: str
    pass_: str
    engine: str
    dtype: str
    problem: ConvProblem | None
    first: int
    last: int = -1
    within: int = -1
    depth: int = 0
    call: bool = True
    flops: int = 0
    bytes: int = 0


class Pattern:
    """The ranges within one outermost range, and what all that were like this took.

    Parameters
    ----------
    entries : list
        From the begin of the outermost range to its end.

    Attributes
    ----------
    ranges : list of Range
        In the order of their begins.
    step : bool
        Whether this is a step of training.
    count : int
        How many such were added.
    sums : ndarray of float64
        For each mark the seconds after the first, added up.
    """

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries
        self.ranges: list[Range] = []
        self._stack: list[int] = []
        self._parse()
        self.step = self.ranges[0].name == STEP
        self.count = 0
        self.sums: Seconds = np.zeros(2 * len(self.ranges))

    def add(self, seconds: Seconds) -> None:
        """Add some that were like this, a row each: when its marks were, after its first."""
        self.count += len(seconds)
        self.sums += seconds.sum(axis=0)

    def own(self) -> Iterator[tuple[Range, float]]:
        """Yield the ranges, and the seconds of each that are in no inner one's."""
        taken = [float(self.sums[r.last] - self.sums[r.first]) for r in self.ranges]
        rest = list(taken)
        for found, seconds in zip(self.ranges, taken, strict=True):
            if found.within >= 0:
                rest[found.within] -= seconds
        yield from zip(self.ranges, rest, strict=True)

    def _parse(self) -> None:
        """Find who is within whom, and what each computes."""
        entries = iter(self.entries)
        divided: set[int] = set()  # ranges within which convolutions have their own
        for mark, first in enumerate(entries):
            if first is None:
                self.ranges[self._stack.pop()].last = mark
            elif isinstance(first, ConvProblem):
                pass_, engine, other = next(entries), next(entries), next(entries)
                divided.update(self._stack[-1:])
                around = self.ranges[self._stack[-1]] if self._stack else None
                name = str(first) if around is None or around.name == STEP else around.name
                engines = ranges.engine_names(engine, other)
                self._open(Range(name, pass_, engines, first.dtype, first, mark))
            else:
                pass_, shape = next(entries), next(entries)
                dtype = getattr(first, "dtype", None) or ""
                found = Range(ranges.label(first), pass_, "", dtype, None, mark)
                if shape is not None:
                    found.flops, found.bytes = layer_work(first, pass_, shape)
                self._open(found)
        for k, found in enumerate(self.ranges):
            if k in divided:  # counted inside
                found.flops = found.bytes = 0
            elif found.problem is not None:
                passes = 2 if found.pass_ == "backward" else 1
                found.flops = passes * found.problem.flops
                found.bytes = passes * found.problem.bytes

    def _open(self, found: Range) -> None:
        """Put a range into those that have begun and not ended."""
        if self._stack:
            found.within, found.depth = self._stack[-1], len(self._stack)
            around = self.ranges[found.within]
            found.call = (around.name, around.pass_) != (found.name, found.pass_)
        self._stack.append(len(self.ranges))
        self.ranges.append(found)


def layer_work(layer: Any, pass_: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return FLOPs and bytes of a layer's pass over an input, if the layer has no convolutions.

    Counted as for a convolution: what must be read and written, once. A layer without weights
    only moves its data. The gradients of a dense layer are two products of the forward's size.
    """
    if pass_ not in ("forward", "backward"):
        return 0, 0
    try:
        out = math.prod(layer.output_shape(shape))
        itemsize = DTYPES[layer.dtype]
        weights = [p for p in layer.parameters.values() if p.ndim == 2 and min(p.shape) > 1]
    except (ValueError, AttributeError, TypeError, KeyError):
        return 0, 0
    size = math.prod(shape)
    if len(shape) == 2 and len(weights) == 1:
        w = weights[0]
        products = 1 if pass_ == "forward" else 2
        return products * 2 * out * w.shape[0], products * itemsize * (size + w.size + out)
    arrays = 2 if pass_ == "forward" else 4  # the backward looks at input and output again
    return 0, itemsize * (size + out) * arrays // 2
