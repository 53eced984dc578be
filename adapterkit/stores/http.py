"""One request over HTTP to a store's own API, without a second attempt; what is no success is a `Fault`."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import urllib3

from adapterkit.foreign import json_value
from adapterkit.stores.faults import NO_CONNECTION, Fault

CONNECTIONS = 64
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{2,64})</Code>")
_REASON = re.compile(r"[A-Za-z0-9]{2,64}")
_NO_BUCKET = re.compile(rb"bucket[^\"]{0,40} does(?: not|n't) exist", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What came: the status, the headers with names in small letters, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def value(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            ValueError: it is none.
        """
        found = json_value(self.body)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found


class Http:
    """Connections that are kept open, for all threads."""

    def __init__(self) -> None:
        self.pool = urllib3.PoolManager(
            maxsize=CONNECTIONS,
            retries=False,
            timeout=urllib3.Timeout(connect=10, read=120),
        )

    def ask(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """The answer to one request.

        Raises:
            Fault: no whole answer, or none of success.
        """
        try:
            found = self.pool.request(method, url, headers=dict(headers or {}), body=body, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise Fault(words=_said(error)) from None
        answer = Answer(found.status, {name.lower(): value for name, value in found.headers.items()}, found.data)
        if not 200 <= answer.status < 300:
            raise Fault(answer.status, code_of(answer))
        return answer


def code_of(answer: Answer) -> str:
    """The store's own word for what is wrong: Azure's header, XML's ``Code``, or the reason of Google's JSON."""
    if said := answer.headers.get("x-ms-error-code", ""):
        return said if _REASON.fullmatch(said) else ""
    if found := _CODE.search(answer.body[:4096]):
        return found[1].decode()
    if answer.status == 404 and _NO_BUCKET.search(answer.body[:4096]):
        return "NoSuchBucket"
    try:
        reason = str(answer.value["error"]["errors"][0]["reason"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return reason if _REASON.fullmatch(reason) else ""


def _said(error: Exception) -> str:
    """What a connection did, without addresses or headers in it."""
    kinds = urllib3.exceptions
    if isinstance(error, (kinds.NewConnectionError, kinds.ConnectTimeoutError, kinds.NameResolutionError)):
        return NO_CONNECTION
    if isinstance(error, kinds.TimeoutError):
        return "no answer in time"
    if isinstance(error, kinds.IncompleteRead) or "IncompleteRead" in str(error):
        return "the body was cut short"
    return "the connection failed"


def md5(data: bytes | bytearray) -> str:
    """What a store holds a body against, in base64; no secret depends on it."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
