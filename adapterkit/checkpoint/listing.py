"""A folder of files, local or on the Hub, as a flat listing: what the readers of formats work on."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.files import FirstSeen, LocalFile, Source
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.errors import CheckpointError, NotFound, UnsafeError, option

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_JSON = 64 << 20  # bytes; the index of a trillion-parameter checkpoint is about 10 MB
WEIGHTS = (".safetensors", ".gguf")
MAX_DEPTH = 2  # folders; side files lie at most this deep (sentence-transformers keeps `1_Pooling/config.json`)


class Listing(ABC):
    """Names of files (relative posix paths) and their bytes."""

    ref: str
    commit: str | None = None

    @property
    @abstractmethod
    def names(self) -> frozenset[str]: ...

    @property
    def every(self) -> frozenset[str]:
        """All names, also those that ``names`` leaves out since they are hidden or lie deep."""
        return self.names

    @abstractmethod
    def open(self, name: str) -> Source:
        """The bytes of ``name``.

        Raises:
            NotFound: there is no such file.
            UnsafeError: it is a link out of the folder.
        """

    def prefetch(self, names: Iterable[str]) -> None:
        """Say which files will be opened next, so that a remote listing can fetch them together."""

    def json(self, name: str) -> dict[str, Any]:
        """A file as a JSON object; see `read_json`."""
        return read_json(self.open(name))


def read_json(source: Source) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is not one, or too large to be one.
    """
    if source.size > MAX_JSON:
        raise CheckpointError(
            f"{source.name} is {source.size} bytes, too large to be what its name says", "do not use it"
        )
    found = parse_json(source.read(0, source.size), source.name)
    if not isinstance(found, dict):
        raise CheckpointError(f"{source.name} is not a JSON object", "download or save it again")
    return found


def check_plain(name: str, where: str) -> str:
    """A file name without a path, or `UnsafeError`: names in an index are data, never paths."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or set(name) & {"/", "\\", "\0"}:
        raise UnsafeError(f"{where} points to {str(name)[:80]!r}, out of its folder", "do not use this checkpoint")
    return name


def _decides(name: str) -> bool:
    """Whether a file of that name says what a folder is."""
    return name.endswith((".safetensors", ".gguf", ".index.json")) or name in ("config.json", "adapter_config.json")


_follows = False


def set_follow_links(asked: bool) -> None:
    """Whether side files that are links out of their folder are read; weights always are."""
    global _follows
    _follows = asked


def follows_links() -> bool:
    """Whether such links are followed."""
    return _follows


class LocalFolder(Listing):
    """A folder on disk. Links may point into the folder or, for a Hugging Face cache snapshot or a registry's tree, into that
    cache or among that registry's blobs.

    Weight files may be links to anywhere, as a DVC or git-annex work tree or a mounted volume has them: they are read as
    safetensors or not at all. Any other file could be one that was not meant to leave its place, and would travel with
    the output; links of such files out of the folder are followed when that is asked for (`set_follow_links`).
    """

    def __init__(self, path: Path, ref: str | None = None, commit: str | None = None) -> None:
        self.path, self.ref, self.commit = path, ref or str(path), commit
        real = path.resolve()
        self._allowed = [real]
        for folder in (real, *real.parents):
            if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
                self._allowed.append(folder.parent.parent.parent)  # the cache root: snapshots link to blobs below it
            if folder.name == "trees" and (folder.parent / "format").is_file():
                self._allowed += [folder.parent / "objects", folder.parent / "records"]
        self._names = frozenset(self._walk(path, PurePosixPath()))
        self._read: list[FirstSeen] = []

    def _walk(self, folder: Path, prefix: PurePosixPath) -> Iterable[str]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read ({error.strerror})", "check its permissions") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if len(prefix.parts) < MAX_DEPTH:
                    yield from self._walk(Path(entry.path), prefix / entry.name)
            elif entry.is_file() or not os.path.exists(entry.path) or (_decides(entry.name) and not entry.is_dir()):
                # A dead link is listed, so that whoever wants it hears of it; so is a pipe that is called like a file
                # without which the rest means something else.
                yield str(prefix / entry.name)

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def open(self, name: str) -> Source:
        path = self.path / name
        shown = f"{self.ref.rstrip('/')}/{name}"
        if name not in self._names:
            raise NotFound(f"{shown} does not exist", "download the missing file or correct the path")
        inside = any(path.resolve().is_relative_to(root) for root in self._allowed)
        if not inside and not _follows and not name.endswith(".safetensors"):
            hint = f"replace the link by the file itself, or add {option('follow_links')} if it is meant"
            raise UnsafeError(f"{shown} is a link out of its folder", hint)
        found = self._file(path, shown, name)
        if name.endswith(WEIGHTS):
            found.beside = self._read
        else:
            self._read.append(found.seen)
        return found

    def _file(self, path: Path, shown: str, name: str) -> LocalFile:
        return LocalFile(path, shown)
