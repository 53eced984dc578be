"""What a signature is about: a folder, a file with what lies beside it, or a registered version, each as a list of files.

Everything under a folder counts, hidden files and a ``.git`` too; of a file, what bears its name (``OUT.gguf.Modelfile``).
The signature itself and the signed statements are left out: they prove themselves.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.errors import NotFound, RegistryError, UnsafeError, UsageError, option
from adapterkit.places import Address, writable
from adapterkit.provenance.attest import NAME as STATEMENT
from adapterkit.registry import blobs, resolve
from adapterkit.registry.beside import beside_path, read_beside
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import BESIDE, FileEntry, Record
from adapterkit.stores.files import copied

__all__ = ["ENVELOPES", "SIGNATURE", "STATEMENT", "Signable", "entries", "signable"]

SIGNATURE = "model.sig"
ENVELOPES = "adapterkit.intoto.jsonl"
_PROVEN = (SIGNATURE, ENVELOPES)


@dataclass(frozen=True)
class Signable:
    """What is signed, or held against a signature.

    Attributes:
        said: how sentences name it.
        model: the folder or file that model-signing hashes.
        files: every file but the record and the two that prove themselves, by its name in the folder.
        record: what ``adapterkit.json`` or the registry says; ``beside`` is the file of it, and ``damaged`` why that
            cannot be read.
        signature, envelopes: where they lie, or would.
        links: whether the files are links to blobs.
        left_out: what the user said not to look at, as far as it is there.
        version: the record of a registered version.
        stored: where it lies, of a copy of what a store has.
    """

    said: str
    model: Path
    files: Mapping[str, Path]
    record: Record | None
    beside: Path | None
    signature: Path | None
    envelopes: Path | None
    links: bool = False
    left_out: tuple[str, ...] = ()
    version: Record | None = None
    own: str = ""
    damaged: str = ""
    stored: Address | None = None

    def place_of(self, path: Path) -> Path | Address:
        """Where a file beside it lies: here, or in its store."""
        if self.stored is None:
            return path
        return self.stored.parent / path.name if self.own else self.stored / path.name

    def name_of(self, resource: str) -> str:
        """The name of a file by what model-signing calls it: a lone file is ``.``"""
        return self.own if resource == "." and self.own else resource


@contextmanager
def signable(
    target: str | Path | Address, *, ignore: Sequence[str] = (), home: Path | None = None
) -> Iterator[Signable]:
    """What a path or a reference means.

    Args:
        ignore: files and folders inside it that are not looked at.

    Raises:
        NotFound: there is no such path or version, or bytes of it are not here.
        UsageError: it is a reference to a base, which has no files; or ``ignore`` names what is not in there.
        UnsafeError: a pipe, a device or a socket lies among the files.
        RegistryError
    """
    place = writable(target, "what is signed")
    if isinstance(place, Address):
        with copied(place) as here:
            found = _of_folder(here) if here.is_dir() else _of_file(here)
            yield _kept(replace(found, said=str(place), stored=place), ignore)
        return
    path = place.expanduser()
    if path.exists():
        yield _kept(_of_folder(path) if path.is_dir() else _of_file(path), ignore)
        return
    if isinstance(target, Path) or os.sep in str(target):
        raise NotFound(f"{target} does not exist", "give a folder, a file or a registry name")
    at = open_home(home)
    record = resolve.find(at, str(target))
    with tempfile.TemporaryDirectory(prefix="adapterkit-sign-") as folder:
        yield _kept(_of_version(at, record, Path(folder)), ignore)


def _of_folder(path: Path) -> Signable:
    files = {}
    for folder, names, found in os.walk(path):
        inside = Path(folder).relative_to(path)
        for name in sorted([*found, *(name for name in names if Path(folder, name).is_symlink())]):
            relative = (inside / name).as_posix()
            if relative not in (*_PROVEN, BESIDE):
                files[relative] = _plain(Path(folder, name))
    record, beside, damaged = _beside(path)
    return Signable(str(path), path, files, record, beside, path / SIGNATURE, path / ENVELOPES, damaged=damaged)


def _of_file(path: Path) -> Signable:
    record, beside, damaged = _beside(path)
    proven = [f"{path.name}.{name}" for name in (*_PROVEN, BESIDE)]
    names = [name for name in sorted(os.listdir(path.parent or Path())) if name.startswith(f"{path.name}.")]
    files = {name: _plain(path.parent / name) for name in (path.name, *names) if name not in proven}
    signature, envelopes = (path.with_name(f"{path.name}.{name}") for name in _PROVEN)
    return Signable(str(path), path, files, record, beside, signature, envelopes, own=path.name, damaged=damaged)


def _beside(path: Path) -> tuple[Record | None, Path | None, str]:
    """The record beside an output, its file, and why that cannot be read."""
    place = beside_path(path)
    if not os.path.lexists(place):
        return None, None, ""
    _readable(_plain(place))
    try:
        return read_beside(path), place, ""
    except RegistryError as error:
        return None, place, error.message


def _of_version(at: Home, record: Record, folder: Path) -> Signable:
    """The files of a version under their names: a folder of links, named like the version."""
    model = folder / f"{record.name}-{record.version}"
    files = {}
    for file in record.files:
        if file.path in _PROVEN:
            continue
        if not file.stored or not blobs.has(at, file.sha256, file.size):
            raise NotFound(f"{record.ref} has no bytes of {file.path} here", "pull it, or run fsck")
        place = model / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(at.blob(file.sha256).absolute())
        files[file.path] = place
    if not files:
        raise UsageError(f"{record.ref} holds no files to sign", "a base is a reference; sign what lies at hand")
    own = {file.path: at.blob(file.sha256) for file in record.files if file.path in _PROVEN}
    return Signable(
        record.ref, model, files, record, None, own.get(SIGNATURE), own.get(ENVELOPES), links=True, version=record
    )


def _plain(path: Path) -> Path:
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise UnsafeError(f"{path} is no file, and cannot be signed", "take it out of the folder")
    return path


def _readable(path: Path) -> Path:
    """
    Raises:
        UnsafeError: it is a link to something else than a file: a pipe, a device, a folder, nothing.
    """
    if not path.is_file():
        raise UnsafeError(f"{path} is a link that leads to no file", "take it out of the folder")
    return path


def _kept(found: Signable, ignore: Sequence[str]) -> Signable:
    """Without what the user said not to look at."""
    out: list[str] = []
    for one in ignore:
        name = one.rstrip("/")
        inside = [file for file in found.files if file == name or file.startswith(f"{name}/")]
        if not inside and (name != BESIDE or (found.record is None and found.beside is None)):
            raise UsageError(f"{found.said} holds no {one}", f"leave out {option('ignore', one)}")
        out += inside or [name]
    kept = {name: path for name, path in found.files.items() if name not in out}
    return replace(found, files=kept, left_out=tuple(ignore)) if out else found


def entries(found: Signable, known: Mapping[str, str]) -> list[FileEntry]:
    """The files with their sha256: those that are known already, the others by reading them.

    Raises:
        UnsafeError: one is a link that leads to no file.
    """
    from adapterkit import disk

    made = []
    for name, path in found.files.items():
        digest, size = (known[name], path.stat().st_size) if name in known else disk.hash_file(_readable(path))
        made.append(FileEntry(name, size, digest))
    return made
