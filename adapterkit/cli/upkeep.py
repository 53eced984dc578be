"""`adapterkit fsck`, `adapterkit gc`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.output import count, note, say, show_json, size
from adapterkit.errors import counted


def _part(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    if value is None:
        return 1, 1
    number, _, parts = value.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and len(value) < 12):
        raise click.BadParameter(f"'{value}' is not like 3/7")
    return int(number), int(parts)


@click.command(name="fsck", short_help="Read the whole registry and say what is damaged.")
@click.option("--repair", is_flag=True, help="Set rotten blobs aside and write again what other files still say.")
@click.option("--reindex", is_flag=True, help="Build the index again from the files first.")
@click.option("--part", metavar="I/N", callback=_part, help="Check one of N parts, such as one a day: 3/7.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def fsck(repair: bool, reindex: bool, part: tuple[int, int], as_json: bool) -> int:
    """Read and check every record, blob, alias and the index. Nothing is changed unless asked for, nothing ever deleted.

    A large registry can be read in parts, in any order; all of them together check everything.

    Exits with 3 when something is damaged and not repaired.

    \b
    Example:
      adapterkit fsck
      adapterkit fsck --repair
      adapterkit fsck --part 1/7
    """
    from adapterkit.registry.fsck import fsck as verb

    if reindex:
        from adapterkit.registry.home import open_home
        from adapterkit.registry.index import reindex as build

        build(open_home())
    found = verb(repair=repair, part=part)
    if as_json:
        from dataclasses import asdict

        show_json({**asdict(found), "clean": found.clean})
        return 0 if found.clean else 3
    for text in found.notes:
        note(f"note: {text}")
    for problem in found.problems:
        say(f"{'repaired' if problem.repaired else 'damaged'}: {problem.path}: {problem.sentence}")
    held = f"{counted(found.records, 'record')}, {counted(found.aliases, 'alias', 'aliases')}, {counted(found.blobs, 'blob')}"
    say(f"{'clean' if found.clean else 'damaged'}: {held} ({size(found.bytes)})")
    return 0 if found.clean else 3


@click.command(name="gc", short_help="Free blobs that no visible version names.")
@click.option("--apply", is_flag=True, help="Delete; without it, only say what would be.")
@click.option("--recipes", is_flag=True, help="Say what keeping versions as their recipes would save; free nothing.")
@click.option("--keep-days", type=click.FloatRange(0), help="Keep what is younger; 14 by default, 1 for uploads.")
@click.option(
    "--uploads",
    metavar="PLACE",
    help="Look not at the registry but at what killed runs left in s3://bucket/folder (or gs://, az://, hf://buckets/) or in a "
    "folder here.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def gc(apply: bool, recipes: bool, keep_days: float | None, uploads: str | None, as_json: bool) -> None:
    """Say which blobs no visible version names, or free them with --apply. Records and aliases always stay.

    Exits with 3, and frees nothing, while a record cannot be read.

    \b
    Example:
      adapterkit gc
      adapterkit gc --apply
      adapterkit gc --recipes
      adapterkit gc --uploads s3://models --apply
      adapterkit gc --uploads ./outputs
    """
    if recipes and uploads is not None:
        raise click.UsageError("--recipes and --uploads are two different questions; give one.")
    if recipes:
        _recipes(apply, as_json)
        return
    if uploads is not None:
        _uploads(uploads, apply, 1.0 if keep_days is None else keep_days, as_json)
        return
    keep_days = 14.0 if keep_days is None else keep_days
    from adapterkit.registry.gc import gc as verb

    found = verb(apply=apply, keep_days=keep_days)
    if as_json:
        show_json(found)
        return
    done = "freed" if apply else "would free"
    say(
        f"{done} {counted(len(found.blobs), 'blob')} ({size(found.bytes)}) and {counted(found.temporary, 'temporary file')}"
    )
    if found.young:
        note(f"note: {found.young} more are younger than {keep_days:g} days")


def _recipes(apply: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from adapterkit.registry.gc import recipes as verb

    if apply:
        raise click.UsageError("--recipes frees nothing; register --as-recipe keeps a version so.")
    found = verb()
    if as_json:
        show_json([asdict(one) for one in found])
        return
    for one in found:
        say(f"{one.ref}: made by {one.operation}, {size(one.bytes)}")
    said = counted(len(found), "version could be kept as its recipe", "versions could be kept as their recipes")
    say(f"{said}, {size(sum(one.bytes for one in found))}; register --as-recipe proves it of one and keeps it so")


def _uploads(address: str, apply: bool, keep_days: float, as_json: bool) -> None:
    from adapterkit.places import address_of, readable

    if address_of(address) is None and not address.startswith("hf://"):
        _left(Path(readable(address, "the place to look at")).expanduser(), apply, keep_days, as_json)
        return
    from adapterkit.checkpoint.uploads import sweep_uploads

    found = sweep_uploads(address, apply=apply, keep_days=keep_days)
    if as_json:
        show_json(found)
        return
    say(f"{'aborted' if apply else 'would abort'} {counted(len(found.uploads), 'upload')} to {found.address}")
    for key in found.uploads[:10]:
        say(f"  {key}")
    if found.notes:
        say(
            f"{'removed' if apply else 'would remove'} {counted(len(found.notes), 'object')} that runs left beside outputs"
        )
    for key in found.unfinished:
        note(
            f"note: the run to {key} ended while its files got their names; go on with --resume, begin anew with --force, "
            "or remove them"
        )
    if found.young:
        note(f"note: {found.young} more are younger than {keep_days:g} days")


def _left(where: Path, apply: bool, keep_days: float, as_json: bool) -> None:
    """What runs left in a folder of this machine."""
    from adapterkit.disk.left import sweep_folder

    found = sweep_folder(where, keep_days=keep_days, apply=apply)
    if as_json:
        show_json(found)
        return
    taken = len(found.left) - len(found.kept)
    say(f"{'removed' if apply else 'would remove'} {count(taken)} files and folders that runs left at {found.folder}")
    for path in found.left[:10]:
        say(f"  {path}{' (could not be removed)' if path in found.kept else ''}")
