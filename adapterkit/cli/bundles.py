"""`adapterkit export`, `adapterkit import`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import say, show_json, size
from adapterkit.cli.paths import FILE_THERE
from adapterkit.errors import counted

if TYPE_CHECKING:
    from adapterkit.places import Address


@click.command(name="export", short_help="Write versions with all they were made from into one file.")
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.option("-o", "--out", required=True, type=FILE_THERE, help="The file or, with --folder, folder.")
@click.option("--no-parents", is_flag=True, help="Leave out what they were made from.")
@click.option("--folder", is_flag=True, help="One version, as a folder of plain files.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(refs: tuple[str, ...], out: Path | Address, no_parents: bool, folder: bool, as_json: bool) -> None:
    """Write REFs and their registered ancestors into a bundle for a place without a network.

    \b
    Example:
      adapterkit export my-merge@prod -o my-merge.bundle
      adapterkit export my-adapter@2 --folder -o ./my-adapter
    """
    if folder:
        from adapterkit.places import local
        from adapterkit.registry.checkout import checkout

        if len(refs) != 1:
            raise click.UsageError("--folder takes one REF.")
        made = checkout(refs[0], to=Path(local(str(out), "-o")))
        if as_json:
            show_json({"path": str(made), "refs": list(refs)})
        else:
            say(str(made))
        return
    from adapterkit.registry.bundle import export_bundle

    found = export_bundle(refs, out, parents=not no_parents)
    if as_json:
        show_json(found)
        return
    for ref in found.refs:
        say(ref)
    say(f"{found.path}: {counted(len(found.refs), 'version')}, {counted(found.blobs, 'blob')}, {size(found.bytes)}")


@click.command(name="import", short_help="Add what a bundle holds to the registry.")
@click.argument("bundle", type=FILE_THERE)
@click.option("--aliases", is_flag=True, help="Set the aliases it carries too, where there are none of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_(bundle: Path | Address, aliases: bool, as_json: bool) -> None:
    """Add the versions in BUNDLE; every byte is checked against its digest.

    Exits with 6 when it holds anything but plain files of ours.

    \b
    Example:
      adapterkit import my-merge.bundle
    """
    from adapterkit.registry.bundle import import_bundle

    found = import_bundle(bundle, aliases=aliases)
    if as_json:
        show_json(found)
        return
    for before, after, new in found.versions:
        say(f"{after}{'' if new else ' was there already'}{'' if before == after else f' (in the bundle: {before})'}")
    say(f"{size(found.stored)} stored")
