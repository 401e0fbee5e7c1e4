"""Compiles CUDA sources for the CPU, and keeps what it compiled between runs.

A source is preprocessed behind ``runtime/device.h``, kernels and shared variables are found in
the result, and a shared library is made of it that runs on one of three runtimes (modes):

- ``fast``: nothing watches.
- ``checked``: every memory access calls the runtime (``runtime/checks.cpp``).
- ``asan``: AddressSanitizer and UndefinedBehaviorSanitizer. Only in a process that has loaded
  AddressSanitizer first (see ``sanitizer.py``).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["MODES", "CompileError", "compiler_available", "find_compiler", "kernel_library"]

RUNTIME = Path(__file__).with_name("runtime")
MODES = ("fast", "checked", "asan")

_COMMON = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
_MODE_FLAGS = {
    "fast": [],
    "checked": ["-g1", "-Og"],
    "asan": ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
             "-fno-sanitize=vptr,object-size", "-fno-sanitize-recover=undefined"],
}  # fmt: skip
#: Flags of NVRTC that mean nothing here.
_IGNORED = re.compile(r"--?(use_fast_math|lineinfo|maxrregcount|arch|gpu-architecture|std)\b.*")


class CompileError(RuntimeError):
    """The host compiler refused a source; the message is the compiler's."""


@cache
def find_compiler() -> str | None:
    """Return the path of a C++ compiler: ``$CXX``, else ``g++``, ``clang++`` or ``c++``."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


@cache
def compiler_available() -> str | None:
    """Return None if kernels can be compiled for the CPU, else the reason why not."""
    if os.name != "posix":
        return "the kernels run on the CPU on Linux only"
    if find_compiler() is None:
        return "no C++17 compiler (g++ or clang++) to run the kernels on the CPU"
    try:
        _runtime_library("fast")
    except CompileError as error:
        return f"the C++ compiler cannot build the kernels' runtime: {error}"
    return None


@cache
def _folder() -> Path:
    """Return the folder of compiled libraries, the user's own."""
    uid = os.getuid()
    path = Path(tempfile.gettempdir()) / f"gpuconv-cuda-on-cpu-{uid}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != uid:  # someone else's, under this name
        return Path(tempfile.mkdtemp(prefix="gpuconv-cuda-on-cpu-"))
    return path


@cache
def _identity() -> str:
    """Return what the result depends on beside source and options."""
    compiler = Path(find_compiler() or "").resolve()
    status = compiler.stat()
    digest = hashlib.sha256(f"{compiler} {status.st_size} {status.st_mtime_ns}".encode())
    for file in (Path(__file__), *sorted(RUNTIME.rglob("*"))):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _run(arguments: Sequence[str], text: str = "") -> str:
    command = [find_compiler() or "c++", *arguments]
    plain = {**os.environ, "LC_ALL": "C"}  # messages in ASCII
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=plain
    )
    if done.returncode:
        raise CompileError(done.stderr.strip() or f"{command[0]} failed")
    return done.stdout


def _kept(key: str, make: Callable[[Path], None]) -> Path:
    """Return the file of this key, made in a temporary place and moved there if it is missing."""
    path = _folder() / (hashlib.sha256(f"{_identity()} {key}".encode()).hexdigest()[:32] + ".so")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as place:
            made = Path(place) / "made.so"
            make(made)
            os.replace(made, path)
    return path


@cache
def _runtime_library(mode: str) -> Path:
    sources = ["scheduler.cpp", "copies.cpp", "hopper.cpp"]
    sources.append("checks.cpp" if mode == "checked" else "unchecked.cpp")
    defines = ["-DCUDA_ON_CPU_ASAN"] if mode == "asan" else []
    flags = [*_COMMON, "-fvisibility=default", *_MODE_FLAGS[mode], *defines, "-shared"]

    def make(place: Path) -> None:
        _run([*flags, *(str(RUNTIME / s) for s in sources), "-o", str(place), "-ldl"])

    return _kept(f"runtime {mode}", make)


@dataclass(frozen=True)
class _Kernel:
    name: str
    bounds: str  # the arguments of __launch_bounds__


# What may stand between two words of preprocessed text.
_GAP = r"(?:\s|^\#.*$)+"
_BOUNDS = rf"(?:CUDA_ON_CPU_BOUNDS\s*\((?P<{{}}>(?:[^()]|\([^()]*\))*)\){_GAP})?"
_KERNEL = re.compile(
    rf"(?:CUDA_ON_CPU_KERNEL{_GAP}{_BOUNDS.format('a')}void|void{_GAP}CUDA_ON_CPU_KERNEL){_GAP}"
    rf"{_BOUNDS.format('b')}(?P<name>\w+)\s*\(",
    re.MULTILINE,
)
_DYNAMIC = re.compile(
    rf"extern{_GAP}CUDA_ON_CPU_SHARED\s+(?P<type>[^;\[\]]+?)\b(?P<name>\w+)\s*\[\s*\]\s*;",
    re.MULTILINE,
)
_SHARED = re.compile(r"CUDA_ON_CPU_SHARED\s+[^;=\[]*?\b(\w+)\s*(?:\[[^;]*)?;")


def _kernels(text: str) -> list[_Kernel]:
    found: dict[str, _Kernel] = {}
    for match in _KERNEL.finditer(text):
        before = re.split(r"[;{}]", text[max(0, match.start() - 500) : match.start()])[-1]
        if "template" not in before:
            name = match["name"]
            found[name] = _Kernel(name, match["a"] or match["b"] or "")
    return list(found.values())


_EXPORT = 'extern "C" __attribute__((visibility("default")))'


def _exported(kernel: _Kernel) -> str:
    """Return C++ that calls a kernel with an array of arguments, and describes them."""
    name, call = kernel.name, f"cuda_on_cpu_call_{kernel.name}"
    return (
        f'extern "C" void {call}(void** arguments) {{ cuda_on_cpu::call({name}, arguments); }}\n'
        f"{_EXPORT} const cuda_on_cpu::Kernel cuda_on_cpu_kernel_{name};\n"
        f"const cuda_on_cpu::Kernel cuda_on_cpu_kernel_{name} = cuda_on_cpu::describe("
        f'"{name}", {call}, cuda_on_cpu::bound({kernel.bounds}), {name});\n'
    )


def kernel_library(source: str, options: Sequence[str], mode: str) -> Path:
    """Return a library that holds the kernels of a CUDA source.

    It exports a ``cuda_on_cpu_kernel_<name>`` for each kernel (``Kernel`` of ``device.h``) and
    ``cuda_on_cpu_shared``, the names of its static shared variables.

    Parameters
    ----------
    source : str
        CUDA C++.
    options : sequence of str
        As for NVRTC; definitions (``-D``) count.
    mode : str
        One of :data:`MODES`.

    Raises
    ------
    CompileError
        If the source does not compile.
    """
    runtime = _runtime_library(mode)
    defines = []
    for option in options:
        if option[:2] in ("-D", "-U"):
            defines.append(option)
        elif not _IGNORED.fullmatch(option):
            raise CompileError(f"option {option!r} is not known here")

    def make(place: Path) -> None:
        _compile(_preprocess(source, defines, mode), mode, runtime, place)

    return _kept("\0".join([source, *defines, mode]), make)


def _preprocess(source: str, defines: Sequence[str], mode: str) -> str:
    checked = ["-DCUDA_ON_CPU_CHECKED"] if mode == "checked" else []
    places = ["-iquote", str(RUNTIME), "-I", str(RUNTIME / "include")]
    header = ["-include", str(RUNTIME / "device.h")]
    flags = ["-E", "-w", "-nostdinc", "-std=c++17", *checked, *defines, *places, *header]
    return _run([*flags, "-x", "c++", "-"], source)


def _compile(text: str, mode: str, runtime: Path, place: Path) -> None:
    text = _DYNAMIC.sub(r"\g<type>* const \g<name> = cuda_on_cpu::DynamicShared();", text)
    shared = " ".join(sorted(set(_SHARED.findall(text))))
    text += "\n" + "".join(map(_exported, _kernels(text)))
    text += f"{_EXPORT} const char cuda_on_cpu_shared[];\n"
    text += f'const char cuda_on_cpu_shared[] = "{shared}";\n'
    # Where variables end off a multiple of 64 bytes, the gap shows an access past the end.
    static = "static __attribute__((aligned(64)))" if mode == "checked" else "static"
    words = [
        "-DCUDA_ON_CPU_KERNEL=",
        "-DCUDA_ON_CPU_BOUNDS(...)=",
        f"-DCUDA_ON_CPU_SHARED={static}",
    ]
    flags = [*_COMMON, "-w", "-fno-strict-aliasing", *_MODE_FLAGS[mode], *words]
    if mode == "checked":
        # Compiled with the instrumentation, linked without its library. The runtime's library
        # brings the standard ones along: to name them here as well takes a third of the time.
        compiled = place.with_suffix(".o")
        _run([*flags, "-fsanitize=thread", "-c", "-x", "c++", "-", "-o", str(compiled)], text)
        _run(["-shared", "-nostdlib", str(compiled), str(runtime), "-lgcc", "-o", str(place)])
    else:
        _run(
            [*flags, "-shared", "-x", "c++", "-", "-x", "none", str(runtime), "-o", str(place)],
            text,
        )
