"""``--output-format``, ``--report`` and ``--summary``: the forms of a result that CI reads, shared by the verbs that have
them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit import disk
from adapterkit.cli.output import clean, say_command, show_json
from adapterkit.cli.paths import FILE, FILE_THERE

if TYPE_CHECKING:
    from adapterkit.lint.problems import Problem
    from adapterkit.places import Address
    from adapterkit.verbs.check import CheckReport, Diagnostic

CONFIG = "adapter_config.json"
LIMIT = 1000 << 10  # bytes of a job summary; GitHub drops one of more than 1024 KiB

# Which field of an adapter's config a finding is about, by its code (of a server's: what stands after the server's name).
FIELDS = {
    "local-base": "base_model_name_or_path",
    "no-base": "base_model_name_or_path",
    "other-base": "base_model_name_or_path",
    "other-weights": "base_model_name_or_path",
    "no-revision": "revision",
    "other-revision": "revision",
    "not_lora": "peft_type",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "alpha_pattern": "alpha_pattern",
    "rank_pattern": "rank_pattern",
    "whole": "modules_to_save",
    "bias": "bias",
    "tokens": "trainable_token_indices",
    "experts": "target_parameters",
    "residual": "init_lora_weights",
    "block_diagonal": "use_bdlora",
    "pooled": "use_qalora",
    "rank_16": "r",
    "rank_512": "r",
    "local_base": "base_model_name_or_path",
    "no_base": "base_model_name_or_path",
    "UnsupportedAdapter": "peft_type",
    "scan-hidden-whole": "modules_to_save",
    "scan-whole": "modules_to_save",
    "scan-hidden-rank": "r",
}
RULES = {
    "local-base": "A base named by a path means nothing on another machine.",
    "no-base": "An adapter should say which base it was trained on.",
    "other-base": "The base given is not the one that the adapter names.",
    "other-weights": "The base given has other weights than the one that the adapter was trained on.",
    "no-revision": "The base may move; its revision says which one was meant.",
    "other-revision": "The base given is of another revision than the one that the adapter was trained on.",
    "TargetError": "Every tensor of an adapter needs its place in the base.",
    "AdapterError": "The adapter is damaged or not understood.",
    "UnsupportedAdapter": "The adapter cannot be folded into weights.",
    "scan": "How much of an adapter was scanned, and beside how many others.",
    "scan-size": "The change of one module is far larger than that of others of its kind.",
    "scan-spike": "The change of one module is one direction, far more than that of others of its kind.",
    "scan-row": "The change of one module lies in one output row, far more than that of others of its kind.",
    "scan-column": "The change of one module lies in one input column, far more than that of others of its kind.",
    "scan-token": "The trained row of one token is far larger than the others.",
    "scan-whole": "A whole parameter is replaced, and the scan does not look into it.",
    "scan-hidden-whole": "A whole parameter is replaced that the config does not declare.",
    "scan-hidden-rank": "A module has a higher rank than the config declares.",
    "scan-code": "An adapter holds no code.",
    "scan-pickle": "A pickle or archive can run code when it is loaded.",
    "scan-file": "Files that do not belong to an adapter may be anything.",
    "scan-large": "A change was too large for the scan to look into.",
    "scan-not-read": "The change could not be looked at.",
}


def output_options(*forms: str) -> tuple[click.Option, ...]:
    """``--output-format`` with these forms beside ``text`` and ``json``, ``--report`` and ``--summary``."""
    words = {"github": "github annotates files", "sarif": "sarif is for code scanning"}
    how = ", ".join(words[one] for one in forms)
    choices, file = click.Choice(["text", "json", *forms]), FILE
    return (
        click.Option(["--output-format", "form"], type=choices, default="text", help=f"Of the result; {how}."),
        click.Option(
            ["--report", "report_file"], type=FILE_THERE, metavar="FILE", help="Write the report to FILE as JSON."
        ),
        click.Option(["--summary"], type=file, metavar="FILE", help="Append the result to FILE as Markdown."),
    )


def relative(path: str | Path) -> str:
    """A path as CI wants it: relative to the working directory, where it lies below that."""
    real, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(real, here).replace(os.sep, "/") if real.startswith(here + os.sep) else str(path)


def problems_of(report: CheckReport) -> list[Problem]:
    """The findings of a check, each at its line of the adapter's config."""
    return [_problem(finding, report.server) for finding in report.findings]


def _problem(finding: Diagnostic, server: str | None) -> Problem:
    from adapterkit.lint.problems import Problem, line_of_key

    path = Path(finding.adapter).expanduser() / CONFIG
    if not path.is_file():
        return Problem(finding.level, finding.code, f"{finding.adapter}: {finding.message}", finding.hint)
    code = finding.code.removeprefix(f"{server}-") if server is not None else finding.code
    line = line_of_key(path.read_text("utf-8", "replace"), FIELDS.get(code, "peft_type"))
    return Problem(finding.level, finding.code, finding.message, finding.hint, relative(path), line or 1)


def show_problems(problems: Sequence[Problem], form: str) -> None:
    """Problems as annotations or as a SARIF log."""
    from adapterkit.lint.problems import github, sarif

    if form == "sarif":
        show_json(sarif(problems, RULES))
        return
    for problem in problems:
        say_command(github(problem))


def write_report(path: Path | Address | None, report: Any) -> None:
    """Write a frozen value as JSON, where a file was asked for."""
    if path is not None:
        from adapterkit.redaction import redact
        from adapterkit.stores.files import deliver
        from adapterkit.verbs.report import to_json

        deliver(path, (redact(to_json(report)) + "\n").encode())


def append_summary(path: Path | None, markdown: str) -> None:
    """Append Markdown to a job summary, as far as there is room."""
    if path is None:
        return
    there = path.stat().st_size if path.exists() else 0
    data = clean(markdown, lines=True).encode()
    if there + len(data) > LIMIT:
        data = (
            data[: max(0, LIMIT - there - 32)].decode("utf-8", "ignore").rpartition("\n")[0].encode()
            + b"\n\n(cut off)\n"
        )
    with open(disk.open_appended(path), "ab") as file:
        file.write(data)
