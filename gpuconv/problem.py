"""One frozen description of a convolution; every size, cost and check comes from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

from gpuconv.activations import Activation

__all__ = ["CHANNELS_FIRST", "CHANNELS_LAST", "COMPLEX", "DTYPES", "ConvProblem"]

CHANNELS_LAST = "channels_last"
CHANNELS_FIRST = "channels_first"

#: The dtypes that are computed, with the bytes of an element; bfloat16 is that of ml_dtypes.
DTYPES = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
COMPLEX = ("complex64", "complex128")


@dataclass(frozen=True)
class ConvProblem:
    """A convolution over 1 to 3 spatial axes, without its data.

    Spatial tuples run from the outermost axis to the innermost (depth, rows, columns).
    Shapes (``x_shape`` and so on) are given *channels last*, the form in which engines see
    every array; ``layout`` says how the caller's memory is laid out.

    Parameters
    ----------
    batch : int
        Number of examples.
    in_channels, out_channels : int
        Channels of the input and of the output, over all groups.
    in_shape : tuple of int
        Spatial size of the input.
    kernel, stride, dilation : tuple of int
        Per spatial axis; ``dilation`` 1 is dense.
    padding : tuple of (int, int)
        Zeros added before and after, per spatial axis. Fewer than none after: so many cells
        at the end that no window reads.
    groups : int
        Number of independent channel groups.
    dtype : str
        Name of the arrays' dtype (``"float32"``).
    layout : str
        ``"channels_last"`` or ``"channels_first"``.
    activation : Activation or None
        Applied by the forward pass to the biased sum; None is the identity.
    """

    batch: int
    in_channels: int
    out_channels: int
    in_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    dtype: str = "float32"
    layout: str = CHANNELS_LAST
    activation: Activation | None = None

    def __hash__(self) -> int:
        # Worked out once: a small call looks its plan up several times.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @cached_property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def window(self) -> tuple[int, ...]:
        """Extent of the dilated kernel per axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        return tuple(
            (n + before + after - win) // s + 1
            for n, (before, after), win, s in zip(
                self.in_shape, self.padding, self.window, self.stride, strict=True
            )
        )

    @cached_property
    def x_shape(self) -> tuple[int, ...]:
        """``(batch, *in_shape, in_channels)``."""
        return (self.batch, *self.in_shape, self.in_channels)

    @cached_property
    def w_shape(self) -> tuple[int, ...]:
        """``(*kernel, in_channels // groups, out_channels)``."""
        return (*self.kernel, self.in_channels // self.groups, self.out_channels)

    @cached_property
    def y_shape(self) -> tuple[int, ...]:
        """``(batch, *out_shape, out_channels)``."""
        return (self.batch, *self.out_shape, self.out_channels)

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype]

    @cached_property
    def taps(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.kernel)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of any one pass, a multiply-add counted as two.

        The definition's count: taps that fall into the padding are included. A complex
        multiply-add is eight.
        """
        each = 8 if self.dtype in COMPLEX else 2
        return each * math.prod(self.y_shape) * self.taps * (self.in_channels // self.groups)

    def reduction_length(self, pass_: str) -> int:
        """Number of products added into one result of ``pass_``."""
        if pass_ == "forward":
            return self.taps * (self.in_channels // self.groups)
        if pass_ == "input_grad":
            return self.taps * (self.out_channels // self.groups)
        if pass_ == "weight_grad":
            return max(1, self.batch * math.prod(self.out_shape))
        raise ValueError(f"pass_ is {pass_!r}; expected forward, input_grad or weight_grad")

    @cached_property
    def bytes(self) -> int:
        """Fewest bytes any one pass moves: two of x, w, y read, the third written, once each."""
        return self.itemsize * sum(math.prod(s) for s in (self.x_shape, self.w_shape, self.y_shape))

    @cached_property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        return self.groups > 1 and self.groups == self.in_channels

    @cached_property
    def pointwise(self) -> bool:
        """Whether the window is one element and no input is skipped or padded."""
        return (
            self.taps == 1
            and all(s == 1 for s in self.stride)
            and all(p == (0, 0) for p in self.padding)
        )

    def with_batch(self, batch: int) -> ConvProblem:
        """Return the same convolution over another number of examples."""
        return self if batch == self.batch else replace(self, batch=batch)

    def __str__(self) -> str:
        def by(values: tuple[int, ...]) -> str:
            return "x".join(map(str, values))

        text = (
            f"{self.batch}x{by(self.in_shape)}x{self.in_channels} -> "
            f"{by(self.out_shape)}x{self.out_channels}, kernel {by(self.kernel)}"
        )
        if any(s != 1 for s in self.stride):
            text += f", stride {by(self.stride)}"
        if any(p != (0, 0) for p in self.padding):
            text += f", padding {self.padding}"
        if any(d != 1 for d in self.dilation):
            text += f", dilation {by(self.dilation)}"
        if self.groups != 1:
            text += f", groups {self.groups}"
        return f"{text}, {self.dtype}, {self.layout}"
