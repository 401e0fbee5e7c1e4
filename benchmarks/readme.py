"""What the README quotes of the results: ``python -m benchmarks.readme`` writes it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import layers, predict
from benchmarks.gpu.pages import goals_table, means_table
from benchmarks.machine import title
from benchmarks.net import best_torch
from benchmarks.report import PASS_TITLES, memory, number, overhead, summary

__all__ = ["gpu_section", "readme_section", "update_readme"]

ROOT = Path(__file__).resolve().parent.parent


def readme_section(result: dict[str, Any], net: dict[str, Any] | None, page: str) -> str:
    """Return what the README quotes: the geometric means of the passes beside each peer."""
    machine, options = result["machine"], result["options"]
    versions = {n: v for f in result["peers"].values() for n, v in f.get("versions", {}).items()}
    torch = f"PyTorch {versions['torch']}, " if "torch" in versions else ""
    lines = [
        ("**With the extra `numba`**" if options.get("compiled") else "**With NumPy alone**")
        + f" on the CPU, {result['date'][:10]}: {title(machine)}, {options['threads']} threads, NumPy "
        f"{versions.get('numpy', '')}, {torch}each peer in its own process, in turn. A number is a "
        "peer's time over gpuconv's (above 1, gpuconv is the faster): the geometric mean over the "
        "layers, in brackets the least. "
        f"[All layers]({page}).",
        "",
    ]
    for dtype in options["dtypes"]:
        for pass_ in options["passes"]:
            rows = [
                r
                for r in result["rows"]
                if r["dtype"] == dtype and r["pass"] == pass_ and r["kind"] != "call overhead"
            ]
            if rows:
                lines += [f"{dtype}, {PASS_TITLES[pass_]}:", ""]
                lines += [*summary(result, rows).splitlines()[2:], ""]
    calls = overhead(result)
    if calls:
        lines += ["The fixed cost of a call:", "", calls, ""]
    held = memory(result)
    if held:
        lines += [held, ""]
    if net is not None:
        lines += [_net(net), ""]
    return "\n".join(lines).rstrip()


def _net(net: dict[str, Any]) -> str:
    peer = best_torch(net)
    if peer is None:
        return ""
    own, other = net["net"]["gpuconv"], net["net"][peer]
    ratio = other["seconds"] / own["seconds"]
    return (
        "A training epoch of a plain conv net (six 3x3 convolutions of 32 to 128 channels, two max "
        "pools, a dense layer, Adam; 32x32x3 images, batch 64), from the same weights to the same "
        f"losses: PyTorch's time over gpuconv's is {number(ratio)}."
    )


def gpu_section(reports: list[tuple[str, dict[str, Any]]]) -> str:
    """Return what the README says of GPUs: of each that was checked, else that none was.

    Parameters
    ----------
    reports : list of (str, dict)
        Stem of the file and content of each device's check.
    """
    if not reports:
        return f"On a GPU: **not measured**.\n\n{predict.section()}"
    parts = []
    for stem, report in reports:
        place = report["machine"]
        parts.append(
            f"On {place['gpu']}, {report['date'][:10]}, driver {place['driver']}, PyTorch "
            f"{place['versions'].get('torch')} with cuDNN {place['cudnn_of_torch']}: PyTorch's time over "
            "ours (above 1, ours is the faster), geometric means, in brackets the least; "
            f"[all of it](benchmarks/results/{stem}.md)."
        )
        parts += [means_table(report["summary"]), goals_table(report["summary"])]
        if report["failures"]:
            parts.append("Failed: " + "; ".join(report["failures"]))
    return "\n\n".join(parts)


def _between(text: str, name: str, content: str) -> str:
    """Return the text with the content between the marks of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def update_readme(readme: Path, results: Path) -> bool:
    """Write what the results say between the README's marks; return whether it changed."""
    text = readme.read_text(encoding="utf-8")
    whole = [
        (f.stem, json.loads(f.read_text(encoding="utf-8")))
        for f in sorted(results.glob("*.json"))
        if not f.stem.endswith(("-net", "-layers"))
    ]
    folder = results.relative_to(readme.parent).as_posix()
    sections = []
    for stem, result in whole:
        if "rows" not in result:
            continue  # a GPU's check
        nets = results / f"{stem}-net.json"
        net = json.loads(nets.read_text(encoding="utf-8")) if nets.exists() else None
        sections.append(readme_section(result, net, f"{folder}/{stem}.md"))
    for others in sorted(results.glob("*-layers.json")):
        timed = json.loads(others.read_text(encoding="utf-8"))
        place, with_numba = timed["machine"], timed["options"].get("compiled")
        sections.append(
            "**Pooling, batch normalisation and activations** "
            f"{'with the extra `numba`' if with_numba else 'with NumPy alone'}, float32, "
            f"{timed['date'][:10]}: {title(place)}, {timed['options']['threads']} threads, PyTorch's "
            f"time over gpuconv's, [layer by layer]({folder}/{others.stem}.md):\n\n"
            f"{layers.summary(timed)}"
        )
    checked = [(stem, r) for stem, r in whole if r.get("on_a_gpu") and "summary" in r]
    made = _between(text, "measured", "\n\n".join(sections))
    made = _between(made, "measured on a GPU", gpu_section(checked))
    if made != text:
        readme.write_text(made, encoding="utf-8")
    return made != text


if __name__ == "__main__":
    changed = update_readme(ROOT / "README.md", ROOT / "benchmarks" / "results")
    print("README.md written" if changed else "README.md says so already")
