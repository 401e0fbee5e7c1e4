"""The pooling layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpuconv.arguments import integer, pair
from gpuconv.device import Device
from gpuconv.layers.base import Array, LayerBase, Shape
from gpuconv.layers.conv import Pads, checked_pad, padding_of
from gpuconv.optimizers import Optimizer
from gpuconv.pooling import pool, pool_grad, pooled_shape

__all__ = ["Pool2D"]

MODES = ("max", "average")


class Pool2D(LayerBase):
    """The maximum or the mean of every window, channel by channel.

    Parameters
    ----------
    kernel_shape : int or pair of int
        Rows and columns of the window.
    stride : int or pair of int
        Step of the window.
    pad : int, tuple or "same"
        Zeros around the input, as for :class:`Conv2D`. They take part, also in a maximum.
    mode : {"max", "average"}
        A maximum that several cells share sends its gradient to the first of them.
    optimizer, device
        As for every layer; there is nothing to train.
    """

    _derived_settings = frozenset({"act_fn", "in_ch", "out_ch"})

    def __init__(
        self,
        kernel_shape: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        pad: int | tuple[int, ...] | str = 0,
        mode: str = "max",
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        device: Device | str | None = None,
    ) -> None:
        super().__init__(optimizer, device=device)
        self.kernel_shape: tuple[int, int]
        self.stride: Any
        self.pad: Any
        self.mode: str
        self.in_ch: int | None = None
        self.out_ch: int | None = None
        given = {"kernel_shape": kernel_shape, "stride": stride, "pad": pad, "mode": mode}
        for name, value in self._settings(given).items():
            setattr(self, name, value)
        self._winners: list[Any] = []

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name == "kernel_shape":
                found[name] = pair(name, value, 1)
            elif name == "stride":
                both = pair(name, value, 1)
                found[name] = both if isinstance(value, (tuple, list)) else both[0]
            elif name == "pad":
                found[name] = checked_pad(value)
            elif name == "mode":
                if value not in MODES:
                    raise ValueError(f"mode is {value!r}; expected 'max' or 'average'")
                found[name] = value
            elif name in ("in_ch", "out_ch"):
                found[name] = None if value is None else integer(name, value, 1)
        return found

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        return {
            "layer": "Pool2D",
            "act_fn": None,
            "pad": self.pad,
            "mode": self.mode,
            "in_ch": self.in_ch,
            "out_ch": self.out_ch,
            "stride": self.stride,
            "kernel_shape": self.kernel_shape,
            "optimizer": self._optimizer_summary(),
        }

    def _no_derived(self) -> dict[str, Any]:
        self._winners = []
        return {"out_rows": [], "out_cols": []}

    def _geometry(self, shape: Shape) -> tuple[Shape, Shape, Pads]:
        stride = pair("stride", self.stride, 1)
        pads = padding_of(self.pad, shape[1:3], self.kernel_shape, stride)
        return self.kernel_shape, stride, pads

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``(n_ex, out_rows, out_cols, in_ch)`` for an input of ``shape``."""
        if len(shape) != 4:
            raise ValueError(f"X has shape {shape}; expected (n_ex, in_rows, in_cols, in_ch)")
        if min(shape[1:]) < 1:
            raise ValueError(f"X has shape {shape}; expected rows, columns and channels")
        if self.in_ch is not None and shape[3] != self.in_ch:
            raise ValueError(f"X has {shape[3]} channels; expected {self.in_ch}")
        out = pooled_shape(shape, *self._geometry(shape))
        if min(out[1:3]) < 1:
            raise ValueError(
                f"X has shape {shape}; expected at least the window, {self.kernel_shape}"
            )
        return out

    def _init_params(self, shape: Shape) -> None:
        self.in_ch = self.out_ch = shape[3]

    def _forward(self, X: Array, retain: bool) -> Array:
        Y, winners = pool(X, *self._geometry(X.shape), self.mode, retain)
        if retain:
            self._winners.append(winners)
            self.derived_variables["out_rows"].append(Y.shape[1])
            self.derived_variables["out_cols"].append(Y.shape[2])
        return Y

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        if not input_grad:
            return None, {}
        shape = self.X[index].shape
        winners = self._winners[index]
        return pool_grad(dy, winners, shape, *self._geometry(shape), self.mode), {}
