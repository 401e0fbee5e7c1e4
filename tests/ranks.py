"""Cases of one to three spatial axes, in every dtype; and what each engine makes of them.

``python -m tests.ranks`` prints which engine computes which rank, dtype and pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch
from gpuconv.engines.base import PASSES
from gpuconv.functional.plan import make_plan, transposed_plan
from gpuconv.problem import COMPLEX, DTYPES, ConvProblem
from tests.support import CPU_ENGINES, CUDA_ENGINES

ENGINES = [*CPU_ENGINES, *CUDA_ENGINES]


@dataclass(frozen=True)
class Ranked:
    """A convolution, or a transposed one, of any rank; shapes are channels last."""

    name: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    activation: str | None = None
    first: bool = False
    transposed: bool = False

    @property
    def nd(self) -> int:
        return len(self.x) - 2

    def call(self, suffix: str = "") -> Callable[..., Any]:
        kind = "conv_transpose" if self.transposed else "conv"
        return getattr(gpuconv, f"{kind}{self.nd}d{suffix}")  # type: ignore[no-any-return]

    def keywords(self, dtype: str) -> dict[str, Any]:
        return {
            **dict(self.options),
            "layout": "channels_first" if self.first else "channels_last",
            "activation": None if dtype in COMPLEX else self.activation,
        }

    def out_channels(self) -> int:
        groups = dict(self.options).get("groups", 1)
        return self.w[-1] * groups if self.transposed else self.w[-1]

    def problem(self, dtype: str) -> ConvProblem:
        o = dict(self.options)
        shared = (o.get("dilation", 1), o.get("groups", 1), "channels_last", None)
        if self.transposed:
            more = (o.get("stride", 1), o.get("padding", 0), o.get("output_padding", 0))
            return transposed_plan(self.nd, self.x, self.w, dtype, *more, *shared).problem
        more = (o.get("stride", 1), o.get("padding", 0))
        return make_plan(self.nd, self.x, self.w, dtype, *more, *shared).problem


def ranked(name: str, x: Any, w: Any, **options: Any) -> Ranked:
    known = {k: options.pop(k) for k in ("activation", "first", "transposed") if k in options}
    return Ranked(name, tuple(x), tuple(w), tuple(sorted(options.items())), **known)


CASES = [
    ranked("1d", (2, 9, 3), (3, 3, 4), padding=1, activation="ReLU"),
    ranked("1d-causal", (2, 8, 4), (3, 2, 6), padding="causal", dilation=2, groups=2),
    ranked("1d-first-strided", (2, 11, 4), (4, 4, 3), stride=2, padding=((2, 1),), first=True),
    ranked("1d-each-to-itself", (2, 11, 6), (3, 1, 6), groups=6, padding=1, activation="ReLU"),
    ranked("1d-depthwise", (2, 9, 4), (3, 1, 8), groups=4, stride=2, activation="Tanh"),
    ranked("1d-transposed", (2, 5, 3), (3, 3, 4), stride=2, padding=1, output_padding=1,
           activation="ReLU", transposed=True),
    ranked("2d", (2, 6, 5, 3), (3, 3, 3, 4), padding=1, activation="ReLU"),
    ranked("2d-first-strided", (2, 9, 8, 4), (3, 3, 2, 4), stride=2, groups=2, first=True),
    ranked("2d-depthwise", (1, 6, 6, 4), (3, 3, 1, 4), groups=4, padding=1, activation="ReLU"),
    ranked("2d-transposed", (2, 3, 4, 4), (3, 2, 4, 3), stride=(2, 3), padding=1, groups=2,
           transposed=True, activation="LeakyReLU(0.1)"),
    ranked("2d-transposed-first", (1, 4, 3, 3), (3, 3, 3, 2), dilation=2, output_padding=(1, 0),
           transposed=True, first=True),
    ranked("3d", (1, 4, 5, 3, 2), (3, 2, 2, 2, 3), padding=1, activation="ReLU"),
    ranked("3d-first-strided", (2, 5, 4, 5, 4), (2, 3, 2, 2, 4), stride=(2, 1, 2), groups=2,
           padding="same", first=True),
    ranked("3d-depthwise", (1, 4, 4, 4, 3), (2, 2, 3, 1, 3), groups=3, dilation=(1, 2, 1)),
    ranked("3d-transposed", (1, 2, 3, 2, 2), (2, 3, 2, 2, 3), stride=2, padding=(0, 1, 0),
           output_padding=1, transposed=True, activation="Sigmoid"),
]  # fmt: skip


@dataclass
class Answers:
    """Inputs in the case's layout, and the loops' results in 64 bits a number."""

    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    dy: np.ndarray
    y: np.ndarray
    gradients: tuple[np.ndarray, ...]


def wide(dtype: str) -> str:
    return "complex128" if dtype in COMPLEX else "float64"


@cache
def answers(c: Ranked, dtype: str) -> Answers:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(len(c.name))

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        a = rng.standard_normal(shape)
        return (a + 1j * rng.standard_normal(shape) if dtype in COMPLEX else a).astype(dtype)

    x, w, b = draw(c.x), draw(c.w), draw((c.out_channels(),))
    if c.first:
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
        first, second = (-2, -1) if c.transposed else (-1, -2)
        w = np.ascontiguousarray(np.moveaxis(w, (first, second), (0, 1)))
    exact = [a.astype(wide(dtype)) for a in (x, w, b)]
    options = c.keywords(dtype)
    with gpuconv.engine("naive"):
        y = c.call()(*exact, **options)
        dy = draw(y.shape)
        seen = y.astype(dtype).astype(wide(dtype))  # what a user passes back
        gradients = c.call("_backward")(dy.astype(wide(dtype)), *exact[:2], y=seen, **options)
    return Answers(x, w, b, dy, y, gradients)


def allowed(engine: str, dtype: str, reduction: int) -> float:
    """Return the error allowed relative to the largest value."""
    exact = {"float64": 1e-11, "complex128": 1e-11, "float16": 5e-3, "bfloat16": 2e-2}
    if dtype in exact:
        return exact[dtype]
    return 1e-5 * reduction**0.5 * dispatch.get_engine(engine).error_factor


def listing() -> dict[tuple[str, int, str, str], str]:
    """Return for engine, rank, dtype and pass the first case that is computed; "" for none."""
    found = {}
    for name in ENGINES:
        made = dispatch.get_engine(name)
        for nd in (1, 2, 3):
            for dtype in DTYPES:
                for p in PASSES:
                    names = (
                        c.name
                        for c in CASES
                        if c.nd == nd and not made.unsupported(c.problem(dtype), p)
                    )
                    found[name, nd, dtype, p] = next(names, "")
    return found


def main() -> None:
    table = listing()
    print(f"{'engine':26} axes " + "".join(f"{d:>12}" for d in DTYPES))
    for name in ENGINES:
        for nd in (1, 2, 3):
            cells = []
            for dtype in DTYPES:
                passes = "".join(p[0] for p in PASSES if table[name, nd, dtype, p])
                cells.append({"fiw": "all"}.get(passes, passes or "-"))
            print(f"{name:26} {nd}    " + "".join(f"{c:>12}" for c in cells))


if __name__ == "__main__":
    main()
