"""Images small enough to train on within a test, and networks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.layers import Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.models import Sequential

CLASSES = (-3, 4, 9)


def images(
    count: int = 60, shape: tuple[int, ...] = (6, 5), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return noise whose brightness, and whose bright corner, tell its label."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % len(CLASSES)
    x = rng.integers(0, 60, (count, *shape)) + 60 * y.reshape(-1, *(1,) * len(shape))
    x[np.arange(count), (y * (shape[0] - 1)) // 2, 0] += 60
    order = rng.permutation(count)
    return x[order].astype(np.uint8), np.array(CLASSES)[y[order]]


def save(path: Path, **arrays: Any) -> Path:
    """Write an npz file; small images with labels where no arrays are given."""
    if not arrays:
        x, y = images()
        arrays = {"X": x, "y": y}
    np.savez(path, **arrays)
    return path


def scaled(count: int = 60, dtype: str = "float32", seed: int = 0) -> tuple[Any, Any]:
    """Return images as a network takes them, and labels from 0."""
    x, y = images(count, seed=seed)
    return ((x[..., None] - 90.0) / 50).astype(dtype), np.searchsorted(CLASSES, y)


def network(optimizer: str = "AdamW(lr=0.01)", seed: int = 1, device: str = "cpu") -> Sequential:
    """Return a network of three outputs for these images."""
    layers = [
        Conv2D(4, (3, 3), pad=1, act_fn="ReLU", init="he_uniform"),
        Pool2D((2, 2), stride=2),
        Flatten(),
        FullyConnected(3),
    ]
    return Sequential(layers, optimizer=optimizer, rng=seed, device=device)
