"""`meshagent apply|delete|get` against a real controller that runs in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from agent.cli import resources
from tests.unit.controller.harness import SHOP, serve, service
from tests.unit.controller.test_gateways import WORKLOAD, gateway, secret


@click.group()
def cli() -> None:
    """Hold the commands under test."""


for _command in resources.commands:
    cli.add_command(_command)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    directory = tmp_path / "src"
    directory.mkdir()
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        async with serve(directory, tmp_path / "c.sock"):
            ready.set()
            await stop.wait()

    def body() -> None:
        loop.run_until_complete(run())
        loop.close()

    thread = threading.Thread(target=body)
    thread.start()
    assert ready.wait(60)
    yield f"unix://{tmp_path}/c.sock"
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    assert not thread.is_alive()


def run(target: str, *arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(arguments), input=text, env={"MESHAGENT_CONTROLLER": target}, catch_exceptions=False)


def test_apply_get_and_delete_speak_like_kubectl(target: str, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(SHOP)
    created = run(target, "apply", "-f", str(file))
    assert (created.exit_code, created.stdout) == (0, "service/cart created\nworkload/cart-1 created\n")
    unchanged = run(target, "apply", "-f", "-", text=SHOP)
    assert (unchanged.exit_code, unchanged.stdout) == (0, "service/cart unchanged\nworkload/cart-1 unchanged\n")
    table = run(target, "get", "all")
    assert table.exit_code == 0
    assert [line.split() for line in table.stdout.splitlines()] == [
        ["KIND", "NAMESPACE", "NAME", "SUMMARY", "STATUS"],
        ["Service", "default", "cart", "10.96.0.1", "80/TCP", "Accepted"],
        ["Workload", "default", "cart-1", "10.0.1.2", "on", "n1", "Accepted"],
    ]
    one = run(target, "get", "svc", "default/cart", "-o", "json")
    assert json.loads(one.stdout)["spec"]["clusterIP"] == "10.96.0.1"
    assert "clusterIP: 10.96.0.1" in run(target, "get", "svc", "cart", "-o", "yaml").stdout
    deleted = run(target, "delete", "-f", str(file), "-o", "json")
    assert deleted.exit_code == 0
    assert [result["action"] for result in json.loads(deleted.stdout)] == ["deleted", "deleted"]
    again = run(target, "delete", "-f", str(file))
    assert (again.exit_code, again.stderr) == (1, "service/cart not found\nworkload/cart-1 not found\n")


def test_what_get_writes_can_be_applied_again(target: str) -> None:
    run(target, "apply", "-f", "-", text=SHOP)
    text = run(target, "get", "all", "-o", "yaml").stdout
    again = run(target, "apply", "-f", "-", text=text)
    assert (again.exit_code, again.stdout) == (0, "service/cart unchanged\nworkload/cart-1 unchanged\n")


def test_a_directory_is_applied_file_by_file_and_refusals_name_the_file(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.yaml").write_text(service("one", "10.96.0.1"))
    (folder / "sub" / "b.yml").write_text(service("two", "nonsense"))
    (folder / "note.txt").write_text("not a resource")
    result = run(target, "apply", "-f", str(folder))
    assert result.exit_code == 1
    assert result.stdout == "service/one created\n"
    assert result.stderr == f'{folder}/sub/b.yml:4 Service/two spec.clusterIP: "nonsense" is not an IPv4 or IPv6 address\n'


def test_negative_answers_are_status_1(target: str) -> None:
    unknown = run(target, "get", "gadgets")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith('Error: unknown kind "gadgets"')
    missing = run(target, "get", "service", "none")
    assert (missing.exit_code, missing.stderr) == (1, "Error: there is no service default/none\n")


def test_an_unreachable_controller_is_one_line(tmp_path: Path) -> None:
    result = run(f"unix://{tmp_path}/none.sock", "get", "all")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: controller unix://{tmp_path}/none.sock is not reachable (")
    assert result.stderr.endswith("): is `mesh-controller run` up? give its address with --controller\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply",),
        ("apply", "-f", "/nonexistent/file.yaml"),
        ("get",),
        ("get", "svc", "a/b", "-n", "c"),
        ("get", "svc", "--controller", "127.0.0.1:1"),
        ("get", "svc", "-o", "xml"),
    ],
)
def test_misuse_is_status_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert run(f"unix://{tmp_path}/none.sock", *arguments).exit_code == 2


def test_a_peer_authentication_is_listed_with_its_modes_and_says_that_it_needs_an_authority(target: str) -> None:
    spec = "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: DISABLE}}}"
    text = f"---\napiVersion: meshagent.io/v1alpha1\nkind: PeerAuthentication\nmetadata: {{name: cart}}\nspec: {spec}\n"
    assert run(target, "apply", "-f", "-", text=SHOP + text).stdout.endswith("peerauthentication/cart created\n")
    for word in ("peerauthentication", "PeerAuthentication", "peerauthentications", "pa"):
        _, row = run(target, "get", word).stdout.splitlines()
        assert row.split() == ["PeerAuthentication", "default", "cart", "STRICT,", "9090", "DISABLE", "NoCertificateAuthority"]
    assert "has no effect" in run(target, "get", "pa", "-o", "wide").stdout


def test_gateways_show_their_listeners_and_secrets_nothing(target: str) -> None:
    text = WORKLOAD + gateway("name: http, port: 80, protocol: HTTP", "name: x, port: 81, protocol: TCP") + secret()
    assert run(target, "apply", "-f", "-", text=text).exit_code == 0
    table = run(target, "get", "gtw", "-o", "wide").stdout.splitlines()
    assert "meshagent: http HTTP 80 *, x TCP 81 *" in table[1]
    assert "UnsupportedProtocol" in table[1]
    assert "protocol TCP is not supported; supported: HTTP, HTTPS" in table[1]
    for form in ("json", "yaml"):
        shown = run(target, "get", "secrets", "-o", form).stdout
        assert "kubernetes.io/tls" in shown
        assert "tls.key" not in shown
