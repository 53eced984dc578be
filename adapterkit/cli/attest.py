"""`adapterkit attest`: a statement of provenance beside an output that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import say, show_json
from adapterkit.cli.paths import FILE_THERE

if TYPE_CHECKING:
    from adapterkit.places import Address


@click.command(name="attest", short_help="Write a provenance statement (in-toto, SLSA) beside an output.")
@click.argument("path", type=FILE_THERE)
@click.option("--input", "inputs", multiple=True, metavar="REF", help="What it was made from, to name its files too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path | Address, inputs: tuple[str, ...], as_json: bool) -> None:
    """Write adapterkit.intoto.json beside PATH, the output of a verb, from the record that lies there.

    It is unsigned; `adapterkit sign` signs it, and the output with it.

    \b
    Example:
      adapterkit attest merged --input ./base --input ./my-adapter
    """
    from adapterkit.provenance.attest import attest

    made = attest(path, inputs)
    if as_json:
        show_json({"path": str(made.path), "subjects": made.subjects, "dependencies": made.dependencies})
    else:
        say(f"{made.path}: {made.subjects} files, made from {made.dependencies} digests")
