"""From what a user calls a checkpoint to its handles: a folder, a file, or a Hub id."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.finders import place_of
from adapterkit.checkpoint.folder import ADAPTER_CONFIG, INDEX, SINGLE, read_file
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.listing import Listing, LocalFolder, read_json
from adapterkit.checkpoint.pipeline import read_listed
from adapterkit.errors import HubError, NotFound, UnsafeError, most_like
from adapterkit.places import address_of, readable

_FILES = (".gguf", ".safetensors")  # of a file, never of a repository


def locate(ref: str | Path, *, headers_only: bool = False) -> Listing:
    """The files behind a reference: a store's, a local folder if there is one, else the registry, else the Hub.

    Args:
        ref: a path, an address like ``s3://bucket/folder``, a registry name ``name[@version|@alias]``, or
            ``org/name[/sub/folder][@revision]``.
        headers_only: for a Hub id, fetch weights by HTTP range as they are read instead of downloading them.

    Raises:
        NotFound: neither a path nor a Hub id.
        AuthError, HubError, StoreError: the Hub or the store said so.
    """
    if not str(ref).strip():
        raise NotFound("a reference is empty", "give a folder, a registry name or a Hub id like org/name")
    address = address_of(ref)
    if address is not None:
        from adapterkit.checkpoint.objects import ObjectFolder

        return ObjectFolder(address)
    ref = readable(ref, "a reference")
    meant = place_of(ref)
    path = Path(meant.place).expanduser()
    if path.is_dir():
        return LocalFolder(path, meant.shown)
    hub = parse_hub(str(meant.place))
    if hub is None or path.exists() or str(ref).startswith((".", "/", "~")) or path.suffix in _FILES:
        raise _absent(str(ref), path)
    from adapterkit.checkpoint.hub import hub_listing

    try:
        return hub_listing(hub, headers_only=headers_only)
    except (HubError, NotFound) as error:
        near = _beside(path) if path.parent.name else ""
        if near:  # meant as a path, perhaps
            error.hint = f"{error.hint}; or, of the folders here, did you mean {near}?"
        raise


def _absent(ref: str, path: Path) -> NotFound:
    """What to say of a path where no checkpoint is: the folder of a file, or the name beside it that is most like it."""
    if path.is_file():
        return NotFound(f"{ref} is a file that holds no tensors that are read here", f"give its folder, {path.parent}")
    near = _beside(path)
    hint = f"did you mean {near}?" if near else "give a folder, a registry name or a Hub id like org/name"
    return NotFound(f"{ref} does not exist", hint)


def _beside(path: Path) -> str:
    """The path in the same folder that is most like one which is not there; empty where none is."""
    try:
        names = [one.name for one in itertools.islice(path.parent.iterdir(), 2000)]
    except OSError:
        return ""
    near = most_like(path.name, names)
    return str(path.with_name(near)) if near else ""


def is_model(ref: str | Path, *, headers_only: bool = False) -> bool:
    """Whether a folder or Hub id holds a whole model and no adapter, as far as names of files tell.

    Raises:
        NotFound, AuthError, HubError: see `locate`.
    """
    meant = place_of(ref)
    if (meant.file or Path(meant.place).expanduser()).is_file() or "#" in str(ref):
        return False
    names = locate(ref, headers_only=headers_only).names
    return {"config.json"} <= names and ADAPTER_CONFIG not in names and bool({SINGLE, INDEX} & names)


def open_checkpoint(ref: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open a checkpoint; no tensor is read.

    Args:
        ref: a folder or a safetensors file, here or in a store, a registry name, or a Hub id ``org/name[@revision]``.
        headers_only: for a Hub id, read only the headers, by HTTP range.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError, StoreError
    """
    if is_object(ref, _FILES):
        return _object(ref)
    meant = place_of(ref)
    path = meant.file or Path(meant.place).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UnsafeError(
                f"{ref} is not a safetensors file", "give a Hugging Face folder, a .safetensors or a .gguf file"
            )
        config = path.with_name("config.json")
        if not config.is_file():
            return read_file(LocalFile(path, meant.shown, loose=True), {})  # what lies beside it is not its own
        weights, said = LocalFile(path, meant.shown), LocalFile(config)
        weights.beside = (said.seen,)
        return read_file(weights, read_json(said))
    listing = locate(ref, headers_only=headers_only)
    return read_listed(listing)


def is_object(ref: str | Path, suffixes: Sequence[str]) -> bool:
    """Whether a reference is the address of a file in a store with one of these endings."""
    address = address_of(ref)
    return address is not None and address.suffix in suffixes


def _object(ref: str | Path) -> Checkpoint:
    """A safetensors file in a store, with the config beside it."""
    from adapterkit.checkpoint.objects import object_file

    address = address_of(ref)
    found = object_file(ref, loose=True)
    if address is None or found is None:
        raise NotFound(f"{ref} does not exist", "check the bucket, the name and the endpoint")
    if address.suffix != ".safetensors":
        raise UnsafeError(
            f"{ref} is not a safetensors file", "give a Hugging Face folder, a .safetensors or a .gguf file"
        )
    config = object_file(address.with_name("config.json"))
    found.beside = () if config is None else (config,)
    return read_file(found, {} if config is None else read_json(config))
