"""Optimizers: names, arguments, defaults and cache keys are numpy-ml's where it has them.

An optimizer is called with a parameter and its gradient and returns the new parameter; what it
has to remember of a parameter is kept under the parameter's name in ``cache``, on the
parameter's device. A layer calls :meth:`Optimizer.step` once an update, before its parameters.
"""

from __future__ import annotations

import abc
import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

from gpuconv.arguments import normal_name, parse_call, real
from gpuconv.device import namespace
from gpuconv.dtypes import is_half, widened
from gpuconv.schedulers import Scheduler, get_scheduler

__all__ = ["SGD", "AdaGrad", "Adam", "AdamW", "Optimizer", "RMSProp", "get_optimizer"]

Array = Any


class Optimizer(abc.ABC):
    """What optimizers share: the learning rate of a step, clipping, and their state.

    Attributes
    ----------
    cache : dict
        What is remembered of each parameter, by its name.
    cur_step : int
        The number of the current update, from 1.
    hyperparameters : dict
        The constructor's arguments, the scheduler as text, with the class's name as ``id``.
    lr_scheduler : Scheduler
        Gives the learning rate of a step.
    """

    def __init__(
        self,
        lr: float,
        clip_norm: float | None,
        lr_scheduler: Scheduler | str | None,
        **others: float,
    ) -> None:
        self.lr_scheduler = get_scheduler(lr_scheduler, real("lr", lr, 0))
        self.cache: dict[str, Any] = {}
        self.cur_step = 0
        self.hyperparameters: dict[str, Any] = {
            "id": type(self).__name__,
            "lr": float(lr),
            **others,
            "clip_norm": None if clip_norm is None else real("clip_norm", clip_norm, 0, above=True),
            "lr_scheduler": str(self.lr_scheduler),
        }
        self._rate: tuple[int, float] | None = None

    def __call__(
        self, param: Array, param_grad: Array, param_name: str, cur_loss: float | None = None
    ) -> Array:
        """Return the updated parameter; see :meth:`update`."""
        return self.update(param, param_grad, param_name, cur_loss)

    def step(self) -> None:
        """Count one update."""
        self.cur_step += 1

    def reset_step(self) -> None:
        """Count from the start again."""
        self.cur_step = 0
        self._rate = None

    def copy(self) -> Optimizer:
        """Return an independent copy, state included."""
        return copy.deepcopy(self)

    def fresh(self) -> Optimizer:
        """Return an optimizer with the same hyperparameters that has seen nothing."""
        values = {k: v for k, v in self.hyperparameters.items() if k != "id"}
        return type(self)(**{**values, "lr_scheduler": self.lr_scheduler.fresh()})

    def learning_rate(self, cur_loss: float | None = None) -> float:
        """Return the current step's rate; a step's first call decides it for all parameters."""
        if self._rate is None or self._rate[0] != self.cur_step or self.cur_step == 0:
            self._rate = (self.cur_step, self.lr_scheduler(self.cur_step, cur_loss))
        return self._rate[1]

    def update(
        self, param: Array, param_grad: Array, param_name: str, cur_loss: float | None = None
    ) -> Array:
        """Return the updated parameter as a new array.

        That of a half is computed in float32, and so is what is remembered of it; a step far
        smaller than the parameter is still lost, other than with float32 copies of the parameters.

        Parameters
        ----------
        param, param_grad : ndarray
            Of one shape, on one device.
        param_name : str
            Under which the cache knows the parameter.
        cur_loss : float, optional
            For schedulers that follow the loss.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        if param.shape != param_grad.shape:
            raise ValueError(
                f"param_grad has shape {param_grad.shape}; expected {param.shape}, that of "
                f"the parameter {param_name!r}"
            )
        if is_half(param):
            changed = self.update(widened(param), widened(param_grad), param_name, cur_loss)
            return changed.astype(param.dtype)
        limit = self.hyperparameters["clip_norm"]
        if limit is not None:
            xp = namespace(param_grad)
            # Without a look at the norm from the host, which would wait for the device.
            length = xp.sqrt(xp.sum(xp.square(param_grad)))
            param_grad = param_grad * (limit / xp.maximum(length, limit)).astype(param_grad.dtype)
        return self._updated(param, param_grad, param_name, self.learning_rate(cur_loss))

    @abc.abstractmethod
    def _updated(self, param: Array, grad: Array, name: str, rate: float) -> Array:
        """Return the parameter after a step of this rate along the clipped gradient."""

    def set_params(
        self,
        hparam_dict: Mapping[str, Any] | None = None,
        cache_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Take over hyperparameters and cache entries from another's; unknown ones are ignored.

        Raises
        ------
        TypeError, ValueError
            If a hyperparameter's value is not allowed; nothing is changed.
        """
        if hparam_dict:
            values = self.hyperparameters | {
                k: v for k, v in hparam_dict.items() if k in self.hyperparameters
            }
            del values["id"]
            if "lr_scheduler" not in hparam_dict and "lr" in hparam_dict:
                values["lr_scheduler"] = None
            other = type(self)(**values)
            self.hyperparameters, self.lr_scheduler = other.hyperparameters, other.lr_scheduler
            self._rate = None
        if cache_dict:
            self.cache.update(copy.deepcopy(dict(cache_dict)))

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return what :meth:`load_state` needs to go on exactly: JSON values, and arrays by name."""
        numbers: dict[str, Any] = {}
        arrays: dict[str, Array] = {}
        for name, entry in self.cache.items():
            parts = entry.items() if isinstance(entry, dict) else [("", entry)]
            for part, value in parts:
                key = f"{name}.{part}" if part else name
                if isinstance(value, int):
                    numbers[key] = value
                else:
                    arrays[key] = value
        state = {
            "cur_step": self.cur_step,
            "scheduler": self.lr_scheduler.state(),
            "numbers": numbers,
        }
        return state, arrays

    def load_state(self, state: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Take over what :meth:`state` returned; the arrays must be on the parameters' device.

        Raises
        ------
        TypeError, ValueError
            If it is not such a state.
        """
        if not isinstance(state, Mapping) or set(state) != {"cur_step", "scheduler", "numbers"}:
            raise ValueError("state is not what state() of an optimizer returns")
        step = state["cur_step"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"cur_step is {step!r}; expected an integer of at least 0")
        cache: dict[str, Any] = {}
        for key, value in {**state["numbers"], **arrays}.items():
            name, dot, part = key.partition(".")
            if dot:
                cache.setdefault(name, {})[part] = value
            else:
                cache[name] = value
        self.lr_scheduler.load_state(state["scheduler"])
        self.cur_step, self.cache, self._rate = step, cache, None

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in self.hyperparameters.items() if k != "id")
        return f"{type(self).__name__}({values})"

    def __repr__(self) -> str:
        return str(self)


class SGD(Optimizer):
    """Gradient descent with momentum: ``v = momentum * v + lr * grad; param - v``."""

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.0,
        clip_norm: float | None = None,
        lr_scheduler: Scheduler | str | None = None,
    ) -> None:
        super().__init__(lr, clip_norm, lr_scheduler, momentum=real("momentum", momentum, 0, 1))

    def _updated(self, param: Array, grad: Array, name: str, rate: float) -> Array:
        momentum = self.hyperparameters["momentum"]
        step = rate * grad
        if name in self.cache and momentum:
            step += momentum * self.cache[name]
        self.cache[name] = step
        return param - step


class AdaGrad(Optimizer):
    """Steps divided by the root of the sum of all squared gradients [1]_.

    .. [1] Duchi, Hazan, Singer: Adaptive subgradient methods for online learning (2011).
    """

    def __init__(
        self,
        lr: float = 0.01,
        eps: float = 1e-7,
        clip_norm: float | None = None,
        lr_scheduler: Scheduler | str | None = None,
    ) -> None:
        super().__init__(lr, clip_norm, lr_scheduler, eps=real("eps", eps, 0, above=True))

    def _updated(self, param: Array, grad: Array, name: str, rate: float) -> Array:
        xp = namespace(param)
        total = xp.square(grad)
        if name in self.cache:
            total += self.cache[name]
        self.cache[name] = total
        return param - rate * grad / (xp.sqrt(total) + self.hyperparameters["eps"])


class RMSProp(Optimizer):
    """Steps divided by the root of a decaying mean of squared gradients [1]_.

    .. [1] Tieleman, Hinton: Lecture 6.5 - RMSProp (2012).
    """

    def __init__(
        self,
        lr: float = 0.001,
        decay: float = 0.9,
        eps: float = 1e-7,
        clip_norm: float | None = None,
        lr_scheduler: Scheduler | str | None = None,
    ) -> None:
        super().__init__(
            lr,
            clip_norm,
            lr_scheduler,
            decay=real("decay", decay, 0, 1),
            eps=real("eps", eps, 0, above=True),
        )

    def _updated(self, param: Array, grad: Array, name: str, rate: float) -> Array:
        xp = namespace(param)
        decay, eps = self.hyperparameters["decay"], self.hyperparameters["eps"]
        mean = (1 - decay) * xp.square(grad)
        if name in self.cache:
            mean += decay * self.cache[name]
        self.cache[name] = mean
        return param - rate * grad / (xp.sqrt(mean) + eps)


class Adam(Optimizer):
    """Steps along a decaying mean of gradients over that of their squares [1]_.

    The cache holds, of each parameter, the number of its updates ``t`` and the means ``mean``
    and ``var``.

    .. [1] Kingma, Ba: Adam: a method for stochastic optimization (2015).
    """

    def __init__(
        self,
        lr: float = 0.001,
        decay1: float = 0.9,
        decay2: float = 0.999,
        eps: float = 1e-7,
        clip_norm: float | None = None,
        lr_scheduler: Scheduler | str | None = None,
        **others: float,
    ) -> None:
        if type(self) is Adam and others:
            raise TypeError(f"Adam got an unexpected argument {next(iter(others))!r}")
        super().__init__(
            lr,
            clip_norm,
            lr_scheduler,
            decay1=real("decay1", decay1, 0, 1, below=True),
            decay2=real("decay2", decay2, 0, 1, below=True),
            eps=real("eps", eps, 0, above=True),
            **others,
        )

    def _updated(self, param: Array, grad: Array, name: str, rate: float) -> Array:
        return param - self._step(grad, name, rate)

    def _step(self, grad: Array, name: str, rate: float) -> Array:
        """Take the gradient in and return the step."""
        xp = namespace(grad)
        values = self.hyperparameters
        decay1, decay2 = values["decay1"], values["decay2"]
        seen = self.cache.get(name)
        if seen is None:
            seen = {"t": 0, "mean": xp.zeros_like(grad), "var": xp.zeros_like(grad)}
        count = seen["t"] + 1
        mean = decay1 * seen["mean"]
        mean += (1 - decay1) * grad
        var = xp.square(grad)
        var *= 1 - decay2
        var += decay2 * seen["var"]
        self.cache[name] = {"t": count, "mean": mean, "var": var}
        # Both corrections for the start from zero, as factors of the scalars.
        root = xp.sqrt(var)
        root *= 1 / math.sqrt(1 - decay2**count)
        root += values["eps"]
        return xp.divide(mean, root, out=root) * (rate / (1 - decay1**count))


class AdamW(Adam):
    """Adam with weight decay apart from the gradient: ``param - lr * weight_decay * param`` [1]_.

    All parameters decay, biases too, as in PyTorch.

    .. [1] Loshchilov, Hutter: Decoupled weight decay regularization (2019).
    """

    def __init__(
        self,
        lr: float = 0.001,
        decay1: float = 0.9,
        decay2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip_norm: float | None = None,
        lr_scheduler: Scheduler | str | None = None,
    ) -> None:
        super().__init__(
            lr,
            decay1,
            decay2,
            eps,
            clip_norm,
            lr_scheduler,
            weight_decay=real("weight_decay", weight_decay, 0),
        )

    def _updated(self, param: Array, grad: Array, name: str, rate: float) -> Array:
        shrunk = param * (1 - rate * self.hyperparameters["weight_decay"])
        shrunk -= self._step(grad, name, rate)
        return shrunk


_CLASSES: tuple[type[Optimizer], ...] = (SGD, AdaGrad, RMSProp, Adam, AdamW)
_BY_NAME = {normal_name(c.__name__): c for c in _CLASSES}


def get_optimizer(spec: Optimizer | str | Mapping[str, Any] | None) -> Optimizer:
    """Return the optimizer that ``spec`` names.

    Parameters
    ----------
    spec : Optimizer, str, dict or None
        An optimizer, returned as it is; text such as ``"Adam(lr=0.003)"`` or
        ``"SGD(momentum=0.9, lr_scheduler=CosineScheduler(total_steps=900))"``; what a layer's
        ``hyperparameters["optimizer"]`` holds; or None for SGD with its defaults.

    Raises
    ------
    TypeError, ValueError
        If the name or its arguments are unknown.
    """
    labels = ", ".join(c.__name__ for c in _CLASSES)
    if spec is None:
        return SGD()
    if isinstance(spec, Optimizer):
        return spec
    if isinstance(spec, str):
        cls, arguments, options = parse_call("optimizer", spec, _BY_NAME, labels)
        return _made(cls, arguments, options, spec)
    if not isinstance(spec, Mapping):
        raise TypeError(f"optimizer is {spec!r}; expected an Optimizer, its text, a dict, or None")
    values = spec.get("hyperparameters")
    if not isinstance(values, Mapping) or "id" not in values:
        raise ValueError("optimizer is a dict without hyperparameters that hold an 'id'")
    found = _BY_NAME.get(normal_name(str(values["id"])))
    if found is None:
        raise ValueError(f"optimizer is {values['id']!r}; expected one of {labels}")
    known = set(inspect.signature(found).parameters)
    made = _made(found, [], {k: v for k, v in values.items() if k in known}, str(values["id"]))
    made.set_params(None, spec.get("cache"))
    return made


def _made(
    cls: type[Optimizer], arguments: list[Any], options: dict[str, Any], spec: str
) -> Optimizer:
    try:
        return cls(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer is {spec!r}; its arguments do not fit {cls.__name__}: {error}"
        ) from None
