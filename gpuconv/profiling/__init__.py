"""Where the time goes: named ranges, the built-in profiler, and NVIDIA's profilers around it.

    from gpuconv.profiling import Recorder

    with Recorder() as recorder:
        ...                       # convolutions, layers, training
    print(recorder.table())

``gpuconv profile`` does this from the command line, or starts nvprof, Nsight Systems or Nsight
Compute where one of them supports the device. Nothing of it costs anything while it is off:
:mod:`gpuconv.profiling.ranges` says how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuconv.profiling.ranges import named_ranges
    from gpuconv.profiling.recorder import Recorder

__all__ = ["Recorder", "named_ranges"]


def __getattr__(name: str) -> Any:
    # Layers and functional import the ranges; they need none of the rest.
    if name == "Recorder":
        from gpuconv.profiling.recorder import Recorder

        return Recorder
    if name == "named_ranges":
        from gpuconv.profiling.ranges import named_ranges

        return named_ranges
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
