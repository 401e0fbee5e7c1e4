"""Predictions for a GPU that is not here, and what the README says where nothing was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import gpuconv
from benchmarks import predict
from benchmarks.gpu import command, shapes
from benchmarks.readme import gpu_section, update_readme
from gpuconv import dispatch
from gpuconv.cuda import architecture, runtime

ROOT = Path(__file__).parents[1]
LAYERS = [s for s in shapes.shapes() if s.name in ("resnet50_conv2_3x3", "line_4_taps_2048")]


@pytest.mark.parametrize("name", predict.GPUS)
def test_a_gpu_that_is_assumed(name: str) -> None:
    want, before = predict.GPUS[name], runtime.installed()
    with predict.assumed(want):
        got = architecture.gpu()
        assert got.architecture == want.architecture
        assert (got.capability, got.multiprocessors) == (want.capability, want.multiprocessors)
        assert got.clock == pytest.approx(want.clock)
        assert got.bandwidth == pytest.approx(want.bandwidth)
        assert got.l2_bytes == want.l2_bytes
        with predict.assumed(predict.GPUS["T4"]):
            assert architecture.gpu().capability == 75
        assert architecture.gpu() == got
    assert runtime.installed() is before


@pytest.mark.parametrize("name", predict.GPUS)
def test_predictions_are_the_engines_own(name: str) -> None:
    found = predict.predictions(predict.GPUS[name], LAYERS, ["float32", "tf32"])
    assert len(found) == len(LAYERS) * 2 * 3
    assert gpuconv.get_precision() == "default"
    for one in found:
        assert one.floor > 0
        assert one.best in one.seconds
        assert one.seconds[one.best] == min(s for n, s in one.seconds.items() if n != "cudnn")
        with predict.assumed(predict.GPUS[name]):
            gpuconv.set_precision("tf32" if one.dtype == "tf32" else "default")
            cost = dispatch.get_engine(one.best).cost(one.shape.problem, one.pass_)
            gpuconv.set_precision("default")
        assert one.seconds[one.best] == cost
    gpu = predict.GPUS[name]
    first = next(p for p in found if p.shape.name == "resnet50_conv2_3x3" and p.dtype == "float32")
    assert first.floor == pytest.approx(first.shape.flops("forward") / gpu.flops("float32"))
    line = next(p for p in found if p.shape.name == "line_4_taps_2048")
    assert line.floor == pytest.approx(line.shape.bytes("forward") / gpu.bandwidth)


def test_the_table_says_that_it_is_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--gpu", "A100", "--layers", "resnet50_conv2_3x3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PREDICTED for A100 by the engines' cost models; nothing is measured.")
    assert said.count("resnet50_conv2_3x3") == 4 * 3
    assert "cuda_atomic, µs" in said
    assert predict.main(["--layers", "alexnet"]) == 2
    assert predict.main(["--dtypes", "int8"]) == 2
    assert "int8" in capsys.readouterr().err
    text = predict.table(predict.predictions(predict.GPUS["H100"], LAYERS, ["float32"]))
    rows = text.splitlines()
    assert len(rows) == 2 + 2
    assert rows[2].count(" / ") == 2


def test_the_readme_without_a_gpu() -> None:
    text = gpu_section([])
    assert text.startswith("On a GPU: **not measured**.")
    assert "**Predicted, not measured**" in text


def test_the_readme_with_a_gpu(tmp_path: Path) -> None:
    """From a check that is made up: one layer, PyTorch half as fast."""
    passes = {
        p: {
            "flops": 1e9, "bytes": 1.0, "chosen": "cuda_gemm",
            "times": {
                "gpuconv": {"ms": 2.0}, "cuda_gemm": {"ms": 2.0}, "torch NHWC": {"ms": 4.0}
            },
        }
        for p in shapes.PASSES
    }  # fmt: skip
    rows = {"a|float32": {"layer": "a", "kind": "1x1", "dtype": "float32", "passes": passes}}
    ceilings = {"bandwidth": 1e12, "flops": {"float32": 1e12}, "how": {"float32": "made up"}}
    report = {
        "on_a_gpu": True, "date": "2026-01-02T03", "ceilings": ceilings, "timings": {"rows": rows},
        "summary": command.summarise(rows, ceilings), "failures": [],
        "machine": {
            "gpu": "Made Up 1", "compute_capability": "90", "memory_bytes": 2**36, "driver": "550.1",
            "cuda_runtime": 12090, "cudnn_of_torch": 91000, "system": "s", "python": "3.11",
            "versions": {"torch": "2.9"},
        },
    }  # fmt: skip
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    made = command.write(report, results)
    assert [f.name for f in made] == ["made-up-1.json", "made-up-1.md", "made-up-1-float32.png"]
    assert json.loads(made[0].read_text())["machine"]["gpu"] == "Made Up 1"
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    assert update_readme(readme, results)
    text = readme.read_text(encoding="utf-8")
    assert "On Made Up 1, 2026-01-02, driver 550.1, PyTorch 2.9 with cuDNN 91000" in text
    assert "2.00 (least 2.00)" in text
    assert "| 50 %" in text
    assert "not measured**" not in text
    assert not update_readme(readme, results)
    report["on_a_gpu"] = False
    command.write(report, results)
    assert update_readme(readme, results)
    assert "On a GPU: **not measured**" in readme.read_text(encoding="utf-8")
