"""What an activation is: a function of every element, with its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ClassVar

from gpuconv.compiled import activations as fast
from gpuconv.device import namespace
from gpuconv.elementwise import New, Step, apply

__all__ = ["Activation"]

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
        if out is None:
            return value.astype(x.dtype)
        out[...] = value
        return out

    return call


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its first and second derivatives."""

    def __init_subclass__(cls) -> None:
        """Let what a class computes by itself take bfloat16, which it need not know of."""
        super().__init_subclass__()
        for name in ("fn", "grad2"):
            if name in cls.__dict__:
                setattr(cls, name, _through_float32(cls.__dict__[name]))

    #: The output determines the derivative (``grad_from_output`` exists).
    invertible: ClassVar[bool] = True
    #: The derivative depends on the sign of the argument alone, which equals the output's.
    by_sign: ClassVar[bool] = False

    @property
    def loop(self) -> tuple[str, tuple[float, float]] | None:
        """Name and numbers of its compiled formula (:mod:`gpuconv.compiled`), if it has one."""
        return None

    def __call__(self, z: Array) -> Array:
        """Apply the function; a 1-D array is taken as one example, as in numpy-ml."""
        return self.fn(z.reshape(1, -1) if z.ndim == 1 else z)

    def fn(self, z: Array, out: Array | None = None) -> Array:
        """Return the value at ``z``; ``out`` may be ``z`` itself."""
        made = fast.value(self, z, out)
        return apply(self._value, z, out=out) if made is None else made

    def grad(self, x: Array) -> Array:
        """Return the first derivative at ``x``."""
        return apply(_whole(self._slope), x)

    def grad2(self, x: Array) -> Array:
        """Return the second derivative at ``x``."""
        return namespace(x).zeros_like(x)

    def grad_from_output(self, y: Array) -> Array:
        """Return the first derivative where the function's value is ``y``."""
        self._check_invertible()
        return apply(_whole(self._slope_from_output), y)

    def backward(
        self, dy: Array, x: Array | None = None, y: Array | None = None, out: Array | None = None
    ) -> Array:
        """Return the gradient with respect to the argument, ``dy * act'``, in one pass.

        Parameters
        ----------
        dy : ndarray
            Gradient with respect to the function's value.
        x : ndarray, optional
            The argument.
        y : ndarray, optional
            The value, in the place of ``x``, where the derivative follows from it.
        out : ndarray, optional
            Where to put the result; may be one of the arrays.

        Raises
        ------
        ValueError
            If there is no ``x``, and the derivative does not follow from the output.
        """
        if y is not None and (self.invertible or x is None):
            self._check_invertible()
            made = fast.backward(self, dy, y, True, out)
            return made if made is not None else apply(
                _times(self._slope_from_output), dy, y, out=out
            )  # fmt: skip
        if x is None:
            raise ValueError("x and y are None; expected one of them")
        made = fast.backward(self, dy, x, False, out)
        return apply(_times(self._slope), dy, x, out=out) if made is None else made

    def _check_invertible(self) -> None:
        if not self.invertible:
            raise ValueError(
                f"the derivative of {self} does not follow from its output; "
                "apply it outside the convolution, or use an activation that can be fused: "
                + ", ".join(c.__name__ for c in Activation.__subclasses__() if c.invertible)
            )

    # The formulas, over a block: see :data:`gpuconv.elementwise.Step`.

    def _value(self, xp: Any, out: Array, new: New, z: Array) -> None:
        """Write the value at ``z`` into ``out``, which may be ``z``: it is read no more then."""
        raise NotImplementedError

    def _slope(self, xp: Any, out: Array, new: New, x: Array, /) -> Array:
        """Return the derivative at ``x``, written into ``out`` or not; ``out`` is not ``x``."""
        raise NotImplementedError

    def _slope_from_output(self, xp: Any, out: Array, new: New, y: Array, /) -> Array:
        """Return the derivative where the value is ``y``, as :meth:`_slope` does."""
        raise NotImplementedError

    def __str__(self) -> str:
        arguments = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return type(self).__name__ + (f"({arguments})" if arguments else "")


def _whole(slope: Callable[..., Array]) -> Step:
    """Return the step that writes a derivative."""

    def step(xp: Any, out: Array, new: New, at: Array) -> None:
        found = slope(xp, out, new, at)
        if found is not out:
            out[...] = found

    return step


def _times(slope: Callable[..., Array]) -> Step:
    """Return the step that multiplies a gradient by a derivative."""

    def step(xp: Any, out: Array, new: New, dy: Array, at: Array) -> None:
        shared = out is dy or out is at
        xp.multiply(dy, slope(xp, new("slope") if shared else out, new, at), out=out)

    return step
