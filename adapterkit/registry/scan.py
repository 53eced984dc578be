"""Reading the files into the index: only the names whose folders changed since the index saw them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from functools import partial

from adapterkit.errors import NotFound, RegistryError
from adapterkit.registry import refs, store
from adapterkit.registry.figures import figures
from adapterkit.registry.home import Home, entries, staging_stamp
from adapterkit.registry.identity import LEVELS, Identity
from adapterkit.registry.names import check_sha256, is_name
from adapterkit.registry.record import OpaqueRecord, Record
from adapterkit.registry.verification import kinds

RACY_NS = 2_000_000_000
DEAD_SECONDS = 60.0


def _quiet(home: Home, stamp: str, at: int) -> bool:
    """Whether nobody is in the middle of a change and the time of ``staging`` is old enough to be believed."""
    if not stamp or at - int(stamp) < RACY_NS:
        return False
    for entry in entries(home.staging):
        try:
            if at / 1e9 - entry.stat().st_mtime < DEAD_SECONDS:
                return False
        except OSError:
            return False
    return True


def catch_up(home: Home, db: sqlite3.Connection, mine: Callable[[str], bool] | None = None) -> None:
    """Reads every name again whose folders changed since the index saw them; one transaction.

    ``mine`` keeps it to some names, as if there were no others.
    """
    at = time.time_ns()
    stamp = staging_stamp(home)
    quiet = _quiet(home, stamp, at)
    db.execute("begin immediate")
    try:
        seen = dict(db.execute("select name, stamp from scanned").fetchall())
        stamps = folder_stamps(home, at, mine)
        for name, value in stamps.items():
            if not value.endswith("?") and seen.get(name) == value:
                continue
            scan_name(home, db, name, partial(store.load, home, name))
            db.execute("insert or replace into scanned values (?, ?)", (name, value))
        for name in seen.keys() - stamps.keys():
            _forget(db, name)
        db.execute("insert or replace into facts values ('clean', ?)", (stamp if quiet else "",))
        db.execute("commit")
    except BaseException:
        db.execute("rollback")
        raise


def folder_stamps(home: Home, at: int, mine: Callable[[str], bool] | None = None) -> dict[str, str]:
    """name -> the times of its three folders; with ``?`` when one is too young to be believed."""
    found: dict[str, str] = {}
    for folder in ("records", "refs", "hidden"):
        for entry in entries(home.root / folder):
            if not is_name(entry.name) or (mine is not None and not mine(entry.name)):
                continue
            try:
                time_ns = entry.stat().st_mtime_ns
            except OSError:
                continue  # a link to nowhere; fsck says so
            young = "?" if at - time_ns < RACY_NS else ""
            found[entry.name] = f"{found.get(entry.name, '')} {folder[:2]}{time_ns}{young}"
    return {name: value.replace("?", "") + ("?" if "?" in value else "") for name, value in found.items()}


def scan_name(home: Home, db: sqlite3.Connection, name: str, load: Callable[[int], Record | OpaqueRecord]) -> None:
    """Reads what the files say of a name into an index; ``load`` gives the record of a version."""
    known = {version for (version,) in db.execute("select version from records where name = ?", (name,))}
    on_disk = set(home.versions(name))
    for version in known - on_disk:
        _drop(db, name, version)
    db.execute("delete from unreadable where name = ?", (name,))
    for version in sorted(on_disk - known):
        try:
            record = load(version)
        except (NotFound, RegistryError) as error:
            db.execute("insert into unreadable values (?, ?, ?)", (name, version, str(error)))
            continue
        if isinstance(record, OpaqueRecord):
            why = f"{name}@{version} was written by a newer adapterkit (schema {record.schema}); upgrade adapterkit"
            db.execute("insert into unreadable values (?, ?, ?)", (name, version, why))
        else:
            _insert(db, record)
    hidden = home.hidden_versions(name)
    was_hidden = {v for (v,) in db.execute("select version from records where name = ? and hidden", (name,))}
    for version in hidden ^ was_hidden:
        db.execute("update records set hidden = ? where name = ? and version = ?", (version in hidden, name, version))
    db.execute("delete from aliases where name = ?", (name,))
    for alias in home.alias_names(name):
        try:
            move = refs.get(home, name, alias)
        except RegistryError:
            continue  # fsck tells; a damaged alias points nowhere.
        if move:
            db.execute("insert into aliases values (?, ?, ?)", (name, alias, move.version))


def _insert(db: sqlite3.Connection, record: Record) -> None:
    base = record.base
    db.execute(
        "insert into records values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
        (
            record.name,
            record.version,
            record.digest,
            record.kind,
            record.method,
            record.content,
            base.label if base else "",
            base.id if base else "",
            ",".join(kinds(record.evidence)),
            record.size,
            record.created,
        ),
    )
    db.executemany(
        "insert or ignore into files values (?, ?)",
        ((record.digest, check_sha256(f.sha256, "file")) for f in record.files),
    )
    for own, identity in ((0, base), (1, record.identity)):
        db.executemany(
            "insert into levels values (?, ?, ?, ?)", ((record.digest, own, *row) for row in _levels(identity))
        )
    db.executemany("insert or ignore into figures values (?, ?, ?)", _figures(record))
    for place, parent in enumerate(record.parents):
        db.execute("insert into parents values (?, ?, ?, ?)", (record.digest, place, parent.content, parent.role))
        rows = ((record.digest, place, *row) for row in _levels(parent.identity))
        db.executemany("insert into parent_levels values (?, ?, ?, ?)", rows)


def _figures(record: Record) -> list[tuple[str, str, float]]:
    try:
        found = figures(record.evidence)
    except RegistryError:
        return []  # fsck and show tell
    return [(record.digest, one.name, one.value) for one in found if isinstance(one.value, float)]


def _levels(identity: Identity | None) -> list[tuple[str, str]]:
    return [(level, identity.level(level)) for level in LEVELS if identity.level(level)] if identity else []


_OF_RECORD = {
    "files": "digest",
    "figures": "digest",
    "levels": "digest",
    "parents": "child",
    "parent_levels": "child",
    "records": "digest",
}


def _drop(db: sqlite3.Connection, name: str, version: int) -> None:
    row = db.execute("select digest from records where name = ? and version = ?", (name, version)).fetchone()
    for table, column in _OF_RECORD.items():
        db.execute(f"delete from {table} where {column} = ?", row)


def _forget(db: sqlite3.Connection, name: str) -> None:
    for (version,) in db.execute("select version from records where name = ?", (name,)).fetchall():
        _drop(db, name, version)
    for table in ("unreadable", "aliases", "scanned"):
        db.execute(f"delete from {table} where name = ?", (name,))
