"""What may be published, and in which form: an allow-list, no links, no secrets, no paths of this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.folder import ADAPTER_CONFIG
from adapterkit.checkpoint.header import parse_header
from adapterkit.errors import CheckFailed, UnsafeError, option
from adapterkit.foreign import json_value
from adapterkit.redaction import check_public
from adapterkit.registry.beside import beside_bytes
from adapterkit.registry.canonical import sha256
from adapterkit.registry.names import is_repo
from adapterkit.registry.record import BESIDE, NOT_CONTENT, FileEntry, Parent, Record

CARD = "README.md"
IN_BUCKET = "bucket"
"""The key of a record's ``meta`` that says from which bucket it was pulled."""
_PULLED_FROM = ("oci", IN_BUCKET)  # not published again: the same version is the same in every remote
# By name, anywhere at most one folder deep where the pattern says so. A pickle is never on it.
ALLOWED = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*/model.safetensors"),
    *("adapter_config.json", "config.json", "generation_config.json", "*processor_config.json", "quantize_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/*.jinja", "modules.json", "*sentence*.json", "*/config.json", "Modelfile"),
    *(CARD, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "adapterkit.intoto.json*", "model.sig"),
)
_WEIGHTS = (".safetensors", ".gguf")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", ".model", ".tiktoken")
_NAMES_OF_BASES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
_LOCAL = re.compile(r"(?:/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
# A path of a machine in a value that is not about a base; a template or prose may well start with a slash.
_OF_A_MACHINE = re.compile(
    r"(?:file:/*|[A-Za-z]:\\|~/|/(?:home|Users|root|tmp|var|mnt|media|data|workspace|content|scratch|opt|srv)/)"
)
_TEXT_LIMIT = 32 << 20


@dataclass(frozen=True)
class Upload:
    """One file to publish: where its bytes are (a path, or the bytes), and what they are."""

    path: str
    source: Path | bytes
    size: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """What will be published: files without the card, the record that describes exactly them, and what was left out."""

    record: Record
    uploads: tuple[Upload, ...]
    card: bytes | None
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def allowed(path: str) -> bool:
    """Whether a file of this name may be published (or fetched)."""
    parts = path.split("/")
    if len(parts) > 2 or any(part.startswith(".") for part in parts):
        return False
    return any(pattern.count("/") == len(parts) - 1 and fnmatchcase(path, pattern) for pattern in ALLOWED)


def prepare(record: Record, files: Iterable[tuple[FileEntry, Path]]) -> Prepared:
    """The files of a version as they may be published.

    Where a file had to be changed or left out, the published record names the original as its source.

    Raises:
        UnsafeError: a file is a link, or holds a secret or a path of this machine that cannot be replaced.
        CheckFailed: the bytes of a file are not those of the record.
    """
    uploads, left, notes = [], [], []
    card = None
    for entry, real in files:
        if not allowed(entry.path):
            left.append(entry.path)
            continue
        if real.is_symlink() or not real.is_file():
            raise UnsafeError(f"{entry.path} is a link or no regular file", "put the file itself in its place")
        digest, size = disk.hash_file(real)
        if (digest, size) != (entry.sha256, entry.size):
            raise CheckFailed(f"the bytes of {entry.path} are not those of its record", "run fsck")
        data = _looked_through(entry.path, real)
        if entry.path == CARD:
            card = data
            continue
        changed, said = _without_local_paths(entry.path, data, record)
        notes += said
        if changed is None:
            uploads.append(Upload(entry.path, real, size, digest))
        else:
            uploads.append(Upload(entry.path, changed, len(changed), sha256(changed)))
    published, said = _published(record, uploads)
    notes += said
    data = beside_bytes(published)
    check_public(data.decode(), BESIDE)
    uploads.append(Upload(BESIDE, data, len(data), sha256(data)))
    return Prepared(published, tuple(uploads), card, tuple(left), tuple(notes))


def _looked_through(path: str, real: Path) -> bytes:
    """The bytes of a small file (none of weights), after a search for secrets."""
    if path.endswith(".safetensors"):
        source = LocalFile(real, path)
        metadata = parse_header(source.read, source.size, path).metadata
        check_public("\n".join(f"{key}={value}" for key, value in metadata.items()), path)
        return b""
    if path.endswith(_WEIGHTS):
        with open(real, "rb") as file:
            check_public(file.read(1 << 20).decode("latin-1"), path)
        return b""
    if real.stat().st_size > _TEXT_LIMIT:
        return b""
    data = real.read_bytes()
    if not path.endswith(_VOCABULARIES):
        check_public(data.decode("utf-8", "replace"), path)
    return data


def _without_local_paths(path: str, data: bytes, record: Record) -> tuple[bytes | None, list[str]]:
    """The bytes of a configuration without paths of this machine; None when there were none.

    Raises:
        UnsafeError: one is in a field that cannot be filled otherwise.
    """
    if not path.endswith(".json") or path.endswith((*_VOCABULARIES, ".index.json")) or not data:
        return None, []
    try:
        config = json_value(data)
    except ValueError:
        raise UnsafeError(f"{path} is not JSON, so nobody can tell what is in it", "repair it or take it out") from None
    notes: list[str] = []
    if not isinstance(config, dict):
        return None, []
    base = record.base.id if record.base is not None else ""
    for key in _NAMES_OF_BASES:
        value = config.get(key)
        if not isinstance(value, str) or not is_local(value):
            continue
        if base and (path != "config.json" or record.kind == "adapter"):
            config[key] = base
            notes.append(f"{path}: {key} was a path of this machine and now says {base}")
        elif path == ADAPTER_CONFIG:
            raise UnsafeError(
                f"{path} names its base by a path of this machine ({key})",
                f"say which it is with {option('base_id', 'ORG/NAME')}",
            )
        else:
            del config[key]
            notes.append(f"{path}: {key} was a path of this machine and was taken out")
    for where, value in _strings(config, path):
        if _OF_A_MACHINE.match(value):
            raise UnsafeError(f"{where} holds a path of this machine", "take it out of the file and register it again")
    return ((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if notes else None), notes


def is_local(value: str) -> bool:
    """Whether the name of a base is a path and not a Hub id."""
    return bool(_LOCAL.match(value)) or not is_repo(value) or os.path.isdir(value)


def _strings(value: Any, where: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{where}: {str(key)[:60]}")
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, where)


def _published(record: Record, uploads: list[Upload]) -> tuple[Record, list[str]]:
    """The record of what is published: without a local name, and with the original as a source if it differs."""
    files = tuple(FileEntry(u.path, u.size, u.sha256) for u in uploads if u.path not in NOT_CONTENT)
    known = {key: value for key, value in record.meta.items() if key not in _PULLED_FROM}
    meta = {key: value for key, value in known.items() if not _OF_A_MACHINE.match(value)}
    notes = [f"meta '{key}' is a path of this machine and is not published" for key in known if key not in meta]
    found = replace(record, files=files, name="", version=0, meta=meta)
    for where, value in _strings(found.to_json(), BESIDE):
        if _OF_A_MACHINE.match(value):
            raise UnsafeError(f"{where} holds a path of this machine", "register it again without it")
    if found.content != record.content:
        source = Parent("source", content=record.content, label="before it was published")
        found = replace(found, parents=(*found.parents, source))
    return found, notes
