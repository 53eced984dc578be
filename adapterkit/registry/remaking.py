"""Versions that are kept as their recipe: the record says how they were made and which bytes came out, and the large files
are made again when somebody asks for them.

Who makes them is handed in (`adapterkit.checkpoint.finders.set_maker`), since the verbs lie above the registry. What was
made counts only when its files have the digests of the record; then they are blobs again, until gc frees them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapterkit import disk
from adapterkit.checkpoint.finders import maker
from adapterkit.errors import AdapterkitError, CheckFailed, NotFound, UsageError
from adapterkit.registry import blobs, index
from adapterkit.registry.gather import gather
from adapterkit.registry.home import Home
from adapterkit.registry.record import NOT_CONTENT, FileEntry, Record

OPERATIONS = ("merge", "convert", "combine", "resize", "extract")
TEMPORARY = ".remake-"
"""What the names of folders begin with in which versions are made again; gc sweeps those that a killed one left."""
SMALL = 1 << 16
"""Bytes up to which a file is kept anyway: configs and tokenizers."""


def can_drop(file: FileEntry) -> bool:
    """Whether the bytes of a file are left out of a version that is kept as its recipe."""
    return file.path not in NOT_CONTENT and file.size > SMALL


def is_recipe(record: Record) -> bool:
    """Whether some bytes of a version are made again when they are asked for."""
    operation = record.operation
    made = operation is not None and operation.name in OPERATIONS
    return made and record.kind != "base" and any(not file.stored for file in record.files)


@contextmanager
def made_again(at: Home, record: Record, base: str | Path | None = None) -> Iterator[Mapping[str, Path]]:
    """The files that a version's operation gives now, by their path; they are gone after the block.

    Raises:
        UsageError: the record does not say how, or of an operation that is not carried out again.
        CheckFailed: what comes out has other bytes.
        NotFound: something that it was made from is not here.
    """
    operation = record.operation
    name = record.ref or record.name or "this"
    carry_out = maker()
    if operation is None or operation.name not in OPERATIONS or carry_out is None:
        how = operation.name if operation is not None else "nothing that is recorded"
        raise UsageError(f"{name} was made by {how}, which is not carried out again", "keep its bytes")
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=at.root) as temporary:
        try:
            made = carry_out(at, record, Path(temporary), base)
        except (NotFound, CheckFailed):
            raise
        except AdapterkitError as error:
            raise CheckFailed(f"{name} cannot be made again: {error.message}", error.hint or "keep its bytes") from None
        found = dict(gather(made).files)
        for file in record.files:
            if file.path in NOT_CONTENT or (file.stored and not can_drop(file)):
                continue
            if file.path not in found:
                raise CheckFailed(f"{name} was made again without {file.path}", "keep its bytes")
            digest, _ = disk.hash_file(found[file.path])
            if digest != file.sha256:
                raise CheckFailed(
                    f"{name} was made again and {file.path} has other bytes than its record says",
                    "another version of adapterkit, of a library or of the processor made it; keep its bytes",
                )
        yield found


def bring_back(at: Home, record: Record, base: str | Path | None = None) -> int:
    """Makes the files of a version again and stores them; how many bytes that were not there.

    Raises:
        UsageError, CheckFailed, NotFound: as `made_again`.
        OutputError: the disk is full or refuses.
    """
    stored = 0
    with made_again(at, record, base) as found, at.store_lock(shared=True):
        for file in record.files:
            if file.path in found and not blobs.has(at, file.sha256, file.size):
                blob = blobs.put_file(at, found[file.path])
                if blob.sha256 != file.sha256:
                    raise CheckFailed(f"{file.path} changed while it was stored", "run it again")
                stored += blob.size if blob.new else 0
    return stored


def parent_ref(at: Home, content: str) -> str:
    """The registered version with a content whose bytes are here or can be made; empty where there is none."""
    rows = index.ask(at, lambda found: found.by_content(content))
    shown = [row for row in rows if not row.hidden]
    return f"{shown[-1].name}@{shown[-1].version}" if shown else ""
