"""What the built-in profiler leaves in its folder: table, trace, picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from gpuconv.profiling import trace
from gpuconv.profiling.floors import Floors, measure
from gpuconv.profiling.recorder import Recorder
from gpuconv.settings import get_num_threads

__all__ = ["ROOFLINE", "TABLE", "TRACE", "limits", "next_folder", "write"]

TABLE, TRACE, ROOFLINE = "table.txt", "trace.json", "roofline.png"


def next_folder(name: str, root: Path) -> Path:
    """Make and return the first of ``root/name-1``, ``root/name-2``, ... that is not there."""
    from gpuconv.training.run import next_folder as make

    return make(name, root)


def limits(recorder: Recorder, seconds: float = 0.2, dtypes: Sequence[str] | None = None) -> Floors:
    """Measure the limits of the recorder's device, in the dtypes that it has seen if none is given."""
    wanted = recorder.dtypes() if dtypes is None else dtypes
    return measure(recorder.place, wanted, get_num_threads(), seconds)


def write(
    recorder: Recorder,
    folder: Path,
    floors: Floors | None = None,
    title: str = "",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write ``table.txt``, ``trace.json`` and ``roofline.png``; say the table and their names.

    The machine's limits are measured unless they are given.
    """
    if not recorder.rows():
        say("gpuconv profile: no convolution and no layer was computed")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    floors = floors or limits(recorder)
    peaks = ", ".join(
        f"{floors.peak[d] / 1e9:.0f} GFLOP/s {d}" for d in recorder.dtypes() if d in floors.peak
    )
    head = (
        f"{recorder.place}: at most {peaks} (matrix product), "
        f"{floors.bandwidth / 1e9:.1f} GB/s (copy)"
    )
    text = f"{recorder.table(floors)}\n{head}"
    say(text)
    made = [folder / TABLE, folder / TRACE]
    made[0].write_text(text + "\n", encoding="utf-8")
    trace.write(made[1], recorder.spans, str(recorder.place), recorder.clock.waits)
    if importlib.util.find_spec("matplotlib") is None:
        say("no roofline.png, for want of matplotlib: pip install 'gpuconv[bench]'")
    else:
        from gpuconv.profiling import roofline

        if roofline.draw(folder / ROOFLINE, recorder.rows(), floors, title or str(recorder.place)):
            made.append(folder / ROOFLINE)
    for path in made:
        say(f"wrote {path}")
    return made
