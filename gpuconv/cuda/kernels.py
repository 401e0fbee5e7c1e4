"""Finding, specialising, compiling and launching the sources of ``kernels/``.

A :class:`Variant` is a source file with its compile-time constants. It is compiled when it is
first launched on a device; CuPy keeps the binaries on disk between runs. Files of ``kernels/``
that a source includes become part of its text, so that a change in one of them is seen by
that cache.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpuconv import activations
from gpuconv.activations import ELU, GELU, SELU, Activation, Affine, LeakyReLU, ReLU
from gpuconv.cuda import prepared, runtime

__all__ = [
    "Variant",
    "activation_defines",
    "clear",
    "function",
    "grid_for",
    "has_activation",
    "launch",
    "prepare",
    "read",
    "unusable",
    "variants",
]

#: Threads of a block for the elementwise-like kernels.
BLOCK = 256

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_lock = threading.Lock()
_modules: dict[tuple[int, Variant], Any] = {}
_functions: dict[tuple[int, Variant, str], Any] = {}
_multiprocessors: dict[int, int] = {}
#: Compute capabilities whose own instructions this driver or compiler turned out not to know.
unusable: set[int] = set()
#: Dynamic shared memory, in bytes, that kernels have been allowed; unasked they have 48 KiB.
_allowed: dict[tuple[int, Variant, str], int] = {}
_UNASKED = 48 * 1024


def folder() -> Path:
    """Return the folder of the sources: in the wheel, else beside the package.

    Raises
    ------
    FileNotFoundError
        If the installation lacks them.
    """
    package = Path(__file__).resolve().parent.parent
    for place in (package / "kernels", package.parent / "kernels"):
        if (place / "common.cuh").is_file():
            return place
    raise FileNotFoundError(
        f"no CUDA sources beside {package}; expected the folder 'kernels': reinstall gpuconv"
    )


@cache
def read(name: str) -> str:
    """Return a source with the project's own headers in the place of their ``#include``."""
    seen: set[str] = set()

    def expand(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        lines = []
        text = (folder() / file).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            match = re.fullmatch(r'#include "([\w.]+)"', line.strip())
            if match:
                lines.append(f'#line 1 "{match[1]}"')
                lines.append(expand(match[1]))
                lines.append(f'#line {number + 1} "{file}"')
            elif line.strip() != "#pragma once":
                lines.append(line)
            else:
                lines.append("")
        return "\n".join(lines)

    return f'#line 1 "{name}"\n{expand(name)}\n'


@dataclass(frozen=True)
class Variant:
    """A source file with its compile-time constants.

    Parameters
    ----------
    file : str
        Name in ``kernels/``.
    dtype : str
        Of the tensors.
    defines : tuple of (str, str)
        Constants in sorted order.
    functions : tuple of str
        Kernels it holds.
    shared_bytes : int
        Dynamic shared memory that a block is launched with, for its occupancy.
    capability : int
        The least compute capability (times ten) that it compiles for.
    alone : bool
        Whether it compiles for that one alone, with what no later one has (``sm_90a``).
    """

    file: str
    dtype: str
    defines: tuple[tuple[str, str], ...]
    functions: tuple[str, ...]
    shared_bytes: int = 0
    capability: int = 70
    alone: bool = False

    @property
    def source(self) -> str:
        """The text to compile."""
        return read(self.file)

    @property
    def options(self) -> tuple[str, ...]:
        """What the compiler is told."""
        constants = [f"-D{name}={value}" for name, value in self.defines]
        if self.alone:  # before CuPy's own: NVRTC takes the first
            constants.append(f"-arch=sm_{self.capability}a")
        return ("-std=c++17", f"-DDTYPE_{_DTYPES[self.dtype]}=1", *constants)


def suffix(dtype: str) -> str:
    """Return the end of the names of kernels of this dtype: ``f32``."""
    return _DTYPES[dtype].lower()


# The numbers of kernels/activations.cuh.
_ACTIVATIONS: dict[type[Activation], int] = {
    activations.Identity: 0,
    activations.Affine: 1,
    activations.ReLU: 2,
    activations.LeakyReLU: 3,
    activations.ELU: 4,
    activations.SELU: 5,
    activations.GELU: 6,
    activations.Tanh: 8,
    activations.Sigmoid: 9,
    activations.HardSigmoid: 10,
    activations.SoftPlus: 11,
    activations.Exponential: 12,
}


def has_activation(activation: Activation | None) -> bool:
    """Return whether ``activations.cuh`` has it; a class of the user's own it has not."""
    return activation is None or type(activation) in _ACTIVATIONS


def activation_defines(activation: Activation | None) -> dict[str, str]:
    """Return the constants that choose an activation in ``activations.cuh``."""
    if activation is None:
        return {"ACT": "0"}
    if type(activation) is LeakyReLU and activation.alpha == 0:
        activation = ReLU()  # as elsewhere: infinity times 0 is no number
    code = _ACTIVATIONS[type(activation)]
    first = second = 0.0
    if isinstance(activation, Affine):
        first, second = activation.slope, activation.intercept
    elif isinstance(activation, (LeakyReLU, ELU)):
        first = activation.alpha
    elif isinstance(activation, SELU):
        first, second = activation.alpha, activation.scale
    elif isinstance(activation, GELU) and not activation.approximate:
        code += 1
    defines = {"ACT": str(code)}
    if first or second:
        defines |= {"ACT_A": f"({float(first)!r})", "ACT_B": f"({float(second)!r})"}
    return defines


def function(variant: Variant, name: str, device: int) -> Any:
    """Return a compiled kernel: call it with grid, block and arguments."""
    key = (device, variant, name)
    found = _functions.get(key)
    if found is None:
        with _lock:
            module = _modules.get((device, variant))
            if module is None:
                module = runtime.cupy().RawModule(
                    code=variant.source, options=variant.options, backend="nvrtc"
                )
                _modules[device, variant] = module
            found = _functions[key] = module.get_function(name)
    return found


def grid_for(work: int, device: int, block: int = BLOCK) -> int:
    """Return the blocks of a grid-stride launch: enough for ``work`` threads, or to fill the device."""
    count = _multiprocessors.get(device)
    if count is None:
        attributes = runtime.cupy().cuda.Device(device).attributes
        count = _multiprocessors[device] = int(attributes["MultiProcessorCount"])
    return max(1, min(-(-work // block), 32 * count))


def prepare(
    variant: Variant,
    name: str,
    device: int,
    grid: Sequence[int],
    block: Sequence[int],
    constants: tuple[Any, ...] = (),
    shared_bytes: int = 0,
) -> Callable[..., None]:
    """Return what launches a kernel: call it with the arrays, which come before ``constants``.

    It launches on the current stream of ``device``, which must be the current device then.
    ``shared_bytes`` of dynamic shared memory are asked for, up to what a block of the device
    may have (``Architecture.shared_per_block``).
    """
    kernel = function(variant, name, device)
    if shared_bytes > _UNASKED:
        key = (device, variant, name)
        if _allowed.get(key, 0) < shared_bytes:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
            _allowed[key] = shared_bytes
    grid, block = tuple(grid), tuple(block)

    def launch(*arrays: Any) -> None:
        kernel(grid, block, (*arrays, *constants), shared_mem=shared_bytes)

    return launch


def launch(
    variant: Variant,
    name: str,
    device: int,
    grid: Sequence[int],
    block: Sequence[int],
    args: tuple[Any, ...],
    shared_bytes: int = 0,
) -> None:
    """Launch a kernel once; see :func:`prepare`."""
    prepare(variant, name, device, grid, block, (), shared_bytes)(*args)


def clear() -> None:
    """Forget what was compiled or could not be, and what was prepared with it."""
    prepared.clear()
    with _lock:
        _modules.clear()
        _functions.clear()
        _allowed.clear()
        _multiprocessors.clear()
        unusable.clear()


def variants() -> Iterator[Variant]:
    """Yield variants that between them compile every kernel with every kind of constant."""
    from gpuconv.cuda import epilogue, normalization, split_sum
    from gpuconv.engines import (
        cuda_atomic,
        cuda_depthwise,
        cuda_gemm,
        cuda_implicit_gemm,
        cuda_tensor_core,
        cuda_winograd,
    )

    yield from cuda_atomic.sample_variants()
    yield from cuda_winograd.sample_variants()
    yield from cuda_gemm.sample_variants()
    yield from cuda_implicit_gemm.sample_variants()
    yield from cuda_tensor_core.sample_variants()
    yield from split_sum.sample_variants()
    yield from normalization.sample_variants()
    yield from epilogue.sample_variants()
    yield from cuda_depthwise.sample_variants()
