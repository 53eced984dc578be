"""What a job will ask of object stores when it is carried out: the numbers of a dry run, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.adapters.adapter import Adapter
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.objects import FIRST, FIRST_GGUF, WHOLE, ObjectFile, ObjectFolder, windows_of
from adapterkit.checkpoint.sink import wanted_ranges
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.dtypes import DTYPES
from adapterkit.places import Address, address_of
from adapterkit.provenance.record import MOST_HASHED
from adapterkit.registry.gather import gather_listed
from adapterkit.registry.weights import cheap, near_windows, tensor_rows
from adapterkit.stores.meter import Moved

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan

_RECORD = 3000  # bytes of a record, about


class Writes(Protocol):
    """What is asked about: a `Job`."""

    @property
    def plan(self) -> Plan: ...

    @property
    def sources(self) -> tuple[Source, ...]: ...

    @property
    def out(self) -> Any: ...

    @property
    def side(self) -> Mapping[str, bytes]: ...

    @property
    def record(self) -> Any: ...

    @property
    def stage(self) -> Any: ...

    @property
    def recorded(self) -> Callable[[], Sequence[Any]] | None: ...

    def in_store(self) -> StoreOut: ...


def foreseen(jobs: Sequence[Writes]) -> Moved:
    """What is asked from now on by jobs that are carried out in one pass, beside what planning asked already."""
    found, read = Moved(), set()
    for job in jobs:
        made = job.in_store() if isinstance(job.out, Address) and job.stage is None else None
        read |= _inputs(job, made)
        found += Moved(sum(one.store.rechecks for one in job.sources if isinstance(one, ObjectFile)))
        if job.record is not None:
            found += _named(job.recorded() if job.recorded is not None else ())
        if made is not None:
            found += _claimed(made) + _sent(made) + _beside(job, made)
            if job.record is not None:
                found += _read_back(job.plan, made)
    return found + Moved(len(read), sum(stop - start for _, start, stop in read))


def _inputs(job: Writes, made: StoreOut | None) -> set[tuple[str, int, int]]:
    """Windows of the inputs that come here to be computed, or sent on: a name, start and stop of each."""
    copied = made.copied(job.plan.files) if made is not None else {}
    return {
        (source.name, start, stop)
        for source, ranges in wanted_ranges(job.plan, job.plan.files, job.sources, copied)
        if isinstance(source, ObjectFile)
        for start, stop in windows_of(ranges)
    }


def _windows(ranges: Iterable[tuple[int, int]]) -> Moved:
    cut = windows_of(ranges)
    return Moved(len(cut), sum(stop - start for start, stop in cut))


def _named(recorded: Sequence[Checkpoint | Adapter]) -> Moved:
    """What is read of the inputs to name them in a record."""
    found = Moved()
    for one in recorded:
        if isinstance(one, Adapter):
            found += _adapter(one)
        elif any(isinstance(source, ObjectFile) for source in one.sources):
            found += _identity(one)
    return found


def _adapter(adapter: Adapter) -> Moved:
    if not isinstance(adapter.source, ObjectFile):
        return Moved()
    address = address_of(adapter.ref)
    if address is None or adapter.source.loose:
        return _whole(adapter.sources)
    listed = [source for _, source in gather_listed(ObjectFolder(address))]
    if sum(source.size for source in listed) > MOST_HASHED:
        listed = [*adapter.sources]
    return _whole(listed)


def _whole(sources: Iterable[Source]) -> Moved:
    """Files that are read from their first byte to their last."""
    found = Moved()
    for source in sources:
        first = _first(source.name, source.size)
        found += Moved(1, first) + (_windows([(0, source.size)]) if source.size > first else Moved())
    return found


def _first(name: str, size: int) -> int:
    if name.endswith(".safetensors"):
        return min(FIRST, size)
    return min(FIRST_GGUF, size) if name.endswith(".gguf") else size if size <= WHOLE else 0


def _identity(checkpoint: Checkpoint, held: Mapping[str, int] | None = None) -> Moved:
    """The windows by which a model is known.

    Args:
        held: how many bytes of each file will be in memory; by default, those that are.
    """
    level = cheap(checkpoint)
    if level == "skeleton":
        return Moved()
    from adapterkit.registry.identity import probed

    rows = tensor_rows(checkpoint)
    near = near_windows(checkpoint, rows if level == "sampled" else probed(rows))
    found = Moved()
    for one in near:
        if isinstance(one.source, ObjectFile):
            start = max(one.start, one.source.held if held is None else held[one.source.name])
            found += Moved(1, one.stop - start) if one.stop > start else Moved()
    return found


def _claimed(made: StoreOut) -> Moved:
    """What keeps two runs apart, and is taken away at the end."""
    said = len(made.claim.says())
    again = 0 if made.store.conditions is not None else 1
    replaced = 0
    if made.force:
        looked = 1 if made.plan.layout == "folder" else len(made.targets)  # for what is there already
        replaced = looked + 1
    gone = made.store.deletions(len(made.plan.files) + 1)
    # The listing and the claim; then its head, its text, its seal; and the end of all notes.
    return Moved(replaced + 3 + 2 * _conditional(made) + again + gone, said, 2 * said + 24 + again * said)


def _conditional(made: StoreOut) -> int:
    """How many requests it takes to write a small object on a condition."""
    return made.store.put_requests + made.store.more_if_conditional


def _sent(made: StoreOut) -> Moved:
    found = Moved()
    for file in made.plan.files:
        parts = made.schedule(file).parts
        note = len(json.dumps({"plan": made.plan.digest, "key": made.targets[file.name], "id": "i" * 80}))
        schedule = made.schedule(file)
        rest = _conditional(made) + made.store.ending(len(parts))  # a note; begun, and completed
        found += Moved(len(parts) + rest, 0, schedule.sent + note, schedule.inside)
        if not made.store.marked:
            found += Moved(made.store.put_requests, 0, note)  # said again, with what was made
    return found


def _beside(job: Writes, made: StoreOut) -> Moved:
    """Small files: those of the job, the index, the record."""
    plan = made.plan
    sizes = [len(data) for data in job.side.values()] if plan.layout == "folder" else []
    if plan.layout == "folder" and len(plan.files) > 1 and plan.index_name not in job.side:
        sizes.append(sum(len(step.tensor) + 45 for step in plan.steps) + 60)
    if job.record is not None:
        sizes.append(_RECORD)
    found = Moved(len(sizes) * (made.store.put_requests if made.force else _conditional(made)), 0, sum(sizes))
    if made.store.conditions is False:  # what lies there is looked at again, and the smallest of it read
        small = sorted(sizes)[:3] if plan.layout == "folder" else []
        found += Moved((1 if plan.layout == "folder" else len(plan.files)) + len(small), sum(small))
    return found


def _read_back(plan: Plan, made: StoreOut) -> Moved:
    """What the record of the output reads of it."""
    ggufs = [file for file in plan.files if file.name.endswith(".gguf")]
    if len(ggufs) > 1 and sum(file.nbytes for file in ggufs) <= MOST_HASHED:
        return sum((_file(file.name, file.nbytes) for file in ggufs), Moved())
    found, held = Moved(), {}
    for file in plan.files:
        head = min((step.offset for step in file.steps), default=0)
        first = _first(file.name, file.nbytes)
        held[file.name] = max(first, head)
        found += Moved(1, first) + (Moved(1, head - first) if head > first else Moved())
    return found + _identity(_as_written(plan, made), held)


def _file(name: str, size: int) -> Moved:
    first = _first(name, size)
    return Moved(1, first) + (_windows([(0, size)]) if size > first else Moved())


def _as_written(plan: Plan, made: StoreOut) -> Checkpoint:
    """The output as it will be opened: handles at the places that the plan gives them."""
    from adapterkit.checkpoint.tensor import Stored
    from adapterkit.stores.store import StoredObject

    tensors, sources = {}, []
    for file in plan.files:
        source = ObjectFile(made.store, StoredObject(file.name, file.nbytes, "planned"), file.name)
        sources.append(source)
        for step in file.steps:
            if step.dtype not in DTYPES:  # packed: its identity is its header's
                return Checkpoint(plan.files[0].name, {})
            tensors[step.tensor] = Stored(step.tensor, DTYPES[step.dtype], step.shape, source, step.offset)
    return Checkpoint(plan.files[0].name, tensors, sources=tuple(sources))
