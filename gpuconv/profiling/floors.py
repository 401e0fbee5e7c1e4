"""What the machine can do at most, measured: operations a second, bytes a second.

A time over the *floor*, the larger of FLOPs over the one and bytes over the other, is what there
is to gain. What stays in a cache, or is computed with fewer operations than the definition's
(Winograd), can be faster than it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpuconv.cuda import runtime
from gpuconv.device import Device
from gpuconv.dtypes import known_dtype
from gpuconv.products import product
from gpuconv.profiling.timing import EventClock, best

__all__ = ["Floors", "measure", "measure_cpu"]

#: Bytes of each of the two buffers that are copied, a thread.
COPIED = 64 * 2**20

#: What engines on the CPU compute half precision in: BLAS has none.
_WIDE = {"float16": "float32", "bfloat16": "float32"}


@dataclass(frozen=True)
class Floors:
    """A machine's measured limits.

    Attributes
    ----------
    peak : dict of float
        FLOP/s of a large matrix product, by dtype.
    bandwidth : float
        Bytes/s of a large copy, read plus written.
    """

    peak: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """Return the least time for so many operations and bytes; 0 where it is not known."""
        peak = self.peak.get(dtype, 0.0)
        return max(flops / peak if peak else 0.0, moved / self.bandwidth if self.bandwidth else 0.0)


def measure_cpu(dtypes: Iterable[str], threads: int, seconds: float = 0.5) -> Floors:
    """Measure BLAS's best FLOP/s in each dtype, and the memory's bytes/s.

    BLAS uses as many threads as it is set to; the copy uses ``threads``.
    """
    peak: dict[str, float] = {}
    for dtype in dtypes:
        n = 2048 if seconds >= 0.3 else 1024
        wide = _WIDE.get(dtype, dtype)
        if wide in peak:
            peak[dtype] = peak[wide]
            continue
        a = np.random.default_rng(0).standard_normal((n, n)).astype(wide)
        b, out = a.T.copy(), np.empty_like(a)
        shortest = best(lambda a=a, b=b, out=out: np.matmul(a, b, out=out), seconds)  # type: ignore[misc]
        peak[dtype] = peak[wide] = 2 * n**3 / shortest
    parts = [(np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            for done in [pool.submit(np.copyto, to, source) for to, source in parts]:
                done.result()

        bandwidth = 2 * COPIED * threads / best(copy, seconds)
    return Floors(peak, bandwidth)


def _measure_cuda(place: Device, dtypes: Iterable[str], seconds: float) -> Floors:
    """Measure the same on a GPU, by its library's matrix product and a copy within its memory."""
    cp = runtime.cupy()
    peak = {}
    with cp.cuda.Device(place.index):
        clock = EventClock()
        for dtype in dtypes:
            n = 4096 if seconds >= 0.3 else 1024
            try:
                a: Any = cp.ones((n, n), known_dtype(dtype, place))
            except ImportError:  # bfloat16, which is not computed then
                continue
            peak[dtype] = 2 * n**3 / best(lambda a=a: product(a, a), seconds, clock)  # type: ignore[misc]
        size = 4 * COPIED
        source, to = cp.ones(size, "uint8"), cp.ones(size, "uint8")

        def copy() -> None:
            to[...] = source

        bandwidth = 2 * size / best(copy, seconds, clock)
    return Floors(peak, bandwidth)


def measure(place: Device, dtypes: Iterable[str], threads: int, seconds: float = 0.2) -> Floors:
    """Measure the limits of a device; takes ``seconds`` a dtype, and as long for the memory."""
    if place.kind == "cpu":
        return measure_cpu(dtypes, threads, seconds)
    return _measure_cuda(place, dtypes, seconds)
