"""What a tracking server gets of a version: its files, its record, its figures; and what comes back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.errors import CheckFailed, UsageError
from adapterkit.hub.files import allowed
from adapterkit.registry import resolve
from adapterkit.registry.beside import beside_bytes
from adapterkit.registry.canonical import thaw
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import open_home
from adapterkit.registry.record import BESIDE, Record
from adapterkit.registry.register import Registered, register

ADAPTERS = ("adapter", "combined")
_NUMBERS = 500


@dataclass(frozen=True)
class LoggedVersion:
    """Where a version is on a tracking server, and the version here that carries the link.

    Attributes:
        ref: ``name@number``: the same content, with the link among its evidence.
        run, url: the run there.
        model, version: in the server's own registry; empty where it was not registered.
    """

    ref: str
    run: str
    url: str
    model: str = ""
    version: str = ""


def adapter_of(ref: str, home: Path | None) -> tuple[Record, Path]:
    """A registered adapter and its folder.

    Raises:
        UsageError: it is a whole model; of those only the adapter is logged.
        NotFound, RegistryError
    """
    at = open_home(home)
    record = resolve.find(at, ref)
    if record.kind not in ADAPTERS:
        raise UsageError(
            f"{record.ref} is {record.kind}, and adapters are logged", "log the adapter that it was made with"
        )
    return record, checkout(record.ref, home=home)


def copy_files(record: Record, folder: Path, target: Path) -> None:
    """The files that `push` would publish, as plain files, with the record beside them."""
    import shutil

    for file in record.files:
        if allowed(file.path):
            place = target / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file.path, place)
    (target / BESIDE).write_bytes(beside_bytes(record))


def labels(record: Record) -> dict[str, str]:
    """What is searched for on a tracking server: reference, digests, method, base."""
    base = record.base
    found = {
        "adapterkit.ref": record.ref,
        "adapterkit.content": f"sha256:{record.content}",
        "adapterkit.record": f"sha256:{record.digest}",
        "adapterkit.kind": record.kind,
        "adapterkit.method": record.method,
        "adapterkit.base": (base.label if base is not None and base.known else ""),
        **{f"adapterkit.meta.{key}": value for key, value in record.meta.items()},
    }
    return {key: value[:500] for key, value in found.items() if value}


def numbers(evidence: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the evidence, by its path, such as ``training.loss``."""
    found: dict[str, float] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, bool) or len(found) >= _NUMBERS:
            return
        if isinstance(value, (int, float)) and abs(value) < 1e300:
            found[re.sub(r"[^A-Za-z0-9_./ -]", "_", path)[:240]] = float(value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))

    walk(thaw(evidence), "")
    return found


def registered(folder: Path, name: str, meta: Mapping[str, str], content: str, home: Path | None) -> Registered:
    """What came back as a version, held against the digest that the tracking server states.

    Raises:
        CheckFailed: these are other files.
    """
    from adapterkit import disk
    from adapterkit.registry.gather import gather
    from adapterkit.registry.record import FileEntry

    entries = []
    for inside, real in gather(folder).files:
        digest, size = disk.hash_file(real)
        entries.append(FileEntry(inside, size, digest))
    found = Record("adapter", tuple(entries)).content
    if content and content != f"sha256:{found}":
        raise CheckFailed(f"what came back is sha256:{found[:12]}, and {content[:19]} was logged", "log it again")
    return register(folder, name, meta=dict(meta), home=home)
