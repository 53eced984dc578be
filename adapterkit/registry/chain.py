"""Short histories in one file: JSON lines, each with its own sum and the sum of the line before it.

A file is small and is replaced whole, so an entry is there or it is not, whatever is killed. Policies of aliases and what
servers were told are kept so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.errors import RegistryError
from adapterkit.registry.canonical import canonical, freeze, parse, sha256, thaw
from adapterkit.registry.home import Home, entries
from adapterkit.registry.names import check_time
from adapterkit.registry.record import now
from adapterkit.registry.refs import check_said

FOLDERS = ("policies", "served", "servers")
"""Folders of a home whose files are chains."""


@dataclass(frozen=True)
class ChainEntry:
    """One entry: what was ``said`` (plain JSON), when, by whom and why."""

    seq: int
    at: str
    by: str
    why: str
    prev: str
    said: Mapping[str, Any] = field(default_factory=dict)

    @property
    def _plain(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "at": self.at,
            "by": self.by,
            "why": self.why,
            "prev": self.prev,
            "said": thaw(self.said),
        }

    @property
    def sum(self) -> str:
        """sha256 of the entry, which the next one names as ``prev``."""
        return sha256(canonical(self._plain))

    @property
    def line(self) -> bytes:
        """The entry as it stands in its file."""
        return canonical({**self._plain, "sum": self.sum}) + b"\n"


def read_chain(path: Path) -> tuple[ChainEntry, ...]:
    """All entries of a file, oldest first; none when there is no file.

    Raises:
        RegistryError: it is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    found: list[ChainEntry] = []
    for line in data.splitlines(keepends=True):
        entry = _entry(line, str(path))
        if (entry.seq, entry.prev) != (len(found) + 1, found[-1].sum if found else ""):
            raise RegistryError(f"{path} is damaged: entry {entry.seq} does not follow the one before it", "run fsck")
        found.append(entry)
    return tuple(found)


def _entry(line: bytes, where: str) -> ChainEntry:
    value = parse(line, where)
    try:
        entry = ChainEntry(
            **{key: freeze(item, where) if key == "said" else item for key, item in value.items() if key != "sum"}
        )
        good = entry.line == line and type(entry.seq) is int and isinstance(entry.said, Mapping)
        check_time(entry.at, where)
    except (TypeError, AttributeError, ValueError):
        good = False
    if not good:
        raise RegistryError(f"{where} is damaged: a line does not have the sum it states", "run fsck")
    return entry


def append(home: Home, path: Path, said: Mapping[str, Any], *, by: str, why: str = "", at: str = "") -> ChainEntry:
    """Adds an entry behind the last one.

    Raises:
        RegistryError: the file is damaged, or ``said`` is not plain JSON.
        UsageError: ``by`` or ``why`` do not print.
        OutputError: the disk is full or refuses.
    """
    check_said(why, "the reason")
    check_said(by, "who says it")
    frozen = freeze(said, "an entry")
    home.create()
    with disk.writing(str(path), home.root), disk.locked(home.root / "locks" / f"chain-{path.parent.name}.lock"):
        before = read_chain(path)
        entry = ChainEntry(len(before) + 1, at or now(), by, why, before[-1].sum if before else "", frozen)
        check_time(entry.at, "the time of an entry")
        disk.make_folder(path.parent)
        with disk.staged(home.staging, b"".join(one.line for one in (*before, entry))) as temporary:
            disk.publish_over(temporary, path)
    return entry


def chains(home: Home) -> list[Path]:
    """The files of all chains of a home."""
    return [
        Path(entry.path)
        for folder in FOLDERS
        for entry in sorted(entries(home.root / folder), key=lambda one: one.name)
        if not entry.name.startswith(".")
    ]


def who() -> str:
    """Who is at work here: ``$ADAPTERKIT_USER``, else whom a CI runner names, else the login name."""
    for key in ("ADAPTERKIT_USER", "GITHUB_ACTOR", "GITLAB_USER_LOGIN"):
        if found := os.environ.get(key, "").strip():
            return found[:200] if found.isprintable() else ""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""
