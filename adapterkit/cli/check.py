"""`adapterkit check`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.annotate import append_summary, output_format, problems_of, show_problems, write_report
from adapterkit.cli.output import say, show_json


@click.command(name="check", short_help="Say whether adapters fit a base, and what a server makes of them.")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--for", "server", metavar="SERVER", help="vllm, sglang, tgi, lorax, llama.cpp, ollama or mlx.")
@click.option("--full", is_flag=True, help="Read every byte of BASE, where a record holds its strongest identity.")
@output_format("github", "sarif")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    base: str,
    adapters: tuple[str, ...],
    server: str | None,
    full: bool,
    form: str,
    report_file: Path | None,
    summary: Path | None,
    as_json: bool,
) -> int:
    """Check ADAPTERs against BASE: names, shapes, vocabulary, what they say of their base. Headers only.

    Where an adapter has a record (see register), it is also checked that BASE has the weights it was trained on: from
    digests, else from at most 512 KiB of them.

    Exits with 3 when something does not hold.

    \b
    Example:
      adapterkit check meta-llama/Llama-3.2-1B ./my-adapter --for vllm
      adapterkit check meta-llama/Llama-3.2-1B ./my-adapter --output-format sarif > check.sarif
    """
    from adapterkit.verbs.check import check

    report = check(base, adapters, server=server, full=full)
    write_report(report_file, report)
    verdict = f"{'fits' if report.ok else 'does not hold'}: {report.touched} tensors of {report.base}"
    if summary is not None:
        from adapterkit.lint.problems import summary as markdown

        append_summary(summary, markdown(f"adapterkit check {' '.join(adapters)}", problems_of(report), verdict))
    if as_json or form == "json":
        show_json(report)
    elif form == "text":
        for finding in report.findings:
            say(f"{finding.level}: {finding.adapter}: {finding.message}{'; ' + finding.hint if finding.hint else ''}")
        say(verdict)
    else:
        show_problems(problems_of(report), form)
    return 0 if report.ok else 3
