"""Networks: a list of layers, and well-known ones made of it."""

from gpuconv.models.networks import MODELS, lenet5, make_model, resnet20, vgg_small
from gpuconv.models.sequential import Sequential

__all__ = ["MODELS", "Sequential", "lenet5", "make_model", "resnet20", "vgg_small"]
