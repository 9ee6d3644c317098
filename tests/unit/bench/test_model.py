"""The large model is what it says it is, and what the agent can read."""

from __future__ import annotations

import ipaddress

import pytest

from agent.model import Policy, Service, Workload, decode
from bench.model import Model, Size, changes

SMALL = Model(Size(services=6, endpoints=3, policies=2, nodes=4))


def test_there_is_as_much_of_everything_as_the_size_says() -> None:
    names = [resource.name for resource in SMALL.resources()]
    assert len(set(names)) == len(names)
    assert [sum(name.startswith(kind) for name in names) for kind in ("service/", "workload/", "policy/")] == [6, 18, 2]


def test_the_default_is_what_the_results_are_about() -> None:
    assert str(Size()) == "5000 services, 100000 endpoints on 200 other nodes, 100 policies"


def test_every_endpoint_backs_its_service_under_the_policy_of_its_namespace() -> None:
    found = [decode(resource.entity) for resource in SMALL.resources()]
    services = {entity.name: entity for entity in found if isinstance(entity, Service)}
    policies = {entity.name: entity for entity in found if isinstance(entity, Policy)}
    workloads = [entity for entity in found if isinstance(entity, Workload)]
    for workload in workloads:
        (backing,) = workload.backing
        (port,) = services[backing.service].ports
        assert set(backing.ports) == {port.port}
        assert len(workload.labels) == 4
        (policy,) = workload.policies
        assert policies[policy].rules[0].sources[0].namespaces == (workload.namespace,)


def test_no_address_is_given_twice() -> None:
    whole = Model()
    last = decode(whole.workload(4999, 19).entity)
    assert isinstance(last, Workload)
    assert last.addresses == (str(ipaddress.ip_address("10.0.0.0") + 99_999),)
    addresses = [a for r in SMALL.resources() for e in [decode(r.entity)] if not isinstance(e, Policy) for a in getattr(e, "addresses", ())]
    assert len(set(addresses)) == len(addresses) == 24


def test_a_name_is_the_resource_s() -> None:
    assert SMALL.workload(5, 2).name == f"workload/{SMALL.workload_name(5, 2)}"
    assert SMALL.service(5).name == f"service/{SMALL.service_name(5)}"


@pytest.mark.parametrize("number", [0, 1, 17])
def test_each_change_makes_another_endpoint_unready(number: int) -> None:
    found = [decode(resource.entity) for resource in changes(SMALL)]
    changed = found[number]
    assert isinstance(changed, Workload)
    assert not changed.ready
    assert len({entity.name for entity in found}) == 18


def test_the_version_is_that_of_the_content() -> None:
    assert SMALL.workload(0, 0).version == SMALL.workload(0, 0).version != SMALL.workload(0, 0, ready=False).version
