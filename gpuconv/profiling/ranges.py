"""Named ranges around every layer's and every convolution's passes: one mechanism for all profilers.

What computes says what it is about to do::

    with ranges.of(self, "forward"):
        ...

and a *sink* is told of the begin and the end: :class:`NvtxSink` shows them in NVIDIA's
profilers, :class:`gpuconv.profiling.recorder.Recorder` measures them. While there is no sink,
which is the rule, a range is one look at a global name and an empty ``with``.

Ranges nest. A convolution inside a layer's pass is counted with that layer. Only the thread that
installed the sink is followed: what the engines' own threads do happens within its ranges.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from gpuconv.cuda import runtime
from gpuconv.problem import ConvProblem

if TYPE_CHECKING:
    from gpuconv.engines.base import Engine

__all__ = [
    "REST", "STEP", "VALIDATION", "NvtxSink", "Sink", "convolution", "install", "label", "name_layers", "named_ranges", "of",
    "part",
]  # fmt: skip

Array = Any

#: The range around a whole step, and its pass: what of the step is in no other range.
STEP, REST = "step", "rest"
#: The range around what is computed between steps, to validate.
VALIDATION = "validation"


class Sink(Protocol):
    """What follows the ranges."""

    def begin(self, owner: Any, pass_: str, x: Array | None) -> None:
        """A layer's pass begins, or a part of a step.

        Parameters
        ----------
        owner : LayerBase or str
            The layer; a part of a step by its name.
        pass_ : str
            Such as ``"forward"``.
        x : ndarray or None
            The layer's input, if it has one. Not to be kept: it holds memory.
        """

    def convolution(
        self, problem: ConvProblem, pass_: str, engine: Engine | None, other: Engine | None
    ) -> None:
        """A convolution's pass begins; one or two engines compute it."""

    def end(self) -> None:
        """The range that began last ends."""


class _End:
    """The end of every range under a sink: one object, as one a range would cost at every call."""

    __slots__ = ("_end",)

    def __init__(self, sink: Sink) -> None:
        self._end = sink.end

    def __enter__(self) -> None:
        """Do nothing: the range has begun."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()


_NOTHING: AbstractContextManager[None] = nullcontext()
_sink: Sink | None = None
_end: AbstractContextManager[None] = _NOTHING
_thread = 0


def of(owner: Any, pass_: str, x: Array | None = None) -> AbstractContextManager[None]:
    """Begin the range of a layer's pass over ``x``; return what ends it, to be entered at once."""
    sink = _sink
    if sink is None or get_ident() != _thread:
        return _NOTHING
    sink.begin(owner, pass_, x)
    return _end


#: The range of a part of a step that is no layer's, such as ``part("step", "loss")``.
part = of


def convolution(
    problem: ConvProblem, pass_: str, engine: Engine | None, other: Engine | None = None
) -> AbstractContextManager[None]:
    """Begin the range of a convolution's pass; return what ends it, to be entered at once."""
    sink = _sink
    if sink is None or get_ident() != _thread:
        return _NOTHING
    sink.convolution(problem, pass_, engine, other)
    return _end


def install(sink: Sink | None) -> Sink | None:
    """Let ``sink`` follow the ranges of this thread from now on; return what did so before."""
    global _sink, _end, _thread
    before = _sink
    _sink, _thread = sink, get_ident()
    _end = _NOTHING if sink is None else _End(sink)
    return before


# ------------------------------------------------------------------------------------- names

_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def name_layers(layers: Iterable[Any]) -> None:
    """Number the layers of a network, by which tables and ranges tell them apart."""
    for k, layer in enumerate(layers):
        for name, leaf in layer.leaves():
            place = f"{k}.{name}" if name else str(k)
            _names[leaf] = f"{place} {describe(leaf)}"


def describe(layer: Any) -> str:
    """Return a layer in few words: its class, its outputs and its window."""
    words = [type(layer).__name__]
    for name in ("out_ch", "n_out"):
        value = getattr(layer, name, None)
        if isinstance(value, int) and type(layer).__name__ != "Pool2D":
            words.append(str(value))
    window = getattr(layer, "kernel_shape", None)
    if isinstance(window, tuple):
        words.append("x".join(map(str, window)))
    return " ".join(words)


def label(owner: Any) -> str:
    """Return the name of a range's owner."""
    if isinstance(owner, str):
        return owner
    return _names.get(owner) or describe(owner)


def engine_names(*engines: Engine | None) -> str:
    """Return the names of what computes a pass, each once."""
    return " ".join(dict.fromkeys(e.name for e in engines if e is not None))


@lru_cache(maxsize=4096)
def convolution_name(problem: ConvProblem, pass_: str, engines: str) -> str:
    """Return a convolution's pass as profilers show it."""
    x, w = ("x".join(map(str, shape)) for shape in (problem.x_shape, problem.w_shape))
    what = f"{engines} {problem.dtype} {problem.layout} {x} * {w}".lstrip()
    return f"gpuconv.conv{problem.ndim}d.{pass_}[{what}]"


# -------------------------------------------------------------------------------------- NVTX


class NvtxSink:
    """Shows the ranges in the timelines of NVIDIA's profilers, by CuPy's binding of NVTX."""

    def __init__(self) -> None:
        self._nvtx = runtime.cupy().cuda.nvtx

    def begin(self, owner: Any, pass_: str, x: Array | None) -> None:
        """Push a range."""
        self._nvtx.RangePush(f"gpuconv.{label(owner)}.{pass_}")

    def convolution(
        self, problem: ConvProblem, pass_: str, engine: Engine | None, other: Engine | None
    ) -> None:
        """Push a range."""
        self._nvtx.RangePush(convolution_name(problem, pass_, engine_names(engine, other)))

    def end(self) -> None:
        """Pop it."""
        self._nvtx.RangePop()


@contextmanager
def named_ranges() -> Iterator[None]:
    """Show every pass as an NVTX range inside a ``with`` block.

    ``GPUCONV_NVTX=1`` in the environment does so for a whole process; ``gpuconv profile`` sets it
    for what it starts under a profiler of NVIDIA's.

    Raises
    ------
    ImportError
        If CuPy, whose binding is used, is not there.
    """
    before = install(NvtxSink())
    try:
        yield
    finally:
        install(before)


def from_environment() -> None:
    """Do what ``GPUCONV_NVTX`` and ``GPUCONV_PROFILE`` ask of a whole process."""
    if os.environ.get("GPUCONV_PROFILE"):
        from gpuconv.profiling.recorder import record_process

        record_process(os.environ["GPUCONV_PROFILE"])
    elif os.environ.get("GPUCONV_NVTX", "0") not in ("", "0"):
        try:
            install(NvtxSink())
        except Exception:  # no CuPy: what computes on the CPU has nothing to show
            install(None)


if "GPUCONV_NVTX" in os.environ or "GPUCONV_PROFILE" in os.environ:
    from_environment()
