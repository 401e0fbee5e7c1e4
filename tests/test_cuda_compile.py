"""NVRTC compiles every kernel for every architecture; no driver is needed.

Every set of kernels is compiled for an architecture of each generation, every variant at least once
(``tests/nvrtc.py`` tells the rule). Registers, spills, shared memory and the occupancy that
follows end up in a table behind the results; ``--ptxas FILE.csv`` (or ``.md``) compiles every
variant for every architecture and writes all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

from gpuconv.cuda import kernels, wgmma_tiles
from gpuconv.cuda.kernels import Variant
from gpuconv.cuda.tensor_tiles import TILES
from tests.nvrtc import (
    ARCHITECTURES,
    GENERATIONS,
    Nvrtc,
    Row,
    Usage,
    find,
    fitting,
    plan,
    remarks,
    rows,
    summary,
    usages,
    whole,
)

VARIANTS = list(kernels.variants())
#: Bytes that the readable reference may spill, in the variants that hold offsets in 64 bits or
#: run over three axes.
MOST_SPILLED = 64
#: Into which each architecture's work is cut, to share the cores.
PARTS = 1


@pytest.fixture
def nvrtc() -> Nvrtc:
    found = find()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def kind(variant: Variant) -> str:
    """Return what tells a variant's table row from another's."""
    defines = dict(variant.defines)
    layout = {"0": "NHWC", "1": "NCHW"}[defines.get("CHANNELS_FIRST", "0")]
    return f"{layout} {'64' if 'INDEX_64' in defines else '32'}-bit offsets"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("part", range(PARTS), ids=lambda i: f"part-{i + 1}")
def test_every_variant_compiles(
    nvrtc: Nvrtc,
    architecture: int,
    part: int,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    if architecture not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    every = pytestconfig.getoption("--ptxas", default=None) is not None
    mine = [v for v, a in plan(VARIANTS, every) if a == architecture]
    for variant in mine[part::PARTS]:
        status, log, binary = nvrtc.compile(
            variant.source, variant.file, variant.options, architecture
        )
        assert status == 0, f"{variant.options}\n{log}"
        assert f"for 'sm_{architecture}{'a' if variant.alone else ''}'" in log
        assert remarks(log) == [], variant.options
        if variant.alone:
            assert "(C75" not in log, "products of a warpgroup wait for each other"
            assert " 0 bytes stack frame" in log, "tensor maps are copied to the stack"
        for name in variant.functions:
            assert name.encode() in binary
        found = list(usages(log, binary))
        assert {u.kernel for u in found} == set(variant.functions)
        defines = dict(variant.defines)
        wide = "INDEX_64" in defines or defines.get("NDIM") == "3"
        readable = variant.file == "conv_atomic.cu"
        for usage in found:
            allowed = MOST_SPILLED if wide and readable else 0
            assert usage.spilled <= allowed, (variant.options, usage)
        for row in rows(variant, architecture, found):
            assert row.blocks > 0, row
            record_property("ptxas", json.dumps(asdict(row)))


def test_every_variant_is_compiled_and_every_kernel_in_each_generation() -> None:
    planned = plan(VARIANTS)
    assert {a for _, a in planned} == set(ARCHITECTURES)
    assert sorted(a for generation in GENERATIONS for a in generation) == ARCHITECTURES
    for variant in VARIANTS:
        mine = [a for v, a in planned if v == variant]
        assert len(mine) == len(set(mine)) >= 1
        for name in variant.functions:
            reached = {a for v, a in planned if name in v.functions}
            able = {a for v in VARIANTS if name in v.functions for a in fitting(v)}
            for generation in GENERATIONS:
                assert bool(reached & set(generation)) == bool(able & set(generation)), name
    assert len(plan(VARIANTS, every=True)) == sum(len(fitting(v)) for v in VARIANTS)


def test_products_of_a_warpgroup_that_wait_for_each_other_are_seen(nvrtc: Nvrtc) -> None:
    """Where it cannot leave the sums where they are, ptxas puts a wait behind each product."""
    variant = next(v for v in VARIANTS if v.file == "conv_wgmma.cu")
    touched = "    sums[0][3] += 1;\n    wgmma_wait<1>();"
    source = variant.source.replace("    wgmma_wait<1>();", touched)
    status, log, _ = nvrtc.compile(source, variant.file, variant.options, 90)
    assert status == 0
    assert "(C75" in log


def test_a_variant_that_no_architecture_can_run() -> None:
    with pytest.raises(ValueError, match="no architecture has what"):
        plan([replace(VARIANTS[0], capability=999)])


def test_the_variants_hold_every_kernel_dtype_layout_index_and_activation() -> None:
    names = {name for v in VARIANTS for name in v.functions}
    kinds_of_kernels = [("2d", t) for t in ("bf16", "f16", "f32", "f64")]
    kinds_of_kernels += [("1d", "f32"), ("3d", "f32")]
    on_tensor_cores = {n for n in names if "_tensor_" in n}
    passes = {n.removeprefix("conv_").split("_tensor_")[0] for n in on_tensor_cores}
    assert passes == {"forward", "input_grad", "weight_grad"}
    types = {n.split("_tensor_")[1].split("_")[0] for n in on_tensor_cores}
    assert types == {"f16", "bf16", "tf32"}
    assert {n.rsplit("_", 1)[1] for n in on_tensor_cores} == set(map(str, TILES))
    by_wgmma = {n for n in names if "_wgmma_" in n}
    kinds_of = {tuple(n.removeprefix("conv_").split("_wgmma_")) for n in by_wgmma}
    assert {(p, rest.split("_")[0]) for p, rest in kinds_of} == {
        (p, t) for p in passes for t in types
    } - {("weight_grad", "tf32")}
    assert {rest.split("_")[1] for _, rest in kinds_of} == set(map(str, wgmma_tiles.TILES))
    assert names - on_tensor_cores - by_wgmma == {
        f"conv{nd}_{p}_atomic_{t}" for p in ("forward", "backward") for nd, t in kinds_of_kernels
    } | {
        f"batch_norm_{part}_{t}"
        for part in ("moments", "normalize", "grad_sums", "grad")
        for t in ("bf16", "f16", "f32", "f64")
    } | {
        f"epilogue_{part}_{t}"
        for part in ("grad_last", "grad_first", "bias_sums")
        for t in ("bf16", "f16", "f32", "f64")
    } | {
        f"conv{nd}_depthwise_{p}_{t}"
        for p, kinds_of in {
            "forward": ("1d f16", "1d f32", "1d f64", "2d bf16", "2d f16", "2d f32", "3d f32"),
            "input_grad": ("1d f16", "1d f32", "2d bf16", "2d f32"),
            "input_gather": ("2d f32",),
            "weight_grad": ("1d bf16", "1d f16", "1d f32", "1d f64", "2d f32"),
            "weight_sums": ("1d bf16", "1d f16", "1d f32", "1d f64", "2d f32"),
        }.items()
        for nd, t in map(str.split, kinds_of)
    } | {
        f"conv2d_winograd_{part}_{t}"
        for part in ("filters", "input", "gradient", "filter_grad", "output")
        for t in ("bf16", "f16", "f32", "f64")
    } | {
        f"conv_{part}_{t}"
        for part in ("im2col", "col2im", "bias_activation", "split_sum")
        for t in ("bf16", "f16", "f32", "f64")
    } | {
        "conv2d_forward_gemm_128x128_f32", "conv2d_input_grad_gemm_128x128_f32",
        "conv2d_weight_grad_gemm_128x128_f32", "conv2d_weight_grad_gemm_128x64_f32",
        "conv2d_input_grad_gemm_64x64_f32", "conv2d_forward_gemm_128x32_f32",
        "conv1d_forward_gemm_32x32_f32", "conv3d_input_grad_gemm_32x32_f32",
        "conv2d_forward_gemm_64x64_f64", "conv2d_weight_grad_gemm_64x32_f64",
        "conv2d_input_grad_gemm_32x32_f64", "conv2d_forward_gemm_64x64_f16",
        "conv2d_weight_grad_gemm_64x64_bf16",
    }  # fmt: skip
    kinds = {(v.dtype, kind(v)) for v in VARIANTS}
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        for which in ("NHWC 32-bit offsets", "NCHW 32-bit offsets", "NHWC 64-bit offsets"):
            assert (dtype, which) in kinds
    codes = {int(dict(v.defines)["ACT"]) for v in VARIANTS}
    assert codes == set(range(13))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('extern "C" __global__ void f(float* y) { y[0] = nothing; }', "undefined"),
        ('extern "C" __global__ void f(float* y) { std::vector<int> v; }', "std"),
        ('#include <vector>\nextern "C" __global__ void f(float* y) {}', "vector"),
    ],
)
def test_what_is_wrong_does_not_compile(nvrtc: Nvrtc, source: str, complaint: str) -> None:
    status, log, binary = nvrtc.compile(source, "broken.cu", ("-std=c++17",), 80)
    assert status != 0
    assert complaint in log
    assert binary == b""


def test_spills_are_seen(nvrtc: Nvrtc) -> None:
    """A kernel that needs more registers than it may have."""
    source = """
    extern "C" __global__ void __launch_bounds__(1024, 2) f(const float* x, float* y, int n) {
      float v[64];
      for (int i = 0; i < 64; i++) v[i] = x[threadIdx.x * 64 + i];
      for (int k = 0; k < n; k++)
        for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i + 7) % 64] + x[k];
      for (int i = 0; i < 64; i++) y[threadIdx.x * 64 + i] = v[i];
    }"""
    status, log, binary = nvrtc.compile(source, "spills.cu", ("-std=c++17",), 80)
    assert status == 0, log
    (usage,) = usages(log, binary)
    assert usage.spilled > 0
    assert usage.registers <= 32
    assert usage.threads == 1024


def test_shared_memory_threads_and_occupancy_are_seen(nvrtc: Nvrtc) -> None:
    """A block of 128 threads with 48 KiB: four fit the 228 KiB of 9.0, three the 164 of 8.0."""
    source = """
    extern "C" __global__ void __launch_bounds__(128) f(float* y) {
      __shared__ float s[8192];
      s[threadIdx.x] = y[threadIdx.x];
      __syncthreads();
      y[threadIdx.x] = s[127 - threadIdx.x];
    }"""
    variant = Variant("f.cu", "float32", (("A", "1"),), ("f",), shared_bytes=16384)
    found = {}
    for architecture in (75, 80, 90):
        status, log, binary = nvrtc.compile(source, "f.cu", ("-std=c++17",), architecture)
        assert status == 0, log
        (usage,) = usages(log, binary)
        assert (usage.threads, usage.shared, usage.spilled) == (128, 32768, 0)
        (found[architecture],) = rows(variant, architecture, [usage])
    assert [r.shared for r in found.values()] == [49152] * 3
    assert {a: r.blocks for a, r in found.items()} == {75: 1, 80: 3, 90: 4}
    assert [r.occupancy for r in found.values()] == [4 / 32, 12 / 64, 16 / 64]
    lines = summary(found.values())
    assert lines[0].split()[-3:] == ["sm_75", "sm_80", "sm_90"]
    assert lines[1].split()[:4] == ["f", "1", "128", "48"]
    assert [c.split()[0] for c in lines[1].split(" / ")[1:]] == ["12", "19", "25"]


def test_the_table_shows_the_range_over_variants() -> None:
    usage = Usage("k", 40, 0, 1024, 256)
    variants = [Variant("k.cu", "float32", (("N", str(n)),), ("k",)) for n in range(3)]
    found = [
        row
        for n, v in enumerate(variants)
        for row in rows(v, 80, [replace(usage, registers=40 + 40 * n, spilled=8 * (n == 2))])
    ]
    assert summary(found)[1].split() == ["k", "3", "256", "1", "40-120+8", "/", "25-75"]
    assert summary([]) == []
    text = whole(found, markdown=False).splitlines()
    assert text[0] == ",".join(Row.__dataclass_fields__)
    assert text[1:] == [
        f"k.cu,k,N={n},80,256,{40 + 40 * n},{8 * (n == 2)},1024,{b},{b / 8:.3f}"
        for n, b in enumerate((6, 3, 2))
    ]
    table = whole(found, markdown=True).splitlines()
    assert len(table) == 5
    assert all(line.count("|") == 11 for line in table)
