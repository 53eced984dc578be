"""Provenance that other tools read: an in-toto Statement with a SLSA provenance predicate, made of the record beside an output.

Every verb's record goes through here, so there is one place that says how a record becomes a statement:

    subject                  every file of the output, by sha256
    buildType                urn:adapterkit:build:VERB:v1
    externalParameters       the parameters of the operation, and each parent's own (its weight)
    resolvedDependencies     every parent: Hub commit, digests of its files where they are at hand, its identity else
    runDetails.builder       adapterkit and its version; no host, no user, no path
    runDetails.byproducts    adapterkit.json, which holds fidelity and verification

Digests that are not those of a file have names of their own: ``adapterkitContent`` and ``adapterkitMerkle`` (see
`adapterkit.registry.record` and `adapterkit.registry.identity`). The same output and inputs give the same statement.

Formats: in-toto attestation framework v1 (Statement, ResourceDescriptor, DigestSet), SLSA provenance v1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.bases import open_model
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.publish import part_name
from adapterkit.errors import AdapterkitError, NotFound, UsageError
from adapterkit.places import local
from adapterkit.provenance.record import entry
from adapterkit.registry import index, store
from adapterkit.registry.beside import beside_path, check_beside, read_beside
from adapterkit.registry.canonical import sha256, thaw
from adapterkit.registry.gather import gather
from adapterkit.registry.home import open_home
from adapterkit.registry.identity import Identity, compare
from adapterkit.registry.record import NOT_CONTENT, UNDATED, FileEntry, Parent, Record
from adapterkit.registry.weights import cheap, identity_of

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
NAME = "adapterkit.intoto.json"


@dataclass(frozen=True)
class Attested:
    """``path`` of the statement; how many files it vouches for, and how many digests of inputs it names."""

    path: Path
    subjects: int
    dependencies: int


def attest(path: str | Path, inputs: Iterable[str | Path] = (), *, strict: bool = True) -> Attested:
    """Writes a statement of provenance beside an output of adapterkit.

    Args:
        path: the folder or file that a verb made, with its ``adapterkit.json``.
        inputs: what it was made from (paths or registry names), so that their files are named by sha256 too; what is
            registered is found by itself.
        strict: an input that the record does not name is an error.

    Raises:
        NotFound: there is no such output, or no record beside it.
        CheckFailed: the record describes other files than are there.
        UsageError: the record does not say how it was made, or an input is not one that it names.
        OutputError: the statement cannot be written.
    """
    out = Path(local(path, "what is attested")).expanduser()
    if not out.exists() and not parts_of(out):
        raise NotFound(f"{out} does not exist", "give the folder or file that was made")
    record = read_beside(out)
    if record is None:
        raise NotFound(f"{beside_path(out)} does not exist", "only outputs of adapterkit say how they were made")
    files = _files(out)
    check_beside(out, record, files)
    known, left = _matched(record.parents, [_place(ref) for ref in inputs])
    if left and strict:
        raise UsageError(f"{left[0]} is none of what the record names", "give what the output was made from")
    made = statement(record, files, beside_path(out).read_bytes(), known)
    target = out / NAME if out.is_dir() else out.with_name(f"{out.name}.{NAME}")
    with disk.writing(NAME, target.parent):
        disk.write_file(target, (json.dumps(made, indent=2) + "\n").encode())
    found = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    return Attested(target, len(made["subject"]), len(found))


def statement(
    record: Record, files: Sequence[FileEntry], beside: bytes, known: Sequence[Sequence[FileEntry]]
) -> dict[str, Any]:
    """The statement about ``files`` as plain JSON.

    Args:
        record: that describes the files; ``beside`` are its bytes.
        known: the files of each parent, as far as they are at hand.

    Raises:
        UsageError: as in `attest`.
    """
    operation = record.operation
    if operation is None:
        raise UsageError("the record does not say how these files were made", "attest what a verb made")
    dependencies = [
        one for parent, found in zip(record.parents, known, strict=True) for one in _resolved(parent, found)
    ]
    run: dict[str, Any] = {
        "builder": {"id": f"urn:{operation.tool}:cli", "version": {operation.tool: operation.tool_version}},
        "byproducts": [
            {"name": "adapterkit.json", "digest": {"sha256": sha256(beside)}, "mediaType": "application/json"}
        ],
    }
    if record.created != UNDATED:
        run["metadata"] = {"finishedOn": record.created}
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": file.path, "digest": {"sha256": file.sha256}} for file in files if file.path not in NOT_CONTENT
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"urn:adapterkit:build:{operation.name}:v1",
                "externalParameters": {
                    **thaw(operation.parameters),
                    "inputs": [
                        {"role": parent.role, "name": parent.label, **thaw(parent.parameters)}
                        for parent in record.parents
                    ],
                },
                "internalParameters": {},
                "resolvedDependencies": dependencies,
            },
            "runDetails": run,
        },
    }


def known_files(record: Record) -> list[Sequence[FileEntry]]:
    """The files of every parent that is registered here; none of the others."""
    return _matched(record.parents, [])[0]


def _matched(parents: Sequence[Parent], inputs: Sequence[Path]) -> tuple[list[Sequence[FileEntry]], list[Path]]:
    """The files of every parent: of the input that has its content or identity, else as registered here; and the inputs
    that are none of them."""
    left = {path: _files(path) for path in inputs}
    found: list[Sequence[FileEntry]] = []
    for parent in parents:
        same = next((path for path, files in left.items() if _is(parent, path, files)), None)
        found.append(left.pop(same) if same is not None else _registered(parent) or ())
    return found, list(left)


def _is(parent: Parent, path: Path, files: Sequence[FileEntry]) -> bool:
    if parent.content:
        return _content(files) == parent.content
    if parent.identity is None:
        return False
    try:
        opened = open_model(path)
    except AdapterkitError:
        return False
    found = compare(parent.identity, identity_of(opened, cheap(opened)))
    return found.fits is not False and bool(found.agree)


def _content(files: Sequence[FileEntry]) -> str:
    return Record("adapter", files=tuple(files)).content


def _registered(parent: Parent) -> Sequence[FileEntry] | None:
    """The files of a parent that is registered here."""
    at = open_home()
    if not parent.content or not at.exists:
        return None
    for row in index.ask(at, lambda found: found.by_content(parent.content)):
        try:
            return store.load_known(at, row.name, row.version).files
        except AdapterkitError:
            continue
    return None


def _resolved(parent: Parent, files: Sequence[FileEntry]) -> list[dict[str, Any]]:
    """ResourceDescriptors of one parent: itself, then its files."""
    identity = parent.identity or Identity()
    digest = {}
    if parent.content:
        digest["adapterkitContent"] = parent.content
    if identity.merkle:
        digest["adapterkitMerkle"] = identity.merkle
    if identity.commit:
        digest["gitCommit"] = identity.commit
    hub = parse_hub(identity.id) if identity.id else None
    repo, commit = (hub.repo, identity.commit) if hub is not None else ("", "")
    name = parent.label or parent.role
    one: dict[str, Any] = {
        "name": name,
        "uri": f"pkg:huggingface/{repo}{f'@{commit}' if commit else ''}"
        if repo
        else f"urn:adapterkit:input:{parent.role}",
        "annotations": {
            "role": parent.role,
            **({"record": parent.record} if parent.record else {}),
            **{level: identity.level(level) for level in ("sampled", "probe", "skeleton") if identity.level(level)},
        },
    }
    if digest:
        one["digest"] = digest
    of_base = [FileEntry(path, 0, sum_, stored=False) for path, sum_ in identity.files]
    named = [file for file in files or of_base if file.path not in NOT_CONTENT]
    return [one, *({"name": f"{name}/{file.path}", "digest": {"sha256": file.sha256}} for file in named)]


def _place(ref: str | Path) -> Path:
    """The folder or file that an input's reference means.

    Raises:
        NotFound: it is none, or one on the Hub.
    """
    path = Path(ref).expanduser()
    if path.exists():
        return path
    from adapterkit.registry import resolve
    from adapterkit.registry.checkout import checkout

    if isinstance(ref, str) and "/" not in ref and resolve.exists(open_home(), ref.partition("@")[0]):
        return checkout(ref)
    raise NotFound(f"{ref} is not here", "give the path of the input, or leave it out: the record names it")


def parts_of(out: Path) -> list[Path]:
    """The files of a set that was written in the place of one GGUF file, ``OUT-00001-of-00003.gguf``."""
    if out.suffix != ".gguf" or not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.iterdir() if part_name(out).fullmatch(path.name))


def _files(path: Path) -> list[FileEntry]:
    if not path.exists():
        return [entry(part.name, part) for part in parts_of(path)]
    return [entry(inside, real) for inside, real in gather(path).files]
