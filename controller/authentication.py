"""RequestAuthentications: what a schema cannot say about one, and what agents are told. Called by `controller.checks` and `controller.compile`.

https://istio.io/latest/docs/reference/config/security/request_authentication/ is whose words these are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from controller import jwks
from controller.documents import Path
from controller.durations import milliseconds
from controller.jwks import Fetched
from controller.objects import Object
from meshapi import discovery_pb2 as pb

DEFAULT_TIMEOUT_S: Final = 5.0
MAX_TIMEOUT_S: Final = 60.0
NEVER: Final = "(none)"
"""No method of HTTP (RFC 9110, 9.1: a token)."""
HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_RESERVED: Final = ("x-envoy-", "x-meshagent-")
"""The waypoint removes what begins so from every request."""
_OWN: Final = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "te", "upgrade", "trailer", "keep-alive", "proxy-connection"}
)


def check(spec: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield what is wrong with a spec that obeys its schema."""
    for index, rule in enumerate(spec["jwtRules"]):
        yield from _rule(("spec", "jwtRules", index), rule)


def _rule(path: Path, rule: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    if ("jwks" in rule) == ("jwksUri" in rule):
        yield (*path, "jwksUri"), "is required, or jwks, but not both: nothing else says which keys the issuer has"
    if "jwks" in rule:
        try:
            jwks.public_keys(rule["jwks"], strict=True)
        except ValueError as error:
            yield (*path, "jwks"), str(error)
    if "jwksUri" in rule and (wrong := jwks.bad_uri(rule["jwksUri"])):
        yield (*path, "jwksUri"), wrong
    if not 0 < timeout(rule) <= MAX_TIMEOUT_S:
        yield (*path, "timeout"), f"must be more than 0 and at most {MAX_TIMEOUT_S:g}s"
    yield from _places(path, rule)
    if "outputPayloadToHeader" in rule:
        yield from _header((*path, "outputPayloadToHeader"), rule["outputPayloadToHeader"], out=True)
    seen: set[str] = set()
    for number, item in enumerate(rule.get("outputClaimToHeaders", [])):
        yield from _header((*path, "outputClaimToHeaders", number, "header"), item["header"], out=True)
        if item["header"].lower() in seen:
            yield (*path, "outputClaimToHeaders", number, "header"), f'"{item["header"]}" is listed twice'
        seen.add(item["header"].lower())


def _places(path: Path, rule: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    for number, item in enumerate(rule.get("fromHeaders", [])):
        yield from _header((*path, "fromHeaders", number, "name"), item["name"], out=False)
    for field in ("fromParams", "fromCookies"):
        for number, name in enumerate(rule.get(field, [])):
            if not HEADER_NAME.fullmatch(name):
                yield (*path, field, number), f'"{name[:80]}" is no name: letters, digits and -._~ are usual'


def _header(path: Path, name: str, *, out: bool) -> Iterator[tuple[Path, str]]:
    if not HEADER_NAME.fullmatch(name):
        yield path, f'"{name[:80]}" is no name of a header'
    elif name.lower().startswith(_RESERVED):
        yield path, f'"{name}": names that begin with {" or ".join(_RESERVED)} are the waypoint\'s own'
    elif out and name.lower() in _OWN:
        yield path, f'"{name}" belongs to the proxy and cannot be set'


def timeout(rule: Mapping[str, Any]) -> float:
    """Seconds that fetching the keys of a rule may take."""
    return milliseconds(rule["timeout"]) / 1000 if "timeout" in rule else DEFAULT_TIMEOUT_S


def uris(items: Iterable[Object]) -> Iterator[tuple[str, float]]:
    """Where keys are to be fetched, and how long that may take; the first to ask for a URI says that."""
    seen: set[str] = set()
    for item in items:
        for rule in item.spec["jwtRules"]:
            if "jwksUri" in rule and rule["jwksUri"] not in seen:
                seen.add(rule["jwksUri"])
                yield rule["jwksUri"], timeout(rule)


def entity(item: Object, keys: Mapping[str, Fetched]) -> pb.Authentication:
    """What agents are told."""
    return pb.Authentication(
        namespace=item.key.namespace, name=item.key.name, issuers=[_issuer(rule, keys) for rule in item.spec["jwtRules"]]
    )


def _issuer(rule: Mapping[str, Any], keys: Mapping[str, Fetched]) -> pb.TokenIssuer:
    return pb.TokenIssuer(
        issuer=rule["issuer"],
        audiences=rule.get("audiences", []),
        keys=jwks.public_keys(rule["jwks"]) if "jwks" in rule else keys.get(rule["jwksUri"], Fetched()).keys,
        headers=[pb.TokenHeader(name=one["name"], prefix=one.get("prefix", "")) for one in rule.get("fromHeaders", [])],
        parameters=rule.get("fromParams", []),
        cookies=rule.get("fromCookies", []),
        forward=rule.get("forwardOriginalToken", False),
        payload_header=rule.get("outputPayloadToHeader", "").lower(),
        claim_headers=[pb.ClaimHeader(header=one["header"].lower(), claim=one["claim"]) for one in rule.get("outputClaimToHeaders", [])],
    )


def problems(item: Object, keys: Mapping[str, Fetched]) -> tuple[str, str]:
    """Return (reason, message) about keys that could not be fetched; empty if all could."""
    wrong, missing = [], False
    for rule in item.spec["jwtRules"]:
        uri = rule.get("jwksUri", "")
        found = keys.get(uri, Fetched())
        if not uri or (found.keys and not found.problem):
            continue
        missing = missing or not found.keys
        then = "the last good keys stay in force" if found.keys else "until then no token of this issuer is believed (401)"
        wrong.append(f"{jwks.shown(uri)}: {found.problem or 'not asked yet'}; {then}")
    return ("KeysMissing" if missing else "KeysNotRefreshed", "; ".join(wrong)) if wrong else ("", "")


def guard(namespace: str, ports: Iterable[int]) -> pb.Policy:
    """The policy that says to the data path that requests to these ports are looked at. It denies nothing: what it asks for is never there."""
    numbers = sorted(set(ports))
    operation = pb.Operation(ports=numbers, methods=[NEVER], protocols=["TCP"])
    return pb.Policy(
        namespace=namespace,
        name=f"(authentication:{','.join(map(str, numbers))})",
        action=pb.Policy.DENY,
        rules=[pb.PolicyRule(operations=[operation])],
    )
