"""Train from a mapped file in a process that may not hold it: ``python -m tests.memory_limited``.

The file is sparse, so that it fills no disk; its labels follow from the images' numbers. The
process limits its own memory, shows that the images do not fit into it, trains, and prints what it
took as JSON. ``BYTES LIMIT STEPS`` are the file's size, the limit, and how many steps.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from gpuconv import data
from gpuconv.losses import CrossEntropy
from gpuconv.models import lenet5

SHAPE = (32, 32, 1)
BATCH = 32


def status() -> dict[str, int]:
    """Return the bytes of this process that are anonymous and mapped from files, now."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {k: 1024 * int(fields[k].split()[0]) for k in ("RssAnon", "RssFile", "VmHWM")}


def sparse(path: Path, count: int) -> None:
    """Write a .npy file of ``count`` images, a few of which are not zero; the rest are holes."""
    held = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *SHAPE))
    held[:: max(1, count // 64)] = 200
    held.flush()


def main(size: int, limit: int, steps: int, folder: Path) -> dict[str, object]:
    """Train ``steps`` steps from a file of ``size`` bytes within ``limit`` bytes of memory."""
    count = size // int(np.prod(SHAPE))
    sparse(folder / "x.npy", count)
    np.save(folder / "y.npy", (np.arange(count) % max(1, count // 64) == 0).astype(np.uint8))
    images = data.read_npy(folder / "x.npy", folder / "y.npy")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.array(images.images)
        fits = True
    except MemoryError:
        fits = False
    model = lenet5(SHAPE, 2, optimizer="SGD(lr=0.01)", rng=0)
    loader = data.Loader(
        images.images, images.labels, BATCH, dtype="float32", transform=lambda x, rng: x / 255
    )
    before, most, losses = status(), 0, []
    batches = loader.epoch(0)
    for _, (x, y) in zip(range(steps), batches, strict=False):
        loss, gradient = CrossEntropy.from_logits(y, model.forward(x))
        model.backward(gradient, input_grad=False)
        model.update(float(loss))
        losses.append(float(loss))
        most = max(most, status()["RssAnon"])
    batches.close()  # type: ignore[attr-defined]
    return {
        "file": (folder / "x.npy").stat().st_size,
        "on disk": 512 * (folder / "x.npy").stat().st_blocks,
        "limit": limit,
        "the images fit": fits,
        "steps": len(losses),
        "losses": [losses[0], losses[-1]],
        "anonymous before": before["RssAnon"],
        "anonymous at most": most,
        "peak resident": status()["VmHWM"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(main(*map(int, sys.argv[1:4]), Path(made)), indent=1))
