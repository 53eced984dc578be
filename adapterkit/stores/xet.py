"""Where the Hub keeps the bytes of its buckets: files by their xet hash, through the Hub's own client (hf_xet).

Bytes are read by range and written from memory. The client cuts what it is given into chunks, sends those that are not there
yet, and tries each of its requests again by itself; it says of none how often. A file that is not there, and a store that
does not answer, may be an empty stream to it: who reads has to count.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hf_xet

from adapterkit.stores.faults import Fault

EARLY = 60  # seconds before a token ends, in which it is no longer used
_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
_READ, _WRITE = "read", "write"


@dataclass(frozen=True)
class Access:
    """What the Hub says of how to reach the bytes of a bucket.

    Attributes:
        endpoint: the address of the store of bytes.
        token, expires: what lets one in, and until when (seconds since 1970).
        url, headers: where the client gets another token by itself, and who asks.
    """

    endpoint: str
    token: str = field(repr=False)
    expires: int
    url: str
    headers: Mapping[str, str] = field(repr=False)


class Xet:
    """The bytes of one bucket.

    Args:
        access: asks the Hub, for ``read`` or ``write``.
    """

    def __init__(self, access: Callable[[str], Access]) -> None:
        self._access, self._lock = access, threading.Lock()
        self._session: Any = hf_xet.XetSession()
        self._known: dict[str, Access] = {}
        self._reader: Any = None

    def forget(self) -> None:
        """Ask the Hub anew, for somebody else."""
        with self._lock:
            self._known.clear()
            self._reader = None

    def _given(self, kind: str) -> dict[str, Any]:
        known = self._known.get(kind)
        if known is None or known.expires < time.time() + EARLY:
            known = self._known[kind] = self._access(kind)
        plain = {name: value for name, value in known.headers.items() if name.lower() != "authorization"}
        return {
            "endpoint": known.endpoint,
            "token": known.token,
            "token_expiry_unix_secs": known.expires,
            "token_refresh_url": known.url,
            "token_refresh_headers": dict(known.headers),
            "custom_headers": plain,
        }

    def read(self, hash: str, size: int | None, start: int, nbytes: int) -> bytes:
        """The bytes of a file from ``start``; fewer where it has fewer, or where it is not there."""
        with self._lock:
            if self._reader is None:
                given = self._given(_READ)
                with _faults():
                    self._reader = self._session.new_download_stream_group(**given)
            reader = self._reader
        with _faults():
            return b"".join(reader.download_stream(hf_xet.XetFileInfo(hash, size), start=start, end=start + nbytes))

    def writer(self) -> XetWriter:
        """Begin a file."""
        with self._lock:
            given = self._given(_WRITE)
        with _faults():
            return XetWriter(self._session.new_upload_commit(**given))

    def send(self, data: bytes) -> str:
        """A small file; its xet hash."""
        made = self.writer()
        made.write(data)
        return made.finish()[0]


class XetWriter:
    """A file on its way: bytes in order. It has no name; a bucket gives it one."""

    def __init__(self, commit: Any) -> None:
        self._commit = commit
        self._stream = commit.start_upload_stream(sha256=hf_xet.SKIP_SHA256)
        self._sent = 0
        self._fault: Fault | None = None

    def write(self, data: bytes | bytearray) -> None:
        """Send bytes behind those before them. After a fault nobody knows how many of them arrived, so it stays."""
        if self._fault is not None:
            raise self._fault
        try:
            with _faults():
                self._stream.write(bytes(data))
        except Fault as fault:
            self._fault = fault
            raise
        self._sent += len(data)

    def finish(self, beside: bytes | None = None) -> tuple[str, str]:
        """End the file; its xet hash, and that of a small file which is sent along."""
        with _faults():
            made = self._stream.finish()
            if int(made.xet_info.file_size) != self._sent:
                raise Fault(words="other bytes arrived than were sent", most=1)
            small = None
            if beside is not None:
                small = self._commit.start_upload_bytes(beside, sha256=hf_xet.SKIP_SHA256)
            self._commit.wait_to_finish()
            return str(made.xet_info.hash), "" if small is None else str(small.result().xet_info.hash)

    def abort(self) -> None:
        """Let go of it."""
        for one in (self._stream, self._commit):
            try:
                one.abort()
            except Exception:  # it has ended already, in one way or another
                continue


@contextmanager
def _faults() -> Iterator[None]:
    """Turn what the client raises into a `Fault`, which is not tried again: the client did that."""
    try:
        yield
    except hf_xet.XetAuthenticationError:
        raise Fault(401, "AuthenticationFailed", most=1) from None
    except (OSError, RuntimeError, ValueError) as error:
        found = _STATUS.search(str(error))
        status = int(found[1]) if found else 0
        code = "AuthenticationFailed" if status == 401 else ""
        words = "no connection to the store of bytes" if "sending request" in str(error) else "the connection failed"
        if status == 404:  # not of the name that was asked for: the bucket has that
            status, words = 0, "the store of bytes answers 404"
        raise Fault(status, code, words, most=1) from None
