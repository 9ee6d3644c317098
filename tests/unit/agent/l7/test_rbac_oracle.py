"""What the RBAC filters decide against `agent.policy.decide`, for any policies, callers and requests.

The filters are read here as Envoy reads them (config.rbac.v3, type.matcher.v3); the last test asks Envoy itself, about fewer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import itertools
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from agent.l7 import names, rbac
from agent.l7.peers import Peers
from agent.l7.snapshot import build
from agent.model import Action, Authentication, Operation, Policy, PolicyRule, Snapshot, Source, TokenIssuer, Workload
from agent.policy import Caller, Verdict, decide, matches, protecting
from tests.ports import free_ports
from tests.tokens import Issuer
from tests.unit.agent import policies as drawn
from tests.unit.agent.l7 import harness

TARGET = "shop/target"


@dataclasses.dataclass(frozen=True)
class Request:
    """What of a request policies ask about. `payload` is that of a token that was verified."""

    method: str
    path: str
    role: str | None = None
    payload: tuple[tuple[str, str], ...] = ()


ROLES: tuple[str | None, ...] = (None, "admin", "user")
PAYLOADS = ((), (("iss", "i"), ("sub", "s"), ("group", "staff")), (("iss", "j"), ("sub", "s")))
# Every method with every path, and every role with every payload: not all with all, that would be 81.
REQUESTS = tuple(
    Request(*one, *other)
    for one, other in zip(
        itertools.product(("GET", "POST", "DELETE"), ("/abc", "/xyz", "/b")),
        sorted(itertools.product(ROLES, PAYLOADS), key=lambda pair: (PAYLOADS.index(pair[1]), ROLES.index(pair[0]))),
        strict=True,
    )
)
CONNECT = Request("CONNECT", "")


@dataclasses.dataclass(frozen=True)
class Call:
    """One request as Envoy sees it."""

    state: dict[str, str]
    address: str
    port: int
    request: Request


def metadata_matches(matcher: Any, request: Request) -> bool:
    assert (matcher.filter, matcher.path[0].key) == (names.JWT_METADATA, names.JWT_PAYLOAD)
    value = dict(request.payload).get(matcher.path[1].key)
    return value is not None and value_matches(matcher.value, value)


def value_matches(matcher: Any, value: str) -> bool:
    """For text alone: the other kinds never match text."""
    kind = matcher.WhichOneof("match_pattern")
    if kind == "or_match":
        return any(value_matches(one, value) for one in matcher.or_match.value_matchers)
    return bool(kind == "string_match" and string_matches(matcher.string_match, value))


def string_matches(matcher: Any, value: str) -> bool:
    kind = matcher.WhichOneof("match_pattern")
    if kind == "safe_regex":
        return bool(re.fullmatch(matcher.safe_regex.regex, value))
    wanted = getattr(matcher, kind)
    return bool({"exact": value == wanted, "prefix": value.startswith(wanted), "suffix": value.endswith(wanted)}[kind])


def principal_matches(principal: Any, call: Call) -> bool:  # noqa: PLR0911 - one for each kind
    kind = principal.WhichOneof("identifier")
    if kind == "any":
        return True
    if kind == "and_ids":
        return all(principal_matches(one, call) for one in principal.and_ids.ids)
    if kind == "or_ids":
        return any(principal_matches(one, call) for one in principal.or_ids.ids)
    if kind == "not_id":
        return not principal_matches(principal.not_id, call)
    if kind == "filter_state":
        value = call.state.get(principal.filter_state.key)
        if principal.filter_state.HasField("address_match"):
            return value is not None and any(within(value, one) for one in principal.filter_state.address_match.ranges)
        return value is not None and string_matches(principal.filter_state.string_match, value)
    if kind == "sourced_metadata":
        return metadata_matches(principal.sourced_metadata.metadata_matcher, call.request)
    assert kind == "direct_remote_ip"
    return within(call.address, principal.direct_remote_ip)


def within(address: str, block: Any) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(f"{block.address_prefix}/{block.prefix_len.value}")


def permission_matches(permission: Any, call: Call) -> bool:  # noqa: PLR0911 - one for each kind
    kind = permission.WhichOneof("rule")
    if kind == "any":
        return True
    if kind == "and_rules":
        return all(permission_matches(one, call) for one in permission.and_rules.rules)
    if kind == "or_rules":
        return any(permission_matches(one, call) for one in permission.or_rules.rules)
    if kind == "not_rule":
        return not permission_matches(permission.not_rule, call)
    if kind == "destination_port":
        return bool(permission.destination_port == call.port)
    if kind == "url_path":
        return string_matches(permission.url_path.path, call.request.path)
    if kind == "header" and permission.header.name == names.DESTINATION_HEADER:
        return string_matches(permission.header.string_match, f"192.0.2.99:{call.port}")
    if kind == "sourced_metadata":
        return metadata_matches(permission.sourced_metadata.metadata_matcher, call.request)
    assert kind == "header"
    value = {":method": call.request.method, "x-role": call.request.role}[permission.header.name]
    return value is not None and string_matches(permission.header.string_match, value)


def allowed(authorization: rbac.Authorization, call: Call) -> bool:
    """What the chain of both filters lets pass."""
    for name in (names.DENY_FILTER, names.ALLOW_FILTER):
        if name not in authorization.filters:
            continue
        per_route = rbac_pb2.RBACPerRoute()
        assert AnyMessage.FromString(authorization.filters[name]).Unpack(per_route)
        if not per_route.rbac.HasField("rules"):
            continue
        hit = any(
            any(principal_matches(p, call) for p in one.principals) and any(permission_matches(p, call) for p in one.permissions)
            for one in per_route.rbac.rules.policies.values()
        )
        if hit is (name == names.DENY_FILTER):
            return False
    return True


def without_requests(policies: Sequence[Policy], request: Request) -> list[Policy]:
    """The policies as they are for one request: each condition on it is answered."""
    payload = dict(request.payload)
    principal = f"{payload['iss']}/{payload['sub']}" if payload else ""

    def fits(wanted: Sequence[str], unwanted: Sequence[str], value: str | None) -> bool:
        if wanted and not (value and any(matches(p, value) for p in wanted)):
            return False
        return not (value and any(matches(p, value) for p in unwanted))

    def asked(source: Source) -> Source | None:
        if not fits(source.request_principals, source.not_request_principals, principal):
            return None
        return dataclasses.replace(source, request_principals=(), not_request_principals=())

    def answered(operation: Operation) -> Operation | None:
        conditions: list[tuple[Sequence[str], Sequence[str], str | None]]
        conditions = [(operation.methods, operation.not_methods, request.method), (operation.paths, operation.not_paths, request.path)]
        conditions += [(one.values, one.not_values, request.role) for one in operation.headers]
        conditions += [(one.values, one.not_values, payload.get(one.path[0])) for one in operation.claims]
        if not all(fits(*condition) for condition in conditions):
            return None
        return dataclasses.replace(operation, methods=(), not_methods=(), paths=(), not_paths=(), headers=(), claims=())

    found = []
    for policy in policies:
        rules = []
        for rule in policy.rules:
            sources = tuple(one for source in rule.sources if (one := asked(source)))
            operations = tuple(to for operation in rule.operations if (to := answered(operation)))
            also = tuple(one for source in rule.also_sources if (one := asked(source)))
            besides = tuple(to for operation in rule.also_operations if (to := answered(operation)))
            complete = len(also) == len(rule.also_sources) and len(besides) == len(rule.also_operations)
            if complete and (operations or not rule.operations) and (sources or not rule.sources):
                rules.append(PolicyRule(sources, operations, also, besides))
        found.append(Policy(policy.name, policy.action, tuple(rules)))
    return found


def says_yes(policies: Sequence[Policy], caller: Caller, call: Call) -> bool:
    verdict = decide(without_requests(policies, call.request), caller, call.port).verdict
    assert verdict is not Verdict.WAYPOINT
    return verdict is not Verdict.DENY


def workload(name: str, caller: Caller) -> Workload:
    """A workload that calls as `caller`; who has no service account is not enrolled."""
    namespace = caller.namespace or "outside"
    account = caller.service_account or "default"
    enrolled = bool(caller.service_account)
    return Workload(f"{namespace}/{name}", account, "node-1", dict(caller.labels), caller.addresses, name, enrolled, True)


def target(policies: Sequence[Policy]) -> tuple[Workload, Snapshot]:
    one = Workload(TARGET, "default", "node-1", {}, ("192.0.2.99",), "t", True, True, policies=tuple(p.name for p in policies))
    return one, Snapshot("1", {one.name: one}, policies={p.name: p for p in policies})


def state_of(caller: Caller, name: str) -> dict[str, str]:
    """What agent.l7.listeners.outbound notes about a connection."""
    return {
        names.PRINCIPAL_KEY: caller.principal,
        names.NAMESPACE_KEY: caller.namespace,
        names.SERVICE_ACCOUNT_KEY: f"{caller.namespace}/{caller.service_account}",
        names.WORKLOAD_KEY: name,
    }


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.enrolled, min_size=1, max_size=5), st.sampled_from((*drawn.PORTS, drawn.UNNAMED_PORT)))
def test_the_callers_side_decides_as_the_definition_does(policies: list[Policy], callers: list[Caller], port: int) -> None:
    one, snapshot = target(policies)
    workloads = [workload(f"w{number}", caller) for number, caller in enumerate(callers)]
    authorization = rbac.at_caller(protecting(one, snapshot), port, rbac.LocalCallers.of(workloads, drawn.TRUST_DOMAIN))
    for (found, caller), request in itertools.product(zip(workloads, callers, strict=True), REQUESTS):
        call = Call(state_of(caller, found.name), "127.0.0.1", port, request)
        assert allowed(authorization, call) is says_yes(policies, caller, call)


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.enrolled, max_size=3), drawn.enrolled)
def test_a_listener_that_is_newer_than_the_rules_is_never_allowed_more_than_it_will_be(
    policies: list[Policy], callers: list[Caller], late: Caller
) -> None:
    one, snapshot = target(policies)
    known = rbac.LocalCallers.of([workload(f"w{number}", caller) for number, caller in enumerate(callers)], drawn.TRUST_DOMAIN)
    authorization = rbac.at_caller(protecting(one, snapshot), 80, known)
    for request in REQUESTS:
        call = Call(state_of(late, "shop/late"), "127.0.0.1", 80, request)
        assert says_yes(policies, late, call) or not allowed(authorization, call)


@settings(max_examples=503, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.callers, max_size=4), st.sampled_from((*drawn.PORTS, drawn.UNNAMED_PORT)))
def test_the_receivers_side_decides_as_the_definition_does_for_every_address(
    policies: list[Policy], callers: list[Caller], port: int
) -> None:
    one, snapshot = target(policies)
    workloads = [workload(f"w{number}", caller) for number, caller in enumerate(callers)]
    authorization = rbac.at_receiver(protecting(one, snapshot), rbac.Callers(workloads, drawn.TRUST_DOMAIN))
    for address, request in itertools.product(drawn.ADDRESSES, REQUESTS):
        owners = [caller for caller in callers if address in caller.addresses] or [Caller(addresses=(address,))]
        call = Call({}, address, port, request)
        answers = {says_yes(policies, owner, call) for owner in owners}
        if len(owners) == 1:
            assert {allowed(authorization, call)} == answers
        else:  # whoever it is of those that share the address, nobody is allowed what one of them is not
            assert not allowed(authorization, call) or answers == {True}


@settings(max_examples=503, deadline=None)
@given(
    drawn.policy_sets(most=2),
    st.lists(drawn.enrolled, max_size=3),
    drawn.enrolled,
    drawn.addresses,
    st.sampled_from((*drawn.PORTS, drawn.UNNAMED_PORT)),
)
def test_the_end_of_a_tunnel_decides_as_the_definition_does_for_who_holds_the_certificate(
    policies: list[Policy], others: list[Caller], caller: Caller, address: str, port: int
) -> None:
    one, snapshot = target(policies)
    caller = dataclasses.replace(caller, addresses=(address,))
    known = [workload("peer", caller), *(workload(f"w{n}", other) for n, other in enumerate(others) if address not in other.addresses)]
    protection = protecting(one, snapshot)
    inside = rbac.request_ports(protection)
    authorization = rbac.at_tunnel(protection, Peers(known, drawn.TRUST_DOMAIN).principal, names.DESTINATION_HEADER)
    state = {names.PEER_KEY: f"spiffe://{caller.principal}", names.PEER_ADDRESS_KEY: address}
    for request in REQUESTS:
        # Outside of `inside` the filters see the CONNECT alone, and what is in the tunnel must not matter.
        seen = request if inside is None or port in inside else CONNECT
        call = Call(state, "", port, request)
        assert allowed(authorization, dataclasses.replace(call, request=seen)) is says_yes(policies, caller, call)


@settings(max_examples=203, deadline=None)
@given(drawn.policy_sets(most=2), st.lists(drawn.enrolled, max_size=3), drawn.enrolled)
def test_a_peer_at_an_address_that_is_not_known_is_never_allowed_more_than_it_will_be(
    policies: list[Policy], others: list[Caller], late: Caller
) -> None:
    one, snapshot = target(policies)
    late = dataclasses.replace(late, addresses=("192.0.2.77",))
    known = Peers([workload(f"w{n}", other) for n, other in enumerate(others)], drawn.TRUST_DOMAIN)
    authorization = rbac.at_tunnel(protecting(one, snapshot), known.principal, names.DESTINATION_HEADER)
    for request in REQUESTS:
        call = Call({names.PEER_KEY: f"spiffe://{late.principal}", names.PEER_ADDRESS_KEY: "192.0.2.77"}, "", 80, request)
        assert says_yes(policies, late, call) or not allowed(authorization, call)


def test_the_requests_that_are_tried_meet_every_condition_that_is_drawn() -> None:
    policy = Policy("shop/p", Action.ALLOW, (PolicyRule(operations=(Operation(methods=("P*",), paths=("/a*", "*z")),)),))
    one, snapshot = target([policy])
    authorization = rbac.at_caller(protecting(one, snapshot), 80, rbac.LocalCallers.of([], drawn.TRUST_DOMAIN))
    passed = {(one.method, one.path) for one in REQUESTS if allowed(authorization, Call({}, "127.0.0.1", 80, one))}
    assert passed == {("POST", "/abc"), ("POST", "/xyz")}


ISSUER = Issuer("i")


@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(st.lists(drawn.policy_sets(most=2), min_size=23, max_size=23))
def test_envoy_itself_decides_as_the_definition_does(sets: list[list[Policy]]) -> None:
    """Each set of policies protects a service of its own; every request goes to each of them, with real tokens."""
    ports = free_ports(len(sets))
    tokens_known = Authentication("shop/tokens", (TokenIssuer(ISSUER.name, keys=ISSUER.jwks),))
    caller = dataclasses.replace(harness.workload("shop/frontend", "10.1.2.3"), labels=dict([drawn.LABELS[0]]))
    pods, services, policies = [], [], {}
    with harness.http_server("target", "0.0.0.0") as target:
        listening = target.server_address[1]
        for number, (drawn_set, port) in enumerate(zip(sets, ports, strict=True)):
            renamed = [dataclasses.replace(policy, name=f"shop/s{number}-{policy.name.partition('/')[2]}") for policy in drawn_set]
            policies.update({policy.name: policy for policy in renamed})
            pod = harness.workload(
                f"shop/p{number}",
                f"127.0.0.{number + 2}",
                backing={f"default/s{number}": {port: listening}},
                policies=tuple(p.name for p in renamed),
            )
            pods.append(dataclasses.replace(pod, authentications=(tokens_known.name,)))
            services.append(harness.service(f"s{number}", "127.0.0.1", port))
        snapshot = harness.snapshot([caller, *pods], services, policies=list(policies.values()))
        snapshot = dataclasses.replace(snapshot, authentications={tokens_known.name: tokens_known})
        resources = build(snapshot, [harness.local(caller)], trust_domain=drawn.TRUST_DOMAIN)

        def ask() -> list[tuple[int, Request, int]]:
            return [(n, one, send(port, one)) for n, port in enumerate(ports) for one in REQUESTS if dict(one.payload).get("iss") != "j"]

        async def scenario() -> list[tuple[int, Request, int]]:
            with tempfile.TemporaryDirectory() as directory:
                async with harness.waypoint(harness.config(Path(directory))) as (server, _):
                    await harness.applied(server, harness.on_loopback(resources, *ports))
                    assert server.state.nacks == 0, server.state.last_nack
                    return await asyncio.to_thread(ask)

        found = asyncio.run(scenario())
    who = Caller.of(caller, drawn.TRUST_DOMAIN)
    for number, request, status in found:
        call = Call({}, "", listening, request)
        assert (status == 200) is says_yes(protecting(pods[number], snapshot), who, call), (status, request, sets[number])
        assert status in {200, 403}


def send(port: int, request: Request) -> int:
    claims = dict(request.payload)
    headers = {"authorization": f"Bearer {ISSUER.token(claims['sub'], group=claims.get('group'))}"} if claims else {}
    if request.role is not None:
        headers["x-role"] = request.role
    return harness.request(port, request.path, request.method, headers).status
