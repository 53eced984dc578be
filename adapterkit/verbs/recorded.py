"""Whether an output that is in its place is that of a job: by what it says of itself, not by names, sizes or dates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import LocalFile, Source
from adapterkit.checkpoint.folder import RECORD
from adapterkit.checkpoint.listing import MAX_JSON, Listing
from adapterkit.checkpoint.publish import RECORD_BYTES, named_beside, part_name
from adapterkit.disk import read_regular
from adapterkit.errors import AdapterkitError, CheckpointError, NotFound, RegistryError, UnsafeError
from adapterkit.places import Address

if TYPE_CHECKING:
    from adapterkit.registry.record import Record
    from adapterkit.verbs.job import Job


def is_recorded(job: Job) -> bool:
    """Whether the output that is there is what this job would make: its record names this operation and these inputs, and
    the bytes are those that the record is about. Both are read for that as far as a record reads them. A report of a
    verification is asked what it is of. Of an output that says nothing of itself the answer is no.

    Raises:
        AuthError, StoreError
    """
    from adapterkit.provenance.record import made_alike
    from adapterkit.registry.beside import parse_beside

    assert job.out is not None
    there = job.in_store().place.listing() if isinstance(job.out, Address) else _listed(job.out)
    if job.alike is not None:
        if not isinstance(there, Listing) or job.out.name not in there.names:
            return False
        source = there.open(job.out.name)
        return source.size <= MAX_JSON and job.alike(source.read(0, source.size))
    data = None if job.record is None else _record_of(job)
    if job.record is None or data is None:
        return False
    try:
        found = parse_beside(data, str(job.out))
    except RegistryError:
        return False
    try:
        ours = parse_beside(job.record(there)[RECORD], str(job.out))
    except (CheckpointError, NotFound, UnsafeError):  # of an output: it is not whole
        return False
    return made_alike(found, ours) and found.identity == ours.identity and _bytes(found) <= _bytes(ours)


def _bytes(record: Record) -> set[tuple[int, str]]:
    """What a record says of files, whatever they are called: what goes next to an output comes later than its record."""
    return {(file.size, file.sha256) for file in record.files}


def _record_of(job: Job) -> bytes | None:
    if isinstance(job.out, Address):
        return job.in_store().place.recorded()
    assert job.out is not None
    try:
        return read_regular(job.out / RECORD if job.out.is_dir() else named_beside(job.out, RECORD), RECORD_BYTES)
    except (AdapterkitError, OSError):
        return None


def _listed(out: Path) -> Listing | Path:
    """An output on this disk: the folder, or its file or files by their names."""
    if out.is_dir():
        return out
    part = part_name(out)
    names = (path.name for path in out.parent.iterdir() if path == out or part.fullmatch(path.name))
    return _Files(out.parent, frozenset(names))


class _Files(Listing):
    """Some files of a folder."""

    def __init__(self, folder: Path, names: frozenset[str]) -> None:
        self.ref, self._folder, self._names = str(folder), folder, names

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def open(self, name: str) -> Source:
        if name not in self._names:
            raise NotFound(f"{self.ref}/{name} does not exist", "write it first")
        return LocalFile(self._folder / name)
