"""What a build remembers beside its recipe: hashes of files by their state on disk, and what each step made.

Nothing in it is needed: without it inputs are hashed again and outputs made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.errors import OutputError
from adapterkit.foreign import json_value

FOLDER = ".adapterkit"
FORMAT = 1
_SETTLED = 100_000_000  # nanoseconds after which a change of a file shows in its times


@dataclass(frozen=True)
class Made:
    """What a step made.

    Attributes:
        key: digest of everything that decides its bytes.
        path: where, relative to the recipe.
        files: sha256 of each file, by its path relative to ``path`` (to the folder around it, where that is a file).
        after: what was done with it then (``verify``, ``register``, ``push``): the key of each, and what came of it.
        stored: of an output in a store, the size and ETag of each object. ``files`` has of weights there their size alone.
    """

    key: str
    path: str
    files: Mapping[str, str]
    after: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over the lines that ``sha256sum`` prints of the files, in order of their names."""
        return digest_of(self.files)

    @property
    def identity(self) -> str:
        """What tells these bytes from others, on this machine: of an output in a store also by the ETags of its objects, which
        may differ between two that are equal."""
        return key_of([self.digest, dict(self.stored)]) if self.stored else self.digest


@dataclass(frozen=True)
class Coming:
    """What a step is about to make, noted before anything of it has its name.

    A run that is cut off between the two leaves an output that the next one knows by these digests.

    Attributes:
        key, path, files: as of `Made`.
    """

    key: str
    path: str
    files: Mapping[str, str]


def digest_of(files: Mapping[str, str]) -> str:
    """One digest of many files: sha256 over lines of digest, two spaces and name, as ``sha256sum`` prints them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def key_of(value: Any) -> str:
    """sha256 of a value of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class State:
    """The memory of one recipe's builds."""

    def __init__(self, recipe: Path) -> None:
        self.path = recipe.parent / FOLDER / f"{recipe.stem}.json"
        self._hashes: dict[str, list[Any]] = {}
        self.made: dict[str, Made] = {}
        self.pages: dict[str, str] = {}  # sha256 of the pages that were written, by what the recipe calls them
        self.coming: dict[str, Coming] = {}
        self.coming_pages: dict[str, str] = {}
        self._moved: dict[tuple[int, ...], str] = {}  # of files that lay under another name when they were hashed
        try:
            data = json_value(disk.read_inside(self.path.parent, self.path.name) or b"")
            if data["format"] == FORMAT:
                # A hash holds for an inode and its times, which nobody foresees. What was made is believed only of a folder
                # that was made here: a repository may carry one that calls its own files the outputs.
                self._hashes = {str(name): list(entry) for name, entry in data["hashes"].items()}
                if disk.is_own(self.path.parent):
                    self.made = {str(name): Made(**entry) for name, entry in data["made"].items()}
                    self.pages = {str(name): str(entry) for name, entry in data.get("pages", {}).items()}
                    self.coming = {str(name): Coming(**entry) for name, entry in data.get("coming", {}).items()}
                    self.coming_pages = {str(k): str(entry) for k, entry in data.get("coming_pages", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._hashes, self.made, self.pages = {}, {}, {}  # nothing is known, then
            self.coming, self.coming_pages = {}, {}

    def sha256(self, path: Path) -> str:
        """The sha256 of a file, from memory where its size, times and inode are those that were hashed."""
        name = str(path.resolve())
        before = _state(path)
        known = self._hashes.get(name)
        if known is not None and known[:-1] == before:
            return str(known[-1])
        digest = self._moved.get(_self(path)) or disk.hash_file(path)[0]
        if _state(path) == before and time.time_ns() - max(before[1], before[2]) > _SETTLED:
            self._hashes[name] = [*before, digest]
        return digest

    def sha256_before(self, path: Path) -> str:
        """The sha256 of a file of this run that gets another name, under which it is not read again."""
        digest, _ = disk.hash_file(path)
        self._moved[_self(path)] = digest
        return digest

    def hash_files(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The sha256 of files, by name."""
        return {name: self.sha256(path) for name, path in sorted(files.items())}

    def is_there(self, made: Made, folder: Path) -> bool:
        """Whether the files of an earlier step are all there, byte for byte, and no others beside them."""
        files = output_files(folder / made.path, made.files)
        return set(files) == set(made.files) and self.hash_files(files) == dict(made.files)

    def save(self) -> None:
        """Write it down; hashes of files that are gone are forgotten.

        Raises:
            OutputError: the folder cannot be written.
        """
        hashes = {name: entry for name, entry in self._hashes.items() if os.path.exists(name)}
        known = {
            "format": FORMAT,
            "hashes": hashes,
            "made": {name: asdict(entry) for name, entry in self.made.items()},
            "pages": self.pages,
            "coming": {name: asdict(entry) for name, entry in self.coming.items()},
            "coming_pages": self.coming_pages,
        }
        data = json.dumps(known, indent=1, sort_keys=True)
        try:
            disk.own_folder(self.path.parent)
            disk.write_file(self.path.parent / ".gitignore", b"*\n")
            disk.write_file(self.path, data.encode())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror})", "check the folder's permissions"
            ) from error


BESIDE = "../"  # what the name of a file begins with that lies in a folder beside that of the output


def output_files(out: Path, known: Iterable[str] = ()) -> dict[str, Path]:
    """The files of an output: all of a folder's, and of the folders beside it of which one is ``known``; of a file's, those
    that are known and there."""
    if out.is_dir():
        beside = sorted({name.split("/")[1] for name in known if name.startswith(BESIDE)})
        folders = {"": out, **{f"{BESIDE}{name}/": out.parent / name for name in beside}}
        return {
            f"{lead}{path.relative_to(folder).as_posix()}": path
            for lead, folder in folders.items()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return {name: out.parent / name for name in known if (out.parent / name).is_file()}


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _self(path: Path) -> tuple[int, ...]:
    """What stays of a file when it is renamed."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
