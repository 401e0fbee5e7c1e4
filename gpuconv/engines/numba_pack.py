"""Filters in the order in which tiles read them, compiled: a block of channels after the other.

Packed filters are ``(groups, blocks, steps, vectors, numbers of a vector)``; a step is a tap and an
input channel. Those of the input gradient have inputs and outputs exchanged, and are turned over
in squares of a vector's side that stay in the registers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from gpuconv.engines import numba_memory, numba_transform
from gpuconv.engines.numba_kept import kept
from gpuconv.engines.numba_memory import numbers_at
from gpuconv.engines.numba_tile import BYTES
from gpuconv.engines.numba_transform import copy_bytes, zero_bytes

__all__ = ["STAMP", "pack_double", "pack_single"]

#: Numba keeps compiled loops by their own file; this makes them stale when this one changes.
STAMP = zlib.crc32(Path(__file__).read_bytes())

_i1, _i32, _i64 = (ir.IntType(n) for n in (1, 32, 64))


def _turned(builder, rows):
    """Return the columns of a square of vectors: halves, quarters, ... change places."""
    width = len(rows)
    apart = width // 2
    while apart:
        made = list(rows)
        for i in range(width):
            if i & apart:
                continue
            a, b = rows[i], rows[i | apart]
            low = [k if not k & apart else width + (k ^ apart) for k in range(width)]
            high = [k | apart if not k & apart else width + k for k in range(width)]
            for place, order in ((i, low), (i | apart, high)):
                mask = ir.Constant(ir.VectorType(_i32, width), order)
                made[place] = builder.shuffle_vector(a, b, mask)
        rows, apart = made, apart // 2
    return rows


def _square(module, real):
    """Return the function that turns a square over, emitting it if the module lacks it."""
    name = f"gpuconv_turned_{real}"
    found = module.globals.get(name)
    if found is not None:
        return found
    scalar, size = (ir.FloatType(), 4) if real == "float32" else (ir.DoubleType(), 8)
    width = BYTES // size
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i64] * 6), name=name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    source, source_row, rows, columns, target, target_row = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    vector, mask_type = ir.VectorType(scalar, width), ir.VectorType(_i1, width)
    numbers = ir.VectorType(_i64, width)
    suffix = f"v{width}f{8 * size}"

    def declared(symbol, result, arguments):
        found = module.globals.get(symbol)
        return found or ir.Function(module, ir.FunctionType(result, arguments), name=symbol)

    pointer = vector.as_pointer()
    load = declared(f"llvm.masked.load.{suffix}.p0", vector, [pointer, _i32, mask_type, vector])
    store = declared(
        f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [vector, pointer, _i32, mask_type]
    )

    def first(count):
        """Return the mask of so many lanes."""
        one = b.insert_element(ir.Constant(numbers, ir.Undefined), count, ir.Constant(_i32, 0))
        order = ir.Constant(ir.VectorType(_i32, width), [0] * width)
        wide = b.shuffle_vector(one, ir.Constant(numbers, ir.Undefined), order)
        return b.icmp_signed("<", ir.Constant(numbers, list(range(width))), wide)

    zero = ir.Constant(vector, [ir.Constant(scalar, 0.0)] * width)
    align, none = ir.Constant(_i32, size), ir.Constant(_i64, 0)
    held = []
    for k in range(width):
        there = b.icmp_signed("<", ir.Constant(_i64, k), rows)
        place = b.inttoptr(b.add(source, b.mul(source_row, ir.Constant(_i64, k))), pointer)
        mask = first(b.select(there, columns, none))
        held.append(b.call(load, [place, align, mask, zero]))
    for k, value in enumerate(_turned(b, held)):
        there = b.icmp_signed("<", ir.Constant(_i64, k), columns)
        place = b.inttoptr(b.add(target, b.mul(target_row, ir.Constant(_i64, k))), pointer)
        mask = first(b.select(there, ir.Constant(_i64, width), none))
        b.call(store, [value, place, align, mask])
    b.ret_void()
    return function


@intrinsic(prefer_literal=True)
def turn(typing_context, real, source, source_row, rows, columns, target, target_row):
    """Write the columns of a square as rows, whole vectors; it may lack rows and columns.

    Addresses are integers, distances bytes; ``real`` is "float32" or "float64", a literal.
    """
    if not isinstance(real, types.Literal):
        return None

    def codegen(context, builder, signature, args):
        builder.call(_square(builder.module, real.literal_value), args[1:])
        return context.get_dummy_value()

    return types.void(real, *[types.int64] * 6), codegen


def _packer(real: str) -> Callable[..., None]:
    """Return what packs some blocks of filters.

    The numbers at the address that it takes: addresses of the weights and of the taps' offsets
    (bytes), taps; bytes from one step of a tap to the next, steps of a tap, bytes from one group
    to the next, groups; address and number of the blocks; output channels of a group; address of
    the packed filters; whether steps and channels are exchanged: then the bytes are those from
    one channel to the next, and steps lie side by side.
    """
    size = 4 if real == "float32" else 8
    vector, width = BYTES, BYTES // size

    @kept(real, numba_memory.STAMP, numba_transform.STAMP)
    def packed(at, first_block, last_block):
        job = carray(numbers_at(at), 12)
        weights, taps, step, depth = job[0], job[2], job[3], job[4]
        group, groups, channels, target, exchanged = job[5], job[6], job[9], job[10], job[11]
        offsets = carray(numbers_at(job[1]), taps)
        columns = carray(numbers_at(job[7]), (job[8], 3))
        steps = taps * depth
        vectors_of_group = columns[job[8] - 1, 0] + columns[job[8] - 1, 1]
        for g in range(groups):
            for block in range(first_block, last_block):
                vectors, first_vector, valid = columns[block]
                to = target + (g * vectors_of_group + first_vector) * steps * vector
                row = vectors * vector
                for t in range(taps):
                    source = weights + offsets[t] + g * group
                    place = to + t * depth * row
                    if exchanged != 0:
                        for v in range(vectors):
                            first = (first_vector + v) * width
                            some = min(width, channels - first)
                            for k in range(0, depth, width):
                                turn(real, source + first * step + k * size, step, some,
                                     min(width, depth - k), place + k * row + v * vector, row)  # fmt: skip
                        continue
                    held = (vectors - 1) * vector + valid * size
                    source += first_vector * vector
                    for k in range(depth):
                        copy_bytes(place + k * row, source + k * step, held)
                        if held < row:
                            zero_bytes(place + k * row + held, row - held)

    return packed  # type: ignore[no-any-return]


pack_single: Callable[..., Any] = _packer("float32")
pack_double: Callable[..., Any] = _packer("float64")
