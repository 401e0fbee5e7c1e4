"""Stages that are done once: what each found is on disk before the next begins."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuconv.training.files import replacing

__all__ = ["Stage", "State", "TimeOut", "run"]


class TimeOut(RuntimeError):
    """A stage has used its time; what it has found is kept, and the next run goes on with it."""


class State:
    """What the stages found so far, in a file that is always whole.

    Parameters
    ----------
    place : Path
        The file.
    identity : mapping
        What the results depend on: device, driver, versions, sources. Found under another
        identity, they are forgotten.
    """

    def __init__(self, place: Path, identity: Mapping[str, Any]) -> None:
        self._place = place
        self._data: dict[str, Any] = {"identity": dict(identity), "stages": {}, "units": {}}
        self.kept_from: str | None = None
        if place.exists():
            try:
                found = json.loads(place.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            if found.get("identity") == json.loads(json.dumps(dict(identity))):
                self._data = found
                self.kept_from = found.get("written")

    def forget(self) -> None:
        """Begin anew."""
        self._data["stages"], self._data["units"] = {}, {}
        self.kept_from = None
        self._place.unlink(missing_ok=True)

    def result(self, stage: str) -> dict[str, Any] | None:
        """Return what a finished stage found."""
        found = self._data["stages"].get(stage)
        return None if found is None else dict(found)

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Write down what a stage found."""
        self._data["stages"][stage] = dict(result)
        self._write()

    def units(self, stage: str) -> dict[str, Any]:
        """Return the parts of a stage that are done."""
        return dict(self._data["units"].get(stage, {}))

    def add(self, stage: str, unit: str, result: Any) -> None:
        """Write down a part of a stage."""
        self._data["units"].setdefault(stage, {})[unit] = result
        self._write()

    def _write(self) -> None:
        self._place.parent.mkdir(parents=True, exist_ok=True)
        self._data["written"] = time.strftime("%Y-%m-%d %H:%M:%S")
        with replacing(self._place) as temporary:
            temporary.write_text(json.dumps(self._data, allow_nan=False), encoding="utf-8")


@dataclass(frozen=True)
class Stage:
    """One part of the check.

    Attributes
    ----------
    name : str
    seconds : float
        It may take, at most.
    work : callable
        Takes the state and the seconds there are, and returns a result; ``passed: False`` in it
        is a failure. It raises :class:`TimeOut` where it must go on in another run.
    """

    name: str
    seconds: float
    work: Callable[[State, float], dict[str, Any]]


def run(
    stages: Sequence[Stage], state: State, budget: float, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """Run what is not done, or has failed; return all results, and the stages left undone.

    A stage that raises has failed, and says why; the others run all the same.
    """
    end = time.monotonic() + budget
    undone = []
    for stage in stages:
        known = state.result(stage.name)
        if known is not None and known.get("passed", True):
            say(f"{stage.name}: done before")
            continue
        left = min(stage.seconds, end - time.monotonic())
        if left <= 0:
            undone.append(stage.name)
            say(f"{stage.name}: no time left")
            continue
        begin = time.monotonic()
        try:
            result = stage.work(state, left)
        except TimeOut as error:
            undone.append(stage.name)
            say(f"{stage.name}: {error}")
            continue
        except Exception as error:
            trace = traceback.format_exc(limit=-3)
            result = {"passed": False, "reason": f"{type(error).__name__}: {error}", "trace": trace}
        result["seconds"] = round(time.monotonic() - begin, 1)
        state.finish(stage.name, result)
        state_text = "" if result.get("passed", True) else f", FAILED: {result.get('reason', '')}"
        say(f"{stage.name}: {result['seconds']} s{state_text}")
    found = {s.name: r for s in stages if (r := state.result(s.name)) is not None}
    return found, undone
