"""What an NVIDIA GPU can do: facts by compute capability, and occupancy from them.

The numbers are those of the tables "Compute Capabilities" and "Arithmetic Instructions" of the
CUDA C++ Programming Guide, and for tensor cores of the architectures' white papers. Engines
choose tiles by them, without timing; nothing here imports CuPy unless a device is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, cached_property

from gpuconv.cuda import runtime

__all__ = [
    "ARCHITECTURES",
    "GPU",
    "Architecture",
    "architecture",
    "forget",
    "gpu",
    "resident_blocks",
]

_KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """Resources of one multiprocessor (SM).

    Parameters
    ----------
    capability : int
        Compute capability times ten: 90 is 9.0.
    warps, blocks, registers : int
        That an SM holds at once.
    shared, shared_per_block : int
        Bytes of shared memory of an SM, and that one block may ask for.
    float32, float64 : int
        Multiply-adds a clock outside the tensor cores.
    tensor16, tensor_tf32 : int
        Multiply-adds a clock of the tensor cores with float32 sums, of 16-bit and TF32
        operands; 0 where there are none. bfloat16 and TF32 come with 8.0.
    """

    capability: int
    warps: int
    blocks: int
    registers: int
    shared: int
    shared_per_block: int
    float32: int
    float64: int
    tensor16: int
    tensor_tf32: int


#: In the order of capability. Where a GPU is between two, the older one's facts are taken.
ARCHITECTURES = tuple(
    Architecture(
        capability, warps, blocks, 65536, shared * _KIB, per_block * _KIB, f32, f64, f16, tf32
    )
    for capability, warps, blocks, shared, per_block, f32, f64, f16, tf32 in (
        (70, 64, 32, 96, 96, 64, 32, 512, 0),
        (75, 32, 16, 64, 64, 64, 2, 512, 0),
        (80, 64, 32, 164, 163, 64, 32, 1024, 512),
        (86, 48, 16, 100, 99, 128, 2, 512, 256),
        (89, 48, 24, 100, 99, 128, 2, 512, 256),
        (90, 64, 32, 228, 227, 128, 64, 2048, 1024),
        (100, 64, 32, 228, 227, 128, 64, 4096, 2048),
        (120, 48, 24, 100, 99, 128, 2, 512, 256),
    )
)


@dataclass(frozen=True)
class GPU:
    """One device: its architecture, and how much of it there is.

    Parameters
    ----------
    architecture : Architecture
    capability : int
        Its own compute capability, times ten.
    multiprocessors : int
    clock : float
        Of the multiprocessors, in Hz.
    bandwidth : float
        Of the device memory, in bytes a second.
    l2_bytes : int
    """

    architecture: Architecture
    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float
    l2_bytes: int

    def __hash__(self) -> int:
        # Worked out once: every call looks for what was planned with these facts.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def flops(self, dtype: str, tensor_cores: bool = False) -> float:
        """Return the peak in floating-point operations a second (a multiply-add counts two).

        16-bit types outside the tensor cores are computed in float32; float32 on the tensor
        cores is TF32.
        """
        a = self.architecture
        if tensor_cores and dtype != "float64":
            lanes = a.tensor_tf32 if dtype == "float32" else a.tensor16
        else:
            lanes = a.float64 if dtype == "float64" else a.float32
        return 2.0 * lanes * self.multiprocessors * self.clock


def architecture(capability: int) -> Architecture:
    """Return the facts of a compute capability (times ten).

    Raises
    ------
    ValueError
        If it is below 7.0.
    """
    known = [a for a in ARCHITECTURES if a.capability <= capability]
    if not known:
        raise ValueError(
            f"compute capability is {capability / 10}; the kernels are written for 7.0 and later"
        )
    return known[-1]


@cache
def _gpu(device: int) -> GPU:
    handle = runtime.cupy().cuda.Device(device)
    facts = handle.attributes
    capability = int(handle.compute_capability)
    # kHz; double data rate; bits. Drivers that hide a number get a middling one.
    clock = 1e3 * (facts.get("ClockRate") or 1_500_000)
    memory = 1e3 * (facts.get("MemoryClockRate") or 2_000_000)
    return GPU(
        architecture(max(capability, ARCHITECTURES[0].capability)),
        capability,
        int(facts["MultiProcessorCount"]),
        clock,
        2 * memory * (facts.get("GlobalMemoryBusWidth") or 2048) / 8,
        int(facts.get("L2CacheSize") or 4 << 20),
    )


def gpu(device: int | None = None) -> GPU:
    """Return the facts of a device; of the current one if None."""
    if device is None:
        device = int(runtime.cupy().cuda.runtime.getDevice())
    return _gpu(device)


def forget() -> None:
    """Ask the devices again (another module stands in for CuPy)."""
    _gpu.cache_clear()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def resident_blocks(a: Architecture, threads: int, registers: int, shared: int) -> int:
    """Return how many blocks of a kernel an SM holds at once; 0 if not even one.

    Registers are given to warps by 256, shared memory to blocks by 128 bytes; from 8.0 on the
    system keeps 1 KiB of each block's (CUDA occupancy calculator).

    Parameters
    ----------
    a : Architecture
    threads : int
        Of a block.
    registers : int
        Of a thread.
    shared : int
        Bytes of a block, static and dynamic.
    """
    warps = _up(threads, 32) // 32
    most = min(a.blocks, a.warps // warps)
    if registers:
        most = min(most, a.registers // _up(32 * registers, 256) // warps)
    if shared > a.shared_per_block:
        return 0
    taken = _up(shared, 128) + (_KIB if a.capability >= 80 else 0)
    return min(most, a.shared // taken) if taken else most
