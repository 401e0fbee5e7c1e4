"""The suite: layers of well-known networks, each with its FLOPs, its bytes and its class."""

from __future__ import annotations

import fnmatch
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuconv.problem import ConvProblem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CLASSES", "PASSES", "SUITE", "Shape", "SuiteError", "load", "select"]

SUITE = Path(__file__).with_name("suite.toml")

#: What is timed: one pass, or "train", the forward and all gradients.
PASSES = ("forward", "train", "input_grad", "weight_grad")

#: The classes in the order of the report; :attr:`Shape.kind` is one of them.
CLASSES = (
    "3x3, stride 1, 64 or more channels",
    "3x3, stride 1, fewer channels",
    "3x3, stride 2",
    "1x1",
    "depthwise",
    "grouped",
    "dilated",
    "first layer (at most 4 channels)",
    "1x7 and 7x1",
    "other kernels",
    "transposed",
    "call overhead",
)

_FIELDS = {
    "name", "network", "batch", "input", "out_channels", "kernel", "stride", "padding",
    "dilation", "groups", "transposed", "tags",
}  # fmt: skip


class SuiteError(ValueError):
    """The suite's file, or a choice from it, is not as it should be."""


@dataclass(frozen=True)
class Shape:
    """One layer of the suite.

    Attributes
    ----------
    name, network : str
        What it is called, and where it comes from.
    problem : ConvProblem
        The convolution, in float32. Of a transposed layer, the convolution whose input gradient
        the layer is: ``problem``'s output has the shape of the layer's input.
    transposed : bool
        Whether the layer is a transposed convolution.
    tags : tuple of str
        ``"quick"`` is in the short suite; ``"overhead"`` is a call so small that its fixed cost
        is what is measured, and stays out of the means.
    """

    name: str
    network: str
    problem: ConvProblem
    transposed: bool = False
    tags: tuple[str, ...] = ()

    def with_dtype(self, dtype: str) -> Shape:
        """Return the same layer in another dtype."""
        return replace(self, problem=replace(self.problem, dtype=dtype))

    def with_batch(self, batch: int) -> Shape:
        """Return the same layer over another number of examples."""
        return replace(self, problem=self.problem.with_batch(batch))

    def with_input(self, rows: int, columns: int) -> Shape:
        """Return the same layer over images of another size."""
        if self.transposed:
            raise ValueError("with_input is for layers that are not transposed")
        return replace(self, problem=replace(self.problem, in_shape=(rows, columns)))

    @property
    def kind(self) -> str:
        """The class, one of :data:`CLASSES`; it follows from the numbers alone."""
        p = self.problem
        if "overhead" in self.tags:
            return "call overhead"
        if self.transposed:
            return "transposed"
        if p.depthwise:
            return "depthwise"
        if p.groups > 1:
            return "grouped"
        if any(d > 1 for d in p.dilation):
            return "dilated"
        if p.in_channels <= 4:
            return "first layer (at most 4 channels)"
        if p.kernel == (1, 1):
            return "1x1"
        if p.kernel == (3, 3) and p.stride == (1, 1):
            few = min(p.in_channels, p.out_channels) < 64
            return "3x3, stride 1, " + ("fewer channels" if few else "64 or more channels")
        if p.kernel == (3, 3) and p.stride == (2, 2):
            return "3x3, stride 2"
        if p.kernel in ((1, 7), (7, 1)):
            return "1x7 and 7x1"
        return "other kernels"

    def flops(self, pass_: str) -> int:
        """Return the floating-point operations, a multiply-add counted as two.

        Those of the definition: an algorithm that needs fewer gets the same number. Bias and
        activation are not counted. "train" is three passes.
        """
        return self.problem.flops * (3 if _known(pass_) == "train" else 1)

    def bytes(self, pass_: str) -> int:
        """Return the fewest bytes moved when each call reads its inputs and writes its results once.

        "train" is two calls: the forward, and all gradients from ``dy, y, x, w`` (for a
        transposed layer, which has no activation: the forward; its input's gradient; its
        weights').
        """
        p = self.problem
        x, w, y = (math.prod(s) for s in (p.x_shape, p.w_shape, p.y_shape))
        b = 0 if self.transposed else p.out_channels
        count = {
            "forward": x + w + y + b,
            "train": (x + w + b + y) + (2 * y + x + w) + (x + w + b),
            "input_grad": y + w + x,
            "weight_grad": y + x + w + b,
        }[_known(pass_)]
        if self.transposed and pass_ == "train":
            count = 3 * (x + w + y)
        return p.itemsize * count

    def floor(self, pass_: str, peak: float, bandwidth: float) -> float:
        """Return the seconds below which it cannot go: by FLOP/s or by byte/s, the larger.

        An algorithm with fewer operations (Winograd) can pass the first, data that stays in the
        cache the second.
        """
        return max(self.flops(pass_) / peak, self.bytes(pass_) / bandwidth)

    def describe(self) -> str:
        """Return the layer in a few words: ``8x56x56x64, 3x3, 64``."""
        p = self.problem
        source, channels = (p.in_shape, p.out_channels)
        in_channels = p.in_channels
        if self.transposed:
            source, in_channels, channels = (p.out_shape, p.out_channels, p.in_channels)
        text = f"{p.batch}x{_by(source)}x{in_channels}, {_by(p.kernel)}"
        if p.stride != (1, 1):
            text += "/" + (str(p.stride[0]) if p.stride[0] == p.stride[1] else _by(p.stride))
        if p.dilation != (1, 1):
            text += " d" + (
                str(p.dilation[0]) if p.dilation[0] == p.dilation[1] else _by(p.dilation)
            )
        text += f", {channels}"
        if p.groups > 1:
            text += f", groups {p.groups}"
        return text + (", transposed" if self.transposed else "")

    def to_json(self) -> dict[str, Any]:
        """Return it in plain types; :meth:`from_json` reads it back."""
        p = self.problem
        return {
            "name": self.name,
            "network": self.network,
            "transposed": self.transposed,
            "tags": list(self.tags),
            "batch": p.batch,
            "in_shape": list(p.in_shape),
            "in_channels": p.in_channels,
            "out_channels": p.out_channels,
            "kernel": list(p.kernel),
            "stride": list(p.stride),
            "padding": [list(pair) for pair in p.padding],
            "dilation": list(p.dilation),
            "groups": p.groups,
            "dtype": p.dtype,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shape:
        """Return the layer that :meth:`to_json` wrote."""
        problem = ConvProblem(
            batch=data["batch"],
            in_channels=data["in_channels"],
            out_channels=data["out_channels"],
            in_shape=tuple(data["in_shape"]),
            kernel=tuple(data["kernel"]),
            stride=tuple(data["stride"]),
            padding=tuple((a, b) for a, b in data["padding"]),
            dilation=tuple(data["dilation"]),
            groups=data["groups"],
            dtype=data["dtype"],
        )
        return cls(data["name"], data["network"], problem, data["transposed"], tuple(data["tags"]))


def _by(values: Iterable[int]) -> str:
    return "x".join(map(str, values))


def _known(pass_: str) -> str:
    if pass_ not in PASSES:
        raise ValueError(f"pass is {pass_!r}; expected one of {', '.join(PASSES)}")
    return pass_


# --------------------------------------------------------------------------------- the file


def load(path: Path = SUITE) -> list[Shape]:
    """Read a suite.

    Raises
    ------
    SuiteError
        If the file is not there or not as it should be; the message names the entry.
    """
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise SuiteError(f"the suite {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"the suite {path} is not TOML: {error}") from None
    entries = data.get("shape")
    if set(data) != {"shape"} or not isinstance(entries, list) or not entries:
        raise SuiteError(f"the suite {path} should consist of [[shape]] entries")
    shapes = [_shape(entry) for entry in entries]
    names = [s.name for s in shapes]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise SuiteError(f"the suite {path} has these names twice: {', '.join(sorted(twice))}")
    return shapes


def select(shapes: Iterable[Shape], globs: Iterable[str] = (), quick: bool = False) -> list[Shape]:
    """Return the shapes of the short suite, of names that match one of ``globs``, or both.

    Raises
    ------
    SuiteError
        If a pattern matches none.
    """
    pool = list(shapes)
    globs = list(globs)
    for glob in globs:
        if not any(fnmatch.fnmatchcase(s.name, glob) for s in pool):
            names = ", ".join(s.name for s in pool)
            raise SuiteError(f"no shape is called {glob!r}; the suite has {names}")
    return [
        s
        for s in pool
        if (not quick or "quick" in s.tags)
        and (not globs or any(fnmatch.fnmatchcase(s.name, g) for g in globs))
    ]


def _shape(entry: Any) -> Shape:
    """Return the layer of one ``[[shape]]`` entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise SuiteError(f"a shape of the suite has no name: {entry!r}")
    name = entry["name"]
    unknown = set(entry) - _FIELDS
    if unknown:
        raise SuiteError(f"{name}: unknown {', '.join(sorted(unknown))}")
    missing = {"batch", "input", "out_channels", "kernel"} - set(entry)
    if missing:
        raise SuiteError(f"{name}: {', '.join(sorted(missing))} is missing")
    transposed = entry.get("transposed", False)
    tags = entry.get("tags", [])
    if not isinstance(transposed, bool):
        raise SuiteError(f"{name}: transposed is {transposed!r}; expected true or false")
    if not isinstance(tags, list) or not all(isinstance(t, str) for t in tags):
        raise SuiteError(f"{name}: tags is {tags!r}; expected a list of strings")
    batch = _integer(name, "batch", entry["batch"], 1)
    groups = _integer(name, "groups", entry.get("groups", 1), 1)
    rows, columns, channels = _integers(name, "input", entry["input"], 3, 1)
    out_channels = _integer(name, "out_channels", entry["out_channels"], 1)
    kernel = _integers(name, "kernel", entry["kernel"], 2, 1)
    stride = _integers(name, "stride", entry.get("stride", 1), 2, 1)
    padding = _integers(name, "padding", entry.get("padding", 0), 2, 0)
    dilation = _integers(name, "dilation", entry.get("dilation", 1), 2, 1)
    if channels % groups or out_channels % groups:
        raise SuiteError(f"{name}: {groups} groups do not divide {channels} and {out_channels}")
    in_shape: tuple[int, ...] = (rows, columns)
    if transposed:
        # The smallest image that the convolution takes to (rows, columns).
        in_shape = tuple(
            (n - 1) * s + d * (k - 1) + 1 - 2 * p
            for n, s, d, k, p in zip(in_shape, stride, dilation, kernel, padding, strict=True)
        )
        channels, out_channels = out_channels, channels
    problem = ConvProblem(
        batch=batch,
        in_channels=channels,
        out_channels=out_channels,
        in_shape=in_shape,
        kernel=kernel,
        stride=stride,
        padding=tuple((p, p) for p in padding),
        dilation=dilation,
        groups=groups,
    )
    if min(problem.out_shape) < 1 or min(in_shape) < 1:
        raise SuiteError(f"{name}: the kernel is larger than the padded input")
    return Shape(name, str(entry.get("network", "")), problem, transposed, tuple(tags))


def _integer(name: str, field: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SuiteError(f"{name}: {field} is {value!r}; expected an integer of at least {least}")
    return value


def _integers(name: str, field: str, value: Any, count: int, least: int) -> tuple[int, ...]:
    if isinstance(value, list):
        if len(value) != count:
            raise SuiteError(f"{name}: {field} is {value!r}; expected {count} integers")
        return tuple(_integer(name, field, v, least) for v in value)
    if count == 3:
        raise SuiteError(f"{name}: {field} is {value!r}; expected [rows, columns, channels]")
    return (_integer(name, field, value, least),) * count
