"""Random convolutions of one to three axes, transposed or not, real or complex, against PyTorch.

``python -m tests.test_against_torch 2000`` compares so many and prints the largest errors.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import gpuconv

#: Problems a run of the suite compares.
COUNT = 300
#: Error allowed relative to the largest value, in 64 bits a number.
ALLOWED = 1e-11


def compare(seed: int) -> tuple[str, float]:
    """Return what was drawn, and the largest error of the result and its gradients."""
    import torch

    rng = np.random.default_rng(seed)
    nd, transposed, first, is_complex = (int(rng.integers(n)) for n in (3, 2, 2, 3))
    nd += 1
    groups = int(rng.choice([1, 1, 2, 3]))
    c_in, c_out = (groups * int(n) for n in rng.integers(1, 5, 2))
    if rng.random() < 0.15:  # depthwise
        groups = c_in
        c_out = c_in * int(rng.integers(1, 3))
    kernel, stride = rng.integers(1, 5, nd).tolist(), rng.integers(1, 4, nd).tolist()
    dilation = rng.choice([1, 1, 1, 2, 3], nd).tolist()
    pads = rng.integers(0, 4, (nd, 2)).tolist()
    window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [int(rng.integers(max(1, w - sum(p)), w + 9)) for w, p in zip(window, pads, strict=True)]
    more = [int(rng.integers(max(s, d))) for s, d in zip(stride, dilation, strict=True)]
    padding: Any = tuple(map(tuple, pads))
    if transposed:
        for i, n in enumerate(size):  # PyTorch crops both ends alike
            room = (n - 1) * stride[i] + window[i] + more[i] - 1
            pads[i] = [min(pads[i][0], room // 2)] * 2
        padding = tuple(p for p, _ in pads)
    elif rng.random() < 0.2:
        padding = "same"
        totals = [
            max(0, (-(-n // s) - 1) * s + w - n)
            for n, s, w in zip(size, stride, window, strict=True)
        ]
        pads = [[t // 2, t - t // 2] for t in totals]
    elif nd == 1 and rng.random() < 0.3:
        padding, pads = "causal", [[window[0] - 1, 0]]

    def draw(*shape: int) -> np.ndarray:
        a = rng.standard_normal(shape)
        return a + 1j * rng.standard_normal(shape) if is_complex == 2 else a

    x = draw(int(rng.integers(1, 4)), c_in, *size)
    w = draw(*((c_in, c_out // groups) if transposed else (c_out, c_in // groups)), *kernel)
    b = draw(c_out) if rng.random() < 0.7 else None
    tx, tw, tb = (None if a is None else torch.tensor(a, requires_grad=True) for a in (x, w, b))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    f = torch.nn.functional
    if transposed:
        options["output_padding"] = more
        name = f"conv_transpose{nd}d"
        ty = getattr(f, name)(tx, tw, tb, padding=list(padding), **options)
    else:
        name = f"conv{nd}d"
        around = f.pad(tx, [n for pair in reversed(pads) for n in pair])
        ty = getattr(f, name)(around, tw, tb, **options)
    dy = draw(*ty.shape)
    wanted = [t for t in (tx, tw, tb) if t is not None]
    grads = [g.numpy() for g in torch.autograd.grad(ty, wanted, torch.tensor(dy))]

    def image(a: np.ndarray) -> np.ndarray:
        return a if first else np.ascontiguousarray(np.moveaxis(a, 1, -1))

    def weights(a: np.ndarray) -> np.ndarray:
        ends = (-2, -1) if transposed else (-1, -2)
        return a if first else np.ascontiguousarray(np.moveaxis(a, (0, 1), ends))

    options |= {"padding": padding, "layout": "channels_first" if first else "channels_last"}
    y = getattr(gpuconv, name)(image(x), weights(w), b, **options)
    needs = "xw" if b is None else "xwb"
    got = getattr(gpuconv, f"{name}_backward")(
        image(dy), image(x), weights(w), needs=needs, **options
    )
    want = [image(ty.detach().numpy()), image(grads[0]), weights(grads[1]), *grads[2:]]
    error = max(
        float(np.abs(a - c).max() / max(1.0, np.abs(c).max())) if a.shape == c.shape else np.inf
        for a, c in zip((y, *(g for g in got if g is not None)), want, strict=True)
    )
    return f"{name} {'complex' if is_complex == 2 else 'real'} seed {seed} {options}", error


@pytest.mark.parametrize("part", range(6))
def test_random_problems(part: int) -> None:
    pytest.importorskip("torch")
    for seed in range(part, COUNT, 6):
        what, error = compare(seed)
        assert error <= ALLOWED, what


def main() -> None:
    worst: dict[str, tuple[float, int]] = {}
    wrong = 0
    count = int(sys.argv[1])
    for seed in range(1_000_000, 1_000_000 + count):
        what, error = compare(seed)
        kind = " ".join(what.split()[:2])
        most, number = worst.get(kind, (0.0, 0))
        worst[kind] = max(most, error), number + 1
        if not error <= ALLOWED:
            wrong += 1
            print("MISMATCH", what, error)
    for kind, (error, number) in sorted(worst.items()):
        print(f"{kind:28} {number:5} problems, largest error {error:.2e}")
    print(f"{count} problems, {wrong} beyond {ALLOWED}")


if __name__ == "__main__":
    main()
