"""The driver's functions that encode tensor maps, as strict with their arguments.

What they write is the stand-in's own (``Map`` of ``runtime/hopper.cpp``); a driver's is secret.
The rules are those of the driver API's reference of ``cuTensorMapEncodeTiled`` and ``...Im2col``.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from tests.cuda_on_cpu.arrays import Home, Memory

__all__ = ["Driver", "tensors"]

_MAGIC = 0x50414D54
_FORM = struct.Struct("<I4BQ4Q5I5H3h3h5B")
#: Of the data types that kernels copy: bytes, and the stand-in's number.
_TYPES = {1: (2, 0), 11: (4, 1)}
_SWIZZLE_128B = 3
_CORNERS = {3: 32768, 4: 128, 5: 16}


class Driver:
    """``libcuda``.

    Attributes
    ----------
    refused : list of str
        Why calls returned ``CUDA_ERROR_INVALID_VALUE``.
    encoded : int
        How many maps were made.
    """

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.encoded = 0

    def cuTensorMapEncodeTiled(
        self, out: Any, kind: Any, rank: Any, address: Any, dims: Any, strides: Any, box: Any,
        steps: Any, interleave: Any, swizzle: Any, promotion: Any, fill: Any,
    ) -> int:  # fmt: skip
        """Encode a box of a tensor."""
        n = rank.value
        sizes = list(box)[:n]
        wrong = self._common(out, kind, n, address, dims, strides, steps, interleave, swizzle, fill)
        if not 1 <= n <= 5:
            wrong.append(f"tensorRank is {n}")
        wrong += [f"boxDim[{i}] is {b}" for i, b in enumerate(sizes) if not 1 <= b <= 256]
        wrong += self._inner(kind, sizes[0], swizzle)
        return self._write(out, wrong, kind, n, address, dims, strides, sizes, steps, swizzle)

    def cuTensorMapEncodeIm2col(
        self, out: Any, kind: Any, rank: Any, address: Any, dims: Any, strides: Any, lower: Any,
        upper: Any, channels: Any, pixels: Any, steps: Any, interleave: Any, swizzle: Any,
        promotion: Any, fill: Any,
    ) -> int:  # fmt: skip
        """Encode pixels of images."""
        n = rank.value
        wrong = self._common(out, kind, n, address, dims, strides, steps, interleave, swizzle, fill)
        low, high = list(lower)[: n - 2], list(upper)[: n - 2]
        if n not in _CORNERS:
            wrong.append(f"tensorRank is {n}")
        most = _CORNERS.get(n, 0)
        for name, values in (("Lower", low), ("Upper", high)):
            wrong += [f"pixelBox{name}Corner is {v}" for v in values if not -most <= v < most]
        wrong += [
            f"the box of axis {i + 1} is empty"
            for i in range(n - 2)
            if dims[i + 1] + high[i] - low[i] < 1
        ]
        if not 1 <= channels.value <= 256:
            wrong.append(f"channelsPerPixel is {channels.value}")
        if not 1 <= pixels.value <= 1024:
            wrong.append(f"pixelsPerColumn is {pixels.value}")
        wrong += self._inner(kind, channels.value, swizzle)
        box = [channels.value, pixels.value]
        corners = (low, high)
        return self._write(
            out, wrong, kind, n, address, dims, strides, box, steps, swizzle, corners
        )

    @staticmethod
    def _common(
        out: Any, kind: Any, n: int, address: Any, dims: Any, strides: Any, steps: Any,
        interleave: Any, swizzle: Any, fill: Any,
    ) -> list[str]:  # fmt: skip
        wrong = []
        if out.value % 64:
            wrong.append("tensorMap is no multiple of 64 bytes")
        if kind.value not in _TYPES:
            wrong.append(f"tensorDataType is {kind.value}")
        if address.value % 16:
            wrong.append(f"globalAddress is {address.value:#x}, no multiple of 16")
        wrong += [f"globalDim[{i}] is {dims[i]}" for i in range(n) if not 1 <= dims[i] <= 2**32]
        wrong += [
            f"globalStrides[{i}] is {strides[i]}"
            for i in range(n - 1)
            if strides[i] % 16 or not 0 < strides[i] < 2**40
        ]
        wrong += [f"elementStrides[{i}] is {steps[i]}" for i in range(n) if not 1 <= steps[i] <= 8]
        if interleave.value or fill.value or swizzle.value not in (0, _SWIZZLE_128B):
            wrong.append("interleave, oobFill or swizzle is none that the stand-in knows")
        return wrong

    @staticmethod
    def _inner(kind: Any, count: int, swizzle: Any) -> list[str]:
        inner = count * _TYPES.get(kind.value, (0, 0))[0]
        if inner % 16 or (swizzle.value and inner > 128):
            return [f"the inner axis of the box has {inner} bytes"]
        return []

    def _write(
        self, out: Any, wrong: list[str], kind: Any, n: int, address: Any, dims: Any, strides: Any,
        box: Sequence[int], steps: Any, swizzle: Any,
        corners: tuple[list[int], list[int]] | None = None,
    ) -> int:  # fmt: skip
        if wrong:
            self.refused.append("; ".join(wrong))
            return 1

        def padded(values: Sequence[int], count: int) -> list[int]:
            return [*values, *[0] * (count - len(values))]

        low, high = corners or ([], [])
        data = _FORM.pack(
            _MAGIC, _TYPES[kind.value][1], n, corners is not None, swizzle.value, address.value,
            *padded([strides[i] for i in range(n - 1)], 4),
            *padded([dims[i] - 1 for i in range(n)], 5), *padded(box, 5),
            *padded(low, 3), *padded(high, 3), *padded([steps[i] for i in range(n)], 5),
        )  # fmt: skip
        ctypes.memmove(out.value, data.ljust(128, b"\0"), 128)
        self.encoded += 1
        return 0


def tensors(parameter: bytes, home: Home) -> Iterator[tuple[Memory, int]]:
    """Yield the memory that tensor maps in a kernel's parameter point into, and their item sizes.

    Raises
    ------
    ValueError
        If a map's tensor lies in no array that there is.
    """
    for start in range(0, len(parameter) - 127, 64):
        if int.from_bytes(parameter[start : start + 4], "little") != _MAGIC:
            continue
        _, kind, n, _, _, address, *rest = _FORM.unpack_from(parameter, start)
        memory = home.memory_of(address)
        size = 4 if kind == 1 else 2
        end = address + size * (rest[4] + 1)
        end += sum(stride * last for stride, last in zip(rest[: n - 1], rest[5:], strict=False))
        if memory is None or end > memory.start + memory.size:
            raise ValueError(f"a tensor map's tensor, {end - address} bytes, lies in no array")
        yield memory, size
