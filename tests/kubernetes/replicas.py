"""Several `mesh-controller run --kubernetes` beside a real API server, each with a directory of its own that may vanish; and nodes that have joined them."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from agent.config import TlsFiles
from controller.identity.certificates import key_pem, pem
from meshapi import discovery_pb2, discovery_pb2_grpc, identity_pb2_grpc
from meshapi import identity_pb2 as pb
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.manifest import OWN
from tests.ports import free_ports
from tests.unit.controller.identity.authorities import Held, make
from tests.unit.controller.identity.harness import OPTIONS, decoded, new_key, request

PROGRAM = Path(sys.executable).with_name("mesh-controller")
OVERRIDE = [*OPTIONS, ("grpc.ssl_target_name_override", "mesh-controller")]


class Replica:
    """One controller: a process, and where it listens."""

    def __init__(self, plane: ControlPlane, top: Path, name: str, authority: Path, user: str = "admin") -> None:
        self.plane, self.top, self.user = plane, top / name, user
        self.port, self.join_port, self.metrics_port = free_ports(3)
        self._authority = authority
        self.options: tuple[str, ...] = ()
        """Of `mesh-controller run`, more than those below."""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *, again: bool = False) -> None:
        """Start it with nothing that an earlier one had, as with an emptyDir; `again`: with all of that, as after a crash in the same pod."""
        if not again:
            shutil.rmtree(self.top, ignore_errors=True)
        self.top.mkdir(parents=True, exist_ok=True)
        command = [
            PROGRAM, "run", "--kubernetes", "--kubeconfig", self.plane.kubeconfig(self.user), "--socket", self.top / "c.sock",
            "--listen", self.address, "--join-listen", f"127.0.0.1:{self.join_port}", "--ca-directory", self.top / "ca",
            "--ca-cert", self._authority / "middle.pem", "--ca-key", self._authority / "middle.key", "--ca-root", self._authority / "root.pem",
            "--metrics-port", str(self.metrics_port), *self.options,
        ]  # fmt: skip
        argv = [str(word) for word in command]
        with (self.top.parent / f"{self.top.name}.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)

    def ready(self) -> str:
        """What /readyz says; "ready" or why not."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/readyz", timeout=5) as answer:
                answer.read()
                return "ready"
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError:
            return "it does not listen"

    def wait(self, seconds: float = 30.0) -> None:
        """Wait until it is ready."""
        deadline = time.monotonic() + seconds
        while (said := self.ready()) != "ready":
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready: {said}\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def log(self) -> str:
        return (self.top.parent / f"{self.top.name}.log").read_text()

    def kill(self) -> None:
        """End it without a word."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass
class Replicas:
    """All of them, and the operator's commands."""

    plane: ControlPlane
    a: Replica
    b: Replica
    root: Held

    def start(self) -> None:
        for one in (self.a, self.b):
            one.start()
        for one in (self.a, self.b):
            one.wait()

    def kill(self) -> None:
        for one in (self.a, self.b):
            one.kill()

    def command(self, *argv: str) -> tuple[int, str]:
        """Run `mesh-controller` as an operator with a kubeconfig does."""
        more = ["--kubernetes", "--kubeconfig", str(self.plane.kubeconfig())]
        run = subprocess.run([PROGRAM, *argv[:2], *more, *argv[2:]], capture_output=True, text=True, timeout=120, check=False)
        return run.returncode, run.stdout + run.stderr

    def said(self, *argv: str) -> str:
        code, text = self.command(*argv)
        assert code == 0, text
        return text

    def shown(self) -> Any:
        return json.loads(self.said("ca", "show", "-o", "json"))

    async def token(self, *options: str) -> str:
        """What an operator makes anywhere."""
        said = await asyncio.to_thread(self.said, "token", "create", *options)
        return next(line for line in said.splitlines() if line.startswith("mesh1."))

    async def join(self, name: str, at: Replica, token: str = "") -> Joined:
        """Have a node join at one of them; with a token for it, if none is given."""
        token = token or await self.token("--node", name)
        key = new_key()
        credentials = grpc.ssl_channel_credentials(pem([self.root.certificate]))
        async with grpc.aio.secure_channel(f"127.0.0.1:{at.join_port}", credentials, OVERRIDE) as channel:
            stub: Any = identity_pb2_grpc.JoinStub(channel)  # type: ignore[no-untyped-call,unused-ignore]
            answer = await stub.Join(pb.JoinRequest(node=name, csr=request(key), token=token))
        roots = pem(decoded(answer.trust.roots))
        return Joined(name, decoded(answer.chain), key_pem(key), pem(decoded(answer.chain)), roots)


@dataclass
class Joined:
    """A node with its certificate."""

    name: str
    chain: list[x509.Certificate]
    key: bytes
    certificate: bytes
    roots: bytes

    def files(self, directory: Path) -> TlsFiles:
        """What its agent would have of it."""
        found = TlsFiles(*(directory / f"{self.name}.{name}" for name in ("roots", "certificate", "key")))
        for path, content in ((found.ca, self.roots), (found.certificate, self.certificate), (found.key, self.key)):
            path.write_bytes(content)
        return found

    @asynccontextmanager
    async def channel(self, at: Replica) -> AsyncIterator[grpc.aio.Channel]:
        credentials = grpc.ssl_channel_credentials(self.roots, self.key, self.certificate)
        async with grpc.aio.secure_channel(at.address, credentials, OVERRIDE) as channel:
            yield channel

    @asynccontextmanager
    async def identity(self, at: Replica) -> AsyncIterator[Any]:
        async with self.channel(at) as channel:
            yield identity_pb2_grpc.IdentityStub(channel)  # type: ignore[no-untyped-call,unused-ignore]

    @asynccontextmanager
    async def discovery(self, at: Replica) -> AsyncIterator[Any]:
        async with self.channel(at) as channel:
            yield discovery_pb2_grpc.DiscoveryStub(channel)  # type: ignore[no-untyped-call,unused-ignore]

    async def refused(self, at: Replica) -> str:
        """Why its certificate is not believed; "" if it is."""
        async with self.identity(at) as stub:
            try:
                await stub.Trust(pb.TrustRequest()).read()
            except grpc.aio.AioRpcError as error:
                return str(error.details())
        return ""

    async def revoked(self, at: Replica) -> set[int]:
        """Serial numbers that agents are told not to believe, as one that connects now hears."""
        async with self.identity(at) as stub:
            bundle = await stub.Trust(pb.TrustRequest()).read()
            return {int.from_bytes(serial, "big") for serial in bundle.revoked}

    async def sign(self, at: Replica, workload: str) -> pb.Signed:
        async with self.identity(at) as stub:
            asked = pb.WorkloadCsr(workload=workload, csr=request(new_key()))
            (answer,) = (await stub.Sign(pb.SignRequest(workloads=[asked]))).workloads
            assert isinstance(answer, pb.Signed)
            return answer

    async def awaiting(self, at: Replica) -> set[str]:
        """Which workloads agents take to have no tunnels yet."""
        async with self.discovery(at) as stub:
            call = stub.Stream()
            await call.write(discovery_pb2.DiscoveryRequest(node=self.name))
            response = await call.read()
            found = set()
            for resource in response.resources:
                entity = discovery_pb2.Entity.FromString(resource.entity)
                if entity.WhichOneof("kind") == "workload" and entity.workload.awaits_tunnels:
                    found.add(f"{entity.workload.namespace}/{entity.workload.name}")
            return found


def workload(space: str, name: str, node: str, address: str) -> dict[str, Any]:
    spec = {"node": node, "addresses": [address], "networkNamespace": name, "serviceAccount": name}
    return {"apiVersion": "meshagent.io/v1alpha1", "kind": "Workload", "metadata": {"name": name, "namespace": space}, "spec": spec}


@contextmanager
def replicas(plane: ControlPlane, top: Path) -> Iterator[Replicas]:
    """Two that are not started yet; what they have shared is gone afterwards."""
    root = make("root")
    middle = make("middle", root)
    root.write(top, "root")
    middle.write(top, "middle")
    found = Replicas(plane, Replica(plane, top, "a", top), Replica(plane, top, "b", top), root)
    try:
        yield found
    finally:
        found.kill()
        plane.start()
        plane.kubectl("delete", "controllerstates", "--all", "-n", OWN)
