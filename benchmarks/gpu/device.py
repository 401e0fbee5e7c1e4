"""The device: its facts, and its ceilings, measured."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import gpuconv
from gpuconv.cuda import runtime
from gpuconv.profiling.timing import EventClock, best

__all__ = ["ceilings", "facts", "torch_on_device"]

#: Chains of multiply-adds in registers: enough of them to hide each other's latency.
FMA = """
template <typename T> __device__ __forceinline__ void chains(T* y, int rounds) {
  T v[16];
  const T a = T(0.999), b = T(threadIdx.x);
  for (int i = 0; i < 16; i++) v[i] = T(i) + b;
  for (int k = 0; k < rounds; k++)
#pragma unroll
    for (int i = 0; i < 16; i++) v[i] = v[i] * a + b;
  T sum = 0;
  for (int i = 0; i < 16; i++) sum += v[i];
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
extern "C" __global__ void __launch_bounds__(256) ceiling_fma_f32(float* y, int rounds) {
  chains(y, rounds);
}
extern "C" __global__ void __launch_bounds__(256) ceiling_fma_f64(double* y, int rounds) {
  chains(y, rounds);
}
"""
CHAINS, THREADS = 16, 256


def facts() -> dict[str, Any]:
    """Return the device, the driver and the versions."""
    cp = runtime.cupy()
    properties = cp.cuda.runtime.getDeviceProperties(0)
    name = properties["name"]
    torch = torch_on_device()
    return {
        "gpu": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": str(cp.cuda.Device(0).compute_capability),
        "multiprocessors": int(properties["multiProcessorCount"]),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "driver": _driver(),
        "cuda_driver": int(cp.cuda.runtime.driverGetVersion()),
        "cuda_runtime": int(cp.cuda.runtime.runtimeGetVersion()),
        "cudnn_of_torch": None if torch is None else torch.backends.cudnn.version(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {
            "gpuconv": gpuconv.__version__,
            "cupy": str(cp.__version__),
            **{p: _version(p) for p in ("numpy", "torch", "jax", "nvidia-cudnn-frontend")},
        },
    }


def torch_on_device() -> Any:
    """Return PyTorch if it is installed and sees a device, else None."""
    if runtime.installed() is not None:
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _driver() -> str | None:
    """Return the driver's version as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _version(package: str) -> str | None:
    """Return an installed package's version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ceilings(seconds: float = 0.2, size: int = 256 << 20, edge: int = 8192) -> dict[str, Any]:
    """Return bytes a second of a copy and operations a second by dtype, each the best of many.

    Parameters
    ----------
    seconds : float
        For each measurement.
    size : int
        Bytes copied.
    edge : int
        Of the square matrices whose product is timed.

    Returns
    -------
    dict
        ``bandwidth`` in bytes/s, read plus written; ``flops`` in FLOP/s by dtype, and ``how``
        each was measured. Of float32 and float64 it is the better of multiply-adds in
        registers and the library's matrix product; of the others the product on the tensor
        cores. What could not be measured is left out.
    """
    cp = runtime.cupy()
    clock = EventClock()
    bandwidth = _copied(size, seconds)
    flops: dict[str, float] = {}
    how: dict[str, str] = {}

    def note(dtype: str, rate: float, text: str) -> None:
        if rate > flops.get(dtype, 0.0):
            flops[dtype], how[dtype] = rate, text

    module = cp.RawModule(code=FMA, options=("-std=c++17",), backend="nvrtc")
    blocks = 8 * int(cp.cuda.Device(0).attributes["MultiProcessorCount"])
    for dtype, name in (("float32", "f32"), ("float64", "f64")):
        kernel = module.get_function(f"ceiling_fma_{name}")
        y = cp.zeros(blocks * THREADS, dtype)
        rounds = max(1, edge // 2)

        def chains(kernel: Any = kernel, y: Any = y, rounds: int = rounds) -> None:
            kernel((blocks,), (THREADS,), (y, _int32(rounds)))

        count = 2 * CHAINS * rounds * blocks * THREADS
        note(dtype, count / best(chains, seconds, clock), "multiply-adds in registers")
    for dtype in ("float64", "float32", "float16"):
        a = cp.ones((edge, edge), dtype)

        def product(a: Any = a) -> None:
            a @ a

        rate = 2 * edge**3 / best(product, seconds, clock)
        note(dtype, rate, "matrix product of the library")
    torch = torch_on_device()
    if torch is not None:
        for dtype, rate in _torch_products(torch, edge, seconds):
            note(dtype, rate, "matrix product, by PyTorch")
    return {"bandwidth": bandwidth, "flops": flops, "how": how}


def _copied(size: int, seconds: float) -> float:
    """Return bytes a second, read plus written, of a copy of so many."""
    cp = runtime.cupy()
    source, to = cp.zeros(size, "uint8"), cp.zeros(size, "uint8")

    def copy() -> None:
        to[...] = source

    return 2 * size / best(copy, seconds, EventClock())


def _int32(value: int) -> Any:
    import numpy as np

    return np.int32(value)


def _torch_products(torch: Any, edge: int, seconds: float) -> list[tuple[str, float]]:
    """Return the rates of products on the tensor cores that CuPy does not offer."""
    from benchmarks.gpu.torch_peer import TorchClock

    found = []
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for name, dtype in (
            ("tf32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16),
        ):  # fmt: skip
            a = torch.randn(edge, edge, device="cuda", dtype=dtype)
            found.append((name, 2 * edge**3 / best(_squared(a), seconds, TorchClock(torch))))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found


def _squared(a: Any) -> Callable[[], Any]:
    return lambda: a @ a
