"""Servers by name, and what runs where: which version of which name a server was brought to, when, by whom.

    servers/<server>.json          a server: address, kind, the base it serves; never a secret, only the name of its variable
    deployments/<server>/<name>    every deployment of a name there, one line of JSON each, with the sum of the one before

A line is written after the server has loaded the version and answered with it, so a deployment that failed leaves no trace
here. The file is replaced as a whole, under a lock of the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.errors import NotFound, RegistryError, UsageError
from adapterkit.registry.canonical import canonical, parse, sha256
from adapterkit.registry.home import Home, entries
from adapterkit.registry.names import check_name, check_sha256, check_time, is_name
from adapterkit.registry.record import now


@dataclass(frozen=True)
class Endpoint:
    """A server that runs a model and can be told which adapters to serve.

    Attributes:
        name: what it is called here.
        url: where it listens.
        kind: a key of `adapterkit.serving.servers.servers`.
        base: the base that it serves: a registered name, a folder, a Hub id or a GGUF file; empty when nobody said.
        copy: a folder that versions are copied to for it; empty when it reads the registry's own folder.
        seen_as: what the server calls that folder (or the registry's home), where it is mounted elsewhere.
        token_env: the environment variable that holds its token; empty for none.
        at, by: when and by whom it was named.
    """

    name: str
    url: str
    kind: str
    base: str = ""
    copy: str = ""
    seen_as: str = ""
    token_env: str = ""
    at: str = ""
    by: str = ""


@dataclass(frozen=True)
class Deployment:
    """One deployment that worked.

    Attributes:
        server, name: the server, and the name in the registry.
        seq: counts from 1 for this name on this server.
        version, record, content: the version, and the digests of its record and its bytes; 0 and empty: taken off.
        alias: the alias that was deployed, empty when it was a number or a digest.
        served: what a request to the server calls it.
        share: of the requests that it gets, from 0 to 1, where the server routes.
        at, by: when and by whom.
        prev: the sum of the line before.
    """

    server: str
    name: str
    seq: int
    version: int
    record: str
    content: str
    alias: str
    served: str
    share: float
    at: str
    by: str
    prev: str

    @property
    def sum(self) -> str:
        """sha256 of the line, that the next one names as ``prev``."""
        return sha256(canonical(_plain(self)))

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


def _plain(value: Deployment | Endpoint) -> dict[str, Any]:
    return asdict(value)


def _line(value: Deployment | Endpoint) -> bytes:
    plain = _plain(value)
    return canonical({**plain, "sum": sha256(canonical(plain))}) + b"\n"


def _read(line: bytes, kind: Any, where: str) -> Any:
    plain = parse(line, where)
    try:
        found = {key: item for key, item in plain.items() if key != "sum"}
        if set(found) != {field.name for field in fields(kind)}:
            raise ValueError
        value = kind(**found)
        good = _line(value) == line
        check_time(value.at, where)
    except (TypeError, AttributeError, ValueError, KeyError):
        good = False
    if not good:
        raise RegistryError(f"{where} is damaged: a line does not have the sum it states", "run fsck")
    return value


def actor() -> str:
    """Who acts: ``$ADAPTERKIT_ACTOR``, the user of a CI run, or the user of this machine; at most 64 characters."""
    import getpass

    for name in ("ADAPTERKIT_ACTOR", "GITHUB_ACTOR", "GITLAB_USER_LOGIN"):
        if said := os.environ.get(name, ""):
            break
    else:
        try:
            said = getpass.getuser()
        except (OSError, KeyError):
            said = ""
    return "".join(c for c in said if c.isprintable())[:64] or "unknown"


# ------------------------------------------------------------------ servers


def _server_file(home: Home, name: str) -> Path:
    return home.root / "servers" / f"{check_name(name, 'name of a server')}.json"


def server_lock(home: Home, name: str) -> AbstractContextManager[None]:
    """The exclusive lock of a server: nobody else deploys to it meanwhile."""
    return disk.locked(home.root / "locks" / f"server-{check_name(name, 'name of a server')}.lock", timeout=600)


def add_server(home: Home, endpoint: Endpoint) -> Endpoint:
    """Names a server, or names it anew."""
    home.create()
    with server_lock(home, endpoint.name):
        return add_server_locked(home, endpoint)


def add_server_locked(home: Home, endpoint: Endpoint) -> Endpoint:
    """The same for a caller that holds `server_lock`."""
    path = _server_file(home, endpoint.name)
    stamped = replace(endpoint, at=now(), by=actor())
    with disk.writing(f"the server {endpoint.name}", home.root):
        disk.make_folder(path.parent)
        with disk.staged(home.staging, _line(stamped)) as temporary:
            disk.publish_over(temporary, path)
    return stamped


def remove_server(home: Home, name: str) -> bool:
    """Forgets a server; what was deployed there stays in the history. False when nobody knew it."""
    path = _server_file(home, name)
    if not path.exists():
        return False
    with disk.writing(f"the server {name}", home.root), server_lock(home, name), disk.staged(home.staging, b""):
        path.unlink(missing_ok=True)
        disk.sync_folder(path.parent)
    return True


def server(home: Home, name: str) -> Endpoint:
    """
    Raises:
        NotFound: no server has that name.
        RegistryError: its file is damaged.
    """
    path = _server_file(home, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        known = ", ".join(one.name for one in all_servers(home))
        raise NotFound(
            f"no server is called '{name}' in {home.root}", f"known: {known}" if known else "give its address"
        ) from None
    found: Endpoint = _read(data, Endpoint, str(path))
    return found


def all_servers(home: Home) -> tuple[Endpoint, ...]:
    """Every server that has a name, sorted."""
    names = sorted(entry.name[:-5] for entry in entries(home.root / "servers") if entry.name.endswith(".json"))
    return tuple(server(home, name) for name in names if is_name(name))


# ------------------------------------------------------------------ deployments


def _history_file(home: Home, server_name: str, name: str) -> Path:
    return home.root / "deployments" / check_name(server_name, "name of a server") / check_name(name)


def history(home: Home, server_name: str, name: str) -> tuple[Deployment, ...]:
    """Every deployment of a name on a server, oldest first.

    Raises:
        RegistryError: the file is damaged.
    """
    path = _history_file(home, server_name, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    found: list[Deployment] = []
    for line in data.splitlines(keepends=True):
        one: Deployment = _read(line, Deployment, str(path))
        right = (one.server, one.name, one.seq) == (server_name, name, len(found) + 1)
        if not right or one.prev != (found[-1].sum if found else ""):
            raise RegistryError(f"{path} is damaged: a line is missing or belongs elsewhere", "run fsck")
        found.append(one)
    return tuple(found)


def current(home: Home, server_name: str, name: str) -> Deployment | None:
    """What of a name a server was last brought to; None when it never was, or was taken off."""
    found = history(home, server_name, name)
    return found[-1] if found and found[-1].version else None


def running(home: Home) -> tuple[Deployment, ...]:
    """What runs where, as far as it was deployed from here: the last deployment of each name on each server."""
    return tuple(found for server_name, name in _pairs(home) if (found := current(home, server_name, name)))


def _pairs(home: Home) -> Iterator[tuple[str, str]]:
    for folder in sorted(entries(home.root / "deployments"), key=lambda entry: entry.name):
        if folder.is_dir() and is_name(folder.name):
            for entry in sorted(entries(Path(folder.path)), key=lambda entry: entry.name):
                if is_name(entry.name):
                    yield folder.name, entry.name


def add(
    home: Home,
    server_name: str,
    name: str,
    version: int,
    *,
    record: str = "",
    content: str = "",
    alias: str = "",
    served: str = "",
    share: float = 1.0,
) -> Deployment:
    """Writes down that a server serves a version now (or none of the name any more: version 0).

    The caller holds `server_lock`.
    """
    for digest in (record, content):
        if digest:
            check_sha256(digest, "deployment")
    if not 0 < share <= 1:
        raise UsageError(f"{share} is no share of the requests", "give a number above 0 and at most 1")
    path = _history_file(home, server_name, name)
    with disk.writing(f"a deployment of {name}", home.root):
        before = history(home, server_name, name)
        step = Deployment(
            server=server_name,
            name=name,
            seq=len(before) + 1,
            version=version,
            record=record,
            content=content,
            alias=alias,
            served=served,
            share=share,
            at=now(),
            by=actor(),
            prev=before[-1].sum if before else "",
        )
        for folder in (path.parent.parent, path.parent):
            disk.make_folder(folder)
        with disk.staged(home.staging, b"".join(map(_line, (*before, step)))) as temporary:
            disk.publish_over(temporary, path)
    return step
