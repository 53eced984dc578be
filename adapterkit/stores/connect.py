"""Credentials and endpoints: found where each store's own tools look for them, and kept there.

S3: boto3's chain (``AWS_ACCESS_KEY_ID`` and so on, ``AWS_PROFILE``, ``~/.aws``, a role of the machine) and its endpoint
(``AWS_ENDPOINT_URL``, ``AWS_ENDPOINT_URL_S3``, ``endpoint_url`` of a profile); without any credentials, as anybody.
Google: its default credentials (``GOOGLE_APPLICATION_CREDENTIALS``, gcloud's own, the machine's), else as anybody. Azure:
``AZURE_STORAGE_CONNECTION_STRING``, or ``AZURE_STORAGE_ACCOUNT_NAME`` with a key, a signature or an identity, else as anybody.
The Hub: ``HF_TOKEN``, or what ``hf auth login`` left, else as anybody; ``HF_ENDPOINT``. None of them is stored, printed, or
part of a plan or a record.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from adapterkit.errors import UsageError
from adapterkit.packages import missing
from adapterkit.places import Address
from adapterkit.stores.faults import NO_CONNECTION, Fault
from adapterkit.stores.store import Store

# No attempts of the client's own: ours are counted.
_ONCE = {"max_retries": 0}
_WAIT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "600s"}
_DECIDE = ("AWS_", "GOOGLE_", "AZURE_", "STORAGE_", "CLOUDSDK_", "HF_")  # of names in the environment

_lock = threading.Lock()
_open: dict[Any, Store] = {}


def open_store(address: Address) -> Store:
    """The store of an address; the same one again while the environment is the same.

    Raises:
        UsageError: the extra is not installed, or the store's settings are not understood.
    """
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_DECIDE)))
    key = (address.scheme, address.bucket, os.getpid(), hash(settings))
    with _lock:
        if key not in _open:
            _open[key] = _OPENERS[address.scheme](Address(address.scheme, address.bucket, ""))
        return _open[key]


def _needed(what: str, error: ImportError) -> UsageError:
    said = missing(error.name or "obstore", f"{what} needs a client of object stores", "stores")
    said.__cause__ = error
    return said


def _s3(root: Address) -> Store:
    try:
        import boto3
        import botocore.exceptions
        from obstore.store import S3Store

        from adapterkit.stores.s3 import S3, client_of
    except ImportError as error:
        raise _needed(f"{root.scheme}://", error) from None
    try:
        made = client_of(boto3.session.Session(), root.bucket)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise UsageError(
            f"the settings for s3:// are not understood ({error})", "check the profile and AWS_*"
        ) from None

    def reader() -> Any:
        config = {"region": made.region, "virtual_hosted_style_request": not made.path_style}
        if made.endpoint:
            config["endpoint"] = made.endpoint
        if made.credentials is None:
            config["skip_signature"] = True
        provider = {"credential_provider": made.provide} if made.credentials is not None else {}
        options = {**_WAIT, "allow_http": made.endpoint.startswith("http://")}
        return S3Store(root.bucket, config=config, client_options=options, retry_config=_ONCE, **provider)

    return S3(root, made, reader)


def _gs(root: Address) -> Store:
    try:
        from adapterkit.stores.gcs import ENDPOINT, Gcs
        from adapterkit.stores.http import Http
    except ImportError as error:
        raise _needed(f"{root.scheme}://", error) from None
    http = Http()
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")  # as for Google's own clients
    if emulator:
        return Gcs(root, http, emulator if "://" in emulator else f"http://{emulator}")
    return Gcs(root, http, ENDPOINT, _google(root, http))


def _google(root: Address, http: Any) -> Callable[[bool], str] | None:
    """Makes the header of Google's default credentials; None where there are none."""
    try:
        import google.auth.exceptions
        import google.auth.transport.urllib3
    except ImportError as error:
        raise _needed(f"{root.scheme}://", error) from None
    try:
        found, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
    except google.auth.exceptions.DefaultCredentialsError:
        if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):  # named on purpose: not to be asked as anybody
            raise UsageError(
                "what GOOGLE_APPLICATION_CREDENTIALS names holds no credentials of Google", "correct it, or unset it"
            ) from None
        return None
    lock, asking = threading.Lock(), google.auth.transport.urllib3.Request(http.pool)

    def header(anew: bool) -> str:
        with lock:
            if anew or not found.valid:
                try:
                    found.refresh(asking)
                except google.auth.exceptions.TransportError:
                    raise Fault(words=NO_CONNECTION) from None
                except google.auth.exceptions.GoogleAuthError as error:
                    # What is signed here says when, and Google refuses it where that is not about now.
                    skewed = "reasonable timeframe" in str(error)
                    raise Fault(401, "RequestTimeTooSkewed" if skewed else "InvalidToken") from None
            return f"Bearer {found.token}"

    return header


def _az(root: Address) -> Store:
    try:
        from adapterkit.stores.azure import Azure, account
    except ImportError as error:
        raise _needed(f"{root.scheme}://", error) from None
    try:
        return Azure(root, account(), account, open_store)
    except ValueError as error:
        raise UsageError(
            f"the settings for {root.scheme}:// are not understood ({type(error).__name__})", "check AZURE_STORAGE_*"
        ) from None


def _hf(root: Address) -> Store:
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        from adapterkit.stores.hub import HubBucket
    except ImportError as error:
        raise _needed(f"{root.scheme}://buckets/", error) from None
    return HubBucket(root, lambda: build_hf_headers(library_name="adapterkit"), lambda: constants.ENDPOINT, open_store)


_OPENERS: dict[str, Callable[[Address], Store]] = {"s3": _s3, "gs": _gs, "az": _az, "hf": _hf}
