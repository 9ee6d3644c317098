"""Global limits in a TrafficPolicy: what its schema cannot say, and their message. Pure, called by `controller.traffic`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from controller.documents import Path
from controller.durations import milliseconds
from meshapi import discovery_pb2 as pb
from meshapi.quotas import COUNTED_MS, MOST_GLOBAL_LIMITS

_LONGEST_MS: Final = 24 * 3_600_000
_SHORTEST_MS: Final = 1000
_BY: Final = {
    "Workload": pb.RateLimit.WORKLOAD,
    "ServiceAccount": pb.RateLimit.SERVICE_ACCOUNT,
    "Namespace": pb.RateLimit.NAMESPACE,
}
_FAILURE: Final = {"Share": pb.RateLimit.SHARE, "Allow": pb.RateLimit.ALLOW, "Deny": pb.RateLimit.DENY}


def is_global(limit: Mapping[str, Any]) -> bool:
    """Is it one for the whole mesh?"""
    return bool(limit.get("scope", "Local") == "Global")


def check(limits: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Path, str]]:
    """Yield what is wrong with the rateLimits of a policy as far as scope is concerned."""
    count = 0
    for index, limit in enumerate(limits):
        path: Path = ("spec", "rateLimits", index)
        if not is_global(limit):
            for name in ("fairness", "failure"):
                if name in limit:
                    yield (*path, name), 'belongs to scope "Global" only'
            continue
        count += 1
        if count > MOST_GLOBAL_LIMITS:
            yield (
                (*path, "scope"),
                f"is the {count}. Global one: at most {MOST_GLOBAL_LIMITS} are possible, such as a rate and a quota of a day",
            )
        if "per" in limit:
            yield (*path, "per"), 'belongs to scope "Local" only: the whole mesh has one count, which fairness.by shares out'
        interval = milliseconds(limit.get("interval", "1s"))
        if not _SHORTEST_MS <= interval <= _LONGEST_MS:
            yield (*path, "interval"), 'must be from 1s to 24h for scope "Global"'
        if "burst" in limit and interval > COUNTED_MS:
            yield (*path, "burst"), "does not belong to an interval longer than 1m: those requests are counted, and may come all at once"
        yield from _weights(path, limit.get("fairness", {}))


def _weights(path: Path, fairness: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    seen: set[str] = set()
    for number, item in enumerate(fairness.get("weights", [])):
        place: Path = (*path, "fairness", "weights", number, "name")
        if item["name"] in seen:
            yield place, f'"{item["name"]}" is listed twice'
        seen.add(item["name"])
        if fairness.get("by") == "Namespace" and "/" in item["name"]:
            yield place, "is no namespace: it has a slash"


def message(namespace: str, limit: Mapping[str, Any]) -> pb.RateLimit:
    """Return the model's form of a global limit. The default burst is what comes in half a second."""
    interval = milliseconds(limit.get("interval", "1s"))
    fairness = limit.get("fairness", {})
    by = _BY[fairness.get("by", "Workload")]
    bare = by == pb.RateLimit.NAMESPACE
    return pb.RateLimit(
        is_global=True,
        requests=limit["requests"],
        interval_ms=interval,
        burst=limit.get("burst", max(1, limit["requests"] * 500 // interval)),
        by=by,
        weights={
            item["name"] if bare or "/" in item["name"] else f"{namespace}/{item['name']}": item["weight"]
            for item in fairness.get("weights", [])
        },
        failure=_FAILURE[limit.get("failure", "Share")],
    )
