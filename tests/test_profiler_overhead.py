"""What the profiler costs: the code without its hooks is that, and the measurement runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuconv
from benchmarks import profiler_overhead
from gpuconv.profiling import Recorder
from gpuconv.training.loop import fit
from tests.small_images import network, scaled

PACKAGE = Path(gpuconv.__file__).parent


@pytest.fixture
def hookless() -> Iterator[None]:
    codes = profiler_overhead.without_hooks()
    before = {function: function.__code__ for function in codes}
    for function, code in codes.items():
        function.__code__ = code
    yield
    for function, code in before.items():
        function.__code__ = code


def test_every_module_with_ranges_is_known() -> None:
    call = re.compile(r"\branges\.(of|part|convolution)\(")
    found = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
        for path in PACKAGE.rglob("*.py")
        if call.search(path.read_text(encoding="utf-8")) and path.parent.name != "profiling"
    }
    assert found == set(profiler_overhead.HOOKED)


def train() -> tuple[dict[str, bytes], Recorder]:
    net = network()
    with Recorder("cpu") as recorder:
        fit(net, scaled(), scaled(20, seed=1), epochs=1, batch_size=16, seed=5)
    return {name: value.tobytes() for name, value in net.tensors().items()}, recorder


def test_without_hooks_nothing_is_followed(hookless: None) -> None:
    assert train()[1].rows() == []


def test_the_code_without_hooks_computes_the_same(request: pytest.FixtureRequest) -> None:
    weights, recorder = train()
    assert {r.pass_ for r in recorder.rows()} >= {"forward", "loss", "weight_grad", "update"}
    request.getfixturevalue("hookless")
    assert train()[0] == weights


def test_the_measurement_prints_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    with gpuconv.engine("numpy_gemm"):  # which has nothing to compile
        assert profiler_overhead.main(["--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines[2:4], ("off / without hooks", "on / off"), strict=True):
        assert re.fullmatch(rf"{name}: (\d\.\d{{4}}) \(\1-\1\), 1 pair", line)
    share = re.fullmatch(r"rows / wall: (\d+\.\d)%", lines[4])
    assert share is not None
    assert 90 < float(share[1]) < 100
