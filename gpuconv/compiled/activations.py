"""Activations of float32 arrays, compiled: a loop that reads, computes and writes once.

NumPy's way (:mod:`gpuconv.elementwise`) goes over a block once for each operation of a formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import compiled, memory

__all__ = ["CHUNK", "backward", "value"]

Array = Any
#: Elements of a chunk.
CHUNK = 128 * 1024


def value(activation: Any, z: Array, out: Array | None) -> Array | None:
    """Return ``activation.fn(z, out)``, or None if there is no loop for it.

    Parameters
    ----------
    activation : Activation
    z : ndarray
    out : ndarray, optional
        Where to put the result; may be ``z``.
    """
    if z.size < compiled.SMALL or activation.loop is None or not compiled.available():
        return None
    return _run("value", activation.loop, (z,), out)


def backward(
    activation: Any, dy: Array, at: Array, from_output: bool, out: Array | None
) -> Array | None:
    """Return ``dy`` times the derivative, or None if there is no loop for it.

    Parameters
    ----------
    activation : Activation
    dy, at : ndarray
        The gradient, and the function's argument or value.
    from_output : bool
        Whether ``at`` is the value.
    out : ndarray, optional
        Where to put the result; may be one of the arrays.
    """
    if dy.size < compiled.SMALL or activation.loop is None or not compiled.available():
        return None
    kind = "gradient from output" if from_output else "gradient"
    return _run(kind, activation.loop, (dy, at), out)


def _run(
    kind: str,
    formula: tuple[str, tuple[float, float]],
    arrays: tuple[Array, ...],
    out: Array | None,
) -> Array | None:
    if not compiled.plain(*arrays, *(() if out is None else (out,)), dense=False):
        return None
    (name, numbers), first = formula, arrays[0]
    if any(a.shape != first.shape for a in arrays):
        return None
    # Copies where need be, so that how an array lies makes no difference to the bits.
    arrays = tuple(np.ascontiguousarray(a) for a in arrays)
    if out is not None and not out.flags.c_contiguous:
        made = _run(kind, formula, arrays, None)
        if made is not None:
            out[...] = made
        return None if made is None else out
    from gpuconv.compiled.activation_loops import loop

    at = -1
    made = memory.empty(first.shape, first.dtype) if out is None else out
    if out is not None:
        for k, a in enumerate(arrays):
            if a.ctypes.data == out.ctypes.data:
                at = k
            elif np.may_share_memory(a, out):
                return None
    found = loop(kind, name, at)
    if found is None:
        return None
    flats = [a.reshape(-1) for a in (made, *(a for k, a in enumerate(arrays) if k != at))]
    shares = -(-first.size // CHUNK)
    pair = np.array(numbers, np.float32)
    compiled.run(found, [*flats, pair], shares, first.size >= compiled.PARALLEL)
    return made
