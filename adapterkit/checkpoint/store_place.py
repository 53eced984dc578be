"""What lies in the place of an output in a store, whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import BytesFile, Source
from adapterkit.checkpoint.folder import RECORD
from adapterkit.checkpoint.listing import Listing
from adapterkit.checkpoint.objects import ObjectFile, ObjectFolder
from adapterkit.checkpoint.publish import RECORD_BYTES, is_record, part_name
from adapterkit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.plan import Plan
    from adapterkit.places import Address
    from adapterkit.stores.store import Store, StoredObject


class StorePlace:
    """The place of an output.

    Args:
        plan: what would be written there.
        out: the folder, or the file.
        targets: keys of the weight files, by name.
    """

    def __init__(self, store: Store, plan: Plan, out: Address, targets: Mapping[str, str]) -> None:
        self.store, self.plan, self.out, self.targets = store, plan, out, targets

    def keys(self) -> list[str]:
        """Keys that are there already, by which the output would not be the only one of its name."""
        return [one.key for one in self.objects()]

    def objects(self) -> list[StoredObject]:
        """What lies in the place of the output."""
        if self.plan.layout == "folder":
            return self.store.entries(f"{self.out.key}/")
        return [found for key in self.targets.values() if (found := self.store.head(key)) is not None]

    def present(self) -> list[StoredObject]:
        """The same, where the plan may not know yet whether the output is a folder or a file."""
        found = self.objects()
        own = None if found else self.store.head(self.out.key)
        return found if own is None else [own]

    @property
    def record(self) -> str:
        """The key of the record beside an output that is a file."""
        return self.out.with_name(f"{self.out.name}.{RECORD}").key

    def is_left_over(self, record: StoredObject) -> bool:
        """Whether a record is all that is left of its output; see `adapterkit.checkpoint.publish.is_left_over`."""
        if record.key != self.record or self.plan.layout != "file" or record.size > RECORD_BYTES:
            return False
        folder, part = self.out.parent, part_name(self.out)
        try:
            found = self.store.entries(f"{folder.key}/" if folder.key else "")
        except UsageError:  # too many to tell
            return False
        names = {self.store.place(one.key) for one in found if one.key not in self.targets.values()}
        if any(one.parent == folder and (one == self.out or part.fullmatch(one.name)) for one in names):
            return False
        return is_record(self.store.read(record.key, 0, record.size, record.etag))

    def recorded(self) -> bytes | None:
        """The record of an output that is there; None where it has none."""
        keys = [(self.out / RECORD).key, self.record]
        found = next((one for one in map(self.store.head, keys) if one is not None), None)
        if found is None or found.size > RECORD_BYTES:
            return None
        return self.store.read(found.key, 0, found.size, found.etag)

    def listing(self) -> Listing:
        """An output that is there."""
        found = self.present()
        if any(one.key.startswith(f"{self.out.key}/") for one in found):
            return ObjectFolder(self.out)
        return StoredOutput(self.store, self.out, {self.store.place(one.key).name: one for one in found}, {})


class StoredOutput(Listing):
    """The files of an output that is nearly finished: the weights in the store, the rest still here."""

    def __init__(
        self, store: Store, out: Address, weights: Mapping[str, StoredObject], beside: Mapping[str, bytes]
    ) -> None:
        self.ref, self._store, self._weights, self._beside = str(out), store, weights, beside

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self._weights, *self._beside})

    def open(self, name: str) -> Source:
        if name in self._beside:
            return BytesFile(f"{self.ref}/{name}", self._beside[name])
        if name not in self._weights:
            raise NotFound(f"{self.ref}/{name} does not exist", "write it first")
        found = self._weights[name]
        return ObjectFile(self._store, found, str(self._store.place(found.key)))
