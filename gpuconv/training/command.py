"""``gpuconv train``: the command around the loop; it prints, the loop does not."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import gpuconv
from gpuconv.device import Device, DeviceError
from gpuconv.training import options
from gpuconv.training.memory import wanted

__all__ = ["add_arguments", "main"]

_PICTURES = "curves.png and mistakes.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gpuconv train``."""
    parser.description = (
        "Train a small convolutional network to classify images: the 1,797 handwritten digits "
        "that scikit-learn carries, or your own. A tenth of the images is held out to validate "
        "and a fifth to test, chosen class by class. Ctrl-C saves the run; --resume goes on with "
        "it as if nothing had happened."
    )
    parser.epilog = (
        "examples:  gpuconv train digits  |  gpuconv train --data mine.npz --epochs 20 --out run  "
        "|  gpuconv train --resume runs/digits-1"
    )
    add = parser.add_argument
    add("dataset", nargs="?", choices=["digits"], metavar="digits", help="the handwritten digits")
    add(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="your images: X of shape (n, rows, columns) or (n, rows, columns, channels), any "
        "size and real dtype, and integer labels y of shape (n,)",
    )
    group = parser.add_argument_group("how to train")
    add = group.add_argument
    add(
        "--model",
        choices=["auto", "lenet5", "resnet20", "vgg_small"],
        help="the network (auto: blocks of convolutions, made for the size of the images)",
    )
    add("--epochs", type=options.count(1), metavar="N", help="passes over the images (50)")
    add("--batch-size", type=options.count(1), metavar="N", help="images a step (32)")
    add("--lr", type=options.rate, metavar="RATE", help="highest learning rate (0.003)")
    add("--weight-decay", type=options.between(1), metavar="W", help="of AdamW (0.01)")
    add(
        "--seed",
        type=options.count(0),
        metavar="N",
        help="the same seed and threads, the same weights bit for bit (0)",
    )
    add(
        "--dtype",
        choices=["float16", "bfloat16", "float32", "float64"],
        help="to compute in (float32); float16 and bfloat16 have float32 master weights, and "
        "float16 a scaled loss; bfloat16 needs gpuconv[bfloat16], and CuPy 14 on a GPU",
    )
    add(
        "--log-interval",
        type=options.count(1),
        metavar="N",
        help="steps between two readings of loss and accuracy, for which a GPU is waited for "
        "(1 on the CPU, 16 on a GPU)",
    )
    add("--cuda-graph", action="store_true", help="on a GPU, capture the step once and replay it")
    group = parser.add_argument_group("how far training images are changed at random")
    change = group.add_argument
    change("--shift", type=options.between(), metavar="PIXELS", help="moved along each axis (0.5)")
    change("--rotate", type=options.between(180), metavar="DEGREES", help="turned (10)")
    change("--zoom", type=options.between(1), metavar="PART", help="enlarged or reduced (0.1)")
    options.add_compute(parser)
    group = parser.add_argument_group("the run's folder")
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="its folder (a new one, runs/NAME-NUMBER)")
    add("--overwrite", action="store_true", help="delete the earlier run in --out")
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the run in DIR, with the options it was started with",
    )
    add("--quiet", "-q", action="store_true", help="print the test result only")


def main(args: argparse.Namespace) -> int:
    """Train; return 0, 1 where the training failed, 2 for bad arguments, 128 + a signal."""
    try:
        say = (lambda text: None) if args.quiet else _say
        _check(args)
        _check_parts(args, say)
        run, folder = _resumed(args) if args.resume else _started(args)
        run.save_config(folder)
    except (ImportError, DeviceError, OSError, TypeError, ValueError) as error:
        return _fail(error, 2)
    except MemoryError as error:
        return _fail(f"there is no room for images and network: {wanted(error)}", 1)
    try:
        with gpuconv.engine(run.settings["engine"]):
            return _train(run, folder, args, say)
    except KeyboardInterrupt:
        print(
            f"\ngpuconv train: interrupted; gpuconv train --resume {folder} goes on",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        raise  # nobody reads what is said: not an error of the run
    except (gpuconv.EngineError, OSError, MemoryError) as error:
        return _fail(error, 1)


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(error: object, code: int) -> int:
    print(f"gpuconv train: {error}", file=sys.stderr)
    return code


def _check(args: argparse.Namespace) -> None:
    if args.resume is None:
        if (args.dataset is None) == (args.data is None):
            both = "both are given" if args.data else "neither is given"
            raise ValueError(f"say 'digits' or --data FILE.npz: {both}")
        if args.overwrite and args.out is None:
            raise ValueError("--overwrite goes with --out")
        return
    if args.out is not None or args.overwrite:
        raise ValueError("--resume writes into the run's own folder: leave --out, --overwrite out")
    if args.dataset is not None and args.data is not None:
        raise ValueError("say 'digits' or --data FILE.npz: both are given")


def _check_parts(args: argparse.Namespace, say: Any) -> None:
    """See, before any work, that what the run needs beside NumPy is there."""
    needed = ["safetensors"] + (["sklearn"] if args.dataset else [])
    if lost := options.missing(*needed):
        raise ImportError(f"{', '.join(lost)}: {options.INSTALL} brings what is missing")
    if lost := options.missing("matplotlib"):
        say(f"no {_PICTURES}, for want of {lost[0]}: {options.INSTALL}")
    if lost := options.missing("tqdm"):
        say(f"no progress bar, for want of {lost[0]}: {options.INSTALL}")


def _check_graph(args: argparse.Namespace, where: Device) -> None:
    if args.cuda_graph and where.kind == "cpu":
        raise ValueError(f"--cuda-graph needs a GPU; the run computes on {where}")


def _started(args: argparse.Namespace) -> tuple[Any, Path]:
    """Return a new run and its folder; the folder is made when all else is known to be well."""
    from gpuconv.training import run as runs
    from gpuconv.training.recipe import Recipe

    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    recipe = Recipe(**{k: v for k, v in given.items() if v is not None})
    where, settings = options.checked_settings(args)
    _check_graph(args, where)
    source = runs.DIGITS if args.dataset else str(args.data)
    run = runs.start(recipe, source, settings, where)
    if args.out is None:
        name = runs.DIGITS if args.dataset else args.data.stem
        return run, runs.next_folder(name, Path("runs"))
    runs.claim_folder(args.out, args.overwrite)
    return run, args.out


def _resumed(args: argparse.Namespace) -> tuple[Any, Path]:
    """Return the run in ``--resume``; options that would change its course are errors."""
    from gpuconv.training import run as runs

    def place(settings: dict[str, Any]) -> Any:
        where, found = options.checked_settings(args, settings)
        _check_graph(args, where)
        settings.update(found)
        return where

    source = runs.DIGITS if args.dataset else None if args.data is None else str(args.data)
    run = runs.resume(args.resume, source, place)
    for field in fields(run.recipe):
        given, kept = getattr(args, field.name), getattr(run.recipe, field.name)
        if given is not None and given != kept:
            option = "--" + field.name.replace("_", "-")
            raise ValueError(
                f"{option} is {given}; the run in {args.resume} was started with {kept} and goes "
                f"on with it: leave {option} out, or start a new run"
            )
    runs.sweep(args.resume)
    return run, args.resume


# ------------------------------------------------------------------------------- the training


class _Reporter:
    """Follows the loop: a bar an epoch, a line an epoch, a checkpoint an epoch."""

    def __init__(self, run: Any, folder: Path, say: Any, quiet: bool) -> None:
        self._run, self._folder, self._say = run, folder, say
        self._make = None if quiet or options.missing("tqdm") else _tqdm()
        self._bar: Any = None

    def __call__(self, event: Any) -> None:
        from gpuconv.training.loop import EpochEnd, StepEnd

        if isinstance(event, StepEnd):
            self._step(event)
        elif isinstance(event, EpochEnd):
            self.close()
            r, epochs = event.record, self._run.recipe.epochs
            width = len(str(epochs))
            self._say(
                f"epoch {r.epoch:{width}}/{epochs}"
                f"   train loss {r.train_loss:.4f} accuracy {r.train_accuracy:.4f}"
                f"   validation loss {r.validation_loss:.4f} accuracy {r.validation_accuracy:.4f}"
                f"   {r.seconds:.1f} s"
            )
            self._run.save_checkpoint(self._folder)

    def _step(self, event: Any) -> None:
        if self._make is None:
            return
        if self._bar is None:
            self._bar = self._make(
                total=event.steps,
                initial=event.step - 1,
                desc=f"epoch {event.epoch}/{self._run.recipe.epochs}",
                unit="step",
                leave=False,
                disable=None,  # where stderr is no terminal
                dynamic_ncols=True,
            )
        if event.loss is not None:
            self._bar.set_postfix_str(
                f"loss {event.mean_loss:.4f} accuracy {event.mean_accuracy:.4f}", refresh=False
            )
        self._bar.update()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tqdm() -> Any:
    return importlib.import_module("tqdm").tqdm


def _train(run: Any, folder: Path, args: argparse.Namespace, say: Any) -> int:
    from gpuconv.training.interrupt import StopRequest
    from gpuconv.training.loop import DivergedError

    reporter = _Reporter(run, folder, say, args.quiet)
    with StopRequest() as stop:
        _introduce(run, folder, say)
        begin = time.perf_counter()
        try:
            run.train(reporter, stop, args.log_interval, args.cuda_graph)
        except DivergedError as error:
            reporter.close()
            return _diverged(error, run, folder)
        finally:
            reporter.close()
        seconds = time.perf_counter() - begin
        run.save_checkpoint(folder)
        run.save_model(folder)
    if not run.finished:
        at = f"epoch {run.progress.epoch + 1}, after step {run.progress.step}"
        print(
            f"stopped in {at}; saved in {folder}; gpuconv train --resume {folder} goes on",
            file=sys.stderr,
        )
        return 128 + (stop.number or 2)
    _finish(run, folder, say, seconds)
    return 0


def _introduce(run: Any, folder: Path, say: Any) -> None:
    shape = "x".join(map(str, run.info.image_shape))
    parts = run.split
    say(
        f"{run.data.name}: {len(run.data.labels)} images {shape} of {len(run.data.classes)} "
        f"classes: {len(parts.train)} to train, {len(parts.validation)} to validate, "
        f"{len(parts.test)} to test"
    )
    count = sum(tensor.size for tensor in run.net.tensors().values())
    say(f"network: {_layers(run.info.config)}; {count:,} parameters, {run.recipe.dtype}")
    engine = run.settings["engine"] or "chosen by cost"
    threads = run.settings["threads"]
    say(
        f"device {run.settings['device']}, engine {engine}, "
        f"{threads} thread{'s' if threads > 1 else ''}; seed {run.recipe.seed}; writing to {folder}"
    )
    if run.progress.epoch or run.progress.step:
        say(
            "the run is finished already"
            if run.finished
            else f"going on in epoch {run.progress.epoch + 1} after step {run.progress.step}"
        )


def _layers(config: dict[str, Any]) -> str:
    """Return the layers in few words."""
    words = []
    for layer in config["layers"]:
        if layer["layer"] == "Conv2D":
            words.append(f"conv {layer['out_ch']}")
        elif layer["layer"] == "ResidualBlock":
            words.append(f"residual {layer['out_ch']}")
        elif layer["layer"] == "Pool2D":
            words.append("pool " + "x".join(map(str, layer["kernel_shape"])))
        elif layer["layer"] == "FullyConnected":
            words.append(f"dense {layer['n_out']}")
    return ", ".join(words)


def _diverged(error: Exception, run: Any, folder: Path) -> int:
    """Say what happened and what is left; the last good state becomes the model."""
    from gpuconv.training import run as runs

    advice = f"a lower --lr than {run.recipe.lr:g} may help"
    if (folder / runs.CHECKPOINT).exists():
        epoch = runs.model_from_checkpoint(folder)
        kept = f"the state of {epoch} is kept in {folder}"
    else:
        kept = "there is no earlier state to keep"
        (folder / runs.CONFIG).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    return _fail(f"the training diverged: {error}; {kept}; {advice}", 1)


def _finish(run: Any, folder: Path, say: Any, seconds: float) -> None:
    from gpuconv.training.evaluation import confusion_matrix, format_confusion

    test = run.test()
    labels = run.data.labels[run.split.test]
    right = int((test.predictions == labels).sum())
    counts = confusion_matrix(labels, test.predictions, len(run.data.classes))
    print(
        f"test accuracy {test.accuracy:.4f} ({right} of {len(labels)} images), "
        f"loss {test.loss:.4f}",
        flush=True,
    )
    say(format_confusion(counts, run.data.classes))
    run.save_results(folder, test)
    if not options.missing("matplotlib"):
        run.save_pictures(folder, test)
    from gpuconv.training import run as runs

    written = ", ".join(name for name in runs.FILES if (folder / name).exists())
    say(f"trained in {seconds:.1f} s; {folder}{os.sep} holds {written}")
