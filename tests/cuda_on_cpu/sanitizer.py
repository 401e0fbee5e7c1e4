"""Processes with AddressSanitizer loaded, which kernels built with it need.

It has to be the first library of a process, so Python is started anew:

    python -m tests.cuda_on_cpu.sanitizer -m pytest tests/test_conformance.py -k cuda_atomic
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from tests.cuda_on_cpu import build

__all__ = ["available", "environment", "python", "require"]


@cache
def _library() -> Path | None:
    compiler = build.find_compiler()
    if compiler is None:
        return None
    for name in ("libasan.so", "libclang_rt.asan.so", "libclang_rt.asan-x86_64.so"):
        done = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        )
        path = Path(done.stdout.strip())
        if path.is_absolute() and path.exists():
            return path
    return None


def available() -> str | None:
    """Return None if processes can be started with AddressSanitizer, else why not."""
    reason = build.compiler_available()
    if reason:
        return reason
    return None if _library() else "the C++ compiler comes without AddressSanitizer"


def require() -> None:
    """Raise RuntimeError unless this process has AddressSanitizer loaded."""
    try:
        ctypes.CDLL(None).__asan_default_options  # noqa: B018 - looks the symbol up
    except AttributeError:
        raise RuntimeError(
            "the mode 'asan' needs AddressSanitizer loaded first: start Python by "
            "`python -m tests.cuda_on_cpu.sanitizer`"
        ) from None


def environment() -> dict[str, str]:
    """Return the environment of a process with AddressSanitizer, kernels in the mode ``asan``."""
    return {
        **os.environ,
        "LD_PRELOAD": str(_library()),
        # Python and NumPy leave memory behind at exit; leaks are not what is looked for.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GPUCONV_TEST_KERNELS": "asan",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def python(*arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[Any]:
    """Run Python with these arguments, AddressSanitizer loaded; its output is text."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


if __name__ == "__main__":
    reason = available()
    if reason:
        sys.exit(reason)
    os.execvpe(sys.executable, [sys.executable, *sys.argv[1:]], environment())
