"""Checks of arguments that name the argument, its value, and what is allowed; specs in text."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

__all__ = ["boolean", "integer", "normal_name", "pair", "parse_call", "real"]

T = TypeVar("T")


def integer(name: str, value: Any, least: int, expected: str = "") -> int:
    """Return ``value`` as an int of at least ``least``.

    Raises
    ------
    TypeError, ValueError
        If it is no integer, or too small.
    """
    expected = expected or f"an integer of at least {least}"
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return number


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return ``value``, an integer or two of them (rows, columns), as two.

    Raises
    ------
    TypeError, ValueError
        If it is neither.
    """
    expected = f"an integer of at least {least}, or two of them (rows, columns)"
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} is {value!r}; expected {expected}")
        rows, columns = (integer(name, v, least, expected) for v in value)
        return rows, columns
    both = integer(name, value, least, expected)
    return both, both


def real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return ``value`` as a finite float within bounds.

    Parameters
    ----------
    name : str
        Of the argument, for the error.
    value : int or float
        NumPy's numbers too.
    low, high : float
        The bounds.
    above, below : bool
        The lower, the upper bound itself is not allowed.

    Raises
    ------
    TypeError, ValueError
        If it is no real number, not finite, or out of bounds.
    """
    limits = []
    if low > -math.inf:
        limits.append(f"{'>' if above else '>='} {low:g}")
    if high < math.inf:
        limits.append(f"{'<' if below else '<='} {high:g}")
    expected = " ".join(["a finite number", " and ".join(limits)]).strip()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    if isinstance(value, np.complexfloating):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    number = float(value)
    inside = (number > low if above else number >= low) and (
        number < high if below else number <= high
    )
    if not math.isfinite(number) or not inside:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def normal_name(name: str) -> str:
    """Return the name without case, spaces, underscores and hyphens."""
    return name.replace("_", "").replace("-", "").replace(" ", "").lower()


def parse_call(
    what: str, spec: str, known: Mapping[str, T], labels: str
) -> tuple[T, list[Any], dict[str, Any]]:
    """Read ``"Name"`` or ``"Name(1, key=2)"``.

    Nothing is executed: arguments are literals. One that is itself a call, such as in
    ``"SGD(lr_scheduler=Cosine(total_steps=9))"``, is returned as its text.

    Parameters
    ----------
    what : str
        The argument's name, for the error.
    spec : str
        The text.
    known : mapping of str
        What the names stand for; keys as :func:`normal_name` gives them.
    labels : str
        The names as the error shows them.

    Returns
    -------
    found, arguments, options
        The value of ``known``, and the call's arguments.

    Raises
    ------
    ValueError
        If the name is not known or the text is no call.
    """
    name, bracket, rest = spec.partition("(")
    key = normal_name(name)
    if key not in known:
        raise ValueError(f"{what} is {spec!r}; expected one of {labels}")
    if not bracket:
        return known[key], [], {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SyntaxError("it is not one call")
        if any(k.arg is None for k in call.keywords):
            raise SyntaxError("it unpacks a mapping")
        arguments = [_literal(a) for a in call.args]
        options = {str(k.arg): _literal(k.value) for k in call.keywords}
        if len(options) < len(call.keywords):
            raise SyntaxError("it gives an argument twice")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{what} is {spec!r}; expected a name or a call such as 'Name(key=1)': {error}"
        ) from None
    return known[key], arguments, options


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return ast.unparse(node)
    return ast.literal_eval(node)
