"""Layers with numpy-ml's contract: forward, backward, update, on the CPU or on a GPU."""

from gpuconv.layers.base import LayerBase
from gpuconv.layers.conv import Conv2D
from gpuconv.layers.dense import Flatten, FullyConnected
from gpuconv.layers.pool import Pool2D

__all__ = ["Conv2D", "Flatten", "FullyConnected", "LayerBase", "Pool2D"]
