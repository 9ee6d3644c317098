"""The shop is consistent with itself: topology, resources and programs tell the same story."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ruamel.yaml import YAML

from lab import hosts, resources, topology
from lab.cli import SHOP
from lab.shop.server import Server, Shop, handler


def documents(file: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all((SHOP / "mesh" / file).read_text()))


def test_workloads_are_the_pods_of_the_topology() -> None:
    assert documents("workloads.yaml") == [resources.workload(pod) for pod in topology.load(SHOP / "lab.yaml").pods]


def test_every_service_selects_a_pod() -> None:
    pods = [resources.workload(pod)["metadata"]["labels"].items() for pod in topology.load(SHOP / "lab.yaml").pods]
    for service in documents("services.yaml"):
        assert any(service["spec"]["selector"].items() <= labels for labels in pods), service["metadata"]["name"]


def test_the_route_splits_between_services_that_exist() -> None:
    names = {service["metadata"]["name"] for service in documents("services.yaml")}
    rule = documents("routes.yaml")[0]["spec"]["rules"][0]
    assert {backend["name"]: backend["weight"] for backend in rule["backendRefs"]} == {"cart-v1": 80, "cart-v2": 20}
    assert {backend["name"] for backend in rule["backendRefs"]} < names


def test_pods_know_the_services_by_name_and_outsiders_do_not() -> None:
    shop = topology.load(SHOP / "lab.yaml")
    services = resources.services(SHOP / "mesh")
    inside = hosts.text(shop.place("frontend"), services)
    assert "10.96.0.10 cart cart.default cart.default.svc cart.default.svc.cluster.local\n" in inside
    assert "fd96::10 cart " in inside
    assert "10.77.1.10 frontend\n" in inside
    assert "cart" not in hosts.text(shop.place("client"), services)


def test_a_service_of_another_namespace_needs_its_namespace() -> None:
    assert resources.VirtualService("db", "back", ("10.96.0.9",)).names("front")[0] == "db.back"


@pytest.fixture
def cart() -> Iterator[http.client.HTTPConnection]:
    """A connection to a cart that fails."""
    server = Server(("::1", 0), handler(Shop({"APP": "cart", "POD_NAME": "cart-7", "VERSION": "v7", "FAIL_POD": "cart-7"})))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    connection = http.client.HTTPConnection("::1", server.server_address[1], timeout=5)
    try:
        yield connection
    finally:
        connection.close()
        server.shutdown()
        thread.join()
        server.server_close()


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> tuple[int, Any]:
    connection.request(method, path, body=b"x" if method == "POST" else None)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_the_cart_answers_counts_and_fails_where_it_is_told_to(cart: http.client.HTTPConnection) -> None:
    assert ask(cart, "GET", "/items?page=2")[1]["version"] == "v7"
    assert ask(cart, "POST", "/items")[0] == 200
    assert ask(cart, "GET", "/flaky")[0] == 503
    assert ask(cart, "GET", "/nothing")[0] == 404
    counters = {"GET /items 200": 1, "POST /items 200": 1, "GET /flaky 503": 1, "GET /nothing 404": 1}
    assert ask(cart, "GET", "/admin/counters") == (200, counters)


def test_a_pod_that_is_not_the_failing_one_does_not_fail() -> None:
    assert Shop({"APP": "cart", "POD_NAME": "cart-8", "FAIL_POD": "cart-7"}).answer("GET", "/flaky")[0] == 200
