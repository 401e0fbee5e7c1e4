"""What Numba compiles and keeps on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from numba import njit

__all__ = ["OPTIONS", "kept", "on_disk"]

#: How all of them are compiled.
OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}


def on_disk(compiler: Callable[..., Any], function: Any, *made_of: object) -> Any:
    """Return a function compiled, named by what it is made of and kept where there is a place.

    Numba finds what it kept by file and name, and links it by a symbol of the name, the types and a
    number that it counts in the process that compiles. So functions of one factory need names of
    their own: two that differ in nothing but what they close over, compiled in two processes, may
    have one symbol, and a process that loads both from disk would run the one for the other. And
    what comes from another file, such as a generator of instructions, makes what is kept stale by
    its stamp in the name.

    Parameters
    ----------
    compiler : callable
        Of ``cache``: ``numba.njit`` or ``numba.cfunc`` with the rest of its options.
    function : function
    *made_of : object
        Whose texts differ where the functions do: parameters of the factory, stamps of files.
    """
    if made_of:
        text = "\0".join(map(str, made_of))
        function.__qualname__ += "_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        return compiler(cache=True)(function)
    except (OSError, RuntimeError):  # nowhere to keep it
        return compiler(cache=False)(function)


def kept(*made_of: object) -> Callable[[Any], Any]:
    """Decorate a function to be compiled when it is first called, without the interpreter's lock.

    See :func:`on_disk`.
    """
    return lambda function: on_disk(partial(njit, nogil=True, **OPTIONS), function, *made_of)
