"""Windows written out as a matrix (im2col), and cuBLAS: ``kernels/im2col.cu``.

The solid baseline on the GPU: every shape, stride and dtype, at the speed of cuBLAS less the
copies. Windows of one element need none. The weight gradient adds parts of the batch up in a
fixed order, in float32 at least; the input gradient gathers: the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.activations import Activation, get_activation
from gpuconv.cuda import architecture, cublas, kernels, prediction, runtime
from gpuconv.device import probe
from gpuconv.engines import cuda_arrays
from gpuconv.engines.base import Engine, Pass, bias_grad
from gpuconv.engines.cuda_arrays import (
    NULL,
    copied,
    element_strides,
    reach,
    stored_image,
    stored_weights,
    three,
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

    def __init__(self, problem: ConvProblem, image: Array) -> None:
        self.problem, self.image = problem, image
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

    def empty(self, n: int, count: int) -> Array:
        """Return a matrix for ``count`` positions of ``n`` examples."""
        p = self.problem
        shape = (n, p.groups, self.row, count) if self.first else (n, count, p.groups, self.row)
        return runtime.cupy().empty(shape, self.dtype)

    def launch(self, name: str, image: Array, arrays: tuple[Any, ...], n: int, start: int,
               count: int, merged: bool, *flags: int) -> None:  # fmt: skip
        """Launch over an image's examples; ``merged``: channels first, a row is all examples'."""
        size = n * count * self.row * self.problem.groups
        work = max(size, image.size) + kernels.BLOCK * 32 * 2048  # the grid's stride overshoots
        wide = max(work, reach(image)) >= cuda_arrays.WIDE_FROM
        device = int(runtime.cupy().cuda.runtime.getDevice())
        pack = self._pack_of(image)
        index = np.int64 if wide else np.int32
        apart, row = (count, n * count) if merged else (size // n, count)
        threads = n * self.problem.in_channels // pack
        threads *= count if name == "im2col" else math.prod(self.problem.in_shape)
        kernels.launch(
            _variant(self.dtype, self.first, pack, wide),
            f"conv_{name}_{kernels.suffix(self.dtype)}",
            device,
            (kernels.grid_for(threads, device),),
            (kernels.BLOCK,),
            (*arrays, self.fill(wide), np.int32(n), index(start), index(count),
             index(apart), index(row), *map(np.int32, flags)),
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

    def im2col(self, n0: int, n: int, start: int, count: int, merged: bool = False) -> Array:
        """Return the windows of positions of examples as a matrix."""
        columns = self.empty(n, count)
        image = self.image[n0 : n0 + n]
        self.launch("im2col", image, (image, columns), n, start, count, merged)
        if merged:
            return columns.reshape(1, self.problem.groups, self.row, n * count)
        return columns

    def col2im(self, columns: Array, n0: int, n: int, start: int, count: int, sums: Array) -> None:
        """Add up what windows hold of each input, into the image or, of a part, into ``sums``."""
        image = self.image[n0 : n0 + n]
        flags = int(start == 0), int(start + count == self.positions)
        self.launch("col2im", image, (columns, image, sums), n, start, count, False, *flags)


class CudaGemm(Engine):
    """im2col, products by cuBLAS, col2im."""

    name = "cuda_gemm"
    device_kind = "cuda"

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

    # ----------------------------------------------------------------------------------- passes

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        xp = runtime.cupy()
        windows = _Windows(problem, x)
        direct = problem.pointwise and stored_image(problem, x).flags.c_contiguous
        weights = _weight_matrices(problem, xp.ascontiguousarray(stored_weights(problem, w)))
        stored = stored_image(problem, y)
        dense = stored.flags.c_contiguous
        plain = b is None and problem.activation is None
        position = 0 if direct else problem.taps * problem.in_channels * problem.itemsize
        if not (dense and plain):  # room for results, where an example is divided
            position += problem.out_channels * problem.itemsize
        bias = NULL if b is None else xp.ascontiguousarray(b)
        for n0, n, start, count in self._chunks(problem, position, 0):
            whole = count == windows.positions
            if direct:
                columns = _part(problem, stored_image(problem, x), n0, n, start, count)
            else:
                columns = windows.im2col(n0, n, start, count)
            z = _part(problem, stored, n0, n, start, count) if dense else None
            target = z if z is not None and (whole or plain) else _empty(problem, n, count)
            _multiply(problem, columns, weights, target)
            if not (plain and target is z):
                self._finish(problem, target, bias, y, n0, n, start, count, target is z)
            del columns, target, z  # the next part has their memory

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        xp = runtime.cupy()
        windows = _Windows(problem, dx)
        stored, given = stored_image(problem, dx), stored_image(problem, dz)
        direct = problem.pointwise and stored.flags.c_contiguous
        weights = _weight_matrices(problem, xp.ascontiguousarray(stored_weights(problem, w)))
        position = 0 if direct else problem.taps * problem.in_channels * problem.itemsize
        sums: Any = NULL
        for n0, n, start, count in self._chunks(problem, position, copied(given)):
            dense = xp.ascontiguousarray(given[n0 : n0 + n])
            part = _part(problem, dense, 0, n, start, count)
            if direct:
                _multiply_back(problem, part, weights, _part(problem, stored, n0, n, start, count))
                continue
            if count < windows.positions and sums is NULL:
                wide = "float32" if problem.itemsize == 2 else problem.dtype
                sums = xp.empty(math.prod(problem.x_shape[1:]), wide)
            columns = windows.empty(n, count)
            _multiply_back(problem, part, weights, columns)
            windows.col2im(columns, n0, n, start, count, sums)
            del columns, part, dense

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_grad(dz, db)
        if dw is None:
            return
        xp = runtime.cupy()
        windows = _Windows(problem, x)
        given, image = stored_image(problem, dz), stored_image(problem, x)
        target = stored_weights(problem, dw)
        wide = "float32" if problem.itemsize == 2 else problem.dtype
        in_place = target.flags.c_contiguous and target.dtype == wide
        sums = target if in_place else xp.empty(target.shape, wide)
        matrices = _weight_matrices(problem, sums)
        position = problem.taps * problem.in_channels * problem.itemsize
        direct = problem.pointwise and image.flags.c_contiguous and not windows.first
        example = copied(given)
        if windows.first and problem.batch > 1:
            example = math.prod(given.shape[1:]) * problem.itemsize
        later = False
        for n0, n, start, count in self._chunks(problem, 0 if direct else position, example):
            if direct:
                columns = _part(problem, image, n0, n, start, count)
            else:
                columns = windows.im2col(n0, n, start, count, merged=windows.first)
            some = given[n0 : n0 + n]
            if windows.first and n > 1:  # a row of each channel, over all examples
                rows = xp.ascontiguousarray(some.swapaxes(0, 1))
                part = rows.reshape(1, problem.groups, -1, n * count)
                del rows
            else:
                part = _part(problem, xp.ascontiguousarray(some), 0, n, start, count)
            _accumulate(problem, columns, part, matrices, later)
            later = True
            del columns, part
        if not in_place:
            target[...] = sums

    @staticmethod
    def _finish(problem: ConvProblem, z: Array, bias: Any, y: Array, n0: int, n: int, start: int,
                count: int, in_place: bool) -> None:  # fmt: skip
        """Write ``act(z + b)`` into the positions of ``y``, which may be ``z``."""
        image = y[n0 : n0 + n]
        windows = _Windows(problem, image)
        work = n * count * problem.out_channels
        wide = max(work + kernels.BLOCK * 32 * 2048, reach(image)) >= cuda_arrays.WIDE_FROM
        device = int(runtime.cupy().cuda.runtime.getDevice())
        shape = windows.fill(wide)
        shape["channels"] = problem.out_channels
        index = np.int64 if wide else np.int32
        kernels.launch(
            _epilogue(problem.dtype, windows.first, wide, problem.activation),
            f"conv_bias_activation_{kernels.suffix(problem.dtype)}",
            device,
            (kernels.grid_for(work, device),),
            (kernels.BLOCK,),
            (z, bias, z if in_place else image, shape, np.int32(n), index(start), index(count),
             np.int32(in_place)),
        )  # fmt: skip


# -------------------------------------------------------------------------------- as matrices


def _weight_matrices(problem: ConvProblem, weights: Array) -> Array:
    """Return dense weights as a matrix a group: (groups, inner, out_group), or, channels first,
    (groups, out_group, inner).
    """
    groups, out_group = problem.groups, problem.out_channels // problem.groups
    if problem.layout == CHANNELS_FIRST:
        return weights.reshape(groups, out_group, -1)
    return weights.reshape(-1, groups, out_group).transpose(1, 0, 2)


def _part(problem: ConvProblem, image: Array, n0: int, n: int, start: int, count: int) -> Array:
    """Return positions of a dense image as (n, count, groups, in_group), or, channels first,
    (n, groups, in_group, count): a view.
    """
    groups = problem.groups
    part = image[n0 : n0 + n]
    if problem.layout == CHANNELS_FIRST:
        flat = part.reshape(n, groups, image.shape[1] // groups, -1)
        return flat[..., start : start + count]
    flat = part.reshape(n, -1, groups, image.shape[-1] // groups)
    return flat[:, start : start + count]


def _empty(problem: ConvProblem, n: int, count: int) -> Array:
    """Return room for results of ``count`` positions of ``n`` examples, as :func:`_part`."""
    groups, out_group = problem.groups, problem.out_channels // problem.groups
    first = problem.layout == CHANNELS_FIRST
    shape = (n, groups, out_group, count) if first else (n, count, groups, out_group)
    return runtime.cupy().empty(shape, problem.dtype)


def _rows(part: Array) -> Array:
    """Return (n, count, groups, k) as (groups, n * count, k), a view."""
    n, count, groups, k = part.shape
    return part.reshape(n * count, groups, k).transpose(1, 0, 2)


def _multiply(problem: ConvProblem, columns: Array, weights: Array, z: Array) -> None:
    """Write windows times weights into ``z``."""
    if problem.layout != CHANNELS_FIRST:
        cublas.product(_rows(columns), weights, _rows(z))
    elif columns.shape[0] >= problem.groups:
        for g in range(problem.groups):
            shared = _repeated(weights[g], columns.shape[0])
            cublas.product(shared, columns[:, g], z[:, g])
    else:
        for n in range(columns.shape[0]):
            cublas.product(weights, columns[n], z[n])


def _multiply_back(problem: ConvProblem, dz: Array, weights: Array, columns: Array) -> None:
    """Write ``dz`` times the transposed weights into ``columns``."""
    turned = weights.transpose(0, 2, 1)
    if problem.layout != CHANNELS_FIRST:
        cublas.product(_rows(dz), turned, _rows(columns))
    elif dz.shape[0] >= problem.groups:
        for g in range(problem.groups):
            cublas.product(_repeated(turned[g], dz.shape[0]), dz[:, g], columns[:, g])
    else:
        for n in range(dz.shape[0]):
            cublas.product(turned, dz[n], columns[n])


def _accumulate(problem: ConvProblem, columns: Array, dz: Array, dw: Array, later: bool) -> None:
    """Write windows transposed times ``dz`` into the matrices ``dw``, or add it (``later``)."""
    if problem.layout != CHANNELS_FIRST:
        cublas.product(_rows(columns).transpose(0, 2, 1), _rows(dz), dw, later)
        return
    for n in range(dz.shape[0]):
        cublas.product(dz[n], columns[n].transpose(0, 2, 1), dw, later or n > 0)


def _repeated(matrix: Array, count: int) -> Array:
    """Return the same matrix ``count`` times, a view."""
    return runtime.cupy().broadcast_to(matrix[None], (count, *matrix.shape))
