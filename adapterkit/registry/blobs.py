"""Blobs: the bytes of files, stored once under their sha256, read-only.

A blob is a reflink of the user's file where the file system can (btrfs, XFS, APFS through copy_file_range), else a
copy. A hard link would be free everywhere, but then whoever writes into the user's file rewrites the blob; it is made
only when asked for, and then the file becomes read-only for both names.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import OutputError, RegistryError
from adapterkit.registry.home import Home


@dataclass(frozen=True)
class Blob:
    """A stored file: its digest, its size, and whether it was new to the registry."""

    sha256: str
    size: int
    new: bool


def put_file(home: Home, path: Path, link: bool = False) -> Blob:
    """Stores the bytes of a regular file; symbolic links are followed, so the caller decides which are allowed.

    ``link`` makes a hard link and takes the write permission from the file, where both are possible.

    Raises:
        NotFound: ``path`` does not exist.
        UnsafeError: it is a pipe, a device or a folder.
        CheckpointError: it cannot be opened.
        OutputError: the disk is full or refuses.
    """
    source = disk.open_regular(path)
    try:
        info = os.fstat(source)
        with disk.writing(path.name, home.root):
            if link and (linked := _put_link(home, path)):
                return linked
            free = shutil.disk_usage(home.incoming).free
            if info.st_size > free and not _reflinks(home, source):
                raise OutputError(
                    f"{path.name} takes {info.st_size} bytes and the disk of {home.root} has {free}",
                    "free some space and run it again",
                )
            target, temporary = disk.fresh(home.incoming)
            try:
                try:
                    with disk.flushing(target, info.st_size):
                        digest, size = disk.copy_and_hash(source, target)
                    return _keep(home, target, temporary, digest, size)
                finally:
                    os.close(target)
            finally:
                temporary.unlink(missing_ok=True)
    finally:
        os.close(source)


def put_chunks(home: Home, chunks: Iterable[bytes], digest: str, size: int) -> Blob:
    """Stores bytes that arrive in pieces and must turn out to be ``digest`` and ``size``.

    Raises:
        RegistryError: they turn out to be something else; nothing is kept.
        OutputError: the disk is full or refuses.
    """
    with disk.writing(f"blob {digest[:12]}", home.root):
        target, temporary = disk.fresh(home.incoming)
        try:
            hasher, got = sha256(), 0
            try:
                for chunk in chunks:
                    got += len(chunk)
                    if got > size:
                        break
                    hasher.update(chunk)
                    disk.write_all(target, chunk)
                if got != size or hasher.hexdigest() != digest:
                    raise RegistryError(
                        f"what arrived for blob {digest[:12]} is not what it should be", "fetch it again"
                    )
                return _keep(home, target, temporary, digest, size)
            finally:
                os.close(target)
        finally:
            temporary.unlink(missing_ok=True)


def has(home: Home, digest: str, size: int) -> bool:
    """Whether a blob of that digest and size is stored; ``fsck`` reads the bytes."""
    try:
        found = home.blob(digest).stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def set_aside(home: Home, path: Path, why: str) -> Path:
    """Moves a file into quarantine, which is never emptied by adapterkit; its new path."""
    target = home.quarantine / f"{path.parent.name}-{path.name}.{why}"
    count = 0
    while True:
        try:
            os.link(path, target)
            break
        except FileExistsError:
            count += 1
            target = target.with_name(f"{path.parent.name}-{path.name}.{why}-{count}")
        except OSError:
            os.rename(path, target)
            disk.sync_folder(home.quarantine)
            return target
    disk.sync_folder(home.quarantine)
    path.unlink()
    disk.sync_folder(path.parent)
    return target


def _keep(home: Home, fd: int, temporary: Path, digest: str, size: int) -> Blob:
    """Gives a finished temporary file its name, unless the blob is there already."""
    target = home.blob(digest)
    if has(home, digest, size):
        _touch(target)
        return Blob(digest, size, False)
    _protect(fd, temporary)
    disk.fsync(fd)
    disk.make_folder(target.parent)
    if target.exists():
        set_aside(home, target, "wrong-size")
    disk.publish_over(temporary, target)
    return Blob(digest, size, True)


def _protect(fd: int, path: Path) -> None:
    """Takes the permission to write, where the file system knows any."""
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(fd, 0o444)
        else:
            path.chmod(0o444)
    except OSError as error:
        if error.errno not in disk.calls.LACKING:
            raise


def _put_link(home: Home, path: Path) -> Blob | None:
    """A hard link as blob, or None where none can be made."""
    source = path.resolve()
    _, temporary = disk.fresh(home.incoming)
    os.close(_)
    temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:
        return None
    try:
        fd = os.open(temporary, os.O_RDONLY | disk.calls.flags("CLOEXEC", "BINARY"))
        try:
            os.fchmod(fd, os.fstat(fd).st_mode & ~0o222)
            digest, size = disk.hash_file(temporary)
            return _keep(home, fd, temporary, digest, size)
        except PermissionError:
            return None  # Somebody else's file: it cannot be protected, so it is copied.
        finally:
            os.close(fd)
    finally:
        temporary.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Makes a blob young again, so that gc keeps it until the record that is about to name it is there."""
    try:
        os.utime(path)
    except OSError:
        pass  # Another user's blob: the store lock alone keeps gc away.


def _reflinks(home: Home, source: int) -> bool:
    """Whether a file can share extents with the home (then its size does not count against the free space)."""
    fd, probe = disk.fresh(home.incoming)
    try:
        return disk.reflink(source, fd)
    finally:
        os.close(fd)
        probe.unlink(missing_ok=True)
