"""`adapterkit remake`"""

from __future__ import annotations

import click

from adapterkit.cli.output import say, show_json, size


@click.command(name="remake", short_help="Make the bytes of a version again that is kept as its recipe.")
@click.argument("ref")
@click.option("--base", metavar="REF", help="The base itself, where the registry holds only its identity.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(ref: str, base: str | None, as_json: bool) -> None:
    """Make REF again from its record, hold it against its digests, and keep the bytes until gc frees them.

    Verbs that need the bytes do this by themselves; --base is for a base that is a folder of yours. Exits with 3 when other
    bytes come out.

    \b
    Example:
      adapterkit remake my-model-q4 --base ./base
    """
    from adapterkit.verbs.remake import remake

    stored = remake(ref, base=base)
    if as_json:
        show_json({"ref": ref, "stored": stored})
    else:
        say(f"{ref} was made again with the same bytes; {size(stored)} stored")
