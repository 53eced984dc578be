"""The record beside an output: ``adapterkit.json``, the same JSON as in the registry, laid out for readers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import CheckFailed, NotFound, RegistryError, option
from adapterkit.places import Address
from adapterkit.registry.canonical import MAX_BYTES
from adapterkit.registry.record import BESIDE, NOT_CONTENT, FileEntry, OpaqueRecord, Record, read


def beside_path(path: Path) -> Path:
    """Where the record of an output lies: in a folder, or beside a file under its name."""
    return path / BESIDE if path.is_dir() else path.with_name(f"{path.name}.{BESIDE}")


def read_beside(path: Path) -> Record | None:
    """The record of an output (a folder, or a file), or None.

    Raises:
        RegistryError: it is damaged, or written by a newer adapterkit.
    """
    try:
        data = disk.read_regular(beside_path(path), MAX_BYTES)
    except NotFound:
        return None
    return parse_beside(data, str(beside_path(path)))


def parse_beside(data: bytes, where: str) -> Record:
    """The record of an output, out of the bytes of its file.

    Raises:
        RegistryError: it is damaged, or written by a newer adapterkit.
    """
    record = read(data, where, exact=False)
    if isinstance(record, OpaqueRecord):
        raise RegistryError(f"{where} was written by a newer adapterkit (schema {record.schema})", "upgrade adapterkit")
    return record


def beside_bytes(record: Record) -> bytes:
    """The bytes of ``adapterkit.json``."""
    text = json.dumps(record.to_json(), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    return text.encode("ascii")


def write_beside(path: Path, record: Record) -> Path:
    """Writes ``adapterkit.json`` beside an output (a folder, or a file), laid out for readers; the file."""
    target = beside_path(path)
    with disk.writing(BESIDE, target.parent):
        disk.write_file(target, beside_bytes(record))
    return target


def check_beside(path: Path | Address, beside: Record, entries: Iterable[FileEntry]) -> None:
    """
    Raises:
        CheckFailed: the record describes another content than these files.
    """
    here = {entry.path: entry.sha256 for entry in entries if entry.path not in NOT_CONTENT}
    said = {file.path: file.sha256 for file in beside.files if file.path not in NOT_CONTENT}
    if wrong := sorted(name for name in said if said[name] != here.get(name)):
        where = f"the record of {path}" if isinstance(path, Address) else beside_path(path)
        raise CheckFailed(
            f"{where} describes another {wrong[0]} than is there, so its evidence is not about these files",
            f"restore the file, or register with {option('ignore_record', True)}",
        )
