"""Bytes from file to file, and their hash: in the kernel where it can, through memory where it cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.disk import calls
from adapterkit.disk.files import write_all

if TYPE_CHECKING:
    import hashlib
    import threading

_BLOCK = 4 << 20
FICLONE = 0x40049409  # linux/fs.h: share the extents of another file
_NO_COPY_RANGE = calls.LACKING | {errno.EXDEV, errno.ETXTBSY, errno.EISDIR, errno.EOVERFLOW}
_FLUSHED = 16 << 20  # bytes from which a file is put on disk while it is written
_PAUSE = 0.02  # seconds between two helpings


def copy_range(source: int, target: int, start: int, offset: int, nbytes: int) -> int:
    """Copy up to ``nbytes`` between two open files inside the kernel; how many it copied, 0 where it cannot.

    Raises:
        OSError: the disk failed.
    """
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    try:
        while done < nbytes:
            count = os.copy_file_range(source, target, nbytes - done, start + done, offset + done)
            if count == 0:
                break  # the end of the file, or a file system that cannot: reading tells which
            done += count
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    return done


def reflink(source: int, target: int) -> bool:
    """Make an empty file share the extents of another; False where the file system cannot."""
    if calls.fcntl is None:
        return False
    try:
        calls.fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def hash_file(path: Path) -> tuple[str, int]:
    """(sha256, size) of a file."""
    import hashlib

    fd = os.open(path, os.O_RDONLY | calls.flags("CLOEXEC", "BINARY"))
    try:
        return _hash_from(fd, 0, hashlib.sha256())
    finally:
        os.close(fd)


@contextmanager
def flushing(fd: int, size: int) -> Iterator[None]:
    """Puts a large file on disk while it is being written and hashed, so that the fsync at the end finds little to do.

    Raises:
        OSError: the disk refused a part of it; the kernel says so once, and here is where.
    """
    if size < _FLUSHED:
        yield
        return
    import threading  # No verb that only reads needs it.

    done = threading.Event()
    faults: list[OSError] = []
    helper = threading.Thread(target=_flush, args=(fd, done, faults), daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
    if faults:
        raise faults[0]


def _flush(fd: int, done: threading.Event, faults: list[OSError]) -> None:
    while not done.wait(_PAUSE):
        try:
            calls.fdatasync(fd)
        except OSError as error:
            faults.append(error)
            return


def copy_and_hash(source: int, target: int) -> tuple[str, int]:
    """Copies an open file into an empty open one; (sha256, size) of what arrived.

    Shares extents where the file system can (FICLONE), else copies inside the kernel (copy_file_range), else through
    memory. The hash is taken from the copy, so it is right even when somebody writes to the source meanwhile.
    """
    import hashlib

    hasher = hashlib.sha256()
    if reflink(source, target):
        return _hash_from(target, 0, hasher)
    done = 0
    buffer = bytearray(_BLOCK)
    while count := copy_range(source, target, done, done, _BLOCK):
        view = memoryview(buffer)[:count]
        got = 0
        while got < count:
            more = calls.pread_into(target, view[got:], done + got)
            if not more:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            got += more
        hasher.update(view)
        done += count
    # Also reads on where the kernel reported an early end, as it does for files that have no size of their own.
    os.lseek(source, done, os.SEEK_SET)
    os.lseek(target, done, os.SEEK_SET)
    while block := os.read(source, _BLOCK):
        write_all(target, block)
        hasher.update(block)
        done += len(block)
    return hasher.hexdigest(), done


def _hash_from(fd: int, offset: int, hasher: hashlib._Hash) -> tuple[str, int]:
    buffer = memoryview(bytearray(_BLOCK))
    while count := calls.pread_into(fd, buffer, offset):
        hasher.update(buffer[:count])
        offset += count
    return hasher.hexdigest(), offset
