"""The CA file, authority.json: the roots that the mesh trusts with their keys, the keys of JWT-SVIDs, and in which step of a rotation each is.

Read and written by `controller.identity.ca` and the `ca` commands; the steps are in `controller.identity.rotation`. Nothing here prints a key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from controller.errors import ControllerError
from controller.identity import fields
from controller.identity.certificates import Issuer, key_pem, may_sign, pem
from controller.identity.directory import AUTHORITY, Directory
from controller.identity.fields import BadState
from meshapi.join import root_hash

VERSION: Final = 1
Stage = Literal["next", "signing", "retired"]
"""next: trusted, does not sign yet. signing: signs. retired: trusted until all it signed has run out."""
_STAGES: Final[Mapping[str, Stage]] = {"next": "next", "signing": "signing", "retired": "retired"}
_ROOT_FIELDS: Final = ("certificate", "key", "stage", "since", "wait_s", "until")
_JWT_FIELDS: Final = ("key", "stage", "since", "until")
_FIELDS: Final = ("version", "trust_domain", "longest_s", "roots", "jwt")


@dataclass(frozen=True, slots=True)
class Root:
    """A self-made root. Times are Unix seconds; `until` is set when it retires, `wait_s` when it is next."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    stage: Stage
    since: int
    wait_s: int = 0
    until: int = 0

    @property
    def issuer(self) -> Issuer:
        """The root as something that signs."""
        return Issuer(self.certificate, self.key)

    @property
    def hash(self) -> str:
        """What join tokens say of it."""
        return root_hash(self.certificate)


@dataclass(frozen=True, slots=True)
class JwtKey:
    """A key of JWT-SVIDs (ES256)."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    stage: Stage
    since: int
    until: int = 0


@dataclass(frozen=True, slots=True)
class Keys:
    """Everything in the CA file. Without self-made roots (an operator's intermediate, an external signer) there are only JWT keys.

    `longest_s`: the longest lifetime that certificates were ever given; decides how long a retired root stays trusted.
    """

    trust_domain: str
    longest_s: int
    roots: tuple[Root, ...] = ()
    jwt: tuple[JwtKey, ...] = ()

    def root(self, stage: Stage) -> Root | None:
        """Return the root in a stage, if there is one."""
        return next((root for root in self.roots if root.stage == stage), None)

    def jwt_key(self, stage: Stage) -> JwtKey | None:
        """Return the newest JWT key in a stage, if there is one."""
        return max((key for key in self.jwt if key.stage == stage), key=lambda key: key.since, default=None)

    def with_root(self, old: Root, **changes: Any) -> Keys:
        """Return a copy in which one root differs."""
        return replace(self, roots=tuple(replace(root, **changes) if root is old else root for root in self.roots))


def dump(keys: Keys) -> str:
    """Return the CA file's text. It holds private keys: it goes into the CA file and nowhere else."""
    content = {
        "version": VERSION,
        "trust_domain": keys.trust_domain,
        "longest_s": keys.longest_s,
        "roots": [
            {
                "certificate": pem([root.certificate]).decode(),
                "key": key_pem(root.key).decode(),
                "stage": root.stage,
                "since": root.since,
                "wait_s": root.wait_s,
                "until": root.until,
            }
            for root in keys.roots
        ],
        "jwt": [{"key": key_pem(key.key).decode(), "stage": key.stage, "since": key.since, "until": key.until} for key in keys.jwt],
    }
    return json.dumps(content, indent=1) + "\n"


def parse(content: bytes) -> Keys:
    """Return what a CA file holds. Raises BadState, which says what is wrong and never shows the content."""
    record = fields.only(fields.parse(content), _FIELDS)
    version = fields.field(record, "version", int)
    if version != VERSION:
        raise BadState(f"it has version {version}, this controller writes {VERSION}: it was written by another release")
    roots = tuple(_root(item) for item in fields.listed(record, "roots"))
    jwt = tuple(_jwt(item) for item in fields.listed(record, "jwt"))
    stages = [root.stage for root in roots]
    if len(stages) != len(set(stages)) or set(stages) >= {"next", "retired"} or ("next" in stages and "signing" not in stages):
        raise BadState("of the roots at most one signs, and beside it one is next or retired")
    if [key.stage for key in jwt].count("signing") != 1:
        raise BadState("of the JWT keys exactly one must sign")
    if len({root.hash for root in roots}) != len(roots):
        raise BadState("the same root is there twice")
    return Keys(fields.field(record, "trust_domain", str), fields.field(record, "longest_s", int), roots, jwt)


def load(directory: Directory) -> Keys | None:
    """Return the CA file of a directory, None if there is none. Raises ControllerError."""
    content = directory.read(AUTHORITY, private=True)
    if content is None:
        return None
    try:
        return parse(content)
    except BadState as error:
        loss = "without it no certificate of this mesh can be made or checked, and every node would have to join again"
        raise fields.refuse(directory.path / AUTHORITY, error, loss) from error


def store(directory: Directory, keys: Keys) -> None:
    """Replace the CA file; call it with the directory locked. Raises ControllerError."""
    text = dump(keys)
    if dump(parse(text.encode())) != text:
        raise ControllerError(f"{directory.path / AUTHORITY} was not written: the new content would not read back; please report this")
    directory.write(AUTHORITY, text)


def _root(item: Any) -> Root:
    record = fields.only(item, _ROOT_FIELDS)
    try:
        certificate = x509.load_pem_x509_certificate(fields.field(record, "certificate", str).encode())
        matches = certificate.public_key() == (key := _key(record)).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise BadState(str(error) if isinstance(error, BadState) else "a root's certificate cannot be read") from error
    if not matches:
        raise BadState("a root's key does not belong to its certificate")
    if not may_sign(certificate):
        raise BadState("a root's certificate is no signing certificate")
    since, wait_s, until = (fields.field(record, name, int) for name in ("since", "wait_s", "until"))
    return Root(certificate, key, _stage(record), since, wait_s, until)


def _jwt(item: Any) -> JwtKey:
    record = fields.only(item, _JWT_FIELDS)
    return JwtKey(_key(record), _stage(record), fields.field(record, "since", int), fields.field(record, "until", int))


def _stage(record: Mapping[str, Any]) -> Stage:
    found = _STAGES.get(fields.field(record, "stage", str))
    if found is None:
        raise BadState(f"a stage is none of {', '.join(_STAGES)}")
    return found


def _key(record: Mapping[str, Any]) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(fields.field(record, "key", str).encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadState(str(error) if isinstance(error, BadState) else "a private key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadState("a private key is not ECDSA P-256")
    return key
