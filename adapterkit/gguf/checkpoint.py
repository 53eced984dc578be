"""GGUF files as checkpoints: one file, or a set of parts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import LocalFile
from adapterkit.errors import CheckpointError, NotFound
from adapterkit.gguf.reader import STRING, GGUFHeader, parse_gguf
from adapterkit.gguf.tensors import stored
from adapterkit.places import address_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor

MAX_PARTS = 1 << 16
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    """A checkpoint read from GGUF files.

    Attributes:
        headers: of every file, in order; metadata stands in the first.
    """

    format: ClassVar[str] = "gguf"
    headers: tuple[GGUFHeader, ...] = field(default=(), repr=False)

    @property
    def header(self) -> GGUFHeader:
        return self.headers[0]

    @property
    def arch(self) -> str:
        return str(self.header.get("general.architecture", ""))

    @property
    def kind(self) -> str:
        """``model``, ``adapter``, ``imatrix``, ...: the file's own word."""
        return str(self.header.get("general.type", "model"))

    def number(self, name: str, default: int = 0) -> int:
        """An integer of the architecture's own metadata, ``name`` without its prefix; the first of a list."""
        value = self.header.get(f"{self.arch}.{name}", default)
        if isinstance(value, list):
            value = next((item for item in value if item), default)
        return value if isinstance(value, int) else default


def open_gguf(ref: str | Path) -> GGUFCheckpoint:
    """Open a GGUF file from its header, with the other parts when it is one of a set.

    Raises:
        NotFound: a part is missing.
        CheckpointError: damaged, or parts that do not belong together.
        UnsafeError: names that are not plain.
    """
    first = source_of(ref)
    header = read_header(first)
    count = header.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return _checkpoint(str(ref), [(first, header)])
    return of_sources(str(ref), _parts(ref, count))


def of_sources(ref: str, sources: Sequence[Source]) -> GGUFCheckpoint:
    """A GGUF model in these files: one, or the parts of a set in order.

    Raises:
        CheckpointError: damaged, or parts that do not belong together.
        UnsafeError: names that are not plain.
    """
    parts = [(source, read_header(source)) for source in sources]
    count = len(parts)
    if count == 1:
        return _checkpoint(ref, parts)
    for number, (source, part) in enumerate(parts):
        if (part.get("split.count"), part.get("split.no")) != (count, number):
            raise CheckpointError(f"{source.name} is not part {number + 1} of {count}", "download the set again")
    total = parts[0][1].get("split.tensors.count")
    found = sum(len(part.tensors) for _, part in parts)
    if total is not None and total != found:
        raise CheckpointError(f"{ref}: its {count} parts hold {found} tensors, not {total}", "download the set again")
    return _checkpoint(ref, parts)


def read_header(source: Source) -> GGUFHeader:
    """The checked header of a GGUF file."""
    return parse_gguf(source.read, source.size, source.name)


def source_of(ref: str | Path, *, loose: bool = False) -> Source:
    """The bytes of one GGUF file, here or in a store.

    Raises:
        NotFound: there is none.
        UnsafeError, AuthError, StoreError
    """
    if address_of(ref) is None:
        return LocalFile(Path(ref).expanduser(), str(ref), loose=loose)
    from adapterkit.checkpoint.objects import object_file

    found = object_file(ref, loose=loose)
    if found is None:
        raise NotFound(f"{ref} does not exist", "check the bucket, the name and the endpoint")
    return found


def _parts(ref: str | Path, count: int) -> list[Source]:
    place = address_of(ref) or Path(ref)
    found = _PART.fullmatch(place.name)
    if found is None or int(found["count"]) != count or count > MAX_PARTS:
        raise CheckpointError(
            f"{ref} is one of {count} parts, and its name does not end in -00001-of-{count:05d}.gguf",
            "give the parts the names under which they were published",
        )
    names = [f"{found['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    sources: list[Source] = []
    missing = []
    for name in names:
        try:
            sources.append(source_of(str(place.with_name(name))))
        except NotFound:
            missing.append(name)
    if missing:
        raise NotFound(f"{ref}: {len(missing)} of {count} parts are missing, as {missing[0]}", "download them too")
    return sources


def _checkpoint(ref: str, parts: Sequence[tuple[Source, GGUFHeader]]) -> GGUFCheckpoint:
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for source, header in parts:
        for info in header.tensors.values():
            if info.name in tensors:
                raise CheckpointError(f"{source.name} holds tensor '{info.name}' a second time", "download it again")
            tensors[info.name] = stored(info, source)
            shards[info.name] = source.name.rpartition("/")[2]
    header = parts[0][1]
    metadata = {key: header[key] for key, kv in header.keys.items() if kv.type == STRING and key.startswith("general.")}
    return GGUFCheckpoint(
        ref,
        tensors,
        shards,
        _config(header, tensors),
        metadata=metadata,
        sources=tuple(source for source, _ in parts),
        headers=tuple(header for _, header in parts),
    )


def _config(header: GGUFHeader, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of ``config.json`` can be said: enough for the rules that ask a config."""
    from adapterkit.gguf.arch.table import specs_of

    arch = str(header.get("general.architecture", ""))
    rows = specs_of(arch)
    embedding = tensors.get("token_embd.weight")
    return {
        "model_type": rows[0].model_type if rows else arch,
        "architectures": [arch],
        "vocab_size": embedding.shape[0] if embedding is not None else 0,
        "tie_word_embeddings": embedding is not None and "output.weight" not in tensors,
    }
