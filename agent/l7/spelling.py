"""Patterns of policies as matchers of Envoy that hold whatever way a caller spells a path, a host or a header. Pure, used by `agent.l7.rbac`.

What a policy says is compared with text that servers read in more than one way. So each pattern has two forms: a *wide* one matches if any usual reading
fits, for what forbids (DENY, AUDIT, and `not...` of ALLOW), a narrow one only if every reading does, for what permits. Patterns are Istio's: exact, one "*"
at the start or at the end, or "*" alone.

Paths: Envoy has resolved dot segments (also "/..;/"), merged slashes, decoded what needs no escape and redirected escaped slashes before (seen with 1.40;
`agent.l7.listeners.manager`). What is left are path parameters, which servlets take away before they look (RFC 3986, 3.3; Jakarta Servlet 6.0, 3.5), and
escapes of reserved characters, of which %3b may begin a parameter. A dot segment with a parameter ("/x/..%3b/admin") is one to some servers, and which
path that makes is theirs to say: it fits everything that forbids, and nothing that permits a part of the paths. Case matters (RFC 3986, 6.2.2.1). Hosts:
case, port, a final dot, and several Host headers, which Envoy joins with a comma as it does with all headers that are there more than once (RFC 9110, 5.3).
"""

from __future__ import annotations

import re

from envoy.config.rbac.v3 import rbac_pb2
from envoy.type.matcher.v3 import path_pb2, regex_pb2, string_pb2

_UNRESERVED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")
_PARAMETER = "(?:;|%3[bB])[^/]*"
_IN_NAME = "(?:[^/;%]|%(?:[0-24-9A-Fa-f][0-9A-Fa-f]|3[0-9AaC-Fc-f]))*"
"""Part of a segment without a parameter: escapes are whole, and none is %3b."""
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


def string(pattern: str) -> string_pb2.StringMatcher:
    """Match text that has one spelling only."""
    if pattern == "*":
        return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=".+"))
    if pattern.endswith("*"):
        return string_pb2.StringMatcher(prefix=pattern[:-1])
    if pattern.startswith("*"):
        return string_pb2.StringMatcher(suffix=pattern[1:])
    return string_pb2.StringMatcher(exact=pattern)


def path(pattern: str, *, wide: bool) -> rbac_pb2.Permission:
    """Match a normalized path without its query (Envoy, PathMatcher)."""
    pattern = plain(pattern)
    fits = _path(_readings(pattern, wide=wide))
    if pattern in ("*", "/*") or not (wide or "*" in pattern):
        return fits
    if wide:
        return rbac_pb2.Permission(or_rules=rbac_pb2.Permission.Set(rules=[fits, _HIDDEN]))
    return rbac_pb2.Permission(and_rules=rbac_pb2.Permission.Set(rules=[fits, rbac_pb2.Permission(not_rule=_HIDDEN)]))


def _path(matcher: string_pb2.StringMatcher) -> rbac_pb2.Permission:
    return rbac_pb2.Permission(url_path=path_pb2.PathMatcher(path=matcher))


def _readings(pattern: str, *, wide: bool) -> string_pb2.StringMatcher:
    """Match a path whose segments may have parameters and escapes."""
    if pattern == "*":
        return string(pattern)
    if wide:
        start, end = pattern.startswith("*"), pattern.endswith("*")
        literal = _any_spelling(pattern[start : len(pattern) - end])
        return _regex(f"{'.*' if start else ''}{literal}{'.*' if end else f'(?:{_PARAMETER})?'}")
    if pattern.startswith("*") and not pattern.startswith("*/"):
        return _regex(f"(?:.*/)?{_IN_NAME}{re.escape(pattern[1:])}")  # "/admin;.css" and "/admin%3b.css" are no ".css"
    return string(pattern)


def host(pattern: str, *, wide: bool) -> string_pb2.StringMatcher:
    """Match :authority whatever its case, port or final dot. Wide: any of several Host headers; narrow: there must be one."""
    tail = r"\.?(:[0-9]+)?"
    if pattern == "*":
        return _regex(".+" if wide else "[^,]+")
    if pattern.endswith("*"):
        one = re.escape(pattern[:-1]) + "[^,]*"
    elif pattern.startswith("*"):
        one = "[^,]*" + re.escape(pattern[1:]) + tail
    else:
        one = re.escape(pattern) + tail
    return _regex("(?i)" + (f"(?:.*,)?\\s*{one}\\s*(?:,.*)?" if wide else one))


def header(pattern: str, *, wide: bool) -> string_pb2.StringMatcher:
    """Match a header's value. Wide: as a whole or any element of a list, which is also what a header that is there twice becomes."""
    if pattern == "*" or not wide:
        return string(pattern)
    start, end = pattern.startswith("*"), pattern.endswith("*")
    one = f"{'.*' if start else ''}{re.escape(pattern[start : len(pattern) - end])}{'.*' if end else ''}"
    return _regex(f"(?:.*,\\s*)?{one}(?:\\s*,.*)?")


def _regex(expression: str) -> string_pb2.StringMatcher:
    return string_pb2.StringMatcher(safe_regex=regex_pb2.RegexMatcher(regex=expression))


_HIDDEN = _path(_regex(rf".*/\.{{1,2}}{_PARAMETER}(?:/.*)?"))


def plain(pattern: str) -> str:
    """The pattern as Envoy spells paths: nothing escaped that needs no escape, everything else as it is, non-ASCII escaped."""

    def decoded(match: re.Match[bytes]) -> bytes:
        character = bytes.fromhex(match[1].decode()).decode("latin-1")
        return character.encode() if character in _UNRESERVED else match[0]

    raw = b"".join(bytes([byte]) if byte < 0x80 else b"%%%02X" % byte for byte in pattern.encode())
    return _ESCAPE.sub(decoded, raw).decode("ascii")


def _any_spelling(literal: str) -> str:
    """A regular expression for a literal part of a path, escaped or not, with or without parameters behind its segments."""
    parts: list[str] = []
    position = 0
    while position < len(literal):
        character = literal[position]
        escape = _ESCAPE.match(literal[position : position + 3].encode("ascii"))
        if escape:
            byte = int(escape[1], 16)
            parts.append(_byte(byte) if 0x20 < byte < 0x7F else _hex(byte))
            position += 3
            continue
        if character == "/":
            parts.append(f"{f'(?:{_PARAMETER})?' if position else ''}(?:/{_PARAMETER})*/")
        else:
            parts.append(re.escape(character) if character in _UNRESERVED else _byte(ord(character)))
        position += 1
    return "".join(parts)


def _byte(byte: int) -> str:
    return f"(?:{re.escape(chr(byte))}|{_hex(byte)})"


def _hex(byte: int) -> str:
    """An escaped byte, in either case."""
    return "%" + "".join(digit if digit.isdigit() else f"[{digit.lower()}{digit}]" for digit in f"{byte:02X}")
