"""Networks in files: gpuconv's own, PyTorch's ``state_dict``, and ONNX."""

from gpuconv.io.network import load, save
from gpuconv.io.onnx_export import OPSET, export_onnx
from gpuconv.io.torch_state import (
    from_state_dict,
    load_state_dict,
    save_state_dict,
    to_state_dict,
)

__all__ = [
    "OPSET", "export_onnx", "from_state_dict", "load", "load_state_dict", "save",
    "save_state_dict", "to_state_dict",
]  # fmt: skip
