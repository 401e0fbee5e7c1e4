"""Images, windows and weights as matrices, and products of them by cuBLAS, of many groups or examples.

What is multiplied is a view of three axes: a matrix a group or an example. A product is prepared
from views and the arrays that they are of, and then takes such arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpuconv.cuda import cublas, runtime
from gpuconv.cuda.cublas import Matrices
from gpuconv.engines.cuda_arrays import stored_image, stored_weights
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = [
    "accumulate",
    "by_channel",
    "dense_image",
    "dense_weights",
    "multiply",
    "part_of",
    "result_shape",
    "turned",
    "weight_matrices",
]

Array = Any
# A view, and the array that it is of: what a product is told at first, and given each time.
View = tuple[Array, Array]
Multiply = Callable[[Array, Array, Array], None]


def weight_matrices(problem: ConvProblem, weights: Array) -> Array:
    """Return dense weights as a matrix a group: (groups, inner, out_group), or, channels first,
    (groups, out_group, inner).
    """
    groups, out_group = problem.groups, problem.out_channels // problem.groups
    if problem.layout == CHANNELS_FIRST:
        return weights.reshape(groups, out_group, -1)
    return weights.reshape(-1, groups, out_group).transpose(1, 0, 2)


def dense_weights(problem: ConvProblem, w: Array) -> tuple[Callable[[Array], Array], View]:
    """Return what makes such weights dense, and their matrices."""
    stored = stored_weights(problem, w)
    if stored.flags.c_contiguous:
        return (lambda w: w), (weight_matrices(problem, stored), w)
    xp = runtime.cupy()
    dense = xp.ascontiguousarray(stored)
    return (
        lambda w: xp.ascontiguousarray(stored_weights(problem, w)),
        (weight_matrices(problem, dense), dense),
    )


def dense_image(problem: ConvProblem, image: Array, copy: bool) -> Array:
    """Return a channels-last view of pixels that lie dense in either layout."""
    if not copy:
        return image
    dense = runtime.cupy().ascontiguousarray(stored_image(problem, image))
    if problem.layout != CHANNELS_FIRST:
        return dense
    return dense.transpose(0, *range(2, dense.ndim), 1)


def by_channel(image: Array) -> Array:
    """Return pixels of a channels-last view with the channels outermost: a row over all examples."""
    axes = image.ndim - 1, *range(image.ndim - 1)
    return runtime.cupy().ascontiguousarray(image.transpose(axes))


def part_of(problem: ConvProblem, image: Array, start: int, count: int) -> Array:
    """Return positions of a dense image as (n, count, groups, in_group), or, channels first,
    (n, groups, in_group, count): a view.
    """
    groups, stored = problem.groups, stored_image(problem, image)
    n = stored.shape[0]
    if problem.layout == CHANNELS_FIRST:
        flat = stored.reshape(n, groups, stored.shape[1] // groups, -1)
        return flat[..., start : start + count]
    flat = stored.reshape(n, -1, groups, stored.shape[-1] // groups)
    return flat[:, start : start + count]


def result_shape(problem: ConvProblem, n: int, count: int) -> tuple[int, ...]:
    """Return the shape of results of ``count`` positions of ``n`` examples, as :func:`part_of`."""
    groups, out_group = problem.groups, problem.out_channels // problem.groups
    first = problem.layout == CHANNELS_FIRST
    return (n, groups, out_group, count) if first else (n, count, groups, out_group)


def _rows(part: Array) -> Array:
    """Return (n, count, groups, k) as (groups, n * count, k), a view."""
    n, count, groups, k = part.shape
    return part.reshape(n * count, groups, k).transpose(1, 0, 2)


def turned(matrices: View) -> View:
    """Return the transposed matrices."""
    return matrices[0].transpose(0, 2, 1), matrices[1]


def multiply(problem: ConvProblem, columns: View, weights: View, z: View) -> Multiply:
    """Return what writes windows times weights into ``z``, given the arrays of these.

    So too, with the weights turned, ``dz`` times weights into windows.
    """
    if problem.layout != CHANNELS_FIRST:
        return _product(_viewed(_rows, columns), weights, _viewed(_rows, z))
    if columns[0].shape[0] >= problem.groups:
        parts = [
            _product(_repeated(weights, g, columns), _group(columns, g), _group(z, g))
            for g in range(problem.groups)
        ]
    else:
        parts = [
            _product(weights, _example(columns, n), _example(z, n))
            for n in range(columns[0].shape[0])
        ]
    run = _together(parts)
    return lambda columns, weights, z: run(weights, columns, z)


def accumulate(problem: ConvProblem, columns: View, dz: View, dw: View, later: bool) -> Multiply:
    """Return what writes windows transposed times ``dz`` into the matrices ``dw``, or adds it."""
    if problem.layout != CHANNELS_FIRST:
        return _product(turned(_viewed(_rows, columns)), _viewed(_rows, dz), dw, later)
    parts = [
        _product(
            _example(dz, n),
            (columns[0][n].transpose(0, 2, 1), columns[1]),
            dw,
            later or n > 0,
        )
        for n in range(dz[0].shape[0])
    ]
    run = _together(parts)
    return lambda columns, dz, dw: run(dz, columns, dw)


def _product(a: View, b: View, c: View, later: bool = False) -> Multiply:
    return cublas.prepare(Matrices.of(*a), Matrices.of(*b), Matrices.of(*c), later)


def _together(parts: list[Multiply]) -> Multiply:
    """Return what calls one after the other."""
    if len(parts) == 1:
        return parts[0]

    def run(a: Array, b: Array, c: Array) -> None:
        for part in parts:
            part(a, b, c)

    return run


def _viewed(view: Callable[[Array], Array], of: View) -> View:
    return view(of[0]), of[1]


def _group(of: View, g: int) -> View:
    return of[0][:, g], of[1]


def _example(of: View, n: int) -> View:
    return of[0][n], of[1]


def _repeated(matrices: View, g: int, images: View) -> View:
    """Return a group's matrix for each of some images, a view."""
    matrix, count = matrices[0][g], images[0].shape[0]
    repeated = runtime.cupy().broadcast_to(matrix[None], (count, *matrix.shape))
    return repeated, matrices[1]
