"""Locks between processes: ``flock``, which the kernel releases when a process dies, and a file where there is none."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterkit.disk import calls
from adapterkit.disk.files import open_inside, read_inside, write_all, writing
from adapterkit.errors import OutputError
from adapterkit.foreign import json_value

LOCK_SECONDS = 60.0
_PAUSE = 0.004  # seconds between two looks of one who has waited for a while
_LATECOMER = 0.02  # its first pause behind others: those who came before look more often
LOCK_FILE = re.compile(r"\.lock\.([1-9][0-9]{0,8})")


class Busy(Exception):
    """Another run holds the lock; the text says what to remove when it does not."""


@contextmanager
def locked(path: Path, shared: bool = False, timeout: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds ``flock`` on ``path`` (created when missing), exclusively or shared.

    Who wants it first takes the lock of ``path.turn`` and keeps that until it has ``path``: nobody who comes later
    overtakes it, neither the process that just let go nor one that would share the lock with those who hold it. Each who
    passes leaves another mark in that file, so whoever waits behind knows that the lock is passed on, and waits on.

    On a file system without locks nothing is held; what is published there relies on names that can be made once only.

    Raises:
        OutputError: others kept it for ``timeout`` seconds and it was passed on to nobody, or the file cannot be opened.
    """
    fd = _opened(path)
    try:
        turn = _opened(path.with_name(f"{path.name}.turn"))
        try:
            waiter = _Waiter(path, turn, timeout)
            waiter.take(turn, False, _LATECOMER, 0.8)
            waiter.take(fd, shared, 0.0005, 1.5)
            with suppress(OSError):  # a full disk: those who wait then count as if nobody had passed
                calls.pwrite(turn, memoryview(os.urandom(8)), 0)
        finally:
            os.close(turn)
        yield
    finally:
        os.close(fd)


def _opened(path: Path) -> int:
    with writing("a lock", path.parent):
        return os.open(path, os.O_RDWR | os.O_CREAT | calls.flags("CLOEXEC", "NOFOLLOW", "NONBLOCK"), 0o666)


class _Waiter:
    """One who waits for a lock, and for how long it was passed on to nobody."""

    def __init__(self, path: Path, turn: int, timeout: float) -> None:
        self.path, self.turn, self.timeout = path, turn, timeout
        self.waited, self.mark = 0.0, b""

    def take(self, fd: int, shared: bool, first: float, factor: float) -> None:
        """Takes the lock of ``fd``, with pauses from ``first`` seconds on that each differ from the last by ``factor``."""
        pause = first
        while True:
            try:
                with writing("a lock", self.path.parent):
                    calls.flock(fd, shared=shared)
                return
            except OutputError as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    raise
            mark = calls.pread(self.turn, 8, 0)
            if mark != self.mark:
                self.mark, self.waited = mark, 0.0
            if self.waited > self.timeout:
                raise OutputError(
                    f"another process has held {self.path} for {self.timeout:.0f} seconds",
                    "wait for it or end it, then run again",
                )
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 256))
            # Counted in own pauses, not by the clock: a machine that slept for an hour has not waited.
            self.waited += pause
            pause = max(pause * factor, _PAUSE) if factor < 1 else min(pause * factor, _PAUSE)


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
        holder = json_value(said or b"")
        if holder["host"] != _host():
            return False
        return bool(calls.process_start(int(holder["pid"])) != holder["start"])
    except (ValueError, KeyError, TypeError):
        return False  # being written at this moment


def _host() -> str:
    import socket

    return socket.gethostname()
