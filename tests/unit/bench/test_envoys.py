"""The proxies that the waypoint is compared with: the real Envoy accepts their configurations."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from agent.l7.envoy import find
from bench import envoys

HERE, THERE = ("127.0.0.1", 18080), ("127.0.0.1", 8080)


def validated(path: Path, configuration: str) -> str:
    path.write_text(configuration)
    argv = [str(find()), "--mode", "validate", "-c", str(path), "--log-level", "error", "--disable-hot-restart"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    return "" if run.returncode == 0 else run.stderr + run.stdout


def test_the_bare_hop_is_valid(tmp_path: Path) -> None:
    assert validated(tmp_path / "bare.json", envoys.hop(HERE, THERE)) == ""


def test_both_sidecars_are_valid_with_their_certificates(tmp_path: Path) -> None:
    envoys.write_certificates(tmp_path)
    opens = envoys.hop(HERE, THERE, open_tls=envoys.mutual_tls(tmp_path, "caller", "server"))
    accepts = envoys.hop(HERE, THERE, accept_tls=envoys.mutual_tls(tmp_path, "server", "caller"))
    assert validated(tmp_path / "caller.json", opens) == ""
    assert validated(tmp_path / "server.json", accepts) == ""


def test_sidecars_of_tcp_services_are_valid_and_know_no_http(tmp_path: Path) -> None:
    envoys.write_certificates(tmp_path)
    hops = [(HERE, THERE), (("127.0.0.1", 18081), ("127.0.0.1", 8081))]
    opens = envoys.tcp(hops, open_tls=envoys.mutual_tls(tmp_path, "caller", "server"))
    accepts = envoys.tcp(hops, accept_tls=envoys.mutual_tls(tmp_path, "server", "caller"))
    assert validated(tmp_path / "caller.json", opens) == ""
    assert validated(tmp_path / "server.json", accepts) == ""
    assert "http_connection_manager" not in opens + accepts
    assert json.loads(accepts)["static_resources"]["listeners"][1]["address"]["socket_address"]["port_value"] == 18081


def test_the_accepting_sidecar_demands_a_certificate_of_the_caller(tmp_path: Path) -> None:
    configuration = json.loads(envoys.hop(HERE, THERE, accept_tls=envoys.mutual_tls(tmp_path, "server", "caller")))
    context = configuration["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"]["typed_config"]
    names = context["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"]
    assert context["require_client_certificate"] is True
    assert names == [{"san_type": "URI", "matcher": {"exact": "spiffe://mesh.local/ns/default/sa/caller"}}]


def test_private_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    envoys.write_certificates(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
