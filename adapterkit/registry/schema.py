"""The tables of the index, as numbered steps that are appended and never changed (after simonw/llm's migrations)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

Migration = Callable[[sqlite3.Connection], object]
MIGRATIONS: list[Migration] = []


def migration(function: Migration) -> Migration:
    """Appends a step to the schema; its name is what the index remembers. Steps are never changed, only added."""
    MIGRATIONS.append(function)
    return function


@migration
def m001_records(db: sqlite3.Connection) -> None:
    # Without row ids a table lies on disk in the order of its key, which is the order in which it is listed. The
    # columns of such a key come first: the integrity check of SQLite 3.40 sees NULLs where they do not.
    db.executescript(
        """
        create table records (
            name text not null, version integer not null, digest text not null, kind text not null,
            method text not null, content text not null, base text not null, base_id text not null,
            evidence text not null, size integer not null, created text not null,
            hidden integer not null default 0,
            primary key (name, version)
        ) without rowid;
        create unique index records_digest on records (digest);
        create index records_content on records (content);
        create table unreadable (
            name text not null, version integer not null, why text not null, primary key (name, version)
        );
        create table files (digest text not null, sha256 text not null, primary key (digest, sha256)) without rowid;
        create index files_sha256 on files (sha256);
        create table aliases (
            name text not null, alias text not null, version integer not null, primary key (name, alias)
        ) without rowid;
        """
    )


@migration
def m002_lineage(db: sqlite3.Connection) -> None:
    # levels: of the base (own = 0) and of the artefact itself (own = 1); parent_levels: of a parent named by identity.
    db.executescript(
        """
        create table parents (
            child text not null, place integer not null, content text not null, role text not null,
            primary key (child, place)
        ) without rowid;
        create index parents_content on parents (content);
        create table levels (
            digest text not null, own integer not null, level text not null, value text not null,
            primary key (digest, own, level)
        ) without rowid;
        create index levels_value on levels (value, own);
        create table parent_levels (
            child text not null, place integer not null, level text not null, value text not null,
            primary key (child, place, level)
        ) without rowid;
        create index parent_levels_value on parent_levels (value);
        """
    )


@migration
def m003_scanned(db: sqlite3.Connection) -> None:
    db.executescript(
        """
        create table scanned (name text primary key, stamp text not null) without rowid;
        create table facts (key text primary key, value text not null) without rowid;
        """
    )


@migration
def m004_figures(db: sqlite3.Connection) -> None:
    # Every record is read again, since the index did not keep its figures.
    db.executescript(
        """
        create table figures (
            digest text not null, name text not null, value real not null, primary key (digest, name)
        ) without rowid;
        create index figures_name on figures (name, value);
        delete from records; delete from unreadable; delete from files; delete from aliases; delete from parents;
        delete from levels; delete from parent_levels; delete from scanned; delete from facts;
        """
    )


def migrate(db: sqlite3.Connection) -> None:
    db.execute("create table if not exists migrations (name text primary key)")
    applied = {name for (name,) in db.execute("select name from migrations")}
    for step in MIGRATIONS:
        if step.__name__ not in applied:
            step(db)
            db.execute("insert into migrations values (?)", (step.__name__,))
