"""`adapterkit.json` beside an output: what was done, with which parameters, to what.

The same inputs give the same record, byte for byte: no paths, hosts or times are in it. Its time is
``$SOURCE_DATE_EPOCH`` where that is set, else none is stated (registering states one). Adapters are named by the digest
of their files; a base by its identity, read as far as it is cheap (16 KiB of each tensor) unless ``full``.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.bases import open_model
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.pipeline import folder_of, read_listed
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.places import Address, address_of
from adapterkit.registry.beside import beside_bytes, parse_beside, read_beside
from adapterkit.registry.canonical import MAX_BYTES, sha256, thaw
from adapterkit.registry.gather import gather, gather_listed
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import BESIDE, UNDATED, FileEntry, Operation, Parent, Record
from adapterkit.registry.weights import cheap, identity_of

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing

_BLOCK = 4 << 20  # bytes that are read at a time to be hashed
MOST_HASHED = 2 << 30  # bytes that are hashed to name an adapter's folder; of a larger one only the adapter itself


def recorder(
    operation: str,
    kind: str,
    parameters: Mapping[str, Any],
    parents: Sequence[Parent],
    *,
    method: str = "",
    evidence: Callable[[], Mapping[str, Any]] | None = None,
    full: bool = False,
    name: str = "",
) -> Callable[[Path | Listing], dict[str, bytes]]:
    """A function from a finished folder of weights (not yet in its place), or from what is finished in a store, to its record,
    as a file to write beside them.

    Args:
        operation: the verb.
        kind: of the result: a key of `adapterkit.registry.record.KINDS`.
        parameters: of the operation, as plain JSON; no paths (see `label`).
        parents: see `base_parent` and `adapter_parent`; the base of the record is the first one with the role ``base``,
            else ``source``.
        method: of the result.
        evidence: asked when the weights are finished.
        full: hash every byte. Files of adapters always are.
        name: of an output that is one file, which has another name in the hidden folder.
    """

    def write(folder: Path | Listing) -> dict[str, bytes]:
        files: tuple[FileEntry, ...] = ()
        identity = None
        parts = sorted(_ggufs(folder))
        # The files of a set are hashed, where that does not mean to read a large output back from a store.
        several = len(parts) > 1 and (isinstance(folder, Path) or _nbytes(folder) <= MOST_HASHED)
        if kind not in ("adapter", "combined") and not several:
            opened = _finished(folder, parts)
            level = cheap(opened)
            found = identity_of(opened, "merkle" if full and level != "skeleton" else level)
            identity = Identity(**{name: getattr(found, name) for name in _LEVELS})
        if full or identity is None:
            files = _entries(folder, name)
        record = Record(
            kind=kind,
            files=files,
            method=method,
            base=next(
                (parent.identity for role in ("base", "source") for parent in parents if parent.role == role), None
            ),
            identity=identity,
            operation=Operation(operation, parameters),
            parents=tuple(parents),
            evidence=evidence() if evidence is not None else {},
            created=created(),
        )
        return {BESIDE: beside_bytes(record)}

    return write


def _ggufs(folder: Path | Listing) -> list[str]:
    names = [path.name for path in folder.iterdir()] if isinstance(folder, Path) else folder.names
    # What runs note in the hidden folder begins with a dot, and may end with the name of a file.
    return [name for name in names if name.endswith(".gguf") and not name.startswith(".")]


def _nbytes(listing: Listing) -> int:
    return sum(listing.open(name).size for name in listing.names)


def _finished(folder: Path | Listing, parts: Sequence[str]) -> Checkpoint:
    """The model in a finished folder, or that is finished in a store."""
    if isinstance(folder, Path):
        return open_model(folder / parts[0] if parts else folder)
    if not parts:
        return read_listed(folder)
    from adapterkit.gguf.checkpoint import of_sources

    return of_sources(folder.ref, [folder.open(name) for name in parts])


def _entries(folder: Path | Listing, name: str) -> tuple[FileEntry, ...]:
    """Every file, hashed; an output that is one file, or a set of parts, by the names that it will have."""
    if isinstance(folder, Path):
        found = gather(folder).files
        called = _called([path for path, _ in found], name)
        return tuple(entry(called(path), real) for path, real in found)
    listed = gather_listed(folder)
    called = _called([path for path, _ in listed], name)
    return tuple(FileEntry(called(path), source.size, hashed(source)) for path, source in listed)


_PART = re.compile(r"model(-\d{5}-of-\d{5}\.gguf)")  # in the hidden folder


def _called(paths: Sequence[str], name: str) -> Callable[[str], str]:
    """What a file of the hidden folder is called when it is in its place.

    Args:
        name: of an output that is a file, or a set of parts; else none.
    """
    suffix = Path(name).suffix
    if suffix not in (".gguf", ".safetensors"):
        return lambda path: path
    if len(paths) == 1 and paths[0].endswith(suffix):
        return lambda path: name
    return lambda path: _PART.sub(lambda found: Path(name).stem + found[1], path)


def made_alike(one: Record, other: Record) -> bool:
    """Whether two records name the same operation on the same inputs, whatever a registry calls these."""

    def said(record: Record) -> Any:
        made = record.operation
        operation = None if made is None else (made.name, made.parameters)
        return operation, [(p.role, p.identity or p.content, p.parameters) for p in record.parents]

    return bool(said(one) == said(other))


_LEVELS = ("shapes", "skeleton", "probe", "sampled", "merkle")


def base_parent(base: Checkpoint, role: str = "base", *, full: bool = False) -> Parent:
    """A whole model as a parent: by its identity, and by content where a registry knows that."""
    level = cheap(base)
    identity = identity_of(base, "merkle" if full and level != "skeleton" else level)
    folder = folder_of(base)
    record = _in_registry(folder) if folder is not None else None
    if record is None:
        return Parent(role, identity=identity, label=label(base.ref, base.commit))
    return Parent(role, record.content, identity, record.digest, record.ref)


def adapter_parent(adapter: Adapter, role: str = "adapter", **parameters: Any) -> Parent:
    """An adapter as a parent: by the digest of its files, the same whether or not it is registered; a model by identity."""
    if adapter.whole:
        from adapterkit.adapters.whole_model import WholeModel

        assert isinstance(adapter, WholeModel)
        assert adapter.checkpoint is not None
        return replace(base_parent(adapter.checkpoint, "model"), parameters=parameters)
    folder = adapter.folder
    if folder is None and adapter.source.version and not adapter.source.loose:
        content = Record("adapter", files=_listed(adapter)).content
        return Parent(role, content, label=label(adapter.ref, adapter.commit), parameters=parameters)
    if folder is None:  # a loose file, or read by range from the Hub: named by its weights alone
        weights = []
        for source in adapter.sources:
            data = source.read(0, source.size)
            name = source.name.rpartition("/")[2] if adapter.shards else "adapter_model.safetensors"
            weights.append(FileEntry(name, len(data), sha256(data)))
        content = Record("adapter", files=tuple(weights)).content
        return Parent(role, content, label=label(adapter.ref, adapter.commit), parameters=parameters)
    record = _in_registry(folder)
    if record is not None:
        return Parent(role, record.content, record=record.digest, label=record.ref, parameters=parameters)
    content = Record("adapter", files=tuple(entry(path, real) for path, real in _files(folder, adapter))).content
    beside = beside_of(folder)
    known = beside is not None and beside.content == content
    return Parent(
        role,
        content,
        record=beside.digest if beside is not None and known and beside.version else "",
        label=beside.ref if beside is not None and known and beside.ref else label(adapter.ref, adapter.commit),
        parameters=parameters,
    )


def converted_parent(ref: str | Path, model: bool) -> Parent:
    """What is converted, as a parent: a model by its identity, an adapter by the digest of its files."""
    from adapterkit.adapters.load import load_adapter

    if model:
        return base_parent(open_model(ref), "source")
    path = Path(ref).expanduser()
    if path.is_file():
        record = _in_registry(path.parent)
        if record is not None:
            return Parent("adapter", record.content, record=record.digest, label=record.ref)
        return Parent("adapter", Record("adapter", files=(entry(path.name, path),)).content, label=label(str(ref)))
    try:
        return adapter_parent(load_adapter(ref))
    except AdapterkitError:  # weights that are pickles: nothing is loaded to name them
        files = tuple(entry(inside, real) for inside, real in gather(path).files)
        return Parent("adapter", Record("adapter", files=files).content, label=label(str(ref)))


def parameters_of(request: Mapping[str, Any], *leave: str) -> dict[str, Any]:
    """The parameters of a plan's request for a record: references by their labels, without the inputs themselves."""
    left = {"verb", "base", "adapters", "weights", "jobs", *leave}
    return {key: _without_paths(thaw(value)) for key, value in request.items() if key not in left}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return label(value) if isinstance(value, str) and ("/" in value or os.path.exists(value)) else value


def label(ref: str, commit: str | None = None) -> str:
    """A name for readers: ``org/name@1234567``, a registry name as it is, or the last part of a path."""
    hub = parse_hub(ref)
    if hub is not None and (commit or not os.path.exists(ref)) and not os.path.isabs(ref):
        return f"{hub.repo}@{commit[:7]}" if commit else hub.repo
    name = Path(ref).expanduser().resolve().name if "/" in ref or os.path.exists(ref) else ref
    return "".join(char if char.isprintable() else "?" for char in name)[:200]


def created() -> str:
    """The time that a record states: ``$SOURCE_DATE_EPOCH``, else none.

    Raises:
        UsageError: it is not a number of seconds.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not given:
        return UNDATED
    if not given.isascii() or not given.isdigit() or int(given) >= 253402300800:  # the year 10000
        raise UsageError(f"SOURCE_DATE_EPOCH is '{given}'", "set it to seconds since 1970")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(given)))


def entry(path: str, real: Path) -> FileEntry:
    """A file of an output, hashed."""
    digest, size = disk.hash_file(real)
    return FileEntry(path, size, digest)


def _files(folder: Path, adapter: Adapter) -> list[tuple[str, Path]]:
    """The files that registering the folder would take; of one that cannot be registered, the adapter itself."""
    try:
        found = list(gather(folder).files)
    except AdapterkitError:
        found = []
    if found and sum(real.stat().st_size for _, real in found) <= MOST_HASHED:
        return found
    own = [source.path for source in adapter.sources if source.path is not None] + [folder / "adapter_config.json"]
    return [(path.name, path) for path in own if path.is_file()]


def _listed(adapter: Adapter) -> tuple[FileEntry, ...]:
    """As `_files`, of an adapter in a store."""
    from adapterkit.checkpoint.objects import ObjectFolder

    address = address_of(adapter.ref)
    assert address is not None
    listing = ObjectFolder(address)
    found = gather_listed(listing)
    if sum(source.size for _, source in found) > MOST_HASHED:
        own = {source.name for source in adapter.sources} | {f"{listing.ref}/adapter_config.json"}
        found = [(name.rpartition("/")[2], source) for name, source in found if source.name in own]
    return tuple(FileEntry(name, source.size, hashed(source)) for name, source in found)


def hashed(source: Source) -> str:
    """The sha256 of a file that may lie in a store, read as a stream."""
    digest = hashlib.sha256()
    source.expect([(0, source.size)])
    for at in range(0, source.size, _BLOCK):
        digest.update(source.read(at, _BLOCK))
    source.expect(())
    return digest.hexdigest()


def _in_registry(folder: Path) -> Record | None:
    """The record of a folder that a registry keeps; its bytes were checked when they were stored."""
    if folder.parent.name != "trees" or not (folder.parent.parent / "format").is_file():
        return None
    record = beside_of(folder)
    return record if record is not None and record.version and record.digest == folder.name else None


def was_converted(folder: Path | Address, to: str) -> bool:
    """Whether the record beside a folder says that ``convert --to`` made it, with this word."""
    record = beside_of(folder)
    operation = None if record is None else record.operation
    return operation is not None and operation.name == "convert" and operation.parameters.get("to") == to


def beside_of(folder: Path | Address) -> Record | None:
    """The record beside an input (a folder, or a GGUF file); one that cannot be read is no reason to stop."""
    from adapterkit.checkpoint.objects import object_file

    try:
        if isinstance(folder, Address):
            alone = folder.name.endswith(".gguf")
            where = folder.with_name(f"{folder.name}.{BESIDE}") if alone else folder / BESIDE
            found = object_file(where)
            data = None if found is None else found.read(0, min(found.size, MAX_BYTES + 1))
            return None if data is None else parse_beside(data, str(where))
        return read_beside(folder)
    except AdapterkitError:
        return None
