"""What a workload's name server answers itself and where it sends the rest: a pure function of the model and of the workload's resolv.conf.

A caller in namespace `shop` finds the service `cart` there as cart, cart.shop, cart.shop.svc and cart.shop.svc.cluster.local
(https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/, without the search domains that make the short names long).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.model import Snapshot

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_HOST = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})+")
_NETNS_DIRECTORIES = frozenset({Path("/run/netns"), Path("/var/run/netns")})


@dataclass(frozen=True, slots=True)
class Record:
    """One service: its names, the whole one first, and the addresses they stand for."""

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    outside: bool = False
    """Hosts outside the mesh: each of the names is whole."""


def records(snapshot: Snapshot, namespace: str, domain: str) -> tuple[Record, ...]:
    """What a caller in `namespace` can name, sorted. A service without addresses of its own stands for its ready endpoints."""
    headless = _endpoints(snapshot)
    found = []
    for name, service in sorted(snapshot.services.items()):
        home, _, leaf = name.partition("/")
        if not (_LABEL.fullmatch(home) and _LABEL.fullmatch(leaf)):  # would not be a name, but might be a line in a file
            continue
        short = (leaf,) if home == namespace and leaf != "localhost" else ()  # RFC 6761, section 6.3
        names = (f"{leaf}.{home}.svc.{domain}", f"{leaf}.{home}.svc", f"{leaf}.{home}", *short)
        found.append(Record(names, service.addresses or headless.get(name, ())))
    return (*found, *_hosts(snapshot, namespace, {name for record in found for name in record.names}))


def _hosts(snapshot: Snapshot, namespace: str, taken: set[str]) -> Iterable[Record]:
    """Hosts of ExternalServices, none that is a name of a service. One that is for this namespace alone goes before one for all."""
    externals = [(name, service, service.external) for name, service in sorted(snapshot.services.items()) if service.external is not None]
    for private in (True, False):
        for name, service, external in externals:
            if external.private is not private or (private and name.partition("/")[0] != namespace):
                continue
            names = tuple(host for host in external.hosts if host not in taken and _HOST.fullmatch(host))
            taken.update(names)
            if names:
                yield Record(names, service.addresses, outside=True)


def _endpoints(snapshot: Snapshot) -> Mapping[str, tuple[str, ...]]:
    """Addresses of the ready endpoints of every service that has none itself."""
    found: dict[str, set[str]] = {name: set() for name, service in snapshot.services.items() if not service.addresses}
    if found:
        for workload in snapshot.workloads.values():
            for backing in workload.backing if workload.ready else ():
                if backing.service in found:
                    found[backing.service].update(workload.addresses)
    return {name: tuple(sorted(addresses)) for name, addresses in found.items()}


def hosts_file(known: Iterable[Record]) -> str:
    """Lines for --addn-hosts: the first name of an address is what a reverse lookup of it yields."""
    return "".join(f"{address} {' '.join(record.names)}\n" for record in known for address in record.addresses)


def servers_file(known: Iterable[Record], resolvers: Sequence[str], domain: str) -> str:
    """Lines for --servers-file: which names are never forwarded, and where the others go.

    Without a line of its own, a type that a known name does not have (AAAA of a service with IPv4 only) would be forwarded. `server=/NAME/` takes
    NAME and everything below it; `server=/*.NAME/#` gives back what is below (dnsmasq(8), --server), so that a service `dev` hides no `web.dev`.
    """
    lines = [f"server={resolver}" for resolver in resolvers]
    lines.append(f"server=/svc.{domain}/")
    for record in known:
        for name in record.names if record.outside else record.names[1:]:
            lines += (f"server=/{name}/", f"server=/*.{name}/#")
    return "\n".join(lines) + "\n"


def nameservers(resolv_conf: str) -> tuple[str, ...]:
    """The resolvers of a resolv.conf(5), in order; without a line it is the one on the local machine.

    One with a scope (fe80::1%eth0) is left out: it means something else on each interface, and its queries go where they were meant for.
    """
    found: dict[str, None] = {}
    named = False
    for line in resolv_conf.splitlines():
        fields = line.split()
        if len(fields) < 2 or not line.startswith("nameserver") or fields[0] != "nameserver":
            continue
        try:
            address = ipaddress.ip_address(fields[1])
        except ValueError:
            continue
        named = True
        if not getattr(address, "scope_id", None):
            found[str(address)] = None
    return tuple(found) if named else ("127.0.0.1",)


def resolv_conf(network_namespace: str, root: Path = Path("/")) -> Path:
    """The resolv.conf that processes in a workload's namespace read: ip-netns(8) gives a named one its own below /etc/netns, if there is one."""
    path = Path(network_namespace)
    if network_namespace and ("/" not in network_namespace or path.parent in _NETNS_DIRECTORIES):
        own = root / "etc/netns" / path.name / "resolv.conf"
        if own.is_file():
            return own
    return root / "etc/resolv.conf"
