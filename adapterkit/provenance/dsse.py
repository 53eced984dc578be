"""DSSE envelopes: a statement, and signatures over its exact bytes, by elliptic curve keys.

What is signed is ``DSSEv1 LENGTH TYPE LENGTH PAYLOAD``, so neither the bytes nor what they are taken for can be changed.
The hash goes with the curve (P-256: SHA-256, P-384: SHA-384, P-521: SHA-512), as Sigstore's bundles, cosign and
model-signing have it. An envelope is one line of JSON; a file of several lines holds several (``.intoto.jsonl``). A
Sigstore bundle holds one too, and is read.

Format: DSSE v1.0.2 (secure-systems-lab/dsse), protocol.md and envelope.md.
"""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.json_data import parse_json
from adapterkit.disk import read_regular
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, UsageError
from adapterkit.packages import missing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

IN_TOTO = "application/vnd.in-toto+json"
PASSWORD = "ADAPTERKIT_KEY_PASSWORD"
"""The environment variable with the password of an encrypted private key."""
MOST = 64 << 20  # bytes of a file of envelopes
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


@dataclass(frozen=True)
class Envelope:
    """A payload as it was signed, what it is said to be, and the signatures; nobody has held them against a key yet."""

    payload: bytes
    kind: str
    signatures: tuple[bytes, ...]

    def signed_by(self, key: EllipticCurvePublicKey) -> bool:
        """Whether one of the signatures is of this key."""
        from cryptography.exceptions import InvalidSignature

        for signature in self.signatures:
            try:
                key.verify(signature, _signed(self.kind, self.payload), _algorithm(key))
            except InvalidSignature:
                continue
            return True
        return False


def seal(payload: bytes, key: EllipticCurvePrivateKey, kind: str = IN_TOTO) -> bytes:
    """An envelope as one line of JSON."""
    signature = key.sign(_signed(kind, payload), _algorithm(key.public_key()))
    envelope = {
        "payloadType": kind,
        "payload": b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": b64encode(signature).decode()}],
    }
    return json.dumps(envelope).encode() + b"\n"


def read_envelopes(data: bytes, where: str) -> list[Envelope]:
    """The envelopes of a file: one, one a line, or that of a Sigstore bundle.

    Raises:
        CheckFailed: it holds none, or something else; ``where`` is named in the sentence.
    """
    if len(data) > MOST:
        raise CheckFailed(f"{where} holds more than {MOST >> 20} MB, and no statements", _AGAIN)
    whole = data.strip()
    try:  # one JSON text may go over several lines
        found = [parse_json(whole, where)]
    except CheckpointError:
        try:
            found = [parse_json(line, where) for line in whole.splitlines() if line.strip()]
        except CheckpointError as error:
            raise CheckFailed(f"{where} holds no signed statement: {error.message}", _AGAIN) from None
    if not found:
        raise CheckFailed(f"{where} holds no signed statement: it is empty", _AGAIN)
    return [_envelope(one, f"{where}, statement {number}") for number, one in enumerate(found, 1)]


def password() -> bytes | None:
    """The password of a private key."""
    said = os.environ.get(PASSWORD)
    return said.encode() if said is not None else None


def private_key(path: Path) -> EllipticCurvePrivateKey:
    """A private key in PEM form; its password is in ``$ADAPTERKIT_KEY_PASSWORD``.

    Raises:
        NotFound, UsageError
    """
    _need()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    hint = f"an elliptic curve key in PEM form is needed, its password in ${PASSWORD}"
    data = _read(path, "private")
    try:
        key = load_pem_private_key(data, password())
    except Exception as error:  # ValueError, TypeError, UnsupportedAlgorithm: it depends on what is wrong
        raise UsageError(f"{path} cannot be used as a private key ({_line(error)})", hint) from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise UsageError(f"{path} cannot be used as a private key (it is of another kind)", hint)
    return key


def public_key(path: Path) -> EllipticCurvePublicKey:
    """A public key in PEM form.

    Raises:
        NotFound, UsageError
    """
    _need()
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    hint = "an elliptic curve key in PEM form is needed"
    data = _read(path, "public")
    try:
        key = load_pem_public_key(data)
    except Exception as error:
        raise UsageError(f"{path} cannot be used as a public key ({_line(error)})", hint) from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise UsageError(f"{path} cannot be used as a public key (it is of another kind)", hint)
    return key


def key_id(key: EllipticCurvePublicKey) -> str:
    """A name for a key, for readers: the sha256 of its PEM form, as model-signing writes it into a signature."""
    from hashlib import sha256

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


_AGAIN = "get it again from where it was signed"


def _need() -> None:
    """
    Raises:
        MissingPackage: there is no cryptography, which the extra ``sign`` brings.
    """
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise missing(error.name or "cryptography", "signing needs the package cryptography", "sign") from None


def _read(path: Path, which: str) -> bytes:
    if not path.exists():
        raise NotFound(f"the {which} key {path} does not exist", "openssl makes keys: see adapterkit sign --help")
    return read_regular(path, 1 << 20, f"the {which} key {path}")


def _envelope(value: Any, where: str) -> Envelope:
    try:
        inner = value.get("dsseEnvelope", value)
        signatures = tuple(b64decode(one["sig"], validate=True) for one in inner["signatures"])
        made = Envelope(b64decode(inner["payload"], validate=True), inner["payloadType"], signatures)
        if not isinstance(made.kind, str):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckFailed(f"{where} is no signed statement: a field is missing or of the wrong type", _AGAIN) from None
    return made


def _signed(kind: str, payload: bytes) -> bytes:
    """The pre-authentication encoding."""
    name = kind.encode("utf-8", "surrogatepass")
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def _algorithm(key: EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA(getattr(hashes, _CURVES[key.curve.name])())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
