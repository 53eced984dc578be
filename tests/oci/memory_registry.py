"""An OCI registry in memory, in place of the network: just what pages show of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from adapterkit import web
from adapterkit.oci import client


def answer_in_memory(host: str, patch: pytest.MonkeyPatch) -> None:
    """Requests to ``host`` are answered from a dictionary; others go where they went."""
    held: dict[str, bytes] = {}
    ask, stream = web.ask, web.stream

    def answer(method: str, url: str, data: Any) -> web.WebAnswer:
        parts = urlsplit(url)
        path, query = parts.path, parse_qs(parts.query)
        data = data.read() if hasattr(data, "read") else data
        if method == "POST":
            return web.WebAnswer(202, {"location": path + "1"})
        if method == "PUT" and "digest" in query:
            held[f"{path.rsplit('/uploads/')[0]}/{query['digest'][0]}"] = data
            return web.WebAnswer(201, {})
        if method == "PUT":
            held[path] = held[f"{path.rsplit('/', 1)[0]}/sha256:{hashlib.sha256(data).hexdigest()}"] = data
            return web.WebAnswer(201, {})
        found = held.get(path)
        if found is None:
            return web.WebAnswer(404, {})
        return web.WebAnswer(200, {"content-length": str(len(found))}, b"" if method == "HEAD" else found)

    def instead_of_ask(method: str, url: str, **given: Any) -> web.WebAnswer:
        if urlsplit(url).netloc == host:
            return answer(method, url, given.get("data"))
        return ask(method, url, **given)

    @contextmanager
    def instead_of_stream(method: str, url: str, **given: Any) -> Iterator[Any]:
        if urlsplit(url).netloc != host:
            with stream(method, url, **given) as found:
                yield found
            return
        whole = answer(method, url, None)
        yield _Whole(whole.status, whole.headers, whole.data)

    patch.setattr(client, "ask", instead_of_ask)
    patch.setattr(client, "stream", instead_of_stream)


class _Whole:
    def __init__(self, status: int, headers: Any, data: bytes) -> None:
        self.status, self.headers, self.data = status, headers, data

    def blocks(self, most: int | None = None) -> Iterator[bytes]:
        yield self.data
