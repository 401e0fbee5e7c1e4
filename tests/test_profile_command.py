"""`gpuconv profile`: the choice of a profiler, its commands, their reports, the built-in one."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gpuconv
from gpuconv.cli import main
from gpuconv.diagnostics import report
from gpuconv.profiling import cupti, reports, tools
from gpuconv.profiling.tools import Facts
from tests.commands import COMMON
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import save

REPORTS = Path(__file__).parent / "profiler_reports"
ALL = {"nvprof": "/bin/nvprof", "nsys": "/bin/nsys", "ncu": "/bin/ncu"}
CPU = ("--device", "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUCONV_DEVICE", "cpu")
    gpuconv.use_device("cpu")
    yield tmp_path
    gpuconv.use_device(None)
    gpuconv.set_num_threads(None)


# -------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("capability", "toolkit", "paths", "tool", "others"),
    [
        ((7, 0), 12, ALL, "nvprof", {}),
        ((7, 5), 11, ALL, "nvprof", {}),
        ((8, 0), 12, ALL, "nsys", {"nvprof": "it supports devices below compute capability 8.0; G has 8.0"}),
        ((7, 0), 13, ALL, "nsys", {"nvprof": "it supports CUDA 12 or older; this is CUDA 13"}),
        ((7, 0), 12, {"nsys": "n", "ncu": "n"}, "nsys", {"nvprof": "it is not installed"}),
        ((9, 0), 12, {"ncu": "n"}, "ncu", {"nvprof": "below compute", "nsys": "not installed"}),
        ((6, 1), 12, {"ncu": "n"}, "builtin", {"nvprof": "not installed", "nsys": "not installed", "ncu": "it needs compute capability 7.0; G has 6.1"}),
        ((9, 0), 13, {}, "builtin", {"nvprof": "below", "nsys": "not inst", "ncu": "not inst"}),
        (None, None, ALL, "builtin", {"nvprof": "G", "nsys": "G", "ncu": "G"}),
    ],
)  # fmt: skip
def test_the_choice(
    capability: Any, toolkit: Any, paths: dict[str, str], tool: str, others: dict[str, str]
) -> None:
    choice = tools.choose(Facts(capability, toolkit, "G", paths))
    assert choice.tool == tool
    found = dict(choice.others)
    assert set(found) == set(others)
    for name, reason in others.items():
        assert reason in found[name]
    text = str(choice)
    assert text.startswith(f"profiling with {tools.TITLES[tool]}: ")
    assert text.count("\n") == len(others)
    if tool != "builtin":
        assert f"compute capability {capability[0]}.{capability[1]}, CUDA {toolkit}" in text


def test_a_forced_tool_says_what_speaks_against_it() -> None:
    choice = tools.choose(Facts((9, 0), 12, "G", ALL), "nvprof")
    assert choice.tool == "nvprof"
    assert choice.reason.startswith("it was asked for, although it supports devices below")
    assert tools.choose(Facts((7, 0), 12, "G", ALL), "ncu").reason == "it was asked for"
    with pytest.raises(ValueError, match="tool is 'vtune'; expected one of nvprof, nsys"):
        tools.choose(Facts((9, 0), 12, "G", ALL), "vtune")


#: The options used, each in its tool's guide: CUDA Profiler User's Guide (12.x) for nvprof,
#: Nsight Systems User Guide (`nsys profile`, `nsys stats`), Nsight Compute CLI guide.
DOCUMENTED = {
    "nvprof": {
        "--force-overwrite", "--export-profile", "--import-profile", "--print-gpu-summary",
        "--csv", "--normalized-time-unit", "--log-file",
    },
    "nsys": {
        "--trace", "--sample", "--cpuctxsw", "--force-overwrite", "--output", "--report",
        "--format", "--force-export",
    },
    "ncu": {
        "--set", "--nvtx", "--target-processes", "--launch-count", "--force-overwrite",
        "--export", "--import", "--csv", "--page",
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", ["nvprof", "nsys", "ncu"])
def test_commands_use_documented_options(tool: str) -> None:
    plan = tools.plan(tool, f"/x/{tool}", ["python", "a.py"], Path("f"), 7)
    assert plan.record[0] == plan.report[0] == f"/x/{tool}"
    assert plan.record[-2:] == ["python", "a.py"]
    used = {w.partition("=")[0] for w in plan.record + plan.report if w.startswith("--")}
    assert used == DOCUMENTED[tool]
    assert plan.environment == {"GPUCONV_NVTX": "1"}
    assert plan.table == Path(f"f/{tool}.csv")
    # The report reads what the record wrote (both tools add their suffix to the name).
    assert str(plan.files[0]) in plan.report
    written = str(plan.files[0]).removesuffix(".nsys-rep").removesuffix(".ncu-rep")
    assert any(w in (written, f"--output={written}") for w in plan.record)
    if tool == "ncu":
        assert plan.record[plan.record.index("--launch-count") + 1] == "7"


# ------------------------------------------------------------------------------- the reports


def read(name: str) -> str:
    return (REPORTS / name).read_text(encoding="utf-8")


def test_nvprof_report() -> None:
    first, second, third = reports.parse("nvprof", read("nvprof.csv"))
    assert first.name.startswith("conv2d_backward_atomic_f32(float const *")
    assert (first.calls, first.seconds, first.least, first.most) == pytest.approx(
        (40, 6e-3, 100e-6, 250e-6)
    )
    assert second.calls == 80
    assert third.name == "[CUDA memcpy HtoD]"


def test_nvprof_report_of_older_versions() -> None:
    first, second = reports.parse("nvprof", read("nvprof8.csv"))
    assert (first.seconds, first.least, second.calls) == pytest.approx((3e-3, 100e-6, 5))


def test_nsys_report() -> None:
    first, second = reports.parse("nsys", read("nsys.csv"))
    assert (first.name, first.calls, first.seconds) == ("conv2d_backward_atomic_f32", 40, 3e-3)
    assert (second.name[:10], second.seconds, second.least) == ("void gemm<", 1e-3, 1.5e-6)


def test_ncu_report() -> None:
    first, second = reports.parse("ncu", read("ncu.csv"))
    assert (first.name, first.calls, first.seconds) == ("conv2d_backward_atomic_f32", 1, 1.5e-3)
    assert first.counters == {}
    assert (second.calls, second.seconds, second.least, second.most) == pytest.approx(
        (2, 50e-6, 20e-6, 30e-6)
    )
    assert second.counters == {"memory %": 50, "compute %": 70, "registers": 32}


def test_kernels_as_a_table() -> None:
    lines = reports.format_kernels(reports.parse("nvprof", read("nvprof.csv"))).splitlines()
    assert lines[0].split() == [
        "kernel", "share", "ms", "calls", "mean", "µs", "min", "µs", "max", "µs",
    ]  # fmt: skip
    assert lines[1].split() == [
        "conv2d_backward_atomic_f32", "60.0%", "6.000", "40", "150.00", "100.00", "250.00",
    ]  # fmt: skip
    assert len(lines) == 4
    cut = reports.format_kernels(reports.parse("nvprof", read("nvprof.csv")), 1)
    assert cut.endswith("and 2 more")
    assert reports.format_kernels([]) == "no kernel ran on the GPU"
    counted = reports.format_kernels(reports.parse("ncu", read("ncu.csv")))
    assert "registers" in counted
    assert reports.short("void k<(int)3, f(x)>(float *, int (*)(int))") == "k<(int)3, f(x)>"
    assert len(reports.short("x" * 99)) == 60


def test_the_table_that_is_read_in_the_docs_is_that_of_the_report() -> None:
    page = (Path(__file__).parents[1] / "docs/profiling.md").read_text(encoding="utf-8")
    assert reports.format_kernels(reports.parse("nvprof", read("nvprof.csv"))) in page


@pytest.mark.parametrize("tool", ["nvprof", "nsys", "ncu"])
@pytest.mark.parametrize("text", ["", "No kernels were profiled.\n", "a,b\n1,2\n"])
def test_other_text_is_no_report(tool: str, text: str) -> None:
    with pytest.raises(reports.ReportError, match="no line names the columns"):
        reports.parse(tool, text)


def test_wrong_numbers_and_units_are_said() -> None:
    with pytest.raises(reports.ReportError, match="'x' is no number"):
        reports.parse("nsys", read("nsys.csv").replace("3000000", "x"))
    with pytest.raises(reports.ReportError, match="'days' is no unit of time"):
        reports.parse("nvprof", read("nvprof.csv").replace("%,us,", "%,days,"))


# ------------------------------------------------------------------------------- the command


def test_training_with_the_builtin_profiler(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(save(here / "a.npz"))
    options = ["--data", data, "--epochs", "4", "--batch-size", "16", "-q", *COMMON]
    assert main(["profile", "--out", "p", "train", *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("profiling with the built-in profiler: it needs nothing but gpuconv\n")
    assert "not nvprof: the CPU computes" in said
    assert re.search(r"^0 Conv2D 32 3x3 +forward +num(py|ba)_\w+[\w ]* +\d+ ", said, re.MULTILINE)
    assert re.search(
        r"the rows are \d\d\.\d% of .* ms, the mean of 9 steps;", said
    )  # 12, 3 left out
    assert {p.name for p in (here / "p").iterdir()} == {
        "table.txt", "trace.json", "roofline.png", "run",
    }  # fmt: skip
    assert (here / "p/run/model.safetensors").exists()
    assert len(json.loads((here / "p/trace.json").read_text())["traceEvents"]) > 100


def test_a_convolution_with_the_builtin_profiler(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["bench", "2,9,9,4", "3,3,4,8", "--padding", "1", "--seconds", "0.01", *CPU]
    assert main(["profile", *shape]) == 0
    said = capsys.readouterr().out
    for pass_ in ("forward", "input_grad", "weight_grad"):
        assert re.search(rf"^convolution +{pass_} +num(py|ba)_\w+[\w ]* ", said, re.MULTILINE)
    assert "wrote profiles/bench-2x9x9x4-1/trace.json" in said
    assert main(["profile", *shape]) == 0
    assert (here / "profiles/bench-2x9x9x4-2/table.txt").exists()


def test_a_layer_of_the_suite_in_either_layout(capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("NHWC", "NCHW"):
        shape = ["bench", "resnet50_conv5_3x3", "--layout", layout, "--seconds", "0.01", *CPU]
        assert main(["profile", "--out", layout, *shape]) == 0
        assert re.search("^resnet50_conv5_3x3 +forward", capsys.readouterr().out, re.MULTILINE)


def test_a_script_with_the_builtin_profiler(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "s.py").write_text(
        "import sys, numpy as np, gpuconv\n"
        "gpuconv.conv2d(np.ones((1, 4, 4, 2)), np.ones((3, 3, 2, 2)))\n"
        "sys.exit(int(sys.argv[1]))"
    )
    assert main(["profile", "--", sys.executable, "s.py", "0"]) == 0
    assert "1x4x4x2 -> 2x2x2, kernel 3x3" in capfd.readouterr().out
    assert (here / "profiles/s-1/table.txt").exists()
    assert main(["profile", "--out", "q", "--", sys.executable, "s.py", "7"]) == 7


def test_a_command_that_computes_nothing_says_so(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for code, status in (("", 1), ("exit(3)", 3)):
        assert main(["profile", "--", sys.executable, "-c", code]) == status
        said = capfd.readouterr().err
        assert f"no table: {sys.executable} ended with status {3 * (status == 3)}, and no" in said
    assert list((here / "profiles").iterdir()) == []  # no empty folders are left
    (here / "p").mkdir()
    (here / "p/table.txt").write_text("of an earlier run")
    assert main(["profile", "--out", "p", "--", sys.executable, "-c", ""]) == 1
    assert not (here / "p").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["python", "a/net.py", "--lr", "1"], "net"),
        (["python3.11", "-X", "dev", "-m", "pack.run", "-v"], "pack.run"),
        (["python", "-c", "import gpuconv"], "python"),
        (["/opt/bin/train.sh", "x"], "train.sh"),
    ],
)
def test_a_folder_is_named_after_what_is_run(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--dry-run", "--", *words]) == 0
    assert f"profiles/{name}-N/table.txt" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["nvprof", "nsys", "ncu", "builtin"])
def test_dry_runs_print_and_write_nothing(
    tool: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in (["train", "digits"], ["bench", "2,9,9,4", "3,3,4,8"], ["--", "python", "a.py"]):
        assert main(["profile", "--tool", tool, "--dry-run", *what]) == 0
        said = capsys.readouterr().out
        assert said.splitlines()[0].startswith("profiling with")
        assert "run:     " in said
        assert "writes:  " in said
        if tool != "builtin":
            assert f"{tool} " in said
            assert "report:  " in said
            if what[0] == "train":
                assert "-m gpuconv train digits --epochs 1 --out profiles/train-digits-N" in said
            if what[0] == "bench":
                assert "-m gpuconv profile --run-only bench 2,9,9,4 3,3,4,8" in said
    assert list(here.iterdir()) == []


def fake(folder: Path, name: str, body: str) -> None:
    """Put a program of this name on the PATH."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys, os, subprocess\na = sys.argv[1:]\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


RUN = "i = a.index(sys.executable)\nsys.exit(subprocess.run(a[i:]).returncode)\n"
FAKES = {
    "nvprof": "if '--import-profile' in a:\n    import shutil\n"
    "    shutil.copy({csv!r}, a[a.index('--log-file') + 1]); sys.exit()\n" + RUN,
    "nsys": "if a[0] == 'stats':\n    print(open({csv!r}).read()); sys.exit()\n" + RUN,
    "ncu": "if '--import' in a:\n    print(open({csv!r}).read()); sys.exit()\n" + RUN,
}


@pytest.mark.parametrize("tool", list(FAKES))
def test_a_tool_is_run_and_its_report_printed(
    tool: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With programs in the place of the tools that run the command and print a recorded report."""
    (here / "bin").mkdir()
    fake(here / "bin", tool, FAKES[tool].format(csv=str(REPORTS / f"{tool}.csv")))
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (here / "s.py").write_text("import os\nprint('nvtx', os.environ['GPUCONV_NVTX'])")
    assert main(["profile", "--tool", tool, "--out", "p", "--", sys.executable, "s.py"]) == 0
    said = capfd.readouterr().out
    assert "nvtx 1" in said
    assert "conv2d_backward_atomic_f32" in said
    assert f"wrote p/{tool}.csv" in said
    assert (here / f"p/{tool}.csv").exists()
    assert main(["profile", "--tool", tool, "--", sys.executable, "-c", "exit(3)"]) == 3
    assert f"{tool} ended with status 3" in capfd.readouterr().err


def test_a_report_that_cannot_be_read_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "bin").mkdir()
    fake(here / "bin", "nsys", "if a[0] == 'stats':\n    sys.exit('no such report')\n" + RUN)
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert main(["profile", "--tool", "nsys", "--", sys.executable, "-c", ""]) == 1
    said = capfd.readouterr().err
    assert said == "gpuconv profile: no table of nsys's report: no such report\n"


def test_run_only_computes(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["bench", "2,9,9,4", "3,3,4,8", "--seconds", "0.01", *CPU]
    assert main(["profile", "--run-only", *shape]) == 0
    assert capsys.readouterr().out == ""


def test_kernels_by_cupti(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module in the place of cupti-python's that hands over records as that does."""
    asked: list[Any] = []

    def record(kind: str, name: str, start: int, end: int) -> Any:
        return types.SimpleNamespace(kind=kind, name=name, start=start, end=end)

    module: Any = types.ModuleType("cupti.cupti")
    module.ActivityKind = types.SimpleNamespace(CONCURRENT_KERNEL="k", MEMCPY="c")
    module.activity_register_callbacks = lambda *calls: asked.append(calls)
    module.activity_enable = lambda kind: asked.append(("on", kind))
    module.activity_disable = lambda kind: asked.append(("off", kind))
    module.activity_flush_all = lambda flag: asked[0][1](
        [record("k", "a", 0, 2000), record("c", "", 0, 500), record("k", "a", 5000, 6000)]
    )
    monkeypatch.setitem(sys.modules, "cupti", types.ModuleType("cupti"))
    monkeypatch.setitem(sys.modules, "cupti.cupti", module)
    assert cupti.available()
    with cupti.KernelTimes() as times:
        assert asked[0][0]() == (cupti.BUFFER, 0)
        assert asked[1:] == [("on", "k"), ("on", "c")]
    assert asked[3:] == [("off", "k"), ("off", "c")]
    first, second = times.kernels
    assert (first.name, first.calls, first.seconds) == ("a", 2, pytest.approx(3e-6))
    assert (second.name, second.most) == ("[memory copy]", pytest.approx(5e-7))
    assert cupti.covered(times.intervals) == pytest.approx(3e-6)  # the copy ran beside a kernel
    monkeypatch.setitem(sys.modules, "cupti.cupti", None)
    assert not cupti.available()


def test_time_in_which_something_ran_is_counted_once() -> None:
    assert cupti.covered([]) == 0
    assert cupti.covered([(5, 6), (0, 2), (1, 3), (1.5, 2.5), (3, 4)]) == 5


def test_doctor_tells_devices_and_profilers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels' stand-in for a GPU of compute capability 8.0 under CUDA 12."""
    if reason := compiler_available():
        pytest.skip(reason)
    monkeypatch.delenv("GPUCONV_DEVICE")
    monkeypatch.setattr(tools, "find", {"nvprof": "/n/nvprof", "nsys": "/n/nsys"}.get)
    with stand_in():
        said = [" ".join(line.split()) for line in report().splitlines()]
    name = "CPU in the place of a GPU"
    assert f"cuda:0 {name}, compute capability 8.0, 1 multiprocessors, 1.0 of 1.0 GiB free" in said
    assert (
        "nvprof /n/nvprof; it supports devices below compute capability 8.0; " + name + " has 8.0"
    ) in said
    assert "nsys /n/nsys; supports the device" in said
    assert "ncu not found; it is not installed, or not on the PATH" in said
    assert (
        f"choice profiling with Nsight Systems (nsys): it supports {name}, compute capability 8.0, "
        "CUDA 12"
    ) in said
    assert "cuda_atomic cuda available" in said


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "say what to profile: train digits, bench SHAPE, or -- COMMAND"),
    "neither": (["python", "a.py"], "'python' is neither train nor bench: put -- before"),
    "tool": (["--tool", "gdb", "train", "digits"], "invalid choice: 'gdb'"),
    "launches": (["--launches", "0", "train", "digits"], "--launches: '0' is not an integer"),
    "missing tool": (["--tool", "ncu", "train", "digits"], "--tool is ncu, which is not installed"),
    "train": (["train", "digits", "--epochs", "x"], "--epochs: 'x' is not an integer"),
    "no layer": (["bench", "nix"], "SHAPE is 'nix'; expected a layer that"),
    "no shape": (["bench", "8,a", "3,3,1,1"], "'8,a' is no shape such as"),
    "kernels": (["bench", "8,8,8,3", "3,3,4,5"], "w has shape (3, 3, 4, 5) with 4 input channels"),
    "seconds": (["bench", "8,8,8,3", "3,3,3,5", "--seconds", "0"], "--seconds is 0.0; expected"),
    "engine": (["bench", "8,8,8,3", "3,3,3,5", "--engine", "x"], "engine is 'x'"),
    "no command": (["--", "no-such-program"], "no-such-program: No such file or directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line_and_status_2(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(tools, "_PLACES", dict.fromkeys(ALL, ()))
    arguments, message = WRONG[name]
    try:
        status: Any = main(["profile", *arguments])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr().err
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith("gpuconv")
    assert message in said


def test_a_failed_training_is_no_profile(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(save(here / "a.npz"))
    options = ["--data", data, "--lr", "1e38", "--epochs", "3", "-q", *COMMON]
    assert main(["profile", "--out", "p", "train", *options]) == 1
    assert "the training diverged" in capsys.readouterr().err
    assert not (here / "p/table.txt").exists()
