"""The convolutions that broken kernels are tried on.

They reach the branches of the kernels: channels that fill vectors and that do not, more than a
tile and less than one, strides, dilations, groups, padding on one side, images smaller than the
kernel, every activation, offsets of 64 bits, grids smaller than the work, sums in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

import gpuconv
from gpuconv import settings
from gpuconv.cuda import kernels, prepared, tensor_tiles, tiles, wgmma_tiles
from gpuconv.engines import cuda_arrays, cuda_tensor_core, cuda_winograd_plan
from gpuconv.functional import _hashable, _plan
from gpuconv.problem import ConvProblem

__all__ = [
    "ACTIVATIONS",
    "PROBLEMS",
    "WGMMA",
    "Problem",
    "convolution",
    "described",
    "dtype_of",
    "in_force",
]


@dataclass(frozen=True)
class Problem:
    """A convolution, channels last; ``options`` are those of the call.

    Attributes
    ----------
    first : bool
        Arrays are channels first.
    wide : bool
        Offsets of 64 bits.
    one_block : bool
        Grids of one block, where a grid strides over its work.
    apart : bool
        Gradients one by one as well, the others not asked for.
    limit : int
        Bytes of workspace, if not the usual: the batch goes in parts.
    segments : int
        Winograd's weight gradient is summed in so many parts.
    tile : int
        Winograd's tile, if not the one of least cost.
    splits : int
        Into how many parts sums of products are divided, if not as predicted to be fastest.
    poison : int, optional
        A NaN and an infinity in images and gradients, so far from the edges; they must go where
        the loops send them.
    spread : bool
        Images and the result lie in larger arrays, so that nothing is dense.
    blank : bool
        The first rows are zero and the rest is large: the activation at a kink and beyond.
    wgmma : str
        The tile of warpgroups' products, on a device of compute capability 9.0.
    """

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    activation: str | None = "ReLU"
    bias: bool = True
    first: bool = False
    wide: bool = False
    one_block: bool = False
    apart: bool = False
    limit: int = 0
    segments: int = 0
    tile: int = 0
    splits: int = 0
    poison: int | None = None
    spread: bool = False
    blank: bool = False
    wgmma: str = ""

    @property
    def call(self) -> str:
        """Name of the function for its number of axes."""
        return f"conv{len(self.x) - 2}d"

    @property
    def keywords(self) -> dict[str, Any]:
        layout = "channels_first" if self.first else "channels_last"
        return {**dict(self.options), "layout": layout, "activation": self.activation}


def convolution(name: str, x: tuple[int, ...], w: tuple[int, ...], **options: Any) -> Problem:
    own = {k: options.pop(k) for k in list(options) if k in Problem.__dataclass_fields__}
    return Problem(name, x, w, tuple(sorted(options.items())), **own)


PROBLEMS = (
    convolution("dense", (2, 6, 5, 3), (3, 3, 3, 4), padding=1),
    convolution("odd", (2, 7, 9, 5), (3, 2, 5, 7), stride=(2, 1), padding=((1, 0), (0, 2)),
             apart=True),
    convolution("dilated", (1, 9, 8, 4), (3, 2, 4, 6), dilation=(2, 3), padding=(2, 3), bias=False),
    convolution("grouped", (2, 5, 6, 6), (3, 3, 2, 9), groups=3, padding=1, activation=None),
    convolution("one-by-one", (2, 4, 5, 12), (1, 1, 12, 10), activation="Tanh"),
    convolution("one-by-one-strided", (1, 7, 8, 8), (1, 1, 8, 16), stride=2, activation=None),
    convolution("padded-beyond", (1, 2, 3, 4), (2, 3, 4, 8), padding=4, stride=3),
    convolution("first", (2, 5, 7, 3), (3, 3, 3, 4), padding=1, first=True),
    convolution("first-grouped", (2, 6, 5, 4), (2, 3, 2, 6), groups=2, stride=(1, 2), first=True),
    convolution("wide-index", (2, 6, 7, 8), (3, 3, 8, 8), padding=1, stride=2, wide=True),
    convolution("wide-index-odd", (2, 5, 4, 3), (2, 2, 3, 5), wide=True, activation=None),
    convolution("one-block", (3, 9, 9, 8), (3, 3, 8, 8), padding=1, one_block=True),
    convolution("channels-64", (1, 9, 9, 64), (3, 3, 64, 72), padding=1),
    convolution("channels-40", (2, 5, 5, 40), (3, 3, 40, 24), padding=1, activation=None),
    convolution("channels-136", (1, 12, 12, 16), (1, 1, 16, 136)),
    convolution("channels-200", (3, 3, 3, 200), (1, 1, 200, 8), activation=None),
    convolution("rows-300", (2, 13, 12, 8), (3, 3, 8, 16), padding=1),
    convolution("grouped-16", (1, 8, 8, 32), (3, 3, 16, 48), groups=2, padding=1),
    convolution("tiles", (2, 13, 11, 4), (3, 3, 4, 5), padding=((1, 2), (2, 0)), activation=None),
    convolution("positions-1800", (2, 30, 30, 4), (3, 3, 4, 6), padding=1, activation=None),
    convolution("parts", (6, 7, 6, 8), (3, 3, 8, 8), padding=1, limit=16384),
    convolution("parts-odd", (5, 6, 5, 5), (3, 3, 5, 3), activation=None, limit=4096, first=True),
    convolution("parts-of-one", (2, 9, 9, 4), (3, 3, 4, 6), padding=1, limit=3000),
    convolution("parts-of-one-3d", (1, 4, 5, 4, 3), (2, 2, 3, 3, 2), stride=(1, 2, 1), padding=1,
             limit=2000, activation=None, bias=False),
    convolution("spread", (2, 6, 7, 4), (3, 3, 4, 8), padding=1, spread=True),
    convolution("spread-first", (2, 5, 6, 3), (3, 2, 3, 4), spread=True, first=True, bias=False),
    convolution("spread-3d", (2, 3, 4, 5, 4), (2, 2, 2, 4, 3), spread=True, limit=2000),
    convolution("poison", (2, 9, 10, 4), (3, 3, 4, 6), padding=1, activation=None, poison=1),
    convolution("poison-first", (1, 8, 7, 3), (3, 3, 3, 5), activation=None, poison=1, first=True),
    convolution("poison-grouped", (2, 9, 9, 6), (3, 3, 3, 4), padding=((1, 2), (2, 0)), groups=2,
             poison=2, bias=False, activation=None),
    convolution("poison-parts", (3, 8, 9, 6), (3, 3, 6, 4), poison=1, limit=6000, tile=2,
             activation=None),
    convolution("segments", (3, 11, 14, 6), (3, 3, 3, 8), padding=1, groups=2, segments=3, tile=2),
    convolution("segments-parts", (3, 12, 13, 5), (3, 3, 5, 4), segments=2, tile=2, limit=13000,
             first=True, bias=False),
    convolution("first-grouped-3x3", (2, 7, 9, 6), (3, 3, 3, 8), padding=((0, 1), (2, 1)), groups=2, first=True),
    convolution("tile-6", (2, 15, 13, 4), (3, 3, 4, 6), padding=((1, 2), (3, 0)), tile=6),
    convolution("positions-2187", (3, 27, 27, 2), (1, 1, 2, 3), first=True),
    convolution("strips-9", (2, 13, 12, 3), (1, 1, 3, 128)),
    convolution("splits-grouped", (2, 6, 7, 24), (3, 3, 12, 16), groups=2, padding=1, splits=3),
    convolution("splits-strided", (2, 9, 8, 10), (3, 3, 10, 5), stride=2, padding=1, splits=2,
                apart=True),
    convolution("splits-first", (1, 6, 9, 12), (2, 3, 12, 7), splits=2, first=True,
                activation=None, bias=False),
    convolution("splits-3d", (1, 4, 5, 6, 8), (3, 2, 3, 8, 6), padding=1, splits=4),
    convolution("strips", (3, 40, 40, 4), (1, 1, 4, 4)),
    convolution("strips-first", (3, 40, 40, 3), (1, 1, 3, 2), first=True),
    convolution("no-bias", (2, 6, 5, 4), (3, 3, 4, 4), padding=1, bias=False),
    convolution("no-bias-first", (2, 6, 5, 4), (3, 3, 4, 3), padding=1, bias=False, first=True),
    convolution("deep-grouped", (2, 3, 3, 256), (3, 3, 128, 6), groups=2, padding=1),
    convolution("deep", (1, 3, 3, 256), (3, 3, 256, 9), padding=1),
    convolution("deep-even", (1, 2, 2, 512), (1, 1, 512, 8), activation=None),
    convolution("three-axes-strided", (1, 6, 8, 7, 3), (3, 4, 3, 3, 4), stride=(2, 3, 2), padding=1),
    convolution("one-axis", (2, 19, 5), (4, 5, 6), stride=2, padding=2, dilation=2),
    convolution("one-axis-8", (1, 40, 16), (3, 16, 24), padding=1, activation=None),
    convolution("three-axes", (1, 4, 5, 6, 3), (2, 3, 3, 3, 4), stride=(1, 2, 1), padding=1),
    convolution("depthwise", (2, 7, 8, 8), (3, 3, 1, 8), groups=8, padding=1, apart=True),
    convolution("depthwise-5", (1, 9, 13, 5), (3, 3, 1, 5), groups=5, padding=1, bias=False),
    convolution("depthwise-strided", (2, 11, 9, 16), (3, 3, 1, 16), groups=16, padding=1, stride=2),
    convolution("depthwise-5x5", (1, 9, 12, 8), (5, 5, 1, 8), groups=8, padding=2, activation=None),
    convolution("depthwise-7x7", (1, 12, 17, 4), (7, 7, 1, 4), groups=4, padding=3),
    convolution("depthwise-dilated", (1, 9, 8, 6), (3, 2, 1, 6), groups=6, dilation=2, padding=2),
    convolution("depthwise-multiplied", (1, 6, 7, 4), (3, 3, 1, 8), groups=4, padding=1),
    convolution("depthwise-first", (2, 6, 7, 3), (3, 3, 1, 3), groups=3, padding=1, first=True),
    convolution("depthwise-40", (2, 17, 5, 40), (3, 3, 1, 40), groups=40, padding=((2, 0), (0, 1))),
    convolution("depthwise-line", (2, 70, 8), (4, 1, 8), groups=8, padding=((3, 0),)),
    convolution("depthwise-line-odd", (1, 37, 35), (3, 1, 35), groups=35, stride=2, padding=1),
    convolution("depthwise-line-first", (2, 23, 3), (3, 1, 3), groups=3, padding=1, first=True),
    convolution("depthwise-block", (3, 15, 6, 8), (3, 3, 1, 8), groups=8, padding=1, one_block=True),
    convolution("depthwise-shares", (137, 4, 5, 8), (3, 3, 1, 8), groups=8, padding=1,
                activation=None),
    convolution("depthwise-shares-first", (137, 4, 9, 2), (3, 3, 1, 2), groups=2, first=True,
                activation=None),
    convolution("depthwise-3d", (3, 5, 6, 7, 8), (2, 3, 2, 1, 8), groups=8,
                padding=((1, 0), (1, 1), (0, 2)), stride=(1, 2, 1)),
    convolution("depthwise-3d-dilated", (1, 6, 7, 6, 4), (3, 2, 3, 1, 4), groups=4, padding=2,
                dilation=(2, 1, 2), bias=False),
    convolution("depthwise-3d-strided", (2, 7, 8, 5, 6), (3, 2, 2, 1, 6), groups=6, padding=1,
                stride=(2, 1, 2)),
    convolution("depthwise-3d-gather", (2, 7, 8, 9, 4), (2, 3, 2, 1, 4), groups=4, padding=1,
                stride=(2, 2, 1), dilation=(3, 2, 2)),
    convolution("depthwise-gather-multiplied", (1, 9, 8, 3), (3, 2, 1, 6), groups=3, padding=2,
                stride=2, dilation=2),
    convolution("depthwise-gather-first", (2, 9, 8, 3), (2, 3, 1, 3), groups=3, padding=1,
                stride=2, dilation=3, first=True),
    convolution("depthwise-multiplied-first", (2, 7, 9, 3), (3, 3, 1, 6), groups=3, padding=1,
                first=True, bias=False),
    convolution("depthwise-multiplied-3d", (1, 4, 6, 5, 3), (2, 3, 2, 1, 6), groups=3, padding=1),
    convolution("depthwise-3d-first", (2, 4, 5, 6, 3), (3, 2, 3, 1, 3), groups=3, padding=1,
                first=True),
    convolution("depthwise-poison", (2, 9, 10, 8), (3, 3, 1, 8), groups=8, padding=1, poison=1,
                activation=None),
    convolution("depthwise-poison-edge", (2, 9, 11, 8), (3, 3, 1, 8), groups=8, poison=0,
                activation=None),
    convolution("depthwise-wide", (2, 7, 6, 12), (3, 3, 1, 12), groups=12, padding=1, wide=True),
)  # fmt: skip


def _wgmma(name: str, x: tuple[int, ...], w: tuple[int, ...], **options: Any) -> Problem:
    options = {"wgmma": "64x64", "activation": None, "bias": False, **options}
    return convolution(f"wgmma-{name}", x, w, **options)


#: What compute capability 9.0 does in its own way: dtype, passes (y, x, w) and the convolution.
#: A step is 64 values of 16 bits deep, a ring of four or five steps.
WGMMA = (
    ("float16", "yxw", _wgmma("small", (1, 9, 8, 24), (3, 2, 24, 40), padding=1, stride=(2, 1))),
    ("float16", "yxw", _wgmma("ring", (2, 5, 11, 136), (2, 2, 136, 72), padding=((0, 1), (1, 0)))),
    ("float16", "yxw", _wgmma("groups", (1, 5, 6, 128), (2, 3, 64, 128), groups=2, padding=1)),
    ("float16", "w", _wgmma("groups-40", (1, 5, 6, 80), (3, 1, 40, 32), groups=2)),
    ("float16", "yxw", _wgmma("3d", (2, 5, 4, 6, 8), (3, 2, 3, 8, 16), stride=(2, 1, 2), padding=1,
                              dilation=(1, 2, 1))),
    ("float16", "yxw", _wgmma("splits", (1, 9, 8, 64), (2, 2, 64, 24), splits=3)),
    ("float16", "yw", _wgmma("splits-over", (1, 6, 13, 16), (2, 1, 16, 8), splits=40)),
    ("float16", "yxw", _wgmma("wide", (2, 5, 6, 16), (2, 3, 16, 24), padding=1, wide=True)),
    ("float16", "y", _wgmma("bias", (1, 6, 5, 16), (1, 2, 16, 80), bias=True, activation="ReLU")),
    ("bfloat16", "yxw", _wgmma("bf16", (1, 7, 5, 24), (2, 2, 24, 16), stride=2, dilation=2)),
    ("tf32", "yx", _wgmma("tf32", (1, 7, 6, 36), (3, 2, 36, 68), padding=1, stride=(1, 2),
                          bias=True)),
    ("float16", "yw", _wgmma("64x128", (1, 9, 9, 16), (2, 2, 16, 136), wgmma="64x128")),
    ("float16", "yxw", _wgmma("256x64", (2, 12, 12, 16), (3, 2, 16, 8), wgmma="256x64")),
    # Nothing for those tiles: groups of 1 and 9 channels, a row more than a tile of mma.sync has.
    ("float16", "yx", convolution("no-wgmma", (1, 13, 5, 8), (1, 1, 1, 72), groups=8, splits=1,
                                  activation=None, bias=False)),
    ("float16", "y", convolution("zero", (1, 3, 4, 8), (1, 1, 8, 8), bias=False,
                                 activation="Affine(slope=0, intercept=0)")),
)  # fmt: skip

ACTIVATIONS = (
    "ReLU", "Affine(slope=2, intercept=1)", "LeakyReLU(0.1)", "ELU(0.5)", "SELU()", "GELU", "GELU(approximate=False)",
    "Tanh", "Sigmoid", "HardSigmoid", "SoftPlus", "Exponential",
)  # fmt: skip


def dtype_of(name: str) -> Any:
    """Return NumPy's dtype; ``tf32`` is kept in float32."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype("float32" if name == "tf32" else name)


def described(problem: Problem, dtype: str) -> ConvProblem:
    """Return the convolution as engines see it, channels last."""
    options = {k: _hashable(v) for k, v in problem.options}
    return _plan(
        len(problem.x) - 2, problem.x, problem.w, str(dtype_of(dtype)), options.get("stride", 1),
        options.get("padding", 0), options.get("dilation", 1), options.get("groups", 1),
        "channels_last", None,
    ).problem  # fmt: skip


def in_force(problem: Problem, dtype: str) -> ExitStack:
    """Return a context in which engines compute as the problem asks for."""
    stack = ExitStack()
    prepared.clear()  # launches that were worked out for other settings
    stack.callback(prepared.clear)
    if problem.wide:
        stack.enter_context(mock.patch.object(cuda_arrays, "WIDE_FROM", 0))
    if problem.limit:
        # Less than a user may ask for, so that small batches go in parts.
        stack.enter_context(
            mock.patch.object(settings, "get_workspace_limit", return_value=problem.limit)
        )
    if problem.segments:
        stack.enter_context(
            mock.patch.object(cuda_winograd_plan, "_segments", return_value=problem.segments)
        )
    if problem.tile:
        stack.enter_context(mock.patch.object(cuda_winograd_plan, "TILES", (problem.tile,)))
    if problem.segments or problem.tile:
        cuda_winograd_plan.plan_of.cache_clear()
        stack.callback(cuda_winograd_plan.plan_of.cache_clear)
    if problem.wgmma:
        tile = next(t for t in wgmma_tiles.TILES if str(t) == problem.wgmma)
        choice = wgmma_tiles.Choice(tile, problem.splits or 1, -1.0)
        stack.enter_context(mock.patch.object(wgmma_tiles, "choose", return_value=choice))
    elif problem.splits:
        stack.enter_context(_divided(problem.splits))
    if problem.one_block:
        stack.enter_context(mock.patch.object(kernels, "grid_for", return_value=1))
    precision = gpuconv.get_precision()
    gpuconv.set_precision("tf32" if dtype == "tf32" else "default")
    stack.callback(gpuconv.set_precision, precision)
    return stack


@contextmanager
def _divided(splits: int) -> Iterator[None]:
    """The smallest tiles, and sums of products divided among blocks."""

    def tensor(gpu: Any, product: Any, room: int) -> tensor_tiles.Choice:
        return tensor_tiles.Choice(tensor_tiles.TILES[-1], splits, 1.0)

    def plain(gpu: Any, shape: tiles.Shape, limit: int) -> tiles.Choice:
        parts, length = tiles._parts(shape, splits if shape.divisible else 1)
        return tiles.Choice(tiles.TILES[shape.dtype][-1], parts, length, 1.0)

    with (
        mock.patch.object(tensor_tiles, "choose", tensor),
        mock.patch.object(tiles, "choose", plain),
    ):
        cuda_tensor_core._plan.cache_clear()
        try:
            yield
        finally:
            cuda_tensor_core._plan.cache_clear()
