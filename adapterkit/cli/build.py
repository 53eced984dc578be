"""`adapterkit build`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.annotate import append_summary, output_options, write_report
from adapterkit.cli.output import Progress, file_count, note, say, show_json, size
from adapterkit.cli.paths import LocalPath
from adapterkit.errors import counted

if TYPE_CHECKING:
    from adapterkit.recipe.report import BuildPlan, BuildReport


@click.command(
    name="build",
    short_help="Carry out a recipe: merge, convert, verify, register, push, reproducibly.",
    params=[*output_options("github")],
)
@click.argument("recipe", required=False, metavar="[RECIPE.toml]", type=LocalPath())
@click.option("--plan", "plan_only", is_flag=True, help="Print everything that will happen, from headers, and stop.")
@click.option("--locked", is_flag=True, help="Use the lock, and exit with 3 if anything that it holds moved.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; keep finished work if interrupted again.")
@click.option("--force", is_flag=True, help="Replace outputs that this recipe did not make, or that changed since.")
@click.option("--outside", is_flag=True, help="Let outputs lie outside of the recipe's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report (with --plan: the plan) as JSON.")
def command(
    recipe: str | None,
    plan_only: bool,
    locked: bool,
    jobs: int | None,
    resume: bool,
    force: bool,
    outside: bool,
    form: str,
    report_file: Path | None,
    summary: Path | None,
    as_json: bool,
) -> None:
    """Carry out RECIPE.toml (by default adapterkit.toml, or [tool.adapterkit] of pyproject.toml, here).

    What is there already and was made from the same inputs by the same versions is left alone. Outputs of one base and
    the same adapters are written in one pass. A lock beside the recipe says what every reference meant and which bytes
    came out; with --locked nothing may differ from it.

    \b
    Example:
      adapterkit build --plan
      adapterkit build RECIPE.toml --locked
    """
    from adapterkit.recipe.run import build, plan_build
    from adapterkit.recipe.summary import of_build, of_plan

    as_json = as_json or form == "json"
    if plan_only:
        planned = plan_build(recipe, locked=locked, jobs=jobs, outside=outside)
        write_report(report_file, planned)
        append_summary(summary, of_plan(planned) if summary is not None else "")
        if as_json:
            show_json(planned)
        else:
            show_plan(planned)
        return
    progress = Progress("building", enabled=not as_json)
    quiet = (lambda text: None) if as_json else note
    how: dict[str, Any] = {"jobs": jobs, "force": force, "resume": resume, "outside": outside}
    report = build(recipe, locked=locked, progress=progress, note=quiet, **how)
    progress.close()
    write_report(report_file, report)
    append_summary(summary, of_build(report) if summary is not None else "")
    if as_json:
        show_json(report)
    else:
        show_report(report)


def show_plan(planned: BuildPlan) -> None:
    """A plan, for readers."""
    for row in planned.outputs:
        say(f"{row.name}: {row.verb} to {row.to}, {row.out}")
        say(f"  {row.state}: {row.why}")
        say(f"  reads {', '.join(row.reads)}")
        if row.nbytes is not None and row.files is not None:
            changed = f", {counted(row.touched, 'tensor')} changed" if row.touched else ""
            say(
                f"  {size(row.nbytes)} in {file_count(len(row.files))}{changed}, about {size(row.peak_memory or 0)} of memory"
            )
        else:
            say("  its size follows from what it is made from, which is not there yet")
        if row.abreast:
            say(f"  in one pass with {', '.join(row.abreast)}")
        for text in row.then:
            say(f"  then {text}")
        for text in row.notes:
            note(f"note: {row.name}: {text}")
    todo = sum(row.state != "unchanged" for row in planned.outputs)
    if not todo:
        say("nothing to do")
        return
    passes = f"{planned.passes} pass{'' if planned.passes == 1 else 'es'}"
    say(f"would make {todo} outputs in {passes}: {size(planned.nbytes)}, about {size(planned.peak_memory)} of memory")


def show_report(report: BuildReport) -> None:
    """A report, for readers."""
    for text in report.notes:
        note(f"note: {text}")
    for row in report.outputs:
        same = " (unchanged)" if row.state == "unchanged" else ""
        say(f"{row.name}: {row.out}, {size(row.nbytes)}, sha256:{row.digest[:16]}{same}")
        if "verify" in row.after:
            say(f"  verified: {row.after['verify']['summary']}")
        if "register" in row.after:
            alias = row.after["register"]["alias"]
            say(f"  registered: {row.after['register']['ref']}{f', alias {alias}' if alias else ''}")
        if "push" in row.after:
            say(f"  pushed: {row.after['push']['url']}")
    done = f"{report.changed} of {counted(len(report.outputs), 'output')} made" if report.changed else "nothing to do"
    lock = f"; {report.lock} written" if report.lock_written else ""
    say(f"{done}, {report.seconds:.1f} s{lock}")
