"""A disk that lacks something."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import types
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


def _refusing(code: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


LACKS = (
    "flock",
    "fcntl",
    "renameat2",
    "libc",
    "fallocate",
    "copy_file_range",
    "copy_file_range_gone",
    "link",
    "folder_fsync",
    "fsync",
    "sticky",
    "handles",
    "owner",
    "windows",
)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``lacking(what)`` takes a call away, as file systems and other operating systems do."""
    from adapterkit.disk import calls

    def take(what: str) -> None:
        if what == "flock":
            monkeypatch.setattr(calls.fcntl, "flock", _refusing(errno.ENOLCK))
        elif what == "fcntl":
            monkeypatch.setattr(calls, "fcntl", None)
        elif what == "renameat2":
            monkeypatch.setattr(calls, "_renameat2", lambda *_: False)
        elif what == "libc":
            monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: types.SimpleNamespace())
        elif what == "fallocate":
            monkeypatch.setattr(calls, "allocate", lambda *_: 0)
        elif what == "copy_file_range":
            monkeypatch.setattr(os, "copy_file_range", _refusing(errno.EBADF))
        elif what == "copy_file_range_gone":
            monkeypatch.delattr(os, "copy_file_range")
        elif what == "link":
            monkeypatch.setattr(os, "link", _refusing(errno.EPERM))
        elif what == "folder_fsync":
            real = os.fsync

            def fsync(fd: int) -> None:
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "Invalid argument")
                real(fd)

            monkeypatch.setattr(os, "fsync", fsync)
        elif what == "fsync":
            monkeypatch.setattr(os, "fsync", _refusing(errno.EINVAL))
            monkeypatch.setattr(os, "fdatasync", _refusing(errno.ENOSYS))
        elif what == "sticky":  # as on FAT and some network mounts
            monkeypatch.setattr(os, "fchmod", _refusing(errno.EPERM))
        elif what == "handles":
            monkeypatch.setattr(os, "supports_dir_fd", set())
        elif what == "owner":  # a mount that gives every file to somebody else
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        elif what == "windows":
            monkeypatch.setattr(calls, "fcntl", None)
            monkeypatch.setattr(calls, "_renameat2", lambda *_: False)
            monkeypatch.setattr(os, "supports_dir_fd", set())
            gone = ("pread", "preadv", "pwrite", "copy_file_range", "fdatasync", "fchmod", "geteuid")
            flags = ("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK")
            for name in (*gone, *flags):
                monkeypatch.delattr(os, name)
        else:
            raise AssertionError(what)

    return take
