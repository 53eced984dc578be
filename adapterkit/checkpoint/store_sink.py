"""The sink of an output in a store: parts of objects, copied by the store or sent from memory by worker threads.

It is handed out to workers as `adapterkit.checkpoint.sink.Sink` is. A worker holds one part in memory. Nothing is to be seen
in the store before `adapterkit.checkpoint.store_out.StoreOut.finish` completes the uploads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.checkpoint.cut import elements_between
from adapterkit.checkpoint.files import check_unchanged
from adapterkit.checkpoint.objects import hold
from adapterkit.checkpoint.schedule import ObjectPart, Schedule, Segment
from adapterkit.checkpoint.sink import Sink, _bytes, _Queue, _Task, expect
from adapterkit.errors import CheckpointError
from adapterkit.ops.threads import OneAtATime

if TYPE_CHECKING:
    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.plan import PlannedFile
    from adapterkit.checkpoint.store_out import StoreOut
    from adapterkit.checkpoint.store_uploads import FileUpload

_JOBS = 8  # worker threads where nobody says how many: they wait for the store more than they compute


def default_store_jobs() -> int:
    """Worker threads of an output in a store, when the user names no number."""
    return _JOBS


class StoreSink(Sink):
    """Executes a plan, or some ranges of its files, into uploads.

    Args:
        made: the output.
        jobs: worker threads.
    """

    def __init__(self, made: StoreOut, *, jobs: int, progress: Callable[[int, int], None] | None = None) -> None:
        self._made, self.jobs, self._jobs, self._progress = made, jobs, jobs, progress
        self._plan, self._tensors, self._sources = made.plan, made.tensors, made.sources
        self._count, self._turns = threading.Lock(), OneAtATime()
        self._left: dict[str, int] = {}  # bytes of each computed tensor that are still to be sent
        self.rooms = ()
        self.done = self.total = 0
        self.passed = self.elements = 0.0
        self.reused = 0
        self.needs_torch = True
        hold(jobs)

    def open(self, parts: Sequence[PlanPart]) -> list[_Queue]:
        """Give what is to be done for each part of the plan: the parts of objects that begin in it."""
        named = list({part.file.name: part.file for part in parts}.values())
        expect(self._plan, named, self._sources.values(), self._made.copied(named))
        queues = []
        for one in parts:
            made, found = self._made.schedule(one.file), self._made.uploads.begun(one.file)
            begin = made.of_range(one.start, one.stop)
            self._expect_bytes(made, begin, found)
            nbytes = sum(part.nbytes for part in begin)
            queues.append(_Queue(self, self._part_tasks(one.file, begin, found), nbytes))
            self.total += nbytes
            self.elements += sum(elements_between(one.file, part.start, part.stop) for part in begin)
        return queues

    def _expect_bytes(self, made: Schedule, parts: Sequence[ObjectPart], found: FileUpload | None) -> None:
        """Count what is still to be computed of each tensor, so that it is released after its last block."""
        kept = _kept(found)
        left: dict[str, int] = {}
        for part in parts:
            if part.source is None:
                for segment, low, high in _overlaps(made, part):
                    if segment.step is not None:
                        name = segment.step.tensor
                        left[name] = left.get(name, 0) + (0 if part.number in kept else high - low)
        self.reused += sum(1 for nbytes in left.values() if nbytes == 0)
        for name, nbytes in left.items():
            self._left[name] = self._left.get(name, 0) + nbytes

    def _part_tasks(self, file: PlannedFile, parts: Sequence[ObjectPart], found: FileUpload | None) -> Iterator[_Task]:
        kept = _kept(found)
        sent = [part.number for part in parts if part.number not in kept and part.source is None]
        for part in parts:
            elements = elements_between(file, part.start, part.stop)
            if part.number in kept:
                yield _Task(partial(int, part.nbytes), elements=elements)
            else:
                yield _Task(partial(self._try, file, part, sent), plain=part.source is not None, elements=elements)

    def _try(self, file: PlannedFile, part: ObjectPart, sent: Sequence[int]) -> int:
        """Have one part in the store, or tell the others that it does not come.

        Args:
            sent: the parts of the file that are sent from here.
        """
        try:
            return self._do(file, part, sent)
        except BaseException as error:
            self._made.uploads.give_up(file, error)
            raise

    def _do(self, file: PlannedFile, part: ObjectPart, sent: Sequence[int]) -> int:
        upload = self._made.uploads.upload(file)
        if upload.assembly is None:
            return part.nbytes  # another worker made the file meanwhile
        upload.assembly.expect([number for number in sent if number not in upload.held])
        if part.number in upload.held:  # another worker's, since the parts were counted
            return part.nbytes
        if part.source is not None:
            source = self._sources[part.source]
            assert source.stored_at is not None
            at = (source.stored_at, source.stored_as(), part.source_offset, part.nbytes)
            etag = upload.assembly.copy(part.number, *at)
        else:
            data = bytearray(part.nbytes)
            used = self._fill(self._made.schedule(file), part, memoryview(data))
            etag = upload.assembly.put(part.number, data)
            self._release(used)
        upload.held[part.number] = etag
        return part.nbytes

    def _fill(self, made: Schedule, part: ObjectPart, room: memoryview) -> dict[str, int]:
        """Put the bytes of a part into ``room``; how many came from each computed tensor."""
        used: dict[str, int] = {}
        for segment, low, high in _overlaps(made, part):
            place = room[low - part.start : high - part.start]
            if segment.data is not None:
                place[:] = segment.data()[low - segment.offset : high - segment.offset]
            elif segment.source is not None:
                at = segment.source_offset + low - segment.offset
                self._sources[segment.source].read_into(place, at)
            else:
                self._compute_range(segment, low - segment.offset, place)
                assert segment.step is not None
                used[segment.step.tensor] = high - low
        return used

    def _compute_range(self, segment: Segment, at: int, place: memoryview) -> None:
        """The bytes of a computed tensor from ``at`` on, block by block."""
        assert segment.step is not None
        tensor = self._tensors[segment.step.tensor]
        done = 0
        for start in range(0, tensor.numel, tensor.block):
            stop = min(start + tensor.block, tensor.numel)
            low, high = tensor.dtype.nbytes((start,)), tensor.dtype.nbytes((stop,))
            if high <= at:
                continue
            if low >= at + len(place):
                break
            with self._turns.of(tensor.reads):
                data = _bytes(tensor.read(start, stop))
            some = data[max(at - low, 0) : min(at + len(place), high) - low]
            place[done : done + len(some)] = some
            done += len(some)
        if done != len(place):
            raise CheckpointError(f"'{segment.step.tensor}' gave fewer bytes than planned", "report it")

    def _release(self, used: Mapping[str, int]) -> None:
        for name, nbytes in used.items():
            with self._count:
                self._left[name] -= nbytes
                last = self._left[name] <= 0
            if last:
                self._tensors[name].release()

    def check_sources(self) -> None:
        check_unchanged(self._sources.values())

    def sync(self) -> None:
        """Nothing: what a store has answered for, it has."""

    def close(self) -> None:
        for source in self._sources.values():
            source.expect(())

    @property
    def place(self) -> str:
        return str(self._made.out)


def _kept(found: FileUpload | None) -> frozenset[int] | _Every:
    if found is None:
        return frozenset()
    return _Every() if found.object is not None else frozenset(found.held)


class _Every:
    """Every part, of a file that is complete."""

    def __contains__(self, number: object) -> bool:
        return True


def _overlaps(made: Schedule, part: ObjectPart) -> Iterator[tuple[Segment, int, int]]:
    """The segments in a part, with the bytes of the file that they have there."""
    for segment in made.within(part.start, part.stop):
        yield segment, max(segment.offset, part.start), min(segment.stop, part.stop)


def written(made: StoreOut, *, jobs: int | None, progress: Callable[[int, int], None] | None) -> StoreSink:
    """The sink of an output, with the workers that it is given."""
    return StoreSink(made, jobs=jobs or default_store_jobs(), progress=progress)
