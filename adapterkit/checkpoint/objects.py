"""Files and folders in an object store: listed once, read by range, each request on the ETag that the listing saw.

What is read is fetched in windows. Where it is known ahead which bytes will be wanted (`ObjectFile.expect`), neighbouring
ranges are joined and cut into windows of at most 16 MiB, so that the number of requests follows from the plan. Elsewhere a
window grows while reads follow one another, as a kernel reads ahead of a program.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.files import Source
from adapterkit.checkpoint.listing import MAX_DEPTH, WEIGHTS, Listing
from adapterkit.errors import NotFound
from adapterkit.places import Address, address_of
from adapterkit.stores.connect import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.stores.store import Store, StoredObject

WINDOW = 16 << 20  # bytes of one request, at most
FIRST = 16 << 10  # bytes of the first request for safetensors: the header of a small file, the length of a large one's
FIRST_GGUF = 1 << 20  # of GGUF, whose header holds the vocabulary
WHOLE = 1 << 20  # any other file of so many bytes comes at once and is kept
AHEAD = 64 << 10  # bytes of the first window of reads that follow one another
HELD = 8  # windows in memory, of all files together, unless there are many workers


_Object = tuple[str, str, int]  # address and version of an object; a number where it has no version
_Key = tuple[_Object, int, int]  # with start and stop of a window


class _Windows:
    """Windows that were fetched, the last used last; those of all files share one limit.

    Outputs that are written in one pass open the same object each for itself. They share its windows: a window is kept until
    all files that expect it have read it.
    """

    def __init__(self) -> None:
        self.limit = HELD
        # A file may be collected, and forgotten, at any moment while its own thread holds the lock: no loop here goes over
        # what `expect` changes.
        self._lock = threading.RLock()
        self._held: OrderedDict[_Key, _Window] = OrderedDict()
        self._expected: dict[int, tuple[_Object, frozenset[tuple[int, int]]]] = {}  # by the number of a file

    def expect(self, file: int, of: _Object, windows: Iterable[tuple[int, int]]) -> None:
        """What a file will read of an object, in place of what it said before."""
        wanted = frozenset(windows)
        with self._lock:
            if wanted:
                self._expected[file] = (of, wanted)
            else:
                self._expected.pop(file, None)
            for key in list(self._held):
                if key[0] == of and not self.readers(key):
                    self._held.pop(key, None)

    def readers(self, key: _Key) -> list[int]:
        """The files that expect a window, by their numbers."""
        of, start, stop = key
        with self._lock:
            said = list(self._expected.items())
            return [file for file, (its, wanted) in said if its == of and (start, stop) in wanted]

    def take(self, key: _Key) -> _Window:
        with self._lock:
            window = self._held.get(key)
            if window is None:
                window = self._held[key] = _Window(key[1], key[2])
                while len(self._held) > self.limit:
                    self._held.popitem(last=False)
            if key in self._held:
                self._held.move_to_end(key)
            return window

    def drop(self, key: _Key) -> None:
        with self._lock:
            self._held.pop(key, None)


class _Window:
    """Bytes of a file, fetched by whoever wants them first."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.data = start, stop, b""
        self.used: dict[int, int] = {}  # bytes that each file has read, by its number
        self.lock = threading.Lock()


_windows = _Windows()
_numbers = count()


def hold(jobs: int) -> None:
    """Keep as many windows as so many worker threads need."""
    _windows.limit = max(HELD, 2 * jobs)


def window_memory(names: Iterable[str], jobs: int) -> int:
    """Bytes of memory of the windows of so many worker threads; none where no input of these names lies in a store."""
    return max(HELD, 2 * jobs) * WINDOW if any(address_of(name) is not None for name in names) else 0


class ObjectFile(Source):
    """An object, read by range. Each request says which ETag it expects, so what is read is of one state of the object.

    Args:
        entry: as listed.
        name: what to call it.
    """

    def __init__(self, store: Store, entry: StoredObject, name: str, *, loose: bool = False) -> None:
        self.store, self.key, self.name, self.path, self.loose = store, entry.key, name, None, loose
        self.size, self.version, self.stored_at = entry.size, entry.etag, store.place(entry.key)
        self.listed: frozenset[str] | None = None  # the names beside it, where its folder was listed
        self._number = next(_numbers)
        self._object: _Object = (str(self.address), self.version, 0) if self.version else ("", "", self._number)
        self._head = b""
        self._head_lock = threading.Lock()
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._first = min(self.size, _first_bytes(self.key, self.size))
        self._ahead, self._next, self._grown = (
            (0, b""),
            -1,
            AHEAD,
        )  # what was read ahead, and the read that would follow
        self._ahead_lock = threading.Lock()

    @property
    def address(self) -> Address:
        return self.store.place(self.key)

    def check_unchanged(self) -> None:
        self.store.check_unchanged(self.key, self.version)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which bytes will be wanted, as (start, stop): each is fetched once if they are read about in order."""
        cut = windows_of(ranges)
        self._starts, self._stops = [start for start, _ in cut], [stop for _, stop in cut]
        _windows.expect(self._number, self._object, cut)

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        found = self._from_head(offset, length)
        return self._fetched(offset, length) if found is None else found

    def _from_head(self, offset: int, length: int) -> bytes | None:
        """Bytes of the header. It is read as far as it was asked for from its start on, and kept."""
        with self._head_lock:
            if not self._head and offset < self._first:
                self._head = self.store.read(self.key, 0, self._first, self.version)
            held = len(self._head)
            if offset + length <= held:
                return self._head[offset : offset + length]
            if held and offset == 8 and length == self._header_length() <= _MOST_HEADER:
                self._head += self.store.read(self.key, held, 8 + length - held, self.version)
                return self._head[offset : offset + length]
            return None

    def _header_length(self) -> int:
        """What a safetensors file says of its header's length; of another file, nothing."""
        return int.from_bytes(self._head[:8], "little") if self.key.endswith(_SAFETENSORS) else -1

    @property
    def held(self) -> int:
        """How many bytes from its start on are in memory."""
        return len(self._head)

    def _fetched(self, offset: int, length: int) -> bytes:
        found = []
        while length:
            data = self._some(offset, length)
            found.append(data)
            offset += len(data)
            length -= len(data)
        return found[0] if len(found) == 1 else b"".join(found)

    def _some(self, offset: int, length: int) -> bytes:
        """One byte at least, from one window."""
        if offset < len(self._head):
            return self._head[offset : offset + length]
        at = bisect_right(self._starts, offset) - 1
        if at >= 0 and offset < self._stops[at]:
            return self._expected(at, offset, length)
        if at + 1 < len(self._starts):
            length = min(length, self._starts[at + 1] - offset)
        return self._unexpected(offset, length)

    def _expected(self, at: int, offset: int, length: int) -> bytes:
        key = (self._object, self._starts[at], self._stops[at])
        window = _windows.take(key)
        with window.lock:
            if not window.data:
                window.data = self.store.read(self.key, window.start, window.stop - window.start, self.version)
            data = window.data[offset - window.start : offset - window.start + length]
            window.used[self._number] = window.used.get(self._number, 0) + len(data)
            # Each file wants each byte once, nearly always. Who else wants it is asked when this file has had it.
            whole = len(window.data)
            if window.used[self._number] >= whole and all(
                window.used.get(file, 0) >= whole for file in _windows.readers(key)
            ):
                _windows.drop(key)
        return data

    def _unexpected(self, offset: int, length: int) -> bytes:
        with self._ahead_lock:
            start, data = self._ahead
            if start <= offset and offset + length <= start + len(data):
                self._next = offset + length
                return data[offset - start : offset - start + length]
            follows = offset == self._next or (len(data) and start <= offset <= start + len(data))
            self._grown = min(2 * self._grown, WINDOW) if follows else AHEAD
            self._next = offset + length
            if follows:
                data = self.store.read(
                    self.key, offset, min(max(length, self._grown), self.size - offset), self.version
                )
                self._ahead = (offset, data)
                return data[:length]
        return self.store.read(self.key, offset, length, self.version)

    def __del__(self) -> None:
        if hasattr(self, "_object"):  # it was opened
            _windows.expect(self._number, self._object, ())


def _first_bytes(key: str, size: int) -> int:
    if key.endswith(_SAFETENSORS):
        return FIRST
    return FIRST_GGUF if key.endswith(".gguf") else size if size <= WHOLE else 0


_SAFETENSORS = ".safetensors"
_MOST_HEADER = 100_000_000  # bytes, as in `adapterkit.checkpoint.header`


def windows_of(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges as (start, stop), joined where they touch and cut into windows of at most `WINDOW` bytes."""
    joined: list[list[int]] = []
    for start, stop in sorted(one for one in ranges if one[1] > one[0]):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return [(at, min(at + WINDOW, stop)) for start, stop in joined for at in range(start, stop, WINDOW)]


class ObjectFolder(Listing):
    """The objects below an address, as a folder. One listing says their sizes and ETags.

    Raises:
        NotFound: there are none.
        UsageError: so many that they are not one model's.
        AuthError, StoreError
    """

    def __init__(self, address: Address) -> None:
        self.ref, self.address, self.commit = str(address), address, None
        self.store = open_store(address)
        prefix = f"{address.key}/" if address.key else ""
        found = self.store.entries(prefix)
        plain = {one.key.removeprefix(prefix): one for one in found if _is_plain(one.key.removeprefix(prefix))}
        # A folder's own mark, as consoles make it, is an empty object; its slash is gone here.
        self._entries = {name: one for name, one in plain.items() if one.size or "." in name}
        if not self._entries:
            raise NotFound(f"nothing lies below {address}/", "check the bucket, the folder and the endpoint")
        self._every = frozenset(self._entries)
        self._open: dict[str, ObjectFile] = {}
        self._read: list[ObjectFile] = []

    @property
    def every(self) -> frozenset[str]:
        """All names, also hidden ones and those that lie deep."""
        return self._every

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name in self._entries if _is_shown(name))

    def open(self, name: str) -> ObjectFile:
        if name not in self._entries:
            raise NotFound(f"{self.ref}/{name} does not exist", "upload the missing file or correct the address")
        if name not in self._open:
            found = self._open[name] = ObjectFile(self.store, self._entries[name], f"{self.ref}/{name}")
            found.listed = self._every
            if name.endswith(WEIGHTS):
                found.beside = self._read
            else:
                self._read.append(found)
        return self._open[name]

    def prefetch(self, names: Iterable[str]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        sources = [self.open(name) for name in names if name in self._entries]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(_read_header, sources))


_PARALLEL = 16


def _read_header(source: ObjectFile) -> None:
    """The header of a safetensors file, as `parse_header` will ask for it."""
    length = int.from_bytes(source.read(0, 8), "little")
    if source.key.endswith(_SAFETENSORS) and length <= min(_MOST_HEADER, source.size):
        source.read(8, length)


def _is_plain(name: str) -> bool:
    """Whether a key is a file's name: not a folder's own mark, and nothing that would lead out of a folder here."""
    return not {"", ".", ".."} & set(name.split("/")) and name.isprintable() and "\\" not in name


def _is_shown(name: str) -> bool:
    """Whether a folder here would show a file of that name: it is not hidden and lies not too deep."""
    parts = name.split("/")
    return len(parts) <= MAX_DEPTH + 1 and not any(part.startswith(".") for part in parts)


def object_file(ref: Any, *, loose: bool = False) -> ObjectFile | None:
    """The object that a reference names by itself, or None where it is no address or that of a folder.

    Raises:
        UsageError: no address that a store can have.
        AuthError, StoreError
    """
    address = address_of(ref)
    if address is None or not address.key:
        return None
    store = open_store(address)
    found = store.head(address.key)
    return None if found is None else ObjectFile(store, found, str(address), loose=loose)
