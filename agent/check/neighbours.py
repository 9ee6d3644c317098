"""Others at the hooks of the mesh: programs in the cgroup tree and in network namespaces, and rules of the packet filter that lead connections elsewhere.

Programs are known by their names, as their projects spell them in their sources; the kernel keeps 15 characters of one. What is not known is said too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from agent import netns
from agent.bpf import attached
from agent.bpf.attached import Attached
from agent.bpf.manifest import PROGRAMS
from agent.check import chains, places
from agent.check.chains import Chain
from agent.check.finding import Finding, error, ok, some, warning
from agent.config import Config

_KEPT: Final = 15
"""Characters of a program's name (BPF_OBJ_NAME_LEN without the NUL, include/uapi/linux/bpf.h)."""
_ANOTHER: Final = "another meshagent"
_OURS: Final = frozenset(program.name[:_KEPT] for program in PROGRAMS)


class _Known(NamedTuple):
    pattern: re.Pattern[str]
    who: str
    cause: str
    next_step: str


_PROGRAMS: Final = (
    _Known(
        re.compile(r"(cil_)?sock[46]_"),  # cilium, bpf/bpf_sock.c
        "Cilium's socket load balancer",
        "it may replace a service's address by a pod's before the mesh sees it, and then the service's routes and policies do not apply",
        "set socketLB.hostNamespaceOnly=true in Cilium's Helm values (bpf-lb-sock-hostns-only in cilium-config), as for other meshes; if it is, nothing",
    ),
    _Known(
        re.compile(r"calico_(connect|sendmsg|recvmsg)"),  # calico, felix/bpf-gpl/connect_balancer*.c
        "Calico's connect-time load balancer",
        "it may replace a service's address by a pod's before the mesh sees it, and then the service's routes and policies do not apply",
        "set bpfConnectTimeLoadBalancing: Disabled and bpfHostNetworkedNATWithoutCTLB: Enabled in the FelixConfiguration",
    ),
    _Known(
        re.compile(r"cgroup_connect[46]|mb_sock[46]_|mb_"),  # kmesh, bpf/kmesh; merbridge, bpf/
        "Kmesh or Merbridge",
        "another mesh redirects connections in the same place",
        "uninstall it on this node, or keep its workloads and the mesh's on different nodes",
    ),
)
_CHAINS: Final = (
    _Known(
        re.compile(r"ISTIO[_-].*", re.IGNORECASE),  # istio, tools/istio-iptables and tools/istio-nftables; cni/pkg/iptables for ambient
        "Istio",
        "a sidecar, or ambient's ztunnel, takes this workload's connections after the mesh has decided about them",
        "take the workload out of one of both: no istio-injection, sidecar.istio.io/inject or istio.io/dataplane-mode labels, and make its pods anew",
    ),
    _Known(
        re.compile(r"PROXY_INIT_.*"),  # linkerd2-proxy-init, iptables
        "Linkerd",
        "linkerd-init or Linkerd's CNI plugin leads this workload's connections to a sidecar after the mesh has decided about them",
        "take the workload out of one of both: no linkerd.io/inject annotation, and make its pods anew",
    ),
    _Known(
        re.compile(r"CONSUL_(PROXY|DNS)_.*"),  # consul, sdk/iptables
        "Consul",
        "its transparent proxy takes this workload's connections after the mesh has decided about them",
        'take the workload out of one of both: consul.hashicorp.com/connect-inject: "false", and make its pods anew',
    ),
    _Known(
        re.compile(r"KUMA_MESH_.*"),  # kuma, pkg/transparentproxy
        "Kuma",
        "its transparent proxy takes this workload's connections after the mesh has decided about them",
        "take the workload out of one of both: kuma.io/sidecar-injection: disabled, and make its pods anew",
    ),
)
_KUBE_PROXY: Final = re.compile(r"KUBE-SERVICES|services")


def findings(config: Config) -> Iterator[Finding]:
    """Everything; root only."""
    spaces = places.namespaces(config.cgroup)
    yield from programs(
        [*attached.in_cgroups(config), *attached.in_namespaces(config, [places.OWN, *(one.path for one in spaces)])], config.cgroup
    )
    found: dict[str, set[Chain]] = {}
    for path, name in ((places.OWN, "the node"), *((one.path, str(one)) for one in spaces)):
        try:
            found[name] = netns.run_in(path, chains.here)
        except OSError as failure:
            if path.exists():  # else it ended meanwhile
                yield warning(
                    "packet filter", "its chains cannot be read", name, cause=str(failure), next_step="look yourself: nft list chains"
                )
    yield from filters(found)


def programs(found: Iterable[Attached], cgroup: Path) -> Iterator[Finding]:
    """What to say of programs that are not this agent's."""
    groups: dict[tuple[str, bool], list[Attached]] = defaultdict(list)
    for one in found:
        blocks = one.alone and (Path(one.place) == cgroup or Path(one.place) in cgroup.parents)
        known = _known(one.name)
        who = known.who if known else _ANOTHER if one.name in _OURS else ""
        groups[who or one.name or f"without a name (id {one.id})", blocks].append(one)
    for (who, blocks), held in sorted(groups.items()):
        known = _known(held[0].name)
        names = some({one.name for one in held} - {""}, 3)
        whose = (
            f"program{'s' if len(held) > 1 else ''} {names} of {who if known or who == _ANOTHER else 'somebody else'}"
            if names
            else f"a program {who}"
        )
        what = f"{whose} at {some({one.attach_type for one in held})}"
        where = f"{some({one.place for one in held}, 3)} (bpftool prog show id {held[0].id})"
        if blocks:
            yield error(
                "programs of others", what, where, cause="it is attached so that no other program may be beside it (without BPF_F_ALLOW_MULTI)",
                next_step="have its owner attach it by a link or with BPF_F_ALLOW_MULTI, or end it: until then the mesh cannot attach its own",
            )  # fmt: skip
        elif known:
            yield warning("programs of others", what, where, cause=known.cause, next_step=known.next_step)
        elif who == _ANOTHER:
            yield warning(
                "programs of others", what, where, cause="an agent with another --pin-dir runs on this machine, or ran and was not uninstalled",
                next_step="run 'meshagent uninstall' with its --pin-dir and --run-dir, unless it serves other cgroups",
            )  # fmt: skip
        else:
            yield warning(
                "programs of others", what, where, cause="the mesh leaves it alone; both run, in the order in which they were attached",
                next_step="find out whose it is; if it changes addresses or refuses connections, what the mesh promises may not hold",
            )  # fmt: skip
    if not groups:
        yield ok("programs of others", "nobody else's are at the hooks of the mesh", str(cgroup))


def _known(name: str) -> _Known | None:
    return next((entry for entry in _PROGRAMS if entry.pattern.match(name)), None)


def filters(found: dict[str, set[Chain]]) -> Iterator[Finding]:
    """What to say of chains of the packet filter, by network namespace."""
    at: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    proxied = False
    for place, here in found.items():
        for table, chain in here:
            proxied |= bool(_KUBE_PROXY.fullmatch(chain)) and (chain.isupper() or table == "kube-proxy")
            for known in _CHAINS:
                if known.pattern.fullmatch(chain) or known.pattern.fullmatch(table):
                    at[known.who][place].add(chain)
    for known in _CHAINS:
        if held := at.get(known.who):
            chain = some({name for names in held.values() for name in names}, 3)
            what = f"chains of {known.who} are in {len(held)} of {len(found)} network namespaces: {chain}"
            yield warning("packet filter", what, some(held, 3), cause=known.cause, next_step=known.next_step)
    if not at:
        yield ok(
            "packet filter", f"no chains of other meshes in {len(found)} network namespaces{', kube-proxy is fine' if proxied else ''}"
        )
