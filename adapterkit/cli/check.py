"""`adapterkit check`"""

from __future__ import annotations

from pathlib import Path

from adapterkit.cli.annotate import append_summary, output_options, problems_of, show_problems, write_report
from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import say, show_json
from adapterkit.errors import counted
from adapterkit.requests.check import CheckRequest


@command_of(
    CheckRequest,
    name="check",
    short_help="Say whether adapters fit a base, and what a server makes of them.",
    own=output_options("github", "sarif"),
)
def command(request: CheckRequest, form: str, report_file: Path | None, summary: Path | None, as_json: bool) -> int:
    """Check ADAPTERs against BASE: names, shapes, vocabulary, what they say of their base. Headers only, but for --scan.

    Where an adapter has a record (see register), it is also checked that BASE has the weights it was trained on: from
    digests, else from at most 512 KiB of them.

    Options of a merge may be given: the merge that has them is planned, and what it refuses is refused here with its exit
    code. Exits with 3 when something else does not hold.

    \b
    Example:
      adapterkit check meta-llama/Llama-3.2-1B ./my-adapter --for vllm
      adapterkit check meta-llama/Llama-3.2-1B ./my-adapter --scan --output-format sarif > check.sarif
    """
    from adapterkit.verbs.check import check

    report = check(**{name: getattr(request, name) for name in request.named})
    write_report(report_file, report)
    verdict = f"{'fits' if report.ok else 'does not hold'}: {counted(report.touched, 'tensor')} of {report.base}"
    if summary is not None:
        from adapterkit.lint.problems import summary as markdown

        append_summary(summary, markdown(f"adapterkit check {' '.join(report.adapters)}", problems_of(report), verdict))
    if as_json or form == "json":
        show_json(report)
    elif form == "text":
        for finding in report.findings:
            where = "" if finding.message.startswith(finding.adapter) else f"{finding.adapter}: "
            say(f"{finding.level}: {where}{finding.message}{'; ' + finding.hint if finding.hint else ''}")
        say(verdict)
    else:
        show_problems(problems_of(report), form)
    return report.exit_code
