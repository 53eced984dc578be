"""HTTP to what is not the Hub: servers that run models, and OCI registries. No redirects, no cookies, a time for the whole.

The standard library does it, so nothing has to be installed. Whoever sends a token adds it to the headers of one call; it goes
to the host of that call's address and to nobody else, because no redirect is followed here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import SplitResult, urlsplit

from adapterkit.errors import AdapterkitError, ServerError, UsageError, option
from adapterkit.foreign import is_whole, json_value

_CHUNK = 1 << 20
_LOOPBACK = ("localhost", "127.", "[::1]", "::1")


@dataclass(frozen=True)
class WebAnswer:
    """What a server answered: status, headers with lower-case names, and the bytes of the body."""

    status: int
    headers: Mapping[str, str]
    data: bytes = b""
    url: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def value(self) -> Any:
        """The body as JSON; as text where it is none."""
        try:
            return json_value(self.data)
        except ValueError:
            return self.data.decode("utf-8", "replace")


@dataclass
class WebStream:
    """An answer whose body is still to be read, block by block."""

    status: int
    headers: Mapping[str, str]
    _body: Any
    _until: float
    _host: str
    _bodiless: bool

    def blocks(self, most: int | None = None) -> Iterator[bytes]:
        """The body in blocks of at most 1 MiB.

        Raises:
            ServerError: it is longer than ``most``, the time is over, or the connection broke.
        """
        total = 0
        while True:
            if time.monotonic() > self._until:
                raise ServerError(f"{self._host} did not finish its answer in time", _SLOW)
            try:
                block = self._body.read1(_CHUNK)
            except (OSError, _http_error()) as error:
                raise _lost(self._host, error) from error
            if not block:
                break
            total += len(block)
            if most is not None and total > most:
                raise ServerError(f"{self._host} sent more than {most:,} bytes", "see what answers at that address")
            yield block
        said = self.headers.get("content-length", "")
        if is_whole(said) and int(said) != total and not self._bodiless:
            raise ServerError(f"{self._host} broke off after {total:,} of {said} bytes", "try again")


_SLOW = "see whether it is overloaded, and try again"


def _http_error() -> type[Exception]:
    from http.client import HTTPException

    return HTTPException


def _lost(host: str, error: BaseException) -> ServerError:
    why = getattr(error, "reason", None) or error
    if isinstance(why, TimeoutError) or "timed out" in str(why):
        return ServerError(f"{host} did not answer in time", _SLOW)
    said = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
    return ServerError(f"{host} cannot be reached ({said})", "see whether it runs and the address is right")


def check_url(url: str) -> str:
    """An address of a server without a slash at its end.

    Raises:
        UsageError: another scheme, no host, or a password in it.
    """
    parts = parts_of(url, UsageError)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"'{url}' is no address of a server", "give it like http://host:8000")
    if "@" in parts.netloc:
        hint = f"keep it in an environment variable and name that with {option('token_env', 'VARIABLE')}"
        raise UsageError("an address is no place for a password", hint)
    if parts.query or parts.fragment:
        raise UsageError(f"'{url}' is more than an address", "leave out what follows the path")
    return url.rstrip("/")


def parts_of(url: str, kind: type[AdapterkitError] = ServerError) -> SplitResult:
    """The parts of an address, of a user or of a server's answer.

    Raises:
        AdapterkitError: of ``kind``: it is no address, such as ``http://[``.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise kind(f"'{url[:100]}' is no address of a server", "give it like http://host:8000") from None
    return parts


@contextmanager
def stream(
    method: str,
    url: str,
    *,
    body: Any = None,
    data: bytes | IO[bytes] | None = None,
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> Iterator[WebStream]:
    """One request, its answer still to be read; any status is an answer.

    Args:
        body: a value that is sent as JSON.
        data, size: bytes that are sent as they are, or an open file with its length.
        timeout: seconds for the whole of it.

    Raises:
        ServerError: nothing answers, or not in time.
    """
    import urllib.error
    import urllib.request

    host = parts_of(url).netloc
    given = {"User-Agent": "adapterkit", **(headers or {})}
    if body is not None:
        data = json.dumps(body).encode()
        given["Content-Type"] = "application/json"
    if size is not None:
        given["Content-Length"] = str(size)
    request = urllib.request.Request(url, data=data, headers=given, method=method)

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    near = (parts_of(url).hostname or "").startswith(_LOOPBACK)
    handlers: list[Any] = [Stay, urllib.request.ProxyHandler({})] if near else [Stay]
    until, bare = time.monotonic() + timeout, method == "HEAD"
    try:
        answer: Any = urllib.request.build_opener(*handlers).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        answer = error
    except (OSError, ValueError, _http_error()) as error:  # an address that cannot be sent is a ValueError
        raise _lost(host, error) from error
    try:
        named = {key.lower(): value for key, value in answer.headers.items()}
        yield WebStream(answer.status, named, answer if hasattr(answer, "read1") else answer.fp, until, host, bare)
    finally:
        answer.close()


def ask(method: str, url: str, *, most: int = 64 << 20, **given: Any) -> WebAnswer:
    """One request with its whole answer; see `stream`.

    Args:
        most: bytes that the answer may have.

    Raises:
        ServerError: nothing answers, not in time, or too much.
    """
    with stream(method, url, **given) as found:
        return WebAnswer(found.status, found.headers, b"".join(found.blocks(most)), url)
