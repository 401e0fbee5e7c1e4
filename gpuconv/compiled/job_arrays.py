"""Arrays of the jobs of :func:`gpuconv.compiled.run`: an address and a shape among the numbers."""

from __future__ import annotations

import zlib
from pathlib import Path

from numba import carray
from numba.extending import register_jitable

from gpuconv.engines.numba_memory import bytes_at, floats_at, numbers_at

__all__ = ["STAMP", "factor_table", "five", "five_bytes", "five_numbers", "line", "table"]

#: Numba keeps compiled loops by their own file; this makes them stale when this one changes.
STAMP = zlib.crc32(Path(__file__).read_bytes())


@register_jitable(inline="always")
def five(given, at):
    shape = given[at + 1], given[at + 2], given[at + 3], given[at + 4], given[at + 5]
    return carray(floats_at(given[at]), shape)


@register_jitable(inline="always")
def five_bytes(given, at):
    shape = given[at + 1], given[at + 2], given[at + 3], given[at + 4], given[at + 5]
    return carray(bytes_at(given[at]), shape)


@register_jitable(inline="always")
def five_numbers(given, at):
    shape = given[at + 1], given[at + 2], given[at + 3], given[at + 4], given[at + 5]
    return carray(numbers_at(given[at]), shape)


@register_jitable(inline="always")
def table(given, at):
    return carray(numbers_at(given[at]), (given[at + 1], given[at + 2]))


@register_jitable(inline="always")
def factor_table(given, at):
    return carray(floats_at(given[at]), (given[at + 1], given[at + 2]))


@register_jitable(inline="always")
def line(given, at):
    return carray(numbers_at(given[at]), given[at + 1])
