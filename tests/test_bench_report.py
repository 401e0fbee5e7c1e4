"""What the benchmark makes of a result: means, ratios, the page, the files, the plots."""

import json
import math
import statistics

import numpy as np
import pytest

from benchmarks import machine, report


def outcome(seconds, **more):
    return {
        "seconds": seconds, "q1": 0.9 * seconds, "q3": 1.2 * seconds, "least": 0.9 * seconds,
        "samples": 9, "calls": 1, "rounds": [seconds], "variant": "", "errors": {"y": 1e-7},
        "wrong_variants": [], "engines": ["numpy_gemm"], **more,
    }  # fmt: skip


def row(shape, own, torch, *, pass_="forward", kind="1x1", extra=2**20):
    peers = {"gpuconv": outcome(own)}
    if torch is not None:
        peers["torch"] = torch if isinstance(torch, dict) else outcome(torch, variant="NHWC")
    return {
        "shape": shape, "network": "", "kind": kind, "layer": "1x8x8x4, 1x1, 4", "dtype": "float32",
        "pass": pass_, "flops": 2_000_000_000, "bytes": 4_000_000, "floor": 0.005, "peers": peers,
        "memory": {"extra": extra, "limit": 256 * 2**20},
    }  # fmt: skip


#: What the files of the stored result are called.
STEM = "acme-9000-family-1-model-2-2-cores"


@pytest.fixture
def stored():
    """A result with numbers that can be followed by hand."""
    rows = [
        row("a", 0.01, 0.02),
        row("b", 0.01, 0.08, extra=3 * 2**20),
        row("c", 0.01, 0.005, kind="depthwise"),
        row("d", 0.01, {"wrong": {"NCHW": {"y": math.inf}}}, kind="depthwise"),
        row("e", 0.01, {"left_out": "it cannot"}),
        row("small", 2e-5, 3e-5, kind="call overhead"),
        row("a", 0.02, 0.06, pass_="train", extra=300 * 2**20),
        row("c", 0.02, {"failed": "torch: it died"}, pass_="train", kind="depthwise"),
    ]
    return {
        "schema": 1, "date": "2026-03-04T05:06:07+00:00", "seconds": 1.0,
        "machine": {
            "cpu": "ACME 9000 8-Core Processor @ 3.00GHz", "family": "1", "model": "2", "cores": 2,
            "architecture": "x86_64", "memory_bytes": 2**34, "system": "Linux", "python": "3.12.0",
            "blas": {"internal_api": "openblas", "version": "1", "architecture": "Zen"},
            "peak_flops": {"float32": 4e11}, "bandwidth_bytes": 4e10,
        },
        "options": {
            "shapes": ["a"], "dtypes": ["float32"], "passes": ["forward", "train"], "threads": 2,
            "repeat": 5, "seconds": 0.4,
        },
        "peers": {
            "gpuconv": {"versions": {"gpuconv": "1", "numpy": "2"}},
            "torch": {"versions": {"torch": "3", "onednn": "x"}},
            "jax": {"missing": "JAX is not installed"},
        },
        "rows": rows,
        "scaling": [
            {
                "shape": "a", "fixed": "8x8", "dtype": "float32", "pass": "forward",
                "axis": "batch", "values": [1, 2], "flops": [1, 2],
                "seconds": {"gpuconv": [1.0, 2.0], "torch": [1.0, None]},
                "exponent": {"gpuconv": 1.0, "torch": None},
            }
        ],
    }  # fmt: skip


def test_geometric_means(stored):
    assert report.geometric_mean([2, 8]) == pytest.approx(4)
    assert report.geometric_mean([]) is None
    values = np.random.default_rng(0).uniform(0.1, 9, 50)
    assert report.geometric_mean(values) == pytest.approx(statistics.geometric_mean(values))
    forward = [r for r in stored["rows"] if r["pass"] == "forward"]
    means = report.means(forward, "torch")
    assert means["all"] == (pytest.approx(2.0), 0.5, "c", 3)  # of 2, 8 and 0.5; not the tiny call
    assert means["1x1"] == (pytest.approx(4.0), 2.0, "a", 2)
    assert means["depthwise"] == (pytest.approx(0.5), 0.5, "c", 1)
    assert means["call overhead"] == (pytest.approx(1.5), pytest.approx(1.5), "small", 1)


def test_ratios(stored):
    a, *_, died = stored["rows"]
    assert report.ratio(a, "torch") == 2.0
    assert report.spread(a, "torch") == (pytest.approx(1.8 / 1.2), pytest.approx(2.4 / 0.9))
    assert report.ratio(died, "torch") is None
    assert report.spread(died, "torch") is None
    assert report.ratio(a, "jax") is None
    assert report.compared(stored) == ["torch"]
    assert report.baseline(stored) == "torch"


def cells(text, start):
    """Return the cells of the table's line that starts so."""
    line = next(x for x in text.splitlines() if x.startswith(f"| {start} "))
    return [c.strip() for c in line.strip("|").split("|")]


def test_page(stored):
    text = report.markdown(stored)
    assert text.startswith(
        "# Benchmark: ACME 9000 8-Core Processor @ 3.00GHz (family 1, model 2), 2 cores\n"
    )
    assert "2026-03-04, 2 threads for every peer" in text
    assert "gpuconv 1, numpy 2, torch 3; NumPy's BLAS: openblas 1 (Zen)" in text
    assert "matrix product 400 GFLOP/s float32; copy 40.0 GB/s" in text
    assert "- left out: JAX is not installed" in text
    forward = text[text.index("## float32, forward, with bias") :]
    assert cells(forward, "**all**") == ["**all**", "5", "2.00 (least 0.50) of 3"]
    assert cells(forward, "depthwise") == ["depthwise", "2", "0.50 of 1"]
    assert cells(forward, "a") == [
        "a", "1x8x8x4, 1x1, 4", "2", "4", "200", "0.4", "50%", "numpy_gemm", "2.00 (1.50–2.67)",
        "1.0",
    ]  # fmt: skip
    assert cells(forward, "d")[8] == "wrong"
    assert cells(forward, "e")[8] == "–"
    train = text[text.index("## float32, forward and all gradients") :]
    assert cells(train, "c")[8] == "failed"
    overhead = text[text.index("## Fixed cost of a call") :]
    assert cells(overhead, "1x8x8x4, 1x1, 4") == [
        "1x8x8x4, 1x1, 4", "float32", "forward", "20.0", "30.0"
    ]  # fmt: skip
    assert "at most 300.0 MiB (a, train)" in text
    assert "Over the limit: a (train)." in text
    assert cells(text[text.index("## Cost") :], "a, 8x8")[-2:] == ["1.000", "–"]
    wrong = text[text.index("## Failures") :]
    assert "- PyTorch, d, float32, forward: wrong result, error inf" in wrong
    assert "- PyTorch, c, float32, train: torch: it died" in wrong
    assert "not to be relied on" not in text
    stored["machine"]["busy_cores"] = 1.25
    assert "- **not to be relied on**: 1.2 cores were at work for others" in report.markdown(stored)
    lines = [x for x in text.splitlines() if x.startswith("|")]
    assert all(x.endswith("|") for x in lines)


def test_files(stored, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    files = report.write(stored, tmp_path / "results")
    assert sorted(f.name.removeprefix(STEM) for f in files) == [
        "-float32-ratio.png", "-float32-roofline.png", "-float32-scaling.png", ".json", ".md",
    ]  # fmt: skip
    again = json.loads(files[0].read_text())
    wrong = again["rows"][3]["peers"]["torch"]["wrong"]["NCHW"]
    assert wrong == {"y": None}  # infinity is no JSON
    assert "error not finite" in report.markdown(again)
    for file in files[2:]:
        assert f"![{file.stem}]({file.name})" in files[1].read_text()
        image = matplotlib.imread(file)
        assert min(image.shape[:2]) > 200
        assert 0.01 < (image[..., :3].min(-1) < 0.8).mean() < 0.5  # something is drawn on white
    both = {**stored, "options": {**stored["options"], "dtypes": ["float64"]}}
    files = report.write({**both, "rows": []}, tmp_path, plots=False)
    assert [f.name for f in files] == [f"{STEM}-float64.json", f"{STEM}-float64.md"]


def test_plots_of_a_run_without_peers(stored, tmp_path):
    pytest.importorskip("matplotlib")
    for entry in stored["rows"]:
        del entry["peers"]["torch"]
    del stored["peers"]["torch"]
    files = report.write(stored, tmp_path)
    names = [f.name.removeprefix(f"{STEM}-float32-") for f in files[2:]]
    assert names == ["scaling.png", "roofline.png"]
    assert "No peer to compare with." in files[1].read_text()


@pytest.mark.parametrize(
    ("cpu", "cores", "want"),
    [
        ("AMD EPYC 9354 32-Core Processor", 2, "amd-epyc-9354-2-cores"),
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", 1, "intel-xeon-e5-2690-v4-1-core"),
        ("", 4, "cpu-4-cores"),
        ("../../etc", 4, "etc-4-cores"),
    ],
)
def test_file_names(cpu, cores, want):
    assert machine.slug({"cpu": cpu, "cores": cores}) == want


def test_processors_of_one_name_are_told_apart():
    old, new = ({"cpu": "AMD EPYC", "cores": 2, "family": f, "model": "1"} for f in ("25", "26"))
    assert machine.slug(old) == "amd-epyc-family-25-model-1-2-cores"
    assert machine.slug(new) != machine.slug(old)
    assert machine.title(new) == "AMD EPYC (family 26, model 1)"
