"""Every command and snippet of the README does what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import readme_section, update_readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
    if line.strip()
]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GPUCONV_DEVICE": "cpu"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_something_to_test() -> None:
    assert len(SNIPPETS) == 2
    assert len(COMMANDS) >= 8
    assert {"make train", "make test"} <= set(COMMANDS)


def test_the_call(tmp_path: Path) -> None:
    printed = run([sys.executable, "-c", SNIPPETS[0]], tmp_path)
    assert printed.strip() == "(8, 14, 14, 16) (8, 28, 28, 3) (3, 3, 3, 16) (16,)"
    lines = [x for x in SNIPPETS[0].splitlines() if x.strip() and not x.startswith("import")]
    assert len(lines) <= 10


def test_the_layer_learns(tmp_path: Path) -> None:
    assert float(run([sys.executable, "-c", SNIPPETS[1]], tmp_path)) < 0.5


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("gpuconv")])
def test_the_commands(command: str, tmp_path: Path) -> None:
    run([sys.executable, "-m", *command.split()], tmp_path)
    if " --out " in f"{command} ":
        made = {p.name for p in (tmp_path / "runs" / "readme").iterdir()}
        assert {
            "model.safetensors",
            "metrics.jsonl",
            "curves.png",
            "mistakes.png",
            "config.json",
        } <= made


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_its_targets(command: str, tmp_path: Path) -> None:
    planned = run([*command.split(), "-n", "-C", str(ROOT), "VENV=.venv"], tmp_path)
    assert ("gpuconv train digits" if command == "make train" else "pytest") in planned


def test_every_file_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_engine_is_in_the_table() -> None:
    import gpuconv

    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == {e.name for e in gpuconv.engines()}


def test_the_numbers_are_the_results(tmp_path: Path) -> None:
    """What stands between the marks is what the files of results give, and nothing else."""
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    assert not update_readme(copy, tmp_path / "benchmarks" / "results"), (
        "run python -m benchmarks.readme"
    )


def test_a_section_of_made_up_results(tmp_path: Path) -> None:
    """From a result with one layer twice as fast as PyTorch."""
    (file,) = [
        f
        for f in (ROOT / "benchmarks" / "results").glob("*.json")
        if not f.stem.endswith(("-net", "-layers"))
    ][:1]
    result = json.loads(file.read_text(encoding="utf-8"))
    row = next(r for r in result["rows"] if "seconds" in r["peers"].get("torch", {}))
    row["peers"]["torch"]["seconds"] = 2 * row["peers"]["gpuconv"]["seconds"]
    result["rows"] = [row]
    text = readme_section(result, None, f"benchmarks/results/{file.stem}.md")
    assert re.search(r"\*\*all\*\* +\| 1 +\| 2\.00", text)
    assert result["date"][:10] in text
