"""`pull`: a repository on the Hub becomes a version in the registry, with every byte checked.

The revision is resolved to its commit first, by asking the Hub and no cache; the digests of all files come with that
answer, and the download has to have them.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.checkpoint.hub import hub_errors, repo_info
from adapterkit.checkpoint.hub_bytes import git_blob
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.errors import CheckFailed, HubError, NotFound, OutputError, UsageError, size
from adapterkit.hub.files import allowed
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.names import check_path, name_or_from
from adapterkit.registry.record import BESIDE, Origin, Record
from adapterkit.registry.register import register

PARALLEL = 8


@dataclass(frozen=True)
class Pulled:
    """``record`` as registered; ``new`` is False when it was there; ``left_out`` was not fetched."""

    record: Record
    repo: str
    commit: str
    new: bool
    stored: int
    left_out: tuple[str, ...]


def pull(ref: str, *, name: str = "", ignore_record: bool = False, home: Path | None = None) -> Pulled:
    """Register what a repository holds at a revision.

    Args:
        ref: ``org/name[@revision]``.
        name: of the registry entry; by default the repository's.
        ignore_record: do not use the repository's ``adapterkit.json``.

    Raises:
        CheckFailed: bytes that are not those of the commit, or a record that is about other files.
        HubError: the Hub cannot be reached, also in offline mode: no cache is believed.
        AuthError, NotFound, UsageError, OutputError, RegistryError
    """
    from huggingface_hub import constants

    hub = parse_hub(ref)
    if hub is None or hub.subfolder:
        raise UsageError(f"'{ref}' is not a repository", "give it as org/name or org/name@revision")
    name = name_or_from(name, hub.repo.rpartition("/")[2], hub.repo)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{ref} cannot be pulled while the Hub is switched off", "unset HF_HUB_OFFLINE")
    with hub_errors(ref):
        info = repo_info(hub.repo, hub.revision)
    commit = str(info.sha)
    siblings = {check_path(s.rfilename, ref): s for s in info.siblings or ()}
    wanted = [path for path in siblings if allowed(path) or path == BESIDE]
    if not any(path.endswith((".safetensors", ".gguf")) for path in wanted):
        raise NotFound(f"{ref} holds no safetensors or GGUF weights", "check the repository's files")
    at = open_home(home)
    at.create()
    folder = pulling_folder(at, sum(siblings[path].size or 0 for path in wanted), ref)
    try:
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda path: _fetch(hub.repo, commit, path, siblings[path], folder), wanted))
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        found = register(
            folder, name, origin=Origin(hub.repo, commit), link=True, ignore_beside=ignore_record, home=home
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    left = tuple(sorted(set(siblings) - set(wanted)))
    return Pulled(found.record, hub.repo, commit, found.new, found.stored, left)


def _fetch(repo: str, commit: str, path: str, sibling: Any, folder: Path) -> None:
    """One file into the folder.

    Raises:
        CheckFailed: its bytes are not those that the commit names.
    """
    import huggingface_hub as hf

    shown = f"{repo}/{path}"
    with hub_errors(shown):
        local = Path(hf.hf_hub_download(repo, path, revision=commit, local_dir=folder))
    if local.is_symlink() or not local.resolve().is_relative_to(folder.resolve()):
        raise CheckFailed(f"{shown} was not downloaded as a plain file", "try again")
    if sibling.lfs is not None:
        right = disk.hash_file(local)[0] == sibling.lfs.sha256
    else:
        right = git_blob(local) == sibling.blob_id
    if not right:
        raise CheckFailed(f"the bytes of {shown} are not those of commit {commit[:7]}", "pull it again")


def pulling_folder(at: Home, nbytes: int, ref: str) -> Path:
    """A folder on the disk of the registry, so that files become blobs by a link; those of killed pulls are taken away."""
    top = at.room_to_pull()
    with disk.writing("a download", at.root):
        free = shutil.disk_usage(top).free
        if nbytes > free:
            raise OutputError(f"{ref} takes {size(nbytes)} and {at.root} has {size(free)} free", "free some space")
        return Path(tempfile.mkdtemp(dir=top))
