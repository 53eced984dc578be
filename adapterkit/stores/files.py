"""Files that are read or written whole, where a path is taken: here, or an object of a store.

What is read becomes a copy in a temporary folder, since most readers of small files take a path; a copy is of one state of
the object, and lasts as long as the process.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from adapterkit import disk
from adapterkit.errors import AdapterkitError, NotFound, OutputError, StoreError, UnsafeError, option, size
from adapterkit.places import Address, address_of, local

if TYPE_CHECKING:
    from adapterkit.stores.store import Store, StoredObject

PART = 16 << 20  # bytes that are read or sent at a time
MOST_PARTS = 9000  # of an upload; S3 takes 10,000

_lock = threading.Lock()
_copies: dict[tuple[int, Address, str], Path] = {}  # by process, address and ETag
_folders: dict[int, Path] = {}  # by process


def brought(place: str | Path | Address, beside: Sequence[str] = ()) -> Path:
    """A path of a file: the path itself, or that of a copy of an object.

    Args:
        beside: names of files that lie beside it, perhaps, and belong to it.

    Raises:
        NotFound: there is no such object.
        OutputError: there is no room for a copy.
        UsageError: an address that is neither read nor written.
        AuthError, StoreError
    """
    import tempfile

    address = address_of(place)
    if address is None:
        return Path(local(str(place), "a file"))
    store, found = _found(address)
    key = (os.getpid(), address, found.etag)
    with _lock:
        if key not in _copies or not found.etag:
            folder = _folder()
            with disk.writing(address.name, folder):
                _check_room(found.size, folder, str(address))
                path = Path(tempfile.mkdtemp(dir=folder)) / address.name
                fetch(store, found, path)
                for name in beside:
                    other = store.head(address.with_name(name).key)
                    if other is not None:
                        fetch(store, other, path.with_name(name))
                if found.written is not None:
                    moment = found.written.timestamp()
                    os.utime(path, (moment, moment))
            _copies[key] = path
        return _copies[key]


@contextmanager
def reading(place: str | Path | Address, beside: Sequence[str] = ()) -> Iterator[Path]:
    """As `brought`, where an error in the body calls a copy by the object's address."""
    path = brought(place, beside)
    with called(path, place):
        yield path


@contextmanager
def called(path: Path, place: str | Path | Address) -> Iterator[None]:
    """Have errors of the body call a copy by the address that it is of."""
    try:
        yield
    except AdapterkitError as error:
        error.message = error.message.replace(str(path), str(place))
        error.hint = error.hint.replace(str(path), str(place))
        error.args = tuple(str(one).replace(str(path), str(place)) for one in error.args)
        raise


def version_of(address: Address) -> str:
    """What tells an object from one that takes its place: its size and its ETag.

    Raises:
        NotFound, AuthError, StoreError
    """
    found = _found(address)[1]
    return stated(found.size, found.etag)


def stated(size: int, etag: str) -> str:
    """The size and ETag of an object, as locks hold them."""
    bare = etag.strip('"')
    return f"{size}:{bare}"


def fetch(store: Store, found: StoredObject, path: Path) -> None:
    """Copy an object to a new file here, all of it of the state that was found."""
    with open(path, "xb") as file:
        for start in range(0, found.size, PART):
            file.write(store.read(found.key, start, min(PART, found.size - start), found.etag))


def fetch_folder(address: Address, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy the objects below an address to a folder here that is empty.

    Args:
        wanted: says of a name below the address whether it is copied.

    Raises:
        NotFound: there are none.
        UnsafeError: a key would lead out of the folder, or cannot be a file's name.
        OutputError, AuthError, StoreError
    """
    from adapterkit.stores.connect import open_store

    store, prefix = open_store(address), f"{address.key}/" if address.key else ""
    _fetch_named(store, {one.key.removeprefix(prefix): one for one in store.entries(prefix)}, address, folder, wanted)


def _fetch_named(
    store: Store, named: Mapping[str, StoredObject], address: Address, folder: Path, wanted: Callable[[str], bool]
) -> None:
    # A folder's own mark, as consoles make it, is an empty object.
    found = {name: one for name, one in named.items() if (one.size or "." in name) and wanted(name)}
    if not found:
        raise NotFound(f"nothing lies below {address}/", "check the bucket, the folder and the endpoint")
    with disk.writing(str(address), folder):
        _check_room(sum(one.size for one in found.values()), folder, str(address))
        for name, one in found.items():
            if {"", ".", ".."} & set(name.split("/")) or not name.isprintable() or "\\" in name:
                raise UnsafeError(f"{address} has an object '{name[:80]!r}' that no folder can hold", "remove it")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            fetch(store, one, folder / name)


@contextmanager
def copied(
    address: Address, folder: Path | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """A copy here, for as long as the body runs, of a folder, or of a file with what bears its name (``OUT.gguf.Modelfile``).

    Args:
        folder: where the copy is made; by default among temporary files.
        wanted: of a folder, says of a name in it whether it is copied.

    Raises:
        NotFound, UnsafeError, OutputError, AuthError, StoreError: see `fetch_folder`.
    """
    import tempfile

    from adapterkit.stores.connect import open_store

    with disk.writing("a temporary folder", folder or Path(tempfile.gettempdir())):
        held = tempfile.TemporaryDirectory(prefix="adapterkit-", dir=folder)
    with held as name:
        place = Path(name) / (address.name or address.bucket)
        store = open_store(address)
        if address.key and store.head(address.key) is not None:
            lead = address.key.removesuffix(address.name)
            # The whole folder is listed: some stores take what a list begins with for the name of a folder.
            own = store.entries(lead, lambda key: _is_of(key.removeprefix(lead), address.name))
            _fetch_named(
                store, {one.key.removeprefix(lead): one for one in own}, address, Path(name), lambda found: True
            )
        else:
            place.mkdir(parents=True)  # a bucket of the Hub has slashes in its name
            fetch_folder(address, place, wanted)
        with called(place, address):
            yield place


def _is_of(name: str, file: str) -> bool:
    """Whether a name is that of a file, or of one beside it that bears its name."""
    return name == file or (name.startswith(f"{file}.") and "/" not in name)


def brought_folder(address: Address) -> Path:
    """A copy of a folder here, which lasts as long as the process.

    Raises:
        NotFound, UnsafeError, OutputError, AuthError, StoreError: see `fetch_folder`.
    """
    import tempfile

    with _lock:
        top = _folder()
    with disk.writing(address.name, top):
        place = Path(tempfile.mkdtemp(dir=top)) / (address.name or address.bucket)
        place.mkdir(parents=True)
    fetch_folder(address, place)
    return place


def deliver(place: Path | Address, data: bytes) -> None:
    """Write a small file that the user named; an object is replaced as a file is.

    Raises:
        OutputError, AuthError, StoreError
    """
    if isinstance(place, Path):
        disk.deliver(place, data)
        return
    from adapterkit.stores.connect import open_store

    open_store(place).put(place.key, data)


def check_absent(place: Path | Address, *, force: bool) -> None:
    """Refuse an object that is there; paths are looked at by who writes them.

    Raises:
        OutputError
    """
    from adapterkit.stores.connect import open_store

    if isinstance(place, Address) and not force and open_store(place).head(place.key) is not None:
        raise OutputError(f"{place} exists", f"choose another name, or replace it with {option('force', True)}")


@contextmanager
def making(place: Path | Address, *, force: bool = False) -> Iterator[Path]:
    """A path to write a file to: the place itself, or one in a temporary folder that is sent when it is whole.

    Raises:
        OutputError: there is such an object, and nothing says that it may be replaced.
    """
    import tempfile

    if isinstance(place, Path):
        yield place
        return
    check_absent(place, force=force)
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as folder:
        path = Path(folder) / place.name
        yield path
        with open(path, "rb") as file:
            if not send(place, file, path.stat().st_size, absent=not force):
                raise OutputError(f"{place} appeared meanwhile", "choose another name")


def send(
    to: Address,
    source: IO[bytes],
    size: int,
    *,
    absent: bool = False,
    seen: Callable[[bytes], None] = lambda data: None,
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Send a file in parts; False where ``absent`` and something has that name.

    Args:
        seen: told of the bytes, in order.
        check: called when all are sent, before the object appears.

    Raises:
        OutputError, AuthError, StoreError
    """
    from adapterkit.stores.connect import open_store

    store = open_store(to)
    if size <= PART:
        data = source.read(size + 1)
        seen(data)
        check()
        return store.put(to.key, data, absent=absent)
    assembly = store.begin(to.key, {}, to.with_name(f".{to.name}.partial"))
    try:
        etags: dict[int, str] = {}
        part = max(PART, -(-size // MOST_PARTS))
        assembly.expect(range(1, -(-size // part) + 1))
        while data := source.read(part):
            seen(data)
            etags[len(etags) + 1] = assembly.put(len(etags) + 1, data)
        check()
        if assembly.complete(etags, absent=absent) is None:
            there = store.head(to.key)  # the answer to an earlier attempt may have been lost
            if absent and there is not None:
                assembly.abort()
                return False
            if there is None or there.size != size:
                raise StoreError(f"the upload of {to} is gone", "send it again")
        assembly.release()
    except BaseException:
        assembly.abort()
        raise
    return True


def _found(address: Address) -> tuple[Store, StoredObject]:
    from adapterkit.stores.connect import open_store

    store = open_store(address)
    found = store.head(address.key) if address.key else None
    if found is None:
        raise NotFound(f"{address} does not exist", "check the bucket, the name and the endpoint")
    return store, found


def _folder() -> Path:
    """The temporary folder of this process; it is taken away when the process ends."""
    import tempfile

    process = os.getpid()
    if process not in _folders:
        _folders[process] = Path(tempfile.mkdtemp(prefix="adapterkit-"))
        atexit.register(_drop, process)
    return _folders[process]


def _drop(process: int) -> None:
    import shutil

    if process == os.getpid():  # a forked child inherits this, and the folder is not its own
        shutil.rmtree(_folders.pop(process), ignore_errors=True)


def _check_room(nbytes: int, folder: Path, what: str) -> None:
    import shutil

    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OutputError(f"{what} takes {size(nbytes)} and {folder} has {size(free)} free", "free some space")
