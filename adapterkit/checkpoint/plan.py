"""The plan: what a sink will write, byte for byte, as a value.

`--dry-run` prints it, a file can hold it, and any part of it (one output file) can be executed alone, on another machine
too, and gives the same bytes. Nothing but headers is needed to make one.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.checkpoint.folder import INDEX, PIPELINE, SINGLE
from adapterkit.checkpoint.header import HASHES, build_header, with_room
from adapterkit.checkpoint.limits import cores
from adapterkit.checkpoint.listing import check_plain
from adapterkit.checkpoint.pipeline import lead_of
from adapterkit.checkpoint.plan_file import PlanStep, Steps, Tables, columns_of, to_text
from adapterkit.checkpoint.slices import Slices, from_data, to_data
from adapterkit.checkpoint.tensor import Stored
from adapterkit.dtypes import DTYPES
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.foreign import json_value
from adapterkit.places import Address
from adapterkit.values import dataclass

Place = TypeVar("Place", "Path", "Address")

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor

MOST_PLAN = 1 << 30  # bytes of a saved plan
FORMAT = 4  # of the plan file
BASELINE_MEMORY = 260_000_000  # bytes: python, torch and its libraries, as measured on Linux x86-64
WORKER_MEMORY = 16_000_000  # bytes: block buffers of one worker thread

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number (decimal units, as in huggingface_hub).

    Raises:
        UsageError: not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"'{text}' is not a size", "write it like 5GB")
    base = 1024 if found[3] else 1000
    size = int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
    if size == 0:
        raise UsageError(f"'{text}' is no size for a file", "write it like 5GB")
    return size


def default_jobs() -> int:
    """Worker threads when the user names no number: the cores this process may use, at most 8."""
    return min(8, cores())


@dataclass(frozen=True)
class Chunk:
    """Bytes of an output file beside its tensors: a range of ``source`` when that is set, else ``data`` (base64)."""

    offset: int
    nbytes: int
    data: str = ""
    source: str | None = None
    source_offset: int = 0

    @property
    def content(self) -> bytes:
        import base64

        return base64.b64decode(self.data)


@dataclass(frozen=True)
class PlannedFile:
    """One output file.

    Attributes:
        verbatim: an input file that it equals byte for byte.
        head: what stands before the tensors, in formats whose header does not follow from the steps alone.
    """

    name: str
    nbytes: int
    steps: Sequence[PlanStep]
    verbatim: str | None = None
    head: tuple[Chunk, ...] = ()

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Offset and length of what lies between the parts: padding, written as zeros."""
        if not self.head:
            return []
        found, position = [], 0
        places = [(chunk.offset, chunk.nbytes) for chunk in self.head] + [(s.offset, s.nbytes) for s in self.steps]
        for offset, nbytes in sorted(places):
            if offset > position:
                found.append((position, offset - position))
            position = offset + nbytes
        return [*found, (position, self.nbytes - position)] if self.nbytes > position else found


@dataclass(frozen=True)
class Plan:
    """Everything a sink will do.

    Attributes:
        files: the weight files, in order; each is a part that can be executed alone.
        metadata: string metadata of every weight file.
        peak_memory: bytes, estimated for ``jobs`` workers.
        inputs: fingerprint of each input file, by name.
        pins: of each small file that was read with them or is copied beside, by name; see `adapterkit.checkpoint.pins`.
        slices: what a part needs of the inputs; no byte depends on it. See `adapterkit.checkpoint.slices`.
        request: what was asked for, enough to make the same plan again.
        layout: ``folder`` when the files stand in the output folder, ``file`` when they are the output themselves.
    """

    files: tuple[PlannedFile, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    peak_memory: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    layout: str = "folder"
    pins: Mapping[str, str] = field(default_factory=dict)
    slices: Slices = field(default_factory=dict, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.nbytes for file in self.files)

    @property
    def total_size(self) -> int:
        """Bytes of the tensors alone, as an index states it."""
        return sum(step.nbytes for file in self.files for step in file.steps)

    @property
    def steps(self) -> tuple[PlanStep, ...]:
        return tuple(step for file in self.files for step in file.steps)

    @property
    def weight_map(self) -> dict[str, str]:
        return {step.tensor: file.name for file in self.files for step in file.steps}

    @property
    def index_name(self) -> str:
        """What the index of the files is called."""
        return PIPELINE + INDEX if all(file.name.startswith(PIPELINE) for file in self.files) else INDEX

    @property
    def in_folders(self) -> bool:
        """Whether the files are those of a pipeline, each in the folder of its component."""
        return any("/" in file.name for file in self.files)

    def targets(self, out: Place) -> dict[str, Place]:
        """Where the files of a plan for ``out`` end up; several of ``layout`` file are numbered before the suffix."""
        names = [file.name for file in self.files]
        if self.layout == "folder":
            return {name: out / name for name in names}
        if len(names) == 1:
            return {names[0]: out}
        count = len(names)
        return {
            name: out.with_name(f"{out.stem}-{i:05d}-of-{count:05d}{out.suffix}") for i, name in enumerate(names, 1)
        }

    def names(self, out: Path | Address | None) -> tuple[str, ...]:
        """What the files are called where they end up."""
        if out is None:
            return tuple(file.name for file in self.files)
        if isinstance(out, Address):
            return tuple(place.name for place in self.targets(out).values())
        return tuple(path.name for path in self.targets(out).values())

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the output bytes; how many workers there are does not."""
        import hashlib

        said = json.dumps({**self._data(), "peak_memory": 0}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(said.encode()).hexdigest()

    def header(self, file: PlannedFile) -> bytes:
        lead = lead_of(file.name)
        return build_header(
            [(s.tensor.removeprefix(lead), DTYPES[s.dtype], s.shape) for s in file.steps], self.metadata
        )[0]

    def to_json(self) -> str:
        """The plan file; `adapterkit.checkpoint.plan_file` says what is in it.

        Raises:
            UsageError: it would name a file whose name is not UTF-8.
        """
        text = to_text({**self._data(), "slices": to_data(self.slices)})
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UsageError("a plan names its inputs, and the name of one is not UTF-8", "rename it") from None
        return text

    def _data(self) -> dict[str, Any]:
        tables, columns = columns_of([file.steps for file in self.files])
        files = [
            {
                "name": file.name,
                "nbytes": file.nbytes,
                "verbatim": file.verbatim,
                "head": [asdict(chunk) for chunk in file.head],
                **of_file,
            }
            for file, of_file in zip(self.files, columns, strict=True)
        ]
        return {
            "format": self.format,
            "layout": self.layout,
            "peak_memory": self.peak_memory,
            "metadata": dict(self.metadata),
            "request": dict(self.request),
            "inputs": dict(self.inputs),
            "pins": dict(self.pins),
            **tables,
            "files": files,
        }

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan file.

        Raises:
            CheckpointError: not one, or of another format.
            UnsafeError: a file that it would write lies outside of the target.
        """
        try:
            data = json_value(text)
            if data["format"] != FORMAT:
                raise CheckpointError(f"the plan has format {data['format']}, not {FORMAT}", "make it again")
            tables = Tables(data["kinds"], data["sources"])
            files = tuple(
                PlannedFile(
                    _checked(file["name"]),
                    int(file["nbytes"]),
                    Steps(file, tables),
                    file["verbatim"],
                    tuple(Chunk(**chunk) for chunk in file["head"]),
                )
                for file in data["files"]
            )
            maps = [dict(data[name]) for name in ("metadata", "inputs", "request", "pins")]
            peak, layout = int(data["peak_memory"]), str(data["layout"])
            return cls(files, maps[0], peak, maps[1], maps[2], FORMAT, layout, maps[3], from_data(data["slices"]))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"this is not a plan file ({error!r})", f"write one with {option('save_plan')}"
            ) from None


def read_plan(place: str | Path | Address) -> Plan:
    """The plan in a file, here or in a store.

    Raises:
        NotFound: there is no such file.
        CheckpointError, UnsafeError: see `Plan.from_json`.
        OutputError, UsageError, AuthError, StoreError: see `adapterkit.stores.files.brought`.
    """
    from adapterkit.disk import read_regular
    from adapterkit.stores.files import brought

    return Plan.from_json(read_regular(brought(place), MOST_PLAN, str(place)))


def _checked(name: str) -> str:
    """The name of an output file: plain, or in the folder of a pipeline's component."""
    folder, slash, file = str(name).partition("/")
    for part in (folder, file) if slash else (folder,):
        check_plain(part, "the plan")
    return name


def plan_safetensors(
    view: Checkpoint,
    *,
    max_shard_size: int | None = None,
    jobs: int = 2,
    inputs: Mapping[str, str] | None = None,
    request: Mapping[str, Any] | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Plan safetensors output of a view: its own sharding, or shards of at most ``max_shard_size`` bytes.

    Args:
        like: tensors as they lie in the files of an input: where an output file holds tensors of the same names, dtypes
            and shapes as one of those, it gets that file's header and order.
    """
    metadata = with_room({**view.metadata, "format": view.metadata.get("format", "pt")})
    if max_shard_size is not None and any("/" in file for file in view.shards.values()):
        raise UsageError("a pipeline keeps the shards of its components", f"leave out {option('max_shard_size')}")
    groups = _own_shards(view) if max_shard_size is None else _packed_shards(view, max_shard_size)
    files = tuple(_plan_file(name, tensors, metadata, like or {}) for name, tensors in groups)
    memory = max((tensor.memory for tensor in view.values()), default=0)
    peak = BASELINE_MEMORY + jobs * WORKER_MEMORY + memory
    return Plan(files, metadata, peak, dict(inputs or {}), dict(request or {}))


def plan_file(name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> Plan:
    """Plan one safetensors file of small tensors, such as an adapter's."""
    memory = BASELINE_MEMORY + WORKER_MEMORY + max((tensor.memory for tensor in tensors), default=0)
    metadata = with_room(metadata)
    return Plan((_plan_file(name, tensors, metadata),), metadata, memory, {}, {})


def _own_shards(view: Checkpoint) -> list[tuple[str, list[Tensor]]]:
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in view.items():
        groups.setdefault(view.shards[name], []).append(tensor)
    if len(groups) == 1 and "/" not in next(iter(groups)):
        return [(_lead(view) + SINGLE, next(iter(groups.values())))]
    return list(groups.items())


def _lead(view: Checkpoint) -> str:
    """What stands before ``model`` in the names of weight files: the models of diffusers name their class themselves."""
    return PIPELINE if "_class_name" in view.config else ""


def _packed_shards(view: Checkpoint, limit: int) -> list[tuple[str, list[Tensor]]]:
    """Shards as huggingface_hub's ``split_state_dict_into_shards_factory`` makes them: filled in order, and a tensor that is
    larger than the limit in a file of its own, without closing the one being filled."""
    groups: list[list[Tensor]] = []
    filling: list[Tensor] = []
    filled = 0
    for tensor in view.values():
        if tensor.nbytes > limit:
            groups.append([tensor])
            continue
        if filled + tensor.nbytes > limit:
            groups.append(filling)
            filling, filled = [], 0
        filling.append(tensor)
        filled += tensor.nbytes
    if filling:
        groups.append(filling)
    if len(groups) == 1:
        return [(_lead(view) + SINGLE, groups[0])]
    count = len(groups)
    return [(f"{_lead(view)}model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _plan_file(
    name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str], like: Mapping[str, Tensor] | None = None
) -> PlannedFile:
    source = _unchanged_file(tensors)
    if source is not None:
        steps = tuple(step_of(tensor, tensor.extent.offset) for tensor in tensors if tensor.extent is not None)
        return PlannedFile(name, source.size, steps, verbatim=source.name)
    stated = metadata.keys() & HASHES.keys()  # of the bytes of that file, which are others here
    again = _same_header(tensors, like) if like and not stated else None
    if again is not None:
        found, places = again
        steps = tuple(step_of(tensor, places[tensor.name]) for tensor in tensors)
        start = 8 + int.from_bytes(found.read(0, 8), "little")
        head = Chunk(0, start, source=found.name)
        return PlannedFile(name, found.size, steps, head=(head,))
    lead = lead_of(name)
    header, offsets = build_header([(t.name.removeprefix(lead), t.dtype, t.shape) for t in tensors], metadata)
    steps = tuple(step_of(tensor, offsets[tensor.name.removeprefix(lead)]) for tensor in tensors)
    return PlannedFile(name, steps[-1].offset + steps[-1].nbytes if steps else len(header), steps)


def _unchanged_file(tensors: Sequence[Tensor]) -> Source | None:
    """The input file that holds exactly these tensors under these names, so that it can be kept, header and all."""
    sources = {tensor.source for tensor in tensors if isinstance(tensor, Stored)}
    if len(sources) != 1 or not all(isinstance(tensor, Stored) for tensor in tensors):
        return None
    source = sources.pop()
    data_start = 8 + int.from_bytes(source.read(0, 8), "little")
    return source if data_start + sum(tensor.nbytes for tensor in tensors) == source.size else None


def _same_header(tensors: Sequence[Tensor], like: Mapping[str, Tensor]) -> tuple[Source, dict[str, int]] | None:
    """The input file whose header says what that of these tensors would say, and where each tensor lies in it."""
    there = [like.get(tensor.name) for tensor in tensors]
    held = [tensor for tensor in there if isinstance(tensor, Stored)]
    sources = {tensor.source for tensor in held}
    if len(sources) != 1 or len(held) != len(tensors):
        return None
    if any(one.dtype is not other.dtype or one.shape != other.shape for one, other in zip(tensors, held, strict=True)):
        return None
    source = sources.pop()
    start = 8 + int.from_bytes(source.read(0, 8), "little")
    if start + sum(tensor.nbytes for tensor in held) != source.size:
        return None
    return source, {tensor.name: tensor.offset for tensor in held}


def step_of(tensor: Tensor, offset: int) -> PlanStep:
    """The step that puts ``tensor`` at ``offset`` of its file."""
    if type(tensor) is Stored:  # most are, and a large model has many
        nbytes = tensor.nbytes
        place = (tensor.source.name, tensor.offset)
        return PlanStep(tensor.name, tensor.dtype.code, tensor.shape, offset, nbytes, "copy", nbytes, *place)
    extent = tensor.extent
    place_of = (None, 0) if extent is None else (extent.source.name, extent.offset)
    about = (tensor.name, tensor.dtype.code, tensor.shape, offset, tensor.nbytes, tensor.how, tensor.reads)
    return PlanStep(*about, *place_of)
