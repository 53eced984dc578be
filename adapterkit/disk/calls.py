"""System calls that not every system or file system has, and what stands in for them.

Each function looks at the system when it is called, not when this module is imported, so that a test can take a call away.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

try:
    import fcntl as fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2  # linux/fs.h: RENAME_NOREPLACE, RENAME_EXCHANGE

# Errors by which a kernel, a sandbox or a file system says that it does not have a call.
LACKING = frozenset(
    getattr(errno, name)
    for name in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM", "EBADF", "ENOTTY", "EACCES")
    if hasattr(errno, name)
)
# An fsync that was refused because there is no such thing here. EIO, ENOSPC and EDQUOT are never among these.
_NO_SYNC = frozenset(
    getattr(errno, name)
    for name in ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EBADF", "EISDIR", "EACCES", "EPERM", "EROFS")
    if hasattr(errno, name)
)
NO_LOCK = frozenset(
    getattr(errno, name)
    for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "EBADF")
    if hasattr(errno, name)
)


def flags(*names: str) -> int:
    """The sum of those ``os.O_...`` flags that this system has."""
    found = 0
    for name in names:
        found |= getattr(os, f"O_{name}", 0)
    return found


def has_handles() -> bool:
    """Whether files can be opened, made and renamed relative to a handle of their folder."""
    return hasattr(os, "O_DIRECTORY") and hasattr(os, "O_NOFOLLOW") and os.open in os.supports_dir_fd


def fsync(fd: int) -> None:
    """Put a file or folder on disk; a file system that has no such call is left as it is.

    Raises:
        OSError: the disk failed or is full.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def fdatasync(fd: int) -> None:
    """As `fsync`, without times where the system can leave them out."""
    if not hasattr(os, "fdatasync"):
        fsync(fd)
        return
    try:
        os.fdatasync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def flock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file or folder without waiting; False where there are no locks.

    Raises:
        BlockingIOError: another holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCK:
            raise
        return False
    return True


def hold_range(fd: int, start: int, nbytes: int) -> None:
    """Say that this process writes these bytes of a file that others write at the same time.

    Clients of NFS write whole pages unless a range of the file is locked: a page in which two ranges meet would bring back
    what the neighbour had not written yet. Nobody waits for the lock, and where there is none nothing is held.
    """
    if fcntl is None or not nbytes:
        return
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, nbytes, start)
    except OSError:
        pass  # another process writes the same bytes, or the file system has no such locks


def rename_new(one: Any, other: Any) -> None:
    """Rename, unless the new name exists.

    Raises:
        FileExistsError: it does.
    """
    if _renameat2(one, other, _NOREPLACE):
        return
    if os.path.lexists(other):  # Not in one step: between this look and the rename a name may appear.
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other))
    os.rename(one, other)


def exchange(one: Any, other: Any) -> bool:
    """Swap two names in one step; False where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(one: Any, other: Any, how: int) -> bool:
    if sys.platform != "linux":
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], how) == 0:
        return True
    code = ctypes.get_errno()
    if code in LACKING - {errno.EACCES}:
        return False
    if code == errno.EEXIST:
        raise FileExistsError(code, os.strerror(code), str(other))
    raise OSError(code, os.strerror(code), str(other))


def pread(fd: int, count: int, offset: int) -> bytes:
    """Up to ``count`` bytes at ``offset``."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _SEEK:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """How many bytes at ``offset`` came into ``buffer``."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """How many bytes of ``data`` were written at ``offset``."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _SEEK:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def allocate(fd: int, start: int, nbytes: int) -> int:
    """Give a file room for these bytes, which are written later; how many there is room for now.

    Only where the file system itself does it: glibc's posix_fallocate else writes into every block.

    Raises:
        OSError: the disk is full.
    """
    if sys.platform != "linux" or not nbytes:
        return 0
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate64"):
        return 0
    if libc.fallocate64(fd, 0, ctypes.c_int64(start), ctypes.c_int64(nbytes)) == 0:
        return nbytes
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(code, os.strerror(code))
    return 0


def free(path: Any) -> int:
    """Bytes that this user may still write on the file system of a path."""
    if hasattr(os, "statvfs"):
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize
    import shutil  # which brings three compressors with it

    return shutil.disk_usage(path).free


class _Lock:
    """A lock that is made when it is first used: most systems have ``pread`` and never need one."""

    def __init__(self) -> None:
        self._lock: Any = None

    def __enter__(self) -> None:
        if self._lock is None:
            import threading

            self._lock = threading.Lock()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_SEEK = _Lock()


def process_start(pid: int) -> str | None:
    """When a process of this machine began, as far as it can be told; None when there is no such process.

    The time tells a process from a later one that got its number.
    """
    if os.path.isdir("/proc/self"):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            return None
    if os.name != "posix":
        return ""  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
