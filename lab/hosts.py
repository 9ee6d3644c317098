"""The /etc/hosts of every place: its own name and, in pods, the Services by name, because a lab has no cluster DNS. Called by `lab.lab`.

The files are rewritten in place: each is bind-mounted over /etc/hosts in the private mount namespaces of running programs.
"""

from __future__ import annotations

from collections.abc import Iterable

from lab import network, paths, resources
from lab.resources import VirtualService
from lab.topology import Place, Pod

_LOCAL = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


def text(place: Place, services: Iterable[VirtualService]) -> str:
    """Return what a place should see."""
    lines = [f"{address} {place.name}" for address in network.place_addresses(place)]
    if isinstance(place, Pod):
        # A pod may be called like a service ("redis"): the service is what callers mean, so it comes first.
        lines = [f"{address} {' '.join(s.names(place.namespace))}" for s in services for address in s.addresses] + lines
    return _LOCAL + "".join(f"{line}\n" for line in lines)


def write(places: Iterable[Place]) -> None:
    """Bring the files of places up to date with the Services that the controller holds."""
    services = resources.services(paths.RESOURCES)
    paths.HOSTS.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in places:
        path = paths.place_hosts(place)
        wanted = text(place, services)
        if not path.exists() or path.read_text() != wanted:
            path.write_text(wanted)
