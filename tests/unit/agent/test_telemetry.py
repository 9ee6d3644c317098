"""The arithmetic between the kernel's counters and Prometheus; the tables themselves are in tests/kernel/test_mesh_metrics.py."""

from __future__ import annotations

import gzip
import itertools
import math
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agent import telemetry
from agent.bpf.manifest import BUCKET_SHIFT, STATS_TUNNELLED, Direction, Reason, Verdict
from agent.config import HBONE_PORT, Config
from agent.enrolment import Enrolled
from agent.errors import EnvironmentUnfit
from agent.flows import Pair
from agent.ids import Ids
from agent.report import CertificateStatus, IdentityStatus, WaypointStatus, WireGuardPeer, WireGuardStatus
from agent.telemetry import FlowMetrics, MetricsServer
from tests.unit.agent import tables

COUNTS = st.lists(st.integers(0, 2**40), min_size=16, max_size=16).map(tuple)


def buckets(counts: tuple[int, ...]) -> list[tuple[float, float]]:
    text = "".join(telemetry._RTT.text([('a="x"', counts, 0.0)]))
    (family,) = text_string_to_metric_families(text)
    return [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]


@given(COUNTS.filter(any))
def test_buckets_are_cumulative_doublings_that_end_with_everything(counts: tuple[int, ...]) -> None:
    found = buckets(counts)
    bounds = [bound for bound, _ in found]
    assert bounds[0] == (1 << BUCKET_SHIFT) / 1e9
    assert all(math.isclose(after, 2 * before) for before, after in itertools.pairwise(bounds[:-1]))
    assert bounds[-1] == math.inf
    assert [count for _, count in found] == sorted(count for _, count in found)
    assert found[-1][1] == sum(counts)


def test_one_event_of_each_slot_is_counted_once_in_each_bucket_above_it() -> None:
    assert [count for _, count in buckets((1,) * 16)] == list(range(1, 17))


def labels(tmp_path: Path, **names: tuple[str, str]) -> dict[str, str]:
    ids = Ids(tmp_path / "ids")
    pair = Pair(0, 0, 0, 6379, Direction.OUTBOUND, socket.IPPROTO_TCP)
    pair = pair._replace(**{member: ids.number(kind, name) for member, (kind, name) in names.items()})
    return dict(zip(telemetry._LABELS, telemetry.pair_labels(ids, pair), strict=True))


def test_labels_are_the_names_behind_the_numbers(tmp_path: Path) -> None:
    found = labels(
        tmp_path, source=("workload", "shop/frontend"), target=("workload", "data/redis-0"), service=("service", "data/redis:6379")
    )
    assert found == {
        "source_workload": "frontend",
        "source_namespace": "shop",
        "destination_workload": "redis-0",
        "destination_namespace": "data",
        "destination_service": "data/redis",
        "port": "6379",
        "security_policy": "none",
        "direction": "outbound",
    }


@pytest.mark.parametrize(
    ("way", "port", "policy"),
    [
        (Direction.OUTBOUND | STATS_TUNNELLED, 6379, "mutual_tls"),
        (Direction.OUTBOUND, 6379, "none"),
        (Direction.INBOUND, 6379, "none"),
        (Direction.INBOUND, HBONE_PORT, "mutual_tls"),
        (Direction.FROM_WAYPOINT, HBONE_PORT, "mutual_tls"),
        (Direction.OUTBOUND, HBONE_PORT, "none"),
    ],
)
def test_what_a_tunnel_carries_and_the_tunnel_itself_have_mutual_tls(tmp_path: Path, way: int, port: int, policy: str) -> None:
    pair = Pair(1, 0, 0, port, way, socket.IPPROTO_TCP)
    found = dict(zip(telemetry._LABELS, telemetry.pair_labels(Ids(tmp_path / "ids"), pair), strict=True))
    assert (found["security_policy"], found["direction"]) == (policy, Direction(way & 3).name.lower())


def test_whom_the_mesh_does_not_know_is_unknown(tmp_path: Path) -> None:
    found = labels(tmp_path)
    assert {found[name] for name in ("source_workload", "source_namespace", "destination_workload", "destination_namespace")} == {"unknown"}
    assert found["destination_service"] == ""


def test_a_connection_to_the_waypoint_has_a_service_and_no_workload_yet(tmp_path: Path) -> None:
    found = labels(tmp_path, source=("workload", "shop/frontend"), service=("service", "shop/cart:80"))
    assert (found["destination_workload"], found["destination_namespace"], found["destination_service"]) == ("", "shop", "shop/cart")


def test_what_found_no_room_in_the_kernels_table_is_other(tmp_path: Path) -> None:
    assert set(telemetry.pair_labels(Ids(tmp_path / "ids"), Pair(0, 0, 0, 0, 0, 0))) == {"other"}


class Node:
    """Tables, numbers and living connections as a test says."""

    def __init__(self, tmp_path: Path) -> None:
        self.stats, self.verdicts = tables.stats(), tables.verdicts()
        self.ids = Ids(tmp_path / "ids")
        maps = {"mesh_stats": self.stats, "mesh_verdicts": self.verdicts, **tables.of_sockets()}
        self.page = FlowMetrics(cast("Any", SimpleNamespace(maps=maps)), self.ids, Enrolled)

    def samples(self) -> dict[str, dict[str, float]]:
        """Sums by sample name and by some of the labels."""
        found: dict[str, Counter[str]] = {}
        seen = set()
        for family in text_string_to_metric_families("".join(self.page.text())):
            for s in (s for s in family.samples if "le" not in s.labels):
                assert (s.name, *s.labels.items()) not in seen, "a sample is there twice"
                seen.add((s.name, *s.labels.items()))
                which = (s.labels.get(name, "") for name in ("destination_workload", "port", "errno", "rule"))
                found.setdefault(s.name, Counter())[" ".join(filter(None, which))] += int(s.value)
        return {name: dict(values) for name, values in found.items()}

    def number(self, name: str, kind: str = "workload") -> int:
        return self.ids.number(kind, name)


def test_failures_are_by_errno_and_refusals_by_the_mesh_are_among_them(tmp_path: Path) -> None:
    node = Node(tmp_path)
    a, b, service, rule = node.number("d/a"), node.number("d/b"), node.number("d/s:80", "service"), node.number("d/p[0]", "rule")
    node.stats.add({"source": a, "target": b, "service": service, "port": 80, "protocol": 6}, closed=(0, 0, 1, 2, 4))
    refused = {"source": a, "target": b, "service": service, "verdict": Verdict.DENY, "protocol": 6}
    node.verdicts.add({**refused, "rule": rule, "reason": Reason.POLICY}, {"": 8})
    node.verdicts.add({**refused, "reason": Reason.NO_BACKEND}, {"": 16})
    node.verdicts.add({**refused, "reason": Reason.NO_BACKEND, "protocol": 17}, {"": 32})
    node.verdicts.add({**refused, "reason": Reason.NO_ENTRY, "direction": Direction.INBOUND}, {"": 64})
    assert node.samples()["mesh_tcp_connections_failed_total"] == {
        "b 80 ECANCELED": 1, "b 80 ECONNREFUSED": 2 + 16, "b 80 ETIMEDOUT": 4, "b 80 EPERM": 8,
    }  # fmt: skip


def test_a_verdict_names_the_service_that_was_dialled_although_nobody_was_there(tmp_path: Path) -> None:
    node = Node(tmp_path)
    refused = {"source": node.number("d/a"), "service": node.number("d/s:80", "service"), "verdict": Verdict.DENY, "protocol": 6}
    node.verdicts.add({**refused, "reason": Reason.NO_BACKEND}, {"": 1})
    assert 'destination_workload="",destination_namespace="d",destination_service="d/s",verdict="deny"' in "".join(node.page.text())


def test_what_an_audited_policy_would_deny_is_no_verdict(tmp_path: Path) -> None:
    node = Node(tmp_path)
    rule = node.number("d/audit[0]", "rule")
    node.verdicts.add({"rule": rule, "verdict": Verdict.ALLOW, "reason": Reason.AUDIT, "protocol": 6}, {"": 3})
    assert node.samples()["mesh_policy_audit_would_deny_total"] == {"unknown d/audit[0]": 3}
    assert "mesh_policy_verdicts_total" not in node.samples()


def test_datagram_flows_are_no_connections(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.stats.add({"target": node.number("d/dns"), "port": 53, "protocol": 17}, opened=5)
    assert node.samples() == {"mesh_udp_flows_opened_total": {"dns 53": 5}}


def test_pairs_whose_names_are_forgotten_are_one_sample(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for number in (1001, 1002):
        node.stats.add({"source": number, "target": number, "port": 80, "protocol": 6}, opened=5, sent_bytes=7)
    assert node.samples()["mesh_tcp_connections_opened_total"] == {"unknown 80": 10}
    assert node.samples()["mesh_tcp_sent_bytes_total"] == {"unknown 80": 14}


def test_what_a_page_says_packed_is_what_it_says() -> None:
    pieces = [b"a\n" * 1000, b"", b"b\n"]
    assert gzip.decompress(b"".join(telemetry._compressed(iter(pieces)))) == b"".join(pieces)


def test_certificates_have_their_end_and_their_trouble_in_the_metrics() -> None:
    status = IdentityStatus(
        mode="on",
        connected=True,
        roots=2,
        node=CertificateStatus("", "spiffe://m/meshagent/node/n", "1f", 1.0, 23.0),
        workloads=(
            CertificateStatus("shop/cart", "spiffe://m/ns/shop/sa/cart", "1f", 1.0, 7.0, problem="the controller is away"),
            CertificateStatus("shop/new", "spiffe://m/ns/shop/sa/new"),
        ),
        signed=11,
        failures=13,
        callers_refused=17,
    )
    found = {(s.name, s.labels.get("workload", "")): s.value for family in telemetry._identity(status) for s in family.samples}
    assert found == {
        ("mesh_identity_connected", ""): 1,
        ("mesh_trust_roots", ""): 2,
        ("mesh_trust_revoked", ""): 0,
        ("mesh_identity_expiry_timestamp_seconds", "cart"): 7,
        ("mesh_identity_expiry_timestamp_seconds", "new"): 0,
        ("mesh_identity_renewal_failing", "cart"): 1,
        ("mesh_identity_renewal_failing", "new"): 0,
        ("mesh_node_certificate_expiry_timestamp_seconds", ""): 23,
        ("mesh_node_certificate_renewal_failing", ""): 0,
        ("mesh_identity_signed_total", ""): 11,
        ("mesh_identity_sign_failures_total", ""): 13,
        ("mesh_workload_api_refused_total", ""): 17,
    }
    assert list(telemetry._identity(IdentityStatus())) == []


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(node="n", controller="unix:x", metrics_address="127.0.0.1", metrics_port=port)
        with pytest.raises(
            EnvironmentUnfit, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --metrics-port"
        ):
            MetricsServer(config, cast("Any", _Nothing()), cast("Any", None), lambda: True)


class _Nothing:
    """A collector without metrics."""

    def describe(self) -> tuple[()]:
        return ()

    collect = describe


def test_wireguard_says_how_old_handshakes_are_and_of_no_more_nodes_than_it_may() -> None:
    assert list(telemetry._wireguard(WireGuardStatus())) == []
    without = next(iter(telemetry._wireguard(WireGuardStatus("unavailable", "why")))).samples[0]
    assert (without.name, without.value) == ("mesh_wireguard_available", 0)
    peers = [WireGuardPeer(f"n{number:04}", "encrypted", 23.0, 7, 11) for number in range(telemetry.MAX_NODES + 3)]
    status = WireGuardStatus("on", peers=(*peers, WireGuardPeer("z", "waiting", None, 0, 0)))
    found = [(s.name, s.labels, s.value) for family in telemetry._wireguard(status) for s in family.samples]
    assert ("mesh_wireguard_available", {}, 1) in found
    assert ("mesh_wireguard_peers", {"state": "encrypted"}, telemetry.MAX_NODES + 3) in found
    assert ("mesh_wireguard_peers", {"state": "waiting"}, 1) in found
    assert ("mesh_wireguard_handshake_age_seconds", {"node": "n0000"}, 23) in found
    assert ("mesh_wireguard_sent_bytes_total", {"node": "n0001"}, 7) in found
    assert ("mesh_wireguard_received_bytes_total", {"node": "n0001"}, 11) in found
    assert sum(name == "mesh_wireguard_handshake_age_seconds" for name, _, _ in found) == telemetry.MAX_NODES


def test_what_the_waypoints_configuration_costs_is_told() -> None:
    waypoint = WaypointStatus(
        True, "1", 23, nacks=2, rejected=1, sent={"Cluster": 7, "Listener": 3}, pushes=5, pushed_seconds=0.25, resident_bytes=4096
    )
    found = {
        (sample.name, sample.labels.get("type", "")): sample.value for family in telemetry._pushes(waypoint) for sample in family.samples
    }
    assert found == {
        ("mesh_xds_rejected", ""): 1,
        ("mesh_xds_resources_sent_total", "Cluster"): 7,
        ("mesh_xds_resources_sent_total", "Listener"): 3,
        ("mesh_xds_push_seconds_count", ""): 5,
        ("mesh_xds_push_seconds_sum", ""): 0.25,
        ("mesh_waypoint_resident_memory_bytes", ""): 4096,
    }
    stopped = WaypointStatus(False, "", None, nacks=0)
    assert "mesh_waypoint_resident_memory_bytes" not in {family.name for family in telemetry._pushes(stopped)}
