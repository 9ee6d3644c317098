"""The CustomResourceDefinitions are what kube-apiserver accepts, and say the same as the file source.

Structural: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema.
Rules (CEL) are not evaluated here; each has an example in tests/kubernetes/resources/bad that it refuses, and which the file source must refuse too.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from controller.compile import Compiled, compile_model
from controller.documents import Document, parse
from controller.errors import Problem
from controller.regexes import problem as wrong_regex
from controller.schema import _strict, kinds, read, validate

ROOT = Path(__file__).parents[3]
RESOURCES = ROOT / "tests/kubernetes/resources"
GROUP = "meshagent.io"
VERSION = f"{GROUP}/v1alpha1"
Node = dict[str, Any]

VALUES = {
    "minimum",
    "maximum",
    "pattern",
    "enum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "format",
    "required",
}
JUNCTORS = {"allOf", "anyOf", "oneOf", "not"}
SHAPES = {"type", "properties", "items", "additionalProperties", "description", "default", "nullable"}
EXTENSIONS = {
    "x-kubernetes-int-or-string",
    "x-kubernetes-validations",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-map-type",
}
"""Not x-kubernetes-preserve-unknown-fields: what nobody knows is pruned."""
FORMATS = {"int32", "int64", "float", "double", "date-time", "byte"}
TAKEN = {
    "cm",
    "svc",
    "po",
    "ns",
    "no",
    "ep",
    "sa",
    "pv",
    "pvc",
    "rs",
    "rc",
    "ds",
    "sts",
    "deploy",
    "hpa",
    "ing",
    "cj",
    "crd",
    "csr",
    "pdb",
    "netpol",
    "sc",
}
"""Short names of Kubernetes' own kinds, which kubectl prefers."""


def load(file: Path) -> Node:
    return parse(file.read_bytes(), str(file))[0].value


CRDS = {content["spec"]["names"]["kind"]: content for content in map(load, sorted((ROOT / "controller/schemas").glob(f"{GROUP}_*.yaml")))}


def root(kind: str) -> Node:
    schema: Node = CRDS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def nodes(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every node that has a type of its own: fields, [] for items, .* for values of maps."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}" if path else name)
    if "items" in node:
        yield from nodes(node["items"], path + "[]")
    if "additionalProperties" in node:
        yield from nodes(node["additionalProperties"], path + ".*")


def rules(kind: str) -> Iterator[tuple[str, Node, Node]]:
    for path, node in nodes(root(kind)):
        for rule in node.get("x-kubernetes-validations", ()):
            yield path + rule.get("fieldPath", ""), rule, node


def plain(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


EVERY = pytest.mark.parametrize("kind", sorted(CRDS))


def test_every_kind_of_our_group_has_one() -> None:
    assert sorted(CRDS) == sorted(kind.kind for kind in kinds().values() if kind.api_version == VERSION)


def test_what_is_deployed_is_what_the_file_source_reads() -> None:
    deployed = {file.name: file for file in (ROOT / "deploy/crds").iterdir()}
    del deployed["meshagent.io_controllerstates.yaml"]  # controllers write it, for themselves
    assert set(deployed) == {f"{GROUP}_{content['spec']['names']['plural']}.yaml" for content in CRDS.values()}
    assert all(file.is_symlink() and file.resolve() == ROOT / "controller/schemas" / name for name, file in deployed.items())


@EVERY
def test_a_definition_has_what_the_api_server_asks_for(kind: str) -> None:
    content = CRDS[kind]
    spec = content["spec"]
    names = spec["names"]
    assert (content["apiVersion"], content["kind"]) == ("apiextensions.k8s.io/v1", "CustomResourceDefinition")
    assert content["metadata"]["name"] == f"{names['plural']}.{spec['group']}"
    assert (spec["group"], spec["scope"], "conversion" in spec, "preserveUnknownFields" in spec) == (GROUP, "Namespaced", False, False)
    assert set(names) == {"kind", "listKind", "plural", "singular", "shortNames", "categories"}
    assert (names["listKind"], names["singular"], names["categories"]) == (f"{kind}List", kind.lower(), ["meshagent"])
    (version,) = spec["versions"]
    assert (version["served"], version["storage"], version["subresources"]) == (True, True, {"status": {}})


def test_no_short_name_means_something_else() -> None:
    words = Counter(
        word for content in CRDS.values() for word in (*content["spec"]["names"]["shortNames"], content["spec"]["names"]["plural"])
    )
    assert [word for word, count in words.items() if count > 1 or word in TAKEN] == []


@EVERY
def test_every_node_is_structural(kind: str) -> None:
    for path, node in nodes(root(kind)):
        unknown = set(node) - VALUES - JUNCTORS - SHAPES - EXTENSIONS
        assert not unknown, (path, unknown)
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
        else:
            assert node.get("type") in {"object", "array", "string", "integer", "number", "boolean"}, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert isinstance(node.get("additionalProperties", {}), dict), path
        assert isinstance(node.get("items", {}), dict), path
        assert (node.get("type") == "array") == ("items" in node), path
        assert node.get("type") == "object" or not {"properties", "additionalProperties", "required"} & set(node), path
        assert set(node.get("required", ())) <= set(node.get("properties", ())), path
        assert node.get("format", "int64") in FORMATS, path
        for word in JUNCTORS & set(node):
            for part in node[word] if word != "not" else [node[word]]:
                assert set(part) <= VALUES, (path, word)


def test_metadata_is_left_to_the_api_server_and_the_top_has_nothing_else() -> None:
    for kind in CRDS:
        top = root(kind)
        assert top["properties"]["metadata"] == {"type": "object"}
        assert (list(top["properties"]), top["required"]) == (["apiVersion", "kind", "metadata", "spec", "status"], ["spec"])
        assert not {"x-kubernetes-validations", "default"} & set(top)


@EVERY
def test_every_field_is_described(kind: str) -> None:
    silent = [
        f"{path}.{name}"
        for path, node in nodes(root(kind), kind)
        for name, child in node.get("properties", {}).items()
        if path != kind and not child.get("description", "").strip()
    ]
    assert silent == []
    assert root(kind)["description"]


@EVERY
def test_every_pattern_is_one_of_re2(kind: str) -> None:
    for path, node in nodes(root(kind)):
        for pattern in (node.get("pattern", ""), node.get("not", {}).get("pattern", "")):
            re.compile(pattern)
            without_sets = re.sub(r"(?<!\\)\[(?:\\.|[^\]\\])+\]", "x", pattern)  # in which * and + mean themselves
            assert not wrong_regex(without_sets), (path, pattern)


@EVERY
def test_every_default_is_valid_and_said_in_the_description(kind: str) -> None:
    for path, node in nodes(root(kind)):
        if "default" not in node:
            continue
        jsonschema.validate(node["default"], _strict(node))
        assert "default" in node["description"].lower() or "mtls.mode" in node["description"], path


REFUSED_WITH_DEFAULTS = (
    ("spec.limits", {"per": "Service"}),
    ("spec.outlierEjection", {"interval": "10s", "baseEjectionTime": "30s", "maxEjectionPercent": 50}),
    ("spec.healthCheck", {"interval": "10s", "timeout": "1s", "unhealthyThreshold": 3, "healthyThreshold": 2}),
)
"""By rules of their own: "limits nothing", "ejects nothing", "needs one of"."""


@EVERY
def test_no_object_that_must_not_be_empty_is_filled_by_defaults_unless_a_rule_refuses_it_then(kind: str) -> None:
    """Defaults come first, so minProperties alone would let {} pass; and what {} would mean there nobody asked for."""
    for path, node in nodes(root(kind)):
        if node.get("minProperties") and any("default" in child for child in node.get("properties", {}).values()):
            empty = with_defaults({}, node)
            assert (path, empty) in REFUSED_WITH_DEFAULTS, "say which rule refuses it"


@EVERY
def test_every_column_shows_a_field_that_there_is(kind: str) -> None:
    known = {path for path, _ in nodes(root(kind))} | {"metadata.creationTimestamp"}
    columns = CRDS[kind]["spec"]["versions"][0]["additionalPrinterColumns"]
    for column in columns:
        assert set(column) <= {"name", "type", "jsonPath", "priority"}
        assert column["type"] in {"string", "integer", "number", "boolean", "date"}
        path = re.sub(r'\[\?\(@\.type=="\w+"\)\]', "[]", column["jsonPath"].removeprefix(".")).replace("[*]", "[]")
        assert path in known, column
    names = [column["name"] for column in columns]
    assert len(set(names)) == len(names)
    assert {"Accepted", "Age"} <= set(names)


def test_the_status_of_every_kind_is_the_same_and_conditions_merge_by_type() -> None:
    first, *others = (root(kind)["properties"]["status"] for kind in sorted(CRDS))
    assert all(status == first for status in others)
    assert set(first["properties"]) == {"observedGeneration", "conditions"}
    conditions = first["properties"]["conditions"]
    assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])
    assert set(conditions["items"]["required"]) == {"type", "status", "lastTransitionTime", "reason", "message"}
    assert set(conditions["items"]["properties"]) == {*conditions["items"]["required"], "observedGeneration"}


MACRO = re.compile(r"\b([a-z]\w*(?:\.\w+)*)\.(?:all|exists|exists_one|filter|map)\((\w+),")
CHAIN = re.compile(r"(?<![\w.'\"])([a-z]\w*)((?:\.\w+)*)")
LIMITS = {"string": ("maxLength", "enum", "format"), "array": ("maxItems",), "object": ("maxProperties", "properties")}


def reached(rule: str, node: Node) -> Iterator[tuple[str, Node]]:
    """What a rule looks into: every chain of fields from `self`, or from a variable of a macro over one. Only has() asks without looking."""
    text = re.sub(r"has\([^()]*\)", "", re.sub(r"'(?:[^'\\]|\\.)*'", "''", rule))
    bound = {"self": "self", **{variable: f"{chain}.[]" for chain, variable in MACRO.findall(text)}}
    for head, tail in CHAIN.findall(text):
        names = [head, *filter(None, tail.split("."))]
        while names[0] != "self" and names[0] in bound:
            names = [*bound[names[0]].split("."), *names[1:]]
        if names[0] != "self":
            continue
        found, path = node, "self"
        yield path, found
        for name in names[1:]:
            if name == "[]":
                found = found.get("items", {"type": "string", "maxLength": "key"})
            elif name in found.get("properties", {}):
                found = found["properties"][name]
            else:
                break  # a function
            path += f".{name}"
            yield path, found


@EVERY
def test_every_list_map_and_text_that_a_rule_walks_over_is_bounded(kind: str) -> None:
    bounded = dict(nodes(root(kind)))
    for path, rule, node in rules(kind):
        for text in (rule["rule"], rule.get("messageExpression", "")):
            for where, found in reached(text, node):
                assert any(limit in found for limit in LIMITS.get(found["type"], found)), (path, text, where)
        parts = re.split(r"(?=\[\]|\.)", path)
        for end in range(1, len(parts)):
            above = bounded.get("".join(parts[:end]).lstrip("."), {})
            assert above.get("type") != "array" or "maxItems" in above, (path, "".join(parts[:end]))


def test_a_list_without_a_bound_would_be_seen() -> None:
    names: Node = {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}}
    seen = dict(reached("!has(self.a) || self.names.all(x, x.name.matches('a'))", {"type": "object", "properties": {"names": names}}))
    assert seen["self.names"] is names
    assert seen["self.names.[].name"] == {"type": "string"}


@EVERY
def test_every_rule_names_a_field_that_there_is_and_has_a_message_in_one_line(kind: str) -> None:
    known = {path for path, _ in nodes(root(kind))}
    for path, rule, _ in rules(kind):
        assert set(rule) <= {"rule", "message", "messageExpression", "fieldPath", "reason"}
        assert path in known
        assert rule["message"].strip() == rule["message"] != ""
        assert "\n" not in rule["message"] + rule["rule"]
        assert rule.get("reason", "FieldValueInvalid") in {"FieldValueInvalid", "FieldValueRequired"}


class Bad:
    """One file of tests/kubernetes/resources/bad: what it is refused for is in its first lines."""

    def __init__(self, file: Path) -> None:
        self.file, self.text = file, file.read_text()
        said = dict(re.findall(r"^# (refused|says|rule): (.*)$", self.text, re.MULTILINE))
        assert self.text.startswith("# refused: ")
        self.field, self.says = said["refused"], said["says"]
        self.rule = said.get("rule", self.says)
        (self.document,) = parse(self.text, file.name)
        self.kind = self.document.value["kind"]


BAD = [Bad(file) for file in sorted((RESOURCES / "bad").glob("*.yaml"))]
GOOD = sorted((RESOURCES / "good").glob("*.yaml"))


def named(bad: Bad) -> list[tuple[str, str, str]]:
    """The rules that an example is for: of those at its field the one whose message it says."""
    return [
        (bad.kind, path, rule["message"])
        for path, rule, _ in rules(bad.kind)
        if path == plain(bad.field) and bad.rule in {rule["message"], bad.says} and rule["message"] in bad.rule
    ]


def test_every_rule_has_one_example_that_it_refuses_and_every_example_a_rule() -> None:
    expected = [(kind, path, rule["message"]) for kind in CRDS for path, rule, _ in rules(kind)]
    assert len(set(expected)) == len(expected)
    assert {bad.file.name: len(named(bad)) for bad in BAD if len(named(bad)) != 1} == {}
    assert sorted(found for bad in BAD for found in named(bad)) == sorted(expected)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.file.stem)
def test_the_file_source_refuses_each_example_for_one_reason_and_names_its_field(bad: Bad) -> None:
    (problem,) = problems(bad.text)
    assert problem.kind == bad.kind
    assert problem.field == bad.field or problem.field.startswith((bad.field + "[", bad.field + "."))
    assert problem.message == bad.says


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.file.stem)
def test_a_rule_speaks_in_the_words_of_the_file_source(bad: Bad) -> None:
    """The literals of its messageExpression stand in what the file source says, in this order, as far as no condition chooses between them."""
    ((_, path, message),) = named(bad)
    (rule,) = (rule for where, rule, _ in rules(bad.kind) if (where, rule["message"]) == (path, message))
    expression = rule.get("messageExpression")
    if expression is None:
        assert message in bad.says or bad.file.stem in {"authorizationpolicy-requests-over-udp", "trafficpolicy-fault-regular-expression"}
    elif "?" not in expression:
        literals = [
            literal for literal in re.findall(r"'((?:[^'\\]|\\.)*)'", re.sub(r"\.filter\(.*?\)\[\d\]", "", expression)) if literal.strip()
        ]
        position = 0
        for literal in (text.replace("\\'", "'") for text in literals):
            assert literal in bad.says[position:], literal
            position = bad.says.index(literal, position)


def problems(text: str) -> list[Problem]:
    return [problem for checked in read(text, "f") for problem in checked.problems]


def with_defaults(value: Any, node: Node) -> Any:
    """Fill in what the API server does: fields that are missing and have a default, at every depth."""
    if isinstance(value, list) and "items" in node:
        return [with_defaults(item, node["items"]) for item in value]
    if not isinstance(value, dict):
        return value
    missing = {name: child["default"] for name, child in node.get("properties", {}).items() if "default" in child and name not in value}
    inner = node.get("additionalProperties", {})
    return {
        name: with_defaults(content, node.get("properties", {}).get(name, inner))
        for name, content in {**value, **copy.deepcopy(missing)}.items()
    }


def documents() -> list[Document]:
    """Resources of our group that are meant to be valid: examples of every field, the lab's shop, what README.md and docs show."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = [text for page in pages for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)]
    texts += [file.read_text() for file in [*GOOD, *sorted((ROOT / "lab/shop/mesh").glob("*.yaml"))]]
    return [document for text in texts for document in parse(text, "f") if document.value.get("apiVersion") == VERSION]


def test_what_is_shown_as_an_example_is_valid_with_and_without_defaults() -> None:
    found = documents()
    assert {document.value["kind"] for document in found} == set(CRDS)
    for document in found:
        kind = document.value["kind"]
        assert validate(document, "f").problems == (), document.value
        assert validate(Document(with_defaults(document.value, root(kind)), 1, {}), "f").problems == (), document.value


SERVICES = "---\n".join(
    f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n"
    f"spec: {{clusterIP: 10.96.2.{host}, selector: {{app: {name}}}, ports: [{{name: http, port: 80}}]}}\n"
    for host, name in enumerate(("cart", "redis", "search", "other"), 1)
)


def test_defaults_change_nothing_of_what_the_controller_makes_of_an_object() -> None:
    def compiled(*, filled: bool) -> Compiled:
        objects = {item.object.key: item.object for item in read(SERVICES, "f") if item.object}
        for document in documents():
            value = with_defaults(document.value, root(document.value["kind"])) if filled else document.value
            checked = validate(Document(value, 1, {}), "f").object
            assert checked is not None
            objects[checked.key] = checked
        return compile_model(objects, authority=True)

    plainly, filled = compiled(filled=False), compiled(filled=True)
    assert filled.entities == plainly.entities
    assert filled.conditions == plainly.conditions
    assert {f"{kind}/shop/cart" for kind in ("policy", "traffic", "telemetry", "service")} <= set(plainly.entities)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.file.stem)
def test_an_example_is_refused_the_same_when_defaults_are_filled_in(bad: Bad) -> None:
    filled = with_defaults(bad.document.value, root(bad.kind))
    assert [problem.message for problem in validate(Document(filled, 1, {}), "f").problems] == [bad.says]


def used(value: Any, path: str) -> Iterator[str]:
    """The path of every value, with [] for items."""
    yield path
    if isinstance(value, dict):
        for name, content in value.items():
            yield from used(content, f"{path}.{name}")
    elif isinstance(value, list):
        for content in value:
            yield from used(content, path + "[]")


@EVERY
def test_the_good_examples_use_every_field_and_leave_out_every_one_with_a_default(kind: str) -> None:
    spec = root(kind)["properties"]["spec"]
    written, left_out = set(), set()
    for document in documents():
        if document.value["kind"] == kind:
            given = set(used(document.value["spec"], "spec"))
            written |= given
            left_out |= set(used(with_defaults(document.value["spec"], spec), "spec")) - given
    fields = [(path, node) for path, node in nodes(spec, "spec") if ".*" not in path]
    assert [path for path, _ in fields if path not in written] == []
    assert [path for path, node in fields if "default" in node and path not in left_out] == []


def test_a_text_that_fits_no_pattern_is_said_in_the_words_of_the_checks_beside_what_else_is_wrong() -> None:
    text = (
        f"apiVersion: {VERSION}\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\n"
        "spec: {targetRefs: [{kind: Service, name: a}], selector: {matchLabels: {a: b}}, rules: [{from: [{source: {principals: ['a*b']}}]}]}\n"
    )
    assert [(problem.field, problem.message) for problem in problems(text)] == [
        ("spec.selector", "cannot be combined with spec.targetRefs: choose one"),
        ("spec.rules[0].from[0].source.principals[0]", '"a*b": a "*" may stand only at the start or at the end'),
    ]


def test_what_no_check_speaks_of_is_said_as_the_pattern() -> None:
    text = f"apiVersion: {VERSION}\nkind: Workload\nmetadata: {{name: w}}\nspec: {{node: n, addresses: [10.0.0.1], serviceAccount: A}}\n"
    assert [problem.message for problem in problems(text)] == ['"A" does not match ^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$']


def test_what_json_schema_does_not_know_is_left_out_and_alternatives_close_nothing() -> None:
    schema = {
        "type": "object",
        "default": {},
        "properties": {
            "default": {"type": "string", "format": "date-time", "default": "a", "x-kubernetes-validations": [{"rule": "true"}]},
            "port": {"x-kubernetes-int-or-string": True, "nullable": True},
        },
        "anyOf": [{"properties": {"port": {"minimum": 1}}}, {"required": ["default"]}],
        "not": {"properties": {"port": {"enum": [7]}}},
    }
    assert _strict(schema) == {
        "type": "object",
        "properties": {"default": {"type": "string"}, "port": {"type": ["integer", "string", "null"]}},
        "anyOf": [{"properties": {"port": {"minimum": 1}}}, {"required": ["default"]}],
        "not": {"properties": {"port": {"enum": [7]}}},
        "additionalProperties": False,
    }
