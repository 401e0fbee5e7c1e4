"""Several layers as one: the skip connections of numpy-ml, and the block of residual networks."""

from gpuconv.modules.base import ModuleBase
from gpuconv.modules.residual import ResidualBlock
from gpuconv.modules.skip import SkipConnectionConvModule, SkipConnectionIdentityModule

__all__ = [
    "ModuleBase", "ResidualBlock", "SkipConnectionConvModule", "SkipConnectionIdentityModule",
]  # fmt: skip
