"""What the commands share: numbers on the command line, devices and engines, optional parts."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from typing import Any

from gpuconv import dispatch
from gpuconv.device import Device, DeviceError, device, parse_device
from gpuconv.settings import get_num_threads, set_num_threads
from gpuconv.tuning import autotune

__all__ = [
    "add_compute", "between", "checked_settings", "choose_device", "count", "missing", "rate",
    "set_threads",
]  # fmt: skip

INSTALL = "pip install 'gpuconv[train]'"


def count(least: int) -> Callable[[str], int]:
    """Return a reader of integers of at least ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return value

    return read


def rate(text: str) -> float:
    """Read a positive, finite number."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def between(most: float = math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers of at least 0 and at most ``most``."""

    def read(text: str) -> float:
        value = _number(text)
        if not (0 <= value <= most and value < math.inf):
            bounds = "of at least 0" if most == math.inf else f"from 0 to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")
        return value

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device``, ``--engine`` and ``--threads``."""
    group = parser.add_argument_group("where and how to compute")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:N (a GPU where there is one that works, else the CPU)",
    )
    group.add_argument(
        "--engine",
        metavar="NAME",
        help="compute every convolution with this engine, such as naive, numpy_gemm or "
        "cuda_atomic (the fastest by prediction; `gpuconv doctor` lists them)",
    )
    group.add_argument(
        "--threads", type=count(1), metavar="N", help="threads on the CPU (one a core)"
    )
    group.add_argument(
        "--autotune",
        action="store_true",
        help="time the engines for each convolution that is met, and remember the fastest",
    )


def choose_device(wanted: str | None, engine: str | None) -> Device:
    """Return the device to compute on; an engine brings its own where none is asked for.

    Raises
    ------
    DeviceError
        If it is not there.
    ValueError
        If there is no engine of that name, or it computes elsewhere than ``wanted``.
    """
    if engine is None:
        return device() if wanted is None else parse_device(wanted)
    kind = dispatch.get_engine(engine).device_kind
    if wanted is None:
        default = device()
        if default.kind == kind:
            return default
        try:
            return parse_device(kind)
        except DeviceError as error:
            reason = str(error).partition(", but ")[2]
            raise DeviceError(f"engine {engine!r} computes on CUDA, but {reason}") from None
    found = parse_device(wanted)
    if found.kind != kind:
        raise ValueError(f"engine is {engine!r}, which computes on {kind}; device is '{found}'")
    return found


def set_threads(wanted: int | None) -> int:
    """Set the threads of the CPU engines, if asked to, and return how many there are."""
    if wanted is not None:
        set_num_threads(wanted)
    return get_num_threads()


def missing(*modules: str) -> list[str]:
    """Return those of the modules that do not import, each with the reason."""
    found = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            found.append(f"{name} ({error})")
    return found


def checked_settings(
    args: argparse.Namespace, saved: dict[str, Any] | None = None
) -> tuple[Device, dict[str, Any]]:
    """Return the device, and device, engine and threads as a run keeps them.

    What is not asked for on the command line is as ``saved`` says, where a run goes on.
    """
    wanted, engine, threads = args.device, args.engine, args.threads
    if saved is not None:
        threads = saved["threads"] if threads is None else threads
        # An engine belongs to a device: what is given for one leaves the other free.
        if wanted is None and engine is None:
            wanted, engine = saved["device"], saved["engine"]
    try:
        where = choose_device(wanted, engine)
    except DeviceError as error:
        if saved is None or args.device is not None:
            raise
        raise DeviceError(f"{error}; --device cpu goes on with the run on the CPU") from None
    if args.autotune:
        autotune(True)
    return where, {"device": str(where), "engine": engine, "threads": set_threads(threads)}
