"""PyTorch with cuDNN, and JAX, beside ours: the same arrays, passes and precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.suite import Shape
from gpuconv.cuda import runtime

__all__ = [
    "JaxClock", "TorchClock", "jax_calls", "jax_on_device", "results_of", "torch_calls",
]  # fmt: skip

Calls = dict[str, Callable[[], Any]]


class TorchClock:
    """CUDA's events by PyTorch, on its stream."""

    what, waits = "CUDA events, by PyTorch", True

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event, time.perf_counter_ns()

    def seconds(self, first: Any, last: Any) -> float:
        last[0].synchronize()
        return float(first[0].elapsed_time(last[0])) * 1e-3

    def host(self, mark: Any) -> int:
        return int(mark[1])


def torch_calls(
    torch: Any, shape: Shape, arrays: dict[str, Any], dtype: str, form: str, place: str = "cuda"
) -> Calls:
    """Return PyTorch's calls by pass, in one memory format, with cuDNN's own search on.

    ``arrays`` are NumPy's, channels last: x, w, b, dy in float32. Asymmetric padding is no
    matter: the suite has none.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    p = shape.problem
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    layout = torch.channels_last if form == "NHWC" else torch.contiguous_format

    def tensor(name: str, axes: tuple[int, ...]) -> Any:
        made = torch.from_numpy(arrays[name].astype("float32").transpose(axes).copy()).to(
            place, kind
        )
        return made.contiguous(memory_format=layout) if made.ndim == 4 else made

    x, dy = tensor("x", (0, 3, 1, 2)), tensor("dy", (0, 3, 1, 2))
    w, b = tensor("w", (3, 2, 0, 1)), tensor("b", (0,))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    padding = [a for a, _ in p.padding]
    options = {
        "stride": p.stride, "padding": padding, "dilation": p.dilation, "groups": p.groups,
    }  # fmt: skip
    convolve = torch.nn.functional.conv2d

    def forward() -> Any:
        with torch.inference_mode():
            return torch.relu_(convolve(x, w, b, **options))

    def gradients(needs: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            dy,
            x,
            w,
            [p.out_channels],
            p.stride,
            padding,
            p.dilation,
            False,
            [0, 0],
            p.groups,
            needs,
        )

    def input_grad() -> Any:
        with torch.no_grad():
            return gradients([True, False, False])[0]

    def weight_grad() -> Any:
        with torch.no_grad():
            return gradients([False, True, True])[1:]

    def train() -> Any:
        y = torch.relu(convolve(x, w, b, **options))
        return y, *torch.autograd.grad(y, leaves, dy)

    return {
        "forward": forward,
        "input_grad": input_grad,
        "weight_grad": weight_grad,
        "train": train,
    }


NAMES = {"forward": ("y",), "input_grad": ("dx",), "weight_grad": ("dw", "db"),
         "train": ("y", "dx", "dw", "db")}  # fmt: skip


def results_of(pass_: str, found: Any, peer: str) -> dict[str, Any]:
    """Return a peer's results as NumPy arrays of float32, channels last, by name."""
    import numpy as np

    names = NAMES[pass_]
    values = (found,) if len(names) == 1 else found
    if peer == "jax":
        return {n: np.asarray(v.astype("float32")) for n, v in zip(names, values, strict=True)}
    axes = {"y": (0, 2, 3, 1), "dx": (0, 2, 3, 1), "dw": (2, 3, 1, 0), "db": (0,)}
    return {
        n: v.detach().float().cpu().numpy().transpose(axes[n])
        for n, v in zip(names, values, strict=True)
    }


def jax_on_device() -> Any:
    """Return JAX if it is installed and has a GPU, else None."""
    if runtime.installed() is not None:
        return None
    try:
        import jax

        return jax if jax.default_backend() == "gpu" else None
    except (ImportError, RuntimeError):
        return None


def jax_calls(jax: Any, shape: Shape, arrays: dict[str, Any], dtype: str) -> tuple[Calls, Any]:
    """Return JAX's compiled calls by pass, and a clock that waits for the last of them."""
    jnp, lax = jax.numpy, jax.lax
    p = shape.problem
    kind = "float32" if dtype == "tf32" else dtype
    precision = lax.Precision.HIGHEST if dtype == "float32" else lax.Precision.DEFAULT
    given = [jnp.asarray(arrays[n].astype("float32")).astype(kind) for n in ("x", "w", "b", "dy")]

    def layer(x: Any, w: Any, b: Any) -> Any:
        return b + lax.conv_general_dilated(
            x, w, p.stride, p.padding, rhs_dilation=p.dilation, feature_group_count=p.groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision,
        )  # fmt: skip

    def train(x: Any, w: Any, b: Any, dy: Any) -> Any:
        y, back = jax.vjp(lambda *leaves: jax.nn.relu(layer(*leaves)), x, w, b)
        return y, *back(dy)

    made: dict[str, Callable[..., Any]] = {
        "forward": lambda x, w, b, dy: jax.nn.relu(layer(x, w, b)),
        "input_grad": lambda x, w, b, dy: jax.vjp(lambda x: layer(x, w, b), x)[1](dy)[0],
        "weight_grad": lambda x, w, b, dy: jax.vjp(lambda w, b: layer(x, w, b), w, b)[1](dy),
        "train": train,
    }
    last: list[Any] = [None]

    def bound(compiled: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> Any:
            last[0] = compiled(*given)
            return last[0]

        return call

    return {n: bound(jax.jit(call)) for n, call in made.items()}, JaxClock(jax, last)


class JaxClock:
    """The host's clock, once the last result is there."""

    what, waits = "the host's clock, behind block_until_ready", True

    def __init__(self, jax: Any, last: list[Any]) -> None:
        self._jax, self._last = jax, last

    def mark(self) -> Any:
        if self._last[0] is not None:
            self._jax.block_until_ready(self._last[0])
        return time.perf_counter_ns()

    def seconds(self, first: Any, last: Any) -> float:
        return float(last - first) * 1e-9

    def host(self, mark: Any) -> int:
        return int(mark)
