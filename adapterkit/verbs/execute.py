"""`execute`: carry out a saved plan, or one part of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from adapterkit.checkpoint.cut import PlanPart, cut
from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.verbs.job import Job, Measured, peak_memory, run
from adapterkit.verbs.report import PartReport

VERBS = ("merge", "convert", "combine", "extract", "resize")
"""Verbs whose plans can be saved; each has a function `replan`, which plans again from a plan's request, for an output."""


class OpenPlan:
    """A plan, cut into parts, whose inputs are opened once: who executes many parts keeps it.

    Args:
        plan: to be executed.
        out: where its output goes.
        part_size: work of a part (see `adapterkit.checkpoint.cut`); with None a part is a file.
        job: the plan's, where it is open already.
    """

    def __init__(self, plan: Plan, out: str | Path, part_size: int | None = None, *, job: Job | None = None) -> None:
        self.plan, self.out = plan, Path(out)
        self._part_size, self._job = part_size, job

    @cached_property
    def parts(self) -> list[PlanPart]:
        """The parts, in the order of the files."""
        if not has_parts(self.plan):
            raise UsageError("this plan has no parts: its files are known when its values are", "execute it whole")
        return cut(self.plan, self._part_size)

    @cached_property
    def job(self) -> Job:
        """The plan's job, made again.

        Raises:
            CheckpointError: the inputs are not those of the plan.
        """
        return _again(self.plan, self.out) if self._job is None else self._job

    def ready(self) -> None:
        """Open the inputs, and import what every part needs, before the first part.

        Raises:
            CheckpointError: the inputs are not those of the plan.
        """
        import_module("torch")
        _ = self.job

    def execute(
        self, index: int, *, jobs: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> PartReport:
        """Execute one part into the hidden folder beside the output.

        Raises:
            UsageError: there is no such part.
            CheckpointError: the inputs are not those of the plan, or changed.
            OutputError: the disk is full, or parts of another plan are being written there.
        """
        from adapterkit.checkpoint.parts import part_of, write_part

        started, spent = time.monotonic(), time.process_time()
        part = part_of(self.parts, index)
        job = self.job
        reused = write_part(job.plan, part, job.tensors, job.sources, self.out, jobs=jobs, progress=progress)
        return PartReport(
            str(self.out),
            index,
            len(self.parts),
            part.file.name,
            part.nbytes,
            time.monotonic() - started,
            peak_memory(),
            start=part.start,
            reads=part.reads,
            reused=reused,
            cpu_seconds=time.process_time() - spent,
        )

    def left(self) -> list[PlanPart]:
        """The parts that are not done."""
        from adapterkit.checkpoint.parts import left

        return left(self.plan, self.parts, self.out)

    def check(self, *, force: bool = False) -> None:
        """Refuse a target that exists, lies in an input, cannot be written, or has no room.

        Raises:
            UsageError, OutputError
        """
        replace(self.job, out=self.out, force=force).check_target()

    def is_there(self) -> bool:
        """Whether the output is in its place, as far as names and sizes tell, and nobody makes it anew."""
        from adapterkit.checkpoint.publish import partial_folder

        targets = self.plan.targets(self.out)
        sizes = {file.name: file.nbytes for file in self.plan.files}
        whole = all(path.is_file() and path.stat().st_size == sizes[name] for name, path in targets.items())
        return whole and not partial_folder(self.out).exists()

    def is_busy(self) -> bool:
        """Whether somebody is at the hidden folder at this moment."""
        from adapterkit.disk import is_busy, partial_folder

        return is_busy(partial_folder(self.out))

    def forget_stale(self) -> None:
        """Forget what was done here of inputs that have changed since."""
        from adapterkit.checkpoint.parts import forget
        from adapterkit.checkpoint.write import identity

        forget(self.plan, self.out, identity(self.plan, self.job.sources))

    def close(self, *, force: bool = False) -> None:
        """Make the output of parts that are all done.

        Raises:
            OutputError: parts are missing, or the output exists.
            CheckpointError: an input changed meanwhile.
        """
        from adapterkit.checkpoint.parts import finish_parts

        job = self.job
        finish_parts(job.plan, self.out, side_files=job.side, force=force, record=job.record, parts=self.parts)

    def finish(self, *, force: bool = False) -> Any:
        """Make the output of parts that are all done; the report of the verb. See `close`."""
        started, job = time.monotonic(), self.job
        self.close(force=force)
        return job.report(Measured(time.monotonic() - started, peak_memory(), plan=job.plan))


def execute(
    plan: Plan,
    out: str | Path,
    *,
    part: int | None = None,
    part_size: int | None = None,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Execute a saved plan: one part of it into the hidden folder beside ``out``, or the end of it when all are done.

    The inputs are opened again and the plan is made again; it must come out the same. A plan whose files are known only
    when its values were computed (a combination, an extraction) has no parts: it is carried out whole.

    Args:
        part_size: work of a part in bytes; with None a part is a file.

    Returns:
        A `PartReport` for a part, else the report of the verb.

    Raises:
        CheckpointError: the inputs are not those of the plan.
        UsageError: there is no such part.
        OutputError: parts are missing or the disk is full.
    """
    started = time.monotonic()
    opened = OpenPlan(plan, out, part_size)
    if part is not None:
        return opened.execute(part, jobs=jobs, progress=progress)
    if not has_parts(plan):
        job = replace(opened.job, force=force)
        return run([job], workers=jobs, resume=resume, progress=progress, started=started)[0]
    return opened.finish(force=force)


def has_parts(plan: Plan) -> bool:
    """Whether the files of a plan can be executed one at a time."""
    return plan.request.get("staged") is not True


def _again(plan: Plan, out: Path) -> Job:
    """The job of a plan, made again from what it asks for.

    Raises:
        CheckpointError: it does not say which verb it is of, or comes out different.
    """
    verb = str(plan.request.get("verb"))
    if verb not in VERBS or not {"base", "src", "adapters", "adapter"} & set(plan.request):
        raise CheckpointError(
            "this plan does not say which merge it is of",
            f"write one with {option('save_plan')}",
        )
    try:
        job: Job = import_module(f"adapterkit.verbs.{verb}").replan(plan.request, out).job()
    except KeyError as error:
        raise CheckpointError(f"this plan of a {verb} does not say {error}", "make the plan again") from None
    if (job.plan.files, job.plan.inputs) != (plan.files, plan.inputs):
        raise CheckpointError("the base or an adapter changed since the plan was made", "make the plan again")
    return job
