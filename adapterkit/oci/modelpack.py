"""A version as an artifact of the CNCF ModelPack specification (github.com/modelpack/model-spec, `docs/spec.md`,
`docs/config.md`, `specs-go/v1`): one layer for each file, neither packed nor compressed.

So a blob of the registry is a file as it is, with the sha256 that records name; headers can be read by range, and equal files
of a base and of what was made of it are one blob. The manifest holds no time of its own: the same version has the same digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckFailed
from adapterkit.oci.client import MANIFEST, Descriptor, Manifest, descriptor
from adapterkit.registry.canonical import canonical, sha256
from adapterkit.registry.names import check_paths

if TYPE_CHECKING:
    from adapterkit.hub.files import Upload
    from adapterkit.registry.record import Record

ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
_WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
_WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
_DOC = "application/vnd.cncf.model.doc.v1.raw"
RAW = (
    _WEIGHT,
    _WEIGHT_CONFIG,
    _DOC,
    "application/vnd.cncf.model.code.v1.raw",
    "application/vnd.cncf.model.dataset.v1.raw",
)
FILEPATH = "org.cncf.model.filepath"
_METADATA = "org.cncf.model.file.metadata+json"
TITLE = "org.opencontainers.image.title"
META = "oci"
"""The key of a record's ``meta`` that says where it was pulled from; it is not pushed again."""
_LAYERS = 20_000


@dataclass(frozen=True)
class PackedArtifact:
    """An artifact to be pushed: its manifest, its config, and a descriptor for each file."""

    manifest: bytes
    config: bytes
    layers: tuple[tuple[Descriptor, Upload], ...]

    @property
    def digest(self) -> str:
        return sha256(self.manifest)


def pack(record: Record, uploads: Sequence[Upload], name: str) -> PackedArtifact:
    """The artifact of a version.

    Args:
        record: of exactly these files.
        name: what the model is called in the artifact's own config.
    """
    layers = tuple((_layer(upload), upload) for upload in sorted(uploads, key=lambda one: one.path))
    config = canonical(_config(record, layers, name))
    about = {
        "org.opencontainers.image.title": name,
        "org.opencontainers.image.description": f"{record.kind}, content sha256:{record.content}",
        "dev.adapterkit.kind": record.kind,
        "dev.adapterkit.content": f"sha256:{record.content}",
    }
    base = record.base.id if record.base is not None else ""
    if base:
        about["org.opencontainers.image.base.name"] = base
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": ARTIFACT,
        "config": Descriptor(CONFIG, sha256(config), len(config), {}).to_json(),
        "layers": [layer.to_json() for layer, _ in layers],
        "annotations": about,
    }
    return PackedArtifact(canonical(manifest), config, layers)


def _layer(upload: Upload) -> Descriptor:
    if upload.path.endswith((".safetensors", ".gguf")):
        kind = _WEIGHT
    elif upload.path.endswith((".md", ".intoto.json", ".sig")) or upload.path.split("/")[-1].startswith(
        ("LICEN", "NOTICE", "USE_POLICY")
    ):
        kind = _DOC
    else:
        kind = _WEIGHT_CONFIG
    plain = {"name": upload.path, "mode": 0o644, "uid": 0, "gid": 0, "size": upload.size, "typeflag": ord("0")}
    notes = {
        FILEPATH: upload.path,
        TITLE: upload.path,
        _METADATA: json.dumps({**plain, "mtime": "1970-01-01T00:00:00Z"}, sort_keys=True),
    }
    return Descriptor(kind, upload.sha256, upload.size, notes)


def _config(record: Record, layers: Sequence[tuple[Descriptor, Upload]], name: str) -> dict[str, Any]:
    """``schema/config-schema.json`` of the specification; nothing is said that is not known."""
    gguf = any(upload.path.endswith(".gguf") for _, upload in layers)
    said: dict[str, Any] = {"format": "gguf" if gguf else "safetensors"}
    if record.kind == "quantized" and record.method:
        said["quantization"] = record.method
    descriptor_: dict[str, Any] = {"name": name, "createdAt": record.created, "title": f"{name} ({record.kind})"}
    licences = [value for key, value in record.meta.items() if key == "license"]
    if licences:
        descriptor_["licenses"] = licences
    return {
        "descriptor": descriptor_,
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{layer.digest}" for layer, _ in layers]},
        "config": said,
    }


@dataclass(frozen=True)
class ArtifactFile:
    """One file of an artifact: its path, and the blob that holds it."""

    path: str
    digest: str
    size: int


def files_of(manifest: Manifest, where: str) -> tuple[ArtifactFile, ...]:
    """The files of an artifact; those of other clients (ORAS, KitOps without archives) name them by their title.

    Raises:
        CheckFailed: a layer has no digest, no name, or is an archive.
        UnsafeError: a name would leave its folder, is there twice, or is a folder too.
    """
    value: Mapping[str, Any] = manifest.value
    rows = value.get("layers")
    if value.get("mediaType") not in (None, MANIFEST) or not isinstance(rows, list) or not rows:
        raise CheckFailed(f"{where} is no artifact with layers", "give the manifest of one model")
    if len(rows) > _LAYERS:
        raise CheckFailed(f"{where} has {len(rows):,} layers", "it is no model")
    found = []
    for row in rows:
        layer = descriptor(row, "a layer")
        if layer.media_type.endswith(("tar", "+gzip", "+zstd", "tar.gzip", "tar.gz")):
            raise CheckFailed(
                f"{where} has a layer that is an archive ({layer.media_type})", "push it with one layer for each file"
            )
        path = layer.annotations.get(FILEPATH) or layer.annotations.get(TITLE, "")
        found.append(ArtifactFile(path, layer.digest, layer.size))
    check_paths((file.path for file in found), where)
    return tuple(found)
