"""`push` to an OCI registry: blobs first, then the manifest under its digest, and the tag last.

Until the tag is set nothing of a push can be found by name, so one that was cut off leaves blobs that the registry collects.
Pushing again sends only what is missing. A tag that means another artifact is moved only when that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import HubError, OutputError, UsageError, option
from adapterkit.hub.files import CARD, Upload, prepare
from adapterkit.hub.push import source_of, with_base
from adapterkit.oci.client import OciRegistry
from adapterkit.oci.modelpack import pack
from adapterkit.oci.reference import parse_oci
from adapterkit.oci.signatures import sign_artifact
from adapterkit.registry.canonical import sha256


@dataclass(frozen=True)
class OciPushed:
    """What is in the registry now.

    Attributes:
        address: ``oci://host/name:tag``.
        digest: of the manifest, hex.
        new: whether the tag was set or moved.
        uploaded, mounted, kept: files by what became of their blobs: sent, taken from another repository, there already.
        sent: bytes of the files that were sent.
        left_out: files of the version that are not published.
        content: digest of what was published.
        signature: digest of the signature's manifest, where it was signed.
        notes: what a user should know.
    """

    address: str
    digest: str
    new: bool
    uploaded: tuple[str, ...]
    mounted: tuple[str, ...]
    kept: tuple[str, ...]
    sent: int
    left_out: tuple[str, ...]
    content: str
    signature: str = ""
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The address that means this artifact for ever."""
        return f"{self.address}@sha256:{self.digest}"


def push_oci(
    ref: str,
    address: str,
    *,
    base_id: str = "",
    move_tag: bool = False,
    share_with: Sequence[str] = (),
    key: Path | None = None,
    plain_http: bool = False,
    home: Path | None = None,
) -> OciPushed:
    """Publish a version (or a folder) as an artifact.

    Args:
        ref: a registry name, or a folder.
        address: ``oci://host/name:tag``.
        base_id: the Hub id of the base, where the record does not know it.
        move_tag: let a tag that means another artifact mean this one.
        share_with: repositories of the same host whose blobs may be used, such as the base's.
        key: a private key: the manifest is signed as cosign does it.
        plain_http: speak HTTP; on the loopback interface that is done in any case.

    Raises:
        UnsafeError: a link, a secret, or a path of this machine.
        OutputError: the tag means another artifact.
        AuthError, ServerError, CheckFailed, NotFound, RegistryError, UsageError
    """
    to = parse_oci(address, plain=plain_http)
    if to.digest:
        raise UsageError(f"{address} names a digest, and what is pushed has its own", "give a tag, or nothing")
    record, files = source_of(ref, home)
    if base_id:
        record = with_base(record, base_id)
    ready = prepare(record, files)
    uploads = list(ready.uploads)
    if ready.card is not None:
        uploads.append(Upload(CARD, ready.card, len(ready.card), sha256(ready.card)))
    made = pack(ready.record, uploads, to.name.rpartition("/")[2])
    registry = OciRegistry(to)
    there = registry.manifest(to.tag)
    if there is not None and there.digest != made.digest and not move_tag:
        raise OutputError(
            f"{to} is sha256:{there.digest[:12]} and is not moved", f"choose another tag, or {option('move_tag', True)}"
        )
    became: dict[str, list[str]] = {"uploaded": [], "mounted": [], "kept": []}
    sent = 0
    new = there is None or there.digest != made.digest
    if new:
        registry.put_blob(sha256(made.config), len(made.config), made.config)
        for layer, upload in made.layers:
            done = registry.put_blob(layer.digest, layer.size, upload.source, tuple(share_with))
            became[done].append(upload.path)
            sent += upload.size if done == "uploaded" else 0
        registry.put_manifest(f"sha256:{made.digest}", made.manifest)
    else:
        became["kept"] = [upload.path for _, upload in made.layers]
    signature = sign_artifact(registry, made.digest, len(made.manifest), key) if key is not None else ""
    if new:
        registry.put_manifest(to.tag, made.manifest)
    found = registry.manifest(to.tag)
    if found is None or found.digest != made.digest:
        raise HubError(
            f"{to} is not what was pushed: somebody else set the tag meanwhile", "look at it, and push again"
        )
    return OciPushed(
        str(to),
        made.digest,
        new,
        tuple(became["uploaded"]),
        tuple(became["mounted"]),
        tuple(became["kept"]),
        sent,
        ready.left_out,
        ready.record.content,
        signature,
        ready.notes,
    )
