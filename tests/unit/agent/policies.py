"""Policies and callers to draw at random, for every test that holds something against `agent.policy.decide`: rows, kernel tables, Envoy's filters.

The pools are small and overlap, so that patterns, blocks and ports really meet: blocks lie within each other, some addresses are in none.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from agent.model import Action, ClaimCondition, HeaderCondition, Operation, Policy, PolicyRule, Source
from agent.policy import PROTOCOLS, STRANGER, Caller

TRUST_DOMAIN = "mesh.local"
NAMESPACES = ("shop", "bank")
ACCOUNTS = ("frontend", "redis", "default")
PORTS = (80, 443, 6379)
UNNAMED_PORT = 9
"""A port that no policy names."""
LABELS = (("app", "cart"), ("app", "web"), ("tier", "front"))
BLOCKS = ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "10.9.0.0/16", "::/0", "fd00::/8", "fd00:1::/32", "fd00:1::5/128")
ADDRESSES = ("10.0.0.1", "10.1.0.1", "10.1.2.3", "10.9.0.9", "192.0.2.1", "fd00::1", "fd00:1::1", "fd00:1::5", "2001:db8::1")


def nonempty(pool: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    """One or two values of a pool."""
    return st.lists(st.sampled_from(pool), min_size=1, max_size=2, unique=True).map(tuple)


def some(pool: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    """Often none."""
    return st.one_of(st.just(()), nonempty(pool))


PRINCIPAL_PATTERNS = (f"{TRUST_DOMAIN}/ns/shop/sa/frontend", f"{TRUST_DOMAIN}/*", "*/sa/redis", "*", "other.domain/*")
NAMESPACE_PATTERNS = ("shop", "bank", "b*", "*op", "*")
FULL_ACCOUNTS = ("shop/frontend", "shop/redis", "bank/default", "bank/frontend")
label_sets = st.lists(st.sampled_from(LABELS), min_size=1, max_size=2, unique_by=lambda pair: pair[0]).map(
    lambda pairs: tuple(sorted(pairs))
)
addresses = st.sampled_from(ADDRESSES)
ports = st.one_of(st.just(()), st.lists(st.sampled_from(PORTS), min_size=1, max_size=2, unique=True).map(tuple))

rich_sources = st.builds(
    Source,
    some(PRINCIPAL_PATTERNS),
    some(PRINCIPAL_PATTERNS),
    some(NAMESPACE_PATTERNS),
    some(NAMESPACE_PATTERNS),
    some(FULL_ACCOUNTS),
    some(FULL_ACCOUNTS),
    some(BLOCKS),
    some(BLOCKS),
    st.one_of(st.just(()), label_sets),
)
sources = st.one_of(
    # One condition each: the rich ones rarely match anybody.
    st.builds(Source, service_accounts=nonempty(FULL_ACCOUNTS)),
    st.builds(Source, not_principals=nonempty(PRINCIPAL_PATTERNS)),
    st.builds(Source, labels=label_sets),
    st.builds(Source, ip_blocks=nonempty(BLOCKS)),
    st.builds(Source, not_ip_blocks=nonempty(BLOCKS)),
    st.builds(Source, ip_blocks=nonempty(BLOCKS), not_ip_blocks=nonempty(BLOCKS)),
    rich_sources,
)
operations = st.builds(
    Operation,
    ports=ports,
    not_ports=ports,
    methods=st.sampled_from([(), (), ("GET",), ("P*",)]),
    not_methods=st.sampled_from([(), (), (), ("GET",)]),
    paths=st.sampled_from([(), (), (), ("/a*", "*z")]),
    protocols=some(PROTOCOLS),
)
plain_rules = st.builds(
    PolicyRule,
    st.one_of(st.lists(sources, min_size=1, max_size=2), st.just([])).map(tuple),
    st.one_of(st.just([]), st.lists(operations, min_size=1, max_size=2)).map(tuple),
)
ROLES, GROUPS, PRINCIPALS = ("admin", "a*", "*"), ("staff", "*ff", "*"), ("i/s", "i/*", "*/s", "i*", "*", "j/s")
also_sources = st.one_of(
    st.builds(Source, namespaces=nonempty(NAMESPACE_PATTERNS)),
    st.builds(Source, not_principals=nonempty(PRINCIPAL_PATTERNS)),
    st.builds(Source, ip_blocks=nonempty(BLOCKS)),
    st.builds(Source, request_principals=some(PRINCIPALS), not_request_principals=some(PRINCIPALS)),
)
also_operations = st.one_of(
    st.builds(Operation, ports=ports, not_ports=ports),
    st.builds(Operation, headers=st.tuples(st.builds(HeaderCondition, st.just("x-role"), some(ROLES), some(ROLES)))),
    st.builds(Operation, claims=st.tuples(st.builds(ClaimCondition, st.just(("group",)), some(GROUPS), some(GROUPS)))),
)


@st.composite
def conditioned_rules(draw: st.DrawFn) -> PolicyRule:
    """With `when`, and with sources that want a token."""
    rule = draw(plain_rules)
    wants = draw(some(PRINCIPALS))
    found = [replace(source, request_principals=wants) if draw(st.booleans()) else source for source in rule.sources]
    more = st.lists(also_sources, max_size=1).map(tuple), st.lists(also_operations, max_size=2).map(tuple)
    return PolicyRule(tuple(found), rule.operations, draw(more[0]), draw(more[1]))


rules = st.one_of(plain_rules, conditioned_rules())


@st.composite
def policy_sets(draw: st.DrawFn, most: int = 5) -> list[Policy]:
    """Policies of one mesh, each with a name of its own; all three actions."""
    count = draw(st.integers(0, most))
    return [Policy(f"shop/p{number}", draw(st.sampled_from(Action)), tuple(draw(st.lists(rules, max_size=3)))) for number in range(count)]


enrolled = st.builds(
    Caller,
    st.sampled_from(NAMESPACES),
    st.sampled_from(ACCOUNTS),
    st.just(TRUST_DOMAIN),
    st.one_of(st.just(()), label_sets),
    st.lists(addresses, max_size=2, unique=True).map(tuple),
)
"""Callers that the mesh vouches for."""
outsiders = st.lists(addresses, min_size=1, max_size=2, unique=True).map(lambda found: Caller(addresses=tuple(found)))
"""Workloads that are not enrolled: known by address alone."""
callers = st.one_of(enrolled, outsiders, st.just(STRANGER))
