"""NVRTC without a driver, what ptxas says of a kernel, and the table of it.

The compiler comes from the wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 (headers).
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from gpuconv.cuda.architecture import architecture, resident_blocks
from gpuconv.cuda.kernels import Variant

__all__ = [
    "ARCHITECTURES", "Nvrtc", "Usage", "find", "fitting", "plan", "remarks", "rows", "summary", "usages", "whole",
]  # fmt: skip

ARCHITECTURES = [70, 75, 80, 86, 89, 90, 100, 120]
#: Those whose instructions, as far as the kernels use them, are the same.
GENERATIONS = ((70, 75), (80, 86, 89), (90,), (100, 120))
#: What CuPy adds to the options of a RawModule. The first flushes float32's subnormals to zero.
CUPYS = ("-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes
    ----------
    kernel : str
    registers : int
        Of a thread.
    spilled : int
        Bytes stored and loaded.
    shared : int
        Bytes of a block, static.
    threads : int
        Of a block, at most.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int = 0
    threads: int = 1024


class Nvrtc:
    """The compiler, through its C interface."""

    def __init__(self, library: Path, include: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._include = include

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value]

    def architectures(self) -> list[int]:
        count = ctypes.c_int()
        self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._library.nvrtcGetSupportedArchs(found)
        return list(found)

    def compile(
        self, source: str, name: str, options: tuple[str, ...], architecture: int
    ) -> tuple[int, str, bytes]:
        """Return the status (0: well), the log and the binary for the architecture."""
        program = ctypes.c_void_p()
        self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
        flags = [*options, f"-arch=sm_{architecture}", f"-I{self._include}", *CUPYS, "-Xptxas=-v"]
        array = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        status = self._library.nvrtcCompileProgram(program, len(flags), array)
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
        binary = b"" if status else self._text(program, "CUBIN")
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return status, log, binary


def folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def find() -> Nvrtc | str:
    """Return the compiler, or why there is none."""
    compiler, runtime = folder("nvidia.cuda_nvrtc"), folder("nvidia.cuda_runtime")
    if compiler is None:
        return "the wheel nvidia-cuda-nvrtc-cu12 is not installed"
    if runtime is None or not (runtime / "include" / "cuda_fp16.h").is_file():
        return "the wheel nvidia-cuda-runtime-cu12, with the headers, is not installed"
    for library in sorted((compiler / "lib").glob("libnvrtc.so*")):
        try:
            return Nvrtc(library, runtime / "include")
        except OSError as error:
            return f"NVRTC does not load: {error}"
    return "the wheel nvidia-cuda-nvrtc-cu12 holds no library"


def _block_sizes(binary: bytes) -> dict[str, int]:
    """Return the threads that each kernel's launch bounds allow, from the cubin's sections."""
    at = struct.unpack_from("<Q", binary, 40)[0]
    size, count, names = struct.unpack_from("<HHH", binary, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", binary, at + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, start, length, *_ in sections:
        begin = sections[names][4] + name
        text = binary[begin : binary.index(b"\0", begin)].decode()
        i, end = start, start + length
        while text.startswith(".nv.info.") and i + 4 <= end:
            form, attribute, bytes_ = struct.unpack_from("<BBH", binary, i)
            if (form, attribute) == (4, 5):  # a sized value, the most threads
                x, y, z = struct.unpack_from("<3I", binary, i + 4)
                found[text[len(".nv.info.") :]] = x * y * z
            i += 4 + (bytes_ if form == 4 else 0)
    return found


def usages(log: str, binary: bytes) -> Iterator[Usage]:
    """Yield what every kernel takes, from ptxas's log and the binary."""
    threads = _block_sizes(binary)
    for part in log.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if spills is None or registers is None:
            raise ValueError(f"ptxas says {part!r}")
        name = part.split("'")[0]
        yield Usage(
            name, int(registers[1]), int(spills[1]) + int(spills[2]),
            int(shared[1]) if shared else 0, threads.get(name, 1024),
        )  # fmt: skip


def remarks(log: str) -> list[str]:
    """Return the warnings; that an architecture is old is none."""
    return [line for line in log.splitlines() if "warning" in line and "deprecated" not in line]


# ------------------------------------------------------------------------- what is compiled


def fitting(variant: Variant) -> list[int]:
    """Return the architectures that have what a variant needs."""
    if variant.alone:
        return [a for a in ARCHITECTURES if a == variant.capability]
    return [a for a in ARCHITECTURES if a >= variant.capability]


def plan(variants: Sequence[Variant], every: bool = False) -> list[tuple[Variant, int]]:
    """Return which variants are compiled for which architectures.

    Each set of kernels for one architecture of every generation, in turn, by the first variant
    that holds it; every other variant for one. An architecture below what a variant needs is left
    out. ``every`` variant for every architecture is what ``--ptxas`` asks for.
    """
    made = []
    seen: set[tuple[tuple[str, ...], tuple[int, ...]]] = set()
    for turn, variant in enumerate(variants):
        fit = fitting(variant)
        if not fit:
            raise ValueError(f"no architecture has what {variant} needs")
        if not every:
            drawn = {fit[turn % len(fit)]}
            for generation in GENERATIONS:
                able = [a for a in generation if a in fit]
                if able and (variant.functions, generation) not in seen:
                    seen.add((variant.functions, generation))
                    drawn |= set() if drawn & set(able) else {able[turn % len(able)]}
            fit = sorted(drawn)
        made += [(variant, a) for a in fit]
    return made


# ------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """A kernel of a variant on an architecture."""

    file: str
    kernel: str
    constants: str
    architecture: int
    threads: int
    registers: int
    spilled: int
    shared: int  # bytes, static and dynamic
    blocks: int  # resident on a multiprocessor
    occupancy: float  # resident warps over the most


def rows(variant: Variant, capability: int, found: Iterable[Usage]) -> list[Row]:
    """Return the rows of a compiled variant."""
    a = architecture(capability)
    made = []
    for usage in found:
        shared = usage.shared + variant.shared_bytes
        blocks = resident_blocks(a, usage.threads, usage.registers, shared)
        warps = blocks * -(-usage.threads // 32)
        constants = " ".join(f"{n}={v}" for n, v in variant.defines)
        made.append(Row(
            variant.file, usage.kernel, constants, capability, usage.threads, usage.registers,
            usage.spilled, shared, blocks, warps / a.warps,
        ))  # fmt: skip
    return made


def _range(values: Iterable[float], form: str = "{:.0f}") -> str:
    texts = [form.format(v) for v in values]
    low, high = min(texts, key=float), max(texts, key=float)
    return low if low == high else f"{low}-{high}"


def summary(found: Iterable[Row]) -> list[str]:
    """Return a table for each file, a line a kernel, the range over variants in each cell.

    A cell holds registers a thread, bytes spilled, and of the warps that an SM can hold the
    percent that are resident: ``40-64+8 / 50-75``.
    """
    table: dict[str, dict[str, dict[int, list[Row]]]] = {}
    for row in found:
        kernels = table.setdefault(row.file, defaultdict(lambda: defaultdict(list)))
        kernels[row.kernel][row.architecture].append(row)
    if not table:
        return []
    columns = sorted({a for ks in table.values() for k in ks.values() for a in k})
    lines = []
    for file, kernels in sorted(table.items()):
        cells = [[file, "variants", "threads", "shared KiB", *(f"sm_{a}" for a in columns)]]
        for kernel, found_ in sorted(kernels.items()):
            mine = [row for part in found_.values() for row in part]
            cells.append([
                kernel, str(len({row.constants for row in mine})),
                _range(row.threads for row in mine),
                _range((row.shared / 1024 for row in mine), "{:.3g}"),
                *(_cell_of(found_.get(a, [])) for a in columns),
            ])  # fmt: skip
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        lines += [
            name.ljust(widths[0])
            + "".join(t.rjust(w) for t, w in zip(rest, widths[1:], strict=True))
            for name, *rest in cells
        ]
    return lines


def _cell_of(found: list[Row]) -> str:
    if not found:
        return "-"
    spilled = max(row.spilled for row in found)
    text = _range(row.registers for row in found) + (f"+{spilled}" if spilled else "")
    return f"{text} / {_range(100 * row.occupancy for row in found)}"


def whole(found: Iterable[Row], markdown: bool) -> str:
    """Return every row, as CSV or as a Markdown table."""
    names = list(Row.__dataclass_fields__)
    lines = [names] + [
        [_cell(v) for v in asdict(row).values()] for row in sorted(found, key=_order)
    ]
    if not markdown:
        return "".join(",".join(f'"{c}"' if "," in c else c for c in line) + "\n" for line in lines)
    lines.insert(1, ["---"] * len(names))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _order(row: Row) -> tuple[str, str, str, int]:
    return row.file, row.kernel, row.constants, row.architecture
