"""An output in a store while it is made: begun, and made to appear.

Beside the output, below ``.NAME.partial/``, lie small objects for as long as a run needs them: its claim
(`adapterkit.checkpoint.store_claim`), and notes of its uploads (`adapterkit.checkpoint.store_uploads`). When every part of
every file is there, the uploads are completed, then the files beside them are written, the record, the config, and the index
last; where something has that name already (`adapterkit.checkpoint.store_place`), a store with conditions refuses it. So a run
that is killed leaves no model, and what it left is found by the next one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from adapterkit.checkpoint.files import Source
from adapterkit.checkpoint.listing import Listing
from adapterkit.checkpoint.objects import ObjectFile
from adapterkit.checkpoint.pipeline import MODEL_INDEX
from adapterkit.checkpoint.schedule import Schedule, Segment, schedule
from adapterkit.checkpoint.store_claim import CLAIM, FINISHING, Claim, note_says, partial_address
from adapterkit.checkpoint.store_place import StoredOutput, StorePlace
from adapterkit.checkpoint.store_uploads import Uploads
from adapterkit.checkpoint.write import component_indexes, index_json
from adapterkit.errors import AuthError, OutputError, StoreError, UsageError, option
from adapterkit.places import Address
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import MARK, PARALLEL, StoredObject

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.tensor import Tensor

CONFIG = "config.json"
T = TypeVar("T")


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
        self.claim = Claim(self.store, self.work / CLAIM, lambda: self.digest, plan.pins, self.sources)
        prefix = out if plan.layout == "folder" else out.with_name(out.stem)
        self.uploads = Uploads(self.store, self.work, self.targets, prefix.key, lambda: self.digest, self.schedule)
        self.place = StorePlace(self.store, plan, out, self.targets)
        self._visible: list[str] = []  # keys that this run made

    @property
    def digest(self) -> str:
        """By which the output is known to be this one."""
        return self._digest or self.plan.digest

    def know(self, tensors: Mapping[str, Tensor], sources: Sequence[Source]) -> None:
        """Learn more tensors of the plan, and the inputs."""
        self.tensors = {**self.tensors, **tensors}
        self.sources |= {source.name: source for source in sources}

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
        there = self.place.keys()
        if record and self.plan.layout == "file" and not there:
            found = self.store.head(self.place.record)
            there = [] if found is None or self.place.is_left_over(found) else [found.key]
        said = self.claim.read() if there and resume else None
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

    def begin(self, *, resume: bool = False, shared: bool = False) -> None:
        """Claim the target for this plan.

        Args:
            resume: go on with what an interrupted run of the same plan left.
            shared: other workers of the same plan may be at it.

        Raises:
            OutputError: another run claimed it.
            AuthError, StoreError
        """
        self.claim.shared = shared
        noted = {one.key: one for one in self.store.entries(f"{self.work.key}/")}
        claim = self.claim.key
        if claim not in noted:
            self.claim.own = self.store.put(claim, self.claim.says(), absent=True)
            if self.claim.own and self.store.conditions is None:
                self.store.conditions = not self.store.put(claim, self.claim.says(), absent=True)
        if not self.claim.own:
            self._take_over(noted, resume=resume, shared=shared)
        if self.store.conditions is False:
            self.notes = (
                f"{self.store.root} keeps no conditions on writing: two runs to {self.out} at one time are not kept apart",
            )
        self.uploads.noted = noted if resume or shared else {}
        if self.claim.own and not shared:
            self.uploads.end_strays()

    def is_there(self) -> bool:
        """Whether the output is in its place, and nobody makes it anew; in a store without marks, as far as names and sizes
        tell."""
        found = self.uploads.made if self.store.marked else self.uploads.alike
        return all(found(file) is not None for file in self.plan.files) and self._is_over()

    def is_newer_than(self, moment: float) -> bool:
        """Whether the output was written after a moment, in seconds since 1970; in a store with marks, which name their
        plan, that is not asked."""
        if self.store.marked:
            return True
        found = self.place.present()
        return bool(found) and all(one.written is not None and one.written.timestamp() >= moment for one in found)

    def is_made(self) -> bool:
        """Whether some object of the output is of this digest, and nobody makes it anew; its files need not be known. In a
        store without marks, whether there is any."""
        found = self.place.present()
        if self.store.marked:
            heads = (self.store.head(one.key) for one in found)
            found = [one for one in heads if one is not None and one.marks.get(MARK) == self.digest]
        return bool(found) and self._is_over()

    def _is_over(self) -> bool:
        """Whether nobody makes the output at this moment. In a store without conditions a claim of this plan may come back when
        two of its tasks end together, so there the output itself has to tell."""
        said = self.claim.read()
        return said is None or (not self.store.marked and said.get("plan") == self.digest)

    def tidy(self) -> None:
        """Take away a claim of this plan that came back, of an output that is there."""
        if not self.store.marked and (self.claim.read() or {}).get("plan") == self.digest:
            self._clear()

    def source(self, file: PlannedFile) -> ObjectFile | None:
        """A file of this output that is there; in a store without marks, as far as its name and size tell."""
        found = self.uploads.made(file) if self.store.marked else self.uploads.alike(file)
        return None if found is None else ObjectFile(self.store, found, str(self.store.place(found.key)))

    def remove(self) -> None:
        """Take the files of the output away."""
        self.store.delete(list(self.targets.values()))

    def shared(self) -> None:
        """The claim is that of all workers of this plan, whichever of them made it."""
        self.claim.shared = True

    def claimed(self) -> bool | None:
        """Whether the target is claimed for this plan and these inputs; None where it is for this plan, and inputs on this
        machine changed since."""
        said = self.claim.read() or {}
        if said.get("plan") != self.digest:
            return False
        return None if self.claim.is_changed(said) else True

    def _take_over(self, noted: dict[str, StoredObject], *, resume: bool, shared: bool) -> None:
        said = self.claim.read() or {}
        same = said.get("plan") == self.digest
        if said.get("run") == self.claim.run:
            self.claim.own = True  # the answer to an earlier attempt was lost
            return
        changed = same and self.claim.is_changed(said)
        if same and not changed and (shared or resume):
            self.claim.run = said.get("run", self.claim.run)
            self.claim.own = resume
            return
        if not self.force:
            if changed and (shared or resume):
                words = f"{self.claim.changed_here(said)} changed since {self.out} was begun"
                raise OutputError(words, f"begin anew with {option('force', True)}")
            if same:
                words = f"another run of this plan writes {self.out}, or was interrupted"
                raise OutputError(
                    words, f"go on with it ({option('resume', True)}) or begin anew ({option('force', True)})"
                )
            other = self.claim.other_pin(said) if shared or resume else None
            if other is not None:
                words = f"{other} changed since {self.out} was begun"
                raise OutputError(words, f"begin anew with {option('force', True)}")
            raise OutputError(
                f"another run writes {self.out}, of other inputs or options ({self.work / CLAIM})",
                f"wait until it is done; if it was interrupted, take its place with {option('force', True)}",
            )
        self.store.put(self.claim.key, self.claim.says())
        self.uploads.sweep(noted.values())
        noted.clear()
        self.claim.own = True
        self.notes = (f"took the place of another run to {self.out}",)

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
        if self.claim.shared:  # all parts are there, so what no upload of ours holds is of a worker that was killed
            self.uploads.doubtful = True
        self.uploads.end_doubtful()
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
        said = record(StoredOutput(self.store, self.out, made, beside)) if record is not None else {}
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
        claim = self.claim.key
        found = self.store.head(claim)
        if found is None or not self.claim.is_ours(note_says(self.store, found)):
            raise self._lost()
        sealed = self.claim.says(state=FINISHING)
        if not self.store.put(claim, sealed, over=found.etag) and not self.claim.is_ours(self.claim.read() or {}):
            raise self._lost()

    def _lost(self) -> OutputError:
        return OutputError(
            f"another run took over {self.out} meanwhile", "see which of the two is wanted, and run it again"
        )

    def _unveil(self) -> list[str]:
        """Take away what makes an output that is replaced look whole; the keys of all that is there."""
        there = self.place.keys()
        first = [(self.out / name).key for name in (MODEL_INDEX, self.plan.index_name, CONFIG)]
        gone = [key for key in there if key in first or self.plan.layout == "file"]
        if gone:
            self.store.delete(gone)
        return there

    def _complete(self, name: str) -> StoredObject:
        file = next(one for one in self.plan.files if one.name == name)
        found, key = self.uploads.upload(file), self.targets[name]
        if found.object is not None:
            return found.object
        assert found.assembly is not None
        etag = found.assembly.complete(found.held, absent=not self.force)
        if etag is not None:
            self._visible.append(key)
            if not self.store.marked:
                self.store.put(self.uploads.note_of(file), self.uploads.note(file, found.assembly, made=etag))
            found.assembly.release()  # last: until the note says what was made, another worker goes by the parts
            return StoredObject(key, file.nbytes, etag)
        made = self.uploads.made(file)  # the answer to an earlier attempt may have been lost
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
        if found is not None and self.place.is_left_over(found) and self.store.put(key, data, over=found.etag):
            self._visible.append(key)
            return
        raise OutputError(f"{self.store.place(key)} appeared while the weights were written", "see which is wanted")

    def _see_whole(self, made: Mapping[str, StoredObject], small: Mapping[str, bytes]) -> None:
        """See that what lies there is what this run wrote: in a store without conditions another run may have written there at
        the same moment. Whichever of the two ends last sees what is left of both.

        Raises:
            OutputError: something of another run is there; what makes the output look whole is taken away.
        """
        there = {one.key: one for one in self.place.objects()}
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
        notes = [self.uploads.note_of(file) for file in self.plan.files]
        self.store.delete([*notes, self.claim.key])

    def abandon(self) -> None:
        """Leave nothing of this run: abort its uploads, and take its claim away if it is still its own."""
        if self.claim.own and not self.claim.shared:
            with contextlib.suppress(AuthError, StoreError):
                self.uploads.end_doubtful()
        for file in self.plan.files:
            found = self.uploads.known(file.name)
            if found is not None and found.assembly is not None:
                found.assembly.abort()
        claimed = self.claim.own and self.claim.is_ours(self.claim.read() or {})
        if self._visible and claimed:
            self.store.delete(self._visible)
        gone = [self.uploads.note_of(file) for file in self.plan.files] if self.claim.own else []
        self.store.delete([*gone, *([self.claim.key] if claimed else [])])

    def discard(self) -> None:
        """Take away what workers of this plan left, if the claim is theirs."""
        self.shared()
        if self.claim.is_ours(self.claim.read() or {}):
            self.uploads.look()
            self.uploads.sweep(self.uploads.noted.values())
            self.store.delete([self.claim.key])

    def _abreast(self, do: Callable[[str], T], names: Sequence[str]) -> list[T]:
        if len(names) < 2:
            return [do(name) for name in names]
        with ThreadPoolExecutor(min(PARALLEL, len(names))) as pool:
            return list(pool.map(do, names))


def _same(one: StoredObject | None, other: StoredObject) -> bool:
    return one is not None and (one.size, one.etag.strip('"')) == (other.size, other.etag.strip('"'))
