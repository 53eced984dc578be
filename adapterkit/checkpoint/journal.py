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

from adapterkit import disk
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

JOURNAL = ".journal.jsonl"
CLAIM, DONE, MADE = ".plan", ".done.", ".beside"  # what workers of one plan say in the folder; see `checkpoint.parts`
INPUTS = ".inputs."
_OF_PARTS = (DONE, INPUTS, ".journal.")


def block_digest(data: Any) -> bytes:
    """The hash of one block of bytes (anything with the buffer protocol)."""
    import xxhash

    return xxhash.xxh3_128_digest(data)


def tensor_digest(blocks: Iterable[bytes]) -> str:
    """The hash of a tensor, from the hashes of its blocks in order."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def forget_parts(folder: Path) -> None:
    """Take away what is said of parts in a hidden folder that a whole run works in from now on: it writes over their bytes."""
    for name in os.listdir(folder):
        if name in (CLAIM, MADE) or (name.startswith(_OF_PARTS) and name != JOURNAL):
            os.unlink(folder / name)


class Journal:
    """Append-only lines in the hidden folder; the first names the plan and the state of its inputs."""

    def __init__(self, folder: Path, identity: str, name: str = JOURNAL) -> None:
        self._folder, self._identity, self._name = folder, identity, name
        self._fd: int | None = None

    def read(self) -> dict[tuple[str, str], str]:
        """The digests by (file, tensor) that an earlier run of the same plan wrote; a torn last line is ignored."""
        lines = (disk.read_inside(self._folder, self._name) or b"").split(b"\n")
        if lines[0] != self._first():
            return {}
        found: dict[tuple[str, str], str] = {}
        for line in lines[1:-1]:
            try:
                entry = json_value(line)
                found[entry["file"], entry["tensor"]] = entry["digest"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def start(self) -> None:
        """Open for appending, beginning anew unless it already belongs to this plan."""
        before = disk.read_inside(self._folder, self._name) or b""
        fresh = not before.startswith(self._first() + b"\n")
        make = disk.open_new_inside if fresh else disk.open_kept_inside
        self._fd = make(self._folder, self._name)
        os.lseek(self._fd, 0, os.SEEK_END)
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
