"""Reading, checking, splitting, scaling and shifting images; files whole or not there."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuconv.training import data, files
from tests.small_images import images, save

X, Y = images()


def test_the_digits() -> None:
    digits = data.load_digits()
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 16)
    assert digits.classes == tuple(range(10))
    assert np.bincount(digits.labels).min() == 174


def test_without_scikit_learn_the_digits_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'gpuconv\[train\]'"):
        data.load_digits()


# ----------------------------------------------------------------------------------- npz files


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", "float64", "bool"])
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 3, 2), (6, 1, 1, 1)])
def test_reads_images_of_any_real_dtype(tmp_path: Path, dtype: str, shape: Any) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    read, labels = data.load_npz(save(tmp_path / "a.npz", X=x, y=np.arange(6)))
    np.testing.assert_array_equal(read, x if len(shape) == 4 else x[..., None])
    assert labels is not None
    assert labels.dtype == np.int64


def test_compressed_files_and_other_arrays_do_not_matter(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", X=X, y=Y, more=np.array([object()]))
    read, labels = data.load_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(read[..., 0], X)
    np.testing.assert_array_equal(labels, Y)  # type: ignore[arg-type]


def test_labels_may_be_missing_where_they_are_not_needed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", X=X)
    assert data.load_npz(path, need_labels=False)[1] is None
    with pytest.raises(ValueError, match=r"a\.npz has no array 'y'; it holds X"):
        data.load_npz(path)


not_finite = X.astype("f8")
not_finite[3, 2, 1] = np.nan
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no X": ({"x": X, "y": Y}, "has no array 'X'; it holds x, y"),
    "pickled X": ({"X": np.array([X, None], object), "y": Y}, "'X' cannot be read.*allow_pickle"),
    "pickled y": ({"X": X, "y": np.array([None] * 60, object)}, "'y' cannot be read.*allow_pickle"),
    "text": ({"X": X.astype(str), "y": Y}, "X has dtype <U.*expected real numbers"),
    "complex": ({"X": X.astype(complex), "y": Y}, "X has dtype complex128"),
    "one image": ({"X": X[0], "y": Y[:1]}, r"X has shape \(6, 5\); expected \(n, rows, cols\)"),
    "five axes": ({"X": X[None, ..., None], "y": Y}, r"X has shape \(1, 60, 6, 5, 1\); expected"),
    "no images": ({"X": X[:0], "y": Y[:0]}, r"X has shape \(0, 6, 5\); it holds no pixels"),
    "no pixels": ({"X": X[:, :0], "y": Y}, "it holds no pixels"),
    "NaN": ({"X": not_finite, "y": Y}, r"X\[3, 2, 1\] is nan; expected finite"),
    "infinity": ({"X": np.full((3, 2, 2), -np.inf), "y": Y[:3]}, r"X\[0, 0, 0\] is -inf"),
    "labels float": ({"X": X, "y": Y.astype("f4")}, "y has dtype float32; expected integer"),
    "labels one-hot": ({"X": X, "y": np.eye(60, dtype=int)}, r"y has shape \(60, 60\); expected"),
    "labels too few": ({"X": X, "y": Y[:-1]}, r"y has shape \(59,\); expected \(60,\)"),
    "labels too large": ({"X": X, "y": np.full(60, 2**63, np.uint64)}, r"labels below 2\*\*63"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_ARRAYS[name]
    with pytest.raises(ValueError, match=rf"wrong\.npz.*{message}"):
        data.load_npz(save(tmp_path / "wrong.npz", **arrays))


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    with pytest.raises(FileNotFoundError, match=r"wrong\.npz: No such file"):
        data.load_npz(path)
    whole = save(tmp_path / "whole.npz").read_bytes()
    for content in (b"", b"PK", b"no archive at all", whole[: len(whole) // 2], whole[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"wrong\.npz"):
            data.load_npz(path)
    with open(path, "wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match="holds one bare array; expected an npz"):
        data.load_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY no header")
    with pytest.raises(ValueError, match=r"wrong\.npz: (array )?'X'"):
        data.load_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.txt", b"text")
    with pytest.raises(ValueError, match=r"wrong\.npz has no array 'X'; it holds X\.txt"):
        data.load_npz(path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        data.load_npz(tmp_path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "wrong.npz")
    content = bytearray(path.read_bytes())
    content[content.index(X.tobytes()) + 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"wrong\.npz: array 'X' cannot be read: Bad CRC"):
        data.load_npz(path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = save(tmp_path / "evil.npz", X=np.array([Evil()], object), y=np.zeros(1, int))
    with pytest.raises(ValueError, match=r"evil\.npz"):
        data.load_npz(path)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------ labels and parts


def labelled() -> data.ImageData:
    return data.label_data("these", X[..., None], Y)


def test_classes_are_numbered_by_label_value() -> None:
    found = labelled()
    assert found.classes == (-3, 4, 9)
    np.testing.assert_array_equal(np.array(found.classes)[found.labels], Y)
    with pytest.raises(ValueError, match="these: every label of y is 4; expected two classes"):
        data.label_data("these", X[..., None], np.full(60, 4))


def test_the_split_is_stratified_disjoint_and_whole() -> None:
    digits = data.load_digits()
    split = data.stratified_split(digits, 3)
    parts = (split.train, split.validation, split.test)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        counts = np.bincount(digits.labels[part]) / np.bincount(digits.labels)
        assert np.abs(counts - share).max() < 0.01
    again, other = data.stratified_split(digits, 3), data.stratified_split(digits, 4)
    np.testing.assert_array_equal(split.test, again.test)
    assert not np.array_equal(split.test, other.test)


def test_a_class_of_three_is_in_every_part_and_one_of_two_is_an_error() -> None:
    y = np.array([0] * 20 + [7] * 3)
    small = data.label_data("small", X[:23, ..., None], y)
    split = data.stratified_split(small, 0)
    for part in (split.train, split.validation, split.test):
        assert (small.labels[part] == 1).sum() == 1
    smaller = data.label_data("small", X[:22, ..., None], y[:22])
    with pytest.raises(ValueError, match="small: label 7 has 2 examples; expected 3 or more"):
        data.stratified_split(smaller, 0)


def test_the_fingerprint_knows_images_and_labels_apart() -> None:
    first = labelled()
    changed = X.copy()
    changed[59, 5, 4] ^= 1
    others = [
        data.label_data("x", changed[..., None], Y),
        data.label_data("x", X[..., None], np.roll(Y, 1)),
        data.label_data("x", X.astype("i2")[..., None], Y),
        data.label_data("x", X[:, :, :, None].reshape(60, 5, 6, 1), Y),
    ]
    assert first.fingerprint() == data.label_data("x", X[..., None].copy("F"), Y).fingerprint()
    assert len({first.fingerprint(), *(o.fingerprint() for o in others)}) == 5


# --------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e200])
def test_scaling_gives_mean_0_and_deviation_1(channels: int, size: float) -> None:
    x = np.random.default_rng(0).normal(3, 2, (20, 4, 5, channels)) * size
    out = data.Scaling.fit(x).apply(x, "float64")
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-10)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, rtol=1e-10)


def test_scaling_works_in_pieces_as_in_one() -> None:
    x = np.random.default_rng(0).integers(0, 255, (5000, 16, 16, 1), dtype=np.uint8)
    scaling = data.Scaling.fit(x)
    want = ((x - scaling.shift[0]) * scaling.scale[0]).astype("float32")
    np.testing.assert_array_equal(scaling.apply(x, "float32"), want)


def test_constant_images_have_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match=r"X is constant \(7\)"):
        data.Scaling.fit(np.full((4, 2, 2, 1), 7))
    with pytest.raises(ValueError, match="X is constant in every channel"):
        data.Scaling.fit(np.full((4, 2, 2, 3), 7.1))
    one = np.full((4, 2, 2, 2), 7.0)
    one[0, ..., 1] = 9
    out = data.Scaling.fit(one).apply(one, "float32")
    np.testing.assert_array_equal(out[..., 0], 0)
    with pytest.raises(ValueError, match="images have 2 channels; the scaling has 1"):
        data.Scaling((0.0,), (1.0,)).apply(one, "float32")


# ----------------------------------------------------------------------- order and augmentation


def test_an_epoch_takes_every_image_once_in_an_order_of_its_own() -> None:
    orders = [tuple(data.epoch_order(50, s, e)) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9
    assert {tuple(sorted(o)) for o in orders} == {tuple(range(50))}
    assert tuple(data.epoch_order(50, 1, 2)) == orders[5]


def sampled(image: np.ndarray, i: float, j: float) -> np.ndarray:
    """Return the value between four pixels, the edge repeated; written as slowly as it reads."""
    rows, cols, _ = image.shape
    i, j = min(max(i, 0), rows - 1), min(max(j, 0), cols - 1)
    total = np.zeros(image.shape[2])
    for a in range(rows):
        for b in range(cols):
            total += max(0, 1 - abs(i - a)) * max(0, 1 - abs(j - b)) * image[a, b]
    return total


@pytest.mark.parametrize("shape", [(5, 6, 2), (4, 4, 1), (1, 3, 1), (1, 1, 1)])
def test_warped_images_are_samples_of_moved_turned_and_zoomed_ones(shape: Any) -> None:
    """Fits the transformation to each image, and compares with a plain interpolation."""
    rows, cols, _ = shape
    x = np.random.default_rng(0).normal(size=(6, *shape))
    ramp = np.zeros((6, 99, 99, 2))  # its pixels are their coordinates, so a warp shows itself
    ramp[..., 0], ramp[..., 1] = np.mgrid[:99, :99]
    options = {"shift": 1.5, "rotate": 20.0, "zoom": 0.3}
    warped = data.warp_images(x, 1, 2, 3, **options)
    seen = data.warp_images(ramp, 1, 2, 3, **options)
    centre = seen[:, 49, 49] - 49
    down, right = seen[:, 50, 49] - seen[:, 49, 49], seen[:, 49, 50] - seen[:, 49, 49]
    np.testing.assert_allclose(down[:, 0], right[:, 1])  # a turn and one size, no shear
    np.testing.assert_allclose(down[:, 1], -right[:, 0], atol=1e-12)
    size, turn = np.hypot(*right.T), np.degrees(np.arctan2(down[:, 1], down[:, 0]))
    assert np.abs(centre).max() <= 1.5
    assert np.abs(turn).max() <= 20
    assert np.abs(np.log(size)).max() <= np.log(1.3)
    for spread in (centre[:, 0], centre[:, 1], turn / 13, np.log(size) * 6):
        assert np.ptp(spread) > 0.5  # every image is changed in its own way
    for k in range(6):
        for a in range(rows):
            for b in range(cols):
                i, j = a - (rows - 1) / 2, b - (cols - 1) / 2
                place = centre[k] + i * down[k] + j * right[k] + [(rows - 1) / 2, (cols - 1) / 2]
                np.testing.assert_allclose(warped[k, a, b], sampled(x[k], *place), atol=1e-9)


def test_a_warp_depends_on_seed_and_position_alone() -> None:
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 1)).astype("float32")
    first = data.warp_images(x, 1, 2, 3)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, data.warp_images(x, 1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.allclose(first, data.warp_images(x, *other))
    still = data.warp_images(x, 1, 2, 3, shift=0, rotate=0, zoom=0)
    np.testing.assert_allclose(still, x, rtol=1e-6)


# ------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": [0.1]})
    assert json.loads(path.read_text()) == {"b": 1, "a": [0.1]}
    with pytest.raises(KeyError), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert temporary.suffix == ".json"
        raise KeyError
    assert json.loads(path.read_text())["b"] == 1
    files.write_lines(path, [{"a": 1}, {"a": 0.1}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 0.1}]
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
