"""Winograd's transforms for the compiled engines: ``L X R.T`` of small matrices of vectors.

Every transform has this form, with constant matrices ``L`` and ``R`` and, in the place of each
number of ``X``, a vector of channels. They are emitted as LLVM code without a loop over the
matrices, so that zeros cost nothing and ones only an addition; the loop over the channels'
vectors is part of them.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpuconv.engines.numba_tile import BYTES
from gpuconv.engines.numba_tile import STAMP as TILE_STAMP
from gpuconv.engines.toom_cook import filtering

__all__ = ["STAMP", "copy_bytes", "matrices", "transform", "zero_bytes"]

#: As that of the tiles.
STAMP = zlib.crc32(Path(__file__).read_bytes(), TILE_STAMP)

_i64, _i32, _i1 = ir.IntType(64), ir.IntType(32), ir.IntType(1)
_ARGUMENTS = (
    "vectors", "valid_in", "valid_out", "source", "source_row", "source_column", "source_step",
    "target", "target_row", "target_column", "target_step", "bias", "rectify",
)  # fmt: skip


def matrices(kind: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return L and R of a kind: what is transformed, then m and r of rows and of columns.

    What follows those four numbers does not count. "input 4 3 4 3" is the transform of the input for F(4x4, 3x3). "taps", "outputs" and
    "gradient" (of the outputs) and "sums" (to the gradient of the taps) are the others.
    """
    what, *numbers = kind.split()
    rows, columns = (filtering(*map(int, numbers[k : k + 2])) for k in (0, 2))
    of = {
        "input": lambda f: f.b,
        "taps": lambda f: f.g,
        "outputs": lambda f: f.a.T,
        "gradient": lambda f: f.a,
        "sums": lambda f: f.g.T,
    }[what]
    return of(rows), of(columns)


def _function(module: ir.Module, kind: str, real: str) -> ir.Function:
    """Return the function of a transform, emitting it if the module lacks it."""
    name = f"gpuconv_{kind.replace(' ', '_')}_{real}"
    found = module.globals.get(name)
    if found is not None:
        return found
    left, right = matrices(kind)
    scalar, size = (ir.FloatType(), 4) if real == "float32" else (ir.DoubleType(), 8)
    width = BYTES // size
    vector, mask_type = ir.VectorType(scalar, width), ir.VectorType(_i1, width)
    numbers = ir.VectorType(_i64, width)
    function = ir.Function(module, ir.FunctionType(_i64, [_i64] * len(_ARGUMENTS)), name=name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    suffix = f"v{width}{'f32' if size == 4 else 'f64'}"
    pointer = vector.as_pointer()

    def declared(symbol: str, result: Any, arguments: list[Any]) -> ir.Function:
        existing = module.globals.get(symbol)
        if existing is not None:
            return existing
        return ir.Function(module, ir.FunctionType(result, arguments), name=symbol)

    fma = declared(f"llvm.fma.{suffix}", vector, [vector] * 3)
    load_masked = declared(
        f"llvm.masked.load.{suffix}.p0", vector, [pointer, _i32, mask_type, vector]
    )
    store_masked = declared(
        f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [vector, pointer, _i32, mask_type]
    )
    arg = dict(zip(_ARGUMENTS, function.args, strict=True))
    b = ir.IRBuilder(function.append_basic_block("entry"))
    align = ir.Constant(_i32, size)

    def constant(value: float) -> Any:
        return ir.Constant(vector, [ir.Constant(scalar, float(value))] * width)

    zero = constant(0.0)

    def splat(value: Any, kind: Any) -> Any:
        one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_i32, 0))
        order = ir.Constant(ir.VectorType(_i32, width), [0] * width)
        return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), order)

    def combined(weights: Any, values: list[Any]) -> Any:
        """Return the sum of weighted vectors."""
        total = None
        for weight, value in zip(weights, values, strict=True):
            if weight == 0:
                continue
            if total is None:
                total = value if weight == 1 else b.fmul(value, constant(weight))
            elif weight == 1:
                total = b.fadd(total, value)
            elif weight == -1:
                total = b.fsub(total, value)
            else:
                total = b.call(fma, [value, constant(weight), total])
        return zero if total is None else total

    def at(base: str, row: int, column: int, offset: Any) -> Any:
        place = b.add(arg[base], offset)
        place = b.add(place, b.mul(arg[f"{base}_row"], ir.Constant(_i64, row)))
        place = b.add(place, b.mul(arg[f"{base}_column"], ir.Constant(_i64, column)))
        return b.inttoptr(place, pointer)

    iota = ir.Constant(numbers, list(range(width)))
    loop, body, done = (function.append_basic_block(n) for n in ("loop", "body", "done"))
    entry = b.block
    outputs = kind.startswith("outputs")
    b.branch(loop)
    b.position_at_end(loop)
    number, wrong = b.phi(_i64), b.phi(vector)
    number.add_incoming(ir.Constant(_i64, 0), entry)
    wrong.add_incoming(zero, entry)
    b.cbranch(b.icmp_signed("<", number, arg["vectors"]), body, done)
    b.position_at_end(body)
    is_last = b.icmp_signed("==", b.add(number, ir.Constant(_i64, 1)), arg["vectors"])
    whole = ir.Constant(_i64, width)

    def mask(valid: str) -> Any:
        return b.icmp_signed("<", iota, splat(b.select(is_last, arg[valid], whole), numbers))

    mask_in, mask_out = mask("valid_in"), mask("valid_out")
    source_offset = b.mul(number, arg["source_step"])
    target_offset = b.mul(number, arg["target_step"])
    (p, depth), (q, across) = left.shape, right.shape
    by_column = []
    for column in range(across):
        loaded = [
            b.call(load_masked, [at("source", row, column, source_offset), align, mask_in, zero])
            for row in range(depth)
        ]
        by_column.append([combined(left[i], loaded) for i in range(p)])
    bias, not_finite = zero, wrong
    if outputs:
        place = b.add(arg["bias"], b.mul(number, ir.Constant(_i64, BYTES)))
        bias = b.load(b.inttoptr(place, pointer), align=size)
        rectify = splat(b.icmp_signed("!=", arg["rectify"], ir.Constant(_i64, 0)), mask_type)
    for i in range(p):
        row = [by_column[k][i] for k in range(across)]
        for j in range(q):
            value = combined(right[j], row)
            if outputs:
                value = b.fadd(value, bias)
                # x * 0 is NaN where x is not finite.
                not_finite = b.call(fma, [value, zero, not_finite])
                below = b.and_(b.fcmp_ordered("<", value, zero), rectify)
                value = b.select(below, zero, value)
            b.call(store_masked, [value, at("target", i, j, target_offset), align, mask_out])
    number.add_incoming(b.add(number, ir.Constant(_i64, 1)), b.block)
    wrong.add_incoming(not_finite, b.block)
    b.branch(loop)
    b.position_at_end(done)
    bits = b.bitcast(b.fcmp_unordered("uno", wrong, wrong), ir.IntType(width))
    b.ret(b.zext(bits, _i64))
    return function


@intrinsic(prefer_literal=True)
def transform(
    typing_context,
    real,
    kind,
    vectors,
    valid_in,
    valid_out,
    source,
    source_row,
    source_column,
    source_step,
    target,
    target_row,
    target_column,
    target_step,
    bias,
    rectify,
):
    """Transform a tile: ``target = L source R.T``; return whether an output is not finite.

    ``real`` and ``kind`` (see :func:`matrices`) are literals; the rest are addresses and
    distances in bytes. ``step`` is the distance between vectors of channels, ``valid_in`` and
    ``valid_out`` the numbers of the last one. Outputs get a bias (an address of whole vectors)
    and, if ``rectify``, a ReLU.
    """
    if not all(isinstance(t, types.Literal) for t in (real, kind)):
        return None
    name, number = kind.literal_value, real.literal_value
    signature = types.int64(real, kind, *[types.int64] * len(_ARGUMENTS))

    def codegen(context, builder, signature, args):
        return builder.call(_function(builder.module, name, number), args[2:])

    return signature, codegen


@intrinsic
def copy_bytes(typing_context, target, source, count):
    """Copy bytes from one address to another."""
    signature = types.void(types.int64, types.int64, types.int64)

    def codegen(context, builder, signature, args):
        kind = ir.IntType(8).as_pointer()
        to, at = (builder.inttoptr(a, kind) for a in args[:2])
        cgutils.raw_memcpy(builder, to, at, args[2], 1)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def zero_bytes(typing_context, target, count):
    """Set bytes at an address to zero."""
    signature = types.void(types.int64, types.int64)

    def codegen(context, builder, signature, args):
        to = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        cgutils.memset(builder, to, args[1], 0)
        return context.get_dummy_value()

    return signature, codegen
