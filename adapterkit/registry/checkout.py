"""A version as a folder, with its files under their own names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from adapterkit.errors import NotFound, OutputError, RegistryError
from adapterkit.registry import blobs, disk, resolve
from adapterkit.registry.beside import write_beside
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import BESIDE, Record


def checkout(ref: str, *, to: Path | None = None, home: Path | None = None) -> Path:
    """A folder with the files of a version under their own names.

    Without ``to``: a folder of symbolic links in the registry, made once and read-only by its blobs. With ``to``:
    copies (reflinks where possible) in a new folder, with ``adapterkit.json``.

    Raises:
        NotFound: some bytes are not in this registry.
        OutputError: ``to`` exists or cannot be written.
    """
    at = open_home(home)
    record = resolve.find(at, ref)
    for file in record.files:
        if not file.stored or not blobs.has(at, file.sha256, file.size):
            where = f"; pull {record.origin.repo}@{record.origin.commit}" if record.origin else ""
            raise NotFound(f"{record.ref} has no bytes of {file.path} in {at.root}{where}")
    target = to if to is not None else at.tree(record.digest)
    if target.exists():
        if to is None:
            return target
        raise OutputError(f"{target} exists", "name a folder that does not")
    _fill(at, record, target, to is None)
    return target


def _fill(at: Home, record: Record, target: Path, links: bool) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}")
    with disk.writing(str(target), target.parent):
        temporary.mkdir(parents=True)
        try:
            for file in record.files:
                path = temporary / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                blob = at.blob(file.sha256)
                if links:
                    os.symlink(os.path.relpath(blob, (target / file.path).parent), path)
                else:
                    _copy(blob, path)
            if links:
                own = at.record(record.name, record.version)
                os.symlink(os.path.relpath(own, target), temporary / BESIDE)
            else:
                write_beside(temporary, record)
            try:
                os.rename(temporary, target)
            except OSError:
                if not (links and target.is_dir()):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy(blob: Path, path: Path) -> None:
    source = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            if disk.copy_and_hash(source, target)[0] != blob.name:
                raise RegistryError(f"blob {blob.name[:12]} is damaged", "run fsck")
            os.fsync(target)
        finally:
            os.close(target)
    finally:
        os.close(source)
