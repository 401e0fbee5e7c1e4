"""kernels/README.md: every kernel file has its place in it, and every file it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
FILES = sorted(p.name for p in KERNELS.iterdir() if p.suffix in (".cu", ".cuh"))


def named() -> set[str]:
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    return set(re.findall(r"\]\(([^)#]+)\)", text))


def test_every_kernel_file_is_in_it() -> None:
    assert set(FILES) - named() == set()


def test_every_file_it_names_is_there() -> None:
    for target in named():
        assert (KERNELS / target).exists(), target
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.\w+)`", text):
        assert any((place / name).exists() for place in (KERNELS, KERNELS.parent)), name


def test_the_steps_are_in_order_and_each_has_its_idea_and_its_bytes() -> None:
    text = (KERNELS / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    sections = re.findall(r"^## (\d+)\. ", text, re.M)
    assert [int(n) for n in sections] == [int(row[0]) for row in rows]
    for row in rows:
        assert len(row) == 4
        assert all(len(cell) > 10 for cell in row[1:]), row
        assert re.search(r"\d", row[3]), row


@pytest.mark.parametrize("file", FILES)
def test_every_file_opens_with_what_it_is(file: str) -> None:
    first = (KERNELS / file).read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r"// \S.{20,}", first), first
