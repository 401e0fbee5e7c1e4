"""How good a classifier is: probabilities, loss, accuracy, and what is taken for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv.arguments import integer
from gpuconv.device import CPU, asnumpy
from gpuconv.losses import softmax
from gpuconv.models import Sequential
from gpuconv.profiling import ranges
from gpuconv.training.memory import OutOfMemory, room_for, told
from gpuconv.training.watch import leaves

__all__ = ["Evaluation", "confusion_matrix", "evaluate", "format_confusion", "probabilities"]

Array = Any
Host = np.ndarray[Any, Any]

#: The widest confusion matrix that is printed whole.
_PRINTED = 20


@dataclass(frozen=True)
class Evaluation:
    """A classifier's answers to labelled images.

    Attributes
    ----------
    loss : float
        Mean cross-entropy.
    accuracy : float
        Share of images whose likeliest class is their label.
    probabilities : ndarray, shape (n, classes)
        float64, on the host.
    predictions : ndarray of int, shape (n,)
        The likeliest class of each image.
    """

    loss: float
    accuracy: float
    probabilities: Host
    predictions: Host


def _logits(net: Sequential, images: Array, batch_size: int) -> Host:
    """Return the network's outputs on the host, in float64; fewer at a time if the device is full."""
    integer("batch_size", batch_size, 1)
    room = room_for(leaves(net)[0].device or CPU)
    parts: list[Host] = []
    start = 0
    while start < len(images):
        try:
            what = f"answers to images, {batch_size} at a time"
            with told(room, what), ranges.part(ranges.VALIDATION, "forward"):
                out = net.forward(images[start : start + batch_size], retain_derived=False)
                parts.append(asnumpy(out).astype(np.float64))
            start += batch_size
            continue
        except OutOfMemory:
            if batch_size == 1:
                raise
        batch_size = -(-batch_size // 2)
        room.free()
    return np.concatenate(parts)


def probabilities(net: Sequential, images: Array, batch_size: int = 256) -> Host:
    """Return the probability of each class for each image, ``(n, classes)``, in float64.

    Parameters
    ----------
    net : Sequential
        Ends in one output a class, without a softmax.
    images : ndarray, shape (n, rows, columns, channels)
        Scaled as in training; at least one. NumPy arrays are moved a batch at a time.
    batch_size : int
        Images at a time.
    """
    return np.asarray(softmax(_logits(net, images, batch_size)))


def evaluate(net: Sequential, images: Array, labels: Array, batch_size: int = 256) -> Evaluation:
    """Return loss, accuracy and answers; the network is not changed.

    Parameters
    ----------
    net, images, batch_size
        As for :func:`probabilities`.
    labels : ndarray of int, shape (n,)
        From 0.

    Raises
    ------
    ValueError
        If a label is none of the network's classes.
    """
    logits = _logits(net, images, batch_size)
    wanted = asnumpy(labels)
    classes = logits.shape[1]
    if wanted.min() < 0 or wanted.max() >= classes:
        bad = wanted[(wanted < 0) | (wanted >= classes)][0]
        raise ValueError(f"labels hold {bad}; expected 0 to {classes - 1}, the network's classes")
    rows = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, wanted]
    chances = softmax(logits)
    predictions = chances.argmax(axis=1)
    return Evaluation(
        float(losses.mean()), float((predictions == wanted).mean()), chances, predictions
    )


def confusion_matrix(labels: Host, predictions: Host, classes: int) -> Host:
    """Return how often class ``i`` (row) was taken for class ``j`` (column).

    Parameters
    ----------
    labels, predictions : ndarray of int, shape (n,)
        From 0 to ``classes - 1``.
    classes : int
        How many there are.
    """
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def format_confusion(counts: Host, names: tuple[int, ...]) -> str:
    """Return the matrix as text; of a wide one the most frequent confusions alone."""
    if len(names) > _PRINTED:
        wrong = counts - np.diag(np.diag(counts))
        pairs = np.argwhere(wrong)
        if len(pairs) == 0:
            return "no image was taken for another class"
        # argwhere is in order of labels, and a stable sort keeps that among equals.
        most = pairs[np.argsort(-wrong[tuple(pairs.T)], kind="stable")][:_PRINTED]
        lines = [f"  {names[i]} taken for {names[j]}: {wrong[i, j]}" for i, j in most]
        more = f" of {len(pairs)}" if len(pairs) > len(most) else ""
        return "\n".join([f"most frequent confusions ({len(most)}{more}):", *lines])
    cells = [[str(n) for n in names]]
    cells += [[str(n) if n else "." for n in row] for row in counts.tolist()]
    width = max(len(cell) for row in cells for cell in row)
    side = max(len("label"), *(len(str(n)) for n in names))
    lines = [f"{'label':>{side}} | predicted"]
    lines.append(f"{'':>{side}} | " + " ".join(f"{c:>{width}}" for c in cells[0]))
    lines.append("-" * len(lines[-1]))
    for name, row in zip(names, cells[1:], strict=True):
        lines.append(f"{name:>{side}} | " + " ".join(f"{c:>{width}}" for c in row))
    return "\n".join(lines)
