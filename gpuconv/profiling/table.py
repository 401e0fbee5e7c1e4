"""One way to report: rows of time, calls, rates and the part of the floor, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuconv.profiling.floors import Floors

__all__ = ["HEAD", "Row", "beyond", "cells", "format_columns", "format_rows", "of_floor", "rate"]

HEAD = ("calls", "ms", "share", "GFLOP/s", "GB/s", "of floor")


@dataclass(frozen=True)
class Row:
    """A pass of a layer, over all its calls.

    Attributes
    ----------
    name, pass_ : str
        The layer, and such as ``"forward"``.
    engine : str
        What computed it; may be empty.
    calls : int
        How often.
    seconds : float
        In all; what an inner pass with a row of its own took is not in it.
    flops, bytes : int
        By the definition, in all; 0 where they are not known.
    dtype : str
        Computed in; may be empty.
    """

    name: str
    pass_: str
    engine: str
    calls: int
    seconds: float
    flops: int = 0
    bytes: int = 0
    dtype: str = ""


def rate(amount: float, seconds: float) -> str:
    """Return ``amount`` a second, in units of 10^9."""
    return f"{amount / seconds / 1e9:.4g}" if amount and seconds > 0 else "–"


def of_floor(floor: float, seconds: float) -> str:
    """Return the floor over the time, as a percentage."""
    return f"{100 * floor / seconds:.0f}%" if floor > 0 and seconds > 0 else "–"


def beyond(row: Row, floors: Floors) -> bool:
    """Return whether a row took less time than its floor."""
    return 0 < row.seconds < floors.seconds(row.flops, row.bytes, row.dtype) / 1.005


def cells(row: Row, whole: float, floors: Floors | None, divisor: int = 1) -> list[str]:
    """Return a row's numbers under :data:`HEAD`.

    Parameters
    ----------
    row : Row
        What to show.
    whole : float
        The seconds of which the share is taken.
    floors : Floors or None
        The machine's limits.
    divisor : int
        Steps: the time is shown for one of them.
    """
    floor = 0.0 if floors is None else floors.seconds(row.flops, row.bytes, row.dtype)
    return [
        str(row.calls),
        f"{1e3 * row.seconds / max(1, divisor):.3f}",
        f"{100 * row.seconds / whole:.1f}%" if whole > 0 else "–",
        rate(row.flops, row.seconds),
        rate(row.bytes, row.seconds),
        of_floor(floor, row.seconds),
    ]


def format_columns(lines: Sequence[Sequence[str]], left: int) -> str:
    """Return lines of cells as text, the first ``left`` columns ranged left, the others right."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k < left else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_rows(
    rows: Sequence[Row], whole: float, floors: Floors | None = None, steps: int = 0
) -> str:
    """Return the table of these rows; with ``steps`` the times are those of one step."""
    head = ["layer", "pass", "engine", *HEAD]
    if steps:
        head[4] = "ms/step"
    body = ([r.name, r.pass_, r.engine, *cells(r, whole, floors, steps or 1)] for r in rows)
    return format_columns([head, *body], 3)
