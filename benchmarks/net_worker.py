"""A child process of the net benchmark: it trains one plain conv net, in gpuconv or in PyTorch.

``python -m benchmarks.net_worker PEER THREADS``; PEER is ``gpuconv``, ``torch:NCHW`` or
``torch:NHWC``. Weights and images come from a file, so that all peers start from the same.
"""

from __future__ import annotations

import abc
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers import PEERS
from benchmarks.worker import serve

__all__ = ["LR", "GpuconvNet", "Net", "NetWorker", "TorchNet", "conv_layers", "dense_layer"]

Array = np.ndarray[Any, Any]

LR = 1e-3


def conv_layers(blocks: int) -> list[int]:
    """Return the numbers of the convolutions: two a block, a pool between blocks."""
    return [3 * k + j for k in range(blocks) for j in range(2)]


def dense_layer(blocks: int) -> int:
    """Return the number of the dense layer, behind the last block and a flattening."""
    return 3 * blocks


class Net(abc.ABC):
    """A net that can train a step.

    Parameters
    ----------
    tensors : dict of ndarray
        Weights, as ``"<number of the layer>.W"`` (HWIO) and ``".b"``.
    channels : tuple of int
        Of each block: two 3x3 convolutions with ReLU, then, but for the last, a 2x2 max pool.
    """

    @abc.abstractmethod
    def __init__(self, tensors: dict[str, Array], channels: tuple[int, ...]) -> None: ...

    @abc.abstractmethod
    def batches(self, images: Array, labels: Array, size: int) -> list[tuple[Any, Any]]:
        """Return NHWC images and their labels as batches in the form that suits the net."""

    @abc.abstractmethod
    def step(self, images: Any, labels: Any) -> float:
        """Train on a batch and return its loss before the step."""


class GpuconvNet(Net):
    """The net in :mod:`gpuconv.layers`."""

    def __init__(self, tensors: dict[str, Array], channels: tuple[int, ...]) -> None:
        from gpuconv.layers import Conv2D, Flatten, FullyConnected, LayerBase, Pool2D
        from gpuconv.losses import CrossEntropy
        from gpuconv.models import Sequential

        blocks = len(channels)
        layers: list[LayerBase] = []
        for k, width in enumerate(channels):
            layers += [Conv2D(width, (3, 3), pad=1, act_fn="ReLU") for _ in range(2)]
            layers += [Pool2D((2, 2), stride=2)] if k + 1 < blocks else []
        classes = tensors[f"{dense_layer(blocks)}.W"].shape[1]
        layers += [Flatten(), FullyConnected(classes)]
        self._net = Sequential(layers, optimizer=f"Adam(lr={LR})", rng=0, device="cpu")
        self._loss = CrossEntropy()
        side = _side(tensors, channels)
        self._net.build((1, side, side, tensors["0.W"].shape[2]), "float32")
        self._net.load_tensors(tensors)

    def batches(self, images: Array, labels: Array, size: int) -> list[tuple[Any, Any]]:
        return [
            (images[k : k + size].copy(), labels[k : k + size].copy())
            for k in range(0, len(images), size)
        ]

    def step(self, images: Any, labels: Any) -> float:
        net = self._net
        loss, gradient = self._loss.from_logits(labels, net.forward(images))
        net.backward(gradient, input_grad=False)
        value = float(loss)
        net.update(value)
        return value


class TorchNet(Net):
    """The same in PyTorch, in one of its two memory formats."""

    format = "NCHW"

    def __init__(self, tensors: dict[str, Array], channels: tuple[int, ...]) -> None:
        import torch

        self._torch = torch
        self._form = torch.channels_last if self.format == "NHWC" else torch.contiguous_format
        nn, blocks = torch.nn, len(channels)
        width = tensors["0.W"].shape[2]
        layers: list[Any] = []
        with torch.no_grad():
            for k, number in enumerate(conv_layers(blocks)):
                conv = nn.Conv2d(width, channels[k // 2], 3, padding=1)
                conv.weight.copy_(_tensor(torch, tensors[f"{number}.W"], (3, 2, 0, 1)))
                conv.bias.copy_(torch.from_numpy(tensors[f"{number}.b"].reshape(-1)))
                layers += [conv, nn.ReLU(inplace=True)]
                layers += [nn.MaxPool2d(2)] if k % 2 and k // 2 + 1 < blocks else []
                width = channels[k // 2]
            # The rows of the dense weights follow the flattened image: here channels come first.
            weights = tensors[f"{dense_layer(blocks)}.W"]
            side = round((len(weights) // width) ** 0.5)
            weights = weights.reshape(side, side, width, -1)
            dense = nn.Linear(side * side * width, weights.shape[-1])
            dense.weight.copy_(_tensor(torch, weights, (3, 2, 0, 1)).reshape(dense.weight.shape))
            dense.bias.copy_(torch.from_numpy(tensors[f"{dense_layer(blocks)}.b"].reshape(-1)))
        layers += [nn.Flatten(), dense]
        self._net = nn.Sequential(*layers).to(memory_format=self._form)
        # gpuconv's epsilon is numpy-ml's, 1e-7.
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=LR, eps=1e-7, fused=True)

    def batches(self, images: Array, labels: Array, size: int) -> list[tuple[Any, Any]]:
        torch = self._torch
        made = []
        for k in range(0, len(images), size):
            batch = _tensor(torch, images[k : k + size], (0, 3, 1, 2))
            made.append(
                (batch.contiguous(memory_format=self._form), torch.tensor(labels[k : k + size]))
            )
        return made

    def step(self, images: Any, labels: Any) -> float:
        loss = self._torch.nn.functional.cross_entropy(self._net(images), labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())


class TorchNetLast(TorchNet):
    """PyTorch, channels last in memory."""

    format = "NHWC"


NETS: dict[str, type[Net]] = {
    "gpuconv": GpuconvNet,
    "torch:NCHW": TorchNet,
    "torch:NHWC": TorchNetLast,
}


def _tensor(torch: Any, array: Array, axes: tuple[int, ...]) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(axes)))


def _side(tensors: dict[str, Array], channels: tuple[int, ...]) -> int:
    """Return the image's side, from the number of rows of the dense weights."""
    blocks = len(channels)
    small = round((len(tensors[f"{dense_layer(blocks)}.W"]) // channels[-1]) ** 0.5)
    return int(small * 2 ** (blocks - 1))


class NetWorker:
    """What the process holds between requests."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer = peer
        self.base = PEERS[peer.partition(":")[0]]
        self.why = self.base.missing()
        self.versions = {} if self.why else self.base(threads).versions()  # and sets the threads
        self.net: Net | None = None
        self.batches: list[tuple[Any, Any]] = []
        self.at = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says; the fields are the arguments of the method that ``op`` names."""
        arguments = dict(request)
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "hello": self.hello,
            "load": self.load,
            "train": self.train,
        }
        return operations[arguments.pop("op")](**arguments)

    def hello(self) -> dict[str, Any]:
        """Return why the peer cannot run here, or its versions."""
        return {"missing": self.why} if self.why else {"versions": self.versions}

    def load(self, file: str, channels: list[int], batch: int) -> dict[str, Any]:
        """Make the net and the batches."""
        with np.load(file) as found:
            tensors = {name: found[name] for name in found.files}
        images, labels = tensors.pop("images"), tensors.pop("labels")
        self.net = NETS[self.peer](tensors, tuple(channels))
        self.batches = self.net.batches(images, labels, batch)
        gc.collect()
        gc.freeze()
        return {}

    def train(self, steps: int) -> dict[str, Any]:
        """Train so many steps further; return the losses and the seconds of each."""
        if self.net is None:
            raise RuntimeError("no net")
        losses, times = [], []
        gc.collect()
        for _ in range(steps):
            images, labels = self.batches[self.at % len(self.batches)]
            self.at += 1
            start = time.perf_counter()
            losses.append(self.net.step(images, labels))
            times.append(time.perf_counter() - start)
        return {"losses": losses, "times": times}


if __name__ == "__main__":
    sys.exit(serve(lambda: NetWorker(sys.argv[1], int(sys.argv[2])).answer))
