"""The JSON of `status` and `trace`: the names and shapes that people's scripts rely on."""

from __future__ import annotations

import enum
import json

import pytest

from agent.report import (
    BackendPlan,
    CertificateStatus,
    Connection,
    ControllerStatus,
    ForeignProgram,
    HookStatus,
    Hop,
    IdentityStatus,
    Plan,
    ProbeStatus,
    Status,
    WaypointStatus,
    WireGuardPeer,
    WireGuardStatus,
    WorkloadStatus,
    as_json,
    encode,
)


class Colour(enum.Enum):
    DARK_RED = 1


def test_a_status_has_the_documented_names() -> None:
    status = Status(
        ready=False,
        node="node-1",
        hooks=(HookStatus("mesh_connect4", attached=True, effective=False),),
        waypoint=WaypointStatus(ready=True, version="1.37.0", pid=None, nacks=0),
        controller=ControllerStatus(connected=False, version="v", lag_seconds=None),
        workloads=(
            WorkloadStatus("default", "cart", enrolled=True, redirected=False, identity="spiffe://m/ns/default/sa/cart", drift=True),
        ),
        problems=("one", "two"),
        probe=ProbeStatus(works=False, age_seconds=2.5),
        foreign_programs=(ForeignProgram(23, "guard", "cgroup_inet4_connect", "/sys/fs/cgroup"),),
        identity=IdentityStatus(
            mode="on",
            connected=True,
            trust_domain="m",
            trust_sequence=7,
            roots=2,
            revoked=3,
            kept="/run/m/identity/svids.json",
            workload_socket="/run/m-workload/workload.sock",
            node=CertificateStatus("", "spiffe://m/meshagent/node/node-1", problem="why"),
            workloads=(CertificateStatus("default/cart", "spiffe://m/ns/default/sa/cart", "1f", 1.0, 3.0, 2.0, "", ("PEM",)),),
            signed=11,
            failures=13,
            callers_refused=17,
        ),
        wireguard=WireGuardStatus("on", "", "a2V5", 51871, 1420, (WireGuardPeer("node-2", "encrypted", 5.0, 7, 11),)),
        version="0.1.0",
    )
    assert json.loads(encode(status)) == {
        "ready": False,
        "node": "node-1",
        "hooks": [{"name": "mesh_connect4", "attached": True, "effective": False}],
        "waypoint": {
            "ready": True,
            "version": "1.37.0",
            "pid": None,
            "nacks": 0,
            "rejected": 0,
            "lastNack": "",
            "sent": {},
            "pushes": 0,
            "pushedSeconds": 0.0,
            "lastPushSeconds": 0.0,
            "residentBytes": None,
        },
        "controller": {"connected": False, "version": "v", "lagSeconds": None},
        "workloads": [
            {
                "namespace": "default",
                "name": "cart",
                "enrolled": True,
                "redirected": False,
                "identity": "spiffe://m/ns/default/sa/cart",
                "drift": True,
            }
        ],
        "problems": ["one", "two"],
        "probe": {"works": False, "ageSeconds": 2.5},
        "acceleration": {"workloads": [], "failingChecks": []},
        "foreignPrograms": [{"id": 23, "name": "guard", "attachType": "cgroup_inet4_connect", "place": "/sys/fs/cgroup"}],
        "identity": {
            "mode": "on",
            "connected": True,
            "trustDomain": "m",
            "trustSequence": 7,
            "roots": 2,
            "revoked": 3,
            "kept": "/run/m/identity/svids.json",
            "workloadSocket": "/run/m-workload/workload.sock",
            "node": {
                "workload": "",
                "spiffeId": "spiffe://m/meshagent/node/node-1",
                "serial": "",
                "notBefore": None,
                "expiresAt": None,
                "renewsAt": None,
                "problem": "why",
                "chain": [],
                "authority": "",
                "authorityBeginsAt": None,
                "authorityEndsAt": None,
            },
            "workloads": [
                {
                    "workload": "default/cart",
                    "spiffeId": "spiffe://m/ns/default/sa/cart",
                    "serial": "1f",
                    "notBefore": 1.0,
                    "expiresAt": 3.0,
                    "renewsAt": 2.0,
                    "problem": "",
                    "chain": ["PEM"],
                    "authority": "",
                    "authorityBeginsAt": None,
                    "authorityEndsAt": None,
                }
            ],
            "signed": 11,
            "failures": 13,
            "callersRefused": 17,
        },
        "wireguard": {
            "mode": "on",
            "reason": "",
            "publicKey": "a2V5",
            "port": 51871,
            "mtu": 1420,
            "peers": [{"node": "node-2", "state": "encrypted", "handshakeAgeSeconds": 5.0, "sentBytes": 7, "receivedBytes": 11}],
        },
        "version": "0.1.0",
    }


def test_a_plan_has_the_documented_names_in_their_order() -> None:
    plan = Plan(
        source="default/a", destination="default/b:80", verdict="DENY", rule=None, level="L4", reason="why",
        backends=(BackendPlan("default/b-1", "10.0.0.1:8080", "node-1", 0.5),), encryption="none", fail_mode="closed", problems=(),
    )  # fmt: skip
    document = json.loads(encode(plan))
    assert list(document) == [
        "kind", "source", "destination", "verdict", "rule", "level", "reason", "backends", "encryption", "failMode", "problems",
        "audit",
    ]  # fmt: skip
    assert (document["kind"], document["rule"]) == ("plan", None)
    assert document["backends"] == [{"workload": "default/b-1", "address": "10.0.0.1:8080", "node": "node-1", "share": 0.5}]


def test_a_hops_detail_stands_beside_its_own_names() -> None:
    connection = Connection(
        source="default/a", destination="default/b", hops=(Hop("connect", "node-1", 23, {"rttUs": 7}),), outcome="closed"
    )
    assert as_json(connection) == {
        "kind": "connection",
        "source": "default/a",
        "destination": "default/b",
        "hops": [{"at": "connect", "node": "node-1", "durationNs": 23, "rttUs": 7}],
        "outcome": "closed",
        "rule": None,
        "nextStep": None,
        "beganNs": 0,
        "clockErrorNs": None,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Colour.DARK_RED, "dark_red"),
        ((1, [2, (3,)]), [1, [2, [3]]]),
        ({"a": (Colour.DARK_RED,)}, {"a": ["dark_red"]}),
        (None, None),
        ("text", "text"),
        (Hop, Hop),
    ],
)
def test_values_become_json_values(value: object, expected: object) -> None:
    assert as_json(value) == expected


def test_an_encoded_document_is_one_line() -> None:
    assert b"\n" not in encode({"text": "two\nlines"})
