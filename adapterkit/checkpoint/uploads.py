"""What runs left in a store that nobody will end any more: uploads, and the objects beside outputs that go with them.

What a run may leave, from the code that makes it:

* an upload (S3), or objects below ``.NAME.partial.parts/`` (Google, the Hub), see each store's `begin`;
* ``.NAME.partial/claim.json`` and ``.NAME.partial/FILE.….upload``, see `adapterkit.checkpoint.store_claim`;
* ``.NAME.results-…/``, the results of parts, and what a run of those leaves (``..NAME.results-….partial/``), see
  `adapterkit.verbs.execute.OpenPlan.place`;
* files of an output that have their names already, of a run that was killed at its very end. These are named and stay, with
  the notes that ``--resume`` needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from adapterkit.checkpoint.header import parse_header
from adapterkit.checkpoint.store_claim import CLAIM, FINISHING, note_says
from adapterkit.checkpoint.store_uploads import NOTE
from adapterkit.errors import CheckpointError, UsageError
from adapterkit.places import Address, address_of
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import MARK, Begun, Store, StoredObject

_PARTIAL = re.compile(r"\.(.+)\.partial(\.parts)?")  # a folder of a run
_RESULTS = re.compile(r"\.(.+)\.results-([0-9a-f]{12})")


@dataclass(frozen=True)
class SweptUploads:
    """What runs left below an address.

    Attributes:
        address: where it was looked.
        uploads: keys of the uploads that are older, and that were aborted where that was asked for.
        notes: keys of objects of the runs that began them, which go with them.
        young: how many uploads are younger.
        applied: whether anything was taken away.
        unfinished: keys of outputs whose run ended while their files got their names: they are left as they are.
    """

    address: str
    uploads: tuple[str, ...]
    notes: tuple[str, ...]
    young: int
    applied: bool
    unfinished: tuple[str, ...] = ()


@dataclass
class _Left:
    """What a run to one output left.

    Attributes:
        output: its key.
        objects: all that lies in its hidden folders.
        ids: of the uploads that its notes name.
        finishing: whether its claim says that its files were about to get their names.
    """

    output: str
    objects: list[StoredObject] = field(default_factory=list)
    ids: set[tuple[str, str]] = field(default_factory=set)
    finishing: bool = False


def sweep_uploads(address: str, *, keep_days: float = 1.0, apply: bool = False) -> SweptUploads:
    """Abort the uploads below an address that were begun long ago: a store keeps their parts, and its owner pays. What goes
    with them goes too: claims, notes, and results of parts.

    A run that is still at it loses its uploads too if it has gone on for longer than that.

    Args:
        address: ``s3://bucket``, ``s3://bucket/folder``, or an output.
        keep_days: how old an upload has to be.
        apply: abort them; else they are only named.

    Raises:
        UsageError: no address of a store.
        AuthError, NotFound, StoreError
    """
    place = address_of(address)
    if place is None:
        raise UsageError(
            f"{address} has no uploads", "give an address like s3://bucket/folder (or gs://, az://, hf://buckets/)"
        )
    store = open_store(place)
    before = datetime.now(timezone.utc) - timedelta(days=keep_days)
    left = _left(store, place)
    begun = _begun(store, place, left.values())
    old = [one for one in begun if one.started <= before]
    young = [one for one in begun if one.started > before]
    gone, unfinished = [], []
    for run in left.values():
        busy = any(_is_of(run, one) for one in young)
        if run.finishing and not busy and _is_seen(store, run.output):
            unfinished.append(run.output)
            mine = {(one.key, one.id) for one in old if _is_of(run, one)}
            old = [one for one in old if (one.key, one.id) not in mine]
        elif not busy:
            named = tuple(f"{one.id}/" for one in begun)  # goes with its upload
            gone += [one.key for one in run.objects if _is_old(one, before) and not one.key.startswith(named)]
    if apply:
        for one in old:
            store.resumed(one.key, one.id).abort()
        store.delete(gone)
    keys = tuple(one.key for one in old)
    return SweptUploads(str(place), keys, tuple(sorted(gone)), len(young), apply, tuple(unfinished))


def _left(store: Store, place: Address) -> dict[str, _Left]:
    """What lies in hidden folders of runs to outputs at or below an address, by output."""
    found: dict[str, _Left] = {}
    folder = place.key.rpartition("/")[0]  # hidden folders lie beside an output
    for one in store.entries(f"{folder}/" if folder else "", lambda key: _is_hidden(key, place.key)):
        output = _output(one.key) or ""
        results = next(filter(None, map(_RESULTS.fullmatch, one.key.split("/")[:-1])), None)
        if results is not None and not _is_ours(store, one, results[2]):
            continue
        run = found.setdefault(output, _Left(output))
        run.objects.append(one)
        if one.key.endswith((NOTE, f"/{CLAIM}")):
            said = note_says(store, one)
            run.finishing |= said.get("state") == FINISHING
            if said.keys() >= {"key", "id"}:
                run.ids.add((said["key"], said["id"]))
    return found


def _is_hidden(key: str, prefix: str) -> bool:
    """Whether an object is one that a run keeps beside an output at or below a prefix."""
    output = _output(key)
    return output is not None and _below(output, prefix)


def _prefixes(key: str) -> list[str]:
    """How keys begin for which uploads of an output are, or of what lies below it."""
    folder, _, name = key.rpartition("/")
    return [key, f"{folder}/.{name}." if folder else f".{name}."] if key else [""]


def _output(key: str) -> str | None:
    """The key of the output that an object is of which a run keeps beside it; None of another object."""
    folders = key.split("/")[:-1]
    for depth, name in enumerate(folders):
        partial = _PARTIAL.fullmatch(name)
        own = name if partial is None else str(partial[1])
        results = _RESULTS.fullmatch(own)
        if partial is not None or results is not None:
            return "/".join([*folders[:depth], own if results is None else str(results[1])])
    return None


def _begun(store: Store, place: Address, runs: Iterable[_Left]) -> list[Begun]:
    """The uploads to what lies at or below an address, and those that notes of runs to it name: parts of a split file, say."""
    found: Mapping[tuple[str, str], Begun] = {
        (one.key, one.id): one for where in _prefixes(place.key) for one in store.uploads(where)
    }
    named = {id for run in runs for id in run.ids}
    beside = place.key.rpartition("/")[0]
    if named - found.keys() and store.keeps_uploads:
        found = {(one.key, one.id): one for one in store.uploads(f"{beside}/" if beside else "")} | dict(found)
    return [one for id, one in found.items() if id in named or _below(_output(one.key) or one.key, place.key)]


def _is_of(run: _Left, upload: Begun) -> bool:
    """Whether an upload is one of a run."""
    return (upload.key, upload.id) in run.ids or _below(_output(upload.key) or upload.key, run.output)


def _below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(f"{prefix}/")


def _is_old(one: StoredObject, before: datetime) -> bool:
    return one.written is not None and one.written <= before


def _is_seen(store: Store, output: str) -> bool:
    """Whether files of an output have their names."""
    return store.head(output) is not None or bool(store.entries(f"{output}/"))


def _is_ours(store: Store, one: StoredObject, digest: str) -> bool:
    """Whether an object is the results of the plan that its name has: it says so, or is made of nothing but bytes."""
    if store.marked:
        found = store.head(one.key)
        return found is not None and found.marks.get(MARK, "").startswith(digest)
    try:
        header = parse_header(lambda start, count: store.read(one.key, start, count, one.etag), one.size, one.key)
    except CheckpointError:
        return False
    return all(info.dtype.code == "U8" for info in header.tensors.values())
