"""`pull` from a bucket: a version with every byte held against the digests of its manifest."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adapterkit import disk
from adapterkit.bucket.layout import BucketFile, BucketReference, found_files, found_tag, missing, parse_bucket
from adapterkit.errors import CheckFailed, NotFound
from adapterkit.hub.files import IN_BUCKET, allowed
from adapterkit.hub.pull import pulling_folder
from adapterkit.registry.home import open_home
from adapterkit.registry.names import name_or_from
from adapterkit.registry.record import BESIDE, Record
from adapterkit.registry.register import register
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import Store

PARALLEL = 4
BLOCK = 16 << 20


@dataclass(frozen=True)
class BucketPulled:
    """As `OciPulled`: ``address`` is with the digest, ``new`` is False when it was there, ``left_out`` was not fetched."""

    record: Record
    address: str
    new: bool
    stored: int
    left_out: tuple[str, ...]


def pull_bucket(address: str, *, name: str = "", ignore_record: bool = False, home: Path | None = None) -> BucketPulled:
    """Register a version that lies in a bucket.

    Args:
        address: ``s3://bucket/folder[@tag|@sha256:digest]``.
        name: of the registry entry; by default the folder's.
        ignore_record: do not use the version's ``adapterkit.json``.

    Raises:
        CheckFailed: other bytes than the digests say, or a record that is about other files.
        UnsafeError: a path that leaves its folder, or is there twice.
        NotFound, AuthError, StoreError, UsageError, OutputError, RegistryError
    """
    asked = parse_bucket(address)
    name = name_or_from(name, asked.folder.name, asked)
    store = open_store(asked.folder)
    exact = asked
    if not asked.digest:
        found = found_tag(store, asked)
        if found is None:
            raise missing(asked)
        exact = BucketReference(asked.folder, "", found[0])
    files = found_files(store, exact)
    if files is None:
        raise missing(exact)
    wanted = [file for file in files if allowed(file.path) or file.path == BESIDE]
    if not any(file.path.endswith((".safetensors", ".gguf")) for file in wanted):
        raise NotFound(f"{asked} holds no safetensors or GGUF weights", "check what was pushed there")
    at = open_home(home)
    at.create()
    folder = pulling_folder(at, sum(file.size for file in wanted), str(asked))
    try:
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda file: _fetch(store, exact, file, folder), wanted))
        made = register(folder, name, meta={IN_BUCKET: str(exact)}, link=True, ignore_beside=ignore_record, home=home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    left = tuple(sorted({file.path for file in files} - {file.path for file in wanted}))
    return BucketPulled(made.record, str(exact), made.new, made.stored, left)


def _fetch(store: Store, exact: BucketReference, file: BucketFile, folder: Path) -> None:
    """One file into the folder.

    Raises:
        CheckFailed: its bytes are not those of its digest.
    """
    key = (exact.files / file.path).key
    there = store.head(key)
    if there is None or there.size != file.size:
        raise CheckFailed(f"{store.place(key)} is not what the manifest says", "push it again")
    target = disk.open_new_inside(folder, file.path)
    try:
        digest = hashlib.sha256()
        with disk.writing(file.path, folder):
            for start in range(0, file.size, BLOCK):
                data = store.read(key, start, min(BLOCK, file.size - start), there.etag)
                digest.update(data)
                disk.write_all(target, data)
    finally:
        os.close(target)
    if digest.hexdigest() != file.sha256:
        raise CheckFailed(f"the bytes of {store.place(key)} are not those of its digest", "remove it, and push again")
