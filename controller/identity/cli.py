"""`mesh-controller ca` and `mesh-controller token`: they change what the authority remembers; running controllers follow within a second.

They need no running controller, only the rights to the CA directory, or, where several controllers share their state, to that.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from controller.errors import ControllerError
from controller.identity import about, fields, jwtkeys, keys, ledger, revocations, rotation, trust
from controller.identity.certificates import pem
from controller.identity.directory import AUTHORITY, STATUS, Directory
from controller.identity.fields import BadState
from controller.identity.keys import Keys
from controller.identity.ledger import Issued
from controller.identity.names import node_id, node_of
from controller.identity.options import Span
from controller.identity.times import when
from controller.identity.tokens import DEFAULT_LIFETIME_S, MAX_LIFETIME_S, Record, TokenStore
from controller.objects import ROOT_NAMESPACE
from controller.store import SharedStore

F = TypeVar("F", bound=Callable[..., Any])
AuthorityStore = Directory | SharedStore
_ELSEWHERE: Final = (
    "somebody else signs for this mesh: put the new root beside the old one into --ca-root, replace --ca-cert and --ca-key (or what --ca-command does) when "
    "every agent is connected, and take the old root out when its certificates have run out"
)
Opener = Callable[[Path | None, str, str], AbstractContextManager[SharedStore]]
"""Opens what several controllers remember together: by kubeconfig (None: the pod's own), context and namespace. `controller.main` gives it."""
_FILE: Final = click.Path(path_type=Path)
_OPTIONS: Final = (
    click.option(
        "--ca-directory",
        "directory",
        type=_FILE,
        envvar=["MESH_CONTROLLER_CA_DIRECTORY", "MESH_CONTROLLER_RUN_CA_DIRECTORY"],
        show_envvar=True,
        help="The directory that `mesh-controller run --ca-directory` has.",
    ),
    click.option("--kubernetes", is_flag=True, help="What controllers with --kubernetes and --ca-cert or --ca-command share, instead."),
    click.option("--kubeconfig", type=_FILE, help="For --kubernetes: the file that says where it is and who we are."),
    click.option("--context", metavar="NAME", default="", help="For --kubeconfig: the context; empty = the file's current one."),
    click.option("--namespace", metavar="NAME", default=ROOT_NAMESPACE, help="For --kubernetes: the controllers'."),
)


def _output(*more: str) -> Callable[[F], F]:
    return click.option("-o", "--output", type=click.Choice(["text", "json", *more]), default="text", help="How it is printed.")


def _of_authority(command: F) -> F:
    """Add the options that say whose state it is; open it."""

    @functools.wraps(command)
    def wrapped(directory: Path | None, kubernetes: bool, kubeconfig: Path | None, context: str, namespace: str, **values: Any) -> Any:
        if not kubernetes and (kubeconfig or context):
            raise click.UsageError("--kubeconfig and --context belong to --kubernetes")
        if directory is None and not kubernetes:
            raise click.UsageError("give --ca-directory DIR, or --kubernetes where several controllers share their state")
        if not kubernetes and directory is not None:
            found = Directory(directory)
            found.check()
            return command(store=found, **values)
        opener: Opener = click.get_current_context().obj
        with opener(kubeconfig, context, namespace) as shared:
            return command(store=shared, **values)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


@click.group(short_help="Look at the certificate authority; rotate, revoke, restore.")
def ca() -> None:
    """Look at the certificate authority, replace its root, revoke certificates."""


@ca.command(short_help="Print roots, the state of a rotation and what is revoked.")
@_output("pem")
@_of_authority
def show(store: AuthorityStore, output: str) -> None:
    """Print roots, steps of a rotation and what it waits for, revoked certificates; -o pem: the trusted roots."""
    held, known, now = _keys(store), trust.read(store), time.time()
    if output == "pem":
        own = pem(root.certificate for root in held.roots).decode()
        click.echo(known.roots if known else own, nl=False)
        return
    revoked = revocations.read(store)
    gone = {record.serial for record in revoked}
    live = [record for record in ledger.issued(store) if record.until > now and record.serial not in gone]
    nodes = {node_of(held.trust_domain, record.spiffe_id) for record in live} - {""}
    content = {
        "trustDomain": held.trust_domain,
        "sequence": known.sequence if known else 0,
        "roots": [
            {
                "hash": root.hash,
                "stage": root.stage,
                "since": root.since,
                "validUntil": int(root.certificate.not_valid_after_utc.timestamp()),
                **({"trustedUntil": root.until} if root.stage == "retired" else {}),
            }
            for root in held.roots
        ],
        "next": _next(held),
        "waits": _waits(store) if held.root("next") else [],
        "certificates": len(live),
        "nodes": sorted(nodes),
        "barred": sorted(revocations.known(store)[1]),
        "revoked": [{"serial": item.serial, "spiffeId": item.spiffe_id, "until": item.until, "at": item.at} for item in revoked],
    }
    click.echo(json.dumps(content) if output == "json" else "\n".join(_described(content)))


@ca.command(short_help="Replace the self-made root, a step at a time.")
@click.option("--wait", type=Span(0, 7 * 86_400), default=f"{rotation.WAIT_S // 60}m", help="For agents to hand the new root on.")
@click.option(
    "--now",
    "at_once",
    is_flag=True,
    help="Take the next step whatever it should wait for, and replace the JWT keys: connections and tokens may break.",
)
@click.option("--cancel", is_flag=True, help="Forget the new root, if it does not sign yet.")
@_of_authority
def rotate(store: AuthorityStore, wait: int, at_once: bool, cancel: bool) -> None:
    """Replace the self-made root in steps, without a dropped connection; the running controller takes the later ones by itself.

    1 a new root is made, and trusted beside the old one. 2 when every node knows it, it signs. 3 when everything that the old one signed has run out,
    the old one is forgotten. Called again it says where the rotation stands. With --now JWT keys are replaced too, whoever signs certificates: tokens of
    the old ones are refused at once.
    """
    if at_once and cancel:
        raise click.UsageError("--now and --cancel exclude each other")
    if not isinstance(store, Directory):
        _withdraw_keys(store, at_once)
        return
    with store.locked():
        held = _keys(store)
        changed = _rotated(held, time.time(), wait, at_once, cancel)
        if changed is not held:
            keys.store(store, changed)
    if at_once:
        click.echo("the JWT keys are replaced")
    click.echo(
        "\n".join([*(f"root {root.hash[:16]}  {root.stage}" for root in changed.roots), _next(changed) or "no rotation is under way"])
    )
    if changed is held and changed.root("next"):
        for line in _waits(store):
            click.echo(f"waits: {line}")


@ca.command(short_help="Let nobody believe a certificate any more.")
@click.option("--with-workloads", is_flag=True, help="With a node's identity: also what its workloads were given there.")
@click.option("--unknown", is_flag=True, help="A serial number that is not on record: revoke it for as long as certificates live.")
@click.argument("what", metavar="SERIAL|SPIFFE-ID")
@_of_authority
def revoke(store: AuthorityStore, what: str, with_workloads: bool, unknown: bool) -> None:
    """Let nobody believe a certificate any more, by its serial number (hexadecimal) or all of an identity by its SPIFFE ID.

    A workload gets a new certificate from its node unless it leaves the model. A node must join again: with a new join token, or, with its Kubernetes
    service account, after `ca restore`.
    """
    held, now = _keys(store), time.time()
    live = [record for record in ledger.issued(store) if record.until > now]
    if what.startswith("spiffe://"):
        found = [record for record in live if record.spiffe_id == what]
        if node := node_of(held.trust_domain, what):
            found += [record for record in live if with_workloads and record.node == node and record not in found]
        elif with_workloads:
            raise click.UsageError(f"--with-workloads belongs to spiffe://{held.trust_domain}/meshagent/node/NODE")
    else:
        serial = _serial(what)
        found = [record for record in live if record.serial == serial]
        if not found and unknown:
            found = [Issued(serial, "", "", "", int(now) + held.longest_s)]
    names = {node_of(held.trust_domain, name) for name in (what, *(record.spiffe_id for record in found))} - {""}
    if not found and not names:
        raise ControllerError(
            f"no certificate in force is on record for {what[:200]}: check the spelling (`ca show`); it may have run out"
            + ("" if what.startswith("spiffe://") else ", or give --unknown")
        )
    also = "" if not what.startswith("spiffe://") or not node else "workloads" if with_workloads else "node"
    new = revocations.add(store, found, now, also, names)
    for record in found:
        click.echo(
            f"{record.serial}  {record.spiffe_id or '?'}  {'revoked' if record.serial in {item.serial for item in new} else 'was revoked before'}"
        )
    for name in sorted(names):
        click.echo(f"node {name} cannot join with its service account until `mesh-controller ca restore {name}`")


@ca.command(short_help="Let a revoked node join again.")
@click.argument("node", metavar="NODE")
@_of_authority
def restore(store: AuthorityStore, node: str) -> None:
    """Let a revoked node join again with its Kubernetes service account. Its revoked certificates stay revoked."""
    if not revocations.restore(store, node):
        raise ControllerError(f"node {node[:80]!r} is not revoked: `mesh-controller ca show` names those that are")
    click.echo(f"node {node} can join again")


@click.group()
def token() -> None:
    """Make, list and revoke the tokens with which nodes join."""


@token.command()
@click.option("--node", default="", help="Only this node may use it; otherwise any that has no certificate.")
@click.option("--ttl", type=Span(60, MAX_LIFETIME_S), default=f"{DEFAULT_LIFETIME_S // 3600}h", help="How long it is good for.")
@_of_authority
def create(store: AuthorityStore, node: str, ttl: int) -> None:
    """Print a token that is good for one join. It is shown once and stored hashed."""
    held, known = _keys(store), trust.read(store)
    if node:
        node_id(held.trust_domain, node)
    signing = held.root("signing")
    name = signing.hash if signing else known.signing if known else ""
    if not name:
        raise ControllerError("it is not known yet which root the controller's certificate leads to: start the controller once")
    made, record = TokenStore(store, time.time).create(node, ttl, name)
    click.echo(f"token {record.id} for {f'node {node}' if node else 'any node'}, one join, until {when(record.expires)}", err=True)
    if held.root("next"):
        click.echo("a root rotation is under way and waits until this token is used, revoked or expired", err=True)
    click.echo(str(made))


@token.command("list")
@_output()
@_of_authority
def list_(store: AuthorityStore, output: str) -> None:
    """Print tokens that are or were good; never the tokens themselves."""
    now = time.time()
    records = TokenStore(store, time.time).all()
    if output == "json":
        found = [
            {
                "id": record.id,
                "node": record.node,
                "state": record.state(now),
                "expires": record.expires,
                "used": record.used,
                "usedBy": record.used_by,
            }
            for record in records
        ]
        click.echo(json.dumps(found))
        return
    for record in records:
        click.echo(f"{record.id}  {record.node or '(any node)'}  {_token_state(record, now)}")


@token.command("revoke")
@click.argument("identifier", metavar="ID")
@_of_authority
def revoke_token(store: AuthorityStore, identifier: str) -> None:
    """Make a token void. What joined with it stays joined: see `mesh-controller ca revoke`."""
    record = TokenStore(store, time.time).revoke(identifier)
    click.echo(f"token {record.id} revoked" + (f"; node {record.used_by} has joined with it" if record.used else ""))


def _rotated(held: Keys, now: float, wait: int, at_once: bool, cancel: bool) -> Keys:
    if at_once:
        return rotation.hurry(held, now)
    if held.root("signing") is None:
        raise ControllerError(_ELSEWHERE)
    if cancel:
        return rotation.cancel(held)
    return held if held.root("next") or held.root("retired") else rotation.begin(held, now, wait)


def _withdraw_keys(store: SharedStore, at_once: bool) -> None:
    """Do what `rotate` does where several controllers share their state, which have no roots of their own."""
    if not at_once:
        raise ControllerError(_ELSEWHERE)
    jwtkeys.withdraw(store)
    click.echo("the JWT keys are replaced: every controller makes new ones within a second, one that is away when it is back")


def _keys(store: AuthorityStore) -> Keys:
    if not isinstance(store, Directory):
        agreed = about.read(store)
        if agreed is None:
            raise ControllerError(
                f"{store.where(about.FILE)} is not there: no controller with --kubernetes and --ca-cert or --ca-command has run"
            )
        return Keys(agreed.trust_domain, agreed.longest_s)
    found = keys.load(store)
    if found is None:
        raise ControllerError(f"{store.path} holds no {AUTHORITY}: start `mesh-controller run` with this --ca-directory first")
    return found


def _serial(text: str) -> str:
    cleaned = text.lower().removeprefix("0x").replace(":", "").lstrip("0")
    try:
        return ledger.check_serial(cleaned)
    except BadState as error:
        raise ControllerError(
            f"{text[:80]!r} is neither a serial number (hexadecimal, as the audit log and `openssl x509 -serial` write it) nor a SPIFFE ID"
        ) from error


def _next(held: Keys) -> str:
    upcoming, retired = held.root("next"), held.root("retired")
    if upcoming:
        return f"next: the new root signs, not before {when(upcoming.since + upcoming.wait_s)} and not before every node knows it"
    if retired:
        return f"next: the old root is forgotten, not before {when(retired.until)}, when all it signed has run out"
    return ""


def _waits(store: AuthorityStore) -> list[str]:
    """Return what the running controller wrote last; a damaged file says nothing."""
    try:
        return [str(line) for line in fields.listed(fields.parse(store.read(STATUS) or b"{}"), "waits")]
    except BadState:
        return []


def _described(content: dict[str, Any]) -> Iterable[str]:
    yield f"trust domain  {content['trustDomain']}"
    if not content["roots"]:
        yield "root          somebody else's (--ca-cert or --ca-command); -o pem prints what is trusted"
    for root in content["roots"]:
        yield f"root          {root['hash']}  {root['stage']} since {when(root['since'])}, valid until {when(root['validUntil'])}"
    if content["next"]:
        yield f"rotation      {content['next']}"
    for line in content["waits"]:
        yield f"waits         {line}"
    yield f"in force      {content['certificates']} certificates, {len(content['nodes'])} nodes"
    for node in content["barred"]:
        yield f"revoked       node {node}  until `mesh-controller ca restore {node}`, unless it has a new join token"
    for record in content["revoked"]:
        yield f"revoked       {record['serial']}  {record['spiffeId'] or '?'}  until {when(record['until'])}"


def _token_state(record: Record, now: float) -> str:
    state = record.state(now)
    if state == "used":
        return f"used {when(record.used)} by {record.used_by}"
    return f"{state}, {'until' if state == 'valid' else 'since'} {when(record.expires)}"
