"""The roofline: what each pass reaches, under what the machine allows [1]_.

.. [1] Williams, Waterman, Patterson: Roofline: an insightful visual performance model for
   multicore architectures (2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuconv.profiling.floors import Floors
from gpuconv.profiling.table import Row

__all__ = ["draw"]

_MARKERS = {"forward": "o", "input_grad": "s", "weight_grad": "D", "backward": "^"}
#: Points that are named; the others would hide each other.
_NAMED = 12


def draw(path: Path, rows: Sequence[Row], floors: Floors, title: str) -> bool:
    """Draw operations a second over operations a byte; needs matplotlib.

    Returns
    -------
    bool
        Whether there was a row with operations and bytes to draw; if not, nothing is written.
    """
    points = [r for r in rows if r.flops and r.bytes and r.seconds > 0]
    if not points or not floors.peak or not floors.bandwidth:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gpuconv.training.files import replacing

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    intensity = [r.flops / r.bytes for r in points]
    ridges = [peak / floors.bandwidth for peak in floors.peak.values()]
    low, high = min(intensity + ridges) / 2, max(intensity + ridges) * 2
    for dtype in dict.fromkeys(r.dtype for r in points):
        peak = floors.peak.get(dtype)
        if peak is None:
            continue
        corner = min(high, max(low, peak / floors.bandwidth))
        roof = [(x, min(peak, x * floors.bandwidth) / 1e9) for x in (low, corner, high)]
        axes.plot(*zip(*roof, strict=True), color="black", linewidth=1.5)
        axes.annotate(
            f"matrix product {dtype}, {peak / 1e9:.0f} GFLOP/s", (high, peak / 1e9),
            xytext=(-4, 4), textcoords="offset points", ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
    axes.annotate(
        f"copy, {floors.bandwidth / 1e9:.0f} GB/s", (low, low * floors.bandwidth / 1e9),
        xytext=(4, -2), textcoords="offset points", ha="left", va="top", fontsize=8,
    )  # fmt: skip
    longest = sorted(points, key=lambda r: -r.seconds)[:_NAMED]
    whole = sum(r.seconds for r in points)
    for pass_ in dict.fromkeys(r.pass_ for r in points):
        some = [r for r in points if r.pass_ == pass_]
        axes.scatter(
            [r.flops / r.bytes for r in some],
            [r.flops / r.seconds / 1e9 for r in some],
            s=[60 + 900 * r.seconds / whole for r in some],
            marker=_MARKERS.get(pass_, "o"),
            alpha=0.6,
            label=pass_,
        )
    for row in longest:
        # Layers by their numbers: names would hide each other.
        number = row.name.split(" ")[0]
        text = number if " " in row.name and number[:1].isdigit() else row.name
        axes.annotate(
            text, (row.flops / row.bytes, row.flops / row.seconds / 1e9),
            ha="center", va="center", fontsize=7,
        )  # fmt: skip
    reached = [r.flops / r.seconds / 1e9 for r in points]
    bottom = min([*reached, low * floors.bandwidth / 1e9]) / 2
    top = max([*reached, *(p / 1e9 for p in floors.peak.values())]) * 2
    axes.set(
        ylim=(bottom, top), xscale="log", yscale="log", xlim=(low, high), title=title,
        xlabel="operations a byte (FLOP/B), by the definition", ylabel="GFLOP/s",
    )  # fmt: skip
    axes.grid(which="both", alpha=0.2)
    axes.legend(
        title="area: time; numbers: layers",
        fontsize=8,
        title_fontsize=8,
        loc="lower right",
        markerscale=0.6,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True
