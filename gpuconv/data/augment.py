"""Images changed at random, on the device they are on: shifted, flipped, cropped.

The few numbers an image needs are drawn on the host by a NumPy generator, so one seed gives the
same on every device; the pixels are gathered where they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv.arguments import integer, real
from gpuconv.device import namespace
from gpuconv.initializers import Rng, generator

__all__ = ["crop_images", "flip_images", "shift_images"]

Array = Any


def _images(images: Array) -> Any:
    xp = namespace(images)
    if images.ndim != 4:
        raise ValueError(f"images has shape {images.shape}; expected (n, rows, columns, channels)")
    return xp


def _windows(images: Array, top: Any, left: Any, rows: int, columns: int) -> Array:
    """Return a window of each image; what lies outside is zero."""
    xp = namespace(images)
    y = xp.asarray(top)[:, None] + xp.arange(rows)
    x = xp.asarray(left)[:, None] + xp.arange(columns)
    inside_y = (y >= 0) & (y < images.shape[1])
    inside_x = (x >= 0) & (x < images.shape[2])
    n = xp.arange(len(images))[:, None, None]
    y, x = xp.clip(y, 0, images.shape[1] - 1), xp.clip(x, 0, images.shape[2] - 1)
    found = images[n, y[:, :, None], x[:, None, :]]
    inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
    return found * inside.astype(images.dtype)


def shift_images(images: Array, rng: Rng = None, most: int = 2) -> Array:
    """Move each image by whole pixels along both axes; zeros come in from outside.

    Parameters
    ----------
    images : ndarray, shape (n, rows, columns, channels)
        NumPy or CuPy.
    rng : int, Generator or None
        By which up to ``most`` pixels either way are drawn.
    most : int
        At least 0.

    Returns
    -------
    ndarray
        New, of the same shape and dtype.
    """
    _images(images)
    integer("most", most, 0)
    top, left = generator(rng).integers(-most, most + 1, (2, len(images)))
    return _windows(images, top, left, *images.shape[1:3])


def flip_images(images: Array, rng: Rng = None, probability: float = 0.5) -> Array:
    """Mirror some of the images, left for right.

    Parameters
    ----------
    images : ndarray, shape (n, rows, columns, channels)
        NumPy or CuPy.
    rng : int, Generator or None
        By which they are chosen.
    probability : float
        Of each image.

    Returns
    -------
    ndarray
        New, of the same shape and dtype.
    """
    xp = _images(images)
    real("probability", probability, 0, 1)
    chosen = xp.asarray(generator(rng).random(len(images)) < probability)
    return xp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def crop_images(images: Array, size: tuple[int, int], rng: Rng = None, pad: int = 0) -> Array:
    """Cut a window out of each image, at a place drawn at random.

    Parameters
    ----------
    images : ndarray, shape (n, rows, columns, channels)
        NumPy or CuPy.
    size : tuple of int
        Rows and columns of the window; at most those of the padded image.
    rng : int, Generator or None
        By which the places are drawn.
    pad : int
        Zeros around the image beforehand; 4 with a size of 32 x 32 is what is usual on CIFAR-10.

    Returns
    -------
    ndarray
        ``(n, *size, channels)``, new, of the same dtype.
    """
    _images(images)
    integer("pad", pad, 0)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size is {size!r}; expected rows and columns")
    room = []
    for n, k in zip(images.shape[1:3], size, strict=True):
        integer("size", k, 1)
        if k > n + 2 * pad:
            raise ValueError(
                f"size is {tuple(size)}; expected at most {images.shape[1] + 2 * pad} rows and "
                f"{images.shape[2] + 2 * pad} columns, those of the padded images"
            )
        room.append(n + 2 * pad - k)
    source = generator(rng)
    top, left = (source.integers(-pad, r - pad + 1, len(images)) for r in room)
    return _windows(images, np.asarray(top), np.asarray(left), *size)
