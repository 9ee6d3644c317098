"""A real node of the control plane: kubelet, and Debian's containerd, runc and CNI plugins, on this machine. Nothing of it is left when `running` ends.

containerd and kubelet have a mount namespace of their own, in which cgroup2 is at /sys/fs/cgroup: so it works where the machine itself has the hybrid layout.
There the controllers of limits belong to cgroup v1, which runc does not use beside cgroup2: containers have their limit of memory in `LIMITS`, and no others
(`_RUNC`). Where the right to make a process less likely to be ended for want of memory is missing (CAP_SYS_RESOURCE), containerd is told not to try. All else
is as on any node.

Of a whole control plane (`ControlPlane.whole`) a node also has kube-proxy, in nftables mode, and names of Services, answered by dnsmasq at an address of
NodeLocal DNSCache's kind. Its /run/meshagent is a shared tmpfs, as all of /run is where systemd runs (mount_namespaces(7)).

A node with `systemd` has one of its own, which makes all slices and scopes, as kubelet and runc ask it to. It is a user's manager, since it is not process 1;
for those two it is the system's: it has a cgroup namespace, so that its slices are at the root, and answers at /run/systemd/private. There systemd's clients
ask where there is no bus (github.com/coreos/go-systemd, dbus.NewWithContext), and none is at the address that they have.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import ipaddress
import json
import os
import shutil
import signal
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kubernetes.controlplane import ControlPlane, Failed, address
from tests.ports import free_ports

PACKAGES = ("containerd", "runc", "containernetworking-plugins", "busybox-static", "curl", "systemd")
PAUSE, BOX = "registry.test/pause:1", "registry.test/box:1"
APPLETS = ("sh", "httpd", "nc", "sleep", "mkdir", "cat", "touch", "ls", "true")
"""Nothing that looks up names: linked statically it ends with SIGSEGV, even for an address."""
START_S = 120.0
_KUBELET = Path("/var/lib/kubelet")
"""Sockets of device plugins are there whatever --root-dir says."""
DNS = "169.254.20.10"
RUN = Path("/run/meshagent")
_FORWARDING = tuple(Path("/proc/sys/net") / name for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"))
_CNI_PLUGINS = Path("/usr/lib/cni")
_PAUSE = """
#include <signal.h>
#include <unistd.h>
static void end(int number) { (void)number; _exit(0); }
int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }
"""
LIMITS = Path("/sys/fs/cgroup/memory/mesh-pods")
"""cgroup v1: the memory of each container that has a limit, by its id. What it starts stays there, Envoy too, which leaves the container's cgroup2."""
_ENTER = """
if [ -d /sys/fs/cgroup/memory ]; then mkdir -p "$0" && mount --bind /sys/fs/cgroup/memory "$0"; fi
umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /run/netns; umount -l /run/netns 2>/dev/null; mount -t tmpfs --make-shared none /run/netns
exec "$@"
"""
"""With /run/netns of its own, too: containerd names pods' namespaces there, and leaves the names behind. What starts later enters the same namespace: kubelet
mounts volumes there for containerd."""
_SYSTEMD = """
mkdir -p /run/systemd; mount -t tmpfs none /run/systemd; mkdir /run/systemd/system
exec /lib/systemd/systemd --user --unit=init.scope
"""
"""The directory tells that systemd runs (sd_booted(3))."""
_SCOPE = ("systemd-run", "--user", "--scope", "--quiet", "--slice=system.slice")
"""What comes before a program that is to be in a cgroup of its own below systemd's root, where nothing may be: controllers are switched on there."""
_RUNC = """#!/usr/bin/python3 -S
import json, os, sys
arguments = sys.argv[1:]
own = os.path.join(%r, arguments[-1])
def write(name, text):
    with open(os.path.join(own, name), "w") as file:
        file.write(text)
if "create" in arguments:
    path = os.path.join(arguments[arguments.index("--bundle") + 1], "config.json")
    config = json.load(open(path))
    held = config["linux"].get("resources", {})
    config["linux"]["resources"] = {name: held[name] for name in ("devices",) if name in held}
    json.dump(config, open(path, "w"))
    limit = held.get("memory", {}).get("limit", 0)
    if limit > 0 and os.path.exists(os.path.dirname(os.path.dirname(own))):
        os.makedirs(own, exist_ok=True)
        write("memory.limit_in_bytes", str(limit))
if {"create", "exec"} & set(arguments) and os.path.exists(own):
    write("cgroup.procs", "0")
os.execv(%r, ["runc", *arguments])
"""
"""A container's id comes last (runc-create(8), runc-exec(8))."""
_CONTAINERD = """
version = 2
root = "{0}/containerd"
state = "{0}/containerd-state"
[grpc]
  address = "{0}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{1}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{2}"
    conf_dir = "{0}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{0}/runc"
      SystemdCgroup = {3}
"""


@dataclass(slots=True)
class Node:
    """A running one."""

    plane: ControlPlane
    name: str
    directory: Path
    cgroup2: Path
    """The machine's cgroup2 tree, with kubepods below it; with `systemd` a part of it, which is made and removed."""
    dns: str = DNS
    """Whom pods ask for names."""
    kubelet_cgroup: Path | None = None
    """Where the kubelet runs, as a service manager would have it; None: with everything else here."""
    systemd: bool = False
    """systemd makes the cgroups of pods."""
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _first: bool = False
    """No kubelet was here before."""
    _forwarding: dict[Path, str] = field(default_factory=dict)
    """As it was: CNI plugins switch it on."""

    def start(self) -> None:
        """Start containerd with its images, then kubelet; return when the node is ready."""
        self._prepare()
        self.start_containerd()
        self.start_kubelet()
        if self.plane.whole:
            self._start_network()

    def start_containerd(self) -> None:
        """Start containerd, and give it the images of tests; before it systemd, if there is to be one."""
        if self.systemd:
            self._start_systemd()
        self._run("containerd", ["containerd", "-c", str(self.directory / "containerd.toml")])
        deadline = time.monotonic() + START_S
        while self.ctr("version", check=False).returncode:
            self._alive("containerd", deadline)
        for image in sorted(self.directory.glob("*.tar")):
            self.ctr("images", "import", str(image))

    def _start_systemd(self) -> None:
        self.cgroup2.mkdir()
        self._run("systemd", ["sh", "-ec", _SYSTEMD], self.cgroup2)
        deadline = time.monotonic() + START_S
        while not (self.cgroup2 / "init.scope").exists() or self.systemctl("list-units", check=False).returncode:
            self._alive("systemd", deadline)

    def systemctl(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Ask the node's systemd."""
        command = [*self._enter(), "env", "XDG_RUNTIME_DIR=/run", "systemctl", "--user", *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=check)

    def start_kubelet(self) -> None:
        """Start kubelet, and wait until it says that its node is ready: what one before it has said does not count."""
        self._have_classes_made_anew()
        unknown = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}
        patch = json.dumps({"status": {"conditions": [unknown]}})
        self.plane.kubectl("patch", "node", self.name, "--subresource=status", "--type=strategic", "-p", patch, check=False)
        kubeconfig = self.plane.kubeconfig(f"system:node:{self.name}", "system:nodes", "system:masters")
        argv = [str(self.plane.assets / "kubelet"), "--config", str(self.directory / "kubelet.json"), "--kubeconfig", str(kubeconfig)]
        argv += ["--hostname-override", self.name, "--root-dir", str(self.directory / "kubelet"), "--cert-dir", str(self.directory / "pki")]
        # Else it asks the machine's DNS for its name, 20 s in a network that leads nowhere; one that registers after 23 s is not ready for two minutes more
        # (pkg/kubelet/nodestatus/setters.go, NodeAddress; pkg/volume/csi/csi_plugin.go, initBackoff).
        argv += ["--node-ip", address()]
        self._run("kubelet", argv, self.kubelet_cgroup)
        deadline = time.monotonic() + START_S
        while not self._ready():
            self._alive("kubelet", deadline)

    def restart_kubelet(self) -> None:
        """Kill it and start another one; pods go on."""
        self._end("kubelet", signal.SIGKILL)
        self.start_kubelet()

    def _have_classes_made_anew(self) -> None:
        """Have a kubelet take cgroups that an earlier one left for such as are not there.

        What it finds it gives limits, and without controllers it ends because of that; what it makes it gives them, too, and only logs that it cannot
        (pkg/kubelet/cm, qos_container_manager_linux.go, and Create in cgroup_v2_manager_linux.go). Whether one is there it asks of cgroup.controllers: a socket
        cannot be read.
        """
        for name in ("burstable", "besteffort"):
            asked = f"kubepods.slice/kubepods-{name}.slice" if self.systemd else f"kubepods/{name}"
            if (self.cgroup2 / asked).exists():
                unreadable = self.directory / "unreadable"
                if not unreadable.exists():
                    os.mknod(unreadable, stat.S_IFSOCK)
                subprocess.run(
                    [*self._enter(), "mount", "--bind", str(unreadable), f"/sys/fs/cgroup/{asked}/cgroup.controllers"], check=True
                )

    def reboot(self) -> None:
        """Have the node lose what one loses that is switched off and on: processes, mounts, cgroups, networks of pods. What is on disk stays.

        Returns when containerd is there again; `start_kubelet` goes on.
        """
        self._end("kubelet", signal.SIGKILL)
        (self._top() / "cgroup.kill").write_text("1")
        for name in tuple(self._processes):
            self._end(name, signal.SIGKILL)
        self._end_shims()
        self._remove_cgroups()
        shutil.rmtree(self.directory / "containerd-state")
        self.start_containerd()
        if self.plane.whole:
            self._start_network()

    def next_address(self, *addresses: str) -> None:
        """Have the next pod get these, of each range one, which have to be free.

        host-local begins after what it gave last (plugins/ipam/host-local/backend/allocator).
        """
        store = self.directory / "addresses" / "test"
        deadline = time.monotonic() + START_S
        while any((store / one).exists() for one in addresses):
            if time.monotonic() > deadline:
                raise Failed(f"{', '.join(addresses)} are not given back: {[each.name for each in store.iterdir()]}")
            time.sleep(0.1)
        for number, one in enumerate(addresses):
            (store / f"last_reserved_ip.{number}").write_text(str(ipaddress.ip_address(one) - 1))

    def _start_network(self) -> None:
        """Services by address and by name."""
        (port,) = free_ports(1)
        # By the machine's own name it would wait half a minute for its Node, and translate nothing meanwhile (cmd/kube-proxy/app/server.go).
        self._run("kube-proxy", [*self._proxy(), "--hostname-override", self.name, "--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0s",
            "--conntrack-tcp-timeout-close-wait", "0s", "--metrics-bind-address", f"127.0.0.1:{port}", "--healthz-bind-address", ""])  # fmt: skip
        subprocess.run(["ip", "address", "replace", f"{DNS}/32", "dev", "lo"], check=True)
        (self.directory / "names").mkdir(exist_ok=True)
        self._run("dnsmasq", ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--pid-file=",
            "--user=root", f"--listen-address={DNS}", "--local=/cluster.local/", f"--hostsdir={self.directory}/names"])  # fmt: skip

    def _proxy(self) -> list[str]:
        return [str(self.plane.assets / "kube-proxy"), "--proxy-mode", "nftables", "--kubeconfig", str(self.plane.kubeconfig())]

    def name_services(self) -> None:
        """Answer for the names of those that have an address now, and for those of pods behind a headless one (DNS-Based Service Discovery 1.1.0, 2.4)."""
        services = json.loads(self.plane.kubectl("get", "services", "-A", "-o", "json"))["items"]
        lines = []
        for of, spec in ((one["metadata"], one["spec"]) for one in services):
            name = f"{of['name']}.{of['namespace']}.svc.cluster.local"
            lines += [f"{one} {name}\n" for one in spec.get("clusterIPs", ()) if one != "None"]
        slices = json.loads(self.plane.kubectl("get", "endpointslices", "-A", "-o", "json"))["items"]
        for of, endpoint in ((one["metadata"], endpoint) for one in slices for endpoint in one["endpoints"] or ()):
            if "hostname" in endpoint:
                name = f"{endpoint['hostname']}.{of['labels']['kubernetes.io/service-name']}.{of['namespace']}.svc.cluster.local"
                lines += [f"{one} {name}\n" for one in endpoint["addresses"]]
        (self.directory / "names" / "services").write_text("".join(lines))

    def stop(self) -> None:
        """End everything, pods too."""
        for name in ("dnsmasq", "kube-proxy"):
            self._end(name, signal.SIGTERM)
        self._end("kubelet", signal.SIGKILL)
        if "containerd" in self._processes:
            for task in self.ctr("tasks", "list", "-q", check=False).stdout.split():
                self.ctr("tasks", "delete", "--force", task, check=False)
            for container in self.ctr("containers", "list", "-q", check=False).stdout.split():
                self.ctr("containers", "delete", container, check=False)
        self._end("containerd", signal.SIGTERM)
        self._end_shims()
        self._end("systemd", signal.SIGKILL)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            point = line.split()[4]
            if point.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "-l", point], check=False)
        if self.plane.whole:
            subprocess.run([*self._proxy(), "--cleanup"], check=False, capture_output=True)
            subprocess.run(["ip", "address", "del", f"{DNS}/32", "dev", "lo"], check=False)
            subprocess.run(["umount", "-l", str(RUN)], check=False)
            with contextlib.suppress(OSError):
                RUN.rmdir()
        if self._first:
            shutil.rmtree(_KUBELET, ignore_errors=True)
        for path, value in self._forwarding.items():
            path.write_text(value)
        self._remove_cgroups()

    def _end_shims(self) -> None:
        """Of containers that were being made: they would keep the mount namespace, and so the networks of all pods."""
        own = f"{self.directory}/containerd.sock".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"shim" in words[0] and own in words:
                    os.kill(int(process.name), signal.SIGKILL)

    def ctr(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Ask containerd."""
        command = ["ctr", "-a", str(self.directory / "containerd.sock"), "-n", "k8s.io", *argv]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if check and run.returncode:
            raise Failed(f"ctr {' '.join(argv)}: {run.stderr}")
        return run

    def change(self, called: str, of: str, files: dict[str, bytes]) -> None:
        """Have another image, which is one that is there with these files instead of its own, in a layer on top."""

        def content(digest: str) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(self.ctr("content", "get", digest).stdout)
            return found

        (line,) = [line for line in self.ctr("images", "list", f"name=={of}").stdout.splitlines() if line.startswith(f"{of} ")]
        manifest = content(line.split()[2])
        archive = self.directory / "changed.tar"
        _write(archive, called, content(manifest["config"]["digest"]), manifest["layers"], _layer(files))
        self.ctr("images", "import", str(archive))
        archive.unlink()

    def log(self, name: str) -> str:
        """The end of what kubelet or containerd says."""
        return (self.directory / f"{name}.log").read_text(errors="replace")[-4000:]

    def _ready(self) -> bool:
        said = self.plane.kubectl("get", "node", self.name, "-o", "jsonpath={.status.conditions[?(@.type=='Ready')].status}", check=False)
        return said == "True"

    def _alive(self, name: str, deadline: float) -> None:
        if self._processes[name].poll() is not None or time.monotonic() > deadline:
            said = self.plane.kubectl("get", "node", self.name, "-o", "jsonpath={.status.conditions}", check=False)
            raise Failed(f"{name} does not start: the node's conditions are {said}; {self.log(name)}")
        time.sleep(0.2)

    def _run(self, name: str, argv: Sequence[str], cgroup: Path | None = None) -> None:
        enter = [*self._enter(), *(_SCOPE if self.systemd and name != "systemd" else ())]
        if cgroup is not None:
            enter = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(cgroup), *enter]
        env = {"PATH": f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin", "HOME": str(self.directory)}
        if self.systemd:
            env |= {"XDG_RUNTIME_DIR": "/run", "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={self.directory}/no-bus"}
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen([*enter, *argv], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)

    def _enter(self) -> list[str]:
        """What comes before a command that is to have the node's mounts and, with systemd, its root of cgroups."""
        first = next((process for process in self._processes.values() if process.poll() is None), None)
        if first is None:
            unshare = ["unshare", "--mount", "--propagation", "private", *(["--cgroup"] if self.systemd else [])]
            return [*unshare, "sh", "-c", _ENTER, str(self.directory / LIMITS.parent.name)]
        return ["nsenter", f"--mount=/proc/{first.pid}/ns/mnt", *([f"--cgroup=/proc/{first.pid}/ns/cgroup"] if self.systemd else [])]

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(number)
            process.wait(30)

    def _prepare(self) -> None:
        self._first = not _KUBELET.exists()
        self._forwarding = {path: path.read_text() for path in _FORWARDING}
        missing = [
            name
            for name in ("containerd", "runc", "busybox", "curl", "systemctl")
            if shutil.which(name, path="/usr/bin:/usr/sbin:/bin") is None
        ]
        if missing:
            raise Failed(f"{', '.join(missing)} not found: apt-get install --no-install-recommends {' '.join(PACKAGES)}")
        self._remove_cgroups()
        if self.plane.whole:
            RUN.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "--make-shared", "none", str(RUN)], check=True)
        (self.directory / "cni").mkdir(parents=True)
        runc = self.directory / "runc"
        limits = self.directory / LIMITS.parent.name / LIMITS.name
        runc.write_text(_RUNC % (str(limits), str(shutil.which("runc", path="/usr/sbin:/usr/bin"))))
        runc.chmod(0o755)
        config = _CONTAINERD.format(self.directory, PAUSE, _CNI_PLUGINS, str(self.systemd).lower())
        (self.directory / "containerd.toml").write_text(config)
        ranges = [[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd44::/112"}]]
        ipam = {
            "type": "host-local",
            "dataDir": str(self.directory / "addresses"),
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        }
        (port,) = free_ports(1)
        network = {"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "ptp", "ipam": ipam}]}
        (self.directory / "cni" / "10-test.conflist").write_text(json.dumps(network))
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self.plane.directory / "ca.crt")},
            },
            "authorization": {"mode": "AlwaysAllow"},  # for certificates of the control plane
            "port": port,
            "healthzPort": 0,
            "cgroupDriver": "systemd" if self.systemd else "cgroupfs",
            "cgroupsPerQOS": True,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "containerRuntimeEndpoint": f"unix://{self.directory}/containerd.sock",
            "localStorageCapacityIsolation": False,
            "podLogsDir": str(self.directory / "logs"),
            "resolvConf": "",
            "clusterDNS": [self.dns],
            "clusterDomain": "cluster.local",
            "imageGCHighThresholdPercent": 100,
        }
        (self.directory / "kubelet.json").write_text(json.dumps(kubelet))
        source, pause = self.directory / "pause.c", self.directory / "pause"
        source.write_text(_PAUSE)
        subprocess.run(["cc", "-static", "-O2", "-o", str(pause), str(source)], check=True)
        image(self.directory / "pause.tar", PAUSE, {"/pause": pause}, ["/pause"])
        busybox = Path(str(shutil.which("busybox", path="/bin:/usr/bin")))
        files = {"/bin/busybox": busybox, "/bin/curl": Path(str(shutil.which("curl")))}
        files |= {str(library): library for library in libraries(files["/bin/curl"])}
        image(self.directory / "box.tar", BOX, files, ["/bin/sh"], {f"/bin/{name}": "busybox" for name in APPLETS})

    def _top(self) -> Path:
        """The cgroup that is the node's alone."""
        return self.cgroup2 if self.systemd else self.cgroup2 / "kubepods"

    def _remove_cgroups(self) -> None:
        """kubelet refuses to take over cgroups whose limits it cannot write."""
        tops = (self._top(), LIMITS)
        for _ in range(100):
            for folder in sorted((path for top in tops for path in [top, *top.rglob("*")] if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if not any(top.exists() for top in tops):
                return
            time.sleep(0.05)
        raise Failed(f"{' or '.join(map(str, tops))} cannot be removed: processes of an earlier node are in it")


def image(target: Path, name: str, files: dict[str, Path], entrypoint: Sequence[str], links: dict[str, str] | None = None) -> None:
    """Write an image of these files as an archive."""
    content = {path: source.read_bytes() for path, source in files.items()}
    layer = _layer(content, ("bin", "etc", "tmp", "proc", "sys", "dev", "run"), links or {})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": []},
    }
    _write(target, name, config, [], layer)


def _layer(files: dict[str, bytes], folders: Sequence[str] = (), links: dict[str, str] | None = None) -> bytes:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for folder in folders:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for path, link in (links or {}).items():
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)
        for path, content in files.items():
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return layer.getvalue()


def _write(target: Path, name: str, config: dict[str, Any], below: list[dict[str, Any]], layer: bytes) -> None:
    """An OCI image layout (https://github.com/opencontainers/image-spec/blob/main/image-layout.md) of layers that whoever takes it has, and of this one."""
    config["rootfs"]["diff_ids"].append(_digest(layer))
    configured = json.dumps(config).encode()
    kind = "application/vnd.oci.image"
    layers = [*below, {"mediaType": f"{kind}.layer.v1.tar", "digest": _digest(layer), "size": len(layer)}]
    described = {"mediaType": f"{kind}.config.v1+json", "digest": _digest(configured), "size": len(configured)}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json", "config": described, "layers": layers}).encode()
    named = {
        "mediaType": f"{kind}.manifest.v1+json",
        "digest": _digest(manifest),
        "size": len(manifest),
        "annotations": {"io.containerd.image.name": name},
    }
    index = json.dumps({"schemaVersion": 2, "manifests": [named]}).encode()
    blobs = {f"blobs/{_digest(one).replace(':', '/')}": one for one in (layer, configured, manifest)}
    whole = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": index, **blobs}
    with tarfile.open(target, "w") as archive:
        for path, data in whole.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def libraries(program: Path) -> list[Path]:
    """What a program is linked with (ldd(1)), its loader too."""
    said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return [Path(word) for line in said.splitlines() for word in line.split() if word.startswith("/")]


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def running(
    plane: ControlPlane, directory: Path, cgroup2: Path, name: str = "node-1", dns: str = DNS, *, systemd: bool = False
) -> Iterator[Node]:
    """A node that is ready."""
    found = Node(plane, name, directory, cgroup2, dns, systemd=systemd)
    try:
        found.start()
        yield found
    finally:
        found.stop()
