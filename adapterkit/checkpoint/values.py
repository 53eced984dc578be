"""What a plan says of the values in weight files on this machine, so that another copy of them is seen to be another.

A fingerprint holds the header, and a model that was trained further has the same one. An adapter is small, so all its bytes
are hashed. A base is not, so pieces of each file are: they tell of a base that was trained further, and need not tell of a
single value. XXH3-128 tells files apart that were made apart; it is not meant to stop someone who makes two alike on purpose.
An object in a store is known by its ETag, and a file of the Hub by its commit, downloaded or not; nothing of them is hashed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import LocalFile, Source, fingerprint

if TYPE_CHECKING:
    from pathlib import Path

WHOLE, PIECES, COMMIT = "all", "some", "commit"  # of a file, what was hashed, or whose it is on the Hub
COUNT, PIECE = 16, 4096  # pieces of a file, and bytes of one
BLOCK = 4 << 20


def known_by(source: Source, header: str | None = None) -> str:
    """What a plan says of a weight file: size, header, and what its values are known by.

    Args:
        header: its fingerprint, where that was made already.

    Raises:
        CheckpointError: the file changed since it was opened.
    """
    said = fingerprint(source) if header is None else header
    kind = COMMIT if source.commit else WHOLE if source.trained else PIECES
    values = _values(source, kind) if said.count(":") == 1 else ""
    return f"{said}:{values}" if values else said


def is_planned(source: Source, said: str) -> bool:
    """Whether a file has what a plan says of it. An object is known by its ETag, so nothing of it is read.

    Raises:
        CheckpointError: the file changed since it was opened.
    """
    if source.version:
        return said.startswith(f"{source.size}:") and said.endswith(f":{source.version}")
    header, _, values = said.rpartition(":")
    kind = values.partition("=")[0]
    if kind not in (WHOLE, PIECES, COMMIT):
        return fingerprint(source) == said
    return fingerprint(source) == header and _values(source, kind) == values


def _values(source: Source, kind: str) -> str:
    """What the values are known by; nothing where nothing tells of them."""
    if kind == COMMIT:
        return f"{kind}={source.commit}"
    if source.path is None or source.version:
        return ""
    found = _hash(source.path, LocalFile(source.path).seen.state, kind)
    source.check_unchanged()  # what was hashed is what was opened
    return f"{kind}={found}"


@functools.lru_cache(maxsize=4096)
def _hash(path: Path, state: tuple[int, ...], kind: str) -> str:
    """Of a file in a state; a worker asks for the same one with each part."""
    import xxhash

    file = LocalFile(path)
    digest = xxhash.xxh3_128()
    if kind == WHOLE or file.size <= COUNT * PIECE:
        for at in range(0, file.size, BLOCK):
            digest.update(file.read(at, BLOCK))
    else:
        for number in range(COUNT):
            digest.update(file.read((file.size - PIECE) * number // (COUNT - 1), PIECE))
    return str(digest.hexdigest())
