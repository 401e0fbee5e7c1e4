"""NVIDIA's cuDNN, through its graphs (:mod:`gpuconv.cuda.cudnn`): for users who have it.

A pass of a problem is one graph, planned once for a device and kept. What lies dense goes to cuDNN
as it is, channels last or first; the rest is copied, in parts of the batch that fit the workspace.
Weights that are held channels last (HWIO) always are: cuDNN takes those of each output together.

It may compute a pass only where cuDNN has a plan that keeps to the settings: IEEE products for
float32 unless ``set_precision("tf32")``, no Winograd or FFT with ``set_precision("strict")``, the
same bits from run to run with ``gpuconv.deterministic(True)``, and the workspace limit. An
activation that cuDNN does not fuse is applied behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from gpuconv import settings
from gpuconv.activations import (
    ELU,
    GELU,
    Activation,
    Exponential,
    LeakyReLU,
    ReLU,
    Sigmoid,
    SoftPlus,
    Tanh,
)
from gpuconv.cuda import architecture, cudnn, prediction, runtime
from gpuconv.engines.base import Engine, Pass, bias_grad
from gpuconv.engines.cuda_arrays import copied, needs_wide_index, parts, stored_image
from gpuconv.problem import CHANNELS_FIRST, ConvProblem

__all__ = ["Cudnn"]

Array = Any

_KINDS: dict[Pass, str] = {"forward": "fprop", "input_grad": "dgrad", "weight_grad": "wgrad"}
#: Fraction of the peak that its kernels are taken to reach, and of the bandwidth.
PEAK = 0.7
#: Seconds of a call: graph, workspace, stream.
CALL = 1.5e-5
#: Channels of a group under which its kernels compute on zeros.
NARROW = 32


class Cudnn(Engine):
    """Graphs of cuDNN: its own choice of kernel, within the settings."""

    name = "cudnn"
    device_kind = "cuda"
    #: Its fastest plans may add in any order; it excludes them where repetition is asked for.
    deterministic = False
    error_factor = 10.0  # among its kernels are Winograd's

    def can_repeat(self) -> bool:
        """Return True: plans that cannot are left out where the settings ask for repetition."""
        return True

    def unavailable(self) -> str | None:
        """Return why cuDNN does not run on the current device, or None."""
        return cudnn.why_not()

    def unsupported(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return why cuDNN cannot compute this pass, or None: it has a plan then."""
        reason = super().unsupported(problem, pass_)
        if reason is not None:
            return reason
        if needs_wide_index(problem):
            return "it is given tensors of fewer than 2**31 elements"
        if self.unavailable() is not None:
            return None  # which says more than a missing plan
        found = cudnn.plan(_graph(_trimmed(problem), pass_, _budget(problem)))
        return found if isinstance(found, str) else None

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted time by FLOPs and bytes."""
        gpu = architecture.gpu()
        narrow = min(problem.in_channels, problem.out_channels) // problem.groups
        tensor = problem.itemsize == 2 or settings.get_precision() == "tf32"
        # Without TF32 (7.x) its tensor cores have no rate for float32.
        peak = gpu.flops(problem.dtype, tensor) or gpu.flops(problem.dtype)
        rate = PEAK * peak * min(1.0, narrow / NARROW)
        return CALL + max(problem.flops / rate, prediction.bytes_moved(gpu, problem.bytes))

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of the plan's workspace and of the weights in cuDNN's order."""
        found = cudnn.plan(_graph(_trimmed(problem), pass_, _budget(problem)))
        return _weight_bytes(problem) + (0 if isinstance(found, str) else found.workspace)

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``act(conv(x, w) + b)`` into ``y``."""
        xp = runtime.cupy()
        x, problem = x[_cells(problem)], _trimmed(problem)
        weights = _stored_weights(problem, w)
        bias = None if b is None else xp.ascontiguousarray(b)
        if bias is None and _operation(problem.activation):
            bias = xp.zeros(problem.out_channels, problem.dtype)  # what it fuses comes with one
        x, y = stored_image(problem, x), stored_image(problem, y)
        for part, at, limit in _parts(problem, x, y):
            target = y[at]
            in_place = target.flags.c_contiguous
            result = target if in_place else xp.empty(target.shape, y.dtype)
            _fprop(part, limit, xp.ascontiguousarray(x[at]), weights, bias, result)
            if not in_place:
                target[...] = result

    def input_grad(self, problem: ConvProblem, dz: Array, w: Array, dx: Array) -> None:
        """Write the gradient with respect to ``x`` into ``dx``."""
        xp = runtime.cupy()
        inside = _cells(problem)
        if _trimmed(problem) is not problem:
            dx.fill(0)  # no window reads the rest
        dx, problem = dx[inside], _trimmed(problem)
        weights = _stored_weights(problem, w)
        dz, dx = stored_image(problem, dz), stored_image(problem, dx)
        for part, at, limit in _parts(problem, dz, dx):
            target = dx[at]
            in_place = target.flags.c_contiguous
            result = target if in_place else xp.empty(target.shape, dx.dtype)
            graph = _graph(part, "input_grad", limit)
            cudnn.execute(_required(graph), (xp.ascontiguousarray(dz[at]), weights, result))
            if not in_place:
                target[...] = result

    def weight_grad(
        self, problem: ConvProblem, dz: Array, x: Array, dw: Array | None, db: Array | None
    ) -> None:
        """Write the gradients with respect to ``w`` and ``b`` into those of ``dw``, ``db`` given."""
        if db is not None:
            bias_grad(dz, db)
        if dw is None:
            return
        xp = runtime.cupy()
        x, problem = x[_cells(problem)], _trimmed(problem)
        stored = dw.transpose(_weight_order(problem))
        x, dz = stored_image(problem, x), stored_image(problem, dz)
        total: Array = None
        for part, at, limit in _parts(problem, x, dz):
            # Parts of a gradient are asked for in float32.
            in_place = stored.flags.c_contiguous and dw.dtype == x.dtype and total is None
            result = stored if in_place else xp.empty(stored.shape, x.dtype)
            graph = _graph(part, "weight_grad", limit)
            arrays = xp.ascontiguousarray(x[at]), xp.ascontiguousarray(dz[at]), result
            cudnn.execute(_required(graph), arrays)
            if part is not problem:
                wide = result.astype("float32") if result.itemsize == 2 else result
                total = wide if total is None else total + wide
                result = total
            if result is not stored:
                stored[...] = result


# --------------------------------------------------------------------------- problems and graphs


def _trimmed(problem: ConvProblem) -> ConvProblem:
    """Return the problem without the cells at the end that no window reads."""
    if all(after >= 0 for _, after in problem.padding):
        return problem
    return replace(
        problem,
        in_shape=tuple(
            n + min(after, 0)
            for n, (_, after) in zip(problem.in_shape, problem.padding, strict=True)
        ),
        padding=tuple((before, max(after, 0)) for before, after in problem.padding),
    )


def _cells(problem: ConvProblem) -> tuple[slice, ...]:
    """Return where the trimmed input lies in the whole."""
    return (slice(None), *(slice(0, n) for n in _trimmed(problem).in_shape))


def _weight_bytes(problem: ConvProblem) -> int:
    """Return the bytes of the copy of the weights in cuDNN's order."""
    if problem.layout == CHANNELS_FIRST:
        return 0
    return math.prod(problem.w_shape) * problem.itemsize


def _budget(problem: ConvProblem) -> int:
    """Return the bytes of workspace that a plan may take."""
    return max(0, settings.get_workspace_limit() - _weight_bytes(problem))


def _parts(problem: ConvProblem, *images: Array) -> Iterator[tuple[ConvProblem, slice, int]]:
    """Yield parts of the batch, where they are, and the workspace that their plans may take.

    Where images are copied, they take half of it.
    """
    example = sum(map(copied, images))
    limit = _budget(problem)
    for part, at in parts(problem, 2 * example):
        yield part, at, limit // 2 if example else limit


def _weight_order(problem: ConvProblem) -> tuple[int, ...]:
    """Return the axes of channels-last weights in cuDNN's order in memory."""
    taps = tuple(range(problem.ndim))
    inputs, outputs = problem.ndim, problem.ndim + 1
    if problem.layout == CHANNELS_FIRST:
        return (outputs, inputs, *taps)
    return (outputs, *taps, inputs)


def _stored_weights(problem: ConvProblem, w: Array) -> Array:
    return runtime.cupy().ascontiguousarray(w.transpose(_weight_order(problem)))


def _tensor(
    outer: int, channels: int, cells: tuple[int, ...], first: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return dimensions and steps of a dense tensor; a single spatial axis gets a second."""
    cells = (1, *cells) if len(cells) == 1 else cells
    dimensions = (outer, channels, *cells)
    axes = range(len(dimensions))
    order = tuple(axes) if first else (0, *axes[2:], 1)
    steps = [0] * len(dimensions)
    size = 1
    for axis in reversed(order):
        steps[axis] = size
        size *= dimensions[axis]
    return dimensions, tuple(steps)


def _excluded(dtype: str) -> tuple[str, ...]:
    """Return the numerical notes that a plan must not carry under the present settings."""
    precision = settings.get_precision()
    notes = ["REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS", "WINOGRAD_TILE_13x13"]
    if dtype == "float32" and precision != "tf32":
        notes.append("TENSOR_CORE")
    if precision == "strict" or dtype in ("float16", "bfloat16"):
        # 16-bit kernels transform in 16 bits.
        notes += ["WINOGRAD", "WINOGRAD_TILE_4x4", "WINOGRAD_TILE_6x6", "FFT"]
    if settings.is_deterministic():
        notes.append("NONDETERMINISTIC")
    return tuple(notes)


def _graph(
    problem: ConvProblem,
    pass_: Pass,
    limit: int,
    bias: bool = False,
    activation: tuple[Any, ...] = (),
) -> cudnn.Graph:
    """Return the graph of a pass."""
    return _described(problem, pass_, limit, bias, activation, _excluded(problem.dtype))


@lru_cache(maxsize=cudnn.KEPT)
def _described(
    problem: ConvProblem,
    pass_: Pass,
    limit: int,
    bias: bool,
    activation: tuple[Any, ...],
    excluded: tuple[str, ...],
) -> cudnn.Graph:
    first = problem.layout == CHANNELS_FIRST

    def two(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return (fill, *values) if len(values) == 1 else values

    inputs, outputs = problem.in_channels, problem.out_channels
    return cudnn.Graph(
        kind=_KINDS[pass_],
        dtype=problem.dtype,
        x=_tensor(problem.batch, inputs, problem.in_shape, first),
        w=_tensor(outputs, inputs // problem.groups, problem.kernel, first),
        y=_tensor(problem.batch, outputs, problem.out_shape, first),
        before=two(tuple(before for before, _ in problem.padding), 0),
        after=two(tuple(after for _, after in problem.padding), 0),
        stride=two(problem.stride, 1),
        dilation=two(problem.dilation, 1),
        bias=bias,
        activation=activation,
        excluded=excluded,
        limit=limit,
    )


# -------------------------------------------------------------------------------------- epilogues


def _operation(activation: Activation | None) -> tuple[Any, ...]:
    """Return the frontend's operation of an activation and its keywords; empty if it has none."""
    plain = {ReLU: "relu", Tanh: "tanh", Sigmoid: "sigmoid", SoftPlus: "softplus"}
    kind = type(activation)
    if kind in plain:
        return (plain[kind],)
    if kind is Exponential:
        return ("exp",)
    if isinstance(activation, LeakyReLU) and kind is LeakyReLU:
        slope = float(activation.alpha)
        return ("relu", ("negative_slope", slope)) if slope else ("relu",)
    if isinstance(activation, ELU) and kind is ELU and activation.alpha == 1:
        return ("elu",)
    if isinstance(activation, GELU) and kind is GELU:
        return ("gelu_approx_tanh" if activation.approximate else "gelu",)
    return ()


def _required(graph: cudnn.Graph) -> cudnn.Plan:
    """Return the plan of a graph that must have one.

    Raises
    ------
    RuntimeError
        If cuDNN has none: for a part of the batch, or beside copies, in less workspace than
        the problem was planned in.
    """
    found = cudnn.plan(graph)
    if isinstance(found, str):
        raise RuntimeError(f"{found}; more workspace may help (gpuconv.set_workspace_limit)")
    return found


def _fprop(
    problem: ConvProblem, limit: int, x: Array, weights: Array, bias: Array | None, y: Array
) -> None:
    """Write the finished outputs of a part, as much of the epilogue fused as cuDNN has a plan for."""
    activation = problem.activation
    operation = _operation(activation)
    plain = replace(problem, activation=None)
    if bias is not None:
        for fused in dict.fromkeys((operation, ())):
            found = cudnn.plan(_graph(plain, "forward", limit, True, fused))
            if isinstance(found, str):
                continue
            cudnn.execute(found, (x, weights, bias, y))
            if activation is not None and not fused:
                activation.fn(y, out=y)
            return
    cudnn.execute(_required(_graph(plain, "forward", limit)), (x, weights, y))
    if bias is not None:
        channels = 1 if problem.layout == CHANNELS_FIRST else y.ndim - 1
        y += bias.reshape(tuple(-1 if k == channels else 1 for k in range(y.ndim)))
    if activation is not None:
        activation.fn(y, out=y)
