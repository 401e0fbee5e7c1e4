"""What the CPU engines' cost models are made of: how fast this machine multiplies and copies.

The models count products, copied bytes and calls; the rates turn them into seconds. What a
model gets wrong by the same factor for all engines does no harm: only the order counts. The
rates are measured once a machine, in well under two seconds, and kept in the user's cache
directory; where they cannot be kept, those of a usual machine serve, so that the same choices
are made from run to run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from gpuconv import cache, settings

__all__ = ["Rates", "calibrate", "efficiency", "rates", "reset"]


@dataclass(frozen=True)
class Rates:
    """The speed of one core; at first that of the core the models were made on.

    Attributes
    ----------
    product32, product64 : float
        Floating-point operations a second of a large matrix product, in float32 and float64.
    copy : float
        Bytes a second that are gathered and written again.
    einsum : float
        Multiplications and additions a second of ``numpy.einsum`` over long lines of float32.
    call : float
        Seconds that a NumPy call takes before it computes.
    """

    product32: float = 2.2e11
    product64: float = 1.1e11
    copy: float = 4.0e10
    einsum: float = 8.0e9
    call: float = 1.2e-6

    def product(self, size: int) -> float:
        """Return the rate of products of numbers of so many bytes."""
        return self.product32 if size == 4 else self.product64


#: What the measurements below gave on the core that the rates of :class:`Rates` belong to.
_REFERENCE = {
    "product32": 2.3e11,
    "product64": 9.0e10,
    "copy": 7.6e10,
    "einsum": 8.3e9,
    "call": 3.1e-7,
}
#: A rate further away than this from the usual one is a mistake of the measurement.
_FURTHEST = 30.0
_NAME = "rates"

_rates: Rates | None = None


def rates() -> Rates:
    """Return the rates of this machine, measuring them if they are not known yet."""
    global _rates
    if _rates is None:
        _rates = _checked(cache.read(_NAME)) or _measured_and_kept()
    return _rates


def reset() -> None:
    """Forget the rates, for when the cache directory is another."""
    global _rates
    _rates = None


def calibrate() -> dict[str, float]:
    """Measure the rates of this machine anew, use and keep them.

    Takes some tenths of a second; best done while nothing else runs. It happens by itself when
    the first convolution is planned on a machine.

    Returns
    -------
    dict
        The rates by name; see :class:`gpuconv.engines.rates.Rates`.
    """
    global _rates
    _rates = _measured()
    cache.write(_NAME, asdict(_rates))
    settings.changed()
    return asdict(_rates)


def _checked(content: Mapping[str, Any] | None) -> Rates | None:
    """Return the rates of a file's content, if they are such."""
    usual = asdict(Rates())
    if content is None or set(content) != set(usual):
        return None
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if not (math.isfinite(value) and 1 / _FURTHEST <= value / usual[name] <= _FURTHEST):
            return None
    return Rates(**{name: float(value) for name, value in content.items()})


def _measured_and_kept() -> Rates:
    if cache.folder() is None:
        return Rates()
    found = _measured()
    if cache.write(_NAME, asdict(found), first=True):
        return found
    # All processes go by what the first of them wrote: the same choices, and the same bits.
    return _checked(cache.read(_NAME)) or Rates()


def _measured() -> Rates:
    """Measure, as ratios to the same measurements on the reference core."""
    from gpuconv import threads

    rng = np.random.default_rng(0)
    found = {}
    with threads.single_threaded_blas():
        for name, dtype in (("product32", "float32"), ("product64", "float64")):
            a = rng.standard_normal((256, 576)).astype(dtype)
            b = rng.standard_normal((576, 128)).astype(dtype)
            out = np.empty((256, 128), dtype)
            seconds = _least(lambda a=a, b=b, out=out: np.matmul(a, b, out=out))  # type: ignore[misc]
            found[name] = 2 * a.shape[0] * b.size / seconds
    source = rng.standard_normal((58, 58, 64)).astype("float32")
    windows = np.lib.stride_tricks.sliding_window_view(source, (3, 3), axis=(0, 1))
    windows = windows.transpose(0, 1, 3, 4, 2)[:8]
    gathered = np.empty(windows.shape, "float32")
    found["copy"] = gathered.nbytes / _least(lambda: np.copyto(gathered, windows))
    lines, weights = source.reshape(58, -1)[:48], rng.standard_normal((9, 3712)).astype("float32")
    taps = np.lib.stride_tricks.as_strided(lines, (40, 9, 3712), (*lines.strides[:1], 256, 4))
    taps = taps[:, :, :3072]
    sums = np.empty((40, 3072), "float32")
    seconds = _least(lambda: np.einsum("itz,tz->iz", taps, weights[:, :3072], out=sums))
    found["einsum"] = taps.size / seconds
    few = np.zeros(8, "float32")
    found["call"] = _least(lambda: np.add(few, few, out=few), 200)
    values = {}
    for field in fields(Rates):
        ratio = found[field.name] / _REFERENCE[field.name]
        ratio = min(max(ratio, 1 / _FURTHEST), _FURTHEST)
        # Two digits: noise should not turn a choice.
        values[field.name] = float(f"{ratio * getattr(Rates(), field.name):.1e}")
    return Rates(**values)


def _least(call: Callable[[], Any], times: int = 25) -> float:
    """Return the shortest of some runs: what else the machine does only makes them longer."""
    call()
    least = math.inf
    for _ in range(times):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def efficiency(depth: float, width: float) -> float:
    """Return which share of its rate BLAS reaches for products of this depth and width."""
    depth, width = max(depth, 1), max(width, 1)
    return min(1.0, 1.1 * depth / (depth + 8)) * min(1.0, 1.1 * width / (width + 10))
