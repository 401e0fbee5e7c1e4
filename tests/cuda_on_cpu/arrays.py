"""Arrays that stand in for CuPy's: NumPy arrays inside, and as strict as CuPy's outside.

They keep to CuPy's rules where code written for NumPy goes wrong on a GPU: no NumPy array is
taken without being asked for (``asarray``), none is made without being asked for (``get``),
reductions and elements stay arrays of no axes, and arrays of another device than the current
one are refused. New memory holds NaN, so that what is used before it is written shows; and the
bytes around each array are watched.
"""

from __future__ import annotations

import ctypes
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

__all__ = ["Home", "Memory", "OutOfMemoryError", "function", "home", "ndarray", "unwrap", "wrap"]

_KINDS = "biufc"  # what CuPy has dtypes for, and bfloat16


def _known(dtype: np.dtype) -> bool:
    return dtype.kind in _KINDS or dtype.name == "bfloat16"


class OutOfMemoryError(MemoryError):
    """``cupy.cuda.memory.OutOfMemoryError``."""


class Home:
    """Where new arrays are made: the mode of the stand-in and the current device.

    Attributes
    ----------
    limit : int or None
        Bytes of a device's memory; None for as many as there are.
    used, peak : int
        Bytes of the arrays there are, and the most there were.
    refused : list of int
        Bytes of the arrays for which there was no room.
    compute_capability : str
        Of every device.
    """

    def __init__(self, mode: str = "fast", devices: int = 1) -> None:
        self.mode, self.devices = mode, devices
        self.limit: int | None = None
        self.used = self.peak = 0
        self.refused: list[int] = []
        self.compute_capability = "80"
        self._memories: weakref.WeakSet[Memory] = weakref.WeakSet()
        self._here = threading.local()

    def take(self, size: int) -> None:
        """Take memory for an array."""
        if self.limit is not None and self.used + size > self.limit:
            self.refused.append(size)
            raise OutOfMemoryError(
                f"Out of memory allocating {size:,} bytes (allocated so far: {self.used:,} bytes, "
                f"limit set to: {self.limit:,} bytes)."
            )
        self.used += size
        self.peak = max(self.peak, self.used)

    def add(self, memory: Memory) -> None:
        """Know of an array's memory."""
        self._memories.add(memory)

    def memory_of(self, pointer: int) -> Memory | None:
        """Return the memory that a pointer points into."""
        return next((m for m in self._memories if 0 <= pointer - m.start < m.size), None)

    @property
    def device(self) -> int:
        """The calling thread's current device."""
        return getattr(self._here, "device", 0)

    @device.setter
    def device(self, index: int) -> None:
        self._here.device = index


_home = Home()


def home() -> Home:
    return _home


def move_to(new: Home) -> Home:
    """Make arrays at ``new`` from now on; return where they were made before."""
    global _home
    old, _home = _home, new
    return old


class Memory:
    """Bytes of a device, with guards of 0xff around them."""

    ALIGNMENT = 256
    GUARD = 64

    @classmethod
    def guard(cls, mode: str) -> int:
        """Return the bytes of a guard; AddressSanitizer has its own."""
        return 0 if mode == "asan" else cls.GUARD

    def __init__(self, size: int) -> None:
        self._home: Home | None = None
        home().take(size)
        self.size, self._home = size, home()
        if home().mode == "asan":
            self.bytes = _sanitized(size)
            self.start = self.bytes.ctypes.data
        else:
            room = np.full(size + 2 * self.GUARD + self.ALIGNMENT, 0xFF, np.uint8)
            first = -(-(room.ctypes.data + self.GUARD) // self.ALIGNMENT) * self.ALIGNMENT
            self.start = first
            offset = first - room.ctypes.data
            self.bytes = room[offset : offset + size]
        home().add(self)

    def __del__(self) -> None:
        if self._home is not None:
            self._home.used -= self.size

    def holds(self, a: np.ndarray) -> bool:
        """Return whether an array lies in here."""
        return a.size > 0 and 0 <= a.__array_interface__["data"][0] - self.start < self.size


def _sanitized(size: int) -> np.ndarray:
    """Return bytes from malloc, whose surroundings AddressSanitizer watches."""
    libc = ctypes.CDLL(None)
    place = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(256), ctypes.c_size_t(size))
    if place.value is None:
        raise MemoryError(f"no {size} bytes")
    room = (ctypes.c_ubyte * size).from_address(place.value)
    libc.free.argtypes = [ctypes.c_void_p]
    weakref.finalize(room, libc.free, place.value)
    a = np.frombuffer(room, np.uint8) if size else np.empty(0, np.uint8)
    a[...] = 0xFF
    return a


class Flags:
    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = flags.owndata

    def __getitem__(self, name: str) -> bool:
        return bool(getattr(self, name.lower()))


class ndarray:
    """An array of a device."""

    __slots__ = ("__weakref__", "_a", "_device", "_memory")
    __hash__ = None  # type: ignore[assignment]
    __array_priority__ = 100

    def __init__(self, shape: Any, dtype: Any = float, order: str = "C") -> None:
        kind = np.dtype(dtype)
        if not _known(kind):
            raise TypeError(f"dtype {kind} is not supported")
        sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
        count = 1
        for n in sizes:
            count *= operator.index(n)
        self._memory = Memory(count * kind.itemsize)
        self._a = np.ndarray(tuple(sizes), kind, self._memory.bytes, order=order)
        self._device = home().device

    # ------------------------------------------------------------------ making and taking apart

    @classmethod
    def _view(cls, a: np.ndarray, memory: Memory, device: int) -> ndarray:
        self = cls.__new__(cls)
        self._a, self._memory, self._device = a, memory, device
        return self

    @classmethod
    def _new(cls, a: np.ndarray) -> ndarray:
        """Return a copy of ``a`` in the device's memory, its axes in the same order."""
        if not _known(a.dtype):
            raise TypeError(f"dtype {a.dtype} is not supported")
        dense = a.copy(order="K")  # its strides are those of the result
        memory = Memory(dense.nbytes)
        inside = np.ndarray(dense.shape, dense.dtype, memory.bytes, strides=dense.strides)
        inside[...] = dense
        return cls._view(inside, memory, home().device)

    def _check_device(self) -> None:
        if self._device != home().device:
            raise ValueError(
                "Array device must be same as the current device: "
                f"array device = {self._device} while current = {home().device}"
            )

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        """Return a NumPy copy."""
        if out is not None:
            out[...] = self._a
            return out
        return self._a.copy(order=order)

    def set(self, a: np.ndarray, stream: Any = None) -> None:
        """Copy a NumPy array in."""
        if not isinstance(a, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if a.shape != self.shape or a.dtype != self.dtype:
            raise ValueError(f"{a.dtype}{a.shape} does not fit {self.dtype}{self.shape}")
        self._a[...] = a

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("out"), tuple):
            kwargs["out"] = kwargs["out"][0]
        return function(getattr(ufunc, method), strict=True)(*inputs, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return function(func)(*args, **kwargs)

    def __copy__(self) -> ndarray:
        return ndarray._new(self._a)

    def __deepcopy__(self, memo: Any) -> ndarray:
        return ndarray._new(self._a)

    # ------------------------------------------------------------------------------- attributes

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    strides = property(lambda self: self._a.strides)
    flags = property(lambda self: Flags(self._a.flags))
    T = property(lambda self: wrap(self._a.T, (self,)))
    real = property(lambda self: wrap(self._a.real, (self,)))
    imag = property(lambda self: wrap(self._a.imag, (self,)))
    device = property(
        lambda self: SimpleNamespace(id=self._device, compute_capability=home().compute_capability)
    )

    @property
    def data(self) -> Any:
        """The pointer of the first element."""
        pointer = self._a.__array_interface__["data"][0] if self._a.size else self._memory.start
        return SimpleNamespace(ptr=pointer, device=self.device, mem=self._memory)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self._a.__array_interface__)
        return {**interface, "strides": self.strides, "stream": 1, "version": 3}

    # ----------------------------------------------------------------- elements and conversions

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> ndarray:
        sources: list[ndarray] = [self]
        key = unwrap(key, sources)
        parts = key if isinstance(key, tuple) else (key,)
        if not any(part is Ellipsis for part in parts):
            key = (*parts, ...)  # an element is an array of no axes, a view
        return wrap(self._a[key], sources)

    def __setitem__(self, key: Any, value: Any) -> None:
        sources: list[ndarray] = [self]
        key, value = unwrap(key, sources), unwrap(value, sources, strict=True)
        for source in sources:
            source._check_device()
        self._a[key] = value

    def __bool__(self) -> bool:
        return bool(self._a)

    def __int__(self) -> int:
        return int(self._a)

    def __float__(self) -> float:
        return float(self._a)

    def __complex__(self) -> complex:
        return complex(self._a)

    def __index__(self) -> int:
        return operator.index(self._a)

    def __format__(self, spec: str) -> str:
        return format(self._a, spec)

    def __repr__(self) -> str:
        return repr(self._a)

    def __str__(self) -> str:
        return str(self._a)


# ------------------------------------------------------------------- NumPy's functions on them


def unwrap(value: Any, sources: list[ndarray], strict: bool = False) -> Any:
    """Return ``value`` with NumPy's arrays in the place of ours, which go to ``sources``.

    NumPy arrays are refused at any depth, and, if ``strict``, lists as well.
    """
    if isinstance(value, ndarray):
        sources.append(value)
        return value._a
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (list, tuple)):
        if strict:
            raise TypeError(f"Unsupported type {type(value)}")
        return type(value)(unwrap(v, sources) for v in value)
    if isinstance(value, dict):
        return {k: unwrap(v, sources) for k, v in value.items()}
    return value


def wrap(value: Any, sources: Any) -> Any:
    """Return a result of NumPy's: arrays become ours, views of a source stay views."""
    if isinstance(value, np.ndarray):
        for source in sources:
            if value is source._a:
                return source
        for source in sources:
            if source._memory.holds(value):
                return ndarray._view(value, source._memory, source._device)
        return ndarray._new(value)
    if isinstance(value, np.generic) and not isinstance(value, np.void):
        return ndarray._new(np.asarray(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # linalg's named results
        return type(value)(*(wrap(v, sources) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(wrap(v, sources) for v in value)
    return value


def function(numpys: Callable[..., Any], strict: bool = False) -> Callable[..., Any]:
    """Return one of NumPy's functions over our arrays; ``strict``: it takes no lists."""

    def call(*args: Any, **kwargs: Any) -> Any:
        sources: list[ndarray] = []
        plain = [unwrap(a, sources, strict) for a in args]
        named = {k: unwrap(v, sources) for k, v in kwargs.items()}
        for source in sources:
            source._check_device()
        with np.errstate(all="ignore"):  # a GPU says nothing of NaN and infinities
            if isinstance(numpys, np.ufunc) and any(s.dtype.name == "bfloat16" for s in sources):
                return wrap(_of_bfloat16(numpys, plain, named), sources)
            return wrap(numpys(*plain, **named), sources)

    call.__name__ = getattr(numpys, "__name__", "call")
    return call


def _of_bfloat16(ufunc: np.ufunc, plain: list[Any], named: dict[str, Any]) -> Any:
    """Return what CuPy makes of bfloat16: numbers take its dtype, and so do products of matrices.

    In NumPy both are float32.
    """
    kinds = {a.dtype for a in plain if isinstance(a, np.ndarray)}
    if len(kinds) > 1:
        return ufunc(*plain, **named)
    (kind,) = kinds
    if ufunc is np.matmul and "out" not in named:
        return ufunc(*(a.astype(np.float32) for a in plain)).astype(kind)
    return ufunc(*(kind.type(a) if isinstance(a, (int, float)) else a for a in plain), **named)


def _method(name: str) -> Callable[..., Any]:
    def call(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        return function(lambda a, *rest, **named: getattr(a, name)(*rest, **named))(
            self, *args, **kwargs
        )

    call.__name__ = name
    return call


def _binary(ufunc: Any, swapped: bool = False) -> Callable[..., Any]:
    over = function(ufunc, strict=True)

    def call(self: ndarray, other: Any) -> Any:
        return over(other, self) if swapped else over(self, other)

    return call


def _in_place(ufunc: Any) -> Callable[..., Any]:
    over = function(ufunc, strict=True)
    return lambda self, other: over(self, other, out=self)


_METHODS = (
    "all", "any", "argmax", "argmin", "argpartition", "argsort", "astype", "choose", "clip",
    "compress", "conj", "conjugate", "copy", "cumprod", "cumsum", "diagonal", "dot", "fill",
    "flatten", "item", "max", "mean", "min", "nonzero", "partition", "prod", "put", "ravel",
    "repeat", "reshape", "round", "searchsorted", "sort", "squeeze", "std", "sum", "swapaxes",
    "take", "tobytes", "tolist", "trace", "transpose", "var", "view",
)  # fmt: skip
_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
    "floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power, "matmul": np.matmul,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift,
    "rshift": np.right_shift, "divmod": np.divmod,
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNARY = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}

for _name in _METHODS:
    setattr(ndarray, _name, _method(_name))
for _name, _ufunc in _BINARY.items():
    setattr(ndarray, f"__{_name}__", _binary(_ufunc))
    setattr(ndarray, f"__r{_name}__", _binary(_ufunc, swapped=True))
    if _name != "divmod":
        setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
for _name, _ufunc in _COMPARE.items():
    setattr(ndarray, f"__{_name}__", _binary(_ufunc))
for _name, _ufunc in _UNARY.items():
    setattr(ndarray, f"__{_name}__", function(_ufunc))
