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

__all__ = ["ACTIVATIONS", "POOLS", "LayersWorker", "inputs", "prepare"]

Array = np.ndarray[Any, Any]
#: The forward, or forward and gradients; it returns what is compared, by name.
Call = Callable[[], dict[str, Any]]

#: name: mode, kernel, stride, padding.
POOLS = {
    "max pool 2x2, stride 2": ("max", 2, 2, 0),
    "max pool 3x3, stride 2": ("max", 3, 2, 1),
    "max pool 3x3, stride 1": ("max", 3, 1, 1),
    "average pool 2x2, stride 2": ("average", 2, 2, 0),
    "average pool 3x3, stride 1": ("average", 3, 1, 1),
}
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
    "SoftPlus": ("SoftPlus", "softplus", {}),
    "Exponential": ("Exponential", "exp", {}),
}
EPSILON = 1e-5


def inputs(layer: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return input and gradient of the result, NHWC and float32.

    A maximum's values are multiples of different steps, so that no two are equal and rounding
    decides nothing.
    """
    random = np.random.default_rng(0)
    x = random.standard_normal(shape, np.float32)
    size = list(shape)
    if layer in POOLS:
        _, kernel, stride, padding = POOLS[layer]
        size[1:3] = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:3]]
        # The layer's zeros of the padding take part in a maximum, PyTorch's do not.
        x = np.abs(x) + np.float32(1e-3)
    return x, random.standard_normal(size, np.float32)


def prepare(peer: str, layer: str, shape: tuple[int, ...], train: bool) -> Call:
    """Return the call that is timed."""
    x, dy = inputs(layer, shape)
    if peer == "gpuconv":
        return _gpuconv(layer, x, dy, train)
    return _torch(layer, x, dy, train, peer.endswith("NHWC"))


def _gpuconv(layer: str, x: Array, dy: Array, train: bool) -> Call:
    from gpuconv.activations import get_activation
    from gpuconv.layers import BatchNorm2D, LayerBase, Pool2D

    if layer in ACTIVATIONS:
        function = get_activation(ACTIVATIONS[layer][0])

        def activate() -> dict[str, Any]:
            y = function.fn(x)
            return {"y": y, "dx": function.backward(dy, x, y)} if train else {"y": y}

        return activate
    made: LayerBase
    if layer in POOLS:
        mode, kernel, stride, padding = POOLS[layer]
        made = Pool2D(kernel, stride, padding, mode, device="cpu")
    else:
        made = BatchNorm2D(epsilon=EPSILON, first_scaler="ones", rng=0, device="cpu")

    def run() -> dict[str, Any]:
        found = {"y": made.forward(x)}
        if train:
            found["dx"] = made.backward(dy)
            found |= {f"d{name}": value for name, value in made.gradients.items()}
        made.flush_gradients()
        return found

    return run


def _torch(layer: str, x: Array, dy: Array, train: bool, last: bool) -> Call:
    import torch

    form = torch.channels_last if last else torch.contiguous_format

    def tensor(a: Array) -> Any:
        return torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=form)

    given, gradient = tensor(x), tensor(dy)
    needs = {"dx": given}
    if layer in ACTIVATIONS:
        _, name, options = ACTIVATIONS[layer]
        function = getattr(torch.nn.functional, name, None) or getattr(torch, name)

        def forward() -> Any:
            return function(given, **options)

    elif layer in POOLS:
        mode, kernel, stride, padding = POOLS[layer]
        pool = getattr(torch.nn.functional, "max_pool2d" if mode == "max" else "avg_pool2d")

        def forward() -> Any:
            return pool(given, kernel, stride, padding)

    else:
        normalise = torch.nn.BatchNorm2d(x.shape[-1], eps=EPSILON)
        needs |= {"dscaler": normalise.weight, "dintercept": normalise.bias}

        def forward() -> Any:
            return normalise(given)

    if not train:

        def infer() -> dict[str, Any]:
            with torch.no_grad():
                return {"y": forward()}

        return infer
    given.requires_grad_()

    def run() -> dict[str, Any]:
        y = forward()
        found = torch.autograd.grad(y, tuple(needs.values()), gradient)
        return {"y": y, **dict(zip(needs, found, strict=True))}

    return run


def as_arrays(results: dict[str, Any]) -> dict[str, Array]:
    """Return results as NumPy arrays, channels last."""
    found = {}
    for name, value in results.items():
        a = value if isinstance(value, np.ndarray) else value.detach().permute(
            *((0, 2, 3, 1) if value.ndim == 4 else range(value.ndim))
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

    def prepare(self, layer: str, shape: list[int], train: bool, file: str) -> dict[str, Any]:
        """Make ready a call and leave its results in ``file``."""
        self.call = None
        gc.collect()
        self.call = prepare(self.peer, layer, tuple(shape), train)
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
