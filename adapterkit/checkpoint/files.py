"""Byte sources: a local file, or a file on the Hub read by HTTP range."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from adapterkit.disk import calls
from adapterkit.errors import CheckpointError, NotFound, UnsafeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from adapterkit.places import Address


GGUF_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, or is called so: by its first bytes, since Ollama's blobs have no ending."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


class Source(ABC):
    """Random access to the bytes of one file; safe to use from several threads."""

    name: str
    size: int
    path: Path | None = None
    loose: bool = False  # the user named the file itself, so its folder is nobody's
    version: str = ""  # of an object in a store: the ETag that every request asks for
    commit: str = ""  # of a file of the Hub
    trained: bool = False  # an adapter's, so a plan knows all its values; see `adapterkit.checkpoint.values`
    beside: Sequence[FirstSeen | Source] = ()  # of a weight file: the small files that were read with it
    stored_at: Address | None = None  # where a store has the same bytes, which it may copy by itself

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``; fewer only at the end of the file."""

    def stored_as(self) -> str:
        """By what the bytes at `stored_at` are known; empty where they cannot be copied."""
        return self.version

    def check_unchanged(self) -> None:
        """See that the file is still the one that was opened.

        Raises:
            CheckpointError: it was written to or replaced.
        """

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which bytes will be wanted, as (start, stop), so that a remote file can be read in few requests."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            CheckpointError: the file ends before the buffer is full.
        """
        data = self.read(offset, len(buffer))
        if len(data) != len(buffer):
            raise self._short(offset + len(data))
        buffer[:] = data

    def _short(self, at: int) -> CheckpointError:
        return CheckpointError(f"{self.name} ended at byte {at} while it was read", "download or save it again")


class FirstSeen:
    """A local file as it was when it was first looked at."""

    __slots__ = ("name", "path", "state")

    def __init__(self, name: str, path: Path, state: tuple[int, ...]) -> None:
        self.name, self.path, self.state = name, path, state

    def check_unchanged(self, fd: int | None = None) -> None:
        """See that the file, and what was opened of it, is still that one.

        Raises:
            CheckpointError: it was written to or replaced.
        """
        try:
            here = [os.stat(self.path), *([] if fd is None else [os.fstat(fd)])]
        except OSError:
            here = []
        if not here or any(_state(info) != self.state for info in here):
            hint = "run it again when nothing writes to it (a download or a training, perhaps)"
            raise CheckpointError(f"{self.name} changed while it was read", hint)


class LocalFile(Source):
    """A file on disk, read by ``pread``; opened at the first read, closed with the object."""

    def __init__(self, path: Path, name: str | None = None, *, loose: bool = False) -> None:
        self.path, self.loose = path, loose
        self.name = name or str(path)
        try:
            info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                kind = "folder" if stat.S_ISDIR(info.st_mode) else "pipe or a device"
                raise UnsafeError(f"{self.name} is a {kind}, not a file", "give a plain file")
            self.size, self.seen = info.st_size, FirstSeen(self.name, path, _state(info))
        except FileNotFoundError:
            raise NotFound(f"{self.name} does not exist", "check the path, or download the missing file") from None
        except OSError as error:
            raise CheckpointError(f"{self.name} cannot be read ({error.strerror})", "check its permissions") from None
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        if self._fd is None:
            try:
                fd = os.open(self.path, os.O_RDONLY | calls.flags("CLOEXEC", "NONBLOCK", "BINARY"))  # type: ignore[arg-type]
            except OSError as error:
                raise CheckpointError(
                    f"{self.name} cannot be opened ({error.strerror})", "check its permissions"
                ) from None
            # Two threads may open it at once: the first one stays, the other is closed.
            if self._fd is None:
                self._fd = fd
            else:
                os.close(fd)
        return self._fd

    def check_unchanged(self) -> None:
        self.seen.check_unchanged(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                more = calls.pread(self.fd, length - len(data), offset + len(data))
            except OSError as error:
                raise self._failed(error) from error
            if not more:
                break
            data = data + more if data else more
        return data

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.name} cannot be read ({error.strerror})", "check the disk it lies on")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = calls.pread_into(self.fd, buffer[done:], offset + done)
            except OSError as error:
                raise self._failed(error) from error
            if count == 0:
                raise self._short(offset + done)
            done += count

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound above: at the end of Python this module may be empty before its last file is closed.
        fd = getattr(self, "_fd", None)
        if fd is not None:
            close(fd)


def check_unchanged(sources: Iterable[Source]) -> None:
    """See that no file changed since it was opened, nor any that was read with it (a config, an index, a tokenizer).

    Raises:
        CheckpointError: one did; see `Source.check_unchanged`.
    """
    beside: dict[int, FirstSeen] = {}
    for source in sources:
        source.check_unchanged()
        # Each request for an object says which ETag it expects.
        beside |= {id(one): one for one in source.beside if isinstance(one, FirstSeen)}
    for one in beside.values():
        one.check_unchanged()


DECIDING = ("config.json", "adapter_config.json")  # small files beside weights that say what their values mean


def states_here(sources: Iterable[Source]) -> dict[str, str]:
    """What tells that inputs on this machine are still what they were, with the configs in their folders, by name.

    It does not depend on what was read of them, so workers that opened more or less of them say the same.
    """
    found, folders = {}, set()
    for source in sources:
        info = os.stat(source.path) if source.path is not None else None
        # The change time also tells of a file that was swapped for one of the same age.
        state = (info.st_mtime_ns, info.st_ctime_ns, info.st_ino) if info is not None else ()
        found[source.name] = f"{source.size}:{state}"
        if source.path is not None:
            folders.add(os.path.realpath(os.path.dirname(source.path)))
    for path in sorted(os.path.join(folder, name) for folder in folders for name in DECIDING):
        try:
            info = os.stat(path)
        except OSError:
            continue
        found[path] = f"{info.st_size}:{(info.st_mtime_ns, info.st_ctime_ns, info.st_ino)}"
    return found


def seen(path: Path) -> tuple[FirstSeen, ...]:
    """A file, or every file of a folder that is not hidden, as it is now: for what another program will read."""
    from pathlib import Path

    if not path.is_dir():
        return (LocalFile(path).seen,)
    found: list[FirstSeen] = []
    for folder, names, files in os.walk(path):
        names[:] = [name for name in names if not name.startswith(".")]
        places = [os.path.join(folder, name) for name in files if not name.startswith(".")]
        found += [LocalFile(Path(place)).seen for place in places if os.path.isfile(place)]
    return tuple(found)


def _state(info: os.stat_result) -> tuple[int, ...]:
    """What tells of a change: also the time of the last change of anything, which no program can set."""
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


class BytesFile(Source):
    """Bytes that are already in memory."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self.size = name, data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def fingerprint(source: Source) -> str:
    """Size and hash of the header: enough to see that a plan belongs to these files, without reading them."""
    import hashlib

    first = source.read(0, 8)
    version = f":{source.version}" if source.version else ""
    if first[:4] == GGUF_MAGIC:
        return f"{source.size}:{hashlib.sha256(source.read(0, 1 << 20)).hexdigest()}{version}"
    length = min(int.from_bytes(first, "little"), source.size)
    return f"{source.size}:{hashlib.sha256(source.read(8, length)).hexdigest()}{version}"
