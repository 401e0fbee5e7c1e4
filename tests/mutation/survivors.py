"""``survivors.toml``: changes that no check can notice, each with the reason.

An entry names the file, the line's text and the change as it is printed, so that it survives
edits elsewhere. Where several changes of a file read the same, ``numbers`` says which of them are
meant, counted from 1. An entry that fits no change of its file is an error, and so is one whose
change was noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.rules import Mutant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FILE", "Entry", "load", "unfit"]

FILE = Path(__file__).with_name("survivors.toml")


@dataclass(frozen=True)
class Entry:
    """A change that makes no difference."""

    file: str
    code: str
    change: str
    reason: str
    numbers: tuple[int, ...] = ()

    def fits(self, mutant: Mutant) -> bool:
        """Return whether this is the change."""
        if self.numbers and mutant.number not in self.numbers:
            return False
        return (self.file, self.code, self.change) == (mutant.file, mutant.code, mutant.change)

    def __str__(self) -> str:
        return f"{self.file}: {self.change} in {self.code!r}"


def load(file: Path = FILE) -> list[Entry]:
    """Read the entries.

    Raises
    ------
    ValueError
        If one is not as it should be.
    """
    if not file.exists():
        return []
    with open(file, "rb") as stream:
        found = tomllib.load(stream).get("survivor", [])
    entries = []
    for one in found:
        numbers = tuple(one.pop("numbers", ()))
        if set(one) != {"file", "code", "change", "reason"} or len(one["reason"].split()) < 3:
            raise ValueError(f"{file.name}: file, code, change and a reason are needed: {one}")
        entries.append(Entry(**one, numbers=numbers))
    return entries


def unfit(entries: Iterable[Entry], mutants: Iterable[Mutant]) -> list[Entry]:
    """Return the entries that fit none of the mutants, or not all those that they number."""
    pool = list(mutants)
    found = [(e, sum(e.fits(m) for m in pool)) for e in entries]
    return [e for e, count in found if count < max(1, len(set(e.numbers)))]
