"""Identities of checkpoints: from a local folder, a registered version, or the Hub, where bytes come by HTTP range.

What costs nothing is always there: the commit of a Hub id, digests that a registry keeps in its file names, names and
shapes from the headers. Bytes are read as far as asked for.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit import disk
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.errors import CheckpointError
from adapterkit.registry.identity import Identity, Tensor, identify, probed, windows
from adapterkit.registry.names import is_repo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source

PARALLEL = 16  # requests at a time, where bytes come from the Hub or a store
CLOSE = 64 << 10  # bytes between two windows that one request reads
FEW = 1000  # tensors of a checkpoint in a store that are sampled one and all
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def identity_of(checkpoint: Checkpoint, upto: str = "probe", *, hub_files: bool = False) -> Identity:
    """The identity of a checkpoint as it is stored.

    Args:
        checkpoint: as opened, not a view that computes.
        upto: ``skeleton`` reads nothing but headers, ``probe`` at most 512 KiB, ``sampled`` 16 KiB a tensor, ``merkle``
            every byte; that also hashes the weight files as they are, where they are local.
        hub_files: ask the Hub for the sha256 of the weight files (one request).

    Raises:
        CheckpointError: a tensor is no byte range of a file, or the file is truncated.
        AuthError, HubError: the Hub said so.
    """
    known = _known(checkpoint)
    if hub_files and not known.files and known.id and known.commit:
        from adapterkit.checkpoint.hub import file_digests

        digests = file_digests(known.id, known.commit)
        files = {name: digests[path] for name, path in _hub_paths(checkpoint).items() if path in digests}
        known = replace(known, files=tuple(files.items()) if len(files) == len(checkpoint.sources) else ())
    if upto == "merkle" and not known.files:
        local = [source.path for source in checkpoint.sources if source.path is not None]
        if len(local) == len(checkpoint.sources):
            known = replace(known, files=tuple((path.name, disk.hash_file(path)[0]) for path in local))
    rows = tensor_rows(checkpoint)
    if upto == "skeleton":
        return identify(rows, None, upto, known)
    reader = _Reader(checkpoint)
    if any(source.path is None for source in checkpoint.sources):
        reader.fetch(probed(rows) if upto == "probe" else rows)
    return identify(rows, reader, upto, known)


def cheap(checkpoint: Checkpoint) -> str:
    """The level that costs little: windows of every tensor where reading is a seek, or a request of a model in a store that
    has not too many; of a few elsewhere; and headers alone where tensors are computed."""
    if any(tensor.extent is None for tensor in checkpoint.values()):
        return "skeleton"
    near = all(source.path is not None for source in checkpoint.sources)
    stored = all(source.path is not None or source.version for source in checkpoint.sources)
    return "sampled" if near or (stored and len(checkpoint) <= FEW) else "probe"


def tensor_rows(checkpoint: Checkpoint) -> list[Tensor]:
    """``(name, dtype code, shape, nbytes)`` of every tensor, from headers alone."""
    return [(name, tensor.dtype.code, tensor.shape, tensor.nbytes) for name, tensor in checkpoint.items()]


class _Reader:
    """``read(name, offset, length)`` over a checkpoint; windows fetched ahead are served from memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._ahead: dict[tuple[str, int, int], bytes] = {}

    def __call__(self, name: str, offset: int, length: int) -> bytes:
        held = self._ahead.get((name, offset, length))
        return self._read(name, offset, length) if held is None else held

    def _read(self, name: str, offset: int, length: int) -> bytes:
        extent = self._checkpoint[name].extent
        if extent is None:
            raise CheckpointError(f"'{name}' of {self._checkpoint.ref} is computed and has no bytes of its own")
        return extent.source.read(extent.offset + offset, length)

    def fetch(self, rows: Iterable[Tensor]) -> None:
        """Read the windows of these tensors at the same time, those that lie close together at once."""
        near = near_windows(self._checkpoint, rows)
        with ThreadPoolExecutor(PARALLEL) as pool:
            read = pool.map(lambda one: one.source.read(one.start, one.stop - one.start), near)
            for one, data in zip(near, read, strict=True):
                for key, at in one.windows:
                    self._ahead[key] = data[at - one.start : at - one.start + key[2]]


@dataclass
class NearWindows:
    """Windows of one file that are read in one request; each with its place in the file."""

    source: Source
    start: int
    stop: int
    windows: list[tuple[tuple[str, int, int], int]]


def near_windows(checkpoint: Checkpoint, rows: Iterable[Tensor]) -> list[NearWindows]:
    wanted = []
    for name, _, _, nbytes in rows:
        extent = checkpoint[name].extent
        if extent is None:
            raise CheckpointError(f"'{name}' of {checkpoint.ref} is computed and has no bytes of its own")
        wanted += [
            (extent.source.name, extent.offset + offset, (name, offset, length), extent.source)
            for offset, length in windows(nbytes)
        ]
    found: list[NearWindows] = []
    for _, at, key, source in sorted(wanted, key=lambda one: one[:3]):
        last = found[-1] if found else None
        if last is not None and last.source is source and at - last.stop <= CLOSE:
            last.stop = max(last.stop, at + key[2])
            last.windows.append((key, at))
        else:
            found.append(NearWindows(source, at, at + key[2], [(key, at)]))
    return found


def _known(checkpoint: Checkpoint) -> Identity:
    """What the place of the files tells: Hub id and commit, digests in the names of blobs."""
    repo, commit = "", ""
    hub = parse_hub(checkpoint.ref) if checkpoint.commit else None
    if hub is not None and not hub.subfolder and is_repo(hub.repo):
        repo, commit = hub.repo, checkpoint.commit or ""
    digests = {}
    for source in checkpoint.sources:
        if source.path is None:
            continue
        if not repo:
            repo, commit = _cached(source.path)
        real = source.path.resolve()
        # A registry checked the bytes of a blob against its name; a Hugging Face cache only their number.
        if source.path.is_symlink() and _SHA256.fullmatch(real.name) and real.parent.parent.name == "sha256":
            digests[source.path.name] = real.name
    whole = len(digests) == len(checkpoint.sources)
    return Identity(repo, commit if _COMMIT.fullmatch(commit) else "", tuple(digests.items()) if whole else ())


def _cached(path: Path) -> tuple[str, str]:
    """Hub id and commit of a file in a Hugging Face cache: ``models--org--name/snapshots/<commit>/...``."""
    folder = path.absolute().parent
    for _ in range(3):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            repo = "/".join(folder.parent.parent.name.split("--")[1:])
            return (repo, folder.name) if is_repo(repo) else ("", "")
        folder = folder.parent
    return "", ""


def _hub_paths(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Weight file to its path in the repository."""
    hub = parse_hub(checkpoint.ref)
    prefix = f"{hub.subfolder}/" if hub is not None and hub.subfolder else ""
    return {file: prefix + file for file in dict.fromkeys(checkpoint.shards.values())}
