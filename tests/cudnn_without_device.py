"""cuDNN's own verdict on our graphs, without a device: ``python -m tests.cudnn_without_device``.

cuDNN plans ahead of time for a device that it is told the properties of. Its libraries still want
a driver to load, so empty ones are put in their way, which no plan needs. What comes out: for each
graph the bytes of workspace of a plan, or the reason why there is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.cuda_on_cpu import compiler_available
from tests.cuda_on_cpu.build import find_compiler

__all__ = ["run", "unavailable"]

#: An H100 as cuDNN writes a device's properties.
H100 = {
    "deviceName": "NVIDIA H100 80GB HBM3", "cudaDeviceId": 0, "deviceVer": 900,
    "driverVer": 12080, "multiProcessorCount": 132, "smCountOrigin": 0, "warpSize": 32,
    "maxGridSize": [2**31 - 1, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "oversizedSharedMemoryPerBlock": 0,
    "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0, "isTccDriver": 0,
    "supportCoopLaunch": 1, "smClockRateKHz": 1980000, "memClockRateKHz": 2619000,
    "memoryBusWidth": 5120, "l2CacheSize": 52428800, "totalGlobalMem": 85014000000,
}  # fmt: skip

_DRIVER = """
int cuInit(int f) { return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* c) { *c = 1; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
"""
_REFUSING = (
    "cuGetErrorString", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload",
    "cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled",
)  # fmt: skip
_RUNTIME = """
int cudaGetDevice(int* d) { *d = 0; return 0; }
const char* cudaGetErrorString(int e) { return "no device"; }
int cudaDeviceGetAttribute(int* v, int a, int d) {
  *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : 1;
  return 0;
}
int cudaRuntimeGetVersion(int* v) { *v = 12080; return 0; }
int cudaDriverGetVersion(int* v) { *v = 13000; return 0; }
"""


def _libraries() -> list[str]:
    found = []
    for name in ("cudnn", "cuda_nvrtc", "cublas"):
        try:
            spec = importlib.util.find_spec(f"nvidia.{name}")
        except ModuleNotFoundError:
            spec = None
        places = (spec.submodule_search_locations if spec else None) or ()
        found += [str(Path(place) / "lib") for place in places]
    return found


def unavailable() -> str | None:
    """Return what is missing, or None."""
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    if len(_libraries()) < 3:
        return "cuDNN's libraries (the wheel nvidia-cudnn-cu12) are not installed"
    return compiler_available()


def _compile(text: str, place: Path, name: str) -> None:
    flags = ["-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{name}"]
    command = [find_compiler() or "cc", *flags, "-o", str(place / name)]
    subprocess.run(command, input=text, text=True, check=True)


def run(python: str) -> str:
    """Return what ``main`` writes, in a process of its own with the empty driver."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        refusing = "".join(f"int {name}() {{ return 100; }}\n" for name in _REFUSING)
        _compile(_DRIVER + refusing, place, "libcuda.so.1")
        _compile(_RUNTIME, place, "libcudart.so.12")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join([*_libraries(), folder]),
            "CUDNN_FRONTEND_CUDART_LIB_NAME": str(place / "libcudart.so.12"),
        }
        done = subprocess.run(
            [python, "-m", "tests.cudnn_without_device", "--child"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return done.stdout.strip().splitlines()[-1]


def _plans() -> dict[str, Any]:
    import cudnn

    from gpuconv.cuda.cudnn import plan_on
    from gpuconv.engines.base import PASSES
    from gpuconv.engines.cudnn import _graph
    from gpuconv.problem import CHANNELS_FIRST, CHANNELS_LAST, ConvProblem

    device = cudnn.create_device_properties(json.dumps(H100))
    ones = (1, 1)
    plain = ConvProblem(8, 64, 128, (28, 28), (3, 3), ones, (ones, ones), ones)
    problems = {
        "plain": plain,
        "asymmetric": replace(plain, padding=((2, 1), (0, 3))),
        "strided": replace(plain, stride=(2, 2)),
        "dilated": replace(plain, dilation=(2, 2), padding=((2, 2), (2, 2))),
        "grouped": replace(plain, groups=4),
        "depthwise": replace(plain, out_channels=64, groups=64),
        "odd": replace(plain, in_channels=3, out_channels=5),
        "1d": ConvProblem(8, 64, 128, (200,), (3,), (1,), (ones,), (1,)),
        "3d": ConvProblem(2, 16, 32, (8, 9, 10), (3,) * 3, (1,) * 3, (ones,) * 3, (1,) * 3),
    }
    found: dict[str, Any] = {}
    for name, problem in problems.items():
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            for layout in (CHANNELS_LAST, CHANNELS_FIRST):
                one = replace(problem, dtype=dtype, layout=layout)
                passes = [(p, False, ()) for p in PASSES]
                passes += [("forward", True, (a,)) for a in ("relu", "tanh", "sigmoid", "elu")]
                for pass_, bias, activation in passes:
                    graph = _graph(one, pass_, 2**28, bias, activation)
                    made = plan_on(cudnn, graph, device_property=device)
                    label = " ".join((name, dtype, layout, pass_, *activation))
                    found[label] = made if isinstance(made, str) else made.workspace
    return found


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(_plans()))
    else:
        print(unavailable() or run(sys.executable))
