"""The rules: which changes are made of a source.

Each rule looks at the words around one place and yields what could stand there instead. None
looks at what the code means; a change that does not compile is thrown away later.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tests.mutation.tokens import Token, closing, opening, tokenise

__all__ = ["Mutant", "mutants"]


@dataclass(frozen=True)
class Mutant:
    """A change of a source.

    Attributes
    ----------
    file : str
        Name in ``kernels/``.
    line : int
        From 1.
    rule : str
        Which rule it comes from.
    start, end : int
        What is replaced.
    new : str
        By what; it has as many lines.
    code : str
        The line as it is, without white space around it.
    change : str
        Old and new words: ``"i [< -> <=] n"``.
    number : int
        Which it is of its file's changes with the same code and change, from 1.
    """

    file: str
    line: int
    rule: str
    start: int
    end: int
    new: str
    code: str
    change: str
    number: int = 1

    @property
    def key(self) -> str:
        """What tells it from the others of its file."""
        return f"{self.start}:{self.end}:{self.new}"

    def apply(self, source: str) -> str:
        """Return the source with the change."""
        return source[: self.start] + self.new + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.change}"


_COMPARISONS = {
    "<": ("<=", ">"), "<=": ("<", ">"), ">": (">=", "<"), ">=": (">", "<"),
    "==": ("!=",), "!=": ("==",),
}  # fmt: skip
_ARITHMETIC = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "+=": "-=", "-=": "+=", "*=": "+=",
    "/=": "*=",
}  # fmt: skip
_BITS = {"<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "|"}
_LOGIC = {"&&": "||", "||": "&&"}
#: Statements that order threads or wait for copies, by their names.
_ORDERS = re.compile(r"\w*(sync|wait|commit|fence|arrive|barrier)\w*", re.IGNORECASE)
_ATOMICS = {"atomicAdd": "+=", "atomicSub": "-="}
#: What stands in their brackets are no computations.
_NO_CODE = {"__launch_bounds__", "__align__", "alignas", "static_assert", "asm", "volatile"}
_WORDS = {"return", "else", "case", "throw", "new", "delete", "goto", "typedef"}
_ENDS = {"&&", "||", ",", ";", "?", ":", "=", "{", "}", "return"}

Change = tuple[int, int, str]  # from, to (words, inclusive), and the new text
Rule = Callable[[list[Token], int], Iterator[Change]]


def _operator(table: dict[str, str]) -> Rule:
    def rule(tokens: list[Token], at: int) -> Iterator[Change]:
        if tokens[at].spaced and tokens[at].text in table:
            yield at, at, table[tokens[at].text]

    return rule


def _comparison(tokens: list[Token], at: int) -> Iterator[Change]:
    if tokens[at].spaced:
        for new in _COMPARISONS.get(tokens[at].text, ()):
            yield at, at, new


def _operand(tokens: list[Token], at: int) -> Iterator[Change]:
    """One side of && or || left out."""
    if tokens[at].text not in _LOGIC or not tokens[at].spaced:
        return
    neutral = "true" if tokens[at].text == "&&" else "false"
    for step in (-1, 1):
        stop = at + step
        while 0 <= stop < len(tokens) and tokens[stop].text not in _ENDS:
            if tokens[stop].text in ("([", "(", "[") if step > 0 else tokens[stop].text in ")]":
                other = closing(tokens, stop) if step > 0 else opening(tokens, stop)
                if other is None:
                    return
                stop = other
            elif tokens[stop].text in ")]([":
                break
            stop += step
        first, last = (at + 1, stop - 1) if step > 0 else (stop + 1, at - 1)
        if first <= last:
            yield first, last, neutral


def _condition(tokens: list[Token], at: int) -> Iterator[Change]:
    """An ``if`` that is always or never taken."""
    if tokens[at].text != "if":
        return
    at += 2 if at + 1 < len(tokens) and tokens[at + 1].text == "constexpr" else 1
    last = closing(tokens, at) if at < len(tokens) and tokens[at].text == "(" else None
    if last is not None:
        yield at + 1, last - 1, "true"
        yield at + 1, last - 1, "false"


def _order(tokens: list[Token], at: int) -> Iterator[Change]:
    """A barrier or a wait left out."""
    if tokens[at].kind != "name" or not _ORDERS.fullmatch(tokens[at].text):
        return
    if at == 0 or tokens[at - 1].text not in (";", "{", "}", ")", "else"):
        return  # a definition, or part of an expression
    call = at + 1
    if call < len(tokens) and tokens[call].text == "<":  # template arguments
        while call < len(tokens) and tokens[call].text != "(":
            call += 1
    last = closing(tokens, call) if call < len(tokens) and tokens[call].text == "(" else None
    if last is not None and last + 1 < len(tokens) and tokens[last + 1].text == ";":
        yield at, last, "(void)0"


def _jump(tokens: list[Token], at: int) -> Iterator[Change]:
    """A ``continue``, ``break`` or ``return`` of nothing left out."""
    if tokens[at].text in ("continue", "break", "return") and tokens[at + 1].text == ";":
        yield at, at, ""


def _atomic(tokens: list[Token], at: int) -> Iterator[Change]:
    """A plain addition in the place of an atomic one."""
    if tokens[at].text not in _ATOMICS or tokens[at + 1].text != "(":
        return
    last = closing(tokens, at + 1)
    if last is None:
        return
    i = at + 2
    while i < last and tokens[i].text != ",":
        i = (closing(tokens, i) or last) + 1 if tokens[i].text in "([{" else i + 1
    if i < last:
        yield (
            at,
            last,
            f"*(\0{at + 2}:{i - 1}\0) {_ATOMICS[tokens[at].text]} (\0{i + 1}:{last - 1}\0)",
        )


def _is_declared(tokens: list[Token], at: int) -> bool:
    """Return whether a square bracket belongs to a declaration."""
    i = at - 1
    while i > 0 and tokens[i].text == "]":
        i = (opening(tokens, i) or 1) - 1
    before = tokens[i - 1] if i > 0 else None
    if before is None:
        return False
    if before.text == ",":  # a further name of a declaration: float a[4], b[4];
        while i >= 0 and tokens[i].text not in (";", "{", "}", "(", "="):
            i -= 1
        first, second = tokens[i + 1 : i + 3]
        return first.kind == second.kind == "name" and first.text not in _WORDS
    return (
        (before.kind == "name" and before.text not in _WORDS)
        or (before.text == ">" and not before.spaced)
        or (before.text in "*&" and not before.spaced and tokens[i - 2].kind == "name")
    )


def _index(tokens: list[Token], at: int) -> Iterator[Change]:
    """An index shifted by one."""
    if tokens[at].text != "[" or at == 0:
        return
    if tokens[at - 1].kind != "name" and tokens[at - 1].text not in "])":
        return
    last = closing(tokens, at)
    if last is not None and last > at + 1:
        yield at + 1, last - 1, f"(\0{at + 1}:{last - 1}\0) + 1"


def _constant(tokens: list[Token], at: int) -> Iterator[Change]:
    """Another number."""
    token = tokens[at]
    if token.kind != "number":
        return
    if re.fullmatch(r"\d+", token.text):
        yield at, at, str(int(token.text) + 1)
    else:
        yield at, at, f"({token.text} + 1)"


def _sign(tokens: list[Token], at: int) -> Iterator[Change]:
    """A minus or a not left out."""
    token = tokens[at]
    if token.text not in "-!~" or token.spaced or at + 1 >= len(tokens):
        return
    if token.end == tokens[at + 1].start and (
        (tokens[at - 1].kind == "mark" and tokens[at - 1].text not in ")]")
        or tokens[at - 1].text in _WORDS
    ):
        yield at, at, ""


def _step(tokens: list[Token], at: int) -> Iterator[Change]:
    if tokens[at].text in ("++", "--"):
        yield at, at, {"++": "--", "--": "++"}[tokens[at].text]


_RULES: dict[str, Rule] = {
    "comparison": _comparison,
    "arithmetic": _operator(_ARITHMETIC),
    "bits": _operator(_BITS),
    "and/or": _operator(_LOGIC),
    "test dropped": _operand,
    "condition": _condition,
    "barrier dropped": _order,
    "jump dropped": _jump,
    "atomic dropped": _atomic,
    "index": _index,
    "constant": _constant,
    "sign dropped": _sign,
    "step": _step,
}


def _no_code(tokens: list[Token]) -> set[int]:
    """Return the words that are no computations."""
    found: set[int] = set()
    for i, token in enumerate(tokens[:-1]):
        if token.text in _NO_CODE and tokens[i + 1].text == "(":
            found.update(range(i, (closing(tokens, i + 1) or i) + 1))
        if token.text == "[" and i and _is_declared(tokens, i):
            found.update(range(i, (closing(tokens, i) or i) + 1))  # sizes: larger does no harm
    return found


def mutants(file: str, source: str) -> list[Mutant]:
    """Return all changes of a source, in its order."""
    tokens = tokenise(source)
    skipped = _no_code(tokens)
    lines = source.splitlines()
    found: dict[str, Mutant] = {}
    for at in range(len(tokens)):
        if at in skipped:
            continue
        for name, rule in _RULES.items():
            for first, last, new in rule(tokens, at):
                made = _made(file, source, lines, tokens, name, (first, last, new))
                found.setdefault(made.key, made)
    counts: Counter[tuple[str, str]] = Counter()
    numbered = []
    for made in found.values():
        counts[made.code, made.change] += 1
        numbered.append(replace(made, number=counts[made.code, made.change]))
    return numbered


def _made(
    file: str, source: str, lines: list[str], tokens: list[Token], rule: str, change: Change
) -> Mutant:
    first, last, new = change
    start, end = tokens[first].start, tokens[last].end

    def words(match: re.Match[str]) -> str:
        return source[tokens[int(match[1])].start : tokens[int(match[2])].end]

    new = re.sub("\0(\\d+):(\\d+)\0", words, new)
    old = source[start:end]
    # Lines keep their numbers, and macros their continuations.
    missing = old.count("\n") - new.count("\n")
    new += (" \\\n" if "\\\n" in old else "\n") * missing
    before = tokens[first - 1].text if first else ""
    after = tokens[last + 1].text if last + 1 < len(tokens) else ""
    short = [" ".join(t.replace("\\\n", " ").split()) for t in (old, new)]
    text = f"{before} [{short[0]} -> {short[1]}] {after}".strip()
    line = tokens[first].line
    code = lines[line - 1].rstrip("\\").strip()
    return Mutant(file, line, rule, start, end, new, code, text)
