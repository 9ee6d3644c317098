"""How others at the hooks of the mesh are named, from what the kernel says of them."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import pytest

from agent.bpf.attached import Attached
from agent.check import chains, neighbours
from agent.check.finding import Severity

CGROUP = Path("/sys/fs/cgroup/mesh")
# The nat table of iptables-legacy and of ip6tables-legacy 1.8.9 with a chain as linkerd-init makes it, as getsockopt(2) returns it.
NAT4 = "c-muNpbaQsn8Cn^MO=e`z7@<2GzH|k>)-$X|7q<mra|g1jzQ`!fkEl64Oqn;7+iyb{DW}n3kdR$h>Z92^9+d(a&_?xa&-=&X+B_syLScF{9wU=-x(l1$mvx;UqF8_=G)(cG`{i6GB5xDv79YC"
NAT6 = (
    "c-muN7(8GF!vzLL9C8{2^!{LB7<7OV|NQ&^|Nmh057RL7563X`kHE0<&kLM#4h*hALH<EF<pYBJBO>EH{X9eBgIrxagIt|M29@8~7!XCn3Wg6j%Lxw#{LW`0!Y%=Q0sY}pF8&^7=@h>#0|Nj<"
    "|1q2"
)


@pytest.mark.parametrize(("blob", "family"), [(NAT4, chains.IPV4), (NAT6, chains.IPV6)], ids=["ipv4", "ipv6"])
def test_chains_of_iptables_legacy_are_read(blob: str, family: chains._Family) -> None:
    assert list(chains.names_of(zlib.decompress(base64.b85decode(blob)), family.offset)) == ["PROXY_INIT_REDIRECT"]


def test_half_a_table_is_no_endless_one() -> None:
    whole = zlib.decompress(base64.b85decode(NAT4))
    for length in range(len(whole)):
        assert len(list(chains.names_of(whole[:length], chains.IPV4.offset))) <= 1
    assert list(chains.names_of(bytes(4096), chains.IPV4.offset)) == []


@pytest.mark.parametrize(
    ("name", "who", "step"),
    [
        ("cil_sock4_conne", "Cilium's socket load balancer", "socketLB.hostNamespaceOnly"),
        ("sock6_sendmsg", "Cilium's socket load balancer", "socketLB.hostNamespaceOnly"),
        ("calico_connect_", "Calico's connect-time load balancer", "bpfConnectTimeLoadBalancing"),
        ("cgroup_connect4", "Kmesh or Merbridge", "uninstall it"),
        ("mesh_connect4", "another meshagent", "meshagent uninstall"),
        ("mesh_getpeernam", "another meshagent", "meshagent uninstall"),
        ("my_firewall", "somebody else", "find out whose it is"),
    ],
)
def test_a_program_of_somebody_else_is_a_warning_with_its_name(name: str, who: str, step: str) -> None:
    (found,) = neighbours.programs([Attached(23, name, "cgroup_inet4_connect", str(CGROUP))], CGROUP)
    assert found.severity is Severity.WARNING
    assert f"{name} of {who}" in found.what
    assert "id 23" in found.where
    assert step in found.next_step


def test_programs_of_one_owner_are_one_finding() -> None:
    names = ("cil_sock4_conne", "cil_sock6_conne", "cil_sock4_sendm")
    (found,) = neighbours.programs([Attached(n, name, "cgroup_inet4_connect", "/sys/fs/cgroup") for n, name in enumerate(names)], CGROUP)
    assert all(name in found.what for name in names)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/sys/fs/cgroup", Severity.ERROR),
        (str(CGROUP), Severity.ERROR),
        (str(CGROUP / "pod"), Severity.WARNING),
        ("/sys/fs/cgroup/x", Severity.WARNING),
    ],
)
def test_a_program_that_lets_nobody_be_beside_it_is_an_error_where_ours_have_to_be(place: str, expected: Severity) -> None:
    (found,) = neighbours.programs([Attached(23, "", "cgroup_inet4_connect", place, alone=True)], CGROUP)
    assert found.severity is expected
    assert "a program without a name (id 23)" in found.what


def test_nobody_else_is_said_too() -> None:
    (found,) = neighbours.programs([], CGROUP)
    assert found.severity is Severity.OK


@pytest.mark.parametrize(
    ("chain", "who"),
    [
        (("nat", "ISTIO_OUTPUT"), "Istio"),
        (("istio-ambient-nat", "istio-prerouting"), "Istio"),
        (("istio-proxy-nat", "output"), "Istio"),
        (("nat", "PROXY_INIT_REDIRECT"), "Linkerd"),
        (("nat", "CONSUL_PROXY_OUTPUT"), "Consul"),
        (("nat", "KUMA_MESH_OUTBOUND"), "Kuma"),
    ],
)
def test_chains_of_other_meshes_are_a_warning_with_their_places(chain: chains.Chain, who: str) -> None:
    (found,) = neighbours.filters({"the node": {("filter", "INPUT")}, "the network namespace of process 7 (app)": {chain}})
    assert found.severity is Severity.WARNING
    assert f"chains of {who} are in 1 of 2 network namespaces" in found.what
    assert found.where == "the network namespace of process 7 (app)"


def test_kube_proxy_and_others_rules_are_fine() -> None:
    for mine in ({("nat", "KUBE-SERVICES"), ("nat", "KUBE-SVC-X")}, {("kube-proxy", "services")}):
        (found,) = neighbours.filters({"the node": mine | {("filter", "DOCKER"), ("nat", "CNI-HOSTPORT-DNAT")}})
        assert (found.severity, "kube-proxy is fine" in found.what) == (Severity.OK, True)
    (found,) = neighbours.filters({"the node": {("filter", "DOCKER")}})
    assert (found.severity, "kube-proxy" in found.what) == (Severity.OK, False)
