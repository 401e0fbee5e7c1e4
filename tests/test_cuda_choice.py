"""Which CUDA engine is chosen for what, on the facts of GPUs that are not here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuconv
from benchmarks.predict import GPUS, Absent, assumed
from gpuconv import dispatch
from gpuconv.cuda import architecture, runtime
from gpuconv.cuda.architecture import GPU
from gpuconv.engines.base import PASSES
from gpuconv.problem import CHANNELS_FIRST, ConvProblem
from tests.support import case, close, compute, home, host, real_gpu, tolerance

H100, T4 = GPUS["H100"], GPUS["T4"]
PRODUCTS = {"cuda_implicit_gemm", "cuda_gemm"}


def layer(
    batch: int, inputs: int, outputs: int, size: int, kernel: int, stride: int = 1,
    dilation: int = 1, groups: int = 1, **options: Any,
) -> ConvProblem:  # fmt: skip
    """Return a square layer that keeps its size but for the stride."""
    pad = dilation * (kernel - 1) // 2
    return ConvProblem(
        batch, inputs, outputs, (size,) * 2, (kernel,) * 2, (stride,) * 2, ((pad, pad),) * 2,
        (dilation,) * 2, groups, **options,
    )  # fmt: skip


#: Layers of usual networks, and who may be chosen for them, in every pass.
LAYERS: dict[str, tuple[ConvProblem, set[str]]] = {
    "3x3, 64 channels": (layer(32, 64, 64, 56, 3), {"cuda_winograd"}),
    "3x3, 256 channels": (layer(32, 256, 256, 14, 3), {"cuda_winograd"}),
    "3x3, channels first": (layer(32, 64, 64, 56, 3, layout=CHANNELS_FIRST), {"cuda_winograd"}),
    "3x3, float64": (layer(8, 64, 64, 56, 3, dtype="float64"), {"cuda_winograd"}),
    "3x3, float16": (layer(32, 64, 64, 56, 3, dtype="float16"), {"cuda_tensor_core"}),
    "3x3, bfloat16": (layer(32, 64, 64, 56, 3, dtype="bfloat16"), {"cuda_tensor_core"}),
    "1x1": (layer(32, 256, 64, 56, 1), PRODUCTS),
    "1x1, float16": (layer(32, 256, 64, 56, 1, dtype="float16"), {"cuda_tensor_core", "cuda_gemm"}),
    "stride 2": (layer(32, 64, 128, 56, 3, 2), PRODUCTS),
    "7x7 stem": (layer(32, 3, 64, 224, 7, 2), PRODUCTS),
    "dilation": (layer(8, 512, 512, 33, 3, dilation=12), PRODUCTS),
    "depthwise": (layer(32, 144, 144, 56, 3, groups=144), {"cuda_depthwise"}),
    "depthwise, float16": (
        layer(32, 144, 144, 56, 3, groups=144, dtype="float16"), {"cuda_depthwise"}
    ),
    "depthwise, stride 2": (layer(32, 96, 96, 112, 3, 2, groups=96), {"cuda_depthwise"}),
}  # fmt: skip


def chosen(problem: ConvProblem) -> list[str]:
    return [dispatch.choose(problem, pass_, "cuda").name for pass_ in PASSES]


@contextmanager
def precision(value: str) -> Iterator[None]:
    before = gpuconv.get_precision()
    gpuconv.set_precision(value)
    try:
        yield
    finally:
        gpuconv.set_precision(before)


@pytest.mark.parametrize("name", LAYERS)
def test_each_engine_is_chosen_for_what_it_is_made_for(name: str) -> None:
    problem, engines = LAYERS[name]
    with assumed(H100):
        assert set(chosen(problem)) <= engines


def test_strict_precision_leaves_winograd_out_and_tf32_lets_tensor_cores_in() -> None:
    with assumed(H100):
        for problem, _ in LAYERS.values():
            with precision("strict"):
                assert "cuda_winograd" not in chosen(problem)
                assert "cuda_tensor_core" not in chosen(problem) or problem.itemsize == 2
        with precision("tf32"):
            assert set(chosen(layer(32, 64, 64, 56, 3))) == {"cuda_tensor_core"}
            assert set(chosen(layer(32, 64, 64, 56, 3, dtype="float64"))) == {"cuda_winograd"}


def test_tensor_cores_are_for_gpus_that_have_them() -> None:
    half, brain = (layer(32, 64, 64, 56, 3, dtype=d) for d in ("float16", "bfloat16"))
    for name, gpu in GPUS.items():
        with assumed(gpu):
            for problem, needs in ((half, 75), (brain, 80)):
                has = "cuda_tensor_core" in chosen(problem)
                assert has == (gpu.capability >= needs), (name, problem.dtype)


def test_complex_numbers_have_no_engine_and_the_error_says_why() -> None:
    problem = layer(2, 8, 8, 9, 3, dtype="complex64")
    with assumed(H100), pytest.raises(dispatch.EngineError, match="not complex64") as error:
        dispatch.choose(problem, "forward", "cuda")
    for name in ("cuda_atomic", "cuda_gemm", "cuda_implicit_gemm", "cuda_winograd"):
        assert f"{name}: it computes float16, bfloat16, float32, float64" in str(error.value)


def test_what_asks_for_a_library_is_left_out_where_it_is_missing() -> None:
    """Winograd's products are cuBLAS's as well as those of cuda_gemm."""
    with assumed(H100):
        del runtime.cupy().cuda.cublas
        dispatch.clear()
        found = {name for problem, _ in LAYERS.values() for name in chosen(problem)}
        assert found == {"cuda_implicit_gemm", "cuda_tensor_core", "cuda_depthwise"}


# ------------------------------------------------------------------------------------ properties


@st.composite
def layers(draw: Any) -> ConvProblem:
    kernel = draw(st.sampled_from([1, 3, 3, 5, 7]))
    groups = draw(st.sampled_from([1, 1, 2, 32]))
    inputs, outputs = (groups * draw(st.sampled_from([1, 3, 8, 17, 64])) for _ in range(2))
    return layer(
        draw(st.sampled_from([1, 2, 3, 8])), inputs, outputs, draw(st.integers(7, 60)), kernel,
        draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2])), groups,
        dtype=draw(st.sampled_from(["float32", "float16", "float64", "bfloat16"])),
        layout=draw(st.sampled_from(["channels_last", CHANNELS_FIRST])),
    )  # fmt: skip


def least(problem: ConvProblem, pass_: Any) -> float:
    """Return the least prediction of those that are not there to be read."""
    return min(
        c.seconds
        for c in dispatch.candidates(problem, pass_, "cuda")
        if not c.reason and not dispatch.get_engine(c.engine).reference
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(layers(), st.sampled_from(PASSES))
def test_the_cheapest_is_chosen_and_never_what_is_there_to_be_read(
    problem: ConvProblem, pass_: Any
) -> None:
    with assumed(H100):
        made = dispatch.choose(problem, pass_, "cuda")
        assert made.name != "cuda_atomic"
        assert made.cost(problem, pass_) == least(problem, pass_)
        assert made.workspace(problem, pass_) <= gpuconv.get_workspace_limit()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(layers(), st.sampled_from(PASSES), st.sampled_from(sorted(GPUS)))
def test_more_work_takes_no_less_and_a_better_gpu_no_more(
    problem: ConvProblem, pass_: Any, name: str
) -> None:
    gpu = GPUS[name]
    with assumed(gpu):
        once = least(problem, pass_)
        assert least(replace(problem, batch=4 * problem.batch), pass_) >= once
    better = replace(gpu, clock=2 * gpu.clock, bandwidth=2 * gpu.bandwidth)
    with assumed(gpu), pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "_gpu", lambda device: better)
        assert architecture.gpu() is better
        assert least(problem, pass_) <= once


# --------------------------------------------------------------------------- one GPU and another


class _Two(Absent):
    """Two GPUs that differ, of which the second may be the current one."""

    def __init__(self, *gpus: GPU) -> None:
        super().__init__(gpus[0], 0)
        single = [Absent(gpu, index).cuda.Device() for index, gpu in enumerate(gpus)]
        self.current = 0
        self.cuda.Device = lambda which=0: single[which]
        self.cuda.runtime = SimpleNamespace(
            **{**vars(self.cuda.runtime), "getDevice": lambda: self.current}
        )


@contextmanager
def machine(*gpus: GPU) -> Iterator[_Two]:
    before, made = runtime.installed(), _Two(*gpus)
    runtime.install(made)
    try:
        yield made
    finally:
        if before is None:
            runtime.uninstall()
        else:
            runtime.install(before)


def test_each_gpu_of_a_machine_has_its_own_choice() -> None:
    """A choice made for one must not be taken for the other, whatever was chosen before."""
    alone = []
    for gpu in (H100, T4):
        with machine(gpu):
            alone.append({problem: chosen(problem) for problem, _ in LAYERS.values()})
    assert alone[0] != alone[1]
    order = [(index, problem) for index in (0, 1) for problem, _ in LAYERS.values()]
    for seed in range(3):
        random.Random(seed).shuffle(order)
        with machine(H100, T4) as both:
            for both.current, problem in order:
                assert chosen(problem) == alone[both.current][problem], (both.current, problem)


@pytest.mark.parametrize(
    ("engine", "size"),
    [("cuda_winograd", (12, 60, 60, 1)), ("cuda_gemm", (12, 40, 40, 4)),
     ("cuda_implicit_gemm", (2, 40, 40, 4))],
)  # fmt: skip
def test_what_is_prepared_is_kept_by_the_facts_of_the_gpu(
    engine: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared for a GPU of one multiprocessor, and asked for again where there are 132."""
    if real_gpu():
        pytest.skip("looks at what the stand-in for CuPy records")
    c = case("many", size, (3, 3, size[-1], 2), padding=1)
    with home(engine) as cp, gpuconv.engine(engine):
        grids = []
        for facts in (architecture.gpu(), H100, architecture.gpu()):
            monkeypatch.setattr(architecture, "gpu", lambda device=None, facts=facts: facts)
            cp.settings.launches.clear()
            products = len(cp.cuda.cublas.products)
            for got, want in compute(cp, c, "float32", "numpy_gemm"):
                close(host(got), want, tolerance(engine, "float32", 12 * 60 * 60))
            grids.append((list(cp.settings.launches), cp.cuda.cublas.products[products:]))
        assert grids[0] == grids[2]
        assert grids[0] != grids[1]
