"""The convolution that NumPy and CuPy do not have: one call, with gradients, on CPU and CUDA."""

from gpuconv._version import __version__
from gpuconv.device import Device, DeviceError, asarray, asnumpy, device, use_device
from gpuconv.dispatch import EngineError, engine, engines
from gpuconv.functional import conv2d, conv2d_backward, explain
from gpuconv.problem import ConvProblem
from gpuconv.settings import (
    deterministic,
    get_num_threads,
    get_precision,
    get_workspace_limit,
    set_num_threads,
    set_precision,
    set_workspace_limit,
)

__all__ = [
    "ConvProblem",
    "Device",
    "DeviceError",
    "EngineError",
    "__version__",
    "asarray",
    "asnumpy",
    "conv2d",
    "conv2d_backward",
    "deterministic",
    "device",
    "engine",
    "engines",
    "explain",
    "get_num_threads",
    "get_precision",
    "get_workspace_limit",
    "set_num_threads",
    "set_precision",
    "set_workspace_limit",
    "use_device",
]
