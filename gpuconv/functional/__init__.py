"""The calls: convolutions and their gradients, on whatever device the arrays are on.

Here arguments are validated and described by a :class:`~gpuconv.problem.ConvProblem`; the
dispatcher picks an engine; the engine computes. Everything is written over the number of
spatial axes: ``plan`` has the checks, ``passes`` what is computed, the other modules the calls.
"""

from gpuconv.functional.convolution import (
    conv1d,
    conv1d_backward,
    conv2d,
    conv2d_backward,
    conv3d,
    conv3d_backward,
)
from gpuconv.functional.explanation import explain
from gpuconv.functional.forward_mode import conv1d_jvp, conv2d_jvp, conv3d_jvp
from gpuconv.functional.plan import hashable as _hashable
from gpuconv.functional.plan import make_plan as _plan
from gpuconv.functional.transposed import (
    conv_transpose1d,
    conv_transpose1d_backward,
    conv_transpose2d,
    conv_transpose2d_backward,
    conv_transpose3d,
    conv_transpose3d_backward,
)

__all__ = [
    "_hashable",
    "_plan",
    "conv1d",
    "conv1d_backward",
    "conv1d_jvp",
    "conv2d",
    "conv2d_backward",
    "conv2d_jvp",
    "conv3d",
    "conv3d_backward",
    "conv3d_jvp",
    "conv_transpose1d",
    "conv_transpose1d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "conv_transpose3d",
    "conv_transpose3d_backward",
    "explain",
]
