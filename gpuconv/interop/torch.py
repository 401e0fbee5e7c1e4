"""Convolutions that PyTorch differentiates, computed by gpuconv's engines.

Importing this module imports PyTorch. Tensors stay where they are: on the CPU they are seen as
NumPy arrays, on a CUDA device as CuPy arrays, over the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gpuconv.functional.passes import conv, conv_backward
from gpuconv.functional.plan import Ints, Padding
from gpuconv.functional.transposed_passes import conv_transpose, conv_transpose_backward

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]

Tensor = Any
_Pass = Callable[..., Any]


class _Convolution(torch.autograd.Function):  # type: ignore[misc]
    """A convolution or a transposed one, by its forward and backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        nd: int,
        passes: tuple[_Pass, _Pass],
        options: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.described = nd, passes[1], options
        return passes[0](nd, x, w, b, *options, None, None)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        nd, backward, options = ctx.described
        needs = [name for name, need in zip("xwb", ctx.needs_input_grad, strict=False) if need]
        gradients = backward(nd, dy, x, w, None, None, *options, needs)
        return (*gradients, None, None, None)


def _conv(
    nd: int,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    passes: tuple[_Pass, _Pass],
    options: tuple[Any, ...],
) -> Tensor:
    for name, tensor in (("x", x), ("w", w), ("b", b)):
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name != "b"):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    return _Convolution.apply(x, w, b, nd, passes, options)


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NCHW",
) -> Tensor:
    """Return :func:`gpuconv.conv2d` of tensors, differentiable once.

    Parameters
    ----------
    x, w : torch.Tensor
        As PyTorch lays them out unless ``layout`` says otherwise.
    b : torch.Tensor, optional
        ``(out_ch,)``.
    stride, padding, dilation, groups, layout
        As for :func:`gpuconv.conv2d`.

    Returns
    -------
    torch.Tensor
        On the device of ``x``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    options = stride, padding, dilation, groups, layout
    return _conv(2, x, w, b, (conv, conv_backward), options)


def conv1d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NCW",
) -> Tensor:
    """Return :func:`gpuconv.conv1d` of tensors, differentiable once; see :func:`conv2d`."""
    options = stride, padding, dilation, groups, layout
    return _conv(1, x, w, b, (conv, conv_backward), options)


def conv3d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NCDHW",
) -> Tensor:
    """Return :func:`gpuconv.conv3d` of tensors, differentiable once; see :func:`conv2d`."""
    options = stride, padding, dilation, groups, layout
    return _conv(3, x, w, b, (conv, conv_backward), options)


def conv_transpose2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NCHW",
) -> Tensor:
    """Return :func:`gpuconv.conv_transpose2d` of tensors, differentiable once.

    Parameters
    ----------
    x, w : torch.Tensor
        As PyTorch lays them out unless ``layout`` says otherwise.
    b : torch.Tensor, optional
        ``(out_ch,)``.
    stride, padding, output_padding, dilation, groups, layout
        As for :func:`gpuconv.conv_transpose2d`.

    Returns
    -------
    torch.Tensor
        On the device of ``x``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    options = stride, padding, output_padding, dilation, groups, layout
    return _conv(2, x, w, b, (conv_transpose, conv_transpose_backward), options)


def conv_transpose1d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NCW",
) -> Tensor:
    """Return :func:`gpuconv.conv_transpose1d` of tensors, differentiable once; see :func:`conv_transpose2d`."""
    options = stride, padding, output_padding, dilation, groups, layout
    return _conv(1, x, w, b, (conv_transpose, conv_transpose_backward), options)


def conv_transpose3d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NCDHW",
) -> Tensor:
    """Return :func:`gpuconv.conv_transpose3d` of tensors, differentiable once; see :func:`conv_transpose2d`."""
    options = stride, padding, output_padding, dilation, groups, layout
    return _conv(3, x, w, b, (conv_transpose, conv_transpose_backward), options)
