"""The command ``gpuconv``: train, predict, bench, profile, explain, doctor."""

from __future__ import annotations

import argparse
import ast
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gpuconv._version import __version__

__all__ = [
    "Parser",
    "convolution_arguments",
    "convolution_options",
    "main",
    "parser",
    "shape_argument",
]


class Parser(argparse.ArgumentParser):
    """One line for a wrong argument, not the usage; no shortened options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    root = Parser(
        prog="gpuconv",
        description="The convolution that NumPy and CuPy do not have: train with it, time it, "
        "ask it.",
    )
    root.add_argument("--version", action="version", version=f"gpuconv {__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, short, declare, run in (
        ("train", "train an image classifier", _train_arguments, _train),
        ("predict", "classify images with a trained model", _predict_arguments, _predict),
        ("bench", "time it beside other libraries", _bench_arguments, _bench),
        ("profile", "where the time goes: layer by layer, pass by pass", _profile_arguments, _profile),
        ("explain", "which engine would compute a convolution, and why", _explain_arguments, _explain),
        ("doctor", "what was found here, what is used, what to install", _doctor_arguments, _doctor),
    ):  # fmt: skip
        command = commands.add_parser(name, help=short)
        declare(command)
        command.set_defaults(run=run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of these arguments (the process's if None); return its exit status."""
    args = parser().parse_args(argv)
    # The library logs why it computes on the CPU; here a user should see it.
    logging.basicConfig(format="gpuconv: %(message)s", level=logging.WARNING)
    logging.getLogger("gpuconv").setLevel(logging.INFO)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        status = run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\ngpuconv {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has had enough. Python would complain once
        # more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


# The commands' modules are imported when they run: `gpuconv --help` should need none.


def _train_arguments(command: argparse.ArgumentParser) -> None:
    from gpuconv.training.command import add_arguments

    add_arguments(command)


def _train(args: argparse.Namespace) -> int:
    from gpuconv.training.command import main as train

    return train(args)


def _predict_arguments(command: argparse.ArgumentParser) -> None:
    from gpuconv.training.predict import add_arguments

    add_arguments(command)


def _predict(args: argparse.Namespace) -> int:
    from gpuconv.training.predict import main as predict

    return predict(args)


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    from gpuconv.bench import add_arguments

    add_arguments(command)


def _bench(args: argparse.Namespace) -> int:
    from gpuconv.bench import main as bench

    return bench(args)


def _profile_arguments(command: argparse.ArgumentParser) -> None:
    from gpuconv.profiling.command import add_arguments

    add_arguments(command)


def _profile(args: argparse.Namespace) -> int:
    from gpuconv.profiling.command import main as profile

    return profile(args)


def _explain_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Print which engine would compute each pass of a convolution, what each engine is "
        "predicted to cost, and why the others cannot. Nothing is computed but with --autotune."
    )
    command.epilog = "example:  gpuconv explain 8,56,56,64 3,3,64,64 --padding 1"
    add = command.add_argument
    add("x", type=shape_argument, metavar="X", help="shape of the images, such as 8,56,56,64")
    add("w", type=shape_argument, metavar="W", help="shape of the kernels, such as 3,3,64,64")
    convolution_arguments(command)
    add(
        "--autotune",
        action="store_true",
        help="time the candidates on random arrays, and remember the fastest",
    )


def convolution_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the options of a convolution, and where and by what it is computed."""
    add = command.add_argument
    add("--stride", type=_literal, default=1, metavar="N", help="N, or one an axis: 2,1 (1)")
    add(
        "--padding",
        type=_literal,
        default=0,
        metavar="P",
        help="N, one an axis: 1,2, pairs: (0,1),(2,3), same or valid (0)",
    )
    add(
        "--dilation",
        type=_literal,
        default=1,
        metavar="N",
        help="N, or one an axis; 1 is dense (1)",
    )
    add("--groups", type=int, default=1, metavar="N", help="of channels (1)")
    add(
        "--layout",
        metavar="NAME",
        help="NHWC or NCHW, channels_last or channels_first (the former)",
    )
    add(
        "--dtype",
        default="float32",
        metavar="NAME",
        help="float16, bfloat16, float32 or float64 (float32)",
    )
    add("--activation", metavar="NAME", help="such as ReLU or 'LeakyReLU(alpha=0.1)' (none)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (as `gpuconv doctor` says)")
    add("--engine", metavar="NAME", help="ask for this engine")


def _explain(args: argparse.Namespace) -> int:
    import gpuconv
    from gpuconv import tuning

    try:
        with gpuconv.engine(args.engine), gpuconv.autotune(args.autotune or tuning.is_on()):
            found = gpuconv.explain(
                args.x, args.w, dtype=args.dtype, device=args.device, **convolution_options(args)
            )
    except (ValueError, TypeError, gpuconv.DeviceError) as error:
        print(f"gpuconv explain: {error}", file=sys.stderr)
        return 2
    print(found)
    return 0


def convolution_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what :func:`convolution_arguments` declared as the keywords of a call."""
    names = ("stride", "padding", "dilation", "groups", "activation")
    return {
        **{name: getattr(args, name) for name in names},
        "layout": args.layout or "channels_last",
    }


def shape_argument(text: str) -> tuple[int, ...]:
    """Read a shape such as ``8,56,56,64`` or ``8x56x56x64``."""
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 8,56,56,64") from None


def _literal(text: str) -> Any:
    """Read an integer, integers, pairs of integers, or a word."""
    if text.isalpha():
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number, pair or pairs") from None


def _doctor_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Print what was found on this machine, which device is used and why, the engines, and "
        "what to install for the rest."
    )


def _doctor(args: argparse.Namespace) -> int:
    from gpuconv.diagnostics import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
