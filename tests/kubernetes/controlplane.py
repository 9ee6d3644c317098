"""etcd and kube-apiserver, started for tests, with certificates and users of their own. Nothing of them is left when `running` ends.

Usually the API server is alone, on loopback. A `whole` control plane also has kube-controller-manager and kube-scheduler, which make pods of Deployments and
DaemonSets, service accounts with their tokens and endpoints of Services; pods reach its API server at the machine's address and at the Service `kubernetes`.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from tests.ports import free_ports

START_S = 120.0
_AUDIT = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived", "Panic"], "rules": [{"level": "Metadata"}]}
CRDS = Path(__file__).parents[2] / "deploy" / "crds"


class Failed(Exception):
    """A part of the control plane does not start, or does not do what it was asked; carries the end of its log."""


@dataclass(slots=True)
class ControlPlane:
    """A running one. `stop` and `start` leave etcd's data in place."""

    assets: Path
    directory: Path
    whole: bool = False
    audited: bool = False
    """Does the API server write down who has asked for what? `asked` reads it."""
    port: int = 0
    etcd_port: int = 0
    peer_port: int = 0
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _ca: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None

    @property
    def address(self) -> str:
        """Where the API server listens."""
        return address() if self.whole else "127.0.0.1"

    @property
    def url(self) -> str:
        """Of the API server."""
        return f"https://{self.address}:{self.port}"

    @property
    def minor(self) -> int:
        """Of Kubernetes 1.MINOR; asked of the API server."""
        return int(json.loads(self.kubectl("get", "--raw", "/version"))["minor"])

    def kubeconfig(self, user: str = "admin", *groups: str) -> Path:
        """Write the kubeconfig file of a user; `admin` may do everything."""
        groups = groups or (("system:masters",) if user == "admin" else ())
        name = user.replace(":", "-")
        path = self.directory / f"{name}.kubeconfig"
        if path.exists():
            return path
        certificate, key = self._sign(user, groups)
        (self.directory / f"{name}.crt").write_bytes(certificate)
        (self.directory / f"{name}.key").write_bytes(key)
        cluster = {"server": self.url, "certificate-authority": str(self.directory / "ca.crt")}
        files = {"client-certificate": str(self.directory / f"{name}.crt"), "client-key": str(self.directory / f"{name}.key")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": files}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config))
        return path

    def kubectl(self, *argv: str, stdin: str = "", user: str = "admin", check: bool = True) -> str:
        """Run kubectl; return what it prints, on both streams."""
        command = [str(self.assets / "kubectl"), "--kubeconfig", str(self.kubeconfig(user)), *argv]
        run = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
        if check and run.returncode:
            raise Failed(f"kubectl {' '.join(argv)}: {run.stderr}")
        return run.stdout + run.stderr

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply objects on the server's side."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def allow(self, user: str, *rules: dict[str, list[str]]) -> None:
        """Give a user rights in the whole cluster, by a ClusterRole of that name."""
        group = "rbac.authorization.k8s.io"
        meta = {"apiVersion": f"{group}/v1", "metadata": {"name": user}}
        role, subject = {"apiGroup": group, "kind": "ClusterRole", "name": user}, {"apiGroup": group, "kind": "User", "name": user}
        self.apply(
            {**meta, "kind": "ClusterRole", "rules": list(rules)},
            {**meta, "kind": "ClusterRoleBinding", "roleRef": role, "subjects": [subject]},
        )

    def install_crds(self) -> None:
        """Apply the mesh's CRDs, and wait until the server answers for their objects."""
        self._install(CRDS)

    def install_gateway_api(self) -> None:
        """The same with Gateway API's."""
        self._install(self.assets / "gateway-api")

    def _install(self, folder: Path) -> None:
        self.kubectl("apply", "--server-side", "-f", str(folder))
        self.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(folder))
        names = self.kubectl("get", "-f", str(folder), "-o", "jsonpath={.items[*].metadata.name}").split()
        deadline = time.monotonic() + START_S
        while "Error" in (said := self.kubectl("get", ",".join(names), "-A", check=False)):  # 429: storage is (re)initializing
            if time.monotonic() > deadline:
                raise Failed(f"the API server does not list what is defined in {folder}: {said}")
            time.sleep(0.2)

    def asked(self, user: str) -> list[dict[str, Any]]:
        """What a user has asked for, in order, as audit events (https://kubernetes.io/docs/reference/config-api/apiserver-audit.v1/)."""
        lines = (self.directory / "audit.log").read_text().split("\n")[:-1]  # one that is being written is left out
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [event for event in events if event["user"].get("username") == user]

    def set_status(self, kind: str, namespace: str, name: str, status: dict[str, Any]) -> None:
        """Write the status of an object, as a kubelet does."""
        patch = json.dumps({"status": status})
        self.kubectl("patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)

    def start(self) -> None:
        """Start what does not run, and wait until the API server is ready."""
        self._start_etcd()
        self._start_apiserver()
        if self.whole:
            self._start_controllers()

    def stop(self, name: str = "kube-apiserver", number: signal.Signals = signal.SIGKILL) -> None:
        """End one part."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(number)
            process.wait(30)

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.peer_port}"
        options = {
            "data-dir": str(self.directory / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "unsafe-no-fsync": "true",
            "quota-backend-bytes": str(4 << 30),
        }
        self._run("etcd", options)

    def _start_apiserver(self) -> None:
        keys = self.directory
        options = {
            "etcd-servers": f"http://127.0.0.1:{self.etcd_port}",
            "bind-address": self.address,
            "secure-port": str(self.port),
            "tls-cert-file": str(keys / "server.crt"),
            "tls-private-key-file": str(keys / "server.key"),
            "client-ca-file": str(keys / "ca.crt"),
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": str(keys / "accounts.pub"),
            "service-account-signing-key-file": str(keys / "accounts.key"),
            "api-audiences": "https://kubernetes.default.svc",
            "authorization-mode": "RBAC",
            "service-cluster-ip-range": "10.96.0.0/16,fd96::/112",
            "disable-admission-plugins": "" if self.whole else "ServiceAccount",  # whose accounts a controller-manager makes
            "allow-privileged": "true",
            "endpoint-reconciler-type": "lease" if self.whole else "none",
            # How exec and logs reach a kubelet.
            "kubelet-preferred-address-types": "InternalIP",
            "kubelet-client-certificate": str(keys / "kubelet-client.crt"),
            "kubelet-client-key": str(keys / "kubelet-client.key"),
        }
        if self.audited:
            (keys / "audit.json").write_text(json.dumps(_AUDIT))
            options |= {
                "audit-policy-file": str(keys / "audit.json"),
                "audit-log-path": str(keys / "audit.log"),
                "audit-log-mode": "blocking",
            }
        self._run("kube-apiserver", options)
        deadline = time.monotonic() + START_S
        while "ok" not in self.kubectl("get", "--raw", "/readyz", check=False).split("\n")[:1]:
            self._alive("kube-apiserver")
            if time.monotonic() > deadline:
                raise Failed(f"kube-apiserver is not ready after {START_S:.0f} s: {self._tail('kube-apiserver')}")
            time.sleep(0.2)

    def _start_controllers(self) -> None:
        kubeconfig = str(self.kubeconfig())
        keys = {"service-account-private-key-file": str(self.directory / "accounts.key"), "root-ca-file": str(self.directory / "ca.crt")}
        port, scheduler_port = free_ports(2)
        common = {"kubeconfig": kubeconfig, "leader-elect": "false", "bind-address": "127.0.0.1"}
        self._run("kube-controller-manager", {**common, **keys, "secure-port": str(port)})
        self._run("kube-scheduler", {**common, "secure-port": str(scheduler_port)})

    def _run(self, name: str, options: dict[str, str]) -> None:
        if name in self._processes:
            return
        argv = [str(self.assets / name), *(f"--{option}={value}" for option, value in options.items())]
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={"HOME": str(self.directory), "PATH": os.environ["PATH"]}
            )
        time.sleep(0.1)
        self._alive(name)

    def _alive(self, name: str) -> None:
        if self._processes[name].poll() is not None:
            raise Failed(f"{name} ended with status {self._processes[name].returncode}: {self._tail(name)}")

    def _tail(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")[-2000:]

    def pid(self, name: str) -> int:
        """Of a part that runs."""
        return self._processes[name].pid

    def prepare(self) -> None:
        """Make keys and certificates, and choose ports."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port, self.etcd_port, self.peer_port = free_ports(3)
        self._ca = _authority("test-ca")
        (self.directory / "ca.crt").write_bytes(self._ca[0].public_bytes(serialization.Encoding.PEM))
        self._sign_server()
        certificate, client_key = self._sign("kube-apiserver-kubelet-client", ("system:masters",))
        (self.directory / "kubelet-client.crt").write_bytes(certificate)
        (self.directory / "kubelet-client.key").write_bytes(client_key)
        accounts = rsa.generate_private_key(65537, 2048)
        (self.directory / "accounts.key").write_bytes(_pem(accounts))
        (self.directory / "accounts.pub").write_bytes(
            accounts.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def rotate(self) -> bytes:
        """Have another authority sign from now on, the certificate of the API server too, when it is started again; return its certificate.

        Those before are believed besides: by the API server, and by who reads ca.crt anew.
        """
        self._ca = _authority(f"test-ca-{time.monotonic_ns()}")
        authority = self._ca[0].public_bytes(serialization.Encoding.PEM)
        with (self.directory / "ca.crt").open("ab") as file:
            file.write(authority)
        self._sign_server()
        return authority

    def _sign_server(self) -> None:
        certificate, key = self._sign("kube-apiserver", (), server=True)
        (self.directory / "server.crt").write_bytes(certificate)
        (self.directory / "server.key").write_bytes(key)

    def _sign(self, user: str, groups: tuple[str, ...], *, server: bool = False) -> tuple[bytes, bytes]:
        if self._ca is None:
            raise Failed("prepare comes first")
        authority, signer = self._ca
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, user), *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups)]
        )
        certificate = _certificate(subject, authority.subject, key.public_key(), signer, server=server)
        return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def _authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return _certificate(subject, subject, key.public_key(), key, ca=True), key


def _certificate(
    subject: x509.Name, issuer: x509.Name, public: Any, signer: ec.EllipticCurvePrivateKey, *, ca: bool = False, server: bool = False
) -> x509.Certificate:
    now = dt.datetime.now(dt.timezone.utc)
    builder = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if server:
        addresses = (ipaddress.ip_address(text) for text in sorted({"127.0.0.1", "10.96.0.1", address()}))
        names = [*map(x509.IPAddress, addresses), x509.DNSName("kubernetes.default.svc")]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256())


def address() -> str:
    """The machine's own, from which it reaches others: what a kubelet calls the node's InternalIP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("198.51.100.1", 9))  # RFC 5737; nothing is sent
        found: str = one.getsockname()[0]
    return found


def _pem(key: Any) -> bytes:
    found: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return found


@contextmanager
def running(assets: Path, directory: Path, *, whole: bool = False, audited: bool = False) -> Iterator[ControlPlane]:
    """A control plane that is ready."""
    found = ControlPlane(assets, directory, whole, audited)
    found.prepare()
    try:
        found.start()
        yield found
    finally:
        found.stop("kube-scheduler")
        found.stop("kube-controller-manager")
        found.stop("kube-apiserver")
        found.stop("etcd")
