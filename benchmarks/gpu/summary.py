"""What the times say: floors, the best of ours, geometric means beside the peers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.report import geometric_mean

__all__ = ["GOALS", "floor_ms", "own_best", "summarise", "torch_best"]

#: Geometric means that are aimed at: dtype, pass (None: each of the three), class (None: all), least.
GOALS = (
    ("float32", None, None, 1.0),
    ("float32", None, "depthwise", 3.0),
    ("float32", "train", None, 1.2),
    ("float16", None, None, 0.7),
    ("bfloat16", None, None, 0.7),
    ("tf32", None, None, 0.7),
)
THREE = ("forward", "input_grad", "weight_grad")
Passed = dict[str, Any]


def floor_ms(dtype: str, found: Passed, ceilings: dict[str, Any]) -> float | None:
    """Return the milliseconds that the measured ceilings allow, by operations or by bytes."""
    peak = ceilings["flops"].get(dtype)
    if peak is None or not ceilings["bandwidth"]:
        return None
    return 1e3 * float(max(found["flops"] / peak, found["bytes"] / ceilings["bandwidth"]))


def _times(found: Passed) -> Iterator[tuple[str, float]]:
    for who, one in found["times"].items():
        if "ms" in one and one.get("correct", True):
            yield who, float(one["ms"])


def own_best(found: Passed, cudnn: bool = False) -> tuple[str, float] | None:
    """Return the best of our engines and its time; with the engine ``cudnn`` if that is asked for."""
    mine = [
        (t, w)
        for w, t in _times(found)
        if w != "gpuconv" and not w.startswith(("torch", "jax")) and (cudnn or w != "cudnn")
    ]
    return (min(mine)[1], min(mine)[0]) if mine else None


def torch_best(found: Passed) -> float | None:
    """Return PyTorch's time in its better memory format."""
    return min((t for w, t in _times(found) if w.startswith("torch")), default=None)


def _passes(rows: Iterable[dict[str, Any]], dtype: str, pass_: str | None) -> Iterator[Passed]:
    for row in rows:
        if row.get("dtype") != dtype:
            continue
        for name, found in row["passes"].items():
            if name == pass_ or (pass_ is None and name in THREE):
                yield {**found, "kind": row["kind"], "pass": name}


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under is not None else None


def _mean(values: Iterable[float | None]) -> dict[str, Any] | None:
    kept = [v for v in values if v is not None]
    mean = geometric_mean(kept)
    return None if mean is None else {"mean": mean, "least": min(kept), "count": len(kept)}


def summarise(rows: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, Any]:
    """Return the geometric means by dtype and pass, by class, and the goals.

    ``best`` is PyTorch's time over that of the best of our engines without ``cudnn``; ``any`` the
    same with it; ``chosen`` that of the dispatcher's choice; ``floor`` the floor over the best of
    ours; ``atomic`` the time of cuda_atomic over it.
    """
    good = [r for r in rows.values() if "passes" in r]
    dtypes = list(dict.fromkeys(r["dtype"] for r in good))
    made: dict[str, Any] = {}
    for dtype in dtypes:
        for pass_ in (*THREE, "train"):
            made.setdefault(dtype, {})[pass_] = _row(
                list(_passes(good, dtype, pass_)), dtype, ceilings
            )
        kinds = list(dict.fromkeys(r["kind"] for r in good if r["dtype"] == dtype))
        made[dtype]["classes"] = {
            kind: _row(
                [p for p in _passes(good, dtype, None) if p["kind"] == kind], dtype, ceilings
            )
            for kind in kinds
        }
    return {"means": made, "goals": [_goal(good, *goal) for goal in GOALS]}


def _row(passes: list[Passed], dtype: str, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Return the means over some passes."""
    found: dict[str, list[float | None]] = {
        k: [] for k in ("best", "any", "chosen", "floor", "atomic")
    }
    for one in passes:
        times = dict(_times(one))
        own, with_cudnn = own_best(one), own_best(one, cudnn=True)
        torch = torch_best(one)
        best = own[1] if own else None
        found["best"].append(_ratio(torch, best))
        found["any"].append(_ratio(torch, with_cudnn[1] if with_cudnn else None))
        found["chosen"].append(_ratio(torch, times.get("gpuconv")))
        found["floor"].append(_ratio(floor_ms(dtype, one, ceilings), best))
        found["atomic"].append(_ratio(times.get("cuda_atomic"), best))
    return {name: _mean(values) for name, values in found.items()}


def _goal(
    rows: list[dict[str, Any]], dtype: str, pass_: str | None, kind: str | None, least: float
) -> dict[str, Any]:
    """Return a goal, what was reached, and whether it is met (None: not measured)."""
    values = []
    for one in _passes(rows, dtype, pass_):
        own = own_best(one)
        if kind in (None, one["kind"]):
            values.append(_ratio(torch_best(one), own[1] if own else None))
    reached = _mean(values)
    return {
        "dtype": dtype, "pass": pass_ or "each pass", "class": kind or "all", "least": least,
        "reached": None if reached is None else reached["mean"],
        "met": None if reached is None or not math.isfinite(least) else reached["mean"] >= least,
    }  # fmt: skip
