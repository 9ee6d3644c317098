"""The kernel's side of WireGuard: the device, its peers, the routes and rules that lead to it. The only place that uses pyroute2, which is imported when
WireGuard is used: that takes 0.3 s. Blocking; works in the network namespace of the thread that calls.

A packet goes into the device if a rule says that its source is a workload of this node *and* the table says that its destination is a workload of a
peer's. Both are exact addresses, so the CNI's routes stay as they are, and no packet of the node itself, WireGuard's own above all, is ever led there: those
have the node's addresses as their source. Each route has an unreachable one behind it: if the device is taken away, packets are refused, not sent unencrypted.
TCP from and to HBONE's port goes round the device: it is encrypted already, and what opens new connections when WireGuard does not work.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agent import netlink, netns
from agent.config import HBONE_PORT
from agent.errors import KernelRefused
from agent.wireguard.keys import KeyPair

DEVICE: Final = "mesh-wg0"
TABLE: Final = 51871
"""Of routes to workloads of peers; nobody else's."""
BYPASS, LEAD, AFTER = 700, 701, 702
"""Priorities of the rules: HBONE goes on at AFTER, sources of this node look into TABLE. After `local` (0), before those of CNIs that route by source."""
FWMARK: Final = 0x6D657368
"""On WireGuard's own packets, for the rules of others: no rule of ours needs it."""
LAST_METRIC: Final = 0xFFFFFFFF
MTU_COST: Final = 80
"""IPv6 (40), UDP (8), WireGuard's header and tag (32): drivers/net/wireguard/messages.h, MESSAGE_MINIMUM_LENGTH."""
MIN_MTU: Final = 1280  # IPv6 needs it (RFC 8200, 5)
KEEPALIVE_S: Final = 25
"""Also what begins the first handshake, and every two minutes the next: that both ends work is known before, and not by, the application's packets."""
PORTION: Final = 256
"""Addresses in one message; a netlink message of a peer with 65,536 bytes would be refused."""
FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_RTM_NEWLINK = 16
_CREATE = netlink.ACK | 0x600  # NLM_F_CREATE | NLM_F_EXCL
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1  # include/uapi/linux/if_link.h
_GOTO, _NOP = 2, 3  # FR_ACT_*, include/uapi/linux/fib_rules.h
_NOTHING_THERE = (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL)


@dataclass(frozen=True, slots=True)
class Found:
    """A peer as the kernel has it. `handshake`: Unix seconds of the last one, 0 if there was none."""

    endpoint: tuple[str, int] | None
    handshake: int
    received: int
    sent: int
    allowed: frozenset[str]


@dataclass(frozen=True, slots=True)
class State:
    """The device. `peers` by public key."""

    public_key: bytes
    port: int
    peers: dict[bytes, Found] = field(default_factory=dict)


def unavailable() -> str:
    """Why this kernel cannot do WireGuard, "" if it can: tried, by making a device in a namespace that goes with it."""
    try:
        netns.apart(_try)
    except OSError as error:
        release = os.uname().release
        if error.errno == errno.EOPNOTSUPP:
            return f"Linux {release} has no WireGuard: it is built without CONFIG_WIREGUARD, or the module is not installed (try: modprobe wireguard)"
        return f"Linux {release} does not let the agent make a WireGuard device: {os.strerror(error.errno or 0)}"
    return ""


def _try() -> None:
    request = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)  # struct ifinfomsg
    request += netlink.attribute(_IFLA_IFNAME, b"probe\0")
    request += netlink.attribute(_IFLA_LINKINFO, netlink.attribute(_IFLA_INFO_KIND, b"wireguard"))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        route.settimeout(60)  # the kernel may have to load the module
        route.bind((0, 0))
        for _ in netlink.exchange(route, "make a WireGuard device", _RTM_NEWLINK, _CREATE, request):
            pass


class Device:
    """The device of one agent, known by its alias. Every method raises KernelRefused."""

    def __init__(self, owner: str) -> None:
        """`owner` tells this agent from others on the machine: its run directory."""
        self._alias = f"meshagent {owner}"

    def read(self, *, allowed: bool = True) -> State | None:
        """The device and its peers, with what each may use if that is asked for; None if there is none. Refuses one of somebody else."""
        with _links() as ip:
            if not self._index(ip):
                return None
        with _wireguard() as wg:
            return self._state(wg, allowed=allowed)

    def make(self, pair: KeyPair, port: int, mtu: int) -> None:
        """Have the device, with this key if it is new, at this port and up."""
        with _links() as ip:
            index = self._index(ip)
            fresh = not index
            if fresh:
                ip.link("add", ifname=DEVICE, kind="wireguard")
                index = ip.link_lookup(ifname=DEVICE)[0]
            ip.link("set", index=index, ifalias=self._alias, mtu=mtu)
            with _about(f"UDP port {port} is taken: give the agent another --wireguard-port", errno.EADDRINUSE):
                with _wireguard() as wg:
                    if fresh:
                        wg.set(DEVICE, private_key=_text(pair.private()), listen_port=port, fwmark=FWMARK)
                    elif self._state(wg).port != port:
                        wg.set(DEVICE, listen_port=port)
                ip.link("set", index=index, state="up")

    def rekey(self, pair: KeyPair) -> None:
        """Replace the device's key, and have each peer hear of it at once: its next handshake is with the new one."""
        with _wireguard() as wg:
            wg.set(DEVICE, private_key=_text(pair.private()))
            for key in self._state(wg).peers:
                for seconds in (0, KEEPALIVE_S):  # turning it on sends a packet (drivers/net/wireguard/netlink.c, set_peer)
                    wg.set(DEVICE, peer={"public_key": _text(key), "update_only": True, "persistent_keepalive": seconds})

    def put_peer(self, key: bytes, endpoint: tuple[str, int]) -> None:
        """Have a peer, at this address; which ones it may use stays as it is."""
        peer = {"public_key": _text(key), "endpoint_addr": endpoint[0], "endpoint_port": endpoint[1], "persistent_keepalive": KEEPALIVE_S}
        with _wireguard() as wg:
            wg.set(DEVICE, peer=peer)

    def allow(self, key: bytes, addresses: Iterable[str]) -> None:
        """Let a peer that is there use these addresses too. One that was another peer's is taken from that in the same moment."""
        with _wireguard() as wg:
            self._allow(wg, key, addresses, update_only=True)

    def disallow(self, addresses: Collection[str]) -> None:
        """Take addresses from whichever peer has them, without a moment in which the others are missing.

        They move to a peer that nobody has the key of, which is then removed: before Linux 6.14 there is no other way to take one address.
        """
        if addresses:
            nobody = KeyPair().public
            with _wireguard() as wg:
                self._allow(wg, nobody, addresses, update_only=False)
                wg.set(DEVICE, peer={"public_key": _text(nobody), "remove": True})

    @staticmethod
    def _allow(wg: Any, key: bytes, addresses: Iterable[str], *, update_only: bool) -> None:
        for portion in _portions(addresses):
            wg.set(DEVICE, peer={"public_key": _text(key), "update_only": update_only, "allowed_ips": [_exact(text) for text in portion]})

    def remove_peer(self, key: bytes) -> None:
        """Forget a peer: what it sends is not decrypted any more."""
        with _wireguard() as wg:
            wg.set(DEVICE, peer={"public_key": _text(key), "remove": True})

    def routes(self) -> frozenset[str]:
        """The addresses that packets are led into the device for, and are refused without it."""
        with _links() as ip:
            led, refused = self._routes(ip)
            return frozenset(led & refused)

    def tidy(self) -> None:
        """Remove half of a pair of routes whose other half is gone."""
        with _links() as ip:
            led, refused = self._routes(ip)
        if halves := led ^ refused:
            self.leave(halves)

    def _routes(self, ip: Any) -> tuple[set[str], set[str]]:
        index = self._index(ip)
        led, refused = set[str](), set[str]()
        for family in FAMILIES:
            for route in ip.get_routes(family=family, table=TABLE):
                found = led if index and route.get_attr("RTA_OIF") == index else refused
                found.add(str(ipaddress.ip_address(route.get_attr("RTA_DST"))))
        return led, refused

    def lead(self, addresses: Iterable[str]) -> None:
        """Lead packets to these addresses into the device; first of all have them refused without it."""
        with _links() as ip:
            index = self._index(ip)
            for text in addresses:
                destination, family = _exact(text), _family(text)
                ip.route("replace", dst=destination, family=family, table=TABLE, type="unreachable", priority=LAST_METRIC)
                ip.route("replace", dst=destination, family=family, table=TABLE, oif=index, scope="link", priority=1)

    def leave(self, addresses: Iterable[str]) -> None:
        """Undo `lead`."""
        with _links() as ip:
            for text in addresses:
                route = {"dst": _exact(text), "family": _family(text), "table": TABLE}
                _gone(ip.route, "del", **route, scope="link", priority=1)  # IPv4 finds it by its scope too
                _gone(ip.route, "del", **route, type="unreachable", priority=LAST_METRIC)

    def sources(self) -> frozenset[str]:
        """The sources whose packets look into the table."""
        with _links() as ip:
            return frozenset(
                str(ipaddress.ip_address(rule.get_attr("FRA_SRC")))
                for family in FAMILIES
                for rule in ip.get_rules(family=family)
                if rule.get_attr("FRA_PRIORITY") == LEAD and rule.get_attr("FRA_TABLE") == TABLE and rule.get_attr("FRA_SRC")
            )

    def serve(self, addresses: Iterable[str]) -> None:
        """Have packets from these sources look into the table."""
        with _links() as ip:
            self._bypass(ip)
            for text in addresses:
                _there(ip.rule, "add", **_source(text))

    def ignore(self, addresses: Iterable[str]) -> None:
        """Undo `serve`."""
        with _links() as ip:
            for text in addresses:
                _gone(ip.rule, "del", **_source(text))

    @staticmethod
    def _bypass(ip: Any) -> None:
        for rule in _bypasses():
            _there(ip.rule, "add", **rule)

    def remove(self) -> bool:
        """Remove the device, its routes and its rules; False if there was nothing."""
        with _links() as ip:
            try:
                index = self._index(ip)
            except KernelRefused:  # another agent's: its routes and rules too
                return False
            rules = self.sources()
            if not index and not rules and not any(True for family in FAMILIES for _ in ip.get_routes(family=family, table=TABLE)):
                return False
            # Rules first: without them nothing is led anywhere.
            self.ignore(rules)
            for rule in _bypasses():
                _gone(ip.rule, "del", **rule)
            for family in FAMILIES:
                ip.flush_routes(family=family, table=TABLE)
            if index:
                ip.link("del", index=index)
            return True

    def _index(self, ip: Any) -> int:
        """Of our device; 0 if there is none."""
        found = ip.link_lookup(ifname=DEVICE)
        if not found:
            return 0
        link = ip.get_links(found[0])[0]
        if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "wireguard" or link.get_attr("IFLA_IFALIAS") != self._alias:
            raise KernelRefused(
                f"network device {DEVICE} is not this agent's ({link.get_attr('IFLA_IFALIAS') or 'no alias'}): WireGuard is not used; "
                f"if nobody needs it, ip link delete {DEVICE}"
            )
        return int(found[0])

    @staticmethod
    def _state(wg: Any, *, allowed: bool = False) -> State:
        peers: dict[bytes, Found] = {}
        key, port = b"", 0
        for part in wg.info(DEVICE):  # a large device comes in several parts, and a peer may go on in the next
            key = base64.b64decode(part.get_attr("WGDEVICE_A_PUBLIC_KEY") or b"") or key
            port = part.get_attr("WGDEVICE_A_LISTEN_PORT") or port
            for peer in part.get_attr("WGDEVICE_A_PEERS") or ():
                name = base64.b64decode(peer.get_attr("WGPEER_A_PUBLIC_KEY"))
                may = {ip["addr"].partition("/")[0] for ip in peer.get_attr("WGPEER_A_ALLOWEDIPS") or ()} if allowed else set[str]()
                if name in peers:
                    before = peers[name]
                    peers[name] = Found(before.endpoint, before.handshake, before.received, before.sent, before.allowed | may)
                    continue
                endpoint = peer.get_attr("WGPEER_A_ENDPOINT")
                shaken = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
                peers[name] = Found(
                    (endpoint["addr"], endpoint["port"]) if endpoint else None,
                    shaken["tv_sec"] if shaken else 0,
                    peer.get_attr("WGPEER_A_RX_BYTES") or 0,
                    peer.get_attr("WGPEER_A_TX_BYTES") or 0,
                    frozenset(may),
                )
        return State(key, port, peers)


def mtu_for(addresses: Collection[str]) -> int:
    """What a packet in the device may have so that it fits, encrypted, through every interface that has one of the node's `addresses`."""
    with _links() as ip:
        indexes = {a["index"] for a in ip.get_addr() if (a.get_attr("IFA_LOCAL") or a.get_attr("IFA_ADDRESS")) in addresses}
        found = [ip.get_links(index)[0].get_attr("IFLA_MTU") for index in indexes]
    return max(MIN_MTU, min(found, default=1500) - MTU_COST)


def own_addresses() -> tuple[str, ...]:
    """Those of the node: WireGuard's packets have one of them."""
    return netns.addresses(Path("/proc/thread-self/ns/net"))


def _source(text: str) -> dict[str, Any]:
    return {"family": _family(text), "priority": LEAD, "table": TABLE, "src": text, "src_len": _bits(text)}


def _bypasses() -> Iterator[dict[str, Any]]:
    """Where HBONE's packets go on: first the place, then the way there."""
    port = f"{HBONE_PORT}:{HBONE_PORT}"
    for family in FAMILIES:
        yield {"family": family, "priority": AFTER, "action": _NOP}
        for ends in ({"dport_range": port}, {"sport_range": port}):
            yield {"family": family, "priority": BYPASS, "action": _GOTO, "goto": AFTER, "ip_proto": socket.IPPROTO_TCP, **ends}


def _text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def _family(text: str) -> int:
    return socket.AF_INET6 if ":" in text else socket.AF_INET


def _bits(text: str) -> int:
    return 128 if ":" in text else 32


def _exact(text: str) -> str:
    return f"{text}/{_bits(text)}"


def _portions(addresses: Iterable[str]) -> Iterator[list[str]]:
    every = list(addresses)
    for start in range(0, len(every), PORTION):
        yield every[start : start + PORTION]


@contextmanager
def _links() -> Iterator[Any]:
    from pyroute2 import IPRoute  # noqa: PLC0415  the module says why

    with _about(), IPRoute() as ip:
        yield ip


@contextmanager
def _wireguard() -> Iterator[Any]:
    from pyroute2 import WireGuard  # noqa: PLC0415

    with _about(), WireGuard() as wg:
        yield wg


@contextmanager
def _about(hint: str = "", code: int = 0) -> Iterator[None]:
    """Turn the kernel's refusals into ours; with `hint` those of `code`."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        yield
    except KernelRefused:
        raise
    except (NetlinkError, OSError) as error:
        number = getattr(error, "code", None) or getattr(error, "errno", None) or 0
        if hint and number == code:
            raise KernelRefused(hint) from error
        raise KernelRefused(f"the kernel refuses a change of WireGuard: {os.strerror(number) if number else error}") from error


def _gone(change: Callable[..., object], *what: str, **which: Any) -> None:
    """Remove what may be gone already."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        change(*what, **which)
    except NetlinkError as error:
        if error.code not in _NOTHING_THERE:
            raise


def _there(change: Callable[..., object], *what: str, **which: Any) -> None:
    """Make what may be there already."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        change(*what, **which)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
