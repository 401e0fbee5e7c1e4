"""A pass of a convolution as the product that ``kernels/conv_implicit_gemm.cu`` computes.

The kernel counts rows and the inner index by digits (a position's or a tap's) and adds up what
each contributes to an offset and to coordinates. Here a problem, a pass and the arrays' strides
become those numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv.cuda.tiles import DEPTH, Shape, Tile
from gpuconv.engines.base import Pass
from gpuconv.engines.cuda_arrays import three
from gpuconv.problem import ConvProblem

__all__ = ["Packs", "Product", "describe", "shape_of", "strided"]

Strides = Sequence[int]

_INTS = (
    ("rows", 4), ("inner", 4), ("step_a", 4), ("step_b", 4), ("move_rows", 3), ("move_inner", 3),
    ("base", 3), ("size", 3), ("columns", 0), ("groups", 0), ("column_tiles", 0), ("phases", 3),
    ("taps", 3), ("tap_step", 3), ("dilation", 3), ("before", 3), ("stride", 3), ("extent", 3),
)  # fmt: skip
_OFFSETS = (
    ("a_rows", 4), ("a_inner", 4), ("a_base", 0), ("a_group", 0), ("a_axis", 3),
    ("b_inner", 4), ("b_column", 0), ("b_group", 0), ("b_axis", 3),
    ("c_rows", 4), ("c_column", 0), ("c_group", 0), ("c_axis", 3), ("part", 0), ("part_size", 0),
)  # fmt: skip


def _struct(wide: bool) -> np.dtype[Any]:
    """Return ``Product`` of the kernel."""
    index = np.int64 if wide else np.int32
    fields: list[Any] = [(name, np.int32, (n,) if n else ()) for name, n in _INTS]
    fields += [(name, index, (n,) if n else ()) for name, n in _OFFSETS]
    return np.dtype(fields, align=True)


_STRUCTS = {wide: _struct(wide) for wide in (False, True)}


def strided(problem: ConvProblem, pass_: Pass) -> bool:
    """Return whether the pass falls into phases."""
    return pass_ == "input_grad" and any(s > 1 for s in problem.stride)


def _tap_steps(problem: ConvProblem) -> tuple[int, ...]:
    """Return, by axis, the distance of taps that meet the same inputs."""
    return tuple(s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True))


def phase_counts(problem: ConvProblem) -> tuple[int, ...]:
    """Return, by axis, the phases in which there are taps."""
    return tuple(map(min, problem.kernel, _tap_steps(problem)))


def shape_of(problem: ConvProblem, pass_: Pass, divisible: bool = True) -> Shape:
    """Return the sizes of the product; of several phases the most rows and the mean inner."""
    in_group, out_group = (c // problem.groups for c in (problem.in_channels, problem.out_channels))
    count, outputs = problem.groups, problem.batch * math.prod(problem.out_shape)
    if pass_ == "forward":
        rows, columns, inner = outputs, out_group, problem.taps * in_group
    elif pass_ == "weight_grad":
        rows, columns, inner = problem.taps * in_group, out_group, outputs
    else:
        rows = problem.batch * math.prod(
            -(-n // s) for n, s in zip(problem.in_shape, problem.stride, strict=True)
        )
        columns, inner = in_group, out_group
        if strided(problem, pass_):
            count *= math.prod(phase_counts(problem))
            inner = -(-inner * problem.taps // math.prod(phase_counts(problem)))  # the mean
            divisible = False
        else:
            inner *= problem.taps
    return Shape(count, rows, columns, inner, problem.dtype, problem.bytes, divisible)


@dataclass(frozen=True)
class Packs:
    """How a variant loads and stores.

    Parameters
    ----------
    a, b, c : int
        Elements at once.
    a_by_row, b_by_column : bool
        Neighbouring threads load along rows or columns, else along inner.
    a_checked : bool
        Some element of A lies in the padding.
    a_linear, b_linear : bool
        Neighbours along inner have the same distance everywhere.
    """

    a: int
    b: int
    c: int
    a_by_row: bool
    b_by_column: bool
    a_checked: bool = True
    a_linear: bool = False
    b_linear: bool = False


class Product:
    """The fields of the kernel's ``Product``, before a tile is chosen.

    Attributes
    ----------
    fields : dict
        By the names of the kernel's structure.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def _steps(self, x: int, pack: int, by_x: bool, tile: Tile) -> tuple[int, ...]:
        """Return the digits of an odometer's step, as ``Fetch`` of the kernel walks."""
        lanes = tile.threads // ((x if by_x else DEPTH) // pack)
        step = lanes if by_x and lanes < DEPTH else DEPTH
        digits = []
        radices = self.fields["inner"]
        last = max((i for i, n in enumerate(radices) if n > 1), default=0)
        for i, n in enumerate(radices):
            digits.append(step if i == last else step % n if i < last else 0)
            step = step // n if i < last else 0
        return tuple(digits)

    def packs(self, problem: ConvProblem, pass_: Pass, aligned: tuple[bool, bool, bool]) -> Packs:
        """Return the widest accesses that alignment allows.

        Parameters
        ----------
        problem : ConvProblem
        pass_ : str
        aligned : tuple of bool
            Whether A, B and C begin at multiples of the widest access.
        """
        f, most = self.fields, 2 if problem.dtype == "float64" else 4
        by_row = _first(f["rows"], f["a_rows"]) <= _first(f["inner"], f["a_inner"])
        by_column = abs(f["b_column"]) <= _first(f["inner"], f["b_inner"])
        if f["columns"] == 1:
            by_column = False
        elif f["b_column"] == 0:
            by_column = True

        def all_divide(*values: Any) -> bool:
            flat = (
                v for value in values for v in (value if isinstance(value, tuple) else (value,))
            )
            return all(v % most == 0 for v in flat)

        # The run must lie within one digit: a tap's channels. Positions are checked one by one.
        if pass_ == "weight_grad":
            a = by_row and f["a_rows"][0] == 1 and f["rows"][0] % most == 0
            a_rest = (f["a_rows"][1:], f["a_inner"])
        else:
            a = not by_row and f["a_inner"][0] == 1 and f["inner"][0] % most == 0
            a_rest = (f["a_inner"][1:], f["a_rows"])
        a = a and aligned[0] and all_divide(*a_rest, f["a_base"], f["a_group"], f["a_axis"])
        if by_column:
            b = f["b_column"] == 1 and f["columns"] % most == 0 and all_divide(f["b_inner"])
        else:
            b = f["b_inner"][0] == 1 and f["inner"][0] % most == 0
            b = b and all_divide(f["b_inner"][1:], f["b_column"])
        b = b and aligned[1] and all_divide(f["b_group"], f["b_axis"])
        c = f["c_column"] == 1 and f["columns"] % most == 0 and aligned[2]
        c = c and all_divide(f["c_rows"], f["c_group"], f["c_axis"])
        width = {True: most, False: 1}
        windows = problem.taps > 1 or any(pad > 0 for pads in problem.padding for pad in pads)
        # Of an input gradient the output may be smaller than what is asked for.
        smaller = pass_ == "input_grad" and problem.in_shape != problem.out_shape
        checked = windows or strided(problem, pass_) or smaller
        in_line = {key: _linear(f["inner"], f[f"{key}_inner"]) for key in "ab"}
        if strided(problem, pass_):
            in_line = {"a": False, "b": False}  # digits differ from phase to phase
        return Packs(
            width[a], width[b], width[c], by_row, by_column, checked,
            in_line["a"] and not checked, in_line["b"],
        )  # fmt: skip

    def structure(self, tile: Tile, packs: Packs, length: int, part_size: int, wide: bool) -> Any:
        """Return the argument of a launch.

        Parameters
        ----------
        tile : Tile
        packs : Packs
        length, part_size : int
            Elements of inner of a part, and elements of all results.
        wide : bool
            Hold offsets in 64 bits.
        """
        made = np.zeros(1, _STRUCTS[wide])
        for name, value in self.fields.items():
            made[name] = value
        made["step_a"] = self._steps(tile.rows, packs.a, packs.a_by_row, tile)
        made["step_b"] = self._steps(tile.columns, packs.b, packs.b_by_column, tile)
        made["column_tiles"] = -(-self.fields["columns"] // tile.columns)
        made["part"], made["part_size"] = length, part_size
        return made


def _first(radices: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the distance of neighbours: the stride of the first digit that counts."""
    return next((abs(s) for n, s in zip(radices, strides, strict=True) if n > 1), 0)


def _linear(radices: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether one more along the odometer is the same distance, whatever carries."""
    count = 1
    for n, stride in zip(radices, strides, strict=True):
        if n > 1 and stride != count * strides[0]:
            return False
        count *= n
    return True


def _times(*vectors: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(math.prod, zip(*vectors, strict=True)))


def describe(problem: ConvProblem, pass_: Pass, a: Strides, b: Strides, c: Strides) -> Product:
    """Return the product of a pass.

    Parameters
    ----------
    problem : ConvProblem
    pass_ : str
    a, b, c : sequence of int
        Strides in elements of the arrays in these places: x, w, y; dz, w, dx; x, dz, dw.
    """

    def axes(values: Sequence[int], fill: int = 1) -> tuple[int, ...]:
        return three(tuple(values), fill)[::-1]  # column, row, depth

    def image(strides: Strides) -> tuple[tuple[int, ...], int, int]:
        return axes(strides[1:-1], 0), strides[0], strides[-1]

    def weights(strides: Strides) -> tuple[tuple[int, ...], int, int]:
        return axes(strides[:-2], 0), strides[-2], strides[-1]

    in_group = problem.in_channels // problem.groups
    out_group = problem.out_channels // problem.groups
    kernel, stride, dilation = map(axes, (problem.kernel, problem.stride, problem.dilation))
    inputs, outputs = axes(problem.in_shape), axes(problem.out_shape)
    before = axes(tuple(p for p, _ in problem.padding), 0)
    negative = tuple(-p for p in before)
    fields: dict[str, Any] = {"groups": problem.groups, "a_axis": (0,) * 3, "b_axis": (0,) * 3,
                              "c_axis": (0,) * 3}  # fmt: skip
    positions, taps = (*outputs, problem.batch), (in_group, *kernel)
    if pass_ == "input_grad":
        (ya, yn, yc), (wa, wi, wo), (xa, xn, xc) = image(a), weights(b), image(c)
        fields |= {
            "rows": (*inputs, problem.batch), "inner": (out_group, *kernel), "columns": in_group,
            "a_rows": (*ya, yn), "a_inner": (yc, *_times((-1,) * 3, dilation, ya)),
            "a_base": sum(_times(before, ya)), "a_group": out_group * yc,
            "b_inner": (wo, *wa), "b_column": wi, "b_group": out_group * wo,
            "c_rows": (*xa, xn), "c_column": xc, "c_group": in_group * xc,
            "move_rows": (1,) * 3, "move_inner": _times((-1,) * 3, dilation), "base": before,
            "size": outputs,
        }  # fmt: skip
        if strided(problem, pass_):
            steps = axes(_tap_steps(problem))
            back = tuple(-(k * d // s) for k, d, s in zip(steps, dilation, stride, strict=True))
            fields |= {
                "a_inner": (yc, *_times(back, ya)), "a_base": 0, "move_inner": back,
                "b_inner": (wo, *_times(steps, wa)), "c_rows": (*_times(stride, xa), xn),
                "a_axis": ya, "b_axis": wa, "c_axis": xa,
                "phases": axes(phase_counts(problem)), "taps": kernel, "tap_step": steps,
                "dilation": dilation, "before": before, "stride": stride, "extent": inputs,
            }  # fmt: skip
        return Product(fields)
    xa, xn, xc = image(a)
    position_part, tap_part = (*_times(stride, xa), xn), (xc, *_times(dilation, xa))
    fields |= {"columns": out_group, "base": negative, "size": inputs,
               "a_base": sum(_times(negative, xa)), "a_group": in_group * xc}  # fmt: skip
    if pass_ == "forward":
        (wa, wi, wo), (ya, yn, yc) = weights(b), image(c)
        fields |= {
            "rows": positions, "inner": taps, "a_rows": position_part, "a_inner": tap_part,
            "move_rows": stride, "move_inner": dilation,
            "b_inner": (wi, *wa), "b_column": wo, "b_group": out_group * wo,
            "c_rows": (*ya, yn), "c_column": yc, "c_group": out_group * yc,
        }  # fmt: skip
    else:
        (ya, yn, yc), (wa, wi, wo) = image(b), weights(c)
        fields |= {
            "rows": taps, "inner": positions, "a_rows": tap_part, "a_inner": position_part,
            "move_rows": dilation, "move_inner": stride,
            "b_inner": (*ya, yn), "b_column": yc, "b_group": out_group * yc,
            "c_rows": (wi, *wa), "c_column": wo, "c_group": out_group * wo,
        }  # fmt: skip
    return Product(fields)
