"""The built-in profiler: how long each pass of each layer takes, by the device's own clock."""

from __future__ import annotations

import atexit
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from gpuconv.device import Device, device, parse_device
from gpuconv.problem import ConvProblem
from gpuconv.profiling import ranges
from gpuconv.profiling.floors import Floors
from gpuconv.profiling.ranges import REST, STEP
from gpuconv.profiling.table import Row, beyond, format_rows
from gpuconv.profiling.timing import Clock, clock_for

__all__ = ["Recorder", "Span", "layer_work", "record_process"]

#: Spans that are kept before they are added up; a clock that waits is asked only then.
PENDING = 4096
#: Spans that the trace keeps.
TRACED = 200_000


class Span(NamedTuple):
    """One range, for the trace. Made at every pass: a tuple costs a third of a frozen dataclass.

    Attributes
    ----------
    name, pass_, engine : str
        As in :class:`~gpuconv.profiling.table.Row`.
    problem : ConvProblem or None
        The convolution.
    start, seconds : float
        When it began, in seconds after the first, and how long it took, by the clock.
    host_start, host_seconds : float
        The same by the host's clock: on a GPU, when the work was put into the queue.
    depth : int
        Ranges around it.
    flops, bytes : int
        By the definition.
    """

    name: str
    pass_: str
    engine: str
    problem: ConvProblem | None
    start: float
    seconds: float
    host_start: float
    host_seconds: float
    depth: int
    flops: int
    bytes: int


class _Frame:
    """A range. Made at every pass of every layer: what it mostly has is its class's."""

    split = False  # convolutions inside have ranges of their own
    start: Any = None
    end: Any = None
    depth = 0
    inner: bool | None = False
    work = (0, 0)

    def __init__(
        self, owner: Any, name: str, pass_: str, problem: ConvProblem | None, engines: str
    ) -> None:
        self.owner, self.name, self.pass_ = owner, name, pass_
        self.problem, self.engines = problem, engines


@dataclass
class _Sum:
    """What a row adds up."""

    engines: dict[str, None]
    dtype: str = ""
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0


class Recorder:
    """Measures every pass inside a ``with`` block, and makes rows and spans of them.

    Parameters
    ----------
    place : Device, str or None
        Where is computed; None is the default device. On a GPU CUDA's events measure, and the
        device is waited for only when rows are made of a few thousand of them.
    skip : int
        Steps of training at the start that are not counted: they compile and fill caches.
    clock : Clock, optional
        Another clock.

    Notes
    -----
    Times are exclusive: what an inner range took is not in the outer one's, so rows add up.

    Attributes
    ----------
    spans : list of Span
        For the trace; the first few hundred thousand.
    steps : int
        Steps of training that were counted.
    wall, outside : float
        Seconds within steps, and in ranges around which there was no step.
    """

    def __init__(
        self, place: Device | str | None = None, *, skip: int = 0, clock: Clock | None = None
    ) -> None:
        self.place = device() if place is None else parse_device(place)
        self.clock = clock or clock_for(self.place)
        self.skip = skip
        self.spans: list[Span] = []
        self.steps = 0
        self.wall = 0.0
        self.outside = 0.0
        self._mark = self.clock.mark
        self._stack: list[_Frame] = []
        self._pending: list[_Frame] = []
        self._labels: dict[int, tuple[Any, str]] = {}
        self._rows: dict[tuple[str, str], _Sum] = {}
        self._works: dict[tuple[int, str, int], tuple[int, int]] = {}
        self._origin: Any = None
        self._children: list[float] = []
        self._begun = 0
        self._before: ranges.Sink | None = None

    # ---------------------------------------------------------------------------- following

    def __enter__(self) -> Recorder:
        self._before = ranges.install(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ranges.install(self._before)
        self._fold()

    def begin(self, owner: Any, pass_: str, problem: ConvProblem | None, engines: str) -> None:
        """Open a range."""
        stack = self._stack
        if owner is not None:
            found = self._labels.get(id(owner))
            if found is None:  # the owner is kept, so that its id stays its own
                found = self._labels[id(owner)] = owner, ranges.label(owner)
            name = found[1]
        elif stack and stack[-1].name != STEP:
            name = stack[-1].name
        else:
            name = str(problem)
        if not stack:
            if self._origin is None:
                self._origin = self._mark()
            if name == STEP:
                self._begun += 1
        elif problem is not None:
            stack[-1].split = True
        frame = _Frame(owner, name, pass_, problem, engines)
        stack.append(frame)
        frame.start = self._mark()

    def end(self) -> None:
        """Close it."""
        mark, stack = self._mark(), self._stack
        frame = stack.pop()
        if 0 < self._begun <= self.skip:
            return
        frame.end = mark
        if frame.problem is not None or (type(frame.owner) is not str and not frame.split):
            frame.work = self._work(frame)
        if stack:
            last = stack[-1]
            frame.depth = len(stack)
            frame.inner = last.name == frame.name and last.pass_ == frame.pass_
        # Where there are steps, the layers' rows are of these alone; the trace shows all.
        if self._begun and (stack[0] if stack else frame).name != STEP:
            frame.inner = None
        self._pending.append(frame)
        if not stack and len(self._pending) >= PENDING:
            self._fold()

    def _work(self, frame: _Frame) -> tuple[int, int]:
        """Return operations and bytes of a range, by the definition."""
        problem = frame.problem
        if problem is not None:
            if frame.split:  # counted inside
                return 0, 0
            passes = 2 if frame.pass_ == "backward" else 1
            return passes * problem.flops, passes * problem.bytes
        owner = frame.owner
        inputs = getattr(owner, "X", None)
        if not inputs or frame.split:
            return 0, 0
        key = id(owner), frame.pass_, len(inputs[-1])
        found = self._works.get(key)
        if found is None:
            found = self._works[key] = layer_work(owner, frame.pass_, inputs[-1])
        return found

    def _fold(self) -> None:
        """Add up what is pending, innermost first, as ranges end."""
        children, elapsed, spans = self._children, self.clock.seconds, self.spans
        for frame in self._pending:
            depth = frame.depth
            seconds = elapsed(frame.start, frame.end)
            while len(children) < depth + 2:
                children.append(0.0)
            own = seconds - children[depth + 1]
            children[depth + 1] = 0.0
            children[depth] = children[depth] + seconds if depth else 0.0
            if frame.inner is not None:
                self._add(frame, own, not frame.inner)
            if depth == 0 and frame.name == STEP:
                self.wall += seconds
                self.steps += 1
            elif depth == 0:
                self.outside += seconds
            if len(spans) < TRACED:
                spans.append(self._span(frame, seconds))
        self._pending.clear()

    def _add(self, frame: _Frame, seconds: float, call: bool) -> None:
        """Add a range to its row."""
        row = self._rows.get((frame.name, frame.pass_))
        if row is None:
            row = self._rows[frame.name, frame.pass_] = _Sum({})
        row.seconds += seconds
        row.calls += call
        row.flops += frame.work[0]
        row.bytes += frame.work[1]
        row.engines[frame.engines] = None
        if not row.dtype:
            row.dtype = frame.problem.dtype if frame.problem else _dtype(frame.owner)

    def _span(self, frame: _Frame, seconds: float) -> Span:
        clock, origin = self.clock, self._origin
        start = clock.host(frame.start)
        return Span(
            frame.name,
            frame.pass_,
            frame.engines,
            frame.problem,
            clock.seconds(origin, frame.start),
            seconds,
            (start - clock.host(origin)) * 1e-9,
            (clock.host(frame.end) - start) * 1e-9,
            frame.depth,
            *frame.work,
        )

    # ---------------------------------------------------------------------------- reporting

    def rows(self) -> list[Row]:
        """Return the rows, in the order in which the passes first began; without the rest."""
        self._fold()
        order = {
            "forward": 0, "loss": 1, "backward": 2, "input_grad": 3, "weight_grad": 4, "update": 5,
        }  # fmt: skip
        found = [
            Row(
                name,
                pass_,
                " ".join(dict.fromkeys(" ".join(s.engines).split())),
                s.calls,
                s.seconds,
                s.flops,
                s.bytes,
                s.dtype,
            )
            for (name, pass_), s in self._rows.items()
            if (name, pass_) != (STEP, REST)
        ]
        names = {row.name: None for row in sorted(found, key=lambda r: _numbered(r.name))}
        place = {name: k for k, name in enumerate(names)}
        return sorted(found, key=lambda r: (place[r.name], order.get(r.pass_, 9), r.pass_))

    def accounted(self) -> float:
        """Return the seconds of all rows together."""
        return math.fsum(row.seconds for row in self.rows())

    def whole(self) -> float:
        """Return the seconds that the rows are parts of: of the steps, where there are any."""
        self._fold()
        return self.wall if self.steps else self.outside

    def table(self, floors: Floors | None = None) -> str:
        """Return the rows as text, and how much of the time they account for."""
        rows, whole = self.rows(), self.whole()
        if not rows:
            return "nothing was computed"
        text = format_rows(rows, whole, floors, self.steps)
        share = 100 * self.accounted() / whole if whole else 0.0
        if self.steps:
            took = f"{1e3 * whole / self.steps:.3f} ms, the mean of {self.steps} steps"
        else:
            took = f"{1e3 * whole:.3f} ms"
        text += f"\nthe rows are {share:.1f}% of {took}; timed by {self.clock.what}"
        if floors is not None and any(beyond(row, floors) for row in rows):
            text += (
                "\nabove 100% of the floor: with fewer operations than the definition's "
                "(Winograd), from a cache, or beside a floor measured on a busy machine"
            )
        return text

    def dtypes(self) -> list[str]:
        """Return the dtypes that were computed in."""
        return sorted({row.dtype for row in self.rows() if row.dtype})


def _numbered(name: str) -> tuple[int, int]:
    """Return a key that brings layers into the order of their numbers, parts of a step first."""
    number = name.split(" ")[0].split(".")[0]
    if number.isdigit() and " " in name:
        return 1, int(number)
    return (0 if name == STEP else 2), 0


def _dtype(owner: Any) -> str:
    found = getattr(owner, "dtype", None)
    return found if isinstance(found, str) else ""


def layer_work(layer: Any, pass_: str, x: Any) -> tuple[int, int]:
    """Return FLOPs and bytes of a layer's pass over an input, if the layer has no convolutions.

    Counted as for a convolution: what must be read and written, once. A layer without weights
    only moves its data. The gradients of a dense layer are two products of the forward's size.
    """
    if pass_ not in ("forward", "backward"):
        return 0, 0
    try:
        out = math.prod(layer.output_shape(tuple(x.shape)))
    except (ValueError, AttributeError, TypeError):
        return 0, 0
    weights = [p for p in layer.parameters.values() if p.ndim == 2 and min(p.shape) > 1]
    if x.ndim == 2 and len(weights) == 1:
        w = weights[0]
        products = 1 if pass_ == "forward" else 2
        return products * 2 * out * w.shape[0], products * x.itemsize * (x.size + w.size + out)
    arrays = 2 if pass_ == "forward" else 4  # the backward looks at input and output again
    return 0, x.itemsize * (x.size + out) * arrays // 2


# ------------------------------------------------------------------------------- processes


def record_process(folder: str) -> None:
    """Record this process from now on, and write table, trace and picture into ``folder`` at exit.

    This is how ``gpuconv profile -- python script.py`` profiles without NVIDIA's tools.
    """
    from gpuconv.profiling.files import limits, write

    recorder = Recorder()
    # Now: at exit there are no new threads. Of every dtype, as it is not known what will be used.
    floors = limits(recorder, 0.1, ("float16", "bfloat16", "float32", "float64"))
    ranges.install(recorder)

    def finish() -> None:
        ranges.install(None)
        write(recorder, Path(folder), floors)

    atexit.register(finish)
