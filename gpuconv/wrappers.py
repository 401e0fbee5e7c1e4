"""What is wrapped around a layer, under the name that numpy-ml has it."""

from gpuconv.layers.wrappers import Dropout

__all__ = ["Dropout"]
