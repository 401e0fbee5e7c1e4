"""The mutation run itself: what it changes, how it counts, and a small sample of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuconv.cuda import kernels
from tests.cuda_on_cpu import compiler_available
from tests.mutation import survey, survivors
from tests.mutation.checks import Check, checks
from tests.mutation.command import Kept, scored
from tests.mutation.rules import Mutant, mutants
from tests.mutation.survey import Launch, chosen, fingerprint
from tests.mutation.tokens import tokenise
from tests.mutation.trial import Outcome

ROOT = Path(__file__).parents[1]
SOURCES = {
    p.name: p.read_text(encoding="utf-8")
    for p in sorted(kernels.folder().iterdir())
    if p.suffix in (".cu", ".cuh")
}


# -------------------------------------------------------------------------------- the words


def test_words_lines_and_what_is_skipped() -> None:
    source = """// a < b
#if N > 2
#define ROW(i) (i < 2 \\
                  + 1)
#endif
/* c
< d */ x = "e < f" + 0x1fu; y<<=2;
"""
    found = [(t.text, t.line) for t in tokenise(source)]
    assert found == [
        ("(", 3), ("i", 3), ("<", 3), ("2", 3), ("+", 4), ("1", 4), (")", 4),
        ("x", 7), ("=", 7), ('"e < f"', 7), ("+", 7), ("0x1fu", 7), (";", 7),
        ("y", 7), ("<<=", 7), ("2", 7), (";", 7),
    ]  # fmt: skip


@pytest.mark.parametrize("file", SOURCES)
def test_every_kernel_can_be_taken_apart(file: str) -> None:
    source = SOURCES[file]
    for token in tokenise(source):
        assert source[token.start : token.end] == token.text
        assert token.line == source.count("\n", 0, token.start) + 1
    for mutant in mutants(file, source):
        changed = mutant.apply(source)
        assert changed != source
        assert changed.count("\n") == source.count("\n"), mutant
        assert source.splitlines()[mutant.line - 1].rstrip("\\").strip() == mutant.code


# -------------------------------------------------------------------------------- the rules

RULES = [
    ("if (i < n) x;", "comparison", {"if (i <= n) x;", "if (i > n) x;"}),
    ("a = b == c;", "comparison", {"a = b != c;"}),
    ("template <int N> T f(Sum<T> x);", "comparison", set()),
    ("a = b - c;", "arithmetic", {"a = b + c;"}),
    ("s += x;", "arithmetic", {"s -= x;"}),
    ("T* p = &q;", "arithmetic", set()),
    ("a = b * c % d;", "arithmetic", {"a = b + c % d;", "a = b * c / d;"}),
    ("a = b << 2 ^ c;", "bits", {"a = b >> 2 ^ c;", "a = b << 2 | c;"}),
    ("a = b && c;", "and/or", {"a = b || c;"}),
    (
        "if (a < 0 || f(b, c) >= n) x;", "test dropped",
        {"if (false || f(b, c) >= n) x;", "if (a < 0 || false) x;"},
    ),
    ("y = a && b[i] ? c : d;", "test dropped", {"y = true && b[i] ? c : d;", "y = a && true ? c : d;"}),
    ("if (i < n) x;", "condition", {"if (true) x;", "if (false) x;"}),
    ("if constexpr (N) x;", "condition", {"if constexpr (true) x;", "if constexpr (false) x;"}),
    ("x; __syncthreads(); y;", "barrier dropped", {"x; (void)0; y;"}),
    ("{ copy_async_wait<N - 1>(); }", "barrier dropped", {"{ (void)0; }"}),
    ("void copy_async_commit() { x; }", "barrier dropped", set()),
    ("for (;;) { continue; }", "jump dropped", {"for (;;) { ; }"}),
    (
        "atomicAdd(&y[f(a, b)], v * w);", "atomic dropped",
        {"*(&y[f(a, b)]) += (v * w);"},
    ),
    ("y = x[i];", "index", {"y = x[(i) + 1];"}),
    ("float x[8], z[8];", "index", set()),
    ("__shared__ Sum<T> x[8][9];", "index", set()),
    ("x = y[i][j];", "index", {"x = y[(i) + 1][j];", "x = y[i][(j) + 1];"}),
    ("x = 3 + 1.5f;", "constant", {"x = 4 + 1.5f;", "x = 3 + (1.5f + 1);"}),
    ("float x[8];", "constant", set()),
    ("void __launch_bounds__(256) f();", "constant", set()),
    ("x = -y;", "sign dropped", {"x = y;"}),
    ("if (!y) x;", "sign dropped", {"if (y) x;"}),
    ("x = a - b;", "sign dropped", set()),
    ("i++;", "step", {"i--;"}),
]  # fmt: skip


@pytest.mark.parametrize(("source", "rule", "expected"), RULES)
def test_rules(source: str, rule: str, expected: set[str]) -> None:
    found = {m.apply(source) for m in mutants("f.cu", source) if m.rule == rule}
    assert found == expected


def test_a_change_over_lines_keeps_them_and_their_continuations() -> None:
    source = "#define F(a) if (a < 1 && \\\n    a > b) x;\nif (a <\n    b) y;\n"
    for mutant in mutants("f.cu", source):
        changed = mutant.apply(source)
        assert changed.count("\n") == 4
        assert changed.splitlines()[0].endswith("\\"), mutant


# --------------------------------------------------------------------------- what is counted


def made_up(change: str = "a [< -> <=] b", code: str = "if (a < b) x;") -> Mutant:
    return Mutant("f.cu", 3, "comparison", 0, 1, "x", code, change)


def test_scores() -> None:
    entry = survivors.Entry("f.cu", "if (a < b) x;", "a [< -> <=] b", "the two are never equal")
    outcomes = ["caught"] * 18 + ["same code", "unseen", "no build"]
    found = [(made_up(f"{i}"), Outcome(s)) for i, s in enumerate(outcomes)]
    found += [(made_up(), Outcome("survived")), (made_up("other"), Outcome("survived"))]
    score = scored("f.cu", found, [entry])
    assert (score.judged, score.share) == (19, 18 / 19)
    assert [m.change for m in score.survived] == ["other"]
    assert score.wrong == []
    assert re.findall(r"[\d.]+", score.row().removeprefix("f.cu")) == [
        "19",
        "18",
        "1",
        "94.7",
        "2",
        "1",
        "1",
    ]
    noticed = scored("f.cu", [(made_up(), Outcome("caught", "a check"))], [entry])
    assert "noticed by a check" in noticed.wrong[0]


def test_every_listed_survivor_is_a_change_of_its_file() -> None:
    entries = survivors.load()
    assert entries
    assert survivors.unfit(entries, [m for f, s in SOURCES.items() for m in mutants(f, s)]) == []
    gone = survivors.Entry("common.cuh", "x = y;", "x [< -> <=] y", "it is not there")
    assert survivors.unfit([*entries, gone], []) == [*entries, gone]


def test_of_changes_that_read_the_same_some_may_be_listed(tmp_path: Path) -> None:
    source = "s = S(0), t = S(0);\nu = S(0);\ns = S(0), t = S(0);\n"
    found = [m for m in mutants("f.cu", source) if m.rule == "constant"]
    assert [(m.line, m.number) for m in found] == [(1, 1), (1, 2), (2, 1), (3, 3), (3, 4)]
    file = tmp_path / "survivors.toml"
    text = (
        '[[survivor]]\nfile = "f.cu"\ncode = "s = S(0), t = S(0);"\nchange = "( [0 -> 1] )"\n'
        'reason = "nobody reads it"\nnumbers = '
    )
    file.write_text(text + "[2, 3]\n")
    (entry,) = survivors.load(file)
    assert [entry.fits(m) for m in found] == [False, True, False, True, False]
    assert survivors.unfit([entry], found) == []
    file.write_text(text + "[4, 5]\n")  # there is no fifth
    assert survivors.unfit(survivors.load(file), found) == survivors.load(file)


def test_a_listed_survivor_has_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "survivors.toml"
    file.write_text('[[survivor]]\nfile = "a"\ncode = "b"\nchange = "c"\nreason = "equivalent"\n')
    with pytest.raises(ValueError, match="a reason are needed"):
        survivors.load(file)


def test_outcomes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run was cut off; each as long as what it rests on stays the same."""

    def kept(checks: dict[str, str], details: tuple[str, ...] = ()) -> Kept:
        return Kept("common.cuh", ["conv_atomic.cu"], checks, tmp_path, details)

    first = kept({"a": "1"})
    first.add(made_up("one"), Outcome("caught", "a", "how", 1.0))
    other = Mutant("f.cu", 3, "index", 5, 6, "y", "", "")
    first.add(other, Outcome("survived"))
    (file,) = tmp_path.iterdir()
    with file.open("a") as stream:
        stream.write('{"key": "0:9:cut o')
    assert kept({"a": "1"}).read() == {
        made_up().key: Outcome("caught", "a", "how", 1.0), other.key: Outcome("survived"),
    }  # fmt: skip
    # Another check may notice what survived; a check that launches something else says nothing.
    assert set(kept({"a": "1", "b": "1"}, ("b 1",)).read()) == {made_up().key}
    assert set(kept({"a": "2"}, ("a 2",)).read()) == set()
    monkeypatch.setattr("tests.mutation.command._CHECKS", ("tests/mutation/rules.py",))
    assert set(kept({"a": "1"}).read()) == {made_up().key}
    monkeypatch.setattr(kernels, "read", lambda f: "changed")
    assert kept({"a": "1"}).read() == {}


def test_what_a_check_launches_has_a_fingerprint() -> None:
    one = Launch(("a.cu",), ("-DN=1",), "k", "(1,) (32,) ['float32(2, 3)(12, 4)'] 0")
    assert fingerprint([one]) == fingerprint([one])
    for name, value in (("files", ("b.cu",)), ("options", ()), ("kernel", "l"), ("call", "")):
        assert fingerprint([one]) != fingerprint([replace(one, **{name: value})])  # type: ignore[arg-type]


def test_checks_are_chosen_by_topic_and_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_words", lambda file: {"N"})

    def launch(*options: str, kernel: str = "k") -> tuple[Launch, ...]:
        return (Launch(("a.cu", "common.cuh"), options, kernel),)

    launches = {
        "1": launch("-DN=1"), "2": launch("-DN=1"), "3": launch("-DN=2"), "4": launch("-DN=2"),
        "5": launch("-DN=1", kernel="other"), "6": (Launch(("b.cu",), ("-DN=9",), "b"),),
        "7": launch("-DN=3") + launch("-DN=4", kernel="third"), "8": launch("-DM=1"),
    }  # fmt: skip
    every = [Check(n, t, str) for n, t in zip("12345678", "xxxyyzxx", strict=True)]
    # What adds most comes first.
    assert [c.name for c in chosen("a.cu", every, launches)] == ["7", "5", "3", "1", "4"]
    assert [c.name for c in chosen("common.cuh", every, launches)] == ["7", "5", "3", "1", "4"]
    assert [c.name for c in chosen("b.cu", every, launches)] == ["6"]


@pytest.mark.skipif(compiler_available() is not None, reason="needs a C++ compiler")
def test_what_is_made_for_one_architecture_is_reached_there() -> None:
    """Each such check launches it; maps of memory that lies elsewhere make no other fingerprint."""
    made = [c for c in checks(["cuda_tensor_core"]) if "/wgmma-" in c.name]
    first, second = survey.survey(made), survey.survey(made)
    kinds = set()
    for check in made:
        (one, *rest) = first[check.name]
        assert one.files[0] == "conv_wgmma.cu", check.name
        assert {"wgmma.cuh", "tma.cuh"} < set(one.files)
        assert all(other.files[0] == "split_sum.cu" for other in rest)
        assert fingerprint(first[check.name]) == fingerprint(second[check.name])
        kinds.add(re.sub(r"_\d+x\d+$", "", one.kernel))
    assert len({fingerprint(v) for v in first.values()}) == len(made)
    passes = ("forward", "input_grad", "weight_grad")
    every = {f"conv_{p}_wgmma_{d}" for p in passes for d in ("f16", "bf16", "tf32")}
    assert kinds == every - {"conv_weight_grad_wgmma_tf32"}


# ------------------------------------------------------------------------------ a real sample


def command(*arguments: str, kept: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.mutation", "--kept", str(kept), *arguments], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def compiler(request: pytest.FixtureRequest) -> None:
    if "tmp_path" in request.fixturenames and compiler_available():
        pytest.skip(str(compiler_available()))


def test_a_sample_of_a_kernel(tmp_path: Path) -> None:
    sample = (
        "--engines", "cuda_atomic", "--file", "conv_atomic.cu", "--sample", "4", "--seed", "3",
        "--most-checks", "10",
    )  # fmt: skip
    done = command(*sample, "--verbose", kept=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    caught = re.findall(r"^caught +conv_atomic.cu:\d+: .* \[cuda_atomic/", done.stdout, re.M)
    assert len(caught) >= 3, done.stdout
    again = command(*sample, kept=tmp_path)
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    assert "caught  " not in again.stdout.replace(done.stdout.splitlines()[-3], "")


def test_a_wrong_name_and_a_score_that_is_not_reached(tmp_path: Path) -> None:
    done = command("--file", "nothing.cu", kept=tmp_path)
    assert done.returncode == 2
    assert "no file of kernels/ is called nothing.cu; there are " in done.stdout
    done = command(
        "--engines", "cuda_atomic", "--file", "batch_norm.cu", "--sample", "1", "--most-checks", "1", "--least", "1.1",
        kept=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "below 110 %" in done.stdout
    kept = [line for f in tmp_path.rglob("*.jsonl") for line in f.read_text().splitlines()]
    assert not any('"survived"' in line for line in kept)  # by one check of many


def test_what_never_ends_and_what_crashes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of this process: one computes for ever, one kills itself, one passes, one fails."""
    from tests.mutation import trial

    monkeypatch.setattr(trial, "CPU_LIMIT", 0.3)
    what: dict[str, Any] = {
        "endless": lambda: [None for _ in iter(int, 1)],
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "passes": lambda: None,
        "fails": lambda: 1 / 0,
    }
    text = SOURCES["common.cuh"]
    at = text.index("typedef int Index;")
    mutant = Mutant("common.cuh", 1, "made up", at, at + 11, "typedef long", "", "")
    launch = Launch(("conv_atomic.cu", "common.cuh"), ("-std=c++17", *DEFINES), "k")
    for name, call in what.items():
        check = Check(name, "x", call)
        runner = trial.Runner({name: (launch,)}, 1)
        runner._sound.add(name)
        ((found, outcome),) = runner.run([mutant], [check])
        assert found is mutant
        if name == "passes":
            assert outcome.status == "survived"
        else:
            assert (outcome.status, outcome.check) == ("caught", name)
            words = {"endless": "no end", "crash": "crashed (-11)", "fails": "ZeroDivisionError"}
            assert words[name] in outcome.how
    # A change that this variant does not compile, and one that compiles to the same.
    unseen = text.index("typedef long long Index;")
    same = text.index("typedef T type;")
    for start, old, new, status in (
        (unseen, "typedef long long", "typedef short", "unseen"),
        (same, "typedef T type;", "typedef T   type, other;", "same code"),
        (same, "typedef T type;", "typedef nothing type;", "no build"),
    ):
        mutant = Mutant("common.cuh", 1, "made up", start, start + len(old), new, "", "")
        builds = lambda: kernels_built()  # noqa: E731
        runner = trial.Runner({"builds": (launch,)}, 1)
        ((_, outcome),) = runner.run([mutant], [Check("builds", "x", builds)])
        assert outcome.status == status, outcome


DEFINES = tuple(
    f"-D{n}={v}"
    for n, v in (
        ("DTYPE_F32", 1), ("NDIM", 1), ("KD", 1), ("KH", 1), ("KW", 2), ("SD", 1), ("SH", 1), ("SW", 1),
        ("DD", 1), ("DH", 1), ("DW", 1), ("CHANNELS_FIRST", 0), ("ACT", 0),
    )
)  # fmt: skip


def kernels_built() -> None:
    from tests.cuda_on_cpu import build

    build.kernel_library(kernels.read("conv_atomic.cu"), ("-std=c++17", *DEFINES), "checked")


def test_what_does_not_build_for_a_later_check() -> None:
    """The look at the machine code, after some checks, compiles what none of them has."""
    from tests.mutation import trial

    if compiler_available():
        pytest.skip(str(compiler_available()))
    at = SOURCES["common.cuh"].index("typedef T type;")
    mutant = Mutant("common.cuh", 1, "made up", at, at + 15, "typedef no type;", "", "")
    launch = Launch(("conv_atomic.cu", "common.cuh"), ("-std=c++17", *DEFINES), "k")
    made = [Check(f"{i}", "x", lambda: None) for i in range(trial.PATIENCE)]
    made.append(Check("builds", "x", lambda: kernels_built()))
    ((_, outcome),) = trial.Runner({c.name: (launch,) for c in made}, 1).run([mutant], made)
    assert outcome.status == "no build", outcome


def test_what_does_not_build_is_not_done_in_another_way(tmp_path: Path) -> None:
    """Without its kernels for one architecture the engine uses others; a check may not."""
    from tests.mutation import trial

    (check,) = (c for c in checks(["cuda_tensor_core"]) if c.name.endswith("wgmma-small-y"))
    text = SOURCES["conv_wgmma.cu"]
    at = text.index("const int ROW = 128;")
    for new, status in (("const int ROW = no;", "no build"), ("const int ROW = 64; ", "caught")):
        mutant = Mutant("conv_wgmma.cu", 1, "made up", at, at + 20, new, "", "")
        runner = trial.Runner(survey.survey([check]), 1)
        ((_, outcome),) = runner.run([mutant], [check])
        assert outcome.status == status, outcome


def test_a_check_that_fails_on_sound_kernels_is_an_error(tmp_path: Path) -> None:
    from tests.mutation import trial

    text = SOURCES["common.cuh"]
    at = text.index("typedef int Index;")
    mutant = Mutant("common.cuh", 1, "made up", at, at + 11, "typedef long", "", "")
    launch = Launch(("conv_atomic.cu", "common.cuh"), ("-std=c++17", *DEFINES), "k")
    runner = trial.Runner({"broken": (launch,)}, 1)
    with pytest.raises(RuntimeError, match="broken fails on the kernels as they are: division"):
        list(runner.run([mutant], [Check("broken", "x", lambda: 1 / 0)]))
