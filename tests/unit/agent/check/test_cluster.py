"""What `meshagent check --kubernetes` knows about its own chart; the rest is tried on a real API server (tests/kubernetes/test_check.py)."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from agent.check import cluster
from agent.check.api import Api, Unreachable
from agent.cli.main import main
from agent.errors import NotFound

ROOT = Path(__file__).parents[4]


def manifest(kind: str) -> list[dict[str, Any]]:
    documents = YAML(typ="safe", pure=True).load_all((ROOT / "deploy/kubernetes/meshagent.yaml").read_text())
    return [one for one in documents if one and one["kind"] == kind]


def test_the_rights_that_are_asked_for_are_those_that_the_chart_gives() -> None:
    for kind, asked in (("ClusterRole", cluster.RIGHTS), ("Role", cluster.RIGHTS_HERE)):
        (role,) = manifest(kind)
        given = {
            (g, r, v, name)
            for rule in role["rules"]
            for g in rule["apiGroups"]
            for r in rule["resources"]
            for v in rule["verbs"]
            for name in rule.get("resourceNames", [""])
        }
        assert set(asked) == given


def test_names_and_labels_are_those_of_the_chart() -> None:
    (daemons,), (deployment,) = manifest("DaemonSet"), manifest("Deployment")
    assert (daemons["metadata"]["name"], deployment["metadata"]["name"]) == (cluster.AGENT, cluster.CONTROLLER)
    labels = daemons["spec"]["template"]["metadata"]["labels"]
    assert all(labels[name] == value for name, _, value in (part.partition("=") for part in cluster.AGENTS.split(",")))


def kubeconfig(tmp_path: Path, user: dict[str, Any], server: str = "http://127.0.0.1:1") -> Path:
    path = tmp_path / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return path


def test_a_server_that_does_not_answer_is_one_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["check", "--kubernetes", "--kubeconfig", str(kubeconfig(tmp_path, {})), "-o", "json"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["worst"], report["scope"], report["name"]) == (1, "error", "cluster", "http://127.0.0.1:1")
    (finding,) = report["findings"]
    assert (finding["severity"], finding["check"]) == ("error", "api")
    assert "ConnectError" in finding["cause"]
    assert "kubectl version" in finding["nextStep"]


def test_a_context_that_does_not_exist_is_a_negative_answer_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["check", "--kubernetes", "--kubeconfig", str(kubeconfig(tmp_path, {})), "--context", "none"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Context 'none' not found" in result.stderr
    assert result.stderr.count("\n") == 1


class Server(http.server.BaseHTTPRequestHandler):
    """Says which credentials it was shown."""

    def do_GET(self) -> None:
        body = json.dumps({"shown": self.headers["Authorization"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_credential_plugin_is_asked_for_a_token(tmp_path: Path, version: str) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/usr/bin/env python3\nimport json, os\n"
        "asked = json.loads(os.environ.get('KUBERNETES_EXEC_INFO', '{}')).get('apiVersion', 'nothing').rpartition('/')[2]\n"
        "print(json.dumps({'kind': 'ExecCredential', 'status': {'token': asked + os.environ['MORE']}}))\n"
    )
    plugin.chmod(0o755)
    more = [{"name": "MORE", "value": "-more"}]
    user = {"exec": {"apiVersion": f"client.authentication.k8s.io/{version}", "command": str(plugin), "env": more}}
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with Api.connect(kubeconfig(tmp_path, user, f"http://127.0.0.1:{server.server_port}")) as api:
            assert api.get("/x") == {"shown": {"v1": "Bearer v1-more", "v1beta1": "Bearer nothing-more"}[version]}
        thread.join()


def test_a_token_is_in_no_message(tmp_path: Path) -> None:
    with pytest.raises((NotFound, Unreachable)) as caught:  # no header may have these characters
        Api.connect(kubeconfig(tmp_path, {"token": "hunter2\n\x00"})).get("/version")
    assert "hunter2" not in str(caught.value)


def test_which_file_says_where_the_server_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kubeconfig(tmp_path, {"token": "t"})
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'none'}:{path}")
    assert Api.connect().namespace == "shop"
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(NotFound, match=r"there is no .*/none; give --kubeconfig"):
        Api.connect()


def test_a_cluster_is_only_looked_at_when_asked(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["check", "--kubeconfig", str(kubeconfig(tmp_path, {}))])
    assert result.exit_code == 2
    assert "give --kubernetes" in result.stderr


def test_the_other_commands_do_not_pay_for_it() -> None:
    names = subprocess.run(
        [sys.executable, "-c", "import sys, agent.cli.main; print(*sorted(sys.modules))"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "agent.cli.check" in names
    assert not {"httpx2", "lightkube", "cryptography", "agent.check.cluster", "agent.check.machine"} & set(names)


@pytest.mark.parametrize(
    ("major", "minor", "severity"),
    [("1", "30", "error"), ("1", "30+", "error"), ("1", "9", "error"), ("1", "31", "ok"), ("1", "36+", "ok"), ("2", "0", "ok")],
)
def test_a_cluster_that_is_too_old_is_an_error_with_its_version(tmp_path: Path, major: str, minor: str, severity: str) -> None:
    said = {"major": major, "minor": minor, "gitVersion": f"v{major}.{minor}.4"}
    with Api.connect(kubeconfig(tmp_path, {})) as api:
        finding = next(cluster.Cluster(api, "meshagent-system", "0.1.0")._server(said))
    assert (finding.severity.name.lower(), finding.check) == (severity, "api")
    assert f"Kubernetes v{major}.{minor}.4" in finding.what
    if severity == "error":
        assert finding.what.endswith("is older than 1.31")
        assert finding.next_step == "upgrade the cluster"
