"""The engine cudnn: which graphs it builds and how it runs them; numbers are those of a stand-in."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch
from gpuconv.activations import get_activation
from gpuconv.cuda import cudnn as graphs
from gpuconv.engines import cudnn as engine
from gpuconv.engines.base import PASSES
from tests import cudnn_on_cpu, cudnn_without_device
from tests.cuda_on_cpu import compiler_available, stand_in
from tests.cudnn_on_cpu import Frontend
from tests.support import CASES, Case, case, close, host, oracle, real_gpu
from tests.test_conformance import problem_of

CASE = {c.name: c for c in CASES}
NOTES = {"REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS", "WINOGRAD_TILE_13x13"}
INEXACT = {"WINOGRAD", "WINOGRAD_TILE_4x4", "WINOGRAD_TILE_6x6", "FFT"}


@pytest.fixture
def started() -> Iterator[tuple[Any, Frontend]]:
    """The stand-ins of CuPy and of the frontend; no engine is forced."""
    reason = "looks at what a stand-in records" if real_gpu() else compiler_available()
    if reason:
        pytest.skip(reason)
    with stand_in(devices=2) as cp, cudnn_on_cpu.installed() as frontend:
        yield cp, frontend


def forward(cp: Any, c: Case, dtype: str = "float32", **options: Any) -> Any:
    data = oracle(c, dtype)
    b = None if data.b is None else cp.asarray(data.b)
    return gpuconv.conv2d(cp.asarray(data.x), cp.asarray(data.w), b, **{**c.keywords, **options})


def backward(cp: Any, c: Case, dtype: str = "float32") -> Any:
    data = oracle(c, dtype)
    arrays = (cp.asarray(a) for a in (data.dy, data.x, data.w))
    y = cp.asarray(data.y.astype(dtype)) if c.activation else None
    return gpuconv.conv2d_backward(*arrays, y=y, **c.keywords)


# ----------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    ("layout", "x", "w", "y"),
    [
        ("NHWC", [90, 1, 15, 3], [27, 1, 9, 3], [140, 1, 20, 4]),
        ("NCHW", [90, 30, 5, 1], [27, 9, 3, 1], [140, 35, 5, 1]),
    ],
)
def test_a_graph_says_how_arrays_lie_in_memory(
    started: Any, layout: str, x: list[int], w: list[int], y: list[int]
) -> None:
    cp, frontend = started
    c = case("graph", (2, 6, 5, 3), (3, 3, 3, 4), padding=((1, 2), (2, 0)), layout=layout)
    with gpuconv.engine("cudnn"):
        forward(cp, c, activation="ReLU")
        backward(cp, c)
    made = {g.name: g for g in frontend.graphs if g.steps[-1] == "execute"}
    fprop, dgrad, wgrad = (made[f"gpuconv_{k}"] for k in ("fprop", "dgrad", "wgrad"))
    assert [t.name for t in fprop.inputs] == ["x", "w", "b"]
    assert [t.dim for t in fprop.inputs] == [[2, 3, 6, 5], [4, 3, 3, 3], [1, 4, 1, 1]]
    assert [t.stride for t in fprop.inputs[:2]] == [x, w]
    assert fprop.outputs[-1].dim == [2, 4, 7, 5]
    assert fprop.outputs[-1].stride == y
    assert [name for name, _ in fprop.operations] == ["conv_fprop", "bias", "relu"]
    assert [t.dim for t in dgrad.inputs] == [[2, 4, 7, 5], [4, 3, 3, 3]]
    assert (dgrad.outputs[-1].dim, dgrad.outputs[-1].stride) == ([2, 3, 6, 5], x)
    assert [t.dim for t in wgrad.inputs] == [[2, 3, 6, 5], [2, 4, 7, 5]]
    assert (wgrad.outputs[-1].dim, wgrad.outputs[-1].stride) == ([4, 3, 3, 3], w)
    for graph in (fprop, dgrad, wgrad):
        at = graph.operations[0][1]
        assert (at["pre_padding"], at["post_padding"]) == ([1, 2], [2, 0])
        assert (at["stride"], at["dilation"]) == ([1, 1], [1, 1])
        assert graph.types == ("data_type.FLOAT",) * 3


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [("float16", ("HALF", "FLOAT", "FLOAT")), ("float64", ("DOUBLE", "DOUBLE", "DOUBLE"))],
)
def test_sums_are_held_in_float32_at_least(
    started: Any, dtype: str, kinds: tuple[str, ...]
) -> None:
    cp, frontend = started
    with gpuconv.engine("cudnn"):
        forward(cp, CASE["dense"], dtype)
    assert frontend.graphs[-1].types == tuple(f"data_type.{k}" for k in kinds)


def test_a_graph_is_built_once_a_problem_and_device(started: Any) -> None:
    cp, frontend = started
    c = CASE["dense"]
    with gpuconv.engine("cudnn"):
        for _ in range(3):
            forward(cp, c)
            backward(cp, c)
        ran = [g for g in frontend.graphs if "execute" in g.steps]
        assert sorted(g.name for g in ran) == ["gpuconv_dgrad", "gpuconv_fprop", "gpuconv_wgrad"]
        assert all(g.steps.count("execute") == 3 for g in ran)
        built, handles = len(frontend.graphs), len(frontend.handles)
        with cp.cuda.Device(1):
            forward(cp, c)
        assert len(frontend.handles) == handles + 1
        assert frontend.graphs[-1].handle is frontend.handles[-1]
        assert len(frontend.graphs) > built
    assert graphs._planned.cache_info().maxsize == engine._described.cache_info().maxsize == 512


def test_launches_go_to_the_current_stream(started: Any) -> None:
    cp, frontend = started
    stream = cp.cuda.Stream()
    with gpuconv.engine("cudnn"):
        forward(cp, CASE["dense"])
        with stream:
            forward(cp, CASE["dense"])
        forward(cp, CASE["dense"])
    assert frontend.streams == [0, stream.ptr, 0]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_plans_keep_to_the_settings(started: Any, dtype: str) -> None:
    cp, frontend = started
    c, narrow = CASE["dense"], dtype == "float16"

    def excluded() -> set[str]:
        forward(cp, c, dtype)
        return set(frontend.ran[-1].excluded) - NOTES

    ieee = {"TENSOR_CORE"} if dtype == "float32" else set()
    inexact = INEXACT if narrow else set()
    with gpuconv.engine("cudnn"):
        assert excluded() == ieee | inexact
        assert set(frontend.graphs[-1].excluded) >= NOTES
        with gpuconv.deterministic(True):
            assert excluded() == ieee | inexact | {"NONDETERMINISTIC"}
        try:
            gpuconv.set_precision("strict")
            assert excluded() == ieee | INEXACT
            gpuconv.set_precision("tf32")
            assert excluded() == inexact
        finally:
            gpuconv.set_precision("default")


# --------------------------------------------------------------------------------------- workspace


def test_workspace_comes_from_the_pool_within_the_limit(started: Any) -> None:
    cp, frontend = started
    frontend.workspace = 1000
    problem = problem_of(CASE["dense"], "float32")
    weights = 4 * 3 * 3 * 3 * 4
    with gpuconv.engine("cudnn"):
        forward(cp, CASE["dense"])
    assert frontend.graphs[-1].limit == gpuconv.get_workspace_limit() - weights
    assert dispatch.get_engine("cudnn").workspace(problem, "forward") == 1000 + weights


def test_what_needs_more_workspace_goes_to_another_engine(started: Any) -> None:
    cp, frontend = started
    frontend.workspace = 2**40
    c = CASE["dense"]
    with (
        gpuconv.engine("cudnn"),
        pytest.raises(gpuconv.EngineError, match=r"cuDNN has no plan for it: .*beyond"),
    ):
        forward(cp, c)
    close(host(forward(cp, c)), oracle(c, "float32").y, 1e-4)
    assert not frontend.streams


def test_a_problem_without_a_plan_goes_to_another_engine(started: Any) -> None:
    cp, frontend = started
    frontend.refuse = lambda graph: "wgrad\nis not here" if graph.name.endswith("wgrad") else ""
    problem = problem_of(CASE["dense"], "float32")
    made = dispatch.get_engine("cudnn")
    reasons = [made.unsupported(problem, p) for p in PASSES]
    assert reasons == [None, None, "cuDNN has no plan for it: wgrad is not here"]
    _, dw, _ = backward(cp, CASE["dense"])
    close(host(dw), oracle(CASE["dense"], "float32").dw, 1e-3)
    assert all(g.name != "gpuconv_wgrad" or "execute" not in g.steps for g in frontend.graphs)


@pytest.mark.parametrize("name", ["dense", "first-layout"])
def test_copies_are_made_in_parts_of_the_batch(started: Any, name: str) -> None:
    cp, frontend = started
    first = CASE[name].layout == "NCHW"
    c = case("parts", (6, 64, 64, 6), (1, 1, 6, 8), layout=CASE[name].layout)
    data = oracle(c, "float32")
    x, dy = (cp.zeros((*a.shape[:3], 2 * a.shape[3]), "float32")[..., ::2]
             for a in (data.x, data.dy))  # fmt: skip
    x[...], dy[...] = cp.asarray(data.x), cp.asarray(data.dy)
    before = gpuconv.get_workspace_limit()
    gpuconv.set_workspace_limit(2**20)
    try:
        with gpuconv.engine("cudnn"):
            y = gpuconv.conv2d(x, cp.asarray(data.w), cp.asarray(data.b), **c.keywords)
            assert len(frontend.streams) == 2
            grads = gpuconv.conv2d_backward(dy, x, cp.asarray(data.w), **c.keywords)
    finally:
        gpuconv.set_workspace_limit(before)
    assert len(frontend.streams) == 2 + 2 + 3
    limits = {g.limit for g in frontend.graphs if "execute" in g.steps}
    assert max(limits) <= 2**19
    for got, want in zip((y, *grads), (data.y, data.dx, data.dw, data.db), strict=True):
        close(host(got), want, 1e-3)
    assert first == (frontend.graphs[-1].inputs[0].stride[1] != 1)


def test_cells_that_no_window_reads_are_left_out(started: Any) -> None:
    """Fewer than no zeros at the end: gradients there are zero."""
    cp, _ = started
    problem = replace(problem_of(CASE["dense"], "float64"), padding=((1, -2), (0, -1)), batch=2)
    rng = np.random.default_rng(0)
    x, w, dz = (rng.standard_normal(s) for s in (problem.x_shape, problem.w_shape, problem.y_shape))
    results = []
    for name, xp in (("naive", np), ("cudnn", cp)):
        made = dispatch.get_engine(name)
        y, dx, dw = (xp.full(s, np.nan) for s in (problem.y_shape, x.shape, w.shape))
        made.forward(problem, xp.asarray(x), xp.asarray(w), None, y)
        made.input_grad(problem, xp.asarray(dz), xp.asarray(w), dx)
        made.weight_grad(problem, xp.asarray(dz), xp.asarray(x), dw, None)
        results.append([host(a) if name == "cudnn" else a for a in (y, dx, dw)])
    for got, want in zip(*reversed(results), strict=True):
        close(got, want, 1e-12)


# --------------------------------------------------------------------------------------- epilogues


@pytest.mark.parametrize("refused", ["", "activation", "bias"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("activation", "operation"),
    [
        ("ReLU", "relu"), ("LeakyReLU(0.2)", "relu"), ("Tanh", "tanh"), ("Sigmoid", "sigmoid"),
        ("ELU", "elu"), ("ELU(0.5)", ""), ("GELU", "gelu_approx_tanh"),
        ("GELU(approximate=False)", "gelu"), ("SoftPlus", "softplus"), ("Exponential", "exp"),
        ("SELU", ""), ("HardSigmoid", ""), ("Affine(2, 1)", ""),
    ],
)  # fmt: skip
def test_what_is_not_fused_comes_behind(
    started: Any, activation: str, operation: str, biased: bool, refused: str
) -> None:
    cp, frontend = started

    def refuse(graph: Any) -> str:
        names = [name for name, _ in graph.operations]
        most = {"": 3, "activation": 2, "bias": 1}[refused]
        return "too much at once" if len(names) > most else ""

    frontend.refuse = refuse
    c = case("epilogue", (1, 4, 4, 2), (2, 2, 2, 3), bias=biased)
    data = oracle(c, "float64")
    b = None if data.b is None else cp.asarray(data.b)
    with gpuconv.engine("cudnn"):
        y = gpuconv.conv2d(cp.asarray(data.x), cp.asarray(data.w), b, activation=activation)
    wanted = get_activation(activation)
    assert wanted is not None
    close(host(y), wanted.fn(data.y), 1e-12)
    (ran,) = (g for g in frontend.graphs if "execute" in g.steps)
    with_bias = (biased or operation) and refused != "bias"
    names = ["conv_fprop"] + ["bias"] * bool(with_bias)
    if operation and not refused:
        names.append(operation)
    assert [name for name, _ in ran.operations] == names


# ------------------------------------------------------------------------------------ availability


def fake_module(**parts: Any) -> types.ModuleType:
    module = types.ModuleType("cudnn")
    module.__dict__.update({"backend_version": lambda: 90_800, "pygraph": object, **parts})
    return module


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (None, r"not installed: pip install 'gpuconv\[cudnn\]'"),
        ({"pygraph": None}, "is not nvidia-cudnn-frontend"),
        ({"backend_version": lambda: 80_900}, "version 80900; expected 90000"),
        ({"backend_version": lambda: 1 // 0}, "cuDNN does not load: integer division"),
        ({"create_handle": lambda: 1 // 0}, "does not start: integer division"),
        ({"create_handle": lambda: "handle"}, None),
    ],
)
def test_it_says_why_it_is_not_available(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any] | None, reason: str | None
) -> None:
    made = None if parts is None else fake_module(**parts)
    if made is not None and made.pygraph is None:
        del made.pygraph
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: made)
    monkeypatch.setattr(importlib, "import_module", lambda name: made)
    monkeypatch.setattr(graphs, "_device", lambda: 0)
    monkeypatch.setattr(graphs.runtime, "installed", lambda: None)
    graphs.clear()
    try:
        said = dispatch.get_engine("cudnn").unavailable()
        if reason is None:
            assert said is None
            assert graphs._handles == {0: "handle"}
        else:
            assert said is not None
            assert re.search(reason, said), said
    finally:
        graphs.clear()


def test_it_is_no_candidate_on_a_stand_in() -> None:
    if real_gpu():
        pytest.skip("there is a device")
    with stand_in() as cp:
        with (
            gpuconv.engine("cudnn"),
            pytest.raises(gpuconv.EngineError, match="stands in for CuPy"),
        ):
            forward(cp, CASE["dense"])
        forward(cp, CASE["dense"])
        (info,) = (i for i in gpuconv.engines() if i.name == "cudnn")
        assert not info.available


def test_repetition_can_be_asked_for() -> None:
    made = dispatch.get_engine("cudnn")
    assert not made.deterministic
    assert made.can_repeat()


# ----------------------------------------------------------------------------- the frontend itself


@pytest.fixture
def frontend() -> Any:
    if importlib.util.find_spec("cudnn") is None:
        pytest.skip("nvidia-cudnn-frontend is not installed")
    try:
        return importlib.import_module("cudnn")
    except Exception as error:  # whatever loading its library raises
        pytest.skip(f"the frontend does not load: {error}")


@pytest.mark.parametrize("activation", ["", "ReLU", "LeakyReLU(0.2)", "Tanh", "ELU", "GELU",
                                        "SoftPlus", "Exponential", "Sigmoid"])  # fmt: skip
def test_the_frontend_takes_what_it_is_called_with(frontend: Any, activation: str) -> None:
    """Names and keywords of the real package, up to where it needs its library."""

    class Reached(Exception):
        pass

    class Graph(frontend.pygraph):  # type: ignore[misc]
        def validate(self) -> None:
            raise Reached

    if not inspect.isfunction(frontend.pygraph.__init__):
        pytest.skip("this version builds graphs in its library, which needs a device")
    module = types.SimpleNamespace(**{**vars(frontend), "pygraph": Graph})
    problem = problem_of(CASE["dense"], "float32")
    operation = engine._operation(get_activation(activation)) if activation else ()
    for pass_ in PASSES:
        epilogue = (True, operation) if pass_ == "forward" else (False, ())
        with pytest.raises(Reached):
            graphs.plan_on(module, engine._graph(problem, pass_, 2**20, *epilogue))
    for note in (*NOTES, *INEXACT, "TENSOR_CORE", "NONDETERMINISTIC"):
        assert hasattr(frontend.numerical_note, note)
    for name in ("build_operation_graph", "create_execution_plans", "deselect_numeric_notes",
                 "deselect_workspace_greater_than", "check_support", "build_plans",
                 "get_workspace_size", "execute"):  # fmt: skip
        assert callable(getattr(frontend.pygraph, name))
    assert list(inspect.signature(frontend.set_stream).parameters) == ["handle", "stream"]
    assert "handle" in inspect.signature(frontend.pygraph.execute).parameters


def test_cudnn_itself_plans_the_graphs_for_a_device_that_is_not_here() -> None:
    """Its heuristics and support checks, given the properties of an H100; nothing is run."""
    reason = cudnn_without_device.unavailable()
    if reason:
        pytest.skip(reason)
    plans = json.loads(cudnn_without_device.run(sys.executable))
    assert len(plans) > 400
    refused = {name: said for name, said in plans.items() if isinstance(said, str)}
    assert refused == {}
