"""`push` to a bucket: the files first, then their manifest, and the tag last.

What was cut off lies under no tag and has no manifest; pushing again sends it anew. A folder means the same bytes for ever,
so two who push the same version at one time do each other no harm.
"""

from __future__ import annotations

import hashlib
import io
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from adapterkit.bucket.layout import (
    MANIFEST,
    BucketFile,
    BucketReference,
    found_tag,
    manifest_of,
    parse_bucket,
    tag_bytes,
)
from adapterkit.errors import CheckFailed, OutputError, StoreError, UsageError, option
from adapterkit.hub.files import CARD, Upload, prepare
from adapterkit.hub.push import source_of, with_base
from adapterkit.registry.canonical import sha256
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import Store

PART = 16 << 20  # bytes that are sent at a time
_BY_DIGEST = 12  # digits of the content's digest, by which servers ask


@dataclass(frozen=True)
class BucketPushed:
    """What is in the bucket now.

    Attributes:
        address: ``s3://bucket/folder@tag``.
        digest: of the manifest, hex.
        folder: where the files lie, for any verb that reads an adapter or a model.
        new: whether the tag was set or moved.
        uploaded: files that were sent; ``sent`` are their bytes.
        left_out: files of the version that are not published.
        content: digest of what was published.
        notes: what a user should know.
    """

    address: str
    digest: str
    folder: str
    new: bool
    uploaded: tuple[str, ...]
    sent: int
    left_out: tuple[str, ...]
    content: str
    notes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The folder of the version in the bucket."""
        return self.folder


def push_bucket(
    ref: str,
    address: str,
    *,
    tag: str | None = None,
    base_id: str = "",
    move_tag: bool = False,
    home: Path | None = None,
) -> BucketPushed:
    """Publish a version (or a folder) in a bucket.

    Args:
        ref: a registry name, or a folder.
        address: ``s3://bucket/folder[@tag]``.
        tag: the tag, where the address names none.
        base_id: the Hub id of the base, where the record does not know it.
        move_tag: let a tag that means another version mean this one.

    Raises:
        UnsafeError: a link, a secret, or a path of this machine.
        OutputError: the tag means another version, or moved meanwhile.
        CheckFailed: the bytes of a file are not those of the record.
        AuthError, StoreError, NotFound, RegistryError, UsageError
    """
    to = parse_bucket(address)
    if to.digest:
        raise UsageError(f"{address} names a digest, and what is pushed has its own", "give a tag, or nothing")
    if tag is not None:
        if "@" in address and to.tag != tag:
            raise UsageError(f"{address} and {option('tag', tag)} name two tags", "give one")
        to = parse_bucket(f"{to.folder}@{tag}")
    record, files = source_of(ref, home)
    if base_id:
        record = with_base(record, base_id)
    ready = prepare(record, files)
    uploads = list(ready.uploads)
    if ready.card is not None:
        uploads.append(Upload(CARD, ready.card, len(ready.card), sha256(ready.card)))
    manifest = manifest_of([BucketFile(one.path, one.sha256, one.size) for one in uploads])
    store = open_store(to.folder)
    exact = BucketReference(to.folder, "", sha256(manifest))
    before = found_tag(store, to)
    if before is not None and before[0] != exact.digest and not move_tag:
        raise OutputError(
            f"{to} is sha256:{before[0][:12]} and is not moved", f"choose another tag, or {option('move_tag', True)}"
        )
    vouched = _vouched(store, exact, manifest)
    left = _left(store, exact, uploads) if vouched else uploads
    for upload in left:
        _send(store, exact, upload)
    if not vouched:
        store.put((exact.files / MANIFEST).key, manifest)
    by_digest = BucketReference(to.folder, ready.record.content[:_BY_DIGEST])
    store.put(by_digest.pointer.key, tag_bytes(exact.digest), absent=True)
    if before is None:
        store.put(to.pointer.key, tag_bytes(exact.digest), absent=True)
    elif before[0] != exact.digest:
        store.put(to.pointer.key, tag_bytes(exact.digest), over=before[1].etag)
    now = found_tag(store, to)
    if now is None or now[0] != exact.digest:
        raise OutputError(f"{to} is not what was pushed: somebody else set the tag meanwhile", "look, and push again")
    notes = list(ready.notes)
    if store.conditions is False:
        notes.append(f"{store.root} keeps no conditions on writing: two who set one tag at one time are not kept apart")
    return BucketPushed(
        str(to),
        exact.digest,
        str(exact.files),
        before is None or before[0] != exact.digest,
        tuple(upload.path for upload in left),
        sum(upload.size for upload in left),
        ready.left_out,
        ready.record.content,
        tuple(notes),
    )


def _vouched(store: Store, exact: BucketReference, manifest: bytes) -> bool:
    """Whether the manifest of an earlier push, which is written last, is there as it has to be."""
    there = store.head((exact.files / MANIFEST).key)
    if there is None or there.size != len(manifest):
        return False
    return store.read(there.key, 0, there.size, there.etag) == manifest


def _left(store: Store, exact: BucketReference, uploads: list[Upload]) -> list[Upload]:
    """The files of an earlier push that are gone, or of another size."""
    held = {one.key: one.size for one in store.entries(f"{exact.files.key}/")}
    return [upload for upload in uploads if held.get((exact.files / upload.path).key) != upload.size]


def _send(store: Store, exact: BucketReference, upload: Upload) -> None:
    """Send one file, and see that what was sent is what was looked through before."""
    key = (exact.files / upload.path).key
    with ExitStack() as held:
        source: IO[bytes]
        if isinstance(upload.source, bytes):
            source = io.BytesIO(upload.source)
        else:
            try:
                source = held.enter_context(open(upload.source, "rb"))
            except OSError as error:
                raise OutputError(f"{upload.path} cannot be read ({error.strerror})", "check the disk") from None
        if upload.size <= PART:
            data = source.read(upload.size + 1)
            _same(upload, hashlib.sha256(data).hexdigest(), len(data))
            store.put(key, data)
            return
        _send_parts(store, key, upload, source)


def _send_parts(store: Store, key: str, upload: Upload, source: IO[bytes]) -> None:
    place = store.place(key)
    assembly = store.begin(key, {}, place.with_name(f".{place.name}.partial"))
    try:
        digest, total = hashlib.sha256(), 0
        etags: dict[int, str] = {}
        part = max(PART, -(-upload.size // 9000))
        assembly.expect(range(1, -(-upload.size // part) + 1))
        while data := source.read(part):
            digest.update(data)
            total += len(data)
            etags[len(etags) + 1] = assembly.put(len(etags) + 1, data)
        _same(upload, digest.hexdigest(), total)
        if assembly.complete(etags, absent=False) is None:
            there = store.head(key)  # the answer to an earlier attempt may have been lost
            if there is None or there.size != upload.size:
                raise StoreError(f"the upload of {store.place(key)} is gone", "push it again")
        assembly.release()
    except BaseException:
        assembly.abort()
        raise


def _same(upload: Upload, digest: str, size: int) -> None:
    if (digest, size) != (upload.sha256, upload.size):
        raise CheckFailed(f"{upload.path} changed while it was sent", "push it again")
