"""What the CPU engines' cost models are made of: how fast this machine multiplies and copies.

The models count products, copied bytes and calls; the rates turn them into seconds. What a
model gets wrong by the same factor for all engines does no harm: only the order counts.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Rates", "efficiency", "rates"]


@dataclass(frozen=True)
class Rates:
    """The speed of one core.

    Attributes
    ----------
    product32, product64 : float
        Floating-point operations a second of a large matrix product, in float32 and float64.
    copy : float
        Bytes a second that are read and written again, in a core's cache.
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
        """Return the rate of products of numbers of so many bytes (complex ones: of as many parts)."""
        return self.product32 if size == 4 else self.product64


_rates = Rates()


def rates() -> Rates:
    """Return the rates of this machine."""
    return _rates


def efficiency(depth: float, width: float) -> float:
    """Return which share of its rate BLAS reaches for products of this depth and width."""
    depth, width = max(depth, 1), max(width, 1)
    return min(1.0, 1.1 * depth / (depth + 8)) * min(1.0, 1.1 * width / (width + 10))
