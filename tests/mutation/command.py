"""Which mutants run, what is kept of them, and what is printed."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpuconv.cuda import kernels
from tests.mutation import survivors
from tests.mutation.checks import Check, checks
from tests.mutation.rules import Mutant, mutants
from tests.mutation.survey import Launch, chosen, fingerprint, survey
from tests.mutation.trial import Outcome, Runner

__all__ = ["Score", "main", "scored"]

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ROOT / "build" / "mutation"
LEAST = 0.95

#: How kernels run, on which an outcome depends beside their text and what is launched.
_STAND_IN = (
    "tests/cuda_on_cpu/runtime/**/*",
    "tests/cuda_on_cpu/build.py",
    "tests/cuda_on_cpu/launch.py",
)

#: How checks compare, and what is watched: what no check noticed is tried again when these change.
_CHECKS = ("tests/mutation/checks.py", "tests/mutation/trial.py")


def _digest(parts: Iterable[str | bytes]) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(b"\0")
    return made.hexdigest()[:20]


def _contents(patterns: Sequence[str]) -> list[bytes]:
    files = {
        f for p in patterns for f in ROOT.glob(p) if f.is_file() and "__pycache__" not in f.parts
    }
    return [f.read_bytes() for f in sorted(files)]


class Kept:
    """What became of a file's mutants in runs before, on disk.

    What was caught stays so as long as the check that noticed it launches the same kernels with
    the same arguments, whatever else is added; what survived is tried again when there are other
    checks.

    Parameters
    ----------
    file : str
    sources : sequence of str
        What includes it, or itself.
    prints : dict of str to str
        The fingerprints of what checks launch.
    folder : Path
    details : sequence of str
        What tells the checks of the file from other ones.
    """

    def __init__(
        self,
        file: str,
        sources: Sequence[str],
        prints: dict[str, str],
        folder: Path,
        details: Sequence[str] = (),
    ) -> None:
        texts = [kernels.read(f) for f in sorted(sources)]
        self._place = folder / f"{file}-{_digest([*texts, *_contents(_STAND_IN)])}.jsonl"
        self._prints = prints
        self._all = _digest([*sorted(details), *_contents(_CHECKS)])

    def read(self) -> dict[str, Outcome]:
        """Return the outcomes by the mutants' keys; of some for one, the last."""
        found: dict[str, Outcome] = {}
        if self._place.exists():
            for line in self._place.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # cut off when the run was
                    continue
                outcome = Outcome(**row["outcome"])
                if row["launches"] == self._launches(outcome):
                    found[row["key"]] = outcome
        return found

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Append one."""
        self._place.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "key": mutant.key, "launches": self._launches(outcome), "outcome": asdict(outcome),
        }  # fmt: skip
        with open(self._place, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _launches(self, outcome: Outcome) -> str:
        """Return the fingerprint of what an outcome rests on."""
        if outcome.status == "no build":
            return ""
        return self._prints.get(outcome.check, "") if outcome.status == "caught" else self._all


@dataclass
class Score:
    """The count of a file."""

    file: str
    counts: Counter[str] = field(default_factory=Counter)
    survived: list[Mutant] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def judged(self) -> int:
        """Mutants that change what is computed, as far as is known."""
        return self.counts["caught"] + self.counts["survived"]

    @property
    def share(self) -> float:
        """Of those, the part that was caught."""
        return self.counts["caught"] / self.judged if self.judged else 1.0

    def row(self) -> str:
        """Return a line of the table."""
        c = self.counts
        share = f"{100 * self.share:.1f} %" if self.judged else "-"
        return (
            f"{self.file:28}{self.judged:>8}{c['caught']:>8}{c['survived']:>9}{share:>9}"
            f"{c['same code'] + c['listed']:>12}{c['unseen']:>8}{c['no build']:>10}"
        )


HEADER = (
    f"{'file':28}{'changes':>8}{'caught':>8}{'survived':>9}{'score':>9}{'equivalent':>12}"
    f"{'unseen':>8}{'no build':>10}"
)


def scored(
    file: str, found: Iterable[tuple[Mutant, Outcome]], entries: Sequence[survivors.Entry]
) -> Score:
    """Return the score of a file; what ``survivors.toml`` lists counts as equivalent."""
    score = Score(file)
    for mutant, outcome in found:
        entry = next((e for e in entries if e.fits(mutant)), None)
        status = outcome.status
        if status == "survived" and entry is not None:
            status = "listed"
        elif status == "survived":
            score.survived.append(mutant)
        elif status == "caught" and entry is not None:
            score.wrong.append(
                f"{entry}: listed as making no difference, noticed by {outcome.check}"
            )
        score.counts[status] += 1
    return score


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    add = parser.add_argument
    add("--file", action="append", metavar="NAME", help="of kernels/; may be repeated")
    add("--sample", type=int, metavar="N", help="at most so many changes of each file")
    add("--seed", type=int, default=0, metavar="N", help="of the sample (0)")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="at once; one a core")
    add("--engines", metavar="LIST", help="only the checks of these; all of them")
    add("--most-checks", type=int, metavar="N", help="try each file on its first N checks only")
    add(
        "--least",
        type=float,
        default=LEAST,
        metavar="X",
        help=f"score that each file is to reach ({LEAST})",
    )
    add("--kept", type=Path, default=KEPT, metavar="DIR", help="where outcomes are kept")
    add("--verbose", action="store_true", help="print every change with what became of it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return 0 where the score is reached, 1 where not, 2 where the question is wrong."""
    args = _arguments(arguments)
    names = sorted(p.name for p in kernels.folder().iterdir() if p.suffix in (".cu", ".cuh"))
    unknown = set(args.file or ()) - set(names)
    if unknown:
        print(
            f"no file of kernels/ is called {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
        return 2
    pools = {n: mutants(n, (kernels.folder() / n).read_text(encoding="utf-8")) for n in names}
    entries = survivors.load()
    lost = survivors.unfit(entries, [m for pool in pools.values() for m in pool])
    for entry in lost:
        print(f"survivors.toml: nothing fits {entry}")
    every = checks(args.engines.split(",") if args.engines else None)
    launches = survey(every)
    scores = []
    for name in args.file or names:
        pool = pools[name]
        if args.sample is not None and len(pool) > args.sample:
            drawn = random.Random(f"{args.seed} {name}").sample(range(len(pool)), args.sample)
            pool = [pool[i] for i in sorted(drawn)]
        score = _file(name, pool, every, launches, entries, args)
        scores.append(score)
        print(f"{HEADER}\n{score.row()}" if len(scores) == 1 else score.row(), flush=True)
    total = Score("all")
    for score in scores:
        total.counts += score.counts
    print(total.row())
    for score in scores:
        for mutant in score.survived:
            print(f"survived  {mutant}\n          {mutant.code}")
        for line in score.wrong:
            print(f"survivors.toml: {line}")
    if lost or any(score.wrong for score in scores):
        return 1
    low = [score for score in scores if score.share < args.least]
    for score in low:
        print(f"{score.file}: {100 * score.share:.1f} %, below {100 * args.least:g} %")
    return 1 if low else 0


def _file(
    name: str,
    pool: Sequence[Mutant],
    every: Sequence[Check],
    launches: dict[str, tuple[Launch, ...]],
    entries: Sequence[survivors.Entry],
    args: argparse.Namespace,
) -> Score:
    """Try the mutants of a file, but for those that are known from before."""
    mine = chosen(name, every, launches)
    sources = {name} | {
        one.files[0] for c in every for one in launches[c.name] if name in one.files
    }
    prints = {c.name: fingerprint(launches[c.name]) for c in every}
    details = [f"{c.name} {prints[c.name]} {c.detail}" for c in mine]
    kept = Kept(name, sorted(sources), prints, args.kept / (args.engines or "all"), details)
    known = kept.read()
    found = [(m, known[m.key]) for m in pool if m.key in known]
    rest = [m for m in pool if m.key not in known]
    rest.sort(key=lambda m: any(e.fits(m) for e in entries))  # these take all checks: last
    began = time.monotonic()
    kills = Counter(o.check for o in known.values())
    runner = Runner(launches, max(1, args.jobs), kills)
    for mutant, outcome in runner.run(rest, mine[: args.most_checks]) if rest else ():
        found.append((mutant, outcome))
        # Fewer checks than all of them notice less: what they do not notice is open still.
        if (
            args.most_checks is None
            or args.most_checks >= len(mine)
            or outcome.status in ("caught", "no build")
        ):
            kept.add(mutant, outcome)
        if args.verbose:
            print(f"{outcome.status:9} {mutant}  [{outcome.check} {outcome.how}]", flush=True)
        elif time.monotonic() - began > 30:
            began = time.monotonic()
            print(f"  {name}: {len(found)} of {len(pool)}", flush=True)
    return scored(name, found, entries)
