"""What a failed call died of, and what to do about it: the words of `meshagent trace`. Pure.

Envoy's own words for a response: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/http/http_conn_man/response_code_details.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from agent.bpf.manifest import Close, Reason
from agent.l7.access_log import RequestRecord

DENIED: Final = {
    Reason.NO_ENTRY: "the agent has not compiled this policy: see 'meshagent status'",
    Reason.NO_BACKEND: "no endpoint is ready: see the Workloads that the service selects",
    Reason.SPOOFED: "a process uses the address of a local workload from outside its namespace",
    Reason.NO_LISTENER: "the waypoint is not ready: see 'meshagent status'",
    Reason.WAYPOINT_PORT: "ports 15001, 15002, 15003 and 15006 belong to the waypoint: dial the service's own port",
    Reason.NO_PORT: "the service has no such port: see its spec.ports",
    Reason.AUDIT: "nothing was refused: an AuthorizationPolicy that enforces this rule would do so",
    Reason.PLAINTEXT: "STRICT: plaintext from outside this node was refused; enrol the caller, or make the port PERMISSIVE in its PeerAuthentication",
    Reason.NO_TUNNEL: "STRICT: this node's waypoint cannot prove yet who the workload is, and plaintext was not tried: see 'meshagent status'",
    Reason.EGRESS: "declare an ExternalService for the destination, or allow egress in the caller's namespace (annotation meshagent.io/egress: allow)",
    Reason.UNKNOWN_ADDRESS: "declare this address in the Workload's spec.addresses",
}
"""Next step by the kernel's reason; what a policy refused `of_policy` explains."""
CLOSED: Final = {
    Close.FAILED: "the application gave up before an answer came: is the backend slow to accept, or the application's time-out short?",
    Close.REFUSED: "the backend did not accept: is it listening, and does the policy at its node allow the caller?",
    Close.TIMED_OUT: "nothing answered: is the backend's node up, and does a firewall or route between the nodes drop its packets?",
}
"""Next step by how a connection ended; of other ends there is none."""
WAYPOINT_AWAY: Final = "the waypoint does not listen: see 'meshagent status'"
NOT_LISTENING: Final = "the application does not accept connections on this port: is it running, and does it listen there?"
UNCERTIFIED: Final = "the {own} has no certificate that is valid: see 'meshagent identity' on its node, and whether the controller answers"
_UNMATCHED: Final = ": no rule matches"  # as agent.policy writes it
_DEFAULT_DENY: Final = "/(default-deny)"  # what the controller calls a namespace's default, behind the namespace: no object has that name
_RBAC = re.compile(r"rbac_access_denied_matched_policy\[(.*)\]$")
_UNSPECIFIC = "TLS_error"
_TLS = (  # BoringSSL's names of errors and alerts (https://www.rfc-editor.org/rfc/rfc8446#section-6.2); an alert is about one's own certificate
    ("ALERT_CERTIFICATE_EXPIRED", "the {own}'s certificate has run out: see 'meshagent identity' on its node, and whether the controller answers"),
    ("certificate has expired", "the {other}'s certificate has run out: see 'meshagent identity' on its node, and whether the controller answers"),
    ("UNKNOWN_CA", "the {other} does not trust who signed the {own}'s certificate: see 'meshagent identity' on both nodes"),
    ("CERTIFICATE_VERIFY_FAILED", "the {other}'s certificate was not accepted: is it of somebody else, or of another authority? see 'meshagent identity'"),
    ("Secret is not supplied", UNCERTIFIED),  # envoy source/common/tls/ssl_socket.cc, NotReadySslSocket
    (_UNSPECIFIC, "the two ends did not agree on TLS: see 'meshagent identity' on both nodes"),
)  # fmt: skip
_CLOSED_EARLY = "the backend closed the connection before it answered: see its log, and whether it speaks HTTP on this port"
_DETAILS = (  # of a response that the waypoint made itself
    ("local_rate_limited", "a rate limit of the service was reached: see rateLimits in its TrafficPolicy, or call less often"),
    ("rate_limit_quota", "a global rate limit was reached: see rateLimits (scope: Global) in its TrafficPolicy, or call less often"),
    ("Jwt_is_missing", "the request has no token, and RequestAuthentication or a policy demands one: send 'Authorization: Bearer TOKEN'"),
    ("jwt_authn_access_denied", "the request's token was not accepted: see the issuer, audiences and keys of the RequestAuthentication, and the token's time"),
    ("route_not_found", "no route of the service matches the request: see the rules of its HTTPRoute"),
    ("fault_filter_abort", "a fault of the service's TrafficPolicy made this answer"),
    ("overflow", "a limit of connections or requests was reached: see the limits in the service's TrafficPolicy"),
    ("connection_timeout", "the backend did not accept a connection in time: is its node up, and does a firewall drop its packets?"),
    ("upstream_response_timeout", "the backend did not answer in time: see the timeouts of the route"),
    ("upstream_per_try_timeout", "the backend did not answer in time: see timeouts.backendRequest of the route"),
    ("connection_failure", "the backend did not accept a connection: is it listening?"),
    ("connection failure", "the backend did not accept a connection: is it listening?"),
    ("protocol_error", "what the backend said is not HTTP: see targetPort, appProtocol and name of the service's port"),
    ("codec_error", "what the caller said is not HTTP, which this port is for: see the service's port, its appProtocol and name"),
    ("connection_termination", _CLOSED_EARLY),
    ("connection termination", _CLOSED_EARLY),
    ("reset_before_response", _CLOSED_EARLY),
    ("cluster_not_found", "a backendRef of the route names no service port: see 'meshagent get httproute -o json'"),
)  # fmt: skip


def _yes() -> bool:
    return True


def rule_of(details: str, allowing: str) -> str | None:
    """The policy rule that refused a request; `allowing` are the policies of which none allowed it."""
    found = _RBAC.search(details)
    if found is None:
        return None
    return f"{allowing}{_UNMATCHED}" if found[1] == "none" else found[1]


def of_denial(reason: Reason, rule: str) -> str | None:
    """The next step after the kernel refused a connection, or would have; `rule` is what decided, as in `agent.policy.Decision`."""
    return of_policy(rule) if reason is Reason.POLICY else DENIED.get(reason)


def of_policy(rule: str, *, request: bool = False, tokens: bool = False) -> str:
    """The next step after a rule refused a connection or, with `request`, a request; `tokens`: a policy demands one."""
    what, other = ("request", "send another") if request else ("caller", "call as another service account")
    if request and tokens:
        other = "send the token that is demanded: 'Authorization: Bearer TOKEN'"
    if not rule:
        return "see the AuthorizationPolicies that select the destination: 'meshagent get authorizationpolicies'"
    if not rule.endswith(_UNMATCHED):
        return f"a DENY comes before every ALLOW: narrow rule {rule}, or {other}"
    policies = [name for name in rule.removesuffix(_UNMATCHED).split(", ") if name]
    written = [name for name in policies if not name.endswith(_DEFAULT_DENY)]
    if policies and not written:
        namespace = policies[0].removesuffix(_DEFAULT_DENY)
        return f"namespace {namespace} denies by default (meshagent.io/default-policy: deny): allow the {what} in an AuthorizationPolicy there, or {other}"
    where = f"AuthorizationPolicy {written[0]}" if len(written) == 1 else f"one of the AuthorizationPolicies {', '.join(written)}".rstrip()
    return f"allow the {what} in {where}, or {other}"


def of_response(
    record: RequestRecord, endpoints: int | None, rule: str | None, *, tokens: bool = False, certified: Callable[[], bool] = _yes
) -> str | None:
    """The next step after a response that the waypoint made itself; None if the application answered. `endpoints` are ready, as far as is known; `rule`: which
    refused (`rule_of`); `tokens`: a policy demands one; `certified`: see `of_failure`.
    """
    details = record.response_code_details
    if rule is not None:
        return of_policy(rule, request=True, tokens=tokens)
    if "no healthy upstream" in record.response_flags or details == "no_healthy_upstream":
        if endpoints:
            return (
                f"all of the {endpoints} ready endpoints are ejected: outlier detection or health checks of the TrafficPolicy found them failing; "
                "see why they do, it takes them back by itself"
            )
        return DENIED[Reason.NO_BACKEND]
    if step := of_failure(record.failure, certified=certified):
        return step
    if details == "via_upstream":
        return None
    return next((step for word, step in _DETAILS if word in details), None)


def of_failure(failure: str, *, at_receiver: bool = False, certified: Callable[[], bool] = _yes) -> str | None:
    """The next step after a handshake that failed, from Envoy's words at one of its ends. `certified`: does that end have a certificate that is
    valid? If not, the connection may break before it has heard of the other's alert.
    """
    own, other = ("receiver", "caller") if at_receiver else ("caller", "receiver")
    found = next(((word, step) for word, step in _TLS if word in failure), None)
    if found is None:
        return None
    word, step = found
    if word == _UNSPECIFIC and not certified():
        step = UNCERTIFIED
    return step.format(own=own, other=other)
