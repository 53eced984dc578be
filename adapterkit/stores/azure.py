"""Azure Blob Storage, through its own client.

An object is a block blob: blocks in any order, which nobody sees before a list of them is committed, in one step, only where
no blob has that name if that is asked for. Blocks are ranges of other blobs of the account too (Put Block From URL). They
belong to the name of the blob and not to an upload, so an upload is a name for its blocks. Azure drops blocks that nobody
commits after a week (https://learn.microsoft.com/rest/api/storageservices/put-block).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import azure.core.exceptions as wrong
from azure.core import MatchConditions
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobBlock, BlobSasPermissions, BlobServiceClient, generate_blob_sas

from adapterkit.errors import UsageError
from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import NO_CONNECTION, Fault, told
from adapterkit.stores.store import MARK, MOST_LISTED, Assembly, HeldPart, Store, StoredObject, too_many

CONNECTIONS = 64
_HOUR = timedelta(hours=1)
_CODES = {"ContainerNotFound": "NoSuchBucket"}
_DETAILS = {
    "Request date header too old": "RequestTimeTooSkewed",
    "Signature not valid in the specified time frame": "ExpiredToken",  # a shared access signature's own end
}
_THERE = ("BlobAlreadyExists", "UnauthorizedBlobOverwrite")
_SCOPE = "https://storage.azure.com/.default"


@dataclass(frozen=True)
class Account:
    """Who asks, and where.

    Attributes:
        service: Azure's client.
        key: the account's own, where that is what there is.
        sas: a shared access signature, without its question mark.
        bearer: makes a token for a copy's source.
    """

    service: Any
    key: str = ""
    sas: str = ""
    bearer: Callable[[], str] | None = None


def account() -> Account:
    """What the environment says: a connection string, or an account's name with a key, a signature, an identity or nothing.

    Raises:
        UsageError: it names no account.
        ValueError: Azure's client does not understand it.
    """
    how = {
        "retry_total": 0,
        "connection_timeout": 10,
        "read_timeout": 120,
        "transport": _transport(),
    }
    said = _env("AZURE_STORAGE_CONNECTION_STRING")
    if said:
        service = BlobServiceClient.from_connection_string(said, **how)
        fields = dict(one.partition("=")[::2] for one in said.split(";") if one)
        return Account(service, fields.get("AccountKey", ""), fields.get("SharedAccessSignature", "").removeprefix("?"))
    name = _env("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")
    endpoint = _env("AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_BLOB_ENDPOINT") or (
        f"https://{name}.blob.core.windows.net" if name else ""
    )
    if not endpoint:
        raise UsageError("nothing says which account az:// is of", "set AZURE_STORAGE_ACCOUNT_NAME")
    key = _env("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_KEY")
    sas = _env("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY").removeprefix("?")
    if key:
        by: Any = {"account_name": name, "account_key": key} if name else key
        return Account(BlobServiceClient(endpoint, credential=by, **how), key)
    if sas:
        return Account(BlobServiceClient(endpoint, credential=sas, **how), sas=sas)
    found = _identity()
    if found is None:
        return Account(BlobServiceClient(endpoint, **how))
    return Account(
        BlobServiceClient(endpoint, credential=found, **how), bearer=lambda: str(found.get_token(_SCOPE).token)
    )


def _env(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _identity() -> Any:
    """The identity of this machine or its user, as Azure's own tools find it; None where the package that does so is not
    installed, or ``AZURE_SKIP_SIGNATURE`` asks for none."""
    if _env("AZURE_SKIP_SIGNATURE").lower() in ("1", "true", "yes"):
        return None
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError:
        return None
    return DefaultAzureCredential()


def _transport() -> Any:
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=0))
    return RequestsTransport(session=session, session_owner=False)


class Azure(Store):
    """A container of Azure Blob Storage.

    Args:
        made: who asks.
        again: finds that out anew.
        opened: the store of another address, from which a range is copied.
    """

    conditions = True
    keeps_uploads = False

    def __init__(
        self, root: Address, made: Account, again: Callable[[], Account], opened: Callable[[Address], Store]
    ) -> None:
        self.root, self.account, self._again, self.opened = root, made, again, opened

    def renew(self) -> bool:
        fresh = self._again()
        if (fresh.key, fresh.sas) == (self.account.key, self.account.sas) and fresh.bearer is None:
            return False
        self.account = fresh
        return True

    def call(self, key: str, name: str, *given: Any, **more: Any) -> Any:
        """One request about a blob."""
        with _faults():
            blob = self.account.service.get_blob_client(self.root.bucket, key)
            return getattr(blob, name)(*given, **more)

    # ------------------------------------------------------------------ reading

    def entries(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> list[StoredObject]:
        def listed() -> list[StoredObject]:
            found: list[StoredObject] = []
            with _faults():
                container = self.account.service.get_container_client(self.root.bucket)
                pages = container.list_blobs(name_starts_with=prefix or None, results_per_page=1000).by_page()
                for number, page in enumerate(pages):
                    meter.count(1 if number else 0)
                    found += [
                        StoredObject(str(one.name), int(one.size), _etag(one.etag), written=one.last_modified)
                        for one in page
                        if wanted(str(one.name))
                    ]
                    if len(found) > MOST_LISTED:
                        raise too_many(self.place(prefix))
            # A folder of a hierarchical namespace is listed too, without a size; a file's name never begins another's.
            return sorted((one for one in found if one.key.startswith(prefix)), key=lambda one: one.key)

        return self.ask(listed, self.place(prefix) if prefix else self.root)

    def head(self, key: str) -> StoredObject | None:
        try:
            found = self.ask(lambda: self.call(key, "get_blob_properties"), self.place(key), pass_on=True)
        except Fault as fault:
            if fault.missing and fault.code != "NoSuchBucket":
                return None
            raise told(fault, str(self.place(key))) from None
        marks = {name.replace("_", "-").lower(): str(value) for name, value in (found.metadata or {}).items()}
        return StoredObject(key, int(found.size), _etag(found.etag), marks, found.last_modified)

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        if nbytes <= 0:
            return b""
        same = {"etag": _quoted(etag), "match_condition": MatchConditions.IfNotModified} if etag else {}

        def asked() -> bytes:
            with _faults():
                blob = self.account.service.get_blob_client(self.root.bucket, key)
                # One request each: what is asked for is never larger than a window.
                data: bytes = blob.download_blob(offset=start, length=nbytes, max_concurrency=1, **same).readall()
            meter.count(down=len(data))
            if len(data) != nbytes:
                raise Fault(words="the body was cut short")
            return data

        return self.ask(asked, self.place(key))

    # ------------------------------------------------------------------ writing

    def put(self, key: str, data: bytes, *, absent: bool = False, over: str = "") -> bool:
        condition: dict[str, Any] = {"overwrite": True}
        if absent:
            condition = {"overwrite": False}
        elif over:
            condition |= {"etag": _quoted(over), "match_condition": MatchConditions.IfNotModified}

        def asked() -> None:
            self.call(key, "upload_blob", data, length=len(data), validate_content=True, max_concurrency=1, **condition)
            meter.count(up=len(data))

        try:
            self.ask(asked, self.place(key), writing=True, pass_on=True)
        except Fault as fault:
            if fault.changed and (absent or over):
                return False
            raise told(fault, str(self.place(key)), writing=True) from None
        return True

    def delete(self, keys: Iterable[str]) -> None:
        self.delete_each(keys, lambda key: self.call(key, "delete_blob"))

    def deletions(self, count: int) -> int:
        return count

    def begin(self, key: str, marks: Mapping[str, str], work: Address) -> Assembly:
        return _Blocks(self, key, f"{os.urandom(8).hex()}-{marks.get(MARK, '')}")

    def resumed(self, key: str, id: str) -> Assembly:
        return _Blocks(self, key, id)

    def ending(self, parts: int) -> int:
        return 1

    def copies_to(self, other: Store) -> bool:
        return isinstance(other, Azure) and other.account.service.url == self.account.service.url

    def source_of(self, key: str) -> tuple[str, dict[str, str]]:
        """What a copy is told to read: an address, and what goes with it. It may be read for an hour."""
        blob = self.account.service.get_blob_client(self.root.bucket, key)
        url = str(blob.url)
        if self.account.sas:
            return url, {}  # the client's address has it
        if self.account.key:
            until = datetime.now(timezone.utc) + _HOUR
            signed = generate_blob_sas(
                blob.account_name,
                self.root.bucket,
                key,
                account_key=self.account.key,
                permission=BlobSasPermissions(read=True),
                expiry=until,
            )
            return f"{url}?{signed}", {}
        return url, {"source_authorization": f"Bearer {self.account.bearer()}"} if self.account.bearer else {}


class _Blocks(Assembly):
    """An upload: blocks whose names begin with its own."""

    def __init__(self, store: Azure, key: str, id: str) -> None:
        self._store, self.key, self.id = store, key, id
        self._name, _, self._digest = id.partition("-")

    def _block(self, number: int) -> str:
        """The client encodes it; all names of a blob's blocks are of one length."""
        return f"{self._name}-{number:05d}"

    def put(self, number: int, data: bytes | bytearray) -> str:
        def asked() -> str:
            more = {"length": len(data), "validate_content": True}
            self._store.call(self.key, "stage_block", self._block(number), bytes(data), **more)
            meter.count(up=len(data))
            return self._block(number)

        return self._store.ask(asked, self._store.place(self.key), writing=True)

    def copy(self, number: int, source: Address, etag: str, start: int, nbytes: int) -> str:
        place = self._store.opened(source)
        assert isinstance(place, Azure)
        same = {"headers": {"x-ms-source-if-match": _quoted(etag)}} if etag else {}

        def asked() -> str:
            with _faults():  # an identity may give no token
                url, more = place.source_of(source.key)
            span = {"source_offset": start, "source_length": nbytes}
            self._store.call(self.key, "stage_block_from_url", self._block(number), url, **span, **more, **same)
            meter.count(inside=nbytes)
            return self._block(number)

        try:
            return self._store.ask(asked, source, writing=True, pass_on=True)
        except Fault as fault:
            if not fault.unknown:
                raise told(fault, str(source), writing=not fault.changed) from None
        # An account or an emulator that copies no ranges: the bytes take the way through here.
        return self.put(number, place.read(source.key, start, nbytes, etag))

    def parts(self) -> dict[int, HeldPart] | None:
        place = self._store.place(self.key)
        try:
            committed, held = self._store.ask(
                lambda: self._store.call(self.key, "get_block_list", "all"), place, pass_on=True
            )
        except Fault as fault:
            if fault.missing and fault.code != "NoSuchBucket":
                return {}  # an upload without a block is not known to Azure
            raise told(fault, str(place)) from None
        if any(self._number(one) is not None for one in committed):
            return None
        found = ((self._number(one), one) for one in held)
        return {number: HeldPart(int(one.size), self._block(number)) for number, one in found if number is not None}

    def _number(self, block: Any) -> int | None:
        """The number of a block of this upload; None of another's."""
        name = str(block.id)
        if "-" not in name:
            try:
                name = base64.b64decode(name, validate=True).decode()
            except ValueError:
                return None
        own, _, number = name.partition("-")
        return int(number) if own == self._name and number.isdecimal() else None

    def complete(self, etags: Mapping[int, str], *, absent: bool) -> str | None:
        blocks = [BlobBlock(block_id=self._block(number)) for number in sorted(etags)]
        more: dict[str, Any] = {"metadata": {MARK.replace("-", "_"): self._digest}} if self._digest else {}
        if absent:
            more |= {"match_condition": MatchConditions.IfMissing}
        place = self._store.place(self.key)
        try:
            found = self._store.ask(
                lambda: self._store.call(self.key, "commit_block_list", blocks, **more),
                place,
                writing=True,
                pass_on=True,
            )
        except Fault as fault:
            if (fault.changed and absent) or fault.code == "InvalidBlockList":
                return None
            raise told(fault, str(place), writing=True) from None
        return _etag(found.get("etag"))

    def abort(self) -> None:
        """Nothing: Azure drops the blocks. To drop them at once would show an empty blob for a moment, and take along the
        blocks of another run to the same name."""


class _faults:  # noqa: N801  (a context manager)
    """Turn what Azure's client raises into a `Fault`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, wrong.AzureError):
            return
        if isinstance(error, wrong.HttpResponseError) and error.status_code:
            named = getattr(error, "error_code", "") or ""  # a word, or of the client's list of words
            code = str(getattr(named, "value", named))
            status = 412 if code in _THERE else int(error.status_code)
            raise Fault(status, _detailed(str(error)) or _CODES.get(code, code)) from None
        if isinstance(error, wrong.ClientAuthenticationError):  # of the identity: it is none
            raise Fault(401, "NoCredentials") from None
        if isinstance(error, (wrong.ServiceRequestTimeoutError, wrong.ServiceResponseTimeoutError)):
            raise Fault(words="no answer in time") from None
        if isinstance(error, wrong.ServiceRequestError):
            raise Fault(words=NO_CONNECTION) from None
        cut = isinstance(error, wrong.IncompleteReadError)
        raise Fault(words="the body was cut short" if cut else "the connection failed") from None


def _detailed(said: str) -> str:
    """The word for what Azure says in the detail of an answer alone; its code is the same for any signature it refuses."""
    return next((word for words, word in _DETAILS.items() if words in said), "")


def _etag(said: Any) -> str:
    return str(said or "").strip('"')


def _quoted(etag: str) -> str:
    return f'"{etag}"'
