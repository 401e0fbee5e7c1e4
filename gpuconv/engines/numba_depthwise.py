"""Depthwise convolution, and groups of few channels, compiled: a vector runs along the channels.

NumPy has no operation that multiplies and adds arrays at the width of today's processors in one
pass, and depthwise convolution is nothing else. This engine is for who has Numba installed (the
extra ``numba``); it is chosen only then. Shares of the rows are taken by the same workers as those of
the NumPy engines; Numba's own threads are not used.

The forward pass reads ``x`` and writes ``y``, bias and activation included, and that is all it
does to memory. The backward pass goes through blocks of rows: ``dy`` behind the activation becomes
``dz`` in a buffer that stays in the cache, between zeros; ``dx`` gathers from it, and the gradients
of weights and bias sum it up. The loops are :mod:`gpuconv.engines.numba_window_loops`'s. What they cannot
read as it lies (channels first, float16), and activations other than ReLU and its kind, go
through NumPy a block at a time.

``GPUCONV_NUMBA=0`` switches it off.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from gpuconv import threads
from gpuconv.activations import Activation
from gpuconv.engines import numba_team
from gpuconv.engines.base import Engine, Pass, epilogue_grad
from gpuconv.engines.im2col import scratch, wide_dtype
from gpuconv.engines.numba_arrays import team_size
from gpuconv.engines.rates import rates
from gpuconv.engines.window_tables import (
    Gather,
    Sums,
    blocks_of,
    forward_gather,
    input_gather,
    plane,
    weight_sums,
)
from gpuconv.engines.windows import forward_axes
from gpuconv.problem import ConvProblem

__all__ = ["NumbaDepthwise"]

Array = np.ndarray[Any, Any]
#: An array for the compiled loops: its address, then the bytes from one to the next along every
#: axis but the last.
Place = tuple[int, ...]

#: Channels of a group: more are worth products of matrices.
GROUPS = (1, 2, 4, 8, 16)
#: Bytes of the rows of dz in a block, and of a copy: they stay in a core's cache.
BLOCK = 384 * 1024
#: Bytes of the lines of one vector of channels that the weight gradient goes through at a time.
PART = 24 * 1024
#: Numbers in a line of sums for the bias.
LINE = 1024


@cache
def _compiled() -> ModuleType:
    """Return the compiled loops; Numba is imported here."""
    from gpuconv.engines import numba_window_loops

    return numba_window_loops


def _workers(problem: ConvProblem) -> int:
    return team_size(4 * problem.flops)


def _count(total: int, workers: int) -> int:
    """Return how many shares workers take from one another's hands."""
    return 1 if workers == 1 else min(total, 8 * workers)


def _slope(activation: Activation | None) -> float | None:
    """Return what the loops multiply negative numbers with, or None if that is not all."""
    if activation is None:
        return 1.0
    return float(getattr(activation, "alpha", 0.0)) if activation.by_sign else None


def _is_native(a: Array | None, dtype: Any, lines: bool = False) -> bool:
    """Return whether the loops can read ``a``; with ``lines``, columns must be neighbours."""
    if a is None:
        return True
    if a.dtype != dtype or a.strides[-1] != a.itemsize or not a.flags.aligned:
        return False
    return not lines or a.strides[-2] == a.itemsize * a.shape[-1] or a.shape[-2] == 1


def _place(a: Array | None, row: int = 0) -> Place:
    """Return where ``a`` lies, its first row being that of the given number."""
    if a is None:
        return (0, 0, 0, 0)
    return (a.ctypes.data - row * a.strides[-3], *a.strides[:-1])


def _as_plane(a: Array | None) -> Array | None:
    """Return ``(n, *spatial, c)`` with two spatial axes."""
    return a if a is None or a.ndim == 4 else a[:, None]


def _read_rows(problem: ConvProblem, first: int, last: int) -> tuple[int, int]:
    """Return the rows of ``x`` that rows ``first`` to ``last`` of ``y`` read."""
    axis = forward_axes(problem)[0]
    low, high = axis.reads(first, last)
    low = min(max(0, low), axis.size)
    return low, max(low, min(high, axis.size))


def _exchanged(w: Array, group: int) -> Array:
    """Return ``(*taps, in a group, out)`` as ``(*taps, out of a group, in)``."""
    if group == 1:
        return w
    split = w.reshape(*w.shape[:2], group, -1, group)
    return np.ascontiguousarray(split.transpose(0, 1, 4, 3, 2)).reshape(w.shape)


class NumbaDepthwise(Engine):
    """Strips of outputs in vector registers, a worker per core."""

    name = "numba_depthwise"
    device_kind = "cpu"
    fused_backward = True
    ndims = (1, 2)

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
        group = problem.in_channels // problem.groups
        if problem.out_channels != problem.in_channels or group not in GROUPS:
            return (
                f"it computes as many channels as it reads, {', '.join(map(str, GROUPS))} a group, "
                f"not {problem.out_channels} from {problem.in_channels} in {problem.groups} groups"
            )
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products by whole vectors, and a way through memory."""
        rate, size = rates(), wide_dtype(problem.dtype).itemsize
        lanes = 64 // size
        filled = -(-problem.in_channels // lanes) * lanes / problem.in_channels
        # Strips share inputs where outputs lie as close as taps; else each has its own.
        reads = 1.0 if problem.stride[-1] == problem.dilation[-1] else 1.5
        seconds = filled * reads * problem.flops / (0.5 * rate.product(size))
        copies = 1.5
        if problem.layout == "channels_first" or problem.itemsize < size:
            copies += 6.0  # by NumPy, into blocks and out
        seconds += copies * problem.bytes / rate.copy
        return 3e-5 + seconds / _workers(problem)

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of buffers, all workers together."""
        size = wide_dtype(problem.dtype).itemsize
        cells = problem.in_shape[-1] + problem.out_shape[-1] + problem.window[-1]
        rows = (problem.window[0] + problem.stride[0]) * cells * problem.in_channels
        held = 2 * math.prod(problem.w_shape) + 2 * problem.in_channels + 2 * LINE
        return _workers(problem) * (4 * BLOCK + size * (2 * rows + held))

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        run = _compiled()
        flat = plane(replace(problem, activation=None))
        dtype, group, channels = wide_dtype(problem.dtype), w.shape[-2], problem.out_channels
        source, target = (a if a.ndim == 4 else a[:, None] for a in (x, y))
        few = channels < run.LANES[dtype.itemsize]
        gather = forward_gather(flat, (1,) if few else run.taps_at_once(group))
        zeros = np.zeros(max(256, 16 * dtype.itemsize), np.uint8)
        weights = np.ascontiguousarray(w, dtype).reshape(flat.w_shape)
        bias = np.zeros(channels, dtype) if b is None else np.ascontiguousarray(b, dtype)
        slope = _slope(problem.activation)
        factor = np.array([1.0 if slope is None else slope], dtype)
        act = problem.activation if slope is None else None
        rows = flat.out_shape[0]
        native = act is None and _is_native(source, dtype) and _is_native(target, dtype)
        step = max(1, BLOCK // (flat.out_shape[1] * channels * dtype.itemsize))
        total = flat.batch * rows
        workers = _workers(problem)
        shares = threads.shares(total, workers)

        tables = [gather.rows.ctypes.data, len(gather.rows)]
        tables += [gather.columns.ctypes.data, len(gather.columns)]
        function = run.forward(dtype.name, group)

        def compute(x: Place, y: Place, first: int, last: int, count: int, workers: int) -> None:
            job = [dtype.itemsize, channels, first, last, *x, *y, *_place(weights)]
            job += [bias.ctypes.data, factor.ctypes.data, zeros.ctypes.data, *gather.steps, *tables]
            numba_team.run(function, np.array(job, np.int64), count, workers)

        def finish(n: int, i: int, end: int) -> None:
            """Compute rows that must be copied, or finished by NumPy."""
            part, out = source[n : n + 1], target[n : n + 1, i:end]
            place, result = _place(part), out
            if not _is_native(part, dtype):
                low, high = _read_rows(flat, i, end)
                copy = scratch.get("lines", (1, high - low, *part.shape[2:]), dtype)
                np.copyto(copy, part[:, low:high])
                place = _place(copy, low)
            if not _is_native(out, dtype):
                result = scratch.get("product", out.shape, dtype)
            compute(place, _place(result, i), i, end, 1, 1)
            if act is not None:
                act.fn(result, out=result)
            if result is not out:
                out[...] = result

        def work(k: int) -> None:
            first, last = shares[k].start, shares[k].stop
            with np.errstate(all="ignore"):  # NaN and Inf travel on without a word
                while first < last:
                    n, i = divmod(first, rows)
                    end = min(rows, i + step, i + last - first)
                    finish(n, i, end)
                    first += end - i

        if not native:
            threads.run(work, len(shares))
            return
        compute(_place(source), _place(target), 0, total, _count(total, workers), workers)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        self.backward(problem, dz, None, w, None, dx, None, None)

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        self.backward(problem, dz, x, None, None, None, dw, db)

    def backward(
        self,
        problem: ConvProblem,
        dy: Array,
        x: Array | None,
        w: Array | None,
        y: Array | None,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
        exact: bool = False,
    ) -> None:
        """Write the gradients asked for, given ``dy`` behind the activation, in one pass.

        The zeros around ``dz`` give taps in the padding products that the definition does not
        have; they are zero unless the other factor is Inf or NaN. Where one is, tables without
        them are used: for ``dx`` if a weight is, for ``dw`` (``exact``) if a result is.
        """
        run = _compiled()
        flat = plane(replace(problem, activation=None))
        dtype, group = wide_dtype(problem.dtype), problem.in_channels // problem.groups
        channels, lanes = problem.out_channels, run.LANES[dtype.itemsize]
        weights = None
        if dx is not None and w is not None:
            weights = _exchanged(np.ascontiguousarray(w, dtype).reshape(flat.w_shape), group)
        finite = weights is None or bool(np.isfinite(weights).all())
        layout = _layout(flat, dtype.itemsize, dx is not None)
        few = channels < lanes
        take = (1,) if few else run.taps_at_once(group)
        gather, _ = input_gather(flat, take, padded=finite)
        sums = weight_sums(flat, (1,) if few else run.sums_at_once(group), padded=not exact)
        job = _Backward(
            flat, problem.activation if y is not None else None, layout, gather, sums,
            dy if dy.ndim == 4 else dy[:, None], _as_plane(y), _as_plane(x), _as_plane(dx), weights, dw is not None,
            -(-channels // lanes) * lanes,
        )  # fmt: skip
        sum_w, sum_b = job.run(_workers(problem))
        if db is not None:
            db[...] = sum_b.reshape(-1, channels).sum(axis=0)
        if dw is not None:
            rest = channels % lanes if channels > lanes else 0
            if rest:  # the last vector of channels begins earlier
                sum_w[..., channels - rest : channels] = sum_w[..., -rest:]
            total = sum_w[..., :channels]
            if exact or np.isfinite(total).all():
                dw[...] = total.reshape(dw.shape)
            else:
                self.backward(problem, dy, x, None, y, None, dw, None, exact=True)


@dataclass(frozen=True)
class _Layout:
    """How the backward pass cuts images, and the buffer of ``dz`` that it needs.

    Attributes
    ----------
    blocks : ndarray
        See :func:`gpuconv.engines.window_tables.blocks_of`.
    rows : int
        Most rows of ``dz`` in a block.
    before, columns : int
        Columns of zeros before the first; all columns.
    part : int
        Rows that the weight gradient goes through at a time.
    """

    blocks: Array
    rows: int
    before: int
    columns: int
    part: int


@lru_cache(maxsize=1024)
def _layout(problem: ConvProblem, size: int, need_x: bool) -> _Layout:
    _, (before, after) = input_gather(problem, (1,), padded=True)
    columns = before + problem.out_shape[1] + after
    row = columns * problem.out_channels * size
    blocks = blocks_of(problem, max(1, BLOCK // row), need_x)
    cells = problem.out_shape[1] + problem.in_shape[1] * problem.stride[0]
    most = int((blocks[:, 5] - blocks[:, 4]).max())
    return _Layout(blocks, most, before, columns, max(1, PART // (64 * cells)))


@dataclass(frozen=True)
class _Backward:
    """A backward pass over planes, for the workers to take their shares of."""

    problem: ConvProblem
    activation: Activation | None
    layout: _Layout
    gather: Gather
    sums: Sums
    dy: Array
    y: Array | None
    x: Array | None
    dx: Array | None
    weights: Array | None
    need_w: bool
    width: int

    def run(self, workers: int) -> tuple[Array, Array]:
        """Compute all blocks; return the sums for weights and bias."""
        problem, layout = self.problem, self.layout
        dtype, channels = wide_dtype(problem.dtype), problem.out_channels
        total, columns = problem.batch * len(layout.blocks), problem.out_shape[1]
        count = min(_count(total, workers), 4 * workers)
        group, repeats = problem.in_channels // problem.groups, max(1, LINE // channels)
        sum_w = np.zeros((count, *problem.kernel, group, self.width), dtype)
        sum_b = np.zeros((count, repeats * channels), dtype)
        slope = _slope(self.activation)
        numbers = np.zeros(channels + 2, dtype)
        numbers[channels:] = 1.0, 1.0 if slope is None else slope
        at = numbers.ctypes.data
        one = at + channels * dtype.itemsize
        behind = self.activation is not None
        place_w = _place(sum_w)
        place_b = (sum_b.ctypes.data, sum_b.strides[0])

        function = _compiled().backward(dtype.name, group)
        tables: list[int] = []
        for table in (self.gather.rows, self.gather.columns, self.sums.rows, self.sums.columns,
                      layout.blocks):  # fmt: skip
            tables += [table.ctypes.data, len(table)]

        def compute(
            dz: Array, places: Any, behind: bool, blocks: range, sums: int, count: int, workers: int
        ) -> None:
            """Compute blocks in so many shares, whose sums begin with the number given."""
            dy, y, x, dx = places
            nothing = np.zeros((workers, repeats * channels), dtype)
            job = [
                dtype.itemsize, channels, blocks.start, blocks.stop, *dy, *y, *x, *dx,
                *_place(self.weights), dz.ctypes.data, *dz.strides[1:3], dz.strides[0],
                place_w[0] + sums * place_w[1], *place_w[1:], place_b[0] + sums * place_b[1],
                place_b[1], nothing.ctypes.data, nothing.strides[0], at, one, one + dtype.itemsize,
                repeats, behind, self.dx is not None, self.need_w, columns, layout.part,
                *self.gather.steps, *self.sums.steps, *tables,
            ]  # fmt: skip
            numba_team.run(function, np.array(job, np.int64), count, workers)

        arrays = (self.dy, self.y, self.x, self.dx)
        lines = all(_is_native(a, dtype, lines=True) for a in arrays[:2])
        if slope is not None and lines and all(_is_native(a, dtype) for a in arrays[2:]):
            places = [_place(a) for a in arrays]
            compute(self._buffer(workers), places, behind, range(total), 0, count, workers)
        else:
            shares = threads.shares(total, min(workers, count))

            def work(k: int) -> None:
                with np.errstate(all="ignore"):  # NaN and Inf travel on without a word
                    dz = self._buffer(1)
                    for block in shares[k]:
                        self._copied(*divmod(block, len(layout.blocks)), k, dz, compute)

            threads.run(work, len(shares))
        return sum_w.sum(axis=0), sum_b.sum(axis=0)

    def _buffer(self, workers: int) -> Array:
        """Return a buffer of a block's ``dz`` for each worker, without the zeros on both sides."""
        problem, layout, columns = self.problem, self.layout, self.problem.out_shape[1]
        shape = (workers, layout.rows, layout.columns, problem.out_channels)
        held = scratch.get("gradient", shape, wide_dtype(problem.dtype))
        held[:, :, : layout.before] = 0
        held[:, :, layout.before + columns :] = 0
        return held[:, :, layout.before : layout.before + columns]

    def _copied(self, n: int, k: int, sums: int, dz: Array, compute: Any) -> None:
        """Compute one block whose arrays must be copied, or whose ``dz`` is NumPy's work."""
        i0, i1, r0, r1, low, high = self.layout.blocks[k].tolist()
        image = slice(n, n + 1)
        gradient = dz[:1, : high - low]
        if self.activation is None or self.y is None:
            np.copyto(gradient, self.dy[image, low:high])
        else:
            behind, above = (
                a[image, low:high].astype(dz.dtype, copy=False) for a in (self.dy, self.y)
            )
            epilogue_grad(behind, above, self.activation, gradient)
        source = None if self.x is None else self.x[image]
        place_x = _place(source)
        if source is not None and not _is_native(source, dz.dtype):
            first, last = _read_rows(self.problem, i0, i1)
            copy = scratch.get("lines", (1, last - first, *source.shape[2:]), dz.dtype)
            np.copyto(copy, source[:, first:last])
            place_x = _place(copy, first)
        target = None if self.dx is None else self.dx[image, r0:r1]
        result = target
        if target is not None and not _is_native(target, dz.dtype):
            result = scratch.get("product", target.shape, dz.dtype)
        # dz is its own source: the loops add it up where it lies.
        places = [_place(gradient, low), _place(None), place_x, _place(result, r0)]
        compute(dz, places, False, range(k, k + 1), sums, 1, 1)
        if target is not None and result is not target:
            target[...] = result
