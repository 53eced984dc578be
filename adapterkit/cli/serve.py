"""`adapterkit serve-args`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.output import note, say, show_json
from adapterkit.cli.paths import FILE
from adapterkit.serving.servers import startable


def _names(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    return [name for name in startable() if name.startswith(typed)]


@click.command(name="serve-args", short_help="Print the command or Modelfile that loads versions in a server.")
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option(
    "--for", "server", required=True, metavar="SERVER", help=f"One of {', '.join(startable())}.", shell_complete=_names
)
@click.option("--base", default="", help="What to serve adapters on; by default the Hub id of their base.")
@click.option("--copy", type=FILE, metavar="DIR", help="Copy the files there instead of linking.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(refs: tuple[str, ...], server: str, base: str, copy: Path | None, as_json: bool) -> None:
    """Print what loads exactly these registered versions: one model, or several adapters on one base.

    Exits with 2 when the server cannot take them, 7 when a version or the base is not known.

    \b
    Example:
      adapterkit serve-args support@prod billing@prod --for vllm
      adapterkit serve-args my-merge@prod --for ollama > Modelfile
    """
    from adapterkit.places import readable
    from adapterkit.serving.command import serve_args

    found = serve_args(refs, server, base=str(readable(base, "--base")) if base else "", copy=copy)
    if as_json:
        show_json(found)
        return
    say(found.text, lines=True)
    for said in found.notes:
        note(f"note: {said}")
    for request in found.requests:
        note(f"request: {request}")
