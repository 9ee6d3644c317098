"""`meshagent identity`, and how a node is told to join."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from agent import logs, supervisor
from agent.cli.main import main
from agent.config import Config, Join
from agent.report import CertificateStatus, IdentityStatus, encode
from meshapi import agent_pb2 as pb
from meshapi import agent_pb2_grpc
from tests.unit.agent.identity.signer import Root

ENDS = time.time() + 37_500  # "10 h" at once, and for almost an hour after this was read
CART = CertificateStatus("default/cart", "spiffe://m/ns/default/sa/cart", "1f", ENDS - 72_000, ENDS, ENDS - 30_000)
SHOP = CertificateStatus("default/shop", "spiffe://m/ns/default/sa/shop", problem="refused: not on this node")
ON = IdentityStatus(mode="on", connected=True, trust_domain="m", trust_sequence=3, roots=2, kept="/run/m/svids.json", workloads=(CART,))


class Agent(agent_pb2_grpc.AgentServicer):
    def __init__(self, status: IdentityStatus, one: CertificateStatus = CART) -> None:
        self.status, self.one = status, one

    def Calls(self, request: pb.CallsRequest, context: grpc.ServicerContext) -> Iterator[pb.Json]:  # noqa: N802 - gRPC's names
        raise NotImplementedError

    def Status(self, request: pb.StatusRequest, context: object) -> pb.Json:  # noqa: N802, ARG002  gRPC's names
        document = {
            "ready": True, "node": "node-1", "hooks": [], "waypoint": {"ready": True, "version": "1", "pid": 23, "nacks": 0},
            "controller": {"connected": True, "version": "v1", "lagSeconds": None},
            "workloads": [{"namespace": "default", "name": "cart", "enrolled": True, "redirected": True, "identity": ""}], "problems": [],
            "identity": json.loads(encode(self.status)),
        }  # fmt: skip
        return pb.Json(document=json.dumps(document).encode())

    def Trace(self, request: pb.TraceRequest, context: grpc.ServicerContext) -> Iterator[pb.Json]:  # noqa: N802
        raise NotImplementedError

    def Graph(self, request: pb.GraphRequest, context: grpc.ServicerContext) -> pb.Json:  # noqa: N802
        raise NotImplementedError

    def Identity(self, request: pb.IdentityRequest, context: grpc.ServicerContext) -> pb.Json:  # noqa: N802
        if request.workload not in {"", self.one.workload}:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no workload {request.workload}")
        return pb.Json(document=encode(self.one if request.workload else self.status))


@contextlib.contextmanager
def serving(directory: Path, agent: Agent) -> Iterator[Path]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    agent_pb2_grpc.add_AgentServicer_to_server(agent, server)  # type: ignore[no-untyped-call,unused-ignore]
    server.add_insecure_port(f"unix:{directory}/agent.sock")
    server.start()
    try:
        yield directory
    finally:
        server.stop(0).wait()


def run(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--run-dir", str(directory)])


def test_the_list_has_who_until_when_and_why_not(tmp_path: Path) -> None:
    status = IdentityStatus(
        mode="on", connected=False, trust_domain="m", trust_sequence=3, roots=2, revoked=1,
        node=CertificateStatus("", "spiffe://m/meshagent/node/n", "ab", 1.0, ENDS), workloads=(CART, SHOP),
    )  # fmt: skip
    with serving(tmp_path, Agent(status)):
        result = run(tmp_path, "identity", "list")
    assert result.exit_code == 1
    text = result.stdout
    for word in (
        "trust domain m",
        "not connected",
        "2 roots, 1 revoked",
        "in memory only",
        "default/cart",
        "1f",
        "10 h",
        "(this node)",
        "refused: not on",
    ):
        assert word in text, text


def test_a_list_without_trouble_is_good_and_json_is_what_the_agent_says(tmp_path: Path) -> None:
    with serving(tmp_path, Agent(ON)):
        assert run(tmp_path, "identity", "list").exit_code == 0
        result = run(tmp_path, "identity", "list", "-o", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(encode(ON))


def test_a_node_without_identities_says_why(tmp_path: Path) -> None:
    with serving(tmp_path, Agent(IdentityStatus())):
        result = run(tmp_path, "identity", "list")
    assert result.exit_code == 0
    assert "no identity service" in result.stdout


def test_one_is_shown_with_its_chain(tmp_path: Path) -> None:
    pem = Root().pem.decode()
    one = CertificateStatus(CART.workload, CART.spiffe_id, "1f", CART.not_before, CART.expires_at, CART.renews_at, chain=(pem,))
    with serving(tmp_path, Agent(ON, one)):
        text = run(tmp_path, "identity", "show", "cart")
        document = run(tmp_path, "identity", "show", "default/cart", "-o", "json")
        other = run(tmp_path, "identity", "show", "other")
    assert text.exit_code == document.exit_code == 0
    assert "SPIFFE ID  spiffe://m/ns/default/sa/cart" in text.stdout
    assert "CN=test root, signed by CN=test root" in text.stdout
    assert pem.strip() in text.stdout
    assert json.loads(document.stdout)["chain"] == [pem]
    assert (other.exit_code, "no workload default/other" in other.stderr) == (1, True)


def test_one_without_a_certificate_is_a_negative_answer(tmp_path: Path) -> None:
    with serving(tmp_path, Agent(ON, SHOP)):
        result = run(tmp_path, "identity", "show", "shop")
    assert result.exit_code == 1
    assert "problem    refused: not on this node" in result.stdout


@pytest.mark.parametrize(
    ("status", "line"),
    [
        pytest.param(IdentityStatus(mode="waiting"), "identity    waiting for the controller", id="waiting"),
        pytest.param(ON, "identity    1 of 1 certificates  first ends", id="on"),
        pytest.param(
            IdentityStatus(mode="on", workloads=(SHOP,)),
            "0 of 1 certificates  0 trusted roots  1 not renewed  kept in memory only",
            id="bad",
        ),
    ],
)
def test_the_status_has_a_line_about_it(tmp_path: Path, status: IdentityStatus, line: str) -> None:
    with serving(tmp_path, Agent(status)):
        assert line in run(tmp_path, "status").stdout


def test_a_status_without_identities_has_none(tmp_path: Path) -> None:
    with serving(tmp_path, Agent(IdentityStatus())):
        assert "identity    " not in run(tmp_path, "status").stdout


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    found: list[Config] = []

    class Stub:
        def __init__(self, config: Config) -> None:
            found.append(config)

        async def run(self) -> None:
            """End at once."""

    monkeypatch.setattr(supervisor, "Supervisor", Stub)
    monkeypatch.setattr(logs, "configure", lambda _: None)
    return found


def start(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(main, ["run", "--node", "n", "--controller", "10.0.0.1:15010", *arguments], env=env)


def test_a_token_file_is_all_that_a_node_needs(started: list[Config], tmp_path: Path) -> None:
    assert start("--join-token-file", str(tmp_path / "t"), "--run-dir", "/r").exit_code == 0
    (config,) = started
    assert config.join == Join("10.0.0.1:15011", token_file=tmp_path / "t")
    assert config.tls is not None
    assert (config.tls.ca, config.tls.certificate, config.tls.key) == (
        Path("/r/identity/roots.pem"), Path("/r/identity/node.pem"), Path("/r/identity/node.pem")
    )  # fmt: skip
    assert config.channel_options == (("grpc.ssl_target_name_override", "mesh-controller"),)
    assert (config.keys_on_disk, config.workload_socket) == (False, Path("/r-workload/workload.sock"))


def test_a_token_in_the_environment_is_taken_out_of_it_and_does_not_show(started: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHAGENT_JOIN_TOKEN", "mesh1.secret")
    assert start("--join", "10.0.0.2:1", "--keys-on-disk").exit_code == 0
    assert "MESHAGENT_JOIN_TOKEN" not in os.environ
    (config,) = started
    assert config.join is not None
    assert (config.join.token, config.join.address, config.keys_on_disk) == ("mesh1.secret", "10.0.0.2:1", True)
    assert "secret" not in repr(config)


def test_a_service_account_token_needs_the_root(started: list[Config], tmp_path: Path) -> None:
    (tmp_path / "ca").touch()
    account = ["--service-account-token-file", str(tmp_path / "t")]
    assert start(*account, "--tls-ca", str(tmp_path / "ca")).exit_code == 0
    assert started[0].join == Join("10.0.0.1:15011", service_account_token_file=tmp_path / "t", root=tmp_path / "ca")
    refused = start(*account)
    assert (refused.exit_code, "--tls-ca" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--join", "x:1"], "--join needs"),
        (["--join-token-file", "t", "--service-account-token-file", "t"], "give one"),
        (["--join-token-file", "t", "--controller", "unix:x"], "unix socket"),
        (["--join-token-file", "t", "--tls-ca", __file__], "leave --tls-* out"),
        (["--join-token-file", "t", "--tls-key", __file__], "leave --tls-* out"),
        ([], "--join-token-file"),
    ],
)
def test_ways_to_join_that_do_not_go_together_are_misuse(started: list[Config], arguments: list[str], said: str) -> None:
    result = start(*arguments)
    assert (result.exit_code, started) == (2, [])
    assert said in " ".join(result.stderr.split()), result.stderr
    assert not isinstance(result.exception, (AssertionError, TypeError)), result.exception
