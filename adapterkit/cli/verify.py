"""`adapterkit verify`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, command_line, count, note, say, show_json
from adapterkit.cli.paths import FILE_THERE
from adapterkit.cli.written import foretold
from adapterkit.errors import UsageError, option
from adapterkit.requests.verify import VerifyRequest
from adapterkit.requests.workers import WRITTEN_JOBS

if TYPE_CHECKING:
    from adapterkit.places import Address
    from adapterkit.verbs.verify.report import VerifyReport

_FILE = FILE_THERE
# What is done with the report, which a caller in Python does by itself.
_OWN = (
    click.Option(["--html"], type=_FILE, metavar="FILE", help="Write the evidence as one HTML page."),
    click.Option(["--markdown"], type=_FILE, metavar="FILE", help="Write a summary as Markdown."),
    click.Option(["--step-summary"], is_flag=True, help="Append that summary to $GITHUB_STEP_SUMMARY."),
    click.Option(
        ["--attach/--no-attach"],
        default=None,
        help="Write the figures into MERGED's record. By default into the adapterkit.json beside an output, and not into "
        "a registered version, which would make a new one. With --html such a version keeps the page too.",
    ),
)


@command_of(VerifyRequest, name="verify", short_help="Prove that a merged model is the trained one.", own=_OWN)
def command(
    request: VerifyRequest,
    html: Path | Address | None,
    markdown: Path | Address | None,
    step_summary: bool,
    attach: bool | None,
    as_json: bool,
) -> int:
    """Compare MERGED with BASE and its adapters, tensor by tensor, and say what is wrong by name.

    Every tensor is recomputed and compared in a stream; nothing is loaded whole. Options of the merge are read from the
    adapterkit.json beside MERGED where it has one. The exit code is 3 when MERGED is not what was trained.

    \b
    Example:
      adapterkit verify merged --base meta-llama/Llama-3.2-1B --adapter ./my-adapter
      adapterkit verify merged-Q4_K_M.gguf --base Llama-3.2-1B-F16.gguf --adapter ./my-adapter --html report.html
      adapterkit verify merged --base BASE --adapter ./my-adapter --prompts prompts.txt --max-kl 0.01 --min-top1 0.99
      adapterkit verify s3://models/merged --base s3://models/base --adapter ./my-adapter --on ray --workers 8 -o report.json
    """
    from adapterkit.verbs.verify import verify

    _check_own({"html": html, "markdown": markdown, "step_summary": step_summary, "attach": attach}, request)
    with Progress("verifying", enabled=not as_json) as progress:
        named = {name: getattr(request, name) for name in request.named}
        report = verify(**named, progress=progress)
    if report.dry_run:
        _planned(report, request, as_json)
        return 0
    if request.out is not None:
        note(f"report written to {request.out}")
    merged = str(request.merged)
    page = as_html(report) if html is not None else ""
    write(report, html, markdown, page=page, step_summary=step_summary)
    if attach or (attach is None and report.record and Path(merged).exists()):
        _attach(report, merged, page)
    if as_json:
        show_json(report)
    else:
        show(report)
    return 0 if report.ok else 3


def _check_own(asked: dict[str, object], request: VerifyRequest) -> None:
    """Refuse what is done with a report where there will be none.

    Raises:
        UsageError
    """
    name = next((name for name, value in asked.items() if value), None)
    if name is not None and (not request.writes or request.on in WRITTEN_JOBS):
        raise UsageError(
            f"{option(name)} needs the report of a comparison, and nothing is compared here", "leave it out"
        )


def _planned(report: VerifyReport, request: VerifyRequest, as_json: bool) -> None:
    """What would be compared."""
    if request.save_plan is not None:
        note(f"plan written to {request.save_plan}")
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    say(f"would compare {report.merged} with {report.base} and {', '.join(report.adapters)}")
    foretold(report.forecast)


def _attach(report: VerifyReport, merged: str, page: str) -> None:
    from adapterkit.verbs.verify.evidence import attach

    found = attach(report, merged, page=page.encode())
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
    from adapterkit.errors import OutputError
    from adapterkit.stores.files import deliver
    from adapterkit.verbs.verify.summary import markdown as as_markdown

    try:
        if html is not None:
            deliver(html, (page or as_html(report)).encode())
            note(f"page written to {html}")
        if markdown is not None:
            deliver(markdown, as_markdown(report).encode())
            note(f"summary written to {markdown}")
        if step_summary:
            summary = os.environ.get("GITHUB_STEP_SUMMARY")
            if not summary:
                raise UsageError("GITHUB_STEP_SUMMARY is not set", "leave out --step-summary outside of a job")
            with open(open_appended(Path(summary)), "a", encoding="utf-8") as file:
                file.write(as_markdown(report))
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be written ({error.strerror})", "check the path") from None


def show(report: VerifyReport) -> None:
    """The verdict, what is wrong, and the figures."""
    from adapterkit.verbs.verify.summary import distance

    for text in report.notes:
        note(f"note: {text}")
    tensors = report.tensors
    for one in report.findings:
        if one.severity == "note":
            note(f"note: {one.text}")
        else:
            say(f"{one.severity}: {one.kind}: {one.text}{'; ' + one.hint if one.hint else ''}")
    if tensors is not None:
        counts = ", ".join(f"{count(number)} {status}" for status, number in tensors.counts.items())
        say(f"tensors  {counts}; {count(tensors.touched)} of {count(tensors.total)} changed by adapters")
        say(
            f"         cosine {tensors.cosine:.5f} with the change, error beside it {tensors.error:.2g}, "
            f"{tensors.retention:.2%} of it is there (|d|/|W| {tensors.relative:.1e}, unmoved {tensors.unmoved:.1%}), "
            f"{tensors.seconds:.1f} s"
        )
    if report.pair is not None:
        pair = report.pair
        say(
            f"together with {report.residual}: cosine {pair.cosine:.5f}, error {pair.error:.2g}, "
            f"{pair.retention:.2%} of the change is there, {pair.seconds:.1f} s"
        )
    if report.layers is not None:
        layers = report.layers
        say(
            f"layers   outputs off by {layers.error:.1e}, where the adapter changes them by {layers.change:.1e}; "
            f"worst: {layers.worst}"
        )
    if report.model is not None:
        model = report.model
        say(f"model    {model.tokens:,} tokens of {len(model.prompts)} prompts in {model.runtime}")
        say(f"         merged beside base + adapters: {distance(model.merged)}")
        say(f"         base beside base + adapters:   {distance(model.base)}")
        say("         perplexity: " + ", ".join(f"{name} {value:.3f}" for name, value in model.perplexity.items()))
    say(f"{'verified' if report.ok else 'not verified'}: {report.summary}")
