"""Signed statements: provenance and record of an output in DSSE envelopes, and whether they are true of what is there.

``sign`` writes two into ``adapterkit.intoto.jsonl``, one a line:

* the SLSA provenance of `adapterkit.provenance.attest`, where it is known how the output was made;
* the record (``urn:adapterkit:record:v1``): how it was made, from what, and the evidence it carries. Its subjects are all
  files, so that it also vouches for those that model-signing leaves out (``.gitattributes``) and for what lies beside an
  output that is a file. Name, version, origin and time of a record are not part of it: a registry gives those anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, counted, option
from adapterkit.places import Address
from adapterkit.provenance import dsse
from adapterkit.provenance.attest import PREDICATE, known_files, statement
from adapterkit.provenance.attest import STATEMENT as IN_TOTO
from adapterkit.provenance.signable import ENVELOPES, STATEMENT, Signable, entries, signable
from adapterkit.registry.record import BESIDE, FileEntry, Record
from adapterkit.stores.files import brought

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

RECORD = "urn:adapterkit:record:v1"
_FIELDS = ("kind", "method", "parameters", "base", "identity", "operation", "parents", "evidence", "meta")
_AGAIN = "get it again from where it was signed, or sign it again if you changed it"


@dataclass(frozen=True)
class SignedStatement:
    """A statement that a key has signed: the type of its predicate, the files it names with their sha256, what it says."""

    predicate_type: str
    subjects: Mapping[str, str]
    predicate: Mapping[str, Any]
    payload: bytes

    @property
    def words(self) -> str:
        """What it is, in a line."""
        if self.predicate_type == RECORD:
            evidence = self.predicate.get("evidence")
            kinds = ", ".join(evidence) if isinstance(evidence, dict) and evidence else "no evidence"
            return f"record, with {kinds}"
        if self.predicate_type == PREDICATE:
            build = self.predicate.get("buildDefinition")
            build = build if isinstance(build, dict) else {}
            named = build.get("resolvedDependencies")
            inputs = (
                [one for one in named if isinstance(one, dict) and "annotations" in one]
                if isinstance(named, list)
                else []
            )
            return f"SLSA provenance: {build.get('buildType')}, from {counted(len(inputs), 'input')}"
        return self.predicate_type


@dataclass(frozen=True)
class Attestations:
    """Statements that are signed with a key and true of ``target``; ``unnamed`` are files of it that none of them names."""

    target: str
    statements: tuple[SignedStatement, ...]
    unnamed: tuple[str, ...]


def verify_attestation(
    target: str | Path | Address,
    key: str | Path,
    *,
    attestation: str | Path | Address | None = None,
    ignore: Sequence[str] = (),
    home: Path | None = None,
) -> Attestations:
    """Holds the signed statements about an output or a version against the key and against what is there.

    Args:
        target: a folder or file, else a registry name.
        key: the public key, in PEM form.
        attestation: DSSE envelopes or a Sigstore bundle; by default ``adapterkit.intoto.jsonl`` in the folder, beside the
            file, or in the version.
        ignore: files and folders inside it that are not looked at.

    Raises:
        CheckFailed: a statement was not signed with the key, names a file that is missing or has other bytes, or the
            record at hand says something else than was signed.
        NotFound: there are no signed statements.
        UsageError, UnsafeError, RegistryError
    """
    public = dsse.public_key(Path(key).expanduser())
    with signable(target, ignore=ignore, home=home) as found:
        statements = read_statements(found, public, None if attestation is None else brought(attestation))
        here = {file.path: file.sha256 for file in entries(found, {})}
        hold(found, statements, here)
        named = {name for one in statements for name in subjects_of(found, one)}
        return Attestations(found.said, tuple(statements), tuple(name for name in here if name not in named))


def seal_statements(found: Signable, files: Sequence[FileEntry], key: EllipticCurvePrivateKey) -> bytes:
    """The statements about an output, signed.

    Raises:
        CheckFailed: the unsigned statement that lies there is about other files.
    """
    made: list[bytes] = []
    lies = found.files.get(STATEMENT if not found.own else f"{found.own}.{STATEMENT}")
    if lies is not None:
        data = lies.read_bytes()
        if off := _off(found, _statement(data, str(lies)), {file.path: file.sha256 for file in files}):
            raise CheckFailed(f"{lies} is not about what lies there: {off}", "make it again with attest, or remove it")
        made.append(data)
    elif found.record is not None and found.record.operation is not None:
        record = found.record
        beside = found.beside.read_bytes() if found.beside is not None else record.data
        made.append(_bytes(statement(record, files, beside, known_files(record))))
    subjects = [{"name": file.path, "digest": {"sha256": file.sha256}} for file in files]
    said = told(found.record) if found.record is not None else {}
    made.append(_bytes({"_type": IN_TOTO, "subject": subjects, "predicateType": RECORD, "predicate": said}))
    return b"".join(dsse.seal(one, key) for one in made)


def told(record: Record) -> dict[str, Any]:
    """What a record says of an artefact, wherever it is registered."""
    plain = record.to_json()
    return {name: plain[name] for name in _FIELDS}


def read_statements(found: Signable, key: EllipticCurvePublicKey, given: Path | None = None) -> list[SignedStatement]:
    """The statements that lie there (or in a file that is given), each signed with the key.

    Raises:
        NotFound: there are none.
        CheckFailed: one is damaged, or another key signed it.
    """
    place = given or found.envelopes
    if place is None or not place.exists():
        missing = place if place is not None else ENVELOPES
        raise NotFound(f"{found.said} has no signed statements ({missing})", "sign makes them, or give their file")
    where = place.name if not found.links or given is not None else ENVELOPES
    statements = []
    for number, envelope in enumerate(dsse.read_envelopes(disk.read_regular(place, dsse.MOST, where), where), 1):
        if not envelope.signed_by(key):
            raise CheckFailed(
                f"{where}, statement {number}, was not signed with this key", "check whose key it is, or get it again"
            )
        if envelope.kind != dsse.IN_TOTO:
            raise CheckFailed(f"{where}, statement {number}, is no in-toto statement", "give attestations of a file")
        statements.append(_statement(envelope.payload, f"{where}, statement {number},"))
    return statements


def hold(found: Signable, statements: Sequence[SignedStatement], here: Mapping[str, str]) -> None:
    """Hold signed statements against the files and the record that are there.

    Raises:
        CheckFailed
    """
    for one in statements:
        if off := _off(found, one, here):
            raise CheckFailed(f"{found.said} is not what was signed: {off}", _AGAIN)
    lies = found.files.get(STATEMENT if not found.own else f"{found.own}.{STATEMENT}")
    if lies is not None and lies.read_bytes() not in [one.payload for one in statements]:
        raise CheckFailed(f"{found.said} is not what was signed: other bytes in {lies.name}", _AGAIN)
    said = [one for one in statements if one.predicate_type == RECORD]
    if BESIDE in found.left_out:
        return
    if found.damaged:
        raise CheckFailed(f"{found.said} is not what was signed: {found.damaged}", _AGAIN)
    if found.record is not None and said and not any(one.predicate for one in said):
        hint = f"sign it again, or hold the files alone with {option('ignore', BESIDE)}"
        raise CheckFailed(f"{found.said} is not what was signed: it had no record then", hint)
    if found.record is not None and said and (other := differing(found.record, said)):
        raise CheckFailed(f"the record of {found.said} has another {other} than was signed", _AGAIN)


def differing(record: Record, said: Sequence[SignedStatement]) -> str:
    """The field in which a record says something else than was signed; empty when it says the same."""
    now, other = json.loads(json.dumps(told(record))), ""
    for one in said:
        other = next((name for name in _FIELDS if now[name] != one.predicate.get(name)), "")
        if not other:
            return ""
    return other


def _off(found: Signable, one: SignedStatement, here: Mapping[str, str]) -> str:
    """The first file that a statement names and that is missing or has other bytes, in words; empty where there is none."""
    for name, digest in subjects_of(found, one).items():
        if any(name == folder.rstrip("/") or name.startswith(f"{folder.rstrip('/')}/") for folder in found.left_out):
            continue
        if here.get(name) != digest:
            return f"other bytes in {name}" if name in here else f"missing: {name}"
    return ""


def subjects_of(found: Signable, one: SignedStatement) -> Mapping[str, str]:
    """The files that a statement names, by their names here: an output that is a file may have been renamed."""
    names = list(one.subjects)
    if not found.own or found.own in names:
        return one.subjects
    first = next(
        (name for name in names if not any(name.startswith(f"{other}.") for other in names if other != name)), ""
    )
    if not first:
        return one.subjects
    return {found.own + name.removeprefix(first): digest for name, digest in one.subjects.items()}


def _statement(payload: bytes, where: str) -> SignedStatement:
    """
    Raises:
        CheckFailed: it is no in-toto statement.
    """
    try:
        said = parse_json(payload, where)
        if said["_type"] not in (IN_TOTO, "https://in-toto.io/Statement/v0.1"):
            raise ValueError
        subjects = {one["name"]: one["digest"]["sha256"] for one in said["subject"]}
        texts = [said["predicateType"], *subjects, *subjects.values()]
        if not subjects or not all(isinstance(text, str) for text in texts):
            raise TypeError
        predicate = said.get("predicate")
        return SignedStatement(texts[0], subjects, predicate if isinstance(predicate, dict) else {}, payload)
    except (CheckpointError, KeyError, TypeError, ValueError):
        said = "a field is missing or of the wrong type"
        raise CheckFailed(f"{where} is no in-toto statement about files: {said}", _AGAIN) from None


def _bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
