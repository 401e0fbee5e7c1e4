"""Facts of GPUs and the occupancy that follows, against NVIDIA's published figures."""

from __future__ import annotations

import pytest

from gpuconv.cuda import architecture
from gpuconv.cuda.architecture import GPU, resident_blocks


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "clock", "float32", "float64", "half", "tf32"),
    [  # clocks at boost and dense rates in TFLOP/s as in the data sheets
        ("V100 SXM2", 70, 80, 1.53e9, 15.7, 7.8, 125, 0),
        ("T4", 75, 40, 1.59e9, 8.1, 0.25, 65, 0),
        ("A100 SXM", 80, 108, 1.41e9, 19.5, 9.7, 312, 156),
        ("A40", 86, 84, 1.74e9, 37.4, 0.58, 149.7, 74.8),
        ("L40S", 89, 142, 2.52e9, 91.6, 1.4, 362, 183),
        ("H100 SXM", 90, 132, 1.83e9, 62, 31, 989, 494),
    ],
)
def test_peaks_are_those_of_the_data_sheets(
    name: str, capability: int, multiprocessors: int, clock: float,
    float32: float, float64: float, half: float, tf32: float,
) -> None:  # fmt: skip
    gpu = GPU(architecture.architecture(capability), capability, multiprocessors, clock, 1e12, 0)
    assert gpu.flops("float32") / 1e12 == pytest.approx(float32, rel=0.05)
    assert gpu.flops("float64") / 1e12 == pytest.approx(float64, rel=0.05)
    assert gpu.flops("float16") == gpu.flops("float32")
    assert gpu.flops("float16", tensor_cores=True) / 1e12 == pytest.approx(half, rel=0.05)
    assert gpu.flops("float32", tensor_cores=True) / 1e12 == pytest.approx(tf32, rel=0.05)


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks"),
    [
        (80, 256, 32, 0, 8),  # warps: 64 of 8 a block
        (80, 256, 128, 0, 2),  # registers: 65536 / (256 * 128)
        (80, 256, 255, 0, 1),
        (80, 128, 64, 40 * 1024, 4),  # shared memory: 164 / 41 KiB
        (75, 256, 64, 0, 4),  # 32 warps
        (75, 256, 64, 33 * 1024, 1),
        (90, 128, 168, 227 * 1024, 1),
        (86, 32, 16, 0, 16),  # blocks
        (90, 128, 16, 228 * 1024, 0),  # more than one block may have
    ],
)
def test_occupancy(capability: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    facts = architecture.architecture(capability)
    assert resident_blocks(facts, threads, registers, shared) == blocks


def test_a_capability_between_two_has_the_older_ones_facts() -> None:
    assert architecture.architecture(87) == architecture.architecture(86)
    with pytest.raises(ValueError, match=r"compute capability is 6.1; .* 7.0 and later"):
        architecture.architecture(61)


def test_the_current_device_is_asked() -> None:
    from tests.support import home

    with home("cuda_atomic"):
        gpu = architecture.gpu()
        assert gpu.capability >= 70
        assert gpu.multiprocessors >= 1
        assert gpu.bandwidth > 0
