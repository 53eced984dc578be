"""A read-only Hub on the loopback interface, for the real huggingface_hub client.

It answers the calls that opening and downloading make (protocol: huggingface_hub 2.4's own requests): ``/api/models/{id}``,
its ``/revision/{rev}`` and ``/tree``, and ``/{id}/resolve/{rev}/{file}``. Weight files are, as on the real Hub, a redirect
to another host (the same server under another host name), so that a token that follows the redirect is seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import pytest

H = TypeVar("H", bound="Hub")
TOKEN = "hf_aTokenThatMustNeverBeSeen0123456789"
LARGE = (".safetensors", ".bin", ".gguf")


@dataclass
class Repo:
    """Files of each commit; ``refs`` maps branches and tags to commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], *refs: str) -> str:
        parts = [name.encode() + hashlib.sha1(data).digest() for name, data in sorted(files.items())]
        sha = hashlib.sha1(b"".join(parts)).hexdigest()
        self.commits[sha] = dict(files)
        self.refs.update(dict.fromkeys(refs or ("main",), sha))
        return sha


@dataclass(frozen=True)
class Call:
    """One request as the server saw it, and how many bytes of a body it sent back."""

    method: str
    host: str
    path: str
    status: int
    sent: int
    token: str | None
    ranged: bool


@dataclass
class Fault:
    match: Callable[[str], bool]
    status: int | None
    times: int
    after: int = 0


class Hub:
    """``with Hub() as hub``: ``hub.url`` is the endpoint, ``hub.calls`` what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.ranges = True

    @property
    def handler(self) -> type[BaseHTTPRequestHandler]:
        """What answers requests."""
        return _Handler

    def __enter__(self: H) -> H:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (self.handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_port
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, folder: Path | Mapping[str, bytes], *refs: str, **options: bool) -> str:
        """A commit of a repository from the files of a folder; gives its id."""
        if isinstance(folder, Path):
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        else:
            files = dict(folder)
        return self.repos.setdefault(name, Repo(**options)).commit(files, *refs)

    def fail(self, words: str, status: int | None = 503, times: int = 1, after: int = 0) -> None:
        """Answer the next calls whose path holds ``words`` with ``status``; None: cut the connection after ``after`` bytes."""
        self.faults.append(Fault(lambda path: words in path, status, times, after))

    @property
    def sent(self) -> int:
        return sum(call.sent for call in self.calls)


class _Problem(Exception):
    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code, self.text = status, code, text


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        fault = next((f for f in self.hub.faults if f.times > 0 and f.match(path)), None)
        if fault is not None:
            fault.times -= 1
            if fault.status is not None:
                return self._answer(fault.status, b'{"error": "injected"}')
            self._cut = fault.after
        try:
            self._route(path)
        except _Problem as problem:
            headers = {"X-Error-Message": problem.text} | ({"X-Error-Code": problem.code} if problem.code else {})
            self._answer(problem.status, json.dumps({"error": problem.text}).encode(), headers)
        return None

    do_HEAD = do_GET  # noqa: N815

    def _route(self, path: str) -> None:
        if found := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            return self._bytes(self.hub.blobs[found[1]], {"ETag": f'"{found[1]}"'})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name = unquote(found[1])
            sha, files = self._files(name, unquote(found[3] or "main"))
            if found[2] == "tree":
                return self._answer(200, json.dumps([_entry(n, d) for n, d in sorted(files.items())]).encode())
            siblings = [{"rfilename": file} for file in sorted(files)]
            info = {"_id": name, "id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []}
            return self._answer(200, json.dumps(info).encode())
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.hub.repos.get(unquote(found[1]))
            sha, files = self._files(unquote(found[1]), unquote(found[2]))
            if repo is not None and repo.gated and self._token() is None:
                raise _Problem(401, "GatedRepo", "Access to this model is restricted")
            file = unquote(found[3])
            if file not in files:
                raise _Problem(404, "EntryNotFound", "Entry not found")
            data = files[file]
            headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if not file.endswith(LARGE):
                return self._bytes(data, headers)
            digest = hashlib.sha256(data).hexdigest()
            self.hub.blobs[digest] = data
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            return self._answer(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/storage/{digest}"})
        raise _Problem(404, "", f"no route {path}")

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._token() is None):
            raise _Problem(401 if self._token() is None else 404, "RepoNotFound", "Repository not found")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def _token(self) -> str | None:
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if sent and sent != TOKEN:
            raise _Problem(401, "", "Invalid credentials in Authorization header")
        return sent or None

    def _bytes(self, data: bytes, headers: Mapping[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None or not self.hub.ranges:
            return self._answer(200, data, headers)
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if start >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        shown = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return self._answer(206, data[start:stop], {**headers, **shown})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        cut = getattr(self, "_cut", None)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        data = b"" if self.command == "HEAD" else body if cut is None else body[:cut]
        token = self.headers.get("Authorization")
        ranged = self.headers.get("Range") is not None
        host = self.headers.get("Host") or ""
        self.hub.calls.append(Call(self.command, host, self.path, status, len(data), token, ranged))
        self.wfile.write(data)
        if cut is not None:
            self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def client_of(served: H, cache: Path, patch: pytest.MonkeyPatch, token: str | None = None) -> Iterator[H]:
    """The real client with an empty cache and this token; it asks nobody else."""
    import huggingface_hub as hf
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    for module in (constants, file_download, hf_api, _http):
        for name, value in {
            "ENDPOINT": served.url,
            "HF_ENDPOINT": served.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_TOKEN_PATH": str(cache.with_name("no-token")),
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        }.items():
            if hasattr(module, name):
                patch.setattr(module, name, value)
    patch.setattr(hf_api.api, "endpoint", served.url)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
    hf.close_session()
    yield served
    hf.close_session()


def without_waits(patch: pytest.MonkeyPatch) -> None:
    """The client's waits between attempts take no time."""
    from huggingface_hub.utils import _http

    patch.setattr(_http.time, "sleep", lambda seconds: None)
