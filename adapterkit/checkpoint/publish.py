"""Targets are looked at before the first byte is written; how they are made and published is in `adapterkit.disk`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.folder import RECORD
from adapterkit.disk import (
    calls,
    partial_folder,
    publish,
    publish_files,
    read_regular,
    recover,
    staging,
    write_file,
    writing,
)
from adapterkit.errors import AdapterkitError, OutputError, UsageError, option, size
from adapterkit.foreign import json_value
from adapterkit.places import local

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.places import Address

RECORD_BYTES = 16 << 20  # of a record, at most
_RECORD_KEYS = frozenset({"digest", "files", "kind", "operation", "parents"})  # what every record of an output has

__all__ = [
    "check_free",
    "check_output",
    "check_target",
    "input_paths",
    "is_left_over",
    "named_beside",
    "partial_folder",
    "publish",
    "publish_files",
    "staging",
    "write_beside",
]


def check_target(out: Path, inputs: Iterable[Path], nbytes: int, *, force: bool, held: Iterable[Path] = ()) -> None:
    """Refuse a target before the first byte is written.

    ``held`` are files of an earlier run whose room the new one takes over.

    Raises:
        UsageError: it has no name, lies in an input, or an input in it.
        OutputError: it exists already, its folder is not writable, its name is too long, or the disk has no room.
    """
    local(out, "the output")
    if out.name in ("", ".."):
        raise UsageError(f"the output {str(out)!r} is not a name for a new folder", "name the folder to make")
    recover(out)
    real = out.resolve()
    for path in inputs:
        source = path.resolve()
        if real == source or source in real.parents or (force and real in source.parents):
            raise UsageError(f"the output {out} lies in or over the input {path}", "write to another folder")
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out} exists", f"choose another name, or replace it with {option('force', True)}")
    parent = next(folder for folder in real.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written to", "choose another place or change its permissions")
    free = calls.free(parent) + sum(map(_held, held))
    if nbytes > free:
        raise OutputError(
            f"{out} needs {size(nbytes)} and {parent} has {size(free)} free",
            "free some space or write elsewhere",
        )


def named_beside(out: Path, name: str) -> Path:
    """Where something lies that belongs to an output which is a file: ``OUT.gguf.adapterkit.json``."""
    return out.with_name(f"{out.name}.{name}")


def is_left_over(out: Path) -> bool:
    """Whether the record beside an output that is a file is all that is left of it: the next output of that name replaces it.

    The record is a plain file that reads as one of ours: who made it wrote nothing of their own into it. Neither the output
    is there, nor a part of one that was split: they share the name of the record.
    """
    try:
        data = read_regular(named_beside(out, RECORD), RECORD_BYTES)
        part = part_name(out)
        alone = not os.path.lexists(out) and not any(part.fullmatch(name) for name in os.listdir(out.absolute().parent))
    except (AdapterkitError, OSError):
        return False
    return alone and is_record(data)


def is_record(data: bytes) -> bool:
    """Whether a file reads as the record of an output."""

    try:
        found = json_value(data)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= _RECORD_KEYS


def part_name(out: Path | Address) -> re.Pattern[str]:
    """What the parts are called of an output that is one file or several."""
    return re.compile(rf"{re.escape(out.stem)}-\d{{5}}-of-\d{{5}}{re.escape(out.suffix)}")


def check_free(path: Path, *, force: bool) -> None:
    """Refuse a file that would be replaced beside an output.

    Raises:
        OutputError: it is there.
    """
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists", f"move it away, or replace it with {option('force', True)}")


def write_beside(out: Path, name: str, data: bytes, *, force: bool, mode: int = 0o666) -> Path:
    """Write a small file beside an output; the file.

    Raises:
        OutputError: a file of that name appeared since `check_free`, or the disk refuses.
    """
    target = named_beside(out, name)
    with writing(target.name, target.parent):
        try:
            write_file(target, data, new=not force, mode=mode)
        except FileExistsError:
            said = f"{target} appeared while {out.name} was being made"
            raise OutputError(said, "move it away, and run it again") from None
    return target


def _held(path: Path) -> int:
    """Bytes on disk of a file that another run may take away at any moment."""
    try:
        return int(getattr(path.stat(), "st_blocks", 0)) * 512
    except OSError:
        return 0


def check_output(
    plan: Plan,
    sources: Sequence[Source],
    out: Path,
    *,
    force: bool,
    inputs: Sequence[Path] = (),
    room: bool = True,
    record: bool = False,
) -> None:
    """Refuse a target that exists, is read-only, lies in an input or has no room, before the first byte.

    Args:
        inputs: folders that are read beside ``sources``.
        room: whether the disk must have room for it.
        record: whether ``adapterkit.json`` is written too, which lies beside an output that is a file.
    """
    paths = [*input_paths(plan, sources), *inputs]
    held = [partial_folder(out) / file.name for file in plan.files]
    nbytes = plan.nbytes if room else 0
    if plan.layout == "folder":
        check_target(out, paths, nbytes, force=force, held=held)
        return
    for target in plan.targets(out).values():
        if target.is_dir():
            raise OutputError(f"{target} is a folder", "name a file")
        check_target(target, paths, nbytes, force=force, held=held)
    if record and not is_left_over(out):
        check_free(named_beside(out, RECORD), force=force)


def input_paths(plan: Plan, sources: Sequence[Source]) -> list[Path]:
    """What an output may not lie in or over: the folders of the inputs; files, where files stand for themselves."""
    found = []
    for source in sources:
        if source.path is not None:
            alone = source.loose or plan.layout == "file" or source.path.suffix == ".gguf"
            found.append(source.path if alone else source.path.parent)
    return found
