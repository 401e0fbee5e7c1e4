"""The one place where CuPy is imported, and where another module may stand in for it."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["cupy", "install", "installed", "loaded", "uninstall"]

_stand_in: Any = None


def cupy() -> Any:
    """Return CuPy, importing it if need be.

    Raises
    ------
    ImportError
        Or whatever else CuPy's own import raises.
    """
    if _stand_in is not None:
        return _stand_in
    import cupy

    return cupy


def loaded() -> Any | None:
    """Return CuPy if it is imported already, else None: no array of it exists then."""
    if _stand_in is not None:
        return _stand_in
    module = sys.modules.get("cupy")
    # While another thread imports it, or after a failed import, it has no arrays yet.
    return module if hasattr(module, "ndarray") else None


def install(module: Any) -> None:
    """Use ``module`` in the place of CuPy (the tests run the kernels without a GPU so)."""
    global _stand_in
    _stand_in = module
    _forget()


def installed() -> Any | None:
    """Return the module in the place of CuPy, or None."""
    return _stand_in


def uninstall() -> None:
    """Go back to CuPy itself."""
    global _stand_in
    _stand_in = None
    _forget()


def _forget() -> None:
    """Drop what was decided or compiled for the other module."""
    from gpuconv import dispatch
    from gpuconv.cuda import architecture, kernels
    from gpuconv.device import reset

    reset()
    kernels.clear()
    architecture.forget()
    dispatch.clear()
