"""Batches that do not fit the device: what is split, what is not, and what comes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import settings
from gpuconv.cli import main
from gpuconv.layers import BatchNorm2D, Conv2D, Flatten, FullyConnected
from gpuconv.models import Sequential
from gpuconv.modules import ResidualBlock
from gpuconv.training import memory
from gpuconv.training.evaluation import evaluate
from gpuconv.training.loop import fit
from gpuconv.training.memory import OutOfMemory, Splitter, has_batch_statistics
from gpuconv.training.precision import Mixed
from gpuconv.training.step import Step
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.small_images import network, save, scaled


@pytest.fixture
def limits() -> Any:
    before = settings.get_workspace_limit()
    yield
    settings.set_workspace_limit(before)


class Full2(Exception):
    """A device is full."""


class SmallRoom:
    """A device that takes so many examples at a time."""

    errors = (Full2,)

    def __init__(self, most: int) -> None:
        self.most, self.freed = most, 0
        self.calls: list[tuple[int, int]] = []

    def free(self) -> None:
        self.freed += 1

    def compute(self, part: slice) -> None:
        self.calls.append((part.start, part.stop))
        if part.stop - part.start > self.most:
            raise Full2("Out of memory allocating 3,145,728 bytes (allocated so far: 5 bytes).")


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("size", [1, 7, 16, 61])
@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_every_example_is_in_one_part(size: int, most: int) -> None:
    room, resets = SmallRoom(most), []
    split = Splitter(room, False, lambda: resets.append(1))
    for _ in range(2):
        room.calls.clear()
        split(room.compute, size)
        done = room.calls[-split.parts :]
        assert [a for a, _ in done] == [0, *(b for _, b in done[:-1])]
        assert done[-1][1] == size
        assert all(0 < b - a <= most for a, b in done)
    assert len(room.calls) == split.parts  # the second batch is split from the start
    assert room.freed == len(resets)


@pytest.mark.usefixtures("limits")
def test_what_cannot_be_split_says_how_much_was_wanted(caplog: pytest.LogCaptureFixture) -> None:
    settings.set_workspace_limit(2**22)
    room = SmallRoom(0)
    split = Splitter(room, False, lambda: None)
    with caplog.at_level(logging.WARNING, "gpuconv"), pytest.raises(OutOfMemory) as caught:
        split(room.compute, 4)
    assert "allocating 3,145,728 bytes" in str(caught.value)
    assert "= 3.0 MiB wanted" in str(caught.value)
    assert "its batch is split into single examples" in str(caught.value)
    assert settings.get_workspace_limit() == memory.LEAST
    assert len(caplog.records) == 1
    assert "out of memory in a batch of 4" in caplog.text


@pytest.mark.usefixtures("limits")
def test_batch_statistics_are_never_split_across() -> None:
    settings.set_workspace_limit(2**22)
    room = SmallRoom(3)
    split = Splitter(room, True, lambda: None)
    with pytest.raises(OutOfMemory, match="a network with batch statistics is not split across"):
        split(room.compute, 4)
    assert set(room.calls) == {(0, 4)}
    assert len(room.calls) == 3  # with 4, 2 and 1 MiB of workspace


def test_batch_statistics_are_found_inside_of_modules() -> None:
    assert not has_batch_statistics(network())
    assert has_batch_statistics(Sequential([BatchNorm2D(), Flatten(), FullyConnected(3)]))
    block = ResidualBlock(4)
    assert has_batch_statistics(Sequential([block, Flatten(), FullyConnected(3)]))


def wide_network(statistics: bool) -> Sequential:
    layers = [Conv2D(4, (3, 3), pad=1, act_fn="Tanh"), Flatten(), FullyConnected(3)]
    if statistics:
        layers.insert(1, BatchNorm2D(first_scaler="ones"))
    return Sequential(layers, optimizer="Adam(lr=0.01)", rng=1, device="cuda")


def limited_training(statistics: bool, room: float | None, size: int = 32) -> tuple[Any, Any, int]:
    """Return weights, device and steps of a training in so much memory, in float64."""
    x, y = scaled(64, "float64")
    with stand_in() as cp, gpuconv.engine("cuda_atomic"):
        net = wide_network(statistics)
        net.build((1, 6, 5, 1), "float64")
        cp._home.limit = None if room is None else int(room)
        fit(net, (x, y), (x[:2], y[:2]), epochs=2, batch_size=size, seed=1)
        return net.tensors(), cp, cp._home.peak


@pytest.mark.usefixtures("limits")
def test_a_batch_beyond_the_device_gives_the_weights_of_the_whole_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four times over the limit: what a step of the whole batch takes is four times what there is."""
    if reason := compiler_available():
        pytest.skip(reason)
    want, _, whole = limited_training(False, None)
    _, _, least = limited_training(False, None, 2)  # what is there whatever the batch
    with caplog.at_level(logging.WARNING, "gpuconv"):
        found, cp, peak = limited_training(False, least + (whole - least) / 4)
    assert len(cp._home.refused) >= 2
    assert cp.settings.freed >= 2
    assert peak <= least + (whole - least) / 4
    assert len(caplog.records) == 1
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("limits")
def test_a_network_with_batch_statistics_keeps_its_batch_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if reason := compiler_available():
        pytest.skip(reason)
    settings.set_workspace_limit(2**22)
    want, _, whole = limited_training(True, None)
    with pytest.raises(OutOfMemory, match="batch statistics is not split across"):
        limited_training(True, whole / 2)
    assert "only the layers split it inside, as the network has batch statistics" in caplog.text
    again, _, _ = limited_training(True, whole)
    for name, value in want.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("limits")
def test_whatever_does_not_fit_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In less and less memory: batches in parts, then no room for the update, then for nothing."""
    if reason := compiler_available():
        pytest.skip(reason)
    data = str(save(tmp_path / "a.npz"))
    command = [
        "train",
        "--data",
        data,
        "--epochs",
        "1",
        "--batch-size",
        "42",
        "--device",
        "cuda",
        "-q",
    ]
    whole, said = 0, []
    for part in (1.0, 0.6, 0.15, 0.02):
        with stand_in() as cp:
            cp._home.limit = int(whole * part) if whole else None
            status = main([*command, "--out", str(tmp_path / str(part))])
            whole = whole or cp._home.peak
        said.append((status, capsys.readouterr().err))
    assert said[:2] == [(0, ""), (0, "")]
    assert [status for status, _ in said[2:]] == [1, 1]
    assert len(caplog.records) == 2  # one warning in each run whose batch was split
    assert (
        "too small for the optimizer's update: Out of memory allocating 36,864 bytes" in said[2][1]
    )
    assert "there is no room for images and network: Out of memory allocating" in said[3][1]
    assert "Traceback" not in "".join(text for _, text in said)


@pytest.mark.usefixtures("limits")
def test_answers_come_in_fewer_images_at_a_time() -> None:
    if reason := compiler_available():
        pytest.skip(reason)
    x, y = scaled(60)
    with stand_in() as cp, gpuconv.engine("cuda_atomic"):
        net = network(device="cuda")
        net.build((1, 6, 5, 1))
        resting = cp._home.used
        want = evaluate(net, x, y)
        cp._home.limit = resting + (cp._home.peak - resting) // 6
        found = evaluate(net, x, y)
        assert len(cp._home.refused) >= 3
        np.testing.assert_allclose(found.probabilities, want.probabilities, rtol=1e-6)
        cp._home.limit = resting + 64
        with pytest.raises(
            OutOfMemory, match="too small for answers to images, 1 at a time: Out of"
        ):
            evaluate(net, x, y)
        # The validation's images stay on the host where the device has no room for all of them.
        cp._home.limit = None
        fit(net, scaled(4), (x, y), epochs=1, batch_size=2)
        cp._home.limit = resting * 4 + x.nbytes // 2
        cp._home.refused.clear()
        fit(net, scaled(4), (x, y), epochs=1, batch_size=2)
        assert x.nbytes in cp._home.refused


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parts_of_a_half_are_added_up_in_float32(dtype: str) -> None:
    """Of 16 equal examples each part's gradient is a sixteenth: the sum has one rounding only."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = (np.repeat(a[:1], 16, axis=0) for a in scaled())
    found = []
    for parts in (1, 16):
        net, how = network(), Mixed(dtype)
        net.build((1, 6, 5, 1), dtype)
        step = Step(net, how)
        step.split.parts = parts
        step.gradients(x, y)
        found.append({k: v.astype("float64") for k, v in net.gradients.items()})
    for name, value in found[0].items():
        np.testing.assert_allclose(
            found[1][name], value, rtol=2**-10 if dtype == "float16" else 2**-7
        )


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("most", [1, 3, 7])
def test_parts_on_the_cpu_give_the_weights_of_the_whole(most: int) -> None:
    """The same with NumPy's own error, raised by a layer for more examples than it takes."""

    class Small(Flatten):
        def _forward(self, X: Any, retain: bool) -> Any:
            if len(X) > most and retain:
                raise MemoryError(f"Unable to allocate {X.nbytes} bytes")
            return super()._forward(X, retain)

    nets = []
    for flatten in (Flatten(), Small()):
        net = network()
        layers = [*net.layers[:2], flatten, net.layers[3]]
        made = Sequential(layers, optimizer="AdamW(lr=0.01)", rng=1, device="cpu")
        x, y = scaled(dtype="float64")
        fit(made, (x, y), (x, y), epochs=2, batch_size=14, interval=1)
        nets.append(made)
    for name, value in nets[0].tensors().items():
        np.testing.assert_allclose(nets[1].tensors()[name], value, rtol=1e-10, atol=1e-13)
