"""Attaching evidence to what was recorded before: measured figures go where the record is.

Records are immutable, so evidence about a registered version makes a new version of the name: the same files and the
same content digest (lineage and blobs stay as they are), with what was measured. Aliases stay where they are: moving
``prod`` to the version that carries the evidence is a decision. Beside an output, ``adapterkit.json`` is written anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.errors import NotFound, OutputError, UsageError
from adapterkit.places import Address, writable
from adapterkit.registry import blobs, evaluation, index, resolve, store
from adapterkit.registry.beside import beside_bytes, beside_path, parse_beside, read_beside, write_beside
from adapterkit.registry.canonical import MAX_BYTES, sha256, thaw
from adapterkit.registry.evaluation import Score
from adapterkit.registry.figures import joined
from adapterkit.registry.home import open_home
from adapterkit.registry.record import BESIDE, PROOF, SIGNATURE, FileEntry, Record
from adapterkit.registry.verification import KEY, Verification, evidence_of


@dataclass(frozen=True)
class Attached:
    """Where the evidence is now: ``ref`` of the version that carries it, or ``path`` of the record beside an output."""

    record: Record
    ref: str = ""
    path: Path | Address | None = None
    new: bool = True


def attach_evidence(
    target: str | Path, kind: str, figures: Mapping[str, Any], *, page: bytes = b"", home: Path | None = None
) -> Attached:
    """Adds evidence about a registered version, or about an output with ``adapterkit.json`` beside it.

    Args:
        target: a folder or file, else a registry name ``name[@version|@alias]`` or digest.
        kind: of the evidence, such as ``fidelity``; of ``verification`` use `attach_verification`.
        figures: plain JSON; each key takes the place of what was there under it, other keys stay.
        page: HTML that shows them; a registered version keeps it as its file ``PROOF``, unless it is signed, or keeps a page
            of the same figures already: a page says when it was made, and the same figures are no new version.

    Raises:
        NotFound: there is no such version; or the output has no record beside it.
        RegistryError: the record is damaged, or the figures are not plain JSON.
        UsageError: the kind is not a word, or the version was removed.
    """
    if not kind.isascii() or not kind.replace("-", "").isalnum():
        raise UsageError(f"{kind!a} cannot be a kind of evidence", "use letters, digits and '-'")
    place = writable(target, "what the evidence is about") if os.sep in str(target) else target
    if isinstance(place, Address):
        return _attach_there(place, kind, figures)
    if isinstance(place, Path) or os.path.exists(target):
        path = Path(place).expanduser()
        if path.parent.name == "trees" and (path.parent.parent / "format").is_file():  # a version, as a folder
            return attach_evidence(f"sha256:{path.name}", kind, figures, page=page, home=path.parent.parent)
        found = read_beside(path)
        if found is None:
            hint = "outputs of adapterkit have one; register takes any folder, and evidence goes to its version then"
            raise NotFound(f"{beside_path(path)} does not exist", hint)
        record = _with(found, kind, figures)
        if record != found:
            write_beside(path, record)
        return Attached(record, path=beside_path(path), new=record != found)
    at = open_home(home)
    found = resolve.find(at, str(target))
    if found.version in at.hidden_versions(found.name):
        raise UsageError(f"{found.ref} was removed and gets no evidence", "first: adapterkit remove --restore REF")

    def extended(there: list[Record]) -> Record:
        # Whoever else added evidence about the same bytes meanwhile keeps it.
        before = joined([*(one for one in there if one.digest != found.digest), found])
        return replace(_with(replace(found, evidence=before), kind, figures), name="", version=0, files=files)

    others = index.ask(at, lambda rows: rows.versions_of_other_content(found.name, found.content))
    files = found.files
    with at.store_lock(shared=True):
        paths = {file.path for file in files}
        shown = PROOF in paths and _with(found, kind, figures).evidence == found.evidence
        if page and not shown and SIGNATURE not in paths:  # a signature covers all files there are
            blob = blobs.put_chunks(at, [page], sha256(page), len(page))
            files = (*(file for file in files if file.path != PROOF), FileEntry(PROOF, blob.size, blob.sha256))
        added = store.extend_record(at, found.name, found.content, extended, others)
    return Attached(added.record, ref=added.record.ref, new=added.new)


def _attach_there(place: Address, kind: str, figures: Mapping[str, Any]) -> Attached:
    """Evidence about an output in a store: the record beside it is written anew, over what was read and nothing else."""
    from adapterkit.stores.connect import open_store

    store = open_store(place)
    alone = store.head(place.key) is not None if place.key else False
    where = place.with_name(f"{place.name}.{BESIDE}") if alone else place / BESIDE
    there = store.head(where.key)
    if there is None:
        hint = "outputs of adapterkit have one; register takes any folder, and evidence goes to its version then"
        raise NotFound(f"{where} does not exist", hint)
    data = store.read(there.key, 0, min(there.size, MAX_BYTES + 1), there.etag)
    found = parse_beside(data, str(where))
    record = _with(found, kind, figures)
    if record != found and not store.put(where.key, beside_bytes(record), over=there.etag):
        raise OutputError(f"{where} changed meanwhile", "attach the evidence again")
    return Attached(record, path=where, new=record != found)


def attach_evaluation(target: str | Path, found: Iterable[Score], *, home: Path | None = None) -> Attached:
    """Adds figures of an evaluation (see ``evaluation``).

    Raises:
        NotFound, RegistryError, UsageError: as for `attach_evidence`.
    """
    return attach_evidence(target, evaluation.KEY, evaluation.evidence_of(found), home=home)


def attach_verification(
    target: str | Path, levels: Iterable[Verification], *, page: bytes = b"", home: Path | None = None
) -> Attached:
    """Adds what ``verify`` found, level by level, and the page that it wrote.

    Raises:
        NotFound, RegistryError, UsageError: as for `attach_evidence`.
    """
    return attach_evidence(target, KEY, evidence_of(levels), page=page, home=home)


def _with(record: Record, kind: str, figures: Mapping[str, Any]) -> Record:
    if kind == evaluation.KEY:
        evaluation.read({kind: figures})
    before = thaw(record.evidence)
    return replace(record, evidence={**before, kind: {**before.get(kind, {}), **figures}})
