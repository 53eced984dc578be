"""Bundles: records and blobs in one file, for places without a network.

A bundle is an uncompressed tar that holds regular files only: ``bundle.json`` (what follows),
``records/<digest>.json``, then ``objects/<sha256>``. It is written by the standard library and read by the strict
reader below: any other type of member, name or order is refused before a byte is used, and every byte is checked
against its digest before it gets a name. Nothing is ever extracted to a path that the bundle chose. The same versions
give the same bundle, byte for byte.

A record arrives under the next free version of its name; its body and content stay what they were, so lineages hold. A
home that has the body already keeps its own version.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from adapterkit import disk
from adapterkit.errors import CheckFailed, NotFound, OutputError, RegistryError, UnsafeError
from adapterkit.places import Address, writable
from adapterkit.registry import blobs, chain, index, policies, refs, resolve, store, verbs
from adapterkit.registry.canonical import MAX_BYTES, canonical, parse, sha256
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.lineage import parents_of
from adapterkit.registry.names import check_alias, check_sha256
from adapterkit.registry.record import OpaqueRecord, Record, read
from adapterkit.stores.files import brought, making

FORMAT = 1
_HEAD = "bundle.json"
_MEMBER = re.compile(r"(?:records/([0-9a-f]{64})\.json|objects/([0-9a-f]{64}))")
_SECTOR = 512
_CHUNK = 4 << 20


@dataclass(frozen=True)
class Bundled:
    """What a bundle holds: versions, blobs and bytes of blobs."""

    path: str
    refs: tuple[str, ...]
    blobs: int
    bytes: int


@dataclass(frozen=True)
class Imported:
    """Which version each record of a bundle became, whether that is new, and the aliases that were set."""

    versions: tuple[tuple[str, str, bool], ...]
    aliases: tuple[str, ...]
    stored: int


def export_bundle(
    wanted: tuple[str, ...], to: Path | Address, *, parents: bool = True, home: Path | None = None
) -> Bundled:
    """Writes the versions that ``wanted`` means, with all their registered ancestors unless ``parents`` is off.

    Raises:
        NotFound: some bytes are not in this registry.
        OutputError: ``to`` exists or cannot be written.
    """
    place, at = writable(to, "the bundle", "file"), open_home(home)
    if isinstance(place, Address):
        with making(place) as made:
            return replace(export_bundle(wanted, made, parents=parents, home=home), path=str(place))
    to = place
    if os.path.lexists(to):
        raise OutputError(f"{to} exists", "name a file that does not")
    records = _closure(at, [resolve.find(at, ref) for ref in wanted], parents)
    sizes: dict[str, int] = {}
    for record in records:
        for file in record.files:
            if file.stored:
                if not blobs.has(at, file.sha256, file.size):
                    raise NotFound(f"{record.ref} has no bytes of {file.path} in {at.root}", "pull or import it first")
                sizes[file.sha256] = file.size
    head = {
        "type": "adapterkit.bundle",
        "format": FORMAT,
        "records": [
            {"digest": record.digest, "aliases": verbs.aliases(at, record.name, record.version)} for record in records
        ],
        "blobs": [{"sha256": digest, "size": sizes[digest]} for digest in sorted(sizes)],
    }
    with disk.writing(str(to), to.parent), disk.staging(to, resume=False) as folder:
        with open(disk.open_new_inside(folder, to.name), "wb") as out:
            _write_member(out, _HEAD, canonical({**head, "sum": sha256(canonical(head))}) + b"\n")
            for record in records:
                _write_member(out, f"records/{record.digest}.json", record.data)
            for digest in sorted(sizes):
                _write_blob(out, at, digest, sizes[digest])
            out.write(b"\0" * _SECTOR * 2)
            out.flush()
            disk.fsync(out.fileno())
        disk.publish_files(folder, {to.name: to}, force=False)
    return Bundled(str(to), tuple(record.ref for record in records), len(sizes), sum(sizes.values()))


def import_bundle(path: Path | Address, *, aliases: bool = False, home: Path | None = None) -> Imported:
    """Adds what a bundle holds. Blobs are stored as they are read and records only once all of it was read and fits.

    A damaged record that the bundle holds in exactly the version that the journal names is put back in its place.
    ``aliases`` also sets the aliases it carries, where the name has none of that name yet.

    Raises:
        UnsafeError: a member is a link, a device, or has a name that no bundle of ours has.
        RegistryError: the bundle is damaged, incomplete or of a newer format.
    """
    path, at = brought(writable(path, "the bundle", "file")), open_home(home)
    at.create()
    with open(disk.open_regular(path), "rb") as file, at.store_lock(shared=True):
        reader = _Reader(file, str(path))
        head = _read_head(reader)
        records = _read_records(reader, head)
        _check_space(at, path, head)
        stored = 0
        for entry in head["blobs"]:
            reader.expect(f"objects/{entry['sha256']}", entry["size"])
            blob = blobs.put_chunks(at, reader.chunks(), entry["sha256"], entry["size"])
            stored += blob.size if blob.new else 0
        reader.end()
        versions, moved = [], []
        for record, names in records:
            store.heal(at, record)
            added = store.add_record(at, record.registered("", 0), record.name)
            versions.append((record.ref, added.record.ref, added.new))
            for alias in names if aliases else ():
                try:
                    gate = policies.gate_of(at, added.record, alias)
                    why = f"imported from {path.name}"[:200]
                    where = (added.record.name, alias, added.record.version, added.record.digest)
                    refs.move(at, *where, expected=0, by=chain.who(), why=why, gate=gate)
                    moved.append(f"{record.name}@{alias}")
                except CheckFailed:
                    pass  # It points somewhere here, or asks for more than this version has; that is the user's to move.
    return Imported(tuple(versions), tuple(moved), stored)


def _closure(at: Home, wanted: list[Record], parents: bool) -> list[Record]:
    """The records with their registered ancestors, each once, in the order in which versions were made."""

    def ask(found: index.Index) -> dict[str, Record]:
        seen: dict[str, Record] = {}
        todo = list(wanted)
        while todo:
            record = todo.pop()
            if record.digest in seen:
                continue
            seen[record.digest] = record
            for parent in parents_of(record) if parents else ():
                rows = found.by_content(parent.content) if parent.content else []
                if not rows and parent.identity is not None:
                    rows = found.by_identity(parent.identity)
                rows.sort(key=lambda row: (row.digest != parent.record, row.hidden, -row.version))
                todo += [store.load_known(at, row.name, row.version) for row in rows[:1]]
        return seen

    return sorted(index.ask(at, ask).values(), key=lambda record: (record.name, record.version))


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.GNU_FORMAT)


def _write_member(out: BinaryIO, name: str, data: bytes) -> None:
    out.write(_header(name, len(data)) + data + b"\0" * (-len(data) % _SECTOR))


def _write_blob(out: BinaryIO, at: Home, digest: str, size: int) -> None:
    import hashlib

    out.write(_header(f"objects/{digest}", size))
    hasher, done = hashlib.sha256(), 0
    with open(at.blob(digest), "rb") as source:
        while block := source.read(_CHUNK):
            hasher.update(block)
            out.write(block)
            done += len(block)
    if done != size or hasher.hexdigest() != digest:
        raise RegistryError(f"blob {digest[:12]} is damaged", "run fsck")
    out.write(b"\0" * (-size % _SECTOR))


class _Reader:
    """Reads the members of a bundle one after the other, regular files only."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.file = file
        self.where = where
        self.name = ""
        self.size = 0
        self.left = 0

    def next(self) -> bool:
        """Goes to the next member; False at the end mark."""
        block = self._take(_SECTOR)
        if block == b"\0" * _SECTOR:
            return False
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise RegistryError(f"{self.where} is not a bundle: {error}", "fetch it again") from None
        if info.type != tarfile.REGTYPE:
            raise UnsafeError(f"{self.where} holds a member that is not a plain file, {info.name!a}")
        if info.name != _HEAD and not _MEMBER.fullmatch(info.name):
            raise UnsafeError(f"{self.where} holds a member that does not belong in a bundle, {info.name!a}")
        if info.size < 0:
            raise RegistryError(f"{self.where} holds a member of negative size, {info.name}")
        self.name, self.size, self.left = info.name, info.size, info.size
        return True

    def expect(self, name: str, size: int | None = None) -> None:
        """Goes to the next member, which must be this one."""
        if not self.next() or self.name != name or size not in (None, self.size):
            raise RegistryError(f"{self.where} does not hold {name} where its head says so", "fetch it again")

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the member."""
        while self.left:
            block = self._take(min(_CHUNK, self.left))
            self.left -= len(block)
            yield block
        self._take(-self.size % _SECTOR)

    def data(self) -> bytes:
        """All bytes of a small member."""
        if self.size > MAX_BYTES:
            raise RegistryError(f"{self.name} of {self.where} is larger than {MAX_BYTES} bytes")
        return b"".join(self.chunks())

    def end(self) -> None:
        """The end of the bundle must be here: two sectors of zeros, and then nothing."""
        if self.next():
            raise RegistryError(f"{self.where} holds {self.name}, which its head does not name")
        if self._take(_SECTOR) != b"\0" * _SECTOR or self.file.read(1):
            raise RegistryError(f"{self.where} goes on after its end", "fetch it again")

    def _take(self, count: int) -> bytes:
        block = self.file.read(count)
        if len(block) != count:
            raise RegistryError(f"{self.where} ends too early", "fetch it again")
        return block


def _read_head(reader: _Reader) -> dict[str, Any]:
    reader.expect(_HEAD)
    head = parse(reader.data(), f"{_HEAD} of {reader.where}")
    try:
        if head.pop("sum") != sha256(canonical(head)):
            raise RegistryError(f"{_HEAD} of {reader.where} is damaged", "fetch it again")
        if head["type"] != "adapterkit.bundle" or type(head["format"]) is not int:
            raise KeyError("type")
        if head["format"] > FORMAT:
            raise RegistryError(f"{reader.where} is a bundle of format {head['format']}", "upgrade adapterkit")
        for entry in head["records"]:
            check_sha256(entry["digest"], "a record of the bundle")
            for alias in entry["aliases"]:
                check_alias(alias)
        for entry in head["blobs"]:
            check_sha256(entry["sha256"], "a blob of the bundle")
            if type(entry["size"]) is not int or entry["size"] < 0:
                raise KeyError("size")
    except (KeyError, TypeError, AttributeError):
        raise RegistryError(f"{_HEAD} of {reader.where} is not the head of a bundle") from None
    return dict(head)


def _read_records(reader: _Reader, head: dict[str, Any]) -> list[tuple[Record, list[str]]]:
    blobs_here = {entry["sha256"]: entry["size"] for entry in head["blobs"]}
    found = []
    for entry in head["records"]:
        name = f"records/{entry['digest']}.json"
        reader.expect(name)
        record = read(reader.data(), f"{name} of {reader.where}")
        if isinstance(record, OpaqueRecord):
            raise RegistryError(f"{name} of {reader.where} was written by a newer adapterkit", "upgrade adapterkit")
        if record.digest != entry["digest"] or not record.version:
            raise RegistryError(f"{name} of {reader.where} holds another record")
        for file in record.files:
            if file.stored and blobs_here.get(file.sha256) != file.size:
                raise RegistryError(f"{reader.where} lacks the bytes of {file.path} of {record.ref}")
        found.append((record, list(entry["aliases"])))
    return found


def _check_space(at: Home, path: Path, head: dict[str, Any]) -> None:
    need = sum(entry["size"] for entry in head["blobs"] if not blobs.has(at, entry["sha256"], entry["size"]))
    free = shutil.disk_usage(at.incoming).free
    if need > free:
        raise OutputError(
            f"{path} takes {need} bytes and the disk of {at.root} has {free}", "free some space and run it again"
        )
