"""ExternalServices: how workloads of this node get out of the mesh by name. Pure functions, called by `agent.l7.snapshot`.

All of their ports are the waypoint's, at the caller's side, because nobody at the other end enforces anything:

- HTTP: through the outbound listener, like an L7 service; the routes are for the declared hosts alone, and carry the authorization.
- others: the connect hook leads them to `listener`, which says who calls and picks a cluster by what was dialled; that leads to an internal listener
  (`stream`), one for each port for all callers of the node, which authorizes, looks at the name in the ClientHello if there is one, and goes out.

Connections to the outside leave from the caller's namespace like all others, and carry MARK: names resolve to what somebody else says, and the connect hook
refuses a marked socket that would go to an address of the mesh, to loopback or to a link-local address (bpf_src/mesh_connect.c). Names are resolved by
Envoy, with c-ares, from the node's own namespace and /etc/resolv.conf, whose changes it sees when it starts anew
(https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/upstream/service_discovery#logical-dns).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.matching.common_inputs.network.v3 import network_inputs_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, tls_pb2
from envoy.type.matcher.v3 import string_pb2
from google.protobuf import wrappers_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from xds.type.matcher.v3 import matcher_pb2

from agent.config import EGRESS_PORT
from agent.external import Endpoint, External, Origination
from agent.l7 import clusters, listeners, names, routes
from agent.l7.rbac import Authorization
from agent.l7.resources import packed
from agent.model import LocalWorkload, ServicePort, Snapshot

MARK = 0x6D736865
"""SO_MARK of connections to the outside: MESH_MARK_OUTSIDE in bpf_src/mesh_types.h."""
CONNECT_TIMEOUT_S = 10
"""TCP and TLS handshake together, over the Internet."""
HELLO_S = 10
"""A caller that has not sent its ClientHello by then is closed."""
SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem")
"""Where Debian, Red Hat, SUSE and Alpine keep whom the system trusts."""


def system_roots(files: Iterable[str] = SYSTEM_ROOTS) -> str:
    """The file with whom this node's system trusts, "" if there is none: then nothing can be verified, and what needs it is refused."""
    return next((file for file in files if Path(file).is_file()), "")


def problems(snapshot: Snapshot, roots: str) -> list[str]:
    """What an operator should know; `roots` is `system_roots`."""
    outside = (service.external for service in snapshot.services.values() if service.external is not None)
    unverified = sorted(one.hosts[0] for one in outside if one.tls is not None and not one.tls.roots)
    if roots or not unverified:
        return []
    hosts = ", ".join(unverified[:10])
    message = f"nobody gets out to {hosts}: this machine has no list of certificate authorities ({', '.join(SYSTEM_ROOTS)}); "
    return [message + "install ca-certificates and restart the agent, or give spec.tls.caCertificates"]


def cluster(service: str, port: ServicePort, external: External, roots: str) -> cluster_pb2.Cluster:
    """Build the way out to one port of an external service; `roots` is `system_roots`.

    One name is a logical host with all of its addresses, tried one after the other (RFC 8305); several names, or names and addresses, are as many hosts as
    they have addresses. What could not be verified, or leads nowhere, has no endpoint: 503, or a closed connection.
    """
    result = clusters.base(names.service(service, port.port), "" if External.is_stream(port) else port.app_protocol)
    originates = external.tls is not None and port.app_protocol != "tls"
    known = tuple(one for one in external.endpoints if external.dns or not one.is_name)
    usable = known if not originates or (external.tls and external.tls.roots) or roots else ()
    _choose_type(result, usable)
    result.lb_policy = cluster_pb2.Cluster.LEAST_REQUEST
    result.connect_timeout.CopyFrom(Duration(seconds=CONNECT_TIMEOUT_S))
    result.upstream_bind_config.socket_options.append(clusters.marked(MARK, "outside"))
    result.load_assignment.cluster_name = result.name
    if usable:
        hosts = result.load_assignment.endpoints.add().lb_endpoints
        hosts.extend(_endpoint(one, port.port) for one in usable)
    if originates and external.tls is not None and usable:
        alpn = "" if External.is_stream(port) else "h2" if port.app_protocol in clusters.HTTP2_PROTOCOLS else "http/1.1"
        result.transport_socket.CopyFrom(_upstream_tls(external.tls, roots, alpn))
    return result


def _choose_type(result: cluster_pb2.Cluster, endpoints: Sequence[Endpoint]) -> None:
    result.type = cluster_pb2.Cluster.STATIC
    if not any(one.is_name for one in endpoints):
        return
    result.type = cluster_pb2.Cluster.LOGICAL_DNS if len(endpoints) == 1 else cluster_pb2.Cluster.STRICT_DNS
    result.dns_lookup_family = cluster_pb2.Cluster.ALL if len(endpoints) == 1 else cluster_pb2.Cluster.V4_PREFERRED
    result.respect_dns_ttl = True
    result.wait_for_warm_on_init.value = False  # a resolver that is away must not hold up everything else


def _endpoint(endpoint: Endpoint, port: int) -> endpoint_components_pb2.LbEndpoint:
    host = endpoint_components_pb2.LbEndpoint(load_balancing_weight={"value": endpoint.weight})
    host.endpoint.address.CopyFrom(clusters.socket_address(endpoint.address, endpoint.ports.get(port, port)))
    return host


def _upstream_tls(tls: Origination, roots: str, alpn: str) -> base_pb2.TransportSocket:
    """Demand a certificate with one of the names; without a match there is no connection."""
    context = tls_pb2.UpstreamTlsContext(sni=tls.sni)
    common = context.common_tls_context
    if alpn:
        common.alpn_protocols.append(alpn)
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    common.tls_params.tls_maximum_protocol_version = common_pb2.TlsParameters.TLSv1_3
    validation = common.validation_context
    if tls.roots:
        validation.trusted_ca.inline_string = tls.roots
    else:
        validation.trusted_ca.filename = roots
    for name in tls.names:
        matcher = common_pb2.SubjectAltNameMatcher(san_type=_san_type(name), matcher=string_pb2.StringMatcher(exact=name))
        validation.match_typed_subject_alt_names.append(matcher)
    return base_pb2.TransportSocket(name="envoy.transport_sockets.tls", typed_config=packed(context))


def _san_type(name: str) -> common_pb2.SubjectAltNameMatcher.SanType.ValueType:
    if "://" in name:
        return common_pb2.SubjectAltNameMatcher.URI
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return common_pb2.SubjectAltNameMatcher.DNS
    return common_pb2.SubjectAltNameMatcher.IP_ADDRESS


def requests(
    service: str, port: int, external: External, addresses: Sequence[str], authorization: Authorization
) -> route_pb2.RouteConfiguration:
    """Build the routes of an HTTP port: requests to the declared hosts, or to fixed addresses by themselves; 421 for any other (RFC 9110, 15.5.20)."""
    name = names.service(service, port)
    result = routes.direct(name, name, f"{service} external", authorization)
    result.virtual_hosts[0].name = "hosts"
    del result.virtual_hosts[0].domains[:]
    literal = [f"[{address}]" if ":" in address else address for address in addresses] if external.fixed else []
    result.virtual_hosts[0].domains.extend([*external.hosts, *literal])
    other = result.virtual_hosts.add(name="other", domains=["*"]).routes.add(name="other host", match={"prefix": "/"})
    other.direct_response.status = 421
    other.response_headers_to_add.add(header=base_pb2.HeaderValue(key=names.REASON_HEADER, value="host-not-declared"))
    return result


def listener(local: LocalWorkload, trust_domain: str) -> listener_pb2.Listener:
    """Build the listener that the connect hook redirects a workload's connections to external services to that are not HTTP. It never changes."""
    result = listeners.bound(names.listener(names.EGRESS, local.workload.name), local, ("127.0.0.1", "::1"), EGRESS_PORT)
    state = [
        listeners.netns(local),
        *(
            listeners.value(key, text, shared=True)
            for key, text in (
                (names.PRINCIPAL_KEY, local.workload.identity(trust_domain).removeprefix("spiffe://")),
                (names.NAMESPACE_KEY, local.workload.namespace),
                (names.SERVICE_ACCOUNT_KEY, f"{local.workload.namespace}/{local.workload.service_account}"),
                (names.WORKLOAD_KEY, local.workload.name),
            )
        ),
        listeners.value(names.TCP_CLUSTER_KEY, f"{names.EGRESS}/%DOWNSTREAM_LOCAL_ADDRESS%", factory=names.TCP_CLUSTER_KEY),
    ]
    # Filter state names the cluster; what was not dialled as an external service has none, and is closed.
    result.filter_chains.add(name="egress", filters=[listeners.set_state(*state), _proxy(names.INVALID_CLUSTER)])
    result.traffic_direction = base_pb2.OUTBOUND
    result.listener_filters.append(listeners.original_destination())
    return result


def stream(service: str, port: ServicePort, external: External, callers: Sequence[str] | None) -> listener_pb2.Listener:
    """Build the node's internal listener for one port that is not HTTP; who calls comes with the connection. `callers` are those who may; None: all.

    They are told apart where the filter chain is chosen, because Envoy's RBAC network filter waits for a first byte from the caller, and until then lets
    through what the server says (seen with 1.40). Of TLS only a ClientHello with the name of a declared host gets through: none, or another, is closed,
    and so is what is no TLS.
    """
    result = listener_pb2.Listener(name=stream_name(service, port.port), stat_prefix=names.EGRESS, traffic_direction=base_pb2.OUTBOUND)
    result.internal_listener.SetInParent()
    result.filter_chains.add(name=_CHAIN, filters=[_proxy(names.service(service, port.port))])
    go = _go()
    if port.app_protocol == "tls":
        inspector = packed(tls_inspector_pb2.TlsInspector())
        result.listener_filters.add(name="envoy.filters.listener.tls_inspector", typed_config=inspector)
        result.listener_filters_timeout.CopyFrom(Duration(seconds=HELLO_S))
        go = _if("server-name", network_inputs_pb2.ServerNameInput(), external.hosts, go)
    if callers is not None:
        go = _if("caller", network_inputs_pb2.FilterStateInput(key=names.WORKLOAD_KEY), callers, go)
    if go.HasField("matcher"):
        result.filter_chain_matcher.CopyFrom(go.matcher)
    return result


_CHAIN = "external"
_NOBODY = "/"
"""No workload and no host is called that; a map must not be empty."""


def _go() -> matcher_pb2.Matcher.OnMatch:
    """Take the one filter chain."""
    found = matcher_pb2.Matcher.OnMatch()
    found.action.name = _CHAIN
    found.action.typed_config.CopyFrom(packed(wrappers_pb2.StringValue(value=_CHAIN)))
    return found


def _if(name: str, source: Message, values: Sequence[str], then: matcher_pb2.Matcher.OnMatch) -> matcher_pb2.Matcher.OnMatch:
    """Do that if an input is one of these, else nothing: the connection is closed
    (https://www.envoyproxy.io/docs/envoy/v1.40.0/intro/arch_overview/listeners/listener_filters#filter-chain-match)."""
    found = matcher_pb2.Matcher.OnMatch()
    tree = found.matcher.matcher_tree
    tree.input.name = name
    tree.input.typed_config.CopyFrom(packed(source))
    for one in values or (_NOBODY,):
        tree.exact_match_map.map[one].CopyFrom(then)
    return found


def stream_name(service: str, port: int) -> str:
    """Name of the internal listener of a port that is not HTTP."""
    return f"{names.EXTERNAL}/{service}/{port}"


def _proxy(target: str) -> listener_components_pb2.Filter:
    proxy = tcp_proxy_pb2.TcpProxy(stat_prefix=names.EGRESS, cluster=target, idle_timeout=Duration())
    return listener_components_pb2.Filter(name="envoy.filters.network.tcp_proxy", typed_config=packed(proxy))
