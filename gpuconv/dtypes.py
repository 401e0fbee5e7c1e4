"""The halves: where bfloat16 comes from, and what is computed in float32 for them.

NumPy has bfloat16 from ``ml_dtypes`` alone, and knows the name once that is imported; CuPy takes
the same dtype from version 14 on. There NumPy adds up in bfloat16, and a sum of ones stops at 256;
and a product with a Python number is float32 in NumPy and bfloat16 in CuPy. So what is more than
one multiplication is done in float32 here, and rounded once.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from gpuconv.cuda import runtime
from gpuconv.device import CPU, Device

__all__ = ["HALVES", "is_half", "known_dtype", "widened"]

Array = Any

#: The dtypes of two bytes.
HALVES = ("float16", "bfloat16")


def known_dtype(name: str, place: Device = CPU) -> np.dtype[Any]:
    """Return NumPy's dtype of this name, which arrays on ``place`` can have.

    Raises
    ------
    ImportError
        If it is bfloat16, and ml_dtypes is not installed or CuPy too old.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401  (which makes the name known)
        except ImportError:
            raise ImportError(
                "dtype is 'bfloat16', which NumPy has from ml_dtypes alone: "
                "pip install 'gpuconv[bfloat16]'"
            ) from None
        if place.kind == "cuda":
            _check_cupy(str(runtime.cupy().__version__), np.__version__)
    return np.dtype(name)


def _check_cupy(cupy: str, numpy: str) -> None:
    """See that CuPy has bfloat16: from 14.0 on, with NumPy 2.1.2 or newer."""
    for name, found, least in (("CuPy", cupy, (14,)), ("NumPy", numpy, (2, 1, 2))):
        numbers = re.match(r"\d+(\.\d+)*", found)
        if numbers is not None and tuple(map(int, numbers[0].split("."))) < least:
            raise ImportError(
                f"dtype is 'bfloat16', for which CUDA needs {name} "
                f"{'.'.join(map(str, least))} or newer; {found} is installed"
            )


def is_half(array: Array) -> bool:
    """Return whether the array is of float16 or bfloat16."""
    return bool(array.dtype.itemsize == 2)


def widened(array: Array) -> Array:
    """Return the array, in float32 where it is of float16 or bfloat16."""
    return array.astype("float32") if array.dtype.itemsize == 2 else array
