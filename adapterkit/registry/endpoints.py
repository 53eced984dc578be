"""Servers by name: address, kind, the base they serve. Never a secret, only the name of its variable.

One chain for each (see ``chain``), so that it can be said what a name meant when something was deployed there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import NotFound, RegistryError
from adapterkit.registry import chain, served
from adapterkit.registry.home import Home, entries
from adapterkit.registry.names import check_name, is_name
from adapterkit.registry.served import Served


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
    """

    name: str
    url: str
    kind: str
    base: str = ""
    copy: str = ""
    seen_as: str = ""
    token_env: str = ""


def _file(home: Home, name: str) -> Path:
    return home.root / "servers" / check_name(name, "name of a server")


def server_lock(home: Home, name: str) -> AbstractContextManager[None]:
    """The exclusive lock of a server: nobody else deploys to it meanwhile."""
    return disk.locked(home.root / "locks" / f"server-{check_name(name, 'name of a server')}.lock", timeout=600)


def add_endpoint(home: Home, endpoint: Endpoint) -> Endpoint:
    """Names a server, or names it anew; the same again changes nothing."""
    if _found(home, endpoint.name) != endpoint:
        chain.append(home, _file(home, endpoint.name), asdict(endpoint), by=chain.who())
    return endpoint


def remove_endpoint(home: Home, name: str) -> bool:
    """Forgets a server; what was deployed there stays in its history. False when nobody knew it."""
    if _found(home, name) is None:
        return False
    chain.append(home, _file(home, name), {}, by=chain.who())
    return True


def _found(home: Home, name: str) -> Endpoint | None:
    path = _file(home, name)
    steps = chain.read_chain(path)
    if not steps or not steps[-1].said:
        return None
    try:
        found = Endpoint(**steps[-1].said)
    except TypeError:
        raise RegistryError(f"{path} is not the file of a server", "name the server anew") from None
    if found.name != name:
        raise RegistryError(f"{path} is the file of another server, {found.name}", "it was moved there; put it back")
    return found


def find_endpoint(home: Home, name: str) -> Endpoint:
    """
    Raises:
        NotFound: no server has that name.
        RegistryError: its file is damaged.
    """
    found = _found(home, name)
    if found is None:
        known = ", ".join(one.name for one in endpoints(home))
        raise NotFound(
            f"no server is called '{name}' in {home.root}", f"known: {known}" if known else "give its address"
        )
    return found


def endpoints(home: Home) -> tuple[Endpoint, ...]:
    """Every server that has a name, sorted."""
    names = sorted(entry.name for entry in entries(home.root / "servers") if is_name(entry.name))
    return tuple(found for name in names if (found := _found(home, name)))


def deployed(home: Home, server: str, name: str) -> Served | None:
    """What of a name a server was last brought to; None when it never was, or was taken off."""
    steps = [step for step in served.served_history(server, home=home.root) if step.name == name]
    last = {step.served_as: step.state for step in steps}
    now = [step for step in steps if last[step.served_as] == served.SERVING and step.state == served.SERVING]
    return now[-1] if now else None


def running(home: Home) -> tuple[Served, ...]:
    """What runs where, as far as it was deployed from here: one version of each name on each server."""
    pairs = sorted({(one.server, one.name) for one in served.serving(home=home.root)})
    return tuple(found for server, name in pairs if (found := deployed(home, server, name)))
