"""How versions lie in a bucket.

    s3://bucket/adapters/tickets/DIGEST/                   the files of a version, as a folder that every verb reads
    s3://bucket/adapters/tickets/DIGEST/manifest.json      their paths, sizes and sha256; it is written last
    s3://bucket/adapters/tickets/tags/v1                   which DIGEST the tag means

DIGEST is the sha256 of the manifest, so a folder means the same bytes for ever. A tag is one small object, which is written
only where there is none yet, or, where it may move, only over what was seen there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import CheckFailed, NotFound, UsageError
from adapterkit.foreign import json_value
from adapterkit.places import Address, address_of, writable
from adapterkit.registry.canonical import canonical, sha256
from adapterkit.registry.names import check_paths
from adapterkit.stores.store import Store, StoredObject

MANIFEST, TAGS = "manifest.json", "tags"
LATEST = "latest"
SCHEMA = 1
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST = 4 << 20  # bytes of a manifest
_LONGEST = 4096  # bytes of a tag


@dataclass(frozen=True)
class BucketReference:
    """A version in a bucket: the folder of its name, and a tag or the digest of its manifest (hex)."""

    folder: Address
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        which = f"sha256:{self.digest}" if self.digest else self.tag
        return f"{self.folder}@{which}"

    @property
    def files(self) -> Address:
        """The folder of the version's files; the digest has to be known."""
        return self.folder / self.digest

    @property
    def pointer(self) -> Address:
        """The object of the tag."""
        return self.folder / TAGS / self.tag


@dataclass(frozen=True)
class BucketFile:
    """One file of a version in a bucket."""

    path: str
    sha256: str
    size: int


def is_bucket(text: str) -> bool:
    """Whether a remote is a folder of an object store."""
    return address_of(text) is not None


def parse_bucket(text: str) -> BucketReference:
    """``s3://bucket/folder[@TAG|@sha256:DIGEST]``; without either the tag ``latest`` is meant.

    Raises:
        UsageError: it is none, or of a store that is not written.
    """
    place, sign, which = text.partition("@")
    folder = writable(place, "the remote")
    if not isinstance(folder, Address):
        raise UsageError(
            f"{text} is no folder in a store",
            "give it like s3://bucket/adapters/tickets@v1 (or gs://, az://, hf://buckets/)",
        )
    digest = which.removeprefix("sha256:") if which.startswith("sha256:") else ""
    tag = "" if digest else (which or LATEST)
    if (sign and not which) or (digest and not _DIGEST.fullmatch(digest)) or (tag and not _TAG.fullmatch(tag)):
        raise UsageError(f"'{which[:80]}' is no tag and no digest", f"give it like {folder}@v1 or {folder}@sha256:...")
    return BucketReference(folder, tag, digest)


def manifest_of(files: Sequence[BucketFile]) -> bytes:
    """The manifest of these files; equal files have an equal one."""
    rows = [{"path": one.path, "sha256": one.sha256, "size": one.size} for one in sorted(files, key=lambda f: f.path)]
    return canonical({"schema": SCHEMA, "files": rows})


def read_manifest(data: bytes, where: BucketReference) -> tuple[BucketFile, ...]:
    """The files that a manifest names.

    Raises:
        CheckFailed: it is not the one of its digest, or none.
        UnsafeError: a path would leave its folder, is there twice, or is a folder too.
    """
    if sha256(data) != where.digest:
        raise CheckFailed(f"the manifest of {where} is not that of its digest", "do not use it; push it again")
    try:
        said = json_value(data)
        if said["schema"] != SCHEMA:
            raise CheckFailed(f"{where} was pushed by a newer adapterkit", "update this one")
        files = [BucketFile(str(one["path"]), str(one["sha256"]), _whole(one["size"])) for one in said["files"]]
    except (ValueError, TypeError, KeyError):
        raise CheckFailed(f"the manifest of {where} is none", "push it again") from None
    check_paths([MANIFEST, *(file.path for file in files)], str(where))
    for file in files:
        if not _DIGEST.fullmatch(file.sha256):
            raise CheckFailed(f"{where} has no digest of {file.path}", "push it again")
    return tuple(files)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


def found_tag(store: Store, where: BucketReference) -> tuple[str, StoredObject] | None:
    """The digest that a tag means, and its object; None where there is no such tag.

    Raises:
        CheckFailed: what lies there is no tag.
    """
    there = store.head(where.pointer.key)
    if there is None:
        return None
    digest = ""
    if there.size <= _LONGEST:
        try:
            digest = str(json_value(store.read(there.key, 0, there.size, there.etag))["manifest"])
        except (ValueError, TypeError, KeyError):
            digest = ""
    if not _DIGEST.fullmatch(digest):
        raise CheckFailed(f"{where.pointer} is no tag of a version", "give another folder, or remove the object")
    return digest, there


def tag_bytes(digest: str) -> bytes:
    """What lies at a tag."""
    return canonical({"manifest": digest})


def found_files(store: Store, where: BucketReference) -> tuple[BucketFile, ...] | None:
    """The files of a version whose digest is known, from its manifest; None where there is none.

    Raises:
        CheckFailed, UnsafeError: see `read_manifest`.
    """
    there = store.head((where.files / MANIFEST).key)
    if there is None:
        return None
    if there.size > _MOST:
        raise CheckFailed(f"the manifest of {where} is larger than any", "do not use it")
    return read_manifest(store.read(there.key, 0, there.size, there.etag), where)


def missing(where: BucketReference) -> NotFound:
    """The error of a version that is not there."""
    return NotFound(f"{where} does not exist", "check the folder and the tag (latest, where none is said)")
