"""The plan of a GGUF output: sizes and offsets are known from headers, so tensors can be written in any order."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.plan import BASELINE_MEMORY, WORKER_MEMORY, Chunk, Plan, PlannedFile, step_of
from adapterkit.errors import UsageError, option
from adapterkit.gguf.metadata import Entry, entry, file_start, tensor_info, u16
from adapterkit.gguf.reader import I32, parse_gguf
from adapterkit.gguf.tensors import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.reader import GGUFHeader

SINGLE = "model.gguf"  # names inside the hidden folder; publishing gives them the output's own name
ENCODER_MEMORY = 60_000_000  # bytes: numba and its compiled encoders


@dataclass(frozen=True)
class FileLayout:
    """What a GGUF output is made of.

    Attributes:
        tensors: handles, each of a type that GGUF has, in the order of the file.
        entries: key-values in order; one with a ``start`` is copied from ``source``.
        alignment: of tensor data, as the metadata says it.
    """

    tensors: Sequence[Tensor]
    entries: Sequence[Entry]
    alignment: int = 32
    source: Source | None = None


def plan_gguf(
    layout: FileLayout,
    *,
    max_shard_size: int | None = None,
    jobs: int = 2,
    inputs: Mapping[str, str] | None = None,
    request: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan one GGUF file, or a set of at most ``max_shard_size`` bytes of tensors each with all metadata in the first.

    Raises:
        UsageError: too many parts.
    """
    groups = _groups(layout.tensors, max_shard_size)
    if len(groups) > 0xFFFF:
        raise UsageError(
            f"{len(groups)} parts are more than a GGUF set may have", f"choose a larger {option('max_shard_size')}"
        )
    files = []
    for number, tensors in enumerate(groups):
        # Metadata stands in the first part; each part needs to know where its own data begins.
        entries = [one for one in layout.entries if number == 0 or one.key == "general.alignment"]
        if len(groups) > 1:
            # The keys and their types are those of llama.cpp's gguf-split.
            entries += [
                u16("split.no", number),
                u16("split.count", len(groups)),
                entry("split.tensors.count", I32, len(layout.tensors)),
            ]
        name = SINGLE if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.gguf"
        files.append(_file(name, tensors, entries, layout))
    memory = max((tensor.memory for tensor in layout.tensors), default=0)
    peak = BASELINE_MEMORY + ENCODER_MEMORY + jobs * WORKER_MEMORY + memory
    return Plan(tuple(files), {}, peak, dict(inputs or {}), dict(request or {}), layout="file")


def planned_header(plan: Plan, sources: Sequence[Source], where: str) -> GGUFHeader:
    """The header of a planned GGUF output: of a set, that of its first part, which has all metadata.

    Args:
        sources: the files that ranges of the header are copied from.
        where: what to call the output in an error.
    """
    file = plan.files[0]
    by_name = {source.name: source for source in sources}
    head = b"".join(
        one.content if one.source is None else by_name[one.source].read(one.source_offset, one.nbytes)
        for one in file.head
    )
    return parse_gguf(lambda offset, length: head[offset : offset + length], file.nbytes, where)


def _groups(tensors: Sequence[Tensor], limit: int | None) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if limit is not None and groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _file(name: str, tensors: Sequence[Tensor], entries: Sequence[Entry], layout: FileLayout) -> PlannedFile:
    align = layout.alignment
    infos, places, offset = [], [], 0
    for tensor in tensors:
        infos.append(tensor_info(tensor.name, kind_of(tensor), tensor.shape, offset))
        places.append(offset)
        offset += tensor.nbytes + -tensor.nbytes % align
    head = _head([file_start(len(tensors), len(entries)), *entries, b"".join(infos)], layout.source)
    start = head[-1].offset + head[-1].nbytes
    start += -start % align
    steps = tuple(step_of(tensor, start + place) for tensor, place in zip(tensors, places, strict=True))
    return PlannedFile(name, start + offset, steps, head=head)


def _head(parts: Sequence[bytes | Entry], source: Source | None) -> tuple[Chunk, ...]:
    """Literal bytes, and ranges of the input file where several key-values in a row stand in it the same way."""
    chunks: list[Chunk] = []
    literal: list[bytes] = []
    position = 0

    def flush() -> None:
        nonlocal position
        data = b"".join(literal)
        if data:
            chunks.append(Chunk(position, len(data), base64.b64encode(data).decode()))
            position += len(data)
        literal.clear()

    for part in parts:
        if isinstance(part, bytes) or part.start is None or source is None:
            literal.append(part if isinstance(part, bytes) else part.data)
            continue
        flush()
        last = chunks[-1] if chunks else None
        if last is not None and last.source is not None and last.source_offset + last.nbytes == part.start:
            chunks[-1] = Chunk(last.offset, last.nbytes + part.nbytes, "", source.name, last.source_offset)
        else:
            chunks.append(Chunk(position, part.nbytes, "", source.name, part.start))
        position += part.nbytes
    flush()
    return tuple(chunks)
