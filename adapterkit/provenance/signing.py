"""Signatures by OpenSSF model-signing (the extra ``sign``), and signed statements: with a key of one's own, offline.

``sign`` writes two files. ``model.sig`` is a Sigstore bundle with the digest of every file of the output, card and record
included; the package's own ``model_signing verify key`` reads it too. ``adapterkit.intoto.jsonl`` holds the provenance and
the record as signed statements (see `adapterkit.provenance.attested`), which also name what model-signing leaves out:
``.gitattributes`` and its kind, and what lies beside an output that is a file.

``verify`` holds only where every file that is there is vouched for by one of the two, and the record says what was signed.
The statements have to name all files of the signature: pieces of two signed outputs are not one.

An output keeps its signature beside it. A registered version is immutable: signing it adds a version of the same content
that has both among its files, and aliases stay where they are.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, OutputError, UnsafeError, option
from adapterkit.packages import missing
from adapterkit.places import Address
from adapterkit.provenance import dsse
from adapterkit.provenance.attested import (
    RECORD,
    SignedStatement,
    differing,
    hold,
    read_statements,
    seal_statements,
    subjects_of,
)
from adapterkit.provenance.signable import ENVELOPES, SIGNATURE, Signable, entries, signable
from adapterkit.registry import blobs
from adapterkit.registry.beside import check_beside
from adapterkit.registry.home import open_home
from adapterkit.registry.record import BESIDE, FileEntry
from adapterkit.registry.register import register_record
from adapterkit.stores.files import brought, deliver

if TYPE_CHECKING:
    from types import ModuleType

PREDICATE = "https://model_signing/signature/v1.0"
# What model-signing never looks at.
_OF_GIT = (".git", ".gitattributes", ".github", ".gitignore")
_AGAIN = "get it again from where it was signed"
# What a push to the Hub writes anew, and what the Hub adds.
_OF_HUB = frozenset({"README.md", ".gitattributes"})


@dataclass(frozen=True)
class Signed:
    """``signature`` and ``statements`` are the files; ``ref`` the version that carries them, where one was signed;
    ``left_out`` what is not vouched for."""

    signature: Path | Address
    statements: Path | Address
    ref: str = ""
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Holds:
    """What a signature vouches for: ``target`` as given, how many files, and what was not looked at as asked."""

    target: str
    files: int
    left_out: tuple[str, ...] = ()


def sign(target: str | Path | Address, key: str | Path, *, home: Path | None = None) -> Signed:
    """Signs an output or a registered version, with its record and its provenance.

    Args:
        target: a folder or file, else a registry name ``name[@version|@alias]``.
        key: the private key, an elliptic curve key in PEM form; its password is in ``$ADAPTERKIT_KEY_PASSWORD``.

    Raises:
        UsageError: the key cannot be used, or the extra is not installed.
        UnsafeError: the folder holds symbolic links.
        CheckFailed: the record or the statement that lies there is about other files.
        NotFound, OutputError, RegistryError
    """
    signing = _package("signing")
    private = Path(key).expanduser()
    own = dsse.private_key(private)
    with signable(target, home=home) as found:
        if found.damaged:
            raise CheckFailed(found.damaged, "restore the record, or take it out")
        found, out = _without_git(found)
        with tempfile.TemporaryDirectory(prefix="adapterkit-sign-") as folder:
            made = Path(folder) / SIGNATURE
            _sign(signing, found, made, private)
            bundle = made.read_bytes()
        digests = _digests(found, bundle)
        files = entries(found, digests)
        if found.record is not None and found.version is None:
            check_beside(found.model, found.record, files)
        statements = seal_statements(found, files, own)
        if found.version is None:
            assert found.signature is not None
            assert found.envelopes is not None
            places = found.place_of(found.signature), found.place_of(found.envelopes)
            _write(places[1], statements)
            _write(places[0], bundle)
            return Signed(*places, left_out=out)
    return _signed_version(found, {SIGNATURE: bundle, ENVELOPES: statements}, home)


def _write(place: Path | Address, data: bytes) -> None:
    if isinstance(place, Address):
        deliver(place, data)
        return
    with disk.writing(SIGNATURE, place.parent):
        disk.write_file(place, data)


def _signed_version(found: Signable, made: Mapping[str, bytes], home: Path | None) -> Signed:
    at, record = open_home(home), found.version
    assert record is not None
    added = []
    with at.store_lock(shared=True):
        for name, data in made.items():
            blob = blobs.put_chunks(at, [data], hashlib.sha256(data).hexdigest(), len(data))
            added.append(FileEntry(name, blob.size, blob.sha256))
    files = [file for file in record.files if file.path not in made]
    ref = register_record(replace(record, files=(*files, *added)), record.name, home=home).record.ref
    signature, statements = (at.blob(file.sha256) for file in added)
    return Signed(signature, statements, ref)


def verify(
    target: str | Path | Address,
    key: str | Path,
    *,
    signature: str | Path | Address | None = None,
    ignore: Sequence[str] = (),
    home: Path | None = None,
) -> Holds:
    """Holds an output or a registered version against its signature; every byte is read.

    Args:
        target: as for `sign`.
        key: the public key, in PEM form.
        signature: where it lies; by default ``model.sig`` in the folder, ``NAME.model.sig`` beside a file, or the one
            that the version carries.
        ignore: files and folders inside it that are not looked at, such as the ``.git`` of a clone.

    Raises:
        CheckFailed: a file was changed, is missing, was added or was never signed; the record says something else than was
            signed; or another key signed.
        NotFound: there is no signature.
        UsageError, UnsafeError, RegistryError
    """
    _package("hashing")
    public = dsse.public_key(Path(key).expanduser())
    with signable(target, ignore=ignore, home=home) as found:
        place = brought(signature) if signature is not None else found.signature
        if place is None and found.version is not None:
            raise NotFound(f"{found.said} is not signed", f"sign it: adapterkit sign {found.said} --key PRIVATE.pem")
        if place is None or not place.exists():
            raise NotFound(
                f"{found.said} has no signature {place}", f"sign it, or give the file with {option('signature')}"
            )
        signed, hashing = _manifest(found, place, public)
        here = _hashes(found, signed, hashing)
        _compare(found, signed, here)
        known = here if hashing["method"] == "files" and hashing["hash_type"] == "sha256" else {}
        files = {file.path: file.sha256 for file in entries(found, known)}
        statements = []
        if found.envelopes is not None and found.envelopes.is_file():
            statements = read_statements(found, public)
            hold(found, statements, files)
        named = {found.name_of(name.partition(":")[0]) for name in signed}
        # A true statement about another output, signed with the same key, vouches for nothing here.
        same = [one for one in statements if subjects_of(found, one).keys() >= named - {BESIDE}]
        for one in same:
            named |= {name for name, digest in subjects_of(found, one).items() if files.get(name) == digest}
        if extra := sorted(set(files) - named):
            raise CheckFailed(
                f"{found.said} is not what was signed: not signed: {', '.join(extra)}",
                _left_out(
                    extra, f"take out what does not belong there, or leave it out with {option('ignore', extra[0])}"
                ),
            )
        _record(found, signed, same)
        return Holds(found.said, len(files) + (found.beside is not None), found.left_out)


def _record(found: Signable, signed: Mapping[str, str], statements: Sequence[SignedStatement]) -> None:
    """The record beside the files, or of the version, is one that was signed: by its bytes or by what it says.

    A registry gives an output another name, version and time, and the same record.
    """
    if BESIDE in found.left_out:
        return
    if found.beside is not None:
        if signed.get(BESIDE) == hashlib.sha256(found.beside.read_bytes()).hexdigest():
            return
    elif found.version is None:
        return
    said = [one for one in statements if one.predicate_type == RECORD and one.predicate]
    if found.record is None or not said or differing(found.record, said):
        what = f"not signed: {found.beside.name}" if found.beside is not None else "its record is not signed"
        hint = f"sign it again, or hold the files alone with {option('ignore', BESIDE)}"
        raise CheckFailed(f"{found.said} is not what was signed: {what}", hint)


def _without_git(found: Signable) -> tuple[Signable, tuple[str, ...]]:
    """Without the folder of version control, which changes with every command and is nobody's output."""
    kept = {name: path for name, path in found.files.items() if not name.startswith(".git/")}
    return (replace(found, files=kept), (".git",)) if len(kept) < len(found.files) else (found, ())


def _package(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise missing(error.name or "model_signing", "signing needs the package model-signing", "sign") from None


def _sign(signing: ModuleType, found: Signable, signature: Path, private: Path) -> None:
    hashing = _package("hashing").Config().use_file_serialization(allow_symlinks=found.links)
    hashing = hashing.set_allow_symlinks(found.links).set_ignored_paths(paths=sorted((SIGNATURE, ENVELOPES)))
    said = dsse.password()
    # Version 1.1 hands the password on as it is, to a function that takes bytes.
    config = signing.Config().set_hashing_config(hashing)
    config.use_elliptic_key_signer(private_key=private, password=said)
    try:
        config.sign(found.model, signature)
    except ValueError as error:
        raise UnsafeError(
            f"{found.said} cannot be signed ({_line(error)})", "copy files in the place of links"
        ) from None
    except OSError as error:
        raise OutputError(f"{found.said} cannot be signed ({error.strerror})", "check the disk") from None


def _digests(found: Signable, bundle: bytes) -> dict[str, str]:
    """The sha256 of the files in a signature that was just made."""
    payload = parse_json(dsse.read_envelopes(bundle, SIGNATURE)[0].payload, SIGNATURE)
    return {found.name_of(one["name"]): one["digest"] for one in payload["predicate"]["resources"]}


def _manifest(found: Signable, signature: Path, public: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The files (or parts of files) of a signature with their digests, and how those were made.

    Raises:
        CheckFailed: it was made with another key, or is damaged.
    """
    name = SIGNATURE if found.links else signature.name
    try:
        envelope, *more = dsse.read_envelopes(disk.read_regular(signature, dsse.MOST, name), name)
        if more:
            raise CheckFailed("it holds several")
    except CheckFailed as error:
        raise CheckFailed(
            f"{found.said} is not what was signed: its signature is damaged ({error.message})", _AGAIN
        ) from None
    if not envelope.signed_by(public):
        raise CheckFailed(f"{found.said} was not signed with this key", "check whose key it is")
    return listed(envelope.payload, found.said)


def listed(payload: bytes, what: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The files and digests in the statement of model-signing, and how those were made.

    Raises:
        CheckFailed: it is damaged; ``what`` is named in the sentence.
    """
    try:
        said = parse_json(payload, SIGNATURE)
        rows, how = said["predicate"]["resources"], dict(said["predicate"]["serialization"])
        signed = {row["name"]: row["digest"] for row in rows}
        if not all(isinstance(text, str) for one in signed.items() for text in one):
            raise TypeError
        whole = hashlib.sha256(b"".join(bytes.fromhex(row["digest"]) for row in rows)).hexdigest()
        right = said["predicateType"] == PREDICATE and said["subject"][0]["digest"]["sha256"] == whole
        if not right or len(signed) < len(rows) or how["method"] not in ("files", "shards"):
            raise ValueError
        how["hash_type"], how["shard_size"] = str(how["hash_type"]), int(how.get("shard_size", 0) or 0)
    except (CheckpointError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        raise CheckFailed(
            f"{what} is not what was signed: its signature is damaged (it lists no files)", _AGAIN
        ) from None
    return signed, how


def _hashes(found: Signable, signed: Mapping[str, str], how: Mapping[str, Any]) -> dict[str, str]:
    """The digests of what is there, made as those of the signature were; by the names in it."""
    named = {name.partition(":")[0] for name in signed}  # a part of a file is NAME:FROM:TO
    paths = [path for name, path in found.files.items() if name in named]
    if found.own:
        paths = []
    elif BESIDE in named and found.beside is not None:
        paths.append(found.beside)
    config = _package("hashing").Config()
    try:
        if how["method"] == "shards":
            config.use_shard_serialization(hashing_algorithm=how["hash_type"], shard_size=how["shard_size"])
        else:
            config.use_file_serialization(hashing_algorithm=how["hash_type"])
        config.set_allow_symlinks(found.links)
        config.set_ignored_paths(paths=[], ignore_git_paths=False)
        if not paths and not found.own:
            return {}
        made = config.hash(found.model, files_to_hash=paths or None)
    except ValueError as error:
        raise CheckFailed(f"{found.said} is not what was signed: {_line(error)}", _AGAIN) from None
    except OSError as error:
        raise NotFound(f"{found.said} cannot be read ({error.strerror})", "check its files") from None
    return {one.identifier: one.digest.digest_hex for one in made.resource_descriptors()}


def _compare(found: Signable, signed: Mapping[str, str], here: Mapping[str, str]) -> None:
    """
    Raises:
        CheckFailed: files of the signature that have other bytes, or are missing.
    """
    own = (
        {BESIDE} if found.beside is not None or found.version is not None else set()
    )  # told by what it says, see `_record`
    out = [name.rstrip("/") for name in found.left_out]
    names = [name for name in signed if name not in own and not any(_inside(name, folder) for folder in out)]
    missing = sorted({name.partition(":")[0] for name in names if name not in here})
    other = sorted({name.partition(":")[0] for name in names if name in here and here[name] != signed[name]})
    parts = []
    if other:
        parts.append(f"other bytes in {', '.join(other)}")
    if missing:
        parts.append(f"missing: {', '.join(missing)}")
    if parts:
        raise CheckFailed(
            f"{found.said} is not what was signed: {'; '.join(parts)}", _left_out(other, "get it again", missing)
        )


def _left_out(names: Sequence[str], otherwise: str, missing: Sequence[str] = ()) -> str:
    """What to do about files that were not signed as they are: those that the Hub or a push changes can be left out."""
    if not names or missing or not _OF_HUB.issuperset(names):
        return otherwise
    options = " ".join(option("ignore", name) for name in names)
    return f"a push writes the card, and the Hub adds .gitattributes; hold the other files with {options}"


def _inside(name: str, folder: str) -> bool:
    return name.partition(":")[0] == folder or name.startswith(f"{folder}/")


def _line(error: Exception) -> str:
    return " ".join(str(error).replace("\\'", "'").split())[:300] or type(error).__name__
