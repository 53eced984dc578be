"""The record: one immutable JSON object that says what an artefact is and how it came to be.

Three digests, each a sha256 in hex:

* ``digest``: of the whole record; names this version, stored in it, and rules the file on disk (any flipped bit is
  found).
* ``content``: of what it is, that is the digests of its files without paths, cards and signatures; the same in every
  home and after push and pull. Parents are named by it.
* ``body``: of everything but name, version and time; registering the same body again gives the version that exists.

A record of a newer schema is kept as an ``OpaqueRecord``: readable in name, version and digest, never written over.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adapterkit._version import __version__
from adapterkit.checkpoint.folder import RECORD
from adapterkit.errors import AdapterkitError, RegistryError
from adapterkit.registry import verification
from adapterkit.registry.canonical import canonical, freeze, parse, sha256, thaw
from adapterkit.registry.identity import Identity
from adapterkit.registry.names import check_commit, check_name, check_path, check_repo, check_sha256, check_time

SCHEMA = 1
TYPE = "adapterkit.record"
BESIDE = RECORD
# Prose, signatures and the record itself: they change when an artefact is published, and it stays the same artefact.
PROOF = "adapterkit-verify.html"
"""The page of ``verify``, as a version keeps it."""
SIGNATURE = "model.sig"
NOT_CONTENT = frozenset(
    {BESIDE, "adapterkit.intoto.json", "adapterkit.intoto.jsonl", "README.md", ".gitattributes", SIGNATURE, PROOF}
)
KINDS = {
    "adapter": "an adapter as trained, extracted or resized",
    "combined": "an adapter made from several adapters",
    "merged": "a model with adapters folded into its weights",
    "quantized": "a model stored in fewer bits than it was made from",
    "converted": "the same weights in another format",
    "base": "a reference to a base; its bytes are not stored",
}
UNDATED = "1970-01-01T00:00:00Z"
"""The time of a record beside an output that states none, so that the same run gives the same bytes."""
_WORD = r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,63}"


@dataclass(frozen=True)
class FileEntry:
    """One file of an artefact: relative POSIX path, size in bytes, sha256, and whether the registry holds its bytes."""

    path: str
    size: int
    sha256: str
    stored: bool = True

    def __post_init__(self) -> None:
        check_path(self.path, "files[].path")
        if type(self.size) is not int or not 0 <= self.size < 1 << 62 or type(self.stored) is not bool:
            raise RegistryError(f"files[{self.path}] has no valid size or stored mark")
        check_sha256(self.sha256, f"files[{self.path}].sha256")


@dataclass(frozen=True)
class Parent:
    """Something this was made from.

    ``content`` is the parent's content digest; a base that was never registered may be named by ``identity`` instead.
    ``record`` and ``label`` say which version was meant, for readers; ``parameters`` are those of this parent (its
    weight).
    """

    role: str
    content: str = ""
    identity: Identity | None = None
    record: str = ""
    label: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _word(self.role, "parents[].role")
        _line(self.label, "parents[].label")
        for key in ("content", "record"):
            if getattr(self, key):
                check_sha256(getattr(self, key), f"parents[].{key}")
        if not self.content and self.identity is None:
            raise RegistryError("a parent is named neither by content digest nor by identity")
        object.__setattr__(self, "parameters", _object(self.parameters, "parents[].parameters"))


@dataclass(frozen=True)
class Operation:
    """What made it: the verb, all its parameters, and the tool with its version."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tool: str = "adapterkit"
    tool_version: str = __version__

    def __post_init__(self) -> None:
        for key in ("name", "tool", "tool_version"):
            _word(getattr(self, key), f"operation.{key}")
        object.__setattr__(self, "parameters", _object(self.parameters, "operation.parameters"))


@dataclass(frozen=True)
class Origin:
    """Where it was pulled from: a Hub repository at one commit."""

    repo: str
    commit: str

    def __post_init__(self) -> None:
        check_repo(self.repo, "origin.repo")
        check_commit(self.commit, "origin.commit")


@dataclass(frozen=True)
class Record:
    """One version of one name. ``version`` 0 with an empty ``name`` is a record that is not registered.

    ``base`` identifies the base it was trained on or made from; ``identity`` is its own, when it is a whole model. All
    mappings are read-only copies. Every rule is checked here.

    Raises:
        RegistryError: a field breaks a rule.
    """

    kind: str
    files: tuple[FileEntry, ...] = ()
    name: str = ""
    version: int = 0
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    base: Identity | None = None
    identity: Identity | None = None
    operation: Operation | None = None
    parents: tuple[Parent, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    created: str = ""

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.kind not in KINDS:
            raise RegistryError(f"{self.kind!a} is not a kind of record; use one of {', '.join(KINDS)}")
        if self.name:
            check_name(self.name)
        if type(self.version) is not int or not 0 <= self.version < 1 << 31 or (self.version > 0) != bool(self.name):
            raise RegistryError("a registered record has a name and a version from 1 up, another has neither")
        if self.method:
            _word(self.method, "method")
        put(self, "created", check_time(self.created, "created") if self.created else now())
        put(self, "files", tuple(sorted(self.files, key=lambda file: file.path)))
        folded = {file.path.casefold() for file in self.files}
        if len(folded) != len(self.files):
            raise RegistryError("two files of the record have one path (upper and lower case count as equal)")
        for key in ("parameters", "evidence", "meta"):
            put(self, key, _object(getattr(self, key), key))
        if not all(isinstance(value, str) for value in self.meta.values()):
            raise RegistryError("meta holds a value that is not text")
        if not all(isinstance(value, Mapping) for value in self.evidence.values()):
            raise RegistryError("evidence holds a value that is not an object")
        verification.read(self.evidence)
        if not self._content_files() and (self.identity is None or not self.identity.known):
            raise RegistryError("a record needs at least one file or an identity")

    def _content_files(self) -> list[FileEntry]:
        return [file for file in self.files if file.path not in NOT_CONTENT]

    @cached_property
    def content(self) -> str:
        """The digest of what it is; see the module."""
        files = self._content_files()
        if files:
            return sha256(canonical({"files": sorted(file.sha256 for file in files)}))
        assert self.identity is not None
        return sha256(canonical({"identity": self.identity.to_json()}))

    @cached_property
    def body(self) -> str:
        """The digest of everything but name, version and time."""
        plain = self._plain()
        for key in ("name", "version", "created"):
            del plain[key]
        return sha256(canonical(plain))

    @cached_property
    def digest(self) -> str:
        """The digest of the whole record."""
        return sha256(canonical(self._plain()))

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def ref(self) -> str:
        """``name@version``, or an empty string when it is not registered."""
        return f"{self.name}@{self.version}" if self.version else ""

    def _plain(self) -> dict[str, Any]:
        """The JSON object without its digest; every key is always there, so that no two spellings exist."""
        return {
            "type": TYPE,
            "schema": SCHEMA,
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "files": [
                {"path": file.path, "size": file.size, "sha256": file.sha256, "stored": file.stored}
                for file in self.files
            ],
            "method": self.method,
            "parameters": thaw(self.parameters),
            "base": self.base.to_json() if self.base else None,
            "identity": self.identity.to_json() if self.identity else None,
            "operation": None
            if self.operation is None
            else {
                "name": self.operation.name,
                "parameters": thaw(self.operation.parameters),
                "tool": self.operation.tool,
                "tool_version": self.operation.tool_version,
            },
            "parents": [
                {
                    "role": parent.role,
                    "content": parent.content,
                    "identity": parent.identity.to_json() if parent.identity else None,
                    "record": parent.record,
                    "label": parent.label,
                    "parameters": thaw(parent.parameters),
                }
                for parent in self.parents
            ],
            "evidence": thaw(self.evidence),
            "meta": thaw(self.meta),
            "origin": {"repo": self.origin.repo, "commit": self.origin.commit} if self.origin else None,
            "created": self.created,
        }

    def to_json(self) -> dict[str, Any]:
        """The JSON object with its digest, as ``record.schema.json`` describes it."""
        return {**self._plain(), "digest": self.digest}

    @cached_property
    def data(self) -> bytes:
        """The exact bytes of the file in the registry: canonical JSON and a newline."""
        return canonical(self.to_json()) + b"\n"

    def registered(self, name: str, version: int) -> Record:
        """The same record under a name and version."""
        return replace(self, name=name, version=version)


@dataclass(frozen=True)
class OpaqueRecord:
    """A record written by a newer adapterkit: its bytes as they are, and the three facts every schema keeps."""

    schema: int
    name: str
    version: int
    digest: str
    data: bytes


def now() -> str:
    """The current UTC time as records spell it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(data: bytes, where: str, exact: bool = True) -> Record | OpaqueRecord:
    """The record in ``data``.

    ``exact`` asks for the registry's own canonical bytes; a record beside an output may be laid out for readers.

    Raises:
        RegistryError: not a record, damaged, or its digest does not hold; ``where`` is named in the sentence.
    """
    value = parse(data, where)
    if not isinstance(value, dict) or value.get("type") != TYPE or type(value.get("schema")) is not int:
        raise RegistryError(f"{where} is not an adapterkit record")
    plain = {key: item for key, item in value.items() if key != "digest"}
    digest = check_sha256(value.get("digest"), f"{where}: digest")
    try:
        if sha256(canonical(plain)) != digest or (exact and canonical(value) + b"\n" != data):
            raise RegistryError(f"{where} is damaged: its content does not have the digest it states")
    except ValueError:
        raise RegistryError(f"{where} is damaged: it holds a value that JSON cannot say") from None
    if plain["schema"] > SCHEMA:
        return _opaque(plain, digest, data, where)
    try:
        record = _build(plain)
    except (AdapterkitError, KeyError, TypeError, AttributeError) as error:
        why = (
            error.message
            if isinstance(error, AdapterkitError)
            else f"a field is missing or of the wrong type ({error})"
        )
        raise RegistryError(f"{where} is not a valid record: {why}") from None
    if record.digest != digest:
        raise RegistryError(f"{where} is not a valid record: it has unknown fields or another order")
    return record


def _opaque(plain: dict[str, Any], digest: str, data: bytes, where: str) -> OpaqueRecord:
    name, version = plain.get("name"), plain.get("version")
    if not isinstance(name, str) or type(version) is not int:
        raise RegistryError(f"{where} is of schema {plain['schema']} and states no name and version")
    return OpaqueRecord(plain["schema"], name, version, digest, data)


def _build(plain: dict[str, Any]) -> Record:
    def identity(value: Any, where: str) -> Identity | None:
        return None if value is None else Identity.from_json(value, where)

    plain = dict(plain)
    for key in ("type", "schema"):
        del plain[key]
    operation, origin = plain.pop("operation"), plain.pop("origin")
    return Record(
        files=tuple(FileEntry(**file) for file in plain.pop("files")),
        base=identity(plain.pop("base"), "base"),
        identity=identity(plain.pop("identity"), "identity"),
        operation=None if operation is None else Operation(**operation),
        parents=tuple(
            Parent(**{**parent, "identity": identity(parent["identity"], "parents[].identity")})
            for parent in plain.pop("parents")
        ),
        origin=None if origin is None else Origin(**origin),
        **plain,
    )


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RegistryError(f"{where} is not an object")
    return freeze(value, where)  # type: ignore[no-any-return]


def _word(value: object, where: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(_WORD, value):
        raise RegistryError(f"{where} is not a plain word of at most 64 characters: {ascii(value)[:80]}")


def _line(value: object, where: str) -> None:
    if not isinstance(value, str) or len(value) > 256 or not (value.isprintable() or not value):
        raise RegistryError(f"{where} is not one printable line of at most 256 characters")
