"""Kinds, their schemas, and the way from text to validated objects. Called by the source, the admin service and `mesh-controller validate`.

The schemas are the files of controller/schemas: CustomResourceDefinitions for our own kinds (deploy/crds points at them), plain structural
schemas for the standard ones. "Structural" as in Kubernetes: an object with `properties` has no other fields
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema), but where
the API server would prune an unknown field, this refuses it. The rules (CEL) of the CustomResourceDefinitions are for the API server: here
`controller.checks` says the same, and more.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Final

import jsonschema
from jsonschema.exceptions import ValidationError

from controller.checks import check
from controller.documents import BadDocument, Document, Path, parse, path_text
from controller.errors import Problem
from controller.objects import Key, Object

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_PROBLEMS: Final = 20  # per object

# Known elsewhere (Kubernetes, Gateway API, Istio), so that the refusal can say so. Indexes are written [].
_NOT_SUPPORTED: Final[Mapping[str, frozenset[str]]] = {
    "Service": frozenset(
        f"spec.{name}"
        for name in (
            "allocateLoadBalancerNodePorts",
            "externalIPs",
            "externalName",
            "externalTrafficPolicy",
            "healthCheckNodePort",
            "loadBalancerClass",
            "loadBalancerIP",
            "loadBalancerSourceRanges",
            "publishNotReadyAddresses",
            "ports[].nodePort",
            "type=NodePort",
            "type=LoadBalancer",
            "type=ExternalName",
            "internalTrafficPolicy=Local",
            "ports[].protocol=SCTP",
        )
    ),
    **{
        kind: frozenset(
            f"spec.{name}"
            for name in (
                "useDefaultGateways",
                "parentRefs[].kind=ExternalService",
                *(
                    f"rules[].{where}filters[].{field}"
                    for where in ("", "backendRefs[].")
                    for field in ("externalAuth", "type=ExternalAuth")
                ),
            )
        )
        for kind in ("HTTPRoute", "GRPCRoute")
    },
    "TrafficPolicy": frozenset(
        {
            "spec.targetRefs[].namespace",
            "spec.targetRefs[].kind=Gateway",
            "spec.targetRefs[].kind=ExternalService",
            "spec.targetRefs[].kind=HTTPRoute",
            "spec.loadBalancing.type=PeakEWMA",  # of contrib: not in stock Envoy
        }
    ),
    "AuthorizationPolicy": frozenset(
        f"spec.{name}"
        for name in (
            "provider",
            "targetRef",
            "action=CUSTOM",
            "targetRefs[].namespace",
            "targetRefs[].kind=Gateway",
            "targetRefs[].kind=GatewayClass",
            "targetRefs[].kind=ServiceEntry",
            *(
                f"rules[].from[].source.{field}"
                for field in (
                    "remoteIpBlocks",
                    "notRemoteIpBlocks",
                    "trustDomains",
                    "notTrustDomains",
                )
            ),
        )
    ),
    "ExternalService": frozenset(
        f"spec.{name}"
        for name in (
            "ports[].protocol=UDP",
            "resolution=NONE",
            "resolution=DNS_ROUND_ROBIN",
            "tls.mode=MUTUAL",
            "location",
            "workloadSelector",
        )
    ),
    "Gateway": frozenset(
        f"spec.{name}"
        for name in (
            "addresses",
            "allowedListeners",
            "backendTLS",
            "infrastructure",
            "tls",
            "listeners[].tls.frontendValidation",
            "listeners[].tls.options",
        )
    ),
    "RequestAuthentication": frozenset(
        f"spec.{name}"
        for name in (
            "targetRef",
            "targetRefs[].kind=ExternalService",
            "targetRefs[].namespace",
            "targetRefs[].kind=Gateway",
            "targetRefs[].kind=GatewayClass",
            "targetRefs[].kind=ServiceEntry",
            "jwtRules[].spaceDelimitedClaims",
        )
    ),
}
_KINDS_ELSEWHERE: Final = frozenset(
    {
        "EndpointSlice",
        "Pod",
        "Node",
        "TCPRoute",
        "TLSRoute",
        "List",
    }
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the controller knows about one kind of resource."""

    kind: str
    api_version: str
    plural: str
    short_names: tuple[str, ...]
    namespaced: bool
    name_is_label: bool
    validator: Any

    @property
    def words(self) -> tuple[str, ...]:
        """Every spelling that the command line accepts, in lower case."""
        return (self.kind.lower(), self.plural, *self.short_names)


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one document. `key` is None if it cannot even be said which object was meant; `object` is None if it is refused."""

    key: Key | None
    object: Object | None
    problems: tuple[Problem, ...]


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """Every kind by its name."""
    folder = FilePath(__file__).parent / "schemas"
    metadata = _load(folder / "metadata.yaml")
    found = {}
    for file in sorted(folder.glob("*.yaml")):
        if file.name != "metadata.yaml":
            kind = _kind(_load(file), metadata)
            found[kind.kind] = kind
    return found


def _load(file: FilePath) -> dict[str, Any]:
    return parse(file.read_bytes(), str(file))[0].value


def _kind(content: dict[str, Any], metadata: dict[str, Any]) -> Kind:
    if content.get("kind") == "CustomResourceDefinition":
        spec = content["spec"]
        version = spec["versions"][0]
        schema = dict(version["schema"]["openAPIV3Schema"])
        names, scope, label = spec["names"], spec["scope"], False
        api_version = f"{spec['group']}/{version['name']}"
    else:
        schema = content
        names = schema["x-kind"]
        api_version, scope, label = names["apiVersion"], names["scope"], names["name"] == "label"
    anything = {"type": "object", "nullable": True, "x-kubernetes-preserve-unknown-fields": True}
    schema["properties"] = {
        **schema["properties"],
        "apiVersion": {"const": api_version},
        "kind": {"const": names["kind"]},
        "metadata": metadata,
        "status": anything,
    }
    schema["required"] = ["apiVersion", "kind", "metadata", *schema.get("required", [])]
    return Kind(
        names["kind"],
        api_version,
        names["plural"],
        tuple(names.get("shortNames", ())),
        scope == "Namespaced",
        label,
        _Validator(_strict(schema)),
    )


def _strict(schema: Mapping[str, Any], *, closed: bool = True) -> dict[str, Any]:
    """Turn a structural schema of Kubernetes into JSON Schema 2020-12 that allows no other fields.

    Within allOf, anyOf, oneOf and not (`closed` is false) only values are looked at: which fields there are is said outside.
    """
    out: dict[str, Any] = {}
    for name, content in schema.items():
        if name.startswith("x-") or name in _NOT_VALIDATION:
            continue
        if name == "properties":
            out[name] = {field: _strict(value, closed=closed) for field, value in content.items()}
        elif name in {"items", "additionalProperties", "not"} and isinstance(content, dict):
            out[name] = _strict(content, closed=closed and name != "not")
        elif name in {"allOf", "anyOf", "oneOf"}:
            out[name] = [_strict(part, closed=False) for part in content]
        else:
            out[name] = content
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if schema.get("nullable"):
        out["type"] = [*(out["type"] if isinstance(out["type"], list) else [out["type"]]), "null"]
    if closed and "properties" in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


_NOT_VALIDATION: Final = frozenset({"nullable", "description", "default", "format", "example", "title", "externalDocs"})
"""What JSON Schema does not know, or knows as annotations. Defaults are not filled in: whoever reads a field knows its own."""


def _is_integer(_checker: object, instance: object) -> bool:
    return isinstance(instance, int) and not isinstance(instance, bool)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
)


def suggestion(word: str, choices: Iterable[str]) -> str:
    """'; did you mean "..."?' if one of the choices is near, otherwise nothing."""
    by_folded = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), list(by_folded), n=1, cutoff=0.6)
    return f'; did you mean "{by_folded[near[0]]}"?' if near else ""


def read(text: str | bytes, origin: str) -> list[Checked]:
    """Parse and validate every document of `text`. Raises BadDocument if it is not YAML that can be read, and nothing else."""
    return [validate(document, origin) for document in parse(text, origin)]


def read_or_problems(text: str | bytes, origin: str) -> tuple[list[Checked], Problem | None]:
    """As `read`, with the unreadable text as a second result instead of an exception."""
    try:
        return read(text, origin), None
    except BadDocument as error:
        return [], error.problem


def validate(document: Document, origin: str) -> Checked:
    """Hold one document against its kind's schema and against what a schema cannot say."""
    value = document.value
    name, namespace = _names(value)

    def problem(path: Path, message: str) -> Problem:
        shown = value.get("kind")
        return Problem(
            origin, document.line_of(path), message, shown[:80] if isinstance(shown, str) and shown else "?", name, path_text(path)
        )

    kind_name = value.get("kind")
    kind = kinds().get(kind_name) if isinstance(kind_name, str) else None
    if kind is None:
        return Checked(None, None, (problem(("kind",), _unknown_kind(kind_name)),))
    if value.get("apiVersion") != kind.api_version:
        return Checked(_key(kind, name, namespace), None, (problem(("apiVersion",), f'must be "{kind.api_version}" for kind {kind.kind}'),))
    key = _key(kind, name, namespace)
    errors = sorted(kind.validator.iter_errors(value), key=lambda error: [str(part) for part in error.absolute_path])
    found = [explained for error in errors for explained in _explain(kind.kind, error)] or _name_problems(kind, value)
    if all(map(_is_spelling, errors)) and (errors or not found):
        said = list(check(kind.kind, key.namespace if key else "", value))
        found = said + [(path, message) for path, message in found if path not in dict(said)]
    problems = [problem(path, message) for path, message in found]
    if problems or key is None:
        return Checked(key, None, tuple(problems[:MAX_PROBLEMS]) or (problem(("metadata", "name"), "is required"),))
    data = {field: content for field, content in value.items() if field != "status"}
    kept = {path: line for path, line in document.lines.items() if path[:2] in _KEPT and len(path) <= 4}
    return Checked(key, Object(key, data, origin, document.line, kept), ())


_KEPT: Final = {("spec", "clusterIP"), ("spec", "clusterIPs"), ("spec", "addresses"), ("metadata", "name")}


def _is_spelling(error: ValidationError) -> bool:
    """Is only the spelling of a text wrong? Then the checks can look at the object, and what they say of it is better than a pattern."""
    return error.validator == "not" or (error.validator == "pattern" and _DURATION not in error.validator_value)


def _names(value: Mapping[str, Any]) -> tuple[str, str]:
    metadata = value.get("metadata")
    if not isinstance(metadata, dict):
        return "", ""
    name, namespace = metadata.get("name"), metadata.get("namespace", "default")
    return (name[:253] if isinstance(name, str) else ""), (namespace if isinstance(namespace, str) else "")


def _key(kind: Kind, name: str, namespace: str) -> Key | None:
    if not SUBDOMAIN.fullmatch(name) or (kind.namespaced and not LABEL.fullmatch(namespace)):
        return None
    return Key(kind.kind, namespace if kind.namespaced else "", name)


def _unknown_kind(kind: object) -> str:
    if kind is None:
        return "is required"
    if not isinstance(kind, str):
        return "must be a string"
    if kind in _KINDS_ELSEWHERE:
        return f'kind "{kind}" is not supported; supported are {", ".join(kinds())}'
    return f'unknown kind "{kind[:80]}"{suggestion(kind, kinds()) or "; known are " + ", ".join(kinds())}'


def _name_problems(kind: Kind, value: Mapping[str, Any]) -> list[tuple[Path, str]]:
    metadata = value["metadata"]
    if kind.name_is_label and not LABEL.fullmatch(metadata["name"]):
        return [(("metadata", "name"), "must be a DNS-1123 label: lower-case letters, digits and '-', at most 63 characters")]
    if not SUBDOMAIN.fullmatch(metadata["name"]):
        return [(("metadata", "name"), "must be a DNS-1123 subdomain: lower-case letters, digits, '-' and '.'")]
    if not kind.namespaced and "namespace" in metadata:
        return [(("metadata", "namespace"), f"a {kind.kind} has no namespace")]
    return []


def _explain(kind: str, error: ValidationError) -> list[tuple[Path, str]]:  # noqa: C901, PLR0911, PLR0912 - one line per JSON Schema keyword
    """Say one schema violation in words, with the path it is about."""
    path: Path = tuple(error.absolute_path)
    value, wanted, keyword = error.instance, error.validator_value, error.validator
    if kind == "Secret" and path[:1] in {("data",), ("stringData",)}:
        return [(path[:1], "must be names with text, at most 256 KiB each; values of Secrets are not shown")]
    if keyword == "additionalProperties":
        known = list(error.schema["properties"])
        return [((*path, name), _unknown_field(kind, (*path, name), name, known)) for name in value if name not in known]
    if keyword == "required":
        return [((*path, name), "is required") for name in wanted if name not in value and _first_missing(error, name)]
    if keyword == "type":
        if value is None:
            return [(path, "is empty: give a value or remove the field")]
        names = wanted if isinstance(wanted, list) else [wanted]
        return [(path, f"must be {' or '.join(_TYPES[name] for name in names if name != 'null')}, not {_shown(value)}")]
    if keyword in {"enum", "const"}:
        choices = wanted if keyword == "enum" else [wanted]
        if isinstance(value, str) and f"{_pattern(path)}={value}" in _NOT_SUPPORTED.get(kind, ()):
            return [(path, f'"{value}" is not supported; supported: {_listed(choices)}')]
        hint = suggestion(value, choices) if isinstance(value, str) else ""
        return [(path, f"must be {_listed(choices)}, not {_shown(value)}{hint}")]
    if keyword == "minimum":
        return [(path, f"must be at least {wanted}, not {value}")]
    if keyword == "maximum":
        return [(path, f"must be at most {wanted}, not {value}")]
    if keyword in {"minItems", "minProperties", "minLength"}:
        return [(path, "must not be empty")]
    if keyword in _COUNTED:
        return [(path, f"must have at most {wanted} {_COUNTED[keyword]}, not {len(value)}")]
    if keyword == "pattern":
        if _DURATION in wanted:
            return [(path, f'{_shown(value)} is not a duration such as "100ms", "5s" or "1h30m" (Gateway API, GEP-2257: no fractions)')]
        return [(path, f"{_shown(value)} does not match {wanted}")]
    return [(path, error.message[:200])]


_DURATION: Final = "h|m|s|ms"  # in the pattern of each
_COUNTED: Final = {"maxItems": "items", "maxProperties": "entries", "maxLength": "characters"}
_TYPES: Final = {
    "object": "a mapping",
    "array": "a list",
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}


def _first_missing(error: ValidationError, name: str) -> bool:
    """jsonschema reports each missing field as an error of its own that carries the whole list: keep only the one it is about."""
    return str(error.message).startswith(repr(name))


def _unknown_field(kind: str, path: Path, name: str, known: list[str]) -> str:
    if _pattern(path) in _NOT_SUPPORTED.get(kind, ()):
        return "is not supported: remove it"
    return f"unknown field{suggestion(name, known) or '; known are ' + ', '.join(known)}"


def _pattern(path: Path) -> str:
    text = ""
    for part in path:
        text += "[]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _listed(choices: Iterable[object]) -> str:
    return " or ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + '..."'
