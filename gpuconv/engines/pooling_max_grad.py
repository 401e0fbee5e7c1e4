"""The gradient of a maximum over windows, an axis at a time.

The maximum over a window is that of its rows' maxima. So it is kept, a byte each, which cell of
each row of a window is the first that has the row's maximum, and which row the first that has
the window's; together the first in row-major order. The gradient is handed down the same way,
from outputs to rows' maxima and from these to cells, a masked addition a tap. Nothing is
scattered, so results repeat bit for bit, on a device too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.device import namespace
from gpuconv.engines.im2col import wide_dtype
from gpuconv.engines.pooling import Windows, at_axis, by_blocks, new, reduce_axis

__all__ = ["max_grad_by_codes", "max_grad_by_values", "pool_max"]

Array = Any
#: For each spatial axis the numbers of the taps that won: ``codes[a]`` has the input's size on
#: the axes before ``a`` and the output's from there on.
Codes = list[Array]


def pool_max(x: Array, y: Array, w: Windows, padded: str) -> Codes:
    """Write the maximum of every window into ``y``; return what its gradient needs.

    Parameters
    ----------
    x, y, w, padded
        As for :func:`gpuconv.engines.pooling.pool`.
    """
    xp = namespace(x)
    axes = range(len(w.kernel))
    codes = []
    for axis in axes:
        shape = list(y.shape)
        shape[w.first : w.first + axis] = w.size[:axis]
        codes.append(xp.empty(tuple(shape), _code_dtype(w.kernel[axis])))

    def work(images: slice, rows: tuple[int, int]) -> None:
        source, part, start, stop = _rows_read(xp, x[images], w, rows)
        target = y[(images, *at_axis(w.first, slice(*rows))[1:])]
        direct = target.dtype == source.dtype
        top = target if direct else new(xp, "pool top", target.shape, source.dtype)
        # Each row's codes are written by one block: the next one starts at its first window.
        end = rows[1] * w.stride[0] - w.before[0] if rows[1] < w.out[0] else stop
        own = slice(start, max(start, min(end, stop)))
        held = [
            new(xp, f"pool code{a}", c.shape, c.dtype) if a else c
            for a, c in enumerate(_block_codes(codes, images, slice(*rows), slice(start, stop), w))
        ]
        _climb(xp, source, top, part, padded, held)
        for a in axes[1:]:
            mine = at_axis(w.first, slice(0, own.stop - own.start))
            codes[a][(images, *at_axis(w.first, own)[1:])] = held[a][mine]
        if not direct:
            target[...] = top

    _blocks(xp, x, w, w.out[0], work)
    return codes


def max_grad_by_codes(dy: Array, codes: Codes, dx: Array, w: Windows) -> None:
    """Write the gradient of a maximum into ``dx``.

    Parameters
    ----------
    dy, dx : ndarray
        Gradients with respect to the result and to the input.
    codes : list of ndarray
        What :func:`pool_max` returned.
    w : Windows
        As there.
    """

    def find(xp: Any, images: slice, outputs: slice, cells: slice, part: Windows) -> Codes:
        return _block_codes(codes, images, outputs, cells, part)

    _grad(dy, dx, w, find)


def max_grad_by_values(dy: Array, x: Array, dx: Array, w: Windows, padded: str = "outside") -> None:
    """Write the gradient of a maximum into ``dx``; the winners are found again.

    Parameters
    ----------
    dy, x, dx, w, padded
        As for :func:`gpuconv.engines.pooling.pool`, with the gradients.
    """

    def find(xp: Any, images: slice, outputs: slice, cells: slice, part: Windows) -> Codes:
        source = x[(images, *at_axis(w.first, cells)[1:])]
        if source.dtype.itemsize == 2:
            wide = new(xp, "pool wide", source.shape, "float32")
            wide[...] = source
            source = wide
        found: Codes = []
        shape = list(source.shape)
        for axis in reversed(range(len(w.kernel))):
            shape[w.first + axis] = part.out[axis]
            found.insert(0, new(xp, f"pool code{axis}", tuple(shape), _code_dtype(w.kernel[axis])))
        top = new(xp, "pool top", tuple(shape), source.dtype)
        _climb(xp, source, top, part, padded, found)
        return found

    _grad(dy, dx, w, find)


def _code_dtype(kernel: int) -> str:
    return "uint8" if kernel <= 256 else "uint32"


def _block_codes(codes: Codes, images: slice, outputs: slice, cells: slice, w: Windows) -> Codes:
    """Return the codes of a block's outputs, and of the rows of the input that they read."""
    first = codes[0][(images, *at_axis(w.first, outputs)[1:])]
    return [first, *(c[(images, *at_axis(w.first, cells)[1:])] for c in codes[1:])]


def _rows_read(
    xp: Any, source: Array, w: Windows, rows: tuple[int, int]
) -> tuple[Array, Windows, int, int]:
    """Return the rows that some outputs read, widened, the windows over them, and which they are."""
    part, start, stop = _part(w, *rows)
    found = source[at_axis(w.first, slice(start, stop))]
    if found.dtype.itemsize == 2:
        wide = new(xp, "pool wide", found.shape, "float32")
        wide[...] = found
        found = wide
    return found, part, start, stop


def _part(w: Windows, low: int, high: int) -> tuple[Windows, int, int]:
    """Return the windows of some rows of outputs over the rows that they read, and which these are."""
    s, before = w.stride[0], w.before[0]
    start = max(0, low * s - before)
    stop = max(start, min(w.size[0], (high - 1) * s - before + w.kernel[0]))
    part = w.rows(low, high)
    part.size = (stop - start, *part.size[1:])
    part.before = (part.before[0] + start, *part.before[1:])
    return part, start, stop


def _blocks(xp: Any, x: Array, w: Windows, rows: int, work: Any) -> None:
    """Call ``work`` for every block; on a device, whole images within the workspace."""
    if xp is np:
        by_blocks(xp, x, w, rows, work)
        return
    image = max(1, x.size // x.shape[0] * wide_dtype(x.dtype.name).itemsize)
    step = max(1, settings.get_workspace_limit() // (6 * image))
    for begin in range(0, x.shape[0], step):
        work(slice(begin, min(begin + step, x.shape[0])), (0, rows))


# ------------------------------------------------------------------------------------ upwards


def _climb(xp: Any, x: Array, y: Array, w: Windows, padded: str, codes: Codes) -> None:
    """Write a block's maxima into ``y``, axis by axis from the last, and who won into ``codes``."""
    lower = x
    for axis in reversed(range(len(w.kernel))):
        shape = list(lower.shape)
        shape[w.first + axis] = w.out[axis]
        upper = y if axis == 0 else new(xp, f"pool level{axis}", tuple(shape), x.dtype)
        reduce_axis(xp, lower, upper, w, axis, "max", padded)
        _winners(xp, lower, upper, w, axis, padded, codes[axis])
        lower = upper


def _winners(
    xp: Any, lower: Array, upper: Array, w: Windows, axis: int, padded: str, code: Array
) -> None:
    """Write the number of the first tap that has the maximum into ``code``.

    From the last tap but one backwards: ``code = (code + 1) * (tap != maximum)``.
    """
    at = w.first + axis
    # A look at the numbers of a device would wait for it: there the general way at once.
    plain = xp is np and _finite(upper)
    one = xp.ones((), code.dtype)
    taps = w.taps(axis)
    other = new(xp, "pool other", code.shape, bool)
    for t in reversed(range(len(taps) - 1)):
        outputs, cells = taps[t]
        part = at_axis(at, outputs)
        if outputs.stop - outputs.start < w.out[axis]:
            if padded == "zeros":
                xp.not_equal(upper, xp.zeros((), upper.dtype), out=other)
            else:
                other.fill(True)
        if outputs.stop > outputs.start:
            values, here = lower[at_axis(at, cells)], other[part]
            xp.not_equal(values, upper[part], out=here)
            if not plain:
                here &= values == values  # a NaN is its window's maximum
        if t == len(taps) - 2:
            code[...] = other
        else:
            xp.add(code, one, out=code)
            xp.multiply(code, other.view(code.dtype) if code.dtype == "uint8" else other, out=code)
    if len(taps) == 1:
        code.fill(0)


def _finite(a: Array) -> bool:
    """Return whether an array of the CPU has neither NaN nor Inf (nor squares beyond all bounds)."""
    flat = np.ascontiguousarray(a).reshape(-1)
    return math.isfinite(np.dot(flat, flat))


# ---------------------------------------------------------------------------------- downwards


def _grad(dy: Array, dx: Array, w: Windows, codes: Any) -> None:
    """Write the gradient into ``dx``, block by block of its rows."""
    xp = namespace(dy)
    wide = wide_dtype(dx.dtype.name)
    k, s, before = w.kernel[0], w.stride[0], w.before[0]

    def work(images: slice, rows: tuple[int, int]) -> None:
        target = dx[(images, *at_axis(w.first, slice(*rows))[1:])]
        # The outputs whose windows reach into these rows, and the rows that these windows read.
        low = min(w.out[0], max(0, -((k - 1 - before - rows[0]) // s)))
        high = max(low, min(w.out[0], (rows[1] - 1 + before) // s + 1))
        part, start, stop = _part(w, low, high)
        first, last = max(rows[0], start), min(rows[1], stop)
        if high == low or first >= last:
            target[...] = 0
            return
        for apart in (slice(0, first - rows[0]), slice(last - rows[0], None)):
            target[at_axis(w.first, apart)] = 0
        gradient = dy[(images, *at_axis(w.first, slice(low, high))[1:])]
        if gradient.dtype != wide:
            copy = new(xp, "pool dy", gradient.shape, wide)
            copy[...] = gradient
            gradient = copy
        held = codes(xp, images, slice(low, high), slice(start, stop), part)
        inner = target[at_axis(w.first, slice(first - rows[0], last - rows[0]))]
        _descend(xp, gradient, inner, part, slice(first - start, last - start), held)

    _blocks(xp, dx, w, w.size[0], work)


def _descend(xp: Any, dy: Array, dx: Array, w: Windows, keep: slice, codes: Codes) -> None:
    """Write the gradient of a block's cells into ``dx``: of those in the rows ``keep``."""
    # An infinite gradient must not turn to NaN where it does not go.
    plain = xp is np and _finite(dy)
    axes = range(len(w.kernel))
    kept = at_axis(w.first, keep)
    upper = dy
    for axis in axes:
        shape = list(upper.shape)
        shape[w.first + axis] = w.size[axis]
        whole = axis > 0 or keep == slice(0, w.size[0])
        if axis == axes[-1] and whole and dx.dtype == dy.dtype:
            lower = dx
        else:
            lower = new(xp, f"pool grad{axis % 2}", tuple(shape), dy.dtype)
        _hand_down(xp, upper, codes[axis][kept] if axis else codes[0], lower, w, axis, plain)
        upper = lower if whole else lower[kept]
    if upper is not dx:
        dx[...] = upper


def _hand_down(
    xp: Any, upper: Array, code: Array, lower: Array, w: Windows, axis: int, plain: bool
) -> None:
    """Write the gradient of an axis's values, from that of its maxima, into ``lower``."""
    at = w.first + axis
    taps = w.taps(axis)
    # The taps of one stride meet every cell once at most: what they meet needs no zero.
    stride = w.stride[axis]
    if sum(r.stop - r.start for r, _ in taps[:stride]) < lower.shape[at]:
        lower.fill(0)
    for t, (outputs, cells) in enumerate(taps):
        if outputs.stop == outputs.start:
            continue
        part, cell = at_axis(at, outputs), lower[at_axis(at, cells)]
        gradient = upper[part]
        here = new(xp, "pool here", gradient.shape, bool)
        xp.equal(code[part], xp.asarray(t, code.dtype), out=here)
        share = new(xp, "pool share", gradient.shape, gradient.dtype)
        if plain:
            share[...] = here
            given = xp.multiply(share, gradient, out=cell if t < stride else share)
        else:
            given = xp.where(here, gradient, xp.zeros((), gradient.dtype))
            if t < stride:
                cell[...] = given
        if t >= stride:
            cell += given
