"""Batches in an order drawn at random, read ahead by a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpuconv.arguments import boolean, integer
from gpuconv.device import Device, asarray, parse_device

__all__ = ["Loader"]

Array = Any
Transform = Callable[[Array, np.random.Generator], Array]


class Loader:
    """Batches of images and labels, epoch by epoch.

    While one batch is computed with, a thread reads the next ones, puts them on the device and
    changes them; at most ``ahead`` wait. No more than these are in memory, so the images may be
    a ``np.memmap`` larger than it.

    Parameters
    ----------
    images : array_like
        ``(n, ...)``: an array, a ``np.memmap``, or what gives an array for an array of numbers
        and has a ``shape``.
    labels : ndarray, shape (n,)
        Of integers.
    batch_size : int
        The last batch of an epoch may be smaller.
    seed : int
        For order and changes; an epoch's follow from it and the epoch's number alone.
    shuffle : bool
        Whether to change the order from epoch to epoch.
    transform : callable, optional
        Given a batch's images, on the device, and a generator, returns the images to train on:
        scaled, shifted, flipped.
    dtype : dtype, optional
        That images are converted to before ``transform``.
    device : Device, str or None
        Where batches go; None leaves them on the host.
    ahead : int
        Batches to read ahead; 0 reads in the caller's thread.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as said.

    Examples
    --------
    >>> loader = Loader(X, y, 128, dtype="float32", transform=lambda x, rng: flip_images(x, rng))
    >>> for epoch in range(10):
    ...     for x, labels in loader.epoch(epoch):
    ...         ...
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        batch_size: int = 32,
        *,
        seed: int = 0,
        shuffle: bool = True,
        transform: Transform | None = None,
        dtype: Any = None,
        device: Device | str | None = None,
        ahead: int = 2,
    ) -> None:
        if not hasattr(images, "shape") or not hasattr(images, "__getitem__"):
            raise TypeError(f"images is a {type(images).__name__}; expected an array")
        labels = np.asarray(labels)
        if labels.shape != (images.shape[0],):
            raise ValueError(
                f"labels has shape {labels.shape}; expected ({images.shape[0]},), one for each image"
            )
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels has dtype {labels.dtype}; expected integers")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform is {transform!r}; expected a function or None")
        self._images, self._labels = images, labels
        self.batch_size = integer("batch_size", batch_size, 1)
        self._seed = integer("seed", seed, 0)
        self._shuffle = boolean("shuffle", shuffle)
        self._transform = transform
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._device = None if device is None else parse_device(device)
        self._ahead = integer("ahead", ahead, 0)
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return -(-len(self._labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Return the batches of the next epoch."""
        number = self._epoch
        self._epoch += 1
        return self.epoch(number)

    def epoch(self, number: int) -> Iterator[tuple[Array, Array]]:
        """Yield images and labels of the batches of epoch ``number``, from 0.

        What reading or ``transform`` raises is raised here, in the place of the batch.
        """
        integer("number", number, 0)
        order = np.arange(len(self._labels))
        if self._shuffle:
            np.random.default_rng([self._seed, 0x10AD, number]).shuffle(order)
        if self._ahead == 0:
            return (self._batch(order, number, k) for k in range(len(self)))
        return self._read_ahead(order, number)

    def _batch(self, order: Array, epoch: int, number: int) -> tuple[Array, Array]:
        chosen = order[number * self.batch_size :][: self.batch_size]
        # In the file's order: neighbours are read together, and no page twice.
        rank = np.argsort(chosen, kind="stable")
        rows = np.asarray(self._images[chosen[rank]])
        x = np.empty(rows.shape, rows.dtype if self._dtype is None else self._dtype)
        x[rank] = rows
        y = self._labels[chosen]
        if self._device is not None:
            x, y = asarray(x, self._device), asarray(y, self._device)
        if self._transform is not None:
            rng = np.random.default_rng([self._seed, 0x7EA5, epoch, number])
            x = self._transform(x, rng)
        return x, y

    def _read_ahead(self, order: Array, epoch: int) -> Iterator[tuple[Array, Array]]:
        waiting: queue.Queue[Any] = queue.Queue(self._ahead)
        stopped = threading.Event()

        def put(item: Any) -> bool:
            while not stopped.is_set():
                try:
                    waiting.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def read() -> None:
            try:
                for k in range(len(self)):
                    if not put(self._batch(order, epoch, k)):
                        return
                put(None)
            except BaseException as error:  # raised where the batch was wanted
                put(error)

        thread = threading.Thread(target=read, name="gpuconv-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = waiting.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
