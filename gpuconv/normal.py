"""The normal distribution's function and the error function, which NumPy has not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuconv.device import namespace
from gpuconv.elementwise import New, at_most

__all__ = ["TANH_FIT", "TANH_LIMIT", "erf", "normal_distribution"]

Array = Any

# Coefficients of W. J. Cody's rational approximations of erf and erfc (Math. Comp. 23, 1969),
# lowest power first.
_ERF_SMALL = (
    (3209.377589138469, 377.485237685302, 113.86415415105016, 3.1611237438705655, 0.18577770618460315),
    (2844.2368334391706, 1282.6165260773723, 244.02463793444417, 23.601290952344122, 1.0),
)  # fmt: skip
_ERFC_MEDIUM = (
    (1230.3393547979972, 2051.0783778260716, 1712.0476126340707, 881.952221241769,
     298.6351381974001, 66.11919063714163, 8.883149794388377, 0.5641884969886701,
     2.1531153547440383e-08),
    (1230.3393548037495, 3439.3676741437216, 4362.619090143247, 3290.7992357334597,
     1621.3895745666903, 537.1811018620099, 117.6939508913125, 15.744926110709835, 1.0),
)  # fmt: skip
_ERFC_LARGE = (
    (0.0006587491615298378, 0.016083785148742275, 0.12578172611122926, 0.36034489994980445,
     0.30532663496123236, 0.016315387137302097),
    (0.002335204976268692, 0.06051834131244132, 0.5279051029514285, 1.8729528499234604,
     2.568520192289822, 1.0),
)  # fmt: skip


def _horner(coefficients: tuple[float, ...], t: Array) -> Array:
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * t + c
    return total


def erf(x: Array) -> Array:
    """Return the error function, to double precision (NumPy has none)."""
    xp = namespace(x)
    dtype = x.dtype
    if dtype.itemsize < 4:  # the coefficients' powers pass float16's largest number
        x = x.astype("float32")
    a = xp.abs(x)
    a2 = xp.minimum(a, 0.5) ** 2
    small = x * _horner(_ERF_SMALL[0], a2) / _horner(_ERF_SMALL[1], a2)
    m = xp.clip(a, 0.46875, 4.0)
    medium = xp.exp(-m * m) * _horner(_ERFC_MEDIUM[0], m) / _horner(_ERFC_MEDIUM[1], m)
    big = xp.clip(a, 4.0, 6.0)
    r = 1.0 / (big * big)
    tail = r * _horner(_ERFC_LARGE[0], r) / _horner(_ERFC_LARGE[1], r)
    large = xp.exp(-big * big) / big * (1 / math.sqrt(math.pi) - tail)
    outer = xp.sign(x) * (1 - xp.where(a <= 4.0, medium, large))
    # NaN compares false and must stay NaN: it takes the first branch.
    return xp.where(a > 0.46875, outer, small).astype(dtype)


#: Phi(x) is (1 + tanh(x * q(x**2))) / 2 with these coefficients of q, lowest power first, fitted
#: to the least largest error, 3e-8; beyond the square's limit Phi is 0 or 1 in float32.
TANH_FIT = (
    0.7978849414604965, 0.036333084575005704, -3.2594977882976986e-05, -5.5306192373815366e-05,
    3.9647441175204155e-06, -1.322633119705659e-07, 1.7561698815327198e-09,
)  # fmt: skip
TANH_LIMIT = 31.36


def normal_distribution(xp: Any, x: Array, out: Array, new: New) -> Array:
    """Write Phi, the normal distribution's function, into ``out`` (not ``x``) and return it.

    In float32 on the CPU by NumPy's tanh, to 1e-7.
    """
    if xp is not np or x.dtype != np.float32:
        found = erf(x / math.sqrt(2))
        found += 1
        return xp.multiply(found, 0.5, out=out)
    square = np.multiply(x, x, out=new("power"))
    at_most(np, square, TANH_LIMIT, square)
    np.multiply(square, TANH_FIT[-1], out=out)
    for c in reversed(TANH_FIT[1:-1]):
        np.add(out, c, out=out)
        np.multiply(out, square, out=out)
    np.add(out, TANH_FIT[0], out=out)
    np.multiply(out, x, out=out)
    np.tanh(out, out=out)
    np.add(out, 1, out=out)
    return np.multiply(out, 0.5, out=out)
