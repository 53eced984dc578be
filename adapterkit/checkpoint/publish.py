"""Outputs appear whole or not at all.

A run works in `.NAME.partial` beside its target, under a lock, and renames that folder when everything in it is on disk.
Without ``resume`` a run that fails or is interrupted takes its folder away again; with it, the folder stays for the next
``resume``. A killed run cannot tidy up: what it left is re-used by ``resume`` and removed by any other run.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def partial_folder(out: Path) -> Path:
    """The hidden folder in which ``out`` is made."""
    return out.parent / f".{out.name}.partial"


def check_target(out: Path, inputs: Iterable[Path], nbytes: int, *, force: bool, held: Iterable[Path] = ()) -> None:
    """Refuse a target before the first byte is written.

    ``held`` are files of an earlier run whose room the new one takes over.

    Raises:
        UsageError: it has no name, lies in an input, or an input in it.
        OutputError: it exists already, its folder is not writable, or the disk has no room.
    """
    if out.name in ("", ".."):
        raise UsageError(f"the output {str(out)!r} is not a name for a new folder", "name the folder to make")
    real = out.resolve()
    for path in inputs:
        source = path.resolve()
        if real == source or source in real.parents or (force and real in source.parents):
            raise UsageError(f"the output {out} lies in or over the input {path}", "write to another folder")
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out} exists", "choose another name, or replace it with --force")
    parent = next(folder for folder in real.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written to", "choose another place or change its permissions")
    free = shutil.disk_usage(parent).free + sum(map(_held, held))
    if nbytes > free:
        raise OutputError(
            f"{out} needs {nbytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free",
            "free some space or write elsewhere",
        )


def _held(path: Path) -> int:
    """Bytes on disk of a file that another run may take away at any moment."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


@contextmanager
def staging(out: Path, *, resume: bool, shared: bool = False) -> Iterator[Path]:
    """The hidden folder for ``out``, locked; taken away again when the body fails, unless ``resume``.

    With ``shared`` other holders of a shared lock may work in it too: the parts of one plan.

    Raises:
        OutputError: another run is writing the same target, or the folder cannot be made.
    """
    folder = partial_folder(out)
    created = [path for path in reversed(out.parents) if not path.exists()]
    lock = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, shared=shared)
        if not resume:
            _empty(folder)
        yield folder
    except _BusyError:
        raise OutputError(f"another run is writing {out}", "wait for it, or choose another name") from None
    except BaseException as error:
        if not resume and lock >= 0:
            shutil.rmtree(folder, ignore_errors=True)
            _remove_empty(reversed(created))
        if lock < 0 and isinstance(error, OSError):
            _remove_empty([folder, *reversed(created)])
            raise OutputError(f"{out.parent} cannot be written to ({error.strerror})", "choose another place") from None
        raise
    finally:
        if lock >= 0:
            os.close(lock)


class _BusyError(Exception):
    """Another run holds the lock."""


def _locked(folder: Path, *, shared: bool) -> int:
    """A descriptor of the hidden folder that holds the lock on it.

    The folder itself is locked, not a file in it: it takes the lock along when it is renamed to be the target, so there is
    no moment at which its name is still there and its lock is not. Who opened it just before that finds another folder, or
    none, under the name, and was too late.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _BusyError from None
        except OSError as error:
            # Some network file systems cannot lock a folder; there, runs on one target are the user's to keep apart.
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        try:
            if not os.path.samestat(os.fstat(lock), os.stat(folder)):
                raise _BusyError
        except FileNotFoundError:
            raise _BusyError from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def publish(folder: Path, out: Path, *, keep: set[str], force: bool) -> None:
    """Make the hidden folder the target: drop all but ``keep``, put it on disk, rename it.

    With ``force`` an existing target is exchanged in one step and removed afterwards.
    """
    for entry in os.scandir(folder):
        if entry.name not in keep:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    sync_folder(folder)
    if out.exists():
        if not force:
            raise OutputError(f"{out} appeared while it was being made", "choose another name, or use --force")
        _exchange(folder, out)
        shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    else:
        os.rename(folder, out)
    sync_folder(out.parent)


def publish_files(folder: Path, targets: Mapping[str, Path], *, force: bool) -> None:
    """Give finished files of the hidden folder their names beside it, and drop the folder.

    Each file appears whole, by one rename; of several, the first of ``targets`` comes last, since it is what readers open.
    """
    for name in reversed(list(targets)):
        target = targets[name]
        if target.exists() and not force:
            raise OutputError(f"{target} appeared while it was being made", "choose another name, or use --force")
        os.replace(folder / name, target)
        sync_folder(target.parent)
    shutil.rmtree(folder)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and put it on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put a folder's entries on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names atomically (renameat2), or by two renames where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(one), os.fsencode(other))
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(other))
    aside = other.parent / f".{other.name}.replaced"
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
