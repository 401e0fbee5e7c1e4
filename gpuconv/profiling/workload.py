"""One convolution, forward and all gradients, again and again: what ``profile bench`` looks at."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv.device import Device
from gpuconv.profiling import ranges
from gpuconv.profiling.ranges import REST, STEP

__all__ = ["Workload", "add_arguments", "make", "repeat"]


@dataclass(frozen=True)
class Workload:
    """A convolution to compute.

    Attributes
    ----------
    name : str
        Of the layer.
    x, w : tuple of int
        The arrays' shapes.
    options : dict
        Of the calls.
    dtype : str
        Of the arrays.
    """

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: dict[str, Any]
    dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what follows ``gpuconv profile bench``."""
    from gpuconv.cli import convolution_arguments, shape_argument

    parser.add_argument(
        "x", metavar="SHAPE", help="a layer of the benchmark's suite, or the shape of the images"
    )
    parser.add_argument("w", nargs="?", type=shape_argument, metavar="W", help="of the kernels")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="to compute (1)")
    convolution_arguments(parser)


def make(args: argparse.Namespace) -> Workload:
    """Return the convolution that the arguments name.

    Raises
    ------
    ValueError
        If they name none.
    """
    from gpuconv.cli import convolution_options, shape_argument

    options = convolution_options(args)
    if args.w is not None:
        try:
            x = shape_argument(args.x)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"SHAPE: {error}") from None
        return _checked(Workload("convolution", x, args.w, options, args.dtype), args)
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "suite.py").is_file():
        raise ValueError(
            f"SHAPE is {args.x!r}; the benchmark's layers are in the source tree only: give the "
            "shapes of images and kernels, such as 8,56,56,64 3,3,64,64"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from benchmarks import suite

    shapes = [s for s in suite.load() if s.name == args.x and not s.transposed]
    if not shapes:
        raise ValueError(
            f"SHAPE is {args.x!r}; expected a layer that `gpuconv bench --list` names (none that "
            "is transposed), or the shapes of images and kernels, such as 8,56,56,64 3,3,64,64"
        )
    problem = shapes[0].problem
    own = {
        "stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation,
        "groups": problem.groups, "activation": args.activation or "ReLU",
        "layout": args.layout or "channels_last",
    }  # fmt: skip
    x_shape, w_shape = problem.x_shape, problem.w_shape
    if own["layout"] not in ("channels_last", "NHWC"):
        x_shape = (x_shape[0], x_shape[-1], *x_shape[1:-1])
        w_shape = (w_shape[-1], w_shape[-2], *w_shape[:-2])
    return _checked(Workload(args.x, x_shape, w_shape, own, args.dtype), args)


def _checked(work: Workload, args: argparse.Namespace) -> Workload:
    """Return the workload, if there is such a convolution and the engine asked for computes it."""
    with gpuconv.engine(args.engine):
        gpuconv.explain(work.x, work.w, dtype=work.dtype, device=args.device, **work.options)
    return work


def repeat(
    work: Workload, place: Device, seconds: float, least: int = 8, most: int = 10_000
) -> int:
    """Compute for so long, each time as a step with a range around it; return how often."""
    rng = np.random.default_rng(0)
    call: Callable[..., Any] = getattr(gpuconv, f"conv{len(work.x) - 2}d")
    backward: Callable[..., Any] = getattr(gpuconv, f"conv{len(work.x) - 2}d_backward")

    def draw(shape: tuple[int, ...]) -> Any:
        return gpuconv.asarray(rng.standard_normal(shape), place, work.dtype)

    x, w = draw(work.x), draw(work.w)
    first = work.options["layout"] in ("channels_first", "NCW", "NCHW", "NCDHW")
    bias = draw((work.w[0 if first else -1],))
    dy: Any = None
    count, end = 0, time.perf_counter() + seconds
    while count < least or (time.perf_counter() < end and count < most):
        with ranges.part(STEP, REST), ranges.part(work.name, "calls"):
            y = call(x, w, bias, **work.options)
            dy = draw(y.shape) if dy is None else dy
            seen = y if work.options["activation"] else None
            backward(dy, x, w, y=seen, **work.options)
        count += 1
    return count
