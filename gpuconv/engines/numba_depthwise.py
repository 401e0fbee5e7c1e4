"""Depthwise convolution compiled by Numba: the loops, with a line of channels in the registers.

NumPy has no operation that multiplies and adds arrays at the width of today's processors in one
pass, and depthwise convolution is nothing else. This engine is for who has Numba installed (the
extra ``numba``); it is chosen only then. Blocks of rows go to the same workers as those of the
NumPy engines; Numba's own threads are not used.

``GPUCONV_NUMBA=0`` switches it off.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import add_bias, bias_line, run_shares, worker_count
from gpuconv.engines.rates import rates
from gpuconv.engines.windows import Block, blocks
from gpuconv.problem import ConvProblem

__all__ = ["NumbaDepthwise"]

Array = np.ndarray[Any, Any]

#: Elements of a block: it stays in a core's cache until its bias and activation are applied.
BLOCK = 64 * 1024
#: How much faster than numpy.einsum the compiled loops are taken to be.
SPEED = 1.6


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Return the three passes over rows ``first`` to ``last`` of an image, compiled.

    All arrays are contiguous: ``(rows, columns, channels)`` and ``(row taps, column taps,
    channels)``. ``sizes`` holds stride, dilation and padding of rows, then of columns.
    """
    from numba import njit

    options: dict[str, Any] = {
        "nogil": True,
        "cache": True,
        "fastmath": {"contract"},
        "boundscheck": False,
    }

    @njit(**options)
    def forward(x: Array, w: Array, y: Array, sizes: Any, first: int, last: int) -> None:
        sr, dr, top, sc, dc, left = sizes
        rows, columns, channels = x.shape
        for i in range(first, last):
            for j in range(y.shape[1]):
                for c in range(channels):
                    y[i, j, c] = 0
                for p in range(w.shape[0]):
                    r = i * sr + p * dr - top
                    if r < 0 or r >= rows:
                        continue
                    for q in range(w.shape[1]):
                        s = j * sc + q * dc - left
                        if s < 0 or s >= columns:
                            continue
                        for c in range(channels):
                            y[i, j, c] += x[r, s, c] * w[p, q, c]

    @njit(**options)
    def input_grad(dz: Array, w: Array, dx: Array, sizes: Any, first: int, last: int) -> None:
        sr, dr, top, sc, dc, left = sizes
        rows, columns, channels = dz.shape
        for r in range(first, last):
            for s in range(dx.shape[1]):
                for c in range(channels):
                    dx[r, s, c] = 0
                for p in range(w.shape[0]):
                    i = r + top - p * dr
                    if i < 0 or i % sr or i // sr >= rows:
                        continue
                    for q in range(w.shape[1]):
                        j = s + left - q * dc
                        if j < 0 or j % sc or j // sc >= columns:
                            continue
                        for c in range(channels):
                            dx[r, s, c] += dz[i // sr, j // sc, c] * w[p, q, c]

    @njit(**options)
    def weight_grad(x: Array, dz: Array, dw: Array, sizes: Any, first: int, last: int) -> None:
        sr, dr, top, sc, dc, left = sizes
        rows, columns, channels = x.shape
        for i in range(first, last):
            for p in range(dw.shape[0]):
                r = i * sr + p * dr - top
                if r < 0 or r >= rows:
                    continue
                for j in range(dz.shape[1]):
                    for q in range(dw.shape[1]):
                        s = j * sc + q * dc - left
                        if s < 0 or s >= columns:
                            continue
                        for c in range(channels):
                            dw[p, q, c] += x[r, s, c] * dz[i, j, c]

    return forward, input_grad, weight_grad


class NumbaDepthwise(Engine):
    """The loops compiled by Numba, a worker per core."""

    name = "numba_depthwise"
    device_kind = "cpu"
    dtypes = ("float32", "float64")
    ndims = (2,)

    def unavailable(self) -> str | None:
        """Return why it cannot run on this machine, or None."""
        if os.environ.get("GPUCONV_NUMBA", "").strip() == "0":
            return "GPUCONV_NUMBA=0 switches it off"
        if importlib.util.find_spec("numba") is None:
            return "Numba is not installed: pip install 'gpuconv[numba]'"
        return None

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if problem.groups != problem.in_channels or problem.out_channels != problem.in_channels:
            return "it computes one channel from one, " + (
                f"not {problem.out_channels} from {problem.in_channels} in {problem.groups} groups"
            )
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time."""
        rate, workers = rates(), worker_count(16 * problem.flops)
        products = problem.flops / 2 * problem.itemsize / 4
        short = 1 + 16 / problem.out_channels  # the loop around a line of channels
        seconds = products * short / (SPEED * rate.einsum) + problem.bytes / rate.copy
        return 5e-5 + seconds / workers

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of copies of what is not laid out channels last."""
        held = math.prod(problem.w_shape) * (1 + worker_count(16 * problem.flops))
        if problem.layout != "channels_last":
            held += math.prod(problem.x_shape) + math.prod(problem.y_shape)
        return held * problem.itemsize

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        run, _, _ = _compiled()
        x, taps = np.ascontiguousarray(x), np.ascontiguousarray(w[..., 0, :])
        result = y if y.flags.c_contiguous else np.empty(y.shape, y.dtype)
        sizes = _sizes(problem)
        line = None if b is None else bias_line(b)

        def work(_: int, share: tuple[Block, ...]) -> None:
            for (n0, n1), (first, last) in share:
                for n in range(n0, n1):
                    run(x[n], taps, result[n], sizes, first, last)
                    done = result[n, first:last]
                    if line is not None:
                        add_bias(done, line, problem.out_channels)
                    if problem.activation is not None:
                        problem.activation.fn(done, out=done)

        run_shares(_cut(problem.y_shape, problem), work)
        if result is not y:
            y[...] = result

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        _, run, _ = _compiled()
        dz, taps = np.ascontiguousarray(dz), np.ascontiguousarray(w[..., 0, :])
        result = dx if dx.flags.c_contiguous else np.empty(dx.shape, dx.dtype)
        sizes = _sizes(problem)

        def work(_: int, share: tuple[Block, ...]) -> None:
            for (n0, n1), (first, last) in share:
                for n in range(n0, n1):
                    run(dz[n], taps, result[n], sizes, first, last)

        run_shares(_cut(problem.x_shape, problem), work)
        if result is not dx:
            dx[...] = result

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is None:
            return
        _, _, run = _compiled()
        dz, x = np.ascontiguousarray(dz), np.ascontiguousarray(x)
        sizes = _sizes(problem)
        shares = _cut(problem.y_shape, problem)
        totals = [np.zeros((*problem.kernel, problem.out_channels), x.dtype) for _ in shares]

        def work(k: int, share: tuple[Block, ...]) -> None:
            # A block's sum first, then the blocks': long sums in one place round badly.
            part = np.empty_like(totals[k])
            for (n0, n1), (first, last) in share:
                part[...] = 0
                for n in range(n0, n1):
                    run(x[n], dz[n], part, sizes, first, last)
                totals[k] += part

        run_shares(shares, work)
        for other in totals[1:]:
            totals[0] += other
        dw[..., 0, :] = totals[0]


def _sizes(problem: ConvProblem) -> tuple[int, ...]:
    """Return stride, dilation and the padding before, of rows and of columns."""
    per_axis = zip(problem.stride, problem.dilation, problem.padding, strict=True)
    return tuple(v for s, d, (before, _) in per_axis for v in (s, d, before))


def _cut(shape: tuple[int, ...], problem: ConvProblem) -> tuple[tuple[Block, ...], ...]:
    """Divide the rows of a result among workers."""
    _, _, columns, channels = shape
    return blocks(
        shape[:2], max(1, BLOCK // (columns * channels)), worker_count(16 * problem.flops)
    )
