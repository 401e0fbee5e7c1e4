"""Networks: a list of layers, and well-known ones made of it."""

from gpuconv.models.sequential import Sequential

__all__ = ["Sequential"]
