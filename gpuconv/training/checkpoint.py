"""Model files and checkpoints: safetensors with a versioned header, checked before use.

The container's metadata holds three strings: ``format`` (always ``gpuconv``), ``version``, and
``header``, a JSON object. Nothing in a file is executed: tensors are plain numbers, and the
header names layers that are looked up in a fixed list. A file is read and checked as a whole
before any of it reaches a model, and written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.dtypes import known_dtype
from gpuconv.layers.base import FLOATS, dtype_name
from gpuconv.training.data import Scaling
from gpuconv.training.files import write_bytes

__all__ = ["FORMAT", "VERSION", "ModelInfo", "check_tensors", "read", "write"]

FORMAT = "gpuconv"
VERSION = 1


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says beside its tensors.

    Attributes
    ----------
    config : dict
        The layers, as :meth:`gpuconv.models.Sequential.config` gives them.
    classes : tuple of int
        The label value of each output.
    image_shape : tuple of int
        Rows, columns and channels.
    scaling : Scaling
        Applied to an image before the first layer.
    dtype : str
        ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``.
    """

    config: dict[str, Any]
    classes: tuple[int, ...]
    image_shape: tuple[int, int, int]
    scaling: Scaling
    dtype: str

    def header(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "model": self.config,
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "scaling": {"shift": list(self.scaling.shift), "scale": list(self.scaling.scale)},
            "dtype": self.dtype,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any], path: Path) -> ModelInfo:
        """Return what ``header`` says, each part checked.

        Raises
        ------
        ValueError
            If a part is missing or not of its type; the text names file and part.
        """
        config = _part(header, "model", dict, path)
        classes = tuple(_list(header, "classes", int, path))
        shape = tuple(_list(header, "image_shape", int, path))
        scaling = _part(header, "scaling", dict, path)
        shift = tuple(_list(scaling, "shift", float, path))
        scale = tuple(_list(scaling, "scale", float, path))
        dtype = _part(header, "dtype", str, path)
        if len(classes) < 2 or list(classes) != sorted(set(classes)):
            raise ValueError(f"{path}: classes are not two or more ascending integers")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"{path}: image_shape is {shape}; expected rows, columns, channels")
        if not len(shift) == len(scale) == shape[2] or not np.isfinite([*shift, *scale]).all():
            raise ValueError(f"{path}: scaling does not hold {shape[2]} finite numbers each")
        if dtype not in FLOATS:
            raise ValueError(f"{path}: dtype is {dtype!r}; expected one of {', '.join(FLOATS)}")
        return cls(config, classes, (shape[0], shape[1], shape[2]), Scaling(shift, scale), dtype)


def _part(header: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    value = header.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path}: the header's {name!r} is missing or no {kind.__name__}")
    return value


def _list(header: Mapping[str, Any], name: str, kind: type, path: Path) -> list[Any]:
    values = _part(header, name, list, path)
    allowed = (int, float) if kind is float else (kind,)
    if any(isinstance(v, bool) or not isinstance(v, allowed) for v in values):
        raise ValueError(f"{path}: the header's {name!r} is not a list of {kind.__name__}")
    return [kind(v) for v in values]


def write(
    path: str | Path,
    kind: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    """Write a file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        Overwritten if it exists.
    kind : {"model", "checkpoint", "network"}
        Kept in the header, so that one is not taken for the other.
    header : mapping
        JSON values.
    tensors : mapping of str to ndarray
        NumPy arrays.
    """
    from safetensors.numpy import save

    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "header": json.dumps({"kind": kind, **header}, allow_nan=False),
    }
    # safetensors writes the memory as it lies: a transposed view would come back scrambled.
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    write_bytes(Path(path), _ordered(save(whole), metadata))


def _ordered(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return the container with its metadata, in their order.

    safetensors itself puts them in another order in every process; so the same model gives the
    same file.
    """
    length = int.from_bytes(content[:8], "little")
    index = {"__metadata__": dict(metadata), **json.loads(content[8 : 8 + length])}
    text = json.dumps(index, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read(
    path: str | Path, kind: str | tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return header and tensors of a file that :func:`write` wrote, of this kind or one of these.

    Raises
    ------
    ValueError
        If the file is truncated, corrupt, another program's, another version's or another
        kind, or a tensor holds NaN or infinity; the text names the file and what is wrong.
    OSError
        If it is not there or cannot be read.
    ImportError
        If it holds bfloat16, and ml_dtypes is not installed.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with open(path, "rb"):  # the container's reader does not say which file is missing
            pass
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror}") from error
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            header = _header(metadata, kind, path)
            for name in opened.keys():  # noqa: SIM118  (no mapping: it has keys() alone)
                if opened.get_slice(name).get_dtype() == "BF16":
                    known_dtype("bfloat16")
                tensors[name] = opened.get_tensor(name)
    except (SafetensorError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error
    for name, value in tensors.items():
        if dtype_name(value.dtype) in FLOATS and not np.isfinite(value).all():
            raise ValueError(f"{path}: tensor {name!r} holds NaN or infinity")
    return header, tensors


def _header(metadata: Mapping[str, str], kind: str | tuple[str, ...], path: Path) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that gpuconv wrote")
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise ValueError(f"{path} is of version {version or '?'}; this gpuconv reads {VERSION}")
    try:
        header = json.loads(metadata.get("header", ""))
    except ValueError as error:
        raise ValueError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a JSON object")
    kinds = (kind,) if isinstance(kind, str) else kind
    if header.get("kind") not in kinds:
        raise ValueError(f"{path} is a {header.get('kind')}; expected a {' or a '.join(kinds)}")
    return header


def check_tensors(
    found: Mapping[str, np.ndarray[Any, Any]], expected: Mapping[str, Any], path: Path
) -> None:
    """Compare names, shapes and dtypes with those of ``expected``'s arrays.

    Raises
    ------
    ValueError
        If a tensor is missing, is one too many, or has another shape or dtype.
    """
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if missing:
        raise ValueError(f"{path} lacks tensors of the model it describes: {', '.join(missing)}")
    if extra:
        raise ValueError(f"{path} holds tensors that its model has not: {', '.join(extra)}")
    for name, value in expected.items():
        have, want = found[name], (tuple(value.shape), str(value.dtype))
        if (have.shape, str(have.dtype)) != want:
            raise ValueError(
                f"{path}: tensor {name!r} is {have.dtype} of shape {have.shape}; "
                f"expected {want[1]} of shape {want[0]}"
            )
