"""What a user can set for the whole process, each with its default and its bounds."""

from __future__ import annotations

import os
from types import TracebackType

__all__ = [
    "deterministic",
    "get_num_threads",
    "get_precision",
    "get_workspace_limit",
    "is_deterministic",
    "set_num_threads",
    "set_precision",
    "set_workspace_limit",
]

_workspace_limit = 256 * 2**20
_deterministic = False
_precision = "default"
_num_threads: int | None = None
#: Counts the changes, so that a choice made under other settings is not used again.
generation = 0


def changed() -> None:
    """Count a change, after which choices are made anew."""
    global generation
    generation += 1


def set_workspace_limit(limit: int) -> None:
    """Bound the memory, in bytes, that a call may use beyond its inputs and outputs.

    An engine splits the batch rather than exceed it; 256 MiB at first. The least that a
    convolution can be computed in (one output row's buffers) is used in any case. On the CPU as much
    memory of results that are gone is kept for the next ones (:func:`gpuconv.memory.clear` gives it
    back).

    Raises
    ------
    TypeError, ValueError
        If ``limit`` is not an integer of at least 1 MiB.
    """
    global _workspace_limit
    if isinstance(limit, bool) or not hasattr(limit, "__index__"):
        raise TypeError(f"limit is {limit!r}; expected a number of bytes")
    if limit < 2**20:
        raise ValueError(f"limit is {limit} bytes; expected at least {2**20} (1 MiB)")
    _workspace_limit = int(limit)
    changed()


def get_workspace_limit() -> int:
    """Return the workspace limit in bytes."""
    return _workspace_limit


class deterministic:
    """Ask for results that are bitwise equal from run to run, for good or for a ``with`` block.

    Engines that cannot promise it (atomics) are then no candidates, and forcing one is an
    error. ``gpuconv.deterministic(True)``; ``with gpuconv.deterministic(True): ...``.
    """

    def __init__(self, on: bool) -> None:
        global _deterministic
        if not isinstance(on, bool):
            raise TypeError(f"on is {on!r}; expected True or False")
        self._previous = _deterministic
        _deterministic = on
        changed()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _deterministic
        _deterministic = self._previous
        changed()


def is_deterministic() -> bool:
    """Return whether bitwise equal results are asked for."""
    return _deterministic


def set_precision(precision: str) -> None:
    """Say how far float32 products may be reordered or rounded.

    Parameters
    ----------
    precision : {"default", "strict", "tf32"}
        ``"default"``: IEEE products; Winograd transforms, which are exact but for rounding
        some ten times larger, are allowed. ``"strict"``: the definition's products only.
        ``"tf32"``: also the tensor cores' 10-bit mantissa, on GPUs that have it.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    global _precision
    if precision not in ("default", "strict", "tf32"):
        raise ValueError(f"precision is {precision!r}; expected 'default', 'strict' or 'tf32'")
    _precision = precision
    changed()


def get_precision() -> str:
    """Return the precision that :func:`set_precision` set."""
    return _precision


def set_num_threads(count: int | None) -> None:
    """Set how many threads the CPU engines use; None goes back to one a core.

    Raises
    ------
    TypeError, ValueError
        If ``count`` is not a positive integer or None.
    """
    global _num_threads
    if count is not None:
        if isinstance(count, bool) or not hasattr(count, "__index__"):
            raise TypeError(f"count is {count!r}; expected a positive integer or None")
        if count < 1:
            raise ValueError(f"count is {count}; expected a positive integer or None")
        count = int(count)
    _num_threads = count
    changed()


def cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _threads_from_environment() -> int:
    """Return ``GPUCONV_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the cores at hand."""
    for name in ("GPUCONV_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "").split(",")[0].strip()
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text and name.startswith("GPUCONV"):
            raise ValueError(f"{name} is {text!r}; expected a positive integer")
    return cores()


def get_num_threads() -> int:
    """Return how many threads the CPU engines use.

    :func:`set_num_threads`, else the environment's ``GPUCONV_NUM_THREADS`` or
    ``OMP_NUM_THREADS``, else the cores this process may run on.
    """
    global _num_threads
    if _num_threads is None:
        _num_threads = _threads_from_environment()
    return _num_threads
