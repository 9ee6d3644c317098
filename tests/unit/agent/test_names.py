"""Names: what is answered, what is forwarded where, and when the kernel leads queries to a name server. Processes are in tests/kernel/test_names.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from agent import features
from agent.cli import daemon
from agent.config import NAMES_ROOT, Config
from agent.errors import EnvironmentUnfit, KernelRefused
from agent.external import External
from agent.model import Backing, LocalWorkload, Service, Snapshot, Workload
from agent.names import dnsmasq, records, service
from agent.names.records import Record, hosts_file, nameservers, resolv_conf, servers_file
from agent.names.service import Names, Rows
from tests.tasks import run_beside, until


def workload(name: str, *addresses: str, ready: bool = True, backs: tuple[str, ...] = (), namespace: str = "") -> Workload:
    return Workload(
        name, "sa", "n", {}, addresses, namespace, enrolled=True, ready=ready, backing=tuple(Backing(b, {80: 8080}) for b in backs)
    )


def snapshot(*entities: Service | Workload) -> Snapshot:
    return Snapshot(
        "v",
        {e.name: e for e in entities if isinstance(e, Workload)},
        {e.name: e for e in entities if isinstance(e, Service)},
    )


CART = Service("shop/cart", ("10.96.0.10", "fd96::10"), ())


def test_a_caller_of_the_same_namespace_may_use_four_names_and_others_three() -> None:
    whole = ("cart.shop.svc.cluster.local", "cart.shop.svc", "cart.shop")
    assert records.records(snapshot(CART), "shop", "cluster.local") == (Record((*whole, "cart"), CART.addresses),)
    assert records.records(snapshot(CART), "other", "cluster.local") == (Record(whole, CART.addresses),)


def test_the_cluster_domain_is_the_end_of_the_whole_name_only() -> None:
    (record,) = records.records(snapshot(CART), "shop", "corp.example")
    assert record.names == ("cart.shop.svc.corp.example", "cart.shop.svc", "cart.shop", "cart")


def test_a_headless_service_stands_for_its_ready_endpoints() -> None:
    model = snapshot(
        Service("shop/db", (), ()),
        workload("shop/db-1", "10.0.0.2", "fd00::2", backs=("shop/db",)),
        workload("shop/db-0", "10.0.0.1", backs=("shop/db", "shop/other")),
        workload("shop/db-2", "10.0.0.3", ready=False, backs=("shop/db",)),
    )
    (record,) = records.records(model, "shop", "cluster.local")
    assert record.addresses == ("10.0.0.1", "10.0.0.2", "fd00::2")


def test_a_headless_service_without_endpoints_has_no_address_and_is_not_asked_elsewhere() -> None:
    known = records.records(snapshot(Service("shop/db", (), ())), "shop", "cluster.local")
    assert hosts_file(known) == ""
    assert "server=/db/\n" in servers_file(known, ["10.0.0.53"], "cluster.local")


def test_what_is_no_dns_label_makes_no_line() -> None:
    odd = [Service(f"shop/{name}", ("10.96.0.1",), ()) for name in ("a b", "x\n1.2.3.4 evil", "-a", "", "A", "a/b")]
    assert records.records(snapshot(*odd, CART), "shop", "cluster.local") == records.records(snapshot(CART), "shop", "cluster.local")


def test_localhost_stays_what_it_is() -> None:
    (record,) = records.records(snapshot(Service("shop/localhost", ("10.96.0.1",), ())), "shop", "cluster.local")
    assert record.names == ("localhost.shop.svc.cluster.local", "localhost.shop.svc", "localhost.shop")


def test_the_files_are_the_same_whatever_the_order_of_the_model() -> None:
    services = [Service(f"shop/s{i}", (f"10.96.0.{i}",), ()) for i in range(5)]
    one, other = (records.records(snapshot(*s), "shop", "cluster.local") for s in (services, services[::-1]))
    assert hosts_file(one) == hosts_file(other)
    assert servers_file(one, ["10.0.0.53"], "d") == servers_file(other, ["10.0.0.53"], "d")


def test_a_reverse_lookup_yields_the_whole_name() -> None:
    assert hosts_file(records.records(snapshot(CART), "shop", "cluster.local")) == (
        "10.96.0.10 cart.shop.svc.cluster.local cart.shop.svc cart.shop cart\n"
        "fd96::10 cart.shop.svc.cluster.local cart.shop.svc cart.shop cart\n"
    )


def test_known_names_are_local_and_what_is_below_them_is_not() -> None:
    known = [Record(("cart.shop.svc.cluster.local", "cart.shop.svc", "cart.shop", "cart"), ("10.96.0.10",))]
    assert servers_file(known, ["10.0.0.53", "fd00::53"], "cluster.local").splitlines() == [
        "server=10.0.0.53",
        "server=fd00::53",
        "server=/svc.cluster.local/",
        "server=/cart.shop.svc/",
        "server=/*.cart.shop.svc/#",
        "server=/cart.shop/",
        "server=/*.cart.shop/#",
        "server=/cart/",
        "server=/*.cart/#",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nameserver 10.0.0.53\nnameserver fd00::53\n", ("10.0.0.53", "fd00::53")),
        ("# nameserver 1.1.1.1\n;nameserver 1.1.1.1\n nameserver 1.1.1.1\nnameserver 127.0.0.53 # stub\nsearch a b\n", ("127.0.0.53",)),
        ("nameserver 10.0.0.1\nnameserver 10.0.0.1\n", ("10.0.0.1",)),
        ("", ("127.0.0.1",)),
        ("nameserver\nnameserver x\nnameservers 1.1.1.1\n", ("127.0.0.1",)),
        ("nameserver fe80::1%eth0\nnameserver 10.0.0.1\n", ("10.0.0.1",)),
        ("nameserver fe80::1%eth0\n", ()),
    ],
)
def test_resolvers_are_those_that_libc_would_ask(text: str, expected: tuple[str, ...]) -> None:
    assert nameservers(text) == expected


def test_a_named_namespace_reads_its_own_resolv_conf_if_there_is_one(tmp_path: Path) -> None:
    own = tmp_path / "etc/netns/blue/resolv.conf"
    own.parent.mkdir(parents=True)
    own.touch()
    node = tmp_path / "etc/resolv.conf"
    assert [resolv_conf(n, tmp_path) for n in ("blue", "/run/netns/blue", "/var/run/netns/blue")] == [own] * 3
    assert [resolv_conf(n, tmp_path) for n in ("red", "/run/netns/red", "/proc/7/ns/net", "/other/blue")] == [node] * 4


def test_a_pod_that_names_no_namespace_reads_the_nodes_resolv_conf(tmp_path: Path) -> None:
    (tmp_path / "etc/netns").mkdir(parents=True)
    (tmp_path / "etc/netns/resolv.conf").touch()
    assert resolv_conf("", tmp_path) == tmp_path / "etc/resolv.conf"


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("var/lib/kubelet", id="kubelet"),
        pytest.param("etc/kubernetes/kubelet.conf", id="kubeadm"),
        pytest.param("var/lib/k0s/kubelet", id="k0s"),
        pytest.param("var/snap/microk8s/common/var/lib/kubelet", id="microk8s"),
    ],
)
def test_a_node_of_a_cluster_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not features.kubernetes_node(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    assert features.kubernetes_node(tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert features.kubernetes_node(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "cluster", "expected"),
    [([], False, True), ([], True, False), (["--names"], True, True), (["--no-names"], False, False)],
)
def test_names_are_on_except_on_a_node_of_a_cluster_unless_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], cluster: bool, expected: bool
) -> None:
    made = []

    class NoAgent:
        def __init__(self, config: Config) -> None:
            made.append(config)

        async def run(self) -> None:
            pass

    monkeypatch.setattr("agent.supervisor.Supervisor", NoAgent)
    monkeypatch.setattr(features, "kubernetes_node", lambda: cluster)
    arguments = ["--node", "n", "--cluster-domain", "corp.example", "--run-dir", str(tmp_path), *options]
    done = CliRunner().invoke(daemon.run, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert (made[0].names, made[0].cluster_domain) == (expected, "corp.example")


def test_two_agents_of_a_machine_have_directories_of_their_own() -> None:
    directories = [Config("n", "unix:x", run_dir=Path(d)).names_dir for d in ("/run/meshagent", "/run/meshagent/b")]
    assert directories == [NAMES_ROOT / "run-meshagent", NAMES_ROOT / "run-meshagent-b"]


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_options: None)
    with pytest.raises(EnvironmentUnfit, match="apt-get install dnsmasq-base"):
        dnsmasq.find()


class FakeServer:
    """Stands in for dnsmasq.Server: answers when a test says so."""

    made: ClassVar[dict[int, FakeServer]] = {}
    log: ClassVar[list[str]] = []

    def __init__(self, _config: Config, local: LocalWorkload, changed: Callable[[], None]) -> None:
        self.local = local
        self.cookie, self.workload, self.changed = local.netns_cookie, local.workload.name, changed
        self.answering, self.judged, self.ipv6, self.problem = False, False, True, ""
        FakeServer.made[self.cookie] = self

    def set(self, *, answering: bool, problem: str = "") -> None:
        self.answering, self.judged, self.problem = answering, True, problem
        self.changed()

    async def run(self) -> None:
        await asyncio.Event().wait()

    def reload(self) -> None:
        self.log.append(f"reload {self.cookie}")

    def close(self) -> None:
        self.log.append(f"close {self.cookie}")


class World:
    def __init__(self, tmp_path: Path) -> None:
        self.etc = tmp_path / "etc"
        self.etc.mkdir()
        (self.etc / "resolv.conf").write_text("nameserver 10.0.0.53\nnameserver fd00::53\n")
        self.config = Config("n", "unix:x", run_dir=tmp_path / "run")
        object.__setattr__(self.config, "names_dir", tmp_path / "names")
        self.pushed: list[Rows] = []
        self.names = Names(self.config, self.push, root=tmp_path)

    def push(self, rows: Rows) -> None:
        self.pushed.append(rows)
        FakeServer.log.append("rows")

    def local(self, *cookies: int) -> list[LocalWorkload]:
        return [LocalWorkload(workload(f"shop/w{c}", f"10.0.0.{c}"), c, f"/netns/{c}") for c in cookies]

    async def up(self, *cookies: int) -> None:
        """Workloads with these cookies, each with a name server that a test may have answer."""
        self.names.update(snapshot(CART), self.local(*cookies))
        await until(lambda: FakeServer.made.keys() >= set(cookies))

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        run_beside(self.names.run(), scenario)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    FakeServer.made.clear()
    FakeServer.log.clear()
    monkeypatch.setattr(dnsmasq, "Server", FakeServer)
    monkeypatch.setattr(service, "POLL_S", 0.05)
    monkeypatch.setattr(service, "PAUSE_S", 0.01)
    return World(tmp_path)


def rows(*cookies: int, resolvers: tuple[str, ...] = ("10.0.0.53", "fd00::53")) -> Rows:
    return frozenset((c, r) for c in cookies for r in resolvers)


def test_rows_exist_while_the_name_server_answers(world: World) -> None:
    async def scenario() -> None:
        await world.up(1)
        assert world.pushed == []
        FakeServer.made[1].set(answering=True)
        assert world.pushed == [rows(1)]
        FakeServer.made[1].set(answering=False, problem="dnsmasq ended")
        assert world.pushed == [rows(1), frozenset()]
        assert world.names.problems() == [
            "workload shop/w1 does not resolve the names of services, it asks its own resolvers: dnsmasq ended"
        ]

    world.run(scenario)


def test_rows_of_an_earlier_agent_stay_until_every_name_server_is_known(world: World) -> None:
    async def scenario() -> None:
        await world.up(1, 2)
        FakeServer.made[1].set(answering=True)
        await asyncio.sleep(0.1)
        assert world.pushed == []
        FakeServer.made[2].set(answering=True)
        assert world.pushed == [rows(1, 2)]

    world.run(scenario)


def test_a_new_workload_does_not_wait_for_others_and_others_do_not_wait_for_it(world: World) -> None:
    async def scenario() -> None:
        await world.up(1)
        FakeServer.made[1].set(answering=True)
        await world.up(1, 2)
        FakeServer.made[1].set(answering=False)
        assert world.pushed[-1] == frozenset()

    world.run(scenario)


def test_a_workload_that_goes_loses_its_rows_before_its_name_server(world: World) -> None:
    async def scenario() -> None:
        await world.up(1, 2)
        for server in FakeServer.made.values():
            server.set(answering=True)
        FakeServer.log.clear()
        world.names.update(snapshot(CART), world.local(2))
        await until(lambda: "close 1" in FakeServer.log)
        assert FakeServer.log == ["rows", "close 1"]
        assert world.pushed[-1] == rows(2)

    world.run(scenario)


def test_only_what_changed_is_read_again(world: World) -> None:
    async def scenario() -> None:
        other = LocalWorkload(workload("bank/w9", "10.0.0.9"), 9, "/netns/9")
        world.names.update(snapshot(CART), [*world.local(1), other])
        await until(lambda: len(FakeServer.made) == 2)
        world.names.update(snapshot(CART, workload("shop/x", "10.0.0.7")), [*world.local(1), other])
        await asyncio.sleep(0.1)
        assert FakeServer.log == []
        world.names.update(snapshot(CART, Service("bank/vault", ("10.96.0.11",), ())), [*world.local(1), other])
        await until(lambda: len(FakeServer.log) == 2)
        assert sorted(FakeServer.log) == ["reload 1", "reload 9"]
        assert "vault\n" in dnsmasq.Files(world.config, 9).hosts.read_text()
        assert "vault.bank\n" in dnsmasq.Files(world.config, 1).hosts.read_text()

    world.run(scenario)


def test_a_changed_resolv_conf_is_followed(world: World) -> None:
    async def scenario() -> None:
        await world.up(1)
        FakeServer.made[1].set(answering=True)
        FakeServer.log.clear()
        (world.etc / "resolv.conf").write_text("nameserver 10.0.0.54\n")
        await until(lambda: world.pushed[-1] == rows(1, resolvers=("10.0.0.54",)))
        assert FakeServer.log == ["reload 1", "rows"]

    world.run(scenario)


def test_without_ipv6_in_the_namespace_only_ipv4_resolvers_have_rows(world: World) -> None:
    async def scenario() -> None:
        await world.up(1)
        FakeServer.made[1].ipv6 = False
        FakeServer.made[1].set(answering=True)
        assert world.pushed == [rows(1, resolvers=("10.0.0.53",))]

    world.run(scenario)


def test_what_the_kernel_refuses_is_a_problem_and_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        def refuse(_: Rows) -> None:
            raise KernelRefused("map mesh_resolver is too small")

        monkeypatch.setattr(world.names, "_set_resolvers", refuse)
        await world.up(1)
        FakeServer.made[1].set(answering=True)
        assert world.names.problems() == [
            "queries for the names of services are not led to their name servers: map mesh_resolver is too small"
        ]
        monkeypatch.setattr(world.names, "_set_resolvers", world.push)
        await until(lambda: world.pushed == [rows(1)])
        await until(lambda: world.names.problems() == [])

    world.run(scenario)


def test_a_missing_program_is_one_problem_for_all_workloads(world: World) -> None:
    async def scenario() -> None:
        await world.up(1, 2)
        for server in FakeServer.made.values():
            server.set(answering=False, problem=dnsmasq.NO_SUCH_PROGRAM)
        (problem,) = world.names.problems()
        assert "apt-get install dnsmasq-base" in problem

    world.run(scenario)


def test_resolvers_that_cannot_be_stood_in_for_are_a_problem(world: World) -> None:
    async def scenario() -> None:
        (world.etc / "resolv.conf").write_text("nameserver fe80::1%eth0\n")
        await world.up(1)
        FakeServer.made[1].set(answering=True)
        assert world.pushed == [frozenset()]
        assert ["scope" in problem for problem in world.names.problems()] == [True]

    world.run(scenario)


def test_switched_off_it_removes_every_row_and_starts_nothing(world: World) -> None:
    async def scenario() -> None:
        object.__setattr__(world.config, "names", False)
        world.names.update(snapshot(CART), world.local(1))
        await until(lambda: world.pushed == [frozenset()])
        await asyncio.sleep(0.1)
        assert FakeServer.made == {}
        assert not world.config.names_dir.exists()

    world.run(scenario)


def outside(name: str, *hosts: str, address: str = "240.240.0.9", private: bool = False) -> Service:
    return Service(name, (address,), (), external=External("api", hosts, False, True, (), private=private))


def test_a_host_outside_is_found_by_its_whole_name_in_every_namespace() -> None:
    known = records.records(snapshot(outside("shop/api.example.com", "api.example.com")), "other", "cluster.local")
    assert known == (Record(("api.example.com",), ("240.240.0.9",), outside=True),)
    assert hosts_file(known) == "240.240.0.9 api.example.com\n"
    lines = servers_file(known, ["10.0.0.53"], "cluster.local")
    assert "server=/api.example.com/\nserver=/*.api.example.com/#\n" in lines, "other types are not asked outside, names below it are"


def test_what_is_private_is_found_at_home_alone_and_goes_first_there() -> None:
    mine = outside("shop/api.example.com", "api.example.com", address="240.240.0.1", private=True)
    model = snapshot(mine, outside("a/api.example.com", "api.example.com", address="240.240.0.2"))
    assert [r.addresses for r in records.records(model, "shop", "cluster.local")] == [("240.240.0.1",)]
    assert [r.addresses for r in records.records(model, "other", "cluster.local")] == [("240.240.0.2",)]


def test_a_host_never_takes_the_name_of_a_service_nor_more_than_a_line() -> None:
    model = snapshot(CART, outside("x/evil.example.com", "cart.shop", "a.example.com\n1.2.3.4 cart", "good.example.com"))
    known = records.records(model, "shop", "cluster.local")
    assert [r.names for r in known if r.outside] == [("good.example.com",)]


@pytest.mark.parametrize("on", [True, False], ids=["names", "no-names"])
def test_resolvers_may_be_asked_whoever_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    FakeServer.made.clear()
    monkeypatch.setattr(dnsmasq, "Server", FakeServer)
    monkeypatch.setattr(dnsmasq, "stop", lambda _: 0)
    monkeypatch.setattr(service, "POLL_S", 0.05)
    world = World(tmp_path)
    object.__setattr__(world.config, "names", on)
    allowed: list[Rows] = []
    names = Names(world.config, world.push, root=tmp_path, allow=allowed.append)

    async def scenario() -> None:
        names.update(snapshot(CART), world.local(1))
        await until(lambda: bool(allowed))
        (tmp_path / "etc/resolv.conf").write_text("nameserver 10.0.0.54\n")
        await until(lambda: len(allowed) == 2)

    run_beside(names.run(), scenario)
    assert allowed == [rows(1), rows(1, resolvers=("10.0.0.54",))]
