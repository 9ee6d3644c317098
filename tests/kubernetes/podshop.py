"""A server, its friend and a stranger as pods of a real kubelet."""

from __future__ import annotations

from typing import Any

from tests.kubernetes.manifest import MARK, objects
from tests.kubernetes.mesh import Cluster, takes
from tests.kubernetes.node import BOX

SPACE = "shop"
WEB = "http://10.96.7.1/"
ACCOUNTS = ("web", "friend", "stranger", "db")
SERVE = "mkdir -p /tmp/www; echo {0} > /tmp/www/index.html; httpd -p [::]:8080 -h /tmp/www"
ASK = f"curl -s -m 5 {WEB} > /dev/termination-log; echo $? >> /dev/termination-log"
"""What a program says at its end, or has said when it is looked for there (spec.containers.terminationMessagePath)."""
KEPT = 8081
"""Where the server says nothing and keeps connections open."""


def open_shop(found: Cluster) -> None:
    """A namespace in the mesh: a server that admits its friend alone, the friend, and a stranger."""
    plane = found.plane
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE, "labels": {"meshagent.io/mode": "mesh"}}})
    plane.apply(*objects("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"))
    takes(lambda: MARK in plane.kubectl("run", "tried", "-n", SPACE, "--image", BOX, "--dry-run=server", "-o", "json", check=False))
    for name in ACCOUNTS:
        plane.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": SPACE}})
    found.run(SPACE, "web", "/bin/sh", "-c", f"{SERVE.format('web')}; exec nc -ll -p {KEPT} -e sleep 10000")
    for name in ("friend", "stranger"):
        found.run(SPACE, name, "/bin/sleep", "10000")
    plane.apply(service("web", "10.96.7.1"), admits("web", "friend"))
    takes(lambda: {f"{SPACE}/{name}" for name in ("web", "friend", "stranger")} <= found.redirected())
    takes(lambda: answers(found, WEB))


def service(name: str, *addresses: str, headless: bool = False) -> dict[str, Any]:
    """Port 80 at its addresses, of one family or both; 8080 of the pods themselves, if it is headless."""
    spec: dict[str, Any] = {"selector": {"app": name}, "ports": [{"name": "web", "port": 8080 if headless else 80, "targetPort": 8080}]}
    if headless:
        spec |= {"clusterIP": "None", "ipFamilyPolicy": "RequireDualStack"}
    else:
        spec |= {"clusterIP": addresses[0], "clusterIPs": [*addresses]}
        spec |= {"ipFamilyPolicy": "RequireDualStack" if len(addresses) > 1 else "SingleStack"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": SPACE}, "spec": spec}


def admits(app: str, account: str, **operation: Any) -> dict[str, Any]:
    """Pods of an app let in one service account, for all or for some requests."""
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": [f"{SPACE}/{account}"]}}]}
    rule |= {"to": [{"operation": operation}]} if operation else {}
    spec = {"selector": {"matchLabels": {"app": app}}, "action": "ALLOW", "rules": [rule]}
    metadata = {"name": app, "namespace": SPACE}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


def seen(found: Cluster, url: str) -> tuple[str, str]:
    """What friend and stranger get."""
    return found.get(SPACE, "friend", url), found.get(SPACE, "stranger", url)


def answers(found: Cluster, url: str) -> bool:
    """To the friend, and not to the stranger?"""
    return seen(found, url) == ("200", "000")


def at(address: str) -> str:
    """A pod's URL."""
    return f"http://[{address}]:8080/" if ":" in address else f"http://{address}:8080/"
