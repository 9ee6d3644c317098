"""What a verified token (JWT, RFC 7519) says, as conditions of Envoy's filters. Pure, used by `agent.l7.rbac`.

`agent.l7.jwt` puts the payload into dynamic metadata; a request without a token, or whose token nobody verified, has none there, so that every positive
condition fails and every negative one holds, as in Istio (https://istio.io/latest/docs/reference/config/security/conditions/).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from envoy.config.rbac.v3 import rbac_pb2
from envoy.type.matcher.v3 import metadata_pb2, string_pb2, value_pb2

from agent.l7 import names, spelling
from agent.model import Source

_PRESENT = spelling.string("*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})")


def claim(path: Sequence[str], pattern: str) -> metadata_pb2.MetadataMatcher:
    """Match a claim: a text, a list that has the text, or a number or truth value that is written so."""
    text = value_pb2.ValueMatcher(string_match=spelling.string(pattern))
    choices = [text]
    if pattern in {"true", "false", "*"}:
        choices += [value_pb2.ValueMatcher(bool_match=said) for said in (True, False) if pattern in {"*", str(said).lower()}]
    if _NUMBER.fullmatch(pattern):
        choices.append(value_pb2.ValueMatcher(double_match={"exact": float(pattern)}))
    any_of = [*choices, *(value_pb2.ValueMatcher(list_match=value_pb2.ListMatcher(one_of=one)) for one in choices)]
    return _metadata(path, value_pb2.ValueMatcher(or_match=value_pb2.OrMatcher(value_matchers=any_of)))


def principals(source: Source) -> list[rbac_pb2.Principal]:
    """The conditions of a Source on "ISSUER/SUBJECT": all of them."""
    found = []
    if source.request_principals:
        found.append(_any(map(_principal, source.request_principals)))
    if source.not_request_principals:
        found.append(rbac_pb2.Principal(not_id=_any(map(_principal, source.not_request_principals))))
    return found


def _principal(pattern: str) -> rbac_pb2.Principal:
    """Where the issuer ends is not known, both may hold slashes: each slash of the pattern could be the one."""
    if pattern == "*":
        return _both(_PRESENT, _PRESENT)
    start, end = pattern.startswith("*"), pattern.endswith("*")
    literal = pattern[start : len(pattern) - end]
    choices = []
    for left, right in _splits(literal):
        issuer = string_pb2.StringMatcher(exact=left)
        if start:
            issuer = string_pb2.StringMatcher(suffix=left) if left else _PRESENT
        subject = string_pb2.StringMatcher(exact=right)
        if end:
            subject = string_pb2.StringMatcher(prefix=right) if right else _PRESENT
        if left or start:
            choices.append(_both(issuer, subject))
    if start and literal:  # all of it in the subject
        choices.append(_both(_PRESENT, string_pb2.StringMatcher(suffix=literal)))
    if end and literal:  # all of it in the issuer
        choices.append(_both(string_pb2.StringMatcher(prefix=literal), _PRESENT))
    return _any(choices) if choices else rbac_pb2.Principal(not_id=rbac_pb2.Principal(any=True))


def _splits(text: str) -> Iterable[tuple[str, str]]:
    for position in itertools.compress(range(len(text)), (character == "/" for character in text)):
        yield text[:position], text[position + 1 :]


def _both(issuer: string_pb2.StringMatcher, subject: string_pb2.StringMatcher) -> rbac_pb2.Principal:
    ids = [_of_payload("iss", issuer), _of_payload("sub", subject)]
    return rbac_pb2.Principal(and_ids=rbac_pb2.Principal.Set(ids=ids))


def _of_payload(name: str, matcher: string_pb2.StringMatcher) -> rbac_pb2.Principal:
    found = _metadata((name,), value_pb2.ValueMatcher(string_match=matcher))
    return rbac_pb2.Principal(sourced_metadata=rbac_pb2.SourcedMetadata(metadata_matcher=found))


def _metadata(path: Sequence[str], value: value_pb2.ValueMatcher) -> metadata_pb2.MetadataMatcher:
    segments = [metadata_pb2.MetadataMatcher.PathSegment(key=key) for key in (names.JWT_PAYLOAD, *path)]
    return metadata_pb2.MetadataMatcher(filter=names.JWT_METADATA, path=segments, value=value)


def _any(ids: Iterable[rbac_pb2.Principal]) -> rbac_pb2.Principal:
    found = list(ids)
    return found[0] if len(found) == 1 else rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=found))
