"""Convolutions over one, two and three spatial axes, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuconv.activations import Activation
from gpuconv.functional.passes import NEEDS, conv, conv_backward
from gpuconv.functional.plan import Ints, Padding

__all__ = ["conv1d", "conv1d_backward", "conv2d", "conv2d_backward", "conv3d", "conv3d_backward"]

Array = Any


def conv2d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve images with a bank of kernels: ``act(conv(x, w) + b)``.

    As everywhere in deep learning this is a cross-correlation; the kernel is not flipped.

    Parameters
    ----------
    x : ndarray
        ``(batch, rows, columns, in_ch)``, or ``(batch, in_ch, rows, columns)`` for NCHW.
        float16, bfloat16, float32, float64, complex64 or complex128; a NumPy array or a CuPy
        array, with any strides. Arrays of PyTorch and JAX are taken as they are, without a
        copy, and the result is theirs.
    w : ndarray
        ``(kernel_rows, kernel_columns, in_ch // groups, out_ch)``, or
        ``(out_ch, in_ch // groups, kernel_rows, kernel_columns)`` for NCHW.
    b : ndarray, optional
        ``(out_ch,)``.
    stride, dilation : int or pair of int
        Per spatial axis; ``dilation`` 1 is a dense kernel.
    padding : int, pair, pair of pairs, "same" or "valid"
        Zeros around the image: the same on all sides; ``(rows, columns)``;
        ``((top, bottom), (left, right))``; ``"same"``: the output has ``ceil(in / stride)``
        cells and an odd zero goes to the end; ``"valid"``: none.
    groups : int
        Channels are split into so many independent convolutions.
    layout : {"NHWC", "NCHW"}
        Also ``"channels_last"`` and ``"channels_first"``.
    activation : Activation or str, optional
        Applied to the result, such as ``"ReLU"`` or ``"LeakyReLU(alpha=0.1)"``; not to
        complex ones.
    out : ndarray, optional
        Where to put the result. It may overlap the inputs.

    Returns
    -------
    y : ndarray
        ``(batch, out_rows, out_columns, out_ch)`` or ``(batch, out_ch, out_rows,
        out_columns)``; of the dtype, the library and the device of ``x``. ``out`` where given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described; the message names it and says what is allowed.
    EngineError
        If the engine forced by :func:`gpuconv.engine` cannot compute this.
    """
    return conv(2, x, w, b, stride, padding, dilation, groups, layout, activation, out)


def conv2d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    needs: Iterable[str] = NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv2d` with respect to ``x``, ``w`` and ``b``.

    Those of complex arrays are PyTorch's: the direction of steepest ascent of a real loss,
    so ``dx`` is made with the conjugate of ``w`` and ``dw`` with that of ``x``.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to the output, of the output's shape: behind the activation
        where one is given, else of the plain convolution.
    x, w : ndarray
        The forward's inputs.
    y : ndarray, optional
        The forward's result; with ``activation`` only. For activations whose derivative
        depends on the sign alone (ReLU, LeakyReLU) the argument of the activation will do
        as well.
    activation : Activation or str, optional
        The forward's. Its derivative must follow from its output, which rules out GELU.
    stride, padding, dilation, groups, layout
        As in the forward.
    needs : iterable of {"x", "w", "b"}
        The gradients to compute.

    Returns
    -------
    dx, dw, db : ndarray or None
        Of the shapes of ``x``, ``w`` and ``(out_ch,)``; None for what ``needs`` leaves out.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    EngineError
        If the engine forced by :func:`gpuconv.engine` cannot compute this.
    """
    return conv_backward(
        2, dy, x, w, y, activation, stride, padding, dilation, groups, layout, needs
    )


def conv1d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve signals with a bank of kernels: :func:`conv2d` over one spatial axis.

    Parameters
    ----------
    x : ndarray
        ``(batch, columns, in_ch)``, or ``(batch, in_ch, columns)`` for NCW.
    w : ndarray
        ``(kernel, in_ch // groups, out_ch)``, or ``(out_ch, in_ch // groups, kernel)`` for NCW.
    padding : int, 1-tuple, pair in a tuple, "same", "valid" or "causal"
        ``"causal"``: all zeros stand in front, so that an output depends on no later input.
    layout : {"NWC", "NCW"}
        Also ``"channels_last"`` and ``"channels_first"``.
    b, stride, dilation, groups, activation, out
        As for :func:`conv2d`.

    Returns
    -------
    y : ndarray
        ``(batch, out_columns, out_ch)`` or ``(batch, out_ch, out_columns)``.
    """
    return conv(1, x, w, b, stride, padding, dilation, groups, layout, activation, out)


def conv1d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NWC",
    needs: Iterable[str] = NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv1d`, as :func:`conv2d_backward` does for two axes."""
    return conv_backward(
        1, dy, x, w, y, activation, stride, padding, dilation, groups, layout, needs
    )


def conv3d(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NDHWC",
    activation: Activation | str | None = None,
    out: Array | None = None,
) -> Array:
    """Convolve volumes with a bank of kernels: :func:`conv2d` over three spatial axes.

    Parameters
    ----------
    x : ndarray
        ``(batch, depth, rows, columns, in_ch)``, or ``(batch, in_ch, depth, rows, columns)``
        for NCDHW.
    w : ndarray
        ``(*kernel, in_ch // groups, out_ch)``, or ``(out_ch, in_ch // groups, *kernel)`` for
        NCDHW; the kernel's depth, rows and columns.
    layout : {"NDHWC", "NCDHW"}
        Also ``"channels_last"`` and ``"channels_first"``.
    b, stride, padding, dilation, groups, activation, out
        As for :func:`conv2d`, with three numbers or pairs.

    Returns
    -------
    y : ndarray
        ``(batch, *out_shape, out_ch)`` or ``(batch, out_ch, *out_shape)``.
    """
    return conv(3, x, w, b, stride, padding, dilation, groups, layout, activation, out)


def conv3d_backward(
    dy: Array,
    x: Array,
    w: Array,
    *,
    y: Array | None = None,
    activation: Activation | str | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NDHWC",
    needs: Iterable[str] = NEEDS,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of :func:`conv3d`, as :func:`conv2d_backward` does for two axes."""
    return conv_backward(
        3, dy, x, w, y, activation, stride, padding, dilation, groups, layout, needs
    )
