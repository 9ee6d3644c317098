"""Credentials that change while the controller runs: what is asked from then on is asked with them. With real certificates: tests/kubernetes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from controller.kubernetes.api import Api
from tests.tasks import beside
from tests.unit.controller.kubernetes.apiserver import listed, scripted, write_kubeconfig

pytestmark = pytest.mark.anyio
PATH = "/api/v1/namespaces"


async def test_a_token_of_a_kubeconfig_is_read_again_and_a_watch_that_was_begun_before_goes_on(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (server, api):
        server.pages[PATH] = [listed("1")]
        async with api.watch(PATH, {"resourceVersion": "1"}, 30) as lines:
            watch = await server.watches.get()
            write_kubeconfig(tmp_path / "kubeconfig", server.port, "second")
            await api.get(PATH, {})
            await watch.raw(b"still here\n")
            assert await anext(aiter(lines)) == b"still here"
        assert server.tokens == ["t", "second"]


async def test_a_token_file_is_read_again_when_it_changes_and_not_only_when_its_token_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted(tmp_path) as (server, api):
        server.pages[PATH] = [listed("1")]
        config = json.loads((tmp_path / "kubeconfig").read_text())
        config["users"][0]["user"] = {"tokenFile": "token"}  # beside the file that names it, as for kubectl
        token = tmp_path / "token"
        token.write_text("one\n")
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        await api.get(PATH, {})
        token.write_text("two\n")
        await api.get(PATH, {})
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        token.write_text("\n")
        await api.get(PATH, {})
        token.unlink()
        await api.get(PATH, {})
        assert server.tokens == ["one", "two", "two", "two"]
        errors = [vars(record)["error"] for record in caplog.records if record.levelname == "ERROR"]
        assert [error.partition(":")[0] for error in errors] == ["ConfigError", "FileNotFoundError"]


async def test_files_that_cannot_be_used_again_are_told_of_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    async with scripted(tmp_path) as (server, api):
        server.pages[PATH] = [listed("1")]
        good = kubeconfig.read_text()
        for _ in range(2):
            for text in ("{", good):
                kubeconfig.write_text(text)
                await api.get(PATH, {})
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("{", "YAMLError|ParserError", id="half written"),
        pytest.param("", "TypeError|AttributeError", id="empty"),
        pytest.param(None, "FileNotFoundError|ConfigError", id="gone"),
    ],
)
async def test_while_the_file_cannot_be_used_what_it_said_before_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None, why: str
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    async with scripted(tmp_path) as (server, api):
        server.pages[PATH] = [listed("1")]
        if text is None:
            kubeconfig.unlink()
        else:
            kubeconfig.write_text(text)
        await api.get(PATH, {})
        await api.get(PATH, {})
        (record,) = caplog.records
        assert any(word in vars(record)["error"] for word in why.split("|")), vars(record)["error"]
        write_kubeconfig(kubeconfig, server.port, "third")
        await api.get(PATH, {})
        assert server.tokens == ["t", "t", "third"]


async def test_a_password_in_an_address_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with scripted(tmp_path) as (server, api):
        server.pages[PATH] = [listed("1")]
        config = json.loads((tmp_path / "kubeconfig").read_text())
        config["clusters"][0]["cluster"]["server"] = "https://admin:s3cret@server.example:6443"
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        await api.get(PATH, {})
        (record,) = caplog.records
        assert "another server, server.example:6443:" in vars(record)["error"]
        assert "s3cret" not in str(vars(record))


async def test_another_server_is_not_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with scripted(tmp_path) as (server, api):
        server.pages[PATH] = [listed("1")]
        write_kubeconfig(tmp_path / "kubeconfig", 1, "second")
        await api.get(PATH, {})
        assert server.tokens == ["t"]
        assert "it names another server, http://127.0.0.1:1: start the controller anew if that is meant" in vars(caplog.records[0])["error"]


async def test_a_connection_is_closed_when_nobody_waits_for_its_handshake_any_more(tmp_path: Path) -> None:
    arrived, ended = asyncio.Event(), asyncio.Event()

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        arrived.set()
        await reader.read()
        ended.set()
        writer.close()

    kubeconfig = tmp_path / "kubeconfig"
    async with await asyncio.start_server(never_answers, "127.0.0.1", 0) as listening:
        write_kubeconfig(kubeconfig, listening.sockets[0].getsockname()[1], scheme="https")
        api = Api.connect(kubeconfig)
        async with beside(api.get(PATH, {})):
            await arrived.wait()
        await asyncio.wait_for(ended.wait(), 5)
        await api.close()
