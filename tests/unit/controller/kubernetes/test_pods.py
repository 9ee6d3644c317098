"""What is in force after pods have changed is what is in force when everything is looked at."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from controller.kubernetes.api import Api
from controller.kubernetes.lastgood import Kept
from controller.kubernetes.pods import Pods
from controller.kubernetes.shapes import Seen
from controller.kubernetes.source import KubernetesSource
from controller.mesh import Mesh


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


def test_orphans_are_taken_once_and_again_when_others_are_written_or_a_kind_is_not_there_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = KubernetesSource(_Nobody(), "own")
    assert found.last_good is not None
    adopted: list[str] = []
    monkeypatch.setattr(found.reflectors["Workload"], "adopt", lambda seen: adopted.append(seen.key.name))
    item = next(iter(source().reflectors["Workload"].store.values())).object
    assert item is not None
    found.last_good.kept = {item.key: Kept(item, "u", orphan=True)}
    for _ in range(3):
        found._other()
    assert adopted == ["vm"]
    found.last_good.kept = dict(found.last_good.kept)
    found._other()
    assert adopted == ["vm"] * 2
    found.ready = True
    found._other()
    found.reflectors["Workload"].absent = True
    found._other()
    found._other()
    assert adopted == ["vm"] * 3
    found.reflectors["Workload"].absent = False
    found._other()
    found.reflectors["Workload"].absent = True
    found._other()
    assert adopted == ["vm"] * 4


@pytest.mark.anyio
async def test_a_thousand_pods_with_a_label_that_is_nonsense_are_one_problem_and_one_line_of_the_log_as_they_come_and_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = source()
    mesh = Mesh(found, authority=False)
    await mesh.start()
    for number in range(1000):
        meta = {"name": f"p{number:03}", "namespace": "shop", "uid": f"{number:032x}", "resourceVersion": "9"}
        said = {
            "metadata": {**meta, "labels": {"meshagent.io/mode": f"mesh-{number}"}},
            "spec": {"nodeName": "n1"},
            "status": {"phase": "Running"},
        }
        put(found, "Pod", said)
        if number % 7 == 0 or number == 999:
            await mesh.reload()
    (problem,) = mesh.state.problems
    assert str(problem) == (
        'api-server Pod/shop metadata.labels[\'meshagent.io/mode\']: must be "mesh" or "none" (not enrolled); it is as if it were not there, and the '
        'Namespace decides: p000 has "mesh-0", p001 has "mesh-1", p002 has "mesh-2" and 997 more'
    )
    store = found.reflectors["Pod"].store
    for left in (10, 9, 10, 9, 3):
        dropped = {key: store.pop(key) for key in sorted(store)[left:]}
        found._changed()
        await mesh.reload()
        store |= dropped if left != 3 else {}
    assert len(mesh.state.problems) == 1
    assert [record.message for record in caplog.records if record.levelname in {"ERROR", "INFO"} and "resource" in record.message] == [
        "resource refused"
    ]
