"""NVRTC compiles every variant of every kernel for every architecture; no driver is needed.

The compiler comes from the wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 (headers).
Registers and spills, as ptxas reports them, end up in a table behind the results.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from gpuconv.cuda import kernels
from gpuconv.cuda.kernels import Variant
from gpuconv.cuda.tensor_tiles import TILES

ARCHITECTURES = [70, 75, 80, 86, 89, 90, 100, 120]
VARIANTS = list(kernels.variants())
#: What CuPy adds to the options of a RawModule. The first flushes float32's subnormals to zero.
CUPYS = ("-ftz=true", "--device-as-default-execution-space")
#: Bytes that the readable reference may spill, in the variants that hold offsets in 64 bits or
#: run over three axes.
MOST_SPILLED = 64


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    kernel: str
    registers: int
    spilled: int  # bytes stored and loaded


class Nvrtc:
    """The compiler, through its C interface."""

    def __init__(self, library: Path, include: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._include = include

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value]

    def architectures(self) -> list[int]:
        count = ctypes.c_int()
        self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._library.nvrtcGetSupportedArchs(found)
        return list(found)

    def compile(
        self, source: str, name: str, options: tuple[str, ...], architecture: int
    ) -> tuple[int, str, bytes]:
        """Return the status (0: well), the log and the binary for the architecture."""
        program = ctypes.c_void_p()
        self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
        flags = [*options, f"-arch=sm_{architecture}", f"-I{self._include}", *CUPYS, "-Xptxas=-v"]
        array = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
        status = self._library.nvrtcCompileProgram(program, len(flags), array)
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
        binary = b"" if status else self._text(program, "CUBIN")
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return status, log, binary


def folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def find() -> Nvrtc | str:
    """Return the compiler, or why there is none."""
    compiler, runtime = folder("nvidia.cuda_nvrtc"), folder("nvidia.cuda_runtime")
    if compiler is None:
        return "the wheel nvidia-cuda-nvrtc-cu12 is not installed"
    if runtime is None or not (runtime / "include" / "cuda_fp16.h").is_file():
        return "the wheel nvidia-cuda-runtime-cu12, with the headers, is not installed"
    for library in sorted((compiler / "lib").glob("libnvrtc.so*")):
        try:
            return Nvrtc(library, runtime / "include")
        except OSError as error:
            return f"NVRTC does not load: {error}"
    return "the wheel nvidia-cuda-nvrtc-cu12 holds no library"


@pytest.fixture
def nvrtc() -> Nvrtc:
    found = find()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def usages(log: str) -> Iterator[Usage]:
    for part in log.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert spills, part
        assert registers, part
        yield Usage(part.split("'")[0], int(registers[1]), int(spills[1]) + int(spills[2]))


def remarks(log: str) -> list[str]:
    """Return the warnings; that an architecture is old is none."""
    return [line for line in log.splitlines() if "warning" in line and "deprecated" not in line]


def kind(variant: Variant) -> str:
    """Return what tells a variant's table row from another's."""
    defines = dict(variant.defines)
    layout = {"0": "NHWC", "1": "NCHW"}[defines.get("CHANNELS_FIRST", "0")]
    return f"{layout} {'64' if 'INDEX_64' in defines else '32'}-bit offsets"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("half", [0, 1], ids=["first-half", "second-half"])  # to share the cores
def test_every_variant_compiles(
    nvrtc: Nvrtc, architecture: int, half: int, record_property: Callable[[str, object], None]
) -> None:
    if architecture not in nvrtc.architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    for variant in (v for v in VARIANTS[half::2] if v.capability <= architecture):
        status, log, binary = nvrtc.compile(
            variant.source, variant.file, variant.options, architecture
        )
        assert status == 0, f"{variant.options}\n{log}"
        assert remarks(log) == [], variant.options
        for name in variant.functions:
            assert name.encode() in binary
        found = list(usages(log))
        assert {u.kernel for u in found} == set(variant.functions)
        defines = dict(variant.defines)
        wide = "INDEX_64" in defines or defines.get("NDIM") == "3"
        for usage in found:
            assert usage.spilled <= (MOST_SPILLED if wide else 0), (variant.options, usage)
            row = f"{usage.kernel}  {kind(variant)}"
            record_property("ptxas", (row, architecture, usage.registers, usage.spilled))


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
    assert names - on_tensor_cores == {
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
        "conv_split_sums_f16", "conv_split_sums_f32",
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
    status, log, _ = nvrtc.compile(source, "spills.cu", ("-std=c++17",), 80)
    assert status == 0, log
    (usage,) = usages(log)
    assert usage.spilled > 0
    assert usage.registers <= 32
