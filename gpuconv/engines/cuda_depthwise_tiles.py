"""How the depthwise kernels cut their work, what that moves, and how long it takes.

A thread has ``vector`` channels, ``columns`` outputs along a row and ``strip`` rows of them.
Larger tiles read less twice, and need more registers; smaller ones are more threads. The
choice is the least predicted time, from counts (:func:`traffic`) and the device's rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gpuconv.cuda import prediction
from gpuconv.cuda.architecture import GPU, resident_blocks
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.cuda_arrays import three
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = [
    "THREADS",
    "Geometry",
    "Groups",
    "Tile",
    "Traffic",
    "best_tile",
    "blocks_at_once",
    "groups",
    "predicted",
    "tiles",
    "traffic",
]

#: Of a block; as in the kernels.
THREADS = 128
#: Registers that a tile may need, and those that its sums may.
_MOST_REGISTERS, _MOST_SUMS = 168, 112
#: Sums of the least tile of an input gradient.
_MOST_SCATTERED = 64
#: Of a thread beside its tile: addresses, sizes, loops.
_OTHER_REGISTERS = 36
#: Values of weights that stay in registers; as in the kernels.
_KEPT = 64
#: Multiply-adds in the text of a loop: beyond, it leaves the instruction cache.
_MOST_TEXT = 1600
#: Columns whose places in the row are kept as bits.
_MOST_COLUMNS = 32
#: Bytes on their way to an SM that keep the memory busy (latency times bandwidth).
_IN_FLIGHT = 40_000
#: Bytes a clock between a multiprocessor and its L1 cache.
_L1_BYTES = 128
#: Instructions of a thread beside its rows: its place, borders, weights.
_PER_THREAD = 200

_Axes = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """A depthwise problem over slices, rows and columns.

    One axis is taken for the rows, which the window slides along; channels first for the
    columns, which lie side by side.
    """

    ndim: int
    channels_first: bool
    multiplier: int
    kernel: _Axes
    stride: _Axes
    dilation: _Axes
    in_shape: _Axes
    out_shape: _Axes
    before: _Axes

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(problem: ConvProblem) -> Geometry:
        """Return that of a problem."""
        first = problem.layout == CHANNELS_FIRST

        def axes(values: tuple[int, ...], fill: int) -> _Axes:
            if problem.ndim == 1 and not first:
                values = (*values, fill)
            depth, row, column = three(values, fill)
            return depth, row, column

        return Geometry(
            problem.ndim,
            first,
            problem.out_channels // problem.in_channels,
            axes(problem.kernel, 1),
            axes(problem.stride, 1),
            axes(problem.dilation, 1),
            axes(problem.in_shape, 1),
            axes(problem.out_shape, 1),
            axes(tuple(before for before, _ in problem.padding), 0),
        )

    @property
    def scatters(self) -> bool:
        """Whether rows of ``dy`` can be scattered into sums in registers.

        No axis of a plane has both a stride and a dilation, and there are few enough sums.
        """
        single = all(1 in pair for pair in zip(self.stride[1:], self.dilation[1:], strict=True))
        return single and max(self.kernel[1], self.stride[1]) * self.stride[2] <= _MOST_SCATTERED

    def reached(self, axis: int) -> tuple[int, int]:
        """Return the first and the last group of ``stride * dilation`` cells in the input."""
        size, before = self.in_shape[axis], self.before[axis]
        step = self.stride[axis] * self.dilation[axis]
        return before // step, (size - 1 + before) // step

    def live(self, axis: int) -> int:
        """Return how many outputs' windows hold one input."""
        return -(-self.kernel[axis] // self.stride[axis])

    def extent(self, axis: int, pass_: Pass) -> int:
        """Return how many places of one remainder by the dilation there are to cut up."""
        if pass_ == "input_grad":
            first, last = self.reached(axis)
            return last - first + 1
        return -(-self.out_shape[axis] // self.dilation[axis])


@dataclass(frozen=True)
class Tile:
    """What a thread has.

    Parameters
    ----------
    vector : int
        Channels.
    columns : int
        Outputs along a row; gradients of the input: as many of dy, ``stride`` times of dx.
    strip : int
        Rows.
    unroll : int
        Rows in the text of the loop.
    loaded, phase, stored : int
        Channels first: columns of a load, how far it begins before the first that is needed,
        and columns of a store (weight gradients: of a load of ``dy``).
    """

    vector: int
    columns: int
    strip: int
    unroll: int
    loaded: int = 1
    phase: int = 0
    stored: int = 1


def blocks_at_once(problem: ConvProblem, pass_: Pass, tile: Tile) -> int:
    """Return how many blocks an SM should hold, which tells the compiler the registers to use."""
    _, registers = _registers(problem, pass_, tile)
    return max(1, min(8, 65536 // (THREADS * (registers + registers // 3))))


@dataclass(frozen=True)
class Groups:
    """How a problem is cut into tiles.

    Parameters
    ----------
    strips, tiles : int
        Of one remainder by the dilations.
    runs_of : int
        Vectors of channels that neighbours take.
    threads : int
    across, lanes, shares, share : int
        Weight gradients: blocks and threads along the channels, blocks along the rest, and
        the places of each.
    """

    strips: int
    tiles: int
    runs_of: int
    threads: int
    across: int = 0
    lanes: int = 1
    shares: int = 1
    share: int = 0


def _run(vectors: int) -> int:
    """Return the vectors of channels that neighbouring threads take: 512 bytes, or all of them."""
    if vectors <= 32:
        return vectors
    most = max(d for d in range(1, 33) if vectors % d == 0)
    return most if most >= 8 else vectors


def _pieces(problem: ConvProblem, pass_: Pass, tile: Tile) -> tuple[int, int, int]:
    """Return the strips, the tiles, and how many places of tiles there are for each channel."""
    g = Geometry.of(problem)
    strips = -(-g.extent(1, pass_) // tile.strip)
    across = -(-g.extent(2, pass_) // tile.columns)
    slices = (g.in_shape if pass_ == "input_grad" else g.out_shape)[0]
    places = problem.batch * slices * strips * g.dilation[1] * across * g.dilation[2]
    return strips, across, places


def _threads(problem: ConvProblem, pass_: Pass, tile: Tile) -> int:
    channels = problem.in_channels if pass_ == "input_grad" else problem.out_channels
    return _pieces(problem, pass_, tile)[2] * channels // tile.vector


@lru_cache(maxsize=4096)
def groups(problem: ConvProblem, pass_: Pass, tile: Tile, device: GPU) -> Groups:
    """Return how a pass is cut."""
    g = Geometry.of(problem)
    strips, across, places = _pieces(problem, pass_, tile)
    channels = problem.in_channels if pass_ == "input_grad" else problem.out_channels
    vectors = channels // tile.vector
    run = 1 if g.channels_first else _run(vectors)
    if pass_ != "weight_grad":
        return Groups(strips, across, run, places * vectors)
    lanes = 1 if g.channels_first else min(32, 1 << (vectors - 1).bit_length())
    blocks, down = -(-vectors // lanes), THREADS // lanes
    bytes_of_row = math.prod(problem.w_shape) * (8 if problem.itemsize == 8 else 4)
    most = min(Engine.workspace_limit() // bytes_of_row, problem.bytes // (4 * bytes_of_row))
    wanted = -(-4 * device.multiprocessors // (blocks * g.kernel[0]))
    shares = max(1, min(wanted, most, -(-places // down), 65535))
    share = -(-places // shares)
    shares = -(-places // share)
    return Groups(strips, across, run, places * vectors, blocks, lanes, shares, share)


# ------------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class Traffic:
    """Bytes that the threads of a launch ask for, each access counted.

    Attributes
    ----------
    images, weights, written : int
        Read of the images and of the weights, and written (without sums of strips).
    """

    images: int
    weights: int
    written: int


def _cells(first: int, count: int, step: int, size: int) -> int:
    """Return how many of ``first, first + step, ...`` lie in ``range(size)``."""
    low = max(0, -(first // step))
    high = min(count, -(-(size - first) // step))
    return max(0, high - low)


def _read_rows(g: Geometry, pass_: Pass, strip: int) -> int:
    """Return the rows of the image (``x``; ``dy`` for its gradient) that all strips read."""
    k, s, d, size = g.kernel[1], g.stride[1], g.dilation[1], g.in_shape[1]
    total = 0
    for remainder in range(d):
        if pass_ == "input_grad":
            first, last = g.reached(1)
            lead = g.live(1) - 1
            for begin in range(first, last + 1, strip):
                count = min(strip, last + 1 - begin) + lead
                total += _cells(remainder + d * (begin - lead), count, d, g.out_shape[1])
            continue
        outputs = -(-(g.out_shape[1] - remainder) // d)
        for begin in range(0, outputs, strip):
            count = min(strip, outputs - begin)
            at = remainder * s - g.before[1] + d * begin * s
            if s > k:  # rows that no window holds are left out
                total += sum(_cells(at + d * i * s, k, d, size) for i in range(count))
            else:
                total += _cells(at, (count - 1) * s + k, d, size)
    return total


def _read_columns(g: Geometry, pass_: Pass, tile: Tile) -> int:
    """Return the columns of a row of the image that all tiles read."""
    s, d, p = g.stride[2], g.dilation[2], tile.loaded
    tiles = -(-g.extent(2, pass_) // tile.columns)
    loads = -(-(tile.phase + _columns(g, pass_, tile.columns)) // p)
    total = 0
    for remainder in range(d):
        for begin in range(0, tiles * tile.columns, tile.columns):
            if pass_ == "input_grad":
                first = remainder + d * (g.reached(2)[0] + begin - (g.live(2) - 1))
                size = g.out_shape[2]
            else:
                first = (remainder + d * begin) * s - g.before[2]
                size = g.in_shape[2]
            total += p * _cells(first - tile.phase, loads, p * d, size)
    return total


def _depth_pairs(g: Geometry) -> int:
    """Return the pairs of output slices and taps that lie in the input."""
    k, s, d = g.kernel[0], g.stride[0], g.dilation[0]
    return sum(_cells(h * s - g.before[0], k, d, g.in_shape[0]) for h in range(g.out_shape[0]))


def _kept(problem: ConvProblem, tile: Tile) -> bool:
    """Return whether a thread's weights stay in registers."""
    g = Geometry.of(problem)
    words = g.kernel[1] * g.kernel[2] * tile.vector * (2 if problem.itemsize == 8 else 1)
    return g.kernel[0] == 1 and words <= _KEPT


@lru_cache(maxsize=4096)
def traffic(problem: ConvProblem, pass_: Pass, tile: Tile) -> Traffic:
    """Return what a launch moves; exact, but for weights that lie in registers or come per row."""
    g = Geometry.of(problem)
    rows, columns = _read_rows(g, pass_, tile.strip), _read_columns(g, pass_, tile)
    each = problem.batch * problem.out_channels * problem.itemsize
    images = each * _depth_pairs(g) * rows * columns
    taps = g.kernel[1] * g.kernel[2]
    kept = _kept(problem, tile)
    per_thread = taps * (1 if kept else g.kernel[0] * tile.strip)
    if pass_ == "weight_grad":
        images += each * _depth_pairs(g) * g.out_shape[1] * g.out_shape[2]
        return Traffic(images, 0, problem.itemsize * math.prod(problem.w_shape))
    weights = _threads(problem, pass_, tile) * per_thread * tile.vector * problem.itemsize
    shape = problem.x_shape if pass_ == "input_grad" else problem.y_shape
    return Traffic(images, weights, problem.itemsize * math.prod(shape))


# ------------------------------------------------------------------------------- time and choice


def _registers(problem: ConvProblem, pass_: Pass, tile: Tile) -> tuple[int, int]:
    """Return the registers for sums, and for all that a thread holds."""
    g = Geometry.of(problem)
    word = 2 if problem.itemsize == 8 else 1
    taps, columns = g.kernel[1] * g.kernel[2], _columns(g, pass_, tile.columns)
    raw = max(1, problem.itemsize * tile.vector // 4)
    if pass_ == "forward":
        sums = g.live(1) * tile.columns
    elif pass_ == "input_grad":
        sums = max(g.kernel[1], g.stride[1]) * tile.columns * g.stride[2]
    else:
        sums = taps + -(-g.live(1) * tile.columns * raw // (tile.vector * word))
    held = sums + columns
    if pass_ != "weight_grad":
        held += taps if _kept(problem, tile) else g.kernel[2]
    return sums * tile.vector * word, held * tile.vector * word + _OTHER_REGISTERS


def _columns(g: Geometry, pass_: Pass, columns: int) -> int:
    """Return the columns that a thread loads for a row."""
    if pass_ == "input_grad":
        return columns + g.live(2) - 1
    return (columns - 1) * g.stride[2] + g.kernel[2]


def _along_columns(
    g: Geometry, pass_: Pass, columns: int, most: int, source_row: int, target_row: int
) -> tuple[int, int, int]:
    """Return columns of a load, its phase, and columns of a store, channels first."""
    if g.dilation[2] > 1 or not g.channels_first:
        return 1, 0, 1
    step, first = g.stride[2], -g.before[2]
    wanted = 0  # the first column that is written
    if pass_ == "input_grad":
        first, step = g.reached(2)[0] - (g.live(2) - 1), 1
        wanted = g.reached(2)[0] * g.stride[2] - g.before[2]
    loaded = stored = most
    while source_row % loaded or columns * step % loaded:
        loaded //= 2
    outputs = columns * g.stride[2] if pass_ == "input_grad" else columns
    while target_row % stored or outputs % stored or wanted % stored:
        stored //= 2
    return loaded, first % loaded, stored


def tiles(problem: ConvProblem, pass_: Pass, most_vector: int) -> Iterator[Tile]:
    """Yield the tiles that fit the registers and the instruction cache."""
    g = Geometry.of(problem)
    rows_of = (g.out_shape[2], g.in_shape[2])
    source_row, target_row = rows_of if pass_ == "input_grad" else rows_of[::-1]
    wide = g.channels_first or g.multiplier > 1
    channels = problem.in_channels
    vectors = [1] if wide else [v for v in (8, 4, 2, 1) if v <= most_vector and channels % v == 0]
    rows, across = g.extent(1, pass_), g.extent(2, pass_)
    lengths = sorted({-(-rows // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 1024)})
    text = g.kernel[1] * g.kernel[2]
    for vector in vectors:
        for columns in (1, 2, 4, 8, 16) if g.channels_first else (1, 2, 3, 4, 5, 6, 7, 8):
            if (columns > 1 and columns >= 2 * across) or _columns(
                g, pass_, columns
            ) > _MOST_COLUMNS:
                continue
            probe = Tile(vector, columns, 1, 1)
            sums, held = _registers(problem, pass_, probe)
            least = vector == columns == 1
            if not least and (sums > _MOST_SUMS or held > _MOST_REGISTERS):
                continue
            if not least and text * vector * columns > _MOST_TEXT:
                continue
            # As many rows as sums wait: then none of them moves from register to register.
            turns = max(g.live(1), 4 if text * vector * columns <= 16 else 1)
            unroll = turns if text * vector * columns * turns <= _MOST_TEXT else 1
            most = most_vector if g.channels_first else 1
            more = _along_columns(g, pass_, columns, most, source_row, target_row)
            for strip in lengths:
                yield Tile(vector, columns, strip, unroll, *more)


def predicted(problem: ConvProblem, pass_: Pass, tile: Tile, device: GPU) -> float:
    """Return the seconds of a pass: the longest of memory, L1 cache and arithmetic."""
    g, cut = Geometry.of(problem), groups(problem, pass_, tile, device)
    moved = traffic(problem, pass_, tile)
    a, count = device.architecture, device.multiprocessors
    _, registers = _registers(problem, pass_, tile)
    blocks = max(1, -(-cut.threads // THREADS))
    if pass_ == "weight_grad":
        blocks = cut.across * cut.shares * g.kernel[0]
    resident = max(1, resident_blocks(a, THREADS, min(255, registers), 0))
    busy = min(blocks, resident * count) * THREADS / count
    per_thread = _columns(g, pass_, tile.columns) * tile.vector * problem.itemsize
    if pass_ == "weight_grad":
        per_thread += tile.columns * tile.vector * problem.itemsize
    flight = busy * per_thread * min(tile.unroll, 4)
    # Beside what must move, an eighth of what is read again is taken to miss the caches; the
    # sums of strips are written and read.
    least = problem.bytes
    again = max(0, moved.images + moved.written - least)
    if pass_ == "weight_grad" and cut.shares > 1:
        again += 16 * cut.shares * math.prod(problem.w_shape) * max(4, problem.itemsize)
    memory = prediction.bytes_moved(device, least + again / 8) / min(1.0, flight / _IN_FLIGHT)
    spread = min(1.0, blocks / count)
    # Of the lines that a warp asks for at once, the part that it needs.
    narrow = 32 * tile.vector * tile.loaded * problem.itemsize
    apart = max(1, tile.columns * g.stride[2] // tile.loaded) if g.channels_first else 1
    cache = ((moved.images + moved.written) * apart + moved.weights) / (
        min(_L1_BYTES, narrow) * device.clock * count * spread
    )
    padded = cut.tiles * tile.columns / g.extent(2, pass_)
    lead = (tile.strip + g.live(1) - 1) / tile.strip if pass_ == "forward" else 1.0
    hidden = min(1.0, busy / 256)
    arithmetic = problem.flops * padded * lead / device.flops(problem.dtype)
    # Beside the multiply-adds: loads with their borders, stores, and for 16-bit types and weights
    # that come from the cache, conversions.
    steps = tile.strip + g.live(1) - 1
    columns, taps = _columns(g, pass_, tile.columns), g.kernel[1] * g.kernel[2]
    step = 4 * (tile.phase + columns) / tile.loaded * min(g.stride[1], g.kernel[1])
    step += 3 * tile.columns
    narrowed = tile.vector if problem.itemsize == 2 else 0
    step += narrowed * (columns + tile.columns)
    if pass_ != "weight_grad" and not _kept(problem, tile):
        step += taps * (2 + narrowed)
    each = _PER_THREAD + steps * step
    arithmetic += cut.threads * each / (128 * count * device.clock)
    arithmetic /= spread * hidden
    launches = 1 if pass_ != "weight_grad" or cut.shares == 1 else 2
    at_once = resident * count
    tail = 1 / prediction.wave_share(blocks, at_once) if blocks > at_once else 1.0
    return launches * prediction.LAUNCH + max(memory, cache, arithmetic) * min(tail, 1.5)


@lru_cache(maxsize=4096)
def best_tile(problem: ConvProblem, pass_: Pass, most_vector: int, device: GPU) -> Tile:
    """Return the tile of the least predicted time with vectors of at most ``most_vector``."""
    g = Geometry.of(problem)
    if pass_ == "input_grad" and not g.scatters:
        vector = 1 if g.channels_first or g.multiplier > 1 else most_vector
        while problem.in_channels % vector:
            vector //= 2
        return Tile(vector, 1, 1, 1)
    found = tiles(problem, pass_, most_vector)
    return min(found, key=lambda tile: predicted(problem, pass_, tile, device))
