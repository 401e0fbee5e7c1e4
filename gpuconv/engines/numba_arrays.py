"""What the compiled engines share: Numba itself, blocks of channels, buffers, dense copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from gpuconv import settings, threads
from gpuconv.activations import Activation
from gpuconv.compiled import numba_missing
from gpuconv.engines.im2col import run_shares
from gpuconv.engines.windows import Axis, Block, Scratch, blocks
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = [
    "blocks_at",
    "buffers",
    "channel_blocks",
    "copied_bytes",
    "finish",
    "in_parts",
    "numba_missing",
    "swapped",
    "team_size",
    "two_axes",
    "up",
    "vector_bytes",
]

Array = np.ndarray[Any, Any]

#: Elements after which an activation is applied, while they are in the cache.
FINISH = 64 * 1024
#: Operations for which one worker needs about as long as another needs to notice that there are some.
TEAM = 400_000


def up(value: int, multiple: int) -> int:
    return -(-value // multiple)


# Numba is imported when the engine computes, not when it is asked whether it could.


@cache
def vector_bytes() -> int:
    """Return the bytes of a vector register."""
    from gpuconv.engines.numba_tile import BYTES

    return BYTES


@cache
def channel_blocks(channels: int, width: int) -> Array:
    """Return vectors, first vector and numbers of the last one, of every block of channels."""
    from gpuconv.engines.numba_tile import MOST_VECTORS

    vectors = up(channels, width)
    blocks = up(vectors, MOST_VECTORS)
    bounds = [vectors * k // blocks for k in range(blocks + 1)]
    rest = channels - (vectors - 1) * width
    return np.array(
        [
            (b - a, a, rest if b == vectors else width)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ],
        np.int64,
    )


@cache
def blocks_at(channels: int, width: int) -> tuple[int, int, int]:
    """Return the address of :func:`channel_blocks`, the number of them, and of all vectors."""
    table = channel_blocks(channels, width)
    return table.ctypes.data, len(table), up(channels, width)


def team_size(flops: float) -> int:
    """Return how many workers a compiled pass is worth: they need not be woken."""
    return 1 if flops < TEAM else settings.get_num_threads()


class _Buffers(Scratch):
    """Buffers that are kept up to a size at which making them anew costs no more than their use."""

    KEEP = 96 * 2**20


buffers = _Buffers()


def _usable(a: Array) -> bool:
    return a.shape[-1] == 1 or a.strides[-1] == a.itemsize


def _at_once(batch: int, example: int) -> int:
    """Return how many examples may be copied at a time."""
    return max(1, min(batch, settings.get_workspace_limit() // 2 // max(1, example)))


def in_parts(inputs: tuple[Array, ...], output: Array | None, work: Callable[..., None]) -> None:
    """Call ``work`` with arrays whose channels are dense, copies where need be, by parts."""
    arrays = (*inputs, *(() if output is None else (output,)))
    copied = [a for a in arrays if not _usable(a)]
    batch = len(inputs[0])
    example = sum(math.prod(a.shape[1:]) * a.itemsize for a in copied)
    count = _at_once(batch, example) if copied else batch
    for start in range(0, batch, count):
        some = slice(start, min(start + count, batch))
        dense = [a[some] if _usable(a) else np.ascontiguousarray(a[some]) for a in inputs]
        if output is None:
            work(*dense)
        elif _usable(output):
            work(*dense, output[some])
        else:
            result = np.empty(output[some].shape, output.dtype)
            work(*dense, result)
            output[some] = result


def finish(target: Array, activation: Activation, workers: int) -> None:
    """Apply an activation in place, in blocks of a cache's size."""

    def work(_: int, share: tuple[Block, ...]) -> None:
        for block in share:
            cells = target[tuple(slice(a, b) for a, b in block)]
            activation.fn(cells, out=cells)

    run_shares(blocks(target.shape[:-1], max(1, FINISH // target.shape[-1]), workers), work)


def two_axes(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Return the axes with rows of one cell before a single one."""
    return axes if len(axes) == 2 else (Axis(1, 1, 1, 1, 1, 0), *axes)


def copied_bytes(problem: ConvProblem) -> int:
    """Return the bytes of the dense copies that are made of arrays channels first."""
    if problem.layout != CHANNELS_FIRST:
        return 0
    size = np.dtype(problem.dtype).itemsize
    example = size * (math.prod(problem.x_shape[1:]) + math.prod(problem.y_shape[1:]))
    return example * _at_once(problem.batch, example)


def swapped(w: Array, ndim: int, workers: int) -> Array:
    """Return weights ``(*taps, in, out)`` as a dense ``(*taps, out, in)``, a buffer of the thread."""
    from gpuconv.engines.numba_loops import swap

    taps = math.prod(w.shape[:ndim])
    flat = w.reshape(taps, *w.shape[ndim:])
    out = buffers.get("swapped", (taps, flat.shape[2], flat.shape[1]), w.dtype)
    run_shares(
        tuple(threads.shares(taps, workers)),
        lambda _, share: swap()(flat[share.start : share.stop], out[share.start : share.stop]),
    )
    return out.reshape(*w.shape[:ndim], *out.shape[1:])
