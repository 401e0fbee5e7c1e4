"""Layers with numpy-ml's contract: forward, backward, update, on the CPU or on a GPU."""

from gpuconv.layers.base import LayerBase
from gpuconv.layers.conv import Conv1D, Conv2D
from gpuconv.layers.deconv import Deconv2D
from gpuconv.layers.dense import Flatten, FullyConnected
from gpuconv.layers.elementwise import Add, Multiply, Softmax
from gpuconv.layers.interface import Layer
from gpuconv.layers.normalization import BatchNorm1D, BatchNorm2D, LayerNorm1D, LayerNorm2D
from gpuconv.layers.pool import Pool2D
from gpuconv.layers.wrappers import Dropout

__all__ = [
    "Add", "BatchNorm1D", "BatchNorm2D", "Conv1D", "Conv2D", "Deconv2D", "Dropout", "Flatten",
    "FullyConnected", "Layer", "LayerBase", "LayerNorm1D", "LayerNorm2D", "Multiply", "Pool2D",
    "Softmax",
]  # fmt: skip
