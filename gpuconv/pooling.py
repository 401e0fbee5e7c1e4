"""Maximum and mean over windows, with gradients: slices of the image, one for each tap.

Arrays are channels last, of NumPy or CuPy, with any number of spatial axes. Everything is
gathered or added tap by tap in whole-array operations of the array's own library.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from gpuconv.device import namespace

__all__ = ["pool", "pool_grad", "pooled_shape"]

Array = Any
Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


def pooled_shape(shape: Ints, kernel: Ints, stride: Ints, pads: Pads) -> Ints:
    """Return the shape of the result for an input of ``shape``, batch and channels included."""
    spatial = (
        (n + before + after - k) // s + 1
        for n, k, s, (before, after) in zip(shape[1:-1], kernel, stride, pads, strict=True)
    )
    return (shape[0], *spatial, shape[-1])


def _padded(x: Array, pads: Pads) -> Array:
    """Return ``x`` with zeros around it; ``x`` itself where there are none to add."""
    if not any(map(any, pads)):
        return x
    sizes = (n + sum(p) for n, p in zip(x.shape[1:-1], pads, strict=True))
    padded = namespace(x).zeros((x.shape[0], *sizes, x.shape[-1]), x.dtype)
    padded[_inner(x.shape, pads)] = x
    return padded


def _inner(shape: Ints, pads: Pads) -> tuple[slice, ...]:
    """Return where an array of ``shape`` lies in its padded self."""
    inner = (slice(p[0], p[0] + n) for n, p in zip(shape[1:-1], pads, strict=True))
    return (slice(None), *inner)


def _taps(kernel: Ints, stride: Ints, out: Ints) -> list[tuple[slice, ...]]:
    """Return for each tap, in row-major order, the cells that the windows have there."""
    ranges = [
        [slice(t, t + (n - 1) * s + 1, s) for t in range(k)]
        for k, s, n in zip(kernel, stride, out[1:-1], strict=True)
    ]
    return [(slice(None), *taps) for taps in itertools.product(*ranges)]


def pool(x: Array, kernel: Ints, stride: Ints, pads: Pads, mode: str) -> Array:
    """Return the maximum or the mean of every window; zeros of the padding take part.

    Parameters
    ----------
    x : ndarray
        ``(batch, *spatial, channels)``.
    kernel, stride : tuple of int
        Per spatial axis.
    pads : tuple of (int, int)
        Zeros before and after, per spatial axis.
    mode : {"max", "average"}
        NaN in a window gives NaN in either.
    """
    xp = namespace(x)
    shape = pooled_shape(x.shape, kernel, stride, pads)
    padded = _padded(x, pads)
    first, *rest = _taps(kernel, stride, shape)
    y = padded[first].copy()
    combine = xp.maximum if mode == "max" else xp.add
    for tap in rest:
        combine(y, padded[tap], out=y)
    if mode == "average":
        y *= 1 / math.prod(kernel)
    return y


def pool_grad(
    dy: Array, x: Array, y: Array, kernel: Ints, stride: Ints, pads: Pads, mode: str
) -> Array:
    """Return the gradient of :func:`pool` with respect to ``x``.

    A maximum that several taps share gives its gradient to the first, in row-major order.

    Parameters
    ----------
    dy, y : ndarray
        Gradient with respect to the result, and the result.
    x, kernel, stride, pads, mode
        As for :func:`pool`.
    """
    xp = namespace(x)
    padded = _padded(x, pads)
    taps = _taps(kernel, stride, dy.shape)
    dx = xp.zeros(padded.shape, dy.dtype)
    if mode == "average":
        share = dy * (1 / math.prod(kernel))
        for tap in taps:
            dx[tap] += share
        return dx[_inner(x.shape, pads)]
    apart = all(s >= k for s, k in zip(stride, kernel, strict=True))
    free = xp.ones(dy.shape, bool)  # windows whose maximum has not been met yet
    for tap in taps:
        cells = padded[tap]
        here = cells == y
        here |= cells != cells  # a NaN is its window's maximum
        here &= free
        free ^= here
        if apart:  # no cell belongs to two windows
            xp.multiply(dy, here, out=dx[tap])
        else:
            dx[tap] += dy * here
    return dx[_inner(x.shape, pads)]
