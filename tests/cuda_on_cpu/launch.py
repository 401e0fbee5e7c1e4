"""``RawModule`` and its kernels: arguments checked, laid out and launched on the CPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.cuda.architecture import architecture
from tests.cuda_on_cpu import build, driver, elf
from tests.cuda_on_cpu.arrays import Memory, home, ndarray

__all__ = ["CUDADriverError", "KernelError", "RawKernel", "RawModule", "Settings"]

_SHARED, _VARIABLE = -1, -2
_MOST_SHARED = 48 * 1024  # without being asked for
_USUAL = 80  # compute capability, times ten; that of runtime/device.h
_launching = threading.Lock()  # the runtime runs one grid at a time


class KernelError(RuntimeError):
    """A kernel did what it must not do; the message says which thread, what and where."""


class CUDADriverError(RuntimeError):
    """A launch that a GPU would refuse."""


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_int),
        ("kind", ctypes.c_char),
        ("element_kind", ctypes.c_char),
        ("element_size", ctypes.c_short),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("max_threads", ctypes.c_int),
        ("count", ctypes.c_int),
        ("parameters", _Parameter * 64),
    ]


class _Region(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_size_t),
        ("size", ctypes.c_size_t),
        ("shift", ctypes.c_uint),
        ("argument", ctypes.c_int),
        ("name", ctypes.c_char_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_size_t),
        ("guard", ctypes.c_size_t),
        ("preempt", ctypes.c_uint),
        ("shuffle", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
        ("traffic", ctypes.POINTER(ctypes.c_ulonglong)),
    ]


class Settings:
    """How a stand-in runs its kernels.

    Parameters
    ----------
    mode : str
        One of ``build.MODES``.
    seed : int
        Of the order of blocks and threads, and of the checking mode's switches.
    capability : int
        Compute capability, times ten.
    """

    def __init__(self, mode: str, seed: int, capability: int = _USUAL) -> None:
        self.mode = mode
        self.seed = seed
        self.capability = capability
        self.most_shared = architecture(capability).shared_per_block  # of one block
        self.launches: list[
            tuple[str, tuple[int, ...], tuple[int, ...]]
        ] = []  # kernel, grid, block
        #: Of each launch in the mode ``checked``, for each array by its argument: bytes read, of
        #: these the ones that no thread of the same block had read before, bytes written.
        self.traffic: list[dict[int, tuple[int, int, int]]] = []
        self.freed = 0  # how often the memory pools were freed
        self._numbers = itertools.count(seed * 1_000_003 + 1)

    def next_seed(self) -> int:
        """Return a seed that differs from launch to launch, and not from run to run."""
        return next(self._numbers)


@cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@cache
def _runner(mode: str) -> Any:
    function = _load(build._runtime_library(mode)).cuda_on_cpu_launch
    function.argtypes = [ctypes.POINTER(_Launch), ctypes.c_char_p, ctypes.c_size_t]
    return function


@cache
def _variables(path: Path, checked: bool) -> list[tuple[int, int, bytes, bool]]:
    """Return address, size, name of a module's variables, and whether they are shared."""
    if not checked:
        return []
    library = _load(path)
    shared = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "cuda_on_cpu_shared")))
    names = set(shared.decode().split())
    found = []
    for symbol in elf.variables(path):
        plain = elf.plain_name(symbol.name)
        found.append((symbol.address, symbol.size, plain.encode(), plain in names))
    known = elf.anchor(path, "cuda_on_cpu_shared")
    offset = ctypes.addressof(ctypes.c_char.in_dll(library, "cuda_on_cpu_shared")) - known
    return [(address + offset, *rest) for address, *rest in found]  # type: ignore[misc]


def _aligned(structure: np.ndarray) -> np.ndarray:
    """Return a copy of a parameter that lies as kernels' parameters do."""
    size = structure.dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + size] = structure.reshape(1).view(np.uint8)
    return room[start : start + size]


class RawModule:
    """CUDA source whose ``extern "C"`` kernels run on the CPU.

    Parameters are CuPy's; ``backend`` and whatever speaks of binaries is accepted and unused.
    """

    def __init__(
        self,
        *,
        code: str,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        settings: Settings,
    ) -> None:
        if not isinstance(code, str):
            raise TypeError(f"code is a {type(code).__name__}; expected a string")
        if backend != "nvrtc":
            raise ValueError(f"backend is {backend!r}; the stand-in knows 'nvrtc'")
        self.code, self.options = code, tuple(options)
        if settings.capability != _USUAL:
            self.options += (f"-D__CUDA_ARCH__={settings.capability}0",)
        for option in options:  # what one architecture alone has
            if option.startswith("-arch="):
                if option != f"-arch=sm_{settings.capability}a":
                    raise CUDADriverError(
                        f"CUDA_ERROR_NO_BINARY_FOR_GPU: {option} on a device of compute "
                        f"capability {settings.capability / 10}"
                    )
                self.options += (f"-D__CUDA_ARCH_FEAT_SM{settings.capability}_ALL=1",)
        self._settings = settings

    def compile(self) -> None:
        """Compile, if that has not been done."""
        build.kernel_library(self.code, self.options, self._settings.mode)

    def get_function(self, name: str) -> RawKernel:
        """Return a kernel.

        Raises
        ------
        CUDADriverError
            If there is none of this name.
        """
        path = build.kernel_library(self.code, self.options, self._settings.mode)
        try:
            found = _Kernel.in_dll(_load(path), f"cuda_on_cpu_kernel_{name}")
        except ValueError:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}") from None
        return RawKernel(name, found, path, self._settings)


class RawKernel:
    """A kernel; call it as CuPy's: ``kernel(grid, block, args, shared_mem=0)``."""

    def __init__(self, name: str, kernel: _Kernel, path: Path, settings: Settings) -> None:
        self.name = name
        self.max_threads_per_block = kernel.max_threads or 1024
        self._kernel, self._path, self._settings = kernel, path, settings
        self._runner = _runner(settings.mode)
        self._most_shared = _MOST_SHARED

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Bytes of shared memory that a launch may ask for."""
        return self._most_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        if not 0 <= size <= self._settings.most_shared:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {size} bytes of shared memory; a block of this device "
                f"has at most {self._settings.most_shared}"
            )
        self._most_shared = size

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        full_grid, full_block = self._sizes(grid, block, shared_mem)
        settings, kernel = self._settings, self._kernel
        if len(args) != kernel.count:
            raise TypeError(f"{self.name} takes {kernel.count} arguments, not {len(args)}")
        keep: list[Any] = []  # alive during the launch
        values = (ctypes.c_void_p * max(1, len(args)))()
        memories: dict[int, tuple[int, Memory, int]] = {}
        for i, arg in enumerate(args):
            value = self._value(i, arg, kernel.parameters[i])
            keep.append(value)
            values[i] = value.ctypes.data
            if isinstance(arg, ndarray):
                memory = arg._memory
                size = min(arg.dtype.itemsize, memories.get(id(memory), (0, memory, 99))[2])
                memories.setdefault(id(memory), (i, memory, size))
            for memory, size in driver.tensors(value.tobytes(), home()):
                memories.setdefault(id(memory), (i, memory, size))
        regions = self._regions(list(memories.values()))
        checked = settings.mode == "checked"
        traffic = (ctypes.c_ulonglong * (3 * max(1, len(regions))))()
        launch = _Launch(
            kernel.call,
            values,
            (ctypes.c_uint * 3)(*full_grid),
            (ctypes.c_uint * 3)(*full_block),
            shared_mem,
            regions,
            len(regions),
            Memory.guard(settings.mode),
            8 if checked else 0,
            int(settings.mode != "fast" or settings.seed != 0),
            settings.next_seed() & (2**64 - 1),
            traffic if checked else None,
        )
        message = ctypes.create_string_buffer(1024)
        settings.launches.append((self.name, full_grid, full_block))
        with _launching:
            failed = self._runner(launch, message, len(message))
        if checked:
            settings.traffic.append(
                {
                    region.argument: tuple(traffic[3 * i : 3 * i + 3])
                    for i, region in enumerate(regions)
                    if region.argument >= 0
                }
            )
        if failed:
            raise KernelError(f"{self.name}: {self._located(message.value.decode())}")

    def _sizes(
        self, grid: Sequence[int], block: Sequence[int], shared_mem: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = []
        for name, given, limits in (
            ("grid", grid, (2**31 - 1, 65535, 65535)),
            ("block", block, (1024, 1024, 64)),
        ):
            if not isinstance(given, tuple) or not 1 <= len(given) <= 3:
                raise TypeError(f"{name} is {given!r}; expected a tuple of 1 to 3 integers")
            full = (*given, 1, 1)[:3]
            if any(not 1 <= n <= most for n, most in zip(full, limits, strict=True)):
                raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {name} is {given}")
            sizes.append(tuple(map(int, full)))
        threads = sizes[1][0] * sizes[1][1] * sizes[1][2]
        if threads > self.max_threads_per_block:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: a block of {threads} threads; {self.name} is compiled "
                f"for at most {self.max_threads_per_block}"
            )
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of dynamic shared memory; without "
                f"max_dynamic_shared_size_bytes at most {self.max_dynamic_shared_size_bytes}"
            )
        return sizes[0], sizes[1]

    def _value(self, index: int, arg: Any, parameter: _Parameter) -> np.ndarray:
        """Return the bytes that the kernel takes, checked against its parameter."""
        where = f"argument {index} of {self.name}"
        kind = parameter.kind.decode()
        if isinstance(arg, ndarray):
            if kind != "p":
                raise TypeError(f"{where} is an array; expected a value of {parameter.size} bytes")
            arg._check_device()
            element = parameter.element_kind.decode()
            if element != "?" and (element, parameter.element_size) != (
                arg.dtype.kind,
                arg.dtype.itemsize,
            ):
                raise TypeError(
                    f"{where} points to {element}{parameter.element_size}, given {arg.dtype}"
                )
            return np.array(arg.data.ptr, np.uint64)
        if isinstance(arg, np.ndarray) and arg.size == 1:  # a structure, by value
            if kind != "?" or arg.dtype.itemsize != parameter.size:
                raise TypeError(f"{where} takes {parameter.size} bytes, given {arg.dtype}")
            return _aligned(arg)
        if isinstance(arg, (bool, int, float)):  # as CuPy passes Python's numbers
            types = {bool: np.bool_, int: np.int64, float: np.float64}
            arg = types[type(arg)](arg)
        if not isinstance(arg, np.generic):
            raise TypeError(
                f"{where} is a {type(arg).__name__}; expected an array or a NumPy scalar"
            )
        if arg.dtype.itemsize != parameter.size:
            raise TypeError(f"{where} takes {parameter.size} bytes, given {arg.dtype}")
        if kind not in ("?", "p") and arg.dtype.kind != kind:
            raise TypeError(f"{where} is of kind {kind!r}, given {arg.dtype}")
        if kind == "p" and (arg.dtype.kind != "u" or arg != 0):
            raise TypeError(f"{where} is a pointer; expected an array, or np.uintp(0) for none")
        return np.array(arg)

    def _regions(self, memories: Sequence[tuple[int, Memory, int]]) -> Any:
        variables = _variables(self._path, self._settings.mode == "checked")
        regions = (_Region * max(1, len(memories) + len(variables)))()
        count = 0
        for index, memory, itemsize in memories:
            if memory.size:
                shift = {1: 0, 2: 1, 4: 2}.get(itemsize, 3)
                regions[count] = _Region(memory.start, memory.size, shift, index, b"")
                count += 1
        for address, size, name, shared in variables:
            regions[count] = _Region(address, size, 0, _SHARED if shared else _VARIABLE, name)
            count += 1
        return (_Region * count).from_buffer(regions) if count else (_Region * 0)()

    def _located(self, message: str) -> str:
        """Return the message with lines of source in the place of addresses of code."""
        tool = shutil.which("addr2line")

        def line(match: re.Match[str]) -> str:
            if tool is None:
                return ""
            # The address behind a call belongs to the next line: look before it.
            address = hex(int(match[1], 16) - 1)
            done = subprocess.run(
                [tool, "-s", "-e", str(self._path), address],
                capture_output=True,
                text=True,
                check=False,
            )
            place = done.stdout.split(" (")[0].strip()
            return f" [{place}]" if place and "?" not in place else ""

        return re.sub(r" \[code ([0-9a-f]+)\]", line, message)
