"""Work that is prepared once and then only launched: the one place where that is kept.

Between a call and its launches a lot is decided: the engine's tile, how a sum is divided, grids,
what is copied, the constants of every kernel. All of it follows from the problem, from how the
arrays lie in memory, from the device and from the settings, and none of it from what the arrays
hold or where they are. So it is worked out once, into a function that takes the arrays and
launches, and a repeated call is one look into a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import settings
from gpuconv.cuda import architecture, runtime

__all__ = ["MOST", "NULL", "clear", "prepared"]

Array = Any

#: The argument for an array that is not there.
NULL = np.uintp(0)
#: Functions that are kept; beyond, all are forgotten.
MOST = 4096
#: Bytes of the widest access; where an array starts matters up to this.
_WIDEST = 16

_kept: dict[Any, Callable[..., Any]] = {}


def prepared(
    make: Callable[..., Callable[..., Any]], about: tuple[Any, ...], arrays: tuple[Array, ...]
) -> Callable[..., Any]:
    """Return ``make(*about, arrays, device)``, made at the first call for such arrays.

    Parameters
    ----------
    make : callable
        Returns a function of arrays that lie as these do, on the current device; it must hold
        none of these. It may look at their shapes, strides, dtypes and alignment, at the facts of
        the GPU and at the settings.
    about : tuple
        All else that it depends on; hashable. Shapes follow from it.
    arrays : tuple of ndarray or NULL
    """
    device = int(runtime.cupy().cuda.runtime.getDevice())
    key = (
        make, about, device, architecture.gpu(device), settings.get_workspace_limit(),
        settings.get_precision(), settings.is_deterministic(),
        *[None if a is NULL else (a.strides, a.data.ptr % _WIDEST, a.dtype) for a in arrays],
    )  # fmt: skip
    found = _kept.get(key)
    if found is None:
        made = make(*about, arrays, device)
        if len(_kept) >= MOST:
            _kept.clear()
        found = _kept[key] = made
    return found


def clear() -> None:
    """Forget what was prepared."""
    _kept.clear()
