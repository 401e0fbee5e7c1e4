"""What each check launches, found without compiling or computing, and which checks a file needs."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np

from gpuconv.cuda import kernels, tensor_map
from tests.cuda_on_cpu import launch
from tests.cuda_on_cpu.arrays import ndarray
from tests.mutation.checks import Check

__all__ = ["Launch", "chosen", "fingerprint", "survey"]

_FILE = re.compile(r'^#line \d+ "([\w.]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Launch:
    """A kernel that a check launches: its file with all that is included, options and name.

    Attributes
    ----------
    files : tuple of str
        The first is the source.
    options : tuple of str
    kernel : str
    call : str
        Grid, block and arguments; of arrays the shape and how they lie.
    """

    files: tuple[str, ...]
    options: tuple[str, ...]
    kernel: str
    call: str = ""

    @property
    def variant(self) -> tuple[str, tuple[str, ...]]:
        """What is compiled."""
        return self.files[0], self.options

    def features(self, file: str) -> Iterator[str]:
        """Yield what a selection of checks for a file should have met at least once.

        Those are the kernels, and the constants that the file's own text names; a constant of a
        source that includes it means the same to a header whatever the source.
        """
        source = file if file == self.files[0] else "any"
        yield self.kernel
        dtype = next((o for o in self.options if "DTYPE" in o), "")
        yield f"{source} {dtype}"
        for option in self.options:
            name = option.removeprefix("-D").partition("=")[0]
            if name in _words(file):
                yield f"{source} {option} {dtype if name == 'ACT' else ''}"


@cache
def _words(file: str) -> frozenset[str]:
    """Return what stands in a file, comments left out."""
    text = (kernels.folder() / file).read_text(encoding="utf-8")
    return frozenset(re.findall(r"\w+", re.sub(r"//.*", "", text)))


class _Recorder:
    """In the place of a kernel: does nothing but tell of its launch."""

    max_threads_per_block = 1024

    def __init__(self, seen: dict[Launch, None], kernel: Launch) -> None:
        self._seen, self._kernel = seen, kernel

    def __call__(self, grid: Any, block: Any, args: Sequence[Any], **options: Any) -> None:
        k = self._kernel
        call = f"{grid} {block} {[_described(a) for a in args]} {options.get('shared_mem', 0)}"
        self._seen[Launch(k.files, k.options, k.kernel, call)] = None

    def __getattr__(self, name: str) -> Any:
        return 0


def _described(argument: Any) -> str:
    if isinstance(argument, ndarray):
        return f"{argument.dtype}{argument.shape}{argument.strides}"
    if isinstance(argument, np.ndarray):  # a structure
        return argument.tobytes().hex()
    return repr(argument)


def survey(checks: Sequence[Check]) -> dict[str, tuple[Launch, ...]]:
    """Return what each check launches; nothing is compiled or computed for it."""
    found: dict[str, tuple[Launch, ...]] = {}
    seen: dict[Launch, None] = {}

    def get_function(module: Any, name: str) -> _Recorder:
        files = tuple(dict.fromkeys(_FILE.findall(module.code)))
        return _Recorder(seen, Launch(files, tuple(module.options), name))

    with (
        mock.patch.object(launch.RawModule, "get_function", get_function),
        mock.patch("tests.mutation.checks.close"),
        mock.patch("tests.mutation.checks._close"),
        mock.patch("tests.mutation.checks.assert_apart"),
        mock.patch("tests.mutation.checks._oracle", _unknown),
        mock.patch.object(tensor_map, "_encode", _map),
    ):
        for check in checks:
            seen.clear()
            check.run()
            found[check.name] = tuple(seen)
    return found


def _unknown(problem: Any, dtype: str) -> Any:
    """Return inputs without the loops' results."""
    from tests.mutation.checks import drawn

    return drawn(problem, dtype)


def _map(name: str, what: str, *arguments: Any) -> np.ndarray:
    """Return, in the place of a tensor map, a number of what it holds but for the address."""
    values = [a[:] if isinstance(a, ctypes.Array) else a.value for a in arguments]
    del values[2]
    digest = hashlib.sha512(f"{name} {values}".encode()).digest()
    return np.frombuffer(2 * digest, tensor_map.MAP)


def fingerprint(launches: Sequence[Launch]) -> str:
    """Return a number that changes when other kernels are launched, or with other arguments."""
    made = hashlib.sha256()
    for one in launches:
        made.update(f"{one.files[0]} {one.options} {one.kernel} {one.call}\n".encode())
    return made.hexdigest()[:16]


def chosen(
    file: str, checks: Sequence[Check], launches: dict[str, tuple[Launch, ...]]
) -> list[Check]:
    """Return the checks that a file's mutants are tried on.

    Every topic that reaches the file once, and what else it takes to meet every kernel, every dtype and value of a compile-time constant that the file names,
    and every activation in every dtype that a topic has it in. Those that meet most come first.
    """
    topics: set[str] = set()
    features: set[str] = set()
    made = []
    for check in checks:
        mine = [one for one in launches[check.name] if file in one.files]
        new = {f for one in mine for f in one.features(file)} - features
        if new or (mine and check.topic not in topics):
            made.append(check)
            topics.add(check.topic)
            features |= new
    return _various(
        made,
        {
            c.name: {f for one in launches[c.name] if file in one.files for f in one.features(file)}
            for c in made
        },
    )


def _various(checks: list[Check], features: dict[str, set[str]]) -> list[Check]:
    """Return the checks in an order in which each adds as much as possible to those before."""
    made: list[Check] = []
    met: set[str] = set()
    rest = list(checks)
    while rest:
        best = max(rest, key=lambda c: len(features[c.name] - met))
        rest.remove(best)
        made.append(best)
        met |= features[best.name]
    return made
