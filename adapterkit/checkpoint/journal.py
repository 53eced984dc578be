"""What an unfinished run has proved of itself, so that `--resume` can use it.

A run writes into a hidden folder beside its target. The journal in that folder gets one line per computed tensor once
all its bytes are written, with a hash over them. A later run trusts a line only after reading those bytes back and
finding the same hash; copied tensors are simply copied again. XXH3-128 guards against torn writes and lost pages, which
is what happens here, at memory speed; it is not meant to stop someone who edits the folder on purpose.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

JOURNAL = ".journal.jsonl"


def block_digest(data: Any) -> bytes:
    """The hash of one block of bytes (anything with the buffer protocol)."""
    import xxhash

    return xxhash.xxh3_128_digest(data)


def tensor_digest(blocks: Iterable[bytes]) -> str:
    """The hash of a tensor, from the hashes of its blocks in order."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


class Journal:
    """Append-only lines in the hidden folder; the first names the plan and the state of its inputs."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._fd: int | None = None

    def read(self) -> dict[tuple[str, str], str]:
        """The digests by (file, tensor) that an earlier run of the same plan wrote; a torn last line is ignored."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        if lines[0] != self._first():
            return {}
        found: dict[tuple[str, str], str] = {}
        for line in lines[1:-1]:
            try:
                entry = json.loads(line)
                found[entry["file"], entry["tensor"]] = entry["digest"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def start(self) -> None:
        """Open for appending, beginning anew unless it already belongs to this plan."""
        fresh = not self._path.exists() or not self._path.read_bytes().startswith(self._first() + b"\n")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
        self._fd = os.open(self._path, flags, 0o666)
        # A leading newline ends a line that a kill may have torn.
        os.write(self._fd, self._first() + b"\n" if fresh else b"\n")

    def add(self, file: str, tensor: str, digest: str) -> None:
        assert self._fd is not None
        os.write(self._fd, json.dumps({"file": file, "tensor": tensor, "digest": digest}).encode() + b"\n")

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _first(self) -> bytes:
        return json.dumps({"plan": self._identity}).encode()
