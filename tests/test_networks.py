"""The networks by name: their shapes, that they learn, and ResNet-20 beside PyTorch's."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

from gpuconv import io
from gpuconv.losses import CrossEntropy
from gpuconv.models import MODELS, Sequential, lenet5, make_model, resnet20, vgg_small

RNG = np.random.default_rng(11)
COUNTS = {"lenet5": 61706, "resnet20": 269722 + 16 + 16 * 6 + 32 * 6 + 64 * 6, "vgg_small": None}


@pytest.mark.parametrize("name", MODELS)
def test_sizes(name: str) -> None:
    model = MODELS[name]()
    shape = (32, 32, 1 if name == "lenet5" else 3)
    assert model.build((2, *shape)) == (2, 10)
    trained = sum(v.size for k, v in model.gradients.items())
    if COUNTS[name] is not None:
        assert trained == COUNTS[name]
    # Without the biases that normalisation takes off, the paper's 0.27 million.
    for rows, columns, channels in ((28, 28, 1), (8, 8, 1), (4, 5, 2), (40, 33, 3)):
        assert make_model(name, (rows, columns, channels), 4).build(
            (1, rows, columns, channels)
        ) == (1, 4)


@pytest.mark.parametrize("name", MODELS)
def test_learns(name: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 24)
    X = rng.standard_normal((24, 8, 8, 1)).astype("float32") * 0.3
    X[np.arange(24), labels + 2] += 1
    model = make_model(name, (8, 8, 1), 3, optimizer="Adam(lr=0.003)", rng=1)
    losses = []
    for _ in range(12):
        loss, gradient = CrossEntropy.from_logits(labels, model.forward(X))
        losses.append(float(loss))
        model.backward(gradient, input_grad=False)
        model.update(losses[-1])
    assert losses[-1] < 0.3 * losses[0]


def twin(torch: Any) -> Any:
    """Return ResNet-20 for CIFAR-10 in PyTorch, convolutions without bias as its authors have."""
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, before: int, channels: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.stride, self.more = stride, (channels - before) // 2

        def forward(self, x: Any) -> Any:
            y = F.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            around = x[:, :, :: self.stride, :: self.stride]
            return F.relu(y + F.pad(around, (0, 0, 0, 0, self.more, self.more)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2
            sizes += [(32, 64, 2)] + [(64, 64, 1)] * 2
            self.blocks = nn.ModuleList(Block(*s) for s in sizes)
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = F.relu(self.bn1(self.conv1(x)))
            for block in self.blocks:
                x = block(x)
            return self.linear(x.mean(dim=(2, 3)))

    return Net().double()


def names() -> dict[str, str]:
    found = {"0": "conv1", "1": "bn1", "13": "linear"}
    for k in range(9):
        for ours, theirs in (("conv1", "conv1"), ("batchnorm1", "bn1"), ("conv2", "conv2"),
                             ("batchnorm2", "bn2")):  # fmt: skip
            found[f"{k + 2}.{ours}"] = f"blocks.{k}.{theirs}"
    return found


def test_resnet20_beside_pytorch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = twin(torch)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    model = resnet20()
    model.build((1, 32, 32, 3), "float64")
    io.from_state_dict(model, net.state_dict(), names())
    x = RNG.standard_normal((4, 32, 32, 3))
    labels = np.array([3, 1, 4, 1])
    first = torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), requires_grad=True)
    logits = net(first)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    loss.backward()
    ours = model.forward(x)
    np.testing.assert_allclose(ours, logits.detach().numpy(), atol=1e-10)
    value, gradient = CrossEntropy.from_logits(labels, ours)
    assert float(value) == pytest.approx(loss.item(), abs=1e-12)
    dX = model.backward(gradient)
    np.testing.assert_allclose(dX, first.grad.numpy().transpose(0, 2, 3, 1), atol=1e-10)
    # Gradients go through the mapping of the weights: as a state_dict of their own.
    holder = Sequential.from_config(model.config())
    holder.build((1, 32, 32, 3), "float64")
    zeros = {k: np.zeros_like(v) for k, v in model.parameters.items()}
    holder.load_tensors({**zeros, **model.gradients})
    found = io.to_state_dict(holder, names())
    compared = 0
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), atol=1e-10, err_msg=name)
        compared += 1
    assert compared == 3 * 19 + 2
    biases = [v for k, v in model.gradients.items() if k.endswith(".b") and not k.startswith("13")]
    assert max(np.abs(b).max() for b in biases) < 1e-10
    # And for inference, from the statistics.
    io.from_state_dict(model, net.state_dict(), names())
    want = net.eval()(first).detach().numpy()
    np.testing.assert_allclose(model.forward(x, retain_derived=False), want, atol=1e-9)


def test_state_goes_on_exactly() -> None:
    """A network with modules, stopped after a step and taken up again, gives the same weights."""
    labels = np.array([0, 1, 2, 0])
    X = RNG.standard_normal((4, 6, 6, 1)).astype("float32")

    def step(model: Sequential) -> None:
        _, gradient = CrossEntropy.from_logits(labels, model.forward(X))
        model.backward(gradient, input_grad=False)
        model.update()

    model = resnet20((6, 6, 1), 3, optimizer="Adam", rng=0)
    step(model)
    again = Sequential.from_config(model.config())
    again.set_optimizer("Adam")
    again.build((1, 6, 6, 1))
    again.load_tensors(model.tensors())
    again.load_state(model.state(), model.state_tensors())
    for net in (model, again):
        step(net)
    for name, value in model.tensors().items():
        np.testing.assert_array_equal(value, again.tensors()[name])


def test_frozen_blocks_keep_their_statistics() -> None:
    model = resnet20((6, 6, 1), 3, rng=0)
    model.build((1, 6, 6, 1))
    for layer in model.layers[:5]:
        layer.freeze()
    before = model.tensors()
    X = RNG.standard_normal((4, 6, 6, 1)).astype("float32")
    Y = model.forward(X)
    model.backward(np.ones_like(Y), input_grad=False)
    model.update()
    changed = {k for k, v in model.tensors().items() if (v != before[k]).any()}
    assert changed
    assert min(int(k.partition(".")[0]) for k in changed) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lenet5((3, 9, 1)), "image_shape is 3"),
        (lambda: resnet20((8, 8)), "image_shape is"),
        (lambda: vgg_small((8, 8, 3), 1), "classes is 1"),
        (lambda: make_model("alexnet", (8, 8, 3), 2), "model is 'alexnet'.*lenet5"),
    ],
)
def test_wrong_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loop_trains_each(name: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    from gpuconv.training.loop import fit
    from gpuconv.training.precision import precision_for
    from gpuconv.training.recipe import Recipe, make_network

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 36)
    X = rng.standard_normal((36, 8, 8, 1)).astype("float32") * 0.3
    X[np.arange(36), labels + 2] += 1
    recipe = Recipe(epochs=4, batch_size=12, model=name, dtype=dtype)
    assert Recipe.from_json(recipe.to_json()) == recipe
    net = make_network(recipe, (8, 8, 1), 3, 36, "cpu")
    assert [type(x) for x in net.layers] == [type(x) for x in make_model(name, (8, 8, 1), 3).layers]
    done = fit(
        net, (X, labels), (X, labels), epochs=4, batch_size=12, precision=precision_for(dtype)
    )
    assert done.history[-1].train_loss < done.history[0].train_loss


def test_recipes_without_a_model_are_older_ones() -> None:
    from gpuconv.training.recipe import Recipe

    values = Recipe(lr=0.25).to_json()
    del values["model"]
    assert Recipe.from_json(values) == Recipe(lr=0.25)
    with pytest.raises(ValueError, match=r"model is 'alexnet'; expected one of auto, lenet5"):
        Recipe(model="alexnet")


def test_a_bad_weight_within_a_block_is_named() -> None:
    from gpuconv.training.loop import DivergedError, fit

    model = resnet20((6, 6, 1), 3, optimizer="SGD", rng=0)
    model.build((1, 6, 6, 1))
    model[4].conv2.parameters["W"][0, 0, 0, 0] = np.nan
    X, y = np.ones((6, 6, 6, 1), "float32"), np.array([0, 1, 2] * 2)
    with pytest.raises(DivergedError, match=r"layer 4 \(.*\(conv2\.W\)"):
        fit(model, (X, y), (X, y), epochs=1)


def test_the_command_knows_them() -> None:
    from gpuconv.training.command import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    choices = next(a.choices for a in parser._actions if "--model" in a.option_strings)
    assert choices == ["auto", *MODELS]
