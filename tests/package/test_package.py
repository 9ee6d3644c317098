"""The Debian packages on a Debian 12 with systemd: installed without a network, joined, restarted, upgraded, removed. The tests are steps of one story."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import shop
from tests.package import machine
from tests.package.machine import Machine

TOP = Path(__file__).parents[2]
DIRECTORY = "MESH_PACKAGES"
"""Where packages and roots are made: `make test-package` says it."""
pytestmark = pytest.mark.timeout(600)
CONTROLLER = "unix:///run/mesh-controller/controller.sock"
RESOURCES = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {node: vm-1, addresses: [10.9.0.2], networkNamespace: web, serviceAccount: web}
---
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {name: client, namespace: shop}
spec: {node: vm-1, addresses: [10.9.0.3], networkNamespace: client, serviceAccount: client}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-echo, port: 9000}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
---
apiVersion: meshagent.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: ALLOW
  rules: [{from: [{source: {serviceAccounts: [shop/client]}}]}]
"""
LATER = """
apiVersion: meshagent.io/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: shop}}
spec: {{node: vm-1, addresses: [{address}], networkNamespace: {name}, serviceAccount: {account}}}
"""
NETWORK = """
ip link add br0 type bridge && ip addr add 10.9.0.1/24 dev br0 && ip link set br0 up
sysctl -q net.ipv4.ip_forward=1
"""
PLACE = """
ip netns add {name}
ip link add {name} type veth peer name eth0 netns {name} && ip link set {name} master br0 up
ip -n {name} link set lo up && ip -n {name} link set eth0 up && ip -n {name} addr add {address}/24 dev eth0 && ip -n {name} route add default via 10.9.0.1
"""


def build(target: Path) -> list[Path]:
    """What `make package` does."""
    subprocess.run([TOP / "scripts/package", target], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return sorted(target.glob("*.deb"))


def depends(package: Path) -> list[str]:
    """Names of the packages that it needs, of alternatives the first."""
    text = subprocess.run(["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, check=True).stdout
    return [re.split(r"[ (|]", one.strip())[0] for one in text.split(",")]


class Vm(Machine):
    """The machine with our packages beside it, and what the story does with it."""

    def place(self, name: str, address: str) -> None:
        """A network namespace, as for a service of its own."""
        self.shell(PLACE.format(name=name, address=address))

    def start(self, unit: str, namespace: str, *argv: str) -> None:
        """Start a service in a network namespace."""
        self.said("systemd-run", "-q", f"--unit={unit}", "-p", f"NetworkNamespacePath=/run/netns/{namespace}", *argv)

    def calls(self, namespace: str, url: str) -> str:
        """The status that a caller gets, 000 for none."""
        enter = ("systemd-run", "-q", "--pipe", "--wait", "-p", f"NetworkNamespacePath=/run/netns/{namespace}")
        return self.run(*enter, "curl", "-s", "-o", "/dev/null", "-m", "5", "-w", "%{http_code}", url).stdout

    def apply(self, text: str) -> None:
        """`meshagent apply` by the machine's root."""
        self.said("meshagent", "apply", "--controller", CONTROLLER, "-f", "-", stdin=text)

    def status(self) -> dict[str, Any]:
        """What the agent says of its node; {} if it does not."""
        text = self.run("meshagent", "status", "-o", "json").stdout
        found: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
        return found

    def enrolled(self, name: str) -> bool:
        """Is a workload in the mesh?"""
        return any(one["name"] == name and one["redirected"] for one in self.status().get("workloads", ()))

    def takes(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait until it is so."""
        said = ("sh", "-c", "meshagent status; journalctl -u meshagent -n 20 --no-pager")
        shop.takes(condition, seconds, pause=0.1, said=lambda: self.run(*said).stdout)

    def envoy(self) -> str:
        """Envoy's process id."""
        return self.said("pgrep", "-x", "envoy")

    def held(self) -> int:
        """How often the connections that are held have carried something."""
        assert self.show("hold.service", "ActiveState") == "active", self.said("journalctl", "-u", "hold", "--no-pager")
        return int(self.said("cat", "/run/held"))

    def goes_on(self) -> None:
        """The connections that are held carry something now."""
        before = self.held()
        self.takes(lambda: self.held() > before + 2)

    def left(self) -> list[str]:
        """Files, mounts and cgroups that tell of us or may."""
        files = "find /etc /usr /lib /var /run /tmp /sys/fs/bpf -xdev ! -path '/run/systemd/*' ! -path '/run/log/*' ! -path '/var/log/*'"
        cgroups = "cd /sys/fs/cgroup && find . -maxdepth 1 -type d"
        return self.shell(f"{files} | sort; cut -d' ' -f2,3 /proc/mounts | sort; {cgroups} | sort").splitlines()


@pytest.fixture(scope="module")
def packages() -> list[Path]:
    """Built once."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        pytest.skip(f"no packages: `make test-package` builds them and says so in {DIRECTORY}")
    return build(Path(directory).resolve())


@pytest.fixture(scope="module")
def vm(packages: list[Path]) -> Iterator[Vm]:
    """A machine that has what the packages depend on, and not them."""
    where = packages[0].parent
    top = Path(tempfile.mkdtemp(prefix="vm-", dir=where))
    try:
        machine.build_root(top / "root", [name for package in packages for name in depends(package)], where)
        for package in packages:
            (top / "root" / "root" / package.name).write_bytes(package.read_bytes())
        script = Path(__file__).with_name("traffic.py").read_text()
        (top / "root" / "root" / "traffic.py").write_text(script)
        (top / "root" / "etc" / "hostname").write_text("vm-1\n")
        (top / "root" / "etc" / "resolv.conf").write_text("nameserver 10.9.0.1\n")
        with machine.running(top / "root") as found:
            yield Vm(found.root, found.pid)
    finally:
        machine.discard(top)


before: list[str] = []


def test_the_same_source_makes_the_same_packages(packages: list[Path], tmp_path: Path) -> None:
    again = build(tmp_path)
    assert [(one.name, digest(one)) for one in again] == [(one.name, digest(one)) for one in packages]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_installs_without_a_network_and_starts_nothing_before_it_is_configured(vm: Vm) -> None:
    before[:] = vm.left()
    vm.shell("apt-get install -qq /root/meshagent_*.deb /root/mesh-controller_*.deb")
    for unit in ("meshagent", "mesh-controller"):
        assert vm.said("systemctl", "is-enabled", unit) == "enabled"
        assert (vm.show(unit, "ActiveState"), vm.show(unit, "ConditionResult")) == ("inactive", "no")
    assert vm.said("meshagent", "--version") == "meshagent, version 0.1.0"
    assert vm.said("systemd-analyze", "verify", "meshagent.service", "mesh-controller.service") == ""
    assert vm.said("dpkg", "--verify", "meshagent", "mesh-controller") == ""


def test_the_controller_runs_as_a_user_of_its_own_and_its_keys_are_closed_to_others(vm: Vm) -> None:
    vm.shell("cp /usr/share/doc/mesh-controller/examples/controller.env /etc/mesh-controller/ && systemctl start mesh-controller")
    assert vm.said("ps", "-o", "user:20=", "-p", vm.show("mesh-controller", "MainPID")).startswith("mesh-controller")
    assert vm.said("stat", "-c", "%U %a", "/var/lib/mesh-controller/ca/authority.json") == "mesh-controller 600"
    assert vm.run("runuser", "-u", "nobody", "--", "ls", "/var/lib/mesh-controller").returncode
    assert vm.show("mesh-controller", "StatusText") == "serving"


def test_the_agent_joins_with_a_token_and_enrolls_namespaces(vm: Vm) -> None:
    vm.shell(NETWORK)
    vm.place("web", "10.9.0.2")
    vm.place("client", "10.9.0.3")
    vm.start("web", "web", "python3", "/root/traffic.py", "serve")
    vm.apply(RESOURCES)
    vm.shell(
        "umask 077; runuser -u mesh-controller -- mesh-controller token create --ca-directory /var/lib/mesh-controller/ca --node vm-1 "
        "> /etc/meshagent/join-token"
    )
    example = vm.said("cat", "/usr/share/doc/meshagent/examples/agent.env")
    vm.write("/etc/meshagent/agent.env", example.replace("controller.example.com", "127.0.0.1"))
    vm.said("systemctl", "start", "meshagent")  # returns when it has said READY=1
    vm.takes(lambda: vm.enrolled("web") and vm.enrolled("client"))
    vm.takes(lambda: vm.calls("client", "http://10.96.0.10/") == "200")
    vm.takes(lambda: vm.show("meshagent", "StatusText") == "in force: 2 workloads")
    assert vm.calls("client", "http://web.shop/") == "200"  # by name: dnsmasq runs as nobody
    assert vm.status()["problems"] == []
    assert "verdict allow" in vm.said("meshagent", "trace", "shop/client", "shop/web", "--probe", "-o", "text")  # what the kernel reports


def test_a_restart_leaves_envoy_and_connections_and_new_workloads_work_with_that_envoy(vm: Vm) -> None:
    vm.start("hold", "client", "python3", "/root/traffic.py", "hold", "10.96.0.10", "10.96.0.10", "/run/held")
    vm.takes(lambda: vm.run("test", "-s", "/run/held").returncode == 0)
    envoy = vm.envoy()
    vm.said("systemctl", "restart", "meshagent")
    vm.goes_on()
    assert vm.envoy() == envoy
    # Envoy opens the mounts of namespaces that the second agent makes, in the mount namespace of the first one's unit.
    vm.place("other", "10.9.0.4")
    vm.apply(LATER.format(name="other", address="10.9.0.4", account="client"))
    vm.takes(lambda: vm.calls("other", "http://10.96.0.10/") == "200")
    vm.place("stranger", "10.9.0.5")
    vm.apply(LATER.format(name="stranger", address="10.9.0.5", account="stranger"))
    vm.takes(lambda: vm.enrolled("stranger"))
    vm.takes(lambda: vm.calls("stranger", "http://10.96.0.10/") == "403")


def test_systemd_starts_an_agent_anew_that_was_killed_or_hangs(vm: Vm) -> None:
    envoy = vm.envoy()
    vm.said("systemctl", "kill", "-s", "KILL", "--kill-who=main", "meshagent")
    vm.takes(lambda: vm.show("meshagent", "NRestarts") == "1" and vm.show("meshagent", "ActiveState") == "active")
    vm.goes_on()
    vm.write("/run/systemd/system/meshagent.service.d/soon.conf", "[Service]\nWatchdogSec=5\n")
    vm.shell("systemctl daemon-reload && systemctl restart meshagent")
    vm.said("systemctl", "kill", "-s", "STOP", "--kill-who=main", "meshagent")
    vm.takes(lambda: vm.show("meshagent", "NRestarts") == "1" and vm.show("meshagent", "ActiveState") == "active")
    assert "watchdog" in vm.said("journalctl", "-u", "meshagent", "--no-pager", "-g", "[Ww]atchdog")
    vm.shell("rm -r /run/systemd/system/meshagent.service.d && systemctl daemon-reload")
    vm.goes_on()
    assert vm.envoy() == envoy


def test_an_upgrade_loses_no_connection(vm: Vm) -> None:
    envoy, agent = vm.envoy(), vm.show("meshagent", "MainPID")
    assert "safe: nothing is lost" in vm.said("meshagent", "upgrade-check")
    vm.shell("apt-get install -qq --reinstall /root/meshagent_*.deb")
    assert vm.show("meshagent", "MainPID") != agent
    vm.goes_on()
    assert vm.envoy() == envoy
    vm.takes(lambda: vm.show("meshagent", "StatusText") == "in force: 4 workloads")


def test_a_stopped_agent_leaves_policy_in_force(vm: Vm) -> None:
    vm.said("systemctl", "stop", "meshagent")
    vm.goes_on()
    assert [vm.calls(name, "http://10.96.0.10/") for name in ("client", "stranger")] == ["200", "403"]
    vm.said("systemctl", "start", "meshagent")
    vm.takes(lambda: vm.status()["ready"])


def test_an_envoy_that_is_ended_is_started_at_once(vm: Vm) -> None:
    vm.said("systemctl", "stop", "hold")
    envoy = vm.envoy()
    vm.said("pkill", "-x", "envoy")
    vm.takes(lambda: vm.run("pgrep", "-x", "envoy").stdout.strip() not in {"", envoy})
    vm.takes(lambda: vm.calls("client", "http://10.96.0.10/") == "200")


def test_when_it_is_removed_and_purged_nothing_is_left(vm: Vm) -> None:
    vm.shell("apt-get remove -qq meshagent")
    assert vm.said("ls", "/etc/meshagent") == "agent.env\njoin-token"
    assert vm.calls("client", "http://10.9.0.2:8080/") == "200"  # plainly: nobody redirects
    vm.shell("apt-get purge -qq meshagent mesh-controller")
    vm.shell("systemctl stop web; for name in web client other stranger; do ip netns del $name; done; ip link del br0; rm -f /run/held")
    accepted = re.compile(r"/etc/(passwd|group|g?shadow)-?$|/etc/\.pwd\.lock|/var/(lib/(dpkg|apt)|cache)/|/run/netns")
    new = [line for line in vm.left() if line not in before and not accepted.match(line)]
    assert new == []
    assert vm.run("pgrep", "-x", "envoy|dnsmasq|meshagent").stdout == ""
