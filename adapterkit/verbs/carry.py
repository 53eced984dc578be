"""What a verb does with its job: show it, save its plan, carry it out, or have workers do so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.plan import default_jobs, parse_size
from adapterkit.errors import OutputError, UsageError, option
from adapterkit.ops.device import CPU, check_there
from adapterkit.places import Address, here
from adapterkit.requests.groups import LIMITS
from adapterkit.requests.option import RUN
from adapterkit.requests.workers import LOCAL, RAY, WRITTEN_JOBS, parse_rate
from adapterkit.stores.files import deliver
from adapterkit.stores.meter import Moved, moved
from adapterkit.verbs.job import Job, Measured, run, show

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.requests.workers import OnWorkers
    from adapterkit.verbs.engines.driver import RunTally
    from adapterkit.verbs.engines.pool import Pool, WorkerSetting
    from adapterkit.verbs.execute import OpenPlan

PLAN_FILE = ".plan.json"  # in the hidden folder, for workers


def carry_out(job: Job, request: Any, started: float, plans: Mapping[Path | Address, Plan] | None = None) -> Any:
    """Do with a job what its request says: show it, save its plan, or carry it out, here or by workers.

    Args:
        plans: what is saved, and where; by default the plan that the job executes.

    Raises:
        OutputError: the plan cannot be written.
        UsageError: workers were asked for, and the plan has no parts; or a plan is saved with what it cannot hold.
    """
    saved = {}
    if request.save_plan is not None:
        saved = _with_the_rest(_saved(job, request, plans), job, request)
    if not request.writes:
        report = show(job, started)
        # Only now: `show` makes the checks, and whoever carries out a plan does not make them again.
        for path, plan in saved.items():
            deliver(path, plan.to_json().encode())
        return forecast_in(report, job, request) if getattr(request, "workers", None) else report
    if getattr(request, "on", None) is None:
        return run([job], workers=request.jobs, resume=request.resume, progress=request.progress, started=started)[0]
    from adapterkit.verbs.execute import OpenPlan
    from adapterkit.verbs.pinned import pinned
    from adapterkit.verbs.sliced import with_slices

    _check(job, request)
    job = with_slices(pinned(job))
    job.check()
    opened = OpenPlan(job.executed, job.out or "", part_size(request, job.executed), job=job)
    if request.on in WRITTEN_JOBS:
        return _written(opened, request, started)
    if not request.resume and isinstance(opened.out, Path):
        with disk.staging(opened.out, resume=False):
            pass  # what an earlier run left goes
    try:
        tally = by_workers(opened, request)
        return opened.finish(force=job.force, more=lambda measured: _together(measured, tally, started))
    except BaseException:
        if not request.resume:
            _discard(opened)
        raise


def _together(measured: Measured, tally: RunTally, started: float) -> Measured:
    """What workers did and what the end of it took."""
    return replace(
        measured,
        seconds=time.monotonic() - started,
        peak_memory=max(tally.peak_memory, measured.peak_memory),
        reused=tally.reused,
        notes=(*measured.notes, tally.summary),
        moved=Moved(**tally.moved) + moved(),
    )


def _saved(job: Job, request: Any, plans: Mapping[Path | Address, Plan] | None) -> dict[Path | Address, Plan]:
    """Where which plan is saved: with its inputs, and what each part needs of them."""
    from adapterkit.verbs.pinned import pinned
    from adapterkit.verbs.sliced import with_slices

    wanted = plans or {request.save_plan: job.plan}
    jobs = [next(one for one in (job, *job.also) if one.plan is plan) for plan in wanted.values()]
    return {path: with_slices(pinned(one)).executed for path, one in zip(wanted, jobs, strict=True)}


def _with_the_rest(plans: Mapping[Path | Address, Plan], job: Job, request: Any) -> dict[Path | Address, Plan]:
    """Plans with what was asked for beside their output. Of several, the tower's file stands beside the first.

    Raises:
        UsageError: something is measured while the values pass, which no plan does.
    """
    from adapterkit.verbs.execute import REST, RESTS

    asked, run = request.given(), request.given(RUN)
    measured = next((name for name in ("fidelity", *LIMITS) if name in run), None) if job.results is None else None
    if measured is not None:
        raise UsageError(
            f"{option(measured)} is measured while one process writes, which a plan does not say",
            f"leave out {option('save_plan')}, or verify the output",
        )
    given = {name: asked[name] for name in RESTS if name in asked}
    rest = {name: str(one) if isinstance(one, (Path, Address)) else one for name, one in given.items()}
    found: dict[Path | Address, Plan] = {}
    for path, plan in plans.items():
        found[path] = replace(plan, request={**plan.request, REST: rest}) if rest else plan
        rest = {name: value for name, value in rest.items() if name != "mmproj"}
    return found


def _check(job: Job, request: Any) -> None:
    """Refuse a job that workers cannot carry out as it was asked for.

    Raises:
        UsageError: it has no parts, or asks for what one process has to do.
    """
    from adapterkit.verbs.execute import has_parts, no_parts

    if job.out is None:
        raise UsageError("nothing says where the output goes", "add -o OUT")
    if not has_parts(job.executed):
        raise no_parts(job.executed, f"leave out {option('on')}")
    # Results are judged when all of them are there.
    for name in ("fidelity", *LIMITS) if job.results is None else ():
        asked = getattr(request, name, None)
        if asked is not None and asked is not False:  # a limit of 0 is one
            raise UsageError(
                f"{option(name)} is measured in one pass by one process",
                f"leave out {option('on')}, or verify the output",
            )
    if request.on in WRITTEN_JOBS and (job.beside or job.also):
        raise UsageError(
            f"a job that is written ({request.on}) makes the output alone, and nothing beside it",
            f"use {option('on', LOCAL)} or {option('on', RAY)}, or make the rest afterwards",
        )


def part_size(request: OnWorkers, plan: Plan) -> int:
    """Work of a part: as it was asked for, or so that all workers have enough of them. Tasks of an array, which are told how
    many they are, all come to the same.
    """
    from adapterkit.checkpoint.cut import LEAST, even_size
    from adapterkit.checkpoint.results import IN_PARTS, STAGED

    if request.part_size is not None:
        return parse_size(request.part_size)
    tasks = getattr(request, "tasks", None)
    # A byte of a result takes longer than one of a merge: factors are decompositions.
    least = LEAST // 50 if plan.request.get(STAGED) == IN_PARTS else LEAST
    return even_size(plan, tasks or max(request.counts, default=workers_of(request)), least)


def workers_of(request: OnWorkers) -> int:
    """How many workers there are; a worker each for two processors, where nothing is said."""
    return request.counts[0] if request.counts else max(1, default_jobs() // 2)


def jobs_of(request: Any) -> int:
    """Threads of a worker: on this machine the workers share the processors."""
    if request.jobs is not None:
        return int(request.jobs)
    local = request.on == LOCAL or (request.on == RAY and request.address is None)
    return max(1, default_jobs() // workers_of(request)) if local else default_jobs()


def by_workers(opened: OpenPlan, request: Any) -> RunTally:
    """Have workers execute the parts that are left; a shared lock keeps others out of the hidden folder meanwhile.

    Raises:
        OutputError, AdapterkitError: see `adapterkit.verbs.engines.driver.drive`.
    """
    from adapterkit.verbs.engines.driver import drive, log_to
    from adapterkit.verbs.engines.pool import Reading, WorkerSetting

    if request.on == LOCAL and opened.device != CPU and opened.left():
        check_there(opened.device)  # before anything is claimed that a refused run would leave
    opened.forget_stale()
    with _room(opened) as folder, log_to(_path(request.events)) as log:
        text = opened.plan.to_json()
        disk.write_inside(folder, PLAN_FILE, text.encode())
        size = part_size(request, opened.plan)
        out = str(opened.out.absolute() if isinstance(opened.out, Path) else opened.out)
        setting = WorkerSetting(
            text, str(folder / PLAN_FILE), out, size, jobs_of(request), Reading.here(), opened.device
        )
        count = workers_of(request)
        left = opened.left()

        def make() -> Pool:
            return _POOLS[request.on](setting, request, min(count, max(1, len(left))))

        return drive(make, opened.parts, left, count, engine=request.on, log=log, progress=request.progress)


@contextmanager
def _room(opened: OpenPlan) -> Iterator[Path]:
    """A folder for the plan, while others keep out of the output: the hidden folder, or one here for an output in a store."""
    from adapterkit.checkpoint.parts import claimed

    if isinstance(opened.out, Path):
        with claimed(opened.plan, opened.out) as folder:
            yield folder
        return
    _ = opened.in_store  # claims it
    import tempfile

    with tempfile.TemporaryDirectory(prefix="adapterkit-") as name:
        yield Path(name)


def _local(setting: WorkerSetting, request: OnWorkers, count: int) -> Pool:
    from adapterkit.verbs.engines.local import LocalPool

    return LocalPool(setting)


def _ray(setting: WorkerSetting, request: OnWorkers, count: int) -> Pool:
    from adapterkit.verbs.engines.on_ray import RayPool

    return RayPool(setting, request.address, count)


_POOLS: dict[str, Callable[[WorkerSetting, OnWorkers, int], Pool]] = {LOCAL: _local, RAY: _ray}


def _path(given: Any) -> Path | None:
    return None if given is None else Path(given)


def _discard(opened: OpenPlan) -> None:
    """Take away what workers left, unless somebody else is at it."""
    if not isinstance(opened.out, Path):
        opened.discard()
        return
    with suppress(_Discarded, OutputError), disk.staging(opened.out, resume=False):
        raise _Discarded


class _Discarded(Exception):
    """Makes `staging` tidy up."""


def _written(opened: OpenPlan, request: Any, started: float) -> Any:
    """The report of a job whose files were written, and handed over where that was asked for."""
    plan = here(opened.out).with_name(f"{opened.out.name}.plan.json")
    disk.deliver(plan, opened.plan.to_json().encode())
    notes = (f"plan written to {plan}", *write_files(opened, request, plan))
    job = opened.job
    seconds = time.monotonic() - started
    return job.report(Measured(seconds, job.plan.peak_memory, plan=job.plan, notes=notes, dry_run=True))


def write_files(opened: OpenPlan, request: Any, plan: Path | Address | None = None) -> tuple[str, ...]:
    """Write the files of a job for a scheduler; what to tell the user. See `adapterkit.verbs.engines.written.write_job`.

    Args:
        plan: the plan file, where the request does not name one.
    """
    from adapterkit.verbs.engines.written import write_job

    where = _shared(request.plan) if plan is None else plan
    return write_job(opened, where, request, workers_of(request), part_size(request, opened.plan))


def _shared(plan: Any) -> Path | Address:
    """A plan file as workers elsewhere name it."""
    return plan if isinstance(plan, Address) else Path(plan).absolute()


def forecast_in(report: Any, job: Job, request: Any) -> Any:
    """A report of what would be done, with what workers would take."""
    from adapterkit.verbs.engines.forecast import forecast
    from adapterkit.verbs.execute import OpenPlan, has_parts, no_parts

    if not has_parts(job.executed):
        raise no_parts(job.executed, f"leave out {option('workers')}")
    parts = OpenPlan(job.executed, "", part_size(request, job.executed)).parts
    rate, jobs = parse_rate(request.bandwidth), request.jobs or default_jobs()
    found = tuple(forecast(parts, count, bandwidth=rate, price=request.price, jobs=jobs) for count in request.counts)
    return replace(report, forecast=found)
