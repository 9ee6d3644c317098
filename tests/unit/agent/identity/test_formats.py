"""Everything that comes from outside, as any bytes: join tokens, chains, bundles, the file of a restart, JWTs. All that is wrong is a ValueError."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Config, Join
from agent.identity import certificates, jwt, store, workloads
from agent.identity.authority import Authority
from agent.identity.clock import Clock
from agent.identity.keys import PrivateKey
from agent.identity.node import Node
from agent.identity.store import Kept, Store, Svid
from agent.identity.trust import Trust, crl_list, decode, jwks
from meshapi import identity_pb2 as pb
from meshapi import join
from tests.unit.agent.identity.signer import TRUST_DOMAIN, JwtKey, Root, b64, spiffe_id

ROOT = Root()
NOW = time.time()


@functools.cache
def svid(account: str = "cart") -> Svid:
    key = PrivateKey.generate()
    public: Any = x509.load_der_x509_csr(key.csr()).public_key()
    leaf = ROOT.sign(public, [x509.UniformResourceIdentifier(spiffe_id(account))])
    return Svid(key, certificates.read([leaf.public_bytes(Encoding.DER)]))


def bundle(**changes: Any) -> pb.TrustBundle:
    fields: dict[str, Any] = {"trust_domain": TRUST_DOMAIN, "sequence": 3, "roots": [ROOT.der], "jwt_keys": b'{"keys":[]}', **changes}
    return pb.TrustBundle(**fields)


def refusal(parse: Callable[[], object]) -> str | None:
    """What a parser says against what it was given; None if nothing."""
    try:
        parse()
    except ValueError as error:
        return str(error)
    return None


# Join tokens


def test_a_token_is_its_text_and_its_secret_does_not_show() -> None:
    token = join.Token(b"0123456789abcdef", join.root_hash(ROOT.certificate))
    text = str(token)
    assert text == f"mesh1.MDEyMzQ1Njc4OWFiY2RlZg.{join.root_hash(ROOT.certificate)}"
    assert join.parse(f" {text}\n") == token
    assert "0123456789" not in repr(token)
    assert "MDEy" not in repr(token)


@given(st.binary(min_size=16, max_size=64), st.binary(min_size=32, max_size=32))
def test_every_token_survives_its_text(secret: bytes, digest: bytes) -> None:
    token = join.Token(secret, digest.hex())
    assert join.parse(str(token)) == token


@given(st.one_of(st.text(max_size=200), st.from_regex(r"mesh1\.[A-Za-z0-9_=-]{0,40}\.[0-9a-fA-F]{60,66}", fullmatch=True)))
def test_what_is_no_token_is_refused_without_being_quoted(text: str) -> None:
    said = refusal(lambda: join.parse(text))
    assert said in {None, refusal(lambda: join.parse("")), refusal(lambda: join.parse(f"mesh1.{'A' * 23}.{'0' * 64}"))}  # two constants


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace("mesh1", "mesh2"), id="another-version"),
        pytest.param(lambda text: text.replace("Zg.", "Zh."), id="bits-that-mean-nothing"),
        pytest.param(lambda text: text.replace("Zg.", "Zg==."), id="padded"),
        pytest.param(lambda text: text[:-1], id="cut-off"),
        pytest.param(lambda text: f"{text}0", id="longer"),
        pytest.param(lambda text: text[:-1] + "F", id="capital-digits"),
    ],
)
def test_a_token_has_one_text_only(change: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="join token"):
        join.parse(change(str(join.Token(b"0123456789abcdef", "0" * 64))))


# Chains


@given(st.lists(st.binary(max_size=100), max_size=10))
def test_any_bytes_are_no_chain(der: list[bytes]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        certificates.read(der)


@given(st.data())
def test_a_damaged_certificate_is_no_chain_or_does_not_verify_or_says_the_same(data: st.DataObject) -> None:
    good = bytearray(svid().chain.der[0])
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    try:
        chain = certificates.read([bytes(good)])
        certificates.verify(chain, [ROOT.certificate], NOW)
    except ValueError:
        return
    # The count of unused bits in a signature is the one byte that says nothing (X.690, 8.6.2): what was signed is as it was.
    assert chain.certificates[0].tbs_certificate_bytes == svid().chain.certificates[0].tbs_certificate_bytes


def test_a_chain_says_who_it_is_for_and_until_when() -> None:
    chain = svid().chain
    assert (chain.spiffe_id, chain.public) == (spiffe_id("cart"), svid().key.public())
    assert chain.not_before < NOW < chain.not_after
    certificates.verify(chain, [Root().certificate, ROOT.certificate], NOW)
    assert x509.load_pem_x509_certificate(chain.pem).serial_number == chain.serial


@pytest.mark.parametrize(
    ("names", "ca"),
    [
        pytest.param([], False, id="no-name"),
        pytest.param([x509.DNSName("cart")], False, id="no-uri"),
        pytest.param([x509.UniformResourceIdentifier(spiffe_id(n)) for n in ("a", "b")], False, id="two-uris"),
        pytest.param([x509.UniformResourceIdentifier("https://mesh.test/x")], False, id="another-scheme"),
        pytest.param([x509.UniformResourceIdentifier("spiffe://mesh.test")], False, id="no-path"),
        pytest.param([x509.UniformResourceIdentifier(spiffe_id("a"))], True, id="an-authority"),
    ],
)
def test_a_certificate_that_is_no_svid_is_no_chain(names: list[x509.GeneralName], ca: bool) -> None:
    leaf = ROOT.sign(ec.generate_private_key(ec.SECP256R1()).public_key(), names, ca=ca)
    with pytest.raises(ValueError, match=r"not an X.509-SVID"):
        certificates.read([leaf.public_bytes(Encoding.DER)])


@pytest.mark.parametrize(
    ("at", "said"),
    [(-4000.0, "is not valid yet"), (3601.0, "has ended"), (40 * 86_400.0, "has ended")],
    ids=["early", "late", "much-later"],
)
def test_a_chain_holds_between_its_times(at: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        certificates.verify(svid().chain, [ROOT.certificate], NOW + at)


def test_a_chain_of_another_root_does_not_hold() -> None:
    for roots in ([], [Root().certificate]):
        with pytest.raises(ValueError, match="no trusted root has signed it"):
            certificates.verify(svid().chain, roots, NOW)


def test_what_a_root_signs_itself_ends_with_that_root() -> None:
    assert certificates.ceiling(svid().chain, [Root(name="other").certificate, ROOT.certificate]) == ROOT.certificate
    assert certificates.ceiling(svid().chain, [Root(name="other").certificate]) is None


def test_an_intermediate_may_stand_between() -> None:
    middle = Root(name="middle")
    signed = ROOT.sign(middle.key.public_key(), [], ca=True)
    renamed = x509.CertificateBuilder(
        ROOT.certificate.subject, middle.certificate.subject, middle.key.public_key(), 7, signed.not_valid_before_utc,
        signed.not_valid_after_utc, list(signed.extensions),
    ).sign(ROOT.key, SHA256())  # fmt: skip
    leaf = middle.sign(ec.generate_private_key(ec.SECP256R1()).public_key(), [x509.UniformResourceIdentifier(spiffe_id("cart"))])
    chain = certificates.read([leaf.public_bytes(Encoding.DER), renamed.public_bytes(Encoding.DER)])
    certificates.verify(chain, [ROOT.certificate], time.time())
    assert certificates.ceiling(chain, [ROOT.certificate]) == chain.certificates[1]
    with pytest.raises(ValueError, match="no trusted root"):
        certificates.verify(certificates.read(chain.der[:1]), [ROOT.certificate], time.time())


# Trust bundles


def test_a_bundle_survives_its_encoding() -> None:
    trust = decode(bundle(revoked=[b"\x01\x00", b""], crl=ROOT.crl([256]) + ROOT.crl([])), TRUST_DOMAIN)
    assert (trust.revoked, len(trust.crls_der)) == (frozenset({256, 0}), 2)
    assert trust.certificates == (ROOT.certificate,)
    assert decode(trust.message(), TRUST_DOMAIN) == trust


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"trust_domain": "elsewhere"}, "--trust-domain", id="another-trust-domain"),
        pytest.param({"roots": []}, "0 roots", id="no-root"),
        pytest.param({"roots": [ROOT.der] * 33}, "33 roots", id="too-many-roots"),
        pytest.param({"roots": [svid().chain.der[0]]}, "no certificate authority", id="a-leaf-as-root"),
        pytest.param({"roots": [b"x"]}, "not a certificate", id="a-root-that-is-none"),
        pytest.param({"revoked": [b"1" * 21]}, "more than 20 bytes", id="a-long-serial"),
        pytest.param({"jwt_keys": b"{"}, "not JSON", id="keys-that-are-no-json"),
        pytest.param({"jwt_keys": b"[" * 100_000}, "not JSON", id="deep-keys"),
        pytest.param({"jwt_keys": b'{"keys":[1]}'}, "no JWK set", id="keys-that-are-no-keys"),
        pytest.param({"jwt_keys": b'{"keys":[{"kty":"EC","d":"x"}]}'}, "secret", id="a-private-key"),
        pytest.param({"crl": b"-----END X509 CRL-----"}, "not a CRL", id="a-crl-that-is-none"),
        pytest.param({"crl": b"x"}, "cut off", id="a-crl-that-is-cut-off"),
    ],
)
def test_a_bundle_with_anything_wrong_is_refused_as_a_whole(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode(bundle(**change), TRUST_DOMAIN)


FIELD = st.binary(max_size=60)


@given(
    st.builds(
        pb.TrustBundle,
        trust_domain=st.sampled_from([TRUST_DOMAIN, "x", ""]),
        sequence=st.integers(0, 2**64 - 1),
        roots=st.lists(st.one_of(FIELD, st.just(ROOT.der)), max_size=3),
        revoked=st.lists(st.binary(max_size=22), max_size=3),
        jwt_keys=st.one_of(FIELD, st.just(b""), st.just(b'{"keys":[{}]}')),
        crl=st.one_of(FIELD, st.just(b"")),
    )
)
def test_any_bundle_is_good_or_a_value_error(message: pb.TrustBundle) -> None:
    try:
        trust = decode(message, TRUST_DOMAIN)
    except ValueError:
        return
    assert trust.certificates
    assert trust.trust_domain == TRUST_DOMAIN


@given(st.binary(max_size=300))
def test_any_text_is_crls_or_a_value_error(text: bytes) -> None:
    for content in (text, text + ROOT.crl([1]), ROOT.crl([1]) + text):
        try:
            assert isinstance(crl_list(content), list)
        except ValueError:
            continue


# Answers of the controller

CHAINS = st.one_of(
    st.lists(st.one_of(FIELD, st.just(ROOT.der)), max_size=3),
    st.builds(lambda n: list(svid(n).chain.der), st.sampled_from(["cart", "admin"])),
)


@given(
    st.lists(
        st.builds(lambda chain, error: pb.Signed(chain=chain, error=error), CHAINS, st.sampled_from(["", "no"])), min_size=1, max_size=4
    )
)
def test_any_answers_to_requests_give_certificates_for_their_own_keys_only(answers: list[pb.Signed]) -> None:
    """`svid` has keys of its own: its certificates are good ones, and not for the keys that were asked for."""
    keys = [PrivateKey.generate() for _ in answers]
    found = workloads._read(keys, answers, [ROOT.certificate], NOW)
    assert all(isinstance(one, ValueError) for one in found)
    mine = workloads._read([svid().key], [pb.Signed(chain=svid().chain.der)], [ROOT.certificate], NOW)
    assert [type(one) for one in mine] == [Svid]


@given(st.builds(lambda chain, trust: pb.JoinResponse(chain=chain, trust=trust), CHAINS, st.just(None) | st.builds(bundle)))
def test_any_answer_to_joining_leaves_a_node_as_it_is(answer: pb.JoinResponse) -> None:
    config = Config("n1", "x:1", trust_domain=TRUST_DOMAIN, run_dir=Path("/nowhere/run"), join=Join("x:2"))

    async def check() -> None:
        authority = Authority(config, Clock(), lambda _, __: None)
        node = Node(config, authority, Clock(), lambda _, __: None)
        with pytest.raises(ValueError):  # noqa: PT011
            await node._take(PrivateKey.generate(), answer)
        assert (node.chain, authority.ready.is_set(), config.identity_dir.exists()) == (None, False, False)

    asyncio.run(check())


# The file of a restart


def kept() -> Kept:
    return Kept(decode(bundle(), TRUST_DOMAIN), {"default/cart": svid(), "default/shop": svid("shop")})


def test_what_was_kept_is_what_is_found(tmp_path: Path) -> None:
    one = Store(tmp_path / "identity")
    assert one.read(TRUST_DOMAIN) == Kept()
    one.write(kept())
    found = one.read(TRUST_DOMAIN)
    assert found.trust == kept().trust
    assert {name: (s.chain, s.key.public()) for name, s in found.svids.items()} == {
        name: (s.chain, s.key.public()) for name, s in kept().svids.items()
    }
    assert one.path.stat().st_mode & 0o777 == 0o600
    left = one.path.with_name(f".{one.path.name}.x1y2")
    left.write_text("a key")
    one.read(TRUST_DOMAIN)
    assert not left.exists()


def text_of_the_file(tmp_path: Path) -> bytes:
    one = Store(tmp_path)
    one.write(kept())
    return one.path.read_bytes()


def test_one_damaged_entry_costs_itself_only(tmp_path: Path) -> None:
    document = json.loads(text_of_the_file(tmp_path))
    document["svids"]["default/cart"]["key"] = document["svids"]["default/shop"]["key"]
    found = store.parse(json.dumps(document).encode(), TRUST_DOMAIN)
    assert set(found.svids) == {"default/shop"}


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", b"[" * 100_000, b'{"version":2,"svids":{}}', b'{"version":1,"svids":[]}', b"\xff"]
)
def test_a_damaged_file_is_nothing_and_is_said(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    one = Store(tmp_path)
    one.path.write_bytes(content)
    assert one.read(TRUST_DOMAIN) == Kept()
    assert "stored identities damaged" in caplog.text


@given(st.binary(max_size=300))
def test_any_file_is_good_or_a_value_error(content: bytes) -> None:
    said = refusal(lambda: store.parse(content, TRUST_DOMAIN))
    assert said in {None, "it is not JSON", "it is of another form"}


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)),
    lambda c: st.lists(c) | st.dictionaries(st.text(max_size=5), c),
    max_leaves=8,
)


@given(JSON, JSON, JSON)
def test_any_document_is_good_or_a_value_error(trust: Any, key: Any, chain: Any) -> None:
    text = base64.b64encode(bundle().SerializeToString()).decode()
    for document in (
        {"version": 1, "trust": trust, "svids": {}},
        {"version": 1, "trust": text, "svids": {"a/b": key}},
        {"version": 1, "trust": text, "svids": {"a/b": {"key": key, "chain": chain}}},
        {"version": 1, "trust": text, "svids": {"a/b": {"key": base64.b64encode(svid().key.der()).decode(), "chain": [chain]}}},
    ):
        try:
            found = store.parse(json.dumps(document).encode(), TRUST_DOMAIN)
        except ValueError:
            continue
        assert found.svids == {}


@given(st.data())
def test_a_file_with_a_flipped_byte_never_holds_another_identity(data: st.DataObject) -> None:
    good = bytearray(the_file())
    good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = store.parse(bytes(good), TRUST_DOMAIN)
    except ValueError:
        return
    for one in found.svids.values():
        assert one.key.public() == one.chain.public
        trust: Trust | None = found.trust
        assert trust is not None
        if trust.certificates == (ROOT.certificate,):
            try:
                certificates.verify(one.chain, trust.certificates, NOW)
            except ValueError:
                continue  # `agent.identity.workloads` verifies what it takes from the store
            assert one.chain.spiffe_id in {spiffe_id("cart"), spiffe_id("shop")}


@functools.cache
def the_file() -> bytes:
    document = {
        "version": 1,
        "trust": base64.b64encode(bundle().SerializeToString()).decode(),
        "svids": {
            name: {"key": base64.b64encode(s.key.der()).decode(), "chain": [base64.b64encode(one).decode() for one in s.chain.der]}
            for name, s in kept().svids.items()
        },
    }
    return json.dumps(document).encode()


# JWT-SVIDs

KEY = JwtKey()
CLAIMS = {"sub": spiffe_id("cart"), "aud": ["shop"], "exp": NOW + 300}


def checked(token: str, audience: str = "shop", keys: list[dict[str, Any]] | None = None, now: float = NOW) -> jwt.Claims:
    return jwt.validate(token, [audience], [KEY.jwk] if keys is None else keys, TRUST_DOMAIN, now)


def test_a_token_says_who_it_is_for_and_until_when() -> None:
    found = checked(KEY.sign({**CLAIMS, "more": {"a": [1]}}))
    assert (found.spiffe_id, found.expires_at, found.all["more"]) == (spiffe_id("cart"), CLAIMS["exp"], {"a": [1]})
    assert checked(KEY.sign({**CLAIMS, "aud": "shop"})).spiffe_id == spiffe_id("cart")


def test_tokens_of_rsa_keys_hold_too() -> None:
    key = rsa.generate_private_key(65537, 2048)
    numbers = key.public_key().public_numbers()
    n, e = (b64(v.to_bytes((v.bit_length() + 7) // 8, "big")) for v in (numbers.n, numbers.e))
    for algorithm, how in (("RS256", padding.PKCS1v15()), ("PS256", padding.PSS(padding.MGF1(SHA256()), 32))):
        signed = f"{b64(json.dumps({'alg': algorithm}).encode())}.{b64(json.dumps(CLAIMS).encode())}"
        token = f"{signed}.{b64(key.sign(signed.encode(), how, SHA256()))}"
        assert checked(token, keys=[{"kty": "RSA", "n": n, "e": e}]).spiffe_id == spiffe_id("cart")


@pytest.mark.parametrize(
    ("claims", "header", "said"),
    [
        pytest.param({"sub": "spiffe://elsewhere/x"}, {}, "subject", id="another-trust-domain"),
        pytest.param({"sub": f"spiffe://{TRUST_DOMAIN}/"}, {}, "subject", id="nobody"),
        pytest.param({"sub": None}, {}, "subject", id="no-subject"),
        pytest.param({"aud": []}, {}, "somebody else", id="no-audience"),
        pytest.param({"aud": {"shop": 1}}, {}, "somebody else", id="audience-of-another-kind"),
        pytest.param({"exp": NOW - 61}, {}, "expired", id="expired"),
        pytest.param({"exp": None}, {}, "expired", id="without-end"),
        pytest.param({"exp": True}, {}, "expired", id="end-of-another-kind"),
        pytest.param({"nbf": NOW + 61}, {}, "not valid yet", id="early"),
        pytest.param({"iat": "now"}, {}, "not valid yet", id="times-of-another-kind"),
        pytest.param({}, {"alg": "none"}, "no key", id="no-algorithm"),
        pytest.param({}, {"alg": "HS256"}, "no key", id="symmetric"),
        pytest.param({}, {"alg": "ES384"}, "no key", id="another-algorithm"),
        pytest.param({}, {"kid": "two"}, "no key", id="another-key"),
        pytest.param({}, {"typ": "at+jwt"}, "type", id="another-type"),
        pytest.param({}, {"crit": ["x"]}, "extension", id="critical-extension"),
    ],
)
def test_a_token_with_anything_wrong_is_refused(claims: dict[str, Any], header: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked(KEY.sign({**CLAIMS, **claims}, header))


def test_a_token_of_another_key_or_with_changed_claims_is_refused() -> None:
    token = KEY.sign(CLAIMS)
    head, _, signature = token.split(".")
    changed = f"{head}.{b64(json.dumps({**CLAIMS, 'sub': spiffe_id('admin')}).encode())}.{signature}"
    for bad in (JwtKey().sign(CLAIMS), changed, f"{token}A", token.rpartition(".")[0] + "."):
        with pytest.raises(ValueError, match=r"no key|not a JWT"):
            checked(bad)


@given(st.one_of(st.text(max_size=100), st.from_regex(r"[A-Za-z0-9_-]{1,30}\.[A-Za-z0-9_-]{1,30}\.[A-Za-z0-9_-]{1,30}", fullmatch=True)))
def test_any_text_is_no_token(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        checked(text)


@given(JSON, JSON)
def test_any_header_and_claims_are_refused_without_a_key(header: Any, claims: Any) -> None:
    token = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}.AAAA"
    for keys in ([], [KEY.jwk], [{"kty": "EC"}], [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]):
        with pytest.raises(ValueError):  # noqa: PT011
            checked(token, keys=keys)


@given(st.lists(st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "alg", "kid", "use"]), JSON, max_size=6), max_size=3))
def test_any_keys_are_read_and_believe_nothing(keys: list[dict[str, Any]]) -> None:
    found = jwks(json.dumps({"keys": keys}).encode())
    with pytest.raises(ValueError, match="no key"):
        checked(KEY.sign(CLAIMS), keys=list(map(dict, found)))
