"""The formulas of :mod:`gpuconv.compiled.activations`, and the loops around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable

from gpuconv import compiled
from gpuconv.compiled.functions import (
    STAMP,
    exp,
    expm1_below,
    faded,
    fma,
    log1p_unit,
    logistic,
    normal_argument,
    weighted,
)

__all__ = ["loop"]

Array = Any
_f32 = np.float32
_ZERO, _ONE, _HALF, _TWO, _THREE = (_f32(v) for v in (0, 1, 0.5, 2, 3))
_FIFTH = _f32(0.2)
_DENSITY = _f32(1 / math.sqrt(2 * math.pi))
#: Beyond this the normal distribution's function is flat; squares of larger numbers could overflow.
_FLAT = _f32(40)

# They stay functions of Python: what a loop closes over tells Numba's files of compiled loops
# apart, and must read the same in every process.
_formula = register_jitable(inline="always")

# Values, of the argument and of two numbers that the activation has.


@_formula
def _leaky(z: Any, a: Any, b: Any) -> Any:
    return z * a if z <= _ZERO else z


@_formula
def _rectified(z: Any, a: Any, b: Any) -> Any:
    return _ZERO if z <= _ZERO else z


@_formula
def _elu(z: Any, a: Any, b: Any) -> Any:
    below = b * expm1_below(_ZERO if z > _ZERO else z)
    return a * z if z > _ZERO else below


@_formula
def _gelu(z: Any, a: Any, b: Any) -> Any:
    return faded(z, z * fma(z * z, b, a))


@_formula
def _gelu_exact(z: Any, a: Any, b: Any) -> Any:
    return faded(z, normal_argument(z))


@_formula
def _sigmoid(z: Any, a: Any, b: Any) -> Any:
    return logistic(z)


@_formula
def _hard_sigmoid(z: Any, a: Any, b: Any) -> Any:
    v = z * _FIFTH + _HALF
    v = _ZERO if v < _ZERO else v
    return _ONE if v > _ONE else v


@_formula
def _softplus(z: Any, a: Any, b: Any) -> Any:
    return (z if z > _ZERO else _ZERO) + log1p_unit(exp(z if z < _ZERO else -z))


@_formula
def _exponential(z: Any, a: Any, b: Any) -> Any:
    return exp(z)


# Gradients, of the gradient behind the activation and of its value (of its argument for GELU).


@_formula
def _leaky_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * (_ONE if y > _ZERO else a)


@_formula
def _elu_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * (a if y > _ZERO else y + b)


@_formula
def _gelu_gradient(dy: Any, x: Any, a: Any, b: Any) -> Any:
    x = -_FLAT if x < -_FLAT else x
    x = _FLAT if x > _FLAT else x
    square = x * x
    s = weighted(_ONE, x * fma(square, b, a))
    return dy * (s * fma((_ONE - s) * x, fma(square, _THREE * b, a), _ONE))


@_formula
def _gelu_exact_gradient(dy: Any, x: Any, a: Any, b: Any) -> Any:
    x = -_FLAT if x < -_FLAT else x
    x = _FLAT if x > _FLAT else x
    return dy * fma(x * _DENSITY, exp(x * x * -_HALF), weighted(_ONE, normal_argument(x)))


@_formula
def _tanh_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * (_ONE - y * y)


@_formula
def _sigmoid_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * ((_ONE - y) * y)


@_formula
def _hard_sigmoid_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * (_FIFTH if y > _ZERO and y < _ONE else _ZERO)


@_formula
def _softplus_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * -expm1_below(-y)


@_formula
def _exponential_gradient(dy: Any, y: Any, a: Any, b: Any) -> Any:
    return dy * y


_FORMULAS: dict[tuple[str, str], Callable[..., Any]] = {
    ("value", "rectified"): _rectified,
    ("value", "leaky"): _leaky,
    ("value", "elu"): _elu,
    ("value", "gelu"): _gelu,
    ("value", "exact gelu"): _gelu_exact,
    ("value", "sigmoid"): _sigmoid,
    ("value", "hard sigmoid"): _hard_sigmoid,
    ("value", "softplus"): _softplus,
    ("value", "exponential"): _exponential,
    ("gradient from output", "rectified"): _leaky_gradient,
    ("gradient from output", "leaky"): _leaky_gradient,
    ("gradient from output", "elu"): _elu_gradient,
    ("gradient from output", "tanh"): _tanh_gradient,
    ("gradient from output", "sigmoid"): _sigmoid_gradient,
    ("gradient from output", "hard sigmoid"): _hard_sigmoid_gradient,
    ("gradient from output", "softplus"): _softplus_gradient,
    ("gradient from output", "exponential"): _exponential_gradient,
    ("gradient", "rectified"): _leaky_gradient,
    ("gradient", "leaky"): _leaky_gradient,
    ("gradient", "gelu"): _gelu_gradient,
    ("gradient", "exact gelu"): _gelu_exact_gradient,
}


@cache
def loop(kind: str, name: str, at: int) -> Callable[..., None] | None:
    """Return a loop over elements, or None where NumPy's way is as good.

    Parameters
    ----------
    kind : {"value", "gradient", "gradient from output"}
    name : str
        Of the formula.
    at : int
        The argument in whose place the result goes, or -1.

    Returns
    -------
    callable
        Of the result, of the arguments but the one in whose place it goes, and of two numbers.
    """
    f = _FORMULAS.get((kind, name))
    if f is None:
        return None
    # A loop is compiled anew when the functions in it have changed.
    options, stamp = compiled.OPTIONS, STAMP

    if kind == "value" and at < 0:

        @njit(**options)
        def run(out: Array, z: Array, start: int, stop: int, a: Any, b: Any) -> None:
            to, z = out[start:stop], z[start:stop]
            for i in range(to.size if stamp else 0):
                to[i] = f(z[i], a, b)

    elif kind == "value":

        @njit(**options)
        def run(out: Array, start: int, stop: int, a: Any, b: Any) -> None:
            to = out[start:stop]
            for i in range(to.size if stamp else 0):
                to[i] = f(to[i], a, b)

    elif at < 0:

        @njit(**options)
        def run(out: Array, dy: Array, y: Array, start: int, stop: int, a: Any, b: Any) -> None:
            to, dy, y = out[start:stop], dy[start:stop], y[start:stop]
            for i in range(to.size if stamp else 0):
                to[i] = f(dy[i], y[i], a, b)

    elif at == 0:

        @njit(**options)
        def run(out: Array, y: Array, start: int, stop: int, a: Any, b: Any) -> None:
            to, y = out[start:stop], y[start:stop]
            for i in range(to.size if stamp else 0):
                to[i] = f(to[i], y[i], a, b)

    else:

        @njit(**options)
        def run(out: Array, dy: Array, start: int, stop: int, a: Any, b: Any) -> None:
            to, dy = out[start:stop], dy[start:stop]
            for i in range(to.size if stamp else 0):
                to[i] = f(dy[i], to[i], a, b)

    made: Callable[..., None] = run
    return made
