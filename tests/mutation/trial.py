"""One mutant after the other, each in a process of its own that may crash or never end.

The kernels' folder is replaced by one with the changed file. A check counts only if it launches
a variant whose preprocessed text the change alters; a mutant that all such checks pass survives,
unless every altered variant compiles to the same machine code as before.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from gpuconv.cuda import kernels
from tests.cuda_on_cpu import CompileError, build
from tests.mutation.checks import Check
from tests.mutation.rules import Mutant
from tests.mutation.survey import Launch

__all__ = ["Outcome", "Runner"]

#: Seconds of CPU time that a check of a broken kernel may compute, and that a process may be silent.
CPU_LIMIT, SILENCE = 4.0, 120.0
#: So many checks are passed before a look at the machine code tells whether more of them make sense.
PATIENCE = 3

#: Beside what the checking mode watches, the bounds of arrays in registers, as the mode ``asan`` does.
_BOUNDS = ("-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")

_FILE = re.compile(r'^#line \d+ "([\w.]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes
    ----------
    status : {"caught", "survived", "same code", "unseen", "no build"}
        ``same code``: it compiles to the same machine code; ``unseen``: no variant that the
        checks use holds the changed text; ``no build``: it does not compile.
    check : str
        The one that noticed it.
    how : str
        What it said.
    seconds : float
    """

    status: str
    check: str = ""
    how: str = ""
    seconds: float = 0.0


class _Library:
    """In the place of ``build.kernel_library``, within a mutant's process."""

    def __init__(self, folder: Path, original: Callable[[str], str]) -> None:
        self._folder, self._original = folder, original
        self._real = build.kernel_library
        self._texts: dict[tuple[str, tuple[str, ...], str, str], tuple[str, str]] = {}
        self._same: set[tuple[str, tuple[str, ...]]] = set()

    def texts(
        self, file: str, options: Sequence[str], mode: str, more: str = ""
    ) -> tuple[str, str]:
        """Return the preprocessed text of a variant before and after the change.

        ``more`` is what a check writes behind it.
        """
        key = file, tuple(options), mode, more
        if key not in self._texts:
            defines = [o for o in options if o[:2] in ("-D", "-U")]
            self._texts[key] = (
                preprocessed(self._original(file) + more, tuple(defines), mode),
                build._preprocess(kernels.read(file) + more, defines, mode),
            )
        return self._texts[key]

    def changed(self, file: str, options: Sequence[str]) -> bool:
        old, new = self.texts(file, options, "checked")
        return old != new

    def __call__(self, source: str, options: Sequence[str], mode: str) -> Path:
        file = _FILE.findall(source)[0]
        more = source.removeprefix(kernels.read(file))
        old, new = self.texts(file, options, mode, more)
        if old == new:
            return self._real(self._original(file) + more, options, mode)
        return self._compiled(new, mode)

    def _compiled(self, text: str, mode: str) -> Path:
        place = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}-{mode}.so"
        if not place.exists():
            flags = [*build._MODE_FLAGS[mode], *(_BOUNDS if mode == "checked" else ())]
            with mock.patch.dict(build._MODE_FLAGS, {mode: flags}):
                build._compile(text, mode, build._runtime_library(mode), place)
        return place

    def same_code(self, variants: Sequence[tuple[str, tuple[str, ...]]]) -> bool:
        """Return whether all variants compile to the same machine code as before."""
        for variant in variants:
            if variant in self._same:
                continue
            old, new = self.texts(*variant, "fast")
            try:
                if old != new and _machine_code(old) != self._compiled(new, "fast").read_bytes():
                    return False
            except CompileError:  # the check that uses it will say so
                return False
            self._same.add(variant)
        return True


@functools.cache
def preprocessed(source: str, defines: tuple[str, ...], mode: str) -> str:
    """Return a source's text behind the preprocessor."""
    return build._preprocess(source, defines, mode)


def _machine_code(text: str) -> bytes:
    """Return the library of a text; kept for the next that asks."""
    digest = hashlib.sha256(text.encode()).hexdigest()

    def make(place: Path) -> None:
        build._compile(text, "fast", build._runtime_library("fast"), place)

    return build._kept(f"mutation {digest}", make).read_bytes()


class Runner:
    """Runs mutants, some at once.

    Parameters
    ----------
    launches : dict
        Of :func:`survey`.
    jobs : int
        How many at once.
    kills : mapping of str to int, optional
        How many mutants each check noticed before; those that notice much come first.
    """

    def __init__(
        self,
        launches: dict[str, tuple[Launch, ...]],
        jobs: int,
        kills: Mapping[str, int] | None = None,
    ) -> None:
        self._launches, self._jobs = launches, jobs
        self._kernels = kernels.folder()
        self._sound: set[str] = set()
        self._kills = Counter(kills or {})
        self._last: list[str] = []

    def run(
        self, mutants: Sequence[Mutant], checks: Sequence[Check]
    ) -> Iterator[tuple[Mutant, Outcome]]:
        """Yield every mutant's outcome, as they end.

        Raises
        ------
        RuntimeError
            If a check that noticed a mutant does not pass on the kernels as they are.
        """
        for check in checks:  # what all processes start from
            check.prepare()
            for one in self._launches[check.name]:
                defines = tuple(o for o in one.options if o[:2] in ("-D", "-U"))
                preprocessed(kernels.read(one.files[0]), defines, "checked")
        waiting = list(reversed(mutants))
        last = time.monotonic()
        running: dict[int, _Process] = {}
        with tempfile.TemporaryDirectory(prefix="gpuconv-mutation-") as place:
            try:
                while waiting or running:
                    while waiting and len(running) < self._jobs:
                        process = _Process(waiting.pop(), Path(place))
                        process.start(
                            self._tried, self._ordered(checks), [p.pipe for p in running.values()]
                        )
                        running[process.pipe] = process
                    ready, _, _ = select.select(list(running), [], [], 1.0)
                    now = time.monotonic()
                    for process in running.values():
                        process.quiet += min(now - last, 2.0)  # all of this may have been stopped
                    last = now
                    silent = [p for p, r in running.items() if r.silent()]
                    for pipe in dict.fromkeys([*ready, *silent]):
                        process = running[pipe]
                        outcome = process.read()
                        if outcome is None:
                            continue
                        del running[pipe]
                        self._note(outcome, checks)
                        yield process.mutant, outcome
            finally:
                for process in running.values():
                    process.kill()

    def _ordered(self, checks: Sequence[Check]) -> list[Check]:
        """Return the checks in the order in which they probably notice something."""
        return sorted(checks, key=lambda c: (c.name not in self._last, -self._kills[c.name]))

    def _note(self, outcome: Outcome, checks: Sequence[Check]) -> None:
        if outcome.status != "caught":
            return
        name = outcome.check
        self._kills[name] += 1
        self._last = [name, *(n for n in self._last if n != name)][:2]
        if name not in self._sound:
            check = next(c for c in checks if c.name == name)
            try:
                check.run()
            except Exception as error:
                raise RuntimeError(f"{name} fails on the kernels as they are: {error}") from error
            self._sound.add(name)

    def _tried(self, mutant: Mutant, checks: Sequence[Check], place: Path, say: Any) -> None:
        """Try one mutant, in its own process; what becomes of it is said."""
        sources: dict[str, str] = {}
        for check in checks:
            for one in self._launches[check.name]:
                sources.setdefault(one.files[0], kernels.read(one.files[0]))
        for file in self._kernels.iterdir():
            if file.is_file():
                shutil.copy(file, place)
        changed = place / mutant.file
        changed.write_text(mutant.apply(changed.read_text(encoding="utf-8")), encoding="utf-8")
        kernels.folder = lambda: place
        kernels.read.cache_clear()
        library = _Library(place, sources.__getitem__)
        build.kernel_library = library
        altered: dict[tuple[str, tuple[str, ...]], None] = {}
        passed, same = 0, True
        for check in checks:
            variants = {
                one.variant: None for one in self._launches[check.name] if mutant.file in one.files
            }
            mine = [v for v in variants if library.changed(*v)]
            if not mine:
                continue
            altered.update(dict.fromkeys(mine))
            if passed >= PATIENCE and same:
                same = library.same_code(list(altered))
                if same:
                    continue
            say(check=check.name)
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT)
            try:
                check.run()
            except CompileError as error:
                say(status="no build", how=str(error)[:200])
                return
            except Exception as error:
                words = " ".join(f"{type(error).__name__}: {error}".split())
                say(status="caught", how=words[:200])
                return
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            passed += 1
        if not altered:
            say(status="unseen")
        else:
            same = same and library.same_code(list(altered))
            say(status="same code" if same else "survived")


class _Process:
    """A mutant in its own process group."""

    def __init__(self, mutant: Mutant, place: Path) -> None:
        self.mutant = mutant
        self.pipe = -1
        self._folder = Path(tempfile.mkdtemp(dir=place))
        self._text = b""
        self._pid = 0
        self._began = time.monotonic()
        self.quiet = 0.0  # seconds since something was heard

    def start(self, work: Callable[..., None], checks: Sequence[Check], others: list[int]) -> None:
        """Fork; the child does the work and ends."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pipe, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            for pipe in (self.pipe, *others):
                os.close(pipe)
            self._child(work, checks, write)
        os.close(write)

    def _child(self, work: Callable[..., None], checks: Sequence[Check], write: int) -> NoReturn:
        status = 1
        try:
            os.setsid()
            faulthandler.disable()
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(quiet, stream)

            def say(**words: str) -> None:
                os.write(write, (json.dumps(words) + "\n").encode())

            try:
                work(self.mutant, checks, self._folder, say)
                status = 0
            except BaseException as error:  # a fault of the tool, not of the mutant
                say(status="error", how=f"{type(error).__name__}: {error}"[:500])
        finally:
            os._exit(status)

    def silent(self) -> bool:
        """Return whether nothing was heard for too long."""
        return self.quiet > SILENCE

    def read(self) -> Outcome | None:
        """Return the outcome, if it is over."""
        if self.silent():
            self.kill()
        else:
            part = os.read(self.pipe, 1 << 16)
            self.quiet = 0.0
            self._text += part
            if part:
                return None
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(self._wait())
        shutil.rmtree(self._folder, ignore_errors=True)
        said = [json.loads(line) for line in self._text.splitlines()]
        check = next((s["check"] for s in reversed(said) if "check" in s), "")
        seconds = round(time.monotonic() - self._began, 2)
        last = said[-1] if said else {}
        if last.get("status") == "error" or (not check and "status" not in last):
            raise RuntimeError(f"{self.mutant}: {last.get('how', f'exit status {code}')}")
        if "status" in last:
            kept = check if last["status"] == "caught" else ""
            return Outcome(last["status"], kept, last.get("how", ""), seconds)
        reason = "no end" if -code in (signal.SIGVTALRM, signal.SIGKILL) else f"crashed ({code})"
        return Outcome("caught", check, reason, seconds)

    def _wait(self) -> int:
        return os.waitpid(self._pid, 0)[1]

    def kill(self) -> None:
        """End the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
