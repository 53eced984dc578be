"""Signatures by OpenSSF model-signing (the extra ``sign``): with a key of one's own, offline.

What is signed are the files that make the artefact what it is: weights, configuration, tokenizer. Cards, records and the
signature itself are left out (and the signature says so), since publishing changes them. ``model.sig`` is a Sigstore
bundle that the package's own ``model_signing verify key`` reads too.

An output keeps its signature beside it. A registered version is immutable: signing it adds a version of the same content
that has ``model.sig`` among its files, and aliases stay where they are.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, OutputError, UnsafeError, UsageError, option
from adapterkit.packages import missing
from adapterkit.registry import blobs, resolve
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import NOT_CONTENT, FileEntry, Record
from adapterkit.registry.register import register_record

if TYPE_CHECKING:
    from types import ModuleType

SIGNATURE = "model.sig"
PASSWORD = "ADAPTERKIT_KEY_PASSWORD"
"""The environment variable with the password of an encrypted private key."""


@dataclass(frozen=True)
class Signed:
    """``signature`` is the file; ``ref`` the version that carries it, where one was signed."""

    signature: Path
    ref: str = ""


@dataclass(frozen=True)
class Holds:
    """What a signature vouches for: ``target`` as given, and how many files."""

    target: str
    files: int


def sign(target: str | Path, key: str | Path, *, home: Path | None = None) -> Signed:
    """Signs an output or a registered version.

    Args:
        target: a folder or file, else a registry name ``name[@version|@alias]``.
        key: the private key, an elliptic curve key in PEM form; its password is in ``$ADAPTERKIT_KEY_PASSWORD``.

    Raises:
        UsageError: the key cannot be used, or the extra is not installed.
        UnsafeError: the folder holds symbolic links.
        NotFound, OutputError, RegistryError
    """
    private = _key(key, "private")
    path = _path(target)
    if path is not None:
        place = path / SIGNATURE if path.is_dir() else path.with_name(f"{path.name}.{SIGNATURE}")
        with disk.writing(SIGNATURE, place.parent), tempfile.TemporaryDirectory(prefix="adapterkit-sign-") as folder:
            made = Path(folder) / SIGNATURE
            _sign(path, made, private, links=False)
            disk.write_file(place, made.read_bytes())
        return Signed(place)
    at = open_home(home)
    record = resolve.find(at, str(target))
    with tempfile.TemporaryDirectory(prefix="adapterkit-sign-") as folder, _folder(at, record) as model:
        made = Path(folder) / SIGNATURE
        _sign(model, made, private, links=True)
        with at.store_lock(shared=True):
            blob = blobs.put_file(at, made)
    files = [file for file in record.files if file.path != SIGNATURE]
    signed = replace(record, files=(*files, FileEntry(SIGNATURE, blob.size, blob.sha256)))
    added = register_record(signed, record.name, home=home).record
    return Signed(at.blob(blob.sha256), added.ref)


def verify(target: str | Path, key: str | Path, *, signature: Path | None = None, home: Path | None = None) -> Holds:
    """Holds an output or a registered version against its signature; every byte is read.

    Args:
        target: as for `sign`.
        key: the public key, in PEM form.
        signature: where it lies; by default ``model.sig`` in the folder, ``NAME.model.sig`` beside a file, or the one
            that the version carries.

    Raises:
        CheckFailed: a file was changed, is missing or was added, or another key signed.
        NotFound: there is no signature.
        UsageError, UnsafeError, RegistryError
    """
    public = _key(key, "public")
    path = _path(target)
    if path is not None:
        beside = path / SIGNATURE if path.is_dir() else path.with_name(f"{path.name}.{SIGNATURE}")
        return Holds(str(target), _verify(path, signature or beside, public, str(target)))
    at = open_home(home)
    record = resolve.find(at, str(target))
    own = next((at.blob(file.sha256) for file in record.files if file.path == SIGNATURE), None)
    if own is None and signature is None:
        raise NotFound(f"{record.ref} is not signed", f"sign it: adapterkit sign {record.ref} --key PRIVATE.pem")
    with _folder(at, record) as model:
        return Holds(record.ref, _verify(model, signature or own or Path(), public, record.ref, links=True))


def _path(target: str | Path) -> Path | None:
    path = Path(target).expanduser()
    if path.exists():
        return path
    if isinstance(target, Path) or os.sep in target:
        raise NotFound(f"{target} does not exist", "give a folder, a file or a registry name")
    return None


def _key(key: str | Path, which: str) -> Path:
    path = Path(key).expanduser()
    if not path.is_file():
        raise NotFound(f"the {which} key {path} does not exist", "openssl makes keys: see adapterkit sign --help")
    return path


@contextmanager
def _folder(at: Home, record: Record) -> Iterator[Path]:
    """The signed files of a version under their names: a folder of links, named like the version."""
    with tempfile.TemporaryDirectory(prefix="adapterkit-sign-") as folder:
        model = Path(folder) / f"{record.name}-{record.version}"
        for file in record.files:
            if file.path in NOT_CONTENT:
                continue
            if not file.stored or not blobs.has(at, file.sha256, file.size):
                raise NotFound(f"{record.ref} has no bytes of {file.path} here", "pull it, or run fsck")
            place = model / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(at.blob(file.sha256).absolute())
        if not model.is_dir():
            raise UsageError(f"{record.ref} holds no files to sign", "a base is a reference; sign what lies at hand")
        yield model


def _package(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise missing(error.name or "model_signing", "signing needs the package model-signing", "sign") from None


def _hashing(links: bool, besides: tuple[str, ...] = ()) -> Any:
    config = _package("hashing").Config().use_file_serialization(allow_symlinks=links).set_allow_symlinks(links)
    return config.set_ignored_paths(paths=sorted({*NOT_CONTENT, *besides}))


def _sign(model: Path, signature: Path, private: Path, *, links: bool, besides: tuple[str, ...] = ()) -> None:
    config = _package("signing").Config().set_hashing_config(_hashing(links, besides))
    said = os.environ.get(PASSWORD)
    try:
        # Version 1.1 hands the password on as it is, to a function that takes bytes.
        config.use_elliptic_key_signer(private_key=private, password=said.encode() if said is not None else None)
    except (ValueError, TypeError, AttributeError) as error:  # the last: a key of another kind
        hint = f"an elliptic curve key in PEM form is needed, its password in ${PASSWORD}"
        raise UsageError(f"{private} cannot be used as a private key ({_line(error)})", hint) from None
    try:
        config.sign(model, signature)
    except ValueError as error:
        raise UnsafeError(f"{model} cannot be signed ({_line(error)})", "copy files in the place of links") from None
    except OSError as error:
        raise OutputError(f"{model} cannot be signed ({error.strerror})", "check the disk") from None


def _verify(model: Path, signature: Path, public: Path, what: str, *, links: bool = False) -> int:
    """How many files the signature holds for."""
    if not signature.is_file():
        raise NotFound(f"{what} has no signature {signature}", f"sign it, or give it with {option('signature')}")
    config = _package("verifying").Config()
    from cryptography.exceptions import InvalidSignature

    payload = _payload(signature, what)
    if links:
        config.set_hashing_config(_like(payload))
    try:
        config.use_elliptic_key_verifier(public_key=public)
    except (ValueError, TypeError, AttributeError) as error:  # the last: a key of another kind
        raise UsageError(f"{public} cannot be used as a public key ({_line(error)})", "give it in PEM form") from None
    try:
        config.verify(model, signature)
    except InvalidSignature:
        raise CheckFailed(f"{what} was not signed with this key", "check whose key it is") from None
    except OSError as error:
        raise NotFound(f"{what} cannot be read ({error.strerror})", "check its files") from None
    except ValueError as error:
        raise CheckFailed(f"{what} is not what was signed: {_differences(error)}", "get it again") from None
    except Exception as error:  # what the package says about a bundle that is none differs with what is wrong in it
        raise CheckFailed(
            f"{what} is not what was signed: {_line(error)}", "get it again from where it was signed"
        ) from None
    return len(payload["predicate"]["resources"])


def _payload(signature: Path, what: str) -> Any:
    """The statement inside a signature that nobody has verified yet."""
    from base64 import b64decode

    try:
        bundle = parse_json(signature.read_bytes(), signature.name)
        found = parse_json(b64decode(bundle["dsseEnvelope"]["payload"]), signature.name)
        found["predicate"]["resources"], found["predicate"]["serialization"]["method"]
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        said = f"its signature is damaged ({type(error).__name__})"
        raise CheckFailed(f"{what} is not what was signed: {said}", "get it again from where it was signed") from None
    return found


def _like(payload: Any) -> Any:
    """How a signature says that its files were hashed, for files that are links to blobs here."""
    said = payload["predicate"]["serialization"]
    config = _package("hashing").Config()
    if said["method"] == "shards":
        config.use_shard_serialization(hashing_algorithm=said["hash_type"], shard_size=said["shard_size"])
    else:
        config.use_file_serialization(hashing_algorithm=said["hash_type"])
    return config.set_allow_symlinks(True)


def _differences(error: ValueError) -> str:
    """Which files, from a message that gives their digests as bytes."""
    text = str(error).replace("\\'", "'")
    parts = []
    for pattern, said in (
        (r"Hash mismatch for '([^']+)'", "other bytes in"),
        (r"Extra files found in model '[^']*': ([^'\"\]]+)", "not signed:"),
        (r"Missing files in model '[^']*': ([^'\"\]]+)", "missing:"),
    ):
        if names := re.findall(pattern, text):
            parts.append(f"{said} {', '.join(names)}")
    return "; ".join(parts) or _line(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).replace("\\'", "'").split())[:300] or type(error).__name__
