from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterkit.ui.server import PageServer


@pytest.fixture
def serve(home: Path) -> Iterator[Callable[[], str]]:
    """``serve()`` starts a server of the home and gives its address, without the last slash."""
    servers = []

    def start() -> str:
        server = PageServer(0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server.url.rstrip("/")

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
