"""The loops: the definition of a convolution and of its gradients, and the oracle of every test.

Each pass is written as one reads it in a textbook, over example, output position and output
channel; ``kernels/conv_atomic.cu`` is the same text with a thread in the place of an
iteration. Slow on purpose: one output element at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpuconv.engines.base import Engine, Pass
from gpuconv.problem import COMPLEX, ConvProblem

__all__ = ["Naive"]

Array = Any


def _wide(dtype: str) -> str:
    """Return the dtype that sums are held in."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def _windows(
    problem: ConvProblem,
) -> Iterator[tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]]:
    """Yield each output position with the pairs (tap, input position) that fall inside the input.

    A tap that falls into the padding meets a zero and is left out.
    """
    for position in np.ndindex(*problem.out_shape):
        inside = []
        for tap in itertools.product(*map(range, problem.kernel)):
            source = tuple(
                i * s + t * d - before
                for i, s, t, d, (before, _) in zip(
                    position, problem.stride, tap, problem.dilation, problem.padding, strict=True
                )
            )
            if all(0 <= r < n for r, n in zip(source, problem.in_shape, strict=True)):
                inside.append((tap, source))
        yield position, inside


class Naive(Engine):
    """NumPy loops over example, position and output channel."""

    name = "naive"
    device_kind = "cpu"
    dtypes = (*Engine.dtypes, *COMPLEX)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return some two microseconds a tap and output element."""
        elements = problem.batch * problem.out_channels * int(np.prod(problem.out_shape))
        return 1e-5 + 2e-6 * elements * problem.taps

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the size of the wide sums."""
        wide = np.dtype(_wide(problem.dtype)).itemsize
        if pass_ == "forward":
            return wide * problem.out_channels
        shape = problem.x_shape if pass_ == "input_grad" else problem.w_shape
        return wide * int(np.prod(shape))

    @np.errstate(all="ignore")  # NaN and Inf travel on without a word, as in BLAS
    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        wide = _wide(problem.dtype)
        in_group = problem.in_channels // problem.groups
        out_group = problem.out_channels // problem.groups
        for position, inside in _windows(problem):
            for n in range(problem.batch):
                for c in range(problem.out_channels):
                    group = c // out_group
                    channels = slice(group * in_group, (group + 1) * in_group)
                    z = np.zeros((), wide)
                    for tap, source in inside:
                        window = x[(n, *source, channels)].astype(wide)
                        z = z + np.dot(window, w[(*tap, slice(None), c)].astype(wide))
                    if b is not None:
                        z = z + b[c].astype(wide)
                    if problem.activation is not None:
                        z = problem.activation.fn(np.asarray(z))
                    y[(n, *position, c)] = z

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        self._gradients(problem, dz, None, w, dx, None, None)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        self._gradients(problem, dz, x, None, None, dw, db)

    @np.errstate(all="ignore")
    def _gradients(
        self,
        problem: ConvProblem,
        dz: Array,
        x: Array | None,
        w: Array | None,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
    ) -> None:
        """Add each output element's contributions into the gradients asked for."""
        wide = _wide(problem.dtype)
        in_group = problem.in_channels // problem.groups
        out_group = problem.out_channels // problem.groups
        sums: list[Array] = [None if a is None else np.zeros(a.shape, wide) for a in (dx, dw, db)]
        dx_sum, dw_sum, db_sum = sums
        for position, inside in _windows(problem):
            for n in range(problem.batch):
                for c in range(problem.out_channels):
                    group = c // out_group
                    channels = slice(group * in_group, (group + 1) * in_group)
                    d = dz[(n, *position, c)].astype(wide)
                    if db_sum is not None:
                        db_sum[c] += d
                    for tap, source in inside:
                        if dx_sum is not None and w is not None:
                            dx_sum[(n, *source, channels)] += d * w[(*tap, slice(None), c)]
                        if dw_sum is not None and x is not None:
                            dw_sum[(*tap, slice(None), c)] += d * x[(n, *source, channels)]
        for result, total in zip((dx, dw, db), sums, strict=True):
            if result is not None:
                result[...] = total
