"""AuthorizationPolicies into the workload model, each by itself. Pure: called by `controller.compile`, which says whom they protect."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any, Final

from controller import conditions
from controller.objects import DRY_RUN_ANNOTATION, HTTP_FIELDS, HTTP_SOURCE_FIELDS, Object
from meshapi import discovery_pb2 as pb


def needs_request(rule: Mapping[str, Any], target: int) -> bool:
    """Can only a request answer this rule, at this target port?"""
    when = rule.get("when", [])
    operations = [entry["operation"] for entry in rule.get("to", [])]
    if not all(_is_at(fields, target) for fields in conditions.ports_of(when)):
        return False
    fitting = [operation for operation in operations if _is_at(operation, target) and "TCP" in operation.get("protocols", ["TCP"])]
    if operations and not fitting:
        return False
    everywhere = any(HTTP_SOURCE_FIELDS & set(entry["source"]) for entry in rule.get("from", []))
    return everywhere or any(map(conditions.is_about_requests, when)) or any(HTTP_FIELDS & set(operation) for operation in fitting)


def _is_at(fields: Mapping[str, Any], target: int) -> bool:
    return ("ports" not in fields or target in _ports(fields["ports"])) and target not in _ports(fields.get("notPorts", []))


def _ports(values: Iterable[int | str]) -> list[int]:
    return [int(value) for value in values]


_ACTIONS: Final = {"ALLOW": pb.Policy.ALLOW, "DENY": pb.Policy.DENY, "AUDIT": pb.Policy.AUDIT}


def message(policy: Object) -> pb.Policy:
    """Return a policy as agents get it."""
    return pb.Policy(
        namespace=policy.key.namespace,
        name=policy.key.name,
        action=pb.Policy.AUDIT if policy.annotations.get(DRY_RUN_ANNOTATION) == "true" else _ACTIONS[policy.spec.get("action", "ALLOW")],
        rules=[
            pb.PolicyRule(
                sources=[source_message(entry["source"], policy.key.namespace) for entry in rule.get("from", [])],
                operations=[_operation(entry["operation"]) for entry in rule.get("to", [])],
                also_sources=[
                    source_message(source, policy.key.namespace)
                    for one in rule.get("when", [])
                    if (source := conditions.source_of(one)) is not None
                ],
                also_operations=[found for one in rule.get("when", []) if (found := conditions.operation_of(one)) is not None],
            )
            for rule in policy.spec.get("rules", [])
        ],
    )


def source_message(source: Mapping[str, Any], namespace: str) -> pb.Source:
    """Return a source of an AuthorizationPolicy, or a CallerMatch, of `namespace`."""

    def accounts(field_name: str) -> list[str]:
        # https://istio.io/latest/docs/reference/config/security/authorization-policy/#Source: a bare name is in the policy's namespace
        return [name if "/" in name else f"{namespace}/{name}" for name in source.get(field_name, [])]

    return pb.Source(
        principals=source.get("principals", []),
        not_principals=source.get("notPrincipals", []),
        namespaces=source.get("namespaces", []),
        not_namespaces=source.get("notNamespaces", []),
        service_accounts=accounts("serviceAccounts"),
        not_service_accounts=accounts("notServiceAccounts"),
        ip_blocks=_blocks(source.get("ipBlocks", [])),
        not_ip_blocks=_blocks(source.get("notIpBlocks", [])),
        labels=source.get("matchLabels", {}),
        request_principals=source.get("requestPrincipals", []),
        not_request_principals=source.get("notRequestPrincipals", []),
    )


def _blocks(texts: Iterable[str]) -> list[str]:
    """One spelling for each block: CIDR, no bits behind the prefix."""
    return list(dict.fromkeys(str(ipaddress.ip_network(text, strict=False)) for text in texts))


def _operation(operation: Mapping[str, Any]) -> pb.Operation:
    return pb.Operation(
        ports=_ports(operation.get("ports", [])),
        not_ports=_ports(operation.get("notPorts", [])),
        methods=operation.get("methods", []),
        not_methods=operation.get("notMethods", []),
        paths=operation.get("paths", []),
        not_paths=operation.get("notPaths", []),
        hosts=operation.get("hosts", []),
        not_hosts=operation.get("notHosts", []),
        protocols=operation.get("protocols", []),
    )
