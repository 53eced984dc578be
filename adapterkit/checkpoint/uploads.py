"""Uploads to a store that no run will end any more: found and aborted, with the small objects that name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from adapterkit.checkpoint.store_out import CLAIM, NOTE
from adapterkit.errors import UsageError
from adapterkit.places import address_of
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import StoredObject


@dataclass(frozen=True)
class SweptUploads:
    """Uploads below an address.

    Attributes:
        address: where it was looked.
        uploads: keys of the uploads that are older, and that were aborted where that was asked for.
        notes: keys of small objects of the runs that began them, which go with them.
        young: how many uploads are younger.
        applied: whether anything was taken away.
    """

    address: str
    uploads: tuple[str, ...]
    notes: tuple[str, ...]
    young: int
    applied: bool


def sweep_uploads(address: str, *, keep_days: float = 1.0, apply: bool = False) -> SweptUploads:
    """Abort the uploads below an address that were begun long ago: a store keeps their parts, and its owner pays.

    A run that is still at it loses its uploads too if it has gone on for longer than that.

    Args:
        address: ``s3://bucket`` or ``s3://bucket/folder``.
        keep_days: how old an upload has to be.
        apply: abort them; else they are only named.

    Raises:
        UsageError: no address of a store that has uploads.
        AuthError, NotFound, StoreError
    """
    place = address_of(address)
    if place is None:
        raise UsageError(
            f"{address} has no uploads", "give an address like s3://bucket/folder (or gs://, hf://buckets/)"
        )
    store = open_store(place)
    if not store.keeps_uploads:
        raise UsageError(f"{place.scheme}:// drops uploads that nobody ends by itself, after a week", "leave them")
    # What a folder's run left lies beside the folder.
    prefix = place.key
    before = datetime.now(timezone.utc) - timedelta(days=keep_days)
    begun = [one for one in store.uploads(prefix) if _below(one.key, prefix)]
    old = [one for one in begun if one.started <= before]
    kept = {one.key for one in begun} - {one.key for one in old}
    notes = _notes_of([one.key for one in old], kept, store.entries) if old else []
    if apply:
        for one in old:
            store.resumed(one.key, one.id).abort()
        store.delete(notes)
    return SweptUploads(str(place), tuple(one.key for one in old), tuple(notes), len(begun) - len(old), apply)


def _below(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(f"{prefix}/")


def _notes_of(keys: list[str], kept: set[str], entries: Callable[[str], list[StoredObject]]) -> list[str]:
    """The claims and notes of the runs that began these uploads, unless such a run has younger uploads."""
    found: set[str] = set()
    listed: dict[str, list[str]] = {}
    for key in keys:
        folder, _, name = key.rpartition("/")
        above, _, last = folder.rpartition("/")
        # An output is the folder of the file, or the file itself.
        for parent, own in ((above, last), (folder, name)):
            work = f"{parent}/.{own}.partial/" if parent else f".{own}.partial/"
            if work not in listed:
                listed[work] = [one.key for one in entries(work)]
            busy = any(one.startswith(f"{folder}/") for one in kept)
            if not busy:
                found |= {one for one in listed[work] if one.endswith((NOTE, f"/{CLAIM}"))}
    return sorted(found)
