"""Labelled images from the files that people have; nothing is downloaded, nothing executed.

npz and npy archives, a folder of images by class, the IDX files of MNIST [1]_ and the binary
batches of CIFAR-10 [2]_. A file that is truncated, or not what it should be, is a ``ValueError``
that names it and says what is wrong.

.. [1] LeCun, Cortes, Burges: The MNIST database of handwritten digits; the IDX format is
   described at its end.
.. [2] Krizhevsky: Learning multiple layers of features from tiny images (2009).
"""

from __future__ import annotations

import gzip
import importlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.arguments import integer
from gpuconv.training.data import load_npz

__all__ = [
    "Images", "read_cifar10", "read_folder", "read_idx", "read_mnist", "read_npy", "read_npz",
]  # fmt: skip

Array = np.ndarray[Any, Any]

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
#: The types of IDX: unsigned and signed bytes, and big-endian numbers.
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
#: What a folder may hold; other files are left alone.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Images:
    """Images with their classes.

    Attributes
    ----------
    images : ndarray, shape (n, rows, columns, channels)
        As they were read; a ``np.memmap`` where the file is mapped.
    labels : ndarray of int64, shape (n,)
        Numbers of classes, from 0.
    classes : tuple of str
        Their names.
    """

    images: Array
    labels: Array
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def _numbered(values: Array, where: object) -> tuple[Array, tuple[str, ...]]:
    """Return numbers of classes by ascending label, and the labels as names."""
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError(
            f"{where}: the labels are {values.dtype} of shape {values.shape}; expected one integer "
            "for each image"
        )
    found, numbers = np.unique(values, return_inverse=True)
    return numbers.reshape(-1).astype(np.int64), tuple(str(v) for v in found)


def read_npz(path: str | Path) -> Images:
    """Return the images ``X`` and labels ``y`` of an npz archive, read as a whole.

    Parameters
    ----------
    path : str or Path
        ``X`` of shape (n, rows, columns) or (n, rows, columns, channels), ``y`` of integers.

    Raises
    ------
    ValueError, OSError
        If it is none, or not as said; the text names the file.
    """
    images, values = load_npz(path)
    assert values is not None
    return Images(images, *_numbered(values, path))


def read_npy(images: str | Path, labels: str | Path) -> Images:
    """Return images and labels of two npy files; the images are mapped and not read.

    So they may be larger than the memory: what is looked at is read then.

    Parameters
    ----------
    images : str or Path
        (n, rows, columns) or (n, rows, columns, channels) of real numbers.
    labels : str or Path
        (n,) of integers.

    Raises
    ------
    ValueError, OSError
        If a file is none, is truncated, or not as said; the text names it.
    """
    x = _npy(images, "r")
    y = _npy(labels, None)
    if x.dtype.kind not in "buif" or x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(
            f"{images} holds {x.dtype} of shape {x.shape}; expected real numbers of shape (n, rows, "
            "columns) or (n, rows, columns, channels)"
        )
    numbers, classes = _numbered(y, labels)
    if len(numbers) != len(x):
        raise ValueError(f"{labels} has {len(numbers)} labels for the {len(x)} images of {images}")
    return Images(x if x.ndim == 4 else x[..., None], numbers, classes)


def _npy(path: str | Path, mode: Any) -> Array:
    try:
        found = np.load(path, mmap_mode=mode, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}") from error
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no npy file of numbers, or truncated: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} is an archive; expected one array (npy)")
    return found


def read_folder(path: str | Path, size: tuple[int, int] | None = None, mode: str = "RGB") -> Images:
    """Return the images of a folder that has a folder for each class.

    Parameters
    ----------
    path : str or Path
        The folder. Its folders' names, in order, are the classes; files that are no images by
        their suffix, and names that begin with a dot, are left alone.
    size : tuple of int, optional
        Rows and columns to scale to (bilinear); without it all images must have one size.
    mode : {"RGB", "L"}
        Colours, or shades of grey.

    Returns
    -------
    Images
        uint8, in the order of classes and file names.

    Raises
    ------
    ImportError
        If Pillow is not installed: ``pip install 'gpuconv[images]'``.
    ValueError, OSError
        If there are no two classes, or an image cannot be read or has another size.
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode is {mode!r}; expected 'RGB' or 'L'")
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ValueError(f"size is {size!r}; expected rows and columns")
        size = (integer("size", size[0], 1), integer("size", size[1], 1))
    pillow = _pillow()
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder")
    found: list[Array] = []
    labels: list[int] = []
    classes: list[str] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(p for p in folder.iterdir() if _is_image(p))
        if not files:
            raise ValueError(f"{folder} holds no images; expected some of {', '.join(SUFFIXES)}")
        for file in files:
            array = _read_image(pillow, file, size, mode)
            if found and array.shape != found[0].shape:
                raise ValueError(
                    f"{file} has shape {array.shape}; expected {found[0].shape}, as the others, or "
                    "a size to scale to"
                )
            found.append(array)
            labels.append(len(classes))
        classes.append(folder.name)
    if len(classes) < 2:
        raise ValueError(f"{root} has {len(classes)} folders with images; expected two classes")
    return Images(np.stack(found), np.array(labels, np.int64), tuple(classes))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError(
            f"folders of images need Pillow ({error}): pip install 'gpuconv[images]'"
        ) from error


def _read_image(pillow: Any, path: Path, size: tuple[int, int] | None, mode: str) -> Array:
    try:
        with pillow.open(path) as opened:
            image = opened.convert(mode)
            if size is not None:
                image = image.resize((size[1], size[0]), pillow.Resampling.BILINEAR)
            array = np.asarray(image, np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    except pillow.DecompressionBombError as error:
        raise ValueError(f"{path} is too large an image: {error}") from error
    return array if array.ndim == 3 else array[..., None]


def _content(path: Path) -> bytes:
    """Return a file's bytes, unpacked where it is compressed by gzip."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def read_idx(path: str | Path) -> Array:
    """Return the array of an IDX file, gzipped or not, in the machine's byte order.

    Raises
    ------
    ValueError, OSError
        If it is none, or has fewer or more bytes than its header says.
    """
    path = Path(path)
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise ValueError(
            f"{path} is no IDX file: it begins with {content[:4].hex(' ') or 'nothing'}; expected "
            "two zeros, a type and a number of axes"
        )
    axes = content[3]
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise ValueError(f"{path} is no IDX file, or truncated: its sizes are missing")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", axes, 4))
    dtype = np.dtype(_IDX_TYPES[content[2]])
    want = start + math.prod(shape) * dtype.itemsize
    if len(content) != want:
        raise ValueError(
            f"{path} has {len(content)} bytes; expected {want} for {dtype.name} of shape {shape}: "
            f"it is {'truncated' if len(content) < want else 'too long'}"
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def read_mnist(folder: str | Path, part: str = "train") -> Images:
    """Return MNIST's images (or those of a set in its form) from its IDX files.

    Parameters
    ----------
    folder : str or Path
        With ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, or ``t10k-...``; each
        may end in ``.gz``, and have a dot in the place of the last hyphen.
    part : {"train", "test"}
        Which.

    Raises
    ------
    ValueError, OSError
        If a file is missing, truncated, or another one; the text names it.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part is {part!r}; expected 'train' or 'test'")
    prefix = "train" if part == "train" else "t10k"
    paths = [
        _first(Path(folder), f"{prefix}-{kind}", f"idx{axes}-ubyte")
        for kind, axes in (("images", 3), ("labels", 1))
    ]
    images, labels = (read_idx(p) for p in paths)
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise ValueError(f"{paths[0]} holds {images.dtype} of shape {images.shape}; expected bytes "
                         "of shape (n, rows, columns)")  # fmt: skip
    numbers, classes = _numbered(labels, paths[1])
    if len(numbers) != len(images):
        raise ValueError(
            f"{paths[1]} has {len(numbers)} labels; expected {len(images)}, as {paths[0]} has images"
        )
    return Images(images[..., None], numbers, classes)


def _first(folder: Path, *parts: str) -> Path:
    names = [f"{mark.join(parts)}{end}" for mark in ("-", ".") for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


def read_cifar10(folder: str | Path, part: str = "train") -> Images:
    """Return CIFAR-10's images from its binary version.

    Parameters
    ----------
    folder : str or Path
        With ``data_batch_1.bin`` to ``data_batch_5.bin``, or ``test_batch.bin``.
    part : {"train", "test"}
        Which.

    Raises
    ------
    ValueError, OSError
        If a file is missing, truncated, or another one; the text names it.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part is {part!r}; expected 'train' or 'test'")
    root = Path(folder)
    paths = [root / "test_batch.bin"]
    if part == "train":
        paths = [root / f"data_batch_{k}.bin" for k in range(1, 6)]
    record = 1 + 3 * 32 * 32
    labels: list[Array] = []
    images: list[Array] = []
    for path in paths:
        content = _content(path)
        if not content or len(content) % record:
            raise ValueError(
                f"{path} has {len(content)} bytes; expected a multiple of {record}, a label and "
                "3 x 32 x 32 bytes for each image: it is truncated or another file"
            )
        rows = np.frombuffer(content, np.uint8).reshape(-1, record)
        if rows[:, 0].max() >= len(CIFAR10_CLASSES):
            raise ValueError(
                f"{path} has the label {rows[:, 0].max()}; expected 0 to 9: it is another file"
            )
        labels.append(rows[:, 0].astype(np.int64))
        images.append(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Images(np.concatenate(images), np.concatenate(labels), CIFAR10_CLASSES)
