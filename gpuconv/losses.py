"""Losses: ``loss`` and ``grad`` as in numpy-ml, and what training calls.

``loss`` and ``grad`` are sums over the batch, of arrays as they come out of a network's last
nonlinearity. :meth:`CrossEntropy.from_logits` takes what goes *into* a softmax and gives means,
in one numerically safe step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.device import namespace

__all__ = ["CrossEntropy", "SquaredError", "softmax"]

Array = Any


def softmax(z: Array) -> Array:
    """Return ``exp(z) / sum(exp(z))`` over the last axis; no ``z`` overflows."""
    xp = namespace(z)
    e = xp.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _same_shape(y: Array, y_pred: Array) -> None:
    if y.shape != y_pred.shape:
        raise ValueError(f"y_pred has shape {y_pred.shape}; expected {y.shape}, that of y")


class SquaredError:
    """``0.5 * sum((y_pred - y)**2)``."""

    def __call__(self, y: Array, y_pred: Array) -> Array:
        """Return the loss."""
        return self.loss(y, y_pred)

    def __str__(self) -> str:
        return "SquaredError"

    @staticmethod
    def loss(y: Array, y_pred: Array) -> Array:
        """Return the sum over all elements, a 0-d array on the arrays' device.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        _same_shape(y, y_pred)
        xp = namespace(y_pred)
        return 0.5 * xp.square(y_pred - y).sum()

    @staticmethod
    def grad(
        y: Array, y_pred: Array, z: Array | None = None, act_fn: Activation | str | None = None
    ) -> Array:
        """Return the gradient with respect to ``z`` where ``y_pred = act_fn(z)``.

        Parameters
        ----------
        y, y_pred : ndarray
            Targets and predictions, of one shape.
        z : ndarray, optional
            The last layer's sums; not needed with an identity, for which the gradient is that
            with respect to ``y_pred``.
        act_fn : Activation or str, optional
            The last layer's activation.

        Raises
        ------
        ValueError
            If the shapes differ, or ``z`` is missing beside ``act_fn``.
        """
        _same_shape(y, y_pred)
        if act_fn is None:
            return y_pred - y
        if z is None:
            raise ValueError("z is None; expected the argument of act_fn")
        return (y_pred - y) * get_activation(act_fn).grad(z)


class CrossEntropy:
    """``-sum(y * log(y_pred))`` of one-hot targets and the probabilities a softmax gave."""

    def __call__(self, y: Array, y_pred: Array) -> Array:
        """Return the loss."""
        return self.loss(y, y_pred)

    def __str__(self) -> str:
        return "CrossEntropy"

    @staticmethod
    def loss(y: Array, y_pred: Array) -> Array:
        """Return the sum over the examples, a 0-d array on the arrays' device.

        Parameters
        ----------
        y : ndarray, shape (n, classes)
            One-hot targets.
        y_pred : ndarray, shape (n, classes)
            Probabilities; rows sum to 1.

        Raises
        ------
        ValueError
            If ``y`` is not binary, ``y_pred`` not stochastic, or their shapes differ.
        """
        xp = _check_probabilities(y, y_pred)
        return -(y * xp.log(y_pred + xp.finfo(xp.float64).eps)).sum()

    @staticmethod
    def grad(y: Array, y_pred: Array) -> Array:
        """Return the gradient with respect to the *argument* of the softmax, ``y_pred - y``.

        Raises
        ------
        ValueError
            As :meth:`loss`.
        """
        _check_probabilities(y, y_pred)
        return y_pred - y

    @staticmethod
    def from_logits(labels: Array, logits: Array) -> tuple[Array, Array]:
        """Return the mean cross-entropy of ``softmax(logits)`` and its gradient.

        On a GPU labels are not looked at, for the host would wait for the device: there a label
        outside the classes is the caller's to rule out.

        Parameters
        ----------
        labels : ndarray of int, shape (n,)
            Class numbers from 0, on the device of ``logits``.
        logits : ndarray, shape (n, classes)
            What goes into the softmax.

        Returns
        -------
        loss : ndarray, 0-d
            The mean over the examples.
        grad : ndarray, shape (n, classes)
            Of the mean, with respect to ``logits``.

        Raises
        ------
        TypeError, ValueError
            If dtype or shape are not as said.
        """
        xp = namespace(logits)
        if logits.ndim != 2 or len(logits) == 0:
            raise ValueError(f"logits has shape {logits.shape}; expected (n, classes), n > 0")
        if labels.dtype.kind not in "iu":
            raise TypeError(f"labels has dtype {labels.dtype}; expected integers")
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels has shape {labels.shape}; expected {logits.shape[:1]}, one for each row "
                "of logits"
            )
        if xp is not namespace(labels):
            raise ValueError("labels and logits are on different devices; expected one")
        classes = logits.shape[1]
        if xp is np and not (labels.min() >= 0 and labels.max() < classes):
            raise ValueError(
                f"labels holds {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, the "
                "columns of logits"
            )
        count, rows = len(logits), xp.arange(len(logits))
        shifted = logits - logits.max(axis=1, keepdims=True)
        e = xp.exp(shifted)
        total = e.sum(axis=1, keepdims=True)
        loss = (xp.log(total[:, 0]) - shifted[rows, labels]).mean()
        grad = e / total
        grad[rows, labels] -= 1
        grad /= count
        return loss, grad


def _check_probabilities(y: Array, y_pred: Array) -> Any:
    _same_shape(y, y_pred)
    xp = namespace(y_pred)
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("y is not binary; expected one-hot targets")
    if y_pred.ndim != 2 or not bool((xp.abs(y_pred.sum(axis=1) - 1) < 1e-3).all()):
        raise ValueError(
            "y_pred has rows that do not sum to 1; expected probabilities (n, classes)"
        )
    return xp
