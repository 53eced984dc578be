"""Where the registry lives, and which file is where.

    format                        the layout's number
    objects/sha256/ab/<hex>       blobs, read-only, named by what they hold
    records/<name>/<n>.json       immutable records; n counts from 1 without holes
    journal/<name>                one line "n body digest" per record: finds a body again, and a record that vanished
    refs/<name>/<alias>           where an alias is: a copy of the last line of its history
    history/<name>/<alias>        every move of an alias, each line naming the sum of the one before
    hidden/<name>/<n>             a mark that a version was removed from sight
    servers/                      servers by name, with history
    trees/<hex>/<path>            symbolic links that give a record's blobs their names back; made when asked for
    policies/                     what an alias asks of a version, with history (see `chain`)
    served/                       what servers were told to serve, with history
    quarantine/                   what fsck moved out of the way
    staging/, incoming/           temporary files of records and of blobs
    pulling/                      a folder for each fetch from elsewhere, until it is registered
    locks/                        files to lock; a ``.turn`` beside each for those who wait
    index.db                      SQLite, rebuilt from the rest at any time

Each change of records, refs or marks goes through ``staging``, so one look at that folder's time tells whether an index
is still right (see ``index``).
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import RegistryError, UsageError
from adapterkit.registry.canonical import sha256
from adapterkit.registry.names import check_alias, check_name, check_sha256, is_name
from adapterkit.values import dataclass

LAYOUT = b"adapterkit registry 1\n"
OLD = 86400.0  # seconds after which what is temporary belongs to a run that was killed
FOLDERS = (
    "objects/sha256",
    "records",
    "journal",
    "refs",
    "history",
    "hidden",
    "trees",
    "quarantine",
    "staging",
    "incoming",
    "locks",
)


def default_home() -> Path:
    """``$ADAPTERKIT_HOME``, else ``adapterkit`` in the user's data folder of this platform.

    Raises:
        UsageError: ``$ADAPTERKIT_HOME`` is not an absolute path (it would name another home in each folder).
    """
    if given := os.environ.get("ADAPTERKIT_HOME", ""):
        path = Path(given).expanduser()
        if not path.is_absolute():
            raise UsageError(f"ADAPTERKIT_HOME is '{given}'", "set it to an absolute path")
        return path
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "adapterkit"
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share") / "adapterkit"


@dataclass(frozen=True)
class Home:
    """The paths of one home. Names and digests are checked before they become part of a path."""

    root: Path

    @property
    def format(self) -> Path:
        return self.root / "format"

    @property
    def index(self) -> Path:
        return self.root / "index.db"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def incoming(self) -> Path:
        return self.root / "incoming"

    @property
    def pulling(self) -> Path:
        return self.root / "pulling"

    def room_to_pull(self) -> Path:
        """The folder to fetch into, so that files become blobs by a link. What killed runs left in it is taken away.

        Raises:
            OutputError: it cannot be made.
        """
        import shutil

        from adapterkit.disk.left import newest

        with disk.writing("a download", self.root):
            self.pulling.mkdir(exist_ok=True)
            for entry in entries(self.pulling):
                try:
                    old = time.time() - newest(Path(entry.path)) > OLD  # a folder is as young as what is written in it
                except FileNotFoundError:  # somebody is at it
                    old = False
                if old:
                    shutil.rmtree(entry.path, ignore_errors=True)
        return self.pulling

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def blob(self, digest: str) -> Path:
        check_sha256(digest, "blob")
        return self.root / "objects" / "sha256" / digest[:2] / digest

    def tree(self, digest: str) -> Path:
        return self.root / "trees" / check_sha256(digest, "record")

    def records(self, name: str) -> Path:
        return self.root / "records" / check_name(name)

    def record(self, name: str, version: int) -> Path:
        return self.records(name) / f"{version:d}.json"

    def journal(self, name: str) -> Path:
        return self.root / "journal" / check_name(name)

    def refs(self, name: str) -> Path:
        return self.root / "refs" / check_name(name)

    def ref(self, name: str, alias: str) -> Path:
        return self.refs(name) / check_alias(alias)

    def history(self, name: str, alias: str) -> Path:
        return self.root / "history" / check_name(name) / check_alias(alias)

    def hidden(self, name: str, version: int) -> Path:
        return self.root / "hidden" / check_name(name) / f"{version:d}"

    def lock(self, name: str) -> AbstractContextManager[None]:
        """The exclusive lock of a name; 256 lock files serve all names, and nobody holds two."""
        return disk.locked(self.root / "locks" / f"{sha256(check_name(name).encode())[:2]}.lock")

    def store_lock(self, shared: bool) -> AbstractContextManager[None]:
        """Shared by everyone who adds, exclusive for gc: a blob found present stays until its record is there."""
        return disk.locked(self.root / "locks" / "store.lock", shared=shared)

    def index_lock(self) -> AbstractContextManager[None]:
        """The exclusive lock of whoever writes the index."""
        return disk.locked(self.root / "locks" / "index.lock")

    def create(self) -> None:
        """Makes the folders that are missing.

        Raises:
            RegistryError: the home is of a layout that this version does not know.
            OutputError: the folders cannot be made.
        """
        if not self.format.exists():
            with disk.writing("a registry", self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                for name in FOLDERS:
                    (self.root / name).mkdir(parents=True, exist_ok=True)
                with disk.staged(self.staging, LAYOUT) as temporary:
                    disk.publish_new(temporary, self.format)
        self.check()

    def check(self) -> None:
        """
        Raises:
            RegistryError: the home is of a layout that this version does not know, or its mark is damaged.
        """
        try:
            found = read_file(self.format)
        except FileNotFoundError:
            return
        if found != LAYOUT:
            raise RegistryError(
                f"{self.format} is not the mark of a layout this version knows",
                "use the newer adapterkit that made it, or run fsck if it is damaged",
            )

    @property
    def exists(self) -> bool:
        """Whether a registry was ever made here."""
        return self.format.exists()

    def names(self) -> Iterator[str]:
        """All names that have records, in no order."""
        for entry in entries(self.root / "records"):
            if is_name(entry.name) and entry.is_dir():
                yield entry.name

    def versions(self, name: str) -> list[int]:
        """All version numbers of a name that have a file, readable or not, ascending."""
        found = (entry.name for entry in entries(self.records(name)))
        return sorted(int(file[:-5]) for file in found if file.endswith(".json") and is_number(file[:-5]))

    def hidden_versions(self, name: str) -> set[int]:
        """The versions of a name that carry a mark of removal."""
        found = (entry.name for entry in entries(self.root / "hidden" / check_name(name)))
        return {int(file) for file in found if is_number(file)}

    def alias_names(self, name: str) -> list[str]:
        """The aliases of a name that have a file, sorted."""
        return sorted(entry.name for entry in entries(self.refs(name)) if is_name(entry.name))


def read_file(path: Path) -> bytes:
    """The bytes of a small file of a registry.

    Raises:
        FileNotFoundError: there is none.
        RegistryError: something else has its name (a folder, a pipe, a device), or it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | disk.calls.flags("CLOEXEC", "NONBLOCK", "BINARY"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror}", "run fsck") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RegistryError(f"{path} is no file, and has the name of one of the registry", "run fsck")
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read()
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror}", "run fsck") from error
    finally:
        os.close(fd)


def is_number(text: str) -> bool:
    """Whether ``text`` is a version number as file names spell it."""
    return text.isascii() and text.isdigit() and text[0] != "0" and len(text) <= 10


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder; none when it is missing."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RegistryError(f"{folder} cannot be read: {error.strerror}", "check its permissions") from error


def staging_stamp(home: Home) -> str:
    """The time of ``staging/``, through which every change passes; empty when there is no registry."""
    try:
        return str(home.staging.stat().st_mtime_ns)
    except OSError:
        return ""


def open_home(home: Path | None = None) -> Home:
    """The home to work on, whether or not it exists yet.

    Raises:
        RegistryError: it is of a layout that this version does not know.
    """
    found = Home(home if home is not None else default_home())
    found.check()
    return found
