"""What is decoded of a host outside the mesh, and what is not taken."""

from __future__ import annotations

import pytest

from agent.external import Endpoint, External, Origination
from agent.model import Service, decode
from meshapi import discovery_pb2 as pb


def decoded(external: pb.External) -> External:
    found = decode(pb.Entity(service=pb.Service(namespace="default", name="x.example.com", external=external)).SerializeToString())
    assert isinstance(found, Service)
    assert found.external is not None
    return found.external


def test_what_the_controller_says_is_what_is_known() -> None:
    said = pb.External(
        resource="x",
        hosts=["x.example.com"],
        dns=True,
        endpoints=[pb.ExternalEndpoint(address="x.example.com", ports={80: 443})],
        tls=pb.ExternalTls(sni="x.example.com", names=["x.example.com"]),
        policies=["default/p"],
        private=True,
    )
    endpoint = Endpoint("x.example.com", 1, {80: 443})
    tls = Origination("x.example.com", ("x.example.com",), "")
    assert decoded(said) == External("x", ("x.example.com",), False, True, (endpoint,), tls, ("default/p",), True)
    assert [Endpoint(a, 1, {}).is_name for a in ("x.example.com", "192.0.2.1", "2001:db8::1")] == [True, False, False]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(pb.External(), id="no-host"),
        pytest.param(pb.External(hosts=["x"], tls=pb.ExternalTls()), id="tls-to-nobody"),
        pytest.param(pb.External(hosts=["x"], tls=pb.ExternalTls(sni="x")), id="no-name-to-verify"),
        pytest.param(pb.External(hosts=["x"], tls=pb.ExternalTls(sni="x", names=[""])), id="an-empty-name"),
    ],
)
def test_what_would_verify_nothing_is_not_taken(said: pb.External) -> None:
    with pytest.raises(ValueError, match=r"without"):
        decoded(said)
