"""Convolution and correlation of signals, with SciPy's meaning of ``mode``, in batches.

Sums are made by the definition, on the device of the arrays; for kernels of some thousand
taps a Fourier transform is faster.
"""

from __future__ import annotations

import math
from typing import Any

from gpuconv.arguments import integer
from gpuconv.device import namespace
from gpuconv.functional.passes import check_arrays, conv, native
from gpuconv.interop import dlpack

__all__ = ["convolve", "correlate"]

Array = Any
_MODES = ("full", "same", "valid")


def convolve(in1: Array, in2: Array, mode: str = "full", *, ndim: int | None = None) -> Array:
    """Convolve signals, or pairs of signals, over their last axes.

    Parameters
    ----------
    in1, in2 : ndarray
        ``(*batch, *signal)`` with 1 to 3 signal axes; floats or complex numbers of one dtype, of
        any library that :func:`gpuconv.conv2d` takes. The batch axes broadcast: one kernel for
        all signals, a kernel a signal (pairs), or a signal with many kernels.
    mode : {"full", "same", "valid"}
        The whole sum; its middle, of the size of ``in1``; or what needs no zeros around
        the signals, one of which must then be at least as large as the other on every axis.
    ndim : int, optional
        Number of signal axes. All axes if not given, and there is no batch then.

    Returns
    -------
    ndarray
        ``(*batch, *result)``, of the dtype of the signals.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    return _signals(in1, in2, mode, ndim, False)


def correlate(in1: Array, in2: Array, mode: str = "full", *, ndim: int | None = None) -> Array:
    """Correlate signals, or pairs of signals, over their last axes.

    As :func:`convolve`, with ``in2`` conjugated and not reversed.

    Parameters
    ----------
    in1, in2, mode, ndim
        As for :func:`convolve`.

    Returns
    -------
    ndarray
        ``(*batch, *result)``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """
    return _signals(in1, in2, mode, ndim, True)


def _signals(in1: Array, in2: Array, mode: Any, ndim: Any, correlation: bool) -> Array:
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}; expected 'full', 'same' or 'valid'")
    if check_arrays({"in1": in1, "in2": in2}) is None:
        return dlpack.call(
            lambda in1, in2: _signals(in1, in2, mode, ndim, correlation),
            {"in1": in1, "in2": in2},
        )
    in1, in2 = native(in1), native(in2)
    if ndim is None:
        if in1.ndim != in2.ndim:
            raise ValueError(
                f"in1 has {in1.ndim} axes and in2 {in2.ndim}; expected as many, or ndim, the number "
                "of signal axes behind the batch's"
            )
        nd = in1.ndim
    else:
        nd = integer("ndim", ndim, 1, "an integer of 1 to 3")
    if not 1 <= nd <= 3:
        raise ValueError(f"ndim is {nd}; expected 1 to 3 signal axes")
    for name, a in (("in1", in1), ("in2", in2)):
        if a.ndim < nd:
            raise ValueError(f"{name} has {a.ndim} axes; expected at least ndim, {nd}")
        if min(a.shape[a.ndim - nd :]) < 1:
            raise ValueError(f"{name} has shape {a.shape}; expected signals of at least one value")
    size, kernel = in1.shape[in1.ndim - nd :], in2.shape[in2.ndim - nd :]
    swapped = mode == "valid" and any(k > n for k, n in zip(kernel, size, strict=True))
    if swapped and any(k < n for k, n in zip(kernel, size, strict=True)):
        raise ValueError(
            f"mode is 'valid' for signals of {size} and {kernel}; expected one of them to be at "
            "least as large as the other on every axis"
        )
    reverse = (..., *(slice(None, None, -1),) * nd)
    if swapped:
        # The same sum with the signals in each other's place; a correlation comes reversed.
        if not correlation:
            return _slide(in2, in1[reverse], "valid", nd)
        return _slide(in2.conj(), in1, "valid", nd)[reverse]
    return _slide(in1, in2.conj() if correlation else in2[reverse], mode, nd)


def _slide(x: Array, w: Array, mode: str, nd: int) -> Array:
    """Slide ``w`` along ``x``: a convolution of the networks' kind, whose layout fits the batch."""
    xp = namespace(x)
    size, kernel = x.shape[x.ndim - nd :], w.shape[w.ndim - nd :]
    lead_x, lead_w = x.shape[: x.ndim - nd], w.shape[: w.ndim - nd]
    try:
        batch = xp.broadcast_shapes(lead_x, lead_w)
    except ValueError:
        raise ValueError(
            f"in1 and in2 have batches of {lead_x} and {lead_w}; expected ones that broadcast"
        ) from None
    if mode == "full":
        padding = tuple((k - 1, k - 1) for k in kernel)
    elif mode == "same":
        # The middle of the full result; where that is between two cells, the earlier.
        padding = tuple((k - 1 - (k - 1) // 2, (k - 1) // 2) for k in kernel)
    else:
        padding = ((0, 0),) * nd
    count = math.prod(batch)
    groups = 1
    if math.prod(lead_w) == 1:  # one kernel: signals are examples
        x, w = x.reshape(-1, 1, *size), w.reshape(1, 1, *kernel)
    elif math.prod(lead_x) == 1:  # one signal: kernels are output channels
        x, w = x.reshape(1, 1, *size), w.reshape(-1, 1, *kernel)
    else:  # pairs: each a channel to itself
        x = xp.broadcast_to(x, (*batch, *size)).reshape(1, count, *size)
        w = xp.broadcast_to(w, (*batch, *kernel)).reshape(count, 1, *kernel)
        groups = max(1, count)
    if count == 0:
        out = [n + sum(p) - k + 1 for n, p, k in zip(size, padding, kernel, strict=True)]
        return xp.empty((*batch, *out), x.dtype)
    y = conv(nd, x, w, None, 1, padding, 1, groups, "channels_first", None, None)
    return y.reshape(*batch, *y.shape[2:])
