"""Which tile of ``kernels/conv_tensor_core.cu`` a product gets, and the time it should take.

A tile is good where many multiply-adds come with each byte, and bad where there are too few of
them to fill the device or much of the last ones hangs over. :func:`choose` weighs that by the
clocks of a step, counted from the table of :mod:`gpuconv.cuda.architecture`: the tensor cores'
work, the reads of shared memory, the copies into it, and the L2 cache behind them; and by waves:
how many blocks an SM holds, and how many rounds it takes until all have had their turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gpuconv.cuda import prediction
from gpuconv.cuda.architecture import GPU, Architecture, resident_blocks

__all__ = ["TILES", "Choice", "Product", "Tile", "choose", "divisions"]

#: Bytes of a row of a piece, along the depth.
DEPTH_BYTES = 64


@dataclass(frozen=True)
class Tile:
    """The part of a product that a block of threads computes.

    Parameters
    ----------
    rows, columns : int
    warp_rows, warp_columns : int
        The part of one warp.
    stages : int
        Pieces in shared memory at once, one of them in use.
    blocks : int
        Of an SM at once, at least: the compiler keeps the registers to that.
    narrow_blocks : int
        The same with copies of less than 16 bytes, which take more registers; 0: not with them.
    """

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    stages: int
    blocks: int
    narrow_blocks: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.rows // self.warp_rows * (self.columns // self.warp_columns)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    def stages_on(self, capability: int) -> int:
        """Return the pieces at once; copies before 8.0 overlap with nothing."""
        return self.stages if capability >= 80 else 2

    def shared_bytes(self, capability: int) -> int:
        """Return the bytes of shared memory."""
        return self.stages_on(capability) * (self.rows + self.columns) * DEPTH_BYTES

    def fits(self, product: Product) -> bool:
        """Return whether a thread's registers hold what the product needs."""
        if product.copy_bytes < 16:
            return self.narrow_blocks > 0
        return not product.crowded or self.blocks > 1

    def blocks_at_least(self, product: Product, capability: int) -> int:
        """Return how many blocks of an SM the registers are kept to.

        Fewer where more registers are needed: by offsets of 64 bits and a third axis, by TF32's
        pieces across the depth, which are read value by value, and by copies before 8.0.
        """
        blocks = self.blocks if product.copy_bytes == 16 else self.narrow_blocks
        if product.crowded:
            return max(1, blocks // 2)
        more = capability < 80 or (product.itemsize == 4 and product.pass_ == "weight_grad")
        return max(1, blocks - more)


#: The first is the best per byte, the last the best for little work.
TILES = (
    Tile(256, 128, 64, 64, 3, 1, 0),
    Tile(128, 128, 64, 32, 4, 2, 1),
    Tile(128, 64, 64, 32, 4, 3, 0),
    Tile(64, 64, 32, 32, 4, 4, 4),
    Tile(128, 32, 32, 32, 4, 4, 0),
    Tile(64, 32, 32, 16, 4, 6, 4),
)


@dataclass(frozen=True)
class Product:
    """A pass as products of matrices; see the head of ``conv_tensor_core.cu``.

    Parameters
    ----------
    pass_ : str
    itemsize : int
        Bytes of a value: 2, or 4 for TF32.
    copy_bytes : int
        Of one copy into shared memory: 16, 8 or 4.
    rows, columns, depth : int
        Of one product.
    count : int
        Number of products: groups, and for the gradient of the input the phases of its stride.
    results : int
        Values written, over all of them.
    bytes : int
        Fewest bytes that device memory sees.
    crowded : bool
        Whether addresses take more registers: there are three axes, or offsets of 64 bits.
    """

    pass_: str
    itemsize: int
    copy_bytes: int
    rows: int
    columns: int
    depth: int
    count: int
    results: int
    bytes: int
    crowded: bool = False


@dataclass(frozen=True)
class Choice:
    """A tile, into how many parts the depth is divided, and the predicted time in seconds."""

    tile: Tile
    splits: int
    seconds: float


#: Clocks of a block before its first step and behind its last, of a step that nothing hides, and
#: bytes a clock that an SM gets from the L2 cache and from its shared memory.
_AROUND, _LATENCY, _L2, _SHARED = 2000.0, 120.0, 32.0, 128.0


def _tensor_rate(a: Architecture, itemsize: int) -> float:
    """Return the multiply-adds a clock that ``mma.sync`` reaches.

    From 9.0 on the full rate belongs to other instructions: on an H100 ``mma.sync`` was measured
    at 62% of it (Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture",
    2024); for 10.0 the rate of an A100 is assumed.
    """
    rate = a.tensor16 if itemsize == 2 else a.tensor_tf32
    return rate * {90: 0.62, 100: 0.25}.get(a.capability, 1.0)


def _up(value: int, by: int) -> int:
    return -(-value // by)


def _seconds(gpu: GPU, product: Product, tile: Tile, splits: int) -> float:
    a = gpu.architecture
    blocks = _up(product.rows, tile.rows) * _up(product.columns, tile.columns)
    blocks *= product.count * splits
    depth = DEPTH_BYTES // product.itemsize
    steps = _up(_up(product.depth, depth), splits)
    # Clocks of a step.
    brought = (tile.rows + tile.columns) * DEPTH_BYTES
    tensor = tile.rows * tile.columns * depth / _tensor_rate(a, product.itemsize)
    read = tile.warps * (tile.warp_rows + tile.warp_columns) * DEPTH_BYTES / _SHARED
    copied = brought / 32 / product.copy_bytes * max(4.0, product.copy_bytes * 32 / _SHARED)
    clocks = max(tensor, read + copied, brought / _L2)
    blocks_at_least = tile.blocks_at_least(product, gpu.capability)
    registers = min(255, a.registers // (blocks_at_least * tile.threads))
    shared = tile.shared_bytes(gpu.capability)
    resident = max(1, resident_blocks(a, tile.threads, registers, shared))

    def wave(together: int) -> float:
        return _AROUND + steps * max(together * clocks, clocks + _LATENCY)

    full, rest = divmod(blocks, gpu.multiprocessors * resident)
    total = full * wave(resident)
    if rest:
        total += wave(_up(rest, gpu.multiprocessors))
    memory = prediction.bytes_moved(gpu, product.bytes)
    seconds = prediction.LAUNCH + max(total / gpu.clock, memory)
    if splits > 1:
        # Written and read once, from the L2 cache where it holds them.
        partial = 8 * product.results * splits
        near = 3 if partial < gpu.l2_bytes else 1
        seconds += prediction.LAUNCH + prediction.bytes_moved(gpu, partial) / near
    return seconds


def divisions(product: Product, room: int) -> Iterator[int]:
    """Yield the numbers of splits worth a thought, whose sums fit ``room`` bytes."""
    yield 1
    most = min(product.depth * product.itemsize // (4 * DEPTH_BYTES), 512)
    if product.results:
        most = min(most, room // (4 * product.results))
    base = 2
    while base <= most:
        yield base
        if base >= 2 and base + base // 2 <= most and base + base // 2 > base:
            yield base + base // 2
        base *= 2


def usable(gpu: GPU, product: Product) -> list[Tile]:
    """Return the tiles that a device has the shared memory for."""
    return [
        tile
        for tile in TILES
        if tile.fits(product)
        and tile.shared_bytes(gpu.capability) <= gpu.architecture.shared_per_block
    ]


@lru_cache(maxsize=4096)
def choose(gpu: GPU, product: Product, room: int) -> Choice:
    """Return the tile and the splits of the least predicted time.

    Parameters
    ----------
    gpu : GPU
    product : Product
    room : int
        Bytes that the sums of splits may take.
    """
    found = (
        Choice(tile, splits, _seconds(gpu, product, tile, splits))
        for tile in usable(gpu, product)
        for splits in divisions(product, room)
    )
    return min(found, key=lambda c: c.seconds)
