"""From what a user calls a checkpoint to its handles: a folder, a file, or a Hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.finders import FINDERS
from adapterkit.checkpoint.folder import read_file, read_folder
from adapterkit.checkpoint.listing import Listing, LocalFolder, read_json
from adapterkit.errors import NotFound, UnsafeError

_FILES = (".gguf", ".safetensors")  # of a file, never of a repository
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?P<sub>(?:/[\w.-]+)*)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubRef:
    """``org/name[/sub/folder][@revision]``."""

    repo: str
    subfolder: str = ""
    revision: str | None = None


def parse_hub(ref: str) -> HubRef | None:
    """The parts of a Hub id, or None when ``ref`` cannot be one."""
    found = _HUB.fullmatch(ref.removeprefix("hf://"))
    if found is None or ".." in ref:
        return None
    return HubRef(found["repo"], found["sub"].strip("/"), found["revision"])


@dataclass(frozen=True)
class Place:
    """A path, or a Hub id as text, and what to call it; ``file`` when a registry name means a single file."""

    place: str | Path
    shown: str
    file: Path | None = None


def place_of(ref: str | Path) -> Place:
    """A path if there is one, else what a registry name means, else the reference as it is.

    Raises:
        NotFound: a registered name without that version or alias.
    """
    text = str(ref)
    if isinstance(ref, Path) or "/" in text or Path(text).expanduser().exists():
        return Place(ref, text)
    for entry in FINDERS:
        module, _, function = entry.partition(":")
        found = getattr(import_module(module), function)(text)
        if found is not None:
            return Place(found.folder or found.hub, found.shown if found.folder else found.hub, found.file)
    return Place(ref, text)


def locate(ref: str | Path, *, headers_only: bool = False) -> Listing:
    """The files behind a reference: a local folder if there is one, else the registry, else the Hub.

    Args:
        ref: a path, a registry name ``name[@version|@alias]``, or ``org/name[/sub/folder][@revision]``.
        headers_only: for a Hub id, fetch weights by HTTP range as they are read instead of downloading them.

    Raises:
        NotFound: neither a path nor a Hub id.
        AuthError, HubError: the Hub said so.
    """
    if not str(ref).strip():
        raise NotFound("a reference is empty", "give a folder, a registry name or a Hub id like org/name")
    meant = place_of(ref)
    path = Path(meant.place).expanduser()
    if path.is_dir():
        return LocalFolder(path, meant.shown)
    hub = parse_hub(str(meant.place))
    if hub is None or path.exists() or str(ref).startswith((".", "/", "~")) or path.suffix in _FILES:
        raise NotFound(f"{ref} does not exist", "give a folder, a registry name or a Hub id like org/name")
    from adapterkit.checkpoint.hub import hub_listing

    return hub_listing(hub, headers_only=headers_only)


def open_checkpoint(ref: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open a checkpoint; no tensor is read.

    Args:
        ref: a folder, a safetensors file, a registry name, or a Hub id ``org/name[@revision]``.
        headers_only: for a Hub id, read only the headers, by HTTP range.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
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
        return read_file(LocalFile(path, meant.shown), read_json(LocalFile(config)))
    return read_folder(locate(ref, headers_only=headers_only))
