"""The two pictures of a run: its curves, and the test images it got wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv.training.evaluation import Evaluation
from gpuconv.training.files import replacing
from gpuconv.training.loop import EpochRecord

__all__ = ["plot_curves", "plot_mistakes"]

Host = np.ndarray[Any, Any]

#: Of the Okabe-Ito palette, which colour-blind readers can tell apart.
_TRAIN, _HELD, _TEST = "#0072B2", "#D55E00", "#009E73"
_SHOWN = 25


def plot_curves(path: Path, title: str, history: Sequence[EpochRecord], test: Evaluation) -> None:
    """Draw loss and error by epoch, training beside validation, with the test error.

    Both on logarithmic axes, as what matters late in a training is small; that of the error
    ends in a linear part, so that no error at all has its place, too.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [r.epoch for r in history]
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2)
    marker = "o" if len(epochs) <= 40 else None
    losses = [r.train_loss for r in history], [r.validation_loss for r in history]
    errors = (
        [100 * (1 - r.train_accuracy) for r in history],
        [100 * (1 - r.validation_accuracy) for r in history],
    )
    for axes, (train, held) in ((left, losses), (right, errors)):
        for values, colour, label in ((train, _TRAIN, "train"), (held, _HELD, "validation")):
            axes.plot(epochs, values, color=colour, label=label, marker=marker, markersize=3.5)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    final = 100 * (1 - test.accuracy)
    label = f"test, at the end: {final:.2f} %"
    right.axhline(final, color=_TEST, linestyle="--", linewidth=1.2, label=label)
    left.set_ylabel("cross-entropy")
    left.set_title("Loss", fontsize=10)
    right.set_ylabel("images classified wrongly")
    right.set_title("Error", fontsize=10)
    _logarithmic(left, [*losses[0], *losses[1]], "")
    _logarithmic(right, [*errors[0], *errors[1], final], " %")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    _save(path, figure)


def _logarithmic(axes: Any, values: Sequence[float], unit: str) -> None:
    """Make the axis of these values logarithmic, down to the smallest and 0 where there is a 0."""
    from matplotlib.ticker import NullLocator

    positive = [v for v in values if v > 0]
    if not positive:
        axes.set_ylim(bottom=0)
        return
    low, high = min(positive), max(positive)
    nothing = len(positive) < len(values)
    if nothing:
        axes.set_yscale("symlog", linthresh=low, linscale=0.4)
        axes.set_ylim(-0.15 * low, 1.5 * high)
    else:
        axes.set_yscale("log")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) < 6 else (1,)
    ticks = [m * 10.0**d for d in decades for m in steps]
    shown = [0.0] * nothing + [t for t in ticks if 0.7 * low <= t <= 1.4 * high]
    if len(shown) > 1:
        axes.set_yticks(shown, [f"{t:g}{unit}" for t in shown])
    axes.yaxis.set_minor_locator(NullLocator())


def plot_mistakes(
    path: Path, images: Host, labels: Host, classes: tuple[int, ...], test: Evaluation
) -> None:
    """Draw the test images that were classified wrongly, the surest mistakes first.

    Where there are none, the images whose right answer was given the least chance.

    Parameters
    ----------
    path : Path
        A PNG file.
    images : ndarray, shape (n, rows, columns, channels)
        As they were read.
    labels : ndarray of int, shape (n,)
        Class numbers.
    classes : tuple of int
        The label value of each class.
    test : Evaluation
        The answers.
    """
    from matplotlib.figure import Figure

    right = test.probabilities[np.arange(len(labels)), labels]
    sure = test.probabilities.max(axis=1)
    wrong = np.flatnonzero(test.predictions != labels)
    if len(wrong):
        shown = wrong[np.argsort(-sure[wrong], kind="stable")][:_SHOWN]
        title = f"{len(wrong)} of {len(labels)} test images classified wrongly"
        title += f"; the surest {len(shown)}" if len(shown) < len(wrong) else ""
    else:
        shown = np.argsort(right, kind="stable")[: min(10, len(labels))]
        title = f"All {len(labels)} test images classified rightly; the least sure {len(shown)}"
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(
        figsize=(max(5.0, 1.9 * columns), 2.15 * rows + 0.6), dpi=120, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    low, high = float(images.min()), float(images.max())
    for place, index in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        picture, colour_map = _picture(images[index], low, high)
        axes.imshow(picture, cmap=colour_map, vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#999999")
        guess = int(test.predictions[index])
        text = f"label {classes[labels[index]]} ({right[index]:.1%})"
        if guess != labels[index]:
            text += f"\ntaken for {classes[guess]} ({sure[index]:.1%})"
        axes.set_title(text, fontsize=8)
    _save(path, figure)


def _picture(image: Host, low: float, high: float) -> tuple[Host, str | None]:
    """Return the image scaled to 0..1: in colour where it has three channels, else their mean."""
    # Halves first: the range of very large values must not overflow.
    scaled = (image.astype(np.float64) / 2 - low / 2) / max(high / 2 - low / 2, 1e-300)
    if image.shape[2] == 3:
        return scaled.clip(0, 1), None
    return scaled.mean(axis=2).clip(0, 1), "gray"


def _save(path: Path, figure: Any) -> None:
    """Write the figure, whole or not at all; no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
