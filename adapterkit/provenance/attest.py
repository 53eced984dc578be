"""Provenance that other tools read: an in-toto Statement with a SLSA provenance predicate, made of the record beside an output.

Every verb's record goes through here, so there is one place that says how a record becomes a statement:

    subject                  every file of the output, by sha256
    buildType                urn:adapterkit:build:VERB:v1
    externalParameters       the parameters of the operation, and each parent's own (its weight)
    resolvedDependencies     every parent: Hub commit, digests of its files where they are at hand, its identity else
    runDetails.builder       adapterkit and its version; no host, no user, no path
    runDetails.byproducts    adapterkit.json, which holds fidelity and verification

Digests that are not those of a file have names of their own: ``adapterkitContent`` and ``adapterkitMerkle`` (see
`adapterkit.registry.record` and `adapterkit.registry.identity`). The same output and inputs give the same statement.

Formats: in-toto attestation framework v1 (Statement, ResourceDescriptor, DigestSet), SLSA provenance v1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.bases import open_model
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.objects import ObjectFolder, object_file
from adapterkit.checkpoint.publish import part_name
from adapterkit.errors import AdapterkitError, NotFound, UsageError
from adapterkit.places import Address, address_of, readable, writable
from adapterkit.provenance.record import entry, hashed
from adapterkit.registry import index, store
from adapterkit.registry.beside import beside_path, check_beside, parse_beside
from adapterkit.registry.canonical import MAX_BYTES, sha256, thaw
from adapterkit.registry.gather import gather, gather_listed
from adapterkit.registry.home import open_home
from adapterkit.registry.identity import Identity, compare
from adapterkit.registry.record import BESIDE, NOT_CONTENT, UNDATED, FileEntry, Parent, Record
from adapterkit.registry.weights import cheap, identity_of
from adapterkit.stores.files import deliver

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
NAME = "adapterkit.intoto.json"


@dataclass(frozen=True)
class Attested:
    """``path`` of the statement; how many files it vouches for, and how many digests of inputs it names."""

    path: Path | Address
    subjects: int
    dependencies: int


def attest(path: str | Path | Address, inputs: Iterable[str | Path] = (), *, strict: bool = True) -> Attested:
    """Writes a statement of provenance beside an output of adapterkit.

    Args:
        path: the folder or file that a verb made, with its ``adapterkit.json``.
        inputs: what it was made from (paths or registry names), so that their files are named by sha256 too; what is
            registered is found by itself.
        strict: an input that the record does not name is an error.

    Raises:
        NotFound: there is no such output, or no record beside it.
        CheckFailed: the record describes other files than are there.
        UsageError: the record does not say how it was made, or an input is not one that it names.
        OutputError: the statement cannot be written.
    """
    place = writable(path, "what is attested")
    out = _Stored.at(place) if isinstance(place, Address) else _Local(place.expanduser())
    if not out.exists:
        raise NotFound(f"{out.place} does not exist", "give the folder or file that was made")
    data = out.record_bytes()
    if data is None:
        raise NotFound(f"{out.record_place} does not exist", "only outputs of adapterkit say how they were made")
    record = parse_beside(data, str(out.record_place))
    files = out.files()
    check_beside(out.place, record, files)
    known, left = _matched(record.parents, [_place(ref) for ref in inputs])
    if left and strict:
        raise UsageError(f"{left[0]} is none of what the record names", "give what the output was made from")
    made = statement(record, files, data, known)
    out.write((json.dumps(made, indent=2) + "\n").encode())
    target = out.statement_place
    found = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    return Attested(target, len(made["subject"]), len(found))


class _Local:
    """An output here."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.exists = place.exists() or bool(parts_of(place))
        self.record_place = beside_path(place)
        self.statement_place = place / NAME if place.is_dir() else place.with_name(f"{place.name}.{NAME}")

    def record_bytes(self) -> bytes | None:
        """What lies beside it as its record."""
        try:
            return disk.read_regular(self.record_place, MAX_BYTES)
        except NotFound:
            return None

    def files(self) -> list[FileEntry]:
        """Its files, hashed."""
        if not self.place.exists():
            return [entry(part.name, part) for part in parts_of(self.place)]
        return [entry(inside, real) for inside, real in gather(self.place).files]

    def write(self, data: bytes) -> None:
        """The statement, beside it."""
        with disk.writing(NAME, self.statement_place.parent):
            disk.write_file(self.statement_place, data)


class _Stored:
    """An output in a store. Its bytes are read and hashed as a stream; nothing is kept of them here."""

    def __init__(self, place: Address, sources: Mapping[str, Source], folder: bool) -> None:
        self.place, self._sources = place, sources
        self.exists = bool(sources)
        self.record_place = place / BESIDE if folder else place.with_name(f"{place.name}.{BESIDE}")
        self.statement_place = place / NAME if folder else place.with_name(f"{place.name}.{NAME}")

    @classmethod
    def at(cls, place: Address) -> _Stored:
        """A folder, or a file or the parts of a set in its place.

        Raises:
            AuthError, StoreError, UsageError
        """
        own = object_file(place)
        if own is not None:
            return cls(place, {place.name: own}, folder=False)
        try:
            return cls(place, dict(gather_listed(ObjectFolder(place))), folder=True)
        except NotFound:
            if place.suffix != ".gguf":
                return cls(place, {}, folder=True)
        beside = ObjectFolder(place.parent)
        parts = {name: beside.open(name) for name in sorted(beside.names) if part_name(place).fullmatch(name)}
        return cls(place, parts, folder=False)

    def record_bytes(self) -> bytes | None:
        """What lies beside it as its record."""
        found = object_file(self.record_place)
        return None if found is None else found.read(0, min(found.size, MAX_BYTES + 1))

    def files(self) -> list[FileEntry]:
        """Its files, hashed."""
        return [FileEntry(name, one.size, hashed(one)) for name, one in self._sources.items()]

    def write(self, data: bytes) -> None:
        """The statement, beside it."""
        deliver(self.statement_place, data)


def statement(
    record: Record, files: Sequence[FileEntry], beside: bytes, known: Sequence[Sequence[FileEntry]]
) -> dict[str, Any]:
    """The statement about ``files`` as plain JSON.

    Args:
        record: that describes the files; ``beside`` are its bytes.
        known: the files of each parent, as far as they are at hand.

    Raises:
        UsageError: as in `attest`.
    """
    operation = record.operation
    if operation is None:
        raise UsageError("the record does not say how these files were made", "attest what a verb made")
    dependencies = [
        one for parent, found in zip(record.parents, known, strict=True) for one in _resolved(parent, found)
    ]
    run: dict[str, Any] = {
        "builder": {"id": f"urn:{operation.tool}:cli", "version": {operation.tool: operation.tool_version}},
        "byproducts": [
            {"name": "adapterkit.json", "digest": {"sha256": sha256(beside)}, "mediaType": "application/json"}
        ],
    }
    if record.created != UNDATED:
        run["metadata"] = {"finishedOn": record.created}
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": file.path, "digest": {"sha256": file.sha256}} for file in files if file.path not in NOT_CONTENT
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"urn:adapterkit:build:{operation.name}:v1",
                "externalParameters": {
                    **thaw(operation.parameters),
                    "inputs": [
                        {"role": parent.role, "name": parent.label, **thaw(parent.parameters)}
                        for parent in record.parents
                    ],
                },
                "internalParameters": {},
                "resolvedDependencies": dependencies,
            },
            "runDetails": run,
        },
    }


def known_files(record: Record) -> list[Sequence[FileEntry]]:
    """The files of every parent that is registered here; none of the others."""
    return _matched(record.parents, [])[0]


def _matched(
    parents: Sequence[Parent], inputs: Sequence[Path | Address]
) -> tuple[list[Sequence[FileEntry]], list[Path | Address]]:
    """The files of every parent: of the input that has its content or identity, else as registered here; and the inputs
    that are none of them."""
    left = {path: _files(path) for path in inputs}
    found: list[Sequence[FileEntry]] = []
    for parent in parents:
        same = next((path for path, files in left.items() if _is(parent, path, files)), None)
        found.append(left.pop(same) if same is not None else _registered(parent) or ())
    return found, list(left)


def _is(parent: Parent, path: Path | Address, files: Sequence[FileEntry]) -> bool:
    if parent.content:
        return _content(files) == parent.content
    if parent.identity is None:
        return False
    try:
        opened = open_model(str(path) if isinstance(path, Address) else path)
    except AdapterkitError:
        return False
    found = compare(parent.identity, identity_of(opened, cheap(opened)))
    return found.fits is not False and bool(found.agree)


def _content(files: Sequence[FileEntry]) -> str:
    return Record("adapter", files=tuple(files)).content


def _registered(parent: Parent) -> Sequence[FileEntry] | None:
    """The files of a parent that is registered here."""
    at = open_home()
    if not parent.content or not at.exists:
        return None
    for row in index.ask(at, lambda found: found.by_content(parent.content)):
        try:
            return store.load_known(at, row.name, row.version).files
        except AdapterkitError:
            continue
    return None


def _resolved(parent: Parent, files: Sequence[FileEntry]) -> list[dict[str, Any]]:
    """ResourceDescriptors of one parent: itself, then its files."""
    identity = parent.identity or Identity()
    digest = {}
    if parent.content:
        digest["adapterkitContent"] = parent.content
    if identity.merkle:
        digest["adapterkitMerkle"] = identity.merkle
    if identity.commit:
        digest["gitCommit"] = identity.commit
    hub = parse_hub(identity.id) if identity.id else None
    repo, commit = (hub.repo, identity.commit) if hub is not None else ("", "")
    name = parent.label or parent.role
    one: dict[str, Any] = {
        "name": name,
        "uri": f"pkg:huggingface/{repo}{f'@{commit}' if commit else ''}"
        if repo
        else f"urn:adapterkit:input:{parent.role}",
        "annotations": {
            "role": parent.role,
            **({"record": parent.record} if parent.record else {}),
            **{level: identity.level(level) for level in ("sampled", "probe", "skeleton") if identity.level(level)},
        },
    }
    if digest:
        one["digest"] = digest
    of_base = [FileEntry(path, 0, sum_, stored=False) for path, sum_ in identity.files]
    named = [file for file in files or of_base if file.path not in NOT_CONTENT]
    return [one, *({"name": f"{name}/{file.path}", "digest": {"sha256": file.sha256}} for file in named)]


def _place(ref: str | Path) -> Path | Address:
    """The folder or file that an input's reference means.

    Raises:
        NotFound: it is none, or one on the Hub.
        UsageError: an address that is neither read nor written.
    """
    known = readable(ref, "an input")
    if (address := address_of(known)) is not None:
        return address
    path = Path(known).expanduser()
    if path.exists():
        return path
    from adapterkit.registry import resolve
    from adapterkit.registry.checkout import checkout

    if isinstance(ref, str) and "/" not in ref and resolve.exists(open_home(), ref.partition("@")[0]):
        return checkout(ref)
    raise NotFound(f"{ref} is not here", "give the path of the input, or leave it out: the record names it")


def parts_of(out: Path) -> list[Path]:
    """The files of a set that was written in the place of one GGUF file, ``OUT-00001-of-00003.gguf``."""
    if out.suffix != ".gguf" or not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.iterdir() if part_name(out).fullmatch(path.name))


def _files(place: Path | Address) -> list[FileEntry]:
    return (_Stored.at(place) if isinstance(place, Address) else _Local(place)).files()
