"""`deploy`: a running server is brought to what an alias says. Checked, loaded, asked what it serves, and probed.

A name on a server is ``name@`` and twelve digits of the content's digest: it means one set of weights for ever, so that no
cache of a server and no reload can make it mean others. What was served before stays loaded until the new version has answered,
and a deployment is written down only then. Where anything fails, what was loaded is unloaded, and the record stays as it was.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from adapterkit.errors import AdapterkitError, AuthError, CheckFailed, NotFound, ServerError, UsageError, option
from adapterkit.registry import endpoints, refs, resolve, served
from adapterkit.registry.endpoints import Endpoint
from adapterkit.registry.home import Home, is_number, open_home
from adapterkit.registry.served import Served
from adapterkit.serving.live import Live, ProbeAnswer, Prompt, ServedAdapter, Serving, refusal
from adapterkit.serving.servers import find as find_server
from adapterkit.serving.servers import servers
from adapterkit.web import ask, check_url

if TYPE_CHECKING:
    from adapterkit.registry.record import Record
    from adapterkit.serving.live import Call
    from adapterkit.serving.server import Server

PROBE = "The first thing to know is"
"""The prompt that is sent unless another is given."""
TIMEOUT = 120.0
"""Seconds for a server to load an adapter."""
_QUICK = 20.0


@dataclass(frozen=True)
class Deployed:
    """What a server serves now.

    Attributes:
        server, url, kind: which server.
        ref: the version, as ``name@number``; only the name where it was taken off.
        alias: the alias that was deployed.
        served: what a request calls it there.
        before: what was served before, as ``name@number``; empty for nothing.
        new: whether anything changed.
        answer: what it said to the probe.
        notes: what a user should know.
    """

    server: str
    url: str
    kind: str
    ref: str
    alias: str
    served: str
    before: str
    new: bool
    answer: str = ""
    notes: tuple[str, ...] = ()


def deploy(
    ref: str,
    to: str,
    *,
    kind: str = "",
    base: str = "",
    copy: str = "",
    seen_as: str = "",
    token_env: str = "",
    probe: Prompt = PROBE,
    allow_same: bool = False,
    canary: float | None = None,
    restart_file: Path | None = None,
    timeout: float = TIMEOUT,
    home: Path | None = None,
) -> Deployed:
    """Bring a server to the version that a reference means.

    Args:
        ref: ``name@alias``, ``name@number`` or a digest: an adapter.
        to: the name of a server, or its address.
        kind, base, copy, seen_as, token_env: see `adapterkit.registry.endpoints.Endpoint`; with an address only.
        probe: what it is asked afterwards: text, or ids of tokens.
        allow_same: take an answer that is exactly the one of before, or of the base alone.
        canary: the share of the requests that the new version gets; refused where the server does not route.
        restart_file: where a server has its adapters since it was started: a script that starts it with this one too.
        timeout: seconds that loading may take.

    Raises:
        CheckFailed: the adapter does not suit the server or its base, or the server refuses it or answers as if it were not
            there.
        ServerError: the server cannot be reached, or not in time.
        NotFound, UsageError, RegistryError, AuthError
    """
    at = open_home(home)
    resolve.find(at, ref)  # what does not exist is said before anything is locked
    endpoint = endpoint_of(at, to, Endpoint("", to, kind, base, copy, seen_as, token_env))
    row = find_server(endpoint.kind)
    if row.live is None:
        raise UsageError(f"{row.name} cannot be told what to serve while it runs", f"known: {_tellable()}")
    if canary is not None and not row.live().routes:
        raise UsageError(
            f"{row.name} sends every request to the adapter that it names, so it gives no share of them to another",
            f"deploy without {option('canary')}, and let the router before it divide the requests",
        )
    with endpoints.server_lock(at, endpoint.name):
        record = resolve.find(at, ref)  # the alias may have moved while another deployment was waited for
        run = _Deploy(at, endpoint, row, record, _alias(at, ref), probe, allow_same, timeout, restart_file)
        return run.run()


def undeploy(name: str, to: str, *, timeout: float = TIMEOUT, home: Path | None = None) -> Deployed:
    """Take a name off a server, with the versions of before that are loaded still.

    Args:
        to: the name of a server, or its address.

    Raises:
        NotFound: nothing of that name was deployed there.
        UsageError: an address that nobody named.
        ServerError, CheckFailed
    """
    at = open_home(home)
    endpoint = endpoint_of(at, to, Endpoint("", to, ""))
    live = connection(endpoint)
    with endpoints.server_lock(at, endpoint.name):
        now = endpoints.deployed(at, endpoint.name, name)
        if now is None:
            raise NotFound(f"{name} is not deployed to {endpoint.name}", "the status lists what is")
        serving = live.serving()
        found = next((one for one in serving.adapters if live.is_it(one, now.served_as)), None)
        if live.live.scales is not None and found is not None:
            live.set_scales({one.place: 0.0 if one is found else one.scale for one in serving.adapters})
        elif live.live.unload is not None:
            listed = {one.name for one in serving.adapters}
            for served_as in _names_of(at, endpoint, name):
                if served_as in listed:
                    live.tell(live.live.unload(served_as), timeout)
        for one in served.serving(endpoint.name, home=at.root):
            if one.name == name:
                served.record_stopped(endpoint.name, one.served_as, home=at.root)
    return Deployed(endpoint.name, endpoint.url, endpoint.kind, name, "", now.served_as, _ref(now), True)


def add_server(
    name: str,
    url: str,
    *,
    kind: str = "",
    base: str = "",
    copy: str = "",
    seen_as: str = "",
    token_env: str = "",
    home: Path | None = None,
) -> Endpoint:
    """Give a server a name; see `adapterkit.registry.endpoints.Endpoint` for what is kept.

    Raises:
        UsageError: no address, or a kind of server that is not known or cannot be told anything while it runs.
    """
    if not kind:
        raise UsageError(f"nobody said what runs at {url}", f"say it with {option('kind')}: {_tellable()}")
    row = find_server(kind)
    if row.live is None:
        raise UsageError(f"{row.name} cannot be told what to serve while it runs", f"known: {_tellable()}")
    if token_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", token_env):
        raise UsageError("that is no name of an environment variable", "give the variable's name, not the token")
    absolute = str(Path(copy).expanduser().absolute()) if copy else ""
    given = Endpoint(name, check_url(url), kind, base, absolute, seen_as, token_env)
    return endpoints.add_endpoint(open_home(home), given)


def remove_server(name: str, *, home: Path | None = None) -> bool:
    """Forget a server; False when nobody knew it."""
    return endpoints.remove_endpoint(open_home(home), name)


def _tellable() -> str:
    return ", ".join(name for name, row in servers().items() if row.live is not None)


def endpoint_of(at: Home, to: str, given: Endpoint) -> Endpoint:
    """The server that a name or an address means.

    Raises:
        NotFound: nobody has that name.
        UsageError: an address without a kind, or a name with what its entry says already.
    """
    if "://" not in to:
        found = endpoints.find_endpoint(at, to)
        changed = [key for key in ("kind", "base", "copy", "seen_as", "token_env") if getattr(given, key)]
        if changed:
            raise UsageError(
                f"what {to} is was said when it was named", f"name it anew, or leave out {option(changed[0])}"
            )
        return found
    url = check_url(to)
    if not given.kind:
        known = next((one for one in endpoints.endpoints(at) if one.url == url), None)
        if known is not None:
            return known
        hint = f"say it with {option('kind')}: {_tellable()}"
        raise UsageError(f"nobody said what runs at {url}", hint)
    find_server(given.kind)
    parts = urlsplit(url)
    name = re.sub(r"[^a-z0-9.-]+", "-", (parts.netloc + parts.path).lower()).strip("-.")
    return replace(given, name=name, url=url)


def _alias(at: Home, ref: str) -> str:
    if ref.startswith("sha256:") or "@" not in ref:
        return ""
    name, rest = resolve.split(ref)
    return rest if rest and not is_number(rest) and refs.get(at, name, rest) is not None else ""


# ------------------------------------------------------------------ talking to a server


class Connection:
    """What can be asked of, and told to, one server."""

    def __init__(self, endpoint: Endpoint, live: Live) -> None:
        self.endpoint, self.live = endpoint, live
        token = os.environ.get(endpoint.token_env, "") if endpoint.token_env else ""
        if endpoint.token_env and not token:
            raise AuthError(f"${endpoint.token_env} holds no token for {endpoint.name}", "set it")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def send(self, call: Call, timeout: float) -> tuple[int, Any]:
        """Status and body of one call.

        Raises:
            ServerError: no answer.
            AuthError: the server wants a token, or another one.
        """
        url = self.endpoint.url + call.path
        found = ask(call.method, url, body=call.body, headers=self._headers, timeout=timeout)
        if found.status in (401, 403):
            raise AuthError(
                f"{self.endpoint.name} takes no request without the right token",
                f"name the variable that holds it with {option('token_env')}",
            )
        return found.status, found.value

    def tell(self, call: Call, timeout: float) -> Any:
        """The body of a call that worked.

        Raises:
            CheckFailed: the server refuses.
            NotFound: it knows no such call.
            ServerError: it fails, or gives no answer.
        """
        status, value = self.send(call, timeout)
        said = refusal(status, value)
        if not said:
            return value
        sentence = f"{self.endpoint.name} refuses {call.method} {call.path} ({said})"
        if status in (404, 405) and not _about_a_model(said):
            raise NotFound(sentence, self.live.allow or "see whether it is the kind of server that was said")
        if status in (502, 503, 504):
            raise ServerError(sentence, "try again")
        raise CheckFailed(sentence, "see the server's log")

    def serving(self) -> Serving:
        """What it says that it serves."""
        return self.live.listed([self.tell(call, _QUICK) for call in self.live.listing])

    def ask_prompt(self, served: str, base: str, prompt: Prompt, timeout: float = 60.0) -> ProbeAnswer:
        """What it says to a prompt; with an empty ``served``, the base alone (or what is applied to every request)."""
        found = self.live.answer(self.tell(self.live.probe(served, base, prompt), timeout))
        if not found.text and not found.logprobs:
            raise CheckFailed(
                f"{self.endpoint.name} answered the probe with nothing", f"give another with {option('probe')}"
            )
        return found

    def set_scales(self, scales: Mapping[int, float]) -> None:
        assert self.live.scales is not None
        self.tell(self.live.scales(sorted(scales.items())), _QUICK)

    def is_it(self, one: ServedAdapter, served: str) -> bool:
        """Whether a listed adapter is what a deployment calls ``served``: its name, or the path where those are names."""
        return served in (one.name, one.path) or (bool(one.path) and _same_file(one.path, served))


def _about_a_model(said: str) -> bool:
    return any(word in said.lower() for word in ("adapter", "model `", "lora"))


def _same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.realpath(one) == os.path.realpath(other)


def connection(endpoint: Endpoint) -> Connection:
    """
    Raises:
        UsageError: its kind cannot be told anything.
    """
    row = find_server(endpoint.kind)
    if row.live is None:
        raise UsageError(f"{row.name} cannot be told what to serve while it runs")
    return Connection(endpoint, row.live())


# ------------------------------------------------------------------ one deployment


class _AsBefore(CheckFailed):
    """It answers exactly as with the version before."""


class _Deploy:
    def __init__(
        self,
        at: Home,
        endpoint: Endpoint,
        row: Server,
        record: Record,
        alias: str,
        prompt: Prompt,
        allow_same: bool,
        timeout: float,
        restart_file: Path | None,
    ) -> None:
        self.at, self.endpoint, self.row, self.record, self.alias = at, endpoint, row, record, alias
        self.prompt, self.allow_same, self.timeout, self.restart_file = prompt, allow_same, timeout, restart_file
        assert row.live is not None
        self.live = row.live()
        self.server = Connection(endpoint, self.live)
        self.now = endpoints.deployed(at, endpoint.name, record.name)

    def run(self) -> Deployed:
        from adapterkit.verbs.suits import place_of, suits

        serving = self.server.serving()
        notes = suits(self.record, self.row, self.live, self.endpoint, serving, self.at)
        path = place_of(self.record, self.row, self.live, self.endpoint, self.at)
        place = path if self.live.by_path or self.live.scales else self._short()
        base = serving.names[0] if serving.names else ""
        if self.live.scales is not None:
            answer, changed, place = self._apply(serving, place, base)
        elif self.live.load is not None:
            answer, changed = self._load(serving, place, path, base)
        else:
            answer, changed = self._address(serving, place, path, base)
        now = self.now
        if now is None or (now.digest, now.served_as, now.alias) != (self.record.digest, place, self.alias):
            self._written(place)
        notes += self._tidy(place)
        before = _ref(now) if now is not None else ""
        return Deployed(
            self.endpoint.name,
            self.endpoint.url,
            self.row.name,
            self.record.ref,
            self.alias,
            place,
            before,
            changed or before != self.record.ref,
            answer.text,
            tuple(notes),
        )

    def _written(self, place: str) -> None:
        """Written down that it is served, and then that the others of its name are not."""
        if not any(one.name == self.endpoint.name for one in endpoints.endpoints(self.at)):
            endpoints.add_endpoint(self.at, self.endpoint)
        home = self.at.root
        others = [one for one in served.serving(self.endpoint.name, home=home) if one.name == self.record.name]
        served.record_serving(self.endpoint.name, self.record, served_as=place, alias=self.alias, home=home)
        for one in others:
            if one.served_as != place:
                served.record_stopped(self.endpoint.name, one.served_as, home=home)

    def _earlier(self) -> list[str]:
        return _names_of(self.at, self.endpoint, self.record.name)

    def _short(self) -> str:
        """The name that means these bytes for ever."""
        return f"{self.record.name}{'-' if '@' in self.live.splits else '@'}{self.record.content[:12]}"

    # ---- servers that load by name

    def _load(self, serving: Serving, served: str, path: str, base: str) -> tuple[ProbeAnswer, bool]:
        assert self.live.load is not None
        there = next((one for one in serving.adapters if one.name == served), None)
        loaded, moved = False, ""
        if there is not None and there.path and there.path != path and not _same_file(there.path, path):
            self._unload(served)  # the same weights from another folder, which may be gone tomorrow
            moved = there.path
            there = None
        try:
            if there is None:
                loaded = True
                self.server.tell(self.live.load(served, path), self.timeout)
                self._must_list(served, path)
            answer = self._probed(served, base, {one.name for one in serving.adapters})
        except BaseException as error:
            if loaded:
                raise self._undone(error, lambda: self._back(served, moved)) from error
            raise
        return answer, loaded

    def _must_list(self, served: str, path: str) -> None:
        """
        Raises:
            CheckFailed: the server said yes, and does not serve it.
        """
        found = next((one for one in self.server.serving().adapters if one.name == served), None)
        if found is None:
            raise CheckFailed(f"{self.endpoint.name} answered that it loaded {served}, and does not list it", _LOOK)
        if found.path and found.path != path and not _same_file(found.path, path):
            raise CheckFailed(f"{self.endpoint.name} serves {served} from {found.path}, and not from {path}", _LOOK)

    def _probed(self, served: str, base: str, listed: set[str]) -> ProbeAnswer:
        """What the new adapter answers, held against the base and the version before it.

        Raises:
            CheckFailed: it answers exactly as one of them, or under another name.
        """
        call = self.live.probe(served, base, self.prompt)
        answer = self.server.ask_prompt(served, base, self.prompt)
        asked = call.body.get("model") if isinstance(call.body, dict) else None
        if answer.model and asked == served and answer.model != served:
            raise CheckFailed(f"{self.endpoint.name} was asked for {served} and answered as {answer.model}", _LOOK)
        self._differs(answer, self.server.ask_prompt("", base, self.prompt), "its base without an adapter", CheckFailed)
        old = self.now
        if old is not None and old.content != self.record.content and (old.served_as in listed or not self.live.knows):
            try:
                before = self.server.ask_prompt(old.served_as, base, self.prompt)
            except (CheckFailed, NotFound):
                return answer  # what is gone cannot be served in place of the new one
            self._differs(answer, before, _ref(old), _AsBefore)
        return answer

    def _differs(self, answer: ProbeAnswer, other: ProbeAnswer, what: str, kind: type[CheckFailed]) -> None:
        if answer.same(other) and answer.logprobs and other.logprobs and not self.allow_same:
            raise kind(
                f"{self.endpoint.name} answers the probe with {self.record.ref} exactly as with {what}, to the last figure",
                f"give another prompt with {option('probe')}, or {option('allow_same', True)} if that is right",
            )

    def _unload(self, served: str) -> None:
        assert self.live.unload is not None
        self.server.tell(self.live.unload(served), _QUICK)

    def _back(self, served: str, moved: str) -> None:
        """Unload what is listed under a name, and load what was there from another folder before, where that is given."""
        if any(one.name == served for one in self.server.serving().adapters):
            self._unload(served)
        if moved:
            assert self.live.load is not None
            self.server.tell(self.live.load(served, moved), self.timeout)

    # ---- servers that have their adapters since they were started

    def _apply(self, serving: Serving, served: str, base: str) -> tuple[ProbeAnswer, bool, str]:
        mine = next((one for one in serving.adapters if self._is_mine(one, served)), None)
        if mine is None:
            raise self._not_started(serving, served)
        earlier = self._earlier()
        beside = [
            one
            for one in serving.adapters
            if one.scale and one is not mine and not any(self.server.is_it(one, old) for old in earlier)
        ]
        if beside:
            raise CheckFailed(
                f"{self.endpoint.name} applies all adapters together, and {beside[0].path} is applied already",
                "set its scale to 0 first, or serve the two from two servers",
            )
        was = {one.place: one.scale for one in serving.adapters}
        active = mine.scale == 1.0 and not any(one.scale for one in serving.adapters if one is not mine)
        if active:
            return self.server.ask_prompt(served, base, self.prompt), False, mine.path
        before = self.server.ask_prompt("", base, self.prompt)
        try:
            self.server.set_scales({place: float(place == mine.place) for place in was})
            after = {one.place: one.scale for one in self.server.serving().adapters}
            if after != {place: float(place == mine.place) for place in was}:
                raise CheckFailed(f"{self.endpoint.name} answered that the scales are set, and lists others", _LOOK)
            answer = self.server.ask_prompt(served, base, self.prompt)
            self._differs(answer, before, "what it applied before", CheckFailed)
        except BaseException as error:
            raise self._undone(error, lambda: self.server.set_scales(was)) from error
        return answer, True, mine.path

    def _is_mine(self, one: ServedAdapter, served: str) -> bool:
        if self.server.is_it(one, served):
            return True
        file = next((file for file in self.record.files if file.path.endswith(".gguf")), None)
        path = Path(one.path)
        if file is None or not path.is_file() or path.stat().st_size != file.size:
            return False
        from adapterkit import disk

        return disk.hash_file(path)[0] == file.sha256

    # ---- servers whose adapters cannot be told, only addressed

    def _address(self, serving: Serving, served: str, path: str, base: str) -> tuple[ProbeAnswer, bool]:
        if not isinstance(self.prompt, str):
            raise UsageError(f"{self.row.name} takes text as a prompt", f"give {option('probe')} as text")
        try:
            return self._probed(served, base, set()), self.now is None or self.now.served_as != served
        except _AsBefore:
            raise
        except (CheckFailed, NotFound) as error:  # it refuses the name, or answers as its base does
            if self.live.restart is None:
                raise
            raise self._not_started(serving, path, error) from error

    def _others(self, serving: Serving) -> list[tuple[str, str]]:
        """Name and path of what else it has to have; of a server that lists nothing, what was deployed to it from here."""
        from adapterkit.verbs.suits import place_of

        if self.live.knows:
            return [(one.name, one.path) for one in serving.adapters if one.path]
        found = []
        for one in served.serving(self.endpoint.name, home=self.at.root):
            if one.served_as != self._short():
                record = resolve.find(self.at, f"{one.name}@{one.version}")
                found.append((one.served_as, place_of(record, self.row, self.live, self.endpoint, self.at)))
        return found

    def _not_started(self, serving: Serving, path: str, why: AdapterkitError | None = None) -> AdapterkitError:
        """What to do where the server has to be started anew; the script is written where one was asked for."""
        assert self.live.restart is not None
        if any(character in path for character in self.live.splits):
            return UsageError(
                f"{self.row.name} takes a path apart at one of '{self.live.splits}', and {path} has one",
                f"give it a copy in a folder without, with {option('copy')}",
            )
        others = self._others(serving)
        words = self.live.restart(serving.path or self.endpoint.base or "BASE", [*others, (self._short(), path)])
        said = why.message if why else f"{self.endpoint.name} was started without {self.record.ref}"
        if self.restart_file is None:
            hint = f"start it with: {shlex.join(words)}; then deploy again"
        else:
            from adapterkit import disk

            disk.write_file(self.restart_file, f"#!/bin/sh\nexec {shlex.join(words)}\n".encode())
            self.restart_file.chmod(0o755)
            hint = f"start it with {self.restart_file}, then deploy again"
        if not self.live.knows:
            hint += "; it lists no adapters, so add those that were not deployed from here"
        if why:
            hint += f"; if it was started so, {why.hint}"
        return CheckFailed(f"{said}, and {self.row.name} takes adapters only when it starts", hint)

    # ---- afterwards

    def _undone(self, error: BaseException, undo: Any) -> BaseException:
        """The error, after what was done was taken back; it says so where that failed too."""
        try:
            undo()
        except AdapterkitError as second:
            if isinstance(error, AdapterkitError):
                more = f"and what was done could not be taken back ({second.message}); the record is as it was"
                return type(error)(f"{error.message}, {more}", error.hint)
        return error

    def _tidy(self, place: str) -> list[str]:
        """Unload versions older than the one before this: that one stays, so that the way back is short."""
        if self.live.unload is None:
            return []
        names = self._earlier()
        kept = {place, *[name for name in names if name != place][:1]}
        notes = []
        try:
            listed = {one.name for one in self.server.serving().adapters}
            for name in names:
                if name in listed and name not in kept:
                    self._unload(name)
        except AdapterkitError as error:
            notes.append(f"an older version could not be unloaded ({error.message})")
        return notes


def _names_of(at: Home, endpoint: Endpoint, name: str) -> list[str]:
    """What the versions of a name were called on a server, newest first."""
    steps = served.served_history(endpoint.name, home=at.root)
    return list(dict.fromkeys(step.served_as for step in reversed(steps) if step.name == name))


def _ref(one: Served) -> str:
    return f"{one.name}@{one.version}"


_LOOK = "see the server's log; the adapter of before is as it was"
