"""The loopback Hub of `hub`, with what publishing calls: create, preupload, LFS, commit, tags, pull requests, cards."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from hub import LARGE, TOKEN, Hub, Repo, _Handler, _Problem, client_of, without_waits

NOW = "2026-01-01T00:00:00.000Z"


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class WriteFault:
    """Answers ``times`` calls with a status, cuts the connection (None) or says nothing (SILENT), before or after the work
    was done."""

    match: Callable[[str, str], bool]
    status: int | None
    times: int
    after: bool


SILENT = 0


class WritableHub(Hub):
    """As `Hub`; ``lies`` replaces the bytes of a digest when they are downloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.write_faults: list[WriteFault] = []
        self.uploads: dict[str, bytes] = {}
        self.lies: dict[str, bytes] = {}
        self.proposals: dict[str, list[dict[str, Any]]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.commits_made = 0
        self.public_names: set[str] = set()
        self.speak = threading.Event()  # what is silent until then

    @property
    def handler(self) -> type[_Handler]:
        return _Writes

    def break_write(self, words: str, status: int | None = 503, times: int = 1, *, after: bool = False) -> None:
        """Fail the next calls whose ``METHOD path`` holds ``words``."""
        self.write_faults.append(WriteFault(lambda method, path: words in f"{method} {path}", status, times, after))

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.refs[ref]]


class _Writes(_Handler):
    hub: WritableHub

    def do_POST(self) -> None:  # noqa: N802
        self._write()

    def do_PUT(self) -> None:  # noqa: N802
        self._write()

    def do_GET(self) -> None:  # noqa: N802
        path = urlsplit(self.path).path
        fault = self._fault(path)
        if fault is not None and not fault.after:
            return self._break(fault)
        return super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    def _fault(self, path: str) -> WriteFault | None:
        fault = next((f for f in self.hub.write_faults if f.times > 0 and f.match(self.command, path)), None)
        if fault is not None:
            fault.times -= 1
        return fault

    def _break(self, fault: WriteFault) -> None:
        if fault.status == SILENT:
            self.hub.speak.wait(60)
        if not fault.status:
            self.close_connection = True
            self.connection.close()
        else:
            self._answer(fault.status, b'{"error": "injected"}')

    def _write(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        fault = self._fault(path)
        if fault is not None and not fault.after:
            return self._break(fault)
        try:
            status, value, headers = self._act(unquote(path), body)
        except _Problem as problem:
            status, value = problem.status, {"error": problem.text}
            headers = {"X-Error-Message": problem.text} | ({"X-Error-Code": problem.code} if problem.code else {})
        if fault is not None:
            return self._break(fault)
        return self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _writer(self) -> None:
        if self._token() is None:
            raise _Problem(401, "", "Invalid username or password.")

    def _act(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path == "/api/validate-yaml":
            return self._card(json.loads(body)["content"])
        if found := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise _Problem(400, "", "sha256 mismatch")
            self.hub.uploads[found[1]] = self.hub.blobs[found[1]] = body
            return 200, {}, {"ETag": f'"{found[1]}"'}
        self._writer()
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'tester'}/{said['name']}"
            repo = Repo(private=said.get("visibility") == "private" or bool(said.get("private")))
            if name not in self.hub.repos:
                self.hub.repos[name] = repo
                repo.commit({})
            return 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name}, {}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tag)/(.+)", path)
        if found is None:
            raise _Problem(404, "", f"no route {self.command} {path}")
        name, verb, revision = found[1], found[2], found[3]
        if name not in self.hub.repos:
            raise _Problem(404, "RepoNotFound", "Repository not found")
        sha, files = self._files(name, revision)
        if verb == "preupload":
            return 200, {"files": [_upload_mode(f, files) for f in json.loads(body)["files"]], "commitOid": sha}, {}
        if verb == "tag":
            tags = self.hub.tags.setdefault(name, {})
            tag = json.loads(body)["tag"]
            if tag in tags:
                raise _Problem(409, "", f"Tag reference exists already: {tag}")
            tags[tag] = self.hub.repos[name].refs[tag] = sha
            return 200, {}, {}
        return self._commit(name, revision, sha, dict(files), body)

    def _commit(
        self, name: str, revision: str, head: str, files: dict[str, bytes], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        said = lines[0]["value"]
        if said.get("parentCommit") not in (None, head):
            raise _Problem(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads.get(value["oid"]) or self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits_made += 1
        repo = self.hub.repos[name]
        answer = {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/x", "hookOutput": ""}
        if "create_pr=1" in self.path:
            number = len(self.hub.proposals.setdefault(name, [])) + 1
            sha = repo.commit(files, f"refs/pr/{number}")
            self.hub.proposals[name].append({"num": number, "title": said["summary"]})
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        else:
            sha = repo.commit(files, revision)
        return 200, {**answer, "commitOid": sha}, {}

    def _batch(self, said: Any) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for item in said["objects"]:
            entry = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.hub.blobs:
                href = f"{self.hub.storage}/storage/{item['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _card(self, content: str) -> tuple[int, Any, dict[str, str]]:
        """What the Hub complains about in a card, as far as it concerns us."""
        found = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        errors = []
        front = yaml.safe_load(found[1]) if found else {}
        base = front.get("base_model")
        for name in [base] if isinstance(base, str) else base or []:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
                errors.append({"message": f'"base_model" with value "{name}" is not valid.'})
        if front.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
            errors.append({"message": '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _route(self, path: str) -> None:
        if found := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            data = self.hub.lies.get(found[1], self.hub.blobs.get(found[1], b""))
            return self._bytes(data, {"ETag": f'"{found[1]}"'})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            tags = self.hub.tags.get(unquote(found[1]), {})
            shown = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in tags.items()]
            return self._answer(200, json.dumps({"branches": [], "converts": [], "tags": shown}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/discussions", path):
            page = parse_qs(urlsplit(self.path).query).get("p", ["0"])[0]
            rows = self.hub.proposals.get(unquote(found[1]), []) if page == "0" else []
            known = {
                "repo": {"name": unquote(found[1]), "type": "model"},
                "author": {"name": "tester"},
                "status": "open",
                "isPullRequest": True,
                "createdAt": NOW,
            }
            value = {"discussions": [{**row, **known} for row in rows], "count": len(rows), "start": 0}
            return self._answer(200, json.dumps(value).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            name = unquote(found[1])
            sha, files = self._files(name, unquote(found[2] or "main"))
            siblings = [_sibling(path, data) for path, data in sorted(files.items())]
            info = {"_id": name, "id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []}
            return self._answer(200, json.dumps({**info, "private": self.hub.repos[name].private}).encode())
        return super()._route(path)


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_blob(data)}
    if path.endswith(LARGE):
        found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
    return found


def _upload_mode(file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    large = file["path"].endswith(LARGE)
    data = files.get(file["path"])
    oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_blob(data)
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


@pytest.fixture(name="hub")
def writable_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[WritableHub]:
    """A Hub of our own and a client with a token, which must be seen nowhere but in its own requests."""
    from huggingface_hub import hf_api

    caplog.set_level(logging.DEBUG)
    without_waits(monkeypatch)
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    with WritableHub() as served, client_of(served, tmp_path / "cache", monkeypatch, TOKEN):
        defaults = (served.url, *hf_api.HfApi.__init__.__defaults__[1:])
        monkeypatch.setattr(hf_api.HfApi.__init__, "__defaults__", defaults)
        yield served
        assert TOKEN not in caplog.text
        assert not any(call.token for call in served.calls if call.host.startswith("localhost"))
