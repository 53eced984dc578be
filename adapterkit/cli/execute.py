"""`adapterkit execute`"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.output import Progress, file_count, say, show_json, size
from adapterkit.cli.paths import FILE_THERE, OUT_THERE
from adapterkit.cli.run import failed
from adapterkit.cli.verification import OWN, check_of_plan, deliver
from adapterkit.requests.option import DEVICES
from adapterkit.requests.workers import ON_DEVICE

if TYPE_CHECKING:
    from adapterkit.places import Address
    from adapterkit.verbs.execute import OpenPlan


def _of_verification(command: click.Command) -> click.Command:
    """The command, with what is done with a report."""
    command.params.extend(OWN)
    return command


@_of_verification
@click.command(name="execute", short_help="Execute a saved plan, or one part of it.")
@click.argument("plan", type=FILE_THERE)
@click.option("-o", "--out", required=True, type=OUT_THERE, help="The folder to make, here or in a store.")
@click.option("--part", type=click.IntRange(0), help="Only this part; the folder appears when all parts are finished.")
@click.option("--part-size", metavar="SIZE", help="Work of a part, like 1GB; by default a part is a file.")
@click.option("--finish", is_flag=True, help="All parts are done: make the folder.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads.")
@click.option("--device", metavar=DEVICES, help=ON_DEVICE)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--served", is_flag=True, hidden=True, help="Execute the parts whose numbers stand on standard input.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    plan: Path | Address,
    out: Path | Address,
    part: int | None,
    part_size: str | None,
    finish: bool,
    jobs: int | None,
    device: str | None,
    force: bool,
    served: bool,
    as_json: bool,
    **asked: Any,
) -> int:
    """Execute a PLAN that --save-plan of a verb wrote.

    The parts can run on several machines that share a file system, in any order; the bytes are those of a whole run.

    \b
    Example:
      adapterkit merge BASE ADAPTER --save-plan plan.json
      adapterkit execute plan.json -o merged --part 0        # one call for each part, anywhere
      adapterkit execute plan.json -o merged --finish
    """
    from adapterkit.checkpoint.plan import parse_size, read_plan
    from adapterkit.verbs.execute import OpenPlan, execute, has_parts, on_device

    if part is not None and finish:
        raise click.UsageError("--part and --finish exclude each other: parts come first.")
    loaded = on_device(read_plan(plan), device)
    check_of_plan(asked, loaded, part is None and not served)
    opened = OpenPlan(loaded, out, None if part_size is None else parse_size(part_size))
    if served:
        _serve(opened, jobs)
        return 0
    if not has_parts(loaded) and part is None:
        report = execute(loaded, out, jobs=jobs, force=force)
    else:
        if part is None:
            opened.check(force=force)  # before the work, not after it
        for index in [part] if part is not None else [] if finish else range(len(opened.parts)):
            with Progress(f"part {index} of {len(opened.parts)}", enabled=not as_json) as progress:
                report = opened.execute(index, jobs=jobs, progress=progress)
        if part is None:
            report = opened.finish(force=force)
    if part is None and hasattr(report, "findings"):
        deliver(report, **asked)
    if as_json:
        show_json(report)
    elif part is not None:
        say(f"part {part} of {len(opened.parts)} is done")
    elif hasattr(report, "findings"):
        from adapterkit.cli.verify import show as show_verification

        show_verification(report)
    else:
        say(f"{out}: {size(report.nbytes)} in {file_count(len(loaded.files))}")
    return 3 if part is None and failed(report) else 0


def _serve(opened: OpenPlan, jobs: int | None) -> None:
    """Be a worker of `run`: messages have standard output for themselves, and what else is printed goes to standard error."""
    from adapterkit.verbs.served import serve

    answers = os.dup(1)
    os.dup2(2, 1)
    serve(opened, sys.stdin.buffer, answers, jobs=jobs)
