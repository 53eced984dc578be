"""What MkDocs cannot do by itself: the command line's reference from click's own commands, and links out of docs/."""

from __future__ import annotations

import re
from typing import Any

import click
from mkdocs.structure.files import File, Files

CLI = "reference/cli.md"
OPTIONS = "reference/options.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the page of the command line."""
    files.append(File.generated(config, CLI, content=cli_reference()))
    files.append(File.generated(config, OPTIONS, content=options_reference()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository become plain names: the site stands alone."""
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!tutorials|reference|images)[\w./-]+\)", r"\1", markdown)


def cli_reference() -> str:
    """Every verb: what it does, its arguments and options, and its example."""
    from adapterkit.cli import VERBS, app

    about = (
        "Every verb prints its result on standard output and everything else on standard error. `--json` prints the report "
        "as it stands. Exit codes: 0 ok, 1 failure, 2 usage or a missing package, 3 a check did not hold, 4 authentication, "
        "5 network or Hub, 6 refused as unsafe, 7 not found, 130 interrupted."
    )
    parts = ["# Command line", "", about, ""]
    context = click.Context(app, info_name="adapterkit")
    for verb in VERBS:
        command = app.get_command(context, verb)
        assert command is not None
        parts += _command(command, verb, click.Context(command, info_name=f"adapterkit {verb}"))
    return "\n".join(parts)


def options_reference() -> str:
    """Every option of the verbs that have a request: its keyword, its flag, its key in a recipe, and what it decides."""
    from adapterkit.requests import every
    from adapterkit.requests.option import flag_of

    about = (
        "One row per option. *Values* decides the values of the output, *bytes* its layout or dtype alone, *run* neither; an "
        "*input* is what is read or where it goes. A dash is a door that does not have the option, with the reason."
    )
    parts = ["# Options", "", about, ""]
    for request in every():
        parts += [f"## {request.VERB}", "", "| keyword | command line | recipe | decides | |", "|---|---|---|---|---|"]
        for name, option in request.options().items():
            elsewhere = option.elsewhere
            flag = f"- ({elsewhere['cli']})" if "cli" in elsewhere else f"`{option.flag or flag_of(name)}`"
            place = "argument" if option.role == "input" and not option.flag and not option.short else flag
            key = (
                f"`{option.recipe}`"
                if option.recipe
                else f"- ({elsewhere['recipe']})"
                if "recipe" in elsewhere
                else "-"
            )
            parts.append(f"| `{name}` | {place} | {key} | {option.role} | {_plain(option.help)} |")
        parts.append("")
    return "\n".join(parts)


def _command(command: click.Command, verb: str, context: click.Context) -> list[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {verb}", "", "```text", usage, "```", ""]
    for paragraph in (command.help or "").split("\n\n"):
        if paragraph.strip().startswith("\b"):
            lines = paragraph.strip().split("\n")[1:]
            title = lines.pop(0) if lines and not lines[0].startswith(" ") else ""
            parts += [title, "", "```text", *(line.removeprefix("  ") for line in lines), "```", ""]
        else:
            parts += [_plain(" ".join(paragraph.split())), ""]
    options = (parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option))
    rows = [_row(option, context) for option in options if option.name != "help"]
    return [*parts, "| option | |", "|---|---|", *(row for row in rows if row), ""]


def _row(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    if record is None:
        return ""
    names, text = record
    return f"| `{names}` | {_plain(text)} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")
