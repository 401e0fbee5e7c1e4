"""Which tile computes a product, and into how many parts its sum is divided: a model, no timing.

One table holds the tiles of ``kernels/conv_implicit_gemm.cu``; every variant is made from it. The
choice weighs what a tile saves (the larger, the fewer bytes and loads for each multiply-add)
against what it wastes: rows and columns beyond the edge, and SMs without a block in the last
wave. Where tiles are too few, the sum is divided; adding the parts up costs their bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuconv.cuda import prediction
from gpuconv.cuda.architecture import GPU, resident_blocks

__all__ = ["DEPTH", "TILES", "Choice", "Shape", "Tile", "choose"]

#: Elements of the sum that a tile holds at once (BK).
DEPTH = 8
#: Parts that a sum is divided into at most, and the elements a part has at least.
_PARTS, _LEAST = 64, 16 * DEPTH
#: Warps that an SM needs to hide the latency of its multiply-adds.
_WARPS = 8
#: Bytes that the L2 cache delivers for each that the memory does.
_L2 = 3.0
#: Clocks that a block's start and end take, of which those of blocks side by side hide nothing.
_FIXED = 2000


@dataclass(frozen=True)
class Tile:
    """A block's part of the result, and a thread's.

    Parameters
    ----------
    rows, columns : int
        Of a block (BM, BN).
    thread_rows, thread_columns : int
        Of a thread (TM, TN).
    blocks : int
        That an SM should hold, from 8.0 to 9.0; elsewhere a third less, as more registers are
        needed there.
    share : float
        Of the peak that the inner loop reaches: of its instructions, those that multiply.
    """

    rows: int
    columns: int
    thread_rows: int
    thread_columns: int
    blocks: int
    share: float

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.thread_rows * (self.columns // self.thread_columns)

    def registers(self, capability: int) -> int:
        """Return the registers that a thread may use, at a compute capability (times ten)."""
        blocks = self.blocks if 80 <= capability < 100 else max(1, self.blocks * 2 // 3)
        return min(255, 65536 // (blocks * self.threads) // 8 * 8)

    def shared(self, itemsize: int) -> int:
        """Return the bytes of shared memory of a block, at that many bytes an element."""
        width = self.rows + self.columns + 2 * (16 // itemsize)
        return 2 * DEPTH * width * itemsize + 8 * self.rows

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


_SINGLE = (
    Tile(128, 128, 8, 8, 2, 0.85),
    Tile(128, 64, 8, 8, 3, 0.80),
    Tile(64, 64, 8, 8, 6, 0.75),
    Tile(128, 32, 8, 4, 4, 0.65),
    Tile(32, 32, 4, 4, 8, 0.45),
)
_DOUBLE = (
    Tile(64, 64, 8, 4, 3, 0.85),
    Tile(64, 32, 4, 4, 4, 0.75),
    Tile(32, 32, 4, 4, 6, 0.65),
)
#: By dtype. 16-bit tensors are multiplied and added in float32.
TILES = {"float16": _SINGLE, "bfloat16": _SINGLE, "float32": _SINGLE, "float64": _DOUBLE}


@dataclass(frozen=True)
class Shape:
    """A product: ``count`` times ``rows`` by ``columns``, each element a sum of ``inner`` products.

    Parameters
    ----------
    count, rows, columns, inner : int
        ``count`` is that of channel groups times that of phases.
    dtype : str
    bytes : int
        Of both operands and the result, each once.
    divisible : bool
        Whether the sum may be divided among blocks.
    """

    count: int
    rows: int
    columns: int
    inner: int
    dtype: str
    bytes: int
    divisible: bool = True

    @property
    def sum_bytes(self) -> int:
        """Bytes of one part of the sums of all elements."""
        return self.count * self.rows * self.columns * (8 if self.dtype == "float64" else 4)


@dataclass(frozen=True)
class Choice:
    """A tile, the number of parts of its sum and the elements of each, and the predicted time."""

    tile: Tile
    parts: int
    length: int
    seconds: float


def _parts(shape: Shape, wanted: int) -> tuple[int, int]:
    """Return how many parts the sum falls into if ``wanted`` are asked for, and their length."""
    length = math.ceil(math.ceil(shape.inner / wanted) / DEPTH) * DEPTH
    return math.ceil(shape.inner / length), length


def _seconds(gpu: GPU, shape: Shape, tile: Tile, parts: int, length: int) -> float:
    """Return the predicted time of a product."""
    wide = 8 if shape.dtype == "float64" else 4
    small = 2 if shape.dtype in ("float16", "bfloat16") else wide
    blocks = shape.count * parts
    blocks *= math.ceil(shape.rows / tile.rows) * math.ceil(shape.columns / tile.columns)
    facts = gpu.architecture
    registers = tile.registers(facts.capability)
    held = max(1, resident_blocks(facts, tile.threads, registers, tile.shared(wide)))
    most = math.ceil(blocks / gpu.multiprocessors)  # that one SM computes
    warps = min(held, most) * tile.threads / 32
    lanes = facts.float64 if shape.dtype == "float64" else facts.float32
    rate = lanes * gpu.clock * tile.share * min(1.0, warps / _WARPS)
    block = tile.rows * tile.columns * length
    arithmetic = most * block / rate + math.ceil(most / held) * _FIXED / gpu.clock
    fetched = blocks * (tile.rows + tile.columns) * length * small
    cache = prediction.bytes_moved(gpu, fetched) / _L2
    memory = prediction.bytes_moved(gpu, shape.bytes)
    seconds = prediction.LAUNCH + max(arithmetic, cache, memory)
    if parts > 1:  # written, and read again by another kernel
        seconds += prediction.LAUNCH + prediction.bytes_moved(gpu, 2 * parts * shape.sum_bytes)
    return seconds


def choose(gpu: GPU, shape: Shape, limit: int) -> Choice:
    """Return the tile and the division of the sum that are predicted to be fastest.

    Parameters
    ----------
    gpu : GPU
    shape : Shape
    limit : int
        Bytes that the parts of the sum may take.
    """
    best: Choice | None = None
    for tile in TILES[shape.dtype]:
        tiles = math.ceil(shape.rows / tile.rows) * math.ceil(shape.columns / tile.columns)
        wanted = {1}
        if shape.divisible:
            most = min(_PARTS, shape.inner // _LEAST, limit // max(1, shape.sum_bytes))
            filling = 2 * tile.blocks * gpu.multiprocessors // (tiles * shape.count)
            wanted |= {n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= most}
            wanted |= {n for n in (filling, filling // 2) if 1 < n <= most}
        for count in sorted(wanted):
            parts, length = _parts(shape, count)
            seconds = _seconds(gpu, shape, tile, parts, length)
            if best is None or seconds < best.seconds:
                best = Choice(tile, parts, length, seconds)
    assert best is not None
    return best
