"""Google's and Azure's stores: what is not there, who may not, and a clock that is off, each in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes
from store_server import Asked, Proxy, proxied
from test_google_azure import azure_at

import adapterkit
from adapterkit.checkpoint.objects import ObjectFolder
from adapterkit.errors import AdapterkitError, AuthError, NotFound, StoreError
from adapterkit.stores.faults import Fault, told
from adapterkit.stores.store import Store

BUCKET = "models"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("small")
    base = plain_base(folder / "base", layers=2, shards=3)
    return base, plain_adapter(folder / "adapter", base)


@pytest.fixture
def stored(store: Store, small: tuple[Path, Path], place: str) -> tuple[str, str]:
    """A base and an adapter in the store."""
    for folder in small:
        for name, data in read_bytes(folder, record=True).items():
            store.put(f"{place}/{folder.name}/{name}", data)
    where = f"{store.root.scheme}://{BUCKET}/{place}"
    return f"{where}/base", f"{where}/adapter"


def test_what_is_not_there_is_named(
    store: Store, stored: tuple[str, str], small: tuple[Path, Path], place: str, tmp_path: Path
) -> None:
    """A bucket, a folder, an object that goes in mid-run; and a bucket that is to be written to."""
    scheme = store.root.scheme
    out = tmp_path / "out"
    with pytest.raises(NotFound, match=f"the bucket of {scheme}://no-such-bucket.* does not exist"):
        adapterkit.open(f"{scheme}://no-such-bucket/x")
    with pytest.raises(NotFound, match=f"nothing lies below {scheme}://{BUCKET}/{place}/none/"):
        adapterkit.merge(f"{scheme}://{BUCKET}/{place}/none", stored[1], out)
    with pytest.raises(NotFound, match=f"{scheme}://{BUCKET}/{place}/none.*"):
        adapterkit.merge(stored[0], f"{scheme}://{BUCKET}/{place}/none", out)
    with pytest.raises(NotFound, match=f"the bucket of {scheme}://no-such-bucket.* does not exist"):
        adapterkit.merge(*small, f"{scheme}://no-such-bucket/out")
    opened = ObjectFolder(store.place(f"{place}/base")).open("model-00002-of-00003.safetensors")
    store.delete([opened.key])
    # Azurite takes an object that is gone for one that is another.
    with pytest.raises(AdapterkitError, match=r"base/model-00002-of-00003.safetensors (does not exist|changed while)"):
        opened.read(0, 8)
    assert not out.exists()


LATE = "Request date header too old: 'Mon, 01 Jan 2001 00:00:00 GMT'"
OVER = "Signature not valid in the specified time frame: Start [..] - Expiry [..] - Current [..]"


def said(status: int, code: str, detail: str = "") -> Callable[[Asked], tuple[int, dict[str, str], bytes]]:
    """An answer as Azure's service gives it; Google's API in XML has the same form."""
    more = f"<AuthenticationErrorDetail>{detail}</AuthenticationErrorDetail>" if detail else ""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode()
    head = {"Content-Type": "application/xml", "x-ms-error-code": code}
    return lambda asked: (status, head, body)


STAYS: dict[str, tuple[Any, type[Exception], str]] = {
    "403": (said(403, "AuthorizationPermissionMismatch"), AuthError, "refused .*AuthorizationPermissionMismatch"),
    "401": (said(401, "NoAuthenticationInformation"), AuthError, "does not accept the credentials"),
    "404": (said(404, "BlobNotFound"), NotFound, "does not exist"),
    "clock": (said(403, "RequestTimeTooSkewed"), AuthError, "the clock of this machine is off"),
    "503": (said(503, "ServerBusy"), StoreError, "in 7 attempts .ServerBusy"),
}


@pytest.mark.parametrize("fault", STAYS)
def test_what_stays_is_one_sentence_of_a_reader_too(
    fault: str, proxy: Proxy, store: Store, stored: tuple[str, str], tmp_path: Path
) -> None:
    answer, kind, words = STAYS[fault]
    before = proxy.instead

    def instead(asked: Asked) -> Any:
        if "00002-of" in asked.path and asked.method == "GET":
            return answer(asked)
        return before(asked) if before is not None else None

    proxy.instead = instead
    with pytest.raises(kind, match=words) as error:
        adapterkit.merge(*stored, tmp_path / "out")
    assert "00002-of-00003.safetensors" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("detail", "words"), [(LATE, "the clock of this machine is off"), (OVER, "the credentials expired before")]
)
@pytest.mark.parametrize("writing", [False, True])
def test_azure_says_in_a_detail_what_is_wrong_with_a_signature(
    writing: bool, detail: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is the same for a wrong key (learn.microsoft.com, "Authorize with Shared Key")."""
    with proxied("http://127.0.0.1:9") as proxy:
        found = azure_at(proxy.endpoint, monkeypatch)
        proxy.instead = said(403, "AuthenticationFailed", detail)
        with pytest.raises(AuthError, match=f"{words}.*|.*{words}") as error:
            found.put("a", b"x") if writing else found.read("a", 0, 1)
        assert "az://models/a" in str(error.value)
        proxy.instead = said(403, "AuthenticationFailed", "The MAC signature found in the HTTP request is not the same")
        with pytest.raises(AuthError, match="does not accept the credentials"):
            found.put("a", b"x") if writing else found.read("a", 0, 1)


def test_google_gives_no_token_to_a_clock_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its token endpoint says then (cloud.google.com, "Troubleshooting ... invalid_grant")."""
    auth = pytest.importorskip("google.auth", reason="the extra stores is not installed")
    from google.auth.exceptions import RefreshError

    from adapterkit.places import Address
    from adapterkit.stores.connect import _google
    from adapterkit.stores.http import Http

    reason = (
        "invalid_grant: Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. "
        "Check your iat and exp values in the JWT claim."
    )

    class Credentials:
        valid = False
        wrong = reason

        def refresh(self, request: object) -> None:
            raise RefreshError(self.wrong, {"error": "invalid_grant"})

    credentials = Credentials()
    monkeypatch.setattr(auth, "default", lambda scopes: (credentials, None))
    token = _google(Address("gs", BUCKET, ""), Http())
    assert token is not None
    for wrong, words in ((reason, "clock of this machine is off"), ("invalid_grant: revoked", "does not accept")):
        credentials.wrong = wrong
        with pytest.raises(Fault) as fault:
            token(False)
        assert words in str(told(fault.value, "gs://models/a"))
