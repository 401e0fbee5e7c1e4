"""Which tile of ``kernels/conv_wgmma.cu`` a product gets, and the time it should take.

The clocks of a step are counted as in :mod:`gpuconv.cuda.tensor_tiles`, so that the two variants
can be held against each other. The difference: products read their operands from shared memory
themselves, each of 64 rows the whole width of the tile; and no thread has to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gpuconv.cuda import prediction, tensor_tiles
from gpuconv.cuda.architecture import GPU, resident_blocks
from gpuconv.cuda.tensor_tiles import Product

__all__ = ["CAPABILITY", "DEPTH_BYTES", "TILES", "Choice", "Tile", "choose"]

#: The one compute capability, times ten, that has these instructions.
CAPABILITY = 90
#: Bytes of a row of a piece, along the depth or across it.
DEPTH_BYTES = 128


@dataclass(frozen=True)
class Tile:
    """The part of a product that a block of threads computes.

    Parameters
    ----------
    rows, columns : int
    consumers : int
        Warpgroups that multiply, each as many rows; a warp more asks for copies.
    stages : int
        Pieces in shared memory at once.
    blocks : int
        Of an SM at once.
    """

    rows: int
    columns: int
    consumers: int
    stages: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.consumers + 32

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory: pieces, and two barriers each."""
        return self.stages * ((self.rows + self.columns) * DEPTH_BYTES + 16)


#: The first are the best per byte, the last the best for little work.
TILES = (
    Tile(128, 256, 2, 4, 1),
    Tile(256, 128, 2, 4, 1),
    Tile(128, 128, 2, 3, 2),
    Tile(256, 64, 2, 5, 1),
    Tile(128, 64, 2, 4, 2),
    Tile(64, 128, 1, 4, 2),
    Tile(64, 64, 1, 4, 3),
)


@dataclass(frozen=True)
class Choice:
    """A tile, into how many parts the depth is divided, and the predicted time in seconds."""

    tile: Tile
    splits: int
    seconds: float


#: Clocks of a block before its first step and behind its last, of a step that nothing hides, and
#: bytes a clock that an SM gets from the L2 cache and from its shared memory.
_AROUND, _LATENCY, _L2, _SHARED = 2000.0, 60.0, 32.0, 128.0
#: Of the peak, measured on an H100 with operands in shared memory (Luo et al., "Benchmarking and
#: Dissecting the Nvidia Hopper GPU Architecture", 2024).
_SHARE = 0.95


def _up(value: int, by: int) -> int:
    return -(-value // by)


def _seconds(gpu: GPU, product: Product, tiles_m: int, tile: Tile, splits: int) -> float:
    a = gpu.architecture
    depth = DEPTH_BYTES // product.itemsize
    rate = _SHARE * (a.tensor16 if product.itemsize == 2 else a.tensor_tf32)
    blocks = tiles_m * _up(product.columns, tile.columns) * product.count * splits
    steps = _up(product.depth // depth, splits)
    brought = (tile.rows + tile.columns) * DEPTH_BYTES
    tensor = tile.rows * tile.columns * depth / rate
    read = tile.rows // 64 * (64 + tile.columns) * DEPTH_BYTES / _SHARED
    clocks = max(tensor, read + brought / _SHARED, brought / _L2)
    registers = min(255, a.registers // (tile.blocks * tile.threads) // 8 * 8)
    resident = max(1, resident_blocks(a, tile.threads, registers, tile.shared_bytes))

    def wave(together: int) -> float:
        return _AROUND + steps * max(together * clocks, clocks + _LATENCY)

    full, rest = divmod(blocks, gpu.multiprocessors * resident)
    total = full * wave(resident)
    if rest:
        total += wave(_up(rest, gpu.multiprocessors))
    memory = prediction.bytes_moved(gpu, product.bytes)
    seconds = prediction.LAUNCH + max(total / gpu.clock, memory)
    if splits > 1:
        partial = 8 * product.results * splits
        near = 3 if partial < gpu.l2_bytes else 1
        seconds += prediction.LAUNCH + prediction.bytes_moved(gpu, partial) / near
    return seconds


@lru_cache(maxsize=4096)
def choose(gpu: GPU, product: Product, rows: tuple[int, ...], room: int) -> Choice:
    """Return the tile and the splits of the least predicted time.

    Parameters
    ----------
    gpu : GPU
    product : Product
        Its depth whole steps.
    rows : tuple of int
        Of each product of a launch: one, or one a phase of a stride.
    room : int
        Bytes that the sums of splits may take.
    """
    found = (
        Choice(tile, splits, _seconds(gpu, product, tiles_m, tile, splits))
        for tile in TILES
        for tiles_m in [sum(_up(n, tile.rows) for n in rows)]
        for splits in tensor_tiles.divisions(product, room)
    )
    return min(found, key=lambda c: c.seconds)
