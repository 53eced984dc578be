"""Locks between processes: ``flock``, which the kernel releases when a process dies, and a file where there is none."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterkit.disk import calls
from adapterkit.disk.files import open_inside, read_inside, write_all, writing
from adapterkit.errors import OutputError

LOCK_SECONDS = 60.0
LOCK_FILE = re.compile(r"\.lock\.([1-9][0-9]{0,8})")


class Busy(Exception):
    """Another run holds the lock; the text says what to remove when it does not."""


@contextmanager
def locked(path: Path, shared: bool = False, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds ``flock`` on ``path`` (created when missing), exclusively or shared.

    On a file system without locks nothing is held; what is published there relies on names that can be made once only.

    Raises:
        OutputError: another process kept it for ``timeout`` seconds, or the file cannot be opened.
    """
    with writing("a lock", path.parent):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | calls.flags("CLOEXEC", "NOFOLLOW", "NONBLOCK"), 0o666)
    try:
        # Counted in own pauses, not by the clock: a machine that slept for an hour has not waited.
        waited, pause = 0.0, 0.0005
        while True:
            try:
                with writing("a lock", path.parent):
                    calls.flock(fd, shared=shared)
                break
            except OutputError as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    raise
                if waited > timeout:
                    raise OutputError(
                        f"another process has held {path} for {timeout:.0f} seconds",
                        "wait for it or end it, then run again",
                    ) from None
                time.sleep(pause * (0.5 + os.urandom(1)[0] / 256))
                waited += pause
                pause = min(pause * 1.5, 0.02)
        yield
    finally:
        os.close(fd)


def hold(folder: Path) -> str:
    """Take a working folder where there is no ``flock``, by a file in it; its name.

    The files are numbered. Whoever finds that the holder of the last one is gone makes the next: one process only can.

    Raises:
        Busy: another run holds it, or may hold it: on another machine it cannot be told.
    """
    while True:
        last = _last(folder)
        if last and not _gone(read_inside(folder, f".lock.{last}")):
            raise Busy(f"when no run is writing there, remove {folder / f'.lock.{last}'}")
        name = f".lock.{last + 1}"
        try:
            fd = open_inside(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue
        except FileNotFoundError:
            raise Busy("") from None
        try:
            write_all(fd, _own())
        finally:
            os.close(fd)
        return name


def taken(folder: Path) -> bool:
    """Whether a lock file says that a process which still runs holds the folder."""
    last = _last(folder)
    return bool(last) and not _gone(read_inside(folder, f".lock.{last}"))


def release(folder: Path, name: str) -> None:
    """Take away the lock file that `hold` made; another's of that name stays."""
    if read_inside(folder, name) == _own():
        try:
            os.unlink(folder / name)
        except OSError:
            pass


def _own() -> bytes:
    pid = os.getpid()
    return json.dumps({"host": _host(), "pid": pid, "start": calls.process_start(pid)}).encode()


def _last(folder: Path) -> int:
    """The highest number of a lock file."""
    return max((int(found[1]) for name in os.listdir(folder) if (found := LOCK_FILE.fullmatch(name))), default=0)


def _gone(said: bytes | None) -> bool:
    """Whether the process that made a lock file has ended."""
    try:
        holder = json.loads(said or b"")
        if holder["host"] != _host():
            return False
        return bool(calls.process_start(int(holder["pid"])) != holder["start"])
    except (ValueError, KeyError, TypeError):
        return False  # being written at this moment


def _host() -> str:
    import socket

    return socket.gethostname()
