"""How the CUDA engines hand arrays to kernels: views in the order of memory, copies, parts.

Kernels take dense tensors, either channels last (NHWC, HWIO) or channels first (NCHW, OIHW).
Engines see every array channels last; :func:`stored_image` and :func:`stored_weights` turn the views back
into the order of the caller's memory, so that a dense array of either layout goes to the
kernel as it is. What is not dense is copied, in parts of the batch that fit the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv.cuda.prepared import NULL
from gpuconv.engines.base import Engine
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = [
    "NULL",
    "WIDE_FROM",
    "by_axis",
    "copied",
    "dense_strides",
    "element_strides",
    "examples_at_once",
    "needs_wide_index",
    "parts",
    "put",
    "reach",
    "sizes",
    "stored_image",
    "stored_weights",
    "three",
    "zero",
]

Array = Any

#: Offsets at or beyond this are held in 64 bits.
WIDE_FROM = 2**31


def by_axis(letter: str, values: tuple[int, ...]) -> dict[str, str]:
    """Return the constants of an option for depth, rows and columns."""
    return {letter + axis: str(v) for axis, v in zip("DHW", three(values, 1), strict=True)}


def three(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Return a value for depth, rows and columns; ``fill`` for axes that are not there."""
    return (*(fill,) * (3 - len(values)), *values)


def sizes(problem: ConvProblem) -> tuple[np.int32, ...]:
    """Return the kernels' arguments N, D, H, W, C, OD, OH, OW, O, front, top, left, groups."""
    values = (
        problem.batch,
        *three(problem.in_shape, 1),
        problem.in_channels,
        *three(problem.out_shape, 1),
        problem.out_channels,
        *three(tuple(before for before, _ in problem.padding), 0),
        problem.groups,
    )
    return tuple(map(np.int32, values))


def needs_wide_index(problem: ConvProblem, beyond: int = 0) -> bool:
    """Return whether an offset into a tensor, or ``beyond`` past its end, exceeds 32 bits."""
    largest = max(math.prod(s) for s in (problem.x_shape, problem.w_shape, problem.y_shape))
    return largest + beyond >= WIDE_FROM


def copied(array: Array | None) -> int:
    """Return the bytes of the dense copy of an example; 0 where none is made."""
    if array is None or array.flags.c_contiguous:
        return 0
    return int(math.prod(array.shape[1:]) * array.dtype.itemsize)


def examples_at_once(problem: ConvProblem, example: int) -> int:
    """Return how many examples fit the workspace at ``example`` bytes each; one at least."""
    if example == 0:
        return problem.batch
    return max(1, min(problem.batch, Engine.workspace_limit() // example))


def parts(problem: ConvProblem, example: int) -> Iterator[tuple[ConvProblem, slice]]:
    """Yield parts of the batch, each within the workspace, and where they are."""
    count = examples_at_once(problem, example)
    for start in range(0, problem.batch, count):
        size = min(count, problem.batch - start)
        part = problem if size == problem.batch else replace(problem, batch=size)
        yield part, slice(start, start + size)


def stored_image(problem: ConvProblem, view: Array) -> Array:
    """Return a channels-last view in the order of the caller's memory."""
    if problem.layout != CHANNELS_FIRST:
        return view
    return view.transpose(0, problem.ndim + 1, *range(1, problem.ndim + 1))


def stored_weights(problem: ConvProblem, view: Array) -> Array:
    """Return weights seen channels last in the order of the caller's memory."""
    if problem.layout != CHANNELS_FIRST:
        return view
    return view.transpose(problem.ndim + 1, problem.ndim, *range(problem.ndim))


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a dense array, in elements."""
    strides = [1]
    for n in shape[:0:-1]:
        strides.append(strides[-1] * n)
    return tuple(reversed(strides))


def element_strides(array: Array) -> tuple[int, ...]:
    """Return the distances of neighbours along each axis, in elements; 0 for axes of one."""
    size = array.dtype.itemsize
    return tuple(s // size if n > 1 else 0 for n, s in zip(array.shape, array.strides, strict=True))


def reach(array: Array) -> int:
    """Return how far an element of the array is from its first, in elements."""
    return sum((n - 1) * abs(s) for n, s in zip(array.shape, element_strides(array), strict=True))


def put(target: Array, source: Array) -> None:
    """Copy an array into another of any strides and dtype."""
    target[...] = source


def zero(target: Array) -> None:
    """Fill an array with zeros."""
    target.fill(0)
