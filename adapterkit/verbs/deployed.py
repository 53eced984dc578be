"""What runs where: what the registry remembers, what the servers say, and what the aliases say now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import AdapterkitError, NotFound, RegistryError
from adapterkit.registry import endpoints, refs
from adapterkit.registry.endpoints import Endpoint
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.served import Served
from adapterkit.verbs.deploy import PROBE, connection

SERVED, MISSING, UNREACHABLE, UNKNOWN = "served", "missing", "unreachable", "unknown"


@dataclass(frozen=True)
class DeploymentState:
    """One deployment and how it is.

    Attributes:
        server, url, kind: where.
        ref, alias, served, at, by: what, as whom, since when, by whom.
        state: ``served``, ``missing`` (the server does not have it), ``unreachable``, or ``unknown`` (the server is not known
            here any more).
        alias_version: where the alias is now; 0 where there is none.
        behind: whether the alias has moved on since.
        said: why it is not served.
    """

    server: str
    url: str
    kind: str
    ref: str
    alias: str
    served: str
    at: str
    by: str
    state: str
    alias_version: int
    behind: bool
    said: str = ""

    @property
    def ok(self) -> bool:
        return self.state == SERVED and not self.behind


def status(*, server: str = "", offline: bool = False, home: Path | None = None) -> tuple[DeploymentState, ...]:
    """Every deployment, and whether its server still serves it.

    Args:
        server: only this one.
        offline: ask no server; the state is then ``unknown``.

    Raises:
        NotFound: no server has that name.
        RegistryError: a file of the registry is damaged.
    """
    at = open_home(home)
    if server:
        endpoints.find_endpoint(at, server)
    found = [one for one in endpoints.running(at) if not server or one.server == server]
    return tuple(_state(at, one, offline) for one in found)


def _state(at: Home, one: Served, offline: bool) -> DeploymentState:
    move = refs.get(at, one.name, one.alias) if one.alias else None
    version = move.version if move is not None else 0
    behind = bool(one.alias) and (move is None or move.digest != one.digest)
    url = kind = said = ""
    try:
        endpoint = endpoints.find_endpoint(at, one.server)
        url, kind = endpoint.url, endpoint.kind
        state = UNKNOWN if offline else ""
    except NotFound as error:
        state, said = UNKNOWN, error.message
    if not state:
        state, said = _asked(endpoint, one)
    return DeploymentState(
        one.server,
        url,
        kind,
        f"{one.name}@{one.version}",
        one.alias,
        one.served_as,
        one.since,
        one.by,
        state,
        version,
        behind,
        said,
    )


def _asked(endpoint: Endpoint, one: Served) -> tuple[str, str]:
    try:
        server = connection(endpoint)
        serving = server.serving()
        if server.live.knows:
            mine = [found for found in serving.adapters if server.is_it(found, one.served_as)]
            if not mine:
                return MISSING, "the server does not list it"
            if server.live.scales is not None and not mine[0].scale:
                return MISSING, "the server has it and does not apply it"
            return SERVED, ""
    except RegistryError:
        raise
    except AdapterkitError as error:
        return UNREACHABLE, error.message
    try:
        base = serving.names[0] if serving.names else ""
        said, bare = server.ask_prompt(one.served_as, base, PROBE), server.ask_prompt("", base, PROBE)
    except AdapterkitError as error:
        return MISSING, error.message
    if said.logprobs and bare.logprobs and said.same(bare):
        return MISSING, "it answers as its base without an adapter"
    return SERVED, ""
