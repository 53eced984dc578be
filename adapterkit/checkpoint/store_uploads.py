"""The uploads of an output in a store, and the notes by which the next run finds them.

A note, ``FILE.….upload``, lies in ``.NAME.partial/`` beside the output, and names the upload of a weight file. Uploads cannot
be seen among the objects of a bucket.
"""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.checkpoint.store_claim import note_says
from adapterkit.errors import AuthError, OutputError, StoreError
from adapterkit.stores.faults import tried_again
from adapterkit.stores.store import MARK, Assembly, StoredObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from adapterkit.checkpoint.plan import PlannedFile
    from adapterkit.checkpoint.schedule import Schedule
    from adapterkit.places import Address
    from adapterkit.stores.store import Store

NOTE = ".upload"
MADE = "made"  # in a note: by what the finished object is known, in a store without marks


@dataclass
class FileUpload:
    """The upload of one file.

    Attributes:
        assembly: None where the file was completed already.
        held: ETags of the parts that the store has.
        object: the file, where it was completed already.
    """

    assembly: Assembly | None
    held: dict[int, str] = field(default_factory=dict)
    object: StoredObject | None = None


class Uploads:
    """The uploads of the files of one output.

    Args:
        store, work: where the objects go, and the notes.
        targets: keys of the files, by name.
        prefix: what the keys of uploads begin with.
        digest: by which the output is known to be of a plan; asked for when it is needed.
        schedule: the parts of a file.

    Attributes:
        noted: the small objects that were there, by key.
        doubtful: an upload may have been begun twice, since the answer to the first attempt was lost.
    """

    def __init__(
        self,
        store: Store,
        work: Address,
        targets: Mapping[str, str],
        prefix: str,
        digest: Callable[[], str],
        schedule: Callable[[PlannedFile], Schedule],
    ) -> None:
        self.store, self.work, self.targets, self._prefix = store, work, targets, prefix
        self._digest, self._schedule = digest, schedule
        self._uploads: dict[str, FileUpload] = {}
        self._locks = {name: threading.Lock() for name in targets}
        self._failed: dict[str, BaseException] = {}
        self.noted: dict[str, StoredObject] = {}
        self.doubtful = False

    def look(self) -> None:
        """See which uploads there are, without a claim of one's own."""
        self.noted = {one.key: one for one in self.store.entries(f"{self.work.key}/")}

    def end_strays(self) -> None:
        """Abort uploads of these files that no note names: a run that was killed right after it began one could not note
        it. Of workers that share a plan, one may be about to."""
        keys = set(self.targets.values())
        try:
            begun = [one for one in self.store.uploads(self._prefix) if one.key in keys]
        # Not every store lists uploads, nor may everybody who writes there; `gc --uploads` sweeps for its owner.
        except (AuthError, StoreError):
            return
        if begun:
            notes = (note_says(self.store, one) for one in self.noted.values() if one.key.endswith(NOTE))
            named = {note.get("id") for note in notes}
            for one in begun:
                if one.id not in named:
                    self.store.resumed(one.key, one.id).abort()

    def end_doubtful(self) -> None:
        """Abort uploads that were begun twice, since the answer to the first attempt was lost."""
        if self.doubtful:
            self.look()
            self.end_strays()
            self.doubtful = False

    def sweep(self, noted: Iterable[StoredObject]) -> None:
        """Abort the uploads that notes name, and take the notes away."""
        notes = [one for one in noted if one.key.endswith(NOTE)]
        for one in notes:
            said = note_says(self.store, one)
            if said.keys() >= {"key", "id"}:
                self.store.resumed(said["key"], said["id"]).abort()
        if notes:
            self.store.delete([one.key for one in notes])

    def upload(self, file: PlannedFile) -> FileUpload:
        """The upload of a file: the one that a note names, or a new one, which is noted."""
        with self._locks[file.name]:
            if file.name not in self._uploads:
                self._uploads[file.name] = self._found(file) or self._new(file)
                if file.name in self._failed:
                    self.give_up(file, self._failed[file.name])
            return self._uploads[file.name]

    def give_up(self, file: PlannedFile, why: BaseException) -> None:
        """A part of a file was not sent, so those who wait for it need not."""
        self._failed.setdefault(file.name, why)
        found = self._uploads.get(file.name)
        if found is not None and found.assembly is not None:
            found.assembly.give_up(why)

    def begun(self, file: PlannedFile) -> FileUpload | None:
        """The upload of a file that an earlier run or another worker began."""
        with self._locks[file.name]:
            found = self._uploads.get(file.name) or self._found(file)
            if found is not None:
                self._uploads[file.name] = found
            return found

    def note_of(self, file: PlannedFile) -> str:
        # Of this plan alone: a run that was replaced may not know it yet.
        return (self.work / f"{file.name}.{self._digest()[:16]}{NOTE}").key

    def _found(self, file: PlannedFile) -> FileUpload | None:
        note = self.noted.get(self.note_of(file))
        return None if note is None else self._of_note(file, note)

    def _of_note(self, file: PlannedFile, note: StoredObject) -> FileUpload | None:
        said = note_says(self.store, note)
        if said.get("key") != self.targets[file.name] or "id" not in said:
            return None  # not a note of this file, whoever wrote it
        assembly = self.store.resumed(said["key"], said["id"])
        held = assembly.parts()
        if held is None:
            made = self.made(file)
            return None if made is None else FileUpload(None, object=made)
        sizes = {part.number: part.nbytes for part in self._schedule(file).parts}
        return FileUpload(assembly, {n: part.etag for n, part in held.items() if sizes.get(n) == part.size})

    def made(self, file: PlannedFile) -> StoredObject | None:
        """The finished object of a file, if there is one and it is of this plan: it says so itself, or in a store without marks
        the note of its upload says by what it is known."""
        found = self.store.head(self.targets[file.name])
        if found is None or found.size != file.nbytes:
            return None
        if self.store.marked:
            return found if found.marks.get(MARK) == self._digest() else None
        note = self.store.head(self.note_of(file))
        return found if note is not None and note_says(self.store, note).get(MADE) == found.etag else None

    def alike(self, file: PlannedFile) -> StoredObject | None:
        """The object in the place of a file, if it has its size."""
        found = self.store.head(self.targets[file.name])
        return found if found is not None and found.size == file.nbytes else None

    def _new(self, file: PlannedFile) -> FileUpload:
        key, note = self.targets[file.name], self.note_of(file)
        before = tried_again()
        assembly = self.store.begin(key, {MARK: self._digest()}, self.work)
        self.doubtful = self.doubtful or tried_again() != before
        said = self.note(file, assembly)
        replaced = note in self.noted  # what it named is gone
        try:
            noted = self.store.put(note, said, absent=not replaced)
        except BaseException:
            # Nobody would find it: it is named nowhere. (Of a store that refuses everything the run's end says more.)
            with contextlib.suppress(AuthError, StoreError):
                assembly.abort()
            raise
        if noted:
            return FileUpload(assembly)
        there = self.store.head(note)
        if there is not None and self.store.read(note, 0, there.size, there.etag) == said:
            return FileUpload(assembly)  # the answer to an earlier attempt was lost
        # Another worker was sooner: its upload gets all parts of the file.
        assembly.abort()
        found = None if there is None else self._of_note(file, there)
        if found is None:
            raise OutputError(f"the upload of {self.store.place(key)} is gone", "execute the part again")
        return found

    def note(self, file: PlannedFile, assembly: Assembly, **more: str) -> bytes:
        """What is noted of an upload."""
        return json.dumps({"plan": self._digest(), "key": self.targets[file.name], "id": assembly.id, **more}).encode()

    def missing(self, file: PlannedFile) -> list[int]:
        """The numbers of the parts of a file that the store does not have."""
        found = self.begun(file)
        if found is not None and found.object is not None:
            return []
        held = {} if found is None else found.held
        return [part.number for part in self._schedule(file).parts if part.number not in held]

    def known(self, name: str) -> FileUpload | None:
        """The upload of a file, if this run knows one."""
        return self._uploads.get(name)
