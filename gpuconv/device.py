"""Which array library and which device; the transparent fallback and its one log line.

The rules:

- An *array* decides for itself: NumPy arrays are computed on the CPU and CuPy arrays on their
  own CUDA device. Nothing here moves an array that was not asked to be moved.
- The *default device* (for layers, training and :func:`asarray`) is decided once, when it is
  first needed: a CUDA device where CuPy has a working one, else the CPU, with one INFO line
  that says why. A device that was asked for and is not there is an error instead.
- CuPy is imported only when the default device is decided or a CUDA device is asked for.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from gpuconv.cuda import runtime

__all__ = [
    "CPU",
    "Device",
    "DeviceError",
    "Probe",
    "asarray",
    "asnumpy",
    "device",
    "device_of",
    "namespace",
    "parse_device",
    "probe",
    "use_device",
]

log = logging.getLogger("gpuconv")

Array = Any


class DeviceError(RuntimeError):
    """A device was asked for that is not there."""


@dataclass(frozen=True)
class Device:
    """A place where arrays live: ``cpu`` or ``cuda:N``."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu")


@dataclass(frozen=True)
class Probe:
    """What a look for CUDA devices found.

    Attributes
    ----------
    count : int
        Number of usable CUDA devices; 0 where there is none.
    reason : str
        Why there is none, in words; empty where there is one.
    advice : str
        What to do about it; may be empty.
    """

    count: int
    reason: str = ""
    advice: str = ""


_lock = threading.RLock()
_probe: Probe | None = None
_chosen: Device | None = None  # by use_device
_default: Device | None = None  # by the environment or the probe, once


def probe() -> Probe:
    """Look for a CUDA device that works, once; the answer is kept."""
    global _probe
    with _lock:
        if _probe is None:
            _probe = _look()
        return _probe


def reset() -> None:
    """Forget what was decided, so that the next call decides anew."""
    global _probe, _default, _chosen
    with _lock:
        _probe = _default = _chosen = None


def _look() -> Probe:
    install = "pip install 'gpuconv[cuda12]' or 'gpuconv[cuda13]', as the driver supports"
    try:
        cupy = runtime.cupy()
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return Probe(0, "CuPy is not installed", install)
        return Probe(0, f"CuPy does not import: {error}", "reinstall CuPy")
    except Exception as error:  # an import may fail in any way: a missing library, a bad driver
        return Probe(0, f"CuPy does not import: {_first_line(error)}", "reinstall CuPy")
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy's error classes exist only where CuPy does
        return Probe(
            0,
            f"CUDA does not start: {_first_line(error)}",
            "install or update the NVIDIA driver (nvidia-smi shows it)",
        )
    if count == 0:
        return Probe(0, "there is no CUDA device", "see CUDA_VISIBLE_DEVICES")
    try:
        with cupy.cuda.Device(0):
            cupy.zeros(1, dtype="float32").sum().item()
    except Exception as error:
        return Probe(
            0,
            f"the CUDA device does not work: {_first_line(error)}",
            "see nvidia-smi: the device may be full, or in exclusive use",
        )
    return Probe(count)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =\n")]
    return lines[0] if lines else type(error).__name__


def parse_device(spec: Device | str) -> Device:
    """Return the device that ``spec`` names, if it is there.

    Parameters
    ----------
    spec : Device or str
        ``"cpu"``, ``"cuda"`` (the first CUDA device) or ``"cuda:N"``.

    Raises
    ------
    TypeError, ValueError
        If it names no device.
    DeviceError
        If it names one that is not there.
    """
    if isinstance(spec, str):
        match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", spec.strip().lower())
        if match is None:
            raise ValueError(f"device is {spec!r}; expected 'cpu', 'cuda' or 'cuda:N'")
        spec = CPU if match[1] else Device("cuda", int(match[2] or 0))
    elif not isinstance(spec, Device):
        raise TypeError(f"device is {spec!r}; expected 'cpu', 'cuda' or 'cuda:N'")
    if spec.kind == "cuda":
        found = probe()
        if found.count == 0:
            advice = f"; {found.advice}" if found.advice else ""
            raise DeviceError(f"device is {str(spec)!r}, but {found.reason}{advice}")
        if spec.index >= found.count:
            raise DeviceError(
                f"device is {str(spec)!r}, but the last CUDA device is cuda:{found.count - 1}"
            )
    return spec


def device() -> Device:
    """Return the default device, deciding it first if need be.

    The order: :func:`use_device`; the environment variable ``GPUCONV_DEVICE`` (``cpu``,
    ``cuda``, ``cuda:N`` or ``auto``); a CUDA device if one works; the CPU.

    Raises
    ------
    DeviceError
        If ``GPUCONV_DEVICE`` asks for a device that is not there.
    """
    global _default
    with _lock:
        if _chosen is not None:
            return _chosen
        if _default is None:
            wish = os.environ.get("GPUCONV_DEVICE", "").strip().lower()
            if wish not in ("", "auto"):
                try:
                    _default = parse_device(wish)
                except (ValueError, DeviceError) as error:
                    raise type(error)(f"GPUCONV_DEVICE: {error}") from None
            elif probe().count:
                _default = Device("cuda", 0)
            else:
                log.info("computing on the CPU: %s", probe().reason)
                _default = CPU
        return _default


class _Restore:
    """What :func:`use_device` returns: undoes it where it is used in a ``with``."""

    def __init__(self, previous: Device | None) -> None:
        self._previous = previous

    def __enter__(self) -> Device:
        return device()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _chosen
        with _lock:
            _chosen = self._previous


def use_device(spec: Device | str | None) -> _Restore:
    """Set the default device, for good or for a ``with`` block.

    Parameters
    ----------
    spec : Device, str or None
        ``"cpu"``, ``"cuda"``, ``"cuda:N"``; None goes back to the automatic choice.

    Raises
    ------
    DeviceError
        If the device is not there; the default stays as it was.
    """
    global _chosen
    wanted = None if spec is None else parse_device(spec)
    with _lock:
        restore = _Restore(_chosen)
        _chosen = wanted
    return restore


def device_of(array: Array) -> Device | None:
    """Return the device of a NumPy or CuPy array; None for anything else."""
    if isinstance(array, np.ndarray):
        return CPU
    cupy = runtime.loaded()
    if cupy is not None and isinstance(array, cupy.ndarray):
        return _cuda_device(int(array.device.id))
    return None


@lru_cache(maxsize=64)
def _cuda_device(index: int) -> Device:
    """Return the CUDA device of a number, the same object each time."""
    return Device("cuda", index)


def namespace(array: Array) -> ModuleType | Any:
    """Return the library of ``array``: ``numpy`` or ``cupy``.

    Raises
    ------
    TypeError
        If it is neither's array.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    cupy = runtime.loaded()
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")


def asarray(a: Any, device: Device | str | None = None, dtype: Any = None) -> Array:
    """Return ``a`` as an array on ``device``, copying only where it must.

    Parameters
    ----------
    a : array_like
        NumPy or CuPy array, or what NumPy makes one of.
    device : Device, str or None
        Where to; None is the default device.
    dtype : dtype, optional
        Converted to, if it differs.
    """
    where = _default_device() if device is None else parse_device(device)
    here = device_of(a)
    if where.kind == "cpu":
        return np.asarray(asnumpy(a), dtype=dtype)
    cupy = runtime.cupy()
    if here is None or here.kind == "cpu":
        a = np.asarray(a, dtype=dtype)
    with cupy.cuda.Device(where.index):
        if here == where:
            return a if dtype is None else a.astype(dtype, copy=False)
        return (
            cupy.array(a, dtype=dtype)
            if here == CPU or here is None
            else cupy.asarray(a.get(), dtype=dtype)
        )


_default_device = device


def asnumpy(a: Any) -> np.ndarray[Any, Any]:
    """Return ``a`` as a NumPy array, copied off its device where it is on one."""
    here = device_of(a)
    if here is not None and here.kind == "cuda":
        return np.asarray(a.get())
    return np.asarray(a)
