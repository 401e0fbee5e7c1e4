"""The bytes that the depthwise kernels move, counted on the stand-in, for the layers of known nets.

``python -m tests.depthwise_bytes`` prints them over the fewest possible (each of two images
once), with the tiles for an H100 at batch 32:

- *issued*: what the threads ask for, each access counted, weights included.
- *blocks*: the same without what a thread of the same block had read before, which the L1 cache
  serves if it holds a block's rows.
- *images*: the same without weights, which every block reads, and an L2 cache holds.

What two blocks both read, rows and columns where their tiles meet, is left to the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpuconv.cuda.architecture import GPU, architecture
from gpuconv.engines import cuda_depthwise
from gpuconv.engines import cuda_depthwise_tiles as tiles
from gpuconv.engines.base import PASSES, Pass
from gpuconv.problem import CHANNELS_FIRST, ConvProblem
from tests.support import home

__all__ = ["H100", "LAYERS", "Counted", "count"]

H100 = GPU(architecture(90), 90, 132, 1.755e9, 3.35e12, 50 << 20)


def _square(size: int, channels: int, kernel: int, stride: int = 1) -> ConvProblem:
    pad = (kernel - 1) // 2
    return ConvProblem(
        32, channels, channels, (size, size), (kernel,) * 2, (stride,) * 2, ((pad, pad),) * 2,
        (1, 1), channels,
    )  # fmt: skip


LAYERS = {
    "MobileNetV2 112, stride 2": _square(112, 96, 3, 2),
    "MobileNetV2 56": _square(56, 144, 3),
    "MobileNetV2 14": _square(14, 576, 3),
    "MobileNetV2 7": _square(7, 960, 3),
    "EfficientNet 28, 5x5": _square(28, 240, 5),
    "ConvNeXt 56, 7x7": _square(56, 96, 7),
    "ConvNeXt 14, 7x7": _square(14, 384, 7),
    "12288 channels, 4 taps": ConvProblem(
        1, 12288, 12288, (16384,), (4,), (1,), ((3, 0),), (1,), 12288
    ),
}


@dataclass(frozen=True)
class Counted:
    """Bytes of a launch over the fewest."""

    issued: float
    blocks: float
    images: float


def _part(problem: ConvProblem) -> ConvProblem:
    """Return a problem of the same rows and columns with fewer examples, channels or tokens."""
    channels = min(problem.in_channels, 512 if problem.ndim == 1 else 96)
    if problem.in_channels % channels:
        channels = problem.in_channels
    shape = tuple(min(n, 2048) for n in problem.in_shape)
    return replace(
        problem, batch=1, in_channels=channels, out_channels=channels, groups=channels,
        in_shape=shape,
    )  # fmt: skip


def count(problem: ConvProblem, pass_: Pass, tile: tiles.Tile) -> Counted:
    """Return the bytes that a pass moves in this tile, as the checking runtime saw them."""
    plan = cuda_depthwise._plan
    cut, pick = plan.cache_clear, cuda_depthwise.best_tile
    made = cuda_depthwise.CudaDepthwise()
    cut()
    cuda_depthwise.best_tile = lambda *_: tile  # type: ignore[assignment]
    try:
        with home("cuda_depthwise", "checked") as cp:
            x, w, y = (
                cp.zeros(_stored(problem, s), problem.dtype)
                for s in (problem.x_shape, problem.w_shape, problem.y_shape)
            )
            x, y = (_seen(problem, a) for a in (x, y))
            if problem.layout == CHANNELS_FIRST:
                w = w.reshape(problem.out_channels, 1, *problem.kernel)
                w = w.transpose(*range(2, w.ndim), 1, 0)
            if pass_ == "forward":
                made.forward(problem, x, w, None, y)
                weights = 1
            elif pass_ == "input_grad":
                made.input_grad(problem, y, w, x)
                weights = 1
            else:
                made.weight_grad(problem, y, x, w, None)
                weights = -1
            moved: dict[int, tuple[int, int, int]] = cp.settings.traffic[0]
    finally:
        cuda_depthwise.best_tile = pick
        cut()
    least = problem.bytes
    issued = sum(read + written for read, _, written in moved.values())
    blocks = sum(fresh + written for _, fresh, written in moved.values())
    images = blocks - (moved[weights][1] if weights in moved else 0)
    return Counted(issued / least, blocks / least, images / least)


def _stored(problem: ConvProblem, shape: tuple[int, ...]) -> tuple[int, ...]:
    if problem.layout != CHANNELS_FIRST:
        return shape
    return (shape[0], shape[-1], *shape[1:-1])


def _seen(problem: ConvProblem, stored: Any) -> Any:
    if problem.layout != CHANNELS_FIRST:
        return stored
    return stored.transpose(0, *range(2, stored.ndim), 1)


def rows(dtypes: tuple[str, ...] = ("float32", "float16")) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{'layer':26} {'dtype':8} {'order':5} {'pass':11} {'tile':>14}  issued blocks images  time/floor"
    for name, layer in LAYERS.items():
        for dtype in dtypes:
            for layout in ("channels_last", CHANNELS_FIRST):
                for pass_ in PASSES:
                    problem = replace(layer, dtype=dtype, layout=layout)
                    tile = tiles.best_tile(problem, pass_, 16 // problem.itemsize, H100)
                    found = count(_part(problem), pass_, tile)
                    seconds = tiles.predicted(problem, pass_, tile, H100)
                    floor = max(problem.bytes / H100.bandwidth, problem.flops / H100.flops(dtype))
                    what = f"{tile.vector}x{tile.columns}x{tile.strip}"
                    order = "first" if layout == CHANNELS_FIRST else "last"
                    yield (
                        f"{name:26} {dtype:8} {order:5} {pass_:11} {what:>14} {found.issued:7.2f}"
                        f"{found.blocks:7.2f}{found.images:7.2f} {seconds / floor:10.2f} predicted"
                    )


if __name__ == "__main__":
    for line in rows():
        print(line, flush=True)
