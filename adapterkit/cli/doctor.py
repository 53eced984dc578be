"""`adapterkit doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import note, say, show_json, size
from adapterkit.cli.paths import FILE

if TYPE_CHECKING:
    from adapterkit.verbs.doctor import DoctorDisk, DoctorExtra, DoctorMachine, DoctorPackage


@click.command(name="doctor", short_help="Say what is installed, what is missing, and what this machine can do.")
@click.argument("folder", default=".", metavar="[FOLDER]", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(folder: Path, as_json: bool) -> int:
    """Say what is installed, what each missing extra would add, and what this machine and the disk of FOLDER can do.

    FOLDER is where outputs would be written, here if it is left out. A file of 64 MiB is written there, read and removed.
    Exits with 3 when a package that adapterkit always needs is missing, too old or broken.

    \b
    Example:
      adapterkit doctor
      adapterkit doctor /mnt/models --json
    """
    from adapterkit.verbs.doctor import doctor

    found = doctor(folder)
    if as_json:
        show_json(found)
        return 0 if found.ok else 3
    say(f"adapterkit {found.version}, Python {found.python}")
    say()
    _rows("installed", [(one.name, _installed(one)) for one in found.packages])
    _rows("extras", [row for extra in found.extras for row in _extra(extra)])
    _rows("machine", _machine(found.machine))
    _rows("disk", _disk(found.disk))
    _rows("places", [("registry", found.registry), ("Hub cache", found.hub_cache)])
    for text in found.notes:
        note(f"note: {text}")
    return 0 if found.ok else 3


def _rows(title: str, rows: list[tuple[str, str]]) -> None:
    say(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        if value:
            say(f"  {name:<{width}}  {value}".rstrip())


def _installed(one: DoctorPackage) -> str:
    if not one.version:
        return f"missing (needs {one.least} or later)"
    return one.version if one.ok else f"{one.version}, too old (needs {one.least} or later)"


def _extra(extra: DoctorExtra) -> list[tuple[str, str]]:
    if extra.ok:
        return [(extra.name, ", ".join(f"{one.name} {one.version}" for one in extra.packages))]
    lacking = ", ".join(
        one.name if not one.version else f"{one.name} {one.version} (old)" for one in extra.packages if not one.ok
    )
    return [(extra.name, f"without {lacking}. It adds: {extra.adds}"), ("", extra.command)]


def _machine(found: DoctorMachine) -> list[tuple[str, str]]:
    memory = size(found.memory) if found.memory is not None else "unknown"
    free = f", {size(found.free)} free" if found.free is not None else ""
    limit = f"; {found.limit_by} allows {size(found.limit)}" if found.limit is not None else ""
    gpus = ", ".join(found.gpus) or "none that torch can use"
    return [
        ("system", found.system),
        ("processor", found.processor),
        ("cores", str(found.cores)),
        ("memory", memory + free + limit),
        ("torch", f"build for {found.torch}" if not found.torch.startswith("cannot") else found.torch),
        ("GPU", gpus),
        ("GGUF encoders", "compiled by numba" if found.encoders == "compiled" else "by torch, which is slower"),
    ]


def _disk(found: DoctorDisk) -> list[tuple[str, str]]:
    able = {
        "copies inside the kernel": found.copy_in_kernel,
        "reflinks": found.reflink,
        "hard links": found.hard_links,
        "locks": found.locks,
    }
    lacking = [name for name, there in able.items() if not there]
    return [
        ("folder", found.folder),
        ("file system", f"{found.kind or 'unknown'}, {size(found.free)} free"),
        ("writes", f"{size(found.write)}/s until the disk has it"),
        ("reads", f"{size(found.read)}/s at most (what was just written may come from memory)"),
        ("has", ", ".join(name for name, there in able.items() if there)),
        ("lacks", ", ".join(lacking)),
    ]
