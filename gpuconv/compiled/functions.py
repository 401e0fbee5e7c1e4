"""Elementary functions in float32, of arithmetic alone, so that compiled loops use vectors.

Each is given with the largest error that its test finds against double precision. NaN stays NaN.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

from gpuconv.normal import TANH_FIT, TANH_LIMIT

__all__ = [
    "STAMP",
    "exp",
    "expm1_below",
    "faded",
    "fma",
    "log1p_unit",
    "logistic",
    "normal_argument",
    "weighted",
]

#: Numba keeps compiled loops by their own file; this makes them stale when this one changes.
STAMP = zlib.crc32(Path(__file__).read_bytes())

_HAS_FMA = dict(binding.get_host_cpu_features()).get(
    "fma", False
) or binding.get_default_triple().startswith("aarch64")
_f32 = np.float32

#: Added to a small number it leaves the nearest whole number in the last bits.
_MAGIC = _f32(1.5 * 2**23)
_MAGIC_BITS = int(_MAGIC.view(np.int32))


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c``, rounded once where the processor can."""
    signature = a(a, a, a)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _HAS_FMA:
            return builder.fma(*args)
        return builder.fadd(builder.fmul(args[0], args[1]), args[2])

    return signature, generate


@intrinsic
def _power(typingctx: Any, t: Any) -> Any:
    """Return ``2**n`` for ``t = _MAGIC + n`` and n from -126 to 127."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        # Beside the magic number's own bits, which leave at the upper end, n + 127 remains.
        bits = builder.add(builder.bitcast(args[0], i32), ir.Constant(i32, 127))
        return builder.bitcast(builder.shl(bits, ir.Constant(i32, 23)), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _scaled(typingctx: Any, p: Any, t: Any) -> Any:
    """Return ``p * 2**n`` for ``t = _MAGIC + n``; in two steps, so that n may be -151 to 128."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        n = builder.sub(builder.bitcast(args[1], i32), ir.Constant(i32, _MAGIC_BITS))
        half = builder.ashr(n, ir.Constant(i32, 1))
        result = args[0]
        for part in (half, builder.sub(n, half)):
            exponent = builder.shl(builder.add(part, ir.Constant(i32, 127)), ir.Constant(i32, 23))
            result = builder.fmul(result, builder.bitcast(exponent, ir.FloatType()))
        return result

    return types.float32(types.float32, types.float32), generate


_LOW, _HIGH = _f32(-105.0), _f32(89.5)
_LOG2E = _f32(math.log2(math.e))
#: ln 2 in two parts; a small whole number times the first is exact.
_LN2_HIGH, _LN2_LOW = _f32(-0.693359375), _f32(2.12194440e-4)
# (exp(r) - 1 - r) / r**2 for |r| <= ln(2) / 2, fitted to the least largest error, 3e-9.
_E0, _E1, _E2 = _f32(0.5), _f32(0.166665181517601), _f32(0.04166620224714279)
_E3, _E4 = _f32(0.008368969894945621), _f32(0.0013950631255283952)
# (log(1 + t) - 2 s) / s**3 over s**2 with s = t / (2 + t) and t from 0 to 1, to 4e-9.
_L0, _L1 = _f32(0.6666641611697927), _f32(0.40021538289272646)
_L2, _L3 = _f32(0.28001605179969663), _f32(0.2801305803417281)
#: The fit of :mod:`gpuconv.normal`, for twice the argument.
_N0, _N1, _N2, _N3, _N4, _N5, _N6 = (_f32(2 * c) for c in TANH_FIT)
_LIMIT = _f32(TANH_LIMIT)
# The same with a number less, to 1e-7, for what stays away from the ends of float32.
_F0, _F1 = _f32(0.49999141693115234), _f32(0.16666455566883087)
_F2, _F3 = _f32(0.04189884662628174), _f32(0.008374742232263088)
_NEAR = _f32(87)
_ZERO, _ONE, _TWO = _f32(0), _f32(1), _f32(2)


@njit(inline="always")
def _reduced(x: Any) -> Any:
    """Return ``_MAGIC + n`` and ``exp(r) - 1``, with ``x = n ln(2) + r``."""
    t = fma(x, _LOG2E, _MAGIC)
    n = t - _MAGIC
    r = fma(n, _LN2_LOW, fma(n, _LN2_HIGH, x))
    p = fma(fma(fma(fma(_E4, r, _E3), r, _E2), r, _E1), r, _E0)
    return t, fma(p * r, r, r)


@njit(inline="always")
def exp(x: Any) -> Any:
    """Return ``exp(x)``, to 1 ulp."""
    x = _LOW if x < _LOW else x
    x = _HIGH if x > _HIGH else x
    t, m = _reduced(x)
    return _scaled(m + _ONE, t)


@njit(inline="always")
def expm1_below(x: Any) -> Any:
    """Return ``exp(x) - 1`` for ``x <= 0``, to 2 ulp."""
    x = _LOW if x < _LOW else x
    t, m = _reduced(x)
    scale = _scaled(_ONE, t)
    return fma(scale, m, scale - _ONE)


@njit(inline="always")
def logistic(x: Any) -> Any:
    """Return ``1 / (1 + exp(-x))``, to 2 ulp."""
    return _ONE / (_ONE + exp(-x))


@njit(inline="always")
def log1p_unit(t: Any) -> Any:
    """Return ``log(1 + t)`` for ``t`` from 0 to 1, to 3 ulp."""
    s = t / (t + _TWO)
    z = s * s
    p = fma(fma(fma(_L3, z, _L2), z, _L1), z, _L0)
    return fma(s * z, p, s + s)


@njit(inline="always")
def weighted(z: Any, x: Any) -> Any:
    """Return ``z / (1 + exp(-x))``, to 2e-7 of ``z``; the exponential stays within e**±87."""
    v = -_NEAR if x > _NEAR else -x
    v = _NEAR if v > _NEAR else v
    t = fma(v, _LOG2E, _MAGIC)
    n = t - _MAGIC
    r = fma(n, _LN2_LOW, fma(n, _LN2_HIGH, v))
    p = fma(fma(fma(fma(_F3, r, _F2), r, _F1), r, _F0) * r, r, r)
    scale = _power(t)
    return z / (fma(scale, p, scale) + _ONE)


@njit(inline="always")
def faded(z: Any, x: Any) -> Any:
    """Return :func:`weighted`, or 0 times ``z`` (no number for an infinity) where ``x < -87``."""
    found = weighted(z, x)
    return z * _ZERO if x < -_NEAR else found


@njit(inline="always")
def normal_argument(x: Any) -> Any:
    """Return what the logistic function takes to the normal distribution's at ``x``, to 1e-7."""
    s = x * x
    s = _LIMIT if s > _LIMIT else s
    q = fma(fma(fma(fma(fma(fma(_N6, s, _N5), s, _N4), s, _N3), s, _N2), s, _N1), s, _N0)
    return x * q
