"""The arithmetic of the benchmark, and what its model and its tokens are made of."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from agent.l7.snapshot import Builder
from agent.model import LocalWorkload
from bench.l7_model import NODE, History, L7Model, L7Size
from bench.scale import percentile
from bench.tokens import Issuer

SMALL = L7Model(L7Size(local=3, services=41, routes=7, endpoints=2, namespaces=11, nodes=2))


@pytest.mark.parametrize(("percent", "value"), [(50, 3.0), (99, 5.0), (100, 5.0), (1, 1.0), (20, 1.0), (21, 2.0)])
def test_a_percentile_is_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], percent) == value


def test_a_history_leads_where_the_whole_leads() -> None:
    history, builder = History(SMALL), Builder(NODE, "mesh.test")
    changes = [
        [*SMALL.resources()],
        [SMALL.endpoint(5, 1, ready=False)],
        [SMALL.route(3, weight=77)],
        [SMALL.policy(0, method="PUT")],
        [SMALL.traffic(20, requests=3)],
        [SMALL.local(1, version="v2")],
    ]
    for change in changes:
        snapshot = history.take(change)
        local = [LocalWorkload(one, 1, f"/{name}") for name, one in snapshot.workloads.items() if one.node == NODE]
        assert builder.build(snapshot, local, "") == Builder(NODE, "mesh.test").build(snapshot, local, "")
    snapshot = history.take([], ["workload/team-1/service-1-here"])
    assert len(snapshot.workloads) == 41 * 2 + 2
    assert (len(snapshot.services), len(snapshot.routes), len(snapshot.traffic), len(snapshot.policies)) == (41, 7, 3, 11)


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_a_token_is_signed_by_the_key_that_is_shown(algorithm: str) -> None:
    issuer = Issuer("https://one.test", algorithm)
    (key,) = json.loads(issuer.jwks)["keys"]
    signed, _, signature = issuer.token("caller").rpartition(".")
    assert json.loads(_bytes(signed.partition(".")[2]))["iss"] == "https://one.test"
    number = {name: int.from_bytes(_bytes(key[name]), "big") for name in ("n", "e", "x", "y") if name in key}
    if algorithm == "RS256":
        public = rsa.RSAPublicNumbers(number["e"], number["n"]).public_key()
        public.verify(_bytes(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    else:
        raw = _bytes(signature)
        pair = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        point = ec.EllipticCurvePublicNumbers(number["x"], number["y"], ec.SECP256R1()).public_key()
        point.verify(pair, signed.encode(), ec.ECDSA(hashes.SHA256()))
