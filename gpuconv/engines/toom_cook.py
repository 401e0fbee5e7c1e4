"""The matrices of Winograd's minimal filtering, made from exact rationals.

``F(m, r)`` computes ``m`` neighbouring outputs of a correlation with ``r`` taps in ``n = m + r - 1``
multiplications: ``y = A.T @ ((G @ w) * (B.T @ x))`` for a tile ``x`` of ``n`` inputs. Two axes
nest. It is the transpose of Toom-Cook's polynomial product: a product of degree ``n - 1`` is
known from its values at ``n`` points, here small rationals and infinity.

The gradients come from the same matrices: with respect to the taps it is
``G.T @ ((A @ dy) * (B.T @ x))``.

References
----------
Winograd: Arithmetic complexity of computations (1980). Lavin, Gray: Fast algorithms for
convolutional neural networks (2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["Filtering", "filtering"]

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Rows = list[list[Fraction]]

#: In the order in which they are taken. Large and small ones in turn, the error of F(4, 3) is less
#: than half of that with 2 and -2, and that of all others no larger.
_POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "1/2", "-2", "2", "-1/2", "3/4", "-4/3"))

#: The largest tile that the points allow.
LARGEST = len(_POINTS) + 1


@dataclass(frozen=True, eq=False)
class Filtering:
    """The matrices of ``F(m, r)``, in float64.

    Attributes
    ----------
    m, r, n : int
        Outputs, taps, and inputs of a tile.
    a : ndarray, shape (n, m)
        Its transpose takes products to outputs; itself, output gradients to products.
    b : ndarray, shape (n, n)
        ``B.T``: takes inputs to factors.
    g : ndarray, shape (n, r)
        Takes taps to factors.
    """

    m: int
    r: int
    n: int
    a: Matrix
    b: Matrix
    g: Matrix


def _values(columns: int, n: int) -> Rows:
    """Return the matrix that takes a polynomial's coefficients to its values at n points."""
    rows = [[p**k for k in range(columns)] for p in _POINTS[: n - 1]]
    return [*rows, [Fraction(int(k == columns - 1)) for k in range(columns)]]


def _inverse(rows: Rows) -> Rows:
    """Return the inverse by Gauss and Jordan."""
    n = len(rows)
    work = [[*row, *(Fraction(int(i == k)) for k in range(n))] for i, row in enumerate(rows)]
    for k in range(n):
        pivot = next(i for i in range(k, n) if work[i][k])
        work[k], work[pivot] = work[pivot], work[k]
        work[k] = [v / work[k][k] for v in work[k]]
        for i in range(n):
            if i != k and work[i][k]:
                factor = work[i][k]
                work[i] = [v - factor * p for v, p in zip(work[i], work[k], strict=True)]
    return [row[n:] for row in work]


@lru_cache(maxsize=64)
def filtering(m: int, r: int) -> Filtering:
    """Return the matrices of ``F(m, r)``; ``F(m, 1)`` is made of ones, without a transform.

    Raises
    ------
    ValueError
        If the tile ``m + r - 1`` exceeds :data:`LARGEST`.
    """
    if r == 1:
        one = np.ones((1, 1))
        return Filtering(1, 1, 1, one, one, one)
    n = m + r - 1
    if m < 1 or n > LARGEST:
        raise ValueError(f"F({m}, {r}) needs a tile of {n}; expected at most {LARGEST}")
    inverse = _inverse(_values(n, n))
    b = [[inverse[k][i] for k in range(n)] for i in range(n)]
    g = _values(r, n)
    for i, row in enumerate(b):
        # Rows of B.T become coprime integers; G takes the factor.
        scale = Fraction(
            math.lcm(*(v.denominator for v in row)), math.gcd(*(v.numerator for v in row))
        )
        b[i] = [v * scale for v in row]
        g[i] = [v / scale for v in g[i]]
    return Filtering(m, r, n, *(np.array(rows, float) for rows in (_values(m, n), b, g)))
