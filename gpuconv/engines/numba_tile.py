"""The heart of the compiled engines: a tile of a matrix product that stays in the registers.

A tile is ``rows`` x ``vectors`` accumulators, a vector as wide as the processor's registers. For
every step of the sum it loads the vectors of a row of ``b`` once, broadcasts one number of ``a``
for each row and multiplies and adds. Numba's loops do not keep such a tile in registers by
themselves, so it is emitted as LLVM code with explicit vectors; the loops around it stay Python.

What to sum is a list of *segments*: runs of steps that are evenly spaced in ``a`` and ``b``. A
convolution needs no copy of its windows: a segment is the row of a window, as it lies in the
image, and the taps that fall into the padding have none.

Goto and van de Geijn: Anatomy of high-performance matrix multiplication (2008); Georganas et
al.: Anatomy of high-performance deep learning convolutions on SIMD architectures (2018).
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "ADD",
    "BIAS",
    "MOST_ROWS",
    "MOST_VECTORS",
    "REGISTERS",
    "STAMP",
    "ZERO",
    "add_line",
    "lanes",
    "tile",
]

#: What a tile begins with: zeros, the bias, or what its place holds.
ZERO, BIAS, ADD = 0, 1, 2


@cache
def _features() -> dict[str, bool]:
    return dict(binding.get_host_cpu_features())


#: Bytes of a vector register, and how many there are.
BYTES, REGISTERS = (64, 32) if _features().get("avx512f") else (32, 16)
#: Vectors of a tile: with few registers two and more rows, so that fewer numbers are read for a product.
MOST_VECTORS = 4 if REGISTERS == 32 else 2


def lanes(itemsize: int) -> int:
    """Return how many numbers a vector holds."""
    return BYTES // itemsize


def most_rows(vectors: int) -> int:
    """Return how many rows a tile of so many vectors may have without leaving the registers."""
    return min(14, (REGISTERS - 2 - vectors) // vectors)


#: Numba keeps compiled loops by their own file; this makes them stale when this one changes.
STAMP = zlib.crc32(Path(__file__).read_bytes())
#: The rows by the number of vectors, 1 to 4.
MOST_ROWS = np.array([0, *(max(1, most_rows(v)) for v in (1, 2, 3, 4))])

_i64 = ir.IntType(64)
_i1 = ir.IntType(1)
_i8 = ir.IntType(8)
_ARGUMENTS = (
    "a", "a_row", "a_step", "b", "b_step", "b_unit", "segments", "count", "c", "c_row", "begin", "bias",
    "rectify", "valid",
)  # fmt: skip


def _function(module: ir.Module, rows: int, vectors: int, real: str, unit: str) -> ir.Function:
    """Return the function of a tile, emitting it if the module lacks it."""
    name = f"gpuconv_tile_{real}_{unit}_{rows}x{vectors}"
    found = module.globals.get(name)
    if found is not None:
        return found
    scalar, size = (ir.FloatType(), 4) if real == "float32" else (ir.DoubleType(), 8)
    width = BYTES // size
    vector = ir.VectorType(scalar, width)
    mask_type = ir.VectorType(_i1, width)
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [_i64] * len(_ARGUMENTS)), name=name
    )
    function.linkage = "internal"
    function.attributes.add("noinline")
    suffix = f"v{width}{'f32' if size == 4 else 'f64'}"

    def declared(symbol: str, kind: ir.FunctionType) -> ir.Function:
        existing = module.globals.get(symbol)
        return existing if existing is not None else ir.Function(module, kind, name=symbol)

    pointer = vector.as_pointer()
    fma = declared(f"llvm.fma.{suffix}", ir.FunctionType(vector, [vector] * 3))
    i32 = ir.IntType(32)
    load_masked = declared(
        f"llvm.masked.load.{suffix}.p0",
        ir.FunctionType(vector, [pointer, i32, mask_type, vector]),
    )
    store_masked = declared(
        f"llvm.masked.store.{suffix}.p0",
        ir.FunctionType(ir.VoidType(), [vector, pointer, i32, mask_type]),
    )
    arg = dict(zip(_ARGUMENTS, function.args, strict=True))
    for key, value in arg.items():
        value.name = key
    b = ir.IRBuilder(function.append_basic_block("entry"))
    zero = ir.Constant(vector, [ir.Constant(scalar, 0.0)] * width)
    align = ir.Constant(i32, size)

    def splat(value: Any, kind: Any) -> Any:
        one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(i32, 0))
        order = ir.Constant(ir.VectorType(i32, width), [0] * width)
        return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), order)

    # As wide as the numbers: AVX2 masks with such a vector, and would else make it anew in each step.
    integer = ir.IntType(8 * size)
    numbers = ir.VectorType(integer, width)
    iota = ir.Constant(numbers, list(range(width)))
    valid = arg["valid"] if size == 8 else b.trunc(arg["valid"], integer)
    mask = b.icmp_signed("<", iota, splat(valid, numbers))

    def vector_at(address: Any, j: int, masked: bool) -> Any:
        place = b.inttoptr(b.add(address, ir.Constant(_i64, j * BYTES)), pointer)
        if masked and j == vectors - 1:
            return b.call(load_masked, [place, align, mask, zero])
        return b.load(place, align=size)

    cells = [(i, j) for i in range(rows) for j in range(vectors)]

    def c_row(i: int) -> Any:
        return b.add(arg["c"], b.mul(arg["c_row"], ir.Constant(_i64, i)))

    # What the accumulators begin with.
    from_zero, from_bias, from_c, loop = (
        function.append_basic_block(n) for n in ("zeros", "bias", "add", "segments")
    )
    switch = b.switch(arg["begin"], from_zero)
    switch.add_case(ir.Constant(_i64, BIAS), from_bias)
    switch.add_case(ir.Constant(_i64, ADD), from_c)
    entries = []
    b.position_at_end(from_zero)
    entries.append(([zero] * len(cells), from_zero))
    b.branch(loop)
    b.position_at_end(from_bias)
    line = [vector_at(arg["bias"], j, True) for j in range(vectors)]
    entries.append(([line[j] for _, j in cells], from_bias))
    b.branch(loop)
    b.position_at_end(from_c)
    entries.append(([vector_at(c_row(i), j, True) for i, j in cells], from_c))
    b.branch(loop)

    # Over the segments.
    b.position_at_end(loop)
    body, steps, after, store = (
        function.append_basic_block(n) for n in ("segment", "steps", "after", "store")
    )
    number = b.phi(_i64)
    sums = [b.phi(vector) for _ in cells]
    for values, block in entries:
        number.add_incoming(ir.Constant(_i64, 0), block)
        for phi, value in zip(sums, values, strict=True):
            phi.add_incoming(value, block)
    b.cbranch(b.icmp_signed("<", number, arg["count"]), body, store)
    b.position_at_end(body)
    entry = b.inttoptr(
        b.add(arg["segments"], b.mul(number, ir.Constant(_i64, 24))), _i64.as_pointer()
    )
    offset_a, offset_b, run = (b.load(b.gep(entry, [ir.Constant(i32, k)])) for k in range(3))
    start_a = b.add(arg["a"], offset_a)
    start_b = b.add(arg["b"], b.mul(offset_b, arg["b_unit"]))
    step_a = ir.Constant(_i64, size) if unit == "step" else arg["a_step"]
    row_a = ir.Constant(_i64, size) if unit == "row" else arg["a_row"]
    # Rows are reached from every third one by the scales that addresses have: 1, 2, 4, 8.
    bases = sorted({_base(i) for i in range(rows)}) if unit == "step" else [0]
    starts = [b.add(start_a, b.mul(row_a, ir.Constant(_i64, j))) for j in bases]
    b.cbranch(b.icmp_signed(">", run, ir.Constant(_i64, 0)), steps, after)

    b.position_at_end(steps)
    left = b.phi(_i64)
    at_a = [b.phi(_i64) for _ in bases]
    at_b = b.phi(_i64)
    inner = [b.phi(vector) for _ in cells]
    left.add_incoming(run, body)
    at_b.add_incoming(start_b, body)
    for phi, value in zip((*at_a, *inner), (*starts, *sums), strict=True):
        phi.add_incoming(value, body)
    row_b = [vector_at(at_b, j, True) for j in range(vectors)]
    results = []
    for i in range(rows):
        base = _base(i) if unit == "step" else 0
        address = b.add(at_a[bases.index(base)], b.mul(row_a, ir.Constant(_i64, i - base)))
        value = b.load(b.inttoptr(address, scalar.as_pointer()), align=size)
        wide = splat(value, vector)
        results += [b.call(fma, [wide, row_b[j], inner[i * vectors + j]]) for j in range(vectors)]
    remaining = b.sub(left, ir.Constant(_i64, 1))
    left.add_incoming(remaining, steps)
    at_b.add_incoming(b.add(at_b, arg["b_step"]), steps)
    for phi, value in zip(at_a, [b.add(p, step_a) for p in at_a], strict=True):
        phi.add_incoming(value, steps)
    for phi, value in zip(inner, results, strict=True):
        phi.add_incoming(value, steps)
    b.cbranch(b.icmp_signed(">", remaining, ir.Constant(_i64, 0)), steps, after)

    b.position_at_end(after)
    for phi, before, now in zip(sums, sums, results, strict=True):
        merged = b.phi(vector)
        merged.add_incoming(before, body)
        merged.add_incoming(now, steps)
        phi.add_incoming(merged, after)
    number.add_incoming(b.add(number, ir.Constant(_i64, 1)), after)
    b.branch(loop)

    # ReLU where asked for; NaN stays NaN.
    b.position_at_end(store)
    rectify = splat(b.icmp_signed("!=", arg["rectify"], ir.Constant(_i64, 0)), mask_type)
    for (i, j), total in zip(cells, sums, strict=True):
        below = b.and_(b.fcmp_ordered("<", total, zero), rectify)
        value = b.select(below, zero, total)
        place = b.inttoptr(b.add(c_row(i), ir.Constant(_i64, j * BYTES)), pointer)
        if j == vectors - 1:
            b.call(store_masked, [value, place, align, mask])
        else:
            b.store(value, place, align=size)
    b.ret_void()
    return function


def _base(row: int) -> int:
    """Return the row from which this one is reached by a scale of an address."""
    return next(j for j in range(row - row % 3, -1, -3) if row - j in (0, 1, 2, 4, 8))


@intrinsic(prefer_literal=True)
def tile(
    typing_context,
    real,
    unit,
    vectors,
    rows,
    a,
    a_row,
    a_step,
    b,
    b_step,
    b_unit,
    segments,
    count,
    c,
    c_row,
    begin,
    bias,
    rectify,
    valid,
):
    """Compute a tile: ``c[i] = begin + sum over steps of a[i, step] * b[step]``.

    Addresses are integers, distances are bytes. ``real`` ("float32", "float64"), ``unit``
    ("step": steps of ``a`` lie side by side; "row": rows do) are literals.

    Parameters
    ----------
    vectors, rows : int
        The tile's size: 1 to 4, and up to ``MOST_ROWS[vectors]``.
    a, a_row, a_step : int
        The first number, and from one row and one step to the next.
    b, b_step : int
        The first vector, and from one step to the next.
    b_unit : int
        In which the segments' offsets in ``b`` are counted.
    segments, count : int
        Address and number of triples: offset in ``a``, offset in ``b``, steps.
    c, c_row : int
        The tile's place, and from one row to the next.
    begin, bias : int
        ZERO, BIAS or ADD, and the address of the bias.
    rectify : int
        Whether negative results become zero.
    valid : int
        How many numbers of the last vector there are.
    """
    if not all(isinstance(t, types.Literal) for t in (real, unit)):
        return None
    kind, direction = real.literal_value, unit.literal_value
    signature = types.void(real, unit, *[types.int64] * (2 + len(_ARGUMENTS)))

    def codegen(context, builder, signature, args):
        width, count, rest = args[2], args[3], args[4:]
        done = builder.append_basic_block("tile_done")
        number = builder.add(builder.shl(width, ir.Constant(_i64, 4)), count)
        switch = builder.switch(number, done)
        for vectors in range(1, len(MOST_ROWS)):
            for rows in range(1, int(MOST_ROWS[vectors]) + 1):
                block = builder.append_basic_block(f"tile_{rows}x{vectors}")
                switch.add_case(ir.Constant(_i64, 16 * vectors + rows), block)
                builder.position_at_end(block)
                builder.call(_function(builder.module, rows, vectors, kind, direction), rest)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def add_line(typing_context, real, target, source, count):
    """Add ``count`` numbers at an address to those at another, a vector at a time."""
    if not isinstance(real, types.Literal):
        return None
    scalar, size = (ir.FloatType(), 4) if real.literal_value == "float32" else (ir.DoubleType(), 8)
    width = BYTES // size
    signature = types.void(real, *[types.int64] * 3)

    def codegen(context, builder, signature, args):
        _, target, source, count = args
        vector, mask_type = ir.VectorType(scalar, width), ir.VectorType(_i1, width)
        i32, numbers = ir.IntType(32), ir.VectorType(_i64, width)
        pointer = vector.as_pointer()
        suffix = f"v{width}{'f32' if size == 4 else 'f64'}"
        load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [pointer, i32, mask_type, vector]),
            f"llvm.masked.load.{suffix}.p0",
        )
        store = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [vector, pointer, i32, mask_type]),
            f"llvm.masked.store.{suffix}.p0",
        )
        align = ir.Constant(i32, size)
        zero = ir.Constant(vector, [ir.Constant(scalar, 0.0)] * width)
        iota = ir.Constant(numbers, list(range(width)))
        order = ir.Constant(ir.VectorType(i32, width), [0] * width)
        step = ir.Constant(_i64, width)
        with cgutils.for_range_slice(builder, ir.Constant(_i64, 0), count, step, _i64) as (i, _):
            left = builder.insert_element(
                ir.Constant(numbers, ir.Undefined), builder.sub(count, i), ir.Constant(i32, 0)
            )
            left = builder.shuffle_vector(left, ir.Constant(numbers, ir.Undefined), order)
            mask = builder.icmp_signed("<", iota, left)
            offset = builder.mul(i, ir.Constant(_i64, size))
            to = builder.inttoptr(builder.add(target, offset), pointer)
            at = builder.inttoptr(builder.add(source, offset), pointer)
            total = builder.fadd(
                builder.call(load, [to, align, mask, zero]),
                builder.call(load, [at, align, mask, zero]),
            )
            builder.call(store, [total, to, align, mask])
        return context.get_dummy_value()

    return signature, codegen
