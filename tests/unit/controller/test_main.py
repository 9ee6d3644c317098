from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from controller.main import main
from tests.ports import free_ports
from tests.unit.controller.harness import SHOP, Authority, service

COMMAND = (sys.executable, "-c", "from controller.main import main; main()")


def start(tmp_path: Path, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "run", "--directory", str(directory), "--socket", str(tmp_path / "c.sock"), *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )


def serving(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if json.loads(line)["message"] == "controller serving":
            return
    raise AssertionError("it ended before it served")


def test_a_second_controller_refuses_to_start_and_sigterm_is_a_clean_exit(tmp_path: Path, directory: Path) -> None:
    (directory / "a.yaml").write_text(SHOP)
    with start(tmp_path, directory) as first:
        serving(first)
        with start(tmp_path, directory) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert said == (f"Error: another controller (pid {first.pid}) serves {tmp_path}/c.sock: stop it, or give another --socket\n")
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert not (tmp_path / "c.sock").exists()


def test_a_killed_controller_leaves_nothing_in_the_way_of_the_next(tmp_path: Path, directory: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        with start(tmp_path, directory) as process:
            serving(process)
            process.send_signal(number)
            process.communicate(timeout=60)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["run", *arguments])
    return result.exit_code, result.stderr


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    code, said = run("--directory", str(tmp_path / "gone"), "--socket", str(tmp_path / "c.sock"))
    assert (code, said) == (1, f"Error: {tmp_path}/gone is not a directory: make it, or give another --directory\n")


def test_a_taken_port_is_one_line(tmp_path: Path, directory: Path) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("controller")
    tls = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key), "--tls-client-ca", str(authority.ca))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = run("--directory", str(directory), "--socket", str(tmp_path / "c.sock"), "--listen", address, *tls)
    assert code == 1
    assert f"Error: cannot listen on {address}: is the port taken? see `ss -ltnp`; or give another --listen\n" in said


def test_bad_certificates_are_one_line_each(tmp_path: Path, directory: Path) -> None:
    authority = Authority(tmp_path, "ours")
    pair, other = authority.issue("controller"), authority.issue("other")
    noise = tmp_path / "noise.pem"
    noise.write_text("nothing")
    for certificate, key, expected in (
        (noise, pair.key, f"--tls-cert {noise} is no PEM certificate"),
        (pair.certificate, noise, f"--tls-key {noise} is no unencrypted PEM key"),
        (pair.certificate, other.key, f"--tls-key {other.key} does not belong to --tls-cert {pair.certificate}"),
        (pair.certificate, tmp_path / "gone", f"cannot read --tls-key {tmp_path}/gone: No such file or directory"),
    ):
        arguments = ("--tls-cert", str(certificate), "--tls-key", str(key), "--tls-client-ca", str(authority.ca), "--listen", "127.0.0.1:0")
        code, said = run("--directory", str(directory), "--socket", str(tmp_path / "c.sock"), *arguments)
        assert code == 1
        assert f"Error: {expected}" in said
        assert "Traceback" not in said


def test_tcp_without_certificates_is_refused(tmp_path: Path, directory: Path) -> None:
    code, said = run("--directory", str(directory), "--socket", str(tmp_path / "c.sock"), "--listen", "127.0.0.1:0")
    assert code == 1
    assert "TCP is served with mutual TLS only" in said


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("run", "--directory", "x", "--tls-cert", "y"), ("run", "--directory", "x", "--listen", "nowhere"), ("validate",)],
)
def test_misuse_is_status_2(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_options_come_from_the_environment_too(tmp_path: Path) -> None:
    environment = {"MESH_CONTROLLER_RUN_DIRECTORY": str(tmp_path / "gone"), "MESH_CONTROLLER_RUN_SOCKET": str(tmp_path / "c.sock")}
    result = CliRunner().invoke(main, ["run"], env={**os.environ, **environment})
    assert f"{tmp_path}/gone is not a directory" in result.stderr


def test_validate_checks_files_and_directories_offline(tmp_path: Path, directory: Path) -> None:
    (directory / "a.yaml").write_text(SHOP)
    good = CliRunner().invoke(main, ["validate", str(directory)])
    assert (good.exit_code, good.stdout, good.stderr) == (0, "", "2 good, 0 problems\n")
    file = tmp_path / "b.yaml"
    file.write_text(service("one", "10.0.0.1") + "---\n" + service("two", "10.0.0.1"))
    bad = CliRunner().invoke(main, ["validate", str(directory), str(file)])
    assert bad.exit_code == 1
    assert bad.stdout == f"{file}:9 Service/two spec.clusterIP: 10.0.0.1 port 80 already belongs to Service default/one\n"


def test_the_page_is_served_where_it_is_wanted_and_goes_with_the_controller(tmp_path: Path, directory: Path) -> None:
    (directory / "a.yaml").write_text(SHOP)
    path = tmp_path / "page.sock"
    with start(tmp_path, directory, "--page-listen", f"unix:{path}") as process:
        serving(process)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            client.sendall(b"GET /graph.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["problems"] == [
        "node n1 is not connected to the controller: what happens there is not shown"
    ]
    assert process.returncode == 0
    assert not path.exists()


def test_a_page_that_strangers_could_open_keeps_the_controller_from_starting(tmp_path: Path, directory: Path) -> None:
    with start(tmp_path, directory, "--page-listen", "0.0.0.0:0") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("Error: --page-listen 0.0.0.0:0 can be reached from other machines, and --page-token-file,")
    code, text = run("--directory", str(directory), "--page-token-file", str(tmp_path / "t"))
    assert code == 2
    assert "--page-token-file without --page-listen: there is no page" in text


def http_get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_health_is_served_beside_metrics(tmp_path: Path, directory: Path) -> None:
    (directory / "a.yaml").write_text(SHOP)
    (port,) = free_ports(1)
    with start(tmp_path, directory, "--metrics-port", str(port)) as process:
        serving(process)
        answers = {path: http_get(port, path) for path in ("/healthz", "/readyz", "/metrics", "/")}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert (answers["/healthz"], answers["/readyz"], answers["/"][0]) == ((200, "ok\n"), (200, "ok\n"), 404)
    assert "mesh_controller_objects" in answers["/metrics"][1]
    assert process.returncode == 0


def test_a_controller_whose_api_server_is_away_serves_nothing_and_says_so(tmp_path: Path) -> None:
    port, closed = free_ports(2)
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        f"{{clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{closed}'}}}}], users: [{{name: u, user: {{token: secret-token}}}}],"
        " contexts: [{name: x, context: {cluster: c, user: u}}], current-context: x}"
    )
    argv = [
        *COMMAND,
        "run",
        "--kubernetes",
        "--kubeconfig",
        str(kubeconfig),
        "--socket",
        str(tmp_path / "c.sock"),
        "--metrics-port",
        str(port),
    ]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        serving(process)
        for _ in range(600):
            ready = http_get(port, "/readyz")
            if "no news" in ready[1]:
                break
            time.sleep(0.05)
        alive = http_get(port, "/healthz")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert ready[0] == 503
    assert "nothing has been published yet: api-server" in ready[1]
    assert alive == (200, "ok\n")
    assert process.returncode == 0
    assert "secret-token" not in log


@pytest.mark.parametrize(
    "arguments",
    [("--directory", "x", "--kubernetes"), (), ("--directory", "x", "--kubeconfig", "y"), ("--kubernetes", "--context", "z")],
)
def test_there_is_one_source(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == 2
    assert "--kubernetes" in result.stderr
