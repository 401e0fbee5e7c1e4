"""The plots: the ratio of every layer, and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.machine import title
from benchmarks.peers import label
from benchmarks.report import PASS_TITLES, baseline, ratio, spread
from benchmarks.suite import CLASSES

__all__ = ["draw"]

_OWN, _OTHER, _GREY = "#1f5fa8", "#d9822b", "#8a8f98"
_STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the plots of every dtype; return their files."""
    peer = baseline(result)
    made = []
    mpl.use("Agg")
    with mpl.rc_context(_STYLE):
        for dtype in result["options"]["dtypes"]:
            rows = [
                r
                for r in result["rows"]
                if r["dtype"] == dtype and "seconds" in r["peers"].get("gpuconv", {})
            ]
            if peer is not None and any(ratio(r, peer) is not None for r in rows):
                made.append(_ratios(result, rows, peer, folder / f"{stem}-{dtype}-ratio.png"))
            fits = [f for f in result.get("scaling", []) if f["dtype"] == dtype]
            if fits:
                made.append(_scaling(fits, folder / f"{stem}-{dtype}-scaling.png"))
            usual = [r for r in rows if r["kind"] != "call overhead"]
            if usual:
                file = folder / f"{stem}-{dtype}-roofline.png"
                made.append(_roofline(result, usual, dtype, peer, file))
    return made


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{title(machine)}, {result['options']['threads']} threads, {result['date'][:10]}"


def _ratios(result: dict[str, Any], rows: list[dict[str, Any]], peer: str, file: Path) -> Path:
    """Draw a line a layer, a mark a pass, on a logarithmic axis; classes apart."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if ratio(r, peer) is not None]
    kinds = [k for k in CLASSES if any(r["kind"] == k for r in rows)]
    passes = [p for p in result["options"]["passes"] if any(r["pass"] == p for r in rows)]
    places: dict[str, float] = {}
    heads: list[tuple[float, str]] = []
    at = 0.0
    for kind in kinds:
        heads.append((at, kind))
        at += 1
        for name in dict.fromkeys(r["shape"] for r in rows if r["kind"] == kind):
            places[name] = at
            at += 1
        at += 0.4
    figure = Figure(figsize=(7.5, 1.2 + 0.17 * at), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=_GREY, linewidth=1)
    for number, pass_ in enumerate(passes):
        shift = 0.18 * (number - (len(passes) - 1) / 2)
        here = [r for r in rows if r["pass"] == pass_]
        y = np.array([places[r["shape"]] + shift for r in here])
        x = np.array([ratio(r, peer) for r in here], float)
        low, high = np.array([spread(r, peer) for r in here], float).T
        color = (_OWN, _OTHER, "#3a8f5c", "#8c5aa8")[number % 4]
        axes.hlines(y, low, high, color=color, linewidth=1, alpha=0.5)
        axes.scatter(x, y, s=14, color=color, label=PASS_TITLES[pass_], zorder=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(list(places.values()), list(places), fontsize=6.5)
    for place, kind in heads:
        axes.text(
            0.0, place, kind, transform=axes.get_yaxis_transform(), fontsize=7, weight="bold",
            va="center", ha="left", color="#333333",
        )  # fmt: skip
    axes.set_ylim(at, -1)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"time of {label(peer)} / time of gpuconv  (right of 1: gpuconv is faster)")
    axes.set_title(f"{rows[0]['dtype']} beside {label(peer)}. {_where(result)}", fontsize=8)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=7)
    figure.savefig(file)
    return file


def _scaling(fits: list[dict[str, Any]], file: Path) -> Path:
    """Draw time over FLOPs, a panel a sweep, with the slope of each peer's fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(fits) + 0.5, 3.2), layout="constrained")
    panels = figure.subplots(1, len(fits), squeeze=False)[0]
    for axes, fit in zip(panels, fits, strict=True):
        work = np.array(fit["flops"]) / 1e9
        for number, (peer, seconds) in enumerate(fit["seconds"].items()):
            slope = fit["exponent"][peer]
            times = [np.nan if s is None else 1e3 * s for s in seconds]
            name = label(peer) + ("" if slope is None else f", {slope:.3f}")
            color = (_OWN, _OTHER)[number % 2]
            axes.plot(work, times, "o-", color=color, markersize=4, linewidth=1, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"GFLOP; {fit['axis']} {fit['values'][0]} to {fit['values'][-1]}")
        axes.set_title(f"{fit['pass']}, {fit['fixed']}")
        axes.grid(color="#eceef1", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, title="slope", alignment="left")
    panels[0].set_ylabel("ms a call")
    figure.suptitle(fits[0]["shape"], x=0.01, ha="left", fontsize=8)
    figure.savefig(file)
    return file


def _roofline(
    result: dict[str, Any], rows: list[dict[str, Any]], dtype: str, peer: str | None, file: Path
) -> Path:
    """Draw FLOP/s over FLOPs a byte, gpuconv and its baseline, below the two roofs; a panel a pass."""
    from matplotlib.figure import Figure

    peak, bandwidth = result["machine"]["peak_flops"][dtype], result["machine"]["bandwidth_bytes"]
    passes = [p for p in result["options"]["passes"] if any(r["pass"] == p for r in rows)]
    figure = Figure(figsize=(4.2 * len(passes) + 0.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True)[0]
    for axes, pass_ in zip(panels, passes, strict=True):
        here = [r for r in rows if r["pass"] == pass_]
        work = np.array([r["flops"] / r["bytes"] for r in here])
        own = np.array([r["flops"] / r["peers"]["gpuconv"]["seconds"] / 1e9 for r in here])
        x = np.geomspace(work.min() / 2, max(work.max() * 2, peak / bandwidth * 4), 200)
        axes.plot(x, np.minimum(peak, bandwidth * x) / 1e9, color=_GREY, linewidth=1.2)
        if peer is not None:
            pairs = [
                (w, o, r["flops"] / r["peers"][peer]["seconds"] / 1e9)
                for w, o, r in zip(work, own, here, strict=True)
                if "seconds" in r["peers"].get(peer, {})
            ]
            for w, o, other in pairs:
                axes.plot([w, w], [o, other], color="#d4d7dc", linewidth=0.8, zorder=1)
            axes.scatter(
                [p[0] for p in pairs], [p[2] for p in pairs], s=16, facecolor="white",
                edgecolor=_OTHER, label=label(peer), zorder=2,
            )  # fmt: skip
        axes.scatter(work, own, s=16, color=_OWN, label="gpuconv", zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs / byte moved at least")
        axes.set_title(PASS_TITLES[pass_])
        axes.grid(color="#eceef1", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("GFLOP/s, by the definition's FLOPs")
    panels[-1].legend(loc="lower right", frameon=False)
    figure.suptitle(
        f"{dtype}: roofs of {peak / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.0f} GB/s. "
        f"{_where(result)}",
        x=0.01, ha="left", fontsize=8,
    )  # fmt: skip
    figure.savefig(file)
    return file
