"""Small files in the user's cache directory: what was measured of this machine.

A file is used only if it is of this format and version and was measured on this very machine
with these libraries; anything else, foreign, outdated or damaged, is as good as none. Nothing
depends on the directory: where it cannot be written, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv._version import __version__

__all__ = ["folder", "machine", "read", "write"]

FORMAT = "gpuconv measurements"
VERSION = 1
#: Bytes of the largest file that is looked into.
_MOST = 2**22


def folder() -> Path | None:
    """Return the directory, which need not exist; None if the user wants none.

    ``GPUCONV_CACHE_DIR`` names it, or is ``off``; else it is where the system keeps caches.
    """
    wish = os.environ.get("GPUCONV_CACHE_DIR", "").strip()
    if wish.lower() == "off":
        return None
    if wish:
        return Path(wish)
    try:
        home = Path.home()
    except RuntimeError:  # no home, as for some services
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "gpuconv"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "gpuconv"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "gpuconv"


def _processor() -> str:
    """Return the processor's model, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def machine() -> dict[str, str]:
    """Return what a measurement depends on: processor, NumPy, its BLAS, and this library."""
    from threadpoolctl import threadpool_info

    found = [p for p in threadpool_info() if p.get("user_api") == "blas"]
    # NumPy's own: other packages may have brought theirs, in this process or in none.
    own = [p for p in found if "numpy" in str(p.get("filepath", ""))] or found[:1]
    blas = [f"{p.get('internal_api')} {p.get('version')} {p.get('architecture')}" for p in own]
    return {
        "processor": _processor(),
        "numpy": np.__version__,
        "blas": ", ".join(sorted(blas)),
        "gpuconv": __version__,
    }


def _file(place: Path, name: str) -> Path:
    """Return a file's name, which tells one machine's from another's on a shared disk."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()
    return place / f"{name}-{digest[:12]}.json"


def read(name: str) -> dict[str, Any] | None:
    """Return the content of a file that :func:`write` wrote on this machine, else None."""
    place = folder()
    if place is None:
        return None
    try:
        file = _file(place, name)
        if file.stat().st_size > _MOST:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("content"), dict):
        return None
    known = {"format": FORMAT, "version": VERSION, "machine": machine()}
    if any(found.get(key) != value for key, value in known.items()):
        return None
    content: dict[str, Any] = found["content"]
    return content


def write(name: str, content: dict[str, Any], *, first: bool = False) -> bool:
    """Write a file, whole or not at all; return whether it was written.

    With ``first`` a file that another process has written meanwhile stays, if it is good.
    """
    place = folder()
    if place is None:
        return False
    whole = {"format": FORMAT, "version": VERSION, "machine": machine(), "content": content}
    temporary = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".json", dir=place)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
        target = _file(place, name)
        if first and read(name) is not None:
            return False
        if first and not target.exists():
            with contextlib.suppress(FileExistsError):
                os.link(temporary, target)  # of several processes one is the first
            return read(name) == content
        os.replace(temporary, target)
        temporary = None
    except OSError:
        return False
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return True
