"""The passes of a convolution, over any number of spatial axes: check, plan, dispatch, compute.

Arrays that are held channels first go to the engines as transposed views. Engines compute
bilinear forms: what is conjugated in the gradients of complex arrays is conjugated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from gpuconv import dispatch, memory, settings, threads
from gpuconv.activations import Activation
from gpuconv.cuda import runtime
from gpuconv.cuda.epilogue import example_bytes, output_grad
from gpuconv.device import CPU, Device, device_of, namespace
from gpuconv.engines.base import Engine
from gpuconv.engines.epilogue import backward_by_parts
from gpuconv.functional.plan import Plan, activation_argument, hashable, make_plan
from gpuconv.interop import dlpack
from gpuconv.problem import CHANNELS_FIRST, COMPLEX, DTYPES, ConvProblem
from gpuconv.profiling import ranges

__all__ = [
    "NEEDS",
    "at",
    "check_arrays",
    "check_gradient",
    "check_out",
    "conjugate_weight_grad",
    "conv",
    "conv_backward",
    "formed_bytes",
    "last",
    "native",
    "needs_argument",
    "on",
    "one_blas_thread",
    "over_parts",
    "overlap",
    "parts",
]

Array = Any

NEEDS = ("x", "w", "b")

#: Operations below which BLAS does not divide a product.
_DIVIDED = 2**19


def conv(
    nd: int,
    x: Array,
    w: Array,
    b: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    activation: Any,
    out: Array | None,
) -> Array:
    """Return ``act(conv(x, w) + b)``; the arguments are those of :func:`gpuconv.conv2d`."""
    usual = _plain(x, w, b)
    where = CPU if usual else check_arrays({"x": x, "w": w, "b": b})
    if where is None:
        return dlpack.call(
            lambda x, w, b, out: conv(
                nd, x, w, b, stride, padding, dilation, groups, layout, activation, out
            ),
            {"x": x, "w": w, "b": b, "out": out},
        )
    if not usual:
        x, w, b = native(x), native(w), None if b is None else native(b)
    plan = make_plan(
        nd,
        x.shape,
        w.shape,
        _names.get(x.dtype) or x.dtype.name,
        hashable(stride),
        hashable(padding),
        hashable(dilation),
        groups,
        layout,
        activation_argument(activation),
    )
    problem = plan.problem
    if b is not None and b.shape != (problem.out_channels,):
        raise ValueError(
            f"b has shape {b.shape}; expected ({problem.out_channels},), one value an output channel"
        )
    with on(where):
        if out is None:
            y = memory.empty_as(x, plan.y_shape)
        else:
            check_out(out, plan.y_shape, x, where)
            y = out
            if any(a is not None and overlap(out, a) for a in (x, w, b)):
                y = memory.empty_as(x, plan.y_shape)
        if not plan.empty:
            chosen = dispatch.choose(problem, "forward", where.kind)
            with (
                ranges.convolution(problem, "forward", chosen),
                one_blas_thread(problem, where.kind),
            ):
                chosen.forward(
                    problem, last(x, plan.x_axes), last(w, plan.w_axes), b, last(y, plan.x_axes)
                )
        if out is not None and y is not out:
            out[...] = y
            return out
    return y


def conv_backward(
    nd: int,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    activation: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    layout: Any,
    needs: Iterable[str],
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients; the arguments are those of :func:`gpuconv.conv2d_backward`."""
    usual = _plain(x, w, y) and _plain(dy, w, None)
    where = CPU if usual else check_arrays({"dy": dy, "x": x, "w": w, "y": y})
    if where is None:
        return dlpack.call(  # type: ignore[no-any-return]
            lambda dy, x, w, y: conv_backward(
                nd, dy, x, w, y, activation, stride, padding, dilation, groups, layout, needs
            ),
            {"dy": dy, "x": x, "w": w, "y": y},
        )
    if not usual:
        dy, x, w, y = native(dy), native(x), native(w), None if y is None else native(y)
    act = activation_argument(activation)
    plan = make_plan(
        nd,
        x.shape,
        w.shape,
        _names.get(x.dtype) or x.dtype.name,
        hashable(stride),
        hashable(padding),
        hashable(dilation),
        groups,
        layout,
        act,
    )
    need_x, need_w, need_b = needs_argument(needs)
    problem = plan.problem
    check_gradient(plan.y_shape, act, dy, y)
    with on(where):
        make = namespace(x).zeros if plan.empty else partial(memory.empty_as, x)
        dx = make(x.shape, x.dtype) if need_x else None
        dw = make(w.shape, x.dtype) if need_w else None
        db = make((problem.out_channels,), x.dtype) if need_b else None
        if not plan.empty and (need_x or need_w or need_b):
            _run_backward(
                plan,
                where.kind,
                last(dy, plan.x_axes),
                last(x, plan.x_axes),
                last(w, plan.w_axes),
                None if y is None or act is None else last(y, plan.x_axes),
                None if dx is None else last(dx, plan.x_axes),
                None if dw is None else last(dw, plan.w_axes),
                db,
            )
    return dx, dw, db


def _run_backward(
    plan: Plan,
    kind: str,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
) -> None:
    """Compute the gradients asked for: in one call where one engine does all of them."""
    weights = dw is not None or db is not None
    by_x = dispatch.choose(plan.plain, "input_grad", kind) if dx is not None else None
    by_w = dispatch.choose(plan.plain, "weight_grad", kind) if weights else None
    whole = by_x or by_w
    if whole is not None and whole.fused_backward and all(e in (whole, None) for e in (by_x, by_w)):
        with ranges.convolution(plan.problem, "backward", whole):
            whole.backward(plan.problem, dy, x, w, y, dx, dw, db)
        return
    if plan.problem.dtype in COMPLEX:
        with ranges.convolution(plan.problem, "backward", by_x, by_w):
            if by_x is not None and dx is not None:
                by_x.input_grad(plan.plain, dy, w.conj(), dx)
            if by_w is not None:
                conjugate_weight_grad(by_w, plan.plain, dy, x, dw, db, "x")
        return
    if kind == "cpu":
        with (
            ranges.convolution(plan.problem, "backward", by_x, by_w),
            one_blas_thread(plan.problem, kind),
        ):
            backward_by_parts(plan.problem, plan.plain, by_x, by_w, dy, x, w, y, dx, dw, db)
        return
    with ranges.convolution(plan.problem, "backward", by_x, by_w):
        _on_device(plan.problem, plan.plain, by_x, by_w, dy, x, w, y, dx, dw, db)


def _on_device(
    problem: ConvProblem,
    plain: ConvProblem,
    by_x: Engine | None,
    by_w: Engine | None,
    dy: Array,
    x: Array,
    w: Array,
    y: Array | None,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
) -> None:
    """Compute the gradients on a GPU by engines that do not fuse the epilogue's gradient."""
    activation = problem.activation if y is not None else None
    first = problem.layout == CHANNELS_FIRST

    def work(part: ConvProblem, some: slice | None, dw: Array | None, db: Array | None) -> None:
        dz = output_grad(at(dy, some), at(y, some), activation, db, first)
        if by_x is not None and dx is not None:
            with ranges.convolution(part, "input_grad", by_x):
                by_x.input_grad(part, dz, w, at(dx, some))
        if by_w is not None and dw is not None:
            with ranges.convolution(part, "weight_grad", by_w):
                by_w.weight_grad(part, dz, at(x, some), dw, None)

    over_parts(plain, formed_bytes(dy, y, activation, db, first), dw, db, work)


def formed_bytes(
    dy: Array, y: Array | None, activation: Activation | None, db: Array | None, first: bool
) -> int:
    """Return what the gradient in front of the epilogue takes for an example; 0 where all of it fits."""
    if 3 * dy.nbytes <= settings.get_workspace_limit() // 2:  # dz, and copies of dy and y
        return 0
    return example_bytes(dy, y, activation, db, first)


def over_parts(
    problem: ConvProblem,
    example: int,
    dw: Array | None,
    db: Array | None,
    work: Callable[[ConvProblem, slice | None, Array | None, Array | None], None],
    wide: Any = None,
) -> None:
    """Call ``work(problem, slice, dw, db)`` for parts of the batch; add up what it writes.

    Parameters
    ----------
    problem : ConvProblem
        Over the whole batch; ``work`` is given that of a part.
    example : int
        Bytes that ``work`` needs for an example; see :func:`parts`.
    dw, db : ndarray or None
        Where the sums over the parts are wanted.
    work : callable
        The slice is None where the batch is not divided.
    wide : dtype, optional
        Of the arrays that ``work`` is given if it is; else the results'.
    """
    cut = parts(problem.batch, example) if example else []
    if len(cut) <= 1:
        work(problem, None, dw, db)
        return
    results = [a for a in (dw, db) if a is not None]
    totals = [
        namespace(a).zeros(a.shape, "float32" if a.dtype.itemsize == 2 else a.dtype)
        for a in results
    ]
    for some in cut:
        made = [memory.empty_as(a, dtype=wide) for a in results]
        given = iter(made)
        part = problem.with_batch(some.stop - some.start)
        work(part, some, *(None if a is None else next(given) for a in (dw, db)))
        for total, value in zip(totals, made, strict=True):
            total += value
    for result, total in zip(results, totals, strict=True):
        result[...] = total


def at(array: Array | None, some: slice | None) -> Array | None:
    """Return a part of the batch; the array itself where it is not divided."""
    return array if array is None or some is None else array[some]


def parts(batch: int, example: int) -> list[slice]:
    """Divide a batch so that half the workspace limit holds ``example`` bytes for each of a part."""
    count = max(1, min(batch, settings.get_workspace_limit() // 2 // max(1, example)))
    return [slice(start, min(start + count, batch)) for start in range(0, batch, count)]


def conjugate_weight_grad(
    engine: Engine,
    problem: ConvProblem,
    dz: Array,
    x: Array,
    dw: Array | None,
    db: Array | None,
    conjugated: str,
) -> None:
    """Write the weight gradient with ``dz`` or ``x`` conjugated, a part of the batch at a time.

    ``db`` gets the sums of ``dz`` as it is, and is for ``conjugated="x"`` only.
    """
    source = x if conjugated == "x" else dz
    cut = parts(problem.batch, source.nbytes // problem.batch)
    for some in cut:
        part = problem.with_batch(some.stop - some.start)
        dz_part, x_part = (a[some].conj() if a is source else a[some] for a in (dz, x))
        if some is cut[0]:
            engine.weight_grad(part, dz_part, x_part, dw, db)
            continue
        more_w, more_b = (None if a is None else memory.empty_as(a) for a in (dw, db))
        engine.weight_grad(part, dz_part, x_part, more_w, more_b)
        for total, value in ((dw, more_w), (db, more_b)):
            if total is not None:
                total += value


# ------------------------------------------------------------------------------- arguments


def check_gradient(
    shape: tuple[int, ...], activation: Activation | None, dy: Array, y: Array | None
) -> None:
    """Check the gradient of a result of ``shape``, and that ``y`` is there where it is needed."""
    for name, array in (("dy", dy), ("y", y)):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; expected {shape}, the forward's result"
            )
    if activation is not None:
        if not activation.invertible:
            raise ValueError(
                f"activation is {activation}; its derivative does not follow from its output y, "
                "so multiply dy by its gradient yourself and pass activation=None"
            )
        if y is None:
            raise ValueError(
                f"y is None; expected the forward's result, as activation is {activation}"
            )


def needs_argument(needs: Iterable[str]) -> tuple[bool, bool, bool]:
    """Return whether the gradients of x, of w and of b are asked for."""
    try:
        names = tuple(needs)
    except TypeError:
        raise TypeError(f"needs is {needs!r}; expected some of {NEEDS}") from None
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"needs is {needs!r}; expected some of {NEEDS}")
    return "x" in names, "w" in names, "b" in names


#: The names of dtypes; ``dtype.name`` itself takes longer than a small array's product.
_names: dict[Any, str] = {}


def _dtype_name(dtype: Any) -> str | None:
    """Return the name of a dtype that is computed, None for others."""
    found = _names.get(dtype)
    if found is None and dtype.name in DTYPES:
        found = _names[dtype] = dtype.name
    return found


def _plain(x: Array, w: Array, other: Array | None) -> bool:
    """Return whether these are NumPy arrays of one native dtype that is computed: the usual case."""
    if type(x) is not np.ndarray or type(w) is not np.ndarray:
        return False
    dtype = x.dtype
    if dtype is not w.dtype or dtype not in _names or not dtype.isnative:
        return False
    return other is None or (type(other) is np.ndarray and other.dtype is dtype)


def check_arrays(arrays: dict[str, Array | None]) -> Device | None:
    """Check that the arrays are such, of one dtype, on one device; return the device.

    None is returned where an array is another library's that speaks DLPack.
    """
    where: Device | None = None
    first: str = ""
    dtype: Any = None
    for name, array in arrays.items():
        if array is None:
            if name in ("b", "y"):
                continue
            raise TypeError(f"{name} is None; expected a NumPy or CuPy array")
        here = CPU if type(array) is np.ndarray else device_of(array)
        if here is None or isinstance(array, np.ma.MaskedArray):
            if here is None and dlpack.speaks(array):
                return None
            raise TypeError(
                f"{name} is a {type(array).__name__}; expected a NumPy or CuPy array "
                "(gpuconv.asarray makes one)"
            )
        if array.dtype is dtype and here is where:  # the usual case
            continue
        if _dtype_name(array.dtype) is None:
            raise TypeError(f"{name} has dtype {array.dtype}; expected one of {', '.join(DTYPES)}")
        if where is None:
            where, first, dtype = here, name, array.dtype
            continue
        if here != where:
            raise ValueError(
                f"{first} is on {where} and {name} on {here}; expected one device "
                "(gpuconv.asarray moves an array)"
            )
        if array.dtype != dtype and array.dtype.name != dtype.name:
            raise TypeError(
                f"{first} has dtype {dtype} and {name} {array.dtype}; expected one dtype"
            )
    if where is None:
        raise TypeError("expected arrays")
    return where


def native(array: Array) -> Array:
    """Return the array as the plain class, in the machine's byte order."""
    if type(array) is np.ndarray and array.dtype.isnative:
        return array
    if isinstance(array, np.ndarray):
        return np.asarray(array, dtype=array.dtype.newbyteorder("="))
    return array


def last(array: Array, axes: tuple[int, ...] | None) -> Array:
    """Return the channels-last view."""
    return array if axes is None else array.transpose(axes)


def check_out(out: Array, shape: tuple[int, ...], x: Array, where: Device) -> None:
    """Check that a result of ``shape`` can be written into ``out``."""
    here = device_of(out)
    if here is None:
        raise TypeError(f"out is a {type(out).__name__}; expected a NumPy or CuPy array")
    if here != where:
        raise ValueError(f"out is on {here} and x on {where}; expected one device")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; expected {shape}")
    if out.dtype != x.dtype:
        raise TypeError(f"out has dtype {out.dtype}; expected {x.dtype}, the dtype of x")
    if not getattr(out.flags, "writeable", True):
        raise ValueError("out is read-only; expected an array that can be written")


def overlap(out: Array, array: Array) -> bool:
    """Return whether writing into ``out`` may change ``array``."""
    xp = namespace(array)
    return bool(xp.may_share_memory(out, array))


def one_blas_thread(problem: ConvProblem, kind: str) -> AbstractContextManager[Any]:
    """Hold BLAS to one thread for a whole pass on the CPU that is large enough to divide.

    Not only where the workers compute: after a product that BLAS has divided, its own threads
    spin for some milliseconds, and take a core from the workers.
    """
    if kind != "cpu" or problem.flops < _DIVIDED:
        return _NOTHING
    return threads.single_threaded_blas()


def on(where: Device) -> AbstractContextManager[Any]:
    """Make the arrays' CUDA device the current one; nothing to do on the CPU, or where it is."""
    if where.kind == "cpu":
        return _NOTHING
    cuda = runtime.cupy().cuda
    if cuda.runtime.getDevice() == where.index:
        return _NOTHING
    return cuda.Device(where.index)  # type: ignore[no-any-return]


_NOTHING: AbstractContextManager[Any] = nullcontext()
