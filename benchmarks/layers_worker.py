"""A child process of the layers' benchmark: pooling, normalisation, activations of one library.

``python -m benchmarks.layers_worker PEER THREADS``; PEER is ``gpuconv``, ``torch:NCHW`` or
``torch:NHWC``. Inputs come from the seed, so that all peers compute on the same values.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers import PEERS
from benchmarks.worker import serve
from gpuconv.profiling.timing import sample

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "PASSES",
    "POOLS",
    "LayersWorker",
    "axes_of",
    "inputs",
    "prepare",
]

Array = np.ndarray[Any, Any]
#: The forward, or forward and gradients; it returns what is compared, by name.
Call = Callable[[], dict[str, Any]]

#: name: spatial axes, mode, kernel, stride, padding.
POOLS = {
    "max pool 2x2, stride 2": (2, "max", 2, 2, 0),
    "max pool 3x3, stride 2": (2, "max", 3, 2, 1),
    "max pool 3x3, stride 1": (2, "max", 3, 1, 1),
    "max pool 3x3, stride 3": (2, "max", 3, 3, 0),
    "max pool 5x5, stride 1": (2, "max", 5, 1, 2),
    "average pool 2x2, stride 2": (2, "avg", 2, 2, 0),
    "average pool 3x3, stride 2": (2, "avg", 3, 2, 1),
    "average pool 3x3, stride 1": (2, "avg", 3, 1, 1),
    "average pool 7x7, stride 1": (2, "avg", 7, 1, 0),
    "max pool 3, stride 2": (1, "max", 3, 2, 1),
    "average pool 3, stride 2": (1, "avg", 3, 2, 1),
    "max pool 2x2x2, stride 2": (3, "max", 2, 2, 0),
    "max pool 3x3x3, stride 2": (3, "max", 3, 2, 1),
    "average pool 2x2x2, stride 2": (3, "avg", 2, 2, 0),
    "average pool 3x3x3, stride 2": (3, "avg", 3, 2, 1),
}
#: name: spatial axes.
NORMS = {"BatchNorm": 2, "BatchNorm of vectors": 0}
#: name: gpuconv's activation, and PyTorch's function and arguments.
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ReLU": ("ReLU", "relu", {}),
    "LeakyReLU": ("LeakyReLU(alpha=0.01)", "leaky_relu", {"negative_slope": 0.01}),
    "ELU": ("ELU", "elu", {}),
    "SELU": ("SELU", "selu", {}),
    "GELU, tanh": ("GELU", "gelu", {"approximate": "tanh"}),
    "GELU, exact": ("GELU(approximate=False)", "gelu", {}),
    "Tanh": ("Tanh", "tanh", {}),
    "Sigmoid": ("Sigmoid", "sigmoid", {}),
    "HardSigmoid": ("HardSigmoid", "hardsigmoid", {}),
    "SoftPlus": ("SoftPlus", "softplus", {}),
    "Exponential": ("Exponential", "exp", {}),
}
#: PyTorch's hard sigmoid rises by z / 6, this one by z / 5: of so much more it is the same.
STEEPER = {"HardSigmoid": 1.2}
EPSILON = 1e-5
#: forward: without a gradient; train: forward and all gradients.
PASSES = ("forward", "backward", "train")


def axes_of(layer: str) -> int:
    """Return how many spatial axes a layer's input has."""
    return POOLS[layer][0] if layer in POOLS else NORMS.get(layer, 2)


def inputs(layer: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return input and gradient of the result, channels last and float32."""
    random = np.random.default_rng(0)
    x = random.standard_normal(shape, np.float32)
    size = list(shape)
    if layer in POOLS:
        _, _, kernel, stride, padding = POOLS[layer]
        size[1:-1] = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:-1]]
        # The layer's zeros of the padding take part in a maximum, PyTorch's do not.
        x = np.abs(x) + np.float32(1e-3)
    return x, random.standard_normal(size, np.float32)


def prepare(peer: str, layer: str, shape: tuple[int, ...], pass_: str) -> Call:
    """Return the call that is timed."""
    x, dy = inputs(layer, shape)
    if peer == "gpuconv":
        forward, backward = _gpuconv(layer, x, dy, pass_ != "forward")
    else:
        forward, backward = _torch(layer, x, dy, pass_ != "forward", peer.endswith("NHWC"))
    if pass_ == "forward":
        return lambda: {"y": forward()}
    if pass_ == "train":

        def train() -> dict[str, Any]:
            y = forward()
            return {"y": y, **backward(y)}

        return train
    kept = forward()
    return lambda: backward(kept)


#: The forward, and the gradients of its result, which may be taken several times.
_Passes = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]


def _gpuconv(layer: str, x: Array, dy: Array, train: bool) -> _Passes:
    import gpuconv
    from gpuconv.activations import get_activation
    from gpuconv.layers import BatchNorm1D, BatchNorm2D, LayerBase, Pool2D

    if layer in ACTIVATIONS:
        function = get_activation(ACTIVATIONS[layer][0])
        return lambda: function.fn(x), lambda y: {"dx": function.backward(dy, x, y)}
    made: LayerBase
    if layer in POOLS:
        axes, mode, kernel, stride, padding = POOLS[layer]
        if axes != 2:
            options: dict[str, Any] = {
                "stride": stride, "padding": padding, "layout": "channels_last",
            }  # fmt: skip
            pool = getattr(gpuconv, f"{mode}_pool{axes}d")
            grad = getattr(gpuconv, f"{mode}_pool{axes}d_backward")
            if mode == "avg":
                return (
                    lambda: pool(x, kernel, **options),
                    lambda y: {"dx": grad(dy, x.shape, kernel, **options)},
                )
            if not train:
                return lambda: pool(x, kernel, **options), lambda y: {}
            indices: list[Array] = []

            def forward() -> Any:
                y, found = pool(x, kernel, return_indices=True, **options)
                indices[:] = [found]
                return y

            return forward, lambda y: {"dx": grad(dy, x, kernel, indices=indices[0], **options)}
        named = {"max": "max", "avg": "average"}[mode]
        made = Pool2D(kernel, stride, padding, named, device="cpu")
    else:
        kind = BatchNorm2D if x.ndim == 4 else BatchNorm1D
        made = kind(epsilon=EPSILON, first_scaler="ones", rng=0, device="cpu")
    # Statistics of the batch take a pass that could be trained on.
    retain = train or layer in NORMS

    def run() -> Array:
        made.flush_gradients()
        y: Array = made.forward(x, retain_derived=retain)
        return y

    def gradients(y: Array) -> dict[str, Array]:
        found = {"dx": made.backward(dy)}
        return found | {f"d{name}": value for name, value in made.gradients.items()}

    return run, gradients


def _torch(layer: str, x: Array, dy: Array, train: bool, last: bool) -> _Passes:
    import torch

    form = {
        4: torch.channels_last,
        5: torch.channels_last_3d,
    }.get(x.ndim if last else 0, torch.contiguous_format)
    scale = np.float32(STEEPER.get(layer, 1))

    def tensor(a: Array) -> Any:
        first = torch.from_numpy(scale * a).permute(0, a.ndim - 1, *range(1, a.ndim - 1))
        return first.clone(memory_format=torch.contiguous_format).contiguous(memory_format=form)

    given, gradient = tensor(x), tensor(dy)
    needs = {"dx": given}
    if layer in ACTIVATIONS:
        _, name, options = ACTIVATIONS[layer]
        function = getattr(torch.nn.functional, name, None) or getattr(torch, name)

        def forward() -> Any:
            return function(given, **options)

    elif layer in POOLS:
        axes, mode, kernel, stride, padding = POOLS[layer]
        pool = getattr(torch.nn.functional, f"{mode}_pool{axes}d")

        def forward() -> Any:
            return pool(given, kernel, stride, padding)

    else:
        kind = torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d
        normalise = kind(x.shape[-1], eps=EPSILON)
        needs |= {"dscaler": normalise.weight, "dintercept": normalise.bias}

        def forward() -> Any:
            return normalise(given)

    if not train:

        def infer() -> Any:
            with torch.no_grad():
                return forward()

        return infer, lambda y: {}
    given.requires_grad_()

    def gradients(y: Any) -> dict[str, Any]:
        found = torch.autograd.grad(y, tuple(needs.values()), gradient, retain_graph=True)
        return dict(zip(needs, found, strict=True))

    return forward, gradients


def as_arrays(results: dict[str, Any]) -> dict[str, Array]:
    """Return results as NumPy arrays, channels last."""
    found = {}
    for name, value in results.items():
        a = value if isinstance(value, np.ndarray) else value.detach().permute(
            *((0, *range(2, value.ndim), 1) if value.ndim > 2 else range(value.ndim))
        ).numpy()  # fmt: skip
        found[name] = np.asarray(a)
    return found


class LayersWorker:
    """What the process holds between requests."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer = peer
        base = PEERS[peer.partition(":")[0]]
        self.why = base.missing()
        self.versions = {} if self.why else base(threads).versions()  # and sets the threads
        self.call: Call | None = None
        gc.freeze()  # what is imported stays, and need not be looked through each time

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; the fields are the arguments of the method that ``op`` names."""
        arguments = dict(request)
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "hello": self.hello,
            "prepare": self.prepare,
            "time": self.time,
        }
        return operations[arguments.pop("op")](**arguments)

    def hello(self) -> dict[str, Any]:
        """Return why the peer cannot run here, or its versions."""
        return {"missing": self.why} if self.why else {"versions": self.versions}

    def prepare(self, layer: str, shape: list[int], pass_: str, file: str) -> dict[str, Any]:
        """Make ready a call and leave its results in ``file``."""
        self.call = None
        gc.collect()
        self.call = prepare(self.peer, layer, tuple(shape), pass_)
        np.savez(file, **as_arrays(self.call()))  # type: ignore[arg-type]
        return {}

    def time(self, seconds: float) -> dict[str, Any]:
        """Return the seconds of as many calls as fit, after a few untimed ones."""
        call = self.call
        if call is None:
            raise RuntimeError("nothing is prepared")

        def run() -> None:
            call()

        warm = time.perf_counter()
        while time.perf_counter() - warm < 0.1 * seconds:
            run()
        times: list[float] = []
        start = time.perf_counter()
        while not times or time.perf_counter() - start < seconds:
            times.append(sample(run, 1))
        return {"times": times}


if __name__ == "__main__":
    sys.exit(serve(lambda: LayersWorker(sys.argv[1], int(sys.argv[2])).answer))
