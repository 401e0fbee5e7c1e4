"""Tensor maps: what ``kernels/tma.cuh`` copies by, encoded by the driver's library.

A map is 128 bytes that a kernel gets by value: the address, shape and strides of a tensor, and
the box that one copy brings. The functions are ``cuTensorMapEncodeTiled`` and
``cuTensorMapEncodeIm2col`` of the CUDA driver API, 12.0 and later.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gpuconv.cuda import runtime

__all__ = ["MAP", "available", "im2col", "tiled"]

#: A map, as a member of a structure that a kernel takes.
MAP = np.dtype([("words", np.uint64, (16,))])

#: UINT16, whose bits pass as they are, and TFLOAT32, which rounds.
_TYPES = {"float16": 1, "bfloat16": 1, "float32": 11}
_NO_INTERLEAVE, _SWIZZLE_128B, _L2_PROMOTION_128B, _ZEROS = 0, 3, 2, 0


#: An array of one.
Map = Any


@cache
def _library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _function(name: str) -> Any:
    """Return a function of the driver's library, or of what stands in for it."""
    stand_in = runtime.installed()
    return getattr(_library() if stand_in is None else stand_in.libcuda, name)


def available() -> bool:
    """Return whether the driver encodes maps: 12.0 and later do."""
    try:
        return bool(_function("cuTensorMapEncodeIm2col"))
    except (OSError, AttributeError):
        return False


def _encode(name: str, what: str, *arguments: Any) -> Map:
    room = np.zeros(192, np.uint8)
    start = -room.ctypes.data % 64
    status = _function(name)(ctypes.c_void_p(room.ctypes.data + start), *arguments)
    if status:
        raise ValueError(f"{name} returns {status} for {what}")
    return room[start : start + 128].view(MAP)


def _tensor(
    dtype: str, address: int, shape: Sequence[int], strides: Sequence[int]
) -> tuple[Any, ...]:
    return (
        ctypes.c_int(_TYPES[dtype]),
        ctypes.c_uint32(len(shape)),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * len(shape))(*shape),
        (ctypes.c_uint64 * max(1, len(strides)))(*strides),
    )


_HOW = tuple(map(ctypes.c_int, (_NO_INTERLEAVE, _SWIZZLE_128B, _L2_PROMOTION_128B, _ZEROS)))


def _strides(dtype: str, shape: Sequence[int]) -> list[int]:
    """Return the strides of a dense tensor in bytes, the innermost axis first and left out."""
    found = [4 if dtype == "float32" else 2]
    for n in shape[:-1]:
        found.append(found[-1] * n)
    return found[1:]


def tiled(dtype: str, address: int, shape: Sequence[int], box: Sequence[int]) -> Map:
    """Return the map of boxes of a dense tensor.

    Parameters
    ----------
    dtype : str
    address : int
        Of its first element; a multiple of 16.
    shape : sequence of int
        From the innermost axis on. Every axis but the outermost is a multiple of 16 bytes long.
    box : sequence of int
        What one copy brings, up to 256 an axis, of the innermost 128 bytes.

    Raises
    ------
    ValueError
        If the driver refuses it.
    """
    return _encode(
        "cuTensorMapEncodeTiled",
        f"boxes of {tuple(box)} of {tuple(shape)} {dtype} at {address:#x}",
        *_tensor(dtype, address, shape, _strides(dtype, shape)),
        (ctypes.c_uint32 * len(box))(*box),
        (ctypes.c_uint32 * len(box))(*[1] * len(box)),
        *_HOW,
    )


def im2col(
    dtype: str,
    address: int,
    shape: Sequence[int],
    lower: Sequence[int],
    upper: Sequence[int],
    step: Sequence[int],
    box: tuple[int, int],
) -> Map:
    """Return the map of pixels of dense images, channels last.

    Parameters
    ----------
    dtype : str
    address : int
        Of the first element; a multiple of 16.
    shape : sequence of int
        Channels, columns, rows, perhaps slices, examples. Pixels are a multiple of 16 bytes.
    lower, upper : sequence of int
        Of columns, rows, slices: the first position, and how far the last one is from the last
        pixel. Each within -128 and 127, for three axes within -16 and 15.
    step : sequence of int
        From position to position, up to 8.
    box : (int, int)
        Channels (128 bytes) and pixels (up to 1024) of one copy.

    Raises
    ------
    ValueError
        If the driver refuses it.
    """
    axes = len(lower)
    return _encode(
        "cuTensorMapEncodeIm2col",
        f"{box[1]} pixels of {tuple(shape)} {dtype} at {address:#x} within {tuple(lower)} and "
        f"{tuple(upper)} by {tuple(step)}",
        *_tensor(dtype, address, shape, _strides(dtype, shape)),
        (ctypes.c_int * axes)(*lower),
        (ctypes.c_int * axes)(*upper),
        ctypes.c_uint32(box[0]),
        ctypes.c_uint32(box[1]),
        (ctypes.c_uint32 * len(shape))(1, *step, 1),
        *_HOW,
    )
