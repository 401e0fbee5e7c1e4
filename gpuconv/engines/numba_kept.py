"""Functions that Numba compiles when they are first called, and keeps on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["kept", "named"]


def named(function: Any, *made_of: object) -> Any:
    """Add what a function is made of to its name, and return it.

    Numba finds what it kept by file and name, and links it by a symbol of the name, the types and a
    number that it counts in the process that compiles. So functions of one factory need names of
    their own: two that differ in nothing but what they close over, compiled in two processes, may
    have one symbol, and a process that loads both from disk would run the one for the other. And
    what comes from another file, such as a generator of instructions, makes what is kept stale by
    its stamp in the name.

    Parameters
    ----------
    function : function
    *made_of : object
        Whose texts differ where the functions do: parameters of the factory, stamps of files.
    """
    if made_of:
        text = "\0".join(map(str, made_of))
        function.__qualname__ += "_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    return function


def kept(*made_of: object, **options: Any) -> Callable[[Any], Any]:
    """Decorate a function to be compiled without the interpreter's lock; see :func:`named`.

    Where there is no place on disk it is compiled in every process.
    """
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", **options}

    def compiled(function: Any) -> Any:
        named(function, *made_of)
        try:
            return njit(cache=True, **options)(function)
        except (OSError, RuntimeError):  # nowhere to keep it
            return njit(**options)(function)

    return compiled
