"""An S3 server on loopback (SeaweedFS, from PyPI), and a proxy before it that counts requests and spoils some."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY, SECRET = "adapterkit", "adapterkit-secret"  # of this server alone
RENEWED = "adapterkit-renewed"  # another key of one who may do the same


def weed() -> str | None:
    """The program, if it is installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ports(count: int) -> list[int]:
    """Ports that are free, with those that SeaweedFS takes 10000 above them for gRPC."""
    found: list[int] = []
    while len(found) < count:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as probe:
            if 10000 < port < 55000 and port not in found:
                probe.bind(("127.0.0.1", port + 10000))
                found.append(port)
    return found


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The endpoint of a server that keeps its data in ``folder``."""
    program = weed()
    assert program is not None
    folder.mkdir(parents=True, exist_ok=True)
    users = [
        {
            "name": "one",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write"],
        },
        {
            "name": "renewed",
            "credentials": [{"accessKey": RENEWED, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write"],
        },
        {"name": "two", "credentials": [{"accessKey": "reader", "secretKey": SECRET}], "actions": ["Read:readable"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": users}))
    s3, master, volume, filer = _ports(4)
    command = [
        *(program, "-logtostderr=true", "server", "-ip=127.0.0.1", f"-dir={folder}", "-s3", f"-s3.port={s3}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", "-volume.max=200"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-master.volumeSizeLimitMB=64"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        _wait(s3, process, folder / "log")
        yield f"http://127.0.0.1:{s3}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a bucket can be made, which needs every part of the server."""
    for _ in range(600):
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            client_of(f"http://127.0.0.1:{port}").list_buckets()
            return
        except Exception:
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:])


def client_of(endpoint: str) -> Any:
    """boto3's own client, the tests' second opinion."""
    import boto3
    from botocore.config import Config

    how = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30)
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=how,
    )


@dataclass
class Seen:
    """A request that came through: sizes are of the bodies, in bytes."""

    method: str
    path: str
    query: str
    range: str
    status: int
    up: int
    down: int
    copied: int = 0


@dataclass
class Asked:
    """A request that is about to be sent on."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    number: int
    body: bytes = b""


# What a rule may answer: None to pass it on, a status with S3's word for it, or one of the words below.
CUT, HANG_UP, LOSE_ANSWER, FLIP_UP, SLOW = "cut", "hang up", "lose answer", "flip up", "slow"
Rule = Callable[[Asked], "tuple[int, str] | str | None"]


@dataclass
class Proxy:
    """Stands before the server; ``rule`` says what happens to a request."""

    server: str
    rule: Rule | None = None
    seen: list[Seen] = field(default_factory=list)
    endpoint: str = ""
    after: Callable[[Seen], None] | None = None
    instead: Callable[[Asked], tuple[int, dict[str, str], bytes] | None] | None = (
        None  # answers what the server does not
    )

    def count(self) -> int:
        return len(self.seen)

    @property
    def down(self) -> int:
        """Bytes of objects that were read."""
        return sum(one.down for one in self.seen if one.method == "GET" and one.range)

    @property
    def up(self) -> int:
        """Bytes of objects and parts that were written."""
        return sum(one.up for one in self.seen if one.method == "PUT")

    @property
    def inside(self) -> int:
        return sum(one.copied for one in self.seen)

    def clear(self) -> None:
        self.seen.clear()
        self.rule = self.after = None


@contextlib.contextmanager
def proxied(server: str) -> Iterator[Proxy]:
    """A proxy before ``server``."""
    proxy = Proxy(server)
    host, _, port = server.removeprefix("http://").partition(":")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body
        protocol_version = "HTTP/1.1"

        def handle_all(self) -> None:
            path, _, query = self.path.partition("?")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                number = len(proxy.seen)
            asked = Asked(self.command, path, query, {k.lower(): v for k, v in self.headers.items()}, number, body)
            what = proxy.rule(asked) if proxy.rule is not None else None
            if what == HANG_UP:
                self.close_connection = True
                self._note(asked, 0, 0)
                return
            if isinstance(what, tuple):
                said = f"<Error><Code>{what[1]}</Code><Message>spoilt</Message></Error>".encode()
                self._note(asked, what[0], len(said))  # before the answer: who has it counts at once
                self._answer(what[0], {"Content-Type": "application/xml"}, said)
                return
            if what == FLIP_UP and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            made = proxy.instead(asked) if proxy.instead is not None else None
            status, headers, data = made or self._forward(body)
            self._note(asked, status, len(data))
            if what == LOSE_ANSWER:
                self.close_connection = True
                return
            self._answer(status, headers, data, cut=what == CUT, slow=what == SLOW)

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = HTTPConnection(host, int(port), timeout=900)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection",)}
            connection.close()
            return answer.status, headers, data

        def _note(self, asked: Asked, status: int, down: int) -> None:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("x-amz-copy-source-range", ""))
            copied = int(span[2]) - int(span[1]) + 1 if span and status == 200 else 0
            seen = Seen(asked.method, asked.path, asked.query, asked.headers.get("range", ""), status, 0, down, copied)
            if status in (200, 201) and asked.method == "PUT":
                seen.up = len(asked.body)
            with lock:
                proxy.seen.append(seen)
            if proxy.after is not None:
                proxy.after(seen)

        def _answer(
            self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False, slow: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding"):
                    self.send_header(name, value)
            said = {name.lower(): value for name, value in headers.items()}
            length = said.get("content-length", str(len(data))) if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            if slow and data:
                self.wfile.write(data[:1])
                self.wfile.flush()
                time.sleep(0.05)
                data = data[1:]
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_all  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

        def send_expect_continue(self) -> None:
            self.send_response_only(100)
            self.end_headers()

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that left

    httpd = Quiet(("127.0.0.1", 0), Handler)
    proxy.endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        httpd.shutdown()
        httpd.server_close()


def upload(endpoint: str, folder: Path, bucket: str, prefix: str) -> None:
    """Put a folder's files below a prefix."""
    client = client_of(endpoint)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=path.read_bytes())


def download(endpoint: str, bucket: str, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, by what follows it."""
    client = client_of(endpoint)
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {
        one["Key"].removeprefix(prefix): client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read()
        for one in found
    }
