"""PeerAuthentication: which mode a workload and its ports have, and what is said about each object."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import Mtls, Workload, decode
from controller.compile import Compiled, compile_model
from controller.objects import ROOT_NAMESPACE, Key
from controller.schema import read
from controller.snapshot import Snapshot, encode

NODE = "apiVersion: meshagent.io/v1alpha1\nkind: Workload\nmetadata: {{name: {}, namespace: {}, labels: {{app: {}}}}}\nspec: {{node: n1, {}}}\n---\n"
CART = NODE.format("cart-1", "shop", "cart", "addresses: [10.0.1.2], networkNamespace: cart-1")
WEB = NODE.format("web-1", "shop", "web", "addresses: [10.0.1.3], networkNamespace: web-1")
ROOT = NODE.format("root-1", ROOT_NAMESPACE, "cart", "addresses: [10.0.1.4], networkNamespace: root-1")
OUTSIDE = NODE.format("outside", "shop", "cart", "addresses: [10.0.1.5]")
SERVICE = (
    "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\n"
    "spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}\n---\n"
)
MESH = CART + WEB + ROOT + SERVICE
OF_CART = "selector: {matchLabels: {app: cart}}"


def peers(name: str, spec: str, namespace: str = "shop", created: str = "") -> str:
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return (
        f"apiVersion: meshagent.io/v1alpha1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}{stamp}}}\n"
        f"spec: {{{spec}}}\n---\n"
    )


def compiled(text: str, *, authority: bool = True) -> Compiled:
    checked = read(text, "f")
    assert [problem for item in checked for problem in item.problems] == []
    return compile_model({item.object.key: item.object for item in checked if item.object}, authority=authority)


def workload(model: Compiled, name: str) -> Workload:
    found = decode(model.entities[f"workload/{name}"].SerializeToString())
    assert isinstance(found, Workload)
    return found


def modes(text: str) -> tuple[str, str, str]:
    """Modes of cart-1, of its neighbour web-1 and of root-1 in the root namespace."""
    model = compiled(MESH + text)
    cart, web, root = (workload(model, name).mtls.name for name in ("shop/cart-1", "shop/web-1", f"{ROOT_NAMESPACE}/root-1"))
    return cart, web, root


def conditions(model: Compiled, name: str, namespace: str = "shop") -> list[tuple[str, bool, str, str]]:
    return [(item.type, item.status, item.reason, item.message) for item in model.conditions[Key("PeerAuthentication", namespace, name)]]


def test_without_a_peer_authentication_both_are_accepted() -> None:
    assert modes("") == ("PERMISSIVE", "PERMISSIVE", "PERMISSIVE")


def test_who_is_not_enrolled_has_no_mutual_tls() -> None:
    text = peers("all", "mtls: {mode: STRICT}") + peers("one", f"{OF_CART}, portLevelMtls: {{80: {{mode: PERMISSIVE}}}}")
    for left_out in (OUTSIDE, CART.replace("app: cart", "app: cart, meshagent.io/mode: none").replace("cart-1", "outside")):
        found = workload(compiled(left_out + text), "shop/outside")
        assert (found.enrolled, found.mtls, found.mtls_ports) == (False, Mtls.DISABLE, ())


def test_the_workloads_mode_wins_over_the_namespaces_and_that_over_the_meshs() -> None:
    mesh = peers("mesh", "mtls: {mode: DISABLE}", ROOT_NAMESPACE)
    assert modes(mesh) == ("DISABLE", "DISABLE", "DISABLE")
    namespace = mesh + peers("shop", "mtls: {mode: STRICT}")
    assert modes(namespace) == ("STRICT", "STRICT", "DISABLE")
    assert modes(namespace + peers("cart", f"{OF_CART}, mtls: {{mode: PERMISSIVE}}")) == ("PERMISSIVE", "STRICT", "DISABLE")
    by_service = peers("cart", "targetRefs: [{kind: Service, name: cart}], mtls: {mode: PERMISSIVE}")
    assert modes(namespace + by_service) == ("PERMISSIVE", "STRICT", "DISABLE")


def test_a_selector_in_the_root_namespace_selects_there_and_not_in_the_mesh() -> None:
    assert modes(peers("p", f"{OF_CART}, mtls: {{mode: STRICT}}", ROOT_NAMESPACE)) == ("PERMISSIVE", "PERMISSIVE", "STRICT")


def test_a_selector_without_labels_is_the_whole_namespace() -> None:
    assert modes(peers("p", "selector: {matchLabels: {}}, mtls: {mode: STRICT}")) == ("STRICT", "STRICT", "PERMISSIVE")
    assert modes(peers("p", "selector: {matchLabels: {}}, mtls: {mode: STRICT}", ROOT_NAMESPACE)) == ("STRICT", "STRICT", "STRICT")


def test_what_is_not_set_is_inherited() -> None:
    strict = peers("mesh", "mtls: {mode: STRICT}", ROOT_NAMESPACE)
    for unset in ("mtls: {mode: UNSET}", "mtls: {}", ""):
        assert modes(strict + peers("shop", unset)) == ("STRICT", "STRICT", "STRICT")
        assert modes(peers("shop", unset)) == ("PERMISSIVE", "PERMISSIVE", "PERMISSIVE")
        own = peers("cart", f"{OF_CART}, {unset or 'mtls: {}'}")
        assert modes(own + peers("shop", "mtls: {mode: DISABLE}") + strict) == ("DISABLE", "DISABLE", "STRICT")


def test_ports_are_listed_sorted_where_they_differ_from_the_workload() -> None:
    ports = "portLevelMtls: {9090: {mode: DISABLE}, 443: {mode: STRICT}, 8080: {mode: PERMISSIVE}, 80: {mode: UNSET}, 81: {}}"
    found = workload(compiled(MESH + peers("p", f"{OF_CART}, mtls: {{mode: STRICT}}, {ports}")), "shop/cart-1")
    assert (found.mtls, found.mtls_ports) == (Mtls.STRICT, ((8080, Mtls.PERMISSIVE), (9090, Mtls.DISABLE)))
    inheriting = workload(compiled(MESH + peers("p", f"{OF_CART}, {ports}") + peers("all", "mtls: {mode: DISABLE}")), "shop/cart-1")
    assert (inheriting.mtls, inheriting.mtls_ports) == (Mtls.DISABLE, ((443, Mtls.STRICT), (8080, Mtls.PERMISSIVE)))


def test_of_two_for_the_same_the_older_counts_and_then_the_first_by_name() -> None:
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    for attached in ("", f"{OF_CART}, "):
        one, two = f"{attached}mtls: {{mode: STRICT}}", f"{attached}mtls: {{mode: DISABLE}}"
        assert modes(peers("a", one, created=new) + peers("b", two, created=old))[0] == "DISABLE"
        assert modes(peers("a", one, created=old) + peers("b", two, created=new))[0] == "STRICT"
        assert modes(peers("b", two, created=old) + peers("a", one, created=old))[0] == "STRICT"
        assert modes(peers("b", two) + peers("a", one, created=old))[0] == "DISABLE", "no time of creation: nobody can be older"


RULE = "the oldest counts, by creationTimestamp (without one it is the oldest), then by name"


def test_the_one_that_comes_too_late_says_so_and_has_no_say_even_where_the_other_sets_nothing() -> None:
    late = "portLevelMtls: {80: {mode: STRICT}}, mtls: {mode: STRICT}"
    model = compiled(MESH + peers("a", f"{OF_CART}, mtls: {{mode: UNSET}}") + peers("b", f"{OF_CART}, {late}"))
    found = workload(model, "shop/cart-1")
    assert (found.mtls, found.mtls_ports) == (Mtls.PERMISSIVE, ())
    assert conditions(model, "a") == [("Accepted", True, "Accepted", "in force")]
    assert conditions(model, "b") == [("Accepted", False, "Conflicted", f"PeerAuthentication shop/a decides for shop/cart-1: {RULE}")]


def test_two_for_one_namespace_or_for_the_mesh_say_so_too() -> None:
    for namespace, where in (("shop", "its namespace"), (ROOT_NAMESPACE, "the mesh")):
        model = compiled(MESH + peers("a", "", namespace) + peers("b", "mtls: {mode: STRICT}", namespace))
        message = f"PeerAuthentication {namespace}/a decides for {where}: {RULE}"
        assert conditions(model, "b", namespace) == [("Accepted", False, "Conflicted", message)]
        assert conditions(model, "a", namespace) == [("Accepted", True, "Accepted", "in force")]


def test_one_that_counts_for_some_of_its_workloads_says_for_which_it_does_not() -> None:
    text = NODE.format("cart-2", "shop", "cart, track: new", "addresses: [10.0.1.6], networkNamespace: cart-2")
    text += peers("a", "selector: {matchLabels: {track: new}}, mtls: {mode: DISABLE}") + peers("b", f"{OF_CART}, mtls: {{mode: STRICT}}")
    model = compiled(MESH + text)
    assert (workload(model, "shop/cart-1").mtls, workload(model, "shop/cart-2").mtls) == (Mtls.STRICT, Mtls.DISABLE)
    assert conditions(model, "b") == [
        ("Accepted", True, "Accepted", "in force"),
        ("Uncontested", False, "Conflicted", f"PeerAuthentication shop/a decides for shop/cart-2: {RULE}"),
    ]


def test_one_is_in_force_only_if_it_decides_for_a_workload_in_the_mesh() -> None:
    everybody = MESH + OUTSIDE + peers("b", OF_CART)
    beaten = compiled(everybody + peers("a", OF_CART))
    assert [item[:3] for item in conditions(beaten, "b")] == [("Accepted", False, "Conflicted")], (
        "what it wishes for outsiders is no matter"
    )
    inside = peers("a", "selector: {matchLabels: {track: new}}")
    rest = compiled(everybody.replace("app: cart}", "app: cart, track: new}", 1) + inside)
    assert conditions(rest, "b")[:2] == [
        ("Accepted", True, "Accepted", "valid"),
        ("Uncontested", False, "Conflicted", f"PeerAuthentication shop/a decides for shop/cart-1: {RULE}"),
    ]
    assert conditions(rest, "b")[2][:3] == ("Enforced", False, "PartlyEnrolled")


def test_without_an_authority_nothing_has_an_effect_and_every_one_says_what_to_do() -> None:
    text = peers("all", "mtls: {mode: STRICT}") + peers("one", f"{OF_CART}, portLevelMtls: {{80: {{mode: STRICT}}}}")
    model = compiled(MESH + text + peers("mesh", "mtls: {mode: DISABLE}", ROOT_NAMESPACE), authority=False)
    assert all(
        (workload(model, name).mtls, workload(model, name).mtls_ports) == (Mtls.DISABLE, ()) for name in ("shop/cart-1", "shop/web-1")
    )
    for name, namespace in (("all", "shop"), ("one", "shop"), ("mesh", ROOT_NAMESPACE)):
        accepted, enforced = conditions(model, name, namespace)
        assert accepted == ("Accepted", True, "Accepted", "valid")
        assert enforced[:3] == ("Enforced", False, "NoCertificateAuthority")
        assert "has no effect" in enforced[3]
        assert "--ca-directory" in enforced[3]


def test_one_that_reaches_nobody_or_not_everybody_says_so() -> None:
    text = peers("typo", "selector: {matchLabels: {app: crat}}") + peers("gone", "targetRefs: [{kind: Service, name: none}]")
    text += peers("all", "mtls: {mode: STRICT}") + peers("outside", "selector: {matchLabels: {app: out}}")
    model = compiled(MESH + OUTSIDE.replace("app: cart", "app: out") + text)
    assert conditions(model, "typo")[1:] == [
        ("Enforced", False, "NothingSelected", "selects no workload of its namespace: nothing is protected"),
    ]
    assert [item[:3] for item in conditions(model, "gone")] == [("Accepted", True, "Accepted"), ("ResolvedRefs", False, "TargetNotFound")]
    for name, words, reason in (("all", "in force", "PartlyEnrolled"), ("outside", "valid", "NotEnrolled")):
        accepted, enforced = conditions(model, name)
        assert accepted == ("Accepted", True, "Accepted", words)
        assert enforced[:3] == ("Enforced", False, reason)
    nobody = compiled(peers("mesh", "", ROOT_NAMESPACE))
    assert conditions(nobody, "mesh", ROOT_NAMESPACE)[1][3] == "selects no workload of the mesh: nothing is protected"


def test_a_change_of_mode_changes_the_workloads_that_it_is_about_and_nothing_else() -> None:
    def versions(text: str) -> dict[str, str]:
        return dict(encode(compiled(MESH + text).entities, Snapshot(), 1).versions)

    steps = ["", "mtls: {mode: STRICT}", "mtls: {mode: DISABLE}", "mtls: {mode: DISABLE}, portLevelMtls: {80: {mode: STRICT}}", ""]
    seen = [versions(peers("p", f"{OF_CART}, {step}") if step else "") for step in steps]
    for before, after in itertools.pairwise(seen):
        assert {name for name in before if before[name] != after[name]} == {"workload/shop/cart-1"}
        assert before.keys() == after.keys()
    assert seen[0] == seen[-1]


@dataclass(frozen=True)
class Peers:
    """One PeerAuthentication as the oracle sees it."""

    name: str
    namespace: str
    attached: str  # "wide", "empty", "cart" (by label) or "service"
    created: int  # day of January, 0: not known
    mode: str
    ports: tuple[tuple[int, str], ...]

    @property
    def selecting(self) -> bool:
        return self.attached in {"cart", "service"}

    def json(self) -> dict[str, Any]:
        metadata = {"name": self.name, "namespace": self.namespace}
        if self.created:
            metadata["creationTimestamp"] = f"2026-01-{self.created:02}T00:00:00Z"
        spec: dict[str, Any] = {"mtls": {"mode": self.mode}}
        if self.attached in {"empty", "cart"}:
            spec["selector"] = {"matchLabels": {"app": "cart"} if self.attached == "cart" else {}}
        elif self.attached == "service":
            spec["targetRefs"] = [{"kind": "Service", "name": "cart"}]
        if self.ports and self.selecting:
            spec["portLevelMtls"] = {str(port): {"mode": mode} for port, mode in self.ports}
        return {"apiVersion": "meshagent.io/v1alpha1", "kind": "PeerAuthentication", "metadata": metadata, "spec": spec}


def istio(found: list[Peers], namespace: str, app: str, port: int) -> str:
    """Mode of one port as the reference says it: the oldest of each level, the narrowest level that sets something, the port above all."""

    def oldest(level: list[Peers]) -> Peers | None:
        return min(level, key=lambda item: (item.created, item.name), default=None)

    # The Service is in shop only.
    reaching = [
        p for p in found if p.namespace == namespace and p.selecting and app == "cart" and (p.attached == "cart" or namespace == "shop")
    ]
    own = oldest(reaching)
    levels = [own, oldest([p for p in found if p.namespace == namespace and not p.selecting])]
    levels.append(oldest([p for p in found if p.namespace == ROOT_NAMESPACE and not p.selecting]))
    set_here = [p.mode for p in levels if p is not None and p.mode != "UNSET"]
    of_port = dict(own.ports).get(port, "UNSET") if own else "UNSET"
    return of_port if of_port != "UNSET" else [*set_here, "PERMISSIVE"][0]


WORDS = st.sampled_from(["UNSET", "DISABLE", "PERMISSIVE", "STRICT"])
PEERS = st.builds(
    Peers,
    st.sampled_from("abcd"),
    st.sampled_from(["shop", ROOT_NAMESPACE]),
    st.sampled_from(["wide", "empty", "cart", "service"]),
    st.integers(0, 2),
    WORDS,
    st.dictionaries(st.sampled_from([80, 8080]), WORDS).map(lambda ports: tuple(ports.items())),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PEERS, max_size=6, unique_by=lambda item: (item.namespace, item.name)))
def test_the_mode_of_every_port_is_what_the_reference_says(found: list[Peers]) -> None:
    model = compiled(MESH + "".join(f"{json.dumps(item.json())}\n---\n" for item in found))
    for name, app in (("shop/cart-1", "cart"), ("shop/web-1", "web"), (f"{ROOT_NAMESPACE}/root-1", "cart")):
        decoded = workload(model, name)
        wanted = {port: istio(found, name.partition("/")[0], app, port) for port in (80, 8080, 9)}
        assert {port: decoded.mtls_of(port).name for port in wanted} == wanted
        assert all(mode is not decoded.mtls for _, mode in decoded.mtls_ports)
