"""`adapterkit attest`, and the option ``--attest`` of the verbs that make something"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import note, say, show_json
from adapterkit.cli.paths import FILE_THERE

if TYPE_CHECKING:
    from adapterkit.places import Address

attest_option = click.option(
    "--attest", is_flag=True, help="Write a SLSA provenance statement (in-toto) beside OUT, with every file's sha256."
)


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


def attested(wanted: bool, out: Path, inputs: Iterable[object]) -> None:
    """What ``--attest`` does when a verb has made ``out`` from ``inputs``; those on the Hub are named by the record."""
    if not wanted:
        return
    from adapterkit.provenance.attest import attest

    here = [str(ref) for ref in inputs if ref is not None and (os.path.exists(str(ref)) or "/" not in str(ref))]
    note(f"attested in {attest(out, here, strict=False).path}")
