"""Networks in files: gpuconv's own, PyTorch's state_dict, ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuconv import io
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
from gpuconv.models import Sequential
from gpuconv.modules import ResidualBlock, SkipConnectionConvModule, SkipConnectionIdentityModule

RNG = np.random.default_rng(5)


def everything() -> list[Any]:
    """Return layers of every kind, for images of 12 x 10 with 2 channels."""
    return [
        Conv2D(4, (3, 3), (0, 1, 2, 1), act_fn="LeakyReLU(0.2)"),
        BatchNorm2D(),
        SkipConnectionIdentityModule(3, (3, 3), (2, 2), act_fn="ReLU"),
        SkipConnectionConvModule(3, 6, (3, 3), (3, 3), (1, 1), 1, 1, 2, act_fn="Tanh", stride_skip=2),
        ResidualBlock(8, 2),
        Deconv2D(5, (3, 2), (1, 0, 0, 1), 2, "ELU(alpha=0.7)"),
        LayerNorm2D(),
        Pool2D((2, 2), 1, (1, 0, 1, 1), "average"),
        Pool2D((2, 3), (2, 1), (0, 1, 1, 1)),
        Dropout(Conv2D(3, (2, 2), act_fn="GELU", stride=2, pad="same"), 0.3),
        Flatten(),
        BatchNorm1D(),
        Dropout(FullyConnected(7, "SELU"), 0.5),
        LayerNorm1D(),
        FullyConnected(4, "GELU(approximate=False)"),
        Softmax(),
    ]  # fmt: skip


SHAPE = (12, 10, 2)


def trained(layers: list[Any] | None = None, shape: Any = SHAPE, dtype: str = "float32") -> Any:
    """Return a network after two steps, so that its statistics are not the first ones."""
    model = Sequential(layers or everything(), optimizer="SGD(lr=0.01)", rng=3)
    for _ in range(2):
        Y = model.forward(images(shape, dtype))
        model.backward(np.ones_like(Y) * RNG.standard_normal(Y.shape).astype(dtype), True)
        model.update()
    return model


def images(shape: Any, dtype: str = "float32", n: int = 3) -> np.ndarray:
    return RNG.standard_normal((n, *shape)).astype(dtype)


# ------------------------------------------------------------------------------ our own files


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_comes_back_from_its_file(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("safetensors")
    model = trained(dtype=dtype)
    io.save(model, tmp_path / "a.safetensors")
    again = io.load(tmp_path / "a.safetensors")
    X = images(SHAPE, dtype)
    np.testing.assert_array_equal(
        again.forward(X, retain_derived=False), model.forward(X, retain_derived=False)
    )
    assert again.config() == model.config()
    io.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_every_layer_has_a_description() -> None:
    layers = [*everything(), Conv1D(2, 3, "causal", act_fn="Tanh"), Add("ReLU"), Multiply()]
    model = Sequential(layers)
    text = json.dumps(model.config())
    again = Sequential.from_config(json.loads(text))
    assert again.config() == model.config()
    assert [type(x) for x in again.layers] == [type(x) for x in layers]


def test_damaged_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = trained([Conv2D(2, (2, 2)), Flatten(), FullyConnected(2)], (4, 4, 1))
    path = tmp_path / "net.safetensors"
    io.save(model, path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-8], "truncated"),
        (whole.replace(b"FullyConnected", b"FullyConnectes"), "FullyConnectes"),
        (whole.replace(b'\\"out_ch\\": 2', b'\\"out_ch\\": 3'), "expected float32 of shape"),
        (whole.replace(b'\\"input_shape\\": [4, 4', b'\\"input_shape\\": [4, 0'), "input_shape"),
        (whole.replace(b'"version":"1"', b'"version":"9"'), "version 9"),
        (whole.replace(b'\\"kind\\": \\"network\\"', b'\\"kind\\": \\"pudding\\"'), "a pudding"),
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            io.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        io.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="build"):
        io.save(Sequential([Flatten()]), path)
    with pytest.raises(TypeError, match="model is a list"):
        io.save([], path)
    model[0].parameters["W"][0] = np.nan
    with pytest.raises(ValueError, match=r"0\.W holds NaN"):
        io.save(model, tmp_path / "nan.safetensors")
    assert not (tmp_path / "nan.safetensors").exists()


# -------------------------------------------------------------------------------- PyTorch


def twin(torch: Any) -> Any:
    """Return PyTorch's network of the test below, with names of its own."""
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, (3, 2), padding=1)
            self.bn1 = nn.BatchNorm2d(4)
            self.up = nn.ConvTranspose2d(4, 5, (2, 3), stride=2)
            self.ln = nn.LayerNorm((5, 10, 17))
            self.conv2 = nn.Conv2d(5, 2, 3, stride=2, bias=False)
            self.bn = nn.BatchNorm1d(64)
            self.fc = nn.Linear(64, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            x = self.conv2(self.ln(self.up(x)))
            return self.head(torch.tanh(self.fc(self.bn(x.flatten(1)))))

    return Net().double()


NAMES = {"0": "conv1", "1": "bn1", "3": "up", "4": "ln", "5": "conv2", "7": "bn", "8": "fc", "9": "head"}  # fmt: skip


def test_state_dicts_in_and_out(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = twin(torch)
    x = torch.randn(5, 3, 5, 7, dtype=torch.float64)
    net(x)  # moves the statistics
    net.eval()
    model = Sequential(
        [
            Conv2D(4, (3, 2), pad=1), BatchNorm2D(), Conv2D(4, (1, 1), act_fn="ReLU"),
            Deconv2D(5, (2, 3), 0, 2), LayerNorm2D(), Conv2D(2, (3, 3), stride=2), Flatten(),
            BatchNorm1D(), FullyConnected(6, "Tanh"), FullyConnected(3),
        ],
        rng=1,
    )  # fmt: skip
    model.build((1, 5, 7, 3), "float64")
    state = dict(net.state_dict())
    # The ReLU stands in a convolution with the identity, as PyTorch has it by itself.
    state["2.weight"] = torch.eye(4, dtype=torch.float64)[:, :, None, None]
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    io.load_state_dict(model, path, NAMES)
    want = net(x).detach().numpy()
    got = model.forward(x.numpy().transpose(0, 2, 3, 1), retain_derived=False)
    np.testing.assert_allclose(got, want, atol=1e-12)
    for end in (".pt", ".safetensors"):
        if end == ".safetensors":
            pytest.importorskip("safetensors")
        path = tmp_path / f"out{end}"
        io.save_state_dict(model, path, NAMES)
        if end == ".pt":
            written = torch.load(path, weights_only=True)
            fits = {k: v for k, v in written.items() if not k.startswith("2.")}
            assert fits.pop("conv2.bias").abs().max() == 0
            fresh = twin(torch)
            missing = fresh.load_state_dict(fits, strict=False)
            assert not missing.unexpected_keys
            assert all(k.endswith("num_batches_tracked") for k in missing.missing_keys)
            np.testing.assert_array_equal(fresh.eval()(x).detach().numpy(), want)
        blank = Sequential.from_config(model.config())
        blank.build((1, 5, 7, 3), "float64")
        io.load_state_dict(blank, path, NAMES)
        np.testing.assert_array_equal(blank.forward(x.numpy().transpose(0, 2, 3, 1), False), got)


def test_state_dict_without_names_is_that_of_a_sequential() -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    model = Sequential([Conv1D(3, 3), Flatten(), FullyConnected(4), LayerNorm1D()], rng=0)
    model.build((1, 6, 2))
    io.from_state_dict(model, net.state_dict())
    x = images((6, 2))
    want = net(torch.tensor(x.transpose(0, 2, 1).copy())).detach().numpy()
    np.testing.assert_allclose(model.forward(x), want, atol=1e-5)
    half = {k: v.to(torch.bfloat16) for k, v in net.state_dict().items()}
    io.from_state_dict(model, half)
    assert model.parameters["0.W"].dtype == "float32"


def test_bfloat16_goes_through_every_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    layers = [Conv2D(4, (3, 3)), BatchNorm2D(act_fn="ReLU"), Flatten(), FullyConnected(3)]
    model = Sequential(layers, rng=0)
    model.build((1, 6, 5, 1), "bfloat16")
    x = images((6, 5, 1)).astype("bfloat16")
    want = model.forward(x, False)
    io.save(model, tmp_path / "own.safetensors")
    read = [io.load(tmp_path / "own.safetensors")]
    for name in ("a.pt", "a.safetensors"):
        io.save_state_dict(model, tmp_path / name)
        read.append(Sequential.from_config(model.config()))
        read[-1].build((1, 6, 5, 1), "bfloat16")
        io.load_state_dict(read[-1], tmp_path / name)
    for other in read:
        assert other.dtype == want.dtype.name == "bfloat16"
        assert other.forward(x, False).tobytes() == want.tobytes()
    assert torch.load(tmp_path / "a.pt")["0.weight"].dtype == torch.bfloat16
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(io.export_onnx(model))  # in float32, as ONNX has no other
    found = session.run(None, {"X": x.astype("float32")})[0]
    np.testing.assert_allclose(found, want.astype("float32"), atol=2e-2)


def test_components_of_modules_have_names() -> None:
    model = Sequential([ResidualBlock(4, 2)], rng=0)
    model.build((1, 6, 6, 2))
    state = io.to_state_dict(model, {"0.conv1": "layer1.0.conv1", "0.batchnorm1": "layer1.0.bn1"})
    assert state["layer1.0.conv1.weight"].shape == (4, 2, 3, 3)
    assert state["layer1.0.bn1.running_var"].shape == (4,)
    assert state["0.conv2.bias"].shape == (4,)


def test_state_dicts_that_do_not_fit(tmp_path: Path) -> None:
    model = Sequential([Conv2D(2, (2, 2)), Flatten(), FullyConnected(2)], rng=0)
    with pytest.raises(ValueError, match="build"):
        io.to_state_dict(model)
    model.build((1, 4, 4, 1))
    before = model.tensors()
    state = io.to_state_dict(model)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        ({k: v for k, v in state.items() if k != "0.weight"}, None, ValueError, r"lacks 0\.weight"),
        ({**state, "3.weight": np.ones(2)}, None, ValueError, r"\['3\.weight'\]"),
        ({**state, "0.weight": np.ones((2, 2, 2, 1))}, None, ValueError, r"0\.weight has shape"),
        ({**state, "2.weight": np.ones((2, 18), int)}, None, TypeError, "int64"),
        (state, {"7": "conv"}, ValueError, r"\['7'\]"),
        (state, ["conv"], TypeError, "names is a list"),
        ([1], None, TypeError, "state is a list"),
    ]
    for values, names, error, message in wrong:
        with pytest.raises(error, match=message):
            io.from_state_dict(model, values, names)
    with pytest.raises(ValueError, match="twice"):
        io.to_state_dict(model, {"0": "a", "2": "a"})
    for name, value in model.tensors().items():
        np.testing.assert_array_equal(value, before[name])
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"nothing")
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"bad\.pt"):
        io.load_state_dict(model, bad)
    pytest.importorskip("safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        io.load_state_dict(model, bad)


# ------------------------------------------------------------------------------------ ONNX


def by_onnx(content: bytes, *inputs: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    result: np.ndarray = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    return result


def check_onnx(model: Sequential, X: Any, shape: Any = None, tolerance: float = 2e-5) -> None:
    onnx = pytest.importorskip("onnx")
    content = io.export_onnx(model, input_shape=shape)
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert [o.version for o in proto.opset_import] == [io.OPSET]
    want = model.forward(X, retain_derived=False)
    got = by_onnx(content, *(X if isinstance(X, list) else [X]))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


def test_onnx_of_every_layer(tmp_path: Path) -> None:
    model = trained()
    check_onnx(model, images(SHAPE))
    check_onnx(model, images(SHAPE, n=1))
    content = io.export_onnx(model, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == content


ACTIVATIONS = [
    "Identity", "Affine(slope=2, intercept=1)", "ReLU", "LeakyReLU(0.1)", "ELU(0.5)", "SELU",
    "GELU", "GELU(approximate=False)", "Tanh", "Sigmoid", "HardSigmoid", "SoftPlus", "Exponential",
]  # fmt: skip


@pytest.mark.parametrize("act_fn", ACTIVATIONS)
def test_onnx_of_activations(act_fn: str) -> None:
    check_onnx(trained([FullyConnected(5, act_fn)], (4,)), images((4,)))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([Conv1D(3, 3, "causal", 1, 1, "ReLU"), Conv1D(2, 2, (0, 3), 2)], (9, 2)),
        ([Conv2D(3, (3, 2), "same", 2, 1)], (7, 6, 2)),
        ([Deconv2D(3, (4, 2), "same", 3), BatchNorm2D()], (4, 5, 2)),
        ([Deconv2D(2, (1, 1), 1)], (4, 5, 2)),
        ([Pool2D((2, 2), 2, 1), Softmax(1)], (5, 5, 2)),
        ([Softmax(2), LayerNorm2D()], (3, 4, 2)),
        ([Flatten("last"), FullyConnected(3)], (3, 4, 2)),
        ([Conv2D(2, (1, 1)), Flatten(-1)], (3, 4, 2)),
        ([ResidualBlock(2), ResidualBlock(5, 3, "Tanh")], (6, 7, 2)),
    ],
)
def test_onnx_of_networks(layers: list[Any], shape: Any) -> None:
    check_onnx(trained(layers, shape), images(shape))


@pytest.mark.parametrize("kind", [Add, Multiply])
def test_onnx_of_several_inputs(kind: Any) -> None:
    model = Sequential([kind("Tanh"), FullyConnected(3)], rng=0)
    X = [images((4,)) for _ in range(3)]
    model.forward(X)
    check_onnx(model, X, [(4,)] * 3)


def test_onnx_of_what_cannot_be() -> None:
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match="build"):
        io.export_onnx(Sequential([Flatten()]))
    with pytest.raises(TypeError, match="model is a Flatten"):
        io.export_onnx(Flatten())  # type: ignore[arg-type]
    model = trained([FullyConnected(2)], (3,))
    with pytest.raises(ValueError, match="columns"):
        io.export_onnx(model, input_shape=(4,))
    model.layers.append(Add())
    with pytest.raises(ValueError, match="layer 1 is a Add"):
        io.export_onnx(model)
