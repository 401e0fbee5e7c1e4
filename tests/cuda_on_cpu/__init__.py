"""The CUDA sources of ``kernels/``, run on the CPU behind the interface of CuPy.

    with stand_in() as cp:                     # gpuconv takes cp for CuPy
        y = gpuconv.conv2d(cp.asarray(x), cp.asarray(w))

The very files are compiled by the host's C++ compiler behind a header that supplies what CUDA
builds in (``runtime/``). Blocks run one after the other; the threads of a block are fibers that
switch at barriers and warp collectives. In the mode ``checked`` every access to memory is
watched: out of bounds, races between threads, shared memory that nothing has written, and chance
switches threads between accesses. In the mode ``asan`` AddressSanitizer watches. The whole
conformance suite runs in any of them:

    GPUCONV_TEST_KERNELS=checked python -m pytest tests/test_conformance.py -k cuda_atomic
    python -m tests.cuda_on_cpu.sanitizer -m pytest tests/test_conformance.py -k cuda_atomic

A built-in that a kernel needs and the header lacks goes into one of ``runtime/*.h``; what a warp
does together is written on ``cuda_on_cpu_gather`` (``runtime/together.h``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpuconv.cuda import runtime
from tests.cuda_on_cpu import arrays
from tests.cuda_on_cpu.build import MODES, CompileError, compiler_available
from tests.cuda_on_cpu.launch import CUDADriverError, KernelError, Settings
from tests.cuda_on_cpu.module import Module

__all__ = ["CUDADriverError", "CompileError", "KernelError", "compiler_available", "stand_in"]


@contextmanager
def stand_in(
    mode: str = "fast", seed: int = 0, devices: int = 1, capability: int = 80
) -> Iterator[Module]:
    """Put a module in the place of CuPy that runs kernels on the CPU.

    Parameters
    ----------
    mode : {"fast", "checked", "asan"}
        What is watched; ``asan`` works in a process that has AddressSanitizer loaded only.
    seed : int
        Of the order of blocks and threads. ``fast`` with the seed 0 runs them in order.
    devices : int
        Number of CUDA devices to show.
    capability : int
        Their compute capability, times ten: what kernels see as ``__CUDA_ARCH__``.

    Yields
    ------
    Module
        Use it as ``cupy``. ``settings.launches`` and ``cuda.nvtx.ranges`` tell what was done.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "asan":
        from tests.cuda_on_cpu import sanitizer

        sanitizer.require()
    home = arrays.Home(mode, devices)
    home.compute_capability = str(capability)
    module = Module(home, Settings(mode, seed, capability))
    outer_home, outer = arrays.move_to(home), runtime.installed()
    runtime.install(module)
    try:
        yield module
    finally:
        arrays.move_to(outer_home)
        if outer is None:
            runtime.uninstall()
        else:
            runtime.install(outer)
