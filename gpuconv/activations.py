"""Activation functions: value, derivatives, and what the engines may fuse.

Names, parameters and defaults are numpy-ml's. Every function works on NumPy and on CuPy
arrays: it calls the array's own library, on the CPU block by block (:mod:`gpuconv.elementwise`).
An activation is a frozen value, so it can sit in a :class:`~gpuconv.problem.ConvProblem` and key
a cache.

A convolution's backward pass has the *output* of the activation at hand, so an engine can
fuse the derivative only where it follows from the output alone (``grad_from_output``); GELU
is not monotone and has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gpuconv import memory
from gpuconv.arguments import boolean, normal_name, parse_call, real
from gpuconv.compiled import activations as fast
from gpuconv.device import namespace
from gpuconv.differentiable import Activation
from gpuconv.elementwise import BLOCK, New, apply, at_least_zero, at_most
from gpuconv.normal import normal_distribution

__all__ = [
    "ELU",
    "GELU",
    "SELU",
    "Activation",
    "Affine",
    "Exponential",
    "HardSigmoid",
    "Identity",
    "LeakyReLU",
    "ReLU",
    "Sigmoid",
    "SoftPlus",
    "Tanh",
    "get_activation",
]

Array = Any


def _positive(xp: Any, new: New, a: Array) -> Array:
    """Return where ``a`` is more than 0."""
    return xp.greater(a, 0, out=new("mask", bool))


def _raised(xp: Any, new: New, mask: Array, height: float, out: Array) -> Array:
    """Add ``height`` to ``out`` where the mask says; branches would take ten times as long."""
    step = new("step")
    step[...] = mask
    xp.multiply(step, height, out=step)
    return xp.add(out, step, out=out)


def _expm1(xp: Any, new: New, v: Array) -> Array:
    """Write ``exp(v) - 1`` over ``v``, which is nowhere positive.

    In float32 as ``2 t / (1 - t)`` with ``t = tanh(v / 2)``, which loses no digits: NumPy's tanh
    takes a tenth of the time of its expm1.
    """
    if xp is not np or v.dtype != np.float32:
        return xp.expm1(v, out=v)
    np.multiply(v, 0.5, out=v)
    np.tanh(v, out=v)
    rest = np.subtract(1, v, out=new("rest"))
    np.divide(v, rest, out=v)
    return np.multiply(v, 2, out=v)


def _logistic(xp: Any, z: Array, out: Array) -> Array:
    """Write ``1 / (1 + exp(-z))`` into ``out``; where the exponential overflows that is 0."""
    xp.negative(z, out=out)
    xp.exp(out, out=out)
    xp.add(out, 1, out=out)
    return xp.divide(1, out, out=out)


@dataclass(frozen=True)
class Identity(Activation):
    """``z``."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``z``."""
        if out is None or out is z:
            return z
        out[...] = z
        return out

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        out.fill(1)
        return out

    _slope_from_output = _slope


@dataclass(frozen=True)
class Affine(Activation):
    """``slope * z + intercept``."""

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        real("slope", self.slope)
        real("intercept", self.intercept)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        xp.multiply(z, self.slope, out=out)
        xp.add(out, self.intercept, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        out.fill(self.slope)
        return out

    _slope_from_output = _slope


@dataclass(frozen=True)
class ReLU(Activation):
    """``max(z, 0)``; its derivative at 0 is 0."""

    by_sign = True

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "rectified", (0.0, 0.0)

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``max(z, 0)``; NaN stays NaN."""
        if type(z) is np.ndarray and z.size > 1024:
            made = fast.value(self, z, out)
            if made is not None:
                return made
            if z.size > BLOCK and z.dtype.kind == "f":
                return apply(self._value, z, out=out)
            if out is None:
                out = memory.empty_as(z)
            if z.flags.c_contiguous and out.flags.c_contiguous:
                at_least_zero(np, z.reshape(-1), out.reshape(-1))
                return out
        if type(z) is np.ndarray:
            return np.maximum(z, 0, out=out)
        return namespace(z).maximum(z, 0, out=out)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        at_least_zero(xp, z, out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        out[...] = _positive(xp, new, x)
        return out

    _slope_from_output = _slope


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """``z`` where positive, else ``alpha * z``, with ``alpha >= 0``."""

    by_sign = True
    alpha: float = 0.3

    def __post_init__(self) -> None:
        real("alpha", self.alpha, 0)

    def __str__(self) -> str:
        return f"Leaky ReLU(alpha={self.alpha})"  # what numpy-ml writes, and reads

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return ("leaky" if self.alpha else "rectified"), (self.alpha, 0.0)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        small = xp.multiply(z, self.alpha, out=new("small"))
        if self.alpha == 0:  # infinity times 0 is no number
            at_least_zero(xp, z, out)
        else:
            (xp.maximum if self.alpha <= 1 else xp.minimum)(z, small, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        mask = _positive(xp, new, x)
        if self.alpha > 2:
            out[...] = xp.where(mask, 1.0, self.alpha)
            return out
        # Where positive the rounded difference to 1, added again, gives 1.
        out[...] = mask
        xp.multiply(out, 1 - self.alpha, out=out)
        return xp.add(out, self.alpha, out=out)

    _slope_from_output = _slope


@dataclass(frozen=True)
class ELU(Activation):
    """``z`` where positive, else ``alpha * (exp(z) - 1)``, with ``alpha >= 0`` [1]_.

    .. [1] Clevert, Unterthiner, Hochreiter: Fast and accurate deep network learning by
       exponential linear units (2016).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        real("alpha", self.alpha, 0)

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "elu", (1.0, self.alpha)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        below = _expm1(xp, new, at_most(xp, z, 0.0, new("below")))
        if self.alpha != 1:
            xp.multiply(below, self.alpha, out=below)
        at_least_zero(xp, z, out)
        xp.add(out, below, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        mask = None if self.alpha == 1 else _positive(xp, new, x)
        xp.exp(at_most(xp, x, 0.0, out), out=out)
        if mask is not None:
            xp.multiply(out, self.alpha, out=out)
            _raised(xp, new, mask, 1 - self.alpha, out)
        return out

    def grad2(self, x: Array) -> Array:
        """Return 0 where ``x > 0``, else ``alpha * exp(x)``."""
        xp = namespace(x)
        return xp.where(x > 0, 0, self.alpha * xp.exp(xp.minimum(x, 0))).astype(x.dtype)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        mask = None if self.alpha == 1 else _positive(xp, new, y)
        xp.add(at_most(xp, y, 0.0, out), self.alpha, out=out)
        return out if mask is None else _raised(xp, new, mask, 1 - self.alpha, out)


@dataclass(frozen=True)
class SELU(Activation):
    """``scale * ELU(z, alpha)`` with the constants that keep unit variance [1]_.

    .. [1] Klambauer, Unterthiner, Mayr: Self-normalizing neural networks (2017).
    """

    alpha: ClassVar[float] = 1.6732632423543772
    scale: ClassVar[float] = 1.0507009873554805

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "elu", (self.scale, self.scale * self.alpha)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        below = _expm1(xp, new, at_most(xp, z, 0.0, new("below")))
        xp.multiply(below, self.alpha, out=below)
        at_least_zero(xp, z, out)
        xp.add(out, below, out=out)
        xp.multiply(out, self.scale, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        mask = _positive(xp, new, x)
        xp.exp(at_most(xp, x, 0.0, out), out=out)
        xp.multiply(out, self.scale * self.alpha, out=out)
        return _raised(xp, new, mask, self.scale * (1 - self.alpha), out)

    def grad2(self, x: Array) -> Array:
        """Return the scaled second derivative of ELU."""
        xp = namespace(x)
        slope = xp.where(x > 0, 0, self.alpha * xp.exp(xp.minimum(x, 0)))
        return (self.scale * slope).astype(x.dtype)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        mask = _positive(xp, new, y)
        xp.add(at_most(xp, y, 0.0, out), self.scale * self.alpha, out=out)
        return _raised(xp, new, mask, self.scale * (1 - self.alpha), out)


#: Beyond this Phi is 0 or 1 and flat, in every dtype; powers of larger arguments could overflow.
_GELU_FLAT = 40.0
_TANH_SLOPE = math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715 * _TANH_SLOPE


@dataclass(frozen=True)
class GELU(Activation):
    """``z * Phi(z)`` with the normal distribution's Phi, or its tanh approximation [1]_.

    .. [1] Hendrycks, Gimpel: Gaussian error linear units (2016).
    """

    invertible = False
    approximate: bool = True

    def __post_init__(self) -> None:
        boolean("approximate", self.approximate)

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return ("gelu" if self.approximate else "exact gelu"), (2 * _TANH_SLOPE, 2 * _TANH_CUBE)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        phi = new("phi")
        if self.approximate:
            xp.multiply(z, z, out=phi)
            xp.multiply(phi, _TANH_CUBE, out=phi)
            xp.add(phi, _TANH_SLOPE, out=phi)
            xp.multiply(phi, z, out=phi)
            xp.tanh(phi, out=phi)
            xp.add(phi, 1, out=phi)
            xp.multiply(phi, 0.5, out=phi)
        else:
            normal_distribution(xp, z, phi, new)
        xp.multiply(z, phi, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        x = xp.clip(x, -_GELU_FLAT, _GELU_FLAT, out=new("clipped"))
        square = xp.multiply(x, x, out=new("square"))
        if not self.approximate:
            # Phi(x) + x * exp(-x**2 / 2) / sqrt(2 pi)
            xp.multiply(square, -0.5, out=square)
            xp.exp(square, out=square)
            xp.multiply(square, 1 / math.sqrt(2 * math.pi), out=square)
            xp.multiply(square, x, out=square)
            normal_distribution(xp, x, out, new)
            return xp.add(out, square, out=out)
        # With u = x * (slope + cube * x**2) and t = tanh(u) it is
        # (1 + t) / 2 * (1 + (1 - t) * x * u'), and x * u' = x * (slope + 3 * cube * x**2).
        xp.multiply(square, _TANH_CUBE, out=square)
        t = xp.add(square, _TANH_SLOPE, out=out)
        xp.multiply(t, x, out=t)
        xp.tanh(t, out=t)
        xp.multiply(square, 3, out=square)
        xp.add(square, _TANH_SLOPE, out=square)
        xp.multiply(square, x, out=square)
        xp.multiply(square, xp.subtract(1, t, out=new("rest")), out=square)
        xp.add(square, 1, out=square)
        xp.add(t, 1, out=t)
        xp.multiply(t, 0.5, out=t)
        return xp.multiply(t, square, out=out)

    def grad2(self, x: Array) -> Array:
        """Return ``2 Phi'(x) + x Phi''(x)``."""
        xp = namespace(x)
        x = xp.clip(x, -_GELU_FLAT, _GELU_FLAT)
        if not self.approximate:
            density = xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return density * (2 - x * x)
        u1 = _TANH_SLOPE * (1 + 3 * 0.044715 * x * x)
        u2 = _TANH_SLOPE * 6 * 0.044715 * x
        t = xp.tanh(_TANH_SLOPE * (x + 0.044715 * x * x * x))
        sech2 = 1 - t * t
        return sech2 * u1 + 0.5 * x * sech2 * (u2 - 2 * t * u1 * u1)


@dataclass(frozen=True)
class Tanh(Activation):
    """Hyperbolic tangent."""

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "tanh", (0.0, 0.0)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        xp.tanh(z, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        return self._slope_from_output(xp, out, new, xp.tanh(x, out=out))

    def grad2(self, x: Array) -> Array:
        """Return ``-2 tanh(x) (1 - tanh(x)**2)``."""
        t = namespace(x).tanh(x)
        return -2 * t * (1 - t * t)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        xp.multiply(y, y, out=out)
        return xp.subtract(1, out, out=out)


@dataclass(frozen=True)
class Sigmoid(Activation):
    """Logistic function ``1 / (1 + exp(-z))``."""

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "sigmoid", (0.0, 0.0)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        _logistic(xp, z, out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        return self._slope_from_output(xp, out, new, _logistic(xp, x, new("logistic")))

    def grad2(self, x: Array) -> Array:
        """Return ``s (1 - s) (1 - 2 s)``."""
        s = self.fn(x)
        return s * (1 - s) * (1 - 2 * s)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        return xp.multiply(xp.subtract(1, y, out=out), y, out=out)


@dataclass(frozen=True)
class HardSigmoid(Activation):
    """``clip(0.2 z + 0.5, 0, 1)``; its derivative where it bends is 0."""

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "hard sigmoid", (0.0, 0.0)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        xp.multiply(z, 0.2, out=out)
        xp.add(out, 0.5, out=out)
        xp.clip(out, 0, 1, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        return self._inside(xp, out, new, x, -2.5, 2.5)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        return self._inside(xp, out, new, y, 0.0, 1.0)

    def _inside(self, xp: Any, out: Array, new: New, a: Array, low: float, high: float) -> Array:
        """Write 0.2 where ``low < a < high``, else 0."""
        mask = xp.greater(a, low, out=new("mask", bool))
        mask &= xp.less(a, high, out=new("other mask", bool))
        out[...] = mask
        return xp.multiply(out, 0.2, out=out)


@dataclass(frozen=True)
class SoftPlus(Activation):
    """``log(1 + exp(z))``."""

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "softplus", (0.0, 0.0)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        rest = xp.absolute(z, out=new("rest"))
        xp.exp(xp.negative(rest, out=rest), out=rest)
        xp.log1p(rest, out=rest)
        xp.add(at_least_zero(xp, z, out), rest, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        return _logistic(xp, x, out)

    def grad2(self, x: Array) -> Array:
        """Return the logistic function's derivative."""
        return Sigmoid().grad(x)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        _expm1(xp, new, xp.negative(y, out=out))
        return xp.negative(out, out=out)


@dataclass(frozen=True)
class Exponential(Activation):
    """``exp(z)``."""

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """See :class:`Activation`."""
        return "exponential", (0.0, 0.0)

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        xp.exp(z, out=out)

    def _slope(self, xp: Any, out: Array, new: New, x: Array) -> Array:
        return xp.exp(x, out=out)

    def grad2(self, x: Array) -> Array:
        """Return ``exp(x)``."""
        return namespace(x).exp(x)

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array) -> Array:
        return y


_CLASSES: tuple[type[Activation], ...] = (
    Identity, Affine, ReLU, LeakyReLU, ELU, SELU, GELU, Tanh, Sigmoid, HardSigmoid, SoftPlus,
    Exponential,
)  # fmt: skip


_BY_NAME = {normal_name(cls.__name__): cls for cls in _CLASSES}


def get_activation(spec: Activation | str | None) -> Activation:
    """Return the activation that ``spec`` names.

    Parameters
    ----------
    spec : Activation, str or None
        An activation; its name, with or without arguments (``"ReLU"``, ``"relu"``,
        ``"LeakyReLU(alpha=0.1)"``; case, spaces and underscores do not matter); or None for
        the identity.

    Raises
    ------
    TypeError
        If ``spec`` is neither.
    ValueError
        If the name or its arguments are unknown.
    """
    if spec is None:
        return Identity()
    if isinstance(spec, Activation):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"activation is {spec!r}; expected an Activation, its name, or None")
    labels = ", ".join(cls.__name__ for cls in _CLASSES)
    cls, arguments, options = parse_call("activation", spec, _BY_NAME, labels)
    try:
        return cls(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"activation is {spec!r}; its arguments do not fit {cls.__name__}: {error}"
        ) from None
