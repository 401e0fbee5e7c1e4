"""Networks as ONNX graphs, for inference: what dropout drops is not dropped, statistics stand.

A graph's inputs and outputs are laid out as here, channels last. ONNX convolves channels first:
transpositions are put in where a layer needs the other order, and nowhere else.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv import activations as act
from gpuconv.device import asnumpy
from gpuconv.layers import (
    Add,
    BatchNorm1D,
    BatchNorm2D,
    Conv1D,
    Conv2D,
    Deconv2D,
    Dropout,
    Flatten,
    FullyConnected,
    LayerNorm1D,
    LayerNorm2D,
    Multiply,
    Pool2D,
    Softmax,
)
from gpuconv.models.sequential import Sequential
from gpuconv.modules import ResidualBlock, SkipConnectionConvModule, SkipConnectionIdentityModule
from gpuconv.training.files import write_bytes

__all__ = ["OPSET", "export_onnx"]

#: Of the operators; the first with LayerNormalization.
OPSET = 17
#: The oldest format of the file that has it, so that old readers take it.
IR_VERSION = 8

Shape = tuple[int, ...]


class _Tensor:
    """A value in the graph: its name, its shape as here, and whether it lies channels first."""

    def __init__(self, name: str, shape: Shape, first: bool = False) -> None:
        self.name, self.shape, self.first = name, shape, first


class _Graph:
    """Nodes and constants, named as they come."""

    def __init__(self, onnx: Any, dtype: str) -> None:
        self._onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._count = 0

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return the name of a new constant."""
        array = np.ascontiguousarray(asnumpy(value), dtype or self.dtype)
        name = f"c{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its one output."""
        self._count += 1
        name = f"t{self._count}"
        self.nodes.append(self._onnx.helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def first(self, x: _Tensor) -> str:
        """Return the value channels first."""
        if x.first or len(x.shape) < 3:
            return x.name
        axes = len(x.shape)
        return self.add("Transpose", x.name, perm=[0, axes - 1, *range(1, axes - 1)])

    def last(self, x: _Tensor) -> str:
        """Return the value channels last."""
        if not x.first:
            return x.name
        axes = len(x.shape)
        return self.add("Transpose", x.name, perm=[0, *range(2, axes), 1])

    def activated(self, x: str, function: act.Activation | None) -> str:
        """Return the name of ``function(x)``."""
        if function is None or isinstance(function, act.Identity):
            return x
        make = _ACTIVATIONS.get(type(function))
        if make is None:
            raise ValueError(f"act_fn is {function}; ONNX export knows no such activation")
        return make(self, x, function)


def _affine(g: _Graph, x: str, f: Any) -> str:
    scaled = x if f.slope == 1 else g.add("Mul", x, g.constant(f.slope))
    return scaled if f.intercept == 0 else g.add("Add", scaled, g.constant(f.intercept))


def _gelu(g: _Graph, x: str, f: Any) -> str:
    if f.approximate:
        cube = g.add("Mul", g.add("Mul", x, x), x)
        inner = g.add("Add", x, g.add("Mul", cube, g.constant(0.044715)))
        bent = g.add("Tanh", g.add("Mul", inner, g.constant(math.sqrt(2 / math.pi))))
    else:
        bent = g.add("Erf", g.add("Mul", x, g.constant(1 / math.sqrt(2))))
    half = g.add("Mul", x, g.constant(0.5))
    return g.add("Mul", half, g.add("Add", bent, g.constant(1.0)))


_ACTIVATIONS: dict[type, Callable[[_Graph, str, Any], str]] = {
    act.Affine: _affine,
    act.GELU: _gelu,
    act.ReLU: lambda g, x, f: g.add("Relu", x),
    act.Tanh: lambda g, x, f: g.add("Tanh", x),
    act.Sigmoid: lambda g, x, f: g.add("Sigmoid", x),
    act.SoftPlus: lambda g, x, f: g.add("Softplus", x),
    act.Exponential: lambda g, x, f: g.add("Exp", x),
    act.LeakyReLU: lambda g, x, f: g.add("LeakyRelu", x, alpha=float(f.alpha)),
    act.ELU: lambda g, x, f: g.add("Elu", x, alpha=float(f.alpha)),
    act.SELU: lambda g, x, f: g.add("Selu", x, alpha=float(f.alpha), gamma=float(f.scale)),
    act.HardSigmoid: lambda g, x, f: g.add("HardSigmoid", x, alpha=0.2, beta=0.5),
}

# ------------------------------------------------------------------------- layer by layer


def _convolution(g: _Graph, layer: Conv1D | Conv2D, x: _Tensor) -> _Tensor:
    stride, dilation, pads = layer._geometry(x.shape)
    axes = (0, 1) if isinstance(layer, Conv2D) else (1,)
    weights = asnumpy(layer.parameters["W"])
    name = g.add(
        "Conv",
        g.first(x),
        g.constant(np.moveaxis(weights, (-1, -2), (0, 1))),
        g.constant(layer.parameters["b"].reshape(-1)),
        kernel_shape=list(weights.shape[:-2]),
        strides=[stride[k] for k in axes],
        dilations=[dilation[k] for k in axes],
        pads=[pads[k][side] for side in (0, 1) for k in axes],
    )
    return _Tensor(g.activated(name, layer.act_fn), layer.output_shape(x.shape), True)


def _deconvolution(g: _Graph, layer: Deconv2D, x: _Tensor) -> _Tensor:
    _, options = layer._transposed(x.shape)
    name = g.add(
        "ConvTranspose",
        g.first(x),
        g.constant(asnumpy(layer.parameters["W"]).transpose(2, 3, 0, 1)),
        g.constant(layer.parameters["b"].reshape(-1)),
        kernel_shape=list(layer.kernel_shape),
        strides=list(options["stride"]),
        pads=[options["padding"][k][side] for side in (0, 1) for k in (0, 1)],
    )
    return _Tensor(g.activated(name, layer.act_fn), layer.output_shape(x.shape), True)


def _padded(g: _Graph, name: str, before: Sequence[int], after: Sequence[int]) -> str:
    if not any(before) and not any(after):
        return name
    amounts = g.constant(np.array([*before, *after]), "int64")
    return g.add("Pad", name, amounts, mode="constant")


def _pool(g: _Graph, layer: Pool2D, x: _Tensor) -> _Tensor:
    kernel, stride, pads = layer._geometry(x.shape)
    # The zeros take part, in a maximum too: they are put there, not left to the operator.
    before, after = ([0, 0, *(p[side] for p in pads)] for side in (0, 1))
    padded = _padded(g, g.first(x), before, after)
    op = "MaxPool" if layer.mode == "max" else "AveragePool"
    name = g.add(op, padded, kernel_shape=list(kernel), strides=list(stride))
    return _Tensor(name, layer.output_shape(x.shape), True)


def _dense(g: _Graph, layer: FullyConnected, x: _Tensor) -> _Tensor:
    weights, bias = (g.constant(layer.parameters[k]) for k in ("W", "b"))
    name = g.add("Add", g.add("MatMul", x.name, weights), bias)
    return _Tensor(g.activated(name, layer.act_fn), layer.output_shape(x.shape))


def _flatten(g: _Graph, layer: Flatten, x: _Tensor) -> _Tensor:
    shape = layer.output_shape(x.shape)
    # The batch's size is not known: the axis that has it is -1.
    target = [-1, shape[1]] if layer.keep_dim != -1 else [1, -1]
    name = g.add("Reshape", g.last(x), g.constant(np.array(target), "int64"))
    return _Tensor(name, shape)


def _batch_norm(g: _Graph, layer: BatchNorm1D | BatchNorm2D, x: _Tensor) -> _Tensor:
    values = [
        g.constant(layer.parameters[k])
        for k in ("scaler", "intercept", "running_mean", "running_var")
    ]
    name = g.add("BatchNormalization", g.first(x), *values, epsilon=float(layer.epsilon))
    return _Tensor(g.activated(name, layer.act_fn), x.shape, len(x.shape) > 2)


def _layer_norm(g: _Graph, layer: LayerNorm1D | LayerNorm2D, x: _Tensor) -> _Tensor:
    values = [g.constant(layer.parameters[k]) for k in ("scaler", "intercept")]
    name = g.add("LayerNormalization", g.last(x), *values, axis=1, epsilon=float(layer.epsilon))
    return _Tensor(name, x.shape)


def _softmax(g: _Graph, layer: Softmax, x: _Tensor) -> _Tensor:
    return _Tensor(g.add("Softmax", g.last(x), axis=layer.dim), x.shape)


def _identity_module(g: _Graph, m: SkipConnectionIdentityModule, x: _Tensor) -> _Tensor:
    y = _convolution(g, m.conv1, x)
    y = _batch_norm(g, m.batchnorm1, y)
    y = _batch_norm(g, m.batchnorm2, _convolution(g, m.conv2, y))
    total = g.add("Add", g.first(x), y.name)
    return _Tensor(g.activated(total, m.add3.act_fn), y.shape, True)


def _conv_module(g: _Graph, m: SkipConnectionConvModule, x: _Tensor) -> _Tensor:
    y = _batch_norm(g, m.batchnorm1, _convolution(g, m.conv1, x))
    y = _batch_norm(g, m.batchnorm2, _convolution(g, m.conv2, y))
    around = _batch_norm(g, m.batchnorm_skip, _convolution(g, m.conv_skip, x))
    total = g.add("Add", around.name, y.name)
    return _Tensor(g.activated(total, m.add3.act_fn), y.shape, True)


def _residual(g: _Graph, m: ResidualBlock, x: _Tensor) -> _Tensor:
    y = _batch_norm(g, m.batchnorm1, _convolution(g, m.conv1, x))
    y = _batch_norm(g, m.batchnorm2, _convolution(g, m.conv2, y))
    around = g.first(x)
    if m.stride > 1:
        starts, ends = [0, 0], [np.iinfo(np.int64).max] * 2
        numbers = [starts, ends, [2, 3], [m.stride] * 2]
        around = g.add("Slice", around, *(g.constant(np.array(n), "int64") for n in numbers))
    inner = m._inner(x.shape[3])
    around = _padded(g, around, [0, inner.start, 0, 0], [0, m.out_ch - inner.stop, 0, 0])
    return _Tensor(g.activated(g.add("Add", around, y.name), m.act_fn), y.shape, True)


_LAYERS: dict[type, Callable[[_Graph, Any, _Tensor], _Tensor]] = {
    Conv1D: _convolution,
    Conv2D: _convolution,
    Deconv2D: _deconvolution,
    Pool2D: _pool,
    FullyConnected: _dense,
    Flatten: _flatten,
    BatchNorm1D: _batch_norm,
    BatchNorm2D: _batch_norm,
    LayerNorm1D: _layer_norm,
    LayerNorm2D: _layer_norm,
    Softmax: _softmax,
    SkipConnectionIdentityModule: _identity_module,
    SkipConnectionConvModule: _conv_module,
    ResidualBlock: _residual,
}


def export_onnx(
    model: Sequential, path: str | Path | None = None, input_shape: Sequence[Any] | None = None
) -> bytes:
    """Return a network as an ONNX model for inference, and write it where a path is given.

    Parameters
    ----------
    model : Sequential
        One that has seen an input, or was built.
    path : str or Path, optional
        Overwritten if it exists.
    input_shape : sequence of int, optional
        Of an input without the batch, whose size is free; the model's own if not given. A
        network that begins with :class:`~gpuconv.layers.Add` or
        :class:`~gpuconv.layers.Multiply` takes a list of them, one for each input.

    Returns
    -------
    bytes
        The serialised ``ModelProto``, of operator set :data:`OPSET`. Inputs are named ``X`` (or
        ``X0``, ``X1``, ...), the output ``Y``; all lie as here, channels last. A network of
        bfloat16, in which that operator set has no convolution, is written in float32.

    Raises
    ------
    TypeError, ValueError
        If the model has no parameters yet, or the shape does not fit it.
    ImportError
        If onnx is not installed: ``pip install 'gpuconv[onnx]'``.
    """
    if not isinstance(model, Sequential):
        raise TypeError(f"model is a {type(model).__name__}; expected a Sequential")
    shape = model.input_shape if input_shape is None else input_shape
    if shape is None:
        raise ValueError("model has no parameters yet; build() it first, or give input_shape")
    onnx = _onnx()
    layers = [_inside(layer) for layer in model.layers]
    merged = isinstance(layers[0], (Add, Multiply))
    given: list[Any] = list(shape)
    shapes = [tuple(s) for s in given] if merged else [tuple(given)]
    dtype = model.dtype or "float32"
    if dtype == "bfloat16":  # in which operator set 17 has no convolution
        dtype = "float32"
    graph = _Graph(onnx, dtype)
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = [f"X{k}" for k in range(len(shapes))] if merged else ["X"]
    inputs = [
        onnx.helper.make_tensor_value_info(name, element, ["n", *s])
        for name, s in zip(names, shapes, strict=True)
    ]
    if merged:
        if len(set(shapes)) != 1:
            raise ValueError(f"input_shape is {shape!r}; expected one shape for all inputs")
        x = _merged(graph, layers.pop(0), names, (1, *shapes[0]))
    else:
        x = _Tensor("X", (1, *shapes[0]))
    for k, layer in enumerate(layers):
        make = _LAYERS.get(type(layer))
        if make is None:
            raise ValueError(
                f"layer {k} is a {type(layer).__name__}; ONNX export knows "
                f"{', '.join(c.__name__ for c in _LAYERS)}, and Add and Multiply as the first"
            )
        x = make(graph, layer, x)
    graph.nodes.append(onnx.helper.make_node("Identity", [graph.last(x)], ["Y"]))
    out_shape: list[Any] = ["n", *x.shape[1:]]
    if any(isinstance(layer, Flatten) and layer.keep_dim != "first" for layer in layers):
        out_shape = [None] * len(x.shape)  # the batch is no longer an axis of its own
    output = onnx.helper.make_tensor_value_info("Y", element, out_shape)
    made = onnx.helper.make_graph(graph.nodes, "gpuconv", inputs, [output], graph.constants)
    proto = onnx.helper.make_model(
        made,
        producer_name="gpuconv",
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    if path is not None:
        write_bytes(Path(path), content)
    return content


def _merged(graph: _Graph, layer: Any, names: list[str], shape: Shape) -> _Tensor:
    total = names[0]
    for name in names[1:]:
        total = graph.add("Add" if isinstance(layer, Add) else "Mul", total, name)
    return _Tensor(graph.activated(total, layer.act_fn), shape)


def _inside(layer: Any) -> Any:
    while isinstance(layer, Dropout):
        layer = layer._base_layer
    return layer


def _onnx() -> Any:
    try:
        for part in ("checker", "helper", "numpy_helper"):
            importlib.import_module(f"onnx.{part}")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs onnx ({error}): pip install 'gpuconv[onnx]'"
        ) from error
