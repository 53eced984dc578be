"""A small HTTP server for one reader: loopback only, GET and HEAD only, answers to its own name only.

A page of another site cannot reach it through a name that it makes resolve to 127.0.0.1 (DNS rebinding), because a Host
other than ours is refused; it cannot embed or read a page (frame-ancestors, Cross-Origin-Resource-Policy, no CORS).
Addresses are never paths: static files come from a table, names and versions go through the registry's own rules.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from adapterkit.errors import AdapterkitError, NotFound, OutputError, UnsafeError, UsageError
from adapterkit.registry.home import Home, open_home
from adapterkit.ui import board, compare, overview, version
from adapterkit.ui.markup import text
from adapterkit.ui.parts import message

LOOPBACK = "127.0.0.1"
PORT = 8484
STATIC = {
    "ui.css": "text/css; charset=utf-8",
    "ui.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_VERSION = r"/v/([^/]+)/([1-9][0-9]{0,9})/?"
_PROOF = r"/v/([^/]+)/([1-9][0-9]{0,9})/verify/"
_NAME = r"/v/([^/]+)"
HTML = "text/html; charset=utf-8"
# A page that came with a version is a stranger's: it may run its script, and reaches neither the network nor these pages.
PROOF_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox allow-scripts"
)


class PageServer(ThreadingHTTPServer):
    """Serves the pages of one home until ``shutdown``; ``url`` is where."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"

    def __init__(self, port: int = PORT, home: Path | None = None) -> None:
        """
        Args:
            port: 0 takes any that is free.
            home: default: ``$ADAPTERKIT_HOME``, else the user's data folder.

        Raises:
            OutputError: the port is taken or not allowed.
            RegistryError: the home is of a layout that this version does not know.
        """
        self.home: Home = open_home(home)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise OutputError(
                f"port {port} of {LOOPBACK} cannot be used: {why}", "give another one with --port"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    @property
    def hosts(self) -> frozenset[str]:
        """What a request may call us."""
        return frozenset(f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost"))

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that hangs up is no error; everything else was answered."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "adapterkit"
    sys_version = ""
    timeout = 30.0  # seconds that a connection may be silent
    policy = ""  # of one answer, where it is another than that of our own pages

    def do_GET(self) -> None:
        self._answer(*self._page())

    def do_HEAD(self) -> None:
        self._answer(*self._page())

    def _page(self) -> tuple[int, str, bytes, str]:
        """(status, type, body, location)"""
        home = self.server.home
        self.policy = ""
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            said = f"This server answers to {self.server.url} only."
            return HTTPStatus.MISDIRECTED_REQUEST, "text/plain; charset=utf-8", said.encode(), ""
        if not self.path.startswith("/") or len(self.path) > 4096:
            return HTTPStatus.BAD_REQUEST, HTML, message("Not an address", "", "", home), ""
        url = urlsplit("//-" + self.path)
        try:
            return self._route(url.path, url.query, home)
        except NotFound as error:
            return HTTPStatus.NOT_FOUND, HTML, message("Not found", f"{error.message}.", error.hint, home), ""
        except (UsageError, UnsafeError) as error:
            return HTTPStatus.NOT_FOUND, HTML, message("Not found", f"{error.message}.", "", home), ""
        except AdapterkitError as error:
            shown = message("This cannot be shown", f"{error.message}.", error.hint, home)
            return HTTPStatus.INTERNAL_SERVER_ERROR, HTML, shown, ""
        except Exception as error:
            shown = message("Something unforeseen went wrong", f"{type(error).__name__}: {error}", "", home)
            return HTTPStatus.INTERNAL_SERVER_ERROR, HTML, shown, ""

    def _route(self, path: str, query: str, home: Home) -> tuple[int, str, bytes, str]:
        if path == "/":
            asked = read_query(query)
            return HTTPStatus.OK, HTML, overview.page(overview.overview(asked, home.root), home), ""
        if path == "/deployed":
            return HTTPStatus.OK, HTML, board.page(home, read_query(query).page), ""
        if path == "/compare":
            given = parse_qs(query, max_num_fields=10)
            one, other = (given.get(key, [""])[-1].strip() for key in ("a", "b"))
            return HTTPStatus.OK, HTML, compare.page(one, other, home.root), ""
        if path.startswith("/static/"):
            name = path.removeprefix("/static/")
            if name in STATIC:
                return HTTPStatus.OK, STATIC[name], static(name), ""
        elif found := re.fullmatch(_VERSION, path):
            return HTTPStatus.OK, HTML, version.page(unquote(found[1]), int(found[2]), home.root), ""
        elif found := re.fullmatch(_PROOF, path):
            proof = version.proof(unquote(found[1]), int(found[2]), home)
            self.policy = PROOF_POLICY
            return HTTPStatus.OK, HTML, proof, ""
        elif found := re.fullmatch(_NAME, path):
            from adapterkit.registry import resolve

            target = resolve.resolve(home, unquote(found[1]))
            return HTTPStatus.FOUND, HTML, b"", f"/v/{target.name}/{target.version}"
        raise NotFound(f"there is no page {text(path)[:200]}")

    def _answer(self, status: int, kind: str, body: bytes, location: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, self.policy if name == "Content-Security-Policy" and self.policy else value)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Everything that is not GET or HEAD, and what is no HTTP."""
        refused = code == HTTPStatus.NOT_IMPLEMENTED
        self.close_connection = True
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED if refused else code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if refused:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Connection", "close")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged: an address may hold what somebody searched for."""


def read_query(query: str) -> overview.Query:
    """The fields of an address; what is not understood counts as not given."""
    try:
        given = parse_qs(query, max_num_fields=10)
    except ValueError:
        given = {}
    number = given.get("page", ["1"])[-1]
    page = int(number) if number.isascii() and number.isdigit() and len(number) < 8 else 1
    plain = {
        key: given.get(key, [""])[-1][:200].strip() for key in ("q", "kind", "base", "figure", "least", "most", "sort")
    }
    return overview.Query(**plain, page=max(1, page))


@lru_cache
def static(name: str) -> bytes:
    """A file that comes with the package."""
    from importlib.resources import files

    return files("adapterkit.ui").joinpath("static").joinpath(name).read_bytes()
