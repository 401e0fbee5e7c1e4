"""``gpuconv bench``: the benchmark of the source tree, beside PyTorch, JAX and plain NumPy."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpuconv.settings import get_num_threads

if TYPE_CHECKING:
    from benchmarks.suite import Shape

__all__ = ["add_arguments", "main"]

#: Options that only the suite of convolutions has.
_OF_SUITE = ("list", "quick", "shapes", "suite", "peers", "scaling")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gpuconv bench``."""
    parser.description = (
        "Time the layers of benchmarks/suite.toml: gpuconv beside PyTorch, JAX, a plain im2col and "
        "the loops, each in a process of its own, results checked first. A run of the whole suite "
        "writes its table, JSON and plots into benchmarks/results; any other only where --out says."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="the short suite only")
    add(
        "--shapes",
        action="append",
        default=[],
        metavar="GLOB",
        help="layers whose names match, such as 'vgg16_*'; may be given more than once",
    )
    add("--dtype", default="float32", metavar="LIST", help="float32, float64 or both")
    add(
        "--passes",
        default="forward,train",
        metavar="LIST",
        help="of forward (bias and ReLU), train (forward and all gradients), input_grad, "
        "weight_grad; forward,train at first",
    )
    add(
        "--peers",
        metavar="LIST",
        help="of torch, jax, im2col64, im2col, loops, and gpuconv:ENGINE for a forced engine; "
        "all but the last at first; 'none' for gpuconv alone",
    )
    add("--threads", type=int, metavar="N", help="for every peer; one a core at first")
    add("--repeat", type=int, default=5, metavar="N", help="rounds of turns (5)")
    add(
        "--seconds",
        type=float,
        default=0.4,
        metavar="S",
        help="for each peer, layer and pass, over all rounds (0.4)",
    )
    add(
        "--compiled",
        action="store_true",
        help="let gpuconv use what its extra numba compiles; NumPy alone at first",
    )
    add("--scaling", action="store_true", help="also fit the time against batch and image size")
    add("--no-memory", action="store_true", help="do not measure gpuconv's peak memory")
    add("--no-plots", action="store_true", help="write no plots")
    add("--suite", type=Path, metavar="FILE", help="another suite")
    add("--out", type=Path, metavar="DIR", help="where to write table, JSON and plots")
    add("--json", action="store_true", help="print the result as JSON instead of a table")
    add(
        "--net",
        action="store_true",
        help="instead of layers, time a training epoch of a conv net beside PyTorch",
    )
    add(
        "--layers",
        action="store_true",
        help="instead of convolutions, time pooling, batch normalisation and activations beside "
        "PyTorch",
    )
    add("--list", action="store_true", help="print the layers, their FLOPs and bytes, and stop")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark; return 0, 1 where gpuconv failed or was wrong, 2 for bad arguments."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "runner.py").is_file():
        print(
            "gpuconv bench needs the source tree: the benchmark's suite and its peers are in the "
            "folder benchmarks/ of the repository, which an installed wheel does not carry. Clone "
            "it and run `make bench` there.",
            file=sys.stderr,
        )
        return 2
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks import layers, net, report, runner, suite
    from benchmarks.children import ChildError
    from benchmarks.peers import PEERS

    threads = get_num_threads() if args.threads is None else args.threads
    suites = [name for name in _OF_SUITE if getattr(args, name)]
    if (args.net or args.layers) and (suites or args.net == args.layers):
        other = f"--{suites[0]}" if suites else "--net"
        print(
            f"gpuconv bench: {other} was given with --{'layers' if args.layers else 'net'}, which "
            "is a run of its own; expected one of them",
            file=sys.stderr,
        )
        return 2
    try:
        if args.net:
            trained = net.run(
                net.NetOptions(
                    threads=threads, rounds=args.repeat, compiled=args.compiled, say=_say
                )
            )
            print(report.to_json(trained) if args.json else net.markdown(trained))
            for file in net.write(trained, args.out) if args.out else []:
                _say(f"wrote {file}")
            return 1 if net.failures(trained) else 0
        if args.layers:
            timed = layers.run(
                layers.LayersOptions(threads, args.repeat, args.seconds, args.compiled, say=_say)
            )
            print(report.to_json(timed) if args.json else layers.markdown(timed))
            for file in layers.write(timed, args.out) if args.out else []:
                _say(f"wrote {file}")
            return 1 if layers.failures(timed) else 0
        shapes = suite.load(args.suite or suite.SUITE)
        chosen = suite.select(shapes, args.shapes, args.quick)
        if args.list:
            _list(chosen)
            return 0
        peers = tuple(PEERS) if args.peers is None else _names(args.peers.replace("none", ""))
        passes = _names(args.passes)
        whole = (
            not (args.quick or args.shapes or args.suite or args.peers)
            and {"forward", "train"} <= set(passes)
        )  # fmt: skip
        options = runner.Options(
            shapes=chosen,
            dtypes=_names(args.dtype),
            passes=passes,
            peers=peers,
            threads=threads,
            repeat=args.repeat,
            seconds=args.seconds,
            memory=not args.no_memory,
            scaling=_reference(chosen) if args.scaling else None,
            compiled=args.compiled,
            say=_say,
        )
        runner.check(options)
        out = args.out or (root / "benchmarks" / "results" if whole else None)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK):
                raise PermissionError(13, "Permission denied", str(out))
        result = runner.run(options)
    except ChildError as error:
        print(f"gpuconv bench: {error}", file=sys.stderr)
        return 1
    except (suite.SuiteError, runner.OptionsError, OSError, ValueError) as error:
        print(f"gpuconv bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpuconv bench: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(report.to_json(result) if args.json else report.markdown(result))
    if out is None:
        _say("not the whole suite, so nothing was written; --out DIR writes it")
    else:
        for file in report.write(result, out, not args.no_plots, _say):
            _say(f"wrote {file}")
    bad = [row for row in result["rows"] if "seconds" not in row["peers"]["gpuconv"]]
    return 1 if bad else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for n in (part.strip() for part in text.split(",")) if n))


def _reference(chosen: list[Shape]) -> str:
    """Return the layer that the scaling is fitted on; empty where none is fit for it."""
    names = [s.name for s in chosen if not s.transposed and "overhead" not in s.tags]
    return "resnet50_conv2_3x3" if "resnet50_conv2_3x3" in names else next(iter(names), "")


def _list(chosen: list[Shape]) -> None:
    width = max((len(s.name) for s in chosen), default=0)
    for s in chosen:
        print(
            f"{s.name:{width}}  {s.flops('forward') / 1e9:8.3f} GFLOP  "
            f"{s.bytes('forward') / 1e6:7.1f} MB  {s.kind:36}  {s.describe()}"
        )
