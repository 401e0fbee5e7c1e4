"""Images and labels: reading, checking, scaling, splitting, batches and augmentation.

Everything random here comes from a seed and a position (epoch, step), never from a running
generator, so a run that was interrupted goes on exactly and a GPU run sees the same images.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpuconv.device import namespace

__all__ = [
    "ImageData",
    "Scaling",
    "Split",
    "as_images",
    "as_labels",
    "epoch_order",
    "label_data",
    "load_digits",
    "load_npz",
    "stratified_split",
    "warp_images",
]

Array = Any

#: Elements scaled at a time, so that a large uint8 set needs no float64 copy of itself.
_CHUNK = 2**20


@dataclass(frozen=True)
class ImageData:
    """Labelled images.

    Attributes
    ----------
    name : str
        Where they come from.
    images : ndarray, shape (n, rows, cols, channels)
        As they were read, any real dtype, finite.
    labels : ndarray of int64, shape (n,)
        Class numbers 0 to ``len(classes) - 1``.
    classes : tuple of int
        The label value of each class, ascending.
    """

    name: str
    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    classes: tuple[int, ...]

    def fingerprint(self) -> str:
        """Return a hash of images and labels, by which a resumed run knows its data again."""
        digest = hashlib.sha256()
        for array in (self.images, self.labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Scaling:
    """``(x - shift) * scale`` per channel, which gives the training images mean 0, deviation 1."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def fit(cls, images: np.ndarray[Any, Any]) -> Scaling:
        """Return the scaling of these images; a constant channel is only centred.

        Raises
        ------
        ValueError
            If every channel is constant: there is nothing to learn from.
        """
        shifts, scales = [], []
        for channel in range(images.shape[3]):
            values = images[..., channel].astype(np.float64)
            # Over the largest first: the square of a very large value must not overflow.
            largest = float(np.abs(values).max()) or 1.0
            values /= largest
            mean, deviation = float(values.mean()), float(values.std())
            shifts.append(mean * largest)
            # Below the rounding of the mean, a deviation is no deviation.
            constant = deviation <= 1e-12
            scales.append(1.0 if constant else 1.0 / deviation / largest)
            if constant and images.shape[3] == 1:
                raise ValueError(f"X is constant ({shifts[0]:g}): there is nothing to learn from")
        if len(set(scales)) == 1 and scales[0] == 1.0:
            raise ValueError("X is constant in every channel: there is nothing to learn from")
        return cls(tuple(shifts), tuple(scales))

    def apply(self, images: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
        """Return the scaled images in ``dtype``, computed in float64.

        Raises
        ------
        ValueError
            If there are not as many channels as the scaling has.
        """
        if images.shape[-1] != len(self.shift):
            raise ValueError(
                f"images have {images.shape[-1]} channels; the scaling has {len(self.shift)}"
            )
        shift, scale = np.array(self.shift), np.array(self.scale)
        scaled = np.empty(images.shape, dtype)
        rows = max(1, _CHUNK // max(1, images[:1].size))
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            scaled[part] = (images[part].astype(np.float64) - shift) * scale
        return scaled


@dataclass(frozen=True)
class Split:
    """Indices of the three parts, each ascending."""

    train: np.ndarray[Any, Any]
    validation: np.ndarray[Any, Any]
    test: np.ndarray[Any, Any]


def load_digits() -> ImageData:
    """Return the 1,797 handwritten digits, 8x8 in 17 shades, that scikit-learn carries.

    They are the test part of the *Optical Recognition of Handwritten Digits* set of the UCI
    repository (Alpaydin and Kaynak, 1998): scans of 13 writers, reduced to counts of ink in
    4x4 blocks. Nothing is downloaded.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which does not import "
            f"({error}): pip install 'gpuconv[train]'"
        ) from error
    images, labels = load(return_X_y=True)
    return ImageData(
        "digits",
        images.reshape(-1, 8, 8, 1).astype(np.uint8),
        labels.astype(np.int64),
        tuple(range(10)),
    )


def load_npz(
    path: str | Path, *, need_labels: bool = True
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return ``X`` as (n, rows, cols, channels) and ``y`` as int64 label values.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` file with arrays ``X`` and ``y``. Pickled objects are never loaded.
    need_labels : bool
        Whether a file without ``y`` is an error; if not, None is returned for it.

    Raises
    ------
    ValueError, OSError
        If the file is no such archive, or its arrays are not as said; the text names the file
        and what is wrong with it.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    try:
        # Opened here: np.load would leave the file of a bad archive open.
        with open(path, "rb") as file:
            archive = _archive(path, file)
            for name in ("X", "y"):
                if name not in archive.files:
                    if name == "y" and not need_labels:
                        continue
                    found = ", ".join(archive.files) or "nothing"
                    raise ValueError(f"{path} has no array {name!r}; it holds {found}")
                try:
                    arrays[name] = archive[name]
                except Exception as error:  # zlib, zip, header and pickle errors, by member
                    raise ValueError(f"{path}: array {name!r} cannot be read: {error}") from error
                if not isinstance(arrays[name], np.ndarray):
                    raise ValueError(f"{path}: {name!r} is not an array")
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror or error}") from error
    try:
        images = as_images(arrays["X"])
        labels = as_labels(arrays["y"], len(images)) if "y" in arrays else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return images, labels


def _archive(path: str | Path, file: BinaryIO) -> np.lib.npyio.NpzFile:
    """Return the archive in an open file."""
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz archive of arrays: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} holds one bare array; expected an npz with arrays X and y")
    return archive


def as_images(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ``x`` as (n, rows, cols, channels), if it is a stack of finite real images.

    Raises
    ------
    ValueError
        If the rank is not 3 or 4, a size is 0, the dtype is no real number's, or a value is
        NaN or infinite.
    """
    if x.dtype.kind not in "buif":
        raise ValueError(f"X has dtype {x.dtype}; expected real numbers or booleans")
    if x.ndim not in (3, 4):
        raise ValueError(
            f"X has shape {x.shape}; expected (n, rows, cols) or (n, rows, cols, channels)"
        )
    if 0 in x.shape:
        raise ValueError(f"X has shape {x.shape}; it holds no pixels")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        index = np.argwhere(~np.isfinite(x))[0]
        where = ", ".join(map(str, index))
        raise ValueError(f"X[{where}] is {x[tuple(index)]}; expected finite values")
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        x = x.astype(np.float64)
    return x if x.ndim == 4 else x[..., None]


def as_labels(y: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Return ``y`` as int64, if it is one integer label an image.

    Raises
    ------
    ValueError
        If dtype or shape is not that.
    """
    if y.dtype.kind not in "ui":
        raise ValueError(f"y has dtype {y.dtype}; expected integer labels")
    if y.shape != (count,):
        raise ValueError(f"y has shape {y.shape}; expected ({count},), a label for each image of X")
    if y.dtype.kind == "u" and len(y) and int(y.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"y holds {y.max()}; expected labels below 2**63")
    return y.astype(np.int64)


def label_data(name: str, images: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> ImageData:
    """Number the classes by ascending label value.

    Raises
    ------
    ValueError
        If all labels are equal.
    """
    classes, labels = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"{name}: every label of y is {classes[0]}; expected two classes or more")
    return ImageData(name, images, labels.astype(np.int64), tuple(int(c) for c in classes))


def stratified_split(
    data: ImageData, seed: int, validation: float = 0.1, test: float = 0.2
) -> Split:
    """Hold out a share of every class for validation and for test, chosen by ``seed``.

    Raises
    ------
    ValueError
        If a class has fewer than three examples: one for each part.
    """
    rng = np.random.default_rng([seed, 0x5B117])
    parts: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
    for number, value in enumerate(data.classes):
        members = rng.permutation(np.flatnonzero(data.labels == number))
        count = len(members)
        if count < 3:
            raise ValueError(
                f"{data.name}: label {value} has {count} example{'s' if count > 1 else ''}; "
                "expected 3 or more (one each to train, to validate and to test)"
            )
        held = max(1, round(validation * count)), max(1, round(test * count))
        bounds = np.cumsum(held)
        for part, chosen in zip(
            parts,
            (members[bounds[1] :], members[: bounds[0]], members[bounds[0] : bounds[1]]),
            strict=True,
        ):
            part.append(chosen)
    return Split(*(np.sort(np.concatenate(part)) for part in parts))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """Return the order in which an epoch takes the examples."""
    return np.random.default_rng([seed, 0x0DE4, epoch]).permutation(count)


def warp_images(
    images: Array,
    seed: int,
    epoch: int,
    step: int,
    *,
    shift: float = 1.0,
    rotate: float = 10.0,
    zoom: float = 0.1,
) -> Array:
    """Move, turn and zoom each image a little, at random; interpolated between its pixels.

    On whatever device the images are: only a few numbers an image are drawn on the host. What
    lies beyond an edge repeats it.

    Parameters
    ----------
    images : ndarray, shape (n, rows, cols, channels)
        float32 or float64.
    seed, epoch, step : int
        By which the numbers are drawn.
    shift : float
        Moved by up to so many pixels along each axis.
    rotate : float
        Turned about the centre by up to so many degrees either way.
    zoom : float
        Enlarged or reduced by a factor of up to ``1 + zoom``.
    """
    xp = namespace(images)
    count, rows, cols, _ = images.shape
    rng = np.random.default_rng([seed, 0x5B1F7, epoch, step])
    moved, angle, size = (rng.uniform(-1, 1, (k, count, 1, 1)) for k in (2, 1, 1))
    angle = np.radians(rotate) * angle[0]
    size = np.exp(np.log1p(zoom) * size[0])
    # The image is sampled at the inverse of what happens to it, about the centre.
    along, across = (xp.asarray(size * turn) for turn in (np.cos(angle), np.sin(angle)))
    down, right = (
        xp.asarray(shift * m + (n - 1) / 2) for m, n in zip(moved, (rows, cols), strict=True)
    )
    i = xp.arange(rows)[:, None] - (rows - 1) / 2
    j = xp.arange(cols) - (cols - 1) / 2
    y = xp.clip(along * i - across * j + down, 0, rows - 1)
    x = xp.clip(across * i + along * j + right, 0, cols - 1)
    top, left = (xp.floor(v).astype(xp.int64) for v in (y, x))
    bottom, end = xp.minimum(top + 1, rows - 1), xp.minimum(left + 1, cols - 1)
    low, far = ((v - w).astype(images.dtype)[..., None] for v, w in ((y, top), (x, left)))
    n = xp.arange(count)[:, None, None]
    upper = images[n, top, left] * (1 - far) + images[n, top, end] * far
    lower = images[n, bottom, left] * (1 - far) + images[n, bottom, end] * far
    return upper * (1 - low) + lower * low
