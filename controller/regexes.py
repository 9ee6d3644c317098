"""Regular expressions before Envoy sees them. Called by `controller.checks`.

Envoy compiles them with RE2 (https://github.com/google/re2/wiki/Syntax), which matches in linear time but refuses what it has no syntax for, what counts
further than 1,000, and what becomes too large a program; and Envoy refuses a whole RouteConfiguration for one expression. So everything that RE2 would
refuse is refused here, with room to spare: the size is estimated, from above.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Final

MOST_REPEATS: Final = 1000
"""RE2's kMaxRepeat, also of counted repetitions within each other (re2/parse.cc, RepetitionWalker)."""
MOST_STEPS: Final = 10_000
"""Instructions that all expressions of Envoy's are allowed here; RE2's own limit is 8 MB for program and states."""
_ANY: Final = 12  # instructions for any one character of UTF-8
_ESCAPED: Final = r"\\x[0-9a-fA-F]{2}|\\."
_CLASS: Final = r"\[\^?\]?(?:\\.|[^\]\\])*\]"
_OPAQUE = re.compile(f"{_ESCAPED}|{_CLASS}", re.DOTALL)
"""Atoms in which nothing is an operator."""
# What Python's `re` accepts and RE2 does not, where it is an operator.
_NOT_RE2 = re.compile(r"\(\?(?:[=!>(#]|<[=!]|P=|[a-zA-Z]*[auLx])|(?:[*+?]|\{\d+(?:,\d*)?\})\+")
_ESCAPES = frozenset("aAbBdDfnrsStvwWx")
_NAMED = re.compile(r"\[:(\^?\w*):\]", re.ASCII)
_CLASSES = frozenset(
    ["alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space", "upper", "word", "xdigit"]
)


@dataclass(slots=True)
class _Group:
    """What has been read of an open parenthesis: `steps` before its last atom, and of that atom."""

    steps: int = 0
    repeats: int = 1
    atom: int = 0
    atom_repeats: int = 1

    def add(self, steps: int, repeats: int = 1) -> None:
        self.steps += self.atom
        self.repeats = max(self.repeats, self.atom_repeats)
        self.atom, self.atom_repeats = steps, repeats


def problem(text: str) -> str:
    """Return the reason why Envoy would refuse a regular expression, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's doubts about its own future syntax do not concern RE2
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression: {error}"
    escapes = set(re.findall(r"\\([A-Za-z0-9])", re.sub(r"\\\\", "", text)))
    if _NOT_RE2.search(_OPAQUE.sub(".", text)) or escapes & set("123456789"):
        return "look-around, back references and possessive quantifiers do not exist in RE2, which Envoy uses"
    wrong = "" if escapes <= _ESCAPES else f"\\{min(escapes - _ESCAPES)} does not exist"
    if wrong := wrong or next(filter(None, map(_wrong_class, _OPAQUE.findall(text))), ""):
        return f"{wrong} in RE2, which Envoy uses"
    steps, repeats = _measure(text)
    if repeats > MOST_REPEATS:
        return f"repeats more than {MOST_REPEATS} times ({repeats}), which RE2 refuses"
    if steps > MOST_STEPS:
        return f"too large: about {steps} steps when compiled, at most {MOST_STEPS} are allowed"
    return ""


def _wrong_class(atom: str) -> str:
    """What a class of characters holds that Python takes for something else: a backspace, or the name of no class (re2/parse.cc, ParseCharClass)."""
    if not atom.startswith("["):
        return ""
    if r"\b" in re.sub(r"\\\\", "", atom):
        return r"\b does not exist within []"
    return next((f"[:{name}:] does not exist within []" for name in _NAMED.findall(atom) if name.removeprefix("^") not in _CLASSES), "")


_TOKEN = re.compile(_ESCAPED + "|" + _CLASS + r"|\(\?(?:P<\w+>|[a-zA-Z-]*[:)])|\{(\d*)(,?)(\d*)\}|.", re.DOTALL)


def _measure(text: str) -> tuple[int, int]:
    """Return about how many instructions an expression has, from above, and how often its innermost part is counted."""
    groups = [_Group()]
    for token in _TOKEN.finditer(text):
        found, last = token[0], groups[-1]
        if found == "(" or (found.startswith("(?") and not found.endswith(")")):
            groups.append(_Group())
        elif found == ")" and len(groups) > 1:
            last.add(0)
            groups.pop()
            groups[-1].add(last.steps + 2, last.repeats)
        elif found in {"*", "+", "?"}:
            last.atom += 2
        elif found.startswith("{") and (token[1] or token[3]):
            least, most = int(token[1] or 0), int(token[3] or 0)
            count = max(least + (token[2] == "," and not token[3]), most, 1)
            last.atom = (last.atom + 1) * count
            last.atom_repeats *= max(least, most, 1)
        else:
            last.add(_size(found))
    last = groups[0]
    last.add(0)
    return last.steps + 2, last.repeats


def _size(atom: str) -> int:
    if atom.startswith("["):
        return 2 * _ANY + 4 * len(atom)
    if atom in {".", r"\D", r"\S", r"\W"}:
        return _ANY
    return max(4, len(atom.encode()))
