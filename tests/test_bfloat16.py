"""bfloat16 in what training touches: layers, optimizers, precision; on the CPU and in the kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes
from gpuconv import layers as L
from gpuconv.models import Sequential
from gpuconv.optimizers import SGD, AdaGrad, Adam, AdamW, RMSProp
from gpuconv.products import column_sums, product
from gpuconv.training import checkpoint, run
from gpuconv.training.loop import StepEnd, fit
from gpuconv.training.precision import Mixed
from gpuconv.training.recipe import Recipe
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import network, save, scaled
from tests.test_layer_contract import NAMES, made

pytest.importorskip("ml_dtypes")
HELD = scaled(20, seed=1)
SETTINGS = {"device": "cpu", "engine": None, "threads": 1}


@contextmanager
def on(device: str) -> Iterator[None]:
    """Compute on the CPU, or with the kernels run on it."""
    if device == "cpu":
        yield
        return
    if reason := compiler_available():
        pytest.skip(reason)
    with stand_in(), gpuconv.engine("cuda_atomic"):
        yield


def layer_of(name: str) -> tuple[Any, Any]:
    more = {
        "Conv2D": lambda: (L.Conv2D(4, (3, 3), pad=1, act_fn="GELU", rng=0), (2, 5, 6, 3)),
        "FullyConnected": lambda: (L.FullyConnected(4, "Sigmoid", rng=0), (6, 5)),
        "MaxPool": lambda: (L.Pool2D((2, 2), stride=2), (2, 6, 4, 3)),
        "MeanPool": lambda: (L.Pool2D((3, 3), stride=2, mode="average"), (2, 7, 5, 3)),
        "Normed": lambda: (L.BatchNorm2D(act_fn="ReLU", rng=0), (2, 5, 4, 3)),
    }
    return more[name]() if name in more else made(name)


# Convolutions in deep modules and dropout's masks are those of the layers they are made of.
EACH = [n for n in NAMES if "Skip" not in n and n not in ("ResidualBlock", "Dropout")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "name", [*EACH, "Conv2D", "FullyConnected", "MaxPool", "MeanPool", "Normed"]
)
def test_a_layer_is_that_of_float64_but_for_rounding(name: str, device: str) -> None:
    layer, shape = layer_of(name)
    rng = np.random.default_rng(3)
    shapes = shape if isinstance(shape, list) else [shape]
    X = [rng.standard_normal(s).astype("float32") for s in shapes]
    X = [x.astype(dtypes.known_dtype("bfloat16")) for x in X]
    wide = copy.deepcopy(layer)
    wide.use_device("cpu")
    with on(device):
        layer.use_device(device)
        Y = layer.forward(X if isinstance(shape, list) else X[0])
        dY = rng.standard_normal(Y.shape).astype("bfloat16")
        dX = layer.backward(dY)
        got = [Y, *(dX if isinstance(dX, list) else [dX]), *layer.gradients.values()]
        assert {a.dtype.name for a in got} == {"bfloat16"}
        got = [gpuconv.asnumpy(a).astype("float64") for a in got]
        held = {k: gpuconv.asnumpy(v).astype("float64") for k, v in layer.parameters.items()}
        layer.update()
        assert {p.dtype.name for k, p in layer.parameters.items() if "running" not in k} <= {
            "bfloat16"
        }
    with gpuconv.engine("naive"):
        X64 = [x.astype("float64") for x in X]
        wide.build(shape, "float64") if not isinstance(shape, list) else None
        wide.parameters.update({k: v for k, v in held.items() if "running" not in k})
        Y64 = wide.forward(X64 if isinstance(shape, list) else X64[0])
        dX64 = wide.backward(dY.astype("float64"))
    want = [Y64, *(dX64 if isinstance(dX64, list) else [dX64]), *wide.gradients.values()]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2 * max(1.0, np.abs(b).max()))


def test_running_statistics_move_by_less_than_a_half_can_tell() -> None:
    """In bfloat16 the mean of ones times 1.02 would stop at the first step's neighbours of 1."""
    layer = L.BatchNorm1D(momentum=0.9, rng=0)
    X = np.full((4, 2), 1.0625, "float32").astype(dtypes.known_dtype("bfloat16"))
    for _ in range(80):
        layer.forward(X)
        layer.flush_gradients()
    mean = layer.parameters["running_mean"]
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, 1.0625, rtol=1e-3)
    own = np.zeros(2, "bfloat16")
    for _ in range(80):
        own = (np.float32(0.9) * own + np.float32(0.1) * X[0]).astype("bfloat16")
    assert abs(float(own[0]) - 1.0625) > 0.02  # which is why
    again = L.BatchNorm1D().set_params(layer.summary())
    assert again.parameters["running_mean"].dtype == np.float32
    assert again.dtype == "bfloat16"
    layer.reset_running_stats()
    assert layer.parameters["running_var"].dtype == np.float32


def test_sums_and_products_go_beyond_256_ones() -> None:
    ones = np.ones((1000, 3), dtypes.known_dtype("bfloat16"))
    assert float(ones.sum(axis=0)[0]) == 256  # NumPy's own
    np.testing.assert_array_equal(column_sums(ones).astype("float32"), np.full((1, 3), 1000))
    found = product(ones.T, ones)
    assert found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found.astype("float32"), np.full((3, 3), 1000))
    if compiler_available():
        return
    for capability in ("80", "75"):  # the matrix products of the older one have no bfloat16
        with stand_in() as cp:
            cp._home.compute_capability = capability
            there = cp.asarray(ones)
            for value in (product(there.T, there), column_sums(there)):
                assert value.dtype.name == "bfloat16"
                assert (value.get().astype("float32") == 1000).all()


@pytest.mark.parametrize("make", [SGD, AdaGrad, RMSProp, Adam, AdamW])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_optimizer_steps_from_a_half_as_from_float32(make: Any, dtype: str) -> None:
    kind = dtypes.known_dtype(dtype)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((3, 4)).astype(kind)
    own, wide = make(lr=0.1), make(lr=0.1)
    a, b = start, start.astype("float32")
    for k in range(4):
        gradient = (rng.standard_normal((3, 4)) * 10.0 ** -(2 * k)).astype(kind)
        own.step()
        wide.step()
        a = own(a, gradient, "W")
        b = wide(b, gradient.astype("float32"), "W").astype(kind).astype("float32")
        assert a.dtype == kind
        np.testing.assert_array_equal(a.astype("float32"), b)
    assert {v.dtype.name for v in own.state()[1].values()} == {"float32"}


# ----------------------------------------------------------------------------------- training


def normed(device: str) -> Sequential:
    layers = [
        L.Conv2D(4, (3, 3), pad=1, init="he_uniform"),
        L.BatchNorm2D(act_fn="ReLU", first_scaler="ones"),
        L.Pool2D((2, 2), stride=2),
        L.Flatten(),
        L.Dropout(L.FullyConnected(3), 0.1),
    ]
    return Sequential(layers, optimizer="AdamW(lr=0.01)", rng=1, device=device)


def small(device: str) -> Sequential:
    return network(device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("make", [small, normed])
def test_it_learns_as_float32_does(make: Any, device: str) -> None:
    with on(device):
        half, single = make(device), make(device)
        how = Mixed("bfloat16")
        options = {"epochs": 5, "batch_size": 16, "seed": 5}
        found = fit(half, scaled(), HELD, precision=how, **options).history[-1]
        want = fit(single, scaled(), HELD, **options).history[-1]
        assert (how.scale, how.skipped, how.scaled) == (1.0, 0, False)
        assert {v.dtype.name for v in how.masters.values()} == {"float32"}
        for name, value in half.parameters.items():
            if name in how.masters:
                want_bytes = how.masters[name].astype("bfloat16").tobytes()
                assert gpuconv.asnumpy(value).tobytes() == want_bytes
    assert found.train_loss == pytest.approx(want.train_loss, rel=0.1)
    assert found.validation_accuracy >= want.validation_accuracy - 0.1


def test_the_kernels_train_as_the_cpu_does() -> None:
    with on("cuda"):
        there, here = small("cuda"), small("cpu")
        for net, engine in ((there, "cuda_atomic"), (here, "numpy_gemm")):
            with gpuconv.engine(engine):
                fit(net, scaled(), HELD, epochs=2, batch_size=16, precision=Mixed("bfloat16"))
        for name, value in there.tensors().items():
            np.testing.assert_allclose(
                value.astype("float32"), here.tensors()[name].astype("float32"), atol=2e-2
            )


def test_master_weights_keep_what_bfloat16_would_lose() -> None:
    net = Sequential([L.Flatten(), L.FullyConnected(2)], optimizer="SGD(lr=1.0)", device="cpu")
    net.build((1, 2, 2, 1), "bfloat16")
    net.layers[1].parameters["W"] = np.ones((4, 2), "bfloat16")
    how = Mixed("bfloat16")
    for _ in range(20):
        net.layers[1].gradients["W"] = np.full((4, 2), 1e-3, "float32").astype("bfloat16")
        how.update(net, None)
    np.testing.assert_allclose(how.masters["1.W"], 1 - 20e-3, rtol=1e-4)
    assert float(np.float32(1 - 1e-3).astype("bfloat16")) == 1  # which is why
    assert float(net.parameters["1.W"][0, 0]) == pytest.approx(0.98, abs=2e-3)


def test_a_run_is_taken_up_again_bit_for_bit(tmp_path: Path) -> None:
    data = str(save(tmp_path / "a.npz"))
    recipe = Recipe(epochs=3, batch_size=8, dtype="bfloat16", lr=0.01, model="resnet20")
    whole = run.start(recipe, data, SETTINGS, "cpu")
    whole.train()
    half = run.start(recipe, data, SETTINGS, "cpu")
    done = 0

    def count(event: Any) -> None:
        nonlocal done
        done += isinstance(event, StepEnd)

    half.train(count, lambda: done >= 4)
    half.save_checkpoint(tmp_path)
    header, held = checkpoint.read(tmp_path / run.CHECKPOINT, "checkpoint")
    assert {v.dtype.name for k, v in held.items() if k.startswith("master.")} == {"float32"}
    assert held["model.0.W"].dtype.name == header["dtype"] == "bfloat16"
    again = run.resume(tmp_path, None, lambda settings: "cpu")
    again.train()
    for name, value in whole.net.tensors().items():
        assert value.tobytes() == again.net.tensors()[name].tobytes()
    for name, value in whole.precision.masters.items():
        assert value.tobytes() == again.precision.masters[name].tobytes()


# ------------------------------------------------------------------------- what it depends on


def test_without_its_packages_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    dtypes._check_cupy("14.0.0", "2.1.2")
    dtypes._check_cupy("15.0.0rc1", "3.0")
    for found, message in (
        (("13.6.0", "2.4.0"), r"CUDA needs CuPy 14 or newer; 13\.6\.0 is installed"),
        (("14.2.0", "2.1.1"), r"CUDA needs NumPy 2\.1\.2 or newer; 2\.1\.1 is installed"),
    ):
        with pytest.raises(ImportError, match=message):
            dtypes._check_cupy(*found)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"pip install 'gpuconv\[bfloat16\]'"):
        L.FullyConnected(2, device="cpu").build((1, 2), "bfloat16")
