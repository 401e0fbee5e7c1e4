"""What is timed on a GPU: the suite at batches that fill one, and short depthwise lines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import cases, suite
from benchmarks.suite import CLASSES, Shape
from gpuconv.problem import ConvProblem

__all__ = ["DTYPES", "PASSES", "Data", "make", "representative", "shapes", "tolerance"]

DTYPES = ("float32", "tf32", "float16", "bfloat16")
PASSES = ("forward", "input_grad", "weight_grad", "train")
#: The suite's batches are a CPU's; a GPU gets so many times as much.
FACTOR = 8
#: Examples of the case that is computed in float64 on the CPU; the batch repeats them.
EXAMPLES = 2

#: Relative to the largest value, as in the conformance suite.
_TOLERANCES = {"float16": 5e-3, "bfloat16": 2e-2, "tf32": 2e-3}


def _line(name: str, batch: int, length: int, channels: int, taps: int) -> Shape:
    problem = ConvProblem(
        batch=batch, in_channels=channels, out_channels=channels, in_shape=(1, length),
        kernel=(1, taps), stride=(1, 1), padding=((0, 0), (taps - 1, taps - 1)), dilation=(1, 1),
        groups=channels, dtype="float32",
    )  # fmt: skip
    return Shape(name, "Mamba", problem)


#: Short depthwise convolutions along one axis, as state-space models have them.
LINES = (_line("line_4_taps_2048", 1, 1024, 2048, 4), _line("line_4_taps_12288", 1, 512, 12288, 4))


def shapes() -> list[Shape]:
    """Return all layers: the suite without transposed ones and calls' overhead, and the lines."""
    found = [s for s in suite.load() if not s.transposed and "overhead" not in s.tags]
    return [s.with_batch(FACTOR * s.problem.batch) for s in (*found, *LINES)]


def representative(pool: list[Shape]) -> list[Shape]:
    """Return what fits into ten minutes: of each class the first two, and the lines."""
    lines = {s.name for s in LINES}
    kept = []
    for kind in CLASSES:
        mine = [s for s in pool if s.kind == kind and s.name not in lines]
        kept += mine[:2]
    return [s for s in pool if s in kept or s.name in lines]


@dataclass(frozen=True)
class Data:
    """Arrays of a layer, NumPy's, channels last, and what is expected of every result.

    ``inputs`` are x, w, b, dy (behind the activation) and dz (in front of it).
    """

    shape: Shape
    dtype: str
    inputs: dict[str, Any]
    expected: dict[str, Any]  # of a few examples, in float64
    repeats: int

    def error(self, name: str, got: Any) -> float:
        """Return the largest error of a result, relative to the largest value expected."""
        want = self.expected[name]
        if name in ("dw", "db"):
            return cases.compare(got, self.repeats * want)
        parts = (
            got.reshape(self.repeats, *want.shape) if got.size == want.size * self.repeats else None
        )
        if parts is None:
            return math.inf
        return max(cases.compare(part, want) for part in parts)


def make(shape: Shape, dtype: str) -> Data:
    """Return random values; the batch repeats the examples whose results are known."""
    plain = "float32" if dtype == "tf32" else dtype
    few = math.gcd(shape.problem.batch, EXAMPLES)
    small = shape.with_batch(few)
    repeats = shape.problem.batch // few
    case = cases.make(
        small.with_dtype("float32") if plain == "bfloat16" else small.with_dtype(plain)
    )
    if plain == "bfloat16":
        case = _rounded(case, small)
    arrays = {n: getattr(case, n) for n in ("x", "w", "b", "dy", "dz")}
    for name in ("x", "dy", "dz"):
        arrays[name] = np.concatenate([arrays[name]] * repeats)
    return Data(shape.with_dtype(plain), dtype, arrays, case.expected, repeats)


def _rounded(case: cases.Case, small: Shape) -> cases.Case:
    """Return a case whose values are bfloat16's; its results are those of the rounded values."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16)
    x, w, b, dy, dz = (
        None if a is None else a.astype(kind) for a in (case.x, case.w, case.b, case.dy, case.dz)
    )
    if x is None or w is None or dz is None or dy is None:
        raise TypeError("x, w and dy are needed")
    z, backward = cases.reference(small, x, w, b)
    dx, dw, db = backward(dz.astype("float64"))
    expected = {"y": np.maximum(z, 0), "dx": dx, "dw": dw, "db": db}
    return replace(case, x=x, w=w, b=b, dy=dy, dz=dz, expected=expected)


def tolerance(shape: Shape, dtype: str, result: str, factor: float = 1.0) -> float:
    """Return the error allowed; ``factor`` is Winograd's, in float32."""
    allowed = _TOLERANCES.get(dtype)
    return cases.tolerance(shape, result, factor) if allowed is None else allowed
