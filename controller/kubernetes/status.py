"""Writes back to the API server what is to be said about its objects: conditions, and an event when one is refused. Done by one controller at a time.

What stands there already is not written again, so that a controller that starts writes nothing where nothing has changed, and its own writes come to an end.
Entries of `status.parents` that other controllers made are kept (https://gateway-api.sigs.k8s.io/reference/spec/#routeparentstatus), and conditions of types
that are not the mesh's, wherever they stand: whoever says them alone may change them (Notes for implementors of GatewayStatus.Conditions,
https://github.com/kubernetes-sigs/gateway-api/blob/main/apis/v1/gateway_types.go).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Mapping
from typing import Any, Final, get_args

from controller import metrics, statuses
from controller.compile import Compiled
from controller.gateways import CLASS, CONTROLLER, ConditionType
from controller.kubernetes.api import Api, ApiError, Unreachable
from controller.kubernetes.lease import Lease
from controller.kubernetes.shapes import Kind, Seen
from controller.kubernetes.source import KubernetesSource
from controller.objects import Key, Object
from controller.schema import kinds
from controller.source import State
from controller.waiting import heard

_log = logging.getLogger(__name__)

RATE_S: Final = 0.02
"""Between two writes: at most 50 a second."""
LOOK_S: Final = 60.0
"""How often all is looked at although nothing has changed: somebody else may have written a status."""
AGAIN_S: Final = 5.0
"""How long after a write that failed everything is looked at again."""
MESSAGE: Final = 32_768  # of a condition (https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.34/#condition-v1-meta)
NOTE: Final = 1024  # of an event
_OURS: Final = frozenset(get_args(ConditionType))
_ROUTES: Final = frozenset({"HTTPRoute", "GRPCRoute"})
_WITHOUT: Final = frozenset({"Namespace", "Node", "Pod", "Service", "EndpointSlice", "ReferenceGrant", "Secret"})


class StatusWriter:
    """See the module. Belongs to the event loop."""

    def __init__(self, api: Api, source: KubernetesSource, lease: Lease) -> None:
        """Nothing is written before `take` was called."""
        self._api, self._source, self._lease = api, source, lease
        self._said: tuple[State, Compiled, Mapping[Key, Seen]] | None = None
        self._kinds = {name: one.kind for name, one in source.reflectors.items() if name not in _WITHOUT}
        self._news = asyncio.Event()
        self._told: dict[Key, str] = {}
        """Refusals that there are events about."""
        self._failures: set[str] = set()
        """What has been logged since all was written last."""
        self.written = 0
        self.failed = 0

    def take(self, state: State, compiled: Compiled, basis: Mapping[Key, Seen]) -> None:
        """Say this from now on: what follows from `state`, and what that follows from."""
        self._said = state, compiled, basis
        self._news.set()

    def changed(self) -> None:
        """It may be this controller's turn to write."""
        self._news.set()

    async def run(self) -> None:
        """Write for ever, while this controller has the lease."""
        pause = AGAIN_S
        while True:
            await heard(self._news, LOOK_S)
            self._news.clear()
            if self._said is None or not self._lease.held or await self._write_all(*self._said):
                pause = AGAIN_S
                self._failures.clear()
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, LOOK_S)
            self._news.set()

    async def _write_all(self, state: State, compiled: Compiled, basis: Mapping[Key, Seen]) -> bool:
        """Write what differs; returns whether all of it arrived."""
        good = True
        self._told = {key: text for key, text in self._told.items() if key in state.refused}
        for key, meant in sorted(basis.items()):
            kind, seen = self._kinds.get(key.kind), self._source.seen(key)
            if (
                kind is None
                or seen is None
                or seen.status is None
                or seen.orphan
                or not seen.same(meant)
                or (key not in state.objects and key not in state.refused)
            ):
                continue  # it has changed since, and will be looked at again
            if not self._lease.held:
                return True
            wanted = _wanted(key, seen, state.objects.get(key), statuses.of(state, compiled, key), refused=key in state.refused)
            if wanted is not None and wanted != seen.status:
                good = await self._patch(kind, key, seen, wanted) and good
            if key in state.refused:
                good = await self._event(key, seen, "; ".join(str(problem) for problem in state.refused[key])) and good
        return good

    async def _patch(self, kind: Kind, key: Key, seen: Seen, status: Mapping[str, Any]) -> bool:
        body = {"metadata": {"resourceVersion": seen.version, "uid": seen.uid}, "status": _patched(seen.status or {}, status)}
        try:
            await self._api.send("PATCH", f"{_of(kind, key)}/status", body, "application/merge-patch+json")
        except (ApiError, Unreachable) as error:
            if isinstance(error, ApiError) and error.code in {404, 409}:
                return True  # it is gone, or newer: then it is read, and said anew
            self._failed("a status cannot be written", key, error)
            return False
        finally:
            await asyncio.sleep(RATE_S)
        self.written += 1
        metrics.STATUS_WRITES.inc()
        return True

    async def _event(self, key: Key, seen: Seen, text: str) -> bool:
        if self._told.get(key) == text:
            return True
        now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        namespace = key.namespace or "default"
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{key.name[:200].rstrip('.-')}.{time.time_ns():x}", "namespace": namespace},
            "eventTime": now,
            "type": "Warning",
            "reason": "Refused",
            "action": "Validate",
            "note": text.encode()[:NOTE].decode(errors="ignore"),
            "reportingController": CONTROLLER,
            "reportingInstance": self._lease.identity[:128],
            "regarding": {
                "apiVersion": kinds()[key.kind].api_version,
                "kind": key.kind,
                "namespace": key.namespace,
                "name": key.name,
                "uid": seen.uid,
                "resourceVersion": seen.version,
            },
        }
        try:
            await self._api.send("POST", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", event)
        except (ApiError, Unreachable) as error:
            self._failed("an event cannot be written", key, error)
            return False
        finally:
            await asyncio.sleep(RATE_S)
        self._told[key] = text
        return True

    def _failed(self, what: str, key: Key, error: Exception) -> None:
        self.failed += 1
        metrics.STATUS_FAILURES.inc()
        why = f"{error.code} {error.reason}" if isinstance(error, ApiError) else str(error)  # the message names the object
        if (failure := f"{what}: {key.kind}: {why}") not in self._failures:  # of a thousand objects of a kind one is told of
            self._failures.add(failure)
            _log.warning(what, extra={"object": str(key), "error": str(error)})


def _of(kind: Kind, key: Key) -> str:
    """The path of one object."""
    root, _, plural = kind.path.rpartition("/")
    return f"{root}/namespaces/{key.namespace}/{plural}/{key.name}" if key.namespace else f"{kind.path}/{key.name}"


def _wanted(key: Key, seen: Seen, in_force: Object | None, said: Mapping[str, Any], *, refused: bool) -> dict[str, Any] | None:
    """The whole status that an object is to have; None: it is not ours to say. `in_force` may be an earlier version, and is if the object was `refused`."""
    before = seen.status or {}
    if key.kind in _ROUTES:
        held = before.get("parents") if isinstance(before.get("parents"), list) else []
        others = [one for one in held or () if isinstance(one, dict) and one.get("controllerName") != CONTROLLER]
        ours = [one for one in held or () if isinstance(one, dict) and one.get("controllerName") == CONTROLLER]
        parents = said.get("parents", [])
        if not parents and not ours:
            return None  # it is for gateways of other classes
        if refused:  # the parents are those of the last good version, which is not what is asked about
            invalid = next(one for one in said["conditions"] if one["type"] == "Accepted")
            parents = [{**one, "conditions": [invalid]} for one in parents]
        more = [one for one in said["conditions"] if one["type"] not in {"Accepted", "ResolvedRefs"} and one["status"] == "False"]
        made = []
        for parent in parents:
            old = next((one for one in ours if one.get("parentRef") == parent["parentRef"]), {})
            made.append({**parent, "conditions": _stamped(old.get("conditions"), [*parent["conditions"], *more], seen.generation)})
        return {**before, "parents": [*others, *made]}
    if key.kind == "Gateway" and (in_force is None or in_force.spec.get("gatewayClassName") != CLASS):
        return None
    result = {**before, **said, "conditions": _stamped(before.get("conditions"), said["conditions"], seen.generation)}
    if listeners := result.get("listeners"):
        old_listeners = {one.get("name"): one for one in before.get("listeners") or () if isinstance(one, dict)}
        result["listeners"] = [
            {**one, "conditions": _stamped(old_listeners.get(one["name"], {}).get("conditions"), one["conditions"], seen.generation)}
            for one in listeners
        ]
    if key.kind != "Gateway":
        result["observedGeneration"] = seen.generation
    return result


def _stamped(before: Any, conditions: list[Mapping[str, str]], generation: int) -> list[dict[str, Any]]:
    """Conditions with the time at which their status changed last, and the generation that they are about; those of others stay, and all where they stand."""
    old = {one.get("type"): one for one in before if isinstance(one, dict)} if isinstance(before, list) else {}
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    made = {name: one for name, one in old.items() if name not in _OURS or any(condition["type"] == name for condition in conditions)}
    for condition in conditions:
        held = old.get(condition["type"], {})
        since = held.get("lastTransitionTime") if held.get("status") == condition["status"] else None
        message = condition["message"][:MESSAGE]
        made[condition["type"]] = {**condition, "message": message, "observedGeneration": generation, "lastTransitionTime": since or now}
    return list(made.values())


def _patched(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """A merge patch: what is not there any more is null (RFC 7396)."""
    return {**dict.fromkeys(before.keys() - after.keys()), **after}
