"""A large model, encoded as a controller sends it: 5,000 services with 20 endpoints each. Called by the benchmarks that ask what size costs.

All endpoints are on other nodes: what each agent of a large mesh must know of everybody else. Each has four labels, one address and a policy: there is one
policy for each namespace, which admits the namespace itself and one service account of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from meshapi import discovery_pb2 as pb

PORT, TARGET_PORT = 80, 8080
ZONES = 3


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is of everything."""

    services: int = 5000
    endpoints: int = 20
    """Of each service; together fewer than 2^24, which is what fits into 10.0.0.0/8."""
    policies: int = 100
    """One for each namespace."""
    nodes: int = 200

    def __str__(self) -> str:
        total = self.services * self.endpoints
        return f"{self.services} services, {total} endpoints on {self.nodes} other nodes, {self.policies} policies"


@dataclass(frozen=True, slots=True)
class Model:
    """Everything of one size."""

    size: Size = Size()

    def resources(self) -> Iterator[pb.Resource]:
        """Every resource, encoded."""
        for number in range(self.size.policies):
            yield self.policy(number)
        for service in range(self.size.services):
            yield self.service(service)
            for endpoint in range(self.size.endpoints):
                yield self.workload(service, endpoint)

    def namespace(self, service: int) -> str:
        """Namespace of a service."""
        return f"team-{service % self.size.policies}"

    def service_name(self, service: int) -> str:
        """Full name of a service."""
        return f"{self.namespace(service)}/service-{service}"

    def workload_name(self, service: int, endpoint: int) -> str:
        """Full name of an endpoint: that of a Deployment's pod, as long as those are."""
        return f"{self.service_name(service)}-{_hash(service)}-{endpoint:05d}"

    def workload(self, service: int, endpoint: int, *, ready: bool = True) -> pb.Resource:
        """An endpoint of a service."""
        namespace, _, name = self.workload_name(service, endpoint).partition("/")
        number = service * self.size.endpoints + endpoint
        node = number % self.size.nodes
        workload = pb.Workload(
            namespace=namespace,
            name=name,
            service_account=f"service-{service}",
            node=f"remote-{node}",
            labels={"app": f"service-{service}", "pod-template-hash": _hash(service), "version": "v1", "tier": f"tier-{service % 4}"},
            addresses=[f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"],
            network_namespace=f"cni-{number:016x}",
            enrolled=True,
            ready=ready,
            backing=[pb.Backing(service=self.service_name(service), ports=[pb.PortMapping(service_port=PORT, target_port=TARGET_PORT)])],
            policies=[f"{namespace}/callers"],
            zone=f"zone-{node % ZONES}",
        )
        return resource("workload", namespace, name, pb.Entity(workload=workload))

    def service(self, service: int) -> pb.Resource:
        """A service of one L4 port."""
        namespace, _, name = self.service_name(service).partition("/")
        port = pb.ServicePort(port=PORT, name="tcp", protocol="TCP", reason="no L7 feature is used")
        address = f"172.{16 + (service >> 16)}.{service >> 8 & 255}.{service & 255}"
        return resource(
            "service", namespace, name, pb.Entity(service=pb.Service(namespace=namespace, name=name, addresses=[address], ports=[port]))
        )

    def policy(self, number: int) -> pb.Resource:
        """The policy of a namespace."""
        namespace, other = self.namespace(number), (number + 1) % self.size.policies
        sources = [pb.Source(namespaces=[namespace]), pb.Source(service_accounts=[f"{self.namespace(other)}/service-{other}"])]
        rules = [pb.PolicyRule(sources=sources, operations=[pb.Operation(ports=[TARGET_PORT])])]
        return resource("policy", namespace, "callers", pb.Entity(policy=pb.Policy(namespace=namespace, name="callers", rules=rules)))


def resource(kind: str, namespace: str, name: str, entity: pb.Entity) -> pb.Resource:
    """An entity with its name and version, as the controller gives them."""
    encoded = entity.SerializeToString(deterministic=True)
    return pb.Resource(name=f"{kind}/{namespace}/{name}", version=hashlib.sha256(encoded).hexdigest()[:16], entity=encoded)


def changes(model: Model) -> Iterator[pb.Resource]:
    """One endpoint after the other, each of another service, becomes unready."""
    for endpoint in range(model.size.endpoints):
        for service in range(model.size.services):
            yield model.workload(service, endpoint, ready=False)


def _hash(service: int) -> str:
    """What a Deployment puts into its pods' names."""
    return hashlib.sha256(str(service).encode()).hexdigest()[:10]
