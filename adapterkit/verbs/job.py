"""A job: what a verb is about to write, as one value, and the one place that carries jobs out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.checkpoint.write import Stage, Writing, check_output, write_together
from adapterkit.errors import OutputError, UsageError

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor

Progress = Callable[[int, int], None]
Recorder = Callable[[Path], Mapping[str, bytes]]
"""Given the finished folder that is not in its place yet, the record to write beside the weights."""


class Beside(Protocol):
    """Something that goes next to an output: a vision tower, what a server loads, a provenance statement."""

    def check(self) -> None:
        """Refuse what cannot be written, before the first byte of the output."""

    def write(self) -> Sequence[str]:
        """Write it, when the output is there; notes for the user."""


@dataclass(frozen=True)
class Measured:
    """What is known when a job is done.

    Attributes:
        seconds, peak_memory: of the run; bytes of memory.
        reused: computed tensors that an interrupted run had finished.
        plan: what was written, which is the job's own plan unless that had to be computed first.
        facts: what the job's stage found out.
        notes: of what was written beside.
    """

    seconds: float = 0.0
    peak_memory: int = 0
    reused: int = 0
    plan: Plan | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dry_run: bool = False


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
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    sources: tuple[Source, ...]
    out: Path | None
    report: Callable[[Measured], Any]
    side: Mapping[str, bytes] = field(default_factory=dict)
    record: Recorder | None = None
    inputs: tuple[Path, ...] = ()
    beside: tuple[Beside, ...] = ()
    stage: Stage | None = None
    ahead: Callable[[], None] | None = None
    force: bool = False
    also: tuple[Job, ...] = ()

    def check(self, *, room: bool = True) -> None:
        """Refuse everything that can be refused before the first byte.

        Args:
            room: too little room on the disk is refused too.

        Raises:
            UsageError, OutputError, NotFound, CheckFailed, CheckpointError
        """
        self.check_target(room=room)
        for one in self.beside:
            one.check()
        if self.ahead is not None:
            self.ahead()
        for other in self.also:
            other.check(room=room)

    def check_target(self, *, room: bool = True) -> None:
        """Refuse a target that exists, lies in an input, cannot be written, or has no room.

        Raises:
            UsageError, OutputError
        """
        assert self.out is not None
        record = self.record is not None
        check_output(self.plan, self.sources, self.out, force=self.force, inputs=self.inputs, room=room, record=record)

    def writing(self) -> Writing:
        """What the sink is given."""
        assert self.out is not None
        return Writing(self.plan, self.tensors, self.sources, self.out, self.side, self.record, self.stage)


def show(job: Job, started: float) -> Any:
    """The report of a job that is not carried out: all checks are made, nothing is written.

    Too little room on this disk is a note, since the plan can be carried out elsewhere.
    """
    notes: tuple[str, ...] = ()
    if job.out is not None:
        job.check(room=False)
        try:
            job.check_target()
        except OutputError as error:
            notes = (error.message,)
    measured = Measured(time.monotonic() - started, job.plan.peak_memory, plan=job.plan, notes=notes, dry_run=True)
    return job.report(measured)


def run(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    started: float | None = None,
) -> list[Any]:
    """Carry out jobs, abreast: where they share inputs, those come from the disk once. A report for each.

    Each output appears whole or not at all, and all of them after the last byte is written.

    Raises:
        UsageError: a job does not say where its output goes.
        CheckFailed, OutputError, CheckpointError, AdapterError, UnsafeError
    """
    started = time.monotonic() if started is None else started
    for job in jobs:
        if job.out is None:
            raise UsageError("nothing says where the output goes", "add -o OUT")
        job.check()
    every = [*jobs, *(other for job in jobs for other in job.also)]
    force = [job.force for job in every]
    written = write_together(
        [job.writing() for job in every], jobs=workers, force=force, resume=resume, progress=progress, checked=True
    )[: len(jobs)]
    reports = []
    for job, done in zip(jobs, written, strict=True):
        notes = tuple(note for one in job.beside for note in one.write())
        spent = Measured(time.monotonic() - started, peak_memory(), done.reused, done.plan, done.facts, notes)
        reports.append(job.report(spent))
    return reports


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
