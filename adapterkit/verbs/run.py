"""`run`: execute a saved plan by workers, or be one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.cut import shares
from adapterkit.checkpoint.plan import read_plan
from adapterkit.errors import CheckpointError, OutputError, StoreError, UsageError, option
from adapterkit.places import here
from adapterkit.requests.call import takes
from adapterkit.requests.workers import WRITTEN_JOBS, RunRequest, parse_rate
from adapterkit.stores.files import brought
from adapterkit.verbs.carry import by_workers, part_size, write_files
from adapterkit.verbs.execute import OpenPlan, on_device
from adapterkit.verbs.job import peak_memory
from adapterkit.verbs.report import Forecast

if TYPE_CHECKING:
    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.plan import Plan


@dataclass(frozen=True)
class RunReport:
    """What a run of a plan did; sizes are bytes, times seconds.

    Attributes:
        on: what executed the parts: local, ray; ``task`` for a task of a job array; empty where nothing was executed.
        parts: of the plan; ``found`` of them an earlier run had done, ``left`` others have to do.
        finished: the output is in its place.
        lost: workers that were gone before they had ended their part.
        bytes_read, bytes_written: by the workers, from inputs (an estimate of the plan) and into the output.
        cpu_seconds, worker_seconds: of all workers, over their parts.
        peak_memory: the largest of a worker.
        reused: computed tensors that an interrupted run had finished.
        requests, bytes_down, bytes_up, bytes_inside: of object stores, by the workers.
        report: of the plan's verb, when the output is in its place.
    """

    plan: str
    out: str
    on: str
    workers: int
    parts: int
    found: int = 0
    left: int = 0
    finished: bool = False
    lost: int = 0
    nbytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    worker_seconds: float = 0.0
    peak_memory: int = 0
    reused: int = 0
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0
    notes: tuple[str, ...] = ()
    forecast: tuple[Forecast, ...] = ()
    report: Any = None


@takes(RunRequest)
def run(request: RunRequest) -> RunReport:
    """Execute a saved plan by workers. What an earlier run of the same plan has done is used; run it again after whatever
    ended it, and it goes on.

    Raises:
        UsageError: the plan has no parts.
        CheckpointError: no plan, or its inputs are others.
        OutputError: the output exists, the disk is full, or workers were lost again and again.
        MissingPackage: Ray is not installed.
    """
    return carried_out(request, read_plan(request.plan))


def carried_out(request: RunRequest, plan: Plan) -> RunReport:
    """As `run`, of a plan that was read."""
    started = time.monotonic()
    plan = on_device(plan, request.device)
    opened = OpenPlan(plan, request.target or "", part_size(request, plan))
    told = RunReport(str(request.plan), str(request.out or ""), "", 0, len(opened.parts), nbytes=plan.nbytes)
    if request.dry_run:
        return _shown(opened, request, told)
    if request.target is None:
        raise UsageError("nothing says where the output goes", f"add {option('out')}")
    if request.task is not None:
        return _task(opened, request, replace(told, on="task", workers=request.tasks or 1), started)
    if request.on in WRITTEN_JOBS:
        opened.check(force=request.force)
        return replace(told, on=str(request.on), left=len(opened.parts), notes=_written(opened, request))
    opened.check(force=request.force)
    if request.force:
        opened.take_over()
    tally = by_workers(opened, request)
    report = opened.finish(force=request.force)
    return replace(
        told,
        on=tally.engine,
        workers=tally.workers,
        found=tally.found,
        finished=True,
        nbytes=_size(opened, report),
        lost=tally.lost,
        bytes_read=tally.bytes_read,
        bytes_written=tally.bytes_written,
        seconds=time.monotonic() - started,
        cpu_seconds=tally.cpu_seconds,
        worker_seconds=tally.worker_seconds,
        peak_memory=max(tally.peak_memory, peak_memory()),
        reused=tally.reused,
        requests=tally.requests,
        bytes_down=tally.bytes_down,
        bytes_up=tally.bytes_up,
        bytes_inside=tally.bytes_inside,
        report=report,
    )


def _written(opened: OpenPlan, request: RunRequest) -> tuple[str, ...]:
    """The files of a job for a scheduler. Its tasks read the plan: one for another device is written beside the output."""
    if request.device is None:
        return write_files(opened, request)
    place = here(opened.out).with_name(f"{opened.out.name}.plan.json")
    disk.deliver(place, opened.plan.to_json().encode())
    return (f"plan written to {place}", *write_files(opened, request, place))


def _shown(opened: OpenPlan, request: RunRequest, told: RunReport) -> RunReport:
    """What would be done."""
    from adapterkit.checkpoint.plan import default_jobs
    from adapterkit.verbs.engines.forecast import forecast

    rate, jobs = parse_rate(request.bandwidth), request.jobs or default_jobs()
    found = tuple(
        forecast(opened.parts, count, bandwidth=rate, price=request.price, jobs=jobs) for count in request.counts
    )
    left = opened.left() if request.out is not None else opened.parts
    return replace(told, found=len(opened.parts) - len(left), left=len(left), forecast=found)


def _task(opened: OpenPlan, request: RunRequest, told: RunReport, started: float) -> RunReport:
    """Execute the share of one task of an array; the task that finds nothing left makes the output."""
    assert request.task is not None
    assert request.tasks is not None
    # What is there already is replaced only once where that is asked for: what is older than the plan.
    if opened.is_there() and (not request.force or opened.is_newer_than(brought(request.plan))):
        return replace(told, finished=True, notes=(f"{opened.out} is there already",))
    opened.check_task(force=request.force)
    if request.force:
        opened.take_over()
    share = {part.index for part in shares(opened.parts, request.tasks)[request.task]}
    todo = [part for part in opened.left() if part.index in share]
    done, progress = [], _Sum(sum(part.nbytes for part in todo), request.progress)
    for part in todo:
        done.append(opened.execute(part.index, jobs=request.jobs, progress=progress.of(part)))
    left = opened.left()
    report = None if left else _finished(opened, force=request.force)
    return replace(
        told,
        found=len(share) - len(todo),
        left=len(left),
        finished=report is not None,
        nbytes=told.nbytes if report is None else _size(opened, report),
        bytes_read=sum(one.reads for one in done),
        bytes_written=sum(one.nbytes for one in done),
        seconds=time.monotonic() - started,
        cpu_seconds=sum(one.cpu_seconds for one in done),
        worker_seconds=sum(one.seconds for one in done),
        peak_memory=peak_memory(),
        reused=sum(one.reused for one in done),
        requests=sum(one.requests for one in done),
        bytes_down=sum(one.bytes_down for one in done),
        bytes_up=sum(one.bytes_up for one in done),
        bytes_inside=sum(one.bytes_inside for one in done),
        report=report,
    )


def _size(opened: OpenPlan, report: Any) -> int:
    """Bytes of an output that is made; the plan of results is of these alone."""
    return int(report.nbytes) if opened.has_results else opened.plan.nbytes


def _finished(opened: OpenPlan, *, force: bool) -> Any:
    """Make the output, unless another task that ended now is at it; None then.

    Of tasks that end together at least one comes after the others have let go of the hidden folder.
    """
    for pause in (0.1, 0.5, 2.0, 0.0):
        try:
            return opened.finish(force=force)
        except (OutputError, CheckpointError, StoreError):  # what was to be read may be gone by then
            if opened.is_there():
                opened.tidy()
                return None
            if opened.is_busy():
                return None
            if not pause:
                raise
            time.sleep(pause)
    return None


class _Sum:
    """Progress over several parts."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress, self._before = total, progress, 0

    def of(self, part: PlanPart) -> Callable[[int, int], None]:
        """What a part is given."""
        before, self._before = self._before, self._before + part.nbytes

        def moved(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(before + done, self._total)

        return moved
