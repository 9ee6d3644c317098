from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.errors import ControllerError
from controller.identity import revocations, service
from controller.identity.ca import CaSettings
from controller.identity.certificates import Order
from controller.identity.kubernetes import read_review
from controller.identity.refusals import Refused, Unavailable
from controller.main import main
from meshapi import identity_pb2 as pb
from tests.unit.controller.harness import Authority
from tests.unit.controller.identity.apiserver import AGENT, Api, serve, user
from tests.unit.controller.identity.harness import Clock, World, ask_to_join, authority, decoded, join, new_key, request, uris, world


async def attempt(served: World, node: str, token: str) -> pb.JoinResponse:
    return await ask_to_join(served, pb.JoinRequest(node=node, csr=request(new_key()), service_account_token=token))


async def refusal(served: World, node: str, token: str) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attempt(served, node, token)
    return caught.value.code().name, str(caught.value.details())


def test_an_agent_joins_with_its_pods_projected_token_as_often_as_it_likes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    api = Api({"good-token": (["meshagent"], user())})

    async def check() -> None:
        with serve(tmp_path / "api", api) as server:
            async with world(tmp_path, kubernetes=server) as served:
                for _ in range(2):
                    answer = await attempt(served, "n1", "good-token")
                    assert uris(decoded(answer.chain)[0]) == ["spiffe://mesh.local/meshagent/node/n1"]
        assert [asked["spec"] for asked in api.asked] == [{"token": "good-token", "audiences": ["meshagent"]}] * 2

    asyncio.run(check())
    lines = [vars(record) for record in caplog.records if record.name == "controller.identity.audit"]
    assert [line["proof"] for line in lines] == ["pod mesh-system/agent-x7k2p"] * 2
    assert "good-token" not in " ".join(str(vars(record)) for record in caplog.records)
    assert "controller-token" not in " ".join(str(vars(record)) for record in caplog.records)


def test_tokens_of_others_and_for_others_are_refused_by_name(tmp_path: Path) -> None:
    api = Api(
        {
            "elsewhere": (["meshagent"], user(node="n2")),
            "for-vault": (["vault"], user()),
            "somebody": (["meshagent"], user(name="system:serviceaccount:default:default")),
            "person": (["meshagent"], user(name="admin")),
            "secret": (["meshagent"], user(node=None, pod=None)),
            "old-cluster": (["meshagent"], user(node=None)),
        }
    )

    async def check() -> None:
        with serve(tmp_path / "api", api) as server:
            async with world(tmp_path, kubernetes=server) as served:
                for token, expected in (
                    ("elsewhere", "the token's pod runs on node n2, not on n1"),
                    ("for-vault", "does not accept the service-account token: [invalid bearer token"),
                    ("unknown", "does not accept the service-account token"),
                    (
                        "somebody",
                        "is of 'system:serviceaccount:default:default', not of the agents' service account mesh-system/mesh-agent",
                    ),
                    ("person", "is of 'admin'"),
                    ("secret", "does not say on which node its pod runs"),
                    ("old-cluster", "Kubernetes 1.30 or newer"),
                    ("", "empty, overlong or no token"),
                    ("x" * 20_000, "empty, overlong or no token"),
                    ("two\nlines", "empty, overlong or no token"),
                ):
                    code, said = await refusal(served, "n1", token)
                    assert (code, expected in said) == ("PERMISSION_DENIED", True), said

    asyncio.run(check())


def test_an_api_server_that_is_away_or_answers_nonsense_is_asked_again_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    api = Api({"good-token": (["meshagent"], user())})

    async def check() -> None:
        with serve(tmp_path / "api", api) as server:
            async with world(tmp_path, kubernetes=server) as served:
                for raw, status in (
                    (b"nonsense", 201),
                    (b"{}", 201),
                    (b"[]", 200),
                    (None, 500),
                    (None, 403),
                    (b"x" * 2_000_000, 201),
                    (b'{"kind": "Status"}', 200),
                ):
                    api.raw, api.status = raw, status
                    assert await refusal(served, "n1", "good-token") == (
                        "UNAVAILABLE",
                        "the controller cannot sign now; its log says why; asking again later may help",
                    )
                api.raw, api.status = None, 201
                own = server.token.read_text()
                for content in ("wrong", ""):
                    server.token.write_text(content)
                    assert (await refusal(served, "n1", "good-token"))[0] == "UNAVAILABLE"
                server.token.write_text(own)
                await attempt(served, "n1", "good-token")

    asyncio.run(check())
    said = " ".join(str(vars(record).get("error")) for record in caplog.records)
    assert "bind ClusterRole system:auth-delegator" in said


def test_an_api_server_with_another_authoritys_certificate_gets_no_token(tmp_path: Path) -> None:
    api = Api({"good-token": (["meshagent"], user())})

    async def check() -> None:
        with serve(tmp_path / "api", api) as server:
            foreign = replace(server, ca=Authority(tmp_path, "foreign").ca)
            async with world(tmp_path, kubernetes=foreign) as served:
                assert (await refusal(served, "n1", "good-token"))[0] == "UNAVAILABLE"
        assert api.asked == []

    asyncio.run(check())


def test_settings_that_cannot_work_are_refused_at_the_start(tmp_path: Path) -> None:
    with serve(tmp_path / "api", Api()) as server:
        server.check()
        for changed, expected in (
            (replace(server, url="http://x"), "is not https://HOST"),
            (replace(server, url="x"), "is not https://HOST"),
            (replace(server, agent="agent"), "is not NAMESPACE/SERVICE-ACCOUNT"),
            (replace(server, ca=tmp_path / "gone"), "No such file or directory"),
            (replace(server, ca=server.token), "must hold PEM certificates"),
            (replace(server, token=tmp_path / "gone"), "cannot read --kubernetes-token"),
        ):
            with pytest.raises(ControllerError, match=expected):
                changed.check()


def good() -> dict[str, Any]:
    return Api({"t": (["meshagent"], user())}).review({"kind": "TokenReview", "spec": {"token": "t", "audiences": ["meshagent"]}})


def test_an_answer_that_does_not_name_our_audience_is_not_believed() -> None:
    review = good()
    assert read_review(json.dumps(review).encode(), AGENT, "n1") == "mesh-system/agent-x7k2p"
    for audiences in ([], ["vault"], "meshagent", None, [["meshagent"]]):
        review["status"]["audiences"] = audiences
        with pytest.raises(Refused, match="is not for audience"):
            read_review(json.dumps(review).encode(), AGENT, "n1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [path, *(found for key in value for found in places(value[key], (*path, key)))]
    if isinstance(value, list):
        return [path, *(found for index, item in enumerate(value) for found in places(item, (*path, index)))]
    return [path]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


NEEDED = {
    ("status", "authenticated"),
    ("status", "audiences"),
    ("status", "user"),
    ("status", "user", "username"),
    ("status", "user", "extra"),
    ("kind",),
    ("status",),
    (),
}


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_whatever_stands_anywhere_in_an_answer_nobody_gets_in_by_it(data: st.DataObject) -> None:
    review = good()
    path = data.draw(st.sampled_from(places(review)))
    changed = replaced(review, path, data.draw(JSON))
    try:
        read_review(json.dumps(changed).encode(), AGENT, "n1")
    except (Refused, Unavailable):
        return
    assert path not in NEEDED or changed == review


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_answer_does_anything_but_being_refused(answer: bytes) -> None:
    with pytest.raises((Refused, Unavailable)):
        read_review(answer, AGENT, "n1")


def test_a_token_that_serves_often_does_not_serve_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "JOIN_BURST", 2)
    api = Api({"good-token": (["meshagent"], user())})

    async def check() -> None:
        with serve(tmp_path / "api", api) as server:
            async with world(tmp_path, kubernetes=server) as served:
                for _ in range(2):
                    await attempt(served, "n1", "good-token")
                code, said = await refusal(served, "n1", "good-token")
                assert (code, "wait 60 s" in said) == ("RESOURCE_EXHAUSTED", True)

    asyncio.run(check())


def test_a_node_that_was_revoked_comes_back_with_no_service_account_token_until_an_operator_restores_it(tmp_path: Path) -> None:
    api = Api({"one": (["meshagent"], user()), "new": (["meshagent"], user()), "two": (["meshagent"], user(node="n2"))})
    settings = CaSettings(tmp_path / "ca", hold_s=0.0)

    def ca(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["ca", *arguments, "--ca-directory", str(settings.directory)])
        return done.exit_code, done.stdout + done.stderr

    async def check() -> None:
        with serve(tmp_path / "api", api) as server:
            async with world(tmp_path, kubernetes=server, ca=settings) as served:
                first = decoded((await attempt(served, "n1", "one")).chain)[0]
                assert ca("revoke", "spiffe://mesh.local/meshagent/node/n1")[0] == 0
                for token in ("one", "new"):  # before the controller has looked, too
                    code, said = await refusal(served, "n1", token)
                    assert (code, "lets it come back with `mesh-controller ca restore n1`" in said) == ("PERMISSION_DENIED", True)
                await attempt(served, "n2", "two")
            later = authority(settings.directory, Clock(time.time() + 86_400 + revocations.KEPT_S + 301))
            await later.tick()
            assert not later.is_revoked(first.serial_number)  # it has run out and is forgotten; the node is not
            later.stop()
            assert "revoked       node n1" in ca("show")[1]
            async with world(tmp_path, kubernetes=server, ca=settings) as served:
                assert (await refusal(served, "n1", "new"))[0] == "PERMISSION_DENIED"
                assert (await join(served, "n1")).name == "n1"  # a join token that is made for it is an operator's word
                path = settings.directory / "revoked.json"
                good = path.read_text()
                path.write_text(good[:-9])
                assert (await refusal(served, "n1", "new"))[0] == "UNAVAILABLE"  # a damaged list lets nobody in
                path.write_text(good)
                assert ca("restore", "n1") == (0, "node n1 can join again\n")
                await attempt(served, "n1", "new")
                assert "is not revoked" in ca("restore", "n1")[1]

    asyncio.run(check())


def test_a_node_is_barred_by_a_serial_number_of_its_own_and_without_a_certificate_in_force(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    key = new_key()
    (made,) = found.issue_now([Order("spiffe://mesh.local/meshagent/node/n1", key.public_key(), request(key), 86_400, "n1")])
    assert isinstance(made, tuple)
    for what in (f"{made[0].serial_number:x}", "spiffe://mesh.local/meshagent/node/n2"):
        done = CliRunner().invoke(main, ["ca", "revoke", what, "--ca-directory", str(tmp_path / "ca")])
        assert (done.exit_code, "cannot join with its service account until `mesh-controller ca restore n" in done.output) == (0, True)
    assert found.barred().keys() == {"n1", "n2"}
    asyncio.run(found.tick())
    assert len(found.trust.current.revoked) == 1
    found.stop()


def test_a_list_of_an_earlier_release_bars_the_nodes_in_it_and_one_that_is_damaged_is_refused(tmp_path: Path) -> None:
    found = authority(tmp_path / "ca")
    path = tmp_path / "ca" / "revoked.json"
    path.write_text(revocations.EMPTY)
    assert found.barred().keys() == frozenset()
    one = {"spiffe_id": "spiffe://mesh.local/meshagent/node/n1", "issuer": "", "until": 2_000_000_000, "at": 1_800_000_000}
    held = [{**one, "serial": "1", "node": "n1", "also": "node"}, {**one, "serial": "2", "node": "n2", "also": ""}]
    path.write_text(json.dumps({"revoked": held}))
    assert found.barred().keys() == {"n1"}
    for nodes in ("null", "[1]", '"n1"', "{}"):
        path.write_text(f'{{"revoked": [], "nodes": {nodes}}}')
        with pytest.raises(ControllerError, match="cannot be used"):
            found.barred()
    found.stop()
