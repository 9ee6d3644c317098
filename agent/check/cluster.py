"""A Kubernetes cluster, before the mesh is installed in it and after. Asks the API server and nobody else; needs no right that it cannot do without."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from agent.check import definitions
from agent.check.api import Api, Refused, Unreachable
from agent.check.finding import Finding, Report, error, ok, some, warning
from meshapi.text import counted

AGENT, CONTROLLER = "meshagent-agent", "meshagent-controller"
"""Fixed names of the chart (deploy/helm/meshagent/templates/_helpers.tpl)."""
AGENTS: Final = "app.kubernetes.io/name=meshagent,app.kubernetes.io/component=agent"
OLDEST_KUBERNETES: Final = (1, 31)
OLDEST_GATEWAY_API: Final = (1, 4)
GATEWAY_KINDS: Final = {"gateways": "v1", "grpcroutes": "v1", "httproutes": "v1", "referencegrants": "v1beta1"}
"""Versions that the controller reads (controller/schemas)."""
_BUNDLE: Final = "gateway.networking.k8s.io/bundle-version"
_ENFORCE: Final = "pod-security.kubernetes.io/enforce"
_MODE: Final = "meshagent.io/mode"
_SKEW_S: Final = 60.0
_SOON_S: Final = 30 * 86_400.0
_OWN: Final = (
    *("authorizationpolicies", "callermatches", "externalservices", "peerauthentications"),
    *("requestauthentications", "telemetries", "trafficpolicies", "workloads"),
)
_DEFINITIONS: Final = "customresourcedefinitions"
RIGHTS: Final = (  # of the controller's service account, as deploy/helm/meshagent/templates/controller-rbac.yaml gives them: (group, resource, verb, name)
    *(("", resource, verb, "") for resource in ("namespaces", "nodes", "pods", "services") for verb in ("list", "watch")),
    *(("discovery.k8s.io", "endpointslices", verb, "") for verb in ("list", "watch")),
    *(("gateway.networking.k8s.io", resource, verb, "") for resource in GATEWAY_KINDS for verb in ("list", "watch")),
    *((definitions.GROUP, resource, verb, "") for resource in _OWN for verb in ("list", "watch")),
    *(("apiextensions.k8s.io", _DEFINITIONS, "get", f"{resource}.gateway.networking.k8s.io") for resource in GATEWAY_KINDS),
    *(("apiextensions.k8s.io", _DEFINITIONS, "get", f"{resource}.{definitions.GROUP}") for resource in _OWN),
    *(("gateway.networking.k8s.io", f"{resource}/status", "patch", "") for resource in ("gateways", "grpcroutes", "httproutes")),
    *((definitions.GROUP, f"{resource}/status", "patch", "") for resource in _OWN),
    ("events.k8s.io", "events", "create", ""),
    ("authentication.k8s.io", "tokenreviews", "create", ""),
)
RIGHTS_HERE: Final = (  # the same in the mesh's own namespace
    ("coordination.k8s.io", "leases", "create", ""),
    *(("coordination.k8s.io", "leases", verb, CONTROLLER) for verb in ("get", "update")),
    *((definitions.GROUP, "controllerstates", verb, "") for verb in ("get", "list", "watch", "create", "update", "delete")),
)
_TO_INSTALL: Final = (
    ("apiextensions.k8s.io", _DEFINITIONS),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
)
_INJECTED: Final = (  # label or annotation of a Namespace, values that mean yes (None: any), whose it is
    ("istio-injection", {"enabled"}, "Istio"),
    ("istio.io/rev", None, "Istio"),
    ("istio.io/dataplane-mode", {"ambient"}, "Istio"),
    ("linkerd.io/inject", {"enabled", "ingress"}, "Linkerd"),
    ("kuma.io/sidecar-injection", {"enabled"}, "Kuma"),
    ("consul.hashicorp.com/connect-inject", {"true"}, "Consul"),
)
_WEBHOOKS: Final = re.compile(r"(istio|linkerd|kuma|consul|osm)[-.]", re.IGNORECASE)
Object = Mapping[str, Any]


def check(kubeconfig: Path | None, context: str, namespace: str, version: str) -> Report:
    """Look at everything. Raises NotFound if it is not known which cluster."""
    with Api.connect(kubeconfig, context) as api:
        return Report("cluster", api.url, tuple(Cluster(api, namespace, version).findings()))


class Cluster:
    """See the module."""

    def __init__(self, api: Api, namespace: str, version: str, now: Callable[[], float] = time.time) -> None:
        self._api = api
        self._namespace = namespace
        self._version = version
        self._now = now
        self._daemons: Object | None = None
        self._deployment: Object | None = None
        self._looked = False

    @property
    def _installed(self) -> bool:
        return self._daemons is not None or self._deployment is not None

    @property
    def _removing(self) -> bool:
        """Do agents take the mesh off their nodes instead of running it (agent.remove of the chart)?"""
        return self._daemons is not None and _removes(self._daemons["spec"]["template"])

    def findings(self) -> Iterator[Finding]:
        """Everything. Without an answer to the first question there is no other."""
        try:
            yield from self._server(self._api.get("/version"))
        except (Unreachable, Refused) as failure:
            yield error(
                "api", "the API server does not answer", self._api.url, cause=str(failure),
                next_step="see whether 'kubectl version' works with the same --kubeconfig and --context",
            )  # fmt: skip
            return
        parts: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
            ("installed", self._components),
            ("definitions", self._definitions),
            ("gateway api", self._gateway_api),
            ("namespace", self._own_namespace),
            ("root", self._root),
            ("signer", self._signer),
            ("nodes", self._nodes),
            ("rights", self._rights),
            ("other meshes", self._namespaces),
            ("webhooks", self._webhooks),
        )
        for name, look in parts:
            try:
                yield from look()
            except Refused as failure:
                yield warning(
                    name, "cannot be looked at", self._api.url, cause=str(failure),
                    next_step="look as a user who has this right" if failure.code == 403 else "see the API server's log",
                )  # fmt: skip
            except (Unreachable, KeyError, TypeError, ValueError) as failure:
                yield warning(
                    name, "cannot be looked at", self._api.url, cause=f"{type(failure).__name__}: {failure}", next_step="check again"
                )

    def _server(self, said: Object) -> Iterator[Finding]:
        number = tuple(int(re.sub(r"\D", "", said[name]) or 0) for name in ("major", "minor"))
        if number < OLDEST_KUBERNETES:
            yield error(
                "api", f"Kubernetes {said['gitVersion']} is older than {OLDEST_KUBERNETES[0]}.{OLDEST_KUBERNETES[1]}", self._api.url,
                cause="rules of the definitions (isIP, cidr in CEL) came with it", next_step="upgrade the cluster",
            )  # fmt: skip
        else:
            yield ok("api", f"Kubernetes {said['gitVersion']} at {self._api.url}")
        ahead = self._api.ahead_s
        if ahead is not None and abs(ahead) > _SKEW_S:
            yield warning(
                "clock", f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the API server's",
                cause="one of both is wrong", next_step="set it; certificates need nodes' clocks that agree within minutes",
            )  # fmt: skip

    def _get(self, path: str, *, metadata: bool = False) -> Object | None:
        try:
            return self._api.get(path, metadata=metadata)
        except Refused as failure:
            if failure.code == 404:
                return None
            raise

    def _components(self) -> Iterator[Finding]:
        apps = f"/apis/apps/v1/namespaces/{self._namespace}"
        self._daemons, self._deployment = self._get(f"{apps}/daemonsets/{AGENT}"), self._get(f"{apps}/deployments/{CONTROLLER}")
        self._looked = True
        if self._removing:
            yield from self._removal()
            return
        if not self._installed:
            yield ok("installed", f"the mesh is not installed in namespace {self._namespace}: what it will need is checked")
            return
        for kind, name, found in (("DaemonSet", AGENT, self._daemons), ("Deployment", CONTROLLER, self._deployment)):
            if found is None:
                yield error(
                    "installed", f"there is no {kind} {name}", self._namespace, cause="the release was removed in part",
                    next_step="install it again: helm upgrade --install meshagent deploy/helm/meshagent",
                )  # fmt: skip
            else:
                yield _rollout(kind, found)
        versions = Counter(_version_of(found) for found in (self._daemons, self._deployment) if found is not None)
        if len(versions) > 1 or self._version not in versions:
            yield warning(
                "versions", f"agents are of version {_version_of(self._daemons)}, controllers {_version_of(self._deployment)}, this command {self._version}",
                self._namespace, cause="one was upgraded alone", next_step="upgrade the release, or use the command of its version",
            )  # fmt: skip
        else:
            yield ok("versions", f"agents, controllers and this command are of version {self._version}")

    def _removal(self) -> Iterator[Finding]:
        """Of agents that clean their nodes, each is ready when it is done. The DaemonSet's own numbers count those that run the mesh yet."""
        found = self._daemons or {}
        status = found.get("status", {})
        seen = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
        wanted = int(status.get("desiredNumberScheduled", 0))
        pods = self._api.items(f"/api/v1/namespaces/{self._namespace}/pods", AGENTS)
        clean = sum("deletionTimestamp" not in one["metadata"] and _removes(one) and _ready(one) for one in pods) if seen else 0
        where, cause = f"daemonset {self._namespace}/{AGENT}", "agent.remove=true was given, or uninstall.yaml applied"
        if seen and not wanted:
            yield warning(
                "installed", "the mesh is to be taken off the nodes, and no node is to have an agent that does it", where,
                cause=f"{cause}; and agent.nodeSelector selects no node",
                next_step="have agent.nodeSelector select every node that had an agent: what is in force there stays until one takes it off",
            )  # fmt: skip
        elif not seen or clean < wanted:
            yield warning(
                "installed", f"the mesh is being taken off the nodes: {wanted - min(clean, wanted)} of {wanted} are not clean yet", where, cause=cause,
                next_step=f"kubectl -n {self._namespace} rollout status daemonset {AGENT}; where it does not end, the log of that node's agent",
            )  # fmt: skip
        else:
            yield warning(
                "installed", f"the mesh was taken off all {wanted} nodes: no pod is in it, and no policy is in force", where, cause=cause,
                next_step="uninstall the release (docs/kubernetes.md), or have agents run again: helm upgrade with agent.remove=false",
            )  # fmt: skip

    def _definitions(self) -> Iterator[Finding]:
        known = definitions.own()
        found = {name: self._get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}") for name in known}
        missing = [name for name, one in found.items() if one is None]
        if len(missing) == len(known) and not self._installed:
            yield ok("definitions", "ours are not there yet: the chart installs them")
            return
        if missing:
            yield error(
                "definitions", f"{len(missing)} of {len(known)} of ours are not there: {some(missing)}", "customresourcedefinitions",
                cause="they were deleted, or the release is older", next_step="kubectl apply --server-side -f deploy/crds",
            )  # fmt: skip
        bad = False
        for name, one in found.items():
            if one is not None:
                for finding in self._definition(name, known[name], one):
                    bad = True
                    yield finding
        if not missing and not bad:
            yield ok("definitions", f"all {len(known)} of ours are served, and are those of this version")

    @staticmethod
    def _definition(name: str, mine: Object, found: Object) -> Iterator[Finding]:
        where = f"customresourcedefinition {name}"
        conditions = {one["type"]: one for one in found.get("status", {}).get("conditions", ())}
        if conditions.get("Established", {}).get("status") != "True":
            yield error(
                "definitions", f"{name} is not served", where, cause=conditions.get("NamesAccepted", {}).get("message", "it is new, or another has its names"),
                next_step=f"kubectl describe crd {name}",
            )  # fmt: skip
            return
        served = definitions.described(found)
        for version, own in mine.items():
            if version not in served:
                yield error(
                    "definitions",
                    f"{name} does not serve {version}",
                    where,
                    cause=f"it serves {some(served)}",
                    next_step="kubectl apply --server-side -f deploy/crds",
                )
                continue
            word, fields = definitions.compare(own, served[version])
            if word == definitions.SAME:
                continue
            difference = {
                definitions.OLDER: f"older than this version: it lacks {some(fields)}",
                definitions.NEWER: f"newer than this version: it has {some(fields)}",
                definitions.OTHER: f"of another version: {some(fields) or 'its fields are the same, its rules are not'}",
            }[word]
            step = (
                "use the command, the agents and the controllers of that version"
                if word == definitions.NEWER
                else "kubectl apply --server-side -f deploy/crds"
            )
            yield warning(
                "definitions", f"{name} is {difference}", where, cause="definitions and mesh were not upgraded together", next_step=step
            )

    def _gateway_api(self) -> Iterator[Finding]:
        found = {
            kind: self._get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kind}.gateway.networking.k8s.io")
            for kind in GATEWAY_KINDS
        }
        missing = [kind for kind, one in found.items() if one is None]
        if missing:
            yield warning(
                "gateway api", f"{'its definitions are' if len(missing) == len(found) else some(missing) + ' are'} not there", "gateway.networking.k8s.io",
                cause="it is installed on its own", next_step="install it (https://gateway-api.sigs.k8s.io/guides/) if there are to be routes and gateways",
            )  # fmt: skip
        unserved = [
            f"{kind} {GATEWAY_KINDS[kind]}"
            for kind, one in found.items()
            if one is not None and not any(v["served"] and v["name"] == GATEWAY_KINDS[kind] for v in one["spec"]["versions"])
        ]
        if unserved:
            yield error(
                "gateway api",
                f"{some(unserved)} is not served",
                "gateway.networking.k8s.io",
                next_step="install a version of Gateway API that serves it",
            )
        bundles = {one["metadata"].get("annotations", {}).get(_BUNDLE, "") for one in found.values() if one is not None} - {""}
        for bundle in sorted(bundles):
            if _number(bundle) < OLDEST_GATEWAY_API:
                yield warning(
                    "gateway api", f"{bundle} is older than v{OLDEST_GATEWAY_API[0]}.{OLDEST_GATEWAY_API[1]}", "gateway.networking.k8s.io",
                    cause="fields of newer routes are dropped by the API server", next_step="upgrade Gateway API",
                )  # fmt: skip
        if not missing and not unserved:
            yield ok("gateway api", f"served: {some(bundles) or 'of a version that it does not say'}")

    def _own_namespace(self) -> Iterator[Finding]:
        found = self._get(f"/api/v1/namespaces/{self._namespace}")
        if found is None:
            yield ok("namespace", f"{self._namespace} is not there yet")
            return
        level = found["metadata"].get("labels", {}).get(_ENFORCE, "")
        step = f"kubectl label namespace {self._namespace} --overwrite {_ENFORCE}=privileged"
        if level == "privileged":
            yield ok("namespace", f"{self._namespace} lets agents run ({_ENFORCE}=privileged)")
        elif level:
            yield error(
                "namespace",
                f"{self._namespace} refuses agents",
                cause=f"its label {_ENFORCE} is {level}; they have the node's network",
                next_step=step,
            )
        else:
            yield warning(
                "namespace",
                f"{self._namespace} does not say that agents may run",
                cause=f"it has no label {_ENFORCE}; the cluster's default decides",
                next_step=step,
            )

    def _volume(self, found: Object | None, kind: str, field: str, default: str) -> str:
        """Name of the ConfigMap or Secret that a component waits for."""
        volumes = found["spec"]["template"]["spec"].get("volumes", ()) if found is not None else ()
        return next((str(one[kind][field]) for one in volumes if kind in one), default)

    def _root(self) -> Iterator[Finding]:
        name = self._volume(self._daemons, "configMap", "name", "meshagent-root")
        where = f"configmap {self._namespace}/{name}"
        found = self._get(f"/api/v1/namespaces/{self._namespace}/configmaps/{name}")
        if found is None:
            say = error if self._installed else warning
            yield say(
                "root", "the ConfigMap that says whom agents believe is not there", where, cause="it is made by hand, or by trust-manager",
                next_step=f"kubectl -n {self._namespace} create configmap {name} --from-file ca.crt=tls.crt (the chart's notes say how)",
            )  # fmt: skip
            return
        text = str(found.get("data", {}).get("ca.crt", ""))
        try:
            certificates = x509.load_pem_x509_certificates(text.encode())
        except ValueError as failure:
            yield error(
                "root",
                "its key ca.crt holds no certificate",
                where,
                cause=str(failure),
                next_step="put the controllers' root there, in PEM",
            )
            return
        now = self._now()
        living = [one for one in certificates if one.not_valid_before_utc.timestamp() <= now < one.not_valid_after_utc.timestamp()]
        ends = max((one.not_valid_after_utc for one in living), default=None)
        if ends is None:
            yield error(
                "root",
                "no certificate in it is in force now",
                where,
                cause="it has ended, or this machine's clock is wrong",
                next_step="renew the root, and put the new one there beside the old one first",
            )
        elif ends.timestamp() - now < _SOON_S:
            yield warning(
                "root",
                f"it ends {ends:%Y-%m-%d}",
                where,
                cause="it is renewed by hand, or by cert-manager",
                next_step="put the next one there beside it before controllers sign with it",
            )
        else:
            yield ok("root", f"{counted(len(living), 'certificate')}; the last ends {ends:%Y-%m-%d}", where)

    def _signer(self) -> Iterator[Finding]:
        """Whether the Secret is there: its metadata alone is asked for, its contents stay in the API server."""
        name = self._volume(self._deployment, "secret", "secretName", "meshagent-ca")
        where = f"secret {self._namespace}/{name}"
        try:
            found = self._get(f"/api/v1/namespaces/{self._namespace}/secrets/{name}", metadata=True)
        except Refused as failure:
            if failure.code != 403:
                raise
            yield ok(
                "signer",
                "whether its Secret is there is not known: you may not look, which is as it should be; controllers do not start without",
                where,
            )
            return
        if found is None:
            say = error if self._installed else warning
            yield say(
                "signer", "the Secret that controllers sign with is not there", where, cause="it is made by hand, or by cert-manager",
                next_step=f"kubectl -n {self._namespace} create secret generic {name} --from-file tls.crt --from-file tls.key --from-file ca.crt",
            )  # fmt: skip
        else:
            yield ok("signer", "the Secret that controllers sign with is there", where)

    def _nodes(self) -> Iterator[Finding]:
        if self._daemons is None or self._removing:
            return
        selector = self._daemons["spec"]["template"]["spec"].get("nodeSelector", {})
        pods = self._api.items(f"/api/v1/namespaces/{self._namespace}/pods", AGENTS)
        running = {one["spec"].get("nodeName", ""): _ready(one) for one in pods if "deletionTimestamp" not in one["metadata"]}
        nodes = [one for one in self._api.items("/api/v1/nodes") if selector.items() <= one["metadata"].get("labels", {}).items()]
        names = {one["metadata"]["name"] for one in nodes}
        if without := names - running.keys():
            yield error(
                "nodes", f"{len(without)} of {len(names)} nodes have no agent: {some(without)}", "pods there have no mesh, and no policy",
                cause="a taint that is not tolerated, no room, or an image that cannot be pulled",
                next_step=f"kubectl -n {self._namespace} describe daemonset {AGENT}",
            )  # fmt: skip
        if waiting := {name for name in names & running.keys() if not running[name]}:
            yield error(
                "nodes", f"the agents of {some(waiting)} are not ready", self._namespace, cause="what 'meshagent check' says on the node",
                next_step=f"kubectl meshagent check --node {min(waiting)}",
            )  # fmt: skip
        if not without and not waiting:
            yield ok("nodes", f"each of {len(names)} nodes has an agent that is ready")

    def _rights(self) -> Iterator[Finding]:
        if not self._looked:
            return
        if not self._installed:
            missing = [resource for group, resource in _TO_INSTALL if not self._may("create", group, resource)]
            if missing:
                yield warning(
                    "rights",
                    f"you may not create {some(missing)}",
                    cause="installing the mesh needs that",
                    next_step="install it as a cluster administrator",
                )
            else:
                yield ok("rights", "you may create what installing the mesh needs")
            return
        if not self._may("create", "", "pods", subresource="exec", namespace=self._namespace):
            yield warning(
                "rights", f"you may not run commands in pods of {self._namespace}", cause="create pods/exec is not granted to you",
                next_step="'kubectl meshagent trace', 'status' and 'graph' need it: ask an administrator",
            )  # fmt: skip
        account = f"system:serviceaccount:{self._namespace}:{CONTROLLER}"
        if not self._may("create", "authorization.k8s.io", "subjectaccessreviews"):
            yield ok("rights", "what the controller may do is not known: you may not ask (create subjectaccessreviews)")
            return
        missing = [
            " ".join(part for part in (verb, resource, name, f"of {namespace}" if namespace else "") if part)
            for namespace, rights in (("", RIGHTS), (self._namespace, RIGHTS_HERE))
            for group, resource, verb, name in rights
            if not self._may(verb, group, resource, name=name, namespace=namespace, account=account)
        ]
        if missing:
            yield error(
                "rights", f"the controller may not {some(missing)}", account, cause="a role of it or a binding was changed, or is of another version",
                next_step="apply the chart again: helm upgrade, or kubectl apply -f deploy/kubernetes/meshagent.yaml",
            )  # fmt: skip
        else:
            yield ok("rights", f"the controller's service account has all {len(RIGHTS) + len(RIGHTS_HERE)} that it needs")

    def _may(
        self, verb: str, group: str, resource: str, *, subresource: str = "", name: str = "", namespace: str = "", account: str = ""
    ) -> bool:
        """Ask the API server itself (https://kubernetes.io/docs/reference/access-authn-authz/authorization/)."""
        resource, _, below = resource.partition("/")
        kind = "SubjectAccessReview" if account else "SelfSubjectAccessReview"
        asked = {
            "verb": verb,
            "group": group,
            "resource": resource,
            "subresource": subresource or below,
            "name": name,
            "namespace": namespace,
        }
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": kind,
            "spec": {"resourceAttributes": asked, **({"user": account, "groups": _groups(account)} if account else {})},
        }
        return bool(self._api.post(f"/apis/authorization.k8s.io/v1/{kind.lower()}s", body)["status"]["allowed"])

    def _namespaces(self) -> Iterator[Finding]:
        both = False
        for one in self._api.items("/api/v1/namespaces"):
            labels, annotations = (one["metadata"].get(field, {}) for field in ("labels", "annotations"))
            marks = {**annotations, **labels}
            others = {who: key for key, values, who in _INJECTED if key in marks and (values is None or marks[key] in values)}
            if others and labels.get(_MODE) == "mesh":
                both = True
                name = one["metadata"]["name"]
                verb = "annotate" if min(others.values()) in annotations else "label"
                yield error(
                    "other meshes", f"pods of {name} are in this mesh and in {some(others)}", f"namespace {name}",
                    cause=f"it has {_MODE}: mesh and {some(others.values())}",
                    next_step=f"take one of both away, and make its pods anew: kubectl {verb} namespace {name} {min(others.values())}-",
                )  # fmt: skip
        if not both:
            yield ok("other meshes", "no namespace is in this mesh and in another")

    def _webhooks(self) -> Iterator[Finding]:
        clean = True
        for plural in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
            for one in self._api.items(f"/apis/admissionregistration.k8s.io/v1/{plural}"):
                name = one["metadata"]["name"]
                for hook in one.get("webhooks", ()) if _WEBHOOKS.match(name) else ():
                    service = hook["clientConfig"].get("service")
                    if service and self._get(f"/api/v1/namespaces/{service['namespace']}/services/{service['name']}") is None:
                        clean = False
                        closed = hook.get("failurePolicy") == "Fail"
                        say = error if closed and plural.startswith("mutating") else warning
                        yield say(
                            "webhooks", f"{name} calls a Service that is gone: {service['namespace']}/{service['name']}", f"{plural} {name}",
                            cause="another mesh was removed and left it behind" + ("; what it matches cannot be created" if closed else ""),
                            next_step=f"kubectl delete {plural.removesuffix('s')} {name}",
                        )  # fmt: skip
                        break
        if clean:
            yield ok("webhooks", "no other mesh has left any behind")


def _groups(account: str) -> list[str]:
    """Of a service account (pkg/serviceaccount in kubernetes/apiserver)."""
    return ["system:serviceaccounts", f"system:serviceaccounts:{account.rsplit(':', 1)[0].rpartition(':')[2]}", "system:authenticated"]


def _rollout(kind: str, found: Object) -> Finding:
    """Ready, and no old ones left (kubectl rollout status asks for the same)."""
    status, name = found.get("status", {}), found["metadata"]["name"]
    if kind == "DaemonSet":
        wanted, updated, ready = (status.get(field, 0) for field in ("desiredNumberScheduled", "updatedNumberScheduled", "numberReady"))
    else:
        wanted = found["spec"].get("replicas", 1)
        updated, ready = (status.get(field, 0) for field in ("updatedReplicas", "readyReplicas"))
    where = f"{kind.lower()} {found['metadata']['namespace']}/{name}"
    seen = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
    if ready < wanted or not ready or not seen:
        return error(
            "installed", f"{ready} of {wanted} pods of {name} are ready", where, cause="they start, wait for the Secret or the ConfigMap, or fail",
            next_step=f"kubectl -n {found['metadata']['namespace']} describe {kind.lower()} {name}, and the logs of its pods",
        )  # fmt: skip
    if updated < wanted:
        return warning(
            "installed",
            f"{wanted - updated} of {wanted} pods of {name} are of an older version",
            where,
            cause="a rollout is under way",
            next_step=f"kubectl -n {found['metadata']['namespace']} rollout status {kind.lower()} {name}",
        )
    return ok("installed", f"all {wanted} pods of {name} are ready", where)


def _version_of(found: Object | None) -> str:
    """What the chart says."""
    return "none" if found is None else str(found["metadata"].get("labels", {}).get("app.kubernetes.io/version", "unknown"))


def _removes(found: Object) -> bool:
    """Does a pod, or one that is made of this template, take the mesh off its node (agent.remove of the chart)?"""
    return any("meshagent uninstall" in word for one in found["spec"]["containers"] for word in one.get("args", ()))


def _ready(pod: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod.get("status", {}).get("conditions", ()))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
