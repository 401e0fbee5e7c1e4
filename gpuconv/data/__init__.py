"""Images from files, changed at random, and read ahead of the training that takes them."""

from gpuconv.data.augment import crop_images, flip_images, shift_images
from gpuconv.data.files import (
    Images,
    read_cifar10,
    read_folder,
    read_idx,
    read_mnist,
    read_npy,
    read_npz,
)
from gpuconv.data.loader import Loader

__all__ = [
    "Images", "Loader", "crop_images", "flip_images", "read_cifar10", "read_folder", "read_idx",
    "read_mnist", "read_npy", "read_npz", "shift_images",
]  # fmt: skip
