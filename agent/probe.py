"""A live probe of the data path: connections that only the kernel programs refuse, every few seconds, from a namespace of the agent's own.

Owned by the supervisor. The probe is a workload like any other, `meshagent/probe` with a service without endpoints and a policy that admits nobody, which
`Probe.extend` adds to every snapshot: the programs know nothing of it.

A connection is judged by the cgroup that its socket was *made* in (kernel/cgroup/cgroup.c, cgroup_sk_alloc; kernel/bpf/cgroup.c,
__cgroup_bpf_run_filter_sock_addr), not by who calls connect(). So a child, which moves itself below the agent's cgroup and into the probe's namespace,
makes the sockets once, hands them over (SCM_RIGHTS) and ends. The agent itself, which may run in any cgroup, dials with them again and again: a refused
socket can be connected anew. No process waits, none is forked for a probe, and no cgroup has to become a threaded one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TypeVar

from agent import features, netns
from agent.compact import Table
from agent.config import Config
from agent.model import Action, LocalWorkload, Policy, Service, ServicePort, Snapshot, Workload

T = TypeVar("T")
NAME: Final = "meshagent/probe"
VIRTUAL: Final = "192.0.0.8"
"""IPv4 dummy address: never anybody's (RFC 7600, section 4.8)."""
OWN, OTHER = "192.0.0.6", "192.0.0.5"
"""Host-local addresses that never leave a machine (RFC 7335, 192.0.0.0/29)."""
PORT: Final = 1
INTERVAL_S: Final = 10.0
_PATIENCE_S = 1
_CHILD_S = 10
_NAMESPACE = "probe"
_CGROUP = "meshagent-probe"
_MAKE_SOCKETS = """
import ctypes, os, socket, sys
cgroup, namespace, own, other, port, channel = sys.argv[1:]
with open(cgroup + "/cgroup.procs", "w") as procs:
    procs.write("0")
fd = os.open(namespace, os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)
if libc.setns(fd, 0x40000000):
    raise OSError(ctypes.get_errno(), "join " + namespace)
out, arriving, listener = (socket.socket() for _ in range(3))
arriving.bind((other, 0))
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((own, int(port)))
listener.listen(8)
socket.send_fds(socket.socket(fileno=int(channel)), [b"x"], [out.fileno(), arriving.fileno(), listener.fileno()])
"""


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of one probe. `works` None: it could not be made. `problem` is a sentence for people, "" if all is well."""

    works: bool | None = None
    problem: str = ""


class Probe:
    """See the module."""

    def __init__(self, config: Config) -> None:
        """Make nothing yet."""
        self._config = config
        self._source = config.netns_dir / _NAMESPACE
        self._cgroup = config.cgroup / _CGROUP
        self._cgroup_id = 0
        self._sockets: tuple[socket.socket, ...] = ()
        self._extended: tuple[Snapshot, Snapshot] | None = None
        self._workload = Workload(
            NAME, "probe", config.node, {}, (OWN, OTHER), str(self._source), enrolled=True, ready=True, policies=(NAME,)
        )
        port = ServicePort(PORT, "", "TCP", "", waypoint=False, reason="the agent's probe")
        self._service = Service(NAME, (VIRTUAL,), (port,))
        self._policy = Policy(NAME, Action.ALLOW)

    def extend(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot` with the probe in it; the same object for the same one."""
        if self._extended is None or self._extended[0] is not snapshot:
            extended = replace(
                snapshot,
                workloads=_with(snapshot.workloads, self._workload),
                services=_with(snapshot.services, self._service),
                policies=_with(snapshot.policies, self._policy),
            )
            self._extended = (snapshot, extended)
        return self._extended[1]

    def prepare(self) -> None:
        """Have the probe's namespace; one of an earlier run serves. Raises OSError."""
        netns.create(self._source)
        absent = {OWN, OTHER} - set(netns.addresses(self._source))
        netns.run_in(self._source, lambda: _configure(absent))

    def run(self, local: tuple[LocalWorkload, ...]) -> Result:
        """Dial once in each direction; blocks for up to two seconds. `local` is what is enrolled."""
        if not any(item.workload.name == NAME for item in local):
            return Result(None, f"the live probe cannot run: its namespace {self._source} is not enrolled; restart the agent")
        try:
            out, arriving, listener = self._open()
        except (OSError, subprocess.SubprocessError) as error:
            return Result(None, f"the live probe cannot run: {_words(error)}; is {self._config.cgroup} writable?")
        expected = {errno.ECONNREFUSED} if features.kernel_version() >= features.SET_RETVAL_KERNEL else {errno.ECONNREFUSED, errno.EPERM}
        left = _dial(out, VIRTUAL)
        if left not in expected:
            return self._failed(
                f"the live probe's connection to a service without endpoints {_outcome(left)}, but mesh_connect4 has to refuse it at once: "
                "connections of pods are not redirected"
            )
        came = _dial(arriving, OWN)
        if came != errno.ECONNREFUSED or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return self._failed(
                f"the live probe's connection to a workload that admits nobody {_outcome(came)}, but mesh_sk_lookup has to refuse it: "
                "policy does not hold at receivers"
            )
        return Result(works=True)

    def _failed(self, problem: str) -> Result:
        self.close()  # these sockets are in whatever state; the next probe makes others
        return Result(False, f"{problem}; see the hooks and foreign programs in 'meshagent status', then restart the agent")

    def _open(self) -> tuple[socket.socket, ...]:
        self._cgroup.mkdir(exist_ok=True)
        number = self._cgroup.stat().st_ino
        if number != self._cgroup_id:  # a cgroup that was removed takes no part any more, its sockets still belong to it
            self.close()
        if not self._sockets:
            self._sockets = self._made()
            self._cgroup_id = number
        return self._sockets

    def _made(self) -> tuple[socket.socket, ...]:
        here, there = socket.socketpair()
        with here, there:
            here.settimeout(_CHILD_S)
            arguments = (str(self._cgroup), str(self._source), OWN, OTHER, str(PORT), str(there.fileno()))
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _MAKE_SOCKETS, *arguments],
                pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHILD_S, check=False,
            )  # fmt: skip
            if done.returncode:
                raise OSError(errno.EIO, (done.stderr.strip().splitlines() or ["its child ended without a word"])[-1])
            _, fds, _, _ = socket.recv_fds(here, 1, 3)
        made = tuple(socket.socket(fileno=fd) for fd in fds)
        for item in made[:2]:
            # Blocking: the kernel then leaves a refused socket as new (net/ipv4/af_inet.c, __inet_stream_connect, sock_error).
            item.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _PATIENCE_S, 0))
        return made

    def close(self) -> None:
        """Close the sockets; the namespace stays."""
        for item in self._sockets:
            item.close()
        self._sockets = ()


def _with(mapping: Mapping[str, T], item: T) -> Mapping[str, T]:
    """`mapping` and one more; the stored models' tables need not be copied for it."""
    return mapping.changed({NAME: item}) if isinstance(mapping, Table) else MappingProxyType({**mapping, NAME: item})


def _configure(absent: set[str]) -> None:
    """Set the loopback interface up and give it these addresses. By hand: pyroute2 would take 10 MB of every agent for it."""
    loopback = socket.if_nametoindex("lo")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        _change(route, _RTM_NEWLINK, 0, struct.pack("=BxHiII", socket.AF_UNSPEC, 0, loopback, _IFF_UP, _IFF_UP))
        for address in absent:
            raw = socket.inet_aton(address)
            attributes = struct.pack("=HH4sHH4s", 8, _IFA_LOCAL, raw, 8, _IFA_ADDRESS, raw)
            _change(route, _RTM_NEWADDR, _NLM_F_CREATE, struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, loopback) + attributes)


_RTM_NEWLINK, _RTM_NEWADDR = 16, 20  # include/uapi/linux/rtnetlink.h
_NLM_F_REQUEST_ACK, _NLM_F_CREATE = 0x5, 0x400  # include/uapi/linux/netlink.h
_IFA_ADDRESS, _IFA_LOCAL = 1, 2  # include/uapi/linux/if_addr.h
_IFF_UP = 1  # include/uapi/linux/if.h


def _change(route: socket.socket, kind: int, flags: int, body: bytes) -> None:
    """Have one thing changed (rtnetlink(7)). Raises OSError for a refusal."""
    route.send(struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST_ACK | flags, 1, 0) + body)
    (code,) = struct.unpack_from("=i", route.recv(4096), 16)
    if code:
        raise OSError(-code, os.strerror(-code))


def _dial(item: socket.socket, address: str) -> int:
    """Errno of a connect(), 0 if it came about."""
    try:
        item.connect((address, PORT))
    except OSError as error:
        return error.errno or errno.EIO
    with contextlib.suppress(OSError):
        item.shutdown(socket.SHUT_RDWR)
    return 0


def _outcome(code: int) -> str:
    if code == 0:
        return "came about"
    return "was not answered" if code == errno.EINPROGRESS else f"failed with {errno.errorcode.get(code, code)} ({os.strerror(code)})"


def _words(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def remove(config: Config) -> None:
    """Remove the cgroup; the namespace goes with the other mounts."""
    with contextlib.suppress(OSError):
        (config.cgroup / _CGROUP).rmdir()
