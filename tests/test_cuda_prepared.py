"""Passes are prepared once and then only launched: what that is kept by, and what a call costs."""

from __future__ import annotations

import cProfile
import gc
import importlib.util
import pstats
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from benchmarks import launch
from gpuconv.cuda import prepared
from gpuconv.cuda.prepared import NULL
from tests.support import CASES, CUDA_ENGINES, case, close, compute, home, host, real_gpu, tolerance

CASE = {c.name: c for c in CASES}
OURS = [name for name in CUDA_ENGINES if name != "cudnn"]


@pytest.fixture
def cp() -> Iterator[Any]:
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    with home("cuda_implicit_gemm") as module:
        yield module


# ------------------------------------------------------------------------------------ what is kept


def test_what_a_preparation_depends_on(cp: Any) -> None:
    """Each of these asks for a new one; the same again, with other numbers, does not."""
    made: list[Any] = []

    def make(name: str, arrays: tuple[Any, ...], device: int) -> Callable[..., Any]:
        made.append((name, device))
        return lambda *arrays: arrays

    def ask(*arrays: Any, name: str = "a") -> bool:
        """Return whether it was prepared anew."""
        before = len(made)
        prepared.prepared(make, (name,), arrays)
        return len(made) > before

    x, y = cp.zeros((4, 6), "float32"), cp.ones((4, 6), "float32")
    assert ask(x)
    assert not ask(y)
    room = cp.zeros(64, "float32")
    assert ask(x, name="b")  # what it is about
    assert ask(x.transpose(1, 0))  # how it lies
    assert ask(room[1:25].reshape(4, 6))  # where it starts, up to the widest access
    assert not ask(room[4:28].reshape(4, 6))
    assert ask(x.astype("float16"))
    assert ask(NULL)  # whether it is there
    assert ask(x, x)
    limit = gpuconv.get_workspace_limit()
    try:
        gpuconv.set_workspace_limit(2**20)
        assert ask(x)
        gpuconv.set_workspace_limit(limit)
        assert not ask(x)
        gpuconv.set_precision("tf32")
        assert ask(x)
        gpuconv.set_precision("default")
        with gpuconv.deterministic(True):
            assert ask(x)
        assert not ask(x)
    finally:
        gpuconv.set_workspace_limit(limit)
        gpuconv.set_precision("default")
    prepared.clear()
    assert ask(x)


def test_each_device_has_its_own() -> None:
    if real_gpu():
        pytest.skip("asks for two devices")
    from tests.cuda_on_cpu import compiler_available, stand_in

    if compiler_available():
        pytest.skip(compiler_available())
    devices: list[int] = []
    with stand_in(devices=2) as cp:
        for index in (0, 1, 0, 1):
            with cp.cuda.Device(index):
                x = cp.zeros((2, 2), "float32")
                prepared.prepared(lambda arrays, device: devices.append(device), (), (x,))
    assert devices == [0, 1, 0, 1]  # a function of its own each time
    devices.clear()
    make = lambda arrays, device: devices.append(device) or len  # noqa: E731
    with stand_in(devices=2) as cp:
        for index in (0, 1, 0, 1):
            with cp.cuda.Device(index):
                prepared.prepared(make, (), (cp.zeros((2, 2), "float32"),))
    assert devices == [0, 1]


def test_what_is_kept_is_bounded(cp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MOST", 3)
    with gpuconv.engine("cuda_implicit_gemm"):
        for name in ("dense", "strided", "same", "dense"):
            for got, want in compute(cp, CASE[name], "float32"):
                close(host(got), want, tolerance("cuda_implicit_gemm", "float32", 100))
            assert len(prepared._kept) <= 3


@pytest.mark.parametrize("engine", OURS)
def test_no_array_is_kept(engine: str) -> None:
    """Of the first call, in which a pass is prepared, nothing stays in the device's memory."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    dtype = "float16" if engine == "cuda_tensor_core" else "float32"
    depthwise = engine == "cuda_depthwise"
    for layout in ("NHWC", "NCHW"):  # of which some copy
        c = case("kept", (2, 5, 6, 6), (3, 3, 1 if depthwise else 6, 6), padding=1, layout=layout,
                 groups=6 if depthwise else 1, activation="ReLU")  # fmt: skip
        with home(engine) as cp, gpuconv.engine(engine):
            gc.collect()
            before = cp._home.used
            assert compute(cp, c, dtype)
            assert prepared._kept
            gc.collect()
            assert cp._home.used == before


# ------------------------------------------------------------------------------- what a call costs


@pytest.fixture(scope="module", params=["stand-in", "cupy"])
def idle(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "cupy" and (real_gpu() or not importlib.util.find_spec("cupy")):
        pytest.skip("takes CuPy's arrays where there is no GPU")
    with launch.idle(request.param) as xp:
        yield xp


def steps(call: Callable[[], Any]) -> int:
    """Return how many functions and methods of gpuconv a call of it calls."""
    call()
    profile = cProfile.Profile()
    profile.enable()
    call()
    profile.disable()
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    package = str(Path(gpuconv.__file__).parent)
    return sum(n for (file, *_), (_, n, *_) in found.items() if file.startswith(package))


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_a_call_is_a_look_and_its_launches(idle: Any, engine: str) -> None:
    """Counted, as times on a machine that others use say little: a function of ours is 0.1 to 0.2 µs.

    A pass that plans at every call calls hundreds.
    """
    most = {"conv2d": 50, "conv2d_backward x": 80, "conv2d_backward w": 80}
    for c in launch.CASES[:2]:
        with gpuconv.engine(engine):
            for what, call in launch.calls(idle, engine, c):
                launch.Idle.launches = 0
                found = steps(call)
                launches = launch.Idle.launches // 2
                fixed = 100 if what.endswith("xwb") else most.get(what, 28)
                assert 0 < launches <= 10, (c.name, what)
                assert 3 < found <= fixed + 2 * launches, (c.name, what, found, launches)


def test_what_is_launched_is_counted(idle: Any) -> None:
    found = launch.measure(idle, ["cuda_winograd", "cuda_depthwise"], launch.CASES[:1], rounds=1)
    counts = {(c.engine, c.what): c.launches for c in found}
    assert counts["cuda_winograd", "forward"] == 4  # filters, input, products, output
    assert counts["cuda_winograd", "weight_grad"] == 4
    assert counts["cuda_depthwise", "forward"] == 1
    assert counts["cuda_depthwise", "conv2d_backward x"] == 2
    assert all(0 < c.seconds < 1 for c in found)
    text = launch.table(found)
    assert text.count("cuda_depthwise") == 1
    assert "(4)" in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--arrays", "stand-in", "--engines", "cuda_depthwise", "--rounds", "1"]
    assert launch.main(command) == 0
    assert "cuda_depthwise" in capsys.readouterr().out
    assert launch.main([*command, "--profile"]) == 0
    assert "prepared.py" in capsys.readouterr().out
    assert launch.main(["--engines", "naive"]) == 2
    assert "naive" in capsys.readouterr().err


def test_nothing_of_it_stays_behind() -> None:
    """After a measurement kernels compute again."""
    if real_gpu():
        pytest.skip("asks for the stand-in for CuPy")
    with launch.idle("stand-in"):
        pass
    with home("cuda_atomic") as cp, gpuconv.engine("cuda_atomic"):
        y = gpuconv.conv2d(cp.ones((1, 2, 2, 1), "float32"), cp.ones((1, 1, 1, 1), "float32"))
        np.testing.assert_array_equal(host(y), 1)
