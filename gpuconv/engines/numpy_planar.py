"""Few input channels in NumPy: images as planes, so that windows are gathered row by row.

With three channels a window's row is a run of nine numbers, and copying so short runs takes
longer than multiplying them. Here the channels are laid out as planes first (and, with a stride
along the columns, the columns of each remainder apart); then a tap of a block of outputs is one
copy of long rows. ``columns`` of the form ``(taps * channels, outputs)`` serve all passes:

- forward: ``columns.T @ w``, with a row of ones that multiplies the bias;
- weight gradient: ``columns @ dz``, summed over the blocks;
- input gradient: ``w @ dz.T`` has the same form; its taps are added to the planes of ``dx``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv import settings
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.epilogue import bias_sums
from gpuconv.engines.im2col import run_shares, scratch, wide_dtype, worker_count
from gpuconv.engines.rates import efficiency, rates
from gpuconv.engines.windows import Axis, Block, blocks, forward_axes
from gpuconv.problem import ConvProblem

__all__ = ["NumpyPlanar"]

Array = np.ndarray[Any, Any]

#: More channels than these make runs long enough to be gathered as they lie.
MOST_CHANNELS = 4
#: Bytes of a block's columns: large enough that copies are worth their calls.
BLOCK = 1280 * 1024
#: Outputs that a block should have, that a copy is worth its call.
LEAST = 1024
#: Elements up to which the windows of a block are one copy: it is the calls that take the time.
ONE_COPY = 16 * 1024


@dataclass(frozen=True)
class _Columns:
    """The columns of a line that have one remainder by the stride.

    Attributes
    ----------
    first, step : int
        Source cells ``first + step * u``; ``first`` may be negative.
    length : int
        How many a line reads; those outside the source are zeros.
    """

    first: int
    step: int
    length: int


@lru_cache(maxsize=256)
def _column_sets(axis: Axis) -> tuple[tuple[_Columns, ...], tuple[tuple[int, int], ...]]:
    """Return the sets of columns, and for each tap its set and its offset in there."""
    numbers: dict[int, int] = {}
    lengths: list[int] = []
    taps = []
    for tap in range(axis.taps):
        offset, phase = divmod(tap * axis.dilation, axis.stride)
        number = numbers.setdefault(phase, len(numbers))
        if number == len(lengths):
            lengths.append(0)
        lengths[number] = max(lengths[number], offset + axis.count)
        taps.append((number, offset))
    sets = tuple(
        _Columns(axis.start + phase, axis.stride, lengths[number])
        for phase, number in numbers.items()
    )
    return sets, tuple(taps)


@lru_cache(maxsize=1024)
def _axes(problem: ConvProblem) -> tuple[Axis, Axis]:
    """Return the gather of the forward pass over two axes."""
    axes = forward_axes(problem)
    return (axes[0], axes[1]) if len(axes) == 2 else (Axis(1, 1, 1, 1, 1, 0), axes[0])


class NumpyPlanar(Engine):
    """Planes and rows of them, a worker per core."""

    name = "numpy_planar"
    device_kind = "cpu"
    ndims = (1, 2)

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if problem.groups != 1:
            return f"it computes one group, not {problem.groups}"
        if problem.in_channels > MOST_CHANNELS:
            return f"it computes up to {MOST_CHANNELS} input channels, not {problem.in_channels}"
        return None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time: products, copied or added rows, and planes."""
        rate, workers = rates(), worker_count(problem.flops)
        size = wide_dtype(problem.dtype).itemsize
        depth = problem.taps * problem.in_channels
        outputs = problem.flops / (2 * depth * problem.out_channels)
        share = (
            efficiency(depth, problem.out_channels)
            * {"forward": 1.0, "input_grad": 0.7, "weight_grad": 0.85}[pass_]
        )
        line = problem.out_shape[-1]
        copied = outputs * depth * size * (1.2 if pass_ == "input_grad" else 0.6)
        copied += outputs * depth / line * 400  # the start of a row, as bytes
        planes = math.prod(problem.x_shape) * size * 6
        moved = copied + planes + outputs * problem.out_channels * size
        count = max(1.0, outputs / (_block_rows(problem) * line))
        if pass_ == "input_grad" or outputs * depth / count > ONE_COPY:
            count *= problem.taps
        seconds = problem.flops / rate.product(size) / share + moved / rate.copy
        return 1e-5 + (seconds + rate.call * count) / workers

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the buffers, all workers together."""
        size = wide_dtype(problem.dtype).itemsize
        rows, columns = _axes(problem)
        depth = problem.taps * problem.in_channels + 1
        outputs = columns.count * _block_rows(problem)
        reads = (_block_rows(problem) * rows.stride + (rows.taps - 1) * rows.dilation) * sum(
            c.length for c in _column_sets(columns)[0]
        )
        if pass_ == "input_grad":
            reads = (rows.reads(0, rows.count)[1] - rows.start) * sum(
                c.length for c in _column_sets(columns)[0]
            )
        held = depth * outputs + reads * problem.in_channels
        held += problem.out_channels * (outputs + 3 * depth)
        return worker_count(problem.flops) * size * held

    # ------------------------------------------------------------------------------- the passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        dtype = wide_dtype(problem.dtype)
        depth = problem.taps * problem.in_channels
        weights = np.empty((depth + (b is not None), problem.out_channels), dtype)
        weights[:depth] = w.reshape(depth, problem.out_channels)
        if b is not None:
            weights[depth] = b
        axes = _axes(problem)
        x, y = _two_axes(x), _two_axes(y)

        def work(_: int, share: tuple[Block, ...]) -> None:
            for block in share:
                columns = _gathered(x, axes, block, dtype, ones=b is not None)
                cells = y[tuple(slice(*r) for r in block)]
                direct = _matrix(cells, dtype)
                shape = columns.shape[1], problem.out_channels
                out = scratch.get("product", shape, dtype) if direct is None else direct
                np.matmul(columns.T, weights, out=out)
                if problem.activation is not None:
                    problem.activation.fn(out, out=out)
                if direct is None:
                    cells[...] = out.reshape(cells.shape)

        run_shares(_cut(problem), work)

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        dtype = wide_dtype(problem.dtype)
        axes = _axes(problem)
        weights = np.ascontiguousarray(w, dtype).reshape(-1, problem.out_channels)
        dz, dx = _two_axes(dz), _two_axes(dx)
        shares = _images(problem)
        split = len(shares) > problem.batch  # several workers to an image
        partial: list[Array] = [np.empty(0)] * len(shares)

        def work(k: int, share: tuple[Block, ...]) -> None:
            for images, (first, last) in share:
                planes = _zero_planes(axes, images, problem.in_channels, dtype, kept=split)
                for block in _rows(problem, images, first, last):
                    gradient = _rows_of(dz[tuple(slice(*r) for r in block)], dtype)
                    columns = scratch.get("windows", (len(weights), len(gradient)), dtype)
                    np.matmul(weights, gradient.T, out=columns)
                    _add_taps(columns, axes, block, planes)
                if split:
                    partial[k] = planes
                else:
                    _store_planes(planes, axes, dx[slice(*images)])

        run_shares(shares, work)
        if split:
            per_image = len(shares) // problem.batch
            for image in range(problem.batch):
                total, *others = partial[image * per_image : (image + 1) * per_image]
                for other in others:
                    total += other
                _store_planes(total, axes, dx[image : image + 1])

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_sums(dz, db)
        if dw is None:
            return
        dtype = wide_dtype(problem.dtype)
        axes = _axes(problem)
        x, dz = _two_axes(x), _two_axes(dz)
        shares = _cut(problem)
        shape = problem.taps * problem.in_channels, problem.out_channels
        totals = [np.zeros(shape, dtype) for _ in shares]

        def work(k: int, share: tuple[Block, ...]) -> None:
            product = np.empty(shape, dtype)
            for block in share:
                gradient = _rows_of(dz[tuple(slice(*r) for r in block)], dtype)
                columns = _gathered(x, axes, block, dtype, ones=False)
                np.matmul(columns, gradient, out=product)
                totals[k] += product

        run_shares(shares, work)
        for other in totals[1:]:
            totals[0] += other
        dw[...] = totals[0].reshape(dw.shape)


# ---------------------------------------------------------------------------------- the blocks


def _two_axes(array: Array) -> Array:
    """Return an image of one spatial axis as one of a single row."""
    return array if array.ndim == 4 else array[:, None]


def _block_rows(problem: ConvProblem) -> int:
    """Return how many rows of outputs, of one image or of several, a block should have."""
    return _block_rows_under(problem, settings.generation)


@lru_cache(maxsize=1024)
def _block_rows_under(problem: ConvProblem, generation: int) -> int:
    _, columns = _axes(problem)
    size = wide_dtype(problem.dtype).itemsize
    depth = problem.taps * problem.in_channels
    wanted = max(LEAST, BLOCK // (depth * size))
    budget = settings.get_workspace_limit() // (4 * worker_count(problem.flops))
    wanted = min(wanted, budget // (size * (depth + problem.out_channels)))
    return max(1, wanted // columns.count)


def _cut(problem: ConvProblem) -> tuple[tuple[Block, ...], ...]:
    """Divide images and rows into blocks, and these among workers."""
    return _cut_under(problem, settings.generation)


@lru_cache(maxsize=1024)
def _cut_under(problem: ConvProblem, generation: int) -> tuple[tuple[Block, ...], ...]:
    rows, columns = _axes(problem)
    line = (0, columns.count)
    cut = blocks((problem.batch, rows.count), _block_rows(problem), worker_count(problem.flops))
    return tuple(tuple((*block, line) for block in share) for share in cut)


def _images(problem: ConvProblem) -> tuple[tuple[Block, ...], ...]:
    """Divide images among workers, or the rows of each where there are fewer images.

    Returns ranges of images and of rows; where rows are divided, a share has one.
    """
    return _images_under(problem, settings.generation)


@lru_cache(maxsize=1024)
def _images_under(problem: ConvProblem, generation: int) -> tuple[tuple[Block, ...], ...]:
    rows, _ = _axes(problem)
    workers = worker_count(problem.flops)
    batch = problem.batch
    if batch >= workers:
        cut = blocks((batch,), max(1, _block_rows(problem) // rows.count), workers)
        return tuple(tuple((*images, (0, rows.count)) for images in share) for share in cut)
    parts = min(rows.count, workers // batch)
    bounds = [rows.count * k // parts for k in range(parts + 1)]
    return tuple(
        (((image, image + 1), part),)
        for image in range(batch)
        for part in zip(bounds, bounds[1:], strict=False)
    )


def _rows(problem: ConvProblem, images: tuple[int, int], first: int, last: int) -> Iterator[Block]:
    """Yield blocks over some rows of some images."""
    _, columns = _axes(problem)
    step = max(1, _block_rows(problem) // (images[1] - images[0]))
    for row in range(first, last, step):
        yield images, (row, min(row + step, last)), (0, columns.count)


def _matrix(cells: Array, dtype: Any) -> Array | None:
    """Return ``(n, rows, columns, c)`` as a matrix ``(outputs, c)`` that BLAS can use, if it is one."""
    if cells.dtype != dtype:
        return None
    n, rows, columns, channels = cells.shape
    s = cells.strides
    if s[3] != cells.itemsize and s[2] != cells.itemsize:
        return None
    if (rows > 1 and s[1] != columns * s[2]) or (n > 1 and s[0] != rows * columns * s[2]):
        return None
    if min(s[2:]) < cells.itemsize:
        return None
    if cells.flags.c_contiguous:
        return cells.reshape(-1, channels)
    return as_strided(cells, (n * rows * columns, channels), (s[2], s[3]))


def _rows_of(cells: Array, dtype: Any) -> Array:
    """Return a block of ``dz`` as a matrix ``(outputs, c)``, copied if it must be."""
    matrix = _matrix(cells, dtype)
    if matrix is None:
        copy = scratch.get("product", cells.shape, dtype)
        np.copyto(copy, cells)
        matrix = copy.reshape(-1, cells.shape[-1])
    return matrix


# ----------------------------------------------------------------------------------- the planes


def _span(size: int, first: int, step: int, count: int) -> tuple[int, int, slice]:
    """Return which of ``first + step * i``, ``i < count``, are cells, and the slice of these."""
    low = max(0, -(first // step))
    high = max(low, min(count, (size - 1 - first) // step + 1))
    begin = first + step * low
    return low, high, slice(begin, begin + step * (high - low), step)


class _Gather:
    """The copies that gather a block, between buffers of a thread: views, made once.

    Blocks of one size that reach into the padding alike share them.

    Parameters
    ----------
    axes : tuple of Axis
        Rows and columns.
    shape : tuple of int
        Channels, images, rows of outputs of a block.
    inside : tuple of int
        Of the rows that it reads, the first in the source and the one after the last.
    dtype : dtype
    ones : bool
        Whether a row of ones ends the columns.
    """

    def __init__(
        self,
        axes: tuple[Axis, Axis],
        shape: tuple[int, int, int],
        inside: tuple[int, int],
        dtype: Any,
        ones: bool,
    ) -> None:
        rows, columns = axes
        sets, taps = _column_sets(columns)
        channels, images, count = shape
        low, high = rows.reads(0, count)
        r0, r1 = inside
        self.zero: list[Array] = []
        self.inside: list[tuple[Array, slice]] = []
        planes = []
        for number, found in enumerate(sets):
            u0, u1, cells = _span(columns.size, found.first, found.step, found.length)
            plane = scratch.get(
                f"plane {number}", (channels, images, high - low, found.length), dtype
            )
            if (r1 - r0, u1 - u0) != plane.shape[2:]:
                self.zero.append(plane)
            self.inside.append((plane[:, :, r0:r1, u0:u1].transpose(1, 2, 3, 0), cells))
            planes.append(plane)
        depth = rows.taps * columns.taps * channels
        outputs = images * count * columns.count
        self.whole = scratch.get("windows", (depth + ones, outputs), dtype)
        self.last = self.whole[depth] if ones else None
        place = self.whole[:depth].reshape(
            rows.taps, columns.taps, channels, images, count, columns.count
        )
        self.copies = []
        if len(sets) == 1 and self.whole.size <= ONE_COPY:
            steps = planes[0].strides
            windows = as_strided(
                planes[0],
                place.shape,
                (rows.dilation * steps[2], columns.dilation // columns.stride * steps[3],
                 *steps[:2], rows.stride * steps[2], steps[3]),
            )  # fmt: skip
            self.copies.append((place, windows))
            return
        for p in range(rows.taps):
            begin = p * rows.dilation
            of_tap = slice(begin, begin + (count - 1) * rows.stride + 1, rows.stride)
            for q, (number, offset) in enumerate(taps):
                source = planes[number][:, :, of_tap, offset : offset + columns.count]
                self.copies.append((place[p, q], source))

    def __call__(self, x: Array) -> Array:
        """Return the columns of a block that reads these rows of some images."""
        for plane in self.zero:
            plane.fill(0)
        for cells, columns in self.inside:
            cells[...] = x[:, :, columns]
        if self.last is not None:
            self.last.fill(1)
        for target, source in self.copies:
            np.copyto(target, source)
        return self.whole


def _gathered(x: Array, axes: tuple[Axis, Axis], block: Block, dtype: Any, *, ones: bool) -> Array:
    """Return a block's columns, ``(taps * channels, outputs)``, with a row of ones at the end if asked."""
    (n0, n1), (first, last), _ = block
    low, high = axes[0].reads(first, last)
    r0, r1, rows = _span(axes[0].size, low, 1, high - low)
    shape, inside = (x.shape[-1], n1 - n0, last - first), (r0, r1)
    key = (axes, shape, inside, dtype, ones)
    gather = scratch.made(key, lambda: _Gather(axes, shape, inside, dtype, ones))
    columns: Array = gather(x[n0:n1, rows])
    return columns


def _zero_planes(
    axes: tuple[Axis, Axis], images: tuple[int, int], channels: int, dtype: Any, *, kept: bool
) -> Array:
    """Return zeros for all sets of columns, ``(sets, channels, images, rows, columns)``."""
    rows, columns = axes
    sets, _ = _column_sets(columns)
    low, high = rows.reads(0, rows.count)
    count = images[1] - images[0]
    shape = len(sets), channels, count, high - low, max(s.length for s in sets)
    if kept:
        return np.zeros(shape, dtype)
    planes = scratch.get("planes", shape, dtype)
    planes[...] = 0
    return planes


def _add_taps(whole: Array, axes: tuple[Axis, Axis], block: Block, planes: Array) -> None:
    """Add each tap's row of products to where it reads."""
    (n0, n1), (first, last), _ = block
    rows, columns = axes
    _, taps = _column_sets(columns)
    count = last - first
    place = whole.reshape(rows.taps, columns.taps, -1, n1 - n0, count, columns.count)
    for p in range(rows.taps):
        begin = first * rows.stride + p * rows.dilation
        of_tap = slice(begin, begin + (count - 1) * rows.stride + 1, rows.stride)
        for q, (number, offset) in enumerate(taps):
            cells = planes[number, :, :, of_tap, offset : offset + columns.count]
            np.add(cells, place[p, q], out=cells)


def _store_planes(planes: Array, axes: tuple[Axis, Axis], dx: Array) -> None:
    """Write the planes into ``(images, rows, columns, channels)``, without the padding."""
    rows, columns = axes
    sets, _ = _column_sets(columns)
    dx[...] = 0  # cells that no window reads
    low, high = rows.reads(0, rows.count)
    r0, r1, row_slice = _span(rows.size, low, 1, high - low)
    for number, found in enumerate(sets):
        u0, u1, column_slice = _span(columns.size, found.first, found.step, found.length)
        cells = planes[number][:, :, r0:r1, u0:u1]
        dx[:, row_slice, column_slice] = cells.transpose(1, 2, 3, 0)
