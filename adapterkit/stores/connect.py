"""Credentials and endpoints: found where each store's own tools look for them, and kept there.

S3: boto3's chain (``AWS_ACCESS_KEY_ID`` and so on, ``AWS_PROFILE``, ``~/.aws``, a role of the machine) and its endpoint
(``AWS_ENDPOINT_URL``, ``AWS_ENDPOINT_URL_S3``, ``endpoint_url`` of a profile); without any credentials, as anybody.
Google: its default credentials (``GOOGLE_APPLICATION_CREDENTIALS``, gcloud's own). Azure: ``AZURE_STORAGE_ACCOUNT_NAME``
with a key, a token or an identity. None of them is stored, printed, or part of a plan or a record.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from adapterkit.errors import UsageError
from adapterkit.packages import missing
from adapterkit.places import Address
from adapterkit.stores.objects import ObjectStore
from adapterkit.stores.store import Store

# No attempts of the client's own: ours are counted.
_ONCE = {"max_retries": 0}
_WAIT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "600s"}
_DECIDE = ("AWS_", "GOOGLE_", "AZURE_")  # of names in the environment

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


def _through(name: str) -> Callable[[Address], Store]:
    def opened(root: Address) -> Store:
        try:
            import obstore.store
        except ImportError as error:
            raise _needed(f"{root.scheme}://", error) from None
        made = getattr(obstore.store, name)

        def client() -> Any:
            return made(root.bucket, client_options=_WAIT, retry_config=_ONCE)

        try:
            return ObjectStore(root, client(), client)
        except Exception as error:  # of obstore's own kinds, one for each setting
            if type(error).__module__.partition(".")[0] not in ("obstore", "builtins"):
                raise
            raise UsageError(
                f"the settings for {root.scheme}:// are not understood ({type(error).__name__})",
                "check the credentials in the environment",
            ) from None

    return opened


_OPENERS: dict[str, Callable[[Address], Store]] = {
    "s3": _s3,
    "gs": _through("GCSStore"),
    "az": _through("AzureStore"),
}
