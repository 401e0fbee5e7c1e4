"""CUDA C++ taken apart: just enough to change it by rule.

Comments, strings and preprocessor lines are stepped over, but for the bodies of ``#define``,
which are code. The project's formatting tells a binary operator from a pointer or a template's
brackets: a binary operator has white space on both sides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Token", "closing", "opening", "tokenise"]

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|\\\n|\s+)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[a-zA-Z]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<mark><<=|>>=|\.\.\.|->|::|\+\+|--|\#\#|[-+*/%&|^<>=!]=|&&|\|\||<<|>>|[^\w\s])""",
    re.VERBOSE | re.DOTALL,
)
#: From the # to the end of the line, lines that end in a backslash included.
_DIRECTIVE = re.compile(r"[ \t]*#[ \t]*(\w*)((?:\\\n|[^\n])*)")
_DEFINE = re.compile(r"[ \t]*#[ \t]*define[ \t]+\w+(?:\([^)]*\))?")


@dataclass(frozen=True)
class Token:
    """A word of the source.

    Attributes
    ----------
    kind : {"text", "number", "name", "mark"}
    text : str
    start, end : int
        Where it is.
    line : int
        From 1.
    spaced : bool
        Whether white space stands on both sides.
    """

    kind: str
    text: str
    start: int
    end: int
    line: int
    spaced: bool


def _directives(source: str) -> list[tuple[int, int]]:
    """Return the stretches of preprocessor lines that are no code."""
    found = []
    position = 0
    while position < len(source):
        end = source.find("\n", position)
        end = len(source) if end < 0 else end
        match = _DIRECTIVE.match(source, position)
        if match is None:
            position = end + 1
            continue
        define = _DEFINE.match(source, position)
        found.append((match.start(), define.end() if define else match.end()))
        position = match.end() + 1
    return found


def tokenise(source: str) -> list[Token]:
    """Return the words of the code."""
    skipped = _directives(source)
    tokens: list[Token] = []
    position, line = 0, 1
    stretch = iter([*skipped, (len(source) + 1, len(source) + 1)])
    begin, end = next(stretch)
    while position < len(source):
        if position >= begin:
            line += source.count("\n", position, end)
            position = end
            begin, end = next(stretch)
            continue
        match = _TOKEN.match(source, position)
        if match is None:
            raise ValueError(f"line {line}: cannot be read: {source[position : position + 20]!r}")
        stop = match.end()
        if match.lastgroup == "skip" and begin < stop:
            stop = begin  # white space before a directive; comments hold none
            if source[position:begin].strip():
                # A comment that holds what looks like a directive.
                while begin < match.end():
                    begin, end = next(stretch)
                stop = match.end()
        if match.lastgroup != "skip":
            around = source[position - 1 : position] + source[stop : stop + 1]
            spaced = len(around) == 2 and around.isspace()
            kind = str(match.lastgroup)
            tokens.append(Token(kind, match[0], position, stop, line, spaced))
        line += source.count("\n", position, stop)
        position = stop
    return tokens


_OPEN, _CLOSE = "([{", ")]}"


def closing(tokens: list[Token], at: int) -> int | None:
    """Return the index of the bracket that closes the one at ``at``; None if nothing does."""
    depth = 0
    for i in range(at, len(tokens)):
        if tokens[i].kind == "mark" and tokens[i].text in _OPEN:
            depth += 1
        elif tokens[i].kind == "mark" and tokens[i].text in _CLOSE:
            depth -= 1
            if depth == 0:
                return i
    return None


def opening(tokens: list[Token], at: int) -> int | None:
    """Return the index of the bracket that the one at ``at`` closes; None if nothing is."""
    depth = 0
    for i in range(at, -1, -1):
        if tokens[i].kind == "mark" and tokens[i].text in _CLOSE:
            depth += 1
        elif tokens[i].kind == "mark" and tokens[i].text in _OPEN:
            depth -= 1
            if depth == 0:
                return i
    return None
