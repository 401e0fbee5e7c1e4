"""The built-in profiler: how long each pass of each layer takes, by the device's own clock.

Inside a step only what cannot be had later is noted: who begins, and when. All else is worked out
between steps, a few dozen of them at a time, and once for all steps that are alike.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuconv.device import Device, device, parse_device
from gpuconv.problem import ConvProblem
from gpuconv.profiling import ranges
from gpuconv.profiling.floors import Floors
from gpuconv.profiling.patterns import Pattern, Seconds
from gpuconv.profiling.ranges import REST, STEP
from gpuconv.profiling.table import Row, beyond, format_rows
from gpuconv.profiling.timing import Clock, HostClock, clock_for

if TYPE_CHECKING:
    from gpuconv.engines.base import Engine

__all__ = ["Recorder", "Span", "record_process"]

#: Marks that are kept before they are added up; a clock that waits is asked only then.
PENDING = 4096
#: Spans that the trace keeps.
TRACED = 200_000
#: Patterns of one length that are looked through: shapes that never come again are many.
RECENT = 16


class Span(NamedTuple):
    """One range, for the trace.

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


class _Block(NamedTuple):
    """Outermost ranges that have the same pattern: when they began, and their marks after that.

    All in seconds; the first two by the clock, the others by the host's.
    """

    pattern: Pattern
    starts: Seconds
    seconds: Seconds
    host_starts: Seconds
    host_seconds: Seconds


@dataclass
class _Sum:
    """What a row adds up."""

    engines: dict[str, None] = field(default_factory=dict)
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
        self.steps = 0
        self.wall = 0.0
        self.outside = 0.0
        self._before: ranges.Sink | None = None
        # What is noted: who begins and what ends, when, and where outermost ranges end in these.
        self._entries: list[Any] = []
        self._marks: list[Any] = []
        self._ends: list[tuple[int, int]] = []
        self._depth = 0
        self._clock = self.clock.mark
        # What is made of it.
        self._origin: Any = None
        self._begun = 0
        self._patterns: list[Pattern] = []
        self._recent: dict[int, list[Pattern]] = {}
        self._traced: list[_Block] = []
        self._spans = 0

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

    # These run at every pass of every layer: they append, and nothing else. A tuple a range costs
    # more than its making: it stays, and the next step's lies elsewhere in memory.

    def begin(self, owner: Any, pass_: str, x: Any = None) -> None:
        """Open a layer's range, or that of a part of a step."""
        self._depth += 1
        self._entries += (owner, pass_, None if x is None else getattr(x, "shape", None))
        self._marks.append(self._clock())

    def convolution(
        self, problem: ConvProblem, pass_: str, engine: Engine | None, other: Engine | None
    ) -> None:
        """Open a convolution's range."""
        self._depth += 1
        self._entries += (problem, pass_, engine, other)
        self._marks.append(self._clock())

    def end(self) -> None:
        """Close what was opened last."""
        self._marks.append(self._clock())
        self._entries.append(None)
        self._depth -= 1
        if not self._depth:
            self._ends.append((len(self._entries), len(self._marks)))
            if len(self._marks) >= PENDING:
                self._fold()

    # ------------------------------------------------------------------------ adding it up

    def _fold(self) -> None:
        """Add up the outermost ranges that have ended: those in a row that are alike, together."""
        alike: list[tuple[Pattern, bool, int, int]] = []
        begin = first = 0
        for end, last in self._ends:
            pattern = self._pattern(self._entries[begin:end])
            self._begun += pattern.step
            skipped = 0 < self._begun <= self.skip
            if alike and alike[-1][:2] == (pattern, skipped):
                alike[-1] = (*alike[-1][:3], last)
            else:
                alike.append((pattern, skipped, first, last))
            begin, first = end, last
        if self._origin is None and alike:
            self._origin = self._marks[0]
        for pattern, skipped, start, last in alike:
            # Where there are steps, the layers' rows are of these alone; the trace shows all.
            if not skipped:
                counted = pattern.step or not self._begun
                self._add(self._block(pattern, self._marks[start:last]), counted)
        del self._entries[:begin], self._marks[:first]
        self._ends.clear()

    def _pattern(self, entries: list[Any]) -> Pattern:
        """Return the pattern of these entries: that of an earlier step, mostly."""
        recent = self._recent.setdefault(len(entries), [])
        for k, pattern in enumerate(recent):
            if pattern.entries == entries:
                if k:
                    recent.insert(0, recent.pop(k))
                return pattern
        made = Pattern(entries)
        self._patterns.append(made)
        recent.insert(0, made)
        del recent[RECENT:]
        return made

    def _block(self, pattern: Pattern, marks: Sequence[Any]) -> _Block:
        """Return the times of outermost ranges that have the same pattern."""
        clock, origin, size = self.clock, self._origin, len(pattern.sums)
        plain = isinstance(clock, HostClock)
        host = np.array(marks if plain else [clock.host(mark) for mark in marks], np.int64)
        host = host.reshape(-1, size)
        host_starts = (host[:, 0] - clock.host(origin)) * 1e-9
        host_seconds = (host - host[:, :1]) * 1e-9
        if plain:
            return _Block(pattern, host_starts, host_seconds, host_starts, host_seconds)
        # From the begin of each: single precision, in which CUDA tells times, is enough for that.
        rows = [marks[k : k + size] for k in range(0, len(marks), size)]
        starts = np.array([clock.seconds(origin, row[0]) for row in rows])
        seconds = np.array([[clock.seconds(row[0], mark) for mark in row] for row in rows])
        return _Block(pattern, starts, seconds, host_starts, host_seconds)

    def _add(self, block: _Block, counted: bool) -> None:
        """Add outermost ranges to what they are part of."""
        pattern, whole = block.pattern, float(block.seconds[:, -1].sum())
        if pattern.step:
            self.steps += len(block.starts)
            self.wall += whole
        else:
            self.outside += whole
        if counted:
            pattern.add(block.seconds)
        if self._spans < TRACED:
            self._spans += len(block.starts) * len(pattern.ranges)
            self._traced.append(block)

    # ---------------------------------------------------------------------------- reporting

    @property
    def spans(self) -> list[Span]:
        """The ranges one by one, for the trace; of a long run the first few hundred thousand."""
        self._fold()
        found = [
            Span(
                r.name,
                r.pass_,
                r.engine,
                r.problem,
                start + times[r.first],
                times[r.last] - times[r.first],
                host_start + host_times[r.first],
                host_times[r.last] - host_times[r.first],
                r.depth,
                r.flops,
                r.bytes,
            )
            for pattern, *block in self._traced
            for start, times, host_start, host_times in zip(
                *(part.tolist() for part in block), strict=True
            )
            for r in pattern.ranges
        ]
        return found[:TRACED]

    def _sums(self) -> dict[tuple[str, str], _Sum]:
        """Return what each row adds up, in the order in which the passes first began."""
        self._fold()
        sums: dict[tuple[str, str], _Sum] = {}
        for pattern in self._patterns:
            if not pattern.count:
                continue
            for found, seconds in pattern.own():
                row = sums.setdefault((found.name, found.pass_), _Sum())
                row.seconds += seconds
                row.calls += pattern.count * found.call
                row.flops += pattern.count * found.flops
                row.bytes += pattern.count * found.bytes
                row.engines.update(dict.fromkeys(found.engine.split()))
                row.dtype = row.dtype or found.dtype
        return sums

    def rows(self) -> list[Row]:
        """Return the rows, in the order in which the passes first began; without the rest."""
        order = {
            "batch": -2, "augment": -1, "forward": 0, "loss": 1, "backward": 2, "input_grad": 3,
            "weight_grad": 4, "update": 5,
        }  # fmt: skip
        found = [
            Row(name, pass_, " ".join(s.engines), s.calls, s.seconds, s.flops, s.bytes, s.dtype)
            for (name, pass_), s in self._sums().items()
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
