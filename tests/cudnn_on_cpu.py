"""What stands in the place of nvidia-cudnn-frontend: records graphs, and computes them in NumPy.

It has the part of the frontend's interface that gpuconv calls, and reads memory only through
pointers, dimensions and steps, as cuDNN does. What it computes follows the documentation of the
operations, tap by tap in float64; it knows nothing of speed, plans or numerical notes, but that
they were asked for. Numbers from it say that the graphs are right, not that cuDNN is.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpuconv import dispatch
from gpuconv.cuda import cudnn as graphs

__all__ = ["Frontend", "installed"]

Array = np.ndarray


class cudnnGraphNotSupportedError(Exception):
    """What the frontend raises where no engine computes a graph."""


def _enumeration(kind: str, *names: str) -> Any:
    return SimpleNamespace(**{name: f"{kind}.{name}" for name in names})


class Tensor:
    """A tensor of a graph; what an operation returns is one too."""

    def __init__(self, name: str = "", dim: Any = None, stride: Any = None, data_type: Any = None):
        self.name, self.dim, self.stride, self.data_type = name, dim, stride, data_type
        self.compute: Callable[[dict[Tensor, Array]], Array] | None = None
        self.is_output = False

    def set_output(self, value: bool) -> Tensor:
        self.is_output = value
        return self

    def set_data_type(self, data_type: Any) -> Tensor:
        self.data_type = data_type
        return self

    def set_dim(self, dim: list[int]) -> Tensor:
        assert isinstance(dim, list)
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Tensor:
        assert isinstance(stride, list)
        self.stride = stride
        return self

    def memory(self, pointer: int) -> Array:
        """Return the array at a device's address."""
        import ml_dtypes

        kinds = {"HALF": "e", "FLOAT": "f", "DOUBLE": "d", "BFLOAT16": ml_dtypes.bfloat16}
        dtype = np.dtype(kinds[self.data_type.split(".")[1]])
        count = 1 + sum((n - 1) * s for n, s in zip(self.dim, self.stride, strict=True))
        room = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
        flat = np.frombuffer(room, dtype)
        steps = [s * dtype.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(flat, self.dim, steps)


def _windows(
    cells: tuple[int, ...], taps: tuple[int, ...], out: tuple[int, ...], at: dict[str, Any]
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each tap with the input's cells that meet it and the outputs where they do."""
    for tap in itertools.product(*map(range, taps)):
        here, there = [], []
        for n, t, o, before, stride, dilation in zip(
            cells, tap, out, at["pre_padding"], at["stride"], at["dilation"], strict=True
        ):
            outputs = [i for i in range(o) if 0 <= i * stride + t * dilation - before < n]
            first, last = (outputs[0], outputs[-1] + 1) if outputs else (0, 0)
            begin = first * stride + t * dilation - before if outputs else 0
            here.append(slice(begin, begin + stride * (last - first), stride))
            there.append(slice(first, last))
        yield tap, tuple(here), tuple(there)


def _groups(x: Array, w: Array) -> int:
    return int(x.shape[1] // w.shape[1])


def fprop(x: Array, w: Array, y: Array, at: dict[str, Any]) -> None:
    """Add the convolution of ``x`` (n, c, ...) with ``w`` (o, c of a group, ...) to ``y``."""
    groups = _groups(x, w)
    xs, ws, ys = np.split(x, groups, 1), np.split(w, groups), np.split(y, groups, 1)
    for tap, here, there in _windows(x.shape[2:], w.shape[2:], y.shape[2:], at):
        for a, b, c in zip(xs, ws, ys, strict=True):
            part = (slice(None), slice(None), *there)
            c[part] += np.einsum("nc...,oc->no...", a[(..., *here)], b[(..., *tap)])


def dgrad(x: Array, w: Array, y: Array, at: dict[str, Any]) -> None:
    """Add the gradient with respect to ``x`` to it, given that of ``y``."""
    groups = _groups(x, w)
    xs, ws, ys = np.split(x, groups, 1), np.split(w, groups), np.split(y, groups, 1)
    for tap, here, there in _windows(x.shape[2:], w.shape[2:], y.shape[2:], at):
        for a, b, c in zip(xs, ws, ys, strict=True):
            a[(..., *here)] += np.einsum("no...,oc->nc...", c[(..., *there)], b[(..., *tap)])


def wgrad(x: Array, w: Array, y: Array, at: dict[str, Any]) -> None:
    """Add the gradient with respect to ``w`` to it, given that of ``y``."""
    groups = _groups(x, w)
    xs, ws, ys = np.split(x, groups, 1), np.split(w, groups), np.split(y, groups, 1)
    for tap, here, there in _windows(x.shape[2:], w.shape[2:], y.shape[2:], at):
        for a, b, c in zip(xs, ws, ys, strict=True):
            flat = (v.reshape(*v.shape[:2], -1) for v in (a[(..., *here)], c[(..., *there)]))
            b[(..., *tap)] += np.einsum("nck,nok->oc", *flat)


def _erf(z: Array) -> Array:
    from scipy.special import erf

    return np.asarray(erf(z))


_POINTWISE: dict[str, Callable[..., Array]] = {
    "relu": lambda z, negative_slope=0.0: np.where(
        z < 0, negative_slope * z if negative_slope else 0, z
    ),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "gelu": lambda z: z / 2 * (1 + _erf(z / np.sqrt(2))),
    "gelu_approx_tanh": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "softplus": lambda z: np.logaddexp(0, z),
    "exp": np.exp,
}


class pygraph:
    """A graph; ``steps`` lists what was called on it, in order."""

    def __init__(
        self,
        frontend: Frontend,
        *,
        name: str,
        io_data_type: str,
        intermediate_data_type: str,
        compute_data_type: str,
        handle: Any = None,
    ):
        self._frontend = frontend
        self.name, self.handle = name, handle
        self.types = (io_data_type, intermediate_data_type, compute_data_type)
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.operations: list[tuple[str, dict[str, Any]]] = []
        self.steps: list[str] = []
        self.excluded: list[str] = []
        self.limit = -1
        frontend.graphs.append(self)

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> Tensor:
        assert isinstance(dim, list)
        assert isinstance(stride, list)
        made = Tensor(name, dim, stride, data_type)
        self.inputs.append(made)
        return made

    def _operation(self, name: str, compute: Any, **at: Any) -> Tensor:
        made = Tensor(name)
        made.compute = compute
        self.operations.append((name, at))
        self.outputs.append(made)
        return made

    def _conv(self, name: str, function: Any, one: Tensor, two: Tensor, at: Any) -> Tensor:
        def compute(values: dict[Tensor, Array]) -> Array:
            made = np.zeros(self.outputs[-1].dim)
            arrays = {
                "conv_fprop": lambda: (values[one], values[two], made),
                "conv_dgrad": lambda: (made, values[two], values[one]),
                "conv_wgrad": lambda: (values[one], made, values[two]),
            }[name]()
            function(*arrays, at)
            return made

        for before, after, stride, dilation in zip(
            *(at[k] for k in ("pre_padding", "post_padding", "stride", "dilation")), strict=True
        ):
            assert min(before, after) >= 0, "no negative padding"
            assert min(stride, dilation) >= 1
        return self._operation(name, compute, **at)

    def conv_fprop(self, *, image: Tensor, weight: Tensor, **at: Any) -> Tensor:
        return self._conv("conv_fprop", fprop, image, weight, at)

    def conv_dgrad(self, *, loss: Tensor, filter: Tensor, **at: Any) -> Tensor:
        return self._conv("conv_dgrad", dgrad, loss, filter, at)

    def conv_wgrad(self, *, image: Tensor, loss: Tensor, **at: Any) -> Tensor:
        return self._conv("conv_wgrad", wgrad, image, loss, at)

    def bias(self, *, input: Tensor, bias: Tensor, compute_data_type: str) -> Tensor:
        return self._operation("bias", lambda values: values[input] + values[bias])

    def __getattr__(self, name: str) -> Any:
        if name not in _POINTWISE:
            raise AttributeError(name)

        def add(*, input: Tensor, compute_data_type: str, **keywords: Any) -> Tensor:
            function = _POINTWISE[name]
            return self._operation(
                name, lambda values: function(values[input], **keywords), **keywords
            )

        return add

    def validate(self) -> None:
        self.steps.append("validate")
        assert [t.is_output for t in self.outputs] == [False] * (len(self.outputs) - 1) + [True]

    def build_operation_graph(self) -> None:
        self.steps.append("build_operation_graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        self.steps.append("create_execution_plans")
        assert modes == ["heur_mode.A", "heur_mode.FALLBACK"]

    def deselect_numeric_notes(self, notes: list[str]) -> None:
        # Filters mark plans that are there: before create_execution_plans they do nothing.
        assert "create_execution_plans" in self.steps
        self.excluded = [n.split(".")[1] for n in notes]

    def deselect_workspace_greater_than(self, limit: int) -> None:
        self.limit = limit

    def check_support(self) -> None:
        self.steps.append("check_support")
        assert "create_execution_plans" in self.steps
        refused = self._frontend.refuse(self)
        if refused:
            raise cudnnGraphNotSupportedError(refused)

    def build_plans(self, policy: str) -> None:
        self.steps.append("build_plans")
        assert "check_support" in self.steps
        assert policy == "build_plan_policy.HEURISTICS_CHOICE"

    def get_workspace_size(self) -> int:
        assert "build_plans" in self.steps
        return self._frontend.workspace

    def execute(self, pack: dict[Tensor, int], workspace: int, handle: Any = None) -> None:
        assert self.steps[-1] in ("build_plans", "execute")
        assert (workspace != 0) == (self._frontend.workspace > 0)
        self.steps.append("execute")
        self._frontend.streams.append(handle.stream)
        self._frontend.ran.append(self)
        assert set(pack) == {*self.inputs, self.outputs[-1]}
        assert all(type(p) is int for p in pack.values())
        with np.errstate(all="ignore"):
            values = {t: t.memory(pack[t]).astype("float64") for t in self.inputs}
            shape = self.outputs[-1].dim
            for made in self.outputs:
                made.dim = made.dim or shape
                assert made.compute is not None
                values[made] = made.compute(values)
            last = self.outputs[-1]
            target = last.memory(pack[last])
            target[...] = values[last].astype(target.dtype)


class Frontend:
    """The module.

    Attributes
    ----------
    graphs : list of pygraph
        All that were made.
    ran, streams : list
        The graph of each execution, and the stream it was launched on.
    workspace : int
        Bytes that every plan takes.
    refuse : callable
        Returns why there is no plan for a graph, or an empty text.
    """

    cudnnGraphNotSupportedError = cudnnGraphNotSupportedError
    data_type = _enumeration("data_type", "HALF", "BFLOAT16", "FLOAT", "DOUBLE")
    heur_mode = _enumeration("heur_mode", "A", "B", "FALLBACK")
    build_plan_policy = _enumeration("build_plan_policy", "HEURISTICS_CHOICE", "ALL")
    numerical_note = _enumeration(
        "numerical_note", "TENSOR_CORE", "DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION",
        "FFT", "NONDETERMINISTIC", "WINOGRAD", "WINOGRAD_TILE_4x4", "WINOGRAD_TILE_6x6",
        "WINOGRAD_TILE_13x13",
    )  # fmt: skip

    def __init__(self) -> None:
        self.graphs: list[pygraph] = []
        self.ran: list[pygraph] = []
        self.handles: list[Any] = []
        self.streams: list[Any] = []
        self.workspace = 0
        self.refuse: Callable[[pygraph], str] = lambda graph: ""

    def backend_version(self) -> int:
        return 90_800

    def create_handle(self) -> Any:
        self.handles.append(SimpleNamespace(stream=None))
        return self.handles[-1]

    def set_stream(self, *, handle: Any, stream: int) -> None:
        handle.stream = stream

    def pygraph(self, **options: Any) -> pygraph:
        return pygraph(self, **options)


@contextmanager
def installed() -> Iterator[Frontend]:
    """Put a stand-in in the place of the frontend, and of the proof that it runs."""
    found, reason = graphs.frontend, graphs.why_not
    made = Frontend()
    graphs.clear()
    graphs.frontend, graphs.why_not = lambda: made, lambda: None  # type: ignore[assignment]
    dispatch.clear()
    try:
        yield made
    finally:
        graphs.frontend, graphs.why_not = found, reason
        graphs.clear()
        dispatch.clear()
