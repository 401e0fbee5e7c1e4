"""``gpuconv profile``: where the time of a training, a convolution or a script goes."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpuconv
from gpuconv.device import Device, DeviceError
from gpuconv.profiling import cupti, files, reports, tools, workload
from gpuconv.profiling.recorder import Recorder
from gpuconv.training import options

__all__ = ["add_arguments", "main"]

#: Steps that are not counted: they compile, choose engines and fill caches.
SKIPPED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gpuconv profile``."""
    parser.usage = (
        "%(prog)s [options] train digits [its options]\n"
        "       %(prog)s [options] bench SHAPE\n"
        "       %(prog)s [options] -- python script.py [its arguments]"
    )
    parser.description = (
        "Run something of gpuconv's under a profiler, and print what took the time. nvprof where "
        "it supports the device (below compute capability 8.0, CUDA 12 or older), else Nsight "
        "Systems, else Nsight Compute, else the built-in profiler, which needs none of them and "
        "works on the CPU: time, calls, GFLOP/s, GB/s and the part of the machine's floor of each "
        "pass of each layer; a trace for Perfetto or chrome://tracing; a roofline. A training is "
        "one epoch unless --epochs is given."
    )
    parser.epilog = (
        "examples:  gpuconv profile train digits  |  gpuconv profile bench 8,56,56,64 3,3,64,64 "
        "--padding 1  |  gpuconv profile --tool nsys -- python train.py"
    )
    add = parser.add_argument
    add("--tool", choices=tools.TOOLS, metavar="NAME", help="nvprof, nsys, ncu or builtin")
    add("--dry-run", action="store_true", help="print the choice and the commands, and stop")
    add("--out", type=Path, metavar="DIR", help="where to write (a new one, profiles/WHAT-NUMBER)")
    add(
        "--launches",
        type=options.count(1),
        default=200,
        metavar="N",
        help="kernels that ncu looks at; it runs each many times (200)",
    )
    add("--run-only", action="store_true", help=argparse.SUPPRESS)  # inside another profiler
    add("what", nargs=argparse.REMAINDER, metavar="...", help="what to profile")


def main(args: argparse.Namespace) -> int:
    """Profile; return what was profiled returns, 1 where a report is amiss, 2 for bad arguments."""
    what = args.what[1:] if args.what[:1] == ["--"] else args.what
    script = args.what[:1] == ["--"] or not {"train", "bench"}.intersection(what[:1])
    try:
        if not what:
            raise ValueError("say what to profile: train digits, bench SHAPE, or -- COMMAND")
        if script and args.what[:1] != ["--"]:
            raise ValueError(f"{what[0]!r} is neither train nor bench: put -- before a command")
        work = None if script else _parsed(what)
        place = _place(work)
        if args.run_only:
            return _run(what, work, place)
        seen = tools.facts(None if place.kind == "cpu" else place.index)
        choice = tools.choose(seen, args.tool)
        missing = choice.tool != tools.BUILTIN and choice.tool not in seen.paths
        if missing and not args.dry_run:
            raise ValueError(f"--tool is {choice.tool}, which is not installed or not on the PATH")
        folder = args.out or _folder(what, script, args.dry_run)
        if not args.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
    except (ImportError, ValueError, TypeError, DeviceError, OSError) as error:
        print(f"gpuconv profile: {error}", file=sys.stderr)
        return 2
    print(choice, flush=True)
    if choice.tool == tools.BUILTIN:
        return _builtin(what, work, place, folder, args.dry_run)
    command = what if script else _command(what, work, folder)
    path = seen.paths.get(choice.tool, choice.tool)
    plan = tools.plan(choice.tool, path, command, folder, args.launches)
    if args.dry_run:
        _print_plan(plan)
        return 0
    return _external(choice.tool, plan)


def _parsed(what: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of train or bench; wrong ones end the command as they always do."""
    from gpuconv import cli

    if what[0] == "train":
        return cli.parser().parse_args(list(what))
    parser = cli.Parser(prog="gpuconv profile bench")
    workload.add_arguments(parser)
    found = parser.parse_args(list(what[1:]))
    if not 0 < found.seconds < 1e4:
        raise ValueError(f"--seconds is {found.seconds}; expected a positive number")
    workload.make(found)  # sees that there is such a convolution, before anything is written
    return found


def _place(work: argparse.Namespace | None) -> Device:
    """Return the device that will compute."""
    if work is None:
        return gpuconv.device()
    return options.choose_device(work.device, work.engine)


def _folder(what: Sequence[str], script: bool, dry: bool) -> Path:
    """Return a folder of a name that says what is in it."""
    words = [_script(what)] if script else [w for w in what[:2] if not w.startswith("-")]
    name = "-".join(words).replace(",", "x").replace(os.sep, "-") or "profile"
    root = Path("profiles")
    return root / f"{name}-N" if dry else files.next_folder(name, root)


def _script(what: Sequence[str]) -> str:
    """Return the name of what a command runs: a Python file's or module's, else the command's."""
    names = [w for w in what[1:] if w.endswith(".py")]
    names += [after for word, after in zip(what[1:], what[2:], strict=False) if word == "-m"]
    return Path((names or what)[0]).name.removesuffix(".py")


def _with_defaults(what: Sequence[str], work: Any, folder: Path) -> list[str]:
    """Return train's arguments with one epoch, and a folder within the profile's, if not given."""
    words = list(what)
    if work.resume is None:
        if work.epochs is None:
            words += ["--epochs", "1"]
        if work.out is None:
            words += ["--out", str(folder / "run"), "--overwrite"]
    return words


def _command(what: Sequence[str], work: Any, folder: Path) -> list[str]:
    """Return the command that another profiler runs."""
    start = [sys.executable, "-m", "gpuconv"]
    if what[0] == "train":
        return [*start, *_with_defaults(what, work, folder)]
    return [*start, "profile", "--run-only", *what]


def _run(what: Sequence[str], work: Any, place: Device) -> int:
    """Compute what is to be profiled, in this process."""
    from gpuconv import cli

    if what[0] == "train":
        return cli.main(list(what))
    with gpuconv.engine(work.engine):
        workload.repeat(workload.make(work), place, work.seconds)
    return 0


def _builtin(
    what: Sequence[str], work: argparse.Namespace | None, place: Device, folder: Path, dry: bool
) -> int:
    """Profile with the recorder: in this process, or in a script's that finds it in its environment."""
    if work is None:
        words = [f"GPUCONV_PROFILE={folder}", *what]
    elif what[0] == "train":
        words = ["gpuconv", *(what := _with_defaults(what, work, folder))]
    else:
        words = ["gpuconv", "profile", "--tool", tools.BUILTIN, *what]
    if dry:
        inside = "" if work is None else "  (in this process)"
        print(f"run:     {shlex.join(words)}{inside}")
        names = (files.TABLE, files.TRACE, files.ROOFLINE)
        print(f"writes:  {', '.join(str(folder / name) for name in names)}")
        return 0
    if work is None:
        return _script_recorded(list(what), folder)
    kernels = cupti.KernelTimes() if place.kind == "cuda" and cupti.available() else None
    with kernels or nullcontext(), Recorder(place, skip=SKIPPED) as recorder:
        status = _run(what, work, place)
    if status == 0:
        print()
        title = f"gpuconv {' '.join(what[:2])}"
        files.write(recorder, folder, title=title)
        if kernels is not None:
            print("kernels, by CUPTI, the first steps too:")
            print(reports.format_kernels(kernels.kernels))
    return status


def _script_recorded(command: list[str], folder: Path) -> int:
    """Run a command whose gpuconv records itself; say so where that left nothing."""
    table = folder / files.TABLE
    table.unlink(missing_ok=True)  # of an earlier run
    status = _child(command, {**os.environ, "GPUCONV_PROFILE": str(folder.resolve())})
    if table.exists():
        return status
    if not any(folder.iterdir()):
        folder.rmdir()
    if shutil.which(command[0]) is not None:  # else that was said
        print(
            f"gpuconv profile: no table: {command[0]} ended with status {status}, and no "
            "convolution or layer of gpuconv's was computed in it",
            file=sys.stderr,
        )
    return status or 1


def _child(command: list[str], environment: dict[str, str]) -> int:
    """Run a command with our terminal; return its status."""
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        print(f"gpuconv profile: {command[0]}: {error.strerror or error}", file=sys.stderr)
        return 2


def _print_plan(plan: tools.Plan) -> None:
    variables = [f"{k}={v}" for k, v in plan.environment.items()]
    print(f"run:     {' '.join(variables)} {shlex.join(plan.record)}")
    to = f" > {shlex.quote(str(plan.table))}" if plan.printed else ""
    print(f"report:  {shlex.join(plan.report)}{to}")
    print(f"writes:  {', '.join(map(str, plan.files))}")


def _external(tool: str, plan: tools.Plan) -> int:
    """Profile with one of NVIDIA's tools, and print the longest kernels of its report."""
    status = _child(plan.record, {**os.environ, **plan.environment})
    if status:
        print(f"gpuconv profile: {tool} ended with status {status}", file=sys.stderr)
        return status if status > 0 else 1
    done = subprocess.run(plan.report, capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise reports.ReportError(said[-1] if said else f"status {done.returncode}")
        if plan.printed:
            plan.table.write_text(done.stdout, encoding="utf-8")
        kernels = reports.parse(tool, plan.table.read_text(encoding="utf-8"))
    except (OSError, reports.ReportError) as error:
        print(f"gpuconv profile: no table of {tool}'s report: {error}", file=sys.stderr)
        return 1
    print(reports.format_kernels(kernels))
    for path in plan.files:
        print(f"wrote {path}")
    return 0
