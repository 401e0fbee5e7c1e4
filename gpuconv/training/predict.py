"""``gpuconv predict``: labels and probabilities for images, by a trained model."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv.device import DeviceError
from gpuconv.training import options
from gpuconv.training.files import replacing, write_bytes

__all__ = ["Predictions", "add_arguments", "main", "predict"]

Host = np.ndarray[Any, Any]


class Predictions:
    """A model's answers to the images of a file.

    Attributes
    ----------
    labels : ndarray of int64, shape (n,)
        The likeliest label of each image.
    probability : ndarray of float64, shape (n,)
        Of that label.
    probabilities : ndarray of float64, shape (n, classes)
        Of every label.
    classes : ndarray of int64, shape (classes,)
        The labels, in the order of the columns.
    wanted : ndarray of int64, shape (n,), or None
        The file's ``y``.
    """

    def __init__(self, probabilities: Host, classes: tuple[int, ...], wanted: Host | None) -> None:
        best = probabilities.argmax(axis=1)
        self.classes = np.array(classes, np.int64)
        self.labels = self.classes[best]
        self.probability = probabilities[np.arange(len(best)), best]
        self.probabilities = probabilities
        self.wanted = wanted

    @property
    def accuracy(self) -> float | None:
        """The share of labels that are those of the file; None where it has none."""
        return None if self.wanted is None else float((self.labels == self.wanted).mean())

    def rows(self) -> list[tuple[str, ...]]:
        """Return a line of names and one for each image."""
        names = ("image", "label", "probability") + (() if self.wanted is None else ("y",))
        lines = [names]
        for k, (label, chance) in enumerate(zip(self.labels, self.probability, strict=True)):
            line = (str(k), str(label), f"{chance:.6f}")
            lines.append(line if self.wanted is None else (*line, str(self.wanted[k])))
        return lines


def predict(
    model: str | Path,
    file: str | Path,
    *,
    device: gpuconv.Device | str | None = None,
    batch_size: int = 256,
) -> Predictions:
    """Return the answers of a trained model to the images of an npz file.

    Parameters
    ----------
    model : str or Path
        A model file, or the folder of a run.
    file : str or Path
        With ``X`` of the shape the model was trained on, and perhaps ``y``.
    device : Device, str or None
        Where to compute; None is the default device.
    batch_size : int
        Images at a time.

    Raises
    ------
    OSError, ValueError
        If a file cannot be used, or they do not fit together; the text names it and says why.
    """
    from gpuconv.training.data import load_npz
    from gpuconv.training.evaluation import probabilities
    from gpuconv.training.run import load_model

    net, info = load_model(Path(model), device)
    images, wanted = load_npz(file, need_labels=False)
    if images.shape[1:] != info.image_shape:
        found, taken = ("x".join(map(str, s)) for s in (images.shape[1:], info.image_shape))
        raise ValueError(f"{file}: X holds images of {found}; {model} takes {taken}")
    if wanted is not None:
        unknown = np.setdiff1d(wanted, info.classes)
        if len(unknown):
            known = ", ".join(map(str, info.classes[:20])) + (", ..." * (len(info.classes) > 20))
            raise ValueError(
                f"{file}: y holds {unknown[0]}, which is no label of {model}; expected {known}"
            )
    parts = [
        probabilities(net, info.scaling.apply(images[k : k + batch_size], info.dtype), batch_size)
        for k in range(0, len(images), batch_size)
    ]
    return Predictions(np.concatenate(parts), info.classes, wanted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gpuconv predict``."""
    parser.description = (
        "Classify the images of an npz file with a model that `gpuconv train` wrote. Prints the "
        "likeliest label of each image and its probability; the accuracy too, where the file has "
        "labels."
    )
    parser.epilog = "example:  gpuconv predict runs/digits-1 new.npz --out labels.csv"
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a model.safetensors, or the folder of a run")
    add(
        "file",
        type=Path,
        metavar="FILE.npz",
        help="images X as in training, of the same size; labels y if there are any",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write into this .csv (what is printed otherwise) or .npz (labels, probability, "
        "probabilities of every class, classes); a file that is there is replaced",
    )
    add("--batch-size", type=options.count(1), default=256, metavar="N", help="at a time (256)")
    options.add_compute(parser)


def main(args: argparse.Namespace) -> int:
    """Predict; return 0, or 2 for bad arguments or files."""
    try:
        if lost := options.missing("safetensors"):
            raise ImportError(f"{lost[0]}: {options.INSTALL} brings what is missing")
        if args.out is not None and args.out.suffix not in (".csv", ".npz"):
            raise ValueError(f"--out is {args.out}; expected a name that ends in .csv or .npz")
        where, settings = options.checked_settings(args)
        with gpuconv.engine(settings["engine"]):
            found = predict(args.model, args.file, device=where, batch_size=args.batch_size)
        if args.out is not None:
            _write(args.out, found)
    except (ImportError, DeviceError, OSError, TypeError, ValueError) as error:
        print(f"gpuconv predict: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        widths = (7, 7, 11, 7)
        for row in found.rows():
            print("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=False)))
    else:
        print(f"wrote {len(found.labels)} predictions to {args.out}")
    if found.wanted is not None:
        right = int((found.labels == found.wanted).sum())
        print(f"accuracy {found.accuracy:.4f} ({right} of {len(found.labels)} images)")
    return 0


def _write(path: Path, found: Predictions) -> None:
    if path.suffix == ".csv":
        text = io.StringIO()
        for row in found.rows():
            print(",".join(row), file=text)
        write_bytes(path, text.getvalue().encode())
        return
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            labels=found.labels,
            probability=found.probability,
            probabilities=found.probabilities,
            classes=found.classes,
        )
