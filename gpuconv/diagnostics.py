"""What ``gpuconv doctor`` prints: what was found, what was chosen and why, what to install."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpuconv import _version, dispatch, settings
from gpuconv.cuda import runtime
from gpuconv.device import Device, DeviceError, parse_device, probe

__all__ = ["report"]

#: The names under which CuPy is published.
_CUPY_WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
_EXTRAS = {
    "train": ("tqdm", "matplotlib", "safetensors", "scikit-learn"),
    "bench": ("matplotlib",),
    "bfloat16": ("ml_dtypes",),
}
_VARIABLES = (
    "GPUCONV_DEVICE",
    "GPUCONV_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_PATH",
    "CUPY_CACHE_DIR",
)


def report() -> str:
    """Return the whole report; nothing that is missing or broken makes it fail."""
    advice: list[str] = []
    lines = ["Versions"]
    lines += _table(
        [
            ("gpuconv", f"{_version.__version__} in {os.path.dirname(__file__)}"),
            ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            ("NumPy", np.__version__),
            *_blas(),
            ("CuPy", _cupy_version()),
            *_cuda_versions(),
        ]
    )
    lines += ["", "Devices", *_table(_devices(advice))]
    lines += ["", "Settings"]
    lines += _table(
        [
            ("threads", _attempt(_threads)),
            ("workspace", f"{settings.get_workspace_limit() / 2**20:.0f} MiB at most"),
            ("precision", settings.get_precision()),
            ("deterministic", "yes" if settings.is_deterministic() else "no"),
            *((name, os.environ[name]) for name in _VARIABLES if name in os.environ),
        ]
    )
    lines += ["", "Engines", *_table(_engines())]
    lines += ["", "Profilers", *_table(_profilers())]
    lines += ["", "Optional parts", *_table(_extras(advice))]
    lines += ["", "Advice", *(f"  {line}" for line in advice or ["nothing: all is in place"])]
    return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:{width}}  {value}" for name, value in rows]


def _attempt(ask: Callable[[], Any]) -> str:
    """Return the answer, or what went wrong: a report goes on where a part is broken."""
    try:
        return str(ask())
    except Exception as error:  # whatever a broken installation raises
        return f"cannot be told: {error or type(error).__name__}"


def _distribution(names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return name and version of the first of these that is installed."""
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _blas() -> list[tuple[str, str]]:
    """Return a line for each BLAS library that NumPy brought in."""
    from threadpoolctl import threadpool_info

    rows = []
    for library in threadpool_info():
        if library.get("user_api") != "blas":
            continue
        core = library.get("architecture")
        text = f"{library.get('internal_api')} {library.get('version') or '(version unknown)'}"
        text += f" for {core}" if core else ""
        rows.append(("BLAS", f"{text}, {library.get('num_threads')} threads"))
    return rows or [("BLAS", "not recognised; its threads cannot be set")]


def _cupy_version() -> str:
    wheel = _distribution(_CUPY_WHEELS)
    found = probe()  # imports CuPy, if it can be
    module = runtime.loaded()
    if module is not None and hasattr(module, "__version__"):
        name = f" ({wheel[0]})" if wheel else ""
        return f"{module.__version__}{name}"
    if wheel is not None:
        return f"{wheel[1]} ({wheel[0]}), but {found.reason}"
    return found.reason or "found, version unknown"


def _cuda_versions() -> list[tuple[str, str]]:
    """Return the driver's, runtime's and compiler's versions, as CuPy tells them."""
    module = runtime.loaded()
    if module is None:
        return []

    def number(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}" if version else "none found"

    return [
        ("CUDA driver", _attempt(lambda: number(module.cuda.runtime.driverGetVersion()))),
        ("CUDA runtime", _attempt(lambda: number(module.cuda.runtime.runtimeGetVersion()))),
        ("NVRTC", _attempt(lambda: ".".join(map(str, module.cuda.nvrtc.getVersion())))),
    ]


def _devices(advice: list[str]) -> list[tuple[str, str]]:
    """Return the devices, the default among them, and why it is that one."""
    found = probe()
    rows = [("cpu", _attempt(_cpu))]
    rows += [(f"cuda:{index}", _attempt(partial(_gpu, index))) for index in range(found.count)]
    chosen, why = _choice()
    rows.append(("default", f"{chosen}: {why}" if chosen else why))
    if found.count == 0:
        rows.append(("no CUDA", found.reason))
        if found.advice:
            advice.append(f"for CUDA: {found.advice}")
    return rows


def _cpu() -> str:
    """Return the processor, its cores at hand, and the memory that is free of how much."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2] for line in file if line.startswith("model name")]
        name = names[0].strip() if names else name
    cores = settings.cores()
    text = f"{name}, {cores} core{'s' if cores > 1 else ''}"
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open("/proc/meminfo", encoding="utf-8") as file:
            sizes = dict(line.split(":", 1) for line in file)
        free, whole = (int(sizes[n].split()[0]) / 2**20 for n in ("MemAvailable", "MemTotal"))
        text += f", {free:.1f} of {whole:.1f} GiB free"
    return text


def _gpu(index: int) -> str:
    cuda = runtime.cupy().cuda
    properties = cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    name = name.decode() if isinstance(name, bytes) else name
    with cuda.Device(index):
        free, whole = (n / 2**30 for n in cuda.runtime.memGetInfo())
    major, minor = properties["major"], properties["minor"]
    return (
        f"{name}, compute capability {major}.{minor}, "
        f"{properties['multiProcessorCount']} multiprocessors, {free:.1f} of {whole:.1f} GiB free"
    )


def _choice() -> tuple[Device | None, str]:
    """Return the default device and the reason, without deciding anything for the process."""
    wish = os.environ.get("GPUCONV_DEVICE", "").strip().lower()
    if wish not in ("", "auto"):
        try:
            return parse_device(wish), f"GPUCONV_DEVICE is {wish!r}"
        except (ValueError, DeviceError) as error:
            return None, f"none, GPUCONV_DEVICE is in the way: {error}"
    if probe().count:
        return Device("cuda", 0), "a CUDA device works"
    return Device("cpu"), probe().reason


def _threads() -> str:
    return f"{settings.get_num_threads()} of {settings.cores()} cores"


def _profilers() -> list[tuple[str, str]]:
    """Return which profilers are here, and which of them support the default device."""
    from gpuconv.profiling import tools

    chosen, _ = _choice()
    on_gpu = chosen is not None and chosen.kind == "cuda"
    try:
        seen = tools.facts(chosen.index if on_gpu and chosen is not None else None)
    except Exception as error:  # whatever a broken installation raises
        return [("all", f"cannot be told: {error or type(error).__name__}")]
    rows = []
    for tool in tools.TOOLS:
        if tool == tools.BUILTIN:
            rows.append((tool, "always here"))
            continue
        why = tools.why_not(tool, seen)
        verdict = "supports the device" if why is None else why
        found = seen.paths.get(tool)
        rows.append((tool, f"{found}; {verdict}" if found else f"not found; {verdict}"))
    cupti = _distribution(("cupti-python",))
    rows.append(("CUPTI", f"cupti-python {cupti[1]}" if cupti else "cupti-python is not installed"))
    rows.append(("choice", str(tools.choose(seen)).splitlines()[0]))
    return rows


def _engines() -> list[tuple[str, str]]:
    rows = []
    for info in dispatch.engines():
        state = "available" if info.available else f"not available: {info.reason}"
        rows.append((info.name, f"{info.device:4}  {state}"))
    return rows


def _extras(advice: list[str]) -> list[tuple[str, str]]:
    rows = []
    for extra, names in _EXTRAS.items():
        versions = {name: _distribution((name,)) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        rows.append(
            (
                extra,
                ", ".join(f"{n} {v[1] if v else 'missing'}" for n, v in versions.items()),
            )
        )
        if missing:
            advice.append(f"for gpuconv {extra}: pip install 'gpuconv[{extra}]'")
    return rows
