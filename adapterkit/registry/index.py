"""The index: an SQLite file that answers lists and lineages fast, and that nobody has to believe.

It is a copy of what the files say and can be deleted at any time. A damaged index, or one made by a newer version, is
built again. It is known to be right when the time of ``staging/`` is still the one it was built at, since every change
of a record, ref or mark passes through that folder; otherwise the folders whose own time changed are read again. A time
less than two seconds old is never believed, because a second change may follow within the clock's step (the "racy git"
problem).

Rollback journal, not WAL: WAL needs shared memory, which network file systems lack. One process writes at a time, under
``locks/index.lock``.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from adapterkit.errors import OutputError
from adapterkit.registry import blobs
from adapterkit.registry.home import Home, staging_stamp
from adapterkit.registry.schema import MIGRATIONS, migrate

if TYPE_CHECKING:
    from adapterkit.registry.identity import Identity

T = TypeVar("T")


class VersionRow(NamedTuple):
    """One version in a list. ``base`` is the label of the base's identity, ``evidence`` the kinds of evidence it
    carries.
    """

    name: str
    version: int
    kind: str
    method: str
    base: str
    size: int
    created: str
    digest: str
    content: str
    evidence: tuple[str, ...]
    aliases: tuple[str, ...]
    hidden: bool


class Unreadable(NamedTuple):
    """A record that is on disk and not in the list, and why."""

    name: str
    version: int
    why: str


_COLUMNS = "name, version, kind, method, base, size, created, digest, content, evidence, hidden"


class Index:
    """An open index that is up to date with the files of ``home``."""

    def __init__(self, home: Home, db: sqlite3.Connection) -> None:
        self.home = home
        self.db = db
        self._aliases: dict[tuple[str, int], tuple[str, ...]] | None = None

    def rows(self, where: str = "1", args: tuple[object, ...] = (), hidden: bool = False) -> list[VersionRow]:
        """The rows that match an SQL condition, by name and version."""
        aliases = self.aliases()
        condition = f"({where})" if hidden else f"({where}) and not hidden"
        found = self.db.execute(f"select {_COLUMNS} from records where {condition} order by name, version", args)
        return [
            VersionRow._make(
                (*row[:9], tuple(row[9].split(",")) if row[9] else (), aliases.get(row[:2], ()), bool(row[10])),
            )
            for row in found
        ]

    def aliases(self) -> dict[tuple[str, int], tuple[str, ...]]:
        """(name, version) -> its aliases; read once, since an index answers one question."""
        if self._aliases is not None:
            return self._aliases
        found: dict[tuple[str, int], tuple[str, ...]] = {}
        for name, alias, version in self.db.execute("select name, alias, version from aliases order by name, alias"):
            found[name, version] = (*found.get((name, version), ()), alias)
        self._aliases = found
        return found

    def unreadable(self) -> tuple[Unreadable, ...]:
        """The records that could not be read."""
        rows = self.db.execute("select name, version, why from unreadable order by name, version")
        return tuple(Unreadable(*row) for row in rows)

    def by_content(self, content: str) -> list[VersionRow]:
        """All versions that are the same artefact, hidden ones too."""
        return self.rows("content = ?", (content,), hidden=True)

    def places(self, content: str) -> list[tuple[str, int, str]]:
        """Name, version and digest of every version in sight that is the same artefact, by name and version."""
        asked = "select name, version, digest from records where content = ? and not hidden order by name, version"
        return self.db.execute(asked, (content,)).fetchall()

    def versions_of_other_content(self, name: str, content: str) -> set[int]:
        """The versions of a name that are another artefact; those that cannot be read are not among them."""
        asked = "select version from records where name = ? and content != ?"
        return {version for (version,) in self.db.execute(asked, (name, content))}

    def by_identity(self, identity: Identity) -> list[VersionRow]:
        """All versions whose own identity agrees at the strongest level that any of them has; commit and bytes only."""
        for level in ("merkle", "files", "sampled", "commit"):
            value = identity.level(level)
            if value and (found := self.rows(_OWN_LEVEL, (level, value), hidden=True)):
                return found
        return []

    def by_prefix(self, prefix: str) -> list[VersionRow]:
        """All versions whose record, content or one file has a digest that starts with ``prefix``."""
        top = prefix + "g"  # Sorts behind every hex digit.
        for where in ("digest >= ? and digest < ?", "content >= ? and content < ?", _OWN_FILE):
            if found := self.rows(where, (prefix, top), hidden=True):
                return found
        return []

    def children(self, row: VersionRow) -> list[VersionRow]:
        """All versions that name this artefact as a parent, by content or (for a model) by identity."""
        found = {child.digest: child for child in self.rows(_CHILD_OF, (row.content,), hidden=True)}
        for child in self.rows(_CHILD_BY_LEVEL, (row.digest, row.digest), hidden=True):
            found.setdefault(child.digest, child)
        return sorted(found.values(), key=lambda child: (child.name, child.version))

    def base_levels(self, digest: str) -> dict[str, str]:
        """The levels of the base of one version, as text."""
        return dict(
            self.db.execute("select level, value from levels where digest = ? and own = 0", (digest,)).fetchall()
        )


_OWN_LEVEL = "digest in (select digest from levels where own = 1 and level = ? and value = ?)"
_OWN_FILE = "digest in (select digest from files where sha256 >= ? and sha256 < ?)"
_CHILD_OF = "digest in (select child from parents where content = ?)"
_CHILD_BY_LEVEL = """digest in (
    select p.child from levels l join parent_levels p on p.value = l.value and p.level = l.level
    where l.digest = ? and l.own = 1 and l.level in ('merkle', 'files', 'sampled', 'commit')
    union
    select b.digest from levels l join levels b on b.value = l.value and b.level = l.level and b.own = 0
    where l.digest = ? and l.own = 1 and l.level in ('merkle', 'files', 'sampled', 'commit'))"""


def ask(home: Home, question: Callable[[Index], T]) -> T:
    """The answer of ``question`` to an index that is up to date with the files.

    The index is built again when it is missing, damaged (also when that only shows while it answers) or of a newer
    version, and in memory on a disk that cannot be written.
    """
    home.check()
    try:
        with closing(_current(home)) as db:
            return question(Index(home, db))
    except (OSError, OutputError, sqlite3.DatabaseError):
        pass
    try:
        reindex(home)
        with closing(_current(home)) as db:
            return question(Index(home, db))
    except (OSError, OutputError, sqlite3.DatabaseError):
        with closing(fresh(home)) as db:
            return question(Index(home, db))


def reindex(home: Home) -> int:
    """Builds the index again from the files; how many records it holds.

    Raises:
        OutputError: it cannot be written.
    """
    with home.index_lock(), closing(_rebuild(home)) as db:
        return int(db.execute("select count(*) from records").fetchone()[0])


def fresh(home: Home) -> sqlite3.Connection:
    """An index in memory, built from the files alone."""
    db = empty()
    _scan(home, db)
    return db


def empty() -> sqlite3.Connection:
    """An index in memory that knows nothing yet."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    migrate(db)
    return db


def _current(home: Home) -> sqlite3.Connection:
    stamp = staging_stamp(home)
    db, complete = _connect(home)
    if db is not None:
        if complete and stamp and _fact(db, "clean") == stamp:
            return db
        db.close()
    with home.index_lock():
        db, _ = _connect(home)
        if db is None:
            return _rebuild(home)
        try:
            migrate(db)
            _scan(home, db)
        except sqlite3.DatabaseError as error:
            db.close()
            if isinstance(error, sqlite3.OperationalError) and "readonly" in str(error):
                raise
            return _rebuild(home)
        return db


def _connect(home: Home) -> tuple[sqlite3.Connection | None, bool]:
    """The index as it is on disk and whether it has every step of the schema; None when it has to be built again."""
    if not home.index.is_file():
        return None, False
    db = sqlite3.connect(home.index, timeout=30, isolation_level=None)
    try:
        applied = [name for (name,) in db.execute("select name from migrations order by rowid")]
        if applied == [step.__name__ for step in MIGRATIONS[: len(applied)]]:
            return db, len(applied) == len(MIGRATIONS)
    except sqlite3.DatabaseError:
        pass
    db.close()
    return None, False


def _rebuild(home: Home) -> sqlite3.Connection:
    """A new index in place of the old one; the caller holds the index lock."""
    path = home.root / "index.db.new"
    for old in (path, home.root / "index.db.new-journal"):
        old.unlink(missing_ok=True)
    db = sqlite3.connect(path, isolation_level=None)
    with closing(db):
        migrate(db)
        _scan(home, db)
    # A journal left by a killed writer belongs to the old file and must not be played into the new one.
    if home.index.is_dir() and not home.index.is_symlink():
        blobs.set_aside(home, home.index, "folder")
    home.index.unlink(missing_ok=True)
    (home.root / "index.db-journal").unlink(missing_ok=True)
    os.replace(path, home.index)
    return sqlite3.connect(home.index, timeout=30, isolation_level=None)


def _scan(home: Home, db: sqlite3.Connection) -> None:
    from adapterkit.registry.scan import (
        catch_up,  # Reads records, which a question to an index that is right never does.
    )

    catch_up(home, db)


def _fact(db: sqlite3.Connection, key: str) -> str:
    try:
        row = db.execute("select value from facts where key = ?", (key,)).fetchone()
    except sqlite3.DatabaseError:
        return ""
    return str(row[0]) if row else ""


def content_of(db: sqlite3.Connection, mine: Callable[[str], bool] | None = None) -> dict[str, list[tuple[Any, ...]]]:
    """Every row that is a copy of the files, for comparing two indexes; with ``mine``, of some names."""
    named, others = ("records", "unreadable", "aliases"), ("parents", "parent_levels", "levels", "files", "figures")
    found = {table: sorted(db.execute(f"select * from {table}").fetchall()) for table in (*named, *others)}
    if mine is not None:
        theirs = {digest for name, digest in db.execute("select name, digest from records") if not mine(name)}
        found |= {table: [row for row in found[table] if mine(row[0])] for table in named}
        found |= {table: [row for row in found[table] if row[0] not in theirs] for table in others}
    return found


def checked_copy(home: Home, mine: Callable[[str], bool] | None = None) -> dict[str, list[tuple[Any, ...]]] | None:
    """What the index on disk says once it has caught up, without changing it; empty when it is damaged.

    None when a newer adapterkit made it: then it is nobody's loss, and is built again by the next question.
    """
    from urllib.parse import quote

    if not home.index.is_file():
        return {}
    try:
        with closing(sqlite3.connect(f"file:{quote(str(home.index))}?mode=ro", uri=True)) as db:
            applied = [name for (name,) in db.execute("select name from migrations order by rowid")]
            ours = [step.__name__ for step in MIGRATIONS]
            if db.execute("pragma integrity_check").fetchall() != [("ok",)]:
                return {}
            if applied[: len(ours)] == ours and len(applied) > len(ours):
                return None
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
                db.backup(copy)
                migrate(copy)
                _scan(home, copy)
                return content_of(copy, mine)
    except (sqlite3.Error, ValueError, TypeError):
        return {}
