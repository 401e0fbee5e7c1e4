"""What compute-sanitizer looks at: every pass of every CUDA engine, on small shapes.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import gpuconv
from gpuconv.cuda import runtime

__all__ = ["compute"]

#: Kernel and options: nothing even, and what a plain layer is.
_KINDS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "uneven": ((3, 2, 4, 16), {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2)}),
    "plain": ((3, 3, 8, 16), {"padding": 1}),
    "depthwise": ((3, 3, 1, 8), {"padding": 1}),
}
_CHANNELS = 8


def compute(
    dtypes: Sequence[str] = ("float32", "float64", "float16", "tf32"),
    layouts: Sequence[str] = ("NHWC", "NCHW"),
) -> None:
    """Compute, and print a line for each pass that an engine takes or does not take."""
    cp = runtime.cupy()
    names = [e.name for e in gpuconv.engines() if e.available and e.device == "cuda"]
    before = gpuconv.get_precision()
    try:
        for dtype in dtypes:
            gpuconv.set_precision("tf32" if dtype == "tf32" else "default")
            for layout in layouts:
                for kind in _KINDS:
                    for name in names:
                        _passes(name, dtype, layout, kind)
    finally:
        gpuconv.set_precision(before)
    cp.cuda.runtime.deviceSynchronize()


def _passes(name: str, dtype: str, layout: str, kind: str) -> None:
    cp = runtime.cupy()
    rng = np.random.default_rng(0)
    kernel, chosen = _KINDS[kind]
    plain = "float32" if dtype == "tf32" else dtype
    options = {**chosen, "groups": _CHANNELS // kernel[2], "layout": layout}
    images, weights = rng.standard_normal((2, 9, 8, _CHANNELS)), rng.standard_normal(kernel)
    if layout == "NCHW":
        images, weights = images.transpose(0, 3, 1, 2), weights.transpose(3, 2, 0, 1)
    x, w = (cp.asarray(np.ascontiguousarray(a, plain)) for a in (images, weights))
    b = cp.ones(kernel[-1], plain)
    with gpuconv.engine("cuda_atomic"):
        dy = gpuconv.conv2d(x, w, b, **options)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: gpuconv.conv2d(x, w, b, activation="ReLU", **options),
        "input_grad": lambda: gpuconv.conv2d_backward(dy, x, w, needs="x", **options),
        "weight_grad": lambda: gpuconv.conv2d_backward(dy, x, w, needs="wb", **options),
    }
    for pass_, call in calls.items():
        with gpuconv.engine(name):
            try:
                call()
            except gpuconv.EngineError as error:
                print("not for", name, pass_, kind, dtype, layout, error)
            else:
                print("computed", name, pass_, kind, dtype, layout, flush=True)


if __name__ == "__main__":
    compute()
