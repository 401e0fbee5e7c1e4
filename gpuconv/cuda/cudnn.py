"""cuDNN through its official frontend, the package ``nvidia-cudnn-frontend``: graphs and their plans.

A :class:`Graph` describes one convolution with its strides, epilogue and what its plan may do. It
is planned when it is first asked for on a device, and the plan is kept; so is the reason where
cuDNN has none. Nothing here is imported before somebody asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gpuconv.cuda import runtime

__all__ = ["Graph", "Plan", "clear", "execute", "frontend", "plan", "plan_on", "why_not"]

#: Plans that are kept; the least used goes first.
KEPT = 512
#: The oldest library whose heuristics and notes are understood.
OLDEST = 90000

_DTYPES = {"float16": "HALF", "bfloat16": "BFLOAT16", "float32": "FLOAT", "float64": "DOUBLE"}
# A handle has one stream at a time: setting it and launching on it are one step.
_lock = threading.Lock()
_handles: dict[int, Any] = {}
_reasons: dict[int, str] = {}


@dataclass(frozen=True)
class Graph:
    """A convolution pass for cuDNN, hashable.

    Dimensions and steps (in elements) run over example, channel and spatial axes, those of
    weights over outputs, inputs and taps, whatever their order in memory.

    Parameters
    ----------
    kind : {"fprop", "dgrad", "wgrad"}
    dtype : str
        Of all tensors; sums are float32 at least.
    x, w, y : tuple of (dimensions, steps)
        Input, weights and output, or their gradients.
    before, after, stride, dilation : tuple of int
        Per spatial axis.
    bias : bool
        Whether a bias is added to fprop's sums.
    activation : tuple
        Name of the frontend's operation behind the bias, and its keywords as pairs; or empty.
    excluded : tuple of str
        Numerical notes that its plan must not carry.
    limit : int
        Bytes of workspace at most.
    """

    kind: str
    dtype: str
    x: tuple[tuple[int, ...], tuple[int, ...]]
    w: tuple[tuple[int, ...], tuple[int, ...]]
    y: tuple[tuple[int, ...], tuple[int, ...]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    bias: bool
    activation: tuple[Any, ...]
    excluded: tuple[str, ...]
    limit: int

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are read, and behind them the one that is written."""
        if self.kind == "fprop":
            return ("x", "w", "b", "y") if self.bias else ("x", "w", "y")
        return ("y", "w", "x") if self.kind == "dgrad" else ("x", "y", "w")


@dataclass
class Plan:
    """A graph that is ready to run.

    Parameters
    ----------
    graph : object
        The frontend's.
    tensors : tuple of object
        The frontend's tensors, in the order of :attr:`Graph.names`.
    workspace : int
        Bytes.
    """

    graph: Any
    tensors: tuple[Any, ...]
    workspace: int


def frontend() -> Any:
    """Return the frontend's module.

    Raises
    ------
    ImportError
        If it, or the library it loads, is missing or too old; the message says what to do.
    """
    if importlib.util.find_spec("cudnn") is None:
        raise ImportError("nvidia-cudnn-frontend is not installed: pip install 'gpuconv[cudnn]'")
    try:
        module = importlib.import_module("cudnn")
        version = int(module.backend_version())
    except Exception as error:  # whatever loading a library raises
        raise ImportError(f"cuDNN does not load: {error}") from error
    if not hasattr(module, "pygraph"):
        raise ImportError("the package 'cudnn' is not nvidia-cudnn-frontend")
    if version < OLDEST:
        raise ImportError(f"cuDNN is of version {version}; expected {OLDEST} or later")
    return module


def why_not() -> str | None:
    """Return why cuDNN cannot run on the current device, or None: a handle was made there."""
    if runtime.installed() is not None:
        return "another module stands in for CuPy, and cuDNN knows real devices only"
    try:
        module = frontend()
    except ImportError as error:
        return str(error)
    try:
        device = _device()
    except Exception as error:  # whatever CuPy raises without a driver
        return f"there is no CUDA device: {error}"
    if device not in _handles and device not in _reasons:
        try:
            _handles[device] = module.create_handle()
        except Exception as error:  # whatever a library without a driver raises
            _reasons[device] = f"cuDNN does not start: {error}"
    return _reasons.get(device)


def _device() -> int:
    return int(runtime.cupy().cuda.runtime.getDevice())


def _handle(device: int) -> Any:
    if device not in _handles:
        _handles[device] = frontend().create_handle()
    return _handles[device]


def plan(graph: Graph) -> Plan | str:
    """Return the plan on the current device, or the reason why cuDNN has none."""
    return _planned(graph, _device())


@lru_cache(maxsize=KEPT)
def _planned(graph: Graph, device: int) -> Plan | str:
    return plan_on(frontend(), graph, handle=_handle(device))


def plan_on(module: Any, graph: Graph, **place: Any) -> Plan | str:
    """Return the plan, or the reason why there is none.

    Parameters
    ----------
    module : object
        The frontend.
    graph : Graph
    **place
        For what device: the frontend's ``handle``, or its ``device_property``.
    """
    unsupported = (module.cudnnGraphNotSupportedError, RuntimeError, ValueError)
    try:
        return _build(module, graph, place)
    except unsupported as error:
        said = " ".join(str(error).split())
        return f"cuDNN has no plan for it: {said[:200] or type(error).__name__}"


def _build(module: Any, graph: Graph, place: dict[str, Any]) -> Plan:
    kinds = module.data_type
    dtype = getattr(kinds, _DTYPES[graph.dtype])
    wide = kinds.DOUBLE if graph.dtype == "float64" else kinds.FLOAT
    made = module.pygraph(
        name=f"gpuconv_{graph.kind}",
        io_data_type=dtype,
        intermediate_data_type=wide,
        compute_data_type=wide,
        **place,
    )
    shapes = {"x": graph.x, "w": graph.w, "y": graph.y, "b": _bias(graph)}
    *read, written = graph.names
    tensors = {
        name: made.tensor(
            name=name, dim=list(shapes[name][0]), stride=list(shapes[name][1]), data_type=dtype
        )
        for name in read
    }
    window = {
        "pre_padding": list(graph.before),
        "post_padding": list(graph.after),
        "stride": list(graph.stride),
        "dilation": list(graph.dilation),
        "compute_data_type": wide,
    }
    if graph.kind == "fprop":
        result = made.conv_fprop(image=tensors["x"], weight=tensors["w"], **window)
        if graph.bias:
            result = made.bias(input=result, bias=tensors["b"], compute_data_type=wide)
        if graph.activation:
            name, *keywords = graph.activation
            result = getattr(made, name)(input=result, compute_data_type=wide, **dict(keywords))
    elif graph.kind == "dgrad":
        result = made.conv_dgrad(loss=tensors["y"], filter=tensors["w"], **window)
    else:
        result = made.conv_wgrad(image=tensors["x"], loss=tensors["y"], **window)
    dimensions, steps = shapes[written]
    result.set_output(True).set_data_type(dtype).set_dim(list(dimensions)).set_stride(list(steps))
    made.validate()
    made.build_operation_graph()
    made.create_execution_plans([module.heur_mode.A, module.heur_mode.FALLBACK])
    notes = [
        getattr(module.numerical_note, name)
        for name in graph.excluded
        if hasattr(module.numerical_note, name)
    ]
    if notes:
        made.deselect_numeric_notes(notes)
    made.deselect_workspace_greater_than(graph.limit)
    made.check_support()
    made.build_plans(module.build_plan_policy.HEURISTICS_CHOICE)
    workspace = int(made.get_workspace_size())
    if workspace > graph.limit:
        raise RuntimeError(f"its plan takes {workspace} bytes of workspace, beyond {graph.limit}")
    return Plan(made, (*(tensors[name] for name in read), result), workspace)


def _bias(graph: Graph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return dimensions and steps of the bias, which lies as the output's channels do."""
    channels = graph.y[0][1]
    ones = (1,) * len(graph.stride)
    steps = tuple(channels for _ in ones)
    return (1, channels, *ones), (channels, 1, *steps)


def execute(plan: Plan, arrays: tuple[Any, ...]) -> None:
    """Run a plan on the current device's current stream, with workspace from CuPy's pool.

    Parameters
    ----------
    plan : Plan
        Of the current device.
    arrays : tuple of ndarray
        CuPy's, laid out as the graph says, in the order of :attr:`Graph.names`.
    """
    xp = runtime.cupy()
    module = frontend()
    workspace = xp.empty(plan.workspace, "uint8") if plan.workspace else None
    pointers = {t: int(a.data.ptr) for t, a in zip(plan.tensors, arrays, strict=True)}
    handle = _handle(_device())
    with _lock:
        module.set_stream(handle=handle, stream=int(xp.cuda.get_current_stream().ptr))
        plan.graph.execute(
            pointers, 0 if workspace is None else int(workspace.data.ptr), handle=handle
        )


def clear() -> None:
    """Forget plans and handles, for when devices come or go."""
    _planned.cache_clear()
    _handles.clear()
    _reasons.clear()
