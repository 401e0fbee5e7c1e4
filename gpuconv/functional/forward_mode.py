"""Forward-mode derivatives of convolutions: two convolutions each."""

from __future__ import annotations

from typing import Any

from gpuconv.activations import Activation
from gpuconv.device import namespace
from gpuconv.functional.passes import check_arrays, conv
from gpuconv.functional.plan import Ints, Padding, activation_argument
from gpuconv.interop import dlpack

__all__ = ["conv1d_jvp", "conv2d_jvp", "conv3d_jvp"]

Array = Any


def _jvp(
    nd: int,
    x: Array,
    w: Array,
    b: Array | None,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
    options: tuple[Any, Any, Any, Any, Any],
    activation: Any,
) -> tuple[Array, Array]:
    given = {"x": x, "w": w, "b": b}
    tangents = {"dx": dx, "dw": dw, "db": db}
    if all(t is None for t in tangents.values()):
        raise ValueError("dx, dw and db are None; expected at least one direction")
    if b is None and db is not None:
        raise ValueError("db is given and b is None; expected both")
    arrays = {**given, **{k: v for k, v in tangents.items() if v is not None}}
    if check_arrays(arrays) is None:
        return dlpack.call(  # type: ignore[no-any-return]
            lambda x, w, b, dx, dw, db: _jvp(nd, x, w, b, dx, dw, db, options, activation),
            {**given, **tangents},
        )
    for name, tangent in tangents.items():
        of = given[name[1:]]
        if tangent is not None and of is not None and tangent.shape != of.shape:
            raise ValueError(
                f"{name} has shape {tangent.shape}; expected {of.shape}, as {name[1:]}"
            )
    act = activation_argument(activation)
    if act is not None and x.dtype.kind == "c":
        raise ValueError(f"activation is {act}; expected None for arrays of {x.dtype.name}")

    def plain(x: Array, w: Array, b: Array | None) -> Array:
        return conv(nd, x, w, b, *options, None, None)

    z = plain(x, w, b)
    dz = None
    if dx is not None:
        dz = plain(dx, w, db)
    if dw is not None:
        more = plain(x, dw, db if dz is None else None)
        dz = more if dz is None else dz + more
    if dz is None and db is not None:
        channel = options[-1] in ("channels_first", "NCW", "NCHW", "NCDHW")
        dz = namespace(z).empty(z.shape, z.dtype)
        dz[...] = db.reshape(-1, *(1,) * nd) if channel else db
    return (z, dz) if act is None else (act.fn(z), (act.grad(z) * dz).astype(z.dtype, copy=False))


def conv2d_jvp(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    dx: Array | None = None,
    dw: Array | None = None,
    db: Array | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NHWC",
    activation: Activation | str | None = None,
) -> tuple[Array, Array]:
    """Return :func:`conv2d` and its derivative along a direction (forward mode).

    ``dz = conv(dx, w) + conv(x, dw) + db``, times the activation's derivative.

    Parameters
    ----------
    x, w, b, stride, padding, dilation, groups, layout, activation
        As for :func:`conv2d`.
    dx, dw, db : ndarray, optional
        The direction, of the shapes of ``x``, ``w`` and ``b``; None is zero. At least one.

    Returns
    -------
    y, dy : ndarray
        The result and its derivative, of the same shape.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    options = stride, padding, dilation, groups, layout
    return _jvp(2, x, w, b, dx, dw, db, options, activation)


def conv1d_jvp(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    dx: Array | None = None,
    dw: Array | None = None,
    db: Array | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NWC",
    activation: Activation | str | None = None,
) -> tuple[Array, Array]:
    """Return :func:`conv1d` and its derivative along a direction; see :func:`conv2d_jvp`."""
    options = stride, padding, dilation, groups, layout
    return _jvp(1, x, w, b, dx, dw, db, options, activation)


def conv3d_jvp(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    dx: Array | None = None,
    dw: Array | None = None,
    db: Array | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    layout: str = "NDHWC",
    activation: Activation | str | None = None,
) -> tuple[Array, Array]:
    """Return :func:`conv3d` and its derivative along a direction; see :func:`conv2d_jvp`."""
    options = stride, padding, dilation, groups, layout
    return _jvp(3, x, w, b, dx, dw, db, options, activation)
