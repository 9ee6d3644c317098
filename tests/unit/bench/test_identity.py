"""What `bench.identity` makes and how it knows that it is there."""

from __future__ import annotations

from bench.identity import MANY, enrolled, pods
from bench.testbed import CALLER
from lab import paths


def test_no_two_of_many_have_the_same_address_or_identity() -> None:
    found = pods(6, MANY)
    assert CALLER.addresses not in {pod.addresses for pod in found}
    assert len({paths.place_netns(pod) for pod in found}) == MANY
    assert len({pod.addresses for pod in found}) == len({(pod.namespace, pod.service_account) for pod in found}) == MANY


def test_a_workload_is_in_the_mesh_when_the_kernel_and_envoy_have_it() -> None:
    rows = [
        {"namespace": "shop", "name": name, "enrolled": kernel, "redirected": envoy}
        for name, kernel, envoy in (("cart", True, True), ("web", True, False), ("other", False, False))
    ]
    assert enrolled({"workloads": rows}) == {"shop/cart"}
    assert enrolled({}) == set()
