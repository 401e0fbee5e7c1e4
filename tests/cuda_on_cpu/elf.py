"""The variables of a shared library, from its ELF symbol table."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Symbol", "anchor", "plain_name", "variables"]

_SYMTAB, _WRITE, _OBJECT = 2, 1, 1


@dataclass(frozen=True)
class Symbol:
    """A variable; its address counts from where the library is loaded."""

    name: str
    address: int
    size: int
    writable: bool


@cache
def _objects(path: Path) -> tuple[Symbol, ...]:
    return tuple(_read(path.read_bytes()))


def _read(data: bytes) -> Iterator[Symbol]:
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("expected a 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    for section in sections:
        if section[1] != _SYMTAB:
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], 24):
            name, info, _, index, address, length = struct.unpack_from("<IBBHQQ", data, at)
            if info & 15 != _OBJECT or not 0 < index < count or length == 0:
                continue
            end = data.index(b"\0", names + name)
            text = data[names + name : end].decode()
            yield Symbol(text, address, length, bool(sections[index][2] & _WRITE))


def variables(path: Path) -> list[Symbol]:
    """Return what can be written in the library, but for what the compiler and we put there."""
    ours = ("cuda_on_cpu_", "DW.ref.")
    return [s for s in _objects(path) if s.writable and not s.name.startswith(ours)]


def anchor(path: Path, name: str) -> int:
    """Return the address of one variable."""
    return next(s.address for s in _objects(path) if s.name == name)


def plain_name(mangled: str) -> str:
    """Return a variable's own name: ``tile`` for ``_ZZ6kernelPfE4tile``."""
    for number in re.finditer(r"\d+", mangled):  # of the letters that follow
        end = number.end() + int(number[0])
        if number.end() < end <= len(mangled) and re.fullmatch(r"(_\d+)?", mangled[end:]):
            return mangled[number.end() : end]
    return re.sub(r"\.\d+$", "", mangled)
