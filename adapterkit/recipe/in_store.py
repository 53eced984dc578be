"""Inputs and outputs of a recipe that lie in stores: known by the sizes and ETags of their objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError
from adapterkit.places import Address
from adapterkit.recipe.input_names import names_beside, names_read
from adapterkit.recipe.state import BESIDE
from adapterkit.stores.files import stated, version_of

if TYPE_CHECKING:
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.stores.store import StoredObject
    from adapterkit.verbs.job import Job

SMALL = 4 << 20  # bytes of a file of which the digest is taken; the digests of weights are in the record beside them
_WEIGHTS = (".safetensors", ".gguf")


def states_of_file(address: Address) -> dict[str, str]:
    """What tells of a change of a file that is read whole.

    Raises:
        NotFound, AuthError, StoreError
    """
    return {address.name: version_of(address)}


def states_of(address: Address, *, adapter: bool) -> dict[str, str]:
    """What tells of a change of a model or an adapter: size and ETag of each object that a step reads, by its name.

    Raises:
        NotFound, CheckpointError, AuthError, StoreError
    """
    from adapterkit.checkpoint.objects import ObjectFolder, object_file

    head, _, part = address.key.rpartition("#")  # a part of a file
    address = replace(address, key=head) if part and PurePosixPath(head).suffix in _WEIGHTS else address
    found = object_file(address) if address.suffix in _WEIGHTS else None
    if found is None:
        listing: Listing = ObjectFolder(address)
        names = names_read(listing)
        return {name: stated((one := listing.open(name)).size, one.version) for name in sorted(names)}
    states = {address.name: stated(found.size, found.version)}
    for name in names_beside(address.name, adapter=adapter):
        other = object_file(address.with_name(name))
        if other is not None:
            states[name] = stated(other.size, other.version)
    return states


def check_pinned(address: Address, states: Mapping[str, str], job: Job) -> None:
    """See that what a job opened is what the build looked at before.

    Raises:
        CheckpointError: an object was replaced meanwhile.
    """
    folder = address.parent if address.name.partition("#")[0] in states else address
    own = {f"{folder}/{name}": state for name, state in states.items()}
    for source in job.sources:
        if source.name in own and own[source.name] != stated(source.size, source.version):
            raise CheckpointError(f"{source.name} changed after the build looked at it", "build again")


def present(out: Address, *, is_file: bool, names: Iterable[str]) -> dict[str, StoredObject]:
    """The objects of an output by their names, as `adapterkit.recipe.state.output_files` gives the files of one here."""
    from adapterkit.stores.connect import open_store

    store = open_store(out)
    if is_file:
        heads = {name: store.head((out.parent / name).key) for name in dict.fromkeys(names)}
        return {name: one for name, one in heads.items() if one is not None}
    beside = sorted({name.split("/")[1] for name in names if name.startswith(BESIDE)})
    folders = {"": out, **{f"{BESIDE}{name}/": out.with_name(name) for name in beside}}
    return {
        f"{lead}{one.key.removeprefix(f'{folder.key}/')}": one
        for lead, folder in folders.items()
        for one in store.entries(f"{folder.key}/")
    }


def states(found: Mapping[str, StoredObject]) -> dict[str, str]:
    """Size and ETag of objects by their names."""
    return {name: stated(one.size, one.etag) for name, one in found.items()}


def digests(out: Address, found: Mapping[str, StoredObject]) -> dict[str, str]:
    """What a lock says of an output: sha256 of small files, and of weights the size; the record beside them, which is one of
    the small files, holds the identity of the weights. ETags would differ between stores, and between two equal uploads."""
    from adapterkit.stores.connect import open_store

    store = open_store(out)
    said = {}
    for name, one in sorted(found.items()):
        small = one.size <= SMALL and not name.endswith(_WEIGHTS)
        data = store.read(one.key, 0, one.size, one.etag) if small else b""
        said[name] = hashlib.sha256(data).hexdigest() if small else f"{one.size} bytes"
    return said


def drop(out: Address, known: Mapping[str, str], gone: Sequence[str], *, is_file: bool) -> None:
    """Take away objects of an earlier output that lie beside this one and are not of it, where they are still as they were
    made."""
    from adapterkit.stores.connect import open_store

    store, found = open_store(out), {}
    for name in gone:
        if is_file or name.startswith(BESIDE):
            found[name] = store.head((out.parent / name.removeprefix(BESIDE)).key)
    keys = [one.key for name, one in found.items() if one is not None and stated(one.size, one.etag) == known.get(name)]
    if keys:
        store.delete(keys)
