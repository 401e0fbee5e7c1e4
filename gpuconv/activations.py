"""Activation functions: value, derivatives, and what the engines may fuse.

Names, parameters and defaults are numpy-ml's. Every function works on NumPy and on CuPy
arrays: it calls the array's own library. An activation is a frozen value, so it can sit in
a :class:`~gpuconv.problem.ConvProblem` and key a cache.

A convolution's backward pass has the *output* of the activation at hand, so an engine can
fuse the derivative only where it follows from the output alone (``grad_from_output``); GELU
is not monotone and has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ClassVar

import numpy as np

from gpuconv.arguments import boolean, normal_name, parse_call, real
from gpuconv.device import namespace

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


def _through_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the method for bfloat16 as well: computed in float32, and rounded once.

    NumPy and CuPy differ in what a bfloat16 and a Python number make, and round in between.
    """

    @wraps(function)
    def call(self: Activation, x: Array, *args: Any, **kwargs: Any) -> Array:
        if x.dtype.itemsize != 2 or x.dtype.name != "bfloat16":  # the text costs time
            return function(self, x, *args, **kwargs)
        out = args[0] if args else kwargs.get("out")
        value = function(self, x.astype("float32"))
        return _store(value.astype(x.dtype) if out is None else value, out)

    return call


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its first and second derivatives."""

    def __init_subclass__(cls) -> None:
        """Let the functions of a class take bfloat16, which it need not know of."""
        super().__init_subclass__()
        for name in ("fn", "grad", "grad2", "grad_from_output"):
            if name in cls.__dict__:
                setattr(cls, name, _through_float32(cls.__dict__[name]))

    #: The output determines the derivative (``grad_from_output`` exists).
    invertible: ClassVar[bool] = True
    #: The derivative depends on the sign of the argument alone, which equals the output's.
    by_sign: ClassVar[bool] = False

    def __call__(self, z: Array) -> Array:
        """Apply the function; a 1-D array is taken as one example, as in numpy-ml."""
        return self.fn(z.reshape(1, -1) if z.ndim == 1 else z)

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return the value at ``z``; ``out`` may be ``z`` itself."""
        raise NotImplementedError

    def grad(self, x: Array) -> Array:
        """Return the first derivative at ``x``."""
        raise NotImplementedError

    def grad2(self, x: Array) -> Array:
        """Return the second derivative at ``x``."""
        raise NotImplementedError

    def grad_from_output(self, y: Array) -> Array:
        """Return the first derivative where the function's value is ``y``."""
        raise ValueError(
            f"the derivative of {self} does not follow from its output; "
            "apply it outside the convolution, or use an activation that can be fused: "
            + ", ".join(sorted(cls.__name__ for cls in _CLASSES if cls.invertible))
        )

    def __str__(self) -> str:
        arguments = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return type(self).__name__ + (f"({arguments})" if arguments else "")


def _store(value: Array, out: Array | None) -> Array:
    if out is None:
        return value
    out[...] = value
    return out


@dataclass(frozen=True)
class Identity(Activation):
    """``z``."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``z``."""
        return z if out is None or out is z else _store(z, out)

    def grad(self, x: Array) -> Array:
        """Return ones."""
        return namespace(x).ones_like(x)

    def grad2(self, x: Array) -> Array:
        """Return zeros."""
        return namespace(x).zeros_like(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return ones."""
        return namespace(y).ones_like(y)


@dataclass(frozen=True)
class Affine(Activation):
    """``slope * z + intercept``."""

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        real("slope", self.slope)
        real("intercept", self.intercept)

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``slope * z + intercept``."""
        return _store(self.slope * z + self.intercept, out)

    def grad(self, x: Array) -> Array:
        """Return the slope everywhere."""
        return namespace(x).full_like(x, self.slope)

    def grad2(self, x: Array) -> Array:
        """Return zeros."""
        return namespace(x).zeros_like(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return the slope everywhere."""
        return namespace(y).full_like(y, self.slope)


_zeros: dict[str, Array] = {}

#: Zeros that are kept: a line long enough to forget the loop around it.
_LINE = 4096


def _maximum_of_zero(z: np.ndarray[Any, Any], out: Array | None) -> Array:
    """Return ``max(z, 0)``: NumPy takes a fifth of the time if the zero is an array, too."""
    zeros = _zeros.get(z.dtype.char)
    if zeros is None:
        zeros = _zeros[z.dtype.char] = np.zeros(_LINE, z.dtype)
    if out is None:
        out = np.empty_like(z)
    if z.flags.c_contiguous and out.flags.c_contiguous:
        flat, result = z.reshape(-1), out.reshape(-1)
        whole = z.size // _LINE * _LINE
        np.maximum(flat[:whole].reshape(-1, _LINE), zeros, out=result[:whole].reshape(-1, _LINE))
        np.maximum(flat[whole:], zeros[: z.size - whole], out=result[whole:])
        return out
    width = z.shape[-1]
    return np.maximum(z, zeros[:width] if 16 <= width <= _LINE else 0, out=out)


@dataclass(frozen=True)
class ReLU(Activation):
    """``max(z, 0)``; its derivative at 0 is 0."""

    by_sign = True

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``max(z, 0)``; NaN stays NaN."""
        if type(z) is np.ndarray and z.size > 1024:
            return _maximum_of_zero(z, out)
        return namespace(z).maximum(z, 0, out=out)

    def grad(self, x: Array) -> Array:
        """Return 1 where ``x > 0``, else 0."""
        return (x > 0).astype(x.dtype)

    def grad2(self, x: Array) -> Array:
        """Return zeros."""
        return namespace(x).zeros_like(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return 1 where ``y > 0``, else 0."""
        return self.grad(y)


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """``z`` where positive, else ``alpha * z``, with ``alpha >= 0``."""

    by_sign = True
    alpha: float = 0.3

    def __post_init__(self) -> None:
        real("alpha", self.alpha, 0)

    def __str__(self) -> str:
        return f"Leaky ReLU(alpha={self.alpha})"  # what numpy-ml writes, and reads

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``z`` where positive, else ``alpha * z``."""
        return _store(namespace(z).where(z > 0, z, self.alpha * z), out)

    def grad(self, x: Array) -> Array:
        """Return 1 where ``x > 0``, else ``alpha``."""
        return namespace(x).where(x > 0, 1, self.alpha).astype(x.dtype)

    def grad2(self, x: Array) -> Array:
        """Return zeros."""
        return namespace(x).zeros_like(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return 1 where ``y > 0``, else ``alpha``."""
        return self.grad(y)


@dataclass(frozen=True)
class ELU(Activation):
    """``z`` where positive, else ``alpha * (exp(z) - 1)``, with ``alpha >= 0`` [1]_.

    .. [1] Clevert, Unterthiner, Hochreiter: Fast and accurate deep network learning by
       exponential linear units (2016).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        real("alpha", self.alpha, 0)

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``z`` where positive, else ``alpha * (exp(z) - 1)``."""
        xp = namespace(z)
        return _store(xp.where(z > 0, z, self.alpha * xp.expm1(xp.minimum(z, 0))), out)

    def grad(self, x: Array) -> Array:
        """Return 1 where ``x > 0``, else ``alpha * exp(x)``."""
        xp = namespace(x)
        return xp.where(x > 0, 1, self.alpha * xp.exp(xp.minimum(x, 0))).astype(x.dtype)

    def grad2(self, x: Array) -> Array:
        """Return 0 where ``x > 0``, else ``alpha * exp(x)``."""
        xp = namespace(x)
        return xp.where(x > 0, 0, self.alpha * xp.exp(xp.minimum(x, 0))).astype(x.dtype)

    def grad_from_output(self, y: Array) -> Array:
        """Return 1 where ``y > 0``, else ``y + alpha``."""
        return namespace(y).where(y > 0, 1, y + self.alpha).astype(y.dtype)


@dataclass(frozen=True)
class SELU(Activation):
    """``scale * ELU(z, alpha)`` with the constants that keep unit variance [1]_.

    .. [1] Klambauer, Unterthiner, Mayr: Self-normalizing neural networks (2017).
    """

    alpha: ClassVar[float] = 1.6732632423543772
    scale: ClassVar[float] = 1.0507009873554805

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``scale * z`` where positive, else ``scale * alpha * (exp(z) - 1)``."""
        xp = namespace(z)
        negative = self.alpha * xp.expm1(xp.minimum(z, 0))
        return _store(self.scale * xp.where(z > 0, z, negative), out)

    def grad(self, x: Array) -> Array:
        """Return the scaled derivative of ELU."""
        xp = namespace(x)
        slope = xp.where(x > 0, 1, self.alpha * xp.exp(xp.minimum(x, 0)))
        return (self.scale * slope).astype(x.dtype)

    def grad2(self, x: Array) -> Array:
        """Return the scaled second derivative of ELU."""
        xp = namespace(x)
        slope = xp.where(x > 0, 0, self.alpha * xp.exp(xp.minimum(x, 0)))
        return (self.scale * slope).astype(x.dtype)

    def grad_from_output(self, y: Array) -> Array:
        """Return ``scale`` where ``y > 0``, else ``y + scale * alpha``."""
        scale = self.scale
        return namespace(y).where(y > 0, scale, y + scale * self.alpha).astype(y.dtype)


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


def _erf(x: Array) -> Array:
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


#: Beyond this Phi is 0 or 1 and flat, in every dtype; powers of larger arguments could overflow.
_GELU_FLAT = 40.0


@dataclass(frozen=True)
class GELU(Activation):
    """``z * Phi(z)`` with the normal distribution's Phi, or its tanh approximation [1]_.

    .. [1] Hendrycks, Gimpel: Gaussian error linear units (2016).
    """

    invertible = False
    approximate: bool = True

    def __post_init__(self) -> None:
        boolean("approximate", self.approximate)

    def _phi(self, x: Array) -> tuple[Array, Array]:
        """Return Phi and its derivative."""
        xp = namespace(x)
        x = xp.clip(x, -_GELU_FLAT, _GELU_FLAT)
        if self.approximate:
            c = math.sqrt(2 / math.pi)
            t = xp.tanh(c * (x + 0.044715 * x * x * x))
            return 0.5 * (1 + t), 0.5 * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
        density = xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + _erf(x / math.sqrt(2))), density

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``z * Phi(z)``."""
        return _store(z * self._phi(z)[0], out)

    def grad(self, x: Array) -> Array:
        """Return ``Phi(x) + x Phi'(x)``."""
        phi, slope = self._phi(x)
        return phi + x * slope

    def grad2(self, x: Array) -> Array:
        """Return ``2 Phi'(x) + x Phi''(x)``."""
        xp = namespace(x)
        x = xp.clip(x, -_GELU_FLAT, _GELU_FLAT)
        if not self.approximate:
            density = xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return density * (2 - x * x)
        c = math.sqrt(2 / math.pi)
        u1 = c * (1 + 3 * 0.044715 * x * x)
        u2 = c * 6 * 0.044715 * x
        t = xp.tanh(c * (x + 0.044715 * x * x * x))
        sech2 = 1 - t * t
        return sech2 * u1 + 0.5 * x * sech2 * (u2 - 2 * t * u1 * u1)


@dataclass(frozen=True)
class Tanh(Activation):
    """Hyperbolic tangent."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``tanh(z)``."""
        return namespace(z).tanh(z, out=out)

    def grad(self, x: Array) -> Array:
        """Return ``1 - tanh(x)**2``."""
        return self.grad_from_output(namespace(x).tanh(x))

    def grad2(self, x: Array) -> Array:
        """Return ``-2 tanh(x) (1 - tanh(x)**2)``."""
        t = namespace(x).tanh(x)
        return -2 * t * (1 - t * t)

    def grad_from_output(self, y: Array) -> Array:
        """Return ``1 - y**2``."""
        return 1 - y * y


@dataclass(frozen=True)
class Sigmoid(Activation):
    """Logistic function ``1 / (1 + exp(-z))``."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return the logistic function, written so that no argument overflows."""
        xp = namespace(z)
        e = xp.exp(-xp.abs(z))
        return _store(xp.where(z < 0, e, 1) / (1 + e), out)

    def grad(self, x: Array) -> Array:
        """Return ``s (1 - s)``."""
        return self.grad_from_output(self.fn(x))

    def grad2(self, x: Array) -> Array:
        """Return ``s (1 - s) (1 - 2 s)``."""
        s = self.fn(x)
        return s * (1 - s) * (1 - 2 * s)

    def grad_from_output(self, y: Array) -> Array:
        """Return ``y (1 - y)``."""
        return y * (1 - y)


@dataclass(frozen=True)
class HardSigmoid(Activation):
    """``clip(0.2 z + 0.5, 0, 1)``."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``clip(0.2 z + 0.5, 0, 1)``."""
        return _store(namespace(z).clip(0.2 * z + 0.5, 0, 1), out)

    def grad(self, x: Array) -> Array:
        """Return 0.2 inside (-2.5, 2.5), else 0."""
        return namespace(x).where(abs(x) < 2.5, 0.2, 0).astype(x.dtype)

    def grad2(self, x: Array) -> Array:
        """Return zeros."""
        return namespace(x).zeros_like(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return 0.2 where ``0 < y < 1``, else 0."""
        return namespace(y).where((y > 0) & (y < 1), 0.2, 0).astype(y.dtype)


@dataclass(frozen=True)
class SoftPlus(Activation):
    """``log(1 + exp(z))``."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``log(1 + exp(z))`` without overflow."""
        xp = namespace(z)
        return _store(xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z))), out)

    def grad(self, x: Array) -> Array:
        """Return the logistic function."""
        return Sigmoid().fn(x)

    def grad2(self, x: Array) -> Array:
        """Return the logistic function's derivative."""
        return Sigmoid().grad(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return ``1 - exp(-y)``."""
        return -namespace(y).expm1(-y)


@dataclass(frozen=True)
class Exponential(Activation):
    """``exp(z)``."""

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return ``exp(z)``."""
        return namespace(z).exp(z, out=out)

    def grad(self, x: Array) -> Array:
        """Return ``exp(x)``."""
        return namespace(x).exp(x)

    def grad2(self, x: Array) -> Array:
        """Return ``exp(x)``."""
        return namespace(x).exp(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return ``y``."""
        return y.copy()


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
