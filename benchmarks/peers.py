"""Who computes: gpuconv, and everything it is measured against.

A peer prepares a function for a case and a pass; only that function is timed. What a user of the
peer would have done before (memory format, dtype, the array's class, compilation) is done in the
preparation. Its result is put into NumPy arrays, channels last, outside the timing.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from benchmarks import plain
from benchmarks.cases import Case
from gpuconv.activations import ReLU
from gpuconv.engines.base import Pass
from gpuconv.problem import ConvProblem

__all__ = [
    "LABELS",
    "PEERS",
    "Peer",
    "Prepared",
    "Unsupported",
    "label",
    "make_peer",
    "torch_reference",
]

Array = np.ndarray[Any, Any]


class Unsupported(Exception):
    """The peer does not compute this case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """What is timed, and how its result becomes ``{"y": ..., "dx": ..., ...}``."""

    run: Callable[[], Any]
    collect: Callable[[Any], dict[str, Array]]


class Peer(abc.ABC):
    """One way to compute a layer."""

    name: ClassVar[str]
    label: ClassVar[str]
    #: Seconds after which one call is enough.
    patience: ClassVar[float] = 2.0

    @classmethod
    def missing(cls) -> str | None:
        """Return why it cannot run here, or None."""
        return None

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the versions that matter."""

    def variants(self, case: Case) -> tuple[str, ...]:
        """Return the ways to ask the peer for it, of which the fastest counts."""
        return ("",)

    @abc.abstractmethod
    def prepare(self, case: Case, pass_: str, variant: str) -> Prepared:
        """Return what is to be timed.

        Raises
        ------
        Unsupported
            If the peer does not compute this.
        """

    def about(self, case: Case, pass_: str) -> dict[str, Any]:
        """Return what is worth knowing about how it computes this."""
        return {}


# ---------------------------------------------------------------------------------- gpuconv


class Gpuconv(Peer):
    """This package, NHWC; the engine is its own choice, or forced."""

    name = "gpuconv"
    label = "gpuconv"

    def __init__(self, threads: int, engine: str | None = None) -> None:
        super().__init__(threads)
        import gpuconv

        gpuconv.set_num_threads(threads)
        self._gpuconv = gpuconv
        self._engine = engine
        if engine is not None:
            self._forced = gpuconv.engine(engine)
            self._forced.__enter__()  # for as long as the process lives

    def versions(self) -> dict[str, str]:
        return {"gpuconv": self._gpuconv.__version__, "numpy": np.__version__}

    def prepare(self, case: Case, pass_: str, variant: str) -> Prepared:
        from gpuconv.functional import conv2d, conv2d_backward

        x, w, b, dy, dz = case.x, case.w, case.b, case.dy, case.dz
        p = case.shape.problem
        options: dict[str, Any] = {
            "stride": p.stride, "padding": p.padding, "dilation": p.dilation, "groups": p.groups,
        }  # fmt: skip
        if pass_ == "input_grad" or (case.shape.transposed and pass_ == "forward"):

            def input_grad() -> Any:
                return conv2d_backward(dz, x, w, needs=("x",), **options)[0]

            return Prepared(input_grad, lambda dx: {"dx": dx})
        if pass_ == "weight_grad":
            needs = ("w",) if b is None else ("w", "b")

            def weight_grad() -> Any:
                return conv2d_backward(dz, x, w, needs=needs, **options)[1:]

            return Prepared(weight_grad, lambda r: _named(("dw", "db"), r))
        if case.shape.transposed:
            # The forward is the input gradient; its gradients are the convolution of x, which
            # stands for the gradient of the layer's output, and the weight gradient.
            def transposed_train() -> Any:
                dx = conv2d_backward(dz, x, w, needs=("x",), **options)[0]
                y = conv2d(x, w, **options)
                dw = conv2d_backward(dz, x, w, needs=("w",), **options)[1]
                return y, dx, dw

            return Prepared(transposed_train, lambda r: _named(("y", "dx", "dw"), r))
        if pass_ == "forward":

            def forward() -> Any:
                return conv2d(x, w, b, activation="relu", **options)

            return Prepared(forward, lambda y: {"y": y})

        def train() -> Any:
            y = conv2d(x, w, b, activation="relu", **options)
            return y, *conv2d_backward(dy, x, w, y=y, activation="relu", **options)

        return Prepared(train, lambda r: _named(("y", "dx", "dw", "db"), r))

    def about(self, case: Case, pass_: str) -> dict[str, Any]:
        from gpuconv import dispatch

        p = case.shape.problem
        used: dict[str, tuple[Pass, ...]] = {
            "forward": ("input_grad",) if case.shape.transposed else ("forward",),
            "train": ("forward", "input_grad", "weight_grad"),
            "input_grad": ("input_grad",),
            "weight_grad": ("weight_grad",),
        }
        biased = replace(p, activation=ReLU()) if case.relu else p
        engines = [dispatch.choose(biased if u == "forward" else p, u, "cpu") for u in used[pass_]]
        return {
            "engines": [e.name for e in engines],
            "error_factor": max(e.error_factor for e in engines),
        }


def _named(names: tuple[str, ...], results: Any) -> dict[str, Array]:
    return {n: r for n, r in zip(names, results, strict=True) if r is not None}


# ---------------------------------------------------------------------------------- PyTorch


def _torch_options(p: ConvProblem) -> dict[str, Any]:
    if any(before != after for before, after in p.padding):
        raise Unsupported("PyTorch's convolution pads both sides alike")
    return {
        "stride": p.stride,
        "padding": tuple(before for before, _ in p.padding),
        "dilation": p.dilation,
        "groups": p.groups,
    }


def _output_padding(p: ConvProblem) -> tuple[int, ...]:
    """Return the cells at the end of the input that no window reaches."""
    return tuple(
        (n + a + b - window) % s
        for n, (a, b), window, s in zip(p.in_shape, p.padding, p.window, p.stride, strict=True)
    )


def torch_reference(p: ConvProblem, arrays: list[Array | None]) -> tuple[Array, Any]:
    """Return ``conv(x, w) + b`` by PyTorch, and a function from ``dz`` to the gradients."""
    import torch

    options = _torch_options(p)
    x, w, b = arrays
    if x is None or w is None:
        raise TypeError("x and w are needed")
    leaves = [
        torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).requires_grad_(),
        torch.from_numpy(np.ascontiguousarray(w.transpose(3, 2, 0, 1))).requires_grad_(),
    ]
    if b is not None:
        leaves.append(torch.from_numpy(b).requires_grad_())
    z = torch.nn.functional.conv2d(*leaves, **options)

    def backward(dz: Array) -> tuple[Array | None, ...]:
        d = torch.from_numpy(np.ascontiguousarray(dz.transpose(0, 3, 1, 2), np.float64))
        dx, dw, *rest = torch.autograd.grad(z, leaves, d)
        db = rest[0].numpy() if rest else None
        return dx.numpy().transpose(0, 2, 3, 1), dw.numpy().transpose(2, 3, 1, 0), db

    return z.detach().numpy().transpose(0, 2, 3, 1), backward


class Torch(Peer):
    """PyTorch in both of its memory formats."""

    name = "torch"
    label = "PyTorch"

    @classmethod
    def missing(cls) -> str | None:
        return _not_installed("torch", "PyTorch")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import torch

        torch.set_num_threads(threads)
        self._torch = torch

    def versions(self) -> dict[str, str]:
        found = {"torch": str(self._torch.__version__)}
        for line in self._torch.__config__.show().splitlines():
            if "oneDNN" in line or "MKL-DNN" in line:
                found["onednn"] = line.strip(" -")
        return found

    def variants(self, case: Case) -> tuple[str, ...]:
        return ("NCHW", "NHWC")

    def prepare(self, case: Case, pass_: str, variant: str) -> Prepared:
        torch = self._torch
        functional = torch.nn.functional
        p = case.shape.problem
        options = _torch_options(p)
        form = torch.channels_last if variant == "NHWC" else torch.contiguous_format

        def tensor(array: Array, axes: tuple[int, ...]) -> Any:
            made = torch.from_numpy(np.ascontiguousarray(array.transpose(axes)))
            return made.contiguous(memory_format=form)

        x, w = tensor(case.x, (0, 3, 1, 2)), tensor(case.w, (3, 2, 0, 1))
        dy, dz = tensor(case.dy, (0, 3, 1, 2)), tensor(case.dz, (0, 3, 1, 2))
        b = None if case.b is None else torch.from_numpy(case.b.copy())
        needs_grad = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]

        def collect(names: tuple[str, ...]) -> Callable[[Any], dict[str, Array]]:
            axes = {"y": (0, 2, 3, 1), "dx": (0, 2, 3, 1), "dw": (2, 3, 1, 0), "db": (0,)}

            def done(results: Any) -> dict[str, Array]:
                parts = results if isinstance(results, tuple | list) else (results,)
                return {
                    n: r.detach().numpy().transpose(axes[n])
                    for n, r in zip(names, parts, strict=True)
                }

            return done

        if case.shape.transposed:
            more = {**options, "output_padding": _output_padding(p)}
            if pass_ in ("forward", "input_grad"):

                def transposed_forward() -> Any:
                    with torch.inference_mode():
                        return functional.conv_transpose2d(dz, w, **more)

                return Prepared(transposed_forward, collect(("dx",)))
            if pass_ == "train":
                leaves = [dz.detach().requires_grad_(), needs_grad[1]]

                def transposed_train() -> Any:
                    dx = functional.conv_transpose2d(*leaves, **more)
                    return dx, *torch.autograd.grad(dx, leaves, x)

                return Prepared(transposed_train, collect(("dx", "y", "dw")))
        if pass_ == "forward":

            def forward() -> Any:
                with torch.inference_mode():
                    return functional.conv2d(x, w, b, **options).relu_()

            return Prepared(forward, collect(("y",)))
        if pass_ == "train":

            def train() -> Any:
                y = functional.conv2d(*needs_grad, **options).relu_()
                return y, *torch.autograd.grad(y, needs_grad, dy)

            return Prepared(train, collect(("y", "dx", "dw", "db")))
        mask = (True, False, False) if pass_ == "input_grad" else (False, True, b is not None)
        names = tuple(n for n, on in zip(("dx", "dw", "db"), mask, strict=True) if on)
        sizes = None if b is None else [p.out_channels]
        arguments = (sizes, p.stride, options["padding"], p.dilation, False, (0, 0), p.groups, mask)
        gradients = torch.ops.aten.convolution_backward

        def gradient() -> Any:
            with torch.inference_mode():
                return [r for r in gradients(dz, x, w, *arguments) if r is not None]

        return Prepared(gradient, collect(names))


# -------------------------------------------------------------------------------------- JAX


class Jax(Peer):
    """JAX on the CPU: NHWC, compiled, all passes of a call in one program."""

    name = "jax"
    label = "JAX"

    @classmethod
    def missing(cls) -> str | None:
        return _not_installed("jax", "JAX")

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        jax = importlib.import_module("jax")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        self._jax = jax

    def versions(self) -> dict[str, str]:
        return {"jax": str(self._jax.__version__)}

    def prepare(self, case: Case, pass_: str, variant: str) -> Prepared:
        jax = self._jax
        p = case.shape.problem
        x, w, dy, dz = (jax.device_put(a) for a in (case.x, case.w, case.dy, case.dz))
        b = None if case.b is None else jax.device_put(case.b)

        def conv(x: Any, w: Any) -> Any:
            return jax.lax.conv_general_dilated(
                x,
                w,
                p.stride,
                p.padding,
                rhs_dilation=p.dilation,
                feature_group_count=p.groups,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )

        def layer(x: Any, w: Any, b: Any) -> Any:
            return jax.nn.relu(conv(x, w) + b)

        def plain_layer(x: Any, w: Any, b: Any) -> Any:
            return conv(x, w) + b

        names: tuple[str, ...]
        arguments: tuple[Any, ...]
        compute: Callable[..., Any]
        if pass_ == "input_grad" or (case.shape.transposed and pass_ == "forward"):
            names, arguments = ("dx",), (dz, x, w)

            def input_grad(dz: Any, x: Any, w: Any) -> Any:
                return jax.vjp(lambda x: conv(x, w), x)[1](dz)

            compute = input_grad
        elif case.shape.transposed and pass_ == "train":
            names, arguments = ("y", "dx", "dw"), (dz, x, w)

            def transposed_train(dz: Any, x: Any, w: Any) -> Any:
                y, back = jax.vjp(conv, x, w)
                return y, *back(dz)

            compute = transposed_train
        elif pass_ == "weight_grad" and b is None:
            names, arguments = ("dw",), (dz, x, w)

            def weight_grad(dz: Any, x: Any, w: Any) -> Any:
                return jax.vjp(lambda w: conv(x, w), w)[1](dz)

            compute = weight_grad
        elif pass_ == "weight_grad":
            names, arguments = ("dw", "db"), (dz, x, w, b)

            def both_weight_grads(dz: Any, x: Any, w: Any, b: Any) -> Any:
                return jax.vjp(lambda w, b: plain_layer(x, w, b), w, b)[1](dz)

            compute = both_weight_grads
        elif pass_ == "forward":
            names, arguments = ("y",), (x, w, b)

            def forward(x: Any, w: Any, b: Any) -> Any:
                return (layer(x, w, b),)

            compute = forward
        else:
            names, arguments = ("y", "dx", "dw", "db"), (dy, x, w, b)

            def train(dy: Any, x: Any, w: Any, b: Any) -> Any:
                y, back = jax.vjp(layer, x, w, b)
                return y, *back(dy)

            compute = train

        program = jax.jit(compute)

        def run() -> Any:
            return jax.block_until_ready(program(*arguments))

        return Prepared(run, lambda r: {n: np.asarray(a) for n, a in zip(names, r, strict=True)})


# ---------------------------------------------------------------------------- NumPy by hand


class Im2col(Peer):
    """The plain im2col, in float64 as numpy-ml computes."""

    name = "im2col64"
    label = "im2col (numpy-ml style), float64"
    patience = 0.5
    dtype: ClassVar[str | None] = "float64"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def prepare(self, case: Case, pass_: str, variant: str) -> Prepared:
        p = case.shape.problem
        if p.groups > 1:
            raise Unsupported("numpy-ml's layer has no groups")
        dtype = np.dtype(self.dtype or p.dtype)
        need, free = 3 * plain.columns_bytes(p, dtype.itemsize), _free_memory()
        if need > free:
            raise Unsupported(f"its windows need {need / 2**30:.1f} GiB")
        x, w, dy, dz = (a.astype(dtype) for a in (case.x, case.w, case.dy, case.dz))
        b = None if case.b is None else case.b.astype(dtype)
        return _by_hand(
            case,
            pass_,
            lambda: plain.im2col_forward(p, x, w, b, case.relu),
            lambda y, needs: plain.im2col_backward(
                p, dz if y is None else dy * (y > 0), x, w, needs
            ),
        )


class Im2col32(Im2col):
    """The plain im2col in the dtype asked for."""

    name = "im2col"
    label = "im2col (numpy-ml style)"
    dtype = None


class Loops(Peer):
    """The loops over example, position and output channel."""

    name = "loops"
    label = "loops"
    patience = 0.2
    limit = 2.0

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def prepare(self, case: Case, pass_: str, variant: str) -> Prepared:
        p, limit = case.shape.problem, self.limit
        return _by_hand(
            case,
            pass_,
            lambda: plain.loops_forward(p, case.x, case.w, case.b, case.relu, limit),
            lambda y, needs: plain.loops_backward(
                p, case.dz if y is None else case.dy * (y > 0), case.x, case.w, limit, needs
            ),
        )


def _by_hand(
    case: Case,
    pass_: str,
    forward: Callable[[], Array],
    backward: Callable[[Array | None, str], tuple[Array | None, Array | None, Array | None]],
) -> Prepared:
    """Return the pass made of a forward and a backward; ``backward(None, ...)`` is the plain one."""
    names = ("dx", "dw", "db")
    transposed = case.shape.transposed
    if pass_ == "input_grad" or (transposed and pass_ == "forward"):
        return Prepared(lambda: backward(None, "x"), lambda r: _named(names, r))
    if pass_ == "weight_grad":
        needs = "w" if case.b is None else "wb"
        return Prepared(lambda: backward(None, needs), lambda r: _named(names, r))
    if pass_ == "forward":
        return Prepared(forward, lambda y: {"y": y})

    def train() -> Any:
        y = forward()
        return y, *backward(None if transposed else y, "xw" if transposed else "xwb")

    return Prepared(train, lambda r: _named(("y", *names), r))


def _free_memory() -> float:
    """Return the bytes that may be used, half of what is free; infinite where that is unknown."""
    try:
        with open("/proc/meminfo") as file:
            found = {name: rest.split() for name, _, rest in (line.partition(":") for line in file)}
        return 0.5 * 1024 * int(found["MemAvailable"][0])
    except (OSError, LookupError, ValueError):
        return float("inf")


def _not_installed(module: str, label: str) -> str | None:
    return None if importlib.util.find_spec(module) is not None else f"{label} is not installed"


# --------------------------------------------------------------------------------- registry

PEERS: dict[str, type[Peer]] = {
    cls.name: cls for cls in (Gpuconv, Torch, Jax, Im2col, Im2col32, Loops)
}
LABELS = {name: cls.label for name, cls in PEERS.items()}


def label(name: str) -> str:
    """Return what a peer is called in a table; ``"gpuconv:ENGINE"`` is gpuconv with it forced."""
    base, _, engine = name.partition(":")
    return f"gpuconv, {engine}" if engine else LABELS[base]


def make_peer(name: str, threads: int) -> Peer:
    """Return the peer of a name.

    Raises
    ------
    ValueError
        If there is none.
    """
    base, _, engine = name.partition(":")
    if base not in PEERS or (engine and base != "gpuconv"):
        raise ValueError(f"peer is {name!r}; expected one of {', '.join(PEERS)}, gpuconv:ENGINE")
    return Gpuconv(threads, engine) if engine else PEERS[base](threads)
