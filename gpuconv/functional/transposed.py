"""Transposed convolutions over one, two and three spatial axes, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuconv.activations import Activation
from gpuconv.functional.passes import NEEDS
from gpuconv.functional.plan import Ints, Padding
from gpuconv.functional.transposed_passes import conv_transpose, conv_transpose_backward

__all__ = [
    "conv_transpose1d",
    "conv_transpose1d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "conv_transpose3d",
    "conv_transpose3d_backward",
]

Array = Any


def conv_transpose2d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Compute ``act(z + b)``, where ``z`` is the input gradient of a convolution given ``x``.

    It makes images larger where the convolution of the same stride makes them smaller (also
    known as deconvolution, or fractionally strided convolution).

    Parameters
    ----------
    x : ndarray
        ``(batch, rows, columns, in_ch)``, or ``(batch, in_ch, rows, columns)`` for NCHW. Dtypes
        and libraries are those of :func:`conv2d`.
    w : ndarray
        ``(kernel_rows, kernel_columns, in_ch, out_ch // groups)``, or, as in PyTorch,
        ``(in_ch, out_ch // groups, kernel_rows, kernel_columns)`` for NCHW.
    b : ndarray, optional
        ``(out_ch,)``.
    stride, dilation : int or pair of int
        Of the convolution that this transposes.
    padding : int, pair, pair of pairs, "same" or "valid"
        The zeros of that convolution: so many cells are missing on each side of the result.
        ``"same"``: the result has ``in * stride`` cells.
    output_padding : int or pair of int
        Cells added at the end of each axis; less than the stride or the dilation. Where several
        sizes lead to ``x`` by the convolution, it says which of them the result has.
    groups, layout, activation, out
        As for :func:`conv2d`.

    Returns
    -------
    y : ndarray
        With ``(in - 1) * stride - before - after + dilation * (kernel - 1) + output_padding + 1``
        cells per spatial axis and ``out_ch`` channels.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; the message names it and says what is allowed.
    EngineError
        If the engine forced by :func:`gpuconv.engine` cannot compute this.
    """
    return conv_transpose(
        2, x, w, b, stride, padding, output_padding, dilation, groups, layout, activation, out
    )


def conv_transpose2d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    needs: Iterable[str] = NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv_transpose2d` with respect to ``x``, ``w`` and ``b``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output, of the output's shape.
    x, w : ndarray
        The forward's inputs.
    y : ndarray, optional
        The forward's result; with ``activation`` only.
    activation : Activation or str, optional
        The forward's. Its derivative must follow from its output, which rules out GELU.
    stride, padding, output_padding, dilation, groups, layout
        As in the forward.
    needs : iterable of {"x", "w", "b"}
        The gradients to compute.

    Returns
    -------
    dx, dw, db : ndarray or None
        Of the shapes of ``x``, ``w`` and ``(out_ch,)``; None for what ``needs`` leaves out.
    """
    return conv_transpose_backward(
        2, dy, x, w, y, activation, stride, padding, output_padding, dilation, groups, layout,
        needs,
    )  # fmt: skip


def conv_transpose1d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Transpose a convolution over one spatial axis: see :func:`conv_transpose2d`.

    Parameters
    ----------
    x : ndarray
        ``(batch, columns, in_ch)``, or channels first, ``(batch, in_ch, columns)``.
    w : ndarray
        ``(kernel, in_ch, out_ch // groups)``, or channels first, ``(in_ch, out_ch // groups, kernel)``.
    b, stride, padding, output_padding, dilation, groups, layout, activation, out
        As for :func:`conv_transpose2d`.
    """
    return conv_transpose(
        1, x, w, b, stride, padding, output_padding, dilation, groups, layout, activation, out
    )


def conv_transpose1d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NWC",
    needs: Iterable[str] = NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv_transpose1d`; see :func:`conv_transpose2d_backward`."""
    return conv_transpose_backward(
        1, dy, x, w, y, activation, stride, padding, output_padding, dilation, groups, layout,
        needs,
    )  # fmt: skip


def conv_transpose3d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NDHWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Transpose a convolution over three spatial axes: see :func:`conv_transpose2d`.

    Parameters
    ----------
    x : ndarray
        ``(batch, depth, rows, columns, in_ch)``, or channels first, ``(batch, in_ch, depth, rows, columns)``.
    w : ndarray
        ``(*kernel, in_ch, out_ch // groups)``, or channels first, ``(in_ch, out_ch // groups, *kernel)``.
    b, stride, padding, output_padding, dilation, groups, layout, activation, out
        As for :func:`conv_transpose2d`.
    """
    return conv_transpose(
        3, x, w, b, stride, padding, output_padding, dilation, groups, layout, activation, out
    )


def conv_transpose3d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NDHWC",
    needs: Iterable[str] = NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv_transpose3d`; see :func:`conv_transpose2d_backward`."""
    return conv_transpose_backward(
        3, dy, x, w, y, activation, stride, padding, output_padding, dilation, groups, layout,
        needs,
    )  # fmt: skip
