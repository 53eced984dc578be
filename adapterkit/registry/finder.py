"""Registry names where a path or Hub id is expected: from ``name[@version|@alias]`` to files that can be opened."""

from __future__ import annotations

from pathlib import Path

from adapterkit.checkpoint.finders import Found
from adapterkit.errors import NotFound
from adapterkit.registry import resolve
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.names import is_name
from adapterkit.registry.record import NOT_CONTENT, Record
from adapterkit.registry.remaking import is_recipe


def find(ref: str, *, home: Path | None = None) -> Found | None:
    """What ``ref`` means in the registry, or None when nothing there has that name.

    Raises:
        NotFound: the name is there, and not this version or alias of it; or its bytes are not.
        RegistryError: its record is damaged.
    """
    at = open_home(home)
    if not is_known(at, ref):
        return None
    record = resolve.find(at, ref)
    if any(file.stored for file in record.files) or is_recipe(record):
        folder = checkout(record.ref, home=home)
        return Found(record.ref, folder, _only_file(record, folder))
    if record.origin is not None:
        return Found(record.ref, hub=f"{record.origin.repo}@{record.origin.commit}")
    if record.identity is not None and record.identity.id and record.identity.commit:
        return Found(record.ref, hub=f"{record.identity.id}@{record.identity.commit}")
    raise NotFound(f"{record.ref} is a reference to a base without a Hub id", "give the folder of the base itself")


def is_known(at: Home, ref: str) -> bool:
    """Whether ``ref`` is a digest, or starts with a name that the registry has (its version may still not be there)."""
    name = ref.partition("@")[0]
    return ref.startswith("sha256:") or (is_name(name) and bool(at.versions(name)))


def _only_file(record: Record, folder: Path) -> Path | None:
    names = [file.path for file in record.files if file.path not in NOT_CONTENT]
    return folder / names[0] if len(names) == 1 else None
