"""Small steps on a disk that survive SIGKILL, power loss and other processes.

A file appears whole or not at all: written under another name, fsynced, then linked or renamed, then its folder
fsynced. ``flock`` is released by the kernel when a process dies, so a lock never outlives its holder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterkit.errors import OutputError

_BLOCK = 4 << 20
FICLONE = 0x40049409  # linux/fs.h: share the extents of another file
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
LOCK_SECONDS = 60.0
_FLUSHED = 16 << 20  # bytes from which a file is put on disk while it is written
_PAUSE = 0.02  # seconds between two helpings


@contextmanager
def writing(what: str, where: Path) -> Iterator[None]:
    """Turns an OSError of the block into one sentence.

    Raises:
        OutputError: the disk is full, read-only, or otherwise refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                f"{what} does not fit on the disk of {where}", "free some space and run it again"
            ) from error
        raise OutputError(f"{what} cannot be written under {where}: {error.strerror or error}") from error


@contextmanager
def locked(path: Path, shared: bool = False, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds ``flock`` on ``path`` (created when missing), exclusively or shared.

    Raises:
        OutputError: another process kept it for ``timeout`` seconds, or the file cannot be opened.
    """
    with writing("a lock", path.parent):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        flag = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        # Counted in own pauses, not by the clock: a machine that slept for an hour has not waited.
        waited, pause = 0.0, 0.0005
        while True:
            try:
                fcntl.flock(fd, flag)
                break
            except BlockingIOError:
                if waited > timeout:
                    raise OutputError(
                        f"another process has held {path} for {timeout:.0f} seconds",
                        "wait for it or end it, then run again",
                    ) from None
                time.sleep(pause * (0.5 + os.urandom(1)[0] / 256))
                waited += pause
                pause = min(pause * 1.5, 0.02)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    break  # A file system without locks: link(2) still keeps versions apart.
                raise
        yield
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable; a file system that cannot fsync a folder is left as it is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Creates ``folder`` (its parent must exist) durably; nothing happens when it is there."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    sync_folder(folder.parent)


def fresh(folder: Path) -> tuple[int, Path]:
    """A new file under a name nobody else uses, open for reading and writing."""
    while True:
        path = folder / f"{os.getpid():d}-{time.time_ns():x}-{os.urandom(6).hex()}"
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), path
        except FileExistsError:
            continue


@contextmanager
def staged(folder: Path, data: bytes) -> Iterator[Path]:
    """A durable temporary file in ``folder`` that holds ``data``; removed afterwards when it was not renamed away."""
    fd, path = fresh(folder)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish_new(temporary: Path, target: Path) -> bool:
    """Gives ``temporary`` the name ``target`` unless that exists; False when it did."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():  # No hard links here: the caller's lock keeps others out between this look and the rename.
            return False
        os.rename(temporary, target)
    sync_folder(target.parent)
    return True


def publish_over(temporary: Path, target: Path) -> None:
    """Replaces ``target`` by ``temporary`` in one step."""
    os.replace(temporary, target)
    sync_folder(target.parent)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes all of ``data``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def hash_file(path: Path) -> tuple[str, int]:
    """(sha256, size) of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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

    def flush() -> None:
        while not done.wait(_PAUSE):
            try:
                os.fdatasync(fd)
            except OSError as error:
                faults.append(error)
                return

    helper = threading.Thread(target=flush, daemon=True)
    helper.start()
    try:
        yield
    finally:
        done.set()
        helper.join()
    if faults:
        raise faults[0]


def copy_and_hash(source: int, target: int) -> tuple[str, int]:
    """Copies an open file into an empty open one; (sha256, size) of what arrived.

    Shares extents where the file system can (FICLONE), else copies inside the kernel (copy_file_range), else through
    memory. The hash is taken from the copy, so it is right even when somebody writes to the source meanwhile.
    """
    hasher = hashlib.sha256()
    try:
        fcntl.ioctl(target, FICLONE, source)
        return _hash_from(target, 0, hasher)
    except OSError:
        pass
    done = 0
    if hasattr(os, "copy_file_range"):
        buffer = bytearray(_BLOCK)
        try:
            while count := os.copy_file_range(source, target, _BLOCK, done, done):
                view = memoryview(buffer)[:count]
                got = 0
                while got < count:
                    got += os.preadv(target, [view[got:]], done + got)
                hasher.update(view)
                done += count
        except OSError as error:
            if error.errno not in _NO_COPY_RANGE or done:
                raise
    # Also reads on where the kernel reported an early end, as it does for files that have no size of their own.
    os.lseek(source, done, os.SEEK_SET)
    os.lseek(target, done, os.SEEK_SET)
    while block := os.read(source, _BLOCK):
        write_all(target, block)
        hasher.update(block)
        done += len(block)
    return hasher.hexdigest(), done


def _hash_from(fd: int, offset: int, hasher: hashlib._Hash) -> tuple[str, int]:
    buffer = bytearray(_BLOCK)
    while count := os.preadv(fd, [buffer], offset):
        hasher.update(memoryview(buffer)[:count])
        offset += count
    return hasher.hexdigest(), offset
