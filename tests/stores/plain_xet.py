"""A store of bytes for buckets of the Hub that several processes use at one moment: files in a folder, by the sha256 of them.

hf_xet's own store in a folder (``local://``) serves one process. Everything else is real: huggingface_hub, the API's stand-in,
and what adapterkit does with both. ``python plain_xet.py FOLDER VERB ...`` is adapterkit with such a store.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any


class PlainXet:
    """As `adapterkit.stores.xet.Xet`."""

    folder = Path()

    def __init__(self, access: Any) -> None:
        self._access = access

    def forget(self) -> None:
        pass

    def read(self, hash: str, size: int | None, start: int, nbytes: int) -> bytes:
        self._access("read")
        path = self.folder / hash
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(start)
            return file.read(nbytes)

    def writer(self) -> PlainWriter:
        self._access("write")
        return PlainWriter(self.folder)

    def send(self, data: bytes) -> str:
        return keep(self.folder, data)


class PlainWriter:
    """As `adapterkit.stores.xet.XetWriter`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._data = folder, bytearray()

    def write(self, data: bytes | bytearray) -> None:
        self._data += data

    def finish(self, beside: bytes | None = None) -> tuple[str, str]:
        return keep(self._folder, bytes(self._data)), "" if beside is None else keep(self._folder, beside)

    def abort(self) -> None:
        pass


def keep(folder: Path, data: bytes) -> str:
    """Have bytes in the store; their hash."""
    name = hashlib.sha256(data).hexdigest() if data else "0" * 64
    own = folder / f"{name}.{os.getpid()}.{os.urandom(4).hex()}"
    own.write_bytes(data)
    own.rename(folder / name)
    return name


if __name__ == "__main__":
    import adapterkit.stores.faults
    import adapterkit.stores.hub
    from adapterkit.cli import main

    PlainXet.folder = Path(sys.argv[1])
    adapterkit.stores.hub.Xet = PlainXet  # type: ignore[misc,assignment]
    adapterkit.stores.faults.FIRST_PAUSE = 0.001
    main(sys.argv[2:])
