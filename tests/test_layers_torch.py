"""Every layer against PyTorch: random shapes and options, results, and all gradients in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuconv.layers import (
    Add,
    BatchNorm1D,
    BatchNorm2D,
    Conv1D,
    Conv2D,
    Deconv2D,
    Dropout,
    Flatten,
    FullyConnected,
    LayerNorm1D,
    LayerNorm2D,
    Multiply,
    Pool2D,
    Softmax,
)  # fmt: skip
from gpuconv.modules import ResidualBlock, SkipConnectionConvModule, SkipConnectionIdentityModule

torch = pytest.importorskip("torch")
F = torch.nn.functional

CASES = 40
Rng = np.random.Generator
ACTIVATIONS: dict[str | None, Callable[[Any], Any]] = {
    None: lambda z: z,
    "ReLU": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "ELU": F.elu,
    "SELU": F.selu,
    "SoftPlus": F.softplus,
    "HardSigmoid": lambda z: (0.2 * z + 0.5).clip(0, 1),
    "Affine(slope=2, intercept=1)": lambda z: 2 * z + 1,
    "Leaky ReLU(alpha=0.3)": lambda z: F.leaky_relu(z, 0.3),
    "GELU(approximate=False)": F.gelu,
}


def pick(rng: Rng, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def size(rng: Rng, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def activation(rng: Rng) -> Any:
    return pick(rng, *ACTIVATIONS)


# Each maker returns a layer, its input (or list of inputs), and the same in PyTorch as a function
# of the inputs and the parameters by name; arrays are channels last on both sides.
Made = tuple[Any, Any, Callable[..., Any]]


def first(x: Any) -> Any:
    return x.movedim(-1, 1).contiguous()


def last(x: Any) -> Any:
    return x.movedim(1, -1)


def flat(p: Any) -> Any:
    return p.reshape(-1)


def conv1d(rng: Rng) -> Made:
    width, dilation, stride = size(rng, 1, 4), size(rng, 0, 2), size(rng, 1, 3)
    window = (dilation + 1) * (width - 1) + 1
    pad: Any = pick(rng, 0, 2, (1, 2), (0, 3), "same", "causal")
    length = size(rng, max(2, window), window + 6)
    act = activation(rng)
    layer = Conv1D(size(rng, 1, 4), width, pad, stride, dilation, act, rng=rng)
    total = stride * (length - 1) + window - length
    ends = {"same": (total // 2, total - total // 2), "causal": (total, 0)}.get(
        str(pad), (pad, pad) if isinstance(pad, int) else pad
    )

    def same(x: Any, W: Any, b: Any) -> Any:
        x = F.pad(first(x), ends)
        weights = W.permute(2, 1, 0)
        return ACTIVATIONS[act](
            last(F.conv1d(x, weights, flat(b), stride=stride, dilation=dilation + 1))
        )

    return layer, rng.standard_normal((size(rng, 1, 3), length, size(rng, 1, 4))), same


def conv2d(rng: Rng) -> Made:
    kernel, stride, dilation = (size(rng, 1, 3), size(rng, 1, 3)), size(rng, 1, 3), size(rng, 0, 1)
    pad: Any = pick(rng, 0, 1, (1, 2), (0, 1, 2, 1), "same")
    window = [(dilation + 1) * (k - 1) + 1 for k in kernel]
    shape = [size(rng, w, w + 5) for w in window]
    act = activation(rng)
    layer = Conv2D(size(rng, 1, 4), kernel, pad, stride, dilation, act, rng=rng)
    if pad == "same":
        totals = [stride * (n - 1) + w - n for n, w in zip(shape, window, strict=True)]
        (t, u), (v, w) = ((s // 2, s - s // 2) for s in totals)
    else:
        t, u, v, w = (pad,) * 4 if isinstance(pad, int) else pad if len(pad) == 4 else (
            pad[0], pad[0], pad[1], pad[1])  # fmt: skip

    def same(x: Any, W: Any, b: Any) -> Any:
        x = F.pad(first(x), (v, w, t, u))
        y = F.conv2d(
            x, W.permute(3, 2, 0, 1).contiguous(), flat(b), stride=stride, dilation=dilation + 1
        )
        return ACTIVATIONS[act](last(y))

    return layer, rng.standard_normal((size(rng, 1, 3), *shape, size(rng, 1, 4))), same


def deconv2d(rng: Rng) -> Made:
    kernel, stride = (size(rng, 1, 4), size(rng, 1, 4)), (size(rng, 1, 3), size(rng, 1, 3))
    pad: Any = pick(rng, 0, (0, 1), (1, 0, 0, 2), "same")
    shape = (size(rng, 2, 5), size(rng, 2, 5))
    act = activation(rng)
    if pad == "same":
        (t, u), (v, w) = ((k // 2, (k - 1) // 2) for k in kernel)
    else:
        t, u, v, w = (pad,) * 4 if isinstance(pad, int) else pad if len(pad) == 4 else (
            pad[0], pad[0], pad[1], pad[1])  # fmt: skip
    whole = [s * (n - 1) + k for n, k, s in zip(shape, kernel, stride, strict=True)]
    if whole[0] <= t + u or whole[1] <= v + w:
        return deconv2d(rng)
    layer = Deconv2D(size(rng, 1, 4), kernel, pad, stride, act, rng=rng)

    def same(x: Any, W: Any, b: Any) -> Any:
        y = F.conv_transpose2d(first(x), W.permute(2, 3, 0, 1).contiguous(), stride=stride)
        y = y[:, :, t : y.shape[2] - u, v : y.shape[3] - w]
        return ACTIVATIONS[act](last(y) + b)

    return layer, rng.standard_normal((size(rng, 1, 3), *shape, size(rng, 1, 4))), same


def pool2d(rng: Rng) -> Made:
    kernel, stride = (size(rng, 1, 3), size(rng, 1, 3)), size(rng, 1, 3)
    mode = pick(rng, "max", "average")
    pad: Any = pick(rng, 0, 1, (1, 0, 2, 1))
    t, u, v, w = (pad,) * 4 if isinstance(pad, int) else pad

    def same(x: Any) -> Any:
        x = F.pad(first(x), (v, w, t, u))
        return last((F.max_pool2d if mode == "max" else F.avg_pool2d)(x, kernel, stride))

    shape = (size(rng, 1, 3), size(rng, 3, 8), size(rng, 3, 8), size(rng, 1, 4))
    return Pool2D(kernel, stride, pad, mode), rng.integers(0, 4, shape).astype(float), same


def fully_connected(rng: Rng) -> Made:
    act = activation(rng)
    layer = FullyConnected(size(rng, 1, 6), act, rng=rng)
    X = rng.standard_normal((size(rng, 1, 6), size(rng, 1, 6)))
    return layer, X, lambda x, W, b: ACTIVATIONS[act](x @ W + b)


def flatten(rng: Rng) -> Made:
    keep = pick(rng, "first", "last", -1)
    X = rng.standard_normal(tuple(size(rng, 1, 4) for _ in range(size(rng, 2, 5))))
    shape = {"first": (len(X), -1), "last": (-1, X.shape[-1]), -1: (1, -1)}[keep]
    return Flatten(keep), X, lambda x: x.reshape(shape)


def softmax(rng: Rng) -> Made:
    X = rng.standard_normal(tuple(size(rng, 1, 5) for _ in range(size(rng, 2, 4))))
    dim = int(rng.integers(-X.ndim, X.ndim))
    return Softmax(dim), 4 * X, lambda x: torch.softmax(x, dim)


def add(rng: Rng) -> Made:
    act, shape = activation(rng), tuple(size(rng, 1, 4) for _ in range(size(rng, 1, 4)))
    X = [rng.standard_normal(shape) for _ in range(size(rng, 1, 4))]
    return Add(act), X, lambda *xs: ACTIVATIONS[act](sum(xs))


def multiply(rng: Rng) -> Made:
    act, shape = activation(rng), tuple(size(rng, 1, 4) for _ in range(size(rng, 1, 4)))
    X = [rng.standard_normal(shape) for _ in range(size(rng, 1, 4))]
    return Multiply(act), X, lambda *xs: ACTIVATIONS[act](torch.stack(xs).prod(0))


def batch_norm(axes: int) -> Callable[[Rng], Made]:
    def make(rng: Rng) -> Made:
        epsilon = pick(rng, 1e-5, 1e-2)
        layer = (BatchNorm2D if axes else BatchNorm1D)(0.9, epsilon, rng=rng)
        shape = (size(rng, 2, 5), *(size(rng, 1, 6) for _ in range(axes)), size(rng, 1, 5))
        X = rng.standard_normal(shape) * rng.uniform(0.1, 9) + rng.normal(0, 20)

        def same(x: Any, scaler: Any, intercept: Any, **running: Any) -> Any:
            return last(F.batch_norm(first(x), None, None, scaler, intercept, True, eps=epsilon))

        return layer, X, same

    return make


def layer_norm(axes: int) -> Callable[[Rng], Made]:
    def make(rng: Rng) -> Made:
        epsilon = pick(rng, 1e-5, 1e-2)
        layer = (LayerNorm2D if axes else LayerNorm1D)(epsilon, rng=rng)
        shape = (size(rng, 1, 5), *(size(rng, 1, 6) for _ in range(axes)), size(rng, 1, 7))
        X = rng.standard_normal(shape) * rng.uniform(0.1, 9) + rng.normal(0, 20)
        return (
            layer,
            X,
            lambda x, scaler, intercept: F.layer_norm(x, shape[1:], scaler, intercept, epsilon),
        )

    return make


def norm(x: Any, part: dict[str, Any]) -> Any:
    return last(F.batch_norm(first(x), None, None, part["scaler"], part["intercept"], True))


def conv(x: Any, part: dict[str, Any], pads: Any, stride: int) -> Any:
    x = F.pad(first(x), pads)
    return last(
        F.conv2d(x, part["W"].permute(3, 2, 0, 1).contiguous(), flat(part["b"]), stride=stride)
    )


def same_pads(n: tuple[int, int], k: tuple[int, int], stride: int) -> tuple[int, ...]:
    totals = [stride * (a - 1) + b - a for a, b in zip(n, k, strict=True)]
    (t, u), (v, w) = ((s // 2, s - s // 2) for s in totals)
    return (v, w, t, u)


def identity_module(rng: Rng) -> Made:
    shape, channels = (size(rng, 3, 6), size(rng, 3, 6)), size(rng, 1, 3)
    k1, k2 = (size(rng, 1, 3), size(rng, 1, 3)), (size(rng, 1, 3), size(rng, 1, 3))
    s1, s2, act = size(rng, 1, 2), size(rng, 1, 2), pick(rng, None, "ReLU", "Tanh")
    layer = SkipConnectionIdentityModule(size(rng, 1, 4), k1, k2, s1, s2, act, rng=rng)

    def same(x: Any, **p: Any) -> Any:
        y = ACTIVATIONS[act](conv(x, p["conv1"], same_pads(shape, k1, s1), s1))
        y = conv(norm(y, p["batchnorm1"]), p["conv2"], same_pads(shape, k2, s2), s2)
        return ACTIVATIONS[act](x + norm(y, p["batchnorm2"]))

    return layer, rng.standard_normal((size(rng, 2, 3), *shape, channels)), same


def conv_module(rng: Rng) -> Made:
    shape = (size(rng, 5, 8), size(rng, 5, 8))
    k1, k2, k3 = ((size(rng, 1, 3), size(rng, 1, 3)) for _ in range(3))
    pad1, pad2 = size(rng, 0, 1), pick(rng, 0, (1, 0))
    s1, s3, act = size(rng, 1, 2), size(rng, 1, 2), pick(rng, None, "ReLU", "Sigmoid")
    out = size(rng, 1, 3)
    layer = SkipConnectionConvModule(
        size(rng, 1, 3), out, k1, k2, k3, pad1, pad2, s1, 1, act, stride_skip=s3, rng=rng
    )
    X = rng.standard_normal((size(rng, 2, 3), *shape, size(rng, 1, 3)))
    try:
        layer.build(X.shape, "float64")
    except ValueError as error:  # no padding fits, or the image is too small
        if not any(word in str(error) for word in ("stride_skip", "expected at least the kernel")):
            raise
        return conv_module(rng)
    t, u, v, w = layer.pad_skip
    p2, q2 = (pad2, pad2) if isinstance(pad2, int) else pad2

    def same(x: Any, **p: Any) -> Any:
        y = ACTIVATIONS[act](conv(x, p["conv1"], (pad1,) * 4, s1))
        y = conv(norm(y, p["batchnorm1"]), p["conv2"], (q2, q2, p2, p2), 1)
        around = norm(conv(x, p["conv_skip"], (v, w, t, u), s3), p["batchnorm_skip"])
        return ACTIVATIONS[act](around + norm(y, p["batchnorm2"]))

    return layer, X, same


def residual_block(rng: Rng) -> Made:
    channels, stride = size(rng, 1, 3), size(rng, 1, 2)
    out, act = channels + size(rng, 0, 3), pick(rng, "ReLU", "Tanh")
    layer = ResidualBlock(out, stride, act, rng=rng)
    before = (out - channels) // 2
    more = (before, out - channels - before)

    def same(x: Any, **p: Any) -> Any:
        y = ACTIVATIONS[act](norm(conv(x, p["conv1"], (1,) * 4, stride), p["batchnorm1"]))
        y = norm(conv(y, p["conv2"], (1,) * 4, 1), p["batchnorm2"])
        return ACTIVATIONS[act](F.pad(x[:, ::stride, ::stride], more) + y)

    shape = (size(rng, 2, 3), size(rng, 3, 6), size(rng, 3, 6), channels)
    return layer, rng.standard_normal(shape), same


def dropout(rng: Rng) -> Made:
    layer, X, same = fully_connected(rng)
    p = rng.uniform(0, 0.9)
    wrapper = Dropout(layer, p, rng=rng)

    def masked(x: Any, **parameters: Any) -> Any:
        mask = torch.tensor(wrapper.derived_variables["wrappers"][0]["dropout_mask"][0])
        return same(x * mask, **parameters) / (1 - p)

    return wrapper, X, masked


MAKERS: dict[str, Callable[[Rng], Made]] = {
    "Conv1D": conv1d, "Conv2D": conv2d, "Deconv2D": deconv2d, "Pool2D": pool2d,
    "FullyConnected": fully_connected, "Flatten": flatten, "Softmax": softmax, "Add": add,
    "Multiply": multiply, "BatchNorm1D": batch_norm(0), "BatchNorm2D": batch_norm(2),
    "LayerNorm1D": layer_norm(0), "LayerNorm2D": layer_norm(2), "Dropout": dropout,
    "SkipConnectionIdentityModule": identity_module, "SkipConnectionConvModule": conv_module,
    "ResidualBlock": residual_block,
}  # fmt: skip


def leaves(values: Any) -> Any:
    """Return nested dictionaries of arrays as tensors that collect gradients."""
    if isinstance(values, dict):
        return {k: leaves(v) for k, v in values.items()}
    return torch.tensor(values, requires_grad=True)


def compare(want: Any, got: Any, name: str) -> None:
    for key, value in got.items():
        if isinstance(value, dict):
            compare(want[key], value, f"{name}.{key}")
        else:
            grad = want[key].grad
            np.testing.assert_allclose(
                value, 0 if grad is None else grad.numpy(), atol=1e-8, rtol=1e-8, err_msg=name + key
            )


@pytest.mark.parametrize("name", MAKERS)
def test_against_pytorch(name: str) -> None:
    for seed in range(CASES):
        rng = np.random.default_rng([seed, len(name)])
        layer, X, same = MAKERS[name](rng)
        Y = layer.forward(X)
        dY = rng.standard_normal(Y.shape)
        kept = dY.copy()
        dX = layer.backward(dY)
        np.testing.assert_array_equal(dY, kept)
        several = X if isinstance(X, list) else [X]
        xs = [torch.tensor(x, requires_grad=True) for x in several]
        parameters = leaves(layer.parameters)
        y = same(*xs, **parameters.get("components", parameters))
        y.backward(torch.tensor(dY))
        where = f"{name}, case {seed}, {layer.hyperparameters}"
        np.testing.assert_allclose(Y, y.detach().numpy(), atol=1e-9, rtol=1e-9, err_msg=where)
        for got, x in zip(dX if isinstance(X, list) else [dX], xs, strict=True):
            np.testing.assert_allclose(got, x.grad.numpy(), atol=1e-8, rtol=1e-8, err_msg=where)
        compare(parameters, layer.gradients, where)


@pytest.mark.parametrize("axes", [0, 2])
def test_running_statistics_against_pytorch(axes: int) -> None:
    """The mean is PyTorch's; the variance differs by the batch's size over one less."""
    rng = np.random.default_rng(axes)
    shape = (5, *(4, 3)[:axes], 6)
    layer = (BatchNorm2D if axes else BatchNorm1D)(momentum=0.8, rng=0)
    twin = torch.nn.BatchNorm1d(6, momentum=0.2, dtype=torch.float64)
    count = 5 * 12 if axes else 5
    variance = np.ones(6)
    for _ in range(4):
        X = rng.standard_normal(shape) * 3 + 1
        layer.forward(X)
        twin(torch.tensor(X).reshape(-1, 6))
        variance = 0.8 * variance + 0.2 * X.reshape(-1, 6).var(axis=0)
    np.testing.assert_allclose(layer.parameters["running_mean"], twin.running_mean, atol=1e-12)
    np.testing.assert_allclose(layer.parameters["running_var"], variance, atol=1e-12)
    unbiased = 0.8**4 + (layer.parameters["running_var"] - 0.8**4) * count / (count - 1)
    np.testing.assert_allclose(unbiased, twin.running_var, atol=1e-12)
    with torch.no_grad():
        twin.running_var[:] = torch.tensor(variance)
        twin.weight[:] = torch.tensor(layer.parameters["scaler"])
    want = twin.eval()(torch.tensor(X).reshape(-1, 6)).detach().numpy().reshape(shape)
    np.testing.assert_allclose(layer.forward(X, retain_derived=False), want, atol=1e-12)
