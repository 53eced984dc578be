"""`adapterkit run`"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, duration, note, say, show_json, size
from adapterkit.cli.verification import OWN, check_of_plan, deliver
from adapterkit.cli.written import foretold
from adapterkit.errors import counted
from adapterkit.requests.workers import WRITTEN_JOBS, RunRequest

if TYPE_CHECKING:
    from adapterkit.verbs.run import RunReport


def _print_template(context: click.Context, option: click.Parameter, engine: str | None) -> None:
    if engine is not None:
        from adapterkit.verbs.engines.written import template_of

        click.echo(template_of(engine), nl=False)
        context.exit()


TEMPLATE = click.Option(
    ["--print-template"],
    type=click.Choice(WRITTEN_JOBS),
    expose_value=False,
    is_eager=True,
    callback=_print_template,
    help="Print the template of a job, for a copy of your own, and stop.",
)


@command_of(
    RunRequest,
    name="run",
    short_help="Execute a saved plan by workers: here, by Ray, Slurm or Kubernetes.",
    own=[TEMPLATE, *OWN],
)
def command(request: RunRequest, as_json: bool, **asked: Any) -> int:
    """Execute the parts of a PLAN by several workers, and make OUT of them.

    Every byte is that of a run by one process. Run it again after whatever ended it: it goes on where it was. All workers
    have to see the inputs and the folder of OUT. Where the plan is a verification, the exit code is 3 when MERGED is not what
    was trained, and its record gets the figures; what --html and --markdown ask for is written when the report is.

    \b
    Example:
      adapterkit merge BASE ADAPTER --save-plan plan.json
      adapterkit run plan.json --dry-run --workers 1,8,64 --bandwidth 25Gb/s
      adapterkit run plan.json -o merged --on local --workers 4
      adapterkit run plan.json -o merged --on ray --address auto --workers 16 --events events.jsonl
      adapterkit run plan.json -o merged --on slurm --workers 64 --submit
      adapterkit run plan.json -o merged --on k8s --workers 64 --set image=registry/adapterkit:1
    """
    from adapterkit.checkpoint.plan import read_plan
    from adapterkit.stores.meter import moving
    from adapterkit.verbs.run import carried_out

    if request.out is None and not request.dry_run:
        raise click.UsageError("Missing option '-o' / '--out': the folder or file to make.")
    with moving(), Progress("running", enabled=not as_json) as progress:
        plan = read_plan(request.plan)
        if asked["attach"] is not None or any(asked.values()):
            check_of_plan(asked, plan, not request.dry_run and request.on not in WRITTEN_JOBS)
        report = carried_out(replace(request, progress=progress), plan)
    if hasattr(report.report, "findings"):
        deliver(report.report, **asked)
    if as_json:
        show_json(report)
    else:
        show(report, request)
    return 3 if failed(report.report) else 0


def failed(report: Any) -> bool:
    """Whether the report of a verb, where there is one, says that something is not what was trained."""
    return getattr(report, "ok", True) is False


def show(report: RunReport, request: RunRequest) -> None:
    """The report, for readers."""
    for text in report.notes:
        note(f"note: {text}")
    if request.dry_run:
        done = f", {report.found} of them done" if report.found else ""
        say(f"would write {size(report.nbytes)} in {counted(report.parts, 'part')}{done}")
        foretold(report.forecast)
        return
    if report.on in WRITTEN_JOBS:
        return
    found = f", {report.found} of them done before" if report.found else ""
    lost = f", {report.lost} workers lost and replaced" if report.lost else ""
    if request.task is not None:
        left = f"; {counted(report.left, 'part is', 'parts are')} left to others" if report.left else ""
        say(f"task {request.task} of {report.workers}: {size(report.bytes_written)} in {report.seconds:.1f} s{left}")
    else:
        busy = f"{duration(report.worker_seconds)} of work, {duration(report.cpu_seconds)} of the processor"
        say(
            f"{counted(report.parts, 'part')}{found} by {counted(report.workers, 'worker')} ({report.on}){lost}: {busy}"
        )
    if report.finished and hasattr(report.report, "findings"):
        from adapterkit.cli.verify import show as show_verification

        show_verification(report.report)
        say(f"{report.out}: the report, {report.seconds:.1f} s")
    elif report.finished:
        say(f"{report.out}: {size(report.nbytes)}, {report.seconds:.1f} s")
