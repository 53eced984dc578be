"""A version as a folder, with its files under their own names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import NotFound, OutputError, RegistryError
from adapterkit.registry import blobs, remaking, resolve
from adapterkit.registry.beside import write_beside
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import BESIDE, Record


def checkout(ref: str, *, to: Path | None = None, home: Path | None = None) -> Path:
    """A folder with the files of a version under their own names.

    Without ``to``: a folder of symbolic links in the registry, made once and read-only by its blobs. With ``to``:
    copies (reflinks where possible) in a new folder, with ``adapterkit.json``.

    A version that is kept as its recipe is made again.

    Raises:
        NotFound: some bytes are not in this registry.
        CheckFailed: a version that is kept as its recipe comes out with other bytes.
        OutputError: ``to`` exists or cannot be written.
    """
    at = open_home(home)
    record = resolve.find(at, ref)
    if remaking.is_recipe(record) and not all(blobs.has(at, file.sha256, file.size) for file in record.files):
        remaking.bring_back(at, record)
    for file in record.files:
        if not blobs.has(at, file.sha256, file.size):
            where = f"; pull {record.origin.repo}@{record.origin.commit}" if record.origin else ""
            raise NotFound(f"{record.ref} has no bytes of {file.path} in {at.root}{where}")
    target = to if to is not None else at.tree(record.digest)
    if to is None and target.exists():
        return target
    if os.path.lexists(target):
        raise OutputError(f"{target} exists", "name a folder that does not")
    with disk.writing(str(target), target.parent):
        if to is None:
            _link(at, record, target)
        else:
            _copies(at, record, target)
    return target


def _copies(at: Home, record: Record, target: Path) -> None:
    with disk.staging(target, resume=False) as folder:
        for file in record.files:
            _copy(at.blob(file.sha256), disk.open_new_inside(folder, file.path))
        write_beside(folder, record)
        disk.publish(folder, target, keep=set(os.listdir(folder)), force=False)


def _link(at: Home, record: Record, target: Path) -> None:
    """A folder of links in the registry; another process may make the same one at the same time."""
    temporary = target.with_name(f".{os.urandom(12).hex()}")
    temporary.mkdir(parents=True)
    try:
        for file in record.files:
            path = temporary / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.relpath(at.blob(file.sha256), (target / file.path).parent), path)
        own = at.record(record.name, record.version)
        os.symlink(os.path.relpath(own, target), temporary / BESIDE)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(blob: Path, target: int) -> None:
    """The bytes of a blob into an open new file, which is closed then."""
    try:
        source = disk.open_regular(blob)
        try:
            if disk.copy_and_hash(source, target)[0] != blob.name:
                raise RegistryError(f"blob {blob.name[:12]} is damaged", "run fsck")
        finally:
            os.close(source)
        disk.fsync(target)
    finally:
        os.close(target)
