"""Signatures of artifacts as cosign makes and finds them (sigstore/cosign, ``specs/SIGNATURE_SPEC.md``), by a key of one's own.

What is signed is a small JSON ("simple signing") that names the manifest by digest. It is a layer of a manifest with the tag
``sha256-DIGEST.sig`` that names the signed one as its subject: ``cosign verify --key`` and the list of referrers find it.
"""

from __future__ import annotations

import base64
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.disk import read_regular
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, ServerError, UsageError
from adapterkit.foreign import json_value
from adapterkit.oci.client import MANIFEST, Descriptor, Manifest, OciRegistry, descriptor
from adapterkit.registry.canonical import canonical, sha256

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

SIGNATURE_TYPE = "application/vnd.dev.cosign.artifact.sig.v1+json"
_PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_NOTE = "dev.cosignproject.cosign/signature"
_PASSWORD = "ADAPTERKIT_KEY_PASSWORD"
_MOST_KEY = 1 << 20  # bytes of a key
_MOST = 100  # signatures of one artifact that are looked at


def sign_artifact(registry: OciRegistry, digest: str, size: int, key: Path) -> str:
    """Sign a manifest that is there; the digest of the signature's manifest. Signing again with the same key changes nothing.

    Args:
        digest, size: of the signed manifest.
        key: an elliptic curve key (P-256) in PEM form; its password is in ``$ADAPTERKIT_KEY_PASSWORD``.
    """
    private = _private(key)
    payload = _payload(registry, digest)
    tag = f"sha256-{digest}.sig"
    before = registry.manifest(tag)
    layers = _layers(before) if before is not None else []
    public = private.public_key()
    if before is not None and any(_holds(registry, layer, digest, public) for layer in layers):
        return before.digest
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    signature = base64.b64encode(private.sign(payload, ec.ECDSA(hashes.SHA256()))).decode()
    layers.append(Descriptor(_PAYLOAD, sha256(payload), len(payload), {_NOTE: signature}))
    config = canonical(
        {
            "architecture": "",
            "config": {},
            "created": "0001-01-01T00:00:00Z",
            "history": [{"created": "0001-01-01T00:00:00Z"}] * len(layers),
            "os": "",
            "rootfs": {"diff_ids": [f"sha256:{layer.digest}" for layer in layers], "type": "layers"},
        }
    )
    registry.put_blob(sha256(payload), len(payload), payload)
    registry.put_blob(sha256(config), len(config), config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": SIGNATURE_TYPE,
        "config": Descriptor(_CONFIG, sha256(config), len(config), {}).to_json(),
        "layers": [layer.to_json() for layer in layers],
        "subject": Descriptor(MANIFEST, digest, size, {}).to_json(),
    }
    return registry.put_manifest(tag, canonical(manifest))


def verify_artifact(registry: OciRegistry, digest: str, key: Path) -> None:
    """Hold a manifest's signatures against a public key.

    Raises:
        CheckFailed: there is none, or none of them holds.
        UsageError: the key cannot be used.
    """
    public = _public(key)
    manifests = [registry.manifest(f"sha256-{digest}.sig")]
    manifests += [
        registry.manifest(f"sha256:{one.digest}") for one in registry.referrers(digest, SIGNATURE_TYPE)[:_MOST]
    ]
    layers = [layer for manifest in manifests if manifest is not None for layer in _layers(manifest)]
    if not layers:
        raise CheckFailed(f"{registry.reference} is not signed", "get it from somebody who signs it, or sign it")
    if not any(_holds(registry, layer, digest, public) for layer in layers[:_MOST]):
        raise CheckFailed(
            f"no signature of {registry.reference} holds for {key.name}: it was signed with another key, or changed",
            "do not use it before you know which",
        )


def _payload(registry: OciRegistry, digest: str) -> bytes:
    name = f"{registry.reference.host}/{registry.reference.name}"
    return canonical(
        {
            "critical": {
                "identity": {"docker-reference": name},
                "image": {"docker-manifest-digest": f"sha256:{digest}"},
                "type": "cosign container image signature",
            },
            "optional": None,
        }
    )


def _layers(manifest: Manifest) -> list[Descriptor]:
    rows = manifest.value.get("layers")
    found = [descriptor(row, "a signature") for row in rows] if isinstance(rows, list) else []
    return [layer for layer in found if layer.media_type == _PAYLOAD and _NOTE in layer.annotations]


def _holds(registry: OciRegistry, layer: Descriptor, digest: str, public: ec.EllipticCurvePublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if layer.size > 1 << 16:
        return False
    try:
        payload = registry.read_blob(layer.digest, layer.size)
        public.verify(base64.b64decode(layer.annotations[_NOTE], validate=True), payload, ec.ECDSA(hashes.SHA256()))
        said: Any = json_value(payload)["critical"]["image"]["docker-manifest-digest"]
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return False
    except (CheckFailed, ServerError):
        return False
    return bool(said == f"sha256:{digest}")


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    _needs_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    password = os.environ.get(_PASSWORD, "").encode() or None
    try:
        found = serialization.load_pem_private_key(read_regular(path, _MOST_KEY), password)
    except (CheckpointError, NotFound, UnsupportedAlgorithm, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be used as a private key ({error})", f"its password is read from ${_PASSWORD}"
        ) from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise UsageError(
            f"{path} is no elliptic curve key", "make one: openssl ecparam -name prime256v1 -genkey -noout"
        )
    return found


def _public(path: Path) -> ec.EllipticCurvePublicKey:
    _needs_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        found = serialization.load_pem_public_key(read_regular(path, _MOST_KEY))
    except (CheckpointError, NotFound, UnsupportedAlgorithm, ValueError) as error:
        raise UsageError(f"{path} cannot be used as a public key ({error})", "give the key in PEM form") from None
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is no elliptic curve key", "give the public half of the key that signed")
    return found


def _needs_library() -> None:
    if find_spec("cryptography") is None:
        raise UsageError("signatures need the package cryptography", "pip install 'adapterkit[sign]'")
