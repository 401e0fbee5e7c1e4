"""The engine registry, and the choice: forced, else tuned, else the cheapest by prediction.

An engine that is there to be read is chosen only where it is forced or no other can compute.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from gpuconv import settings, tuning
from gpuconv.cuda import architecture
from gpuconv.device import probe
from gpuconv.engines.base import PASSES, Engine, Pass
from gpuconv.problem import ConvProblem

__all__ = [
    "Candidate",
    "EngineError",
    "EngineInfo",
    "Explanation",
    "candidates",
    "choose",
    "engine",
    "engines",
    "forced_engine",
    "get_engine",
]

#: Every engine, as module and class; a module is imported when its engine is first asked for.
_REGISTRY: dict[str, tuple[str, str, str]] = {
    # name: (device kind, module, class)
    "naive": ("cpu", "gpuconv.engines.naive", "Naive"),
    "numpy_gemm": ("cpu", "gpuconv.engines.numpy_gemm", "NumpyGemm"),
    "numpy_depthwise": ("cpu", "gpuconv.engines.numpy_depthwise", "NumpyDepthwise"),
    "numpy_depthwise_winograd": (
        "cpu",
        "gpuconv.engines.numpy_depthwise_winograd",
        "NumpyDepthwiseWinograd",
    ),
    "numpy_planar": ("cpu", "gpuconv.engines.numpy_planar", "NumpyPlanar"),
    "numpy_taps": ("cpu", "gpuconv.engines.numpy_taps", "NumpyTaps"),
    "numpy_winograd": ("cpu", "gpuconv.engines.numpy_winograd", "NumpyWinograd"),
    "numba_depthwise": ("cpu", "gpuconv.engines.numba_depthwise", "NumbaDepthwise"),
    "numba_direct": ("cpu", "gpuconv.engines.numba_direct", "NumbaDirect"),
    "numba_winograd": ("cpu", "gpuconv.engines.numba_winograd", "NumbaWinograd"),
    "cuda_atomic": ("cuda", "gpuconv.engines.cuda_atomic", "CudaAtomic"),
    "cuda_depthwise": ("cuda", "gpuconv.engines.cuda_depthwise", "CudaDepthwise"),
    "cuda_winograd": ("cuda", "gpuconv.engines.cuda_winograd", "CudaWinograd"),
    "cudnn": ("cuda", "gpuconv.engines.cudnn", "Cudnn"),
    "cuda_gemm": ("cuda", "gpuconv.engines.cuda_gemm", "CudaGemm"),
    "cuda_implicit_gemm": (
        "cuda",
        "gpuconv.engines.cuda_implicit_gemm",
        "CudaImplicitGemm",
    ),
    "cuda_tensor_core": ("cuda", "gpuconv.engines.cuda_tensor_core", "CudaTensorCore"),
}

_forced: ContextVar[str | None] = ContextVar("gpuconv_engine", default=None)


class EngineError(ValueError):
    """An engine was asked for that cannot compute what it is given."""


@dataclass(frozen=True)
class EngineInfo:
    """One line of :func:`engines`."""

    name: str
    device: str
    available: bool
    reason: str
    deterministic: bool
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        state = "available" if self.available else f"not available: {self.reason}"
        return f"{self.name:16} {self.device:5} {state}"


@cache
def get_engine(name: str) -> Engine:
    """Return the engine of this name.

    Raises
    ------
    ValueError
        If there is none.
    """
    _check_name(name)
    _, module, cls = _REGISTRY[name]
    made = getattr(importlib.import_module(module), cls)()
    if not isinstance(made, Engine):
        raise TypeError(f"{module}.{cls} is not an Engine")
    return made


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"engine is {name!r}; expected a name: {', '.join(_REGISTRY)}")
    if name not in _REGISTRY:
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(_REGISTRY)}")


def _why_unavailable(name: str) -> str | None:
    """Return why the engine cannot run on this machine; a missing device comes first."""
    if _REGISTRY[name][0] == "cuda" and probe().count == 0:
        return probe().reason
    return get_engine(name).unavailable()


def engines() -> list[EngineInfo]:
    """Return every engine: its device, whether it can run on this machine, and why not."""
    found = []
    for name, (kind, _, _) in _REGISTRY.items():
        reason = _why_unavailable(name)
        made = get_engine(name)
        found.append(
            EngineInfo(name, kind, reason is None, reason or "", made.deterministic, made.dtypes)
        )
    return found


@contextmanager
def engine(name: str | None) -> Iterator[None]:
    """Force one engine for the convolutions inside a ``with`` block.

    A convolution that the engine cannot compute is then an error that says why.

    Parameters
    ----------
    name : str or None
        See :func:`engines`; None goes back to the choice by cost.

    Raises
    ------
    ValueError
        If there is no engine of this name.
    """
    if name is not None:
        _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_engine() -> str | None:
    """Return the name that :func:`engine` forces here, or None."""
    return _forced.get()


def _why_not(name: str, problem: ConvProblem, pass_: Pass, device_kind: str) -> str | None:
    """Return why ``name`` is no candidate, or None."""
    kind = _REGISTRY[name][0]
    if kind != device_kind:
        place = {"cpu": "NumPy arrays on the CPU", "cuda": "CuPy arrays on a CUDA device"}
        return f"it computes {place[kind]}, and these are {place[device_kind]}"
    reason = _why_unavailable(name)
    if reason is not None:
        return reason
    made = get_engine(name)
    if settings.is_deterministic() and not made.can_repeat():
        return "it is not deterministic, and gpuconv.deterministic(True) asks for that"
    return made.unsupported(problem, pass_)


@dataclass(frozen=True)
class Candidate:
    """One engine's part in an :class:`Explanation`.

    Attributes
    ----------
    engine : str
        Its name.
    reason : str
        Why it is no candidate; empty where it is one.
    seconds : float
        Predicted time; NaN where it is no candidate.
    workspace : int
        Bytes beyond inputs and outputs; 0 where it is no candidate.
    tuned : float
        Measured time, see :func:`gpuconv.autotune`; NaN where it was not measured.
    """

    engine: str
    reason: str
    seconds: float
    workspace: int
    tuned: float = float("nan")


@dataclass(frozen=True)
class Explanation:
    """What :func:`gpuconv.explain` returns; ``print`` it."""

    problem: ConvProblem
    device: str
    forced: str | None
    passes: dict[str, list[Candidate]]
    choice: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.problem} on {self.device}"]
        for pass_, found in self.passes.items():
            lines.append(f"{pass_}: {self.choice[pass_]}" + (" (forced)" if self.forced else ""))
            for c in found:
                mark = "*" if c.engine == self.choice[pass_] else " "
                if c.reason:
                    lines.append(f"  {mark} {c.engine:16} no: {c.reason}")
                else:
                    rate = self.problem.flops / c.seconds / 1e9
                    tuned = "" if math.isnan(c.tuned) else f" {c.tuned * 1e3:10.4f} ms measured"
                    lines.append(
                        f"  {mark} {c.engine:16} {c.seconds * 1e3:10.4f} ms predicted{tuned}"
                        f" {rate:9.1f} GFLOP/s {c.workspace / 2**20:8.2f} MiB workspace"
                    )
        return "\n".join(lines)


def candidates(problem: ConvProblem, pass_: Pass, device_kind: str) -> list[Candidate]:
    """Return every engine with its prediction or the reason why it is no candidate."""
    measured = tuning.known(problem, pass_, device_kind)
    found = []
    for name in _REGISTRY:
        reason = _why_not(name, problem, pass_, device_kind)
        if reason is None:
            made = get_engine(name)
            seconds, workspace = made.cost(problem, pass_), made.workspace(problem, pass_)
            tuned = measured.get(name, float("nan"))
            found.append(Candidate(name, "", seconds, workspace, tuned))
        else:
            found.append(Candidate(name, reason, float("nan"), 0))
    return found


def choose(problem: ConvProblem, pass_: Pass, device_kind: str) -> Engine:
    """Return the engine that computes this pass.

    Raises
    ------
    EngineError
        If the forced engine cannot, or none can.
    """
    # GPUs of one machine may differ, and so may what is best on them.
    gpu = architecture.gpu() if device_kind == "cuda" and probe().count else None
    return _choose(problem, pass_, device_kind, gpu, _forced.get(), settings.generation)


@lru_cache(maxsize=4096)
def _choose(
    problem: ConvProblem,
    pass_: Pass,
    device_kind: str,
    gpu: architecture.GPU | None,
    forced: str | None,
    generation: int,
) -> Engine:
    if forced is not None:
        reason = _why_not(forced, problem, pass_, device_kind)
        if reason is not None:
            raise EngineError(
                f"engine {forced!r} was asked for but cannot compute {pass_} of {problem}: {reason}"
            )
        return get_engine(forced)
    found = candidates(problem, pass_, device_kind)
    usable = [c for c in found if not c.reason]
    if not usable:
        reasons = "; ".join(f"{c.engine}: {c.reason}" for c in found)
        raise EngineError(f"no engine can compute {pass_} of {problem}: {reasons}")
    usable = [c for c in usable if not get_engine(c.engine).reference] or usable
    if tuning.is_on() and len(usable) > 1 and all(math.isnan(c.tuned) for c in usable):
        predicted = {c.engine: c.seconds for c in usable}
        times = tuning.measure(problem, pass_, device_kind, predicted, get_engine)
        return get_engine(min(times, key=lambda name: times[name]))
    tuned = [c for c in usable if not math.isnan(c.tuned)]
    if tuned:
        return get_engine(min(tuned, key=lambda c: c.tuned).engine)
    return get_engine(min(usable, key=lambda c: c.seconds).engine)


def explain(problem: ConvProblem, device_kind: str) -> Explanation:
    """Return the candidates of every pass, their predictions, and the choice."""
    # Gradients are computed in front of the activation.
    plain = problem if problem.activation is None else replace(problem, activation=None)
    of: dict[Pass, ConvProblem] = {p: problem if p == "forward" else plain for p in PASSES}
    choice: dict[str, str] = {p: choose(of[p], p, device_kind).name for p in PASSES}
    found: dict[str, list[Candidate]] = {p: candidates(of[p], p, device_kind) for p in PASSES}
    return Explanation(problem, device_kind, _forced.get(), found, choice)


def clear() -> None:
    """Forget every choice, for when devices come or go."""
    _choose.cache_clear()
