"""The choice of tiles and of divided sums, and the predictions of CUDA engines beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from benchmarks.suite import load
from gpuconv import dispatch
from gpuconv.cuda import architecture
from gpuconv.cuda.architecture import GPU, resident_blocks
from gpuconv.cuda.tiles import DEPTH, TILES, Shape, choose
from gpuconv.engines.base import PASSES
from gpuconv.problem import ConvProblem
from tests.support import home

_H100 = GPU(architecture.architecture(90), 90, 132, 1.7e9, 3.35e12, 50 << 20)
_T4 = GPU(architecture.architecture(75), 75, 40, 1.5e9, 0.32e12, 4 << 20)
_L40S = GPU(architecture.architecture(89), 89, 142, 2.5e9, 0.86e12, 96 << 20)
GPUS = {"H100": _H100, "T4": _T4, "L40S": _L40S}
BLOCKS = ("float32", "float64")
ENGINES = ("cuda_gemm", "cuda_implicit_gemm")


def shape(rows: int, columns: int, inner: int, dtype: str = "float32") -> Shape:
    size = 8 if dtype == "float64" else 4
    count = (rows + columns) * inner + rows * columns
    return Shape(1, rows, columns, inner, dtype, size * count)


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[GPU]:
    """A GPU that is predicted for, in the place of the stand-in's."""
    with home("cuda_atomic"):
        monkeypatch.setattr(architecture, "gpu", lambda device=None: GPUS[request.param])
        dispatch.clear()
        yield GPUS[request.param]
    dispatch.clear()


@pytest.mark.parametrize("dtype", TILES)
def test_tiles_fit_every_architecture(dtype: str) -> None:
    for facts in architecture.ARCHITECTURES:
        for tile in TILES[dtype]:
            shared = tile.shared(8 if dtype == "float64" else 4)
            assert shared <= 48 * 1024
            assert tile.threads % 32 == 0
            assert tile.rows // tile.thread_rows % 4 == 0
            assert tile.columns // tile.thread_columns % 8 == 0
            registers = tile.registers(facts.capability)
            assert resident_blocks(facts, tile.threads, registers, shared) >= 1


def test_large_products_take_large_tiles_and_small_ones_are_divided() -> None:
    large = choose(_H100, shape(2**16, 512, 1024), 2**28)
    assert str(large.tile) in ("128x128", "128x64")
    assert large.parts == 1
    narrow = choose(_H100, shape(2**16, 24, 1024), 2**28)
    assert narrow.tile.columns == 32
    weights = choose(_H100, shape(576, 64, 2**16), 2**28)
    tiles = math.ceil(576 / weights.tile.rows) * math.ceil(64 / weights.tile.columns)
    assert tiles * weights.parts >= 0.5 * 132
    assert weights.length % DEPTH == 0
    assert (weights.parts - 1) * weights.length < 2**16 <= weights.parts * weights.length


def test_parts_stay_within_the_workspace() -> None:
    product = shape(576, 64, 2**16)
    assert choose(_H100, product, 4 * product.sum_bytes).parts <= 4
    assert choose(_H100, product, product.sum_bytes).parts == 1


def test_no_prediction_beats_the_floor(gpu: GPU) -> None:
    for layer in load():
        for dtype in BLOCKS:
            problem = layer.with_dtype(dtype).problem
            floor = max(problem.flops / gpu.flops(dtype), problem.bytes / gpu.bandwidth)
            for pass_ in PASSES:
                for name in ENGINES:
                    seconds = dispatch.get_engine(name).cost(problem, pass_)
                    assert floor < seconds < math.inf, (layer.name, dtype, pass_, name)


def test_what_is_there_to_be_read_is_not_chosen(gpu: GPU) -> None:
    for layer in load():
        for pass_ in PASSES:
            assert dispatch.choose(layer.problem, pass_, "cuda").name != "cuda_atomic"
    tiny = ConvProblem(1, 1, 1, (1,), (1,), (1,), ((0, 0),), (1,))
    assert dispatch.choose(tiny, "forward", "cuda").name != "cuda_atomic"


def test_more_work_takes_longer(gpu: GPU) -> None:
    for name in (*ENGINES, "cuda_atomic"):
        made = dispatch.get_engine(name)
        for pass_ in PASSES:
            times = []
            for batch in (1, 8, 64):
                pads = ((1, 1), (1, 1))
                problem = ConvProblem(
                    batch, 64, 64, (56, 56), (3, 3), (1, 1), pads, (1, 1), dtype="float32"
                )
                times.append(made.cost(problem, pass_))
            assert times == sorted(times), (name, pass_)
            assert times[2] > 3 * times[1], (name, pass_)
