"""Well-known networks for small images, as lists of layers: LeNet-5, ResNet-20, a small VGG.

Each gives one output a class, the argument of a softmax, for images ``(n, rows, columns,
channels)``; the sizes the authors had are the defaults. Smaller images than theirs keep their
sides where a kernel would no longer fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpuconv.arguments import integer
from gpuconv.device import Device
from gpuconv.initializers import Rng
from gpuconv.layers import BatchNorm2D, Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.models.sequential import Sequential
from gpuconv.modules import ResidualBlock
from gpuconv.optimizers import Optimizer

__all__ = ["MODELS", "lenet5", "make_model", "resnet20", "vgg_small"]

ImageShape = Sequence[int]
_OPTIMIZER = Optimizer | str | None


def lenet5(
    image_shape: ImageShape = (32, 32, 1),
    classes: int = 10,
    *,
    optimizer: _OPTIMIZER = None,
    rng: Rng = None,
    device: Device | str | None = None,
) -> Sequential:
    """Return LeNet-5 [1]_: two 5x5 convolutions, each averaged 2x2, and three dense layers.

    The second convolution sees all channels, and the last layer is a dense one, as is usual
    since. The images of MNIST, 28x28, are padded to the 32x32 of the paper.

    Parameters
    ----------
    image_shape : sequence of int
        Rows, columns and channels; at least 4 rows and columns.
    classes : int
        Outputs, at least 2.
    optimizer, rng, device
        See :class:`Sequential`.

    References
    ----------
    .. [1] LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document
       recognition (1998).
    """
    rows, columns, _ = _checked(image_shape, classes, 4)
    layers: list[Any] = []
    for number, channels in enumerate((6, 16)):
        side = min(rows, columns)
        pad = 2 if side < (32, 6)[number] else 0
        layers.append(Conv2D(channels, (5, 5), pad, act_fn="Tanh"))
        layers.append(Pool2D((2, 2), 2, mode="average"))
        rows, columns = ((n + 2 * pad - 4) // 2 for n in (rows, columns))
    layers += [
        Flatten(),
        FullyConnected(120, "Tanh"),
        FullyConnected(84, "Tanh"),
        FullyConnected(classes),
    ]
    return Sequential(layers, optimizer, rng=rng, device=device)


def resnet20(
    image_shape: ImageShape = (32, 32, 3),
    classes: int = 10,
    *,
    optimizer: _OPTIMIZER = None,
    rng: Rng = None,
    device: Device | str | None = None,
) -> Sequential:
    """Return ResNet-20 in the form for CIFAR-10 [1]_: three stages of three blocks.

    16, 32 and 64 channels; the second and the third stage begin with a stride of 2; the ways
    around have no parameters (option A). Then the mean over the image and a dense layer.

    Parameters
    ----------
    image_shape : sequence of int
        Rows, columns and channels.
    classes : int
        Outputs, at least 2.
    optimizer, rng, device
        See :class:`Sequential`.

    Notes
    -----
    Convolutions have a bias here, which the normalisation behind them takes off again; its
    gradient is zero but for rounding.

    References
    ----------
    .. [1] He, Zhang, Ren, Sun: Deep residual learning for image recognition (2015), section 4.2.
    """
    rows, columns, _ = _checked(image_shape, classes, 1)
    layers: list[Any] = [
        Conv2D(16, (3, 3), pad=1, init="he_normal"),
        BatchNorm2D(act_fn="ReLU", first_scaler="ones"),
    ]
    for channels, first in ((16, 1), (32, 2), (64, 2)):
        layers += [ResidualBlock(channels, stride) for stride in (first, 1, 1)]
        rows, columns = (-(-n // first) for n in (rows, columns))
    layers += [Pool2D((rows, columns), (rows, columns), mode="average"), Flatten()]
    layers.append(FullyConnected(classes, init="he_normal"))
    return Sequential(layers, optimizer, rng=rng, device=device)


def vgg_small(
    image_shape: ImageShape = (32, 32, 3),
    classes: int = 10,
    *,
    optimizer: _OPTIMIZER = None,
    rng: Rng = None,
    device: Device | str | None = None,
) -> Sequential:
    """Return a small network in the manner of VGG [1]_, with batch normalisation.

    Three blocks of two 3x3 convolutions with 32, 64 and 128 channels, each halved by a maximum
    over 2x2, and two dense layers.

    Parameters
    ----------
    image_shape : sequence of int
        Rows, columns and channels.
    classes : int
        Outputs, at least 2.
    optimizer, rng, device
        See :class:`Sequential`.

    References
    ----------
    .. [1] Simonyan, Zisserman: Very deep convolutional networks for large-scale image
       recognition (2014).
    """
    rows, columns, _ = _checked(image_shape, classes, 1)
    layers: list[Any] = []
    for channels in (32, 64, 128):
        for _ in range(2):
            layers.append(Conv2D(channels, (3, 3), pad=1, init="he_uniform"))
            layers.append(BatchNorm2D(act_fn="ReLU", first_scaler="ones"))
        window = (min(rows, 2), min(columns, 2))
        if window != (1, 1):
            layers.append(Pool2D(window, window))
        rows, columns = rows // window[0], columns // window[1]
    layers += [Flatten(), FullyConnected(128, "ReLU", "he_uniform"), FullyConnected(classes)]
    return Sequential(layers, optimizer, rng=rng, device=device)


#: The networks by name.
MODELS: dict[str, Callable[..., Sequential]] = {
    "lenet5": lenet5,
    "resnet20": resnet20,
    "vgg_small": vgg_small,
}


def make_model(name: str, image_shape: ImageShape, classes: int, **options: Any) -> Sequential:
    """Return the network of this name; options as its function takes them.

    Raises
    ------
    TypeError, ValueError
        If there is none, or it takes no such images.
    """
    if name not in MODELS:
        raise ValueError(f"model is {name!r}; expected one of {', '.join(MODELS)}")
    return MODELS[name](image_shape, classes, **options)


def _checked(image_shape: ImageShape, classes: int, least: int) -> tuple[int, int, int]:
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"image_shape is {image_shape!r}; expected rows, columns and channels")
    rows, columns = (integer("image_shape", n, least) for n in image_shape[:2])
    integer("classes", classes, 2)
    return rows, columns, integer("image_shape", image_shape[2], 1)
