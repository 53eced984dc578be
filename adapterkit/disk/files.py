"""Small files, and opening files without following links."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterkit.disk import calls
from adapterkit.errors import CheckpointError, NotFound, OutputError, UnsafeError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LONGEST = 200  # bytes of a name that a temporary name repeats; file systems allow 255
READER = 2.0  # seconds in which somebody has to begin to read a pipe
_STRAY = 86400.0  # seconds after which a temporary file of a system without locks belongs to a run that was killed


@contextmanager
def writing(what: str, where: Path) -> Iterator[None]:
    """Turns an OSError of the block into one sentence.

    Raises:
        OutputError: the disk is full, read-only, or otherwise refuses.
    """
    try:
        yield
    except OSError as error:
        raise refused(error, what, where) from error


def refused(error: OSError, what: str, where: Path) -> OutputError:
    """One sentence about a disk that refused ``what`` under ``where``."""
    if error.errno in _FULL:
        return OutputError(f"{what} does not fit on the disk of {where}", "free some space and run it again")
    return OutputError(f"{what} cannot be written under {where}: {error.strerror or error}")


# ------------------------------------------------------------------ names


def fresh(folder: Path) -> tuple[int, Path]:
    """A new file under a name that nobody can guess, open for reading and writing."""
    while True:
        path = folder / f"{os.getpid():d}-{os.urandom(12).hex()}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | calls.flags("NOFOLLOW", "CLOEXEC", "BINARY"), 0o644)
            return fd, path
        except FileExistsError:
            continue


@contextmanager
def _handle(folder: Path) -> Iterator[int | None]:
    """A handle of a folder; None where the system has none, and paths have to do."""
    if not calls.has_handles():
        yield None
        return
    fd = os.open(folder, os.O_RDONLY | calls.flags("DIRECTORY", "CLOEXEC"))
    try:
        yield fd
    finally:
        os.close(fd)


def _temporary(folder: Path, handle: int | None, name: str, mode: int) -> tuple[int, str]:
    """A new file for the bytes of ``name``: hidden, not to be guessed, and locked while somebody writes it."""
    short = name.encode("utf-8", "surrogateescape")[:_LONGEST].decode("utf-8", "ignore")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | calls.flags("NOFOLLOW", "CLOEXEC", "BINARY")
    while True:
        hidden = f".{short}.{os.urandom(8).hex()}.part"
        try:
            if handle is None:
                return os.open(folder / hidden, flags, mode), hidden
            return os.open(hidden, flags, mode, dir_fd=handle), hidden
        except FileExistsError:
            continue


def _sweep(folder: Path, name: str) -> None:
    """Takes away what killed runs left of ``name``."""
    import re
    import time

    short = name.encode("utf-8", "surrogateescape")[:_LONGEST].decode("utf-8", "ignore")
    ours = re.compile(re.escape(f".{short}.") + r"[0-9a-f]{16}\.part")
    try:
        with os.scandir(folder) as found:
            left = [entry for entry in found if ours.fullmatch(entry.name)]
    except OSError:
        return
    for entry in left:
        try:
            if not entry.is_file(follow_symlinks=False):
                continue
            fd = os.open(entry.path, os.O_RDONLY | calls.flags("NOFOLLOW", "CLOEXEC", "NONBLOCK"))
            try:
                # Whoever still writes it holds its lock.
                free = calls.flock(fd) or time.time() - entry.stat(follow_symlinks=False).st_mtime > _STRAY
                if free:
                    os.unlink(entry.path)
            finally:
                os.close(fd)
        except OSError:
            continue


# ------------------------------------------------------------------ whole files


def write_file(path: Path, data: bytes, *, new: bool = False, mode: int = 0o666) -> None:
    """Make or replace a small file: it is there whole or not at all, and on disk.

    A link under that name is replaced and not followed.

    Args:
        new: refuse to replace.
        mode: permissions, of which the user's mask takes some away.

    Raises:
        OSError: the disk refuses; ``FileExistsError`` with ``new``.
        UnsafeError: something that is no file has the name: a folder, a device, a pipe.
    """
    if not new:
        _check_kind(path)
    with _handle(path.parent) as handle:
        for again in (True, False):
            fd, hidden = _temporary(path.parent, handle, path.name, mode)
            try:
                try:
                    if not new:
                        calls.flock(fd)
                    write_all(fd, data)
                    calls.fsync(fd)
                finally:
                    os.close(fd)
                if new:
                    calls.rename_new(path.parent / hidden, path)
                elif handle is None:
                    os.replace(path.parent / hidden, path)
                else:
                    os.replace(hidden, path.name, src_dir_fd=handle, dst_dir_fd=handle)
                break
            except FileNotFoundError:
                if not again:  # Somebody took it for a stray in the moment before it was locked.
                    raise
            except BaseException:
                _unlink(path.parent, handle, hidden)
                raise
        if handle is not None:
            calls.fsync(handle)
    _sweep(path.parent, path.name)


def _check_kind(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise UnsafeError(f"{path} is no file", "remove it, or choose another name")


def _unlink(folder: Path, handle: int | None, name: str) -> None:
    try:
        if handle is None:
            os.unlink(folder / name)
        else:
            os.unlink(name, dir_fd=handle)
    except OSError:
        pass


def deliver(path: Path, data: bytes) -> None:
    """Write a file that the user named on the command line: as `write_file`, but a device or a pipe takes the bytes as they
    come (``--html /dev/stdout``).

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path.name, path.parent):
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            raise OutputError(f"{path} is a folder", "name a file")
        if _is_stream(mode):
            with open(_stream(path), "wb") as file:
                file.write(data)
            return
        write_file(path, data)


def open_appended(path: Path) -> int:
    """A descriptor that adds to the end of a file that the user named, made where it is not there. No link is followed to a
    file; a device, or a pipe that somebody reads, takes the bytes as they come.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path.name, path.parent):
        if _is_stream(_mode(path)):
            return _stream(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | calls.flags("NOFOLLOW", "CLOEXEC", "NONBLOCK", "BINARY")
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OutputError(f"{path} is a link, and nothing is added through one", "name the file itself") from None


def _mode(path: Path) -> int:
    """What lies at a path, links followed; 0 where nothing can be seen."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _is_stream(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _stream(path: Path) -> int:
    """A device or a pipe, open for writing; a pipe that nobody begins to read is given up."""
    until = time.monotonic() + READER
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | calls.flags("CLOEXEC", "NONBLOCK", "BINARY"))
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() >= until:
                raise OutputError(f"{path} is a pipe or a socket that nobody reads", "name a file") from None
        time.sleep(0.02)
    if hasattr(os, "set_blocking"):
        os.set_blocking(fd, True)
    return fd


@contextmanager
def staged(folder: Path, data: bytes) -> Iterator[Path]:
    """A durable temporary file in ``folder`` that holds ``data``; removed afterwards when it was not renamed away."""
    fd, path = fresh(folder)
    try:
        try:
            write_all(fd, data)
            calls.fsync(fd)
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
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in calls.LACKING | {errno.EMLINK}:
            raise
        try:  # No hard links here.
            calls.rename_new(temporary, target)
        except FileExistsError:
            return False
    sync_folder(target.parent)
    return True


def publish_over(temporary: Path, target: Path) -> None:
    """Replaces ``target`` by ``temporary`` in one step."""
    os.replace(temporary, target)
    sync_folder(target.parent)


# ------------------------------------------------------------------ files inside a folder of ours


def open_inside(folder: Path, name: str, flags: int, *, make: bool = False) -> int:
    """A descriptor of a file inside ``folder``; no part of ``name`` may be a link.

    Args:
        name: relative, with ``/`` between its parts.
        flags: of ``os.open``, besides those that refuse links.
        make: make the folders in between.

    Raises:
        OSError: it cannot be opened; ``ELOOP`` or ``ENOTDIR`` where a link is in the way.
        UnsafeError: the name leads out of the folder.
    """
    *folders, last = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in (*folders, last)):
        raise UnsafeError(f"{name!a} is no name inside a folder")
    flags |= calls.flags("NOFOLLOW", "CLOEXEC", "NONBLOCK", "BINARY")
    if not calls.has_handles():
        return _open_by_path(folder, folders, last, flags, make)
    into = calls.flags("DIRECTORY", "NOFOLLOW", "CLOEXEC")
    handle = os.open(folder, os.O_RDONLY | into)
    try:
        for part in folders:
            if make:
                try:
                    os.mkdir(part, dir_fd=handle)
                except FileExistsError:
                    pass
            inner = os.open(part, os.O_RDONLY | into, dir_fd=handle)
            os.close(handle)
            handle = inner
        return os.open(last, flags, 0o666, dir_fd=handle)
    finally:
        os.close(handle)


def _open_by_path(folder: Path, folders: list[str], last: str, flags: int, make: bool) -> int:
    """As `open_inside` on a system without handles: looks first, then opens."""
    place = folder
    for part in (*folders, last):
        if part != last and make:
            (place / part).mkdir(exist_ok=True)
        place = place / part
        if place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(place))
    return os.open(place, flags, 0o666)


def write_inside(folder: Path, name: str, data: bytes) -> None:
    """Write a small file into a working folder, and put it on disk. What has its name is taken away first, so neither a
    link nor another name of the same file is written through."""
    fd = open_new_inside(folder, name)
    try:
        write_all(fd, data)
        calls.fsync(fd)
    finally:
        os.close(fd)


def open_new_inside(folder: Path, name: str) -> int:
    """A new, empty file inside a working folder, in the place of what had its name; open for reading and writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return open_inside(folder, name, flags, make=True)
    except FileExistsError:
        (folder / name).unlink()  # the link, not what it points to
        return open_inside(folder, name, flags)


def open_kept_inside(folder: Path, name: str) -> int:
    """A file that an earlier run of ours may have left inside a working folder, else a new one; for reading and writing.

    Only a plain file of one name is used again: a link, a pipe, or a file that has another name somewhere else is taken
    away.
    """
    try:
        fd = open_inside(folder, name, os.O_RDWR)
    except OSError:
        return open_new_inside(folder, name)
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_nlink <= 1:
        return fd
    os.close(fd)
    return open_new_inside(folder, name)


def open_shared_inside(folder: Path, name: str) -> int:
    """A file inside a working folder that several processes write, each a range of its own; made by the first of them.

    Raises:
        UnsafeError: something else has its name.
    """
    while True:
        try:
            fd = open_inside(folder, name, os.O_RDWR)
        except FileNotFoundError:
            try:
                return open_inside(folder, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, make=True)
            except FileExistsError:
                continue
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UnsafeError(f"{folder / name} is a link", "remove it, and run again") from None
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_nlink <= 1:
            return fd
        os.close(fd)
        raise UnsafeError(f"{folder / name} is no plain file of one name", "remove it, and run again")


def read_inside(folder: Path, name: str) -> bytes | None:
    """The bytes of a plain file inside a working folder; None when there is none, or a link."""
    try:
        fd = open_inside(folder, name, os.O_RDONLY)
    except OSError:
        return None
    with open(fd, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else None


# ------------------------------------------------------------------ reading what others wrote


def open_regular(path: Path, what: str = "") -> int:
    """A descriptor of a file to read. Links are followed; a pipe or a device is refused and not waited for.

    Raises:
        NotFound: there is none.
        UnsafeError: it is no plain file.
        CheckpointError: it cannot be opened.
    """
    what = what or str(path)
    try:
        fd = os.open(path, os.O_RDONLY | calls.flags("CLOEXEC", "NONBLOCK", "BINARY"))
    except FileNotFoundError:
        raise NotFound(f"{what} does not exist", "check the path") from None
    except IsADirectoryError:
        raise UnsafeError(f"{what} is a folder, not a file") from None
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{what} cannot be opened ({said})", "check its permissions") from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
            hint = "name a file" if kind == "folder" else "copy what it gives into a file first"
            raise UnsafeError(f"{what} is a {kind}, not a file", hint)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: Path, limit: int, what: str = "") -> bytes:
    """All bytes of a small file.

    Raises:
        NotFound, UnsafeError: as `open_regular`.
        CheckpointError: it is larger than ``limit`` bytes, or cannot be read.
    """
    with open(open_regular(path, what), "rb") as file:
        try:
            # Of a size that the system states, no more room is made than it needs; in /proc that is 0.
            stated = os.fstat(file.fileno()).st_size
            data = file.read(min(stated or limit, limit) + 1)
            while len(data) <= limit and (more := file.read(min(limit + 1 - len(data), 1 << 20))):
                data += more  # it grew, or its size was not stated
        except OSError as error:
            raise CheckpointError(f"{what or path} cannot be read ({error.strerror})", "check the disk") from None
    if len(data) > limit:
        raise CheckpointError(f"{what or path} has more than {limit} bytes", "it cannot be the file it is named like")
    return data


# ------------------------------------------------------------------ on disk


def sync(path: Path) -> None:
    """Put a file on disk."""
    fd = os.open(path, os.O_RDONLY | calls.flags("NOFOLLOW", "CLOEXEC", "NONBLOCK", "BINARY"))
    try:
        calls.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, where the file system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        fd = os.open(folder, os.O_RDONLY | calls.flags("DIRECTORY", "CLOEXEC"))
    except PermissionError:
        return  # a folder that may be written to and not read
    try:
        calls.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Put every file and folder below ``folder`` on disk, and ``folder`` itself last."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            sync(Path(entry.path))
    sync_folder(folder)


def make_folder(folder: Path) -> None:
    """Creates ``folder`` (its parent must exist) durably; nothing happens when it is there."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    sync_folder(folder.parent)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes all of ``data``."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
