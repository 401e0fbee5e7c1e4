"""The formulas of :mod:`gpuconv.compiled.activations`, and the loops around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray
from numba.extending import register_jitable

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
from gpuconv.engines.numba_memory import floats_at, numbers_at
from gpuconv.engines.numba_team_loops import job

__all__ = ["loop"]

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


@_formula
def part(given: Any, at: Any, share: Any, count: Any) -> Any:
    """Return a share of an array."""
    size = given[at + 1]
    return carray(floats_at(given[at]), size)[size * share // count : size * (share + 1) // count]


@cache
def loop(kind: str, name: str, at: int) -> int | None:
    """Return a job that computes elements, or None where NumPy's way is as good.

    Parameters
    ----------
    kind : {"value", "gradient", "gradient from output"}
    name : str
        Of the formula.
    at : int
        The argument in whose place the result goes, or -1.

    Returns
    -------
    int
        A job for :func:`gpuconv.compiled.run`, of the result, of the arguments but the one in
        whose place it goes, and of two numbers.
    """
    f = _FORMULAS.get((kind, name))
    if f is None:
        return None
    # What is computed in place is given once: a loop that wrote to what it also reads under
    # another name would not be vectorised.

    if kind == "value" and at < 0:

        def run(at_job, share, count, worker):
            given = carray(numbers_at(at_job), 6)
            to, z = part(given, 0, share, count), part(given, 2, share, count)
            a, b = carray(floats_at(given[4]), 2)
            for i in range(to.size):
                to[i] = f(z[i], a, b)

    elif kind == "value":

        def run(at_job, share, count, worker):
            given = carray(numbers_at(at_job), 4)
            to = part(given, 0, share, count)
            a, b = carray(floats_at(given[2]), 2)
            for i in range(to.size):
                to[i] = f(to[i], a, b)

    elif at < 0:

        def run(at_job, share, count, worker):
            given = carray(numbers_at(at_job), 8)
            to, dy = part(given, 0, share, count), part(given, 2, share, count)
            y = part(given, 4, share, count)
            a, b = carray(floats_at(given[6]), 2)
            for i in range(to.size):
                to[i] = f(dy[i], y[i], a, b)

    elif at == 0:

        def run(at_job, share, count, worker):
            given = carray(numbers_at(at_job), 6)
            to, y = part(given, 0, share, count), part(given, 2, share, count)
            a, b = carray(floats_at(given[4]), 2)
            for i in range(to.size):
                to[i] = f(to[i], y[i], a, b)

    else:

        def run(at_job, share, count, worker):
            given = carray(numbers_at(at_job), 6)
            to, dy = part(given, 0, share, count), part(given, 2, share, count)
            a, b = carray(floats_at(given[4]), 2)
            for i in range(to.size):
                to[i] = f(dy[i], to[i], a, b)

    return job(run, kind, name, at, STAMP)
