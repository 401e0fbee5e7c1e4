"""Layers that normalise: over the batch, or over an example's features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from gpuconv.activations import Activation, Identity
from gpuconv.arguments import integer, real
from gpuconv.device import Device, namespace
from gpuconv.dtypes import HALVES
from gpuconv.initializers import Rng, generator
from gpuconv.layers.base import Array, LayerBase, Shape, activation_of
from gpuconv.normalization import (
    column_statistics,
    columns_grad,
    normalized_columns,
    rows_forward,
    rows_grad,
)
from gpuconv.optimizers import Optimizer

__all__ = ["BatchNorm1D", "BatchNorm2D", "LayerNorm1D", "LayerNorm2D"]

FIRST_SCALERS = ("random", "ones")


class _Normalization(LayerBase):
    """What the layers here share: scaler and intercept, and the names of the sizes."""

    #: numpy-ml's names of the number of features, in and out.
    _sizes: ClassVar[tuple[str, str]]
    _form: ClassVar[str]
    _feature_axes: ClassVar[int] = 1
    _derived_settings = frozenset({"in_ch", "out_ch", "n_in", "n_out"})

    def __init__(
        self,
        given: dict[str, Any],
        optimizer: Optimizer | str | Mapping[str, Any] | None,
        first_scaler: str,
        rng: Rng,
        device: Device | str | None,
    ) -> None:
        super().__init__(optimizer, rng=rng, device=device)
        if first_scaler not in FIRST_SCALERS:
            raise ValueError(f"first_scaler is {first_scaler!r}; expected 'random' or 'ones'")
        self._first_scaler = first_scaler
        for name in self._sizes:
            setattr(self, name, None)
        for name, value in self._settings(given).items():
            setattr(self, name, value)

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        checks: dict[str, Any] = {
            "epsilon": lambda v: real("epsilon", v, 0),
            "momentum": lambda v: real("momentum", v, 0, 1),
        }
        for size in self._sizes:
            checks[size] = lambda v, size=size: None if v is None else integer(size, v, 1)
        return {name: checks[name](value) for name, value in values.items() if name in checks}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Return what makes the layer."""
        act_fn = None if self.act_fn is None else str(self.act_fn)
        made: dict[str, Any] = {"layer": type(self).__name__, "act_fn": act_fn}
        made |= {name: getattr(self, name) for name in (*self._sizes, "epsilon")}
        if hasattr(self, "momentum"):
            made["momentum"] = self.momentum
        return {**made, "optimizer": self._optimizer_summary()}

    def config(self) -> dict[str, Any]:
        """Return what makes the layer anew, without weights and optimizer."""
        return {**super().config(), "first_scaler": self._first_scaler}

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``shape``, if it is one of the layer's inputs."""
        axes = 4 if self._sizes[0] == "in_ch" else 2
        if len(shape) != axes or min(shape[1:]) < 1:
            raise ValueError(f"X has shape {shape}; expected {self._form}")
        size = getattr(self, self._sizes[0])
        if size is not None and shape[-1] != size:
            raise ValueError(f"X has {shape[-1]} values in its last axis; expected {size}")
        return shape

    def _init_params(self, shape: Shape) -> None:
        for name in self._sizes:
            setattr(self, name, shape[-1])
        features = self._feature_shape(shape)
        first = np.ones(features)
        if self._first_scaler == "random":
            first = generator(self._rng).random(features)
        self.parameters = {"scaler": self._placed(first), "intercept": self._zeros(features)}

    def _feature_shape(self, shape: Shape) -> Shape:
        return shape[-1:]

    def _parameter_names(self) -> tuple[str, ...]:
        return ("scaler", "intercept")

    def _trained_names(self) -> tuple[str, ...]:
        return ("scaler", "intercept")

    def _parameter_shape(
        self, name: str, parameters: dict[str, Array], known: Mapping[str, Any]
    ) -> Shape | None:
        size = known[self._sizes[0]]
        held = (self.parameters or parameters).get("scaler")
        if held is None:
            return None
        like = tuple(held.shape)
        if len(like) != self._feature_axes:
            raise ValueError(f"scaler has shape {like}; expected {self._feature_axes} axes")
        return (*like[:-1], like[-1] if size is None else size)

    def _follow_parameters(self) -> None:
        for name in self._sizes:
            setattr(self, name, int(self.parameters["scaler"].shape[-1]))


class _BatchNorm(_Normalization):
    momentum: float
    epsilon: float

    def __init__(
        self,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        act_fn: Activation | str | None = None,
        first_scaler: str = "random",
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        given = {"momentum": momentum, "epsilon": epsilon, "act_fn": act_fn}
        super().__init__(given, optimizer, first_scaler, rng, device)

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        found = super()._settings(values)
        if "act_fn" in values:
            act_fn = activation_of(values["act_fn"])
            if not act_fn.invertible:
                raise ValueError(
                    f"act_fn is {act_fn}; expected one whose derivative follows from its output"
                )
            found["act_fn"] = None if isinstance(act_fn, Identity) else act_fn
        return found

    def _no_derived(self) -> dict[str, Any]:
        self._outputs: list[Array | None] = []
        #: Of each retained pass: mean, one over the deviation, and whether they are the batch's.
        self._statistics: list[tuple[Array, Array, bool]] = []
        return {}

    def _init_params(self, shape: Shape) -> None:
        super()._init_params(shape)
        self._reset_running(shape[-1:])

    def _reset_running(self, shape: Shape) -> None:
        for name, first in (("running_var", np.ones(shape)), ("running_mean", np.zeros(shape))):
            self.parameters[name] = self._placed(first, name)

    def _parameter_dtype(self, name: str | None) -> str | None:
        # In a half a tenth of a small difference would not move the running values any more.
        wide = name in ("running_var", "running_mean") and self.dtype in HALVES
        return "float32" if wide else self.dtype

    def _parameter_names(self) -> tuple[str, ...]:
        return ("scaler", "intercept", "running_var", "running_mean")

    def reset_running_stats(self) -> None:
        """Set the running mean to 0 and the running variance to 1.

        Raises
        ------
        RuntimeError
            If the layer is frozen.
        """
        self._check_trainable()
        if self.is_initialized:
            self._reset_running(self.parameters["scaler"].shape)

    def _forward(self, X: Array, retain: bool) -> Array:
        xp, own = namespace(X), self.parameters
        rows = X.reshape(-1, X.shape[-1])
        of_batch = self.trainable and retain and len(rows) > 0
        if of_batch:
            mean, variance = column_statistics(rows)
            for name, value in (("running_mean", mean), ("running_var", variance)):
                moved = self.momentum * own[name] + (1 - self.momentum) * value
                own[name] = moved.astype(own[name].dtype, copy=False)
        else:
            mean, variance = own["running_mean"], own["running_var"]
        inverse = 1 / xp.sqrt(variance + self.epsilon)
        if retain:
            self._statistics.append((mean, inverse, of_batch))
        values = (mean, inverse, own["scaler"], own["intercept"])
        made = normalized_columns(rows, *values, self.act_fn)
        if retain:
            self._outputs.append(None if self.act_fn is None else made)
        return made.reshape(X.shape)

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        mean, inverse, of_batch = self._statistics[index]
        shape, channels = dy.shape, dy.shape[-1]
        if not input_grad and not needs_params:
            return None, {}
        dx, dscaler, dintercept = columns_grad(
            dy.reshape(-1, channels),
            self.X[index].reshape(-1, channels),
            mean,
            inverse,
            self.parameters["scaler"],
            of_batch,
            input_grad,
            self._outputs[index],
            self.act_fn,
        )
        dx = None if dx is None else dx.reshape(shape)
        if not needs_params:
            return dx, {}
        return dx, {
            "scaler": dscaler.astype(dy.dtype, copy=False),
            "intercept": dintercept.astype(dy.dtype, copy=False),
        }


_BATCH_DOC = """Batch normalisation of {what}: ``scaler * (X - mean) / deviation + intercept``.

    Mean and variance are each {which}'s over the batch, and follow the batches in
    ``running_mean`` and ``running_var``. These take their place in a pass that retains nothing
    (``forward(X, retain_derived=False)``) and in a frozen layer.

    Parameters
    ----------
    momentum : float
        Weight of the old running value: ``momentum * running + (1 - momentum) * batch``.
        PyTorch calls ``1 - momentum`` its momentum.
    epsilon : float
        Added to the variance.
    optimizer : Optimizer, str, dict or None
        See :func:`gpuconv.optimizers.get_optimizer`.
    act_fn : Activation, str or None
        Applied to the result; one whose derivative follows from its output, such as ``"ReLU"``.
        numpy-ml has none there.
    first_scaler : {{"random", "ones"}}
        What ``scaler`` starts from: uniform in [0, 1) as in numpy-ml, or ones as elsewhere.
    rng, device
        See :class:`~gpuconv.layers.base.LayerBase`.

    Attributes
    ----------
    parameters : dict
        ``scaler``, ``intercept``, ``running_mean`` and ``running_var``, one value for each
        {which}; the first two are trained. The running values are float32 where the layer's
        dtype is a half.

    Notes
    -----
    After Ioffe and Szegedy, Batch normalization (2015). The running variance is that of the
    batch divided by its size, as in numpy-ml; PyTorch divides by one less. The gradient is that
    of the pass as it was: where a frozen layer passes it on, mean and variance are constants.
    """


class BatchNorm2D(_BatchNorm):
    __doc__ = _BATCH_DOC.format(
        what="images, ``(n_ex, in_rows, in_cols, in_ch)``, over examples and pixels",
        which="channel",
    )
    in_ch: int | None
    out_ch: int | None
    _sizes = ("in_ch", "out_ch")
    _form = "(n_ex, in_rows, in_cols, in_ch)"


class BatchNorm1D(_BatchNorm):
    __doc__ = _BATCH_DOC.format(what="vectors, ``(n_ex, n_in)``", which="feature")
    n_in: int | None
    n_out: int | None
    _sizes = ("n_in", "n_out")
    _form = "(n_ex, n_in)"


class _LayerNorm(_Normalization):
    epsilon: float
    _derived_settings = _Normalization._derived_settings | {"act_fn"}

    def __init__(
        self,
        epsilon: float = 1e-5,
        optimizer: Optimizer | str | Mapping[str, Any] | None = None,
        *,
        first_scaler: str = "random",
        rng: Rng = None,
        device: Device | str | None = None,
    ) -> None:
        super().__init__({"epsilon": epsilon}, optimizer, first_scaler, rng, device)

    def _no_derived(self) -> dict[str, Any]:
        self._statistics: list[Any] = []
        return {}

    def _forward(self, X: Array, retain: bool) -> Array:
        features = math.prod(X.shape[1:])
        scaler, intercept = (self.parameters[k].reshape(-1) for k in ("scaler", "intercept"))
        rows = X.reshape(len(X), features)
        Y, statistics = rows_forward(rows, scaler, intercept, self.epsilon)
        if retain:
            self._statistics.append(statistics)
        return Y.reshape(X.shape)

    def _backward(
        self, dy: Array, index: int, input_grad: bool, needs_params: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        if not input_grad and not needs_params:
            return None, {}
        features = math.prod(dy.shape[1:])
        dx, dscaler, dintercept = rows_grad(
            dy.reshape(len(dy), features),
            self.X[index].reshape(len(dy), features),
            self._statistics[index],
            self.parameters["scaler"].reshape(-1),
            input_grad,
        )
        dx = None if dx is None else dx.reshape(dy.shape)
        if not needs_params:
            return dx, {}
        return dx, {
            "scaler": dscaler.astype(dy.dtype, copy=False),
            "intercept": dintercept.astype(dy.dtype, copy=False),
        }


_LAYER_DOC = """Layer normalisation of {what}: ``scaler * (X - mean) / deviation + intercept``.

    Mean and variance are each example's over all of its values; scaler and intercept are applied
    value by value.

    Parameters
    ----------
    epsilon : float
        Added to the variance.
    optimizer : Optimizer, str, dict or None
        See :func:`gpuconv.optimizers.get_optimizer`.
    first_scaler : {{"random", "ones"}}
        What ``scaler`` starts from: uniform in [0, 1) as in numpy-ml, or ones as elsewhere.
    rng, device
        See :class:`~gpuconv.layers.base.LayerBase`.

    Attributes
    ----------
    parameters : dict
        ``scaler`` and ``intercept``, {shape}.

    Notes
    -----
    After Ba, Kiros and Hinton, Layer normalization (2016).
    """


class LayerNorm2D(_LayerNorm):
    __doc__ = _LAYER_DOC.format(
        what="images, ``(n_ex, in_rows, in_cols, in_ch)``",
        shape="of shape ``(in_rows, in_cols, in_ch)``",
    )
    in_ch: int | None
    out_ch: int | None
    _sizes = ("in_ch", "out_ch")
    _form = "(n_ex, in_rows, in_cols, in_ch)"
    _feature_axes = 3

    def output_shape(self, shape: Shape) -> Shape:
        """Return ``shape``, if it is one of the layer's inputs."""
        super().output_shape(shape)
        if self.parameters and shape[1:] != tuple(self.parameters["scaler"].shape):
            want = ("n_ex", *self.parameters["scaler"].shape)
            raise ValueError(f"X has shape {shape}; expected {want}, as the parameters")
        return shape

    def _feature_shape(self, shape: Shape) -> Shape:
        return shape[1:]


class LayerNorm1D(_LayerNorm):
    __doc__ = _LAYER_DOC.format(what="vectors, ``(n_ex, n_in)``", shape="of shape ``(n_in,)``")
    n_in: int | None
    n_out: int | None
    _sizes = ("n_in", "n_out")
    _form = "(n_ex, n_in)"
