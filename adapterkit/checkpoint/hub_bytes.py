"""Bytes from the Hub are held against the digests that the Hub states of a commit, whichever verb reads them.

huggingface_hub compares sizes. A storage host, a proxy or a damaged cache can send other bytes of the same size, and a record
that names the commit would then be untrue. So every file is hashed once; that it was right is remembered by its size, times
and inode in the user's cache folder, so that the next run does not read it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from adapterkit import disk
from adapterkit.errors import CheckFailed
from adapterkit.foreign import json_value

UNCHECKED = "ADAPTERKIT_NO_VERIFY_DOWNLOAD"
_PARALLEL = 4
_MOST = 20_000  # files that are remembered
_SETTLED = 100_000_000  # nanoseconds after which a change of a file shows in its times
_WEIGHTS = (".safetensors", ".gguf")
_wanted: bool | None = None


class Stated(NamedTuple):
    """What the Hub says of a file: the sha256 of a large one, the git blob id of a small one; empty where it says nothing."""

    sha256: str = ""
    git: str = ""


def set_verify_downloads(wanted: bool | None) -> None:
    """Whether files from the Hub are checked from now on, in this process.

    With None, as at first, they are unless ``$ADAPTERKIT_NO_VERIFY_DOWNLOAD`` is set.
    """
    global _wanted
    _wanted = wanted


def wanted() -> bool:
    """Whether files from the Hub are checked."""
    return os.environ.get(UNCHECKED, "") in ("", "0") if _wanted is None else _wanted


def cached_digest(path: Path) -> str:
    """The sha256 by which huggingface_hub's cache calls a large file; empty for any other."""
    name = path.resolve().name
    return name if path.is_symlink() and len(name) == 64 else ""


def stated_of(siblings: Any) -> dict[str, Stated]:
    """The digests in an answer of the Hub about the files of a commit (``files_metadata=True``)."""
    found = {}
    for one in siblings or ():
        lfs = getattr(one, "lfs", None)
        found[str(one.rfilename)] = Stated(str(getattr(lfs, "sha256", None) or ""), str(one.blob_id or ""))
    return found


def check_bytes(what: str, commit: str, files: Mapping[str, Path], stated: Mapping[str, Stated]) -> None:
    """Hold downloaded files against what the Hub states of them.

    Args:
        what: the repository, for messages.
        files: where they lie, by name in the repository.
        stated: what the Hub says of them. Of a file that it says nothing about, the name in huggingface_hub's cache is
            believed, which is the digest that it was downloaded by.

    Raises:
        CheckFailed: the bytes of a file are not those of the commit, or nothing says what those of a weight file are.
    """
    if not wanted():
        return
    memory = _Memory()
    with ThreadPoolExecutor(_PARALLEL) as pool:
        tasks = [
            pool.submit(_check, memory, f"{what}/{name}", commit, path, stated.get(name, Stated()))
            for name, path in files.items()
        ]
        try:
            for task in tasks:
                task.result()
        finally:
            memory.save()


def git_blob(path: Path) -> str:
    """The id that git gives the content of a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(memory: _Memory, what: str, commit: str, path: Path, stated: Stated) -> None:
    real = path.resolve()
    sha256 = stated.sha256 or ("" if stated.git else cached_digest(path))
    if not sha256 and not stated.git:
        if what.endswith(_WEIGHTS):
            hint = "use a Hub that does, or accept it with --no-verify-download"
            raise CheckFailed(f"the Hub states no digest of {what}", hint)
        return
    if memory.digest(real, sha256=bool(sha256)) != (sha256 or stated.git):
        hint = f"remove {real} and download it again"
        raise CheckFailed(f"the bytes of {what} are not those of commit {commit[:7]}", hint)


class _Memory:
    """Digests of files by their state on disk, in the user's cache folder."""

    def __init__(self) -> None:
        self._path = _cache() / "hub-files.json"
        self._known: dict[str, list[Any]] = {}
        self._new = False
        try:
            found = json_value(disk.read_inside(self._path.parent, self._path.name) or b"{}")
            self._known = {str(name): list(entry) for name, entry in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # nothing is known, then

    def digest(self, path: Path, *, sha256: bool) -> str:
        name = f"{'sha256' if sha256 else 'git'}:{path}"
        before = _state(path)
        known = self._known.get(name)
        if known is not None and known[:-1] == before:
            return str(known[-1])
        digest = disk.hash_file(path)[0] if sha256 else git_blob(path)
        if _state(path) == before and time.time_ns() - max(before[1], before[2]) > _SETTLED:
            self._known[name] = [*before, digest]
            self._new = True
        return digest

    def save(self) -> None:
        if not self._new:
            return
        there = [(name, entry) for name, entry in self._known.items() if os.path.exists(name.partition(":")[2])]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            disk.write_file(self._path, json.dumps(dict(there[-_MOST:])).encode())
        except OSError:
            pass  # A cache that cannot be written only costs time.


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "adapterkit"
