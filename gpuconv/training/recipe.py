"""What is trained and how: a small conv net made for the image size, AdamW, one cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gpuconv.arguments import integer, real
from gpuconv.device import Device
from gpuconv.layers import Conv2D, Flatten, FullyConnected, Pool2D
from gpuconv.models import MODELS, Sequential, make_model
from gpuconv.training.data import warp_images

__all__ = ["DTYPES", "Recipe", "make_network", "make_optimizer", "network_layers"]

#: That a network can be trained in.
DTYPES = ("float16", "bfloat16", "float32", "float64")
#: The network made for the images' size.
AUTO = "auto"
#: Channels of the blocks of two convolutions each; further blocks repeat the last.
_CHANNELS = (32, 64, 128)
#: Blocks halve the image until no side is longer than this.
_LONGEST = 3


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run; each is checked when it is made.

    Attributes
    ----------
    epochs : int
        How often every training image is seen.
    batch_size : int
        Images a step.
    lr : float
        The highest learning rate; it rises to there over the first epoch (never over more than
        a tenth of the run) and falls to zero along half a cosine.
    weight_decay : float
        Of AdamW.
    shift, rotate, zoom : float
        How far training images are moved (in pixels), turned (in degrees, at most 180) and
        enlarged (by the factor ``1 + zoom``) at random; see :func:`data.warp_images`.
    seed : int
        For the split, the first weights, the order of the images and what is done to them.
    dtype : str
        ``"float16"`` or ``"bfloat16"`` (with float32 master weights), ``"float32"`` or
        ``"float64"``.
    model : str
        ``"auto"``, the layers of :func:`network_layers`, or a name of
        :data:`gpuconv.models.MODELS`.
    """

    epochs: int = 50
    batch_size: int = 32
    lr: float = 0.003
    weight_decay: float = 0.01
    shift: float = 0.5
    rotate: float = 10.0
    zoom: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    model: str = AUTO

    def __post_init__(self) -> None:
        integer("epochs", self.epochs, 1)
        integer("batch_size", self.batch_size, 1)
        real("lr", self.lr, 0, above=True)
        real("weight_decay", self.weight_decay, 0)
        real("shift", self.shift, 0)
        real("rotate", self.rotate, 0, 180)
        real("zoom", self.zoom, 0, 1)
        integer("seed", self.seed, 0)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.model != AUTO and self.model not in MODELS:
            raise ValueError(
                f"model is {self.model!r}; expected one of {', '.join([AUTO, *MODELS])}"
            )

    def augment(self, images: Any, epoch: int, step: int) -> Any:
        """Return a step's images, each moved, turned and zoomed at random."""
        if self.shift == self.rotate == self.zoom == 0:
            return images
        amounts = {"shift": self.shift, "rotate": self.rotate, "zoom": self.zoom}
        return warp_images(images, self.seed, epoch, step, **amounts)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe that :meth:`to_json` wrote.

        Raises
        ------
        TypeError, ValueError
            If a number is missing, unknown, or not allowed.
        """
        known = {field.name for field in fields(cls)}
        # Runs from before there were several networks do not say which one.
        if not isinstance(values, Mapping) or set(values) | {"model"} != known:
            raise ValueError(f"recipe is {values!r}; expected the numbers {', '.join(known)}")
        return cls(**values)


def network_layers(image_shape: tuple[int, int, int], classes: int) -> list[Any]:
    """Return the layers for images of this shape.

    Blocks of two 3x3 convolutions, each block followed by a halving of the sides that are
    longer than one pixel, until the image is at most 3x3; one dense layer on what is left.
    So an image of any size from 1x1 on fits, and the dense layer never sees more than nine
    cells.

    Parameters
    ----------
    image_shape : tuple of int
        Rows, columns and channels, each at least 1.
    classes : int
        Outputs, at least 2.
    """
    rows, columns, _ = image_shape
    layers: list[Any] = []
    block = 0
    while block == 0 or max(rows, columns) > _LONGEST:
        channels = _CHANNELS[min(block, len(_CHANNELS) - 1)]
        layers += [
            Conv2D(channels, (3, 3), pad=1, act_fn="ReLU", init="he_uniform") for _ in range(2)
        ]
        window = (min(rows, 2), min(columns, 2))
        if window != (1, 1):
            layers.append(Pool2D(window, stride=window))
        rows, columns = rows // window[0], columns // window[1]
        block += 1
    return [*layers, Flatten(), FullyConnected(classes)]


def make_optimizer(recipe: Recipe, train_images: int) -> str:
    """Return the optimizer for so many training images, as its text."""
    steps = math.ceil(train_images / recipe.batch_size)
    total = recipe.epochs * steps
    warmup = min(steps, total // 10)
    schedule = f"CosineScheduler({recipe.lr!r}, total_steps={total}, warmup_steps={warmup})"
    return f"AdamW(weight_decay={recipe.weight_decay!r}, lr_scheduler={schedule!r})"


def make_network(
    recipe: Recipe,
    image_shape: tuple[int, int, int],
    classes: int,
    train_images: int,
    device: Device | str | None = None,
) -> Sequential:
    """Return the network of the recipe with its first weights and its optimizer."""
    options: dict[str, Any] = {
        "optimizer": make_optimizer(recipe, train_images),
        "rng": recipe.seed,
        "device": device,
    }
    if recipe.model == AUTO:
        net = Sequential(network_layers(image_shape, classes), **options)
    else:
        net = make_model(recipe.model, image_shape, classes, **options)
    net.build((1, *image_shape), recipe.dtype)
    return net
