"""Which engine computes a convolution, and what each would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuconv import dispatch
from gpuconv.activations import Activation
from gpuconv.device import Device, parse_device
from gpuconv.device import device as _default_device
from gpuconv.functional.plan import (
    LAYOUTS,
    Ints,
    Padding,
    activation_argument,
    dtype_argument,
    hashable,
    make_plan,
    shape_argument,
)

__all__ = ["explain"]


def explain(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    *,
    dtype: Any = "float32",
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "channels_last",
    activation: Activation | str | None = None,
    device: Device | str | None = None,
) -> dispatch.Explanation:
    """Return which engine would compute a convolution, and what each would cost.

    Parameters
    ----------
    x_shape, w_shape : sequence of int
        As for :func:`conv1d`, :func:`conv2d` or :func:`conv3d`: 3 to 5 numbers.
    dtype : dtype
        Of the arrays.
    stride, padding, dilation, groups, layout, activation
        As for :func:`conv2d`.
    device : Device or str, optional
        Where the arrays are; the default device if not given.

    Returns
    -------
    Explanation
        ``print`` it; or read its ``choice`` and ``passes``.
    """
    shapes = [shape_argument("x_shape", x_shape), shape_argument("w_shape", w_shape)]
    nd = len(shapes[0]) - 2
    if nd not in LAYOUTS:
        raise ValueError(f"x_shape is {tuple(x_shape)}; expected 3 to 5 axes")
    plan = make_plan(
        nd,
        shapes[0],
        shapes[1],
        dtype_argument(dtype),
        hashable(stride),
        hashable(padding),
        hashable(dilation),
        groups,
        layout,
        activation_argument(activation),
    )
    where = _default_device() if device is None else parse_device(device)
    return dispatch.explain(plan.problem, where.kind)
