"""A job: what a verb is about to write, as one value, and the one place that carries jobs out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.errors import OutputError, UsageError
from adapterkit.ops.device import check_there
from adapterkit.places import Address
from adapterkit.stores.meter import Moved, moved
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from contextlib import ExitStack

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.results import Results
    from adapterkit.checkpoint.store_out import StoreOut
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.checkpoint.write import Ready, Stage, Writing

Progress = Callable[[int, int], None]
Recorder = Callable[["Path | Listing"], Mapping[str, bytes]]
"""Given the finished folder that is not in its place yet, or what is finished in a store, the record beside the weights."""


class Beside(Protocol):
    """Something that goes next to an output: a vision tower, what a server loads, a provenance statement."""

    def check(self) -> None:
        """Refuse what cannot be written, before the first byte of the output."""

    def write(self) -> Sequence[str]:
        """Write it, when the output is there; notes for the user."""

    def made(self) -> dict[Path, str] | None:
        """The sha256 of what `write` makes of an output that is there, by its path; None where nobody can say."""


@dataclass(frozen=True)
class Measured:
    """What is known when a job is done.

    Attributes:
        seconds, peak_memory: of the run; bytes of memory.
        reused: computed tensors that an interrupted run had finished.
        plan: what was written, which is the job's own plan unless that had to be computed first.
        facts: what the job's stage found out.
        notes: of what was written beside.
        moved: what was asked of object stores.
    """

    seconds: float = 0.0
    peak_memory: int = 0
    reused: int = 0
    plan: Plan | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dry_run: bool = False
    moved: Moved = field(default_factory=Moved)


@dataclass(frozen=True)
class Job:
    """Everything that will be written for one output. Headers have been read, and nothing else.

    Attributes:
        plan: the files, byte for byte; for a job with a ``stage``, an upper bound.
        tensors, sources: what the sink writes and reads.
        out: where it goes; None for a plan that is only shown.
        report: what the verb says when it is done.
        side: small files beside the weights, where the output is a folder.
        record: what writes ``adapterkit.json``.
        inputs: folders, beside those of ``sources``, that the output may not lie in or over.
        beside: what goes next to the output.
        stage: what has to be computed before the plan is known.
        ahead: a check of values before the first byte.
        force: replace an output that exists.
        also: jobs of other outputs that are written in the same pass, such as the tower of a model.
        recorded: the models and adapters that the record names, which are read once more for it.
        results: what the stage computes, as a plan of its own, where that can be executed in parts.
        alike: whether a report that is there, as bytes, is of what this job would look at; of a job without a record.
        sliced: whether a part can be planned of what its tensors are made of, without the rest of the inputs.
        digest: of the plan whose parts it is made of, where that is not its own: an output in a store is known by it.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    sources: tuple[Source, ...]
    out: Path | Address | None
    report: Callable[[Measured], Any]
    side: Mapping[str, bytes] = field(default_factory=dict)
    record: Recorder | None = None
    inputs: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    stage: Stage | None = None
    ahead: Callable[[], None] | None = None
    force: bool = False
    also: tuple[Job, ...] = ()
    recorded: Callable[[], Sequence[Any]] | None = None
    results: Callable[[], Results] | None = None
    alike: Callable[[bytes], bool] | None = None
    sliced: bool = True
    digest: str = ""

    @property
    def executed(self) -> Plan:
        """The plan that is executed in parts: that of the files, or of the results that they are made from."""
        return self.plan if self.results is None else self.results().plan

    def check(self, *, room: bool = True, resume: bool = False) -> None:
        """Refuse everything that can be refused before the first byte.

        Args:
            room: too little room on the disk is refused too.
            resume: what an interrupted run left in a store is no target that exists.

        Raises:
            UsageError, OutputError, NotFound, CheckFailed, CheckpointError
        """
        self.check_target(room=room, resume=resume)
        for one in self.beside:
            one.check()
        if self.ahead is not None:
            self.ahead()
        for other in self.also:
            other.check(room=room, resume=resume)

    def check_target(self, *, room: bool = True, resume: bool = False) -> None:
        """Refuse a target that exists, lies in an input, cannot be written, or has no room.

        Raises:
            UsageError, OutputError, AuthError, StoreError
        """
        from adapterkit.checkpoint.publish import check_output

        assert self.out is not None
        record = self.record is not None
        if isinstance(self.out, Address):
            from adapterkit.checkpoint.hashes import has_room

            # The plan of a staged job is known when its values are, and so are hashes; it is held against the target again
            # then.
            made = self.in_store()
            made.check(resume=resume, record=record, claimed=self.stage is not None or has_room(self.plan))
            return
        check_output(self.plan, self.sources, self.out, force=self.force, inputs=self.inputs, room=room, record=record)

    def in_store(self) -> StoreOut:
        """The output in its store."""
        from adapterkit.checkpoint.hashes import without_room
        from adapterkit.checkpoint.store_out import StoreOut

        assert isinstance(self.out, Address)
        return StoreOut(
            without_room(self.plan), self.tensors, self.sources, self.out, force=self.force, digest=self.digest
        )

    def writing(self) -> Writing:
        """What the sink is given."""
        from adapterkit.checkpoint.write import Writing

        assert isinstance(self.out, Path)
        return Writing(
            *(self.plan, self.tensors, self.sources, self.out, self.side, self.record, self.stage), parts=self.digest
        )


def show(job: Job, started: float) -> Any:
    """The report of a job that is not carried out: all checks are made, nothing is written.

    Too little room on this disk is a note, since the plan can be carried out elsewhere.
    """
    notes: tuple[str, ...] = ()
    if job.out is not None:
        job.check(room=False)
    if isinstance(job.out, Path):
        try:
            job.check_target()
        except OutputError as error:
            notes = (error.message,)
    will = foreseen([job, *job.also])
    measured = Measured(
        time.monotonic() - started, job.plan.peak_memory, plan=job.plan, notes=notes, dry_run=True, moved=will
    )
    return job.report(measured)


def foreseen(jobs: Sequence[Job]) -> Moved:
    """What object stores were asked for so far, and will be when jobs are carried out."""
    if not any(isinstance(job.out, Address) or any(source.version for source in job.sources) for job in jobs):
        return moved()
    from adapterkit.verbs.foreseen import foreseen as ahead

    # In this order: what is opened to look ahead is opened again by the run, and counts.
    found = ahead(jobs)
    return moved() + found


def run(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    started: float | None = None,
    before: Callable[[Sequence[Ready]], None] = lambda ready: None,
) -> list[Any]:
    """Carry out jobs, abreast: where they share inputs, those come from the disk once. A report for each.

    Each output appears whole or not at all, and all of them after the last byte is written.

    Args:
        before: called with all outputs on a disk when they are whole, before the first has its name.

    Raises:
        UsageError: a job does not say where its output goes.
        CheckFailed, OutputError, CheckpointError, AdapterError, UnsafeError
    """
    from adapterkit.checkpoint.write import write_together
    from adapterkit.verbs.placed import device_of

    started = time.monotonic() if started is None else started
    if any(isinstance(job.out, Address) for job in jobs):
        from adapterkit.verbs.pinned import pinned

        jobs = [pinned(job) for job in jobs]  # a run that goes on with another is one of the same inputs
    for job in jobs:
        if job.out is None:
            raise UsageError("nothing says where the output goes", "add -o OUT")
        check_there(device_of(job.plan.request))
        job.check(resume=resume)
    every = [*jobs, *(other for job in jobs for other in job.also)]
    if all(isinstance(job.out, Address) for job in every):
        return _run_to_stores(jobs, every, workers, resume, progress, started)
    if any(isinstance(job.out, Address) for job in every):
        raise UsageError("of what is written in one pass, some lies in a store and some does not", "run them apart")
    force = [job.force for job in every]
    written = write_together(
        [job.writing() for job in every],
        jobs=workers,
        force=force,
        resume=resume,
        progress=progress,
        checked=True,
        before=before,
    )[: len(jobs)]
    reports = []
    for job, done in zip(jobs, written, strict=True):
        notes = tuple(note for one in job.beside for note in one.write())
        spent = Measured(
            time.monotonic() - started, peak_memory(), done.reused, done.plan, done.facts, notes, moved=moved()
        )
        reports.append(job.report(spent))
    return reports


def _run_to_stores(
    jobs: Sequence[Job],
    every: Sequence[Job],
    workers: int | None,
    resume: bool,
    progress: Progress | None,
    started: float,
) -> list[Any]:
    """As `run`, of outputs that all lie in stores."""
    from contextlib import ExitStack

    from adapterkit.checkpoint.store_write import StoreWriting, write_to_stores

    reports = []
    with ExitStack() as held:
        staged = [_hashed(*_staged(job, held, workers, resume, progress), resume) for job in every]
        writings = [StoreWriting(job.in_store(), job.side, job.record) for job, _ in staged]
        sinks = write_to_stores(writings, jobs=workers, resume=resume, progress=progress)
        for (job, facts), sink, one in zip(staged[: len(jobs)], sinks, writings, strict=False):
            notes = (*one.made.notes, *(note for beside in job.beside for note in beside.write()))
            spent = time.monotonic() - started
            done = Measured(spent, peak_memory(), sink.reused, one.made.plan, facts, notes, moved=moved())
            reports.append(job.report(done))
    return reports


def _staged(
    job: Job, held: ExitStack, workers: int | None, resume: bool, progress: Progress | None
) -> tuple[Job, Mapping[str, Any]]:
    """A job whose stage has run, with what that found out. Values wait in a temporary folder, until they are sent."""
    if job.stage is None:
        return job, {}
    import tempfile

    from adapterkit import disk
    from adapterkit.checkpoint.plan import default_jobs
    from adapterkit.checkpoint.write import Room

    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="adapterkit-")))
    try:
        made = job.stage(Room(folder, workers or default_jobs(), progress=progress))
    except OSError as error:
        raise disk.refused(error, str(folder), folder.parent) from error
    if made.close is not None:
        held.callback(made.close)
    record: Any = made.record or job.record
    plan, tensors, sources = made.plan, made.tensors, tuple(made.sources)
    known = replace(job, plan=plan, tensors=tensors, sources=sources, side=made.side_files, record=record, stage=None)
    known.check_target(resume=resume)
    return known, made.facts


def _hashed(job: Job, facts: Mapping[str, Any], resume: bool) -> tuple[Job, Mapping[str, Any]]:
    """The job with the hashes that the metadata of its file state."""
    from adapterkit.checkpoint.hashes import filled

    plan = filled(job.plan, job.tensors)
    if plan is not job.plan:
        job = replace(job, plan=plan)
        job.check_target(resume=resume)
    return job, facts


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux's own high-water mark is used where there is one: ``getrusage`` also counts what the process was forked from.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        found = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), "")
        if found:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
