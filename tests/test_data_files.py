"""Images from files, damaged ones too; changes at random; the loader, and what is not in memory."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuconv import data
from gpuconv.losses import CrossEntropy
from gpuconv.models import lenet5
from tests.test_device import ROOT

RNG = np.random.default_rng(2)


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    head = struct.pack(">BBBB", 0, 0, kind, values.ndim)
    return head + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def mnist(folder: Path, packed: bool = False, mark: str = "-") -> tuple[np.ndarray, np.ndarray]:
    images = RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8)
    labels = np.array([3, 0, 9, 3, 1, 0, 9], np.uint8)
    for name, values in (("images", images), ("labels", labels)):
        content = idx(values)
        path = folder / f"train-{name}{mark}idx{values.ndim}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return images, labels


@pytest.mark.parametrize(("packed", "mark"), [(False, "-"), (True, "-"), (False, "."), (True, ".")])
def test_mnist(tmp_path: Path, packed: bool, mark: str) -> None:
    images, labels = mnist(tmp_path, packed, mark)
    found = data.read_mnist(tmp_path)
    np.testing.assert_array_equal(found.images[..., 0], images)
    assert found.classes == ("0", "1", "3", "9")
    assert [int(found.classes[k]) for k in found.labels] == labels.tolist()
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        data.read_mnist(tmp_path, "test")
    with pytest.raises(ValueError, match="part is 'all'"):
        data.read_mnist(tmp_path, "all")


@pytest.mark.parametrize(
    ("kind", "dtype"), [(8, "u1"), (9, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
)  # fmt: skip
def test_every_type_of_idx(tmp_path: Path, kind: int, dtype: str) -> None:
    values = RNG.integers(-100, 100, (2, 3, 4)).astype(dtype)
    path = tmp_path / "a"
    path.write_bytes(idx(values, kind))
    found = data.read_idx(path)
    np.testing.assert_array_equal(found, values)
    assert found.dtype.isnative


def test_damaged_idx(tmp_path: Path) -> None:
    mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], r"has 155 bytes; expected 156.*\(7, 5, 4\).*truncated"),
        (whole + b"x", "too long"),
        (whole[:6], "sizes are missing"),
        (b"", "begins with nothing"),
        (b"\x89PNG" + whole, "no IDX file: it begins with 89 50"),
        (b"\0\0\x0a\x01" + whole, "no IDX file"),
        (gzip.compress(whole)[:-9], "truncated or corrupt"),
        (idx(np.zeros((7, 3), np.uint8)), r"\(7, 3\)"),
        (idx(np.zeros((6, 5, 4), np.uint8)), "7 labels; expected 6"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            data.read_mnist(tmp_path)
        assert "train-" in str(error.value)


def cifar(path: Path, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, 10, count, dtype=np.uint8)
    planes = RNG.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    path.write_bytes(
        b"".join(bytes([k]) + p.tobytes() for k, p in zip(labels, planes, strict=True))
    )
    return labels, planes


def test_cifar10(tmp_path: Path) -> None:
    parts = [cifar(tmp_path / f"data_batch_{k}.bin") for k in range(1, 6)]
    found = data.read_cifar10(tmp_path)
    assert found.images.shape == (15, 32, 32, 3)
    assert len(found.classes) == 10
    np.testing.assert_array_equal(found.labels, np.concatenate([p[0] for p in parts]))
    np.testing.assert_array_equal(found.images[4, 3, 7], parts[1][1][1, :, 3, 7])
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin"):
        data.read_cifar10(tmp_path, "test")
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "9218 bytes; expected a multiple of 3073"),
        (b"", "0 bytes"),
        (b"\x0a" + whole[1:], "the label 10"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data_batch_3\.bin has.*{message}"):
            data.read_cifar10(tmp_path)


def test_folder_of_images(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    pictures = {}
    for name in ("cat", "ant"):
        (tmp_path / name).mkdir()
        for k in range(2):
            picture = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            pillow.fromarray(picture).save(tmp_path / name / f"{k}.png")
            pictures[name, k] = picture
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    found = data.read_folder(tmp_path)
    assert found.classes == ("ant", "cat")
    assert found.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(found.images[1], pictures["ant", 1])
    np.testing.assert_array_equal(found.images[2], pictures["cat", 0])
    assert data.read_folder(tmp_path, mode="L").images.shape == (4, 4, 6, 1)
    assert data.read_folder(tmp_path, (8, 3)).images.shape == (4, 8, 3, 3)
    pillow.fromarray(pictures["cat", 0][:3]).save(tmp_path / "cat" / "z.png")
    with pytest.raises(ValueError, match=r"z\.png has shape \(3, 6, 3\)"):
        data.read_folder(tmp_path)
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing"):
        (tmp_path / "cat" / "z.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"z\.png cannot be read"):
            data.read_folder(tmp_path)
    (tmp_path / "cat" / "z.png").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        data.read_folder(tmp_path)
    with pytest.raises(ValueError, match="mode is 'CMYK'"):
        data.read_folder(tmp_path, mode="CMYK")
    with pytest.raises(NotADirectoryError, match="none is no folder"):
        data.read_folder(tmp_path / "none")


def test_npz_and_npy(tmp_path: Path) -> None:
    X, y = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8), np.array([2, 7, 2, 7, 2, 2])
    np.savez(tmp_path / "a.npz", X=X, y=y)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", y)
    for found in (
        data.read_npz(tmp_path / "a.npz"),
        data.read_npy(tmp_path / "x.npy", tmp_path / "y.npy"),
    ):
        np.testing.assert_array_equal(found.images[..., 0], X)
        assert found.labels.tolist() == [0, 1, 0, 1, 0, 0]
        assert found.classes == ("2", "7")
    assert isinstance(found.images, np.memmap)
    np.save(tmp_path / "short.npy", y[:5])
    with pytest.raises(ValueError, match="5 labels for the 6 images"):
        data.read_npy(tmp_path / "x.npy", tmp_path / "short.npy")
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"x\.npy is no npy file of numbers, or truncated"):
        data.read_npy(tmp_path / "x.npy", tmp_path / "y.npy")
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        data.read_npy(tmp_path / "none.npy", tmp_path / "y.npy")
    with pytest.raises(ValueError, match="archive"):
        data.read_npy(tmp_path / "a.npz", tmp_path / "y.npy")


# ------------------------------------------------------------------------------ augmentation


def test_shift_flip_and_crop() -> None:
    X = RNG.standard_normal((40, 6, 5, 2)).astype("float32") + 9
    moved = data.shift_images(X, 0, 2)
    top, left = np.random.default_rng(0).integers(-2, 3, (2, 40))
    for x, m, t, k in zip(X, moved, top, left, strict=True):
        wide = np.pad(x, ((2, 2), (2, 2), (0, 0)))
        np.testing.assert_array_equal(m, wide[2 + t : 8 + t, 2 + k : 7 + k])
    assert len({(t, k) for t, k in zip(top, left, strict=True)}) > 10
    flipped = data.flip_images(X, 0)
    chosen = [not np.array_equal(x, f) for x, f in zip(X, flipped, strict=True)]
    assert 8 < sum(chosen) < 32
    for x, f, c in zip(X, flipped, chosen, strict=True):
        np.testing.assert_array_equal(f, x[:, ::-1] if c else x)
    np.testing.assert_array_equal(data.flip_images(X, 0, 1.0), X[:, :, ::-1])
    cut = data.crop_images(X, (4, 3), 1)
    assert cut.shape == (40, 4, 3, 2)
    whole = [
        any(np.array_equal(c, x[i : i + 4, j : j + 3]) for i in range(3) for j in range(3))
        for x, c in zip(X, cut, strict=True)
    ]
    assert all(whole)
    np.testing.assert_array_equal(data.crop_images(X, (6, 5)), X)
    padded = data.crop_images(X, (6, 5), 3, pad=4)
    assert (padded == 0).any()
    assert padded.dtype == X.dtype


@pytest.mark.parametrize("name", ["shift", "flip", "crop"])
def test_changes_are_the_same_on_a_device(name: str) -> None:
    from tests.support import home

    X = RNG.standard_normal((5, 6, 7, 3)).astype("float32")

    def change(a: Any) -> Any:
        if name == "shift":
            return data.shift_images(a, 4)
        return data.flip_images(a, 4) if name == "flip" else data.crop_images(a, (5, 5), 4, pad=1)

    with home("cuda_atomic") as cp:
        there = change(cp.asarray(X))
        assert isinstance(there, cp.ndarray)
        np.testing.assert_array_equal(there.get(), change(X))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.shift_images(np.ones((2, 3, 3))), ValueError, "images has shape"),
        (lambda: data.shift_images([1]), TypeError, "list"),
        (lambda: data.shift_images(np.ones((1, 2, 2, 1)), most=-1), ValueError, "most is -1"),
        (lambda: data.flip_images(np.ones((1, 2, 2, 1)), 0, 2.0), ValueError, "probability is 2"),
        (lambda: data.crop_images(np.ones((1, 2, 2, 1)), (3, 2)), ValueError, "size is"),
        (lambda: data.crop_images(np.ones((1, 2, 2, 1)), 2), ValueError, "size is 2"),
        (lambda: data.Loader([1], [1]), TypeError, "images is a list"),
        (lambda: data.Loader(np.ones((2, 1)), [1]), ValueError, "labels has shape"),
        (lambda: data.Loader(np.ones((1, 1)), [1.0]), TypeError, "labels has dtype"),
        (lambda: data.Loader(np.ones((1, 1)), [1], 0), ValueError, "batch_size is 0"),
        (lambda: data.Loader(np.ones((1, 1)), [1], transform=1), TypeError, "transform is 1"),
    ],
)  # fmt: skip
def test_wrong_calls(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------ loader


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_an_epoch_has_every_image_once(ahead: int) -> None:
    X = np.arange(23.0)[:, None]
    loader = data.Loader(X, np.arange(23), 5, seed=1, ahead=ahead)
    assert len(loader) == 5
    epochs = [[(x.copy(), y.copy()) for x, y in loader] for _ in range(2)]
    for batches in epochs:
        assert [len(y) for _, y in batches] == [5, 5, 5, 5, 3]
        for x, y in batches:
            np.testing.assert_array_equal(x[:, 0], y)
        assert sorted(np.concatenate([y for _, y in batches])) == list(range(23))
    orders = [np.concatenate([y for _, y in e]).tolist() for e in epochs]
    assert orders[0] != orders[1]
    again = data.Loader(X, np.arange(23), 5, seed=1, ahead=2)
    assert np.concatenate([y for _, y in again.epoch(1)]).tolist() == orders[1]
    still = data.Loader(X, np.arange(23), 5, shuffle=False, ahead=ahead)
    assert np.concatenate([y for _, y in still]).tolist() == list(range(23))


def test_batches_are_read_ahead_and_no_more() -> None:
    read: list[int] = []

    class Slow:
        shape = (12, 1)

        def __getitem__(self, rows: Any) -> np.ndarray:
            read.append(int(rows[0]))
            return np.zeros((len(rows), 1))

    loader = data.Loader(Slow(), np.zeros(12, int), 2, shuffle=False, ahead=2)
    batches = iter(loader)
    next(batches)
    until = time.monotonic() + 10
    while len(read) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == [0, 2, 4, 6]  # the one that was taken, two that wait, one in the thread's hand
    batches.close()  # type: ignore[attr-defined]
    assert not any(t.name == "gpuconv-loader" for t in threading.enumerate())


def test_errors_of_the_thread_arrive() -> None:
    def fail(x: Any, rng: Any) -> Any:
        if x[0, 0] >= 4:
            raise RuntimeError("no such image")
        return x

    loader = data.Loader(np.arange(8.0)[:, None], np.arange(8), 2, shuffle=False, transform=fail)
    batches = iter(loader)
    assert [int(next(batches)[1][0]) for _ in range(2)] == [0, 2]
    with pytest.raises(RuntimeError, match="no such image"):
        next(batches)


def test_batches_on_a_device() -> None:
    from tests.support import home

    X = RNG.standard_normal((6, 4, 4, 1))
    here = list(data.Loader(X, np.arange(6), 4, transform=data.shift_images, dtype="float32"))
    with home("cuda_atomic") as cp:
        loader = data.Loader(
            X, np.arange(6), 4, transform=data.shift_images, dtype="float32", device="cuda"
        )
        for (x, y), (a, b) in zip(loader, here, strict=True):
            assert isinstance(x, cp.ndarray)
            assert x.dtype == "float32"
            np.testing.assert_array_equal(x.get(), a)
            np.testing.assert_array_equal(y.get(), b)


def test_a_file_is_trained_from_without_being_loaded(tmp_path: Path) -> None:
    """64 MiB of images: the peak of what is allocated stays at a few batches."""
    count, shape = 65536, (32, 32, 1)
    path = tmp_path / "x.npy"
    held = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape))
    held[::4096] = 200  # the rest is a hole in the file
    held.flush()
    del held
    labels = (np.arange(count) % 4096 == 0).astype(np.int64)
    np.save(tmp_path / "y.npy", labels)
    images = data.read_npy(path, tmp_path / "y.npy")
    model = lenet5(shape, 2, optimizer="SGD(lr=0.01)", rng=0)
    loader = data.Loader(
        images.images, images.labels, 16, dtype="float32", transform=lambda x, rng: x / 255
    )

    def step(x: Any, y: Any) -> None:
        loss, gradient = CrossEntropy.from_logits(y, model.forward(x))
        model.backward(gradient, input_grad=False)
        model.update(float(loss))

    batches = loader.epoch(0)
    step(*next(batches))  # what is made once
    tracemalloc.start()
    try:
        for _ in range(8):
            step(*next(batches))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        batches.close()  # type: ignore[attr-defined]
    assert images.images.nbytes == 64 * 2**20
    assert peak < 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts are Linux's")
def test_a_file_larger_than_the_memory_allowed_is_trained_from() -> None:
    """2 GiB of images, in a process that may have 1 GiB: they cannot be loaded, and train."""
    command = [sys.executable, "-m", "tests.memory_limited", str(2 << 30), str(1 << 30), "6"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["file"] > found["limit"]
    assert not found["the images fit"]
    assert found["steps"] == 6
    assert found["losses"][1] < found["losses"][0]
    assert found["anonymous at most"] < found["file"] / 10
    assert found["peak resident"] < found["file"] / 5
