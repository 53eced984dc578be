"""What is done with the report of a verification on the command line: by `verify`, by `run` and `execute` of a saved one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import command_line, note
from adapterkit.cli.paths import FILE_THERE
from adapterkit.errors import AuthError, OutputError, StoreError, UsageError, option
from adapterkit.places import address_of

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.places import Address
    from adapterkit.verbs.verify.report import VerifyReport

# A caller in Python does this by itself.
OWN = (
    click.Option(["--html"], type=FILE_THERE, metavar="FILE", help="Write the evidence as one HTML page."),
    click.Option(["--markdown"], type=FILE_THERE, metavar="FILE", help="Write a summary as Markdown."),
    click.Option(["--step-summary"], is_flag=True, help="Append that summary to $GITHUB_STEP_SUMMARY."),
    click.Option(
        ["--attach/--no-attach"],
        default=None,
        help="Write the figures into MERGED's record. By default into the adapterkit.json of an output, here or in a store, "
        "and not into a registered version, of which it makes a new one. With --html such a version keeps the page too.",
    ),
)
NAMES = ("html", "markdown", "step_summary", "attach")


def check_compared(asked: Mapping[str, object], compared: bool) -> None:
    """Refuse what is done with a report where there will be none.

    Raises:
        UsageError
    """
    name = next((name for name in NAMES if asked[name]), None)
    if name is not None and not compared:
        raise UsageError(
            f"{option(name)} needs the report of a comparison, and nothing is compared here", "leave it out"
        )


def check_of_plan(asked: Mapping[str, object], plan: Plan, compared: bool) -> None:
    """The same, of a saved plan, which may be of another verb.

    Raises:
        UsageError
    """
    name = next((name for name in NAMES if asked[name] or (name == "attach" and asked[name] is not None)), None)
    if name is not None and plan.request.get("verb") != "verify":
        raise UsageError(
            f"{option(name)} is about a verification, and this plan is of a {plan.request.get('verb')}", "leave it out"
        )
    check_compared(asked, compared)


def deliver(
    report: VerifyReport,
    *,
    html: Path | Address | None,
    markdown: Path | Address | None,
    step_summary: bool,
    attach: bool | None,
) -> None:
    """Write what was asked for, and the figures into the record of an output that has one, here or in a store.

    Raises:
        OutputError, UsageError, NotFound, RegistryError, AuthError, StoreError
    """
    page = as_html(report) if html is not None else ""
    write(report, html, markdown, page=page, step_summary=step_summary)
    there = address_of(report.merged) is not None
    if attach or (attach is None and report.record and (there or Path(report.merged).exists())):
        from adapterkit.verbs.verify.evidence import attach as into

        try:
            found = into(report, report.merged, page=page.encode())
        except (AuthError, OutputError, StoreError) as error:
            if attach:
                raise
            # Who may read a model may often not write to it. Nobody asked for this by name, and the result is yet to be shown.
            note(f"the figures are not in the record of {report.merged}: {error.message}")
            return
        if found.new:
            note(f"evidence written to {found.ref or found.path}")


def as_html(report: VerifyReport) -> str:
    """The page, with the command that made it and when."""
    from adapterkit.registry.record import now
    from adapterkit.verbs.verify.page import html

    return html(report, command=command_line(), when=now())


def write(
    report: VerifyReport,
    html: Path | Address | None,
    markdown: Path | Address | None,
    *,
    page: str = "",
    step_summary: bool = False,
) -> None:
    """The page (``page``, or made here) and the summary, where they are wanted.

    Raises:
        OutputError: a file cannot be written.
        UsageError: there is no job to summarise.
    """
    from adapterkit.disk import open_appended
    from adapterkit.stores.files import deliver as put
    from adapterkit.verbs.verify.summary import markdown as as_markdown

    try:
        if html is not None:
            put(html, (page or as_html(report)).encode())
            note(f"page written to {html}")
        if markdown is not None:
            put(markdown, as_markdown(report).encode())
            note(f"summary written to {markdown}")
        if step_summary:
            summary = os.environ.get("GITHUB_STEP_SUMMARY")
            if not summary:
                raise UsageError("GITHUB_STEP_SUMMARY is not set", "leave out --step-summary outside of a job")
            with open(open_appended(Path(summary)), "a", encoding="utf-8") as file:
                file.write(as_markdown(report))
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be written ({error.strerror})", "check the path") from None
