"""Initial weights, drawn from a NumPy generator.

Weights are drawn in float64 on the CPU and converted and moved afterwards, so one seed gives
the same weights on every device and, up to rounding, in every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuconv.activations import Activation, LeakyReLU, ReLU, Tanh
from gpuconv.arguments import integer, real

__all__ = [
    "fans",
    "generator",
    "get_initializer",
    "glorot_gain",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "std_normal",
    "trunc_normal",
    "zeros",
]

Weights = np.ndarray[Any, np.dtype[np.float64]]
Rng = int | np.random.Generator | None


def generator(rng: Rng) -> np.random.Generator:
    """Return a NumPy generator: the one given, one with the seed given, or a new one.

    Raises
    ------
    TypeError, ValueError
        If ``rng`` is neither a generator, nor an integer of at least 0, nor None.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    if rng is None:
        return np.random.default_rng()
    expected = "a numpy.random.Generator, a seed (an integer of at least 0), or None"
    return np.random.default_rng(integer("rng", rng, 0, expected))


def fans(shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
    """Return how many inputs feed an output, and how many outputs an input feeds.

    Parameters
    ----------
    shape : sequence of int
        Of the weights: ``(n_in, n_out)`` of a dense layer, or
        ``(*kernel, in_ch // groups, out_ch)`` of a convolution.
    groups : int
        Of the convolution.

    Raises
    ------
    TypeError, ValueError
        If the shape has fewer than two axes or an empty one, or if ``groups`` does not
        divide the outputs.
    """
    expected = "two or more positive integers"
    try:
        sizes = [integer("shape", n, 1, expected) for n in shape]
    except TypeError:
        raise TypeError(f"shape is {shape!r}; expected {expected}") from None
    if len(sizes) < 2:
        raise ValueError(f"shape is {shape!r}; expected {expected}")
    count = integer("groups", groups, 1)
    if sizes[-1] % count:
        raise ValueError(f"groups is {groups}; expected a divisor of {sizes[-1]}, the outputs")
    taps = math.prod(sizes[:-2])
    return taps * sizes[-2], taps * sizes[-1] // count


def glorot_gain(activation: Activation) -> float:
    """Return the factor that keeps the variance through an activation.

    5/3 for Tanh, the square root of 2 for ReLU, ``sqrt(2 / (1 + alpha**2))`` for LeakyReLU,
    else 1; the values of ``torch.nn.init.calculate_gain``.
    """
    if isinstance(activation, Tanh):
        return 5 / 3
    if isinstance(activation, ReLU):
        return math.sqrt(2)
    if isinstance(activation, LeakyReLU):
        return math.sqrt(2 / (1 + activation.alpha**2))
    return 1.0


def glorot_uniform(
    shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1
) -> Weights:
    """Draw uniformly with variance ``gain**2 * 2 / (fan_in + fan_out)`` [1]_.

    .. [1] Glorot, Bengio: Understanding the difficulty of training deep feedforward neural
       networks (2010).
    """
    bound = real("gain", gain) * math.sqrt(6 / sum(fans(shape, groups)))
    return generator(rng).uniform(-bound, bound, tuple(shape))


def glorot_normal(
    shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1
) -> Weights:
    """Draw normally with variance ``gain**2 * 2 / (fan_in + fan_out)``; see glorot_uniform."""
    scale = real("gain", gain) * math.sqrt(2 / sum(fans(shape, groups)))
    return generator(rng).normal(0.0, scale, tuple(shape))


def he_uniform(
    shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1
) -> Weights:
    """Draw uniformly with variance ``2 / fan_in`` [1]_; ``gain`` is not used.

    .. [1] He, Zhang, Ren, Sun: Delving deep into rectifiers (2015).
    """
    bound = math.sqrt(6 / fans(shape, groups)[0])
    return generator(rng).uniform(-bound, bound, tuple(shape))


def he_normal(
    shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1
) -> Weights:
    """Draw normally with variance ``2 / fan_in``; see he_uniform; ``gain`` is not used."""
    return generator(rng).normal(0.0, math.sqrt(2 / fans(shape, groups)[0]), tuple(shape))


def std_normal(
    shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1
) -> Weights:
    """Draw from the standard normal distribution."""
    fans(shape, groups)
    return generator(rng).normal(0.0, 1.0, tuple(shape))


def trunc_normal(
    shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1
) -> Weights:
    """Draw from the standard normal distribution; values beyond 2 are drawn again."""
    fans(shape, groups)
    source = generator(rng)
    values = source.normal(0.0, 1.0, tuple(shape))
    while (far := np.abs(values) > 2).any():
        values[far] = source.normal(0.0, 1.0, int(far.sum()))
    return values


def zeros(shape: Sequence[int], rng: Rng = None, *, gain: float = 1.0, groups: int = 1) -> Weights:
    """Return zeros; nothing is drawn."""
    fans(shape, groups)
    return np.zeros(tuple(shape))


_BY_NAME: dict[str, Callable[..., Weights]] = {
    f.__name__: f
    for f in (
        glorot_uniform, glorot_normal, he_uniform, he_normal, std_normal, trunc_normal, zeros
    )
}  # fmt: skip


def get_initializer(name: str) -> Callable[..., Weights]:
    """Return the initializer of this name: ``f(shape, rng, *, gain=1.0, groups=1)``.

    Raises
    ------
    TypeError, ValueError
        If there is none.
    """
    allowed = ", ".join(_BY_NAME)
    if not isinstance(name, str):
        raise TypeError(f"init is {name!r}; expected one of {allowed}")
    if name not in _BY_NAME:
        raise ValueError(f"init is {name!r}; expected one of {allowed}")
    return _BY_NAME[name]
