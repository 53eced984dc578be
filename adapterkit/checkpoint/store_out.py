"""An output in a store while it is made: its claim, its uploads, and how it appears.

Beside the output, below ``.NAME.partial/``, lie small objects for as long as a run needs them: ``claim.json``, which names
the plan whose output this will be, and ``FILE.upload``, which names the upload of a weight file. Uploads cannot be seen
among the objects of a bucket. When every part of every file is there, the uploads are completed, then the files beside
them are written, the record, the config, and the index last; where something has that name already, a store with conditions
refuses it. So a run that is killed leaves no model, and what it left is found by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from adapterkit.checkpoint.files import BytesFile, Source, states_here
from adapterkit.checkpoint.folder import RECORD
from adapterkit.checkpoint.listing import Listing
from adapterkit.checkpoint.objects import ObjectFile, ObjectFolder
from adapterkit.checkpoint.pipeline import MODEL_INDEX
from adapterkit.checkpoint.publish import RECORD_BYTES, is_record, part_name
from adapterkit.checkpoint.schedule import Schedule, Segment, schedule
from adapterkit.checkpoint.write import component_indexes, index_json
from adapterkit.errors import AuthError, NotFound, OutputError, StoreError, UsageError, option
from adapterkit.foreign import json_value
from adapterkit.places import Address
from adapterkit.stores.connect import open_store
from adapterkit.stores.faults import tried_again
from adapterkit.stores.store import MARK, PARALLEL, Assembly, StoredObject

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.stores.store import Store

CLAIM, NOTE = "claim.json", ".upload"
FINISHING = "finishing"  # the state in a claim of an output whose files get their names
MADE = "made"  # in a note: by what the finished object is known, in a store without marks
MOST_SAID = 1 << 16  # bytes of a claim or a note; ours have some hundred
CONFIG = "config.json"
T = TypeVar("T")


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


def note_says(store: Store, found: StoredObject) -> dict[str, str]:
    """What a claim or a note says; nothing where it is damaged."""
    if found.size > MOST_SAID:
        return {}
    try:
        said = json_value(store.read(found.key, 0, found.size, found.etag))
        return {str(name): str(value) for name, value in said.items()}
    except (ValueError, AttributeError):
        return {}


def _digits(states: Mapping[str, str]) -> dict[str, str]:
    """What is known of files by name, short enough for a claim."""
    return {name: hashlib.sha256(said.encode()).hexdigest()[:12] for name, said in states.items()}


def _other(theirs: str, ours: Mapping[str, str]) -> str | None:
    """The file that a claim knows by other digits than this run."""
    try:
        found = json_value(theirs)
        return next((name for name, digits in found.items() if name in ours and ours[name] != digits), None)
    except (ValueError, AttributeError):
        return None


def partial_address(out: Address) -> Address:
    """Where the small objects of a run lie."""
    return out.with_name(f".{out.name}.partial")


class StoreOut:
    """One output in a store.

    Args:
        plan, tensors, sources: what is written, and what it is made from.
        out: the folder, or the file.
        force: replace an output that is there.
        digest: by which the output is known to be this one; by default the plan's.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        sources: Sequence[Source],
        out: Address,
        *,
        force: bool = False,
        digest: str = "",
    ) -> None:
        self.plan, self.tensors, self.out, self.force = plan, tensors, out, force
        self._digest = digest
        self.store, self.work = open_store(out), partial_address(out)
        self.sources = {source.name: source for source in sources}
        self.targets = {name: address.key for name, address in plan.targets(out).items()}
        self.notes: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._schedules: dict[str, Schedule] = {}
        self._uploads: dict[str, FileUpload] = {}
        self._locks = {file.name: threading.Lock() for file in plan.files}
        self._failed: dict[str, BaseException] = {}
        self._noted: dict[str, StoredObject] = {}
        self._run = os.urandom(16).hex()
        self._own = self._shared = self._doubtful = False
        self._visible: list[str] = []  # keys that this run made

    @property
    def digest(self) -> str:
        """By which the output is known to be this one."""
        return self._digest or self.plan.digest

    def know(self, tensors: Mapping[str, Tensor], sources: Sequence[Source]) -> None:
        """Learn more tensors of the plan, and the inputs."""
        self.tensors = {**self.tensors, **tensors}
        self.sources |= {source.name: source for source in sources}

    # ------------------------------------------------------------------ what is moved

    def schedule(self, file: PlannedFile) -> Schedule:
        """The parts of a file."""
        with self._lock:
            if file.name not in self._schedules:
                self._schedules[file.name] = schedule(
                    self.plan, file, self.tensors, self.inside, ranges=self.store.copies_ranges
                )
            return self._schedules[file.name]

    def inside(self, segment: Segment) -> bool:
        """Whether the store can copy bytes of an input by itself."""
        source = self.sources.get(segment.source or "")
        at = source.stored_at if source is not None else None
        if source is None or at is None or not self.store.holds(at) or not open_store(at).copies_to(self.store):
            return False
        if not self.store.copies_ranges and (segment.source_offset, segment.nbytes) != (0, source.size):
            return False
        return bool(source.stored_as())

    def copied(self, files: Iterable[PlannedFile]) -> dict[str, list[tuple[int, int]]]:
        """By input, the ranges that the store copies."""
        found: dict[str, list[tuple[int, int]]] = {}
        for file in files:
            for part in self.schedule(file).parts:
                if part.source is not None:
                    found.setdefault(part.source, []).append((part.source_offset, part.source_offset + part.nbytes))
        return found

    # ------------------------------------------------------------------ the claim

    def check(self, *, resume: bool = False, record: bool = False, claimed: bool = False) -> None:
        """Refuse a target that is there already or lies in or over an input.

        Args:
            resume: what an interrupted run of this plan left there is none that is there already.
            record: whether ``adapterkit.json`` is written too, which lies beside an output that is a file.
            claimed: with ``resume``, that of a run of any plan: this one is not the last word.

        Raises:
            UsageError, OutputError, AuthError, NotFound, StoreError
        """
        folder = self.plan.layout == "folder"
        for source in self.sources.values():
            if isinstance(source, ObjectFile) and source.address.scheme == self.out.scheme:
                self._apart(source, folder)
        if self.force:
            return
        there = self._there()
        if record and self.plan.layout == "file" and not there:
            found = self.store.head(self._record)
            there = [] if found is None or self._is_left_over(found) else [found.key]
        said = self._claim() if there and resume else None
        if there and not (said is not None and (claimed or said.get("plan") == self.digest)):
            raise OutputError(
                f"{self.out} exists ({there[0]})", f"choose another name, or replace it with {option('force', True)}"
            )

    def _apart(self, source: ObjectFile, folder: bool) -> None:
        if source.address.bucket != self.out.bucket:
            return
        own = f"{self.out.key}/"
        alone = source.loose or source.key.endswith(".gguf")
        beside = "" if alone else f"{source.address.parent.key}/"
        over = source.key in self.targets.values() or (folder and source.key.startswith(own))
        if over or (beside not in ("", "/") and f"{self.out.key}/".startswith(beside)):
            raise UsageError(
                f"the output {self.out} lies in or over the input {source.name}", "write to another folder"
            )

    def _there(self) -> list[str]:
        """Keys that are there already, by which the output would not be the only one of its name."""
        return [one.key for one in self._objects()]

    def _objects(self) -> list[StoredObject]:
        """What lies in the place of the output."""
        if self.plan.layout == "folder":
            return self.store.entries(f"{self.out.key}/")
        return [found for key in self.targets.values() if (found := self.store.head(key)) is not None]

    def _present(self) -> list[StoredObject]:
        """The same, where the plan may not know yet whether the output is a folder or a file."""
        found = self._objects()
        own = None if found else self.store.head(self.out.key)
        return found if own is None else [own]

    @property
    def _record(self) -> str:
        """The key of the record beside an output that is a file."""
        return self.out.with_name(f"{self.out.name}.{RECORD}").key

    def _is_left_over(self, record: StoredObject) -> bool:
        """Whether a record is all that is left of its output; see `adapterkit.checkpoint.publish.is_left_over`."""
        if record.key != self._record or self.plan.layout != "file" or record.size > RECORD_BYTES:
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

    def _claim(self) -> dict[str, str] | None:
        """What the claim of the target says; None where there is none."""
        key = (self.work / CLAIM).key
        found = self.store.head(key)
        return None if found is None else self._read_claim(found)

    def _read_claim(self, found: StoredObject) -> dict[str, str]:
        return note_says(self.store, found)

    def _said(self, **more: str) -> bytes:
        told = {name: json.dumps(digits) for name, digits in (("pins", self._pins), ("states", self._states))}
        told = {name: said for name, said in told.items() if 2 < len(said) < MOST_SAID // 3}
        return json.dumps({"plan": self.digest, "run": self._run, **self._inputs_here, **told, **more}).encode()

    @cached_property
    def _pins(self) -> dict[str, str]:
        """The small files of the inputs, by the first digits of what the plan says of them: for who goes on with other ones."""
        return _digits(self.plan.pins)

    @cached_property
    def _states(self) -> dict[str, str]:
        """The inputs that lie on this machine, by the first digits of their states."""
        return _digits(states_here(self._here))

    @property
    def _here(self) -> list[Source]:
        return [source for _, source in sorted(self.sources.items()) if source.path is not None]

    def _other_pin(self, said: Mapping[str, str]) -> str | None:
        """The small file that is another than that of a run which claimed the output."""
        return _other(said.get("pins", "{}"), self._pins)

    def changed_here(self, said: Mapping[str, str] | None = None) -> str:
        """What input on this machine is another than that of the run which claimed the output, as the subject of a sentence.

        Args:
            said: what its claim says, if that was read already.
        """
        said = (self._claim() or {}) if said is None else said
        name = _other(said.get("states", "{}"), self._states)
        return "inputs here" if name is None else name

    def claim(self) -> bytes:
        """What the claim of this run says."""
        return self._said()

    @cached_property
    def _inputs_here(self) -> dict[str, str]:
        """The state of the inputs that lie on this machine, and its name: the plan knows of them no more than headers.
        Nothing where all lie in stores, which know an object by its ETag.
        """
        said = json.dumps(self._states, sort_keys=True).encode()
        return {"host": socket.gethostname(), "inputs": hashlib.sha256(said).hexdigest()[:32]} if self._here else {}

    def begin(self, *, resume: bool = False, shared: bool = False) -> None:
        """Claim the target for this plan.

        Args:
            resume: go on with what an interrupted run of the same plan left.
            shared: other workers of the same plan may be at it.

        Raises:
            OutputError: another run claimed it.
            AuthError, StoreError
        """
        self._shared = shared
        noted = {one.key: one for one in self.store.entries(f"{self.work.key}/")}
        claim = (self.work / CLAIM).key
        if claim not in noted:
            self._own = self.store.put(claim, self._said(), absent=True)
            if self._own and self.store.conditions is None:
                self.store.conditions = not self.store.put(claim, self._said(), absent=True)
        if not self._own:
            self._take_over(noted, resume=resume, shared=shared)
        if self.store.conditions is False:
            self.notes = (
                f"{self.store.root} keeps no conditions on writing: two runs to {self.out} at one time are not kept apart",
            )
        self._noted = noted if resume or shared else {}
        if self._own and not shared:
            self._end_strays()

    def is_there(self) -> bool:
        """Whether the output is in its place, and nobody makes it anew; in a store without marks, as far as names and sizes
        tell."""
        found = self._made if self.store.marked else self._alike
        return all(found(file) is not None for file in self.plan.files) and self._is_over()

    def is_newer_than(self, moment: float) -> bool:
        """Whether the output was written after a moment, in seconds since 1970; in a store with marks, which name their
        plan, that is not asked."""
        if self.store.marked:
            return True
        found = self._present()
        return bool(found) and all(one.written is not None and one.written.timestamp() >= moment for one in found)

    def is_made(self) -> bool:
        """Whether some object of the output is of this digest, and nobody makes it anew; its files need not be known. In a
        store without marks, whether there is any."""
        found = self._present()
        if self.store.marked:
            heads = (self.store.head(one.key) for one in found)
            found = [one for one in heads if one is not None and one.marks.get(MARK) == self.digest]
        return bool(found) and self._is_over()

    def _is_over(self) -> bool:
        """Whether nobody makes the output at this moment. In a store without conditions a claim of this plan may come back when
        two of its tasks end together, so there the output itself has to tell."""
        said = self._claim()
        return said is None or (not self.store.marked and said.get("plan") == self.digest)

    def tidy(self) -> None:
        """Take away a claim of this plan that came back, of an output that is there."""
        if not self.store.marked and (self._claim() or {}).get("plan") == self.digest:
            self._clear()

    def recorded(self) -> bytes | None:
        """The record of an output that is there; None where it has none."""
        keys = [(self.out / RECORD).key, self._record]
        found = next((one for one in map(self.store.head, keys) if one is not None), None)
        if found is None or found.size > RECORD_BYTES:
            return None
        return self.store.read(found.key, 0, found.size, found.etag)

    def listing(self) -> Listing:
        """An output that is there."""
        found = self._present()
        if any(one.key.startswith(f"{self.out.key}/") for one in found):
            return ObjectFolder(self.out)
        return StoredOutput(self, {self.store.place(one.key).name: one for one in found}, {})

    def source(self, file: PlannedFile) -> ObjectFile | None:
        """A file of this output that is there; in a store without marks, as far as its name and size tell."""
        found = self._made(file) if self.store.marked else self._alike(file)
        return None if found is None else ObjectFile(self.store, found, str(self.store.place(found.key)))

    def remove(self) -> None:
        """Take the files of the output away."""
        self.store.delete(list(self.targets.values()))

    def shared(self) -> None:
        """The claim is that of all workers of this plan, whichever of them made it."""
        self._shared = True

    def look(self) -> None:
        """See which uploads there are, without a claim of one's own."""
        self._noted = {one.key: one for one in self.store.entries(f"{self.work.key}/")}

    def _is_changed(self, said: Mapping[str, str]) -> bool:
        """Whether inputs on this machine are others than when a claim was made here."""
        here = self._inputs_here
        return said.get("host") == here.get("host") and said.get("inputs") != here.get("inputs")

    def claimed(self) -> bool | None:
        """Whether the target is claimed for this plan and these inputs; None where it is for this plan, and inputs on this
        machine changed since."""
        said = self._claim() or {}
        if said.get("plan") != self.digest:
            return False
        return None if self._is_changed(said) else True

    def _take_over(self, noted: dict[str, StoredObject], *, resume: bool, shared: bool) -> None:
        said = self._claim() or {}
        same = said.get("plan") == self.digest
        if said.get("run") == self._run:
            self._own = True  # the answer to an earlier attempt was lost
            return
        changed = same and self._is_changed(said)
        if same and not changed and (shared or resume):
            self._run = said.get("run", self._run)
            self._own = resume
            return
        if not self.force:
            if changed and (shared or resume):
                words = f"{self.changed_here(said)} changed since {self.out} was begun"
                raise OutputError(words, f"begin anew with {option('force', True)}")
            if same:
                words = f"another run of this plan writes {self.out}, or was interrupted"
                raise OutputError(
                    words, f"go on with it ({option('resume', True)}) or begin anew ({option('force', True)})"
                )
            other = self._other_pin(said) if shared or resume else None
            if other is not None:
                words = f"{other} changed since {self.out} was begun"
                raise OutputError(words, f"begin anew with {option('force', True)}")
            raise OutputError(
                f"another run writes {self.out}, of other inputs or options ({self.work / CLAIM})",
                f"wait until it is done; if it was interrupted, take its place with {option('force', True)}",
            )
        self.store.put((self.work / CLAIM).key, self._said())
        self._sweep(noted.values())
        noted.clear()
        self._own = True
        self.notes = (f"took the place of another run to {self.out}",)

    def _end_strays(self) -> None:
        """Abort uploads of these files that no note names: a run that was killed right after it began one could not note
        it. Of workers that share a plan, one may be about to."""
        keys = set(self.targets.values())
        prefix = self.out if self.plan.layout == "folder" else self.out.with_name(self.out.stem)
        try:
            begun = [one for one in self.store.uploads(prefix.key) if one.key in keys]
        # Not every store lists uploads, nor may everybody who writes there; `gc --uploads` sweeps for its owner.
        except (AuthError, StoreError):
            return
        if begun:
            notes = (self._read_claim(one) for one in self._noted.values() if one.key.endswith(NOTE))
            named = {note.get("id") for note in notes}
            for one in begun:
                if one.id not in named:
                    self.store.resumed(one.key, one.id).abort()

    def _end_doubtful(self) -> None:
        """Abort uploads that were begun twice, since the answer to the first attempt was lost."""
        if self._doubtful:
            self.look()
            self._end_strays()
            self._doubtful = False

    def _sweep(self, noted: Iterable[StoredObject]) -> None:
        """Abort the uploads that notes name, and take the notes away."""
        notes = [one for one in noted if one.key.endswith(NOTE)]
        for one in notes:
            said = self._read_claim(one)
            if said.keys() >= {"key", "id"}:
                self.store.resumed(said["key"], said["id"]).abort()
        if notes:
            self.store.delete([one.key for one in notes])

    # ------------------------------------------------------------------ uploads

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

    def _note_of(self, file: PlannedFile) -> str:
        # Of this plan alone: a run that was replaced may not know it yet.
        return (self.work / f"{file.name}.{self.digest[:16]}{NOTE}").key

    def _found(self, file: PlannedFile) -> FileUpload | None:
        note = self._noted.get(self._note_of(file))
        return None if note is None else self._of_note(file, note)

    def _of_note(self, file: PlannedFile, note: StoredObject) -> FileUpload | None:
        said = self._read_claim(note)
        if said.get("key") != self.targets[file.name] or "id" not in said:
            return None  # not a note of this file, whoever wrote it
        assembly = self.store.resumed(said["key"], said["id"])
        held = assembly.parts()
        if held is None:
            made = self._made(file)
            return None if made is None else FileUpload(None, object=made)
        sizes = {part.number: part.nbytes for part in self.schedule(file).parts}
        return FileUpload(assembly, {n: part.etag for n, part in held.items() if sizes.get(n) == part.size})

    def _made(self, file: PlannedFile) -> StoredObject | None:
        """The finished object of a file, if there is one and it is of this plan: it says so itself, or in a store without marks
        the note of its upload says by what it is known."""
        found = self.store.head(self.targets[file.name])
        if found is None or found.size != file.nbytes:
            return None
        if self.store.marked:
            return found if found.marks.get(MARK) == self.digest else None
        note = self.store.head(self._note_of(file))
        return found if note is not None and self._read_claim(note).get(MADE) == found.etag else None

    def _alike(self, file: PlannedFile) -> StoredObject | None:
        """The object in the place of a file, if it has its size."""
        found = self.store.head(self.targets[file.name])
        return found if found is not None and found.size == file.nbytes else None

    def _new(self, file: PlannedFile) -> FileUpload:
        key, note = self.targets[file.name], self._note_of(file)
        before = tried_again()
        assembly = self.store.begin(key, {MARK: self.digest}, self.work)
        self._doubtful = self._doubtful or tried_again() != before
        said = self._note(file, assembly)
        replaced = note in self._noted  # what it named is gone
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

    def _note(self, file: PlannedFile, assembly: Assembly, **more: str) -> bytes:
        """What is noted of an upload."""
        return json.dumps({"plan": self.digest, "key": self.targets[file.name], "id": assembly.id, **more}).encode()

    def missing(self, file: PlannedFile) -> list[int]:
        """The numbers of the parts of a file that the store does not have."""
        found = self.begun(file)
        if found is not None and found.object is not None:
            return []
        held = {} if found is None else found.held
        return [part.number for part in self.schedule(file).parts if part.number not in held]

    # ------------------------------------------------------------------ the end

    def finish(
        self,
        side_files: Mapping[str, bytes],
        record: Callable[[Listing], Mapping[str, bytes]] | None = None,
    ) -> None:
        """Make the objects of the uploads, then the files beside them, the index last.

        Raises:
            OutputError: the target appeared meanwhile, or another run took over.
            AuthError, StoreError
        """
        self._seal()
        if self._shared:  # all parts are there, so what no upload of ours holds is of a worker that was killed
            self._doubtful = True
        self._end_doubtful()
        stale = self._unveil() if self.force else []
        names = [file.name for file in self.plan.files]
        if self.plan.layout == "file":
            names = [*names[1:], names[0]]  # a loader asks for the first part
            made = dict(zip(names[:-1], self._abreast(self._complete, names[:-1]), strict=True))
            made[names[-1]] = self._complete(names[-1])
        else:
            made = dict(zip(names, self._abreast(self._complete, names), strict=True))
        beside = dict(side_files) if self.plan.layout == "folder" else {}
        if self.plan.in_folders:
            beside |= component_indexes(self.plan)
        elif self.plan.layout == "folder" and len(self.plan.files) > 1:
            beside.setdefault(self.plan.index_name, index_json(self.plan))
        said = record(StoredOutput(self, made, beside)) if record is not None else {}
        if self.plan.layout == "folder":
            keys = {(self.out / name).key: data for name, data in {**beside, **said}.items()}
            last = [(self.out / name).key for name in (*said, CONFIG, self.plan.index_name, MODEL_INDEX)]
        else:
            keys = {self.out.with_name(f"{self.out.name}.{name}").key: data for name, data in said.items()}
            last = []
        self._abreast(lambda key: self._put(key, keys[key]), [key for key in keys if key not in last])
        for key in last:
            if key in keys:
                self._put(key, keys[key])
        if self.store.conditions is False:
            self._see_whole(made, {key: keys[key] for key in last if key in keys})
        written = {*keys, *self.targets.values()}
        if left := [key for key in stale if key not in written]:
            self.store.delete(left)
        self._clear()

    def _seal(self) -> None:
        """See that the target is still claimed for this plan, and say that it is about to appear."""
        claim = (self.work / CLAIM).key
        found = self.store.head(claim)
        if found is None or not self._ours(self._read_claim(found)):
            raise self._lost()
        sealed = self._said(state=FINISHING)
        if not self.store.put(claim, sealed, over=found.etag) and not self._ours(self._claim() or {}):
            raise self._lost()

    def _ours(self, said: Mapping[str, str]) -> bool:
        """Whether a claim is that of this run; of workers of one plan, that of the plan."""
        return said.get("plan") == self.digest and (self._shared or said.get("run") == self._run)

    def _lost(self) -> OutputError:
        return OutputError(
            f"another run took over {self.out} meanwhile", "see which of the two is wanted, and run it again"
        )

    def _unveil(self) -> list[str]:
        """Take away what makes an output that is replaced look whole; the keys of all that is there."""
        there = self._there()
        first = [(self.out / name).key for name in (MODEL_INDEX, self.plan.index_name, CONFIG)]
        gone = [key for key in there if key in first or self.plan.layout == "file"]
        if gone:
            self.store.delete(gone)
        return there

    def _complete(self, name: str) -> StoredObject:
        file = next(one for one in self.plan.files if one.name == name)
        found, key = self.upload(file), self.targets[name]
        if found.object is not None:
            return found.object
        assert found.assembly is not None
        etag = found.assembly.complete(found.held, absent=not self.force)
        if etag is not None:
            self._visible.append(key)
            if not self.store.marked:
                self.store.put(self._note_of(file), self._note(file, found.assembly, made=etag))
            return StoredObject(key, file.nbytes, etag)
        made = self._made(file)  # the answer to an earlier attempt may have been lost
        if made is None:
            there = self.store.head(key) is not None
            raise OutputError(
                f"{self.store.place(key)} appeared while it was written"
                if there
                else f"the upload of {self.store.place(key)} is gone",
                "another run writes there, or its uploads were swept; see which is wanted, and run it again",
            )
        found.assembly.abort()  # where an upload is made of objects, they may still be there
        return made

    def _put(self, key: str, data: bytes) -> None:
        if self.store.put(key, data, absent=not self.force):
            self._visible.append(key)
            return
        found = self.store.head(key)
        # The answer to an earlier attempt may have been lost, or an earlier run was killed in between.
        if found is not None and found.size == len(data) and self.store.read(key, 0, found.size, found.etag) == data:
            return
        if found is not None and self._is_left_over(found) and self.store.put(key, data, over=found.etag):
            self._visible.append(key)
            return
        raise OutputError(f"{self.store.place(key)} appeared while the weights were written", "see which is wanted")

    def _see_whole(self, made: Mapping[str, StoredObject], small: Mapping[str, bytes]) -> None:
        """See that what lies there is what this run wrote: in a store without conditions another run may have written there at
        the same moment. Whichever of the two ends last sees what is left of both.

        Raises:
            OutputError: something of another run is there; what makes the output look whole is taken away.
        """
        there = {one.key: one for one in self._objects()}
        other = [key for name, one in made.items() if not _same(there.get(key := self.targets[name]), one)]
        for key, data in small.items():
            one = there.get(key) or self.store.head(key)
            if one is None or one.size != len(data) or self.store.read(key, 0, one.size, one.etag) != data:
                other.append(key)
        if other:
            self._unveil()
            raise OutputError(
                f"another run wrote {self.store.place(other[0])} at the same time",
                f"the files are of two runs: run one of them again with {option('force', True)}",
            )

    def _clear(self) -> None:
        notes = [self._note_of(file) for file in self.plan.files]
        self.store.delete([*notes, (self.work / CLAIM).key])

    def abandon(self) -> None:
        """Leave nothing of this run: abort its uploads, and take its claim away if it is still its own."""
        if self._own and not self._shared:
            with contextlib.suppress(AuthError, StoreError):
                self._end_doubtful()
        for file in self.plan.files:
            found = self._uploads.get(file.name)
            if found is not None and found.assembly is not None:
                found.assembly.abort()
        claimed = self._own and self._ours(self._claim() or {})
        if self._visible and claimed:
            self.store.delete(self._visible)
        gone = [self._note_of(file) for file in self.plan.files] if self._own else []
        self.store.delete([*gone, *([(self.work / CLAIM).key] if claimed else [])])

    def discard(self) -> None:
        """Take away what workers of this plan left, if the claim is theirs."""
        self.shared()
        if self._ours(self._claim() or {}):
            self.look()
            self._sweep(self._noted.values())
            self.store.delete([(self.work / CLAIM).key])

    def _abreast(self, do: Callable[[str], T], names: Sequence[str]) -> list[T]:
        if len(names) < 2:
            return [do(name) for name in names]
        with ThreadPoolExecutor(min(PARALLEL, len(names))) as pool:
            return list(pool.map(do, names))


def _same(one: StoredObject | None, other: StoredObject) -> bool:
    return one is not None and (one.size, one.etag.strip('"')) == (other.size, other.etag.strip('"'))


class StoredOutput(Listing):
    """The files of an output that is nearly finished: the weights in the store, the rest still here."""

    def __init__(self, made: StoreOut, weights: Mapping[str, StoredObject], beside: Mapping[str, bytes]) -> None:
        self.ref, self._made, self._weights, self._beside = str(made.out), made, weights, beside

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self._weights, *self._beside})

    def open(self, name: str) -> Source:
        if name in self._beside:
            return BytesFile(f"{self.ref}/{name}", self._beside[name])
        if name not in self._weights:
            raise NotFound(f"{self.ref}/{name} does not exist", "write it first")
        found = self._weights[name]
        return ObjectFile(self._made.store, found, str(self._made.store.place(found.key)))
