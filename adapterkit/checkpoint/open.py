"""From what a user calls a checkpoint to its handles: a folder, a file, or a Hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.folder import read_file, read_folder
from adapterkit.checkpoint.listing import Listing, LocalFolder, read_json
from adapterkit.errors import NotFound, UnsafeError

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


def locate(ref: str | Path, *, headers_only: bool = False) -> Listing:
    """The files behind a reference: a local folder if there is one, else the Hub.

    Args:
        ref: a path, or ``org/name[/sub/folder][@revision]``.
        headers_only: for a Hub id, fetch weights by HTTP range as they are read instead of downloading them.

    Raises:
        NotFound: neither a path nor a Hub id.
        AuthError, HubError: the Hub said so.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return LocalFolder(path, str(ref))
    hub = parse_hub(str(ref))
    if hub is None or path.exists() or str(ref).startswith((".", "/", "~")):
        raise NotFound(f"{ref} does not exist", "give a folder or a Hub id like org/name")
    from adapterkit.checkpoint.hub import hub_listing

    return hub_listing(hub, headers_only=headers_only)


def open_checkpoint(ref: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open a checkpoint; no tensor is read.

    Args:
        ref: a folder, a safetensors file, or a Hub id ``org/name[@revision]``.
        headers_only: for a Hub id, read only the headers, by HTTP range.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    path = Path(ref).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UnsafeError(
                f"{ref} is not a safetensors file", "give a Hugging Face folder, a .safetensors or a .gguf file"
            )
        config = path.with_name("config.json")
        return read_file(LocalFile(path, str(ref)), read_json(LocalFile(config)) if config.is_file() else {})
    return read_folder(locate(ref, headers_only=headers_only))
