"""A run and its folder: started, saved, taken up again, finished.

The folder holds ``config.json`` (what is run), ``checkpoint.safetensors`` (all that going on
exactly needs), ``metrics.jsonl`` (one line an epoch, the test at the end),
``model.safetensors`` (the trained network), and the pictures ``curves.png`` and
``mistakes.png``. Each file is whole or not there.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv._version import __version__
from gpuconv.arguments import integer
from gpuconv.device import Device
from gpuconv.models import Sequential
from gpuconv.optimizers import get_optimizer
from gpuconv.threads import single_threaded_blas
from gpuconv.training import checkpoint
from gpuconv.training.data import (
    ImageData,
    Scaling,
    Split,
    label_data,
    load_digits,
    load_npz,
    stratified_split,
)
from gpuconv.training.evaluation import Evaluation, confusion_matrix, evaluate
from gpuconv.training.files import write_json, write_lines
from gpuconv.training.loop import DivergedError, Event, Progress, fit
from gpuconv.training.precision import Full, Mixed, precision_for
from gpuconv.training.recipe import Recipe, make_network, make_optimizer

__all__ = [
    "FILES", "Run", "claim_folder", "load_model", "model_from_checkpoint", "next_folder",
    "read_data", "resume", "start", "sweep",
]  # fmt: skip

MODEL, CHECKPOINT, METRICS = "model.safetensors", "checkpoint.safetensors", "metrics.jsonl"
CURVES, MISTAKES, CONFIG = "curves.png", "mistakes.png", "config.json"
FILES = (MODEL, CHECKPOINT, METRICS, CURVES, MISTAKES, CONFIG)
DIGITS = "digits"


# -------------------------------------------------------------------------------- the folder


def next_folder(name: str, root: Path) -> Path:
    """Make and return the first of ``root/name-1``, ``root/name-2``, ... that is not there."""
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = root / f"{name}-{number}"
        try:
            folder.mkdir()  # fails where another process was quicker
            return folder
        except FileExistsError:
            number += 1


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Make ``folder``, or see that it holds no run; with ``overwrite``, delete the run in it.

    Files of other names stay.

    Raises
    ------
    FileExistsError
        If it holds a file that a run would write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [name for name in FILES if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} holds an earlier run ({', '.join(found)}): --resume {folder} goes on with "
            "it, --overwrite deletes it, another --out keeps it"
        )
    for name in found:
        (folder / name).unlink()


# ----------------------------------------------------------------------------------- the run


def read_data(source: str) -> ImageData:
    """Return the digits, or the images of the npz file whose path ``source`` is.

    Raises
    ------
    ImportError
        If scikit-learn is missing, which carries the digits.
    ValueError, OSError
        If the file cannot be used; the text names it and says why.
    """
    if source == DIGITS:
        return load_digits()
    images, labels = load_npz(source)
    assert labels is not None
    return label_data(source, images, labels)


@dataclass
class Run:
    """A training run in memory.

    Attributes
    ----------
    recipe : Recipe
        Its numbers.
    source : str
        ``"digits"`` or the absolute path of an npz file.
    data : ImageData
        The images as they were read, and the labels.
    split : Split
        Which of them train, validate and test.
    info : ModelInfo
        What the model file says.
    net : Sequential
        The network, with its optimizer.
    progress : Progress
        How far it is.
    settings : dict
        ``device``, ``engine`` (None: chosen by cost) and ``threads``, as they were used.
    precision : Full or Mixed
        How the recipe's dtype is computed in.
    """

    recipe: Recipe
    source: str
    data: ImageData
    split: Split
    info: checkpoint.ModelInfo
    net: Sequential
    progress: Progress
    settings: dict[str, Any]
    precision: Full | Mixed = field(init=False)

    def __post_init__(self) -> None:
        self.precision = precision_for(self.recipe.dtype)

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return self.progress.epoch >= self.recipe.epochs

    def train(
        self,
        on_event: Callable[[Event], object] = lambda event: None,
        stop: Callable[[], bool] = lambda: False,
        interval: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Go on from where the run is, to the end or until ``stop``; see :func:`loop.fit`."""
        # One thread in BLAS: the dense layer is small, and its sums then do not depend on how
        # many threads BLAS would have taken.
        with single_threaded_blas():
            fit(
                self.net,
                self._part(self.split.train),
                self._part(self.split.validation),
                epochs=self.recipe.epochs,
                batch_size=self.recipe.batch_size,
                seed=self.recipe.seed,
                augment=self.recipe.augment,
                progress=self.progress,
                on_event=on_event,
                stop=stop,
                precision=self.precision,
                interval=interval,
                cuda_graph=cuda_graph,
            )

    def test(self) -> Evaluation:
        """Return the network's answers to the test images."""
        with single_threaded_blas():
            images, labels = self._part(self.split.test)
            return evaluate(self.net, self.precision.images(images), labels)

    def _part(self, chosen: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        images = self.info.scaling.apply(self.data.images[chosen], self.precision.data)
        return images, self.data.labels[chosen]

    # ------------------------------------------------------------------------ what is written

    def save_config(self, folder: Path) -> None:
        """Write ``config.json``: what is run, on what, with which versions."""
        tensors = self.net.tensors()
        write_json(
            folder / CONFIG,
            {
                "data": {
                    "source": self.source,
                    "fingerprint": self.data.fingerprint(),
                    "images": len(self.data.labels),
                    "image_shape": list(self.info.image_shape),
                    "classes": list(self.info.classes),
                    "train": len(self.split.train),
                    "validation": len(self.split.validation),
                    "test": len(self.split.test),
                },
                "recipe": self.recipe.to_json(),
                "optimizer": make_optimizer(self.recipe, len(self.split.train)),
                "parameters": sum(t.size for t in tensors.values()),
                "network": self.info.config,
                "settings": self.settings,
                "versions": {
                    "gpuconv": __version__,
                    "numpy": np.__version__,
                    "python": platform.python_version(),
                },
            },
        )

    def save_checkpoint(self, folder: Path) -> None:
        """Write ``checkpoint.safetensors`` and the finished epochs' ``metrics.jsonl``.

        Raises
        ------
        DivergedError
            If a parameter or what the optimizer remembers is not finite; the files of the
            last good state stay.
        """
        tensors = {f"model.{k}": v for k, v in self.net.tensors().items()}
        tensors |= {f"state.{k}": v for k, v in self.net.state_tensors().items()}
        more: dict[str, Any] = {}
        if isinstance(self.precision, Mixed):
            more["scaling_state"], masters = self.precision.state(self.net)
            tensors |= {f"master.{k}": v for k, v in masters.items()}
        for name, value in tensors.items():
            if not np.isfinite(value).all():
                raise DivergedError(
                    f"{name.partition('.')[2]} holds NaN or infinity after epoch "
                    f"{self.progress.epoch}"
                )
        header = {
            **self.info.header(),
            "recipe": self.recipe.to_json(),
            "source": self.source,
            "fingerprint": self.data.fingerprint(),
            "settings": self.settings,
            "progress": self.progress.to_json(),
            "state": self.net.state(),
            "random": self.net.random_state(),
            **more,
        }
        checkpoint.write(folder / CHECKPOINT, "checkpoint", header, tensors)
        write_lines(folder / METRICS, [asdict(r) for r in self.progress.history])

    def save_model(self, folder: Path) -> None:
        """Write ``model.safetensors``: the network as it is now."""
        checkpoint.write(folder / MODEL, "model", self.info.header(), self.net.tensors())

    def save_results(self, folder: Path, test: Evaluation) -> None:
        """Add the test to ``metrics.jsonl``."""
        labels = self.data.labels[self.split.test]
        counts = confusion_matrix(labels, test.predictions, len(self.info.classes))
        last = {
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "test_images": len(labels),
            "confusion": counts.tolist(),
        }
        write_lines(folder / METRICS, [*(asdict(r) for r in self.progress.history), last])

    def save_pictures(self, folder: Path, test: Evaluation) -> None:
        """Draw ``curves.png`` and ``mistakes.png``; needs matplotlib."""
        from gpuconv.training.plots import plot_curves, plot_mistakes

        name = DIGITS if self.source == DIGITS else Path(self.source).name
        title = f"{name}: test accuracy {test.accuracy:.4f} after {self.progress.epoch} epochs"
        plot_curves(folder / CURVES, title, self.progress.history, test)
        chosen = self.split.test
        plot_mistakes(
            folder / MISTAKES,
            self.data.images[chosen],
            self.data.labels[chosen],
            self.data.classes,
            test,
        )


def start(
    recipe: Recipe, source: str, settings: dict[str, Any], device: Device | str | None = None
) -> Run:
    """Return a run at its start; nothing is written yet.

    Parameters
    ----------
    recipe : Recipe
        Its numbers.
    source : str
        See :func:`read_data`.
    settings : dict
        Kept with the run, see :class:`Run`.
    device : Device, str or None
        Where to compute; None is the default device.

    Raises
    ------
    ImportError, OSError, TypeError, ValueError
        If the data cannot be used; the text says why.
    """
    data = read_data(source)
    split = stratified_split(data, recipe.seed)
    scaling = Scaling.fit(data.images[split.train])
    shape = data.images.shape[1:]
    image_shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    net = make_network(recipe, image_shape, len(data.classes), len(split.train), device)
    info = checkpoint.ModelInfo(net.config(), data.classes, image_shape, scaling, recipe.dtype)
    return Run(recipe, _resolved(source), data, split, info, net, Progress(), settings)


def resume(
    folder: Path, source: str | None = None, device: Callable[[dict[str, Any]], Any] | None = None
) -> Run:
    """Return the run whose checkpoint lies in ``folder``, as it was when that was written.

    Parameters
    ----------
    folder : Path
        The run's.
    source : str, optional
        Where its images are now, if they have moved.
    device : callable, optional
        Given the run's ``settings``, returns the device to go on with, and may change them;
        the default device if not given.

    Raises
    ------
    ImportError, OSError, TypeError, ValueError
        If checkpoint or data cannot be used; the text names the file and says why.
    """
    path = folder / CHECKPOINT
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of a run")
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {CHECKPOINT}: there is no run to go on with")
    header, tensors = checkpoint.read(path, "checkpoint")
    info = checkpoint.ModelInfo.from_header(header, path)
    try:
        recipe = Recipe.from_json(header.get("recipe", {}))
        progress = Progress.from_json(header.get("progress", {}))
        settings = _settings(header.get("settings"))
        if not isinstance(header.get("source"), str):
            raise ValueError("source is missing")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    where = header["source"] if source is None else source
    data = read_data(where)
    if data.fingerprint() != header.get("fingerprint"):
        raise ValueError(
            f"{where} does not hold the images and labels that the run in {folder} was started with"
        )
    split = stratified_split(data, recipe.seed)
    place = device(settings) if device is not None else None
    net = _network(info, place, path)
    model = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("model.")}
    state = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("state.")}
    optimizer = make_optimizer(recipe, len(split.train))
    run = Run(recipe, _resolved(where), data, split, info, net, progress, settings)
    scaling = header.get("scaling_state")
    scaling = scaling if isinstance(scaling, dict) else {}
    try:
        updates = _updates(progress, recipe, len(split.train))
        if isinstance(run.precision, Mixed):  # steps that overflowed were no updates
            updates -= integer("skipped", scaling.get("skipped"), 0)
        if any(part["cur_step"] != updates for part in header["state"]):
            raise ValueError(f"state is not that after {updates} updates")
        checkpoint.check_tensors(model, net.tensors(), path)
        wide = "float32" if isinstance(run.precision, Mixed) else None
        remembered = _remembered(optimizer, net, wide) if updates else {}
        checkpoint.check_tensors(state, remembered, path)
        net.set_optimizer(optimizer)
        net.load_tensors(model)
        net.load_state(header["state"], state)
        if "random" in header:  # older checkpoints know of none
            net.load_random_state(header["random"])
        if isinstance(run.precision, Mixed):
            masters = {k.partition(".")[2]: v for k, v in tensors.items() if k[:7] == "master."}
            run.precision.load_state(net, scaling, masters)
    except (KeyError, TypeError, ValueError) as error:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ValueError(text) from error
    return run


def _resolved(source: str) -> str:
    """Return where the images are, from whatever folder it is asked."""
    return source if source == DIGITS else str(Path(source).resolve())


def _settings(values: Any) -> dict[str, Any]:
    """Return the settings of a checkpoint, each of its kind."""
    if (
        not isinstance(values, dict)
        or set(values) != {"device", "engine", "threads"}
        or not isinstance(values["device"], str)
        or not isinstance(values["engine"], (str, type(None)))
    ):
        raise ValueError(f"settings is {values!r}; expected device, engine and threads")
    integer("threads", values["threads"], 1)
    return values


def _updates(progress: Progress, recipe: Recipe, train_images: int) -> int:
    """Return how many updates the network has had, if the run can be there."""
    steps = math.ceil(train_images / recipe.batch_size)
    if progress.epoch > recipe.epochs or progress.step >= steps:
        raise ValueError(
            f"progress is at epoch {progress.epoch}, step {progress.step}; expected at most "
            f"{recipe.epochs} epochs of {steps} steps"
        )
    return progress.epoch * steps + progress.step


def _remembered(optimizer: str, net: Sequential, dtype: str | None = None) -> dict[str, Any]:
    """Return arrays of the names, shapes and dtypes that the optimizer remembers after a step."""
    probe = get_optimizer(optimizer)
    probe.step()
    probe(np.zeros(1), np.zeros(1), "p")
    parts = [name.partition(".")[2] for name in probe.state()[1]]
    # Of the trained ones: running statistics have no gradient.
    trained = {n: v for n, v in net.tensors().items() if n in net.gradients}
    own = {n: v if dtype is None else v.astype(dtype) for n, v in trained.items()}
    return {f"{name}.{part}": value for name, value in own.items() for part in parts}


def sweep(folder: Path) -> None:
    """Remove what a run that was killed while it wrote has left behind."""
    for name in FILES:
        stem, _, suffix = name.partition(".")
        for temporary in folder.glob(f".{stem}.*.tmp.{suffix}"):
            temporary.unlink(missing_ok=True)


def model_from_checkpoint(folder: Path) -> str:
    """Make the checkpoint's network the folder's model; return in words which state it is."""
    path = folder / CHECKPOINT
    header, tensors = checkpoint.read(path, "checkpoint")
    info = checkpoint.ModelInfo.from_header(header, path)
    progress = Progress.from_json(header["progress"])
    model = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("model.")}
    checkpoint.write(folder / MODEL, "model", info.header(), model)
    if progress.step:
        return f"step {progress.step} of epoch {progress.epoch + 1}"
    return f"the end of epoch {progress.epoch}"


def load_model(
    path: Path, device: Device | str | None = None
) -> tuple[Sequential, checkpoint.ModelInfo]:
    """Return the network of a model file, or of the run in a folder, and what the file says.

    Raises
    ------
    OSError, ValueError
        If it cannot be used; the text names the file and says why.
    """
    path = path / MODEL if path.is_dir() else path
    header, tensors = checkpoint.read(path, "model")
    info = checkpoint.ModelInfo.from_header(header, path)
    net = _network(info, device, path)
    checkpoint.check_tensors(tensors, net.tensors(), path)
    net.load_tensors(tensors)
    return net, info


def _network(info: checkpoint.ModelInfo, device: Device | str | None, path: Path) -> Sequential:
    """Return the network that a file describes, checked to fit its images and classes."""
    try:
        net = Sequential.from_config(info.config, device=device)
        out = net.build((1, *info.image_shape), info.dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the network it describes cannot be made: {error}") from error
    if tuple(out) != (1, len(info.classes)):
        raise ValueError(
            f"{path}: its network gives {tuple(out)} for an image; "
            f"expected (1, {len(info.classes)}), one output a class"
        )
    return net
