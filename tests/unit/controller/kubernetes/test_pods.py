"""What is in force after pods have changed is what is in force when everything is looked at."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from controller.kubernetes.api import Api
from controller.kubernetes.pods import Pods
from controller.kubernetes.shapes import Seen
from controller.kubernetes.source import KubernetesSource


class _Nobody(Api):
    """Is never asked."""

    def __init__(self) -> None:
        pass


def source() -> KubernetesSource:
    """One that has listed everything, with a Service and a Workload whose addresses pods may come to have."""
    found = KubernetesSource(_Nobody())
    for reflector in found.reflectors.values():
        reflector.synced = True
    meta = {"namespace": "shop", "uid": "u", "resourceVersion": "1", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"}
    put(found, "Service", {"metadata": {"name": "a", **meta}, "spec": {"clusterIP": "10.0.0.3", "ports": [{"port": 80}]}})
    spec = {"node": "n1", "addresses": ["10.0.0.4"]}
    workload = {"apiVersion": "meshagent.io/v1alpha1", "kind": "Workload", "metadata": {"name": "vm", **meta}, "spec": spec}
    put(found, "Workload", workload)
    return found


def put(found: KubernetesSource, kind: str, value: dict[str, Any]) -> None:
    seen = found.reflectors[kind].kind.read(json.dumps(value).encode())
    assert seen is not None
    assert kind == "Pod" or seen.object is not None
    found.reflectors[kind].store[seen.key] = seen


def pod(draw: random.Random, number: int, version: int) -> dict[str, Any]:
    addresses = draw.choice(([], [], [f"10.0.1.{number}"], [f"10.0.1.{number}"], [f"10.0.1.{number}"], [f"10.0.0.{draw.randrange(1, 6)}"]))
    return {
        "metadata": {
            "name": f"p{number}",
            "namespace": "shop",
            "uid": "no uid" if draw.random() < 0.05 else f"{number:032x}",
            "resourceVersion": str(version),
            "deletionTimestamp": draw.choice((None, None, None, "2026-01-01T00:00:00Z")),
            "creationTimestamp": f"2026-01-{draw.randrange(1, 28):02}T00:00:00Z",
        },
        "spec": {"nodeName": draw.choice(("", "n1", "n1", "n1")), "hostNetwork": draw.random() < 0.1},
        "status": {"phase": draw.choice(("Running", "Running", "Running", "Failed")), "podIPs": [{"ip": one} for one in addresses]},
    }


@pytest.mark.parametrize("seed", range(13))
def test_what_changes_of_pods_alone_leads_to_what_a_look_at_everything_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)  # noqa: S311 - has to be the same each time
    quick = 0
    again = Pods.again

    def counted(*args: Any) -> Any:
        nonlocal quick
        found = again(*args)
        quick += found is not None
        return found

    monkeypatch.setattr(Pods, "again", counted)
    one, other = source(), source()
    for version in range(1, 98):
        number = draw.randrange(1, 24)
        if draw.random() < 0.2:
            for found in (one, other):
                key = next((key for key in found.reflectors["Pod"].store if key.name == f"p{number}"), None)
                if key is not None:
                    del found.reflectors["Pod"].store[key]
        else:
            made = pod(draw, number, version)
            for found in (one, other):
                put(found, "Pod", made)
        other._other()
        before, state, all_of_it = one.state, one.load(), other.load()
        assert dict(state.objects) == dict(all_of_it.objects)
        assert (state.refused, state.problems, one.basis) == (all_of_it.refused, all_of_it.problems, other.basis)
        assert before is not state or not before.objects
    assert quick >= 23


def test_a_change_of_anything_else_is_looked_at() -> None:
    found = source()
    assert found.load().objects
    key = next(iter(found.reflectors["Service"].store))
    service: Seen = found.reflectors["Service"].store.pop(key)
    assert service.key in found.load().objects, "nobody has said that something has changed"
    found._other()
    assert service.key not in found.load().objects
