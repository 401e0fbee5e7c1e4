"""Files that are either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["replacing", "write_bytes", "write_json", "write_lines"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it over ``path`` when all went well.

    The temporary name keeps the suffix, by which writers choose a format. Where the block
    raises, ``path`` stays as it was and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, keys in the order given."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_bytes(path, "".join(json.dumps(value) + "\n" for value in values).encode())
