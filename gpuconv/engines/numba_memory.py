"""What compiled loops do to memory by its address: numbers that threads share, tables, functions.

Addresses are integers. What threads share is read and written in one order that all of them see.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "STAMP",
    "add",
    "bytes_at",
    "call",
    "doubles_at",
    "exchange",
    "floats_at",
    "load",
    "numbers_at",
    "pause",
    "replace",
    "store",
]

#: Numba keeps compiled loops by their own file; this makes them stale when this one changes.
STAMP = zlib.crc32(Path(__file__).read_bytes())

_i64 = ir.IntType(64)
_ORDER = "seq_cst"


def _place(builder, address):
    return builder.inttoptr(address, _i64.as_pointer())


@intrinsic
def load(typing_context, address):
    """Return the number at an address."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_place(builder, args[0]), _ORDER, 8)

    return types.int64(types.int64), codegen


@intrinsic
def store(typing_context, address, number):
    """Write a number to an address."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], _place(builder, args[0]), _ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add(typing_context, address, number):
    """Add to a number in memory, and return what it was."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _place(builder, args[0]), args[1], _ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def exchange(typing_context, address, number):
    """Write a number to an address, and return what was there."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("xchg", _place(builder, args[0]), args[1], _ORDER)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def replace(typing_context, address, old, new):
    """Write ``new`` to an address if ``old`` is there, and return whether it was."""

    def codegen(context, builder, signature, args):
        place = _place(builder, args[0])
        pair = builder.cmpxchg(place, args[1], args[2], _ORDER, _ORDER)
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typing_context):
    """Leave the core to whatever shares it for a moment."""

    def codegen(context, builder, signature, args):
        if binding.get_default_triple().startswith(("x86_64", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call(typing_context, function, job, share, count, worker):
    """Call the function at an address; see :mod:`gpuconv.engines.numba_team`."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_i64] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _pointer_to(kind, element, words):
    """Return an intrinsic that gives an address as a pointer, for ``numba.carray``."""

    def at(typing_context, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], element.as_pointer())

        return types.CPointer(kind)(types.int64), codegen

    at.__doc__ = f"Return an address as a pointer to {words}, for ``numba.carray``."
    return intrinsic(at)


numbers_at = _pointer_to(types.int64, _i64, "64-bit integers")
bytes_at = _pointer_to(types.uint8, ir.IntType(8), "bytes")
floats_at = _pointer_to(types.float32, ir.FloatType(), "float32")
doubles_at = _pointer_to(types.float64, ir.DoubleType(), "float64")
