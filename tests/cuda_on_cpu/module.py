"""What stands in the place of CuPy: its namespace, devices, streams and named ranges.

NumPy's functions are forwarded under their names, as far as CuPy has them too (read from the
text of its package where it is installed, as it need not be importable).
"""

from __future__ import annotations

import importlib.util
import re
import time
import types
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.cuda_on_cpu.arrays import Home, OutOfMemoryError, function, ndarray, unwrap, wrap
from tests.cuda_on_cpu.cublas import Cublas
from tests.cuda_on_cpu.driver import Driver
from tests.cuda_on_cpu.launch import CUDADriverError, RawModule, Settings

__all__ = ["Module"]

#: Small, so that a grid with one thread an element reaches its cap, and strides, early.
MULTIPROCESSORS = 1


@cache
def _cupy_names(package: str) -> frozenset[str] | None:
    """Return what ``cupy.<package>`` has under NumPy's names; None where that cannot be told."""
    spec = importlib.util.find_spec("cupy")
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent
    for file in (place / package / "__init__.py", place / f"{package}.py"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            break
    else:
        return frozenset()
    imported = re.findall(r"^\s*from \S+ import (\w+)(?: as (\w+))?", text, re.MULTILINE)
    defined = re.findall(r"^(?:def )?(\w+)(?:\(| = )", text, re.MULTILINE)
    modules = re.findall(r"^\s*from cupy import (\w+)|^import cupy\.(\w+)", text, re.MULTILINE)
    return frozenset(
        [renamed or name for name, renamed in imported]
        + defined
        + [a or b for a, b in modules]
        + ([p.name for p in place.iterdir()] if not package else [])
    )


class Ufunc:
    """A universal function with its methods."""

    def __init__(self, ufunc: np.ufunc) -> None:
        self.__name__ = ufunc.__name__
        self._call = function(ufunc, strict=True)
        for name in ("at", "reduce", "accumulate", "reduceat", "outer"):
            setattr(self, name, function(getattr(ufunc, name)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class Generator:
    """A source of random numbers whose arrays are ours."""

    def __init__(self, numpys: Any) -> None:
        self._numpys = numpys

    def __getattr__(self, name: str) -> Any:
        return function(getattr(self._numpys, name))


class Namespace:
    """A module of NumPy's, over our arrays."""

    def __init__(self, numpys: types.ModuleType, package: str = "") -> None:
        self._numpys, self._package = numpys, package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        names = _cupy_names(self._package)
        path = "/".join(filter(None, (self._package, name)))
        if (names is not None and name not in names) or not hasattr(self._numpys, name):
            dotted = path.replace("/", ".")
            raise AttributeError(
                f"module 'cupy' has no attribute {dotted!r}, or its stand-in lacks it"
            )
        found = getattr(self._numpys, name)
        if isinstance(found, types.ModuleType):
            made: Any = Namespace(found, path)
        elif isinstance(found, np.ufunc):
            made = Ufunc(found)
        elif name in ("default_rng", "RandomState", "Generator"):
            made = lambda *args: Generator(found(*args))  # noqa: E731
        elif isinstance(found, type) or not callable(found):
            made = found  # dtypes, constants
        else:
            made = function(found)
        setattr(self, name, made)
        return made


class Module(Namespace):
    """The stand-in for the module ``cupy``.

    Attributes
    ----------
    settings : Settings
        How kernels run, and which were launched.
    libcuda : Driver
        What ``gpuconv.cuda.tensor_map`` asks of the driver's library.
    """

    __name__ = "cupy"
    __version__ = "stand-in"
    ndarray = ndarray

    def __init__(self, home: Home, settings: Settings) -> None:
        super().__init__(np)
        self.settings = settings
        self.cuda = Cuda(home, settings)
        self.libcuda = Driver()
        self.RawModule = partial(RawModule, settings=settings)
        self._home = home

    def array(
        self, obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", ndmin: int = 0
    ) -> ndarray:
        """Return an array on the current device, from a NumPy array or one of any device."""
        if isinstance(obj, ndarray):
            here = obj._device == self._home.device
            same = dtype is None or obj.dtype == dtype
            if here and same and not copy and obj.ndim >= ndmin:
                return obj
            obj = obj._a
        elif isinstance(obj, (list, tuple)) and _has_array(obj):
            obj = unwrap(obj, [])
        return ndarray._new(np.array(obj, dtype, order=order, ndmin=ndmin))

    def asarray(self, a: Any, dtype: Any = None, order: str = "K") -> ndarray:
        """Return ``a`` on the current device, itself where that is so already."""
        made = self.array(a, dtype, copy=False, order=order)
        if order in ("C", "F") and not made.flags[f"{order}_CONTIGUOUS"]:
            return ndarray._new(made._a.copy(order=order))
        return made

    asanyarray = asarray

    def empty(self, shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
        """Return an array of NaN, in the place of whatever a GPU's memory holds."""
        return ndarray(shape, dtype, order)

    def empty_like(
        self, a: ndarray, dtype: Any = None, order: str = "K", **options: Any
    ) -> ndarray:
        """Return an array of NaN as large as ``a``."""
        made = ndarray._new(np.empty_like(a._a, dtype, order=order, **options))
        made._memory.bytes[...] = 0xFF
        return made

    def allclose(self, *args: Any, **kwargs: Any) -> ndarray:
        """Return NumPy's answer, as an array of no axes."""
        return wrap(np.bool_(function(np.allclose)(*args, **kwargs)), ())

    def array_equal(self, *args: Any, **kwargs: Any) -> ndarray:
        """Return NumPy's answer, as an array of no axes."""
        return wrap(np.bool_(function(np.array_equal)(*args, **kwargs)), ())

    def asnumpy(self, a: Any, stream: Any = None, order: str = "C", out: Any = None) -> np.ndarray:
        """Return a NumPy array."""
        return a.get(order=order, out=out) if isinstance(a, ndarray) else np.asarray(a)

    def get_array_module(self, *args: Any) -> Any:
        """Return this for one of its arrays, else NumPy."""
        return self if any(isinstance(a, ndarray) for a in args) else np

    def get_default_memory_pool(self) -> Any:
        """Return a memory pool that holds nothing back, and counts how often it is freed."""
        return types.SimpleNamespace(
            used_bytes=lambda: self._home.used,
            total_bytes=lambda: self._home.used,
            free_all_blocks=self._freed,
        )

    get_default_pinned_memory_pool = get_default_memory_pool

    def _freed(self) -> None:
        self.settings.freed += 1

    def is_available(self) -> bool:
        """Return True: there is a device."""
        return True


def _has_array(values: Any) -> bool:
    return any(
        isinstance(v, ndarray) or (isinstance(v, (list, tuple)) and _has_array(v)) for v in values
    )


# ---------------------------------------------------------------------------------- cupy.cuda


class Cuda:
    """``cupy.cuda``."""

    class driver:
        CUDADriverError = CUDADriverError

    class memory:
        OutOfMemoryError = OutOfMemoryError

    class nvrtc:
        @staticmethod
        def getVersion() -> tuple[int, int]:
            return (12, 9)

    def __init__(self, home: Home, settings: Settings) -> None:
        self.runtime = Runtime(home, settings)
        self.nvtx = Nvtx()
        self.cublas = Cublas(home)
        self.Device = partial(Device, home, settings)
        self.Stream = partial(Stream, self)
        self.Event = Event
        self._stream = self.null_stream = Stream(self, null=True)

    def get_current_stream(self, device_id: int | None = None) -> Stream:
        """Return the stream that a ``with`` block chose, or the null stream."""
        return self._stream

    def get_cublas_handle(self) -> int:
        """Return the handle of the current device."""
        return self.cublas.handle()

    @staticmethod
    def alloc_pinned_memory(size: int) -> bytearray:
        """Return memory of the host's: here all of it can be read by kernels."""
        return bytearray(size)

    @staticmethod
    def get_elapsed_time(start: Event, end: Event) -> float:
        """Return milliseconds."""
        return (end.time - start.time) * 1e3

    @staticmethod
    def is_available() -> bool:
        """Return True: there is a device."""
        return True


class Runtime:
    """``cupy.cuda.runtime``."""

    CUDARuntimeError = RuntimeError

    def __init__(self, home: Home, settings: Settings) -> None:
        self._home, self._settings = home, settings

    def getDeviceCount(self) -> int:
        return self._home.devices

    def getDevice(self) -> int:
        return self._home.device

    def setDevice(self, index: int) -> None:
        Device(self._home, self._settings, index).use()

    def getDeviceProperties(self, index: int) -> dict[str, Any]:
        facts = Device(self._home, self._settings, index).attributes
        return {
            "name": b"CPU in the place of a GPU", "totalGlobalMem": 1 << 30,
            "major": facts["ComputeCapabilityMajor"], "minor": facts["ComputeCapabilityMinor"],
            "multiProcessorCount": MULTIPROCESSORS, "clockRate": 1_000_000, "warpSize": 32,
            "memoryClockRate": 1_000_000, "memoryBusWidth": 64, "l2CacheSize": 1 << 20,
            "sharedMemPerBlock": 48 * 1024,
            "sharedMemPerBlockOptin": facts["MaxSharedMemoryPerBlockOptin"],
            "regsPerBlock": 65536, "maxThreadsPerBlock": 1024, "maxThreadsPerMultiProcessor": 2048,
        }  # fmt: skip

    @staticmethod
    def driverGetVersion() -> int:
        return 12090

    runtimeGetVersion = driverGetVersion

    @staticmethod
    def deviceSynchronize() -> None:
        """Return at once: kernels have ended when their launch returns."""

    @staticmethod
    def memGetInfo() -> tuple[int, int]:
        return (1 << 30, 1 << 30)


class Device:
    """``cupy.cuda.Device``: a context manager that makes it the current one."""

    def __init__(self, home: Home, settings: Settings, device: int | Any = None) -> None:
        self.id = home.device if device is None else int(getattr(device, "id", device))
        if not 0 <= self.id < home.devices:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self._home, self._settings = home, settings
        self._before: list[int] = []

    @property
    def attributes(self) -> dict[str, int]:
        """Numbers of the device, under CUDA's names."""
        major, minor = divmod(int(self._home.compute_capability), 10)
        return {
            "MultiProcessorCount": MULTIPROCESSORS, "WarpSize": 32, "MaxThreadsPerBlock": 1024,
            "MaxSharedMemoryPerBlock": 48 * 1024,
            "MaxSharedMemoryPerBlockOptin": self._settings.most_shared,
            "ComputeCapabilityMajor": major, "ComputeCapabilityMinor": minor, "L2CacheSize": 1 << 20,
            "ClockRate": 1_000_000, "MemoryClockRate": 1_000_000, "GlobalMemoryBusWidth": 64,
        }  # fmt: skip

    @property
    def compute_capability(self) -> str:
        """Major and minor, as text."""
        return self._home.compute_capability

    mem_info = (1 << 30, 1 << 30)

    def use(self) -> None:
        """Make it the current device of this thread."""
        self._home.device = self.id

    def synchronize(self) -> None:
        """Return at once: kernels have ended when their launch returns."""

    def __enter__(self) -> Device:
        self._before.append(self._home.device)
        self.use()
        return self

    def __exit__(self, *error: object) -> None:
        self._home.device = self._before.pop()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class Nvtx:
    """``cupy.cuda.nvtx``: keeps the ranges that were pushed, for tests to look at.

    Attributes
    ----------
    ranges : list of (str, int)
        Name and depth of every range, in the order of their starts.
    open : list of str
        The ranges that have not ended.
    """

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int]] = []
        self.open: list[str] = []

    def RangePush(self, message: str, id_color: int = -1) -> None:
        self.ranges.append((message, len(self.open)))
        self.open.append(message)

    def RangePop(self) -> None:
        self.open.pop()

    def Mark(self, message: str, id_color: int = -1) -> None:
        self.ranges.append((message, len(self.open)))


class Stream:
    """``cupy.cuda.Stream``; everything has happened when its call returns."""

    def __init__(self, cuda: Cuda, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else id(self)
        self._cuda = cuda
        self._before: list[Stream] = []

    def use(self) -> Stream:
        """Make it the current stream."""
        self._cuda._stream = self
        return self

    def synchronize(self) -> None:
        """Return at once."""

    def record(self, event: Event | None = None) -> Event:
        """Note the time in an event."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Return at once."""

    def __enter__(self) -> Stream:
        self._before.append(self._cuda._stream)
        return self.use()

    def __exit__(self, *error: object) -> None:
        self._cuda._stream = self._before.pop()


class Event:
    """``cupy.cuda.Event``: a time."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.time = 0.0
        self.done = True

    def record(self, stream: Stream | None = None) -> None:
        """Note the time."""
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once."""
