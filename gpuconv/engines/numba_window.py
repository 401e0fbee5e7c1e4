"""Windows over lines of channels: what stays in the processor's registers, as LLVM code.

Where a channel meets only itself, or the few of its group, the vectors of the processor run along
the channels. Numba's loops do not keep a strip of outputs in registers by themselves, so three
small functions are emitted as LLVM code with explicit vectors:

*window*: eight neighbouring outputs (or four) of one vector of channels. Each input that they
share is loaded once and meets all taps of a row, whose weights are registers, too. Within groups
it meets them once for each channel of the group, which is spread over the group's lanes.

*correlation*: the gradient of a row of taps, over a block of rows, in registers.

*gradient line*: ``dy * act'`` into a buffer, and its sums.

The loops around them are Python, in :mod:`gpuconv.engines.numba_window_loops`. Addresses are integers and
distances bytes, whatever the arrays' strides; only channels must lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, register_jitable

from gpuconv.engines.window_tables import APART, DENSE, EDGE, NARROW, STRIDED, WIDE

__all__ = [
    "BYTES",
    "LANES",
    "SPREAD",
    "correlation",
    "line",
    "number_of",
    "sums_at_once",
    "taps_at_once",
    "window",
]

_FEATURES = dict(binding.get_host_cpu_features())
#: Bytes of a vector register, and how many there are.
BYTES, REGISTERS = (
    (64, 32) if _FEATURES.get("avx512f") else (32 if _FEATURES.get("avx") else 16, 16)
)
#: Numbers in a vector, by their size.
LANES = {4: BYTES // 4, 8: BYTES // 8}
#: Vectors that a single output at the border is computed in at a time.
SPREAD = 4

_i1, _i8, _i32, _i64 = (ir.IntType(n) for n in (1, 8, 32, 64))
_REAL = {types.float32: (ir.FloatType(), 4), types.float64: (ir.DoubleType(), 8)}


def taps_at_once(group: int) -> tuple[int, ...]:
    """Return how many taps of a row are taken at a time: all of them if they are among these."""
    return (7, 5, 3, 2, 1) if group == 1 else (3, 1)


def sums_at_once(group: int) -> tuple[int, ...]:
    """Return how many taps of a row the weight gradient sums up at a time."""
    return tuple(t for t in taps_at_once(group) if t * group <= 3 * REGISTERS // 4) or (1,)


class _Writer:
    """Writes one function: addresses in, vectors through, nothing out."""

    def __init__(
        self, module: ir.Module, name: str, arguments: str, real: Any, group: int, masked: bool
    ) -> None:
        self.scalar, self.size = _REAL[real]
        self.width = BYTES // self.size
        self.group, self.masked = group, masked
        self.vector = ir.VectorType(self.scalar, self.width)
        self.module = module
        names = arguments.split()
        self.function = ir.Function(
            module, ir.FunctionType(ir.VoidType(), [_i64] * len(names)), name=name
        )
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        self.arg = dict(zip(names, self.function.args, strict=True))
        self.entry = self.function.append_basic_block("entry")
        self.b = ir.IRBuilder(self.function.append_basic_block("body"))
        self.zero = self.constant(0.0)
        rolled = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
        self.once = module.add_metadata([rolled])
        self.mask: Any = None
        if masked:
            numbers = ir.VectorType(_i64, self.width)
            lanes = ir.Constant(numbers, list(range(self.width)))
            self.mask = self.b.icmp_signed("<", lanes, self.spread(self.arg["valid"], numbers))

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [ir.Constant(self.scalar, value)] * self.width)

    def declared(self, symbol: str, result: Any, arguments: list[Any]) -> Any:
        found = self.module.globals.get(symbol)
        return found or ir.Function(self.module, ir.FunctionType(result, arguments), name=symbol)

    def spread(self, value: Any, kind: Any) -> Any:
        """Return a vector of one value."""
        nothing = ir.Constant(kind, ir.Undefined)
        one = self.b.insert_element(nothing, value, ir.Constant(_i32, 0))
        order = ir.Constant(ir.VectorType(_i32, self.width), [0] * self.width)
        return self.b.shuffle_vector(one, nothing, order)

    def of_group(self, value: Any, channel: int) -> Any:
        """Return the vector in which every lane holds this channel of its group."""
        if self.group == 1:
            return value
        lanes = range(self.width)
        order = [lane // self.group * self.group + channel % self.width for lane in lanes]
        kind = ir.VectorType(_i32, self.width)
        return self.b.shuffle_vector(value, value, ir.Constant(kind, order))

    def span(self, channel: int) -> int:
        """Return the bytes to the vector that holds this channel of a wide group."""
        return channel // self.width * BYTES

    def moved(self, address: Any, step: Any, times: int = 1) -> Any:
        """Return the address some steps on: by pointers, whose sums LLVM leaves as they are."""
        for _ in range(times):
            address = self.b.gep(address, [step])
        return address

    def at(self, address: Any) -> Any:
        return self.b.inttoptr(address, _i8.as_pointer())

    def load(self, pointer: Any, offset: int = 0) -> Any:
        place = self.vector_at(pointer, offset)
        if self.masked:
            load = self.declared(
                f"llvm.masked.load.v{self.width}f{8 * self.size}.p0",
                self.vector,
                [self.vector.as_pointer(), _i32, self.mask.type, self.vector],
            )
            return self.b.call(load, [place, ir.Constant(_i32, self.size), self.mask, self.zero])
        return self.b.load(place, align=self.size)

    def store(self, value: Any, pointer: Any, offset: int = 0) -> None:
        place = self.vector_at(pointer, offset)
        if self.masked:
            store = self.declared(
                f"llvm.masked.store.v{self.width}f{8 * self.size}.p0",
                ir.VoidType(),
                [self.vector, self.vector.as_pointer(), _i32, self.mask.type],
            )
            self.b.call(store, [value, place, ir.Constant(_i32, self.size), self.mask])
        else:
            self.b.store(value, place, align=self.size)

    def vector_at(self, pointer: Any, offset: int) -> Any:
        if offset:
            pointer = self.b.gep(pointer, [ir.Constant(_i64, offset)])
        return self.b.bitcast(pointer, self.vector.as_pointer())

    def fetch(self, pointer: Any, step: Any, count: int) -> None:
        """Ask for lines of the next strip of the row that nothing has read yet."""
        numbers = [ir.Constant(_i32, n) for n in (0, 3, 1)]
        place = [_i8.as_pointer(), _i32, _i32, _i32]
        fetch = self.declared("llvm.prefetch.p0", ir.VoidType(), place)
        for _ in range(count):
            self.b.call(fetch, [pointer, *numbers])
            pointer = self.moved(pointer, step)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        name = f"llvm.fmuladd.v{self.width}f{8 * self.size}"
        return self.b.call(self.declared(name, self.vector, [self.vector] * 3), [a, b, c])

    def variable(self, value: Any) -> Any:
        """Return a place that LLVM turns into registers."""
        with self.b.goto_block(self.entry):
            place = self.b.alloca(value.type)
        self.b.store(value, place)
        return place

    @contextmanager
    def repeat(self, count: Any) -> Iterator[None]:
        """Write what is inside as a loop."""
        left = self.variable(count)
        test, body, after = (
            self.function.append_basic_block(n) for n in ("test", "repeat", "after")
        )
        self.b.branch(test)
        self.b.position_at_end(test)
        now = self.b.load(left)
        self.b.cbranch(self.b.icmp_signed(">", now, ir.Constant(_i64, 0)), body, after)
        self.b.position_at_end(body)
        self.b.store(self.b.sub(now, ir.Constant(_i64, 1)), left)
        yield
        # LLVM would unroll it, for nothing but longer compiling.
        self.b.branch(test).set_metadata("llvm.loop", self.once)
        self.b.position_at_end(after)

    def advance(self, place: Any, step: Any, times: int = 1) -> None:
        self.b.store(self.moved(self.b.load(place), step, times), place)

    def done(self) -> ir.Function:
        self.b.ret_void()
        with self.b.goto_block(self.entry):
            self.b.branch(self.function.blocks[1])
        return self.function

    def slope(self, address: Any) -> tuple[Any, Any]:
        """Return the number at an address as a vector, and whether it is zero."""
        pointer = self.b.inttoptr(address, self.scalar.as_pointer())
        number = self.b.load(pointer, align=self.size)
        zero = self.b.fcmp_ordered("==", number, ir.Constant(self.scalar, 0.0))
        return self.spread(number, self.vector), self.spread(zero, ir.VectorType(_i1, self.width))


def _window(
    module: ir.Module, real: Any, group: int, masked: bool, columns: int, taps: int, way: int,
    vectors: int = 1,
) -> ir.Function:  # fmt: skip
    """Return the function that computes a strip of outputs, in one of the ways below."""
    kind, part = str(real), f"{'part' if masked else 'full'}"
    name = f"gpuconv_window_{kind}_g{group}_{part}_{columns}x{taps}_{way}_{vectors}"
    found = module.globals.get(name)
    if found is not None:
        return found
    write = _Writer(module, name, _WINDOW, real, group, masked)
    b, arg = write.b, write.arg
    cells = [(j, u) for j in range(columns) for u in range(vectors)]
    begin = {k: write.variable(write.at(arg[k])) for k in ("x", "w", "y", "bias")}
    with write.repeat(arg["count"]):
        bias = b.load(begin["bias"])
        sums = {(j, u): write.variable(write.load(bias, u * BYTES)) for j, u in cells}
        row_x, row_w = (write.variable(b.load(begin[k])) for k in ("x", "w"))
        with write.repeat(arg["p_count"]):
            at_x, at_w = (write.variable(b.load(place)) for place in (row_x, row_w))
            with write.repeat(arg["q_count"]):
                total = {cell: b.load(place) for cell, place in sums.items()}
                _meet(write, total, b.load(at_x), b.load(at_w), columns, taps, way, vectors)
                for cell, value in total.items():
                    b.store(value, sums[cell])
                write.advance(at_x, arg["q_step"], taps)
                write.advance(at_w, arg["w_q"], taps)
            write.advance(row_x, arg["p_step"])
            write.advance(row_w, arg["w_p"])
        if columns == WIDE:
            back = b.neg(arg["p_step"])
            last = write.moved(b.load(row_x), back)
            write.fetch(write.moved(last, arg["x_step"], columns), arg["x_step"], columns)
            if way == STRIDED:  # of the row before as well, and the columns in between
                for place in (
                    write.moved(last, arg["q_step"]),
                    write.moved(last, back),
                    write.moved(write.moved(last, back), arg["q_step"]),
                ):
                    at = write.moved(place, arg["x_step"], columns)
                    write.fetch(at, arg["x_step"], columns)
        _finish(write, sums, b.load(begin["y"]))
        for place in begin.values():
            write.advance(place, ir.Constant(_i64, vectors * BYTES))
    return write.done()


def _meet(
    write: _Writer, total: dict[tuple[int, int], Any], x: Any, w: Any, columns: int, taps: int,
    way: int, vectors: int,
) -> None:  # fmt: skip
    """Write the products of some taps of a row with all inputs that they meet."""
    b, arg = write.b, write.arg
    zeros = write.at(arg["zeros"])
    for channel in range(write.group):
        span = write.span(channel)
        weights = [
            [write.load(write.moved(w, write.arg["w_q"], q), u * BYTES) for u in range(vectors)]
            for q in range(taps)
        ]
        place = x
        if way in (DENSE, EDGE):
            for step in range(columns - 1 + taps):
                cell = place
                if way == EDGE:
                    number = ir.Constant(_i64, step)
                    before = b.icmp_signed("<", number, arg["skip"])
                    outside = b.or_(before, b.icmp_signed(">=", number, arg["stop"]))
                    cell = b.select(outside, zeros, place)
                value = write.of_group(write.load(cell, span), channel)
                for j in range(max(0, step - taps + 1), min(columns, step + 1)):
                    total[j, 0] = write.fma(value, weights[step - j][0], total[j, 0])
                place = write.moved(place, arg["q_step"])
        else:
            for q in range(taps):
                cell = place
                for j in range(columns):
                    for u in range(vectors):
                        value = write.of_group(write.load(cell, span + u * BYTES), channel)
                        total[j, u] = write.fma(value, weights[q][u], total[j, u])
                    cell = write.moved(cell, write.arg["x_step"])
                place = write.moved(place, write.arg["q_step"])
        w = write.moved(w, write.arg["w_c"])


def _finish(write: _Writer, sums: dict[tuple[int, int], Any], y: Any) -> None:
    """Write the activation, and the results into memory."""
    b, function = write.b, write.function
    slope = b.inttoptr(write.arg["slope"], write.scalar.as_pointer())
    factor = b.load(slope, align=write.size)
    wide = write.spread(factor, write.vector)
    plain, other, rectified, sloped, after = (
        function.append_basic_block(n) for n in ("plain", "other", "rectified", "sloped", "stored")
    )
    is_one = b.fcmp_ordered("==", factor, ir.Constant(write.scalar, 1.0))
    b.cbranch(is_one, plain, other)
    b.position_at_end(other)
    is_zero = b.fcmp_ordered("==", factor, ir.Constant(write.scalar, 0.0))
    b.cbranch(is_zero, rectified, sloped)
    for block in (plain, rectified, sloped):
        b.position_at_end(block)
        place, column = y, 0
        for (j, u), variable in sums.items():
            if j != column:
                place, column = write.moved(place, write.arg["y_step"]), j
            value = b.load(variable)
            if block is not plain:
                below = write.zero if block is rectified else b.fmul(value, wide)
                negative = b.fcmp_ordered("<", value, write.zero)  # NaN stays NaN
                value = b.select(negative, below, value)
            write.store(value, place, u * BYTES)
        b.branch(after)
    b.position_at_end(after)


_WINDOW = "count x x_step p_step q_step p_count q_count w w_p w_q w_c y y_step bias slope valid zeros skip stop"
_CORRELATION = "x x_step x_row dz dz_step dz_row rows columns dw dw_t dw_c valid"
_LINE = "dy y dz db slope whole valid"


def _correlation(module: ir.Module, real: Any, group: int, masked: bool, taps: int) -> ir.Function:
    """Return the function that adds the gradient of a row of taps up over rows and columns."""
    part = "part" if masked else "full"
    name = f"gpuconv_correlation_{real}_g{group}_{part}_{taps}"
    found = module.globals.get(name)
    if found is not None:
        return found
    write = _Writer(module, name, _CORRELATION, real, group, masked)
    b, arg = write.b, write.arg
    strip = 4 if group == 1 else 2
    # Sums apart from each other, that a sum need not wait for the one before.
    apart = max(1, min(strip, REGISTERS // 2 // (taps * group)))
    keys = [(t, c, a) for t in range(taps) for c in range(group) for a in range(apart)]
    sums = {key: write.variable(write.zero) for key in keys}
    row_x, row_dz = (write.variable(write.at(arg[k])) for k in ("x", "dz"))

    def columns(count: int) -> None:
        total = {key: b.load(place) for key, place in sums.items()}
        place, cell = b.load(at_dz), b.load(at_x)
        seen: dict[int, Any] = {}
        for j in range(count):
            gradient = []
            for t in range(taps):
                if j + t not in seen:
                    seen[j + t] = write.load(place)
                    place = write.moved(place, arg["dz_step"])
                gradient.append(seen[j + t])
            for c in range(group):
                value = write.of_group(write.load(cell, write.span(c)), c)
                for t in range(taps):
                    key = (t, c, j % apart)
                    total[key] = write.fma(value, gradient[t], total[key])
            cell = write.moved(cell, arg["x_step"])
        for key, value in total.items():
            b.store(value, sums[key])
        b.store(cell, at_x)
        write.advance(at_dz, arg["dz_step"], count)

    with write.repeat(arg["rows"]):
        at_x, at_dz = (write.variable(b.load(place)) for place in (row_x, row_dz))
        with write.repeat(b.sdiv(arg["columns"], ir.Constant(_i64, strip))):
            columns(strip)
        with write.repeat(b.srem(arg["columns"], ir.Constant(_i64, strip))):
            columns(1)
        write.advance(row_x, arg["x_row"])
        write.advance(row_dz, arg["dz_row"])
    place = write.at(arg["dw"])
    for t in range(taps):
        line = place
        for c in range(group):
            value = b.load(sums[t, c, 0])
            for a in range(1, apart):
                value = b.fadd(value, b.load(sums[t, c, a]))
            write.store(b.fadd(value, write.load(line)), line)
            line = write.moved(line, arg["dw_c"])
        place = write.moved(place, arg["dw_t"])
    return write.done()


def _line(module: ir.Module, real: Any, masked: bool, behind: bool) -> ir.Function:
    """Return the function that writes ``dy * act'(z)`` of a line, and adds it to a line of sums."""
    name = f"gpuconv_line_{real}_{'part' if masked else 'full'}_{'behind' if behind else 'plain'}"
    found = module.globals.get(name)
    if found is not None:
        return found
    write = _Writer(module, name, _LINE, real, 1, masked)
    b, arg = write.b, write.arg
    places = {k: write.variable(write.at(arg[k])) for k in ("dy", "y", "dz", "db")}
    slope, _ = write.slope(arg["slope"])
    with write.repeat(arg["whole"]):
        at = {k: b.load(place) for k, place in places.items()}
        value = write.load(at["dy"])
        if behind:
            above = b.fcmp_ordered(">", write.load(at["y"]), write.zero)
            value = b.fmul(value, b.select(above, write.constant(1.0), slope))
        write.store(value, at["dz"])
        write.store(b.fadd(value, write.load(at["db"])), at["db"])
        for place in places.values():
            write.advance(place, ir.Constant(_i64, BYTES))
    return write.done()


@register_jitable
def number_of(columns, taps, way, masked):
    """Return the number of a variant."""
    return columns * 64 + taps * 8 + way * 2 + masked


def _windows(module: ir.Module, real: Any, group: int) -> dict[int, ir.Function]:
    """Return every window function by its number."""
    made = {}
    for columns in (WIDE, NARROW):
        for taps in taps_at_once(group):
            for way in (DENSE, EDGE) if taps > 1 else (DENSE,):
                key = number_of(columns, taps, way, 0)
                made[key] = _window(module, real, group, False, columns, taps, way)
    for columns in (WIDE, NARROW, 1):
        for masked in (0, 1):
            key = number_of(columns, 1, APART, masked)
            made[key] = _window(module, real, group, bool(masked), columns, 1, APART)
    made[number_of(WIDE, 1, STRIDED, 0)] = _window(module, real, group, False, WIDE, 1, STRIDED)
    if group * real.bitwidth <= 8 * BYTES:
        made[number_of(0, 1, APART, 0)] = _window(module, real, group, False, 1, 1, APART, SPREAD)
    return made


def _correlations(module: ir.Module, real: Any, group: int) -> dict[int, ir.Function]:
    """Return every correlation function by its number."""
    made = {
        number_of(0, taps, 0, 0): _correlation(module, real, group, False, taps)
        for taps in sums_at_once(group)
    }
    made[number_of(0, 1, 0, 1)] = _correlation(module, real, group, True, 1)
    return made


def _lines(module: ir.Module, real: Any, group: int) -> dict[int, ir.Function]:
    """Return every gradient line by its number."""
    return {
        number_of(behind, 0, 0, masked): _line(module, real, bool(masked), bool(behind))
        for behind in (0, 1)
        for masked in (0, 1)
    }


def _intrinsic(arguments: str, variants: Callable[..., dict[int, Any]]) -> Any:
    """Return what calls, from compiled Python, the variant of a number with its arguments."""
    count = len(arguments.split())

    @intrinsic
    def call(typing_context, kind, number, values):
        signature = types.void(kind, types.int64, types.UniTuple(types.int64, count))

        def codegen(context, builder, signature, args):
            made = variants(builder.module, kind.dtype, kind.count)
            rest = [builder.extract_value(args[2], k) for k in range(count)]
            done = builder.append_basic_block("done")
            switch = builder.switch(args[1], done)
            for key, function in made.items():
                block = builder.append_basic_block(f"variant_{key}")
                switch.add_case(ir.Constant(_i64, key), block)
                builder.position_at_end(block)
                builder.call(function, rest)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return signature, codegen

    return call


window = _intrinsic(_WINDOW, _windows)
correlation = _intrinsic(_CORRELATION, _correlations)
line = _intrinsic(_LINE, _lines)
