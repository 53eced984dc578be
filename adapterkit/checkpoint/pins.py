"""What a plan says of the small files that are read with weights, and copied beside them: configs, an index, a tokenizer.

A config says what numbers mean (the scale of an adapter, the heads of an attention), so parts that were computed under two
of them would be no model. A file on a disk is pinned by its bytes, so that its copy on another machine is the same file; an
object in a store by its ETag.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import FirstSeen, LocalFile, Source
from adapterkit.errors import CheckpointError, NotFound
from adapterkit.places import address_of
from adapterkit.stores.connect import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

WHOLE = 64 << 20  # bytes of a file that is hashed whole; of a larger one both ends are
END = 1 << 20
AGAIN = "make the plan again"


def pins_of(sources: Iterable[Source]) -> dict[str, str]:
    """By name, the pins of the small files that were read with these weight files, sorted.

    Raises:
        CheckpointError: one changed since it was read.
    """
    found: dict[str, str] = {}
    for source in sources:
        for one in source.beside:
            if one.name not in found:
                found[one.name] = pin(one)
    return dict(sorted(found.items()))


def pin(one: FirstSeen | Source) -> str:
    """What tells that a file is still the same one."""
    if isinstance(one, Source):
        return _of_object(one.size, one.version)
    said = _of_file(one.path)
    one.check_unchanged()  # what was hashed is what was read
    return said


def _of_object(size: int, etag: str) -> str:
    return f"{size}:{etag}"


def _of_file(path: Path) -> str:
    file = LocalFile(path)
    ranges = [(0, file.size)] if file.size <= WHOLE else [(0, END), (file.size - END, END)]
    digest = hashlib.sha256()
    for offset, length in ranges:
        digest.update(file.read(offset, length))
    return f"{file.size}:{digest.hexdigest()}"


def check_pins(pins: Mapping[str, str]) -> None:
    """See that the small files of a plan are what they were, as far as their names say where they lie.

    Raises:
        CheckpointError: one changed, or is gone; it is named.
        AuthError, StoreError
    """
    there: dict[str, dict[str, str]] = {}
    for name, said in pins.items():
        address = address_of(name)
        if address is not None:
            folder = str(address.parent)
            if folder not in there:
                store, prefix = open_store(address), address.parent.key
                entries = store.entries(f"{prefix}/" if prefix else "")
                there[folder] = {one.key: _of_object(one.size, one.etag) for one in entries}
            now = there[folder].get(address.key)
        elif os.path.isfile(name):
            now = _of_file(Path(name))
        elif os.path.isabs(name):
            now = None
        else:
            continue  # of the Hub, a registry, or another folder than the one where the plan was made
        if now is None:
            raise NotFound(f"{name} is gone since the plan was made", AGAIN)
        if now != said:
            raise CheckpointError(f"{name} changed since the plan was made", AGAIN)


def unseen(pins: Mapping[str, str]) -> bool:
    """Whether some names of pins do not say where their files lie: of the Hub, say. Those are seen when they are opened."""
    return any(address_of(name) is None and not os.path.isabs(name) and not os.path.isfile(name) for name in pins)


def compare(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """See that two sets of inputs, by name what is known of each, are the same.

    Raises:
        CheckpointError: one changed, came, or went; it is named.
    """
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        how = "was not there when" if name not in before else "is gone since" if name not in now else "changed since"
        raise CheckpointError(f"{name} {how} the plan was made", AGAIN)
