"""Windows written out as a matrix (im2col), and cuBLAS: ``kernels/im2col.cu``.

The solid baseline on the GPU: every shape, stride and dtype, at the speed of cuBLAS less the
copies. Windows of one element need none. The weight gradient adds parts of the batch up in a
fixed order, in float32 at least; the input gradient gathers: the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, cublas, kernels, prediction, runtime
from gpuconv.device import probe
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Engine, Pass
from gpuconv.engines.cuda_arrays import (
    NULL,
    copied,
    element_strides,
    reach,
    stored_image,
    stored_weights,
    three,
)
from gpuconv.engines.cuda_engine import CudaEngine
from gpuconv.engines.cuda_matrices import (
    accumulate,
    by_channel,
    dense_image,
    dense_weights,
    multiply,
    part_of,
    result_shape,
    turned,
    weight_matrices,
)
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["CudaGemm", "sample_variants"]

Array = Any

#: Of the arithmetic's peak, in products of usual sizes.
_SHARE, _TENSOR_SHARE = 0.8, 0.55
#: Rows and columns of a result that one block of cuBLAS computes.
_TILE = 128


def _struct(wide: bool) -> np.dtype[Any]:
    """Return ``Shape`` of im2col.cu."""
    axes = ("in", "out", "kernel", "stride", "dilation", "before")
    return np.dtype(
        [
            *((name, np.int32, (3,)) for name in axes),
            ("channels", np.int32),
            ("groups", np.int32),
            ("image", np.int64 if wide else np.int32, (5,)),
        ],
        align=True,
    )


_STRUCTS = {wide: _struct(wide) for wide in (False, True)}


@lru_cache(maxsize=256)
def _variant(dtype: str, channels_first: bool, pack: int, wide_index: bool) -> kernels.Variant:
    defines = {"CHANNELS_FIRST": str(int(channels_first)), "VEC": str(pack)}
    defines |= kernels.activation_defines(None)
    if wide_index:
        defines["INDEX_64"] = "1"
    end = kernels.suffix(dtype)
    functions = (f"conv_im2col_{end}", f"conv_col2im_{end}")
    return kernels.Variant("im2col.cu", dtype, tuple(sorted(defines.items())), functions)


@lru_cache(maxsize=256)
def _epilogue(
    dtype: str, channels_first: bool, wide_index: bool, activation: Activation | None
) -> kernels.Variant:
    defines = dict(_variant(dtype, channels_first, 1, wide_index).defines)
    defines |= {"EPILOGUE": "1", **kernels.activation_defines(activation)}
    functions = (f"conv_bias_activation_{kernels.suffix(dtype)}",)
    return kernels.Variant("im2col.cu", dtype, tuple(sorted(defines.items())), functions)


def sample_variants() -> Iterator[kernels.Variant]:
    """Yield variants of every dtype, layout, width and index."""
    for dtype in CudaGemm.dtypes:
        yield _variant(dtype, False, _pack(dtype), False)
        yield _epilogue(dtype, False, dtype == "float64", get_activation("ReLU"))
    yield _variant("float32", False, 1, True)
    yield _variant("float32", True, 1, False)
    yield _epilogue("float32", True, False, None)


def _pack(dtype: str) -> int:
    """Return how many elements make 16 bytes."""
    return {"float64": 2, "float32": 4}.get(dtype, 8)


class _Windows:
    """The matrix of windows of a problem: how it lies, and launches between it and an image.

    ``columns`` of ``count`` positions of ``n`` examples have the shape ``(n, count, groups,
    taps * in_group)`` or, channels first, ``(n, groups, in_group * taps, count)``.
    """

    def __init__(self, problem: ConvProblem, image: Array, device: int) -> None:
        self.problem, self.device = problem, device
        self.first = problem.layout == CHANNELS_FIRST
        self.row = problem.taps * (problem.in_channels // problem.groups)
        self.positions = math.prod(problem.out_shape)
        self.dtype = problem.dtype
        strides = element_strides(image)
        self._strides = (strides[0], *three(strides[1:-1], 0), strides[-1])

    def fill(self, wide: bool) -> Any:
        """Return the structure that the kernels take."""
        p = self.problem
        made = np.zeros(1, _STRUCTS[wide])
        made["in"], made["out"] = three(p.in_shape, 1), three(p.out_shape, 1)
        made["kernel"], made["stride"] = three(p.kernel, 1), three(p.stride, 1)
        made["dilation"] = three(p.dilation, 1)
        made["before"] = three(tuple(before for before, _ in p.padding), 0)
        made["channels"], made["groups"], made["image"] = p.in_channels, p.groups, self._strides
        return made

    def shape(self, n: int, count: int) -> tuple[int, ...]:
        """Return the shape of the matrix of ``count`` positions of ``n`` examples."""
        groups = self.problem.groups
        return (n, groups, self.row, count) if self.first else (n, count, groups, self.row)

    def prepare(self, name: str, image: Array, n: int, start: int, count: int,
                merged: bool, *flags: int) -> Callable[..., None]:  # fmt: skip
        """Return what launches over an image's examples.

        im2col takes the image and columns; col2im columns, image, and the sums of an example
        that is divided. ``merged``: channels first, a row is all examples'.
        """
        size = n * count * self.row * self.problem.groups
        work = max(size, image.size) + kernels.BLOCK * 32 * 2048  # the grid's stride overshoots
        wide = max(work, reach(image)) >= cuda_arrays.WIDE_FROM
        pack = self._pack_of(image)
        index = np.int64 if wide else np.int32
        apart, row = (count, n * count) if merged else (size // n, count)
        threads = n * self.problem.in_channels // pack
        threads *= count if name == "im2col" else math.prod(self.problem.in_shape)
        return kernels.prepare(
            _variant(self.dtype, self.first, pack, wide),
            f"conv_{name}_{kernels.suffix(self.dtype)}",
            self.device,
            (kernels.grid_for(threads, self.device),),
            (kernels.BLOCK,),
            (self.fill(wide), np.int32(n), index(start), index(count), index(apart), index(row),
             *map(np.int32, flags)),
        )  # fmt: skip

    def _pack_of(self, image: Array) -> int:
        """Return how many channels a thread moves at once: as many as alignment allows."""
        if self.first or self._strides[-1] != 1:
            return 1
        in_group = self.problem.in_channels // self.problem.groups
        pack = _pack(self.dtype)
        numbers = (in_group, *self._strides[:-1], image.data.ptr // image.dtype.itemsize)
        while pack > 1 and any(v % pack for v in numbers):
            pack //= 2
        return pack


class CudaGemm(CudaEngine):
    """im2col, products by cuBLAS, col2im."""

    name = "cuda_gemm"

    def unavailable(self) -> str | None:
        """Return why cuBLAS cannot be called, or None."""
        return cublas.unavailable()

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why it cannot compute this pass of ``problem``, or None."""
        if problem.dtype == "bfloat16" and probe().count and architecture.gpu().capability < 80:
            return "cuBLAS multiplies bfloat16 from compute capability 8.0 on"
        if not kernels.has_activation(problem.activation):
            return f"no kernel computes the activation {problem.activation}"
        if problem.layout == CHANNELS_FIRST and math.prod(problem.out_shape) > cublas.MOST:
            return "cuBLAS counts the positions of an example in 32 bits"
        return super().unsupported(problem, pass_)

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the time of the copies and of the products, one after the other."""
        gpu = architecture.gpu()
        halves = problem.itemsize == 2
        rows = problem.batch * math.prod(problem.out_shape)
        inner = problem.taps * (problem.in_channels // problem.groups)
        out_group = problem.out_channels // problem.groups
        if pass_ == "forward":
            sides = (rows, out_group, inner)
        else:
            sides = (rows, inner, out_group) if pass_ == "input_grad" else (inner, out_group, rows)
        m, n, k = sides
        tiles = problem.groups * math.ceil(m / _TILE) * math.ceil(n / _TILE)
        tiles *= max(1, min(k // 512, gpu.multiprocessors // tiles))  # it divides long sums
        filled = prediction.wave_share(tiles, gpu.multiprocessors)
        filled *= m / (math.ceil(m / 32) * 32) * n / (math.ceil(n / 32) * 32)
        share = (_TENSOR_SHARE if halves else _SHARE) * filled
        matrix = 0 if problem.pointwise else rows * inner * problem.groups * problem.itemsize
        # A part of the windows stays in the L2 cache between copy and product, but not all.
        moved = problem.bytes + 1.5 * matrix
        fixed = prediction.LAUNCH * (1 if problem.pointwise else 2 + (pass_ == "forward"))
        fixed *= len(list(self._chunks(problem, self._position(problem), 0)))
        return (
            fixed
            + prediction.multiply_adds(gpu, problem, share, tensor_cores=halves)
            + prediction.bytes_moved(gpu, moved)
        )

    @staticmethod
    def _position(problem: ConvProblem) -> int:
        """Return the bytes of the windows of one position."""
        if problem.pointwise:
            return 0
        return problem.taps * problem.in_channels * problem.itemsize

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the windows of the largest part, for dense arrays."""
        wanted = 4 if problem.itemsize == 2 else 0
        fixed = wanted * math.prod(problem.w_shape) if pass_ == "weight_grad" else 0
        position, example = self._position(problem), 0
        if pass_ == "forward":
            position += problem.out_channels * problem.itemsize
        if pass_ == "weight_grad" and problem.layout == CHANNELS_FIRST:
            example = math.prod(problem.y_shape[1:]) * problem.itemsize
        chunks = self._chunks(problem, position, example)
        return fixed + max(n * (count * position + example) for _, n, _, count in chunks)

    @staticmethod
    def _chunks(
        problem: ConvProblem, position: int, example: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield parts of the work that fit the workspace: whole examples, or parts of one.

        Parameters
        ----------
        position, example : int
            Bytes for each position and, beyond that, for each example.

        Yields
        ------
        n0, n, start, count : int
            The first example and how many; the first position of each and how many.
        """
        limit = Engine.workspace_limit()
        positions = math.prod(problem.out_shape)
        whole = position * positions + example
        most = max(1, cublas.MOST // positions)
        if whole <= limit and positions <= cublas.MOST:
            # Windows are read from the L2 cache if they fit, and if so few fill the device.
            gpu = architecture.gpu()
            full = 4 * gpu.multiprocessors * _TILE
            at_once = min(most, problem.batch, limit // max(1, whole))
            if position:
                small = max(gpu.l2_bytes // 2 // max(1, whole), -(-full // positions))
                at_once = min(at_once, small)
            at_once = max(1, at_once)
            for n0 in range(0, problem.batch, at_once):
                yield n0, min(at_once, problem.batch - n0), 0, positions
            return
        count = max(1, min(positions, cublas.MOST, (limit - example) // max(1, position)))
        for n0 in range(problem.batch):
            for start in range(0, positions, count):
                yield n0, 1, start, min(count, positions - start)

    def prepare(
        self, problem: ConvProblem, pass_: Pass, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what launches a pass, part by part."""
        if pass_ == "forward":
            return self._forward(problem, arrays, device)
        if pass_ == "input_grad":
            return self._input_grad(problem, arrays, device)
        return self._weight_grad(problem, arrays, device)

    def _forward(
        self, problem: ConvProblem, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what writes ``act(x w + b)`` into ``y``, given x, w, b or NULL, and y."""
        xp, dtype = runtime.cupy(), problem.dtype
        x, w, b, y = arrays
        windows = _Windows(problem, x, device)
        direct = problem.pointwise and stored_image(problem, x).flags.c_contiguous
        dense = stored_image(problem, y).flags.c_contiguous
        plain = b is NULL and problem.activation is None
        position = 0 if direct else problem.taps * problem.in_channels * problem.itemsize
        if not (dense and plain):  # room for results, where an example is divided
            position += problem.out_channels * problem.itemsize
        of_weights, weights = dense_weights(problem, w)
        steps = []
        for n0, n, start, count in self._chunks(problem, position, 0):
            at = slice(n0, n0 + n)
            image, out = x[at], y[at]
            shape, gather, columns = windows.shape(n, count), None, image
            given = part_of(problem, image, start, count) if direct else None
            if given is None:
                gather = windows.prepare("im2col", image, n, start, count, False)
                columns = given = xp.empty(shape, dtype)
            in_place = dense and (plain or count == windows.positions)
            room = None if in_place else result_shape(problem, n, count)
            z = out if room is None else xp.empty(room, dtype)
            into = part_of(problem, out, start, count) if room is None else z
            product = multiply(problem, (given, columns), weights, (into, z))
            finish = None
            if not (plain and in_place):
                finish = _finish(problem, out, start, count, in_place, device)
            steps.append((None if n == problem.batch else at, shape, gather, product, room, finish))
            del columns, given, into, z  # the next part has their memory

        def run(x: Array, w: Array, b: Any, y: Array) -> None:
            weights = of_weights(w)
            for at, shape, gather, product, room, finish in steps:
                image, out = (x, y) if at is None else (x[at], y[at])
                columns = image
                if gather is not None:
                    columns = xp.empty(shape, dtype)
                    gather(image, columns)
                z = out if room is None else xp.empty(room, dtype)
                product(columns, weights, z)
                if finish is not None:
                    finish(z, b, out)
                del columns, z

        return run

    def _input_grad(
        self, problem: ConvProblem, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what writes the gradient of the input, given dz, w, NULL and dx."""
        xp, dtype = runtime.cupy(), problem.dtype
        dz, w, _, dx = arrays
        windows = _Windows(problem, dx, device)
        direct = problem.pointwise and stored_image(problem, dx).flags.c_contiguous
        position = 0 if direct else problem.taps * problem.in_channels * problem.itemsize
        of_weights, weights = dense_weights(problem, w)
        weights = turned(weights)
        of_dz = copied(stored_image(problem, dz))
        steps, divided = [], False
        for n0, n, start, count in self._chunks(problem, position, of_dz):
            at = slice(n0, n0 + n)
            image, given = dx[at], dense_image(problem, dz[at], bool(of_dz))
            part = part_of(problem, given, start, count), given
            shape, scatter, columns = windows.shape(n, count), None, image
            into = part_of(problem, image, start, count) if direct else None
            if into is None:
                flags = int(start == 0), int(start + count == windows.positions)
                divided = divided or count < windows.positions
                scatter = windows.prepare("col2im", image, n, start, count, False, *flags)
                columns = into = xp.empty(shape, dtype)
            product = multiply(problem, part, weights, (into, columns))
            steps.append((None if n == problem.batch else at, shape, scatter, product))
            del columns, given, into, part
        wide = "float32" if problem.itemsize == 2 else problem.dtype
        example = math.prod(problem.x_shape[1:])

        def run(dz: Array, w: Array, _: Any, dx: Array) -> None:
            weights = of_weights(w)
            sums = xp.empty(example, wide) if divided else NULL
            for at, shape, scatter, product in steps:
                image, given = (dx, dz) if at is None else (dx[at], dz[at])
                if of_dz:
                    given = dense_image(problem, given, True)
                if scatter is None:
                    product(given, weights, image)
                    continue
                columns = xp.empty(shape, dtype)
                product(given, weights, columns)
                scatter(columns, image, sums)
                del columns, given

        return run

    def _weight_grad(
        self, problem: ConvProblem, arrays: tuple[Array, ...], device: int
    ) -> Callable[..., None]:
        """Return what writes the gradient of the weights, given dz, x and dw."""
        xp, dtype = runtime.cupy(), problem.dtype
        dz, x, dw = arrays
        windows = _Windows(problem, x, device)
        target = stored_weights(problem, dw)
        wide = "float32" if problem.itemsize == 2 else problem.dtype
        in_place = target.flags.c_contiguous and target.dtype == wide
        room = target.shape
        sums = dw if in_place else xp.empty(room, wide)
        matrices = weight_matrices(problem, target if in_place else sums), sums
        position = problem.taps * problem.in_channels * problem.itemsize
        pointwise = problem.pointwise and stored_image(problem, x).flags.c_contiguous
        direct = pointwise and not windows.first
        of_dz = copied(stored_image(problem, dz))
        example = of_dz
        if windows.first and problem.batch > 1:
            example = math.prod(problem.y_shape[1:]) * problem.itemsize
        steps: list[Any] = []
        for n0, n, start, count in self._chunks(problem, 0 if direct else position, example):
            at = slice(n0, n0 + n)
            image, merged = x[at], windows.first and n > 1
            shape, gather, columns = windows.shape(n, count), None, image
            of_x = part_of(problem, image, start, count) if direct else None
            if of_x is None:
                gather = windows.prepare("im2col", image, n, start, count, windows.first)
                columns = of_x = xp.empty(shape, dtype)
                if windows.first:
                    of_x = columns.reshape(1, problem.groups, windows.row, n * count)
            given = by_channel(dz[at]) if merged else dense_image(problem, dz[at], bool(of_dz))
            if merged:
                part = given.reshape(1, problem.groups, -1, n * count)
            else:
                part = part_of(problem, given, start, count)
            add = accumulate(problem, (of_x, columns), (part, given), matrices, bool(steps))
            steps.append((None if n == problem.batch else at, shape, gather, merged, add))
            del columns, given, of_x, part

        def run(dz: Array, x: Array, dw: Array) -> None:
            sums = dw if in_place else xp.empty(room, wide)
            for at, shape, gather, merged, add in steps:
                image, given = (x, dz) if at is None else (x[at], dz[at])
                columns = image
                if gather is not None:
                    columns = xp.empty(shape, dtype)
                    gather(image, columns)
                if merged:
                    given = by_channel(given)
                elif of_dz:
                    given = dense_image(problem, given, True)
                add(columns, given, sums)
                del columns, given
            if not in_place:
                cuda_arrays.put(stored_weights(problem, dw), sums)

        return run


def _finish(
    problem: ConvProblem, y: Array, start: int, count: int, in_place: bool, device: int
) -> Callable[[Array, Any, Array], None]:
    """Return what writes ``act(z + b)`` into positions like these of ``y``, which may be ``z``."""
    n = y.shape[0]
    windows = _Windows(problem, y, device)
    work = n * count * problem.out_channels
    wide = max(work + kernels.BLOCK * 32 * 2048, reach(y)) >= cuda_arrays.WIDE_FROM
    shape = windows.fill(wide)
    shape["channels"] = problem.out_channels
    index = np.int64 if wide else np.int32
    return kernels.prepare(
        _epilogue(problem.dtype, windows.first, wide, problem.activation),
        f"conv_bias_activation_{kernels.suffix(problem.dtype)}",
        device,
        (kernels.grid_for(work, device),),
        (kernels.BLOCK,),
        (shape, np.int32(n), index(start), index(count), np.int32(in_place)),
    )
