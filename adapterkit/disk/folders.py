"""Working folders: where an output is made, and how it becomes the target.

A run works in ``.NAME.partial`` beside its target, under a lock, and renames that folder when everything in it is on
disk. The name can be foreseen, for a later run has to find what an earlier one left; so whatever lies there is looked at
first. It is used, and emptied, only if it is

* a folder and no link, opened by ``O_NOFOLLOW`` and locked by that same handle;
* of the same owner as what this user makes there;
* marked as ours, or empty. The mark is the sticky bit, which no clone of a repository carries over, and which the folder
  loses when it has become the target. Where a file system keeps no such bit, a file marks the folder; it
  names the folder's inode, so that it is worth nothing anywhere else.

Replacing a target (``--force``) takes one exchange of names, or two renames where the system has no exchange. In between
everything lies in ``.NAME.replaced``, marked likewise, and the next run puts right what a killed one left there.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapterkit.disk import calls
from adapterkit.disk.files import read_inside, refused, sync_folder, sync_tree, write_inside
from adapterkit.disk.locks import LOCK_FILE, Busy, hold, release, taken
from adapterkit.errors import OutputError, UnsafeError, option

MARK = ".adapterkit-folder"  # where the sticky bit cannot be had
_LOOKS, _PAUSE = 5, 0.02  # how often, and seconds between two looks
_LONGEST = 230  # bytes of a name that a hidden name repeats whole; file systems allow 255


def partial_folder(out: Path) -> Path:
    """The hidden folder in which ``out`` is made."""
    return hidden_folder(out, "partial")


def _aside(out: Path) -> Path:
    """The hidden folder that holds what is being exchanged."""
    return hidden_folder(out, "replaced")


def hidden_folder(out: Path, what: str) -> Path:
    """A hidden name beside ``out``; of a long name it repeats the beginning."""
    name = os.fsencode(out.name)
    if len(name) <= _LONGEST:
        return out.parent / f".{out.name}.{what}"
    from hashlib import blake2b  # names that long are rare, and have to stay apart

    short = name[: _LONGEST - 17].decode("utf-8", "ignore")
    return out.parent / f".{short}~{blake2b(name, digest_size=8).hexdigest()}.{what}"


def may_be_shortened(name: str) -> bool:
    """Whether a hidden name may repeat only the beginning of the name that it is of."""
    cut_letter = 3  # bytes at most, of one that did not fit whole
    return re.search("~[0-9a-f]{16}$", name) is not None and len(os.fsencode(name)) >= _LONGEST - cut_letter


# ------------------------------------------------------------------ ours


def own_folder(path: Path) -> None:
    """Make a folder of ours, or see that it is one.

    Raises:
        UnsafeError: a link, or a folder that adapterkit did not make, is in its place.
        OSError
    """
    made = _make(path)
    with _opened(path) as fd:
        _take(path, fd, made=made)


def is_own(path: Path) -> bool:
    """Whether ``path`` is a folder that adapterkit made for this user here."""
    try:
        with _opened(path) as fd:
            return _owned(path, fd) and _marked(path, fd)
    except (OSError, UnsafeError):
        return False


def is_of_user(path: Path) -> bool:
    """Whether ``path`` is a real folder that belongs to this user, or to whom this disk gives all that this user makes."""
    try:
        with _opened(path) as fd:
            return _owned(path, fd)
    except (OSError, UnsafeError):
        return False


def _make(path: Path) -> bool:
    try:
        os.mkdir(path)
    except FileExistsError:
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A handle of a real folder; None where the system gives none."""
    hint = "remove it, or choose another name"
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise UnsafeError(f"{path} is in the way and is no folder of adapterkit", hint)
    if not hasattr(os, "O_DIRECTORY"):
        yield None
        return
    try:
        fd = os.open(path, os.O_RDONLY | calls.flags("DIRECTORY", "NOFOLLOW", "CLOEXEC"))
    except NotADirectoryError:
        raise UnsafeError(f"{path} is in the way and is no folder of adapterkit", hint) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _take(path: Path, fd: int | None, *, made: bool) -> None:
    """Mark a folder that was just made; of another, see that it is ours."""
    if made:
        _mark(path, fd)
        return
    if not _owned(path, fd):
        raise UnsafeError(f"{path} belongs to another user", "write to another folder")
    if _marked(path, fd):
        return
    if os.listdir(path):
        raise UnsafeError(
            f"{path} is not a working folder that adapterkit made here", "move it away, or choose another name"
        )
    _mark(path, fd)


def _mark(path: Path, fd: int | None) -> None:
    info = _stat(path, fd)
    try:
        if fd is not None and hasattr(os, "fchmod"):
            os.fchmod(fd, stat.S_IMODE(info.st_mode) | stat.S_ISVTX)
    except OSError:
        pass
    if not _stat(path, fd).st_mode & stat.S_ISVTX:
        write_inside(path, MARK, str(info.st_ino).encode())


def _marked(path: Path, fd: int | None) -> bool:
    info = _stat(path, fd)
    return bool(info.st_mode & stat.S_ISVTX) or read_inside(path, MARK) == str(info.st_ino).encode()


def _owned(path: Path, fd: int | None) -> bool:
    if not hasattr(os, "geteuid"):
        return True
    owner = _stat(path, fd).st_uid
    if owner == os.geteuid():
        return True
    # Some network file systems give every file of this user another owner: see what a new folder gets.
    probe = path.parent / f".{os.urandom(12).hex()}"
    try:
        os.mkdir(probe)
        try:
            return os.lstat(probe).st_uid == owner
        finally:
            os.rmdir(probe)
    except OSError:
        return False


def _stat(path: Path, fd: int | None) -> os.stat_result:
    return os.fstat(fd) if fd is not None else os.lstat(path)


# ------------------------------------------------------------------ staging


@dataclass
class _Held:
    """The lock on a working folder: its handle, where there is one, and its lock file, where ``flock`` is not to be had."""

    fd: int | None = None
    file: str = ""

    def has(self, folder: Path) -> bool:
        """Whether ``folder`` is still the one that was locked, and not the target's or a later run's."""
        try:
            return self.fd is None or os.path.samestat(os.fstat(self.fd), os.lstat(folder))
        except OSError:
            return False

    def close(self, folder: Path) -> None:
        if self.file and self.has(folder):
            release(folder, self.file)
        if self.fd is not None:
            os.close(self.fd)


@contextmanager
def staging(out: Path, *, resume: bool, shared: bool = False) -> Iterator[Path]:
    """The hidden folder for ``out``, locked; taken away again when the body fails, unless ``resume``.

    With ``shared`` other holders of a shared lock may work in it too: the parts of one plan.

    Raises:
        OutputError: another run is writing the same target, or the folder cannot be made.
        UnsafeError: a link, or somebody else's folder, is in its place.
    """
    folder = partial_folder(out)
    created = [path for path in reversed(out.parents) if not path.exists()]
    held: _Held | None = None
    try:
        if created:
            out.parent.mkdir(parents=True, exist_ok=True)
        for path in created:
            sync_folder(path.parent)
        held = _enter(folder, shared=shared)
        if not resume:
            _empty(folder, held.file)
        yield folder
    except Busy as busy:
        _remove_empty(reversed(created))
        raise OutputError(f"another run is writing {out}", str(busy) or "wait for it, or choose another name") from None
    except BaseException as error:
        if not resume and held is not None:
            if held.has(folder):
                _remove_tree(folder, ignore_errors=True)
            _remove_empty(reversed(created))
        if held is None:
            _remove_empty(reversed(created))
            if isinstance(error, OSError):
                said = error.strerror or error
                raise OutputError(f"{out.parent} cannot be written to ({said})", "choose another place") from None
        raise
    finally:
        if held is not None:
            held.close(folder)


def _enter(folder: Path, *, shared: bool) -> _Held:
    """Make or take the hidden folder, and lock it.

    The folder itself is locked, not a file in it: it takes the lock along when it is renamed to be the target, so there is
    no moment at which its name is still there and its lock is not. Who opened it just before that finds another folder, or
    none, under the name, and was too late.
    """
    made = _make(folder)
    held = _Held()
    try:
        with _opened(folder) as fd:
            held.fd = os.dup(fd) if fd is not None else None
        try:
            has_lock = held.fd is not None and calls.flock(held.fd, shared=shared)
        except BlockingIOError:
            if made:
                _leave(folder, held.fd)
            raise Busy from None
        if not held.has(folder):
            raise Busy
        _take(folder, held.fd, made=made)
        if not held.has(folder):
            raise Busy
        if not has_lock and not shared:
            held.file = hold(folder)
    except FileNotFoundError:
        held.close(folder)
        raise Busy from None
    except BaseException as error:
        held.close(folder)
        if made and isinstance(error, OSError):
            _remove_empty([folder])
        raise
    return held


def _leave(folder: Path, fd: int | None) -> None:
    """Take a folder away that was made and could not be locked, unless another run took it in between.

    That run marks it at once. A system that says "busy" where nobody is would leave an empty folder otherwise.
    """
    for _ in range(_LOOKS):
        if _marked(folder, fd):
            return
        time.sleep(_PAUSE)
    _remove_empty([folder])


def _empty(folder: Path, lock: str) -> None:
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.name in (MARK, lock):
            continue
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(entry.path)
        else:
            os.unlink(entry.path)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


# ------------------------------------------------------------------ publishing


def publish(folder: Path, out: Path, *, keep: set[str], force: bool) -> None:
    """Make the hidden folder the target: drop all but ``keep``, put it on disk, rename it.

    With ``force`` an existing target is exchanged in one step and removed afterwards.

    Raises:
        OutputError: the target appeared meanwhile, or the disk refuses.
    """
    try:
        with os.scandir(folder) as found:
            entries = list(found)
        left = []
        for entry in entries:
            if entry.name == MARK or LOCK_FILE.fullmatch(entry.name):
                left.append(entry.name)  # until it is the target: what is killed before has to be known as ours
            elif entry.name not in keep:
                if entry.is_dir(follow_symlinks=False):
                    _remove_tree(entry.path)
                else:
                    os.unlink(entry.path)
        sync_tree(folder)
        if not os.path.lexists(out):
            calls.rename_new(folder, out)
        elif force:
            _replace(folder, out)
        else:
            raise FileExistsError
        for name in left:
            _unlink(out / name)
        _unmark(out)
        sync_folder(out.parent)
    except FileExistsError:
        raise OutputError(
            f"{out} appeared while it was being made", f"choose another name, or use {option('force', True)}"
        ) from None
    except OSError as error:
        raise refused(error, str(out), out.parent) from error


def publish_files(folder: Path, targets: Mapping[str, Path], *, force: bool) -> None:
    """Give finished files of the hidden folder their names beside it, and drop the folder.

    Each file appears whole, by one rename; of several, the first of ``targets`` comes last, since it is what readers open.

    Raises:
        OutputError: a target appeared meanwhile, or the disk refuses.
    """
    for name in reversed(list(targets)):
        target = targets[name]
        try:
            if force:
                os.replace(folder / name, target)
            else:
                calls.rename_new(folder / name, target)
            sync_folder(target.parent)
        except FileExistsError:
            said = f"{target} appeared while it was being made"
            raise OutputError(said, f"choose another name, or use {option('force', True)}") from None
        except OSError as error:
            raise refused(error, str(target), target.parent) from error
    _remove_tree(folder, ignore_errors=True)


def _unmark(out: Path) -> None:
    """Take the mark from a folder that has become the target."""
    try:
        with _opened(out) as fd:
            if fd is not None and hasattr(os, "fchmod"):
                os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & ~stat.S_ISVTX)
    except (OSError, UnsafeError):
        pass  # It is whole and in its place; the mark tells nobody anything there.


def _replace(folder: Path, out: Path) -> None:
    """Put the hidden folder in the place of the target, and take the old one away."""
    aside = _aside(out)
    own_folder(aside)
    _empty(aside, "")
    new, old = aside / "new", aside / "old"
    try:
        os.rename(folder, new)
        try:
            if not calls.exchange(new, out):
                os.rename(out, old)
                try:
                    os.rename(new, out)
                except OSError:
                    os.rename(old, out)
                    raise
        except BaseException:
            os.rename(new, folder)
            raise
        sync_folder(out.parent)
    finally:
        if os.path.lexists(out):  # else the old one is in there, and `recover` brings it back
            _remove_tree(aside, ignore_errors=True)
    sync_folder(out.parent)


def recover(out: Path) -> None:
    """Put right what a run left that was killed while it replaced ``out``.

    Raises:
        OSError: the disk refuses.
    """
    aside, folder = _aside(out), partial_folder(out)
    old, new = aside / "old", aside / "new"
    if not is_own(aside) or is_busy(folder) or is_busy(new):
        return
    if os.path.lexists(old) and not os.path.lexists(out):
        calls.rename_new(old, out)
    if is_own(new) and not os.path.lexists(folder):
        calls.rename_new(new, folder)
    _take_away(aside)


def is_busy(folder: Path) -> bool:
    """Whether a run holds a working folder at this moment."""
    try:
        with _opened(folder) as fd:
            return not (fd is not None and calls.flock(fd)) and taken(folder)
    except BlockingIOError:
        return True
    except (OSError, UnsafeError):
        return False


def remove_own(folder: Path) -> bool:
    """Take a working folder away, or one that was lent for a while; False where somebody is at it, or the system refuses."""
    try:
        held = _enter(folder, shared=False) if is_own(folder) else None
    except (Busy, OSError, UnsafeError):
        return False
    try:
        _remove_tree(folder, ignore_errors=True)
    finally:
        if held is not None:
            held.close(folder)
    return not os.path.lexists(folder)


def _remove_tree(path: str | Path, *, ignore_errors: bool = False) -> None:
    import shutil  # which brings three compressors with it

    shutil.rmtree(path, ignore_errors=ignore_errors)


def _take_away(folder: Path) -> None:
    _remove_tree(folder, ignore_errors=True)
    sync_folder(folder.parent)
