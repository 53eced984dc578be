"""Buckets of a Hub on the loopback interface, for the real clients of both sides: huggingface_hub and hf_xet.

The API follows huggingface_hub 2.4 (``hf_api.py``: ``create_bucket``, ``bucket_info``, ``list_bucket_tree``,
``get_bucket_paths_info``, ``_batch_bucket_files``, ``get_bucket_file_metadata``; ``utils/_pagination.py``; ``utils/_xet.py``)
and the answer to a token's renewal that hf_xet 1.8 documents (``XetSession.new_upload_commit``). The store of bytes is hf_xet's
own, in a folder (``local://``): real chunks, xorbs and shards. Of a bucket
whose name ends in a status it is another one, which answers everything with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub import LARGE, Hub, _entry, _Handler, _Problem

EMPTY = "0" * 64
PAGE = 7  # files of a page, so that lists have several
DROP, LOSE = "drop", "lose"


@dataclass
class Held:
    """A name in a bucket."""

    hash: str
    size: int
    when: datetime


@dataclass
class Wanted:
    """A request that is about to be answered."""

    method: str
    path: str
    body: bytes
    number: int

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The operations of a batch."""
        return [json.loads(line) for line in self.body.splitlines()] if self.path.endswith("/batch") else []


@dataclass
class Bucket:
    files: dict[str, Held] = field(default_factory=dict)
    private: bool = True


class BucketHub(Hub):
    """``rule`` says what happens to a request: a status, `DROP` (no answer), `LOSE` (done, and no answer), or None."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.cas = f"local://{folder}"
        self.buckets: dict[str, Bucket] = {}
        self.asked: list[Wanted] = []
        self.rule: Callable[[Wanted], int | str | tuple[int, dict[str, str]] | None] | None = None
        self._known: dict[str, int] = {EMPTY: 0}
        self._kept: dict[str, str] = {}
        self._bytes: Any = None

    @property
    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _Buckets

    def size(self, hash: str) -> int | None:
        """Bytes of a file in the store of bytes; None where there is none."""
        if hash not in self._known:
            import hf_xet

            if self._bytes is None:
                self._bytes = hf_xet.XetSession().new_download_stream_group(endpoint=self.cas)
            found = sum(len(data) for data in self._bytes.download_stream(hf_xet.XetFileInfo(hash)))
            if not found:
                return None
            self._known[hash] = found
        return self._known[hash]

    def keep(self, data: bytes) -> str:
        """Have bytes in the store of bytes, as those of a repository are; their hash."""
        import hf_xet

        name = hashlib.sha1(data).hexdigest()
        if name not in self._kept:
            with hf_xet.XetSession().new_upload_commit(endpoint=self.cas) as commit:
                made = commit.start_upload_bytes(data, sha256=hf_xet.SKIP_SHA256)
            self._kept[name] = str(made.result().xet_info.hash)
        return self._kept[name]

    def clear(self) -> None:
        self.asked.clear()
        self.rule = None


class _Buckets(_Handler):
    hub: BucketHub

    def do_GET(self) -> None:  # noqa: N802
        path = urlsplit(self.path).path
        if not re.match(r"/(api/)?buckets/|/cas/|/api/models/[^/]+/[^/]+/(paths-info|xet-)", path):
            return super().do_GET()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/cas/"):
            return self._answer(int(path.split("/")[2]), b"")
        wanted = Wanted(self.command, unquote(path), body, len(self.hub.asked))
        self.hub.asked.append(wanted)
        said = self.hub.rule(wanted) if self.hub.rule is not None else None
        if said == DROP:
            self.close_connection = True
            return None
        if isinstance(said, (int, tuple)):
            status, headers = (said, {}) if isinstance(said, int) else said
            return self._answer(status, b'{"error": "injected"}', headers)
        try:
            status, value, headers = self._bucket(path, body)
        except _Problem as problem:
            status, value = problem.status, {"error": problem.text}
            headers = {"X-Error-Message": problem.text} | ({"X-Error-Code": problem.code} if problem.code else {})
        if said == LOSE:
            self.close_connection = True
            return None
        return self._answer(status, json.dumps(value).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _bucket(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", path):
            _, files = self._files(unquote(found[1]), found[2])
            asked = parse_qs(body.decode())["paths"]
            return 200, [self._of_repo(name, files[name]) for name in asked if name in files], {}
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-read-token/.+", path):
            return 200, {"accessToken": "cas-token", "exp": int(time.time()) + 900, "casUrl": self.hub.cas}, {}
        found = re.fullmatch(r"/(?:api/)?buckets/([^/]+/[^/]+)(?:/(.*))?", path)
        assert found is not None
        name, rest = unquote(found[1]), found[2] or ""
        if self.command == "POST" and not rest:
            self.hub.buckets.setdefault(name, Bucket())
            return 200, {"url": f"{self.hub.url}/buckets/{name}"}, {}
        token, bucket = self._token(), self.hub.buckets.get(name)
        writes = rest in ("batch", "xet-write-token")
        if bucket is None or (token is None and (bucket.private or writes)):
            raise _Problem(401 if token is None else 404, "RepoNotFound", "Bucket not found")
        if rest in ("xet-read-token", "xet-write-token"):
            status = re.search(r"[45]\d\d$", name)
            at = f"{self.hub.url}/cas/{status[0]}" if status else self.hub.cas
            return 200, {"accessToken": "cas-token", "exp": int(time.time()) + 900, "casUrl": at}, {}
        if rest == "paths-info":
            paths = json.loads(body)["paths"]
            return 200, [_row(path, bucket.files[path]) for path in paths if path in bucket.files], {}
        if rest == "tree" or rest.startswith("tree/"):
            return self._tree(bucket, path, unquote(rest.removeprefix("tree").removeprefix("/")))
        if rest == "batch":
            return self._batch(bucket, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("resolve/"):
            held = bucket.files.get(unquote(rest.removeprefix("resolve/")))
            if held is None:
                raise _Problem(404, "EntryNotFound", "Entry not found")
            route = f"{self.hub.url}/api/buckets/{name}/xet-read-token"
            return (
                200,
                {},
                {
                    "X-Xet-Hash": held.hash,
                    "X-Linked-Size": str(held.size),
                    "Link": f'<{route}>; rel="xet-auth"',
                },
            )
        assert not rest
        size = sum(one.size for one in bucket.files.values())
        said = {"id": name, "private": bucket.private, "createdAt": "2026-02-06T17:37:57.000Z"}
        return 200, {**said, "size": size, "totalFiles": len(bucket.files)}, {}

    def _of_repo(self, name: str, data: bytes) -> dict[str, Any]:
        return {**_entry(name, data), **({"xetHash": self.hub.keep(data)} if name.endswith(LARGE) else {})}

    def _tree(self, bucket: Bucket, path: str, prefix: str) -> tuple[int, Any, dict[str, str]]:
        query = parse_qs(urlsplit(self.path).query)
        assert query["recursive"] == ["true"]
        start = int(query.get("cursor", ["0"])[0])
        rows = [_row(path, held) for path, held in sorted(bucket.files.items()) if path.startswith(prefix)]
        following = f"{self.hub.url}{quote(path, safe='/%')}?recursive=true&cursor={start + PAGE}"
        more = {"Link": f'<{following}>; rel="next"'} if start + PAGE < len(rows) else {}
        folders = [{"type": "directory", "path": "folder"}] if not start else []
        return 200, [*folders, *rows[start : start + PAGE]], more

    def _batch(self, bucket: Bucket, lines: list[dict[str, Any]]) -> tuple[int, Any, dict[str, str]]:
        failed = []
        for line in lines:
            path = line["path"]
            if line["type"] == "deleteFile":
                if bucket.files.pop(path, None) is None:
                    failed.append({"path": path, "error": "not found"})
                continue
            if line["type"] == "copyFile" and not self._is_held(line):
                failed.append({"path": path, "error": "the source has no such file"})
                continue
            size = self.hub.size(line["xetHash"])
            if size is None:
                failed.append({"path": path, "error": "no such content"})
                continue
            bucket.files[path] = Held(line["xetHash"], size, datetime.now(timezone.utc))
        status = 422 if failed and len(failed) == len(lines) else 200
        return status, {"success": not failed, "processed": len(lines), "failed": failed}, {}

    def _is_held(self, line: dict[str, Any]) -> bool:
        """Whether the repository or bucket that a copy names holds those bytes."""
        if line["sourceRepoType"] == "bucket":
            held = self.hub.buckets[line["sourceRepoId"]].files.values()
            return any(one.hash == line["xetHash"] for one in held)
        repo = self.hub.repos[line["sourceRepoId"]]
        large = [data for files in repo.commits.values() for name, data in files.items() if name.endswith(LARGE)]
        return any(line["xetHash"] == self.hub.keep(data) for data in large)


def _row(path: str, held: Held) -> dict[str, Any]:
    when = held.when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"type": "file", "path": path, "size": held.size, "xetHash": held.hash, "uploadedAt": when}
