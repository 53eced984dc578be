"""`execute`: carry out a saved plan, or one part of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.verbs.job import Job, Measured, peak_memory, run
from adapterkit.verbs.report import PartReport

# Verb of a plan: module and function that plan it again from the plan's request, for an output.
VERBS = {
    "merge": "adapterkit.verbs.merge:replan",
    "convert": "adapterkit.verbs.convert:replan",
    "combine": "adapterkit.verbs.combine:replan",
    "extract": "adapterkit.verbs.extract:replan",
    "resize": "adapterkit.verbs.resize:replan",
}


def execute(
    plan: Plan,
    out: str | Path,
    *,
    part: int | None = None,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Execute a saved plan: one part of it into the hidden folder beside ``out``, or the end of it when all are done.

    The inputs are opened again and the plan is made again; it must come out the same. A plan whose files are known only
    when its values were computed (a combination, an extraction) has no parts: it is carried out whole.

    Returns:
        A `PartReport` for a part, else the report of the verb.

    Raises:
        CheckpointError: the inputs are not those of the plan.
        UsageError: there is no such part.
        OutputError: parts are missing or the disk is full.
    """
    from adapterkit.checkpoint.parts import finish_parts, write_part

    started = time.monotonic()
    job = _again(plan, Path(out))
    if job.stage is not None:
        if part is not None:
            raise UsageError("this plan has no parts: its files are known when its values are", "execute it whole")
        return run([replace(job, force=force)], workers=jobs, resume=resume, progress=progress, started=started)[0]
    if part is None:
        finish_parts(job.plan, Path(out), side_files=job.side, force=force, record=job.record)
        return job.report(Measured(time.monotonic() - started, peak_memory(), plan=job.plan))
    write_part(job.plan, part, job.tensors, job.sources, Path(out), jobs=jobs, progress=progress)
    file = plan.files[part]
    return PartReport(
        str(out), part, len(plan.files), file.name, file.nbytes, time.monotonic() - started, peak_memory()
    )


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
    module, _, function = VERBS[verb].partition(":")
    try:
        job: Job = getattr(import_module(module), function)(plan.request, out).job()
    except KeyError as error:
        raise CheckpointError(f"this plan of a {verb} does not say {error}", "make the plan again") from None
    if (job.plan.files, job.plan.inputs) != (plan.files, plan.inputs):
        raise CheckpointError("the base or an adapter changed since the plan was made", "make the plan again")
    return job
