"""What runs where: which version a server was told to serve, since when and by whom.

One chain for each server (see ``chain``). It says what was done and seen through adapterkit; nobody is asked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import UnsafeError, UsageError
from adapterkit.redaction import check_public
from adapterkit.registry import chain
from adapterkit.registry.canonical import sha256
from adapterkit.registry.chain import ChainEntry
from adapterkit.registry.home import Home, entries, open_home
from adapterkit.registry.record import Record
from adapterkit.web import parts_of

SERVING, STOPPED = "serving", "stopped"


@dataclass(frozen=True)
class Served:
    """One version at one server.

    Attributes:
        server: a URL without credentials, or a name.
        served_as: what the server calls it, such as ``tickets@78ea3fde5dff``.
        name, version, digest, content: which version it is.
        alias: the alias that it was deployed by; empty when a version was named.
        since: UTC time from which it is served.
        by, why: who had it served, and the reason given.
        state: ``serving`` or ``stopped``.
        share: of the requests that it gets, 1.0 for all.
    """

    server: str
    served_as: str
    name: str
    version: int
    digest: str
    content: str
    alias: str
    since: str
    by: str
    why: str = ""
    state: str = SERVING
    share: float = 1.0


def record_serving(
    server: str,
    record: Record,
    *,
    served_as: str,
    alias: str = "",
    share: float = 1.0,
    since: str = "",
    by: str = "",
    why: str = "",
    home: Path | None = None,
) -> Served:
    """Keeps that a server serves a version. The same again, from the same alias, changes nothing.

    Raises:
        UsageError: the record is not registered; or the server is no plain name or URL.
        UnsafeError: the server's URL holds credentials.
    """
    if not record.version:
        raise UsageError("only a registered version can be said to be served", "register it first")
    at = open_home(home)
    found = Served(
        check_server(server),
        served_as,
        record.name,
        record.version,
        record.digest,
        record.content,
        alias,
        since,
        by or chain.who(),
        why,
        SERVING,
        float(share),
    )
    now = {one.served_as: one for one in serving(server, home=home)}.get(served_as)
    if now is not None and (now.digest, now.alias, now.share) == (found.digest, found.alias, found.share):
        return now
    return _added(at, found)


def record_stopped(
    server: str, served_as: str, *, by: str = "", why: str = "", home: Path | None = None
) -> Served | None:
    """Keeps that a server serves something no more; None when it was not known to."""
    at = open_home(home)
    now = {one.served_as: one for one in serving(server, home=home)}.get(served_as)
    if now is None:
        return None
    said = {key: value for key, value in now.__dict__.items() if key not in ("since", "by", "why", "state")}
    return _added(at, Served(**said, since="", by=by or chain.who(), why=why, state=STOPPED))


def _added(at: Home, found: Served) -> Served:
    said = {key: value for key, value in found.__dict__.items() if key not in ("since", "by", "why")}
    entry = chain.append(at, _path(at, found.server), said, by=found.by, why=found.why, at=found.since)
    return _of(entry)


def _of(entry: ChainEntry) -> Served:
    return Served(**entry.said, since=entry.at, by=entry.by, why=entry.why)


def serving(server: str = "", *, home: Path | None = None) -> tuple[Served, ...]:
    """What is served now, at one server or at all, by server and by what it is called there.

    Raises:
        RegistryError: what was kept of a server is damaged.
    """
    at = open_home(home)
    paths = [_path(at, check_server(server))] if server else _files(at)
    found: list[Served] = []
    for path in paths:
        last = {one.served_as: one for one in map(_of, chain.read_chain(path))}
        found += [one for one in last.values() if one.state == SERVING]
    return tuple(sorted(found, key=lambda one: (one.server, one.served_as)))


def served_history(server: str, *, home: Path | None = None) -> tuple[Served, ...]:
    """Everything that was kept of one server, oldest first."""
    at = open_home(home)
    return tuple(map(_of, chain.read_chain(_path(at, check_server(server)))))


def at_alias(found: Iterable[Served], name: str, alias: str) -> tuple[Served, ...]:
    """Those of ``found`` that were deployed by an alias."""
    return tuple(one for one in found if (one.name, one.alias) == (name, alias))


def check_server(server: str) -> str:
    """``server``, without a last slash, when it is a name or a URL that can be shown.

    Raises:
        UnsafeError: it holds credentials.
        UsageError: it is empty, too long, or does not print.
    """
    if not 0 < len(server) <= 512 or not server.isprintable() or " " in server:
        raise UsageError(f"{server[:80]!a} is not a server", "give a URL such as http://127.0.0.1:8000, or a name")
    parts = parts_of(server, UsageError)
    if parts.username is not None or "@" in parts.netloc:
        raise UnsafeError("the address of the server holds credentials, and it is kept", "leave them out")
    check_public(server, "the address of the server")
    return server.rstrip("/")


def _path(at: Home, server: str) -> Path:
    return at.root / "served" / sha256(server.encode())[:32]


def _files(at: Home) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries(at.root / "served") if not entry.name.startswith("."))
