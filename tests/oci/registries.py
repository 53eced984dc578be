"""Debian's docker-registry on loopback, and a proxy before it that lets things go wrong."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "let-me-in"
# of `ci` with that password, by bcrypt, as htpasswd keeps it
HTPASSWD = "ci:$2b$05$M6y/LNGTQjVPLHiw0GKjbOo0i9mJj/9KtsHIt6hTb4n8ZRiFKtTeO\n"


@contextmanager
def docker_registry(folder: Path, *, login: bool = False) -> Iterator[str]:
    """Its ``host:port``; what it holds lies in ``folder``."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (a package of Debian)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(HTPASSWD)
    auth = f"auth:\n  htpasswd:\n    realm: here\n    path: {folder / 'htpasswd'}\n" if login else ""
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {folder / 'data'}\n"
        f"http:\n  addr: 127.0.0.1:{port}\n{auth}"
    )
    process = subprocess.Popen([program, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "docker-registry did not start"
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


Rule = Callable[[str, str, dict[str, str]], "tuple[int, dict[str, str], bytes] | None"]
"""What is answered instead: of method, path and headers, status, headers and body; None to ask the registry."""


class Proxy:
    """A registry behind rules. ``rule`` may be set at any time; ``calls`` are method and path."""

    def __init__(self, host: str) -> None:
        self.behind, self.host = host, ""
        self.rule: Rule = lambda *_: None
        self.alter: Callable[[str, str, bytes], bytes] = lambda method, path, data: data
        self.calls: list[tuple[str, str]] = []

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any, bytes]:
        self.calls.append((method, path))
        instead = self.rule(method, path, headers)
        if instead is not None:
            return instead[0], instead[1].items(), instead[2]
        connection = http.client.HTTPConnection(self.behind, timeout=900)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = self.alter(method, path, answer.read())
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("content-length", "transfer-encoding")]
        if method == "HEAD":
            kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
        connection.close()
        return answer.status, kept, data


@contextmanager
def proxied(host: str) -> Iterator[Proxy]:
    proxy = Proxy(host)

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self._do
            raise AttributeError(name)

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
            status, sent, data = proxy.forward(self.command, self.path, headers, body)
            self.send_response(status)
            for key, value in sent:
                self.send_header(key, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    proxy.host = f"127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
